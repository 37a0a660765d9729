//! What one would do without gradients.

use super::numbers::choose;
use super::{Generator, Reno, RenoConfig, RewardLoss};
use crate::error::{check, Error};
use crate::Result;
use candle_core::Tensor;
use flows::Condition;
use tensor_core::random::RandomStream;

/// The best of several draws.
#[derive(Debug, Clone)]
pub struct BestOf {
    /// The noise of the best samples.
    pub z: Tensor,
    /// The best samples.
    pub sample: Tensor,
    /// Their weighted losses.
    pub loss: Vec<f64>,
}

/// What one would do without gradients: for each row, the best of `n` independent draws.
///
/// # Errors
/// [`Error::InvalidConfig`] for `n = 0`; those of generator and rewards; [`Error::NonFinite`] for a
/// row none of whose draws has a loss.
pub fn best_of_n(
    generator: &dyn Generator,
    rewards: &[(f64, &dyn RewardLoss)],
    like: &Tensor,
    condition: &Condition,
    n: usize,
    rng: &mut RandomStream,
) -> Result<BestOf> {
    check::require(n > 0, "best_of_n::n", n, "at least 1")?;
    let config = RenoConfig {
        iters: 1,
        reg_weight: 0.0,
        ..RenoConfig::default()
    };
    let reno = Reno::new(generator, rewards.to_vec(), config)?;
    let mut best: Option<BestOf> = None;
    for _ in 0..n {
        let z = rng.normal(0.0, 1.0, like.shape(), like.dtype(), like.device())?;
        let condition = condition.for_rows(like.dims().first().copied().unwrap_or(0))?;
        let found = reno.evaluate(&z, &condition)?;
        best = Some(match best {
            None => BestOf {
                z,
                sample: found.sample,
                loss: found.loss,
            },
            Some(old) => {
                let pairs = found.loss.iter().zip(&old.loss);
                let better: Vec<bool> = pairs.map(|(a, b)| a < b || b.is_nan()).collect();
                let loss = (0..better.len())
                    .map(|i| {
                        if better[i] {
                            found.loss[i]
                        } else {
                            old.loss[i]
                        }
                    })
                    .collect();
                BestOf {
                    z: choose(&better, &z, &old.z)?,
                    sample: choose(&better, &found.sample, &old.sample)?,
                    loss,
                }
            }
        });
    }
    let best = best.ok_or_else(|| Error::argument("n", n, "at least 1"))?;
    match best.loss.iter().position(|l| !l.is_finite()) {
        None => Ok(best),
        Some(row) => Err(Error::NonFinite {
            rule: "best of n",
            what: format!("every loss of row {row}"),
            step: n,
        }),
    }
}

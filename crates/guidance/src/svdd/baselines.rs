//! What one would do without the decoder.

use super::{choose, decode, numbers, row_streams, Batch, ReverseKernel, Reward, Value};
use crate::error::{check, Error};
use crate::Result;
use tensor_core::random::RandomStream;

/// The best of several finished samples.
#[derive(Debug, Clone)]
pub struct BestOf<S> {
    /// The best sample of each slot.
    pub states: S,
    /// Its reward.
    pub rewards: Vec<f64>,
    /// Judgements of the reward.
    pub reward_calls: usize,
    /// Slots none of whose samples had a reward.
    pub unscored: usize,
}

/// Draws `slots * n` samples and keeps the best `n`-th of them, one of `n` for each slot.
///
/// # Errors
/// [`Error::InvalidArgument`] for no slots or no samples; those of kernel and reward.
pub fn best_of_n<K: ReverseKernel>(
    kernel: &K,
    reward: &dyn Reward<K::State>,
    slots: usize,
    n: usize,
    rng: &RandomStream,
) -> Result<BestOf<K::State>> {
    let states = decode::sample(kernel, slots * n, rng)?;
    let values = numbers(&reward.reward(&states)?, slots * n, "the rewards")?;
    let choice = choose(&values, n, 0.0, &[])?;
    let rows: Vec<u32> = (0u32..)
        .zip(&choice.index)
        .map(|(slot, j)| slot * n as u32 + j)
        .collect();
    Ok(BestOf {
        states: states.take(&rows)?,
        rewards: rows.iter().map(|row| values[*row as usize]).collect(),
        reward_calls: slots * n,
        unscored: choice.unscored,
    })
}

/// Sequential Monte Carlo: all samples of the batch are one population, weighted by
/// `exp((v_after - v_before) / alpha)` and resampled when the effective sample size falls. Right in
/// the limit of many samples; in a small batch few ancestors survive.
pub struct SmcSampler<'a, K: ReverseKernel> {
    /// The model.
    pub kernel: &'a K,
    /// The value of states.
    pub value: &'a dyn Value<K::State>,
    /// The temperature, in units of the value.
    pub alpha: f64,
    /// Resamples when the effective sample size is below this part of the samples; 1 always.
    pub threshold: f64,
}

/// What [`SmcSampler::sample`] gives.
#[derive(Debug, Clone)]
pub struct SmcOutput<S> {
    /// The finished samples, with equal weights.
    pub states: S,
    /// How many of the first states have a descendant among them.
    pub ancestors: usize,
    /// How often the population was resampled.
    pub resamplings: usize,
    /// Judgements of the reward.
    pub reward_calls: usize,
}

impl<K: ReverseKernel> SmcSampler<'_, K> {
    /// Samples a population of `n`.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`]; [`Error::InvalidArgument`] for `n = 0`; [`Error::NonFinite`] when
    /// no member has a value; those of kernel and value.
    pub fn sample(&self, n: usize, rng: &RandomStream) -> Result<SmcOutput<K::State>> {
        check::positive("SmcSampler::alpha", self.alpha)?;
        let part = (0.0..=1.0).contains(&self.threshold);
        let words = "a number in [0, 1]";
        check::require(part, "SmcSampler::threshold", self.threshold, words)?;
        if n == 0 {
            return Err(Error::argument("n", n, "at least one sample"));
        }
        let mut x = self
            .kernel
            .init(&mut row_streams(&rng.split("start"), 0, n))?;
        let mut draws = row_streams(rng, 0, n);
        let mut picks = rng.split("resample");
        let mut lineage: Vec<u32> = (0..n as u32).collect();
        let (mut before, mut log_weights) = (vec![0.0; n], vec![0.0; n]);
        let (mut resamplings, mut reward_calls) = (0, 0);
        let steps = self.kernel.steps();
        for step in 0..steps {
            x = self.kernel.propose(&x, step, 1, &mut draws)?;
            let after = self.value.value(&x, step + 1)?;
            let after = numbers(&after, n, "the values of the population")?;
            reward_calls += self.value.reward_calls(n);
            for ((w, new), old) in log_weights.iter_mut().zip(&after).zip(&before) {
                let gain = (new - old) / self.alpha;
                *w = if gain.is_nan() {
                    f64::NEG_INFINITY
                } else {
                    *w + gain
                };
            }
            let weights = normalized(&log_weights, step)?;
            let effective = 1.0 / weights.iter().map(|w| w * w).sum::<f64>();
            before = after;
            if effective < self.threshold * n as f64 || step + 1 == steps {
                let rows = systematic(&weights, picks.next_uniform());
                x = x.take(&rows)?;
                before = rows.iter().map(|r| before[*r as usize]).collect();
                lineage = rows.iter().map(|r| lineage[*r as usize]).collect();
                log_weights = vec![0.0; n];
                resamplings += 1;
            }
        }
        lineage.sort_unstable();
        lineage.dedup();
        Ok(SmcOutput {
            states: self.kernel.finish(x)?,
            ancestors: lineage.len(),
            resamplings,
            reward_calls,
        })
    }
}

fn normalized(log_weights: &[f64], step: usize) -> Result<Vec<f64>> {
    let top = log_weights
        .iter()
        .copied()
        .fold(f64::NEG_INFINITY, f64::max);
    if !top.is_finite() {
        return Err(Error::NonFinite {
            rule: "SMC",
            what: "the value of every sample".into(),
            step,
        });
    }
    let weights: Vec<f64> = log_weights.iter().map(|w| (w - top).exp()).collect();
    let total: f64 = weights.iter().sum();
    Ok(weights.iter().map(|w| w / total).collect())
}

/// As many rows as weights, each `floor` or `ceil` of its expected number of times.
fn systematic(weights: &[f64], uniform: f64) -> Vec<u32> {
    let n = weights.len();
    let (mut row, mut sum) = (0, weights[0]);
    let mut rows = Vec::with_capacity(n);
    for k in 0..n {
        let at = (k as f64 + uniform) / n as f64;
        while sum < at && row + 1 < n {
            row += 1;
            sum += weights[row];
        }
        rows.push(row as u32);
    }
    rows
}

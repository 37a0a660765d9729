//! Gradients over micro-batches.

use crate::accumulate::Sums;
use crate::closure::loss_value;
use crate::error::check;
use crate::gradients::Gradients;
use crate::{Error, Result};
use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};

/// Configuration of [`GhostAccumulator`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GhostAccumulatorConfig {
    /// Global norm that the averaged gradient is clipped to; `None` for no clipping.
    pub max_norm: Option<f64>,
}

impl Default for GhostAccumulatorConfig {
    fn default() -> Self {
        Self {
            max_norm: Some(5.0),
        }
    }
}

impl GhostAccumulatorConfig {
    /// # Errors
    /// [`Error::InvalidConfig`] for a clip that is not positive.
    pub fn validate(&self) -> Result<()> {
        self.max_norm.map_or(Ok(()), |norm| {
            check::positive("GhostAccumulatorConfig::max_norm", norm)
        })
    }
}

/// One large-batch gradient from many small ones.
#[derive(Debug)]
pub struct GhostStep {
    /// Mean of the micro-batches' losses.
    pub loss: f64,
    /// The averaged, clipped gradients.
    pub grads: GradStore,
    /// Global norm of the averaged gradient before clipping.
    pub norm: f64,
}

/// Runs one forward and backward pass per ghost batch and averages the gradients: the low-memory
/// way to train with large batches, and the official one for ghost batch normalization. For
/// batches of equal size the result is the gradient of the mean loss over all of them, with a
/// normalization layer seeing each ghost batch alone.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use thalweg_optim::large_batch::{GhostAccumulator, GhostAccumulatorConfig};
///
/// let w = Var::new(&[1f64, 2.0], &Device::Cpu)?;
/// let x = Tensor::new(&[[1f64, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, 0.0]], &Device::Cpu)?;
/// let mut ghost = GhostAccumulator::new(vec![w.clone()], GhostAccumulatorConfig::default())?;
/// let step = ghost.run(2, |i| {
///     let part = x.narrow(0, 2 * i, 2)?;
///     part.matmul(&w.unsqueeze(1)?)?.mean_all()
/// })?;
/// let grad = step.grads.get(&w).unwrap().to_vec1::<f64>()?;
/// assert_eq!(grad, [1.0, 0.5]);
/// # Ok::<(), thalweg_optim::Error>(())
/// ```
#[derive(Debug)]
pub struct GhostAccumulator {
    config: GhostAccumulatorConfig,
    params: Vec<(String, Var)>,
    sums: Sums,
}

impl GhostAccumulator {
    /// An accumulator for these variables.
    ///
    /// # Errors
    /// Those of [`GhostAccumulatorConfig::validate`]; an error for integer variables.
    pub fn new(vars: Vec<Var>, config: GhostAccumulatorConfig) -> Result<Self> {
        config.validate()?;
        let params = crate::param_group::numbered(vars);
        Ok(Self {
            sums: Sums::new(&params)?,
            config,
            params,
        })
    }

    /// Differentiates the mean loss of each of `chunks` micro-batches, averages, clips.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for no chunks, [`Error::NonFiniteLoss`] for a loss that is NaN
    /// or infinite, [`Error::NonFiniteGradient`] when the averaged gradient is; those of `loss`.
    pub fn run(
        &mut self,
        chunks: usize,
        mut loss: impl FnMut(usize) -> candle_core::Result<Tensor>,
    ) -> Result<GhostStep> {
        if chunks == 0 {
            return Err(Error::argument("chunks", chunks, "at least 1"));
        }
        self.sums.clear();
        let mut total = 0.0;
        for i in 0..chunks {
            let value = loss(i)?;
            total += loss_value(&value, format!("the loss of micro-batch {i}"))?;
            let store = value.backward()?;
            self.sums
                .add(&Gradients::collect(&self.params, &store), 1.0)?;
        }
        let mut sums = GradStore::default();
        for (i, (_, var)) in self.params.iter().enumerate() {
            if let Some(sum) = self.sums.get(i) {
                sums.insert(var, sum);
            }
        }
        let averaged = Gradients::collect(&self.params, &sums);
        let bad = averaged.nonfinite()?;
        if !bad.is_empty() {
            let names = bad.iter().map(|(name, _)| name.to_string()).collect();
            return Err(Error::NonFiniteGradient(names));
        }
        let squares: f64 = averaged.squares()?.iter().map(|m| m.gg).sum();
        let norm = squares.sqrt() / chunks as f64;
        let clip = self
            .config
            .max_norm
            .map_or(1.0, |max| clip_factor(norm, max));
        let factor = clip / chunks as f64;
        let mut grads = GradStore::default();
        for (_, var) in &self.params {
            if let Some(sum) = sums.get(var) {
                grads.insert(var, sum.affine(factor, 0.0)?);
            }
        }
        Ok(GhostStep {
            loss: total / chunks as f64,
            grads,
            norm,
        })
    }
}

/// `min(1, max / norm)`.
pub(crate) fn clip_factor(norm: f64, max: f64) -> f64 {
    if norm > max {
        max / norm
    } else {
        1.0
    }
}

//! Configuration of ghost batch normalization.

use crate::norm::layer::check_eps;
use crate::{Error, Result};

/// What to do with a batch that is not a multiple of the ghost size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Remainder {
    /// As many groups as fit, the first ones larger by one example: no group is below the ghost
    /// size unless the batch is.
    #[default]
    Balanced,
    /// Equal groups of `ceil(batch / k)`, the last one smaller (it may hold one example): what the
    /// published training script does.
    Official,
    /// An error, unless the batch is a multiple or less than two ghost batches.
    Strict,
}

/// How the running statistics take in the groups of one batch. Both give the same numbers up to
/// rounding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RunningUpdate {
    /// One group after the other: `R <- (1 - q) R + q S_j`.
    #[default]
    Sequential,
    /// At once: `R <- (1 - q)^k R + sum_j q (1 - q)^(k - j) S_j`.
    Closed,
}

/// Configuration of [`GhostBatchNorm`](super::GhostBatchNorm).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GhostBatchNormConfig {
    /// Examples per group in training. Larger than half the batch is ordinary batch norm.
    pub ghost_size: usize,
    /// Weight `q` of a group's statistics in the running ones (candle's and torch's convention).
    pub momentum: f64,
    /// Added to the variance under the square root.
    pub eps: f64,
    /// Have a trained weight and bias.
    pub affine: bool,
    /// Subtract the mean; without it the "variance" is the second moment.
    pub remove_mean: bool,
    /// What to do with an incomplete group.
    pub remainder: Remainder,
    /// How the running statistics take in the groups.
    pub update: RunningUpdate,
}

impl Default for GhostBatchNormConfig {
    fn default() -> Self {
        Self {
            ghost_size: 128,
            momentum: 0.1,
            eps: 1e-5,
            affine: true,
            remove_mean: true,
            remainder: Remainder::Balanced,
            update: RunningUpdate::Sequential,
        }
    }
}

impl GhostBatchNormConfig {
    /// Ordinary batch norm: one group, whatever the batch.
    pub fn batch_norm() -> Self {
        Self {
            ghost_size: usize::MAX,
            ..Self::default()
        }
    }

    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`].
    pub fn validate(&self) -> Result<()> {
        if self.ghost_size == 0 {
            let field = "GhostBatchNormConfig::ghost_size";
            return Err(Error::config(field, 0, "at least 1"));
        }
        if !(0.0..=1.0).contains(&self.momentum) {
            let field = "GhostBatchNormConfig::momentum";
            return Err(Error::config(field, self.momentum, "a number in [0, 1]"));
        }
        check_eps("GhostBatchNormConfig::eps", self.eps)
    }
}

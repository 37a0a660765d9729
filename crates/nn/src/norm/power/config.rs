//! Configuration of power normalization.

use crate::norm::layer::check_eps;
use crate::{Error, Result};

/// What the backward pass divides by after warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum BackwardDenominator {
    /// `sqrt(q + eps)` with the quadratic mean `q` of the batch at hand: what the published
    /// implementation does.
    #[default]
    BatchQuadraticMean,
    /// `sqrt(d + eps)` with the denominator of the forward pass, which after warm-up is the
    /// running quadratic mean `psi^(t-1)`: the paper's Algorithm 2.
    RunningQuadraticMean,
}

/// Where the time axis of a three-dimensional input is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SequenceLayout {
    /// `(T, B, C)`.
    #[default]
    TimeFirst,
    /// `(B, T, C)`.
    BatchFirst,
}

/// Configuration of [`PowerNorm`](super::PowerNorm).
#[derive(Debug, Clone, PartialEq)]
pub struct PowerNormConfig {
    /// Added to the quadratic mean under the square root.
    pub eps: f64,
    /// Weight of the old running quadratic mean in the forward pass, the paper's `alpha_fwd`.
    pub alpha_fwd: f64,
    /// `1 - alpha_bkw` is the weight of the running `ema_gz` in the gradient.
    pub alpha_bkw: f64,
    /// Training steps in which the forward pass divides by the batch's own quadratic mean.
    pub warmup_iters: u64,
    /// Groups of channels that are scaled together, per token; the paper takes the attention
    /// heads.
    pub groups: usize,
    /// Scale each token's groups to second moment 1 first. Part of the published layer, also with
    /// one group: without it users saw NaN after some thousand steps.
    pub group_scaling: bool,
    /// What the backward pass divides by.
    pub denominator: BackwardDenominator,
    /// Bounds the second moment `Gamma` of the normalised batch where it enters the update of
    /// `ema_gz`. That update multiplies by `1 - (1 - alpha_bkw) Gamma` and explodes for `Gamma`
    /// above `2 / (1 - alpha_bkw)`; a bound below it keeps it contracting. None: as published.
    pub max_gamma: Option<f64>,
    /// Refuse a batch or gradient that would put NaN or infinity into the running statistics; on
    /// a device this waits for it once per pass. The state stays as it was.
    pub check_finite: bool,
    /// Layout of three-dimensional inputs; `(N, C)` is taken as `N` rows under either.
    pub layout: SequenceLayout,
}

impl Default for PowerNormConfig {
    fn default() -> Self {
        Self {
            eps: 1e-5,
            alpha_fwd: 0.9,
            alpha_bkw: 0.9,
            warmup_iters: 10_000,
            groups: 1,
            group_scaling: true,
            denominator: BackwardDenominator::BatchQuadraticMean,
            max_gamma: None,
            check_finite: true,
            layout: SequenceLayout::TimeFirst,
        }
    }
}

/// The largest step count that the f32 counter among the layer's buffers holds exactly.
pub(super) const MAX_ITERS: u64 = 1 << 24;

impl PowerNormConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`].
    pub fn validate(&self) -> Result<()> {
        check_eps("PowerNormConfig::eps", self.eps)?;
        let momenta = [
            ("PowerNormConfig::alpha_fwd", self.alpha_fwd),
            ("PowerNormConfig::alpha_bkw", self.alpha_bkw),
        ];
        for (field, alpha) in momenta {
            if !(0.0..=1.0).contains(&alpha) {
                return Err(Error::config(field, alpha, "a number in [0, 1]"));
            }
        }
        if self.warmup_iters > MAX_ITERS {
            let field = "PowerNormConfig::warmup_iters";
            let expected = format!("at most {MAX_ITERS}");
            return Err(Error::config(field, self.warmup_iters, expected));
        }
        if self.groups == 0 {
            return Err(Error::config("PowerNormConfig::groups", 0, "at least 1"));
        }
        match self.max_gamma {
            Some(bound) if !(bound.is_finite() && bound > 0.0) => Err(Error::config(
                "PowerNormConfig::max_gamma",
                bound,
                "a finite number > 0",
            )),
            _ => Ok(()),
        }
    }
}

//! Configuration of [`Sso`](super::Sso).

use crate::error::check;
use crate::{Error, Result};

/// How far the model's new outputs are from the old ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Divergence {
    /// Squared distance.
    #[default]
    Euclidean,
    /// Kullback-Leibler divergence of `softmax` of the outputs; the loss is then a function of
    /// probabilities.
    Kl,
    /// Squared distance in the metric of AdaGrad: each target coordinate weighted by the root of
    /// its summed squared gradients. Needs the same batch in every outer step.
    DiagonalAdaptive,
}

/// How the step size changes with the outer step `t = 1, 2, ...`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum StepSchedule {
    /// `eta`
    #[default]
    Constant,
    /// `eta / sqrt(t)`
    InvSqrt,
    /// `eta (1/total)^(t/total)`
    Exponential {
        /// Number of outer steps within which the step size falls by the factor `total`.
        total: usize,
    },
}

/// Adaptation of the step size to the target gradients seen so far, as in AdaGrad.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Adaptive {
    /// None.
    #[default]
    None,
    /// `1 / (sqrt(sum |g|^2) / eta + 1e-6)`
    Scalar,
    /// The same per target coordinate, in the Euclidean metric. Needs the same batch in every
    /// outer step.
    Diagonal,
}

/// What the loss is, and what `eta` means; see the [module](super) page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Normalization {
    /// The paper's: the loss is the mean over the batch.
    #[default]
    Paper,
    /// The authors' code's: the loss is the sum over the batch.
    Official,
}

/// Search for the step size in the space of targets (SSO-SLS): first
/// `eta <- expand eta`, then `eta <- shrink eta` until
/// `l(z - eta g) <= l(z) - c eta |g|^2`. Costs values of the loss, no model call.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ArmijoTarget {
    /// Fraction of the predicted decrease that must come true, in (0, 1).
    pub c: f64,
    /// Factor after a failure, in (0, 1).
    pub shrink: f64,
    /// Factor before the search, at least 1.
    pub expand: f64,
    /// Most failures.
    pub max_tries: usize,
    /// Smallest step size.
    pub min_step: f64,
    /// Largest step size.
    pub max_step: f64,
}

impl Default for ArmijoTarget {
    fn default() -> Self {
        Self {
            c: 0.5,
            shrink: 0.9,
            expand: 1.8,
            max_tries: 100,
            min_step: 1e-4,
            max_step: 1e4,
        }
    }
}

impl ArmijoTarget {
    /// # Errors
    /// [`Error::InvalidConfig`] naming the first value that makes no sense.
    pub fn validate(&self) -> Result<()> {
        let open = |x: f64| x > 0.0 && x < 1.0;
        let in_open = "a number in (0, 1)";
        check::require(open(self.c), "ArmijoTarget::c", self.c, in_open)?;
        check::require(
            open(self.shrink),
            "ArmijoTarget::shrink",
            self.shrink,
            in_open,
        )?;
        check::require(
            self.expand.is_finite() && self.expand >= 1.0,
            "ArmijoTarget::expand",
            self.expand,
            "a finite number >= 1",
        )?;
        check::at_least_one("ArmijoTarget::max_tries", self.max_tries)?;
        check::positive("ArmijoTarget::min_step", self.min_step)?;
        check::require(
            self.max_step.is_finite() && self.max_step >= self.min_step,
            "ArmijoTarget::max_step",
            self.max_step,
            "a finite number >= min_step",
        )
    }
}

/// Configuration of [`Sso`](super::Sso).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SsoConfig {
    /// `eta`: how far the targets move. Safe up to `1/L`; for cross entropy in logits `L = 1/2`.
    /// With `Normalization::Official` it is `1/eta_o` of the authors' code.
    pub step_size: f64,
    /// `m`: steps on each surrogate.
    pub inner_steps: usize,
    /// The distance in the surrogate.
    pub divergence: Divergence,
    /// How the step size changes with time.
    pub schedule: StepSchedule,
    /// Search for the step size by values of the loss.
    pub target_search: Option<ArmijoTarget>,
    /// Adaptation of the step size by past gradients.
    pub adaptive: Adaptive,
    /// The convention for loss and step size.
    pub normalization: Normalization,
    /// Inner steps stop where the norm of the surrogate's gradient in the parameters is at most
    /// this.
    pub stop_grad_norm: f64,
    /// Evaluate the loss once more after the inner steps, for
    /// [`SsoReport::decrease_ratio`](super::SsoReport::decrease_ratio).
    pub measure_decrease: bool,
}

impl Default for SsoConfig {
    fn default() -> Self {
        Self {
            step_size: 1.0,
            inner_steps: 10,
            divergence: Divergence::Euclidean,
            schedule: StepSchedule::Constant,
            target_search: None,
            adaptive: Adaptive::None,
            normalization: Normalization::Paper,
            stop_grad_norm: 1e-6,
            measure_decrease: false,
        }
    }
}

impl SsoConfig {
    /// # Errors
    /// [`Error::InvalidConfig`] naming the first value or combination that makes no sense.
    pub fn validate(&self) -> Result<()> {
        check::positive("SsoConfig::step_size", self.step_size)?;
        check::at_least_one("SsoConfig::inner_steps", self.inner_steps)?;
        check::non_negative("SsoConfig::stop_grad_norm", self.stop_grad_norm)?;
        if let StepSchedule::Exponential { total } = self.schedule {
            check::at_least_one("StepSchedule::Exponential::total", total)?;
        }
        let euclidean = self.divergence == Divergence::Euclidean;
        if let Some(search) = &self.target_search {
            search.validate()?;
            let plain = euclidean
                && self.adaptive == Adaptive::None
                && self.schedule == StepSchedule::Constant;
            check::require(
                plain,
                "SsoConfig::target_search",
                search,
                "Euclidean divergence, no adaptation and a constant schedule beside it",
            )?;
        }
        let diagonal = self.adaptive == Adaptive::Diagonal;
        if diagonal && !euclidean
            || self.divergence == Divergence::DiagonalAdaptive && self.adaptive != Adaptive::None
        {
            return Err(Error::config(
                "SsoConfig::adaptive",
                self.adaptive,
                format!("None with {:?}", self.divergence),
            ));
        }
        Ok(())
    }

    /// Whether squared gradients are summed per target coordinate.
    pub(super) fn sums_coordinates(&self) -> bool {
        self.adaptive == Adaptive::Diagonal || self.divergence == Divergence::DiagonalAdaptive
    }

    /// The step size of outer step `t = 1, 2, ...` before any adaptation.
    pub(super) fn scheduled(&self, t: usize) -> f64 {
        let t = t as f64;
        match self.schedule {
            StepSchedule::Constant => self.step_size,
            StepSchedule::InvSqrt => self.step_size / t.sqrt(),
            StepSchedule::Exponential { total } => {
                let total = total as f64;
                self.step_size * (1.0 / total).powf(t / total)
            }
        }
    }
}

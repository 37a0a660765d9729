//! The plain schedules: constant, steps, and smooth decays.

use super::{cosine_between, linear_between, progress, Schedule};
use crate::error::check;
use crate::{Error, Result};

/// The same value at every step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Constant(f64);

impl Constant {
    /// # Errors
    /// [`Error::InvalidConfig`] for a value that is not finite.
    pub fn new(value: f64) -> Result<Self> {
        check::finite("Constant::value", value)?;
        Ok(Self(value))
    }
}

impl Schedule for Constant {
    fn at(&self, _: usize) -> f64 {
        self.0
    }
}

/// `initial * gamma^floor(step / every)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step {
    initial: f64,
    every: usize,
    gamma: f64,
}

impl Step {
    /// Multiplies by `gamma` every `every` steps.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for `every = 0`, a negative or non-finite `initial` or `gamma`.
    pub fn new(initial: f64, every: usize, gamma: f64) -> Result<Self> {
        check::non_negative("Step::initial", initial)?;
        check::at_least_one("Step::every", every)?;
        check::non_negative("Step::gamma", gamma)?;
        Ok(Self {
            initial,
            every,
            gamma,
        })
    }
}

impl Schedule for Step {
    fn at(&self, step: usize) -> f64 {
        self.initial * power(self.gamma, step / self.every)
    }
}

/// `initial * gamma^(number of milestones <= step)`.
#[derive(Debug, Clone, PartialEq)]
pub struct MultiStep {
    initial: f64,
    milestones: Vec<usize>,
    gamma: f64,
}

impl MultiStep {
    /// Multiplies by `gamma` at each milestone.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] unless the milestones increase strictly, and for a negative or
    /// non-finite `initial` or `gamma`.
    pub fn new(initial: f64, milestones: impl Into<Vec<usize>>, gamma: f64) -> Result<Self> {
        let milestones = milestones.into();
        check::non_negative("MultiStep::initial", initial)?;
        check::non_negative("MultiStep::gamma", gamma)?;
        if !milestones.windows(2).all(|pair| pair[0] < pair[1]) {
            return Err(Error::config(
                "MultiStep::milestones",
                &milestones,
                "strictly increasing steps",
            ));
        }
        Ok(Self {
            initial,
            milestones,
            gamma,
        })
    }
}

impl Schedule for MultiStep {
    fn at(&self, step: usize) -> f64 {
        let passed = self.milestones.partition_point(|m| *m <= step);
        self.initial * power(self.gamma, passed)
    }
}

/// `initial * gamma^step`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Exponential {
    initial: f64,
    gamma: f64,
}

impl Exponential {
    /// Multiplies by `gamma` at every step.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for a negative or non-finite argument.
    pub fn new(initial: f64, gamma: f64) -> Result<Self> {
        check::non_negative("Exponential::initial", initial)?;
        check::non_negative("Exponential::gamma", gamma)?;
        Ok(Self { initial, gamma })
    }
}

impl Schedule for Exponential {
    fn at(&self, step: usize) -> f64 {
        self.initial * power(self.gamma, step)
    }
}

/// From `initial` to `end` along a line of `total` steps.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Linear {
    initial: f64,
    end: f64,
    total: usize,
}

impl Linear {
    /// Reaches `end` at step `total`.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for `total = 0` or values that are not finite.
    pub fn new(initial: f64, end: f64, total: usize) -> Result<Self> {
        check::finite("Linear::initial", initial)?;
        check::finite("Linear::end", end)?;
        check::at_least_one("Linear::total", total)?;
        Ok(Self {
            initial,
            end,
            total,
        })
    }
}

impl Schedule for Linear {
    fn at(&self, step: usize) -> f64 {
        linear_between(self.initial, self.end, progress(step, self.total))
    }
}

/// `end + (initial - end) (1 + cos(pi step / total)) / 2` (Loshchilov and Hutter 2017).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cosine {
    initial: f64,
    end: f64,
    total: usize,
}

impl Cosine {
    /// Reaches `end` at step `total`.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for `total = 0` or values that are not finite.
    pub fn new(initial: f64, end: f64, total: usize) -> Result<Self> {
        check::finite("Cosine::initial", initial)?;
        check::finite("Cosine::end", end)?;
        check::at_least_one("Cosine::total", total)?;
        Ok(Self {
            initial,
            end,
            total,
        })
    }
}

impl Schedule for Cosine {
    fn at(&self, step: usize) -> f64 {
        cosine_between(self.initial, self.end, progress(step, self.total))
    }
}

/// `end + (initial - end) (1 - step / total)^power`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Polynomial {
    initial: f64,
    end: f64,
    total: usize,
    power: f64,
}

impl Polynomial {
    /// Reaches `end` at step `total`; `power` 1 is [`Linear`].
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for `total = 0`, `power <= 0` or values that are not finite.
    pub fn new(initial: f64, end: f64, total: usize, power: f64) -> Result<Self> {
        check::finite("Polynomial::initial", initial)?;
        check::finite("Polynomial::end", end)?;
        check::at_least_one("Polynomial::total", total)?;
        check::positive("Polynomial::power", power)?;
        Ok(Self {
            initial,
            end,
            total,
            power,
        })
    }
}

impl Schedule for Polynomial {
    fn at(&self, step: usize) -> f64 {
        let left = 1.0 - progress(step, self.total);
        self.end + (self.initial - self.end) * left.powf(self.power)
    }
}

/// `peak * min((step + 1) / warmup, sqrt(warmup / (step + 1)))` (Vaswani et al. 2017).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct InverseSqrt {
    peak: f64,
    warmup: usize,
}

impl InverseSqrt {
    /// Rises to `peak` within `warmup` steps, then falls with the root of the step.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for `warmup = 0` or a negative or non-finite `peak`.
    pub fn new(peak: f64, warmup: usize) -> Result<Self> {
        check::non_negative("InverseSqrt::peak", peak)?;
        check::at_least_one("InverseSqrt::warmup", warmup)?;
        Ok(Self { peak, warmup })
    }
}

impl Schedule for InverseSqrt {
    fn at(&self, step: usize) -> f64 {
        let (t, warmup) = (step as f64 + 1.0, self.warmup as f64);
        self.peak * (t / warmup).min((warmup / t).sqrt())
    }
}

/// `base^n`; 1 for `n = 0`, whatever the base.
fn power(base: f64, n: usize) -> f64 {
    match i32::try_from(n) {
        Ok(n) => base.powi(n),
        Err(_) => base.powf(n as f64),
    }
}

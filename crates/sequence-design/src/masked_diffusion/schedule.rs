//! How fast tokens are masked: `t` runs from 0 (clean) to 1 (all masked).

use crate::error::check;
use crate::{Error, Result};

/// The noise schedules of masked diffusion: `sigma(t)` with `P(masked at t) = 1 - exp(-sigma(t))`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum NoiseSchedule {
    /// `sigma = -log(1 - (1 - eps) t)`: a token is masked with probability `(1 - eps) t`.
    LogLinear {
        /// What is left unmasked at `t = 1`.
        eps: f64,
    },
    /// `sigma = -log(eps + (1 - eps) cos(pi t / 2))`.
    Cosine {
        /// What is left unmasked at `t = 1`.
        eps: f64,
    },
    /// `sigma = -log(eps + (1 - eps) cos^2(pi t / 2))`.
    CosineSqr {
        /// What is left unmasked at `t = 1`.
        eps: f64,
    },
    /// `sigma = min + t (max - min)`.
    Linear {
        /// `sigma` at 0.
        min: f64,
        /// `sigma` at 1.
        max: f64,
    },
    /// `sigma = min^(1 - t) max^t`.
    Geometric {
        /// `sigma` at 0.
        min: f64,
        /// `sigma` at 1.
        max: f64,
    },
}

impl Default for NoiseSchedule {
    fn default() -> Self {
        Self::LogLinear { eps: 1e-3 }
    }
}

impl NoiseSchedule {
    /// Checks the parameters.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`].
    pub fn validate(&self) -> Result<()> {
        match *self {
            Self::LogLinear { eps } | Self::Cosine { eps } | Self::CosineSqr { eps } => {
                let holds = eps > 0.0 && eps < 1.0;
                check::require(holds, "NoiseSchedule::eps", eps, "a number in (0, 1)")
            }
            Self::Linear { min, max } => {
                let holds = min >= 0.0 && max > min && max.is_finite();
                check::require(holds, "NoiseSchedule", (min, max), "0 <= min < max")
            }
            Self::Geometric { min, max } => {
                let holds = min > 0.0 && max > min && max.is_finite();
                check::require(holds, "NoiseSchedule", (min, max), "0 < min < max")
            }
        }
    }

    /// What is left unmasked, and its derivative, for the schedules that are defined by it.
    fn kept(eps: f64, inner: f64, derivative: f64) -> (f64, f64) {
        (eps + (1.0 - eps) * inner, (1.0 - eps) * derivative)
    }

    /// `sigma(t)`.
    pub fn total(&self, t: f64) -> f64 {
        let half = std::f64::consts::FRAC_PI_2;
        match *self {
            Self::LogLinear { eps } => -(-(1.0 - eps) * t).ln_1p(),
            Self::Cosine { eps } => -Self::kept(eps, (half * t).cos(), 0.0).0.ln(),
            Self::CosineSqr { eps } => -Self::kept(eps, (half * t).cos().powi(2), 0.0).0.ln(),
            Self::Linear { min, max } => min + t * (max - min),
            Self::Geometric { min, max } => min.powf(1.0 - t) * max.powf(t),
        }
    }

    /// `sigma'(t)`.
    pub fn rate(&self, t: f64) -> f64 {
        let half = std::f64::consts::FRAC_PI_2;
        match *self {
            Self::LogLinear { eps } => (1.0 - eps) / (1.0 - (1.0 - eps) * t),
            Self::Cosine { eps } => {
                let (kept, fall) = Self::kept(eps, (half * t).cos(), half * (half * t).sin());
                fall / kept
            }
            Self::CosineSqr { eps } => {
                let cos = (half * t).cos();
                let (kept, fall) = Self::kept(eps, cos * cos, 2.0 * half * cos * (half * t).sin());
                fall / kept
            }
            Self::Linear { min, max } => max - min,
            Self::Geometric { min, max } => self.total(t) * (max / min).ln(),
        }
    }

    /// The probability that a token is masked at `t`.
    pub fn move_chance(&self, t: f64) -> f64 {
        -(-self.total(t)).exp_m1()
    }

    /// The weight of a masked token's log-likelihood in the continuous-time bound,
    /// `sigma' / (e^sigma - 1)`; `1 / t` for the log-linear schedule.
    pub fn weight(&self, t: f64) -> f64 {
        self.rate(t) / self.total(t).exp_m1()
    }

    /// The probabilities of being masked before and after each of `steps` equal steps from 1 down to
    /// `eps`, and the times before them.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] without a step or for `eps` outside `[0, 1)`.
    pub fn steps(&self, steps: usize, eps: f64) -> Result<Vec<Step>> {
        if steps == 0 {
            return Err(Error::argument("steps", steps, "at least 1"));
        }
        if !(0.0..1.0).contains(&eps) {
            return Err(Error::argument("eps", eps, "a number in [0, 1)"));
        }
        let dt = (1.0 - eps) / steps as f64;
        let one = |i: usize| {
            let time = 1.0 - i as f64 * dt;
            Step {
                time,
                sigma: self.total(time),
                masked: self.move_chance(time),
                masked_after: self.move_chance(time - dt),
            }
        };
        Ok((0..steps).map(one).collect())
    }
}

/// One step of the reverse process.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step {
    /// The time before it.
    pub time: f64,
    /// `sigma` before it.
    pub sigma: f64,
    /// `a`: the probability of being masked before it.
    pub masked: f64,
    /// `s`: the probability of being masked after it.
    pub masked_after: f64,
}

//! Which method, and how its radius changes.

use crate::error::check;
use crate::schedule::Schedule;
use crate::Result;

/// The method, with its constants; see the [module](super) page.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Sharpness {
    /// Sharpness-aware minimization.
    Sam {
        /// Radius of the perturbation.
        rho: f64,
    },
    /// Adaptive SAM, invariant to rescaling of weights.
    Asam {
        /// Radius in the metric of the weights.
        rho: f64,
        /// Added to the weights' absolute values.
        eta: f64,
    },
    /// SAM that also closes the gap between perturbed and plain loss.
    Gsam {
        /// Radius of the perturbation.
        rho: f64,
        /// Weight of the gap.
        alpha: f64,
        /// Measure the radius in the metric of the weights, as ASAM with `eta = 0`.
        adaptive: bool,
    },
    /// SAM whose perturbed gradient is matched with the plain one.
    Sagm {
        /// Radius of the perturbation.
        rho: f64,
        /// How far the perturbation steps back along the plain gradient.
        alpha: f64,
    },
    /// Gradient norm aware minimization; four passes.
    Gam {
        /// Radius of the perturbation of the loss.
        rho: f64,
        /// Radius of the perturbation of the gradient norm.
        norm_rho: f64,
        /// Weight of the plain gradient beside the perturbed one.
        beta0: f64,
        /// Weight of the first perturbed gradient beside the last one.
        beta1: f64,
        /// Weight of the part that is orthogonal to the direction.
        gamma: f64,
    },
}

impl Sharpness {
    /// SAM with radius 0.05.
    pub fn sam() -> Self {
        Self::Sam { rho: 0.05 }
    }

    /// ASAM with radius 0.5 and `eta = 0.01`.
    pub fn asam() -> Self {
        Self::Asam {
            rho: 0.5,
            eta: 0.01,
        }
    }

    /// GSAM with radius 0.05 and `alpha = 0.4`.
    pub fn gsam() -> Self {
        Self::Gsam {
            rho: 0.05,
            alpha: 0.4,
            adaptive: false,
        }
    }

    /// SAGM with radius 0.05 and `alpha = 0.001`.
    pub fn sagm() -> Self {
        Self::Sagm {
            rho: 0.05,
            alpha: 0.001,
        }
    }

    /// GAM with radii 0.05 and 0.04, both `beta` 0.1 and `gamma = 0.05`.
    pub fn gam() -> Self {
        Self::Gam {
            rho: 0.05,
            norm_rho: 0.04,
            beta0: 0.1,
            beta1: 0.1,
            gamma: 0.05,
        }
    }

    /// The radius.
    pub fn rho(&self) -> f64 {
        match *self {
            Self::Sam { rho }
            | Self::Asam { rho, .. }
            | Self::Gsam { rho, .. }
            | Self::Sagm { rho, .. }
            | Self::Gam { rho, .. } => rho,
        }
    }

    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`](crate::Error::InvalidConfig) that names the first bad one.
    pub fn validate(&self) -> Result<()> {
        check::non_negative("Sharpness::rho", self.rho())?;
        match *self {
            Self::Sam { .. } => Ok(()),
            Self::Asam { eta, .. } => check::non_negative("Sharpness::Asam::eta", eta),
            Self::Gsam { alpha, .. } => check::non_negative("Sharpness::Gsam::alpha", alpha),
            Self::Sagm { alpha, .. } => check::non_negative("Sharpness::Sagm::alpha", alpha),
            Self::Gam {
                norm_rho,
                beta0,
                beta1,
                gamma,
                ..
            } => {
                check::non_negative("Sharpness::Gam::norm_rho", norm_rho)?;
                check::finite("Sharpness::Gam::beta0", beta0)?;
                check::finite("Sharpness::Gam::beta1", beta1)?;
                check::non_negative("Sharpness::Gam::gamma", gamma)
            }
        }
    }
}

/// How the radius changes during training.
#[derive(Debug, Default)]
pub enum RhoSchedule {
    /// It stays what [`Sharpness`] says.
    #[default]
    Fixed,
    /// It is a function of the step.
    Of(Box<dyn Schedule>),
    /// It follows the learning rate: `min` at `lr_min`, `max` at `lr_max`, linear between and
    /// bounded by both.
    ProportionalTo {
        /// Learning rate of the smallest radius.
        lr_min: f64,
        /// Learning rate of the largest radius.
        lr_max: f64,
        /// Smallest radius.
        min: f64,
        /// Largest radius.
        max: f64,
    },
}

impl RhoSchedule {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`](crate::Error::InvalidConfig) that names the first bad one.
    pub fn validate(&self) -> Result<()> {
        let Self::ProportionalTo {
            lr_min,
            lr_max,
            min,
            max,
        } = *self
        else {
            return Ok(());
        };
        check::non_negative("RhoSchedule::lr_min", lr_min)?;
        check::require(
            lr_max.is_finite() && lr_max > lr_min,
            "RhoSchedule::lr_max",
            lr_max,
            "a finite number above lr_min",
        )?;
        check::non_negative("RhoSchedule::min", min)?;
        check::require(
            max.is_finite() && max >= min,
            "RhoSchedule::max",
            max,
            "a finite number, at least min",
        )
    }

    /// The radius of step `step` (from 0) at a learning rate.
    pub(super) fn at(&self, fixed: f64, step: usize, lr: f64) -> f64 {
        match self {
            Self::Fixed => fixed,
            Self::Of(schedule) => schedule.at(step),
            Self::ProportionalTo {
                lr_min,
                lr_max,
                min,
                max,
            } => {
                let fraction = ((lr - lr_min) / (lr_max - lr_min)).clamp(0.0, 1.0);
                min + (max - min) * fraction
            }
        }
    }
}

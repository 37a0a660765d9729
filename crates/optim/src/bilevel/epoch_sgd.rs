//! Epoch-SGD: averages over epochs of projected steps, each in a smaller ball with smaller steps.

use super::problem::{axpy, norm};
use crate::error::check;
use crate::Result;
use candle_core::Tensor;

/// Settings of [`epoch_sgd`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EpochSgdConfig {
    /// Epochs.
    pub epochs: usize,
    /// Steps of the first epoch; doubled in each further one.
    pub t1: usize,
    /// Step size of the first epoch; halved in each further one.
    pub lr1: f64,
    /// Radius of the first epoch's ball; divided by the root of 2 in each further one.
    pub radius1: f64,
}

impl Default for EpochSgdConfig {
    fn default() -> Self {
        Self {
            epochs: 4,
            t1: 16,
            lr1: 0.1,
            radius1: 10.0,
        }
    }
}

impl EpochSgdConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`](crate::Error::InvalidConfig) that names the first bad one.
    pub fn validate(&self) -> Result<()> {
        check::at_least_one("EpochSgdConfig::epochs", self.epochs)?;
        check::at_least_one("EpochSgdConfig::t1", self.t1)?;
        check::positive("EpochSgdConfig::lr1", self.lr1)?;
        check::positive("EpochSgdConfig::radius1", self.radius1)
    }
}

/// Minimizes from `start` by Hazan & Kale's Epoch-SGD: in each epoch projected steps inside a ball
/// around the last center, the next center being the mean of the iterates before each step. Gives
/// the centers after every epoch.
///
/// # Errors
/// Those of [`EpochSgdConfig::validate`] and of `grad`.
pub fn epoch_sgd(
    mut grad: impl FnMut(&Tensor) -> Result<Tensor>,
    start: &Tensor,
    config: &EpochSgdConfig,
) -> Result<Vec<Tensor>> {
    config.validate()?;
    let (mut steps, mut lr, mut radius) = (config.t1, config.lr1, config.radius1);
    let mut center = start.detach();
    let mut centers = Vec::with_capacity(config.epochs);
    for _ in 0..config.epochs {
        let (mut w, mut sum) = (center.clone(), center.zeros_like()?);
        for _ in 0..steps {
            sum = (sum + &w)?;
            w = project(&axpy(&w, -lr, &grad(&w)?)?, &center, Some(radius))?;
        }
        center = (sum / steps as f64)?;
        centers.push(center.clone());
        steps *= 2;
        lr /= 2.0;
        radius /= std::f64::consts::SQRT_2;
    }
    Ok(centers)
}

/// The point of the ball around `center` that is nearest to `w`.
pub(super) fn project(w: &Tensor, center: &Tensor, radius: Option<f64>) -> Result<Tensor> {
    let Some(radius) = radius else {
        return Ok(w.clone());
    };
    let shift = (w - center)?;
    let distance = norm(&shift)?;
    if distance > radius {
        return axpy(center, radius / distance, &shift);
    }
    Ok(w.clone())
}

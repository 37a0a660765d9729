//! The convex program by an interior-point method, for every loss.

use super::interior::{self, Program};
use super::model::{group_norms, outputs_and_slack, violation};
use super::projection::onto_cones;
use super::{ConvexLoss, ConvexReluModel, Data, Patterns};
use crate::error::check;
use crate::linalg::norm;
use crate::Result;
use candle_core::Tensor;

/// Settings of [`ConeRelu`].
#[derive(Debug, Clone, PartialEq)]
pub struct ConeConfig {
    /// The loss.
    pub loss: ConvexLoss,
    /// Weight of the group norms; half of it is the network's weight decay.
    pub beta: f64,
    /// Gap and infeasibility, absolute and relative, at which the method stops.
    pub tol: f64,
    /// A weight of at least 0 for each sample's loss; `None` = all 1.
    pub sample_weights: Option<Vec<f64>>,
}

impl Default for ConeConfig {
    fn default() -> Self {
        Self {
            loss: ConvexLoss::Squared,
            beta: 1e-4,
            tol: 1e-8,
            sample_weights: None,
        }
    }
}

impl ConeConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`](crate::Error::InvalidConfig) that names the first bad one.
    pub fn validate(&self) -> Result<()> {
        check::non_negative("ConeConfig::beta", self.beta)?;
        check::positive("ConeConfig::tol", self.tol)
    }
}

/// Trains by an interior-point method, with no penalty to choose: some tens of steps to any precision,
/// each with a system over the samples and one over the columns for every unit. Where there are many
/// samples or units [`AdmmRelu`](super::AdmmRelu) needs less memory.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use thalweg_convex::relu::{ConeConfig, ConeRelu, Patterns};
///
/// let x = Tensor::new(&[[-1.5, 1.0], [-0.5, 1.0], [0.2, 1.0], [0.9, 1.0], [1.6, 1.0]], &Device::Cpu)?;
/// let y = Tensor::new(&[0.9, 0.1, 0.0, 0.5, 1.2], &Device::Cpu)?;
/// let patterns = Patterns::enumerate(&x)?;
/// let model = ConeRelu::new(ConeConfig { beta: 0.01, ..Default::default() })?.fit(&x, &y, &patterns)?;
/// assert!(model.gap < 1e-6 && model.violation < 1e-9);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct ConeRelu {
    config: ConeConfig,
}

impl ConeRelu {
    /// A solver.
    ///
    /// # Errors
    /// Those of [`ConeConfig::validate`].
    pub fn new(config: ConeConfig) -> Result<Self> {
        config.validate()?;
        Ok(Self { config })
    }

    /// Trains on `x` `[n, d]`, `y` `[n]`; units end on their cones, so that outputs are the network's.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape), [`Error::NonFinite`](crate::Error::NonFinite),
    /// [`Error::InvalidConfig`](crate::Error::InvalidConfig) for labels that the loss does not take,
    /// [`Error::Numerical`](crate::Error::Numerical) where the interior-point method fails.
    pub fn fit(&self, x: &Tensor, y: &Tensor, patterns: &Patterns) -> Result<ConvexReluModel> {
        let ConeConfig {
            loss, beta, tol, ..
        } = self.config;
        let data = Data::new(x, y, loss, self.config.sample_weights.as_deref())?;
        patterns.fits(data.x.nrows(), data.x.ncols())?;
        let fixed = vec![false; data.x.ncols()];
        let program = Program {
            data: &data,
            patterns,
            loss,
            beta,
            eps: 0.0,
            perturbed: &fixed,
        };
        let solved = interior::solve(&program, tol)?;
        let (mut v, mut w) = (solved.v, solved.w);
        let d = patterns.d;
        let largest = v.chunks(d).chain(w.chunks(d)).map(norm).fold(0.0, f64::max);
        for units in [&mut v, &mut w] {
            // An interior point leaves a rest of every unit that the optimum does not use.
            let rest = |unit: &&mut [f64]| norm(unit) <= tol * largest;
            units.chunks_mut(d).filter(rest).for_each(|u| u.fill(0.0));
            onto_cones(&data.x, patterns, units);
        }
        let outputs = outputs_and_slack(&data.x, patterns, &v, &w, &fixed).0;
        let objective =
            data.loss(loss, &outputs, None) + beta * (group_norms(&v, d) + group_norms(&w, d));
        let violated = |units: &[f64]| violation(&data.x, patterns, units, 0.0, &fixed);
        Ok(ConvexReluModel {
            patterns: patterns.clone(),
            gap: objective - solved.bound,
            violation: violated(&v).max(violated(&w)),
            objective,
            iterations: solved.iterations,
            converged: true,
            v,
            w,
        })
    }
}

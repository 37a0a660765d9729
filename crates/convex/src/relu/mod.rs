//! Two-layer ReLU networks trained to the global optimum of a convex program.
//!
//! For small and tabular data where a network without learning rate, restarts or initial weights is
//! wanted, or one with certified margins. *Efficient Global Optimization of Two-layer ReLU Networks:
//! Quadratic-time Algorithms and Adversarial Training*, Bai, Gautam, Sojoudi, SIAM J. Mathematics of
//! Data Science 2023, arXiv 2201.01965.
//!
//! A network `sum_j relu(x' u_j) alpha_j` with weight decay, on data `X` `[n, d]` (append a column of
//! ones for a bias), is equivalent to
//!
//! ```text
//! min l(sum_i D_i X (v_i - w_i), y) + beta sum_i (|v_i| + |w_i|)
//! s.t. (2 D_i - I) X v_i >= 0,  (2 D_i - I) X w_i >= 0        D_i = diag(X a_i >= 0)
//! ```
//!
//! over all patterns `D_i`; with sampled ones it is an upper bound. The network is read off:
//! `(v_i / sqrt|v_i|, sqrt|v_i|)` and `(w_i / sqrt|w_i|, -sqrt|w_i|)`.
//!
//! | symbol | here |
//! | --- | --- |
//! | `D_i`, `a_i` | [`Patterns`] |
//! | `beta`, `rho`, `gamma_a` | [`AdmmConfig`] |
//! | `v`, `w` | [`ConvexReluModel`] |
//! | `eps` | [`AdversarialConfig::eps`] |
//!
//! [`ConeRelu`] solves it for every loss by an interior point, [`AdmmRelu`] by operator splitting with one
//! `n x n` system a step, [`ScpRelu`] a lasso over random units, [`AdversarialRelu`] the certified program.
//!
//! [`GatedRelu`] drops the cones: a network whose gates stay as they were drawn, for one output or many.
//! [`AdmmRelu::path`] goes through several `beta`, [`AdmmRelu::fit_growing`] adds the patterns that the
//! optimum wants; every solver takes weights of the samples.
//!
//! Sampling is not global: with few of the patterns a wide network found by gradient descent can be
//! better. Compare with [`Patterns::enumerate`] where `d` is small. Standardize the columns of `X`:
//! `rho` acts on their scale.
//!
//! ```
//! use candle_core::{Device, Module, Tensor};
//! use thalweg_convex::relu::{AdmmConfig, AdmmRelu, Patterns};
//!
//! let x = Tensor::new(&[[-1.5, 1.0], [-0.5, 1.0], [0.2, 1.0], [0.9, 1.0], [1.6, 1.0]], &Device::Cpu)?;
//! let y = Tensor::new(&[0.9, 0.1, 0.0, 0.5, 1.2], &Device::Cpu)?;
//! let patterns = Patterns::enumerate(&x)?;
//! let model = AdmmRelu::new(AdmmConfig { beta: 0.01, ..Default::default() })?.fit(&x, &y, &patterns)?;
//! assert!(model.gap < 1e-3);
//! let network = model.to_network(1e-6)?;
//! let error = (network.forward(&x)? - &y)?.sqr()?.sum_all()?.to_scalar::<f64>()?;
//! assert!(error < 0.05);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod admm;
mod adversarial;
mod cone;
mod fista;
mod gated;
mod interior;
mod model;
mod patterns;
mod projection;
mod scp;

pub use admm::{AdmmConfig, AdmmRelu, AdmmRun, AdmmState, GrowConfig, Grown, Primal};
pub use adversarial::{AdversarialConfig, AdversarialRelu, AdversarialSolver};
pub use cone::{ConeConfig, ConeRelu};
pub use gated::{GatedConfig, GatedModel, GatedNetwork, GatedRelu, OutputNorm};
pub use model::{certificate, ConvexReluModel, TwoLayerRelu};
pub use patterns::{adversarial_patterns, Patterns};
pub use scp::{sample_units, ScpConfig, ScpModel, ScpRelu, ScpSolver};

use crate::error::check;
use crate::linalg::{matrix, values};
use crate::{Error, Result};
use candle_core::Tensor;
use faer::Mat;

/// The loss `l`, of outputs `f` and targets `y`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConvexLoss {
    /// `1/2 sum (f - y)^2`
    Squared,
    /// `1/n sum log(1 + exp(-y f))`, labels -1 and 1.
    Logistic,
    /// `1/n sum max(0, 1 - y f)`, labels -1 and 1.
    Hinge,
}

impl ConvexLoss {
    /// The loss of one sample where its output may be wrong by `slack` in the bad direction: the worst
    /// case over perturbations of the input. The mean's `1/n` is left out.
    fn one(self, output: f64, y: f64, slack: f64) -> f64 {
        match self {
            Self::Squared => 0.5 * ((output - y).abs() + slack).powi(2),
            Self::Logistic => {
                let z = slack - y * output;
                z.max(0.0) + (-z.abs()).exp().ln_1p()
            }
            Self::Hinge => (1.0 - y * output + slack).max(0.0),
        }
    }

    /// What a sum over `n` samples is divided by.
    fn divisor(self, n: usize) -> f64 {
        match self {
            Self::Squared => 1.0,
            _ => n as f64,
        }
    }
}

/// Data of a problem, checked.
struct Data {
    x: Mat<f64>,
    y: Vec<f64>,
    /// Of each sample's loss.
    weights: Vec<f64>,
}

impl Data {
    fn new(x: &Tensor, y: &Tensor, loss: ConvexLoss, weights: Option<&[f64]>) -> Result<Self> {
        let x = inputs(x)?;
        let y = values("y", y)?;
        check::length("y", y.len(), x.nrows())?;
        if loss != ConvexLoss::Squared {
            if let Some(bad) = y.iter().find(|y| y.abs() != 1.0) {
                return Err(Error::config("y", bad, "labels 1 and -1 for this loss"));
            }
        }
        let weights = sample_weights(weights, x.nrows())?;
        Ok(Self { x, y, weights })
    }

    /// With rows times the roots of their weights: for the squared loss, whose cones do not change by
    /// that, the same problem without weights.
    fn absorbed(mut self) -> Self {
        for (k, weight) in self.weights.iter_mut().enumerate() {
            let root = weight.sqrt();
            (0..self.x.ncols()).for_each(|j| self.x[(k, j)] *= root);
            self.y[k] *= root;
            *weight = 1.0;
        }
        self
    }

    /// The weighted loss, of the worst case where slacks are given.
    fn loss(&self, loss: ConvexLoss, outputs: &[f64], slack: Option<&[f64]>) -> f64 {
        let one = |k: usize| {
            let slack = slack.map_or(0.0, |s| s[k]);
            self.weights[k] * loss.one(outputs[k], self.y[k], slack)
        };
        (0..self.y.len()).map(one).sum::<f64>() / loss.divisor(self.y.len())
    }

    /// The derivative of the loss by each output, where it is smooth.
    fn slopes(&self, loss: ConvexLoss, outputs: &[f64]) -> Vec<f64> {
        let divisor = loss.divisor(outputs.len());
        (0..outputs.len())
            .map(|k| {
                let (f, y) = (outputs[k], self.y[k]);
                let slope = match loss {
                    ConvexLoss::Squared => f - y,
                    _ => -y / (1.0 + (y * f).exp()),
                };
                self.weights[k] * slope / divisor
            })
            .collect()
    }
}

/// Targets of the squared loss `1/2 |F - Y|^2`, the weights of the samples inside.
struct Targets {
    /// `[n, c]`
    values: Mat<f64>,
}

impl Targets {
    /// From `[n]` or `[n, c]`.
    fn new(y: &Tensor, weights: &[f64]) -> Result<Self> {
        let outputs = match *y.dims() {
            [_] => 1,
            [_, c] => c,
            _ => return Err(Error::shape("y", y.dims(), "[n] or [n, c]")),
        };
        check::at_least("outputs", outputs, 1)?;
        let flat = values("y", y)?;
        check::length("y", flat.len() / outputs, weights.len())?;
        let at = |k: usize, o: usize| weights[k].sqrt() * flat[k * outputs + o];
        Ok(Self {
            values: Mat::from_fn(weights.len(), outputs, at),
        })
    }

    /// A lower bound of `1/2 |F - Y|^2 + beta sum |A_i|` by the dual problem, at the residual `F - Y`
    /// scaled until it is feasible: `largest` is its largest dual norm.
    fn bound(&self, residual: &Mat<f64>, largest: f64, beta: f64) -> f64 {
        let pairs = residual.col_iter().zip(self.values.col_iter());
        let along: f64 = pairs
            .map(|(r, y)| r.iter().zip(y.iter()).map(|(r, y)| -r * y).sum::<f64>())
            .sum();
        let square = residual.squared_norm_l2();
        let most = if largest > 0.0 {
            beta / largest
        } else {
            f64::INFINITY
        };
        let best = if square > 0.0 { along / square } else { 0.0 };
        let scale = best.min(most).max(0.0);
        scale * along - 0.5 * scale * scale * square
    }
}

/// Rows and columns, at least one of each.
fn inputs(x: &Tensor) -> Result<Mat<f64>> {
    let (n, d, x) = matrix("x", x)?;
    check::at_least("rows of x", n, 1)?;
    check::at_least("columns of x", d, 1)?;
    Ok(crate::linalg::from_rows(n, d, &x))
}

/// Weights of samples, checked; ones where none are given.
fn sample_weights(weights: Option<&[f64]>, n: usize) -> Result<Vec<f64>> {
    let Some(weights) = weights else {
        return Ok(vec![1.0; n]);
    };
    check::length("sample_weights", weights.len(), n)?;
    check::finite("sample_weights", weights)?;
    if let Some(bad) = weights.iter().find(|w| **w < 0.0) {
        return Err(Error::config(
            "sample_weights",
            bad,
            "weights of at least 0",
        ));
    }
    let sum: f64 = weights.iter().sum();
    check::positive("sum of sample_weights", sum)?;
    Ok(weights.to_vec())
}

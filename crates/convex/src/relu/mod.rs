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
//! [`AdmmRelu`] solves it by operator splitting with one `n x n` system a step, [`ScpRelu`] a lasso
//! over random units, [`AdversarialRelu`] the certified program (and, with `eps = 0`, the plain one
//! for every loss, by an interior point to full precision).
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
mod interior;
mod model;
mod patterns;
mod scp;

pub use admm::{AdmmConfig, AdmmRelu, AdmmRun, AdmmState, Primal};
pub use adversarial::{AdversarialConfig, AdversarialRelu, AdversarialSolver};
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
    /// The loss where each output may be wrong by `slack` in the bad direction: the worst case over
    /// perturbations of the input.
    fn worst(self, outputs: &[f64], y: &[f64], slack: &[f64]) -> f64 {
        let n = y.len() as f64;
        let one = |k: usize| match self {
            Self::Squared => 0.5 * ((outputs[k] - y[k]).abs() + slack[k]).powi(2),
            Self::Logistic => {
                let z = slack[k] - y[k] * outputs[k];
                (z.max(0.0) + (-z.abs()).exp().ln_1p()) / n
            }
            Self::Hinge => (1.0 - y[k] * outputs[k] + slack[k]).max(0.0) / n,
        };
        (0..y.len()).map(one).sum()
    }
}

/// Data of a problem, checked.
struct Data {
    x: Mat<f64>,
    y: Vec<f64>,
}

impl Data {
    fn new(x: &Tensor, y: &Tensor, loss: ConvexLoss) -> Result<Self> {
        let (n, d, x) = matrix("x", x)?;
        check::at_least("rows of x", n, 1)?;
        check::at_least("columns of x", d, 1)?;
        let y = values("y", y)?;
        check::length("y", y.len(), n)?;
        if loss != ConvexLoss::Squared {
            if let Some(bad) = y.iter().find(|y| y.abs() != 1.0) {
                return Err(Error::config("y", bad, "labels 1 and -1 for this loss"));
            }
        }
        Ok(Self {
            x: crate::linalg::from_rows(n, d, &x),
            y,
        })
    }
}

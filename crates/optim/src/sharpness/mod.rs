//! Sharpness-aware minimization: for flatter minima, around any optimizer.
//!
//! Each method evaluates the loss two to four times per step and hands a direction `d` to the
//! optimizer underneath. With `g = grad L(theta)`, `|.|` the norm over all parameters together:
//!
//! ```text
//! SAM    e = rho g / |g|                        d = grad L(theta + e)
//! ASAM   T = |theta| + eta (entry by entry)     e = rho T^2 g / |T g|,  d = grad L(theta + e)
//! GSAM   g_p = grad L(theta + e)                v = g - <g, g_p> g_p / |g_p|^2
//!                                               d = g_p - alpha v
//! SAGM   e = (rho / |g| - alpha) g              d = (g + grad L(theta + e)) / 2
//! GAM    g_1 = grad L(theta + rho g/|g|)        theta_2 = theta + rho' (g_1 - g) / |g_1 - g|
//!        g_2 = grad L(theta_2)                  g_3 = grad L(theta_2 + rho g_2/|g_2|)
//!        m = g + (1 - beta_0) g_2               n = beta_1 g_1 + (1 - beta_1) g_3
//!        d = n - gamma (m - <m, n> n / |n|^2)
//! ```
//!
//! | symbol | field |
//! | --- | --- |
//! | `rho` | `rho` of each variant of [`Sharpness`], or [`RhoSchedule`] |
//! | `rho'` | `norm_rho` |
//! | `eta`, `alpha`, `beta_0`, `beta_1`, `gamma` | the fields of these names |
//!
//! Foret et al., "Sharpness-Aware Minimization" (ICLR 2021); Kwon et al., "ASAM" (ICML 2021);
//! Zhuang et al., "Surrogate Gap Minimization" (ICLR 2022); Wang et al., "Sharpness-Aware Gradient
//! Matching" (CVPR 2023); Zhang et al., "Gradient Norm Aware Minimization" (CVPR 2023).
//!
//! Parameters come back from a copy, bit for bit, before the optimizer's own step. Weight decay and
//! clipping belong to that optimizer: they act on `d`, not on the ascent. Freeze running statistics
//! of normalization layers in all passes but the first
//! ([`SharpnessAware::with_pass_hook`]).
//!
//! ```
//! use candle_core::{Device, Tensor, Var};
//! use thalweg_optim::sgd::{SgdConfig, SgdMomentum};
//! use thalweg_optim::sharpness::{Sharpness, SharpnessAware};
//! use thalweg_optim::ClosureOptimizer;
//! use candle_nn::Optimizer;
//!
//! let w = Var::new(&[0.6f64, -0.4], &Device::Cpu)?;
//! let x = Tensor::new(&[[1f64, 2.0], [-1.0, 0.5]], &Device::Cpu)?;
//! let sgd = SgdMomentum::new(vec![w.clone()], SgdConfig { lr: 0.1, ..Default::default() })?;
//! let mut sam = SharpnessAware::new(vec![w.clone()], Sharpness::sam(), sgd)?;
//! let mut loss = || x.matmul(&w.unsqueeze(1)?)?.sqr()?.mean_all();
//! let first = sam.step(&mut loss)?;
//! for _ in 0..50 {
//!     sam.step(&mut loss)?;
//! }
//! assert!(first.perturbed_loss > first.loss);
//! assert!(sam.step(&mut loss)?.loss < 0.1 * first.loss);
//! # Ok::<(), thalweg_optim::Error>(())
//! ```

mod config;
mod direction;
mod optimizer;
mod vectors;

pub use config::{RhoSchedule, Sharpness};
pub use optimizer::{sharpness_profile, SharpReport, SharpnessAware};

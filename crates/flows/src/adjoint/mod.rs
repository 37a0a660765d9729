//! Gradients of a loss on the final sample with respect to the start noise, the condition or the
//! weights, through a whole sampler, in the memory of one network evaluation.
//!
//! *AdjointDPM: Adjoint Sensitivity Method for Gradient Backpropagation of Diffusion Probabilistic
//! Models*, Pan et al., ICLR 2024, arXiv 2307.10711.
//!
//! With `x = alpha x0 + sigma eps`, `y = x / alpha` and `rho = sigma / alpha` the probability-flow
//! equation has no linear part left, and the adjoint `a = dL/dy` follows it backwards:
//!
//! ```text
//! dy/drho = eps(alpha y)         da/drho = -a^T d eps/dy      a(rho_end) = alpha_end dL/dx_end
//! da_theta/drho = -a^T d eps/d theta                          dL/dx_T    = a(rho_T) / alpha_T
//! ```
//!
//! | symbol | here |
//! | --- | --- |
//! | `eps(alpha y)` | [`RhoOde`] over any [`Denoiser`](crate::Denoiser) (with guidance: [`Guided`](crate::guidance::Guided)) |
//! | `y`, `rho` or the dual `x / sigma`, `alpha / sigma` | [`Form`] |
//! | the authors' scale, `y_T = x_T` | [`Anchor::Start`] |
//! | how `a` is computed | [`GradientMode`] |
//!
//! The default, [`GradientMode::Discrete`], is the exact gradient of the discretised solver, one
//! step at a time. The continuous adjoint of the paper is an approximation of it, and on Euler steps
//! an unstable one: near the end one step back multiplies `a` by about `2 - rho_i / rho_{i+1}`, so
//! where that ratio exceeds 2 the sign flips ([`AdjointSolver::worst_ratio`]; above 1.5 a
//! `tracing` warning says so). [`GradientMode::Scaled`] integrates that part exactly.
//!
//! All modes but [`States::Reconstructed`] keep the states of the grid, as many samples as steps, on the
//! device or in the host's memory ([`AdjointSolver::offload`]); none keeps a network graph.
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use thalweg_flows::adjoint::{AdjointSolver, RhoOde};
//! use thalweg_flows::schedule::VpSde;
//! use thalweg_flows::{AnalyticMixture, Condition, Grid, RandomStream};
//!
//! let means = Tensor::new(&[[1.0_f64, 0.0], [-1.0, 0.5]], &Device::Cpu)?;
//! let model = AnalyticMixture::new(&means, &[0.1, 0.1], &[1.0, 1.0])?;
//! let schedule = VpSde::default();
//! let ode = RhoOde::new(&model, &schedule, &Condition::Null);
//! let solver = AdjointSolver::new(Grid::uniform_lambda_between(&schedule, 1.0, 0.02, 20)?);
//!
//! // Moves the start noise until the sample comes near a point.
//! let mut x = RandomStream::new(1).normal(0.0, 1.0, (1, 2), DType::F64, &Device::Cpu)?;
//! let goal = Tensor::new(&[[0.9_f64, 0.1]], &Device::Cpu)?;
//! let loss = |x: &Tensor| Ok((x - &goal)?.sqr()?.sum_all()?);
//! let mut values = vec![];
//! for _ in 0..20 {
//!     let (value, gradients) = solver.value_and_grad(&ode, &x, &[], loss)?;
//!     values.push(value);
//!     x = (x - (gradients.start * 0.3)?)?;
//! }
//! assert!(values[19] < 0.1 * values[0]);
//! # Ok::<(), thalweg_flows::Error>(())
//! ```

mod op;
mod pullback;
mod rho;

pub use op::AdjointSample;
pub use pullback::{AdjointSolver, Forward, GradientMode, Gradients, States, Tape};
pub use rho::{Anchor, Form, RhoOde};

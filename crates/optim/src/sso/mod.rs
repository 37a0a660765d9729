//! Target-based surrogates: few calls of an expensive loss, many cheap steps of the model.
//!
//! Lavington, Vaswani et al., "Target-based Surrogates for Stochastic Optimization" (ICML 2023,
//! arXiv 2302.02607). For `h(theta) = l(f(theta))`, where the gradient of `l` in the model's
//! outputs (the targets) is expensive and the model `f` is cheap: ask for one gradient, then take
//! `m` steps on a surrogate that needs the model alone. One outer step on a batch of `n` examples:
//!
//! ```text
//! z = f(theta_t),  g = grad_z l(z)                                  the only call of the oracle
//! S(theta) = (1/n) sum_i [ <g_i, f_i - z_i> + |f_i - z_i|^2 / (2 eta) ]      Normalization::Paper
//! S(theta) = mean over all entries of [ eta g f + (f - z)^2 ]             Normalization::Official
//! S(theta) = (1/n) sum_i [ <g_i, p_i - p_i,t> + KL(p_i || p_i,t) / eta ],  p = softmax f      Kl
//! theta_{t+1} = m steps of the inner optimizer on S from theta_t
//! ```
//!
//! | symbol | field |
//! | --- | --- |
//! | `eta` | [`SsoConfig::step_size`] (with its [schedule](StepSchedule), [search](ArmijoTarget) or [adaptation](Adaptive)) |
//! | `m` | [`SsoConfig::inner_steps`] |
//! | `l`, `g` | [`TargetLoss`] |
//! | `f` | [`TargetModel`] |
//!
//! **Two normalizations.** `Paper` expects a loss that is the *mean* over the batch, and minimizing
//! `S` over free targets gives the step `z - eta g_i`. `Official` is what the authors' code does:
//! a loss that is the *sum* over the batch, no half, so that the step is `z - eta g / 2`.
//!
//! With `eta <= 1/L` (`L` the smoothness of the per-example loss in its targets) `l(z) + S` lies
//! above the loss, and every decrease of `S` decreases the loss. One plain gradient step on `S` is
//! exactly SGD. The model must be the same function in all inner steps: freeze dropout and
//! normalization statistics.
//!
//! ```
//! use candle_core::{DType, Device, Tensor, Var};
//! use thalweg_optim::sso::{ArmijoGd, ArmijoGdConfig, AutogradLoss, Sso, SsoConfig};
//!
//! let device = Device::Cpu;
//! let x = Tensor::new(&[[1f64, 0.0], [0.0, 1.0], [1.0, 1.0]], &device)?;
//! let y = Tensor::new(&[[1f64], [-2.0], [-1.0]], &device)?;
//! let w = Var::zeros((2, 1), DType::F64, &device)?;
//!
//! // An "expensive" loss: in real life a simulator, or a label that somebody has to give.
//! let loss = AutogradLoss::new(|z: &Tensor| ((z - &y)?.sqr()?.sum_all()? / 6.0));
//! let inner = ArmijoGd::new(vec![w.clone()], ArmijoGdConfig::default())?;
//! let mut sso = Sso::new(vec![w.clone()], SsoConfig { step_size: 1.0, ..Default::default() }, inner)?;
//! for _ in 0..3 {
//!     sso.step(&|| x.matmul(&w), &loss)?;
//! }
//! assert_eq!(loss.calls(), 3);
//! assert!((w.to_vec2::<f64>()?[1][0] + 2.0).abs() < 1e-3);
//! # Ok::<(), thalweg_optim::Error>(())
//! ```

mod armijo;
mod config;
mod oracle;
mod step;
mod surrogate;

pub use armijo::{ArmijoGd, ArmijoGdConfig, ArmijoStep};
pub use config::{Adaptive, ArmijoTarget, Divergence, Normalization, SsoConfig, StepSchedule};
pub use oracle::{AutogradLoss, TargetLoss, TargetModel};
pub use step::{InnerOptimizer, InnerPoint, InnerStep, Sso, SsoReport};
pub use surrogate::{surrogate_kl, surrogate_official, surrogate_squared};

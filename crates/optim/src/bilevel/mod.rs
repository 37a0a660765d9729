//! Bilevel optimization: hyper-gradients, BO-REP and its baselines.
//!
//! For problems in which one set of variables `x` is judged by what another set `y` becomes when it
//! is trained under `x`: data weights, regularization, shared representations. BO-REP takes
//! normalized momentum steps, so that the upper loss may have exponential growth or come from a
//! recurrent network; the hyper-gradient estimators serve any other scheme. *Bilevel Optimization
//! under Unbounded Smoothness: A New Algorithm and Convergence Analysis*, Hao, Gong & Liu,
//! ICLR 2024, arXiv 2401.09587.
//!
//! `min_x f(x, y*(x))` with `y*(x) = argmin_y g(x, y)` and `g` strongly convex in `y`:
//!
//! ```text
//! hyper-gradient   grad_x f - (d2_xy g) z      (d2_yy g) z = grad_y f
//!
//! BO-REP, step t:
//! y <- N times Proj_R(y - alpha grad_y g(x, y))         if t > 0 and t mod I = 0
//! z' = z - nu ((d2_yy g) z - grad_y f)
//! m <- beta m + (1 - beta) (grad_x f - (d2_xy g) z)      z (Old) or z' (New)
//! x <- x - eta m / (|m| + eps)
//! ```
//!
//! | symbol | field |
//! | --- | --- |
//! | `eta`, `beta`, `nu`, `alpha`, `eps` | [`BoRepConfig`]'s fields of these names |
//! | `I`, `N`, `R` | [`BoRepConfig::interval`], [`BoRepConfig::lower_steps`], [`BoRepConfig::radius`] |
//!
//! Steps of normalized length never shrink: with a constant `eta` the iterate hovers in a ball of
//! that size ([`BoRep::set_eta`] lets it follow a schedule). Use a squared penalty for the lower
//! problem (`mu/2 |y|^2`): it must be strongly convex. Where the lower problem is not convex (a
//! network), `z` can diverge: watch [`StepReport::z_residual`], damp or clip.
//!
//! | type | role |
//! | --- | --- |
//! | [`BilevelProblem`] | what a problem must be able to compute; [`LossProblem`] does it for two losses of candle variables |
//! | [`hypergradient`], [`LinearSolve`] | estimators: Neumann, conjugate gradient, fixed point, dense |
//! | [`BoRep`] | the method |
//! | [`Soba`], [`StocBio`] | baselines on the same trait (`Soba` with momentum is MA-SOBA) |
//! | [`epoch_sgd`] | the careful start of the lower variable |
//! | [`NormalizedMomentumSgd`] | the upper step alone, as a `candle_nn::Optimizer` |
//!
//! ```
//! use candle_core::{Device, Tensor, Var};
//! use thalweg_optim::bilevel::{BoRep, BoRepConfig, LossProblem};
//!
//! // Ridge regression: x = log of the penalty, y = weights; judged on other data.
//! let (x, y) = (Var::new(&[0f64], &Device::Cpu)?, Var::new(&[0f64, 0.0], &Device::Cpu)?);
//! let train = (Tensor::new(&[[1f64, 0.2], [0.3, 1.0], [1.0, 1.0]], &Device::Cpu)?, Tensor::new(&[1f64, 2.0, 3.3], &Device::Cpu)?);
//! let valid = (Tensor::new(&[[1f64, -1.0], [2.0, 0.5]], &Device::Cpu)?, Tensor::new(&[-1f64, 3.0], &Device::Cpu)?);
//! let error = |(a, b): &(Tensor, Tensor)| (a.matmul(&y.unsqueeze(1)?)?.squeeze(1)? - b)?.sqr()?.mean_all();
//! let mut problem = LossProblem::new(
//!     vec![("x".into(), x.clone())],
//!     vec![("y".into(), y.clone())],
//!     |_: &()| error(&train)? + x.exp()?.broadcast_mul(&y.sqr()?)?.sum_all()?,
//!     |_: &()| error(&valid),
//!     |_| Ok(()),
//! )?;
//! let config = BoRepConfig { eta: 0.05, nu: 0.2, alpha: 0.2, ..Default::default() };
//! let mut method = BoRep::new(&problem.upper()?, &problem.lower()?, config)?;
//! for _ in 0..150 {
//!     method.step(&mut problem)?;
//! }
//! problem.set(method.x(), method.y())?;
//! // A penalty of 1 was far too much.
//! assert!(x.to_vec1::<f64>()?[0] < -2.0);
//! # Ok::<(), thalweg_optim::Error>(())
//! ```

mod baselines;
mod bo_rep;
mod epoch_sgd;
mod hyper;
mod normalized;
mod problem;
mod quadratic;

pub use baselines::{Soba, SobaConfig, StocBio, StocBioConfig};
pub use bo_rep::{BoRep, BoRepConfig, InitRefinement, LowerOutput, StepReport, ZOrder};
pub use epoch_sgd::{epoch_sgd, EpochSgdConfig};
pub use hyper::{hypergradient, HyperGradient, LinearSolve};
pub use normalized::{NormalizedMomentumSgd, NormalizedMomentumSgdConfig};
pub use problem::{BatchRequest, BilevelProblem, LossProblem, Oracle, UpperGrads};
pub use quadratic::QuadraticProblem;

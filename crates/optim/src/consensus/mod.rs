//! Consensus-based optimization: global minimization from function values alone.
//!
//! For objectives that are rugged, not differentiable or a black box: a cloud of particles drifts
//! towards its weighted mean and diffuses in proportion to the distance from it. Consensus hopping
//! is the form without particles that persist, whose steps are those of gradient descent in
//! disguise. *Gradient is All You Need?*, Riedl, Klock, Geldhauser & Fornasier 2023,
//! arXiv 2306.09778.
//!
//! With particles `V_i` in `R^d`, energies `E_i = E(V_i)` and the consensus point
//! `v = sum_i w_i V_i / sum_i w_i`, `w_i = exp(-alpha (E_i - min E))`, a step is, in this order:
//!
//! ```text
//! V_i <- V_i - lambda dt (V_i - v)
//! V_i <- V_i + sigma sqrt(dt) D_i xi_i       D_i = |V_i - v|_2 (isotropic) or |V_i - v| per
//!                                            coordinate, of the drifted V_i, at most M
//! V_i <- V_i - gamma lr dt grad E(V_i)       where a gradient drift is wanted
//! ```
//!
//! Consensus hopping draws `V_i = v_k + sigma xi_i` and takes `v_{k+1}` as their consensus.
//!
//! | symbol | field |
//! | --- | --- |
//! | `lambda`, `sigma`, `alpha`, `dt` | [`CboConfig`]'s fields of these names |
//! | `M` | [`CboConfig::truncation`] |
//! | `gamma`, `lr` | [`GradientDrift`] |
//! | `lambda_2`, `sigma_2`, `kappa`, `beta` | [`Memory`] |
//! | `n_N` | [`Batching::particles`] |
//!
//! `alpha` may be anything up to `1e15` and beyond, where the consensus is the best particle (ties
//! average). A particle whose energy is NaN or infinite has weight 0; an error is raised where none
//! is left. The mean-field limit contracts if `2 lambda > d sigma^2` (isotropic) or
//! `2 lambda > sigma^2` (anisotropic): see [`CboConfig::contracts`].
//!
//! Particles are kept in double precision in host memory; the objective gets them as a tensor
//! `[N, d]` in the dtype and on the device of the initial particles, in one batch per step.
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use thalweg_optim::consensus::{Cbo, CboConfig, Diffusion};
//! use thalweg_optim::RandomStream;
//!
//! // A sum of absolute values with a ripple: no useful gradient anywhere.
//! let objective = |v: &Tensor| (v.abs()? + (v * 9.0)?.cos()?.neg()?)?.sum(1);
//! let mut rng = RandomStream::new(1);
//! let start = rng.normal(2.0, 2.0, (100, 3), DType::F64, &Device::Cpu)?;
//! let config = CboConfig { alpha: 50.0, diffusion: Diffusion::Anisotropic, max_steps: 600, ..Default::default() };
//! let mut cbo = Cbo::new(&start, config, rng.split("noise"))?;
//! let report = cbo.run(&objective)?;
//! let distance = report.consensus.abs()?.max(0)?.to_scalar::<f64>()?;
//! assert!(distance < 0.3, "{distance}");
//! # Ok::<(), thalweg_optim::Error>(())
//! ```
//!
//! To train a network from its loss values, [`Particles`] turns named variables into rows and back.

mod config;
pub mod diagnostics;
mod dynamics;
mod hopping;
mod langevin;
mod noise;
mod objective;
mod particles;
mod point;
pub mod test_functions;

pub use config::{
    Acceptance, BatchUpdate, Batching, Bounds, BoundsRule, CboConfig, Cooling, Diffusion,
    GradientDrift, Memory,
};
pub use dynamics::{Cbo, CboEnsemble, RunReport, StepReport, Stop};
pub use hopping::{ConsensusHopping, Hopping, SigmaDecay};
pub use langevin::{Langevin, LangevinCooling};
pub use noise::{NoiseRequest, NoiseSource, Purpose, Tape};
pub use objective::{finite_difference_gradients, Differentiable, Objective, PerParticle};
pub use particles::Particles;
pub use point::{consensus_point, consensus_points, polarized_consensus, weights};

//! Optimizers, gradient transforms, learning-rate schedules and training diagnostics for
//! [candle](candle_core), with fused update kernels.
//!
//! | module | what it gives |
//! | --- | --- |
//! | [`lion`] | sign of an interpolated momentum: one state buffer instead of AdamW's two |
//! | [`spam`] | Adam with spike clipping, momentum reset and sparse momentum; a spike monitor |
//! | [`perp_grad`] | any optimizer without the gradient's part along the weights; softmax-collapse and scaling diagnoses |
//! | [`sharpness`] | SAM, ASAM, GSAM, SAGM and GAM around any optimizer |
//! | [`sso`] | few calls of an expensive loss, many cheap steps of the model; a stochastic line search |
//! | [`large_batch`] | learning-rate and regime scaling, gradient noise, micro-batches, diffusion diagnostics |
//! | [`discovery`] | search for update rules: typed programs, evolution, a compiler to an optimizer |
//! | [`diagnostics`] | ranks of untrained architectures by gradient signs; the examples that make a loss oscillate |
//! | [`adamw`], [`sgd`] | the baselines, in the same single pass over memory |
//! | [`local`] | one layer, one loss, one optimizer: no gradient between layers |
//! | [`transform`] | clip, spike clip, project, accumulate, decay, guard: chained in front of an optimizer |
//! | [`schedule`] | learning rates (or any scalar) as pure functions of the step |
//!
//! Every optimizer implements `candle_nn::Optimizer` and drops into an existing loop. Beyond it:
//!
//! - [`ParamGroup`]s with hyper-parameters and decay masks of their own (`with_groups`);
//! - a [`Chain`](transform::Chain) of gradient transforms (`with_transforms`) whose scalars are
//!   applied inside the step, without new tensors;
//! - [`Stateful`]: state as named tensors that resume with the same bits, undoing by
//!   [`Snapshot`], and the bytes it really occupies;
//! - one policy for NaN and infinity, [`NonFinite`];
//! - [`ClosureOptimizer`] for methods that evaluate the loss more than once per step.
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use candle_nn::{init::ZERO, Linear, Module, Optimizer, VarBuilder, VarMap};
//! use thalweg_optim::schedule::{Cosine, Schedule, Warmup};
//! use thalweg_optim::transform::{Chain, ClipByGlobalNorm};
//! use thalweg_optim::{DecayMask, Lion, LionConfig, ParamGroup, Stateful};
//!
//! let vars = VarMap::new();
//! let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
//! let bias = vb.get_with_hints(1, "bias", ZERO)?;
//! let model = Linear::new(vb.get_with_hints((1, 3), "weight", ZERO)?, Some(bias));
//! let x = Tensor::new(&[[0f32, 1., 2.], [1., 0., 1.], [2., 1., 0.]], &Device::Cpu)?;
//! let y = Tensor::new(&[[1f32], [0.], [-1.]], &Device::Cpu)?;
//!
//! let config = LionConfig { weight_decay: 0.1, decay_mask: DecayMask::NoOneDimensional, ..Default::default() };
//! let mut optimizer = Lion::with_groups(vec![ParamGroup::from_varmap(&vars, config)])?
//!     .with_transforms(Chain::new().then(ClipByGlobalNorm::new(1.0)?));
//! let schedule = Warmup::new(10, Cosine::new(0.03, 0.0, 190)?)?;
//! let mut last = f32::INFINITY;
//! for step in 0..200 {
//!     optimizer.set_learning_rate(schedule.at(step));
//!     let loss = (model.forward(&x)? - &y)?.sqr()?.mean_all()?;
//!     optimizer.backward_step(&loss)?;
//!     last = loss.to_scalar()?;
//! }
//! assert!(last < 0.02, "{last}");
//! // One buffer of momentum: as many numbers as the model has weights.
//! assert_eq!(optimizer.state_bytes(), 4 * 4);
//! # Ok::<(), thalweg_optim::Error>(())
//! ```

mod accumulate;
pub mod adamw;
pub mod bilevel;
pub mod closure;
pub mod consensus;
pub mod diagnostics;
pub mod discovery;
mod error;
mod foreign;
mod fused;
pub mod gradients;
mod host;
pub mod large_batch;
pub mod lion;
pub mod local;
pub mod param_group;
pub mod perp_grad;
pub mod schedule;
pub mod sgd;
pub mod sharpness;
pub mod spam;
pub mod sso;
pub mod transform;
#[cfg(feature = "verify")]
pub mod verify;

pub use adamw::{AdamW, AdamWConfig};
pub use closure::ClosureOptimizer;
pub use error::{Error, Result};
pub use foreign::Foreign;
pub use fused::{
    NonFinite, Snapshot, State, Stateful, StepCounts, StepReport, StepWith, WeightDecay,
};
pub use gradients::{global_norm, Gradients};
pub use lion::{Lion, LionConfig};
pub use param_group::{DecayMask, ParamFilter, ParamGroup};
pub use sgd::{SgdConfig, SgdMomentum};
pub use spam::{Spam, SpamConfig};
pub use tensor_core::random::RandomStream;

/// The example of the README is compiled and run with the others.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

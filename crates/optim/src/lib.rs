//! Optimizers, gradient transforms, learning-rate schedules and training diagnostics for
//! [candle](candle_core), with fused update kernels.

mod accumulate;
pub mod adamw;
pub mod closure;
mod error;
mod foreign;
mod fused;
pub mod gradients;
pub mod large_batch;
pub mod lion;
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

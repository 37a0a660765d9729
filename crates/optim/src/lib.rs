//! Optimizers, gradient transforms, learning-rate schedules and training diagnostics for
//! [candle](candle_core), with fused update kernels.

mod accumulate;
pub mod closure;
mod error;
pub mod gradients;
pub mod large_batch;
pub mod param_group;
pub mod schedule;
pub mod sso;
#[cfg(feature = "verify")]
pub mod verify;

pub use closure::ClosureOptimizer;
pub use error::{Error, Result};
pub use gradients::Gradients;
pub use param_group::{DecayMask, ParamFilter, ParamGroup};
pub use tensor_core::random::RandomStream;

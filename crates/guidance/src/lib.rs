//! Steering diffusion and flow models on [candle](candle_core): rules that plug into the sampling
//! loop of `thalweg-flows`.
//!
//! | module | what it gives |
//! | --- | --- |
//! | [`basic`] | classifier-free guidance, autoguidance, classifier guidance; intervals, schedules, sums of rules |
//! | [`adaptive`] | adaptive guidance: the same guidance at a part of its evaluations |
//! | [`apg`] | adaptive projected guidance: high scales without oversaturation |
//! | [`svdd`] | soft value-based decoding: black-box rewards, continuous and discrete |
//! | [`space`] | in which form of the prediction a rule works |
//!
//! `w = 1` means "conditional only" everywhere. Rules compose: what two of them both ask is
//! evaluated once.

pub mod adaptive;
pub mod apg;
pub mod basic;
mod error;
pub mod space;
pub mod svdd;
#[cfg(feature = "verify")]
pub mod verify;

pub use adaptive::{AdaptiveGuidance, LinearAg, LinearAgFitter};
pub use apg::Apg;
pub use basic::{Autoguidance, Cfg, ClassifierGuidance, Interval, Rescaled, Scheduled, Sum, Then};
pub use error::{Error, Result};
pub use space::{ReduceDims, Space};
pub use svdd::Svdd;
pub use tensor_core::random::RandomStream;

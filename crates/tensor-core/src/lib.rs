//! The floor that every other thalweg crate stands on: a thin layer over [candle](candle_core)
//! with what training code needs and candle does not have.
//!
//! | module | what it gives |
//! | --- | --- |
//! | [`device`] | parse `cpu`, `cuda:1`, `metal`; a missing feature is an error that names it |
//! | [`random`] | seeded, splittable random streams that fill tensors, the same bits for any thread count |
//! | [`params`] | a view over named variables: flatten, dot, norm, axpy, EMA, snapshot, in place |
//! | [`kernels`] | the fused elementwise update engine and reductions in a fixed order |
//! | [`autograd`] | Hessian-vector products, mixed and forward derivatives, gradient checks |
//! | [`solve`] | conjugate gradient, Neumann series, power iteration, Lanczos, fixed points |
//! | [`operator`] | linear operators with exact transposes: masks, pooling, blur, matrices |
//! | [`checkpoint`] | atomic safetensors files of named state that refuse what does not fit |
//!
//! Two features serve the crates that stand on it: `verify` reads reference files and records what
//! was compared, `testing` has what their tests share.
//!
//! Tensors are candle's; nothing here adds a tensor type. Nothing here prints: progress and
//! decisions are `tracing` events.

pub mod autograd;
pub mod checkpoint;
pub mod device;
mod error;
pub mod flat;
pub mod kernels;
pub mod operator;
pub mod params;
pub mod random;
pub mod solve;
#[cfg(feature = "testing")]
pub mod testing;
#[cfg(feature = "verify")]
pub mod verify;

pub use error::{Error, Result};

/// The README's example is compiled and run with the other examples.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

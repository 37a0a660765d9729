//! Neural-network layers, losses, initialisers and small reference networks that
//! [`candle_nn`] lacks, all of them with gradients.
//!
//! | module | what it gives |
//! | --- | --- |
//! | [`init`] | Glorot, He, LeCun, orthogonal, truncated normal; variables seeded by name |
//! | [`norm`] | layer norm and RMS norm with a gradient |
//! | [`softmax`] | softmax and log-softmax with a gradient |
//! | [`loss`] | cross entropy over class indices |
//! | [`models`] | small reference networks (feature `models`) |
//!
//! Several of candle's own functions (`softmax_last_dim`, `LayerNorm` with a bias, `RmsNorm`)
//! return no gradient and no error. The layers here take the same parameter names and shapes, so
//! weights move over unchanged.

mod error;
pub mod init;
mod kernel;
pub mod loss;
#[cfg(feature = "models")]
pub mod models;
pub mod norm;
pub mod softmax;
pub mod stablemax;
#[cfg(feature = "verify")]
pub mod verify;

pub use error::{Error, Result};
/// The seeded stream that initial values are drawn from, from `thalweg-tensor-core`.
pub use tensor_core::random::RandomStream;

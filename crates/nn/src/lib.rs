//! Neural-network layers, losses, initializers and small reference networks that
//! [`candle_nn`] lacks, all of them with gradients.
//!
//! | module | what it gives |
//! | --- | --- |
//! | [`linear`], [`conv`] | linear layers, convolutions and their transposes, bias and activation fused |
//! | [`attention`] | scaled dot-product attention without the matrix of all scores |
//! | [`activation`] | ReLU, GELU, SiLU, Mish and others |
//! | [`norm`] | layer norm, RMS norm, group norm, batch norm with a gradient |
//! | [`norm::power`] | power normalization: batch statistics for transformers that do not collapse |
//! | [`norm::ghost_batch`] | batch norm over small groups of a large batch |
//! | [`pool`], [`resample`] | pooling with any window, nearest and bilinear resampling |
//! | [`embedding`], [`dropout`], [`condition`] | tables of vectors, seeded dropout, levels for denoisers |
//! | [`softmax`] | softmax and log-softmax with a gradient |
//! | [`lora`] | low-rank adapters for layers, and for any network that is built from variables |
//! | [`loss`] | cross entropy over class indices or soft labels |
//! | [`masked`] | log-probabilities of policies some of whose actions are impossible |
//! | [`goodness`] | losses of layers that are trained apart: goodness, the logistic loss |
//! | [`stablemax`] | StableMax and its cross entropy, which rounding does not silence |
//! | [`init`] | Glorot, He, LeCun, orthogonal, truncated normal; variables seeded by name |
#![cfg_attr(
    feature = "models",
    doc = "| [`models`] | MLP, convolutional and residual networks, a transformer, a UNet |"
)]
//!
//! Several of candle's own functions (`softmax_last_dim`, `LayerNorm` with a bias, `RmsNorm`)
//! return no gradient and no error, and training on the CPU spends most of its time in copies,
//! allocations and naive convolutions. The layers here take the same parameter names and shapes, so
//! weights move over unchanged.
//!
//! Layers are candle `Module`s or `ModuleT`s over tensors of the caller; nothing here knows a
//! trainer or a data set. Kernels are fused for f32 and f64 on the CPU, with the same bits for any
//! number of threads; other devices run candle operations. Each item's documentation says whether
//! it can be differentiated twice.

pub mod activation;
pub mod attention;
pub mod condition;
pub mod conv;
pub mod dropout;
pub mod embedding;
mod error;
pub mod goodness;
pub mod init;
mod kernel;
pub mod linear;
pub mod lora;
pub mod loss;
pub mod masked;
#[cfg(feature = "models")]
pub mod models;
pub mod norm;
pub mod pool;
pub mod resample;
pub mod softmax;
pub mod stablemax;
#[cfg(feature = "verify")]
pub mod verify;

pub use error::{Error, Result};
/// The seeded stream that initial values are drawn from, from `thalweg-tensor-core`.
pub use tensor_core::random::RandomStream;

/// The README's example, compiled and run.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

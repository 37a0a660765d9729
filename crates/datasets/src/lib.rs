//! Data for training and testing models with [candle](candle_core): embedded, generated, loaded
//! and downloaded.
//!
//! | module | what it gives |
//! | --- | --- |
//! | [`digits`](mod@digits) | 1797 real images of handwritten digits inside the crate, no download |
//! | [`generate`] | problems made from a seed, with a known answer |
//! | [`load`] | MNIST and other IDX files |
//! | [`split`](mod@split) | seeded and stratified splits |
//! | [`batches`] | mini-batches with a state that resumes in the middle of an epoch |
//! | [`standardize`] | mean zero and variance one, fitted on the training part |
//!
//! A data set is a [`Classification`] or a [`Regression`]: two candle tensors with the examples
//! along dimension 0. There is no data set trait to adopt; [`Batches`] also takes a plain pair of
//! tensors. Every random choice comes from a [`RandomStream`] that the caller passes in.

pub mod batches;
mod data;
pub mod digits;
mod error;
pub mod generate;
pub mod load;
pub mod split;
pub mod standardize;

pub use batches::{BatchConfig, BatchState, Batches, Order};
pub use data::{Classification, Examples, Regression, TrainTest};
pub use digits::digits;
pub use error::{Error, Result};
pub use load::idx::mnist;
pub use split::Sizes;
pub use tensor_core::random::RandomStream;

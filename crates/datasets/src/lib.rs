//! Data for training and testing models with [candle](candle_core): embedded, generated, loaded
//! and downloaded.
//!
//! | module | what it gives |
//! | --- | --- |
//! | [`digits`](mod@digits) | 1797 real images of handwritten digits inside the crate, no download |
//! | [`text`] | 199,995 characters of Shakespeare inside the crate |
//! | [`generate`] | problems made from a seed, with a known answer |
//! | [`load`] | MNIST (IDX), CIFAR, CSV, NPY and NPZ files, binding tables of DNA 8-mers |
//! | [`data_dir`] | the layout of a folder with data sets (`--data DIR`) |
//! | `download` | checked, resumable downloads into that layout (feature `download`) |
//! | [`split`](mod@split) | seeded and stratified splits |
//! | [`batches`] | mini-batches with a state that resumes in the middle of an epoch |
//! | [`standardize`] | mean zero and variance one, fitted on the training part |
//! | [`corrupt`] | shifted images, wrong labels, long-tailed classes |
//!
//! A data set is a [`Classification`] or a [`Regression`]: two candle tensors with the examples
//! along dimension 0. There is no data set trait to adopt; [`Batches`] also takes a plain pair of
//! tensors. Every random choice comes from a [`RandomStream`] that the caller passes in.
//!
//! ```
//! use thalweg_datasets::{digits, BatchConfig, Batches, RandomStream, Sizes};
//!
//! let mut rng = RandomStream::new(0);
//! let parts = digits()?.split_stratified(Sizes::Fractions(&[0.8, 0.2]), &mut rng)?;
//! let (train, test) = (&parts[0], &parts[1]);
//! let mut batches = Batches::new(train.len(), BatchConfig::shuffled(64), &mut rng)?;
//! for _step in 0..100 {
//!     let (images, labels) = batches.draw(train)?; // [64, 64] in [0, 1] and u32 [64]
//!     # let _ = (images, labels);
//! }
//! assert_eq!(test.len(), 359);
//! # Ok::<(), thalweg_datasets::Error>(())
//! ```

pub mod batches;
pub mod corrupt;
mod data;
pub mod data_dir;
pub mod digits;
#[cfg(feature = "download")]
pub mod download;
mod error;
pub mod generate;
pub mod load;
pub mod split;
pub mod standardize;
pub mod text;

pub use batches::{BatchConfig, BatchState, Batches, Order};
pub use data::{Classification, Examples, Regression, TrainTest};
pub use data_dir::DataDir;
pub use digits::digits;
pub use error::{Error, Result};
pub use load::cifar::{cifar10, cifar100};
pub use load::idx::mnist;
pub use split::Sizes;
pub use tensor_core::random::RandomStream;

/// Compiles the examples of the README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

//! Integration tests of `thalweg-datasets`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod batches;
mod binding;
mod cifar;
mod corrupt;
mod data;
mod data_dir;
mod digits;
#[cfg(feature = "download")]
mod download;
mod generate;
mod idx;
mod markov;
mod modular;
mod npy;
#[cfg(feature = "download")]
mod server;
mod split;
mod table;
mod text;

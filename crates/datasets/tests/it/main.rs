//! Integration tests of `thalweg-datasets`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod batches;
mod cifar;
mod corrupt;
mod data;
mod data_dir;
mod digits;
mod generate;
mod idx;
mod markov;
mod modular;
mod npy;
mod split;
mod table;

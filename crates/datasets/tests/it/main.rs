//! Integration tests of `thalweg-datasets`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod batches;
mod data;
mod digits;
mod idx;
mod markov;
mod modular;
mod split;

//! Integration tests of `thalweg-convex`: one binary, a module per topic.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

extern crate thalweg_convex as convex;

mod attention_svm;
mod block_cd;
mod gromov;
mod relu;
mod support;
mod transport;

//! Integration tests of `thalweg-optim`: one binary, a module per topic.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

extern crate thalweg_optim as optim;

mod large_batch;
mod lion;
mod perp_grad;
mod schedule;
mod sharpness;
mod spam;
mod sso;
mod support;

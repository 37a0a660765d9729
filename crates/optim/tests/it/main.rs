//! Integration tests of `thalweg-optim`: one binary, a module per topic.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

extern crate thalweg_optim as optim;

mod adamw;
mod allocations;
mod bilevel;
mod consensus;
mod discovery;
mod gradients;
mod gradsign;
mod large_batch;
mod lion;
mod local;
mod nonfinite;
mod opposing_signals;
mod perp_grad;
mod schedule;
mod sgd;
mod sharpness;
mod spam;
mod sso;
mod state;
mod support;
mod transform;

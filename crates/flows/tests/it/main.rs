//! Integration tests of `thalweg-flows`: one binary, a module per topic.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

extern crate thalweg_flows as flows;

mod combine;
mod disback;
mod floor;
mod late;
mod rectified;
mod reference;
mod solvers;
mod support;
#[cfg(feature = "transformers")]
mod transformers;

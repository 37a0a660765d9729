//! Integration tests of `thalweg-flows`: one binary, a module per topic.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

extern crate thalweg_flows as flows;

mod floor;
mod rectified;
mod reference;
mod solvers;
mod support;

//! Integration tests of `thalweg-guidance`: one binary, a module per topic.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

extern crate thalweg_guidance as guidance;

mod adaptive;
mod apg;
mod basic;
mod reference;
mod support;
mod svdd;

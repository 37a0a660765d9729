//! Integration tests of `thalweg-sequence-design`: one binary, a module per topic.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

extern crate thalweg_sequence_design as sequence_design;

mod bib;
mod drakes;
mod gflownet;
mod sequences;
mod support;
mod svdd;

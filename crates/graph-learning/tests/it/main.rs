//! Integration tests of `thalweg-graph-learning`: one binary, a module per topic.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

extern crate thalweg_graph_learning as graph_learning;

mod cgs;
mod contrastive;
mod conv;
mod forward;
mod generate;
mod graph;
mod graphon;
mod io;
mod metrics;
mod sample;
mod scale;
mod sparse;
mod ssl;
mod support;

//! Integration tests of `thalweg-nn`: one binary, a module per topic.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

extern crate thalweg_nn as nn;

mod conv;
mod dense;
mod ghost;
mod goodness;
mod images;
mod init;
mod layers;
mod lora;
mod losses;
mod masked;
mod memory;
mod models;
mod power;
mod reference;
mod second_order;
mod stable;
mod support;
mod tokens;

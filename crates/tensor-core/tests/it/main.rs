//! One binary for all integration tests of the crate: it links once.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod autograd;
mod checkpoint;
mod child;

//! Checks against reference files, one function per method.
//!
//! Each runs this crate on the file's inputs with the file's hyper-parameters and compares with
//! the file's outputs. Cases, counts and shapes are discovered in the file.

mod adaptive;
mod apg;
mod guidance_core;
mod svdd;

pub use adaptive::adaptive_guidance;
pub use apg::apg;
pub use guidance_core::guidance_core;
pub use svdd::{svdd, svdd_without_tokens};

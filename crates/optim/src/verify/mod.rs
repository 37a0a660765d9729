//! Checks against reference files, one function per method.
//!
//! Each runs this crate on the file's inputs with the file's hyper-parameters and compares with
//! the file's outputs. Cases, counts and shapes are discovered in the file.

mod large_batch;
mod sso;

pub use large_batch::large_batch;
pub use sso::sso;

use crate::{Error, Result};
use tensor_core::verify::{Array, Reference};

/// The rows along the first axis of an array.
fn rows(array: &Array) -> Result<Vec<Array>> {
    let count = array.shape.first().copied().unwrap_or(0);
    (0..count).map(|i| Ok(array.row(i)?)).collect()
}

/// An error about the file.
fn bad(reference: &Reference, reason: impl ToString) -> Error {
    reference.bad(reason).into()
}

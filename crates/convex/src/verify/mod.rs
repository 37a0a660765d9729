//! Checks against reference files, one function per method.
//!
//! Each runs this crate on the file's inputs with the file's hyper-parameters and compares with
//! the file's outputs. Cases, counts and shapes are discovered in the file.

mod attention_svm;
mod bcd;
mod convex_relu;
mod sparse_ot;

pub use attention_svm::attention_svm;
pub use bcd::bcd;
pub use convex_relu::convex_relu;
pub use sparse_ot::sparse_ot;

use crate::Result;
use tensor_core::verify::Reference;

/// What stands before `name`: nothing, or a case and a separator.
fn prefixes(reference: &Reference, name: &str) -> Vec<String> {
    let cases = reference.cases(name).into_iter();
    cases
        .filter(|p| p.is_empty() || p.ends_with(['.', '/', '_']))
        .collect()
}

/// A hyper-parameter of the case, or of the file.
fn number<T: std::str::FromStr>(reference: &Reference, case: &str, key: &str) -> Result<T> {
    let own = format!("{case}{key}");
    let key = if reference.metadata().contains_key(&own) {
        own
    } else {
        key.to_string()
    };
    Ok(reference.number(&key)?)
}

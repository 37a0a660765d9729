//! Checks against reference files, one function per method.
//!
//! Each runs this crate on the file's inputs with the file's hyper-parameters and compares with
//! the file's outputs. Cases, counts and shapes are discovered in the file.

mod bo_rep;
mod cbo;
mod gradsign;
mod large_batch;
mod lion;
mod opposing_signals;
mod perp_grad;
mod sharpness;
mod spam;
mod sso;

pub use bo_rep::bo_rep;
pub use cbo::cbo;
pub use gradsign::gradsign;
pub use large_batch::large_batch;
pub use lion::lion;
pub use opposing_signals::opposing_signals;
pub use perp_grad::perp_grad;
pub use sharpness::sharpness;
pub use spam::spam;
pub use sso::sso;

use crate::{Error, Result};
use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};
use candle_nn::Optimizer;
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

/// A number inside a metadata value that is a JSON object.
fn json_number(
    reference: &Reference,
    name: &str,
    object: &serde_json::Value,
    key: &str,
) -> Result<f64> {
    let missing = || {
        bad(
            reference,
            format!("metadata `{name}` has no number `{key}`"),
        )
    };
    object[key].as_f64().ok_or_else(missing)
}

/// The values of a tensor, row-major.
fn values(tensor: &Tensor) -> Result<Vec<f64>> {
    Ok(tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?)
}

/// One step with each parameter's gradient number `t`, where it has that many.
fn step_on(
    optimizer: &mut impl Optimizer,
    params: &[(String, Var)],
    grads: &[Vec<Tensor>],
    t: usize,
) -> Result<()> {
    let mut store = GradStore::default();
    for ((_, var), grads) in params.iter().zip(grads) {
        if let Some(grad) = grads.get(t) {
            store.insert(var, grad.clone());
        }
    }
    Ok(optimizer.step(&store)?)
}

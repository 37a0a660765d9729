//! Lists of tensors as one vector.

use crate::Result;
use candle_core::Tensor;
use tensor_core::kernels::{moments, GradMap};

/// `<a, b>`.
pub(super) fn dot(a: &[Tensor], b: &[Tensor]) -> Result<f64> {
    let pairs = a.iter().zip(b);
    let items: Vec<_> = pairs
        .map(|(a, b)| (Some(a), b, GradMap::default()))
        .collect();
    Ok(moments(&items)?.iter().map(|m| m.pg).sum())
}

/// `|a|`.
pub(super) fn norm(a: &[Tensor]) -> Result<f64> {
    let items: Vec<_> = a.iter().map(|a| (None, a, GradMap::default())).collect();
    Ok(moments(&items)?.iter().map(|m| m.gg).sum::<f64>().sqrt())
}

/// `alpha a + beta b`.
pub(super) fn combine(alpha: f64, a: &[Tensor], beta: f64, b: &[Tensor]) -> Result<Vec<Tensor>> {
    let mut out = Vec::with_capacity(a.len());
    for (a, b) in a.iter().zip(b) {
        out.push((a.affine(alpha, 0.0)? + b.affine(beta, 0.0)?)?);
    }
    Ok(out)
}

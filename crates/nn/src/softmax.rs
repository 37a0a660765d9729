//! Softmax and log-softmax with a gradient.
//!
//! `candle_nn::ops::softmax_last_dim` returns no gradient and no error. These are built from
//! candle operations only: they run on every device and can be differentiated any number of
//! times. f16 and bf16 inputs are computed in f32 and returned in their own dtype.

use crate::Result;
use candle_core::shape::Dim;
use candle_core::{DType, Tensor};

/// `softmax(x)_i = exp(x_i) / sum_j exp(x_j)` along `dim`; the shape stays.
///
/// An entry of `-inf` gets probability 0, so masks may be added to `x`. A row of `-inf` only has
/// no softmax and gives NaN.
///
/// # Errors
/// Those of candle, for a `dim` that does not exist or an integer dtype.
pub fn softmax(x: &Tensor, dim: impl Dim) -> Result<Tensor> {
    let dim = dim.to_index(x.shape(), "softmax")?;
    let exp = shifted(x, dim)?.exp()?;
    let normal = exp.broadcast_div(&exp.sum_keepdim(dim)?)?;
    Ok(normal.to_dtype(x.dtype())?)
}

/// `log softmax(x)_i = x_i - log sum_j exp(x_j)` along `dim`, without forming the probabilities;
/// the shape stays.
///
/// # Errors
/// Those of candle, for a `dim` that does not exist or an integer dtype.
pub fn log_softmax(x: &Tensor, dim: impl Dim) -> Result<Tensor> {
    let dim = dim.to_index(x.shape(), "log_softmax")?;
    let shifted = shifted(x, dim)?;
    let log_sum = shifted.exp()?.sum_keepdim(dim)?.log()?;
    Ok(shifted.broadcast_sub(&log_sum)?.to_dtype(x.dtype())?)
}

/// `x - max x` in the dtype to compute in. The maximum is a constant for the gradient: both
/// functions are the same for every shift.
fn shifted(x: &Tensor, dim: usize) -> Result<Tensor> {
    let x = match x.dtype() {
        DType::F16 | DType::BF16 => x.to_dtype(DType::F32)?,
        _ => x.clone(),
    };
    let max = x.detach().max_keepdim(dim)?;
    Ok(x.broadcast_sub(&max)?)
}

//! Softmax and log-softmax with a gradient.
//!
//! `candle_nn::ops::softmax_last_dim` returns no gradient and no error. Here f32 and f64 tensors on
//! the CPU take one fused pass along the last dimension,
//!
//! ```text
//! p = e^(x - max x) / sum_j e^(x_j - max x),   dx = p (dp - sum_j dp_j p_j)
//! l = ln p,                                    dx = dl - p sum_j dl_j
//! ```
//!
//! and everything else (other dimensions, devices and dtypes, and gradients that keep their graph)
//! candle operations, which can be differentiated any number of times. f16 and bf16 inputs are
//! computed in f32 and returned in their own dtype.

mod short;

use crate::kernel::{
    filled, has_kernel, max, pieces, sum, sum2, tensor, vectorized, Computed, Scalar, View,
};
use crate::Result;
use candle_core::shape::Dim;
use candle_core::{DType, Tensor};
use tensor_core::autograd::keeps_graph;

/// `softmax(x)_i = exp(x_i) / sum_j exp(x_j)` along `dim`; the shape stays.
///
/// An entry of `-inf` gets probability 0, so masks may be added to `x`. A row of `-inf` only has
/// no softmax and gives NaN.
///
/// # Errors
/// Those of candle, for a `dim` that does not exist or an integer dtype.
pub fn softmax(x: &Tensor, dim: impl Dim) -> Result<Tensor> {
    let dim = dim.to_index(x.shape(), "softmax")?;
    if is_fused(x, dim)? {
        return match x.dtype() {
            DType::F64 => fused::<f64, false>(&x.contiguous()?),
            _ => fused::<f32, false>(&x.contiguous()?),
        };
    }
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
    if is_fused(x, dim)? {
        return match x.dtype() {
            DType::F64 => fused::<f64, true>(&x.contiguous()?),
            _ => fused::<f32, true>(&x.contiguous()?),
        };
    }
    let shifted = shifted(x, dim)?;
    let log_sum = shifted.exp()?.sum_keepdim(dim)?.log()?;
    Ok(shifted.broadcast_sub(&log_sum)?.to_dtype(x.dtype())?)
}

fn is_fused(x: &Tensor, dim: usize) -> Result<bool> {
    Ok(has_kernel(x) && dim + 1 == x.rank() && x.elem_count() > 0 && !keeps_graph()?)
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

/// Numbers of a row whose exponentials are added in the row's own precision; the blocks are added
/// in f64.
const BLOCK: usize = 512;
/// Sums that run side by side.
const LANES: usize = 32;

/// The maximum of a row and the logarithm of the sum of exponentials.
#[inline(always)]
pub(crate) fn log_sum_exp<T: Scalar>(x: &[T]) -> (T, T) {
    let top = max(x);
    let mut total = 0.0;
    for x in x.chunks(BLOCK) {
        total += sum(x, |x| (x - top).exp_of_negative()).to_f64();
    }
    (top, T::from_f64(total.ln()))
}

/// `y = e^(x - top)`, `top` being the maximum; gives the sum.
#[inline(always)]
fn exponentials_of<T: Scalar>(x: &[T], top: T, y: &mut [T]) -> f64 {
    let mut total = 0.0;
    for (x, y) in x.chunks(BLOCK).zip(y.chunks_mut(BLOCK)) {
        let mut lanes = Lanes::new(top);
        let (full, mut places) = (x.chunks_exact(LANES), y.chunks_exact_mut(LANES));
        let rest = full.remainder();
        for (x, y) in full.zip(&mut places) {
            lanes.add(x, y);
        }
        lanes.add(rest, places.into_remainder());
        total += lanes.sum();
    }
    total
}

/// `x <- e^(x - top)` in place; gives the sum.
#[inline(always)]
pub(crate) fn exponentials<T: Scalar>(x: &mut [T], top: T) -> f64 {
    let mut total = 0.0;
    for block in x.chunks_mut(BLOCK) {
        let mut lanes = Lanes::new(top);
        let mut full = block.chunks_exact_mut(LANES);
        for x in &mut full {
            let old: [T; LANES] = std::array::from_fn(|l| x[l]);
            lanes.add(&old, x);
        }
        let rest = full.into_remainder();
        let mut old = [T::ZERO; LANES];
        let old = &mut old[..rest.len()];
        old.copy_from_slice(rest);
        lanes.add(old, rest);
        total += lanes.sum();
    }
    total
}

/// Sums of exponentials that run side by side.
struct Lanes<T> {
    top: T,
    sums: [T; LANES],
}

impl<T: Scalar> Lanes<T> {
    #[inline(always)]
    fn new(top: T) -> Self {
        Self {
            top,
            sums: [T::ZERO; LANES],
        }
    }

    /// `y = e^(x - top)` of at most as many numbers as there are sums.
    #[inline(always)]
    fn add(&mut self, x: &[T], y: &mut [T]) {
        for ((x, y), sum) in x.iter().zip(y).zip(&mut self.sums) {
            *y = (*x - self.top).exp_of_negative();
            *sum = *sum + *y;
        }
    }

    #[inline(always)]
    fn sum(&self) -> f64 {
        sum(&self.sums, |x| x).to_f64()
    }
}

/// Softmax, or its logarithm, of one row.
#[inline(always)]
fn forward_row<T: Scalar, const LOG: bool>(x: &[T], y: &mut [T]) {
    if LOG {
        let (top, log) = log_sum_exp(x);
        for (y, x) in y.iter_mut().zip(x) {
            *y = (*x - top) - log;
        }
        return;
    }
    let top = max(x);
    let scale = T::from_f64(1.0 / exponentials_of(x, top, y));
    for y in y {
        *y = *y * scale;
    }
}

fn fused<T: Scalar, const LOG: bool>(x: &Tensor) -> Result<Tensor> {
    let width = x.dims()[x.rank() - 1];
    let y = {
        let view = View::new(x)?;
        let x = view.slice::<T>()?;
        filled(x.len(), |y| {
            pieces(y, width, |first, y| {
                let x = &x[first * width..][..y.len()];
                vectorized(
                    #[inline(always)]
                    || {
                        if width < LANES {
                            return short::forward::<T, LOG>(x, y, width);
                        }
                        for (x, y) in x.chunks_exact(width).zip(y.chunks_exact_mut(width)) {
                            forward_row::<T, LOG>(x, y);
                        }
                    },
                );
            });
        })
    };
    let backward = move |_: &[&Tensor], y: &Tensor, dy: &Tensor| {
        Ok(vec![Some(gradient::<T, LOG>(y, dy, width)?)])
    };
    let node = Computed::new("softmax", y, x.shape(), backward);
    Ok(x.apply_op1(node)?)
}

fn gradient<T: Scalar, const LOG: bool>(y: &Tensor, dy: &Tensor, width: usize) -> Result<Tensor> {
    let dx = {
        let (yv, dyv) = (View::new(y)?, View::new(dy)?);
        let (y, dy) = (yv.slice::<T>()?, dyv.slice::<T>()?);
        filled(y.len(), |dx| {
            pieces(dx, width, |first, dx| {
                let range = first * width..first * width + dx.len();
                let (y, dy) = (&y[range.clone()], &dy[range]);
                vectorized(
                    #[inline(always)]
                    || {
                        if width < LANES {
                            return short::gradient::<T, LOG>(y, dy, dx, width);
                        }
                        let rows = y.chunks_exact(width).zip(dy.chunks_exact(width));
                        for ((y, dy), dx) in rows.zip(dx.chunks_exact_mut(width)) {
                            row_gradient::<T, LOG>(y, dy, dx);
                        }
                    },
                );
            });
        })
    };
    tensor(dx, y.shape())
}

#[inline(always)]
fn row_gradient<T: Scalar, const LOG: bool>(y: &[T], dy: &[T], dx: &mut [T]) {
    if LOG {
        let total = sum(dy, |g| g);
        for ((y, g), dx) in y.iter().zip(dy).zip(dx) {
            *dx = *g - y.exp_of_negative() * total;
        }
    } else {
        let total = sum2(y, dy, |y, g| y * g);
        for ((y, g), dx) in y.iter().zip(dy).zip(dx) {
            *dx = *y * (*g - total);
        }
    }
}

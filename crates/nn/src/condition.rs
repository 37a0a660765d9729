//! What a network for generation is told besides its input: a noise level or time per example, a
//! vector per example added to the channels of images, a second image beside the first.
//!
//! ```
//! use candle_core::{Device, Tensor};
//! use thalweg_nn::condition::{shift_channels, sinusoidal};
//! let levels = Tensor::new(&[0f32, 0.5], &Device::Cpu)?;
//! let features = sinusoidal(&levels, 6, 10_000.0)?;
//! assert_eq!(features.dims(), &[2, 6]);
//! let images = Tensor::zeros((2, 6, 4, 4), features.dtype(), &Device::Cpu)?;
//! assert_eq!(shift_channels(&images, &features)?.dims(), &[2, 6, 4, 4]);
//! # Ok::<(), thalweg_nn::Error>(())
//! ```

use crate::kernel::{
    filled, has_kernel, piece_of, pieces, sum, tensor, vectorized, Computed, Scalar, View,
};
use crate::linear::same_dtype;
use crate::{Error, Result};
use candle_core::{DType, Shape, Tensor, D};
use rayon::prelude::*;
use tensor_core::autograd::keeps_graph;

/// Sines and cosines of `t` `[B]` (Vaswani et al. 2017, section 3.5; Ho, Jain, Abbeel 2020): gives
/// `[B, dim]`, first `sin(t w_i)`, then `cos(t w_i)` with `w_i = max_period^(-i / (dim / 2))`. Levels
/// in `[0, 1]` are usually multiplied by 1000 first.
///
/// # Errors
/// [`Error::Shape`] for `t` of another rank or empty, [`Error::InvalidConfig`] for an odd `dim` or a
/// period that is not above 0; [`Error::DType`] for integers.
pub fn sinusoidal(t: &Tensor, dim: usize, max_period: f64) -> Result<Tensor> {
    crate::kernel::wide(t.dtype())?;
    if t.rank() != 1 || t.elem_count() == 0 {
        return Err(Error::shape("t", t.dims(), "a non-empty [B]"));
    }
    if dim == 0 || dim % 2 == 1 {
        return Err(Error::config("dim", dim, "an even number above 0"));
    }
    if !(max_period.is_finite() && max_period > 0.0) {
        return Err(Error::config("max_period", max_period, "a number above 0"));
    }
    let half = dim / 2;
    let frequency = |i: usize| max_period.powf(-(i as f64) / half as f64);
    let frequencies: Vec<f64> = (0..half).map(frequency).collect();
    let frequencies = crate::kernel::vector(frequencies, t.dtype(), t.device())?;
    let angles = t.unsqueeze(1)?.broadcast_mul(&frequencies.unsqueeze(0)?)?;
    Ok(Tensor::cat(&[angles.sin()?, angles.cos()?], D::Minus1)?)
}

/// `x` `[B, C, ..]` plus `shift` `[B, C]` at every position.
///
/// One pass over memory on the CPU in f32 and f64; candle operations elsewhere and where gradients
/// keep their graph, differentiable any number of times.
///
/// # Errors
/// [`Error::Shape`] and [`Error::DType`] when the two do not fit.
pub fn shift_channels(x: &Tensor, shift: &Tensor) -> Result<Tensor> {
    if x.rank() < 2 || x.elem_count() == 0 || shift.dims() != &x.dims()[..2] {
        let expected = "[B, C] for a non-empty input [B, C, ..]";
        return Err(Error::shape("shift", shift.dims(), expected));
    }
    same_dtype(x, [Some(shift)])?;
    if !has_kernel(x) || keeps_graph()? {
        let mut dims = vec![1; x.rank()];
        dims[..2].copy_from_slice(shift.dims());
        return Ok(x.broadcast_add(&shift.reshape(dims)?)?);
    }
    match x.dtype() {
        DType::F64 => shifted::<f64>(&x.contiguous()?, &shift.contiguous()?),
        _ => shifted::<f32>(&x.contiguous()?, &shift.contiguous()?),
    }
}

fn shifted<T: Scalar>(x: &Tensor, shift: &Tensor) -> Result<Tensor> {
    let plane: usize = x.dims()[2..].iter().product();
    let y = {
        let (xv, sv) = (View::new(x)?, View::new(shift)?);
        let (x, s) = (xv.slice::<T>()?, sv.slice::<T>()?);
        filled(x.len(), |y| {
            pieces(y, plane, |first, y| {
                let planes = x[first * plane..].chunks_exact(plane).zip(&s[first..]);
                vectorized(
                    #[inline(always)]
                    || {
                        for ((x, s), y) in planes.zip(y.chunks_exact_mut(plane)) {
                            for (y, x) in y.iter_mut().zip(x) {
                                *y = *x + *s;
                            }
                        }
                    },
                );
            });
        })
    };
    let backward = move |arguments: &[&Tensor], _: &Tensor, dy: &Tensor| {
        let view = View::new(dy)?;
        let planes = view.slice::<T>()?.par_chunks_exact(plane);
        let sums = planes.with_min_len(piece_of(plane)).map(|g| {
            vectorized(
                #[inline(always)]
                || sum(g, |g| g),
            )
        });
        let ds = tensor(sums.collect::<Vec<T>>(), arguments[1].shape())?;
        Ok(vec![Some(dy.clone()), Some(ds)])
    };
    let node = Computed::new("shift of channels", y, x.shape(), backward);
    Ok(x.apply_op2(shift, node)?)
}

/// The channels of `a` `[B, C, ..]`, then those of `b` `[B, D, ..]`: `[B, C + D, ..]`.
///
/// As `Tensor::cat` along dimension 1, whose gradient goes through memory number by number; this one
/// copies it in blocks. Candle operations outside the CPU in f32 and f64 and where gradients keep
/// their graph.
///
/// # Errors
/// [`Error::Shape`] and [`Error::DType`] when the two do not fit.
pub fn concat_channels(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let fits = a.rank() >= 2
        && a.rank() == b.rank()
        && a.dims()[0] == b.dims()[0]
        && a.dims()[2..] == b.dims()[2..];
    if !fits || a.elem_count() == 0 || b.elem_count() == 0 {
        let expected = format!("what lies beside {:?} along dimension 1", a.dims());
        return Err(Error::shape("second input", b.dims(), expected));
    }
    same_dtype(a, [Some(b)])?;
    if !has_kernel(a) || keeps_graph()? {
        return Ok(Tensor::cat(&[a, b], 1)?);
    }
    match a.dtype() {
        DType::F64 => joined::<f64>(&a.contiguous()?, &b.contiguous()?),
        _ => joined::<f32>(&a.contiguous()?, &b.contiguous()?),
    }
}

fn joined<T: Scalar>(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let mut dims = a.dims().to_vec();
    dims[1] += b.dims()[1];
    let shape = Shape::from(dims);
    // Numbers of an example.
    let [n, m] = [a, b].map(|t| t.elem_count() / t.dims()[0]);
    let y = {
        let (av, bv) = (View::new(a)?, View::new(b)?);
        let (a, b) = (av.slice::<T>()?, bv.slice::<T>()?);
        filled(a.len() + b.len(), |y| {
            pieces(y, n + m, |first, y| {
                for (i, y) in y.chunks_exact_mut(n + m).enumerate() {
                    let i = first + i;
                    y[..n].copy_from_slice(&a[i * n..(i + 1) * n]);
                    y[n..].copy_from_slice(&b[i * m..(i + 1) * m]);
                }
            });
        })
    };
    let backward = move |arguments: &[&Tensor], _: &Tensor, dy: &Tensor| {
        let view = View::new(dy)?;
        let dy = view.slice::<T>()?;
        let part = |of: &Tensor, start: usize, size: usize| {
            let dx = filled(of.elem_count(), |dx| {
                pieces(dx, size, |first, dx| {
                    for (i, dx) in dx.chunks_exact_mut(size).enumerate() {
                        let at = (first + i) * (n + m) + start;
                        dx.copy_from_slice(&dy[at..at + size]);
                    }
                });
            });
            tensor(dx, of.shape())
        };
        let (da, db) = (part(arguments[0], 0, n)?, part(arguments[1], n, m)?);
        Ok(vec![Some(da), Some(db)])
    };
    let node = Computed::new("concatenation", y, &shape, backward);
    Ok(a.apply_op2(b, node)?)
}

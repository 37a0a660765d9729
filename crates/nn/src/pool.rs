//! Pooling with any kernel, stride and padding, and its exact gradient.
//!
//! candle has no gradient for windows that overlap or leave gaps, and its `max_pool2d` gives a
//! quarter of the right one. Maxima are here; means, which are linear, are in
//! [`resample`](crate::resample).
//!
//! ```
//! use candle_core::{Device, Tensor};
//! use thalweg_nn::pool::{max_pool2d, PoolConfig};
//! let x = Tensor::arange(0f32, 9.0, &Device::Cpu)?.reshape((1, 1, 3, 3))?;
//! let config = PoolConfig { stride: (1, 1), ..2.into() };
//! let y = max_pool2d(&x, config)?.flatten_all()?.to_vec1::<f32>()?;
//! assert_eq!(y, [4.0, 5.0, 7.0, 8.0]);
//! # Ok::<(), thalweg_nn::Error>(())
//! ```

use crate::kernel::{filled, has_kernel, pieces, tensor, vectorized, Computed, Scalar, View};
use crate::{Error, Result};
use candle_core::{DType, Shape, Tensor};
use rayon::prelude::*;
use std::sync::Arc;
use tensor_core::autograd::keeps_graph;

pub use crate::resample::{adaptive_avg_pool2d, avg_pool2d};

/// Windows of a pooling; heights first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolConfig {
    /// Size of a window.
    pub kernel: (usize, usize),
    /// Distance of windows.
    pub stride: (usize, usize),
    /// Positions outside the image, on each side, that windows may cover: at most half a window.
    pub padding: (usize, usize),
    /// Whether these count in a mean, as zeros.
    pub count_include_pad: bool,
}

/// Square windows of this size, side by side, without padding.
impl From<usize> for PoolConfig {
    fn from(size: usize) -> Self {
        Self {
            kernel: (size, size),
            stride: (size, size),
            padding: (0, 0),
            count_include_pad: true,
        }
    }
}

impl PoolConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`].
    pub fn validate(&self) -> Result<()> {
        for (field, pair) in [
            ("PoolConfig::kernel", self.kernel),
            ("PoolConfig::stride", self.stride),
        ] {
            if pair.0 == 0 || pair.1 == 0 {
                return Err(Error::config(field, format!("{pair:?}"), "at least (1, 1)"));
            }
        }
        if 2 * self.padding.0 > self.kernel.0 || 2 * self.padding.1 > self.kernel.1 {
            let field = "PoolConfig::padding";
            let given = format!("{:?}", self.padding);
            return Err(Error::config(field, given, "at most half the kernel"));
        }
        Ok(())
    }

    /// The rows and the columns of each window, inside the image.
    pub(crate) fn windows(&self, x: &Tensor) -> Result<(Windows, Windows)> {
        self.validate()?;
        let (h, w) = image(x)?;
        let along = |n: usize, k: usize, s: usize, p: usize| -> Result<Windows> {
            let room = (n + 2 * p).checked_sub(k).ok_or_else(|| {
                let expected = format!("at least {:?} with its padding", self.kernel);
                Error::shape("input", x.dims(), expected)
            })?;
            let window = |i: usize| ((i * s).saturating_sub(p), (i * s + k - p).min(n));
            Ok((0..=room / s).map(window).collect())
        };
        let (k, s, p) = (self.kernel, self.stride, self.padding);
        Ok((along(h, k.0, s.0, p.0)?, along(w, k.1, s.1, p.1)?))
    }
}

/// First index and end.
type Window = (usize, usize);
pub(crate) type Windows = Vec<Window>;

/// `m` windows that cover `n` positions.
pub(crate) fn windows(n: usize, m: usize) -> Windows {
    let window = |i: usize| (i * n / m, ((i + 1) * n).div_ceil(m));
    (0..m).map(window).collect()
}

/// Height and width of a batch of images.
pub(crate) fn image(x: &Tensor) -> Result<(usize, usize)> {
    match x.dims() {
        [_, _, h, w] if x.elem_count() > 0 => Ok((*h, *w)),
        other => Err(Error::shape("input", other, "a non-empty [B, C, H, W]")),
    }
}

/// Maxima over windows of `x` `[B, C, H, W]`; gives `[B, C, H', W']` with
/// `H' = (H + 2 padding - kernel) / stride + 1`. The first of equal maxima gets the gradient; NaN
/// wins over numbers.
///
/// A kernel on the CPU in f32 and f64, differentiable any number of times.
///
/// # Errors
/// [`Error::Shape`] and [`Error::InvalidConfig`] for sizes that do not fit; [`Error::Unsupported`]
/// on other devices and in other dtypes.
pub fn max_pool2d(x: &Tensor, config: PoolConfig) -> Result<Tensor> {
    let (rows, cols) = config.windows(x)?;
    max_pool(x, rows, cols)
}

/// Maxima over `size` windows that cover `x` `[B, C, H, W]` as evenly as they can, as those of
/// [`adaptive_avg_pool2d`].
///
/// # Errors
/// As [`max_pool2d`].
pub fn adaptive_max_pool2d(x: &Tensor, size: (usize, usize)) -> Result<Tensor> {
    let (h, w) = image(x)?;
    if size.0 == 0 || size.1 == 0 {
        return Err(Error::config(
            "size",
            format!("{size:?}"),
            "at least (1, 1)",
        ));
    }
    max_pool(x, windows(h, size.0), windows(w, size.1))
}

fn max_pool(x: &Tensor, rows: Windows, cols: Windows) -> Result<Tensor> {
    if !has_kernel(x) {
        return Err(Error::Unsupported {
            operation: "max pooling".into(),
            context: format!("of {:?} on {:?}", x.dtype(), x.device().location()),
        });
    }
    let x = x.contiguous()?;
    let pairs = is_halving(&rows) && is_halving(&cols) && !keeps_graph()?;
    match (x.dtype(), pairs) {
        (DType::F64, true) => halved::<f64>(&x, (rows.len(), cols.len())),
        (_, true) => halved::<f32>(&x, (rows.len(), cols.len())),
        (DType::F64, false) => typed::<f64>(&x, &rows, &cols),
        (_, false) => typed::<f32>(&x, &rows, &cols),
    }
}

/// Maxima of squares of 2 by 2; of each one byte says where it was.
fn halved<T: Scalar>(x: &Tensor, (oh, ow): (usize, usize)) -> Result<Tensor> {
    let (batch, channels, h, w) = x.dims4()?;
    let shape = Shape::from((batch, channels, oh, ow));
    let (large, small) = (h * w, oh * ow);
    let mut places = vec![0u8; shape.elem_count()];
    let y = {
        let view = View::new(x)?;
        let x = view.slice::<T>()?;
        let few = crate::kernel::piece_of(small);
        let places = places.as_mut_slice();
        filled(shape.elem_count(), |y| {
            let parts = y
                .par_chunks_mut(few * small)
                .zip(places.par_chunks_mut(few * small));
            let parts = parts.zip(x.par_chunks(few * large));
            parts.for_each(|((y, places), x)| {
                let y = y.chunks_exact_mut(small);
                let planes = y.zip(places.chunks_exact_mut(small));
                vectorized(
                    #[inline(always)]
                    || {
                        for (x, (y, places)) in x.chunks_exact(large).zip(planes) {
                            let lines = y.chunks_exact_mut(ow).zip(places.chunks_exact_mut(ow));
                            for (x, (y, places)) in x.chunks_exact(2 * w).zip(lines) {
                                halve(x.split_at(w), y, places);
                            }
                        }
                    },
                );
            });
        })
    };
    let backward = move |arguments: &[&Tensor], _: &Tensor, dy: &Tensor| {
        let to = arguments[0].shape();
        let view = View::new(dy)?;
        let dy = view.slice::<T>()?;
        let dx = filled(to.elem_count(), |dx| {
            pieces(dx, large, |first, dx| {
                let places = places[first * small..].chunks_exact(small);
                let planes = dy[first * small..].chunks_exact(small).zip(places);
                vectorized(
                    #[inline(always)]
                    || {
                        for ((dy, places), dx) in planes.zip(dx.chunks_exact_mut(large)) {
                            spread_halved((dy, places), dx, (w, ow));
                        }
                    },
                );
            });
        });
        Ok(vec![Some(tensor(dx, to)?)])
    };
    let node = Computed::new("max pooling", y, &shape, backward);
    Ok(x.apply_op1(node)?)
}

fn typed<T: Scalar>(
    x: &Tensor,
    rows: &[(usize, usize)],
    cols: &[(usize, usize)],
) -> Result<Tensor> {
    let (batch, channels, h, w) = x.dims4()?;
    let (oh, ow) = (rows.len(), cols.len());
    let shape = Shape::from((batch, channels, oh, ow));
    let total = shape.elem_count();
    let mut places = vec![0u32; total];
    let y = {
        let view = View::new(x)?;
        let x = view.slice::<T>()?;
        let size = crate::kernel::piece_of(oh * ow) * oh * ow;
        let places = places.as_mut_slice();
        filled(total, |y| {
            let parts = y.par_chunks_mut(size).zip(places.par_chunks_mut(size));
            parts.enumerate().for_each(|(i, (y, places))| {
                let x = x[i * (size / (oh * ow)) * h * w..].chunks_exact(h * w);
                let y = y
                    .chunks_exact_mut(oh * ow)
                    .zip(places.chunks_exact_mut(oh * ow));
                vectorized(
                    #[inline(always)]
                    || {
                        for (x, (y, places)) in x.zip(y) {
                            plane(x, w, y, places, (rows, cols));
                        }
                    },
                );
            });
        })
    };
    let places = Arc::new(places);
    let backward = move |arguments: &[&Tensor], _: &Tensor, dy: &Tensor| {
        let to = arguments[0].shape();
        Ok(vec![Some(spread::<T>(dy, places.clone(), to)?)])
    };
    let node = Computed::new("max pooling", y, &shape, backward);
    Ok(x.apply_op1(node)?)
}

/// Numbers in a plane of `[B, C, H, W]`.
fn plane_of(shape: &Shape) -> usize {
    shape.dims().iter().skip(2).product()
}

/// Adds each entry of `y` to its place in a plane of zeros; differentiable any number of times.
fn spread<T: Scalar>(y: &Tensor, places: Arc<Vec<u32>>, to: &Shape) -> Result<Tensor> {
    let (small, large) = (plane_of(y.shape()), plane_of(to));
    let y = y.contiguous()?;
    let x = {
        let view = View::new(&y)?;
        let y = view.slice::<T>()?;
        filled(to.elem_count(), |x| {
            pieces(x, large, |first, x| {
                x.fill(T::ZERO);
                for (i, x) in x.chunks_exact_mut(large).enumerate() {
                    let at = (first + i) * small;
                    let range = at..at + small;
                    for (place, y) in places[range.clone()].iter().zip(&y[range]) {
                        let x = &mut x[*place as usize];
                        *x = *x + *y;
                    }
                }
            });
        })
    };
    let backward = move |arguments: &[&Tensor], _: &Tensor, dx: &Tensor| {
        let to = arguments[0].shape();
        Ok(vec![Some(pick::<T>(dx, places.clone(), to)?)])
    };
    Ok(y.apply_op1(Computed::new("spread", x, to, backward))?)
}

/// The entries of `x` at the places: the transposed map of [`spread`].
fn pick<T: Scalar>(x: &Tensor, places: Arc<Vec<u32>>, to: &Shape) -> Result<Tensor> {
    let (small, large) = (plane_of(to), plane_of(x.shape()));
    let x = x.contiguous()?;
    let y = {
        let view = View::new(&x)?;
        let x = view.slice::<T>()?;
        filled(places.len(), |y| {
            pieces(y, small, |first, y| {
                let planes = x[first * large..].chunks_exact(large);
                let places = places[first * small..].chunks_exact(small);
                let planes = planes.zip(places).zip(y.chunks_exact_mut(small));
                for ((x, places), y) in planes {
                    for (y, place) in y.iter_mut().zip(places) {
                        *y = x[*place as usize];
                    }
                }
            });
        })
    };
    let backward = move |arguments: &[&Tensor], _: &Tensor, dy: &Tensor| {
        let to = arguments[0].shape();
        Ok(vec![Some(spread::<T>(dy, places.clone(), to)?)])
    };
    Ok(x.apply_op1(Computed::new("pick", y, to, backward))?)
}

/// Whether the windows are pairs, one after the other.
fn is_halving(windows: &[(usize, usize)]) -> bool {
    let pair = |(i, w): (usize, &(usize, usize))| *w == (2 * i, 2 * i + 2);
    windows.iter().enumerate().all(pair)
}

/// `b` if it is larger or NaN.
#[inline(always)]
fn larger<T: Scalar>(a: (T, u32), b: (T, u32)) -> (T, u32) {
    let takes = (b.0 > a.0) | b.0.partial_cmp(&b.0).is_none();
    (T::select(takes, b.0, a.0), if takes { b.1 } else { a.1 })
}

/// Maxima over pairs of columns of two rows, and which of the four it was.
#[inline(always)]
fn halve<T: Scalar>((top, bottom): (&[T], &[T]), y: &mut [T], places: &mut [u8]) {
    let pairs = top.chunks_exact(2).zip(bottom.chunks_exact(2));
    for ((y, place), (a, b)) in y.iter_mut().zip(places).zip(pairs) {
        let upper = larger((a[0], 0), (a[1], 1));
        let best = larger(upper, larger((b[0], 2), (b[1], 3)));
        (*y, *place) = (best.0, best.1 as u8);
    }
}

/// Each gradient to the place of its square's maximum, and 0 elsewhere.
#[inline(always)]
fn spread_halved<T: Scalar>((dy, places): (&[T], &[u8]), dx: &mut [T], (w, ow): (usize, usize)) {
    // An odd side has a last row or column that nobody looks at.
    dx[dy.len() / ow * 2 * w..].fill(T::ZERO);
    let gradients = dy.chunks_exact(ow).zip(places.chunks_exact(ow));
    for (dx, (dy, places)) in dx.chunks_exact_mut(2 * w).zip(gradients) {
        let (dx, below) = dx.split_at_mut(w);
        dx[2 * ow..].fill(T::ZERO);
        below[2 * ow..].fill(T::ZERO);
        let to = dx.chunks_exact_mut(2).zip(below.chunks_exact_mut(2));
        for ((g, place), (a, b)) in dy.iter().zip(places).zip(to) {
            let share = |i: u8| T::select(*place == i, *g, T::ZERO);
            (a[0], a[1]) = (share(0), share(1));
            (b[0], b[1]) = (share(2), share(3));
        }
    }
}

#[inline(always)]
fn plane<T: Scalar>(
    x: &[T],
    w: usize,
    y: &mut [T],
    places: &mut [u32],
    (rows, cols): (&[Window], &[Window]),
) {
    let mut out = y.iter_mut().zip(places);
    for (top, bottom) in rows {
        for (left, right) in cols {
            let first = top * w + left;
            let mut best = (x[first], first as u32);
            for i in *top..*bottom {
                for j in *left..*right {
                    best = larger(best, (x[i * w + j], (i * w + j) as u32));
                }
            }
            if let Some((y, place)) = out.next() {
                (*y, *place) = best;
            }
        }
    }
}

//! One pass forward and one backward over rows that are normalized by themselves.

use crate::activation::Activation;
use crate::kernel::{
    filled, moments, pieces, positive, sum, sum2, tensor, total, vectorized, Computed, Scalar, View,
};
use crate::Result;
use candle_core::{DType, Shape, Tensor};

/// How a row is normalized.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    pub eps: f64,
    pub remove_mean: bool,
}

impl Rows {
    /// Mean (0 where it is not removed) and inverse deviation.
    #[inline(always)]
    fn statistics<T: Scalar>(self, x: &[T]) -> (T, T) {
        let n = x.len() as f64;
        let mean = match self.remove_mean {
            true => T::from_f64(sum(x, |x| x).to_f64() / n),
            false => T::ZERO,
        };
        let square = sum(x, |x| (x - mean) * (x - mean)).to_f64() / n;
        (mean, T::from_f64(1.0 / (square + self.eps).sqrt()))
    }
}

/// Over the last dimension, with a weight and maybe a bias of its size; dtypes agree.
pub(super) fn normalize(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    rows: Rows,
) -> Result<Tensor> {
    match x.dtype() {
        DType::F64 => typed::<f64>(x, weight, bias, rows),
        _ => typed::<f32>(x, weight, bias, rows),
    }
}

fn typed<T: Scalar>(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    rows: Rows,
) -> Result<Tensor> {
    let (x, weight) = (x.contiguous()?, weight.contiguous()?);
    let bias = bias.map(Tensor::contiguous).transpose()?;
    let width = weight.elem_count();
    let mut statistics = vec![];
    let y = {
        let (xv, wv) = (View::new(&x)?, View::new(&weight)?);
        let bv = bias.as_ref().map(View::new).transpose()?;
        let (x, w) = (xv.slice::<T>()?, wv.slice::<T>()?);
        let b = bv.as_ref().map(View::slice::<T>).transpose()?;
        filled(x.len(), |y| {
            let parts = pieces(y, width, |first, y| {
                let x = x[first * width..].chunks_exact(width);
                vectorized(
                    #[inline(always)]
                    || {
                        let mut all = vec![];
                        for (x, y) in x.zip(y.chunks_exact_mut(width)) {
                            all.push(forward_row(x, y, w, b, rows));
                        }
                        all
                    },
                )
            });
            statistics = parts.concat();
        })
    };
    let backward = move |arguments: &[&Tensor], _: &Tensor, dy: &Tensor| {
        gradients::<T>(arguments, dy, &statistics, rows.remove_mean)
    };
    let node = Computed::new("normalization", y, x.shape(), backward);
    Ok(match &bias {
        Some(bias) => x.apply_op3(&weight, bias, node)?,
        None => x.apply_op2(&weight, node)?,
    })
}

#[inline(always)]
fn forward_row<T: Scalar>(x: &[T], y: &mut [T], w: &[T], b: Option<&[T]>, rows: Rows) -> (T, T) {
    let (mean, inverse) = rows.statistics(x);
    let rows = y.iter_mut().zip(x).zip(w);
    match b {
        Some(b) => {
            for (((y, x), w), b) in rows.zip(b) {
                *y = ((*x - mean) * inverse) * *w + *b;
            }
        }
        None => {
            for ((y, x), w) in rows {
                *y = ((*x - mean) * inverse) * *w;
            }
        }
    }
    (mean, inverse)
}

fn gradients<T: Scalar>(
    arguments: &[&Tensor],
    dy: &Tensor,
    statistics: &[(T, T)],
    remove_mean: bool,
) -> Result<Vec<Option<Tensor>>> {
    let (x, weight) = (arguments[0], arguments[1]);
    let width = weight.elem_count();
    let (mut dw, mut db) = (vec![], vec![]);
    let dx = {
        let (xv, wv, dyv) = (View::new(x)?, View::new(weight)?, View::new(dy)?);
        let (x, w, dy) = (xv.slice::<T>()?, wv.slice::<T>()?, dyv.slice::<T>()?);
        filled(x.len(), |dx| {
            let parts = pieces(dx, width, |first, dx| {
                let at = first * width;
                let data = x[at..]
                    .chunks_exact(width)
                    .zip(dy[at..].chunks_exact(width));
                vectorized(
                    #[inline(always)]
                    || {
                        let mut sums = (vec![T::ZERO; width], vec![T::ZERO; width]);
                        let rows = data.zip(&statistics[first..]);
                        for (((x, dy), s), dx) in rows.zip(dx.chunks_exact_mut(width)) {
                            backward_row((x, dy, w), *s, dx, remove_mean);
                            parameter_sums((x, dy), *s, &mut sums.0, &mut sums.1);
                        }
                        sums
                    },
                )
            });
            let (w, b): (Vec<Vec<T>>, Vec<Vec<T>>) = parts.into_iter().unzip();
            dw = total(width, w);
            db = total(width, b);
        })
    };
    let shape = Shape::from(width);
    Ok(vec![
        Some(tensor(dx, x.shape())?),
        Some(tensor(dw, &shape)?),
        Some(tensor(db, &shape)?),
    ])
}

#[inline(always)]
fn backward_row<T: Scalar>(
    (x, dy, w): (&[T], &[T], &[T]),
    (mean, inverse): (T, T),
    dx: &mut [T],
    remove_mean: bool,
) {
    for ((dx, dy), w) in dx.iter_mut().zip(dy).zip(w) {
        *dx = *dy * *w;
    }
    let n = x.len() as f64;
    let along = sum2(dx, x, |g, x| g * ((x - mean) * inverse)).to_f64() / n;
    let shift = match remove_mean {
        true => sum(dx, |g| g).to_f64() / n,
        false => 0.0,
    };
    let (along, shift) = (T::from_f64(along), T::from_f64(shift));
    for (dx, x) in dx.iter_mut().zip(x) {
        let h = (*x - mean) * inverse;
        *dx = inverse * ((*dx - shift) - h * along);
    }
}

#[inline(always)]
fn parameter_sums<T: Scalar>(
    (x, dy): (&[T], &[T]),
    (mean, inverse): (T, T),
    dw: &mut [T],
    db: &mut [T],
) {
    for (((dw, db), x), dy) in dw.iter_mut().zip(db).zip(x).zip(dy) {
        *dw = *dw + *dy * ((*x - mean) * inverse);
        *db = *db + *dy;
    }
}

/// How groups of channels are normalized.
#[derive(Clone, Copy)]
pub(super) struct Groups {
    pub groups: usize,
    pub eps: f64,
    pub activation: Activation,
}

/// Groups of channels of `[B, C, S]`, each normalized over its channels and positions.
pub(super) fn normalize_groups(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    groups: Groups,
) -> Result<Tensor> {
    match x.dtype() {
        DType::F64 => grouped::<f64>(x, weight, bias, groups),
        _ => grouped::<f32>(x, weight, bias, groups),
    }
}

fn grouped<T: Scalar>(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    settings: Groups,
) -> Result<Tensor> {
    let Groups {
        groups,
        eps,
        activation,
    } = settings;
    let (x, weight) = (x.contiguous()?, weight.contiguous()?);
    let bias = bias.contiguous()?;
    let each = weight.elem_count() / groups;
    let spatial: usize = x.dims()[2..].iter().product();
    let width = each * spatial;
    let mut statistics = vec![];
    let y = {
        let (xv, wv, bv) = (View::new(&x)?, View::new(&weight)?, View::new(&bias)?);
        let (x, w, b) = (xv.slice::<T>()?, wv.slice::<T>()?, bv.slice::<T>()?);
        filled(x.len(), |y| {
            let parts = pieces(y, width, |first, y| {
                let x = x[first * width..].chunks_exact(width).enumerate();
                vectorized(
                    #[inline(always)]
                    || {
                        let mut all = vec![];
                        for ((i, x), y) in x.zip(y.chunks_exact_mut(width)) {
                            let s = long_statistics(x, eps);
                            let c = (first + i) % groups * each;
                            affine_row(x, (&w[c..c + each], &b[c..c + each]), s, y, activation);
                            all.push(s);
                        }
                        all
                    },
                )
            });
            statistics = parts.concat();
        })
    };
    let backward = move |arguments: &[&Tensor], _: &Tensor, dy: &Tensor| {
        group_gradients::<T>(arguments, dy, &statistics, (settings, spatial))
    };
    let node = Computed::new("group normalization", y, x.shape(), backward);
    Ok(x.apply_op3(&weight, &bias, node)?)
}

fn group_gradients<T: Scalar>(
    arguments: &[&Tensor],
    dy: &Tensor,
    statistics: &[(T, T)],
    (settings, spatial): (Groups, usize),
) -> Result<Vec<Option<Tensor>>> {
    let [x, weight, bias] = [0, 1, 2].map(|i| arguments[i]);
    let groups = settings.groups;
    let channels = weight.elem_count();
    let each = channels / groups;
    let width = each * spatial;
    let mut sums = vec![];
    let dx = {
        let (xv, wv, dyv) = (View::new(x)?, View::new(weight)?, View::new(dy)?);
        let bv = View::new(bias)?;
        let (x, w, dy) = (xv.slice::<T>()?, wv.slice::<T>()?, dyv.slice::<T>()?);
        let b = bv.slice::<T>()?;
        filled(x.len(), |dx| {
            let parts = pieces(dx, width, |first, dx| {
                let at = first * width;
                let data = x[at..]
                    .chunks_exact(width)
                    .zip(dy[at..].chunks_exact(width));
                vectorized(
                    #[inline(always)]
                    || {
                        let mut sums = vec![T::ZERO; 2 * channels];
                        let mut dz = vec![T::ZERO; width];
                        let rows = data.zip(&statistics[first..]).enumerate();
                        for ((i, ((x, dy), s)), dx) in rows.zip(dx.chunks_exact_mut(width)) {
                            let c = (first + i) % groups * each;
                            let (w, b) = (&w[c..c + each], &b[c..c + each]);
                            let activation = settings.activation;
                            // With an activation, `dx` holds its input for a moment.
                            let dz = match activation == Activation::Identity {
                                true => dy,
                                false => {
                                    let first = match activation.keeps_output() {
                                        true => activation,
                                        false => Activation::Identity,
                                    };
                                    affine_row(x, (w, b), *s, dx, first);
                                    activation.gradient(dx, dy, &mut dz);
                                    &dz
                                }
                            };
                            group_row((x, dz), w, *s, dx, &mut sums[2 * c..]);
                        }
                        sums
                    },
                )
            });
            sums = total(2 * channels, parts);
        })
    };
    let shape = Shape::from(channels);
    let every = |first: usize| sums.iter().skip(first).step_by(2).copied().collect();
    Ok(vec![
        Some(tensor(dx, x.shape())?),
        Some(tensor::<T>(every(1), &shape)?),
        Some(tensor::<T>(every(0), &shape)?),
    ])
}

/// Mean and inverse deviation of many numbers, in one pass over them.
#[inline(always)]
fn long_statistics<T: Scalar>(x: &[T], eps: f64) -> (T, T) {
    let few = &x[..x.len().min(64)];
    let shift = sum(few, |x| x).to_f64() / few.len() as f64;
    let n = x.len() as f64;
    let (sums, squares) = moments(x, shift);
    let off = sums / n;
    let variance = positive(squares / n - off * off);
    (
        T::from_f64(shift + off),
        T::from_f64(1.0 / (variance + eps).sqrt()),
    )
}

/// `f((x - mean) inverse w + b)`, channel by channel.
#[inline(always)]
fn affine_row<T: Scalar>(
    x: &[T],
    (w, b): (&[T], &[T]),
    (mean, inverse): (T, T),
    y: &mut [T],
    f: Activation,
) {
    let spatial = x.len() / w.len();
    let lines = x.chunks_exact(spatial).zip(y.chunks_exact_mut(spatial));
    for ((x, y), (w, b)) in lines.zip(w.iter().zip(b)) {
        let z = x.iter().map(|x| ((*x - mean) * inverse) * *w + *b);
        f.each(z.zip(y));
    }
}

/// One group of one example; `sums` takes (sum of dy, sum of dy h) for each of its channels.
#[inline(always)]
fn group_row<T: Scalar>(
    (x, dy): (&[T], &[T]),
    w: &[T],
    (mean, inverse): (T, T),
    dx: &mut [T],
    sums: &mut [T],
) {
    let spatial = x.len() / w.len();
    let (mut shift, mut along) = (0.0, 0.0);
    let lines = x.chunks_exact(spatial).zip(dy.chunks_exact(spatial));
    for (((x, dy), w), sums) in lines.clone().zip(w).zip(sums.chunks_exact_mut(2)) {
        let plain = sum(dy, |g| g);
        let product = sum2(dy, x, |g, x| g * ((x - mean) * inverse));
        shift += (*w * plain).to_f64();
        along += (*w * product).to_f64();
        sums[0] = sums[0] + plain;
        sums[1] = sums[1] + product;
    }
    let n = x.len() as f64;
    let (shift, along) = (T::from_f64(shift / n), T::from_f64(along / n));
    for (((x, dy), w), dx) in lines.zip(w).zip(dx.chunks_exact_mut(spatial)) {
        for ((dx, x), dy) in dx.iter_mut().zip(x).zip(dy) {
            let h = (*x - mean) * inverse;
            *dx = inverse * ((*dy * *w - shift) - h * along);
        }
    }
}

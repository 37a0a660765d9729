//! Log-probabilities under a softmax over the possible entries of each row, in one pass: what the
//! losses of policies whose actions depend on the state are sums of.
//!
//! ```text
//! y_i  = l_ia - log sum_(j in mask_i) e^(l_ij)          or the mean over the mask in the place of l_ia
//! dl_ij = dy_i (1[j = a] - p_ij) for j in mask_i        or 1 / |mask_i| in the place of 1[j = a]
//! ```
//!
//! f32 and f64 on the CPU take a fused pass each way, several rows side by side, since rows of few
//! entries do not fill a vector; everything else, and gradients that keep their graph, candle
//! operations.

use crate::kernel::{
    filled, has_kernel, piece_of, pieces, tensor, vectorized, wide, Computed, Scalar, View,
    PARALLEL_FROM,
};
use crate::softmax::log_softmax;
use crate::{Error, Result};
use candle_core::{DType, Shape, Tensor};
use rayon::prelude::*;
use tensor_core::autograd::keeps_graph;
use tensor_core::kernels::conv::transpose;

/// Which log-probability of a row is wanted.
#[derive(Debug, Clone)]
pub enum Wanted {
    /// That of one entry a row, an action say.
    Action(Vec<u32>),
    /// The mean over the possible entries.
    Mean,
}

/// A finite number in the place of minus infinity, whose exponential is 0. f16 cannot hold it.
pub const IMPOSSIBLE: f64 = -1e30;

/// Row `i` of `logits` `[n, width]` gives `log softmax(logits_i over mask_i)` at the wanted entry,
/// or the mean of it over the mask: `[n]`. `mask` has `n` rows of `width`.
///
/// # Errors
/// [`Error::Shape`] when mask or actions do not fit; [`Error::Impossible`] for a row without a
/// possible entry or a wanted one that is impossible.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use thalweg_nn::masked::{masked_log_prob, Wanted};
///
/// let logits = Tensor::new(&[[0.0f32, 9.0, 0.0], [1.0, 1.0, 1.0]], &Device::Cpu)?;
/// let mask = [true, false, true, true, true, true];
/// let log_p = masked_log_prob(&logits, &mask, &Wanted::Action(vec![2, 0]))?.to_vec1::<f32>()?;
/// assert!((log_p[0] - 0.5f32.ln()).abs() < 1e-6);
/// assert!((log_p[1] + 3f32.ln()).abs() < 1e-6);
/// # Ok::<(), thalweg_nn::Error>(())
/// ```
pub fn masked_log_prob(logits: &Tensor, mask: &[bool], wanted: &Wanted) -> Result<Tensor> {
    let (n, width) = logits.dims2()?;
    if mask.len() != n * width {
        let expected = format!("{n} rows of {width}");
        return Err(Error::shape("mask", &[mask.len()], expected));
    }
    if let Wanted::Action(actions) = wanted {
        if actions.len() != n {
            return Err(Error::shape("actions", &[actions.len()], format!("[{n}]")));
        }
    }
    if n == 0 {
        return Ok(Tensor::zeros(0, logits.dtype(), logits.device())?);
    }
    if width == 0 {
        return Err(wanted.impossible(0));
    }
    if !has_kernel(logits) || keeps_graph()? {
        return composed(logits, mask, wanted);
    }
    let logits = logits.contiguous()?;
    match logits.dtype() {
        DType::F64 => fused::<f64>(&logits, mask, wanted),
        _ => fused::<f32>(&logits, mask, wanted),
    }
}

/// `logits` with the impossible entries out of the way: a finite number whose exponential is 0.
///
/// # Errors
/// Those of candle, for a mask of another size.
pub fn hide(logits: &Tensor, mask: &[bool]) -> Result<Tensor> {
    let mask: Vec<u8> = mask.iter().map(|m| u8::from(*m)).collect();
    let mask = Tensor::from_vec(mask, logits.shape(), logits.device())?;
    let low = Tensor::full(IMPOSSIBLE, logits.shape(), logits.device())?;
    Ok(mask.where_cond(logits, &low.to_dtype(logits.dtype())?)?)
}

/// How entries of a row take part in what is wanted of it: one alone, or all possible ones with the
/// same share.
enum Share {
    One(usize),
    Each(f64),
}

impl Wanted {
    /// `None` where the mask excludes what is wanted.
    #[inline]
    fn of_row(&self, i: usize, mask: &[bool]) -> Option<Share> {
        match self {
            Self::Action(actions) => {
                let a = actions[i] as usize;
                mask.get(a)?.then_some(Share::One(a))
            }
            Self::Mean => {
                let count = mask.iter().filter(|m| **m).count();
                (count > 0).then_some(Share::Each(1.0 / count as f64))
            }
        }
    }

    fn impossible(&self, row: usize) -> Error {
        let reason = match self {
            Self::Action(actions) => format!("entry {} is wanted and impossible", actions[row]),
            Self::Mean => "no entry is possible".to_string(),
        };
        Error::Impossible { row, reason }
    }
}

/// What is wanted of the logits of a row.
#[inline]
fn logit<T: Scalar>(share: &Share, row: &[T], mask: &[bool]) -> T {
    match share {
        Share::One(a) => row[*a],
        Share::Each(share) => {
            let possible = row.iter().zip(mask).filter(|(_, m)| **m);
            let sum: f64 = possible.map(|(x, _)| x.to_f64()).sum();
            T::from_f64(share * sum)
        }
    }
}

fn composed(logits: &Tensor, mask: &[bool], wanted: &Wanted) -> Result<Tensor> {
    let (n, width) = logits.dims2()?;
    let mut weights = vec![0.0; n * width];
    for (i, (row, mask)) in weights
        .chunks_mut(width)
        .zip(mask.chunks(width))
        .enumerate()
    {
        match wanted.of_row(i, mask).ok_or_else(|| wanted.impossible(i))? {
            Share::One(a) => row[a] = 1.0,
            Share::Each(share) => {
                let possible = row.iter_mut().zip(mask).filter(|(_, m)| **m);
                possible.for_each(|(w, _)| *w = share);
            }
        }
    }
    let weights = Tensor::from_vec(weights, (n, width), logits.device())?;
    let dtype = wide(logits.dtype())?;
    let log_p = log_softmax(&hide(&logits.to_dtype(dtype)?, mask)?, 1)?;
    let wanted = (log_p * weights.to_dtype(dtype)?)?.sum(1)?;
    Ok(wanted.to_dtype(logits.dtype())?)
}

/// Rows side by side: one of the widest vectors of f32.
const ROWS: usize = 16;
/// Entries of a row whose exponentials are added in the row's own precision; the blocks are added in
/// f64.
const BLOCK: usize = 512;

/// The maximum of each of the rows over its mask, and the logarithm of the sum of exponentials of what
/// they lack to it. `columns` is room for the rows side by side, `flat` for the possible entries.
#[inline(always)]
fn log_sums<T: Scalar>(
    x: &[T],
    mask: &[bool],
    flat: &mut [T],
    columns: &mut [[T; ROWS]],
) -> ([T; ROWS], [T; ROWS]) {
    let width = columns.len();
    let low = T::from_f64(f64::NEG_INFINITY);
    for ((possible, x), m) in flat.iter_mut().zip(x).zip(mask) {
        *possible = T::select(*m, *x, low);
    }
    let rows = (x.len() / width, width, width);
    transpose(flat, rows, columns.as_flattened_mut(), ROWS);
    let mut top = [low; ROWS];
    for column in columns.iter() {
        for l in 0..ROWS {
            top[l] = T::select(column[l] > top[l], column[l], top[l]);
        }
    }
    let mut total = [0.0; ROWS];
    for block in columns.chunks(BLOCK) {
        let mut sums = [T::ZERO; ROWS];
        for column in block {
            for l in 0..ROWS {
                sums[l] = sums[l] + (column[l] - top[l]).exp_of_negative();
            }
        }
        for l in 0..ROWS {
            total[l] += sums[l].to_f64();
        }
    }
    let mut log = [T::ZERO; ROWS];
    for l in 0..ROWS {
        log[l] = T::from_f64(total[l]).ln_from_one();
    }
    (top, log)
}

/// The values of the rows from `first` on; gives the first row that has none.
fn forward<T: Scalar>(
    (x, mask, wanted): (&[T], &[bool], &Wanted),
    width: usize,
    first: usize,
    y: &mut [T],
) -> Option<usize> {
    let mut columns = vec![[T::ZERO; ROWS]; width];
    let mut flat = vec![T::ZERO; ROWS * width];
    let mut failed = None;
    for (k, y) in y.chunks_mut(ROWS).enumerate() {
        let from = first + k * ROWS;
        let span = from * width..(from + y.len()) * width;
        let (x, mask) = (&x[span.clone()], &mask[span]);
        let (top, log) = vectorized(
            #[inline(always)]
            || log_sums(x, mask, &mut flat, &mut columns),
        );
        let rows = x.chunks_exact(width).zip(mask.chunks_exact(width));
        for (r, (y, (row, mask))) in y.iter_mut().zip(rows).enumerate() {
            *y = match wanted.of_row(from + r, mask) {
                Some(share) => (logit(&share, row, mask) - top[r]) - log[r],
                None => {
                    failed = failed.or(Some(from + r));
                    T::ZERO
                }
            };
        }
    }
    failed
}

fn fused<T: Scalar>(logits: &Tensor, mask: &[bool], wanted: &Wanted) -> Result<Tensor> {
    let (n, width) = logits.dims2()?;
    let mut failed = None;
    let y = {
        let view = View::new(logits)?;
        let all = (view.slice::<T>()?, mask, wanted);
        filled(n, |y| {
            let rows = piece_of(width);
            failed = match n * width <= PARALLEL_FROM {
                true => forward(all, width, 0, y),
                false => {
                    let parts = y.par_chunks_mut(rows).enumerate();
                    let rows = parts.filter_map(|(k, y)| forward(all, width, k * rows, y));
                    rows.min()
                }
            };
        })
    };
    if let Some(row) = failed {
        return Err(wanted.impossible(row));
    }
    let shape = Shape::from(n);
    if !logits.track_op() {
        return tensor(y, &shape);
    }
    let (mask, wanted) = (mask.to_vec(), wanted.clone());
    let backward = move |arguments: &[&Tensor], y: &Tensor, dy: &Tensor| {
        let dx = gradient::<T>(arguments[0], y, dy, &mask, &wanted)?;
        Ok(vec![Some(dx)])
    };
    let node = Computed::new("masked-log-prob", y, &shape, backward);
    Ok(logits.apply_op1(node)?)
}

fn gradient<T: Scalar>(
    logits: &Tensor,
    y: &Tensor,
    dy: &Tensor,
    mask: &[bool],
    wanted: &Wanted,
) -> Result<Tensor> {
    let width = logits.dims()[1];
    let dx = {
        let (xv, yv, dyv) = (View::new(logits)?, View::new(y)?, View::new(dy)?);
        let all = (xv.slice::<T>()?, yv.slice::<T>()?, dyv.slice::<T>()?);
        filled(logits.elem_count(), |dx| {
            pieces(dx, width, |first, dx| {
                for (k, dx) in dx.chunks_mut(ROWS * width).enumerate() {
                    rows_gradient(all, (mask, wanted), (first + k * ROWS, width), dx);
                }
            });
        })
    };
    tensor(dx, logits.shape())
}

/// The gradients of some rows, with the probabilities on the way.
fn rows_gradient<T: Scalar>(
    (x, y, dy): (&[T], &[T], &[T]),
    (mask, wanted): (&[bool], &Wanted),
    (first, width): (usize, usize),
    dx: &mut [T],
) {
    let low = T::from_f64(f64::NEG_INFINITY);
    let masked = |i: usize| &mask[i * width..(i + 1) * width];
    for (i, dx) in (first..).zip(dx.chunks_mut(width)) {
        let (x, mask) = (&x[i * width..(i + 1) * width], masked(i));
        // The forward pass has refused rows of which nothing is wanted.
        let wanted = wanted.of_row(i, mask).map_or(low, |s| logit(&s, x, mask));
        for ((x, m), dx) in x.iter().zip(mask).zip(dx) {
            *dx = T::select(*m, (*x - wanted) + y[i], low);
        }
    }
    vectorized(
        #[inline(always)]
        || {
            for dx in dx.iter_mut() {
                *dx = dx.exp_of_negative();
            }
        },
    );
    for (i, dx) in (first..).zip(dx.chunks_mut(width)) {
        dx.iter_mut().for_each(|dx| *dx = -dy[i] * *dx);
        match wanted.of_row(i, masked(i)) {
            Some(Share::One(a)) => dx[a] = dx[a] + dy[i],
            Some(Share::Each(share)) => {
                let share = T::from_f64(share) * dy[i];
                let possible = dx.iter_mut().zip(masked(i)).filter(|(_, m)| **m);
                possible.for_each(|(dx, _)| *dx = *dx + share);
            }
            None => {}
        }
    }
}

//! Loops over elements and rows: vector lanes with a fixed order of summation, pieces that do not
//! depend on the number of threads.

use super::{Scalar, PARALLEL_FROM};
use rayon::prelude::*;

/// Partial sums that run side by side: two of the widest vectors.
const LANES: usize = 32;

/// `sum_i f(a_i)` in a fixed order.
#[inline(always)]
pub(crate) fn sum<T: Scalar>(a: &[T], f: impl Fn(T) -> T) -> T {
    let mut lanes = [T::ZERO; LANES];
    let full = a.chunks_exact(LANES);
    for (lane, x) in lanes.iter_mut().zip(full.remainder()) {
        *lane = f(*x);
    }
    for x in full {
        for l in 0..LANES {
            lanes[l] = lanes[l] + f(x[l]);
        }
    }
    fold(lanes)
}

/// `sum_i f(a_i, b_i)` in a fixed order.
#[inline(always)]
pub(crate) fn sum2<T: Scalar>(a: &[T], b: &[T], f: impl Fn(T, T) -> T) -> T {
    let mut lanes = [T::ZERO; LANES];
    let n = a.len().min(b.len());
    let (a, b) = (a[..n].chunks_exact(LANES), b[..n].chunks_exact(LANES));
    let rest = a.remainder().iter().zip(b.remainder());
    for (lane, (x, y)) in lanes.iter_mut().zip(rest) {
        *lane = f(*x, *y);
    }
    for (x, y) in a.zip(b) {
        for l in 0..LANES {
            lanes[l] = lanes[l] + f(x[l], y[l]);
        }
    }
    fold(lanes)
}

/// The sums of `x - shift` and of its square, in f64 and in a fixed order. One pass gives mean and
/// variance without loss as long as the shift is some deviations from the mean at most.
#[inline(always)]
pub(crate) fn moments<T: Scalar>(x: &[T], shift: f64) -> (f64, f64) {
    const WIDE: usize = LANES / 2;
    let (mut sums, mut squares) = ([0.0; WIDE], [0.0; WIDE]);
    let full = x.chunks_exact(WIDE);
    for (l, x) in full.remainder().iter().enumerate() {
        let d = x.to_f64() - shift;
        (sums[l], squares[l]) = (d, d * d);
    }
    for x in full {
        for l in 0..WIDE {
            let d = x[l].to_f64() - shift;
            sums[l] += d;
            squares[l] += d * d;
        }
    }
    (sums.into_iter().sum(), squares.into_iter().sum())
}

/// A variance that rounding has brought below 0 is 0; NaN stays.
#[inline(always)]
pub(crate) fn positive(variance: f64) -> f64 {
    if variance < 0.0 {
        0.0
    } else {
        variance
    }
}

/// The largest element; NaN is passed over (unless it is the first), as it shows in what is computed
/// next.
#[inline(always)]
pub(crate) fn max<T: Scalar>(a: &[T]) -> T {
    let Some(first) = a.first() else {
        return T::ZERO;
    };
    let larger = |m: T, x: T| T::select(x > m, x, m);
    let mut lanes = [*first; LANES];
    let full = a.chunks_exact(LANES);
    for (lane, x) in lanes.iter_mut().zip(full.remainder()) {
        *lane = larger(*lane, *x);
    }
    for x in full {
        for l in 0..LANES {
            lanes[l] = larger(lanes[l], x[l]);
        }
    }
    lanes.into_iter().fold(*first, larger)
}

#[inline(always)]
fn fold<T: Scalar>(mut lanes: [T; LANES]) -> T {
    let mut half = LANES / 2;
    while half > 0 {
        for l in 0..half {
            lanes[l] = lanes[l] + lanes[l + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// A vector whose content `write` fills: it must write every element and read none before.
pub(crate) fn filled<T: Scalar>(n: usize, write: impl FnOnce(&mut [T])) -> Vec<T> {
    let mut out = Vec::with_capacity(n);
    // SAFETY: the capacity is there, any bits are a number, and `write` fills all of them. Zeroing
    // first would cost a pass over memory that every kernel overwrites.
    unsafe {
        write(std::slice::from_raw_parts_mut(out.as_mut_ptr(), n));
        out.set_len(n);
    }
    out
}

/// Rows in a piece of work, for rows of `width` elements.
pub(crate) fn piece_of(width: usize) -> usize {
    (PARALLEL_FROM / width.max(1)).max(1)
}

/// Calls `f(first row, rows of out)` for pieces of rows of `width` elements, in parallel where it
/// is worth it, and gives the results in order. The pieces depend on the sizes only.
pub(crate) fn pieces<T: Scalar, R: Send>(
    out: &mut [T],
    width: usize,
    f: impl Fn(usize, &mut [T]) -> R + Sync,
) -> Vec<R> {
    let rows = piece_of(width);
    let size = rows * width.max(1);
    if out.len() <= size {
        return vec![f(0, out)];
    }
    let parts = out.par_chunks_mut(size).enumerate();
    parts.map(|(i, part)| f(i * rows, part)).collect()
}

/// The sum of vectors of the same length, in order; zeros of length `n` for none.
pub(crate) fn total<T: Scalar>(n: usize, parts: impl IntoIterator<Item = Vec<T>>) -> Vec<T> {
    let mut parts = parts.into_iter();
    let mut sum = parts.next().unwrap_or_else(|| vec![T::ZERO; n]);
    for part in parts {
        for (s, x) in sum.iter_mut().zip(part) {
            *s = *s + x;
        }
    }
    sum
}

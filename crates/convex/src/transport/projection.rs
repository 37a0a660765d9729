//! Projections on the simplex, and the same for the `k` largest entries.

use crate::error::check;
use crate::Result;
use pulp::{Arch, Simd, WithSimd};

/// An entry of a sparse column.
pub(super) type Entry = (u32, f64);

/// The Euclidean projection of `v` on `{y >= 0, sum y = z}`.
///
/// # Errors
/// [`Error::InvalidConfig`](crate::Error::InvalidConfig) for an empty `v` or `z <= 0`,
/// [`Error::NonFinite`](crate::Error::NonFinite).
pub fn project_simplex(v: &[f64], z: f64) -> Result<Vec<f64>> {
    project_sparse_simplex(v, v.len().max(1), z)
}

/// The Euclidean projection of `v` on `{y >= 0, sum y = z, |y|_0 <= k}`: the `k` largest entries
/// (ties: lowest index first) are projected on the simplex, the rest is zero.
///
/// # Errors
/// As [`project_simplex`], and for `k = 0`.
pub fn project_sparse_simplex(v: &[f64], k: usize, z: f64) -> Result<Vec<f64>> {
    check::at_least("length of v", v.len(), 1)?;
    check::at_least("k", k, 1)?;
    check::positive("z", z)?;
    check::finite("v", v)?;
    let zeros = vec![0.0; v.len()];
    let max = largest(v, &zeros);
    let mut entries = Vec::new();
    candidates(v, &zeros, max - z, &mut entries);
    if entries.is_empty() {
        // `max - z` is rounded to `max`.
        let first = v.iter().position(|x| *x == max).unwrap_or(0);
        entries.push((first as u32, max));
    }
    keep_largest(&mut entries, k);
    entries.iter_mut().for_each(|(_, x)| *x -= max);
    let threshold = threshold(&mut entries, z);
    let mut out = vec![0.0; v.len()];
    for (i, x) in entries {
        out[i as usize] = (x - threshold).max(0.0);
    }
    Ok(out)
}

/// The largest entry of `alpha - c`.
pub(super) fn largest(alpha: &[f64], cost: &[f64]) -> f64 {
    Arch::new().dispatch(Largest { alpha, cost })
}

struct Largest<'a> {
    alpha: &'a [f64],
    cost: &'a [f64],
}

impl WithSimd for Largest<'_> {
    type Output = f64;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f64 {
        let (alpha, alpha_tail) = S::as_simd_f64s(self.alpha);
        let (cost, cost_tail) = S::as_simd_f64s(self.cost);
        // Four largest, so that comparisons need not wait for each other.
        let mut best = [simd.splat_f64s(f64::NEG_INFINITY); 4];
        let (alpha_runs, alpha_rest) = alpha.as_chunks::<4>();
        let (cost_runs, cost_rest) = cost.as_chunks::<4>();
        for (alpha, cost) in alpha_runs.iter().zip(cost_runs) {
            for l in 0..4 {
                best[l] = simd.max_f64s(best[l], simd.sub_f64s(alpha[l], cost[l]));
            }
        }
        for (alpha, cost) in alpha_rest.iter().zip(cost_rest) {
            best[0] = simd.max_f64s(best[0], simd.sub_f64s(*alpha, *cost));
        }
        let best = simd.max_f64s(
            simd.max_f64s(best[0], best[1]),
            simd.max_f64s(best[2], best[3]),
        );
        let tails = alpha_tail.iter().zip(cost_tail);
        tails
            .map(|(a, c)| a - c)
            .fold(simd.reduce_max_f64s(best), f64::max)
    }
}

/// The entries of `alpha - c` above `floor`, by ascending index. A projection on a simplex of size `z`
/// is zero wherever an entry lies `z` or more below the largest: few entries are left of a long column.
pub(super) fn candidates(alpha: &[f64], cost: &[f64], floor: f64, out: &mut Vec<Entry>) {
    out.clear();
    Arch::new().dispatch(Above {
        alpha,
        cost,
        floor,
        out,
    });
}

struct Above<'a> {
    alpha: &'a [f64],
    cost: &'a [f64],
    floor: f64,
    out: &'a mut Vec<Entry>,
}

impl WithSimd for Above<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self {
            alpha,
            cost,
            floor,
            out,
        } = self;
        let mut push = |from: usize, to: usize| {
            for i in from..to {
                let x = alpha[i] - cost[i];
                if x > floor {
                    out.push((i as u32, x));
                }
            }
        };
        let (packed, tail) = S::as_simd_f64s(alpha);
        let floors = simd.splat_f64s(floor);
        let columns = packed.iter().zip(S::as_simd_f64s(cost).0);
        for (block, (a, c)) in columns.enumerate() {
            let above = simd.less_than_f64s(floors, simd.sub_f64s(*a, *c));
            if simd.first_true_m64s(above) < S::F64_LANES {
                push(block * S::F64_LANES, (block + 1) * S::F64_LANES);
            }
        }
        push(alpha.len() - tail.len(), alpha.len());
    }
}

/// Leaves the `k` largest entries, ties to the lowest index, in no particular order.
pub(super) fn keep_largest(entries: &mut Vec<Entry>, k: usize) {
    if entries.len() > k {
        let order = |a: &Entry, b: &Entry| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        entries.select_nth_unstable_by(k - 1, order);
        entries.truncate(k);
    }
}

/// The number that is subtracted from all entries, of which the largest is 0, so that what stays
/// positive sums to `z`; the others are taken out (Michelot's method).
pub(super) fn threshold(entries: &mut Vec<Entry>, z: f64) -> f64 {
    loop {
        let count = entries.len();
        let sum: f64 = entries.iter().map(|(_, x)| x).sum();
        let threshold = (sum - z) / count as f64;
        entries.retain(|(_, x)| *x > threshold || *x == 0.0);
        if entries.len() == count {
            return threshold;
        }
    }
}

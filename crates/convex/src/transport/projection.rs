//! Projections on the simplex, and the same for the `k` largest entries.

use crate::error::check;
use crate::Result;

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
    let max = v.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let mut entries = Vec::new();
    candidates(v, max - z, &mut entries);
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

/// `x = alpha - c`, and its largest entry.
#[inline(always)]
pub(super) fn subtract_and_max(alpha: &[f64], cost: &[f64], x: &mut [f64]) -> f64 {
    const LANES: usize = 16;
    let mut lanes = [f64::NEG_INFINITY; LANES];
    let whole = x.len() / LANES * LANES;
    let chunks = x[..whole]
        .chunks_exact_mut(LANES)
        .zip(alpha[..whole].chunks_exact(LANES))
        .zip(cost[..whole].chunks_exact(LANES));
    for ((x, alpha), cost) in chunks {
        for l in 0..LANES {
            let value = alpha[l] - cost[l];
            x[l] = value;
            lanes[l] = if value > lanes[l] { value } else { lanes[l] };
        }
    }
    let mut max = lanes.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    for i in whole..x.len() {
        x[i] = alpha[i] - cost[i];
        max = max.max(x[i]);
    }
    max
}

/// The entries above `floor`, by ascending index. A projection on a simplex of size `z` is zero
/// wherever an entry lies `z` or more below the largest: few entries are left of a long column.
#[inline(always)]
pub(super) fn candidates(x: &[f64], floor: f64, out: &mut Vec<Entry>) {
    const LANES: usize = 16;
    out.clear();
    for (block, x) in x.chunks(LANES).enumerate() {
        let mut any = false;
        for &value in x {
            any |= value > floor;
        }
        if any {
            for (l, &value) in x.iter().enumerate() {
                if value > floor {
                    out.push(((block * LANES + l) as u32, value));
                }
            }
        }
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

/// The number that is subtracted from all entries, so that what stays positive sums to `z`; the
/// entries are left in descending order.
pub(super) fn threshold(entries: &mut [Entry], z: f64) -> f64 {
    entries.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let (mut sum, mut threshold) = (0.0, 0.0);
    for (r, &(_, u)) in entries.iter().enumerate() {
        sum += u;
        let next = (sum - z) / (r + 1) as f64;
        // The first entry always stays.
        if r > 0 && u <= next {
            break;
        }
        threshold = next;
    }
    threshold
}

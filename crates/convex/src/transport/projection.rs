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
    let mut peaks = Peaks::default();
    let max = peaks.scan(v, &zeros);
    let mut entries = Vec::new();
    peaks.above(v, &zeros, peaks.floor(k, z), &mut entries);
    if entries.is_empty() {
        // The floor is rounded to `max`.
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

/// Vectors of a run, whose largest entries are kept.
const RUN: usize = 16;
/// Rounds in which the floor of a projection is raised.
const ROUNDS: usize = 6;

/// The largest entries of `alpha - c` in every short run of a long column: by them the entries that a
/// projection keeps are found without looking at the others again.
#[derive(Debug, Default)]
pub(super) struct Peaks {
    /// For each run as many as a vector has lanes.
    of_runs: Vec<f64>,
    max: f64,
}

impl Peaks {
    /// Looks at all of a column; gives its largest entry.
    pub(super) fn scan(&mut self, alpha: &[f64], cost: &[f64]) -> f64 {
        let of_runs = &mut self.of_runs;
        self.max = Arch::new().dispatch(Scan {
            alpha,
            cost,
            of_runs,
        });
        self.max
    }

    /// A number that every positive entry of the projection of the `k` largest on the simplex of size
    /// `z` lies above. Whatever lies `z` or more below the largest is zero; and the threshold of some
    /// entries is at most that of all, so the peaks alone bring the floor near the threshold itself.
    pub(super) fn floor(&self, k: usize, z: f64) -> f64 {
        if !self.max.is_finite() {
            return self.max - z;
        }
        // As distances from the largest, which keep their digits however large the potentials are.
        let (mut floor, mut probe) = (-z, -z);
        for _ in 0..ROUNDS {
            let (count, sum) = above(&self.of_runs, self.max, probe);
            if count == 0 {
                break;
            }
            if count >= k {
                floor = floor.max(probe);
            }
            let next = if count <= k {
                (sum - z) / count as f64
            } else {
                0.5 * probe
            };
            if count <= k {
                floor = floor.max(next);
            }
            if next <= probe {
                break;
            }
            probe = next;
        }
        self.max + floor
    }

    /// The entries of `alpha - c` above `floor`, by ascending index, of the column that was scanned.
    pub(super) fn above(&self, alpha: &[f64], cost: &[f64], floor: f64, out: &mut Vec<Entry>) {
        out.clear();
        Arch::new().dispatch(Above {
            alpha,
            cost,
            floor,
            of_runs: Some(&self.of_runs),
            out,
        });
    }
}

/// How many peaks are more than `probe` above the largest entry, and the sum of their distances from it.
fn above(peaks: &[f64], max: f64, probe: f64) -> (usize, f64) {
    const LANES: usize = 16;
    Arch::new().dispatch(
        #[inline(always)]
        || {
            let (mut counts, mut sums) = ([0.0; LANES], [0.0; LANES]);
            let (blocks, rest) = peaks.as_chunks::<LANES>();
            let mut add = |l: usize, peak: f64| {
                let x = peak - max;
                let on = x > probe;
                counts[l] += if on { 1.0 } else { 0.0 };
                sums[l] += if on { x } else { 0.0 };
            };
            for block in blocks {
                (0..LANES).for_each(|l| add(l, block[l]));
            }
            rest.iter().enumerate().for_each(|(l, x)| add(l, *x));
            let count: f64 = counts.iter().sum();
            (count as usize, sums.iter().sum())
        },
    )
}

struct Scan<'a> {
    alpha: &'a [f64],
    cost: &'a [f64],
    of_runs: &'a mut Vec<f64>,
}

impl WithSimd for Scan<'_> {
    type Output = f64;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f64 {
        let (alpha, alpha_tail) = S::as_simd_f64s(self.alpha);
        let (cost, cost_tail) = S::as_simd_f64s(self.cost);
        let lowest = simd.splat_f64s(f64::NEG_INFINITY);
        self.of_runs
            .resize(alpha.len().div_ceil(RUN) * S::F64_LANES, 0.0);
        let (peaks, _) = S::as_mut_simd_f64s(self.of_runs);
        let mut best = lowest;
        let (alpha_runs, alpha_rest) = alpha.as_chunks::<RUN>();
        let (cost_runs, cost_rest) = cost.as_chunks::<RUN>();
        for ((peak, alpha), cost) in peaks.iter_mut().zip(alpha_runs).zip(cost_runs) {
            // Four largest, so that comparisons need not wait for each other.
            let mut tops = [lowest; 4];
            for i in 0..RUN {
                tops[i % 4] = simd.max_f64s(tops[i % 4], simd.sub_f64s(alpha[i], cost[i]));
            }
            let (left, right) = (
                simd.max_f64s(tops[0], tops[1]),
                simd.max_f64s(tops[2], tops[3]),
            );
            *peak = simd.max_f64s(left, right);
            best = simd.max_f64s(best, *peak);
        }
        if let Some(last) = peaks.last_mut().filter(|_| !alpha_rest.is_empty()) {
            *last = lowest;
            for (alpha, cost) in alpha_rest.iter().zip(cost_rest) {
                *last = simd.max_f64s(*last, simd.sub_f64s(*alpha, *cost));
            }
            best = simd.max_f64s(best, *last);
        }
        let tails = alpha_tail.iter().zip(cost_tail);
        tails
            .map(|(a, c)| a - c)
            .fold(simd.reduce_max_f64s(best), f64::max)
    }
}

/// The entries of `alpha - c` above `floor`, by ascending index.
pub(super) fn candidates(alpha: &[f64], cost: &[f64], floor: f64, out: &mut Vec<Entry>) {
    out.clear();
    Arch::new().dispatch(Above {
        alpha,
        cost,
        floor,
        of_runs: None,
        out,
    });
}

struct Above<'a> {
    alpha: &'a [f64],
    cost: &'a [f64],
    floor: f64,
    /// Where they are known, only runs with a peak above the floor are looked at.
    of_runs: Option<&'a [f64]>,
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
            of_runs,
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
        let some = |x: S::f64s| simd.first_true_m64s(simd.less_than_f64s(floors, x)) < S::F64_LANES;
        let peaks = of_runs.map(|peaks| S::as_simd_f64s(peaks).0);
        let runs = packed.chunks(RUN).zip(S::as_simd_f64s(cost).0.chunks(RUN));
        for (run, (alpha, cost)) in runs.enumerate() {
            if peaks.is_some_and(|peaks| !some(peaks[run])) {
                continue;
            }
            for (i, (a, c)) in alpha.iter().zip(cost).enumerate() {
                if some(simd.sub_f64s(*a, *c)) {
                    let from = (run * RUN + i) * S::F64_LANES;
                    push(from, from + S::F64_LANES);
                }
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

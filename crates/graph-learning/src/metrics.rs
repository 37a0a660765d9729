//! Scores of predictions and clusterings, with their conventions for ties, and k-means.

use crate::{Error, RandomStream, Result};
use rayon::prelude::*;
use std::collections::BTreeMap;

/// Scores beside which of them belong to positive examples, in descending order of score.
fn ranked(scores: &[f64], positive: &[bool]) -> Result<Vec<(f64, bool)>> {
    if scores.len() != positive.len() {
        let expected = format!("one for each of {} scores", scores.len());
        return Err(Error::argument("labels", positive.len(), expected));
    }
    let count = scores.iter().filter(|s| !s.is_finite()).count();
    if count > 0 {
        let (what, total) = ("scores", scores.len());
        return Err(Error::NonFinite { what, count, total });
    }
    let hits = positive.iter().filter(|p| **p).count();
    if hits == 0 || hits == positive.len() {
        let value = format!("{hits} positive of {}", positive.len());
        return Err(Error::argument("labels", value, "both kinds"));
    }
    let mut pairs: Vec<(f64, bool)> = scores
        .iter()
        .copied()
        .zip(positive.iter().copied())
        .collect();
    pairs.sort_by(|a, b| b.0.total_cmp(&a.0));
    Ok(pairs)
}

/// The number of positive and of negative examples at each distinct score, in descending order.
fn groups(pairs: &[(f64, bool)]) -> Vec<(f64, f64)> {
    let mut groups: Vec<(f64, (f64, f64))> = Vec::new();
    for (score, hit) in pairs {
        if groups.last().is_none_or(|(s, _)| s != score) {
            groups.push((*score, (0.0, 0.0)));
        }
        if let Some((_, (hits, misses))) = groups.last_mut() {
            if *hit {
                *hits += 1.0;
            } else {
                *misses += 1.0;
            }
        }
    }
    groups.into_iter().map(|(_, counts)| counts).collect()
}

/// The area under the ROC curve: the probability that a positive example scores higher than a
/// negative one, ties counting half.
///
/// # Errors
/// [`Error::InvalidArgument`] for lists of different lengths or only one kind of example,
/// [`Error::NonFinite`].
pub fn roc_auc(scores: &[f64], positive: &[bool]) -> Result<f64> {
    let groups = groups(&ranked(scores, positive)?);
    let (mut above, mut area) = (0.0, 0.0);
    for (hits, misses) in &groups {
        area += misses * (above + hits / 2.0);
        above += hits;
    }
    let misses: f64 = groups.iter().map(|g| g.1).sum();
    Ok(area / (above * misses))
}

/// Average precision: `sum_k (R_k - R_(k-1)) P_k` over the distinct scores as thresholds, without
/// interpolation.
///
/// # Errors
/// As [`roc_auc`].
pub fn average_precision(scores: &[f64], positive: &[bool]) -> Result<f64> {
    let groups = groups(&ranked(scores, positive)?);
    let total: f64 = groups.iter().map(|g| g.0).sum();
    let (mut hits, mut taken, mut sum) = (0.0, 0.0, 0.0);
    for (h, m) in groups {
        hits += h;
        taken += h + m;
        sum += h / total * (hits / taken);
    }
    Ok(sum)
}

/// How many items have each pair of labels.
struct Contingency {
    cells: BTreeMap<(u32, u32), f64>,
    rows: BTreeMap<u32, f64>,
    columns: BTreeMap<u32, f64>,
    n: f64,
}

impl Contingency {
    fn new(a: &[u32], b: &[u32]) -> Result<Self> {
        if a.len() != b.len() || a.is_empty() {
            let value = format!("{} and {}", a.len(), b.len());
            return Err(Error::argument(
                "labels",
                value,
                "equal numbers, at least 1",
            ));
        }
        let (mut cells, mut rows, mut columns) =
            (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        for (x, y) in a.iter().zip(b) {
            *cells.entry((*x, *y)).or_insert(0.0) += 1.0;
            *rows.entry(*x).or_insert(0.0) += 1.0;
            *columns.entry(*y).or_insert(0.0) += 1.0;
        }
        let n = a.len() as f64;
        Ok(Self {
            cells,
            rows,
            columns,
            n,
        })
    }
}

/// Normalized mutual information of two labelings, by the arithmetic mean of their entropies (the
/// V-measure); 1 where both have one class.
///
/// # Errors
/// [`Error::InvalidArgument`] for lists of different lengths or empty ones.
pub fn normalized_mutual_information(a: &[u32], b: &[u32]) -> Result<f64> {
    let t = Contingency::new(a, b)?;
    let entropy = |counts: &BTreeMap<u32, f64>| -> f64 {
        counts.values().map(|c| -c / t.n * (c / t.n).ln()).sum()
    };
    let mean = (entropy(&t.rows) + entropy(&t.columns)) / 2.0;
    if mean == 0.0 {
        return Ok(1.0);
    }
    let term =
        |((x, y), c): (&(u32, u32), &f64)| c / t.n * (c * t.n / (t.rows[x] * t.columns[y])).ln();
    let mutual: f64 = t.cells.iter().map(term).sum();
    Ok((mutual / mean).clamp(0.0, 1.0))
}

/// The Rand index of two labelings, adjusted for chance: 0 for independent ones, 1 for equal ones.
///
/// # Errors
/// As [`normalized_mutual_information`].
pub fn adjusted_rand_index(a: &[u32], b: &[u32]) -> Result<f64> {
    let t = Contingency::new(a, b)?;
    let pairs = |c: f64| c * (c - 1.0) / 2.0;
    let within = |counts: &BTreeMap<u32, f64>| -> f64 { counts.values().map(|c| pairs(*c)).sum() };
    let together: f64 = t.cells.values().map(|c| pairs(*c)).sum();
    let (rows, columns, all) = (within(&t.rows), within(&t.columns), pairs(t.n));
    let expected = if all > 0.0 { rows * columns / all } else { 0.0 };
    let most = (rows + columns) / 2.0;
    if most == expected {
        return Ok(1.0);
    }
    Ok((together - expected) / (most - expected))
}

/// The result of [`kmeans`].
#[derive(Debug, Clone, PartialEq)]
pub struct Clusters {
    /// The cluster of each row.
    pub labels: Vec<u32>,
    /// Centers, one after the other.
    pub centers: Vec<f64>,
    /// The sum of squared distances to the centers.
    pub inertia: f64,
}

/// Lloyd's iterations from k-means++ starts, the best of `restarts`: `rows` holds `d` numbers for each
/// row. A cluster that loses all its rows takes the row farthest from its center.
///
/// # Errors
/// [`Error::InvalidArgument`] for `d = 0`, `k = 0`, more clusters than rows or no restart;
/// [`Error::NonFinite`].
pub fn kmeans(
    rows: &[f64],
    d: usize,
    k: usize,
    restarts: usize,
    rng: &mut RandomStream,
) -> Result<Clusters> {
    if d == 0 || !rows.len().is_multiple_of(d) {
        let expected = format!("a divisor of {} numbers", rows.len());
        return Err(Error::argument("d", d, expected));
    }
    let n = rows.len() / d;
    if k == 0 || k > n {
        return Err(Error::argument("k", k, format!("1 to {n} rows")));
    }
    if restarts == 0 {
        return Err(Error::argument("restarts", 0, "at least 1"));
    }
    let count = rows.iter().filter(|v| !v.is_finite()).count();
    if count > 0 {
        let (what, total) = ("rows", rows.len());
        return Err(Error::NonFinite { what, count, total });
    }
    let mut best: Option<Clusters> = None;
    for _ in 0..restarts {
        let found = lloyd(rows, d, plus_plus(rows, d, k, rng)?);
        if best.as_ref().is_none_or(|b| found.inertia < b.inertia) {
            best = Some(found);
        }
    }
    best.ok_or_else(|| Error::argument("restarts", 0, "at least 1"))
}

fn squared(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum()
}

/// Centers drawn in proportion to the squared distance from those before.
fn plus_plus(rows: &[f64], d: usize, k: usize, rng: &mut RandomStream) -> Result<Vec<f64>> {
    let n = rows.len() / d;
    let row = |i: usize| &rows[i * d..(i + 1) * d];
    let mut centers = row(rng.below(n)?).to_vec();
    let mut nearest = vec![f64::INFINITY; n];
    while centers.len() < k * d {
        let last = &centers[centers.len() - d..];
        for (i, near) in nearest.iter_mut().enumerate() {
            *near = near.min(squared(row(i), last));
        }
        let mut goal = rng.next_uniform() * nearest.iter().sum::<f64>();
        // All rows equal: any will do.
        let chosen = nearest.iter().position(|s| {
            goal -= s;
            goal < 0.0
        });
        centers.extend_from_slice(row(chosen.unwrap_or(n - 1)));
    }
    Ok(centers)
}

const LLOYD_ITERATIONS: usize = 300;

fn lloyd(rows: &[f64], d: usize, mut centers: Vec<f64>) -> Clusters {
    let k = centers.len() / d;
    let mut labels: Vec<u32> = Vec::new();
    let mut inertia = f64::INFINITY;
    for _ in 0..LLOYD_ITERATIONS {
        let assigned: Vec<(u32, f64)> = rows
            .par_chunks_exact(d)
            .map(|row| {
                let distances = centers.chunks_exact(d).map(|c| squared(row, c)).enumerate();
                let best = distances.fold(
                    (0, f64::INFINITY),
                    |b, (c, s)| {
                        if s < b.1 {
                            (c, s)
                        } else {
                            b
                        }
                    },
                );
                (best.0 as u32, best.1)
            })
            .collect();
        let fresh: Vec<u32> = assigned.iter().map(|a| a.0).collect();
        inertia = assigned.iter().map(|a| a.1).sum();
        let done = fresh == labels;
        labels = fresh;
        if done {
            break;
        }
        let mut counts = vec![0.0; k];
        let mut sums = vec![0.0; k * d];
        for (row, label) in rows.chunks_exact(d).zip(&labels) {
            let c = *label as usize;
            counts[c] += 1.0;
            let sum = &mut sums[c * d..(c + 1) * d];
            sum.iter_mut().zip(row).for_each(|(s, v)| *s += v);
        }
        let mut far: Vec<usize> = (0..labels.len()).collect();
        far.sort_by(|a, b| assigned[*b].1.total_cmp(&assigned[*a].1));
        let mut far = far.into_iter();
        for (c, count) in counts.iter().enumerate() {
            let center = &mut centers[c * d..(c + 1) * d];
            if *count > 0.0 {
                let sum = &sums[c * d..(c + 1) * d];
                center.iter_mut().zip(sum).for_each(|(m, s)| *m = s / count);
            } else if let Some(i) = far.next() {
                center.copy_from_slice(&rows[i * d..(i + 1) * d]);
            }
        }
    }
    Clusters {
        labels,
        centers,
        inertia,
    }
}

//! Activation patterns of the first layer.

use crate::error::check;
use crate::linalg::matrix;
use crate::{Error, RandomStream, Result};
use candle_core::{DType, Device, Tensor};
use std::collections::HashSet;

/// Distinct patterns `[X a >= 0]` (zero counts as active), with a direction for each.
#[derive(Debug, Clone)]
pub struct Patterns {
    pub(super) n: usize,
    pub(super) d: usize,
    /// One column of length `n` a pattern.
    pub(super) columns: Vec<Vec<bool>>,
    pub(super) directions: Vec<Vec<f64>>,
    kept: Vec<usize>,
}

/// Subsets of rows that an enumeration may look at.
const SUBSETS: f64 = 2e6;

impl Patterns {
    /// The patterns of directions `[P, d]` in order of first appearance.
    ///
    /// # Errors
    /// [`Error::Shape`] where `x` and `directions` do not fit or are empty, [`Error::NonFinite`].
    pub fn from_directions(x: &Tensor, directions: &Tensor) -> Result<Self> {
        let (n, d, x) = matrix("x", x)?;
        let (p, e, directions) = matrix("directions", directions)?;
        check::length("columns of directions", e, d)?;
        check::at_least("rows of x", n, 1)?;
        check::at_least("directions", p, 1)?;
        let mut out = Self::none(n, d);
        for (h, a) in directions.chunks(d).enumerate() {
            out.add(pattern(&x, a), a, h);
        }
        Ok(out)
    }

    /// The patterns of `directions` random directions, normally distributed.
    ///
    /// # Errors
    /// As [`from_directions`](Self::from_directions).
    pub fn sample(x: &Tensor, directions: usize, stream: &mut RandomStream) -> Result<Self> {
        let d = x.dims().last().copied().unwrap_or(0);
        let a = stream.normal(0.0, 1.0, (directions, d), DType::F64, &Device::Cpu)?;
        Self::from_directions(x, &a)
    }

    /// All patterns that some direction has with no row on the boundary, but rows of zeros: every cell
    /// of the arrangement of `n` hyperplanes. For small `d`: the work grows as `n^(d-1)`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where there are too many, [`Error::Shape`], [`Error::NonFinite`].
    pub fn enumerate(x: &Tensor) -> Result<Self> {
        let (n, d, values) = matrix("x", x)?;
        check::at_least("rows of x", n, 1)?;
        check::at_least("columns of x", d, 1)?;
        let subsets = (1..d).fold(1.0, |c, i| c * (n as f64 - i as f64 + 1.0) / i as f64);
        if subsets > SUBSETS {
            return Err(Error::unsupported(
                "enumerating patterns",
                format!("for {n} rows of {d} columns: sample them"),
            ));
        }
        let rows: Vec<Vec<f64>> = values.chunks(d).map(<[f64]>::to_vec).collect();
        let mut out = Self::none(n, d);
        for a in cells(&rows, d) {
            out.add(pattern(&values, &a), &a, out.columns.len());
        }
        Ok(out)
    }

    fn none(n: usize, d: usize) -> Self {
        Self {
            n,
            d,
            columns: vec![],
            directions: vec![],
            kept: vec![],
        }
    }

    pub(super) fn add(&mut self, column: Vec<bool>, direction: &[f64], index: usize) {
        if !self.columns.contains(&column) {
            self.columns.push(column);
            self.directions.push(direction.to_vec());
            self.kept.push(index);
        }
    }

    /// The first `count` patterns.
    #[must_use]
    pub fn first(&self, count: usize) -> Self {
        self.select(&(0..count.min(self.len())).collect::<Vec<_>>())
    }

    /// The patterns of these numbers; numbers that there are not are left out.
    #[must_use]
    pub fn select(&self, numbers: &[usize]) -> Self {
        let mut out = Self::none(self.n, self.d);
        for &i in numbers.iter().filter(|i| **i < self.len()) {
            out.add(self.columns[i].clone(), &self.directions[i], self.kept[i]);
        }
        out
    }

    /// Number of patterns.
    pub fn len(&self) -> usize {
        self.columns.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.columns.is_empty()
    }

    /// For each pattern the index of the first direction that has it.
    pub fn kept(&self) -> &[usize] {
        &self.kept
    }

    /// Zeros and ones `[n, P]`, row-major.
    pub fn bits(&self) -> Vec<f64> {
        let at = |k: usize| self.columns.iter().map(move |c| f64::from(u8::from(c[k])));
        (0..self.n).flat_map(at).collect()
    }

    pub(super) fn fits(&self, n: usize, d: usize) -> Result<()> {
        check::at_least("patterns", self.len(), 1)?;
        check::length("rows of the patterns", self.n, n)?;
        check::length("columns of the patterns' directions", self.d, d)
    }
}

/// Patterns for adversarial training: for each direction `a_h` those of `X` and of
/// `X + eps sign(R)` for each `R` of `signs` `[H, S, n, d]`, for the first `H` directions.
///
/// # Errors
/// [`Error::Shape`] where the tensors do not fit, [`Error::InvalidConfig`] for a negative `eps`.
pub fn adversarial_patterns(
    x: &Tensor,
    directions: &Tensor,
    signs: &Tensor,
    eps: f64,
) -> Result<Patterns> {
    check::non_negative("eps", eps)?;
    let (n, d, x) = matrix("x", x)?;
    let (p, e, directions) = matrix("directions", directions)?;
    check::length("columns of directions", e, d)?;
    let &[h, s, rows, columns] = signs.dims() else {
        return Err(Error::shape("signs", signs.dims(), "[H, S, n, d]"));
    };
    if h > p || rows != n || columns != d {
        let expected = format!("[at most {p}, S, {n}, {d}]");
        return Err(Error::shape("signs", signs.dims(), expected));
    }
    let signs = crate::linalg::values("signs", signs)?;
    let mut out = Patterns::none(n, d);
    for (number, a) in directions.chunks(d).take(h).enumerate() {
        out.add(pattern(&x, a), a, number);
        for r in signs.chunks(n * d).skip(number * s).take(s) {
            let pairs = x.iter().zip(r);
            let moved: Vec<f64> = pairs
                .map(|(x, r)| if *r == 0.0 { *x } else { x + eps * r.signum() })
                .collect();
            out.add(pattern(&moved, a), a, number);
        }
    }
    check::at_least("patterns", out.len(), 1)?;
    Ok(out)
}

fn pattern(x: &[f64], a: &[f64]) -> Vec<bool> {
    let positive = |row: &[f64]| row.iter().zip(a).map(|(x, a)| x * a).sum::<f64>() >= 0.0;
    x.chunks(a.len()).map(positive).collect()
}

/// A direction in each cell of the arrangement of the hyperplanes `row' a = 0` in `d` dimensions.
///
/// Every cell has an edge, a direction on `d - 1` hyperplanes; around it the cells are those of the
/// hyperplanes through it, one dimension lower.
fn cells(rows: &[Vec<f64>], d: usize) -> Vec<Vec<f64>> {
    let rows = distinct(rows);
    if rows.is_empty() {
        let mut any = vec![0.0; d];
        any[0] = 1.0;
        return vec![any];
    }
    if d == 1 {
        return vec![vec![1.0], vec![-1.0]];
    }
    let mut seen = HashSet::new();
    let mut found = Vec::new();
    let mut take = |a: Vec<f64>| {
        let signs: Vec<bool> = rows.iter().map(|r| dot(r, &a) >= 0.0).collect();
        if seen.insert(signs) {
            found.push(a);
        }
    };
    for edge in edges(&rows, d) {
        let through: Vec<usize> = (0..rows.len())
            .filter(|&i| dot(&rows[i], &edge).abs() <= 1e-10)
            .collect();
        let basis = complement(std::slice::from_ref(&edge), d);
        let inside = |i: &usize| basis.iter().map(|b| dot(b, &rows[*i])).collect();
        let lower: Vec<Vec<f64>> = through.iter().map(inside).collect();
        // How far one may leave the edge without crossing another hyperplane.
        let others = (0..rows.len()).filter(|i| !through.contains(i));
        let room = others.fold(1.0f64, |m, i| m.min(dot(&rows[i], &edge).abs()));
        for step in cells(&lower, d - 1) {
            let scale = 0.5 * room / dot(&step, &step).sqrt();
            let mut a = edge.clone();
            for (s, b) in step.iter().zip(&basis) {
                crate::linalg::axpy(scale * s, b, &mut a);
            }
            take(a);
        }
    }
    found
}

/// Unit directions on `d - 1` independent hyperplanes, both ways; where the rows span less, directions
/// on as many as they span, less one.
fn edges(rows: &[Vec<f64>], d: usize) -> Vec<Vec<f64>> {
    let span = d - complement(rows, d).len();
    if span < d {
        // Cells are products with the complement: edges within the span serve.
        let outside = complement(rows, d);
        let basis = complement(&outside, d);
        let inside = |r: &Vec<f64>| basis.iter().map(|b| dot(b, r)).collect();
        let lower: Vec<Vec<f64>> = rows.iter().map(inside).collect();
        let lift = |e: Vec<f64>| {
            let mut out = vec![0.0; d];
            for (x, b) in e.iter().zip(&basis) {
                crate::linalg::axpy(*x, b, &mut out);
            }
            out
        };
        if span == 1 {
            return vec![lift(vec![1.0]), lift(vec![-1.0])];
        }
        return edges(&lower, span).into_iter().map(lift).collect();
    }
    let mut out = Vec::new();
    let mut subset: Vec<usize> = (0..d - 1).collect();
    loop {
        let chosen: Vec<Vec<f64>> = subset.iter().map(|&i| rows[i].clone()).collect();
        let normal = complement(&chosen, d);
        if let [a] = normal.as_slice() {
            out.push(a.clone());
            out.push(a.iter().map(|x| -x).collect());
        }
        // The next subset in lexicographic order.
        let Some(i) = (0..d - 1)
            .rev()
            .find(|&i| subset[i] < rows.len() - (d - 1) + i)
        else {
            return out;
        };
        subset[i] += 1;
        for j in i + 1..d - 1 {
            subset[j] = subset[j - 1] + 1;
        }
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Unit rows, without those of zeros and those that are parallel to another.
fn distinct(rows: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let mut out: Vec<Vec<f64>> = Vec::new();
    for row in rows {
        let norm = dot(row, row).sqrt();
        if norm == 0.0 {
            continue;
        }
        let unit: Vec<f64> = row.iter().map(|x| x / norm).collect();
        if out.iter().all(|o| dot(o, &unit).abs() < 1.0 - 1e-13) {
            out.push(unit);
        }
    }
    out
}

/// An orthonormal basis of what is orthogonal to all of `rows`.
fn complement(rows: &[Vec<f64>], d: usize) -> Vec<Vec<f64>> {
    let mut basis: Vec<Vec<f64>> = Vec::new();
    let mut reduce = |v: &[f64]| {
        let mut v = v.to_vec();
        // Twice is enough for orthogonality to the last bits.
        for _ in 0..2 {
            for b in &basis {
                let c = dot(b, &v);
                crate::linalg::axpy(-c, b, &mut v);
            }
        }
        let norm = dot(&v, &v).sqrt();
        (norm > 1e-9).then(|| {
            v.iter_mut().for_each(|x| *x /= norm);
            basis.push(v.clone());
            v
        })
    };
    for row in rows {
        reduce(row);
    }
    let axes = (0..d).map(|i| {
        (0..d)
            .map(|j| f64::from(u8::from(i == j)))
            .collect::<Vec<_>>()
    });
    axes.filter_map(|axis| reduce(&axis)).collect()
}

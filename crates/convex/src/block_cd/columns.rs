//! The data matrix, dense or sparse, as its columns.

use crate::error::check;
use crate::linalg::{axpy, dot, matrix};
use crate::{Error, Result};
use candle_core::Tensor;
use faer::sparse::{SparseColMat, Triplet};
use faer::Mat;
use rayon::prelude::*;

/// A matrix `[n, p]` that is worked on by columns.
#[derive(Debug, Clone)]
pub struct Columns {
    rows: usize,
    columns: usize,
    storage: Storage,
}

#[derive(Debug, Clone)]
enum Storage {
    /// Column-major.
    Dense(Vec<f64>),
    Sparse(SparseColMat<usize, f64>),
}

impl Columns {
    /// From a tensor `[n, p]` of any floating-point dtype.
    ///
    /// # Errors
    /// [`Error::Shape`] for another rank or no entry, [`Error::NonFinite`].
    pub fn new(x: &Tensor) -> Result<Self> {
        let (rows, columns, values) = matrix("A", x)?;
        Self::from_slice(rows, columns, &values)
    }

    /// From row-major values.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn from_slice(rows: usize, columns: usize, values: &[f64]) -> Result<Self> {
        check::at_least("rows of A", rows, 1)?;
        check::at_least("columns of A", columns, 1)?;
        check::length("A", values.len(), rows * columns)?;
        check::finite("A", values)?;
        let at = |p: usize| values[(p % rows) * columns + p / rows];
        Ok(Self {
            rows,
            columns,
            storage: Storage::Dense((0..rows * columns).map(at).collect()),
        })
    }

    /// From a sparse matrix; duplicates must have been summed, as faer does.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn sparse(x: SparseColMat<usize, f64>) -> Result<Self> {
        check::at_least("rows of A", x.nrows(), 1)?;
        check::at_least("columns of A", x.ncols(), 1)?;
        check::finite("A", x.val())?;
        Ok(Self {
            rows: x.nrows(),
            columns: x.ncols(),
            storage: Storage::Sparse(x),
        })
    }

    /// From `(row, column, value)`; equal places are summed.
    ///
    /// # Errors
    /// As [`new`](Self::new), and [`Error::Shape`] for a place outside.
    pub fn from_triplets(
        rows: usize,
        columns: usize,
        entries: &[(usize, usize, f64)],
    ) -> Result<Self> {
        let triplets: Vec<Triplet<usize, usize, f64>> = entries
            .iter()
            .map(|&(i, j, x)| Triplet::new(i, j, x))
            .collect();
        let matrix = SparseColMat::try_new_from_triplets(rows, columns, &triplets)
            .map_err(|e| Error::numerical("building a sparse matrix", e))?;
        Self::sparse(matrix)
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn columns(&self) -> usize {
        self.columns
    }

    fn dense<'a>(&self, values: &'a [f64], j: usize) -> &'a [f64] {
        &values[j * self.rows..(j + 1) * self.rows]
    }

    /// Rows and values of a column's entries.
    pub(crate) fn entries(&self, j: usize) -> Vec<(usize, f64)> {
        match &self.storage {
            Storage::Dense(v) => self.dense(v, j).iter().copied().enumerate().collect(),
            Storage::Sparse(s) => s
                .row_idx_of_col(j)
                .zip(s.val_of_col(j).iter().copied())
                .collect(),
        }
    }

    /// `a_j' y`
    pub(crate) fn dot(&self, j: usize, y: &[f64]) -> f64 {
        match &self.storage {
            Storage::Dense(v) => dot(self.dense(v, j), y),
            Storage::Sparse(s) => s
                .row_idx_of_col(j)
                .zip(s.val_of_col(j))
                .map(|(i, x)| x * y[i])
                .sum(),
        }
    }

    /// `y += alpha a_j`
    pub(crate) fn axpy(&self, alpha: f64, j: usize, y: &mut [f64]) {
        match &self.storage {
            Storage::Dense(v) => axpy(alpha, self.dense(v, j), y),
            Storage::Sparse(s) => {
                for (i, x) in s.row_idx_of_col(j).zip(s.val_of_col(j)) {
                    y[i] += alpha * x;
                }
            }
        }
    }

    /// `a_i' diag(w) a_j`; without weights `a_i' a_j`.
    pub(crate) fn product(&self, i: usize, j: usize, weights: Option<&[f64]>) -> f64 {
        match (&self.storage, weights) {
            (Storage::Dense(v), None) => dot(self.dense(v, i), self.dense(v, j)),
            (Storage::Dense(v), Some(w)) => {
                let pairs = self.dense(v, i).iter().zip(self.dense(v, j));
                pairs.zip(w).map(|((x, y), w)| x * y * w).sum()
            }
            (Storage::Sparse(_), w) => {
                let (a, b) = (self.entries(i), self.entries(j));
                let (mut p, mut q, mut sum) = (0, 0, 0.0);
                while p < a.len() && q < b.len() {
                    match a[p].0.cmp(&b[q].0) {
                        std::cmp::Ordering::Less => p += 1,
                        std::cmp::Ordering::Greater => q += 1,
                        std::cmp::Ordering::Equal => {
                            let weight = w.map_or(1.0, |w| w[a[p].0]);
                            sum += a[p].1 * b[q].1 * weight;
                            p += 1;
                            q += 1;
                        }
                    }
                }
                sum
            }
        }
    }

    /// `A_b' diag(w) A_b`
    pub(crate) fn gram(&self, block: &[usize], weights: Option<&[f64]>) -> Mat<f64> {
        let n = block.len();
        let mut out = Mat::zeros(n, n);
        let lower: Vec<(usize, usize)> =
            (0..n).flat_map(|i| (0..=i).map(move |j| (i, j))).collect();
        let one = |&(i, j): &(usize, usize)| self.product(block[i], block[j], weights);
        let products: Vec<f64> = if n * n * self.rows > 1 << 16 {
            lower.par_iter().map(one).collect()
        } else {
            lower.iter().map(one).collect()
        };
        for ((i, j), x) in lower.into_iter().zip(products) {
            out[(i, j)] = x;
            out[(j, i)] = x;
        }
        out
    }

    /// `A x`
    pub(crate) fn times(&self, x: &[f64]) -> Vec<f64> {
        let mut out = vec![0.0; self.rows];
        for (j, x) in x.iter().enumerate().filter(|(_, x)| **x != 0.0) {
            self.axpy(*x, j, &mut out);
        }
        out
    }

    /// `A' y` into `out`, on all threads where it is long.
    pub(crate) fn transposed_times(&self, y: &[f64], out: &mut [f64]) {
        const LEAST: usize = 64;
        out.par_chunks_mut(LEAST.max((1 << 16) / self.rows))
            .enumerate()
            .for_each(|(piece, out)| {
                let first = piece * LEAST.max((1 << 16) / self.rows);
                for (c, out) in out.iter_mut().enumerate() {
                    *out = self.dot(first + c, y);
                }
            });
    }
}

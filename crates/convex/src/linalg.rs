//! Small pieces of dense linear algebra over slices; decompositions are faer's.

use crate::{Error, Result};
use candle_core::{DType, Tensor};
use faer::linalg::matmul::matmul;
use faer::linalg::solvers::Solve;
use faer::{Accum, Mat, MatMut, MatRef, Par, Side};

pub(crate) fn dot(a: &[f64], b: &[f64]) -> f64 {
    // Four sums, so that additions need not wait for each other.
    let (heads, tails) = (a.chunks_exact(4), b.chunks_exact(4));
    let rest: f64 = heads
        .remainder()
        .iter()
        .zip(tails.remainder())
        .map(|(x, y)| x * y)
        .sum();
    let mut sums = [0.0; 4];
    for (x, y) in heads.zip(tails) {
        for i in 0..4 {
            sums[i] += x[i] * y[i];
        }
    }
    (sums[0] + sums[1]) + (sums[2] + sums[3]) + rest
}

/// `y += alpha x`
pub(crate) fn axpy(alpha: f64, x: &[f64], y: &mut [f64]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += alpha * x;
    }
}

pub(crate) fn norm(x: &[f64]) -> f64 {
    dot(x, x).sqrt()
}

pub(crate) fn max_abs(x: &[f64]) -> f64 {
    x.iter().fold(0.0, |m, x| m.max(x.abs()))
}

/// Ascending indices of a slice by a key; ties: lowest index first.
pub(crate) fn argsort(keys: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..keys.len()).collect();
    order.sort_by(|&a, &b| keys[a].total_cmp(&keys[b]).then(a.cmp(&b)));
    order
}

/// The `[rows, columns]` of a matrix and its values as `f64`, row-major.
pub(crate) fn matrix(what: &'static str, x: &Tensor) -> Result<(usize, usize, Vec<f64>)> {
    let &[rows, columns] = x.dims() else {
        return Err(Error::shape(what, x.dims(), "two dimensions"));
    };
    let values = values(what, x)?;
    Ok((rows, columns, values))
}

/// A tensor's values as `f64`, row-major; all must be finite.
pub(crate) fn values(what: &'static str, x: &Tensor) -> Result<Vec<f64>> {
    let values: Vec<f64> = x.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?;
    crate::error::check::finite(what, &values)?;
    Ok(values)
}

/// A matrix from row-major values.
pub(crate) fn from_rows(rows: usize, columns: usize, values: &[f64]) -> Mat<f64> {
    Mat::from_fn(rows, columns, |i, j| values[i * columns + j])
}

/// `out = lhs rhs`, by columns on all threads; pieces do not depend on their number.
pub(crate) fn product(out: MatMut<'_, f64>, lhs: MatRef<'_, f64>, rhs: MatRef<'_, f64>) {
    const COLUMNS: usize = 64;
    const WORK: usize = 1 << 20;
    let columns = out.ncols();
    if columns <= COLUMNS || columns * lhs.nrows() * lhs.ncols() < WORK {
        matmul(out, Accum::Replace, lhs, rhs, 1.0, Par::Seq);
        return;
    }
    let half = columns / 2;
    let (left, right) = out.split_at_col_mut(half);
    let (a, b) = rhs.split_at_col(half);
    rayon::join(|| product(left, lhs, a), || product(right, lhs, b));
}

/// The largest eigenvalue of a symmetric matrix, and never less than it is.
pub(crate) fn largest_eigenvalue(matrix: MatRef<'_, f64>) -> Result<f64> {
    if matrix.nrows() == 1 {
        return Ok(matrix[(0, 0)]);
    }
    let values = matrix
        .self_adjoint_eigenvalues(Side::Lower)
        .map_err(|e| Error::numerical("an eigenvalue decomposition", e))?;
    Ok(values.last().copied().unwrap_or(0.0))
}

/// `pinv(H) g` for a symmetric positive semi-definite `H`: Cholesky where it goes through, and
/// eigenvalues cut at `1e-12` of the largest where the matrix is singular.
pub(crate) fn solve_psd(matrix: MatRef<'_, f64>, rhs: &[f64]) -> Result<Vec<f64>> {
    let n = matrix.nrows();
    let scale = (0..n).fold(0.0f64, |m, i| m.max(matrix[(i, i)]));
    if let Ok(llt) = matrix.llt(Side::Lower) {
        let l = llt.L();
        let pivot = (0..n).fold(f64::INFINITY, |m, i| m.min(l[(i, i)]));
        // A pivot that is rounding alone would divide noise by noise.
        if pivot * pivot > 1e-10 * scale {
            let mut x = Mat::from_fn(n, 1, |i, _| rhs[i]);
            llt.solve_in_place(x.as_mut());
            return Ok((0..n).map(|i| x[(i, 0)]).collect());
        }
    }
    let eigen = matrix
        .self_adjoint_eigen(Side::Lower)
        .map_err(|e| Error::numerical("an eigenvalue decomposition", e))?;
    let (u, s) = (eigen.U(), eigen.S().column_vector());
    let largest = (0..n).fold(0.0f64, |m, i| m.max(s[i].abs()));
    if (0..n).any(|i| s[i] < -1e-8 * largest.max(f64::MIN_POSITIVE)) {
        return Err(Error::Indefinite {
            what: "the matrix of a block",
            kind: "semi-definite",
            detail: format!("it has the eigenvalue {}", s[0]),
        });
    }
    let mut out = vec![0.0; n];
    for j in (0..n).filter(|&j| s[j] > 1e-12 * largest) {
        let weight = (0..n).map(|i| u[(i, j)] * rhs[i]).sum::<f64>() / s[j];
        for (i, x) in out.iter_mut().enumerate() {
            *x += weight * u[(i, j)];
        }
    }
    Ok(out)
}

/// Conjugate gradients for `A x = right` from `x`, with `apply` as `p -> A p` for a positive definite
/// `A`, until the residual is `tol |right|`.
pub(crate) fn conjugate_gradient(
    apply: impl Fn(&[f64]) -> Vec<f64>,
    right: &[f64],
    mut x: Vec<f64>,
    tol: f64,
    max_iter: usize,
) -> Vec<f64> {
    let mut r = right.to_vec();
    axpy(-1.0, &apply(&x), &mut r);
    let mut p = r.clone();
    let mut size = dot(&r, &r);
    let enough = (tol * norm(right)).powi(2);
    for _ in 0..max_iter {
        if size <= enough {
            break;
        }
        let ap = apply(&p);
        let alpha = size / dot(&p, &ap);
        axpy(alpha, &p, &mut x);
        axpy(-alpha, &ap, &mut r);
        let next = dot(&r, &r);
        for (p, r) in p.iter_mut().zip(&r) {
            *p = r + next / size * *p;
        }
        size = next;
    }
    x
}

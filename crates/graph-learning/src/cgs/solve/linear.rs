//! Linear maps: the solution by a factorization or by conjugate gradients, head by head.

use super::bicgstab::bicgstab;
use super::system::System;
use super::{merge, SolveReport};
use crate::sparse::{real, Scalar};
use faer::linalg::solvers::Solve;
use std::ops::Range;
use tensor_core::kernels::Real;

/// `slope (gamma A h + b)` of one head and graph as `M h = slope b` with `M = I - slope gamma A`.
fn slope<T: Scalar>(slopes: Option<&[T]>, at: usize) -> f64 {
    slopes.map_or(1.0, |s| Real::to_f64(s[at]))
}

pub(super) fn direct<T: Scalar>(
    system: &System<T>,
    rows: Range<usize>,
    slopes: Option<&[T]>,
) -> (Vec<T>, SolveReport) {
    let (m, n, first) = (system.heads, rows.len(), rows.start);
    let mut h = vec![<T as Real>::ZERO; n * m];
    let mut residual = 0.0f64;
    for k in 0..m {
        let mut matrix = faer::Mat::<f64>::identity(n, n);
        let mut right = faer::Mat::<f64>::zeros(n, 1);
        for r in rows.clone() {
            let d = slope(slopes, r * m + k);
            right[(r - first, 0)] = d * Real::to_f64(system.bias[r * m + k]);
            for p in system.csr.row(r) {
                let c = system.csr.indices()[p] as usize - first;
                matrix[(r - first, c)] -= d * Real::to_f64(system.weights[p * m + k]);
            }
        }
        let x = matrix.partial_piv_lu().solve(&right);
        let error = &matrix * &x - &right;
        for i in 0..n {
            residual = residual.max(error[(i, 0)].abs());
            h[i * m + k] = real(x[(i, 0)]);
        }
    }
    let report = SolveReport {
        iterations: 0,
        residual,
        converged: residual.is_finite(),
    };
    (h, report)
}

pub(super) fn krylov<T: Scalar>(
    system: &System<T>,
    rows: Range<usize>,
    slopes: Option<&[T]>,
    tol: f64,
    max_iter: usize,
) -> (Vec<T>, SolveReport) {
    let (m, first) = (system.heads, rows.start);
    let mut h = vec![<T as Real>::ZERO; rows.len() * m];
    let mut reports = Vec::with_capacity(m);
    for k in 0..m {
        let apply = |x: &[f64]| -> Vec<f64> {
            let one = |r: usize| {
                let weight = |p: usize| Real::to_f64(system.weights[p * m + k]);
                let col = |p: usize| system.csr.indices()[p] as usize - first;
                let sum: f64 = system.csr.row(r).map(|p| weight(p) * x[col(p)]).sum();
                x[r - first] - slope(slopes, r * m + k) * sum
            };
            rows.clone().map(one).collect()
        };
        let right = |r: usize| slope(slopes, r * m + k) * Real::to_f64(system.bias[r * m + k]);
        let right: Vec<f64> = rows.clone().map(right).collect();
        let (x, report) = bicgstab(apply, &right, tol, max_iter);
        x.iter()
            .enumerate()
            .for_each(|(i, x)| h[i * m + k] = real(*x));
        reports.push(report);
    }
    (h, merge(reports.into_iter()))
}

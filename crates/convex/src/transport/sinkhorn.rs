//! Sinkhorn's alternating scaling, for the entropic problem in the convention
//! `T = exp((alpha + beta - C) / gamma - 1)`.

use super::exponential::{add, of_costs, of_differences, raise};
use super::projection::Peaks;
use super::OtProblem;
use crate::linalg::axpy;
use crate::{Error, Result};
use pulp::Arch;
use rayon::prelude::*;

pub(super) struct Scaling {
    pub gamma: f64,
    pub log_domain: bool,
    pub tol: f64,
    pub max_iter: usize,
}

/// What the logarithmic iteration looks at to stop.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Rest {
    /// The violation of the rows' marginals over the mass.
    Marginals,
    /// The sum of the absolute changes of all potentials.
    Potentials,
}

/// Potentials, and how the iteration ended.
pub(super) struct Scaled {
    pub alpha: Vec<f64>,
    pub beta: Vec<f64>,
    pub iterations: usize,
    /// The last violation of the rows' marginals, over the mass.
    pub error: f64,
}

/// Columns are cut into pieces of this many, whatever the number of threads.
const WIDTH: usize = 64;

pub(super) fn sinkhorn(problem: &OtProblem, how: Scaling, beta: &[f64]) -> Result<Scaled> {
    if how.log_domain {
        in_logarithms(problem, &how, beta, Rest::Marginals)
    } else {
        by_scaling(problem, &how, beta)
    }
}

/// With `K = exp(-C / gamma)`: `u = a / K v`, `v = b / K' u`; both passes over `K` in one.
fn by_scaling(problem: &OtProblem, how: &Scaling, beta: &[f64]) -> Result<Scaled> {
    let (a, b) = (problem.a(), problem.b());
    let m = a.len();
    let mut kernel = vec![0.0; problem.cost.len()];
    let pieces = kernel.par_chunks_mut(m * WIDTH);
    pieces
        .zip(problem.cost.par_chunks(m * WIDTH))
        .for_each(|(kernel, cost)| of_costs(cost, 1.0 / how.gamma, kernel));
    let mut v: Vec<f64> = beta.iter().map(|x| (x / how.gamma).exp()).collect();
    let mut u = vec![1.0; m];
    let mut rows = rows_of(&kernel, m, &v);
    let (mut error, mut iterations) = (f64::INFINITY, 0);
    while iterations < how.max_iter && error > how.tol {
        iterations += 1;
        divide(a, &rows, &mut u);
        // The new column scales, and with them the rows' sums, in one pass over the kernel.
        let sums: Vec<(Vec<f64>, Vec<f64>)> = kernel
            .par_chunks(m * WIDTH)
            .enumerate()
            .map(|(piece, kernel)| scale_columns(kernel, &b[piece * WIDTH..], &u))
            .collect();
        v.clear();
        rows.fill(0.0);
        for (scales, sums) in sums {
            v.extend(scales);
            axpy(1.0, &sums, &mut rows);
        }
        error = (0..m).map(|i| (u[i] * rows[i] - a[i]).abs()).sum::<f64>() / problem.mass();
        if !error.is_finite() {
            return Err(Error::numerical(
                "Sinkhorn without logarithms",
                format!(
                    "under- or overflow at gamma = {}: take the logarithmic domain",
                    how.gamma
                ),
            ));
        }
    }
    let log = |x: &Vec<f64>| x.iter().map(|x| how.gamma * x.ln()).collect();
    Ok(Scaled {
        alpha: log(&u),
        beta: log(&v),
        iterations,
        error,
    })
}

/// The scales `b_j / K_j' u` of some columns, and the sum of the columns times them.
fn scale_columns(kernel: &[f64], b: &[f64], u: &[f64]) -> (Vec<f64>, Vec<f64>) {
    const LANES: usize = 32;
    let (mut scales, mut sums) = (Vec::with_capacity(WIDTH), vec![0.0; u.len()]);
    Arch::new().dispatch(
        #[inline(always)]
        || {
            for (column, b) in kernel.chunks_exact(u.len()).zip(b) {
                let (x, y) = (column.as_chunks::<LANES>(), u.as_chunks::<LANES>());
                let mut lanes = [0.0; LANES];
                for (x, y) in x.0.iter().zip(y.0) {
                    (0..LANES).for_each(|l| lanes[l] += x[l] * y[l]);
                }
                let rest = x.1.iter().zip(y.1).map(|(x, y)| x * y);
                let total = lanes.iter().sum::<f64>() + rest.sum::<f64>();
                let scale = if *b > 0.0 { b / total } else { 0.0 };
                for (sum, x) in sums.iter_mut().zip(column) {
                    *sum += scale * x;
                }
                scales.push(scale);
            }
        },
    );
    (scales, sums)
}

fn rows_of(kernel: &[f64], m: usize, v: &[f64]) -> Vec<f64> {
    let mut rows = vec![0.0; m];
    for (column, v) in kernel.chunks_exact(m).zip(v) {
        axpy(*v, column, &mut rows);
    }
    rows
}

fn divide(a: &[f64], rows: &[f64], u: &mut [f64]) {
    for ((u, a), r) in u.iter_mut().zip(a).zip(rows) {
        *u = if *a > 0.0 { a / r } else { 0.0 };
    }
}

/// Sweeps of both potentials until `rest` is at most the tolerance.
pub(super) fn in_logarithms(
    problem: &OtProblem,
    how: &Scaling,
    beta: &[f64],
    rest: Rest,
) -> Result<Scaled> {
    let (a, b) = (problem.a(), problem.b());
    let (m, gamma) = (a.len(), how.gamma);
    let (mut alpha, mut beta) = (vec![f64::NEG_INFINITY; m], beta.to_vec());
    let (mut error, mut iterations) = (f64::INFINITY, 0);
    let mut rows = row_logarithms(problem, &beta, gamma);
    while iterations < how.max_iter && error > how.tol {
        iterations += 1;
        let mut change = 0.0;
        for i in (0..m).filter(|&i| a[i] > 0.0) {
            // A first potential counts from that of a plan of `exp(-C / gamma)`.
            let before = if iterations == 1 { gamma } else { alpha[i] };
            alpha[i] = gamma * (a[i].ln() + 1.0 - rows[i]);
            change += (alpha[i] - before).abs();
        }
        let next: Vec<f64> = (0..b.len())
            .into_par_iter()
            .map_init(
                || (Peaks::default(), vec![0.0; m]),
                |(peaks, terms), j| {
                    let column = problem.column(j);
                    let max = peaks.scan(&alpha, column);
                    let sum = of_differences(&alpha, column, (max, 1.0 / gamma), terms);
                    if b[j] > 0.0 {
                        gamma * (b[j].ln() + 1.0 - sum.ln()) - max
                    } else {
                        f64::NEG_INFINITY
                    }
                },
            )
            .collect();
        let pairs = next.iter().zip(&beta).filter(|(x, _)| x.is_finite());
        change += pairs.map(|(x, y)| (x - y).abs()).sum::<f64>();
        beta = next;
        rows = row_logarithms(problem, &beta, gamma);
        error = match rest {
            Rest::Potentials => change,
            Rest::Marginals => {
                let sum = |i: usize| (alpha[i] / gamma - 1.0 + rows[i]).exp();
                let missed = (0..m).filter(|&i| a[i] > 0.0);
                missed.map(|i| (sum(i) - a[i]).abs()).sum::<f64>() / problem.mass()
            }
        };
    }
    if !error.is_finite() {
        return Err(Error::numerical(
            "Sinkhorn",
            format!("the potentials are not finite at gamma = {gamma}"),
        ));
    }
    Ok(Scaled {
        alpha,
        beta,
        iterations,
        error,
    })
}

/// `log sum_j exp((beta_j - c_ij) / gamma)` of each row.
fn row_logarithms(problem: &OtProblem, beta: &[f64], gamma: f64) -> Vec<f64> {
    let m = problem.a().len();
    let rate = 1.0 / gamma;
    let pieces: Vec<(Vec<f64>, Vec<f64>)> = problem
        .cost
        .par_chunks(m * WIDTH)
        .zip(beta.par_chunks(WIDTH))
        .map(|(cost, beta)| {
            let (mut max, mut sum) = (vec![f64::NEG_INFINITY; m], vec![0.0; m]);
            for (column, beta) in cost.chunks_exact(m).zip(beta) {
                raise(column, *beta, rate, &mut max);
            }
            // A row without terms has a sum of zero, whatever they are divided by.
            let with_terms = |max: &f64| max.max(f64::MIN);
            let tops: Vec<f64> = max.iter().map(with_terms).collect();
            for (column, beta) in cost.chunks_exact(m).zip(beta) {
                add(column, *beta, rate, &tops, &mut sum);
            }
            (max, sum)
        })
        .collect();
    let join = |i: usize| {
        let max = pieces
            .iter()
            .map(|(max, _)| max[i])
            .fold(f64::NEG_INFINITY, f64::max);
        let with_terms = pieces.iter().filter(|(max, _)| max[i] > f64::NEG_INFINITY);
        let sum: f64 = with_terms
            .map(|(top, sum)| (top[i] - max).exp() * sum[i])
            .sum();
        max + sum.ln()
    };
    (0..m).map(join).collect()
}

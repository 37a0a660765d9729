//! The solvers behind one function.

use super::auction::auction;
use super::exact::{network_simplex, Exact};
use super::objective::{has_dual, Pass};
use super::plan::SparsePlan;
use super::sinkhorn::{sinkhorn, Scaled, Scaling};
use super::{Formulation, OtProblem, OtReg, OtSolver};
use crate::error::check;
use crate::lbfgs::{minimize, Limits};
use crate::{Error, Result};
use candle_core::Tensor;
use rayon::prelude::*;

/// Potentials to start from.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Start {
    /// One number a row; zeros when empty.
    pub alpha: Vec<f64>,
    /// One number a column; zeros when empty. The semi-dual does not look at it.
    pub beta: Vec<f64>,
}

/// What a solver found, with its certificate.
#[derive(Debug, Clone)]
pub struct OtSolution {
    /// Potential of each row. Where only differences count (equal masses) it is centered. `-inf` for
    /// a row without mass under [`OtReg::Entropic`].
    pub alpha: Vec<f64>,
    /// Potential of each column; with the semi-dual, what belongs to `alpha`.
    pub beta: Vec<f64>,
    /// The plan.
    pub plan: SparsePlan,
    /// The dual objective: a lower bound of the primal one, not `<T, C>`.
    pub value: f64,
    /// `<T, C>`.
    pub primal_cost: f64,
    /// `<T, C> + sum_j Omega(t_j) - value`. At most the tolerance where the plan is feasible and
    /// optimal; it can be negative where the plan misses its marginals.
    pub gap: f64,
    /// `|T 1 - a|_1 + |T' 1 - b|_1`: how far the plan is from feasible.
    pub marginal_error: f64,
    /// Largest entry of the gradient of the maximized function.
    pub gradient: f64,
    /// Whether the solver's own tolerance was met.
    pub converged: bool,
    /// Iterations done.
    pub iterations: usize,
    /// The objective before each iteration, and after the last.
    pub history: Vec<f64>,
    /// Non-zeros of each column of the plan.
    pub nnz_per_column: Vec<usize>,
}

/// Solves from potentials of zero.
///
/// # Errors
/// As [`solve_from`].
pub fn solve(
    problem: &OtProblem,
    reg: &OtReg,
    formulation: Formulation,
    solver: &OtSolver,
) -> Result<OtSolution> {
    solve_from(problem, reg, formulation, solver, &Start::default())
}

/// Solves from given potentials.
///
/// A solver that does not reach its tolerance is no error: ties of the `k` largest entries make it
/// impossible. [`OtSolution::converged`] and [`OtSolution::marginal_error`] tell.
///
/// # Errors
/// Those of the validations, [`Error::Unsupported`] for combinations that make no sense (Sinkhorn
/// without entropy, the network simplex or the auction with a regularizer, the dual without one), and
/// [`Error::Infeasible`] where forbidden pairs leave no plan (seen by the network simplex).
pub fn solve_from(
    problem: &OtProblem,
    reg: &OtReg,
    formulation: Formulation,
    solver: &OtSolver,
    start: &Start,
) -> Result<OtSolution> {
    reg.validate()?;
    solver.validate()?;
    let start = Start {
        alpha: or_zeros("Start::alpha", &start.alpha, problem.a().len())?,
        beta: or_zeros("Start::beta", &start.beta, problem.b().len())?,
    };
    match (*solver, *reg) {
        (OtSolver::NetworkSimplex, OtReg::None) => {
            Ok(of_vertex(problem, reg, network_simplex(problem)?))
        }
        (OtSolver::AuctionExact, OtReg::None) => Ok(of_vertex(problem, reg, auction(problem)?)),
        (OtSolver::AuctionExact, _) => Err(Error::unsupported("the auction", "with a regularizer")),
        (OtSolver::NetworkSimplex, _) => Err(Error::unsupported(
            "the network simplex",
            "with a regularizer",
        )),
        (
            OtSolver::Sinkhorn {
                log_domain,
                tol,
                max_iter,
            },
            OtReg::Entropic { gamma },
        ) => {
            let scaling = Scaling {
                gamma,
                log_domain,
                tol,
                max_iter,
            };
            let scaled = sinkhorn(problem, scaling, &start.beta)?;
            Ok(of_scaling(problem, reg, scaled, tol))
        }
        (OtSolver::Sinkhorn { .. }, _) => {
            Err(Error::unsupported("Sinkhorn", "without an entropic term"))
        }
        _ => ascend(problem, reg, formulation, solver, start),
    }
}

/// Many problems with the same regularizer, on all threads: weights `[batch, m]` and `[batch, n]`,
/// costs `[batch, m, n]`.
///
/// # Errors
/// As [`solve`] and [`OtProblem::new`].
pub fn solve_batch(
    a: &Tensor,
    b: &Tensor,
    cost: &Tensor,
    reg: &OtReg,
    formulation: Formulation,
    solver: &OtSolver,
) -> Result<Vec<OtSolution>> {
    let batch = match (a.dims(), b.dims(), cost.dims()) {
        (&[p, m], &[q, n], &[r, rows, columns])
            if p == q && q == r && m == rows && n == columns =>
        {
            p
        }
        _ => {
            let expected = format!(
                "[batch, m, n] beside weights {:?} and {:?}",
                a.dims(),
                b.dims()
            );
            return Err(Error::shape("cost", cost.dims(), expected));
        }
    };
    let one = |i| OtProblem::new(&a.get(i)?, &b.get(i)?, &cost.get(i)?);
    let problems: Vec<OtProblem> = (0..batch).map(one).collect::<Result<_>>()?;
    problems
        .par_iter()
        .map(|problem| solve(problem, reg, formulation, solver))
        .collect()
}

fn of_vertex(problem: &OtProblem, reg: &OtReg, exact: Exact) -> OtSolution {
    let raw = Raw {
        value: exact.value,
        gradient: 0.0,
        converged: true,
        iterations: exact.pivots,
        history: vec![exact.value],
        alpha: exact.alpha,
        beta: exact.beta,
        plan: exact.plan,
    };
    raw.finish(problem, reg)
}

fn or_zeros(what: &'static str, given: &[f64], length: usize) -> Result<Vec<f64>> {
    if given.is_empty() {
        return Ok(vec![0.0; length]);
    }
    check::length(what, given.len(), length)?;
    check::finite(what, given)?;
    Ok(given.to_vec())
}

/// A result without what follows from it.
struct Raw {
    alpha: Vec<f64>,
    beta: Vec<f64>,
    plan: SparsePlan,
    value: f64,
    gradient: f64,
    converged: bool,
    iterations: usize,
    history: Vec<f64>,
}

impl Raw {
    fn finish(mut self, problem: &OtProblem, reg: &OtReg) -> OtSolution {
        let entropic = matches!(reg, OtReg::Entropic { .. });
        complete(problem, &mut self.alpha, &mut self.beta, entropic);
        let primal_cost = self.plan.cost_of(problem);
        let gap = primal_cost + omega(&self.plan, reg) - self.value;
        let missed = |sums: Vec<f64>, wanted: &[f64]| -> f64 {
            sums.iter().zip(wanted).map(|(s, w)| (s - w).abs()).sum()
        };
        let marginal_error = missed(self.plan.row_sums(), problem.a())
            + missed(self.plan.column_sums(), problem.b());
        OtSolution {
            gap,
            primal_cost,
            marginal_error,
            nnz_per_column: self.plan.nnz_per_column(),
            alpha: self.alpha,
            beta: self.beta,
            plan: self.plan,
            value: self.value,
            gradient: self.gradient,
            converged: self.converged,
            iterations: self.iterations,
            history: self.history,
        }
    }
}

/// Centers `alpha`, and gives rows without mass the largest potential that moves nothing to them.
fn complete(problem: &OtProblem, alpha: &mut [f64], beta: &mut [f64], entropic: bool) {
    let (a, b) = (problem.a(), problem.b());
    let with_mass = a.iter().filter(|a| **a > 0.0).count() as f64;
    let sum: f64 = (0..a.len()).filter(|&i| a[i] > 0.0).map(|i| alpha[i]).sum();
    let mean = sum / with_mass;
    alpha.iter_mut().for_each(|x| *x -= mean);
    beta.iter_mut().for_each(|x| *x += mean);
    for i in (0..a.len()).filter(|&i| a[i] == 0.0) {
        let slack = |j: usize| problem.column(j)[i] - beta[j];
        let bound = (0..b.len()).filter(|&j| b[j] > 0.0).map(slack);
        alpha[i] = if entropic {
            f64::NEG_INFINITY
        } else {
            bound.fold(f64::INFINITY, f64::min)
        };
    }
    for j in (0..b.len()).filter(|&j| b[j] == 0.0) {
        let column = problem.column(j);
        let slack = |i: usize| column[i] - alpha[i];
        let bound = (0..a.len()).filter(|&i| a[i] > 0.0).map(slack);
        beta[j] = if entropic {
            f64::NEG_INFINITY
        } else {
            bound.fold(f64::INFINITY, f64::min)
        };
    }
}

fn omega(plan: &SparsePlan, reg: &OtReg) -> f64 {
    let columns = plan.shape().1;
    let sum = |f: &(dyn Fn(f64) -> f64 + Sync)| -> f64 {
        let column = |j: usize| plan.column(j).iter().map(|(_, t)| f(*t)).sum::<f64>();
        // Columns are added in order, whatever the number of threads.
        let sums: Vec<f64> = (0..columns).into_par_iter().map(column).collect();
        sums.iter().sum()
    };
    match *reg {
        OtReg::None => 0.0,
        OtReg::Entropic { gamma } => gamma * sum(&|t| t * t.ln()),
        OtReg::Quadratic { gamma } | OtReg::KSparse { gamma, .. } => 0.5 * gamma * sum(&|t| t * t),
    }
}

/// Rows without mass out of the way.
fn masked(problem: &OtProblem, alpha: &[f64]) -> Vec<f64> {
    let pairs = alpha.iter().zip(problem.a());
    pairs
        .map(|(x, a)| if *a > 0.0 { *x } else { f64::NEG_INFINITY })
        .collect()
}

/// One evaluation of the maximized function, negated: the value, and the gradient written into
/// `gradient`.
fn negated(
    pass: &mut Pass,
    problem: &OtProblem,
    formulation: Formulation,
    x: &[f64],
    gradient: &mut [f64],
) -> f64 {
    let m = problem.a().len();
    let alpha = masked(problem, &x[..m]);
    match formulation {
        Formulation::SemiDual => pass.semi_dual(problem, &alpha, false),
        Formulation::Dual => pass.dual(problem, &alpha, &x[m..], false),
    }
    for (out, g) in gradient.iter_mut().zip(&pass.grad_alpha) {
        *out = -g;
    }
    if formulation == Formulation::Dual {
        for (out, g) in gradient[m..].iter_mut().zip(pass.column_values()) {
            *out = -g;
        }
    }
    -pass.value
}

fn ascend(
    problem: &OtProblem,
    reg: &OtReg,
    formulation: Formulation,
    solver: &OtSolver,
    start: Start,
) -> Result<OtSolution> {
    let mut x = start.alpha;
    if formulation == Formulation::Dual {
        has_dual(reg)?;
        x.extend(start.beta);
    }
    let mut pass = Pass::new(problem, *reg);
    let mut evaluate = |x: &[f64], g: &mut [f64]| negated(&mut pass, problem, formulation, x, g);
    let (x, iterations, mut history, tol) = match *solver {
        OtSolver::Lbfgs {
            memory,
            tol,
            max_iter,
        } => {
            let limits = Limits {
                memory,
                tol,
                max_iter,
            };
            let found = minimize(&x, limits, evaluate);
            let history: Vec<f64> = found.history.iter().map(|f| -f).collect();
            (found.x, found.iterations, history, tol)
        }
        _ => {
            let (x, history) = adam(x, solver, &mut evaluate);
            let steps = history.len();
            (x, steps, history, 0.0)
        }
    };
    let (alpha, given) = x.split_at(problem.a().len());
    let alpha_in = masked(problem, alpha);
    match formulation {
        Formulation::SemiDual => pass.semi_dual(problem, &alpha_in, true),
        Formulation::Dual => pass.dual(problem, &alpha_in, given, true),
    }
    let mut gradient = crate::linalg::max_abs(&pass.grad_alpha);
    let mut beta = pass.column_values();
    if formulation == Formulation::Dual {
        gradient = gradient.max(crate::linalg::max_abs(&beta));
        beta = given.to_vec();
    }
    if matches!(solver, OtSolver::Adam { .. }) {
        history.push(pass.value);
    }
    let raw = Raw {
        alpha: alpha.to_vec(),
        beta,
        plan: pass.plan(problem),
        value: pass.value,
        gradient,
        converged: gradient <= tol,
        iterations,
        history,
    };
    Ok(raw.finish(problem, reg))
}

/// The point after all steps, and the maximized function before each.
fn adam(
    mut x: Vec<f64>,
    solver: &OtSolver,
    evaluate: &mut impl FnMut(&[f64], &mut [f64]) -> f64,
) -> (Vec<f64>, Vec<f64>) {
    let OtSolver::Adam {
        lr,
        steps,
        beta1,
        beta2,
        eps,
    } = *solver
    else {
        return (x, vec![]);
    };
    let mut g = vec![0.0; x.len()];
    let (mut m, mut v) = (vec![0.0; x.len()], vec![0.0; x.len()]);
    let mut history = Vec::with_capacity(steps);
    for t in 1..=steps {
        history.push(-evaluate(&x, &mut g));
        let (c1, c2) = (1.0 - beta1.powi(t as i32), 1.0 - beta2.powi(t as i32));
        for i in 0..x.len() {
            m[i] = beta1 * m[i] + (1.0 - beta1) * g[i];
            v[i] = beta2 * v[i] + (1.0 - beta2) * g[i] * g[i];
            x[i] -= lr * (m[i] / c1) / ((v[i] / c2).sqrt() + eps);
        }
    }
    (x, history)
}

/// Sinkhorn's result: the column potentials are the best for the row potentials, so that the columns
/// are exact.
fn of_scaling(problem: &OtProblem, reg: &OtReg, scaled: Scaled, tol: f64) -> OtSolution {
    let mut pass = Pass::new(problem, *reg);
    let alpha = masked(problem, &scaled.alpha);
    pass.dual(problem, &alpha, &scaled.beta, true);
    let raw = Raw {
        alpha: scaled.alpha,
        beta: scaled.beta,
        plan: pass.plan(problem),
        value: pass.value,
        gradient: crate::linalg::max_abs(&pass.grad_alpha)
            .max(crate::linalg::max_abs(&pass.column_values())),
        converged: scaled.error <= tol,
        iterations: scaled.iterations,
        history: vec![pass.value],
    };
    raw.finish(problem, reg)
}

//! Discrete optimal transport: exact, entropic, quadratic, and quadratic with at most `k`
//! non-zeros in each column of the plan; a differentiable loss and a router for mixtures of
//! experts.
//!
//! For whoever matches two weighted sets (points, colors, tokens and experts) and wants a plan that
//! is sparse by construction. *Sparsity-Constrained Optimal Transport*, Liu, Puigcerver, Blondel,
//! ICLR 2023, arXiv 2209.15466. The problem, with `t_j` the column `j` of `T`:
//!
//! ```text
//! min <T, C> + sum_j Omega(t_j)   over   T >= 0, T 1 = a, T' 1 = b
//! Omega(t) = 0 | gamma sum t log t | gamma/2 |t|^2 | gamma/2 |t|^2 where |t|_0 <= k
//! ```
//!
//! It is solved through its smooth concave duals. With `t_j = b_j y` and `y` in the simplex,
//!
//! ```text
//! semi-dual  S(alpha)       = <alpha, a> - sum_j b_j max_y (<alpha - c_j, y> - Omega(b_j y) / b_j)
//! dual       D(alpha, beta) = <alpha, a> + <beta, b> - sum_j max_{t >= 0} (<alpha + beta_j - c_j, t> - Omega(t))
//! ```
//!
//! and the maximizers are the plan's columns: a softmax, a projection on the simplex, or the
//! projection of the `k` largest entries. `D <= S <= primal`. With `k` the primal is not convex: the
//! plan is optimal where the `k` largest entries of each column are unique at the optimum, and else
//! one supergradient, whose [`OtSolution::marginal_error`] says by how much it misses `a`.
//!
//! Sets that are known only by their own structure, such as two graphs, are matched by
//! [`gromov_wasserstein`]: see [`GwProblem`].
//!
//! | symbol | field |
//! | --- | --- |
//! | `a`, `b`, `C` | [`OtProblem`] |
//! | `gamma`, `k` | [`OtReg`] |
//! | `alpha`, `beta`, `T` | [`OtSolution::alpha`], [`OtSolution::beta`], [`OtSolution::plan`] |
//!
//! Sparsity is per column, that is per target `b_j`: transpose to limit it per row. Costs of the
//! order of 1 (`C / max C`) suit the default `gamma`s; an infinite cost forbids a pair.
//!
//! ```
//! use thalweg_convex::transport::{solve, Formulation, OtProblem, OtReg, OtSolver};
//!
//! let cost = [0.0, 1.0, 4.0, 1.0, 0.0, 1.0, 4.0, 1.0, 0.0];
//! let problem = OtProblem::from_slices(&[0.2, 0.5, 0.3], &[0.4, 0.3, 0.3], &cost)?;
//! let reg = OtReg::KSparse { gamma: 1.0, k: 2 };
//! let solution = solve(&problem, &reg, Formulation::SemiDual, &OtSolver::lbfgs())?;
//! assert!(solution.nnz_per_column.iter().all(|&nnz| nnz <= 2));
//! assert!(solution.value <= solution.primal_cost + 1.0 * 0.5);
//! # Ok::<(), thalweg_convex::Error>(())
//! ```

mod auction;
mod exact;
mod exponential;
mod gromov;
mod loss;
mod objective;
mod plan;
mod projection;
mod router;
mod sinkhorn;
mod solver;

pub use gromov::{
    entropic_gromov_wasserstein, gromov_wasserstein, proximal_transport, EntropicGwConfig,
    GroundLoss, GwConfig, GwGradients, GwLoss, GwProblem, GwSolution, ProximalConfig,
};
pub use loss::OtLoss;
pub use objective::{dual, semi_dual, DualValue, SemiDualValue};
pub use plan::{restrict_to_support, SparsePlan};
pub use projection::{project_simplex, project_sparse_simplex};
pub use router::{Capacity, GateCost, Routing, SparseMoe, SparseOtRouter, SparseOtRouterConfig};
pub use solver::{solve, solve_batch, solve_from, OtSolution, Start};

use crate::error::check;
use crate::linalg::{matrix, values};
use crate::{Error, Result};
use candle_core::Tensor;

/// How far the two masses may differ, relative to the larger: the rounding of single precision.
const MASS_TOLERANCE: f64 = 1e-6;

/// Two weighted sets and what it costs to move a unit of mass between them.
#[derive(Debug, Clone)]
pub struct OtProblem {
    a: Vec<f64>,
    b: Vec<f64>,
    /// Column-major: entry `(i, j)` at `j * m + i`.
    cost: Vec<f64>,
}

impl OtProblem {
    /// Weights `a` `[m]` and `b` `[n]`, costs `[m, n]`, of any floating-point dtype on any device;
    /// they are copied to the CPU in `f64`.
    ///
    /// # Errors
    /// As [`from_slices`](Self::from_slices); [`Error::Shape`] for a cost that is no matrix.
    pub fn new(a: &Tensor, b: &Tensor, cost: &Tensor) -> Result<Self> {
        let (a, b) = (values("OtProblem::a", a)?, values("OtProblem::b", b)?);
        let &[rows, columns] = cost.dims() else {
            return Err(Error::shape("OtProblem::cost", cost.dims(), "[m, n]"));
        };
        if (rows, columns) != (a.len(), b.len()) {
            let expected = format!("[{}, {}]", a.len(), b.len());
            return Err(Error::shape("OtProblem::cost", cost.dims(), expected));
        }
        let flat = cost.to_dtype(candle_core::DType::F64)?.flatten_all()?;
        Self::from_slices(&a, &b, &flat.to_vec1()?)
    }

    /// Equal weights that sum to one on each side.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn uniform(cost: &Tensor) -> Result<Self> {
        let (m, n, values) = matrix("OtProblem::cost", cost)?;
        check::at_least("rows of OtProblem::cost", m, 1)?;
        check::at_least("columns of OtProblem::cost", n, 1)?;
        Self::from_slices(&vec![1.0 / m as f64; m], &vec![1.0 / n as f64; n], &values)
    }

    /// Weights `a` and `b` of at least 0 with the same sum, and row-major costs. A difference of the
    /// sums that single precision explains is taken out of `b`.
    ///
    /// # Errors
    /// [`Error::Shape`] for lengths that do not fit, [`Error::NonFinite`] for NaN or a cost of
    /// `-inf`, [`Error::InvalidConfig`] for a negative weight or no mass, [`Error::UnequalMass`], and
    /// [`Error::Infeasible`] where a row or column with mass has no finite cost.
    pub fn from_slices(a: &[f64], b: &[f64], cost: &[f64]) -> Result<Self> {
        let (m, n) = (a.len(), b.len());
        let b = balanced(["OtProblem::a", "OtProblem::b"], a, b)?;
        check::length("OtProblem::cost", cost.len(), m * n)?;
        if let Some(position) = cost
            .iter()
            .position(|c| c.is_nan() || *c == f64::NEG_INFINITY)
        {
            return Err(Error::NonFinite {
                what: "OtProblem::cost",
                position,
                value: cost[position],
            });
        }
        let problem = Self {
            a: a.to_vec(),
            b,
            cost: (0..m * n).map(|p| cost[(p % m) * n + p / m]).collect(),
        };
        problem.check_reachable()?;
        Ok(problem)
    }

    fn check_reachable(&self) -> Result<()> {
        let (m, n) = (self.a.len(), self.b.len());
        let stuck = |what: &str, index: usize| Error::Infeasible {
            problem: "optimal transport",
            certificate: format!("{what} {index} has mass and no finite cost"),
            multipliers: vec![],
        };
        let open = |i: usize, j: usize| self.cost[j * m + i].is_finite();
        let (rows, columns) = (&self.a, &self.b);
        for i in (0..m).filter(|&i| rows[i] > 0.0) {
            if !(0..n).any(|j| columns[j] > 0.0 && open(i, j)) {
                return Err(stuck("row", i));
            }
        }
        for j in (0..n).filter(|&j| columns[j] > 0.0) {
            if !(0..m).any(|i| rows[i] > 0.0 && open(i, j)) {
                return Err(stuck("column", j));
            }
        }
        Ok(())
    }

    /// The weights of the rows.
    pub fn a(&self) -> &[f64] {
        &self.a
    }

    /// The weights of the columns.
    pub fn b(&self) -> &[f64] {
        &self.b
    }

    /// The cost of column `j`, by row.
    pub fn column(&self, j: usize) -> &[f64] {
        let m = self.a.len();
        &self.cost[j * m..(j + 1) * m]
    }

    /// The mass that is moved.
    pub fn mass(&self) -> f64 {
        self.a.iter().sum()
    }
}

/// Checks weights and gives the second ones with the sum of the first.
fn balanced(names: [&'static str; 2], a: &[f64], b: &[f64]) -> Result<Vec<f64>> {
    for (what, weights) in names.into_iter().zip([a, b]) {
        if weights.is_empty() {
            return Err(Error::shape(what, &[0], "at least one weight"));
        }
        check::finite(what, weights)?;
        if let Some(bad) = weights.iter().find(|w| **w < 0.0) {
            return Err(Error::config(what, bad, "weights of at least 0"));
        }
    }
    let (rows, columns): (f64, f64) = (a.iter().sum(), b.iter().sum());
    if rows <= 0.0 {
        return Err(Error::config(names[0], rows, "a positive mass"));
    }
    if (rows - columns).abs() > MASS_TOLERANCE * rows.max(columns) {
        return Err(Error::UnequalMass { rows, columns });
    }
    // A rounding of f64 itself is left alone, so that no bit of `b` changes without need.
    let scale = if (rows - columns).abs() > 1e-12 * rows {
        rows / columns
    } else {
        1.0
    };
    Ok(b.iter().map(|w| w * scale).collect())
}

/// The regularizer `Omega` of a column of the plan.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum OtReg {
    /// None: the plan is a vertex.
    None,
    /// `gamma sum t log t`: a dense plan. The dual has `exp(x / gamma - 1)`; Sinkhorn codes that
    /// penalize the divergence from `a b'` differ by a constant.
    Entropic {
        /// Its weight, in units of the cost.
        gamma: f64,
    },
    /// `gamma/2 |t|^2`: a sparse plan.
    Quadratic {
        /// Its weight, in units of the cost over mass.
        gamma: f64,
    },
    /// `gamma/2 |t|^2` with at most `k` non-zeros a column.
    KSparse {
        /// Its weight, in units of the cost over mass.
        gamma: f64,
        /// Most non-zeros of a column; all entries where it is at least the number of rows.
        k: usize,
    },
}

impl OtReg {
    /// Checks the weight and `k`.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for a weight that is not positive or `k = 0`.
    pub fn validate(&self) -> Result<()> {
        match *self {
            Self::None => Ok(()),
            Self::Entropic { gamma } => check::positive("OtReg::Entropic::gamma", gamma),
            Self::Quadratic { gamma } => check::positive("OtReg::Quadratic::gamma", gamma),
            Self::KSparse { gamma, k } => {
                check::positive("OtReg::KSparse::gamma", gamma)?;
                check::at_least("OtReg::KSparse::k", k, 1)
            }
        }
    }
}

/// Which of the two concave problems is maximized.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Formulation {
    /// Over `alpha` and `beta`: cheaper evaluations, marginals of both sides are approximate.
    Dual,
    /// Over `alpha` alone: the columns' sums are `b` exactly.
    SemiDual,
}

/// How it is maximized.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum OtSolver {
    /// L-BFGS with a strong-Wolfe line search.
    Lbfgs {
        /// Pairs of differences that are kept.
        memory: usize,
        /// Largest entry of the gradient (a violated marginal) at which it stops.
        tol: f64,
        /// Most iterations.
        max_iter: usize,
    },
    /// A fixed number of ADAM steps, for routers and for kinks where line searches stall.
    Adam {
        /// Step size, in units of the cost.
        lr: f64,
        /// Number of steps.
        steps: usize,
        /// Weight of the first moment.
        beta1: f64,
        /// Weight of the second moment.
        beta2: f64,
        /// Added to the root of the second moment.
        eps: f64,
    },
    /// Alternating scaling, for [`OtReg::Entropic`].
    Sinkhorn {
        /// Logarithms throughout: slower, safe for a small `gamma`.
        log_domain: bool,
        /// Largest violation of a row's marginal, relative to the mass, at which it stops.
        tol: f64,
        /// Most iterations.
        max_iter: usize,
    },
    /// The network simplex method, for [`OtReg::None`]: exact.
    NetworkSimplex,
    /// The auction algorithm, for [`OtReg::None`] with as many rows as columns, all of equal weight and
    /// no pair forbidden: within `1e-13` of the largest cost, times the mass, of the optimum.
    AuctionExact,
}

impl OtSolver {
    /// L-BFGS with memory 10, tolerance `1e-9` and 500 iterations.
    pub fn lbfgs() -> Self {
        Self::Lbfgs {
            memory: 10,
            tol: 1e-9,
            max_iter: 500,
        }
    }

    /// ADAM with a step of `0.01` and the usual moments.
    pub fn adam(steps: usize) -> Self {
        Self::Adam {
            lr: 1e-2,
            steps,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
        }
    }

    /// Sinkhorn in the logarithmic domain to `1e-9`, at most 10 000 iterations.
    pub fn sinkhorn() -> Self {
        Self::Sinkhorn {
            log_domain: true,
            tol: 1e-9,
            max_iter: 10_000,
        }
    }

    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] that names the first bad one.
    pub fn validate(&self) -> Result<()> {
        match *self {
            Self::Lbfgs {
                memory,
                tol,
                max_iter,
            } => {
                check::at_least("OtSolver::Lbfgs::memory", memory, 1)?;
                check::non_negative("OtSolver::Lbfgs::tol", tol)?;
                check::at_least("OtSolver::Lbfgs::max_iter", max_iter, 1)
            }
            Self::Adam {
                lr,
                beta1,
                beta2,
                eps,
                ..
            } => {
                check::positive("OtSolver::Adam::lr", lr)?;
                check::rate("OtSolver::Adam::beta1", beta1)?;
                check::rate("OtSolver::Adam::beta2", beta2)?;
                check::positive("OtSolver::Adam::eps", eps)
            }
            Self::Sinkhorn { tol, max_iter, .. } => {
                check::positive("OtSolver::Sinkhorn::tol", tol)?;
                check::at_least("OtSolver::Sinkhorn::max_iter", max_iter, 1)
            }
            Self::NetworkSimplex | Self::AuctionExact => Ok(()),
        }
    }
}

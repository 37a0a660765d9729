//! Conditional gradients: the linear model of each step is an exact transport problem.

use super::{centered, inner, tensor_of, GwProblem, GwSolution};
use crate::error::check;
use crate::linalg::product;
use crate::transport::exact::Basis;
use crate::transport::plan::SparsePlan;
use crate::transport::OtProblem;
use crate::Result;
use candle_core::Tensor;
use faer::{Mat, MatRef};

/// Settings of [`gromov_wasserstein`].
#[derive(Debug, Clone, PartialEq)]
pub struct GwConfig {
    /// Most steps.
    pub max_iter: usize,
    /// Change of the objective, relative to it, at which it stops.
    pub tol_rel: f64,
    /// Change of the objective at which it stops.
    pub tol_abs: f64,
}

impl Default for GwConfig {
    fn default() -> Self {
        Self {
            max_iter: 10_000,
            tol_rel: 1e-9,
            tol_abs: 1e-9,
        }
    }
}

impl GwConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`](crate::Error::InvalidConfig) that names the first bad one.
    pub fn validate(&self) -> Result<()> {
        check::at_least("GwConfig::max_iter", self.max_iter, 1)?;
        check::non_negative("GwConfig::tol_rel", self.tol_rel)?;
        check::non_negative("GwConfig::tol_abs", self.tol_abs)
    }
}

/// A stationary plan of the Gromov-Wasserstein problem, from `start` `[m, n]` or from the product of
/// the weights. A solver that reaches its last step is no error: [`GwSolution::converged`] tells.
///
/// # Errors
/// Those of [`GwConfig::validate`], [`Error::InvalidConfig`](crate::Error::InvalidConfig) and
/// [`Error::Shape`](crate::Error::Shape) for a start that is no plan, and those of the network simplex.
pub fn gromov_wasserstein(
    problem: &GwProblem,
    config: &GwConfig,
    start: Option<&Tensor>,
) -> Result<GwSolution> {
    config.validate()?;
    let mut point = Point::new(problem, problem.start(start)?);
    let (m, n) = (problem.p.len(), problem.q.len());
    let zeros = vec![0.0; m * n];
    let mut linear = OtProblem::from_slices(&problem.p, &problem.q, &zeros)?;
    let mut basis = Basis::new(&linear)?;
    let mut history = vec![point.value(problem)];
    let mut converged = false;
    while history.len() <= config.max_iter && !converged {
        point.gradient(problem, &mut linear.cost);
        let pivots = basis.optimize(&linear)?;
        let vertex = basis.read(&linear, pivots)?.plan;
        point.search(problem, &vertex, &linear.cost);
        let (value, before) = (point.value(problem), history[history.len() - 1]);
        history.push(value);
        let change = (value - before).abs();
        converged = change <= config.tol_abs || change <= config.tol_rel * value.abs();
    }
    // The potentials and the gap belong to the last plan.
    point.gradient(problem, &mut linear.cost);
    let pivots = basis.optimize(&linear)?;
    let last = basis.read(&linear, pivots)?;
    let plan = point.plan.as_ref();
    let gradient = MatRef::from_column_major_slice(&linear.cost, m, n);
    Ok(GwSolution {
        value: history[history.len() - 1],
        gap: (inner(plan, gradient) - last.value).max(0.0),
        marginal_error: problem.missed(plan),
        alpha: centered(last.alpha),
        beta: centered(last.beta),
        plan: tensor_of(plan)?,
        converged,
        iterations: history.len() - 1,
        history,
    })
}

/// A plan with what is kept up to date beside it.
struct Point {
    plan: Mat<f64>,
    /// `h1(C1) T h2(C2)'`
    cross: Mat<f64>,
    /// `h1(C1)' T h2(C2)`, where a structure is not symmetric.
    turned: Option<Mat<f64>>,
    costs: (Vec<f64>, Vec<f64>),
    turned_costs: (Vec<f64>, Vec<f64>),
}

impl Point {
    fn new(problem: &GwProblem, plan: Mat<f64>) -> Self {
        let turned = (!problem.symmetric).then(|| problem.transposed_cross(plan.as_ref()));
        Self {
            cross: problem.cross(plan.as_ref()),
            turned,
            costs: problem.marginal_costs(),
            turned_costs: problem.transposed_marginal_costs(),
            plan,
        }
    }

    fn value(&self, problem: &GwProblem) -> f64 {
        problem.value(self.plan.as_ref(), self.cross.as_ref(), &self.costs)
    }

    /// The gradient by the plan, column-major.
    fn gradient(&self, problem: &GwProblem, out: &mut [f64]) {
        let m = problem.p.len();
        let weight = problem.weight();
        for (j, column) in out.chunks_exact_mut(m).enumerate() {
            for (i, out) in column.iter_mut().enumerate() {
                let straight = self.costs.0[i] + self.costs.1[j] - self.cross[(i, j)];
                let other = match &self.turned {
                    None => straight,
                    Some(turned) => {
                        self.turned_costs.0[i] + self.turned_costs.1[j] - turned[(i, j)]
                    }
                };
                let member = problem.features.as_ref().map_or(0.0, |(m, _)| m[(i, j)]);
                *out = weight * (straight + other) + (1.0 - weight) * member;
            }
        }
    }

    /// Moves towards the vertex as far as the objective, a parabola, decreases most.
    fn search(&mut self, problem: &GwProblem, vertex: &SparsePlan, gradient: &[f64]) {
        let (m, n) = (problem.p.len(), problem.q.len());
        let mut direction = Mat::from_fn(m, n, |i, j| -self.plan[(i, j)]);
        for j in 0..n {
            for &(i, t) in vertex.column(j) {
                direction[(i as usize, j)] += t;
            }
        }
        let mut cross = vertex_cross(vertex, problem.c1.as_ref(), problem.h2.transpose());
        cross -= &self.cross;
        let gradient = MatRef::from_column_major_slice(gradient, m, n);
        let slope = inner(gradient, direction.as_ref());
        let curve = -problem.weight() * inner(cross.as_ref(), direction.as_ref());
        let step = minimum(curve, slope);
        self.plan += faer::Scale(step) * &direction;
        self.cross += faer::Scale(step) * &cross;
        if let Some(turned) = &mut self.turned {
            let mut other = vertex_cross(vertex, problem.c1.transpose(), problem.h2.as_ref());
            other -= &*turned;
            *turned += faer::Scale(step) * &other;
        }
        // What a step of one leaves of the old plan is rounding.
        for j in 0..n {
            for i in 0..m {
                if self.plan[(i, j)] < 0.0 {
                    self.plan[(i, j)] = 0.0;
                }
            }
        }
    }
}

/// `left V right` for a vertex, which has few entries.
fn vertex_cross(vertex: &SparsePlan, left: MatRef<'_, f64>, right: MatRef<'_, f64>) -> Mat<f64> {
    let (m, n) = vertex.shape();
    let mut half = Mat::zeros(m, n);
    for j in 0..n {
        let mut column = half.col_mut(j);
        for &(i, t) in vertex.column(j) {
            column += faer::Scale(t) * left.col(i as usize);
        }
    }
    let mut out = Mat::zeros(m, n);
    product(out.as_mut(), half.as_ref(), right);
    out
}

/// Where `curve s^2 + slope s` is least on `[0, 1]`.
fn minimum(curve: f64, slope: f64) -> f64 {
    if curve > 0.0 {
        (-slope / (2.0 * curve)).clamp(0.0, 1.0)
    } else if curve + slope < 0.0 {
        1.0
    } else {
        0.0
    }
}

//! Mirror descent: each step is an entropic transport problem whose cost is the gradient.

use super::{centered, inner, tensor_of, GwProblem, GwSolution};
use crate::error::check;
use crate::transport::sinkhorn::{in_logarithms, Rest, Scaling};
use crate::transport::OtProblem;
use crate::{Error, Result};
use candle_core::Tensor;
use faer::{Mat, MatRef};

/// Settings of [`entropic_gromov_wasserstein`].
#[derive(Debug, Clone, PartialEq)]
pub struct EntropicGwConfig {
    /// Weight of the entropy, in units of the objective.
    pub epsilon: f64,
    /// Most steps.
    pub max_iter: usize,
    /// Change of the plan in the Frobenius norm at which it stops.
    pub tol: f64,
    /// The change is looked at every so many steps, from the first on.
    pub check_every: usize,
    /// Most sweeps of Sinkhorn in a step.
    pub sweeps: usize,
    /// Sum of the absolute changes of all potentials, in units of the objective, at which they stop.
    pub sweep_tol: f64,
    /// Whether the sweeps of a step start at the potentials of the last one, or at zeros.
    pub warm_start: bool,
}

impl Default for EntropicGwConfig {
    fn default() -> Self {
        Self {
            epsilon: 5e-3,
            max_iter: 1000,
            tol: 1e-9,
            check_every: 10,
            sweeps: 1000,
            sweep_tol: 1e-9,
            warm_start: true,
        }
    }
}

impl EntropicGwConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] that names the first bad one.
    pub fn validate(&self) -> Result<()> {
        check::positive("EntropicGwConfig::epsilon", self.epsilon)?;
        check::at_least("EntropicGwConfig::max_iter", self.max_iter, 1)?;
        check::at_least("EntropicGwConfig::check_every", self.check_every, 1)?;
        check::at_least("EntropicGwConfig::sweeps", self.sweeps, 1)?;
        check::non_negative("EntropicGwConfig::tol", self.tol)?;
        check::non_negative("EntropicGwConfig::sweep_tol", self.sweep_tol)
    }
}

/// A stationary plan of the problem with an entropic term, from `start` `[m, n]` or from the product of
/// the weights: a dense plan that changes smoothly with the structures. Sinkhorn runs on logarithms.
/// The value has no entropy in it.
///
/// # Errors
/// Those of [`EntropicGwConfig::validate`], [`Error::InvalidConfig`] and [`Error::Shape`] for a start
/// that is no plan, [`Error::Unsupported`] for structures that are not symmetric,
/// [`Error::Numerical`] where `epsilon` is too small for the costs.
pub fn entropic_gromov_wasserstein(
    problem: &GwProblem,
    config: &EntropicGwConfig,
    start: Option<&Tensor>,
) -> Result<GwSolution> {
    config.validate()?;
    if !problem.symmetric {
        return Err(Error::unsupported(
            "the entropic Gromov-Wasserstein problem",
            "with a structure that is not symmetric: take gromov_wasserstein",
        ));
    }
    let mut plan = problem.start(start)?;
    let (m, n) = (problem.p.len(), problem.q.len());
    let zeros = vec![0.0; m * n];
    let mut linear = OtProblem::from_slices(&problem.p, &problem.q, &zeros)?;
    let costs = problem.marginal_costs();
    let scaling = Scaling {
        gamma: config.epsilon,
        log_domain: true,
        tol: config.sweep_tol,
        max_iter: config.sweeps,
    };
    let (mut history, mut converged) = (vec![], false);
    let mut potentials = (vec![0.0; m], vec![0.0; n]);
    while history.len() < config.max_iter && !converged {
        let cross = problem.cross(plan.as_ref());
        history.push(problem.value(plan.as_ref(), cross.as_ref(), &costs));
        gradient(problem, cross.as_ref(), &costs, &mut linear.cost);
        let beta = if config.warm_start {
            &potentials.1
        } else {
            &zeros[..n]
        };
        let scaled = in_logarithms(&linear, &scaling, beta, Rest::Potentials)?;
        let next = Mat::from_fn(m, n, |i, j| {
            let cost = linear.cost[j * m + i];
            ((scaled.alpha[i] + scaled.beta[j] - cost) / config.epsilon - 1.0).exp()
        });
        if (history.len() - 1) % config.check_every == 0 {
            converged = (&next - &plan).norm_l2() <= config.tol;
        }
        plan = next;
        potentials = (scaled.alpha, scaled.beta);
    }
    let cross = problem.cross(plan.as_ref());
    let value = problem.value(plan.as_ref(), cross.as_ref(), &costs);
    history.push(value);
    gradient(problem, cross.as_ref(), &costs, &mut linear.cost);
    let slopes = MatRef::from_column_major_slice(&linear.cost, m, n);
    let best = crate::transport::exact::network_simplex(&linear)?;
    Ok(GwSolution {
        value,
        gap: (inner(plan.as_ref(), slopes) - best.value).max(0.0),
        marginal_error: problem.missed(plan.as_ref()),
        alpha: centered(potentials.0),
        beta: centered(potentials.1),
        plan: tensor_of(plan.as_ref())?,
        converged,
        iterations: history.len() - 1,
        history,
    })
}

/// The gradient by the plan, column-major.
fn gradient(
    problem: &GwProblem,
    cross: MatRef<'_, f64>,
    costs: &(Vec<f64>, Vec<f64>),
    out: &mut [f64],
) {
    let weight = problem.weight();
    for (j, column) in out.chunks_exact_mut(problem.p.len()).enumerate() {
        for (i, out) in column.iter_mut().enumerate() {
            let structure = costs.0[i] + costs.1[j] - cross[(i, j)];
            let member = problem.features.as_ref().map_or(0.0, |(m, _)| m[(i, j)]);
            *out = 2.0 * weight * structure + (1.0 - weight) * member;
        }
    }
}

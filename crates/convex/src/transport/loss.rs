//! The value of a transport problem as a differentiable function of weights and costs.

use super::{solve, Formulation, OtProblem, OtReg, OtSolution, OtSolver};
use crate::error::check;
use crate::{Error, Result};
use candle_core::{Device, Tensor};

/// The value of the dual problem, differentiable by cost and weights: by the envelope theorem the
/// gradient by `C` is the plan, by `a` and `b` the centered potentials (a change of weights that keeps
/// the mass). Right at the optimum only, so a plan that misses its marginals by much is refused.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use thalweg_convex::transport::{Formulation, OtLoss, OtReg, OtSolver};
///
/// // Points on a line that are moved towards others.
/// let x = Var::new(&[0.0f64, 1.0, 2.0], &Device::Cpu)?;
/// let y = Tensor::new(&[0.5f64, 1.5, 2.5], &Device::Cpu)?;
/// let weights = Tensor::full(1.0 / 3.0, 3, &Device::Cpu)?;
/// let loss = OtLoss::new(OtReg::Quadratic { gamma: 0.1 }, Formulation::SemiDual, OtSolver::lbfgs())?;
/// let mut last = f64::INFINITY;
/// for _ in 0..20 {
///     let cost = x.unsqueeze(1)?.broadcast_sub(&y.unsqueeze(0)?)?.sqr()?;
///     let value = loss.forward(&weights, &weights, &cost)?;
///     let grads = value.backward()?;
///     x.set(&(x.as_tensor() - (grads.get(&x).unwrap() * 0.5)?)?)?;
///     last = value.to_scalar::<f64>()?;
/// }
/// assert!(last < 0.05);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct OtLoss {
    reg: OtReg,
    formulation: Formulation,
    solver: OtSolver,
    max_marginal_error: f64,
}

impl OtLoss {
    /// A loss that refuses plans whose marginals are wrong by more than a hundredth of the mass.
    ///
    /// # Errors
    /// Those of the validations.
    pub fn new(reg: OtReg, formulation: Formulation, solver: OtSolver) -> Result<Self> {
        reg.validate()?;
        solver.validate()?;
        Ok(Self {
            reg,
            formulation,
            solver,
            max_marginal_error: 1e-2,
        })
    }

    /// Accepts plans whose marginals are wrong by this share of the mass (in the sum of absolute
    /// differences); infinite accepts all.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] unless it is at least 0.
    pub fn with_max_marginal_error(mut self, share: f64) -> Result<Self> {
        if share != f64::INFINITY {
            check::non_negative("OtLoss::max_marginal_error", share)?;
        }
        self.max_marginal_error = share;
        Ok(self)
    }

    /// The value for weights `[m]`, `[n]` and costs `[m, n]` of one dtype and device: a scalar.
    ///
    /// # Errors
    /// As [`forward_with`](Self::forward_with).
    pub fn forward(&self, a: &Tensor, b: &Tensor, cost: &Tensor) -> Result<Tensor> {
        Ok(self.forward_with(a, b, cost)?.0)
    }

    /// The value and the solution behind it.
    ///
    /// # Errors
    /// Those of [`OtProblem::new`] and [`solve`]; [`Error::NotConverged`] for a plan that misses its
    /// marginals; [`Error::Infeasible`] for a weight of zero under entropy, where the derivative is
    /// infinite.
    pub fn forward_with(
        &self,
        a: &Tensor,
        b: &Tensor,
        cost: &Tensor,
    ) -> Result<(Tensor, OtSolution)> {
        let problem = OtProblem::new(a, b, cost)?;
        let solution = solve(&problem, &self.reg, self.formulation, &self.solver)?;
        let allowed = self.max_marginal_error * problem.mass();
        if solution.marginal_error > allowed {
            return Err(Error::NotConverged {
                solver: "optimal transport",
                iterations: solution.iterations,
                residual: solution.marginal_error,
                tolerance: allowed,
            });
        }
        let (da, db) = (centered(&solution.alpha)?, centered(&solution.beta)?);
        let (dtype, device) = (cost.dtype(), cost.device());
        let tensor = |values: Vec<f64>| -> Result<Tensor> {
            let n = values.len();
            Ok(Tensor::from_vec(values, n, &Device::Cpu)?
                .to_dtype(dtype)?
                .to_device(device)?)
        };
        // A linear function with the right gradient, less its own value: it adds exactly nothing.
        let plan = solution.plan.to_tensor(dtype, device)?;
        let moved = plan
            .ne(0.0)?
            .where_cond(&(&plan * cost)?, &plan.zeros_like()?)?;
        let linear = (moved.sum_all()? + (tensor(da)? * a)?.sum_all()?)?;
        let linear = (linear + (tensor(db)? * b)?.sum_all()?)?;
        let nothing = (&linear - linear.detach())?;
        let value = Tensor::new(solution.value, &Device::Cpu)?
            .to_dtype(dtype)?
            .to_device(device)?;
        Ok(((value + nothing)?, solution))
    }
}

fn centered(potential: &[f64]) -> Result<Vec<f64>> {
    if let Some(i) = potential.iter().position(|x| !x.is_finite()) {
        return Err(Error::Infeasible {
            problem: "the derivative by a weight",
            certificate: format!("weight {i} is zero and its potential is {}", potential[i]),
            multipliers: vec![],
        });
    }
    let mean = potential.iter().sum::<f64>() / potential.len() as f64;
    Ok(potential.iter().map(|x| x - mean).collect())
}

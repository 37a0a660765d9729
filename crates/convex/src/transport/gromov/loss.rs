//! The value as a differentiable function of structures and weights.

use super::{
    entropic_gromov_wasserstein, gromov_wasserstein, EntropicGwConfig, GroundLoss, GwConfig,
    GwProblem, GwSolution,
};
use crate::{Error, Result};
use candle_core::{Device, Tensor};

/// The Gromov-Wasserstein value, differentiable by the structures and by the weights: by the envelope
/// theorem, with the plan held fixed.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use thalweg_convex::transport::{GroundLoss, GwConfig, GwLoss};
///
/// // A structure that is moved towards another one.
/// let c1 = Var::new(&[[0.0f64, 0.4], [0.4, 0.0]], &Device::Cpu)?;
/// let c2 = Tensor::new(&[[0.0f64, 1.0], [1.0, 0.0]], &Device::Cpu)?;
/// let weights = Tensor::new(&[0.5f64, 0.5], &Device::Cpu)?;
/// let loss = GwLoss::exact(GroundLoss::Square, GwConfig::default())?;
/// let before = loss.forward(&c1, &c2, &weights, &weights)?;
/// let grads = before.backward()?;
/// c1.set(&(c1.as_tensor() - (grads.get(&c1).unwrap() * 0.5)?)?)?;
/// let after = loss.forward(&c1, &c2, &weights, &weights)?;
/// assert!(after.to_scalar::<f64>()? < before.to_scalar::<f64>()?);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct GwLoss {
    loss: GroundLoss,
    solver: Solver,
}

#[derive(Debug, Clone)]
enum Solver {
    Exact(GwConfig),
    Entropic(EntropicGwConfig),
}

impl GwLoss {
    /// By [`gromov_wasserstein`].
    ///
    /// # Errors
    /// Those of [`GwConfig::validate`].
    pub fn exact(loss: GroundLoss, config: GwConfig) -> Result<Self> {
        config.validate()?;
        let solver = Solver::Exact(config);
        Ok(Self { loss, solver })
    }

    /// By [`entropic_gromov_wasserstein`]. The value has no entropy in it, while the plan is that of the
    /// problem with entropy: the gradient by the structures leaves out how the plan moves, and the
    /// weights get none.
    ///
    /// # Errors
    /// Those of [`EntropicGwConfig::validate`].
    pub fn entropic(loss: GroundLoss, config: EntropicGwConfig) -> Result<Self> {
        config.validate()?;
        let solver = Solver::Entropic(config);
        Ok(Self { loss, solver })
    }

    /// The value for structures `[m, m]`, `[n, n]` and weights `[m]`, `[n]` of one dtype and device: a
    /// scalar.
    ///
    /// # Errors
    /// As [`forward_with`](Self::forward_with).
    pub fn forward(&self, c1: &Tensor, c2: &Tensor, p: &Tensor, q: &Tensor) -> Result<Tensor> {
        Ok(self.forward_with(c1, c2, p, q)?.0)
    }

    /// The value and the solution behind it.
    ///
    /// # Errors
    /// Those of [`GwProblem::new`] and of the solver; [`Error::Unsupported`] for weights that want a
    /// gradient from the entropic solver.
    pub fn forward_with(
        &self,
        c1: &Tensor,
        c2: &Tensor,
        p: &Tensor,
        q: &Tensor,
    ) -> Result<(Tensor, GwSolution)> {
        let problem = GwProblem::new(c1, c2, p, q, self.loss)?;
        let solution = match &self.solver {
            Solver::Exact(config) => gromov_wasserstein(&problem, config, None)?,
            Solver::Entropic(config) => {
                if p.track_op() || q.track_op() {
                    return Err(Error::unsupported(
                        "a gradient by the weights",
                        "from the entropic solver: detach them",
                    ));
                }
                entropic_gromov_wasserstein(&problem, config, None)?
            }
        };
        let gradients = problem.gradients(&solution.plan)?;
        let like =
            |x: &Tensor| -> Result<Tensor> { Ok(x.to_dtype(c1.dtype())?.to_device(c1.device())?) };
        // A linear function with the right gradient, less its own value: it adds exactly nothing.
        let mut linear = (like(&gradients.c1)? * c1)?.sum_all()?;
        linear = (linear + (like(&gradients.c2)? * c2)?.sum_all()?)?;
        if let Solver::Exact(_) = self.solver {
            for (potential, weights) in [(&solution.alpha, p), (&solution.beta, q)] {
                let slope = Tensor::from_slice(potential, potential.len(), &Device::Cpu)?;
                linear = (linear + (like(&slope)? * weights)?.sum_all()?)?;
            }
        }
        let nothing = (&linear - linear.detach())?;
        let value = like(&Tensor::new(solution.value, &Device::Cpu)?)?;
        Ok(((value + nothing)?, solution))
    }
}

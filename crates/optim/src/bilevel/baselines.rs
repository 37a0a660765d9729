//! SOBA, MA-SOBA and stocBiO.

use super::bo_rep::{steps_of, BoRep, BoRepConfig, StepReport};
use super::hyper::{estimate, HyperGradient, LinearSolve};
use super::problem::{axpy, finite, BatchRequest, BilevelProblem, Oracle};
use crate::error::check;
use crate::fused::{counters, part, State};
use crate::{Error, Result};
use candle_core::Tensor;

/// Hyper-parameters of [`Soba`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SobaConfig {
    /// Upper step.
    pub eta: f64,
    /// Lower step.
    pub alpha: f64,
    /// Step of the linear system.
    pub nu: f64,
    /// Momentum of the upper direction: 0 is SOBA, more is MA-SOBA.
    pub beta: f64,
}

impl Default for SobaConfig {
    fn default() -> Self {
        Self {
            eta: 1e-2,
            alpha: 1e-2,
            nu: 1e-2,
            beta: 0.0,
        }
    }
}

/// One step of each variable per iteration, the upper one not normalized:
/// `y <- y - alpha grad_y g`, `z <- z - nu (H z - grad_y f)`, `x <- x - eta m` with the direction
/// from the `z` before.
#[derive(Debug, Clone)]
pub struct Soba(BoRep);

impl Soba {
    /// Starts at `x0` and `y0`.
    ///
    /// # Errors
    /// As [`BoRep::new`].
    pub fn new(x0: &Tensor, y0: &Tensor, config: SobaConfig) -> Result<Self> {
        let config = BoRepConfig {
            eta: config.eta,
            beta: config.beta,
            nu: config.nu,
            alpha: config.alpha,
            interval: 1,
            lower_steps: 1,
            normalize: false,
            ..BoRepConfig::default()
        };
        Ok(Self(BoRep::new(x0, y0, config)?))
    }

    /// One step.
    ///
    /// # Errors
    /// As [`BoRep::step`].
    pub fn step<P: BilevelProblem>(&mut self, problem: &mut P) -> Result<StepReport> {
        self.0.advance(problem, true)
    }

    /// The upper variable.
    pub fn x(&self) -> &Tensor {
        self.0.x()
    }

    /// The lower variable.
    pub fn y(&self) -> &Tensor {
        self.0.y()
    }

    /// The approximate solution of the linear system.
    pub fn z(&self) -> &Tensor {
        self.0.z()
    }

    /// As [`BoRep::state`].
    ///
    /// # Errors
    /// Those of candle.
    pub fn state(&self) -> Result<State> {
        self.0.state()
    }

    /// As [`BoRep::load_state`].
    ///
    /// # Errors
    /// As there.
    pub fn load_state(&mut self, state: &State) -> Result<()> {
        self.0.load_state(state)
    }
}

/// Hyper-parameters of [`StocBio`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StocBioConfig {
    /// Upper step.
    pub eta: f64,
    /// Lower step.
    pub alpha: f64,
    /// Lower steps per iteration, from where the last ones ended (`K`).
    pub lower_steps: usize,
    /// How the linear system is solved; a Neumann sum in the original.
    pub solve: LinearSolve,
}

impl Default for StocBioConfig {
    fn default() -> Self {
        Self {
            eta: 1e-2,
            alpha: 1e-2,
            lower_steps: 10,
            solve: LinearSolve::Neumann { terms: 10, lr: 0.1 },
        }
    }
}

/// Several lower steps, then a hyper-gradient from scratch.
#[derive(Debug, Clone)]
pub struct StocBio {
    config: StocBioConfig,
    x: Tensor,
    y: Tensor,
    t: usize,
}

impl StocBio {
    /// Starts at `x0` and `y0`.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] that names the first bad field.
    pub fn new(x0: &Tensor, y0: &Tensor, config: StocBioConfig) -> Result<Self> {
        check::non_negative("StocBioConfig::eta", config.eta)?;
        check::non_negative("StocBioConfig::alpha", config.alpha)?;
        check::at_least_one("StocBioConfig::lower_steps", config.lower_steps)?;
        config.solve.validate()?;
        Ok(Self {
            config,
            x: x0.detach().copy()?,
            y: y0.detach().copy()?,
            t: 0,
        })
    }

    /// One iteration; gives the hyper-gradient that it stepped along.
    ///
    /// # Errors
    /// As [`hypergradient`](super::hypergradient); nothing has changed then.
    pub fn step<P: BilevelProblem>(&mut self, problem: &mut P) -> Result<HyperGradient> {
        let mut y = self.y.clone();
        for index in 0..self.config.lower_steps {
            let batch = problem.batch(BatchRequest {
                oracle: Oracle::Lower,
                iteration: self.t,
                index,
            })?;
            let grad = problem.lower_grad(&self.x, &y, &batch)?;
            y = axpy(&y, -self.config.alpha, &grad)?;
        }
        finite("the lower variable", &y)?;
        let found = estimate(problem, (&self.x, &y), &self.config.solve, None, self.t)?;
        let x = axpy(&self.x, -self.config.eta, &found.grad_x)?;
        finite("the upper variable", &x)?;
        (self.x, self.y) = (x, y);
        self.t += 1;
        Ok(found)
    }

    /// The upper variable.
    pub fn x(&self) -> &Tensor {
        &self.x
    }

    /// The lower variable.
    pub fn y(&self) -> &Tensor {
        &self.y
    }

    /// Everything that a later run needs to continue with the same bits; not the configuration.
    ///
    /// # Errors
    /// Those of candle.
    pub fn state(&self) -> Result<State> {
        Ok(State::from([
            ("x".to_string(), self.x.copy()?),
            ("y".to_string(), self.y.copy()?),
            ("t".to_string(), counters(&[self.t as u64])?),
        ]))
    }

    /// Restores what [`state`](Self::state) returned.
    ///
    /// # Errors
    /// A list of everything that is missing, unexpected or of another shape or dtype; nothing is
    /// changed then.
    pub fn load_state(&mut self, state: &State) -> Result<()> {
        let t = steps_of(state, &self.state()?)?;
        let read = |name: &str| Ok::<_, Error>(part(state, name)?.detach().copy()?);
        (self.x, self.y) = (read("x")?, read("y")?);
        self.t = t;
        Ok(())
    }
}

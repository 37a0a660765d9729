//! The wrapper.

use super::direction::Landscape;
use super::{RhoSchedule, Sharpness};
use crate::closure::{loss_value, ClosureOptimizer};
use crate::fused::{counters, part, read_counters, State, Stateful};
use crate::{Error, Result};
use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};
use candle_nn::Optimizer;
use std::fmt;
use tensor_core::checkpoint::expect_state;
use tensor_core::params::Params;

/// Called before each evaluation of the loss with the number of the pass in this step, from 0.
type PassHook = Box<dyn FnMut(usize) + Send>;

/// What one step did.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SharpReport {
    /// The loss at the start of the step.
    pub loss: f64,
    /// The loss at the first perturbed point.
    pub perturbed_loss: f64,
    /// Norm of the gradient at the start of the step.
    pub grad_norm: f64,
    /// The radius that was used.
    pub rho: f64,
    /// How often the loss was evaluated and differentiated.
    pub passes: usize,
}

/// Sharpness-aware minimization around an optimizer; see the [module](super) page.
pub struct SharpnessAware<O> {
    params: Params,
    kind: Sharpness,
    rho: RhoSchedule,
    inner: O,
    before_pass: Option<PassHook>,
    steps: usize,
}

impl<O: fmt::Debug> fmt::Debug for SharpnessAware<O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharpnessAware")
            .field("kind", &self.kind)
            .field("rho", &self.rho)
            .field("steps", &self.steps)
            .field("inner", &self.inner)
            .finish_non_exhaustive()
    }
}

impl<O: Optimizer> SharpnessAware<O> {
    /// Wraps an optimizer over the same variables.
    ///
    /// # Errors
    /// Those of [`Sharpness::validate`]; an error for variables that share memory or hold
    /// integers.
    pub fn new(vars: Vec<Var>, kind: Sharpness, inner: O) -> Result<Self> {
        kind.validate()?;
        Ok(Self {
            params: Params::new(crate::param_group::numbered(vars))?,
            kind,
            rho: RhoSchedule::Fixed,
            inner,
            before_pass: None,
            steps: 0,
        })
    }

    /// Lets the radius change during training.
    ///
    /// # Errors
    /// Those of [`RhoSchedule::validate`].
    pub fn with_rho(mut self, rho: RhoSchedule) -> Result<Self> {
        rho.validate()?;
        self.rho = rho;
        Ok(self)
    }

    /// Calls `hook` before each evaluation of the loss with the number of the pass in this step,
    /// from 0: to let normalization layers update their running statistics in pass 0 only, or to
    /// replay the same dropout masks.
    #[must_use]
    pub fn with_pass_hook(mut self, hook: impl FnMut(usize) + Send + 'static) -> Self {
        self.before_pass = Some(Box::new(hook));
        self
    }

    /// The optimizer underneath.
    pub fn inner(&self) -> &O {
        &self.inner
    }

    /// The optimizer underneath.
    pub fn inner_mut(&mut self) -> &mut O {
        &mut self.inner
    }

    /// The radius of the next step.
    pub fn rho(&self) -> f64 {
        let lr = self.inner.learning_rate();
        self.rho.at(self.kind.rho(), self.steps, lr)
    }

    /// The direction alone: no step is taken, and the parameters are the same bits as before.
    /// Where the gradient is zero the direction is the plain gradient.
    ///
    /// # Errors
    /// [`Error::NonFiniteLoss`] or [`Error::NonFiniteGradient`] when a pass leaves the numbers;
    /// those of the closure.
    pub fn gradient(
        &mut self,
        loss: &mut dyn FnMut() -> candle_core::Result<Tensor>,
    ) -> Result<(GradStore, SharpReport)> {
        let rho = self.rho();
        if !(rho.is_finite() && rho >= 0.0) {
            return Err(Error::argument("rho", rho, "a finite number >= 0"));
        }
        let start = self.params.snapshot()?;
        let mut land = Landscape {
            params: &self.params,
            start: &start,
            loss,
            before_pass: self.before_pass.as_deref_mut(),
            passes: 0,
            present: vec![false; self.params.len()],
        };
        let found = passes(&self.kind, &mut land, rho);
        let present = std::mem::take(&mut land.present);
        self.params.restore(&start)?;
        let (direction, report) = found?;
        let mut grads = GradStore::default();
        for (((_, var), tensor), present) in self.params.named().iter().zip(direction).zip(present)
        {
            if present {
                grads.insert(var, tensor);
            }
        }
        Ok((grads, report))
    }
}

fn passes(
    kind: &Sharpness,
    land: &mut Landscape<'_>,
    rho: f64,
) -> Result<(Vec<Tensor>, SharpReport)> {
    let (loss, g) = land.evaluate()?;
    let grad_norm = land.finite_norm(&g)?;
    let mut report = SharpReport {
        loss,
        perturbed_loss: loss,
        grad_norm,
        rho,
        passes: land.passes,
    };
    // A perfect fit has nowhere to climb to.
    if grad_norm == 0.0 {
        return Ok((g, report));
    }
    let found = kind.direction(land, rho, g)?;
    report.perturbed_loss = found.perturbed_loss;
    report.passes = land.passes;
    Ok((found.direction, report))
}

impl<O: Optimizer> ClosureOptimizer for SharpnessAware<O> {
    type Report = SharpReport;

    fn step(
        &mut self,
        loss: &mut dyn FnMut() -> candle_core::Result<Tensor>,
    ) -> Result<SharpReport> {
        let (grads, report) = self.gradient(loss)?;
        self.inner.step(&grads)?;
        self.steps += 1;
        Ok(report)
    }

    fn learning_rate(&self) -> f64 {
        self.inner.learning_rate()
    }

    fn set_learning_rate(&mut self, lr: f64) {
        self.inner.set_learning_rate(lr);
    }
}

impl<O: Optimizer + Stateful> SharpnessAware<O> {
    /// The state of the optimizer underneath, and the number of steps for the radius' schedule.
    ///
    /// # Errors
    /// Those of candle.
    pub fn state(&self) -> Result<State> {
        let mut state = State::new();
        for (name, tensor) in self.inner.state()? {
            state.insert(format!("inner.{name}"), tensor);
        }
        state.insert("steps".into(), counters(&[self.steps as u64])?);
        Ok(state)
    }

    /// Continues from a saved state with the same bits.
    ///
    /// # Errors
    /// A list of everything that is missing, unexpected or of another shape or dtype; nothing is
    /// changed then.
    pub fn load_state(&mut self, state: &State) -> Result<()> {
        let (mut inner, mut own) = (State::new(), State::new());
        for (name, tensor) in state {
            match name.strip_prefix("inner.") {
                Some(name) => inner.insert(name.to_string(), tensor.clone()),
                None => own.insert(name.clone(), tensor.clone()),
            };
        }
        expect_state(&own, [("steps", 1, DType::I64)])?;
        let [steps] = read_counters(part(&own, "steps")?)?;
        self.inner.load_state(&inner)?;
        self.steps = steps as usize;
        Ok(())
    }
}

/// The loss at `theta + rho g / |g|` for each of `rhos`: how fast it rises along the gradient. The
/// parameters are the same bits afterwards.
///
/// # Errors
/// [`Error::InvalidArgument`] for radii that are not finite, [`Error::NonFiniteLoss`] or
/// [`Error::NonFiniteGradient`] when an evaluation leaves the numbers; those of the closure.
pub fn sharpness_profile(
    loss: &mut dyn FnMut() -> candle_core::Result<Tensor>,
    vars: Vec<Var>,
    rhos: &[f64],
) -> Result<Vec<f64>> {
    if let Some(rho) = rhos.iter().find(|rho| !rho.is_finite()) {
        return Err(Error::argument("rho", rho, "a finite number"));
    }
    let params = Params::new(crate::param_group::numbered(vars))?;
    let start = params.snapshot()?;
    let mut land = Landscape {
        params: &params,
        start: &start,
        loss,
        before_pass: None,
        passes: 0,
        present: vec![false; params.len()],
    };
    let (center, g) = land.evaluate()?;
    let norm = land.finite_norm(&g)?;
    let mut along = || -> Result<Vec<f64>> {
        let mut losses = Vec::with_capacity(rhos.len());
        for rho in rhos {
            if norm == 0.0 {
                losses.push(center);
                continue;
            }
            params.restore(&start)?;
            params.axpy(rho / norm, &g)?;
            let what = format!("the loss at rho = {rho}");
            losses.push(loss_value(&(land.loss)()?, what)?);
        }
        Ok(losses)
    };
    let losses = along();
    params.restore(&start)?;
    losses
}

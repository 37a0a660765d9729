//! Gradient descent with a backtracking line search.

use super::step::{InnerOptimizer, InnerPoint, InnerStep};
use crate::closure::{loss_value, ClosureOptimizer};
use crate::error::check;
use crate::gradients::Gradients;
use crate::{Error, Result};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use tensor_core::checkpoint::{expect_state, State};
use tensor_core::params::{Params, Snapshot};

/// Configuration of [`ArmijoGd`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ArmijoGdConfig {
    /// First step size.
    pub init: f64,
    /// Fraction of the predicted decrease `a |G|^2` that must come true, in (0, 1).
    pub c: f64,
    /// Factor after a failure, in (0, 1).
    pub shrink: f64,
    /// Growth per epoch of the first trial after the last accepted step, at least 1.
    pub expand: f64,
    /// Batches per epoch: each step's first trial is `expand^(1 / batches_per_epoch)` times the
    /// last step.
    pub batches_per_epoch: f64,
    /// Most trials per step.
    pub max_tries: usize,
    /// Below this step size the search gives up.
    pub min_step: f64,
    /// A gradient of at most this norm is taken as a minimum: no step, and no growth of the step
    /// size.
    pub stop_grad_norm: f64,
}

impl Default for ArmijoGdConfig {
    fn default() -> Self {
        Self {
            init: 10.0,
            c: 0.5,
            shrink: 0.9,
            expand: 1.8,
            batches_per_epoch: 1.0,
            max_tries: 100,
            min_step: 1e-6,
            stop_grad_norm: 1e-6,
        }
    }
}

impl ArmijoGdConfig {
    /// # Errors
    /// [`Error::InvalidConfig`] naming the first value that makes no sense.
    pub fn validate(&self) -> Result<()> {
        let open = |x: f64| x > 0.0 && x < 1.0;
        let in_open = "a number in (0, 1)";
        check::positive("ArmijoGdConfig::init", self.init)?;
        check::require(open(self.c), "ArmijoGdConfig::c", self.c, in_open)?;
        check::require(
            open(self.shrink),
            "ArmijoGdConfig::shrink",
            self.shrink,
            in_open,
        )?;
        check::require(
            self.expand.is_finite() && self.expand >= 1.0,
            "ArmijoGdConfig::expand",
            self.expand,
            "a finite number >= 1",
        )?;
        check::positive("ArmijoGdConfig::batches_per_epoch", self.batches_per_epoch)?;
        check::at_least_one("ArmijoGdConfig::max_tries", self.max_tries)?;
        check::non_negative("ArmijoGdConfig::min_step", self.min_step)?;
        check::non_negative("ArmijoGdConfig::stop_grad_norm", self.stop_grad_norm)
    }
}

/// What one step of [`ArmijoGd`] did.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ArmijoStep {
    /// The loss before the step.
    pub loss: f64,
    /// Norm of its gradient.
    pub grad_norm: f64,
    /// The step size that was applied; 0 for none.
    pub step: f64,
    /// Trials that were rejected.
    pub backtracks: usize,
    /// Whether the applied step satisfies Armijo's inequality. A search that gives up leaves its
    /// last trial in place, unless the loss there is not finite.
    pub accepted: bool,
}

/// Gradient descent whose step size satisfies `L(w - a G) <= L(w) - c a |G|^2`, found by
/// backtracking: the stochastic line search of Vaswani et al. (2019) when used alone on
/// mini-batches (the search uses the same batch as the gradient), and the inner optimizer of
/// [`Sso`](super::Sso).
#[derive(Debug)]
pub struct ArmijoGd {
    params: Params,
    config: ArmijoGdConfig,
    /// The step size that the next search starts to grow from; `None` before the first.
    last: Option<f64>,
}

impl ArmijoGd {
    /// A line search over these variables.
    ///
    /// # Errors
    /// Those of [`ArmijoGdConfig::validate`]; an error for integer variables.
    pub fn new(vars: Vec<Var>, config: ArmijoGdConfig) -> Result<Self> {
        config.validate()?;
        Ok(Self {
            params: Params::new(crate::param_group::numbered(vars))?,
            config,
            last: None,
        })
    }

    /// The step size that was used last.
    pub fn last_step(&self) -> Option<f64> {
        self.last
    }

    /// The state: the last step size (NaN for none).
    ///
    /// # Errors
    /// Those of candle.
    pub fn state(&self) -> Result<State> {
        let last = Tensor::new(self.last.unwrap_or(f64::NAN), &Device::Cpu)?;
        Ok(State::from([("last_step".to_string(), last)]))
    }

    /// Continues from a saved state.
    ///
    /// # Errors
    /// An error listing what does not fit.
    pub fn load_state(&mut self, state: &State) -> Result<()> {
        expect_state(state, [("last_step", (), DType::F64)])?;
        if let Some(last) = state.get("last_step") {
            self.last = Some(last.to_scalar::<f64>()?).filter(|x| !x.is_nan());
        }
        Ok(())
    }

    /// The search; parameters are back at the start when it fails.
    fn search(
        &mut self,
        point: &InnerPoint<'_>,
        objective: &mut dyn FnMut() -> Result<f64>,
    ) -> Result<ArmijoStep> {
        if point.grad_norm <= self.config.stop_grad_norm {
            return Ok(ArmijoStep {
                loss: point.value,
                grad_norm: point.grad_norm,
                step: 0.0,
                backtracks: 0,
                accepted: true,
            });
        }
        let start = self.params.snapshot()?;
        let (mut found, value) = match self.backtrack(point, &start, objective) {
            Ok(found) => found,
            Err(error) => {
                self.params.restore(&start)?;
                return Err(error);
            }
        };
        self.last = Some(found.step);
        if !value.is_finite() {
            self.params.restore(&start)?;
            found.step = 0.0;
        }
        Ok(found)
    }

    /// Tries steps from `start` until one is accepted; the last trial stays in place. Returns what
    /// was found, and the loss there.
    fn backtrack(
        &self,
        point: &InnerPoint<'_>,
        start: &Snapshot,
        objective: &mut dyn FnMut() -> Result<f64>,
    ) -> Result<(ArmijoStep, f64)> {
        let config = &self.config;
        let direction = self.params.gradients(point.grads)?;
        let growth = config.expand.powf(1.0 / config.batches_per_epoch);
        let mut step = self.last.unwrap_or(config.init) * growth;
        let square = point.grad_norm * point.grad_norm;
        let mut value = point.value;
        let mut found = ArmijoStep {
            loss: point.value,
            grad_norm: point.grad_norm,
            step,
            backtracks: 0,
            accepted: false,
        };
        for _ in 0..config.max_tries {
            found.step = step;
            self.params.restore(start)?;
            self.params.axpy(-step, &direction)?;
            value = objective()?;
            if value <= point.value - config.c * step * square {
                found.accepted = true;
                break;
            }
            found.backtracks += 1;
            step *= config.shrink;
            if step < config.min_step {
                break;
            }
        }
        Ok((found, value))
    }
}

/// The gradient norm over all parameters.
pub(super) fn gradient_norm(params: &Params, grads: &GradStore) -> Result<f64> {
    let gradients = Gradients::collect(params.named(), grads);
    let bad = gradients.nonfinite()?;
    if !bad.is_empty() {
        let names = bad.iter().map(|(name, _)| name.to_string()).collect();
        return Err(Error::NonFiniteGradient(names));
    }
    let square: f64 = gradients.squares()?.iter().map(|m| m.gg).sum();
    Ok(square.sqrt())
}

impl ClosureOptimizer for ArmijoGd {
    type Report = ArmijoStep;

    fn step(
        &mut self,
        loss: &mut dyn FnMut() -> candle_core::Result<Tensor>,
    ) -> Result<ArmijoStep> {
        let value = loss()?;
        let at = loss_value(&value, "the loss")?;
        let grads = value.backward()?;
        let grad_norm = gradient_norm(&self.params, &grads)?;
        let point = InnerPoint {
            value: at,
            grads: &grads,
            grad_norm,
        };
        self.search(&point, &mut || finite_or_infinite(loss()?))
    }

    /// The step size that was used last; before the first step, the one that it will start from.
    fn learning_rate(&self) -> f64 {
        self.last.unwrap_or(self.config.init)
    }

    fn set_learning_rate(&mut self, lr: f64) {
        self.last = Some(lr);
    }
}

/// A trial's loss: what is not a number is worse than everything.
pub(super) fn finite_or_infinite(loss: Tensor) -> Result<f64> {
    match loss_value(&loss, "the loss of a trial") {
        Ok(value) => Ok(value),
        Err(Error::NonFiniteLoss { .. }) => Ok(f64::INFINITY),
        Err(other) => Err(other),
    }
}

impl InnerOptimizer for ArmijoGd {
    /// Every surrogate is a new problem: the search starts from `init` again.
    fn begin(&mut self) {
        self.last = None;
    }

    fn inner_step(
        &mut self,
        point: &InnerPoint<'_>,
        objective: &mut dyn FnMut() -> Result<f64>,
    ) -> Result<InnerStep> {
        let found = self.search(point, objective)?;
        Ok(InnerStep {
            step: Some(found.step),
            backtracks: found.backtracks,
        })
    }
}

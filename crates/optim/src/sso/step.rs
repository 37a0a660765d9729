//! The outer step.

use super::armijo::{finite_or_infinite, gradient_norm};
use super::config::{Adaptive, ArmijoTarget, Divergence, Normalization, SsoConfig};
use super::surrogate::{as_rows, softmax, Anchor, Scales};
use super::{TargetLoss, TargetModel};
use crate::closure::loss_value;
use crate::{Error, Result};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::Optimizer;
use tensor_core::checkpoint::{expect_state, State, TensorSpec};
use tensor_core::kernels::sum_squares;
use tensor_core::params::Params;

/// Added to `sqrt(sum |g|^2) / eta`, so that the first step of an adapted run is finite.
const ADAPTIVE_EPS: f64 = 1e-6;

/// Where an inner step starts.
#[derive(Debug)]
pub struct InnerPoint<'a> {
    /// The surrogate there.
    pub value: f64,
    /// Its gradient in the parameters.
    pub grads: &'a GradStore,
    /// Norm of that gradient over all parameters.
    pub grad_norm: f64,
}

/// What an inner step did.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct InnerStep {
    /// The step size, where the optimizer has one.
    pub step: Option<f64>,
    /// Rejected trials of a line search.
    pub backtracks: usize,
}

/// What takes the steps on the surrogate: every `candle_nn::Optimizer`, or
/// [`ArmijoGd`](super::ArmijoGd).
pub trait InnerOptimizer {
    /// Called at the beginning of each outer step.
    fn begin(&mut self) {}

    /// One step from `point`; `objective` evaluates the surrogate at the present parameters.
    ///
    /// # Errors
    /// The implementor's.
    fn inner_step(
        &mut self,
        point: &InnerPoint<'_>,
        objective: &mut dyn FnMut() -> Result<f64>,
    ) -> Result<InnerStep>;
}

impl<O: Optimizer> InnerOptimizer for O {
    fn inner_step(
        &mut self,
        point: &InnerPoint<'_>,
        _: &mut dyn FnMut() -> Result<f64>,
    ) -> Result<InnerStep> {
        self.step(point.grads)?;
        Ok(InnerStep {
            step: Some(self.learning_rate()),
            backtracks: 0,
        })
    }
}

/// What one outer step did.
#[derive(Debug, Clone, PartialEq)]
pub struct SsoReport {
    /// The loss at the start of the step.
    pub loss: f64,
    /// The surrogate at the start of each inner step.
    pub surrogate: Vec<f64>,
    /// The step size in the space of targets (after schedule and search, before adaptation).
    pub eta: f64,
    /// Inner steps taken.
    pub inner_steps: usize,
    /// Step size of the last inner step, where the inner optimizer has one.
    pub last_inner_step: Option<f64>,
    /// Trials that the inner line searches rejected.
    pub inner_backtracks: usize,
    /// Calls of [`TargetLoss::value_and_grad`]: always 1.
    pub loss_calls: usize,
    /// Calls of [`TargetLoss::value`]: by the target search and for the decrease ratio.
    pub value_calls: usize,
    /// Forward passes of the model.
    pub model_calls: usize,
    /// Whether some inner step began at a larger surrogate value than the one before.
    pub surrogate_increased: bool,
    /// Decrease of the loss over decrease of the surrogate, with
    /// [`SsoConfig::measure_decrease`]: near 1 where the surrogate can be trusted. Meaningful with
    /// [`Normalization::Paper`].
    pub decrease_ratio: Option<f64>,
}

/// Target-based surrogate optimization; see the [module](super) page.
#[derive(Debug)]
pub struct Sso<I> {
    params: Params,
    config: SsoConfig,
    inner: I,
    outer_steps: usize,
    /// The step size that the target search keeps from step to step.
    searched: f64,
    /// Sum of squared target gradients: of all, and per coordinate.
    sum: f64,
    sums: Option<Tensor>,
}

impl<I: InnerOptimizer> Sso<I> {
    /// Wraps an inner optimizer over the same variables.
    ///
    /// # Errors
    /// Those of [`SsoConfig::validate`]; an error for integer variables.
    pub fn new(vars: Vec<Var>, config: SsoConfig, inner: I) -> Result<Self> {
        config.validate()?;
        Ok(Self {
            params: Params::new(crate::param_group::numbered(vars))?,
            searched: config.step_size,
            config,
            inner,
            outer_steps: 0,
            sum: 0.0,
            sums: None,
        })
    }

    /// The inner optimizer.
    pub fn inner(&self) -> &I {
        &self.inner
    }

    /// The inner optimizer, to change its learning rate.
    pub fn inner_mut(&mut self) -> &mut I {
        &mut self.inner
    }

    /// One call of the oracle, then up to `inner_steps` steps on the surrogate.
    ///
    /// # Errors
    /// [`Error::NonFiniteLoss`] or [`Error::NonFiniteGradient`] when loss or surrogate leave the
    /// numbers, [`Error::Shape`] when shapes differ between calls; those of model and loss. The
    /// parameters are then what they were before the step.
    pub fn step(&mut self, model: &impl TargetModel, loss: &impl TargetLoss) -> Result<SsoReport> {
        let start = self.params.snapshot()?;
        let done = self.outer_step(model, loss);
        if done.is_err() {
            self.params.restore(&start)?;
        }
        done
    }

    fn outer_step(
        &mut self,
        model: &impl TargetModel,
        loss: &impl TargetLoss,
    ) -> Result<SsoReport> {
        let outputs = model.forward()?;
        let targets = self.targets(&outputs)?;
        let (value, gradient) = loss.value_and_grad(&targets.reshape(outputs.shape())?)?;
        if !value.is_finite() {
            let what = "the loss of the targets".to_string();
            return Err(Error::NonFiniteLoss { what, value });
        }
        let anchor = self.anchor(&targets, &gradient)?;
        let mut report = SsoReport {
            loss: value,
            surrogate: Vec::with_capacity(self.config.inner_steps),
            eta: 0.0,
            inner_steps: 0,
            last_inner_step: None,
            inner_backtracks: 0,
            loss_calls: 1,
            value_calls: 0,
            model_calls: 1,
            surrogate_increased: false,
            decrease_ratio: None,
        };
        let t = self.outer_steps + 1;
        report.eta = match self.config.target_search {
            Some(search) => self.search(&search, &anchor, &outputs, loss, &mut report)?,
            None => self.config.scheduled(t),
        };
        let (sum, sums) = self.accumulate(&anchor)?;
        let (eta, scales) = self.adapted(report.eta, sum, sums.as_ref())?;
        let surrogate = Surrogate {
            anchor: &anchor,
            divergence: self.config.divergence,
            normalization: self.config.normalization,
            eta,
            scales: scales.as_ref(),
        };
        self.descend(model, &surrogate, outputs, &mut report)?;
        if self.config.measure_decrease {
            self.measure_decrease(model, loss, &surrogate, &mut report)?;
        }
        // Only a step that came to its end counts.
        self.outer_steps = t;
        (self.sum, self.sums) = (sum, sums);
        if self.config.target_search.is_some() {
            self.searched = report.eta;
        }
        Ok(report)
    }

    /// What the loss is a function of: the outputs, or their softmax.
    fn targets(&self, outputs: &Tensor) -> Result<Tensor> {
        let rows = as_rows(&outputs.detach())?;
        match self.config.divergence {
            Divergence::Kl => softmax(&rows),
            // A model may hand out a view of a parameter, which would move with the inner steps.
            _ => Ok(rows.copy()?),
        }
    }

    /// Targets with per-example gradients: a mean loss has been divided by the batch.
    fn anchor(&self, targets: &Tensor, gradient: &Tensor) -> Result<Anchor> {
        let anchor = Anchor::new(targets, gradient)?;
        match self.config.normalization {
            Normalization::Official => Ok(anchor),
            Normalization::Paper => {
                let n = anchor.z().dim(0)? as f64;
                Anchor::new(anchor.z(), &anchor.g().affine(n, 0.0)?)
            }
        }
    }

    /// Armijo search along `z - eta g`, starting from the last step size.
    fn search(
        &self,
        search: &ArmijoTarget,
        anchor: &Anchor,
        outputs: &Tensor,
        loss: &impl TargetLoss,
        report: &mut SsoReport,
    ) -> Result<f64> {
        // The slope of the loss along g: |g|^2 for a sum, |g|^2 / n for a mean.
        let mut slope = sum_squares(anchor.g())?;
        if self.config.normalization == Normalization::Paper {
            slope /= anchor.z().dim(0)? as f64;
        }
        let mut eta = self.searched * search.expand;
        for _ in 0..search.max_tries {
            let trial = (anchor.z() - anchor.g().affine(eta, 0.0)?)?;
            report.value_calls += 1;
            let value = loss.value(&trial.reshape(outputs.shape())?);
            let value = match value {
                Err(Error::NonFiniteLoss { .. }) => f64::INFINITY,
                other => other?,
            };
            if value <= report.loss - search.c * eta * slope {
                break;
            }
            eta *= search.shrink;
        }
        Ok(eta.clamp(search.min_step, search.max_step))
    }

    /// The sums of squared gradients with this step's added.
    fn accumulate(&self, anchor: &Anchor) -> Result<(f64, Option<Tensor>)> {
        let square = anchor.g().sqr()?;
        let sum = self.sum + sum_squares(anchor.g())?;
        if !self.config.sums_coordinates() {
            return Ok((sum, None));
        }
        let sums = match &self.sums {
            None => square,
            Some(before) if before.dims() == square.dims() => (before + square)?,
            Some(before) => {
                return Err(Error::shape(
                    "targets",
                    square.dims(),
                    format!("{:?} as in the steps before", before.dims()),
                ))
            }
        };
        Ok((sum, Some(sums)))
    }

    /// The step size after adaptation, and factors for single coordinates.
    fn adapted(&self, eta: f64, sum: f64, sums: Option<&Tensor>) -> Result<(f64, Option<Scales>)> {
        if let Some(sums) = sums {
            let weight = sums.sqrt()?.affine(1.0, ADAPTIVE_EPS * eta)?;
            let step = weight.recip()?;
            return Ok((eta, Some(Scales { step, weight })));
        }
        match self.config.adaptive {
            Adaptive::Scalar => Ok((1.0 / (sum.sqrt() / eta + ADAPTIVE_EPS), None)),
            _ => Ok((eta, None)),
        }
    }

    /// The inner steps.
    fn descend(
        &mut self,
        model: &impl TargetModel,
        surrogate: &Surrogate<'_>,
        outputs: Tensor,
        report: &mut SsoReport,
    ) -> Result<()> {
        self.inner.begin();
        // The first inner step starts where the oracle was asked: no second forward pass.
        let mut first = Some(outputs);
        for _ in 0..self.config.inner_steps {
            let outputs = match first.take() {
                Some(outputs) => outputs,
                None => {
                    report.model_calls += 1;
                    model.forward()?
                }
            };
            let objective = surrogate.of(&outputs)?;
            let value = loss_value(&objective, "the surrogate")?;
            let grads = objective.backward()?;
            let grad_norm = gradient_norm(&self.params, &grads)?;
            if report.surrogate.last().is_some_and(|last| value > *last) {
                report.surrogate_increased = true;
            }
            report.surrogate.push(value);
            if grad_norm <= self.config.stop_grad_norm {
                break;
            }
            let point = InnerPoint {
                value,
                grads: &grads,
                grad_norm,
            };
            let calls = &mut report.model_calls;
            let done = self.inner.inner_step(&point, &mut || {
                *calls += 1;
                finite_or_infinite(surrogate.of(&model.forward()?)?)
            })?;
            report.inner_steps += 1;
            report.inner_backtracks += done.backtracks;
            report.last_inner_step = done.step;
        }
        Ok(())
    }

    /// Actual over predicted decrease of the loss.
    fn measure_decrease(
        &self,
        model: &impl TargetModel,
        loss: &impl TargetLoss,
        surrogate: &Surrogate<'_>,
        report: &mut SsoReport,
    ) -> Result<()> {
        report.model_calls += 1;
        report.value_calls += 1;
        let outputs = model.forward()?.detach();
        let end = loss_value(&surrogate.of(&outputs)?, "the surrogate")?;
        let targets = self.targets(&outputs)?.reshape(outputs.shape())?;
        let actual = report.loss - loss.value(&targets)?;
        let predicted = report.surrogate.first().map_or(0.0, |start| start - end);
        report.decrease_ratio = (predicted > 0.0).then(|| actual / predicted);
        Ok(())
    }

    /// Counters, step size and sums, to continue with the same bits; the inner optimizer's state
    /// is its own.
    ///
    /// # Errors
    /// Those of candle.
    pub fn state(&self) -> Result<State> {
        let scalar = |x: f64| Tensor::new(x, &Device::Cpu);
        let mut state = State::from([
            (
                "outer_steps".to_string(),
                Tensor::new(self.outer_steps as i64, &Device::Cpu)?,
            ),
            ("step_size".to_string(), scalar(self.searched)?),
            ("sum".to_string(), scalar(self.sum)?),
        ]);
        if let Some(sums) = &self.sums {
            state.insert("sums".to_string(), sums.copy()?);
        }
        Ok(state)
    }

    /// Continues from a saved state.
    ///
    /// # Errors
    /// An error listing what does not fit; nothing is changed then.
    pub fn load_state(&mut self, state: &State) -> Result<()> {
        let mut expected: Vec<TensorSpec> = vec![
            ("outer_steps", (), DType::I64).into(),
            ("step_size", (), DType::F64).into(),
            ("sum", (), DType::F64).into(),
        ];
        // The shape of the sums is that of the batch, which only the state knows.
        let sums = state.get("sums").filter(|_| self.config.sums_coordinates());
        if let Some(sums) = sums {
            expected.push(("sums", sums.shape(), sums.dtype()).into());
        }
        expect_state(state, expected)?;
        let get = |name: &str| {
            let missing = || Error::StateMismatch(vec![format!("missing tensor `{name}`")]);
            state.get(name).ok_or_else(missing)
        };
        let steps = get("outer_steps")?.to_scalar::<i64>()?;
        let outer_steps = usize::try_from(steps)
            .map_err(|_| Error::StateMismatch(vec![format!("outer_steps = {steps} < 0")]))?;
        (self.searched, self.sum) = (
            get("step_size")?.to_scalar::<f64>()?,
            get("sum")?.to_scalar::<f64>()?,
        );
        self.outer_steps = outer_steps;
        self.sums = sums.map(Tensor::copy).transpose()?;
        Ok(())
    }
}

/// The surrogate of one outer step.
struct Surrogate<'a> {
    anchor: &'a Anchor,
    divergence: Divergence,
    normalization: Normalization,
    eta: f64,
    scales: Option<&'a Scales>,
}

impl Surrogate<'_> {
    fn of(&self, outputs: &Tensor) -> Result<Tensor> {
        self.anchor.surrogate(
            outputs,
            self.divergence,
            self.normalization,
            self.eta,
            self.scales,
        )
    }
}

//! Training a flow: the loss of rectified flow, averaged weights, reflow and distillation.
//!
//! *Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow*, Liu, Gong and
//! Liu, ICLR 2023, arXiv 2209.03003.
//!
//! For pairs `(X0, X1)` of any coupling and a path `X_t = alpha_t X1 + beta_t X0`:
//!
//! ```text
//! L = E_t E | v(X_t, t) - (alpha'_t X1 + beta'_t X0) |^2      straight: X_t = t X1 + (1 - t) X0, target X1 - X0
//! ```
//!
//! | symbol | here |
//! | --- | --- |
//! | `v` | any [`Velocity`] |
//! | `alpha_t`, `beta_t` | [`Interpolant`], [`Linear`] by default |
//! | the law of `t` | [`TimeSampler`] |
//! | the norm | [`Metric`], [`Reduction`] |
//! | `(X0, X1)` | [`Coupling`](crate::coupling::Coupling): independent, stored, made online |
//!
//! The flow of the minimiser has at every time the law of `X_t`, and no convex transport cost of its
//! coupling exceeds that of the pairs it was trained on. **Reflow** trains again on the pairs
//! `(Z_0, Z_1)` of that flow ([`reflow`](crate::coupling::reflow)), which straightens its paths:
//! `min_{k <= K} S(Z^k) <= E |X1 - X0|^2 / K`. **Distillation** ([`Distill`]) trains for the one (or
//! `k`) steps that will be made.
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use candle_nn::{Module, Optimizer};
//! use thalweg_flows::coupling::{reflow, Coupling, Examples, Gaussian, Independent};
//! use thalweg_flows::ode::{FixedStep, OdeSolver};
//! use thalweg_flows::train::{FlowLoss, TrainConfig, Trainer};
//! use thalweg_flows::RandomStream;
//! # extern crate nn as thalweg_nn;
//! use thalweg_nn::init::SeededVars;
//!
//! let mut rng = RandomStream::new(3);
//! let data = rng.normal(2.0, 0.3, (256, 1), DType::F32, &Device::Cpu)?;
//! let vars = SeededVars::new(&rng.split("weights"));
//! let vb = vars.builder(DType::F32, &Device::Cpu);
//! let (first, second) = (candle_nn::linear(2, 32, vb.pp("a"))?, candle_nn::linear(32, 1, vb.pp("b"))?);
//! let net = |x: &Tensor, t: &Tensor| {
//!     let input = Tensor::cat(&[x, &t.unsqueeze(1)?], 1)?;
//!     second.forward(&first.forward(&input)?.silu()?)
//! };
//!
//! let variables: Vec<_> = vars.trainable();
//! let optimizer = candle_nn::AdamW::new_lr(variables.iter().map(|(_, v)| v.clone()).collect(), 1e-2)?;
//! let config = TrainConfig { lr: 1e-2, warmup: 10, ema_decay: 0.99, ..Default::default() };
//! let mut trainer = Trainer::new(variables, optimizer, config)?;
//! let mut pairs = Independent { source: Gaussian::like(&data)?, target: Examples(data.clone()) };
//! let loss = FlowLoss::default();
//! for _ in 0..200 {
//!     let (x0, x1) = pairs.batch(64, &mut rng)?;
//!     trainer.step(&loss.sample_and_loss(&net, &x0, &x1, &mut rng)?)?;
//! }
//! // Samples and the pairs of the next round come from the averaged weights.
//! let stored = trainer.with_averaged(|| {
//!     reflow(&net, &mut Gaussian::like(&data)?, 100, 50, &FixedStep::euler(20), &mut rng)
//! })?;
//! let mean = stored.tensors().1.mean_all()?.to_scalar::<f32>()?;
//! assert!((mean - 2.0).abs() < 0.3);
//! # Ok::<(), thalweg_flows::Error>(())
//! ```

use crate::condition::Condition;
use crate::error::{check, Error, Result};
use crate::interpolant::{interpolate, Interpolant, Linear};
use crate::time_sampler::TimeSampler;
use crate::velocity::Velocity;
use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};
use candle_nn::Optimizer;
use std::collections::HashMap;
use tensor_core::kernels::sum_squares;
use tensor_core::params::Params;
use tensor_core::random::RandomStream;

/// What a custom metric is given: all `[rows, ...]`.
#[derive(Debug)]
pub struct Residual<'a> {
    /// The predicted velocity.
    pub prediction: &'a Tensor,
    /// The path's.
    pub target: &'a Tensor,
    /// The point of the path.
    pub x_t: &'a Tensor,
}

/// A metric of one's own; it gives one number per row, `[rows]`.
pub type CustomMetric = Box<dyn Fn(&Residual) -> Result<Tensor>>;

/// How far a predicted velocity is from the path's.
#[derive(Default)]
pub enum Metric {
    /// The squared Euclidean distance.
    #[default]
    SquaredL2,
    /// `sqrt(|r|^2 + c^2) - c` of the whole row: quadratic for small errors, linear for large ones.
    PseudoHuber {
        /// Where it turns.
        c: f64,
    },
    /// One's own.
    Custom(CustomMetric),
}

/// The distance of what a frozen network `h` makes of the two velocities: `|J_h(x_t) r|^2`, for
/// transfer between domains that keeps the content. `h` maps `[rows, ...]` to features
/// `[rows, features]`; the product with its Jacobian is a central difference over `step * r`, so `h`
/// is evaluated twice and differentiated once.
pub fn feature_metric(h: impl Fn(&Tensor) -> Result<Tensor> + 'static, step: f64) -> Metric {
    Metric::Custom(Box::new(move |given| {
        check::positive("step", step)?;
        let move_by = (given.prediction - given.target)?.affine(step, 0.0)?;
        let (plus, minus) = (h(&(given.x_t + &move_by)?)?, h(&(given.x_t - &move_by)?)?);
        let along = (plus - minus)?.affine(0.5 / step, 0.0)?;
        Ok(along.flatten_from(1)?.sqr()?.sum(1)?)
    }))
}

/// How [`Metric::SquaredL2`] sums over the dimensions of a row; rows are always averaged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Reduction {
    /// The mean.
    #[default]
    Mean,
    /// Half the sum.
    HalfSum,
}

/// A weight of times: from `[rows]` to `[rows]`.
pub type TimeWeight = Box<dyn Fn(&Tensor) -> Result<Tensor>>;

/// The loss of a flow; see the [module](self) page.
pub struct FlowLoss {
    /// The path.
    pub interpolant: Box<dyn Interpolant>,
    /// The law of the time.
    pub time: TimeSampler,
    /// The distance of velocities.
    pub metric: Metric,
    /// A weight of times; none weighs all alike.
    pub weight: Option<TimeWeight>,
    /// How squares are summed.
    pub reduction: Reduction,
}

impl Default for FlowLoss {
    fn default() -> Self {
        Self {
            interpolant: Box::new(Linear),
            time: TimeSampler::default(),
            metric: Metric::SquaredL2,
            weight: None,
            reduction: Reduction::Mean,
        }
    }
}

impl FlowLoss {
    /// The default with other times.
    pub fn with_time(time: TimeSampler) -> Self {
        Self {
            time,
            ..Self::default()
        }
    }

    /// The loss at given times `[rows]`, a scalar with its graph.
    ///
    /// # Errors
    /// [`Error::Shape`] when shapes do not fit together; [`Error::InvalidArgument`] for no row;
    /// those of the field.
    pub fn loss(
        &self,
        v: &dyn Velocity,
        x0: &Tensor,
        x1: &Tensor,
        t: &Tensor,
        condition: &Condition,
    ) -> Result<Tensor> {
        if check::rows("x0", x0)? == 0 {
            return Err(Error::argument("rows", 0, "at least 1"));
        }
        let (x_t, target) = interpolate(self.interpolant.as_ref(), x0, x1, t)?;
        let prediction = v.velocity(&x_t, t, condition)?;
        check::same_shape("the velocity", &prediction, &target)?;
        let squares = || -> Result<Tensor> {
            Ok((&prediction - &target)?
                .reshape((x0.dims()[0], ()))?
                .sqr()?)
        };
        let per_row = match (&self.metric, self.reduction) {
            (Metric::SquaredL2, Reduction::Mean) => squares()?.mean(1)?,
            (Metric::SquaredL2, Reduction::HalfSum) => squares()?.sum(1)?.affine(0.5, 0.0)?,
            (Metric::PseudoHuber { c }, _) => {
                check::positive("Metric::PseudoHuber c", *c)?;
                let root = squares()?.sum(1)?.affine(1.0, c * c)?.sqrt()?;
                root.affine(1.0, -c)?
            }
            (Metric::Custom(metric), _) => metric(&Residual {
                prediction: &prediction,
                target: &target,
                x_t: &x_t,
            })?,
        };
        check::same_shape("the metric", &per_row, t)?;
        let weighted = match &self.weight {
            Some(weight) => (per_row * weight(t)?)?,
            None => per_row,
        };
        Ok(weighted.mean_all()?)
    }

    /// The unconditional loss at times drawn from [`time`](Self::time).
    ///
    /// # Errors
    /// As [`loss`](Self::loss).
    pub fn sample_and_loss(
        &self,
        v: &dyn Velocity,
        x0: &Tensor,
        x1: &Tensor,
        rng: &mut RandomStream,
    ) -> Result<Tensor> {
        let rows = check::rows("x0", x0)?;
        let t = self.time.sample(rows, rng, x0.dtype(), x0.device())?;
        self.loss(v, x0, x1, &t, &Condition::Null)
    }
}

/// Distillation of a flow to the few steps that will be made. Start from the weights of the flow
/// whose pairs are used (best after a reflow), and sample with [`steps`](Self::steps) Euler steps and
/// no other number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Distill {
    /// One step from the source: `X0 + v(X0, 0)`.
    OneStep,
    /// One step back from the target, for an encoder: `X1 - v(X1, 1)`.
    OneStepBack,
    /// This many Euler steps.
    Steps(usize),
}

impl Distill {
    /// The loss to train with, on pairs of the teacher.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for no step.
    pub fn loss(&self, metric: Metric) -> Result<FlowLoss> {
        let time = match self {
            Self::OneStep => TimeSampler::Fixed(0.0),
            Self::OneStepBack => TimeSampler::Fixed(1.0),
            Self::Steps(k) => TimeSampler::Discrete { k: *k, eps: 0.0 },
        };
        time.validate()?;
        Ok(FlowLoss {
            metric,
            ..FlowLoss::with_time(time)
        })
    }

    /// The number of Euler steps of the distilled flow; keep it with the weights.
    pub fn steps(&self) -> usize {
        match self {
            Self::Steps(k) => *k,
            _ => 1,
        }
    }
}

/// How [`Trainer`] trains.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TrainConfig {
    /// Learning rate after the warm-up.
    pub lr: f64,
    /// Steps of linear warm-up.
    pub warmup: usize,
    /// Decay of the averaged weights. The update number `n` uses `min(decay, (1 + n) / (10 + n))`, so
    /// that the average also converges in short runs; for small data 0.999 is usual.
    pub ema_decay: f64,
    /// Largest norm of all gradients together.
    pub grad_clip: Option<f64>,
}

impl Default for TrainConfig {
    /// The paper's for CIFAR-10.
    fn default() -> Self {
        Self {
            lr: 2e-4,
            warmup: 5000,
            ema_decay: 0.999_999,
            grad_clip: Some(1.0),
        }
    }
}

impl TrainConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`].
    pub fn validate(&self) -> Result<()> {
        check::non_negative("TrainConfig::lr", self.lr)?;
        let decay = (0.0..1.0).contains(&self.ema_decay);
        check::require(
            decay,
            "TrainConfig::ema_decay",
            self.ema_decay,
            "a number in [0, 1)",
        )?;
        self.grad_clip
            .map_or(Ok(()), |c| check::positive("TrainConfig::grad_clip", c))
    }
}

/// What one step of a [`Trainer`] saw.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TrainStep {
    /// The loss.
    pub loss: f64,
    /// The norm of all gradients before clipping.
    pub grad_norm: f64,
}

/// Warm-up, clipping and averaged weights around any optimizer of candle.
pub struct Trainer<O> {
    config: TrainConfig,
    optimizer: O,
    params: Params,
    average: Params,
    steps: usize,
}

impl<O: Optimizer> Trainer<O> {
    /// A trainer of these variables, which are also the optimizer's.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`]; variables that share memory.
    pub fn new(vars: Vec<(String, Var)>, optimizer: O, config: TrainConfig) -> Result<Self> {
        config.validate()?;
        let copy = |(name, var): &(String, Var)| {
            Ok((
                name.clone(),
                Var::from_tensor(&var.as_detached_tensor().copy()?)?,
            ))
        };
        let copies = vars.iter().map(copy).collect::<Result<Vec<_>>>()?;
        Ok(Self {
            config,
            optimizer,
            params: Params::new(vars)?,
            average: Params::new(copies)?,
            steps: 0,
        })
    }

    /// Another learning rate after the warm-up, for schedules.
    pub fn set_learning_rate(&mut self, lr: f64) {
        self.config.lr = lr;
    }

    /// The variables that are trained.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// Steps taken.
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// One step on a loss.
    ///
    /// # Errors
    /// [`Error::NonFinite`] for a loss or gradient that is no number: nothing is changed;
    /// [`Error::Core`] naming variables without a gradient.
    pub fn step(&mut self, loss: &Tensor) -> Result<TrainStep> {
        let value = loss.to_dtype(DType::F64)?.to_scalar::<f64>()?;
        let bad = |what: &str| Error::NonFinite {
            what: what.to_string(),
            step: self.steps,
        };
        if !value.is_finite() {
            return Err(bad("the loss"));
        }
        let grads = loss.backward()?;
        let lost = |(name, var): &(String, Var)| grads.get(var).is_none().then(|| name.clone());
        let lost: Vec<String> = self.params.named().iter().filter_map(lost).collect();
        if !lost.is_empty() {
            return Err(tensor_core::Error::LostGradient(lost).into());
        }
        let tensors = self.params.gradients(&grads)?;
        let mut squares = 0.0;
        for grad in &tensors {
            squares += sum_squares(grad)?;
        }
        let norm = squares.sqrt();
        if !norm.is_finite() {
            return Err(bad("the gradient"));
        }
        let factor = match self.config.grad_clip {
            Some(limit) if norm > limit => limit / norm,
            _ => 1.0,
        };
        let mut store = GradStore::default();
        for (grad, (_, var)) in tensors.iter().zip(self.params.named()) {
            let scaled = if factor == 1.0 {
                grad.clone()
            } else {
                grad.affine(factor, 0.0)?
            };
            store.insert(var, scaled);
        }
        let warm = ((self.steps + 1) as f64 / self.config.warmup.max(1) as f64).min(1.0);
        self.optimizer.set_learning_rate(self.config.lr * warm);
        self.optimizer.step(&store)?;
        self.steps += 1;
        self.update_average()?;
        Ok(TrainStep {
            loss: value,
            grad_norm: norm,
        })
    }

    fn update_average(&mut self) -> Result<()> {
        let n = self.steps as f64;
        let decay = self.config.ema_decay.min((1.0 + n) / (10.0 + n));
        let now: Vec<Tensor> = self
            .params
            .named()
            .iter()
            .map(|(_, var)| var.as_detached_tensor())
            .collect();
        Ok(self.average.lerp(1.0 - decay, &now)?)
    }

    /// Runs something with the averaged weights in the variables; the trained ones are put back,
    /// whatever happens.
    ///
    /// # Errors
    /// Those of `f`.
    pub fn with_averaged<R>(&self, f: impl FnOnce() -> Result<R>) -> Result<R> {
        let trained = self.params.snapshot()?;
        self.params.restore(&self.average.snapshot()?)?;
        let result = f();
        self.params.restore(&trained)?;
        result
    }

    /// Puts the averaged weights into the variables for good: the start of the next round.
    ///
    /// # Errors
    /// Those of candle.
    pub fn adopt_average(&self) -> Result<()> {
        Ok(self.params.restore(&self.average.snapshot()?)?)
    }

    /// The averaged weights (`average.NAME`) and the number of steps (`steps`), for a checkpoint
    /// beside those of the variables and of the optimizer.
    ///
    /// # Errors
    /// Those of candle.
    pub fn state(&self) -> Result<HashMap<String, Tensor>> {
        let mut state = HashMap::new();
        for ((name, _), tensor) in self
            .params
            .named()
            .iter()
            .zip(self.average.snapshot()?.tensors())
        {
            state.insert(format!("average.{name}"), tensor.clone());
        }
        let steps = Tensor::new(&[self.steps as i64], &candle_core::Device::Cpu)?;
        state.insert("steps".into(), steps);
        Ok(state)
    }

    /// Goes on from what [`state`](Self::state) gave, with the same bits.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] naming what is missing, [`Error::Shape`] what has another shape;
    /// nothing is changed then.
    pub fn load_state(&mut self, state: &HashMap<String, Tensor>) -> Result<()> {
        let find = |name: &str| {
            let found = state.get(name);
            found.ok_or_else(|| Error::argument("state", name, "a tensor of this name"))
        };
        let mut loaded = Vec::new();
        for (name, var) in self.params.named() {
            let tensor = find(&format!("average.{name}"))?;
            check::same_shape(name, tensor, var.as_tensor())?;
            loaded.push(tensor.to_dtype(var.dtype())?.to_device(var.device())?);
        }
        let steps = find("steps")?.to_vec1::<i64>()?;
        let steps = steps.first().and_then(|n| usize::try_from(*n).ok());
        let steps = steps.ok_or_else(|| Error::argument("steps", "none", "one number >= 0"))?;
        for ((_, var), tensor) in self.average.named().iter().zip(&loaded) {
            var.set(tensor)?;
        }
        self.steps = steps;
        Ok(())
    }

    /// The optimizer.
    pub fn optimizer(&mut self) -> &mut O {
        &mut self.optimizer
    }
}

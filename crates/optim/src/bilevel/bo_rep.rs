//! BO-REP: normalized momentum above, periodic updates below.

use super::epoch_sgd::{epoch_sgd, project, EpochSgdConfig};
use super::hyper::combine;
use super::problem::{axpy, finite, norm, BatchRequest, BilevelProblem, Oracle};
use crate::error::check;
use crate::fused::{counters, part, read_counters, State};
use crate::{Error, Result};
use candle_core::Tensor;
use tensor_core::checkpoint::{expect_state, TensorSpec};

/// What an update of the lower variable leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LowerOutput {
    /// The last iterate.
    #[default]
    Last,
    /// The mean of the new iterates.
    Average,
}

/// Which `z` the direction of `x` is made from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ZOrder {
    /// The one from before the step, as in the paper.
    #[default]
    Old,
    /// The one that the step has just made, as in the official code.
    New,
}

/// How [`BoRep::refine_init`] prepares the lower variable.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum InitRefinement {
    /// Not at all.
    #[default]
    None,
    /// Plain steps.
    Sgd {
        /// How many.
        steps: usize,
        /// Step size.
        lr: f64,
    },
    /// [`epoch_sgd`].
    EpochSgd(EpochSgdConfig),
}

/// Hyper-parameters of [`BoRep`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BoRepConfig {
    /// Length of the upper step.
    pub eta: f64,
    /// Momentum of the upper direction.
    pub beta: f64,
    /// Step of the linear system.
    pub nu: f64,
    /// Step of the lower variable.
    pub alpha: f64,
    /// Steps between two updates of the lower variable (`I`).
    pub interval: usize,
    /// Lower steps at an update (`N`).
    pub lower_steps: usize,
    /// Radius `R` of the ball around the old value that an update stays in.
    pub radius: Option<f64>,
    /// What an update leaves.
    pub lower_output: LowerOutput,
    /// Added to the norm that divides the direction.
    pub eps: f64,
    /// Which `z` the direction is made from.
    pub z_order: ZOrder,
    /// Divide the direction by its norm.
    pub normalize: bool,
    /// Added to the Hessian.
    pub damping: f64,
    /// Radius of a ball around zero that `z` is kept in.
    pub z_radius: Option<f64>,
    /// Ends of an interval that every entry of `x` is kept in.
    pub x_bounds: Option<(f64, f64)>,
    /// How [`BoRep::refine_init`] prepares the lower variable; without that call it is not prepared.
    pub init: InitRefinement,
}

impl Default for BoRepConfig {
    fn default() -> Self {
        Self {
            eta: 1e-2,
            beta: 0.9,
            nu: 1e-2,
            alpha: 1e-3,
            interval: 2,
            lower_steps: 3,
            radius: None,
            lower_output: LowerOutput::Last,
            eps: 1e-10,
            z_order: ZOrder::Old,
            normalize: true,
            damping: 0.0,
            z_radius: None,
            x_bounds: None,
            init: InitRefinement::None,
        }
    }
}

impl BoRepConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] that names the first bad one.
    pub fn validate(&self) -> Result<()> {
        check::non_negative("BoRepConfig::eta", self.eta)?;
        check::rate("BoRepConfig::beta", self.beta)?;
        check::non_negative("BoRepConfig::nu", self.nu)?;
        check::non_negative("BoRepConfig::alpha", self.alpha)?;
        check::at_least_one("BoRepConfig::interval", self.interval)?;
        check::at_least_one("BoRepConfig::lower_steps", self.lower_steps)?;
        if let Some(radius) = self.radius {
            check::positive("BoRepConfig::radius", radius)?;
        }
        check::positive("BoRepConfig::eps", self.eps)?;
        check::non_negative("BoRepConfig::damping", self.damping)?;
        if let Some(radius) = self.z_radius {
            check::positive("BoRepConfig::z_radius", radius)?;
        }
        if let Some((low, high)) = self.x_bounds {
            let holds = low <= high;
            let value = (low, high);
            check::require(holds, "BoRepConfig::x_bounds", value, "low <= high")?;
        }
        match self.init {
            InitRefinement::None => Ok(()),
            InitRefinement::Sgd { steps, lr } => {
                check::at_least_one("InitRefinement::Sgd::steps", steps)?;
                check::positive("InitRefinement::Sgd::lr", lr)
            }
            InitRefinement::EpochSgd(config) => config.validate(),
        }
    }
}

/// What a step tells about itself.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepReport {
    /// The upper loss before the step, where the problem gives it.
    pub f_value: Option<f64>,
    /// Norm of the step's own direction `grad_x f - (d2_xy g) z`.
    pub grad_norm: f64,
    /// Norm of the direction averaged by the momentum.
    pub momentum_norm: f64,
    /// `|(d2_yy g) z - grad_y f|` for the `z` before the step, on the step's batches.
    pub z_residual: f64,
    /// Whether the lower variable was updated.
    pub y_updated: bool,
}

/// BO-REP; see the [module](super) page.
#[derive(Debug, Clone)]
pub struct BoRep {
    config: BoRepConfig,
    x: Tensor,
    y: Tensor,
    z: Tensor,
    m: Tensor,
    t: usize,
}

/// The steps in a state that has the same parts as `own`.
pub(super) fn steps_of(state: &State, own: &State) -> Result<usize> {
    let spec = |(name, tensor): (&String, &Tensor)| {
        TensorSpec::from((name.as_str(), tensor.dims(), tensor.dtype()))
    };
    expect_state(state, own.iter().map(spec))?;
    let [t] = read_counters(part(state, "t")?)?;
    Ok(t as usize)
}

/// What a step moves besides the upper variable.
struct Place {
    y: Tensor,
    z: Tensor,
    m: Tensor,
}

impl BoRep {
    /// Starts at `x0` and `y0` with `z` and momentum zero.
    ///
    /// # Errors
    /// Those of [`BoRepConfig::validate`]; [`Error::Shape`] for an empty tensor;
    /// [`Error::NonFiniteGradient`] for a start that is not finite.
    pub fn new(x0: &Tensor, y0: &Tensor, config: BoRepConfig) -> Result<Self> {
        config.validate()?;
        for (name, start) in [("x0", x0), ("y0", y0)] {
            if start.elem_count() == 0 {
                return Err(Error::shape(name, start.dims(), "at least one entry"));
            }
            finite(name, start)?;
        }
        Ok(Self {
            config,
            x: x0.detach().copy()?,
            y: y0.detach().copy()?,
            z: y0.zeros_like()?,
            m: x0.zeros_like()?,
            t: 0,
        })
    }

    /// The upper variable.
    pub fn x(&self) -> &Tensor {
        &self.x
    }

    /// The lower variable.
    pub fn y(&self) -> &Tensor {
        &self.y
    }

    /// The approximate solution of the linear system.
    pub fn z(&self) -> &Tensor {
        &self.z
    }

    /// The momentum of the upper direction.
    pub fn momentum(&self) -> &Tensor {
        &self.m
    }

    /// Steps made.
    pub fn steps(&self) -> usize {
        self.t
    }

    /// Starts from another `z` and momentum than zero.
    ///
    /// # Errors
    /// [`Error::Shape`].
    pub fn with_start(mut self, z: &Tensor, m: &Tensor) -> Result<Self> {
        for (name, new, old) in [("z", z, &self.z), ("m", m, &self.m)] {
            if new.dims() != old.dims() {
                return Err(Error::shape(name, new.dims(), format!("{:?}", old.dims())));
            }
        }
        (self.z, self.m) = (z.detach().copy()?, m.detach().copy()?);
        Ok(self)
    }

    /// Sets the length of the upper step, for a schedule.
    pub fn set_eta(&mut self, eta: f64) {
        self.config.eta = eta;
    }

    /// Sets the step of the lower variable, for a schedule.
    pub fn set_alpha(&mut self, alpha: f64) {
        self.config.alpha = alpha;
    }

    /// Brings the lower variable close to its minimum at the start, as
    /// [`init`](BoRepConfig::init) says.
    ///
    /// # Errors
    /// Those of the problem.
    pub fn refine_init<P: BilevelProblem>(&mut self, problem: &mut P) -> Result<()> {
        let mut index = 0;
        let x = self.x.clone();
        let mut grad = |y: &Tensor| {
            let request = BatchRequest {
                oracle: Oracle::Lower,
                iteration: 0,
                index,
            };
            index += 1;
            let batch = problem.batch(request)?;
            problem.lower_grad(&x, y, &batch)
        };
        let y = match self.config.init {
            InitRefinement::None => return Ok(()),
            InitRefinement::Sgd { steps, lr } => {
                let mut y = self.y.clone();
                for _ in 0..steps {
                    y = axpy(&y, -lr, &grad(&y)?)?;
                }
                y
            }
            InitRefinement::EpochSgd(config) => {
                let mut centers = epoch_sgd(&mut grad, &self.y, &config)?;
                centers.pop().unwrap_or_else(|| self.y.clone())
            }
        };
        finite("the refined lower variable", &y)?;
        self.y = y;
        Ok(())
    }

    fn update_lower<P: BilevelProblem>(&self, problem: &mut P, y: &Tensor) -> Result<Tensor> {
        let (mut w, mut sum) = (y.clone(), y.zeros_like()?);
        for index in 0..self.config.lower_steps {
            let request = BatchRequest {
                oracle: Oracle::Lower,
                iteration: self.t,
                index,
            };
            let batch = problem.batch(request)?;
            let grad = problem.lower_grad(&self.x, &w, &batch)?;
            let moved = axpy(&w, -self.config.alpha, &grad)?;
            w = project(&moved, y, self.config.radius)?;
            sum = (sum + &w)?;
        }
        match self.config.lower_output {
            LowerOutput::Last => Ok(w),
            LowerOutput::Average => Ok((sum / self.config.lower_steps as f64)?),
        }
    }

    /// One step.
    ///
    /// # Errors
    /// [`Error::NonFiniteGradient`] when a gradient or product is not finite, and those of the
    /// problem; nothing has changed then.
    pub fn step<P: BilevelProblem>(&mut self, problem: &mut P) -> Result<StepReport> {
        let y_updated = self.t > 0 && self.t.is_multiple_of(self.config.interval);
        self.advance(problem, y_updated)
    }

    /// One step on a batch of tasks that share both variables (meta-learning): lower variable, `z` and
    /// momentum go through the tasks one after the other, the lower variable being updated at the
    /// first task and at every [`interval`](BoRepConfig::interval)-th after it; `x` then takes a step
    /// along the mean of the momenta that the tasks have left. A report for each task.
    ///
    /// # Errors
    /// As [`step`](Self::step); [`Error::TooFew`] without a task.
    pub fn step_tasks<P: BilevelProblem>(&mut self, tasks: &mut [P]) -> Result<Vec<StepReport>> {
        let (mut at, mut sum) = (self.place(), self.m.zeros_like()?);
        let mut reports = Vec::with_capacity(tasks.len());
        for (k, task) in tasks.iter_mut().enumerate() {
            let y_updated = k.is_multiple_of(self.config.interval);
            let (next, report) = self.follow(task, &at, y_updated)?;
            sum = (sum + &next.m)?;
            reports.push(report);
            at = next;
        }
        if reports.is_empty() {
            return Err(Error::TooFew {
                what: "a step on tasks",
                of: "tasks",
                needed: 1,
                got: 0,
            });
        }
        let x = self.moved(&(sum / reports.len() as f64)?)?;
        self.take(x, at);
        Ok(reports)
    }

    pub(super) fn advance<P: BilevelProblem>(
        &mut self,
        problem: &mut P,
        y_updated: bool,
    ) -> Result<StepReport> {
        let (next, report) = self.follow(problem, &self.place(), y_updated)?;
        let x = self.moved(&next.m)?;
        self.take(x, next);
        Ok(report)
    }

    fn place(&self) -> Place {
        Place {
            y: self.y.clone(),
            z: self.z.clone(),
            m: self.m.clone(),
        }
    }

    fn take(&mut self, x: Tensor, at: Place) {
        (self.x, self.y, self.z, self.m) = (x, at.y, at.z, at.m);
        self.t += 1;
    }

    /// Lower variable, `z` and momentum after a step at the present `x`.
    fn follow<P: BilevelProblem>(
        &self,
        problem: &mut P,
        at: &Place,
        y_updated: bool,
    ) -> Result<(Place, StepReport)> {
        let config = self.config;
        let y = match y_updated {
            true => self.update_lower(problem, &at.y)?,
            false => at.y.clone(),
        };
        finite("the lower variable", &y)?;
        let batch = |problem: &mut P, oracle| {
            problem.batch(BatchRequest {
                oracle,
                iteration: self.t,
                index: 0,
            })
        };
        let (for_hessian, for_upper) = (
            batch(problem, Oracle::Hessian)?,
            batch(problem, Oracle::Upper)?,
        );
        let for_cross = batch(problem, Oracle::Cross)?;
        let upper = problem.upper_grads(&self.x, &y, &for_upper)?;
        let hz = problem.lower_hvp(&self.x, &y, &at.z, &for_hessian)?;
        let residual = (axpy(&hz, config.damping, &at.z)? - &upper.y)?;
        let z = axpy(&at.z, -config.nu, &residual)?;
        let z = project(&z, &z.zeros_like()?, config.z_radius)?;
        let used = match config.z_order {
            ZOrder::Old => &at.z,
            ZOrder::New => &z,
        };
        let cross = problem.cross_vjp(&self.x, &y, used, &for_cross)?;
        let f_value = upper.value;
        let direction = combine(upper, &cross)?;
        let m = ((&at.m * config.beta)? + (&direction * (1.0 - config.beta))?)?.detach();
        finite("the solution z of the linear system", &z)?;
        finite("the upper direction", &m)?;
        let report = StepReport {
            f_value,
            grad_norm: norm(&direction)?,
            momentum_norm: norm(&m)?,
            z_residual: norm(&residual)?,
            y_updated,
        };
        Ok((Place { y, z, m }, report))
    }

    /// The upper variable after a step along `direction`.
    fn moved(&self, direction: &Tensor) -> Result<Tensor> {
        let config = self.config;
        let length = match config.normalize {
            true => config.eta / (norm(direction)? + config.eps),
            false => config.eta,
        };
        let mut x = axpy(&self.x, -length, direction)?;
        if let Some((low, high)) = config.x_bounds {
            x = x.clamp(low, high)?;
        }
        finite("the upper variable", &x)?;
        Ok(x)
    }

    /// Everything that a later run needs to continue with the same bits; not the configuration.
    ///
    /// # Errors
    /// Those of candle.
    pub fn state(&self) -> Result<State> {
        Ok(State::from([
            ("x".to_string(), self.x.copy()?),
            ("y".to_string(), self.y.copy()?),
            ("z".to_string(), self.z.copy()?),
            ("m".to_string(), self.m.copy()?),
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
        (self.x, self.y, self.z, self.m) = (read("x")?, read("y")?, read("z")?, read("m")?);
        self.t = t;
        Ok(())
    }
}

//! The guided loop, and the same with exact gradients.

use super::cost::{gradient, Cost};
use crate::error::{check, Error};
use crate::Result;
use candle_core::{Tensor, Var};
use flows::combine::linear_combination;
use flows::{Condition, GradientCheck, Nfe, Velocity};
use std::ops::ControlFlow;
use tensor_core::kernels::sum_squares;

/// The paper's 8 in units of the cost's curvature, spread over the steps.
const TOTAL_GAMMA: f64 = 8.0;
/// Above this, guidance of reflowed flows loses quality or diverges.
const LARGEST_GAMMA: f64 = 0.3;

/// How far a correction goes.
#[derive(Default)]
pub enum StepRule {
    /// `x - gamma / L grad` with the curvature `L` of the cost, `gamma = min(8 / N, 0.3)`.
    #[default]
    Auto,
    /// `x - scale grad`.
    Gd {
        /// The scale; 500 in the paper's code, for mean squares of 64 x 64 x 3 images.
        scale: f64,
    },
    /// `x - gamma / L grad`, for costs with a [`curvature`](Cost::curvature).
    Normalized {
        /// The part of the way to the minimum along the steepest direction, below 2.
        gamma: f64,
    },
    /// Adam (0.9, 0.999, 1e-8) with a fresh state at every time step. Factors on the cost matter
    /// through `eps` only.
    Adam {
        /// The learning rate: 0.5 for inpainting latents, 0.02 for pixels behind a decoder.
        lr: f64,
    },
    /// `x - scale(step, t) grad`.
    Schedule(Box<dyn Fn(usize, f64) -> f64>),
}

/// How a step is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Solver {
    /// Euler's rule, the paper's.
    #[default]
    Euler,
    /// Heun's: the mean of the velocities at both ends of the unguided step, for the prediction and
    /// the step alike; the last step is Euler's.
    Heun,
}

/// A step of a guided run.
#[derive(Debug, Clone)]
pub struct GuidedStep {
    /// The step, from 0.
    pub step: usize,
    /// Its time.
    pub t: f64,
    /// The sample after it.
    pub x: Tensor,
    /// The prediction of the finished sample before any correction.
    pub x1: Tensor,
    /// The cost of that prediction, `[rows]`.
    pub cost: Tensor,
}

/// Looks at every step, and may end the run with the sample as it is.
pub type StepCallback<'a> = &'a mut dyn FnMut(&GuidedStep) -> ControlFlow<()>;

/// What a guided run gives.
#[derive(Debug, Clone)]
pub struct GuidedOutput {
    /// The samples.
    pub x: Tensor,
    /// Predictions of the finished sample by step, where they were to be recorded.
    pub x1_hats: Vec<Tensor>,
    /// Costs of the predictions by step, `[rows]` each, where they were to be recorded.
    pub costs: Vec<Tensor>,
    /// Rows through the network, and of backward passes through it.
    pub nfe: Nfe,
    /// Gradients of the cost, in rows.
    pub grad_evals: usize,
}

/// Guidance without the network's gradient; see the [module](super) page.
pub struct FlowChef {
    /// Steps `N`.
    pub steps: usize,
    /// Corrections per step.
    pub inner_steps: usize,
    /// How far they go.
    pub rule: StepRule,
    /// The first step that is not guided any more; by default the last one.
    pub guide_until: Option<usize>,
    /// Whether the last step is guided too.
    pub guide_last: bool,
    /// The first time instead of 0, for networks that divide by it; the noise is scaled by 1 minus
    /// this.
    pub start_eps: f64,
    /// How steps are made.
    pub solver: Solver,
    /// Whether predictions and costs of every step are kept.
    pub record: bool,
    /// The comparison of the first gradient with differences, where one goes through somebody's network:
    /// that of the cost ([`Cost::through_network`]), and of the flow in [`BackpropGuidance`].
    pub gradient_check: GradientCheck,
}

impl Default for FlowChef {
    fn default() -> Self {
        Self {
            steps: 100,
            inner_steps: 1,
            rule: StepRule::Auto,
            guide_until: None,
            guide_last: false,
            start_eps: 1e-5,
            solver: Solver::Euler,
            record: false,
            gradient_check: GradientCheck::default(),
        }
    }
}

/// How a correction is scaled.
pub(crate) enum Scale {
    Plain(f64),
    Adam(Adam),
}

/// The constants of Adam.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Adam {
    pub lr: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
}

impl Adam {
    pub(crate) fn new(lr: f64) -> Self {
        Self {
            lr,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
        }
    }
}

impl FlowChef {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`].
    pub fn validate(&self) -> Result<()> {
        check::require(self.steps > 0, "FlowChef::steps", self.steps, "at least 1")?;
        let inner = self.inner_steps;
        check::require(inner > 0, "FlowChef::inner_steps", inner, "at least 1")?;
        let start = (0.0..1.0).contains(&self.start_eps);
        let words = "a number in [0, 1)";
        check::require(start, "FlowChef::start_eps", self.start_eps, words)?;
        self.rule.validate()
    }

    fn guided(&self, step: usize) -> bool {
        let last = step + 1 == self.steps;
        self.guide_until.is_none_or(|until| step < until) && (!last || self.guide_last)
    }

    /// The time of a grid point.
    fn time(&self, i: usize) -> f64 {
        match i {
            0 => self.start_eps,
            _ => i as f64 / self.steps as f64,
        }
    }

    /// Samples from standard normal noise `[rows, ...]`. The flow's network is never differentiated, so
    /// it may be one that cannot be.
    ///
    /// # Errors
    /// As [`validate`](Self::validate); [`Error::Unsupported`] for a normalized step on a cost without
    /// a curvature; [`Error::NonFinite`] when a sample leaves the numbers (a step that is too large);
    /// those of network and cost.
    pub fn sample(
        &self,
        velocity: &dyn Velocity,
        noise: &Tensor,
        condition: &Condition,
        cost: &dyn Cost,
        callback: Option<StepCallback>,
    ) -> Result<GuidedOutput> {
        let correction = |run: &mut Run, at: &Here| {
            let x = correct(&run.x, &at.v, 1.0 - at.t, cost, &at.scale, self.inner_steps)?;
            run.out.grad_evals += self.inner_steps * at.rows;
            Ok(x)
        };
        let asked = (velocity, noise, condition, cost);
        self.run(asked, false, correction, callback)
    }

    /// The loop: velocity, prediction, correction, step. With `through` the corrections see the
    /// velocity's graph.
    fn run(
        &self,
        (velocity, noise, condition, cost): (&dyn Velocity, &Tensor, &Condition, &dyn Cost),
        through: bool,
        correction: impl Fn(&mut Run, &Here) -> Result<Tensor>,
        mut callback: Option<StepCallback>,
    ) -> Result<GuidedOutput> {
        self.validate()?;
        let rows = match noise.dims().first() {
            Some(rows) => *rows,
            None => return Err(Error::shape("the noise", noise.dims(), "[rows, ...]")),
        };
        let condition = &condition.for_rows(rows)?;
        let mut run = Run {
            x: noise.affine(1.0 - self.start_eps, 0.0)?.detach(),
            out: GuidedOutput {
                x: noise.clone(),
                x1_hats: Vec::new(),
                costs: Vec::new(),
                nfe: Nfe::default(),
                grad_evals: 0,
            },
        };
        if rows == 0 {
            return Ok(run.out);
        }
        let mut curvature = None;
        for step in 0..self.steps {
            let (t, next) = (self.time(step), self.time(step + 1));
            let at = match through && self.guided(step) {
                true => Some(Var::from_tensor(&run.x)?),
                false => None,
            };
            let x = at.as_ref().map_or(&run.x, Var::as_tensor).clone();
            let asked = run.ask(velocity, &x, t, condition)?;
            let mut v = asked.detach();
            let graph = at.map(|at| (at, asked));
            if self.solver == Solver::Heun && step + 1 < self.steps {
                let ahead = linear_combination(&[(1.0, &run.x), (next - t, &v)])?;
                let far = run.ask(velocity, &ahead, next, condition)?.detach();
                v = linear_combination(&[(0.5, &v), (0.5, &far)])?;
            }
            let x1 = linear_combination(&[(1.0, &run.x), (1.0 - t, &v)])?;
            let watched = self.record || callback.is_some();
            let value = match watched {
                true => Some(cost.value(&x1)?.detach()),
                false => None,
            };
            if self.guided(step) {
                if curvature.is_none() {
                    curvature = Some(self.rule.curvature(cost, &x1)?);
                    if cost.through_network() {
                        let value = |x: &Tensor| Ok(cost.value(x)?);
                        let g = cost.grad(&x1)?;
                        run.out.grad_evals += rows;
                        self.gradient_check.run("the cost", value, &x1, &g)?;
                    }
                }
                let scale = self
                    .rule
                    .scale((step, t, self.steps), curvature.unwrap_or(1.0));
                let here = Here {
                    v: v.clone(),
                    graph,
                    t,
                    rows,
                    scale,
                };
                run.x = correction(&mut run, &here)?;
            }
            run.x = linear_combination(&[(1.0, &run.x), (next - t, &v)])?;
            if !sum_squares(&run.x)?.is_finite() {
                return Err(Error::NonFinite {
                    rule: "FlowChef",
                    what: "the sample (a smaller step of the correction may help)".into(),
                    step,
                });
            }
            if let Some(cost) = value {
                if self.record {
                    run.out.x1_hats.push(x1.clone());
                    run.out.costs.push(cost.clone());
                }
                let x = run.x.clone();
                let seen = GuidedStep {
                    step,
                    t,
                    x,
                    x1,
                    cost,
                };
                if let Some(ControlFlow::Break(())) = callback.as_mut().map(|f| f(&seen)) {
                    break;
                }
            }
        }
        run.out.x = run.x;
        Ok(run.out)
    }
}

/// A run in progress.
struct Run {
    x: Tensor,
    out: GuidedOutput,
}

impl Run {
    /// The velocity, counted.
    fn ask(
        &mut self,
        velocity: &dyn Velocity,
        x: &Tensor,
        t: f64,
        condition: &Condition,
    ) -> Result<Tensor> {
        self.out.nfe.main += x.dims()[0];
        self.out.nfe.sequential_calls += 1;
        ask(velocity, x, t, condition)
    }
}

pub(super) fn ask(
    velocity: &dyn Velocity,
    x: &Tensor,
    t: f64,
    condition: &Condition,
) -> Result<Tensor> {
    let rows = x.dims()[0];
    let times = Tensor::full(t, rows, x.device())?.to_dtype(x.dtype())?;
    let v = velocity.velocity(x, &times, condition)?;
    match v.dims() == x.dims() {
        true => Ok(v),
        false => Err(Error::shape(
            "the velocity",
            v.dims(),
            format!("{:?}", x.dims()),
        )),
    }
}

/// What a correction knows.
struct Here {
    v: Tensor,
    /// The sample and its velocity with the graph between them.
    graph: Option<(Var, Tensor)>,
    t: f64,
    rows: usize,
    scale: Scale,
}

impl StepRule {
    pub(super) fn validate(&self) -> Result<()> {
        match self {
            Self::Gd { scale } => check::finite("StepRule::Gd::scale", *scale),
            Self::Normalized { gamma } => {
                let holds = (0.0..2.0).contains(gamma);
                let words = "a number in [0, 2)";
                check::require(holds, "StepRule::Normalized::gamma", *gamma, words)
            }
            Self::Adam { lr } => check::positive("StepRule::Adam::lr", *lr),
            Self::Auto | Self::Schedule(_) => Ok(()),
        }
    }

    /// The curvature of the cost where the rule needs it, else 1.
    pub(super) fn curvature(&self, cost: &dyn Cost, x1: &Tensor) -> Result<f64> {
        if !matches!(self, Self::Auto | Self::Normalized { .. }) {
            return Ok(1.0);
        }
        match cost.curvature(x1)? {
            Some(c) if c.is_finite() && c > 0.0 => Ok(c),
            // A cost that is flat everywhere has no gradient either.
            Some(0.0) => Ok(1.0),
            Some(c) => Err(Error::argument(
                "curvature of the cost",
                c,
                "a finite number >= 0",
            )),
            None => Err(Error::unsupported(
                "a normalized step on a cost without a constant curvature",
                "give the step: StepRule::Gd, Adam or Schedule",
            )),
        }
    }

    pub(super) fn scale(&self, (step, t, steps): (usize, f64, usize), curvature: f64) -> Scale {
        match self {
            Self::Auto => {
                let gamma = (TOTAL_GAMMA / steps as f64).min(LARGEST_GAMMA);
                Scale::Plain(gamma / curvature)
            }
            Self::Gd { scale } => Scale::Plain(*scale),
            Self::Normalized { gamma } => Scale::Plain(gamma / curvature),
            Self::Adam { lr } => Scale::Adam(Adam::new(*lr)),
            Self::Schedule(scale) => Scale::Plain(scale(step, t)),
        }
    }
}

/// `inner_steps` corrections of a state towards a lower cost of `x + remaining v`, `v` held constant.
pub(crate) fn correct(
    x: &Tensor,
    v: &Tensor,
    remaining: f64,
    cost: &dyn Cost,
    scale: &Scale,
    inner_steps: usize,
) -> Result<Tensor> {
    let mut x = x.clone();
    let mut moments: Option<(Tensor, Tensor)> = None;
    for k in 1..=inner_steps {
        let g = cost.grad(&linear_combination(&[(1.0, &x), (remaining, v)])?)?;
        if g.dims() != x.dims() {
            let expected = format!("{:?}", x.dims());
            return Err(Error::shape("the gradient of the cost", g.dims(), expected));
        }
        x = match scale {
            Scale::Plain(s) => linear_combination(&[(1.0, &x), (-s, &g)])?,
            Scale::Adam(adam) => (x - adam.step(&g, k, &mut moments)?)?,
        };
    }
    Ok(x)
}

impl Adam {
    /// The step from the moments; a zero gradient makes no step.
    fn step(&self, g: &Tensor, k: usize, moments: &mut Option<(Tensor, Tensor)>) -> Result<Tensor> {
        let (first, second) = (self.beta1, self.beta2);
        let fresh = (
            g.affine(1.0 - first, 0.0)?,
            g.sqr()?.affine(1.0 - second, 0.0)?,
        );
        let (m, v) = match moments.take() {
            Some((m, v)) => (
                (m.affine(first, 0.0)? + fresh.0)?,
                (v.affine(second, 0.0)? + fresh.1)?,
            ),
            None => fresh,
        };
        let grown = |beta: f64| 1.0 - beta.powi(k as i32);
        let root = v.affine(1.0 / grown(second), 0.0)?.sqrt()?;
        let change = (m.affine(self.lr / grown(first), 0.0)? / root.affine(1.0, self.eps)?)?;
        *moments = Some((m, v));
        Ok(change)
    }
}

/// The gradient of the cost of `x + (1 - t) v(x, t)` at `x` as guidance takes it, with the velocity
/// held constant.
///
/// # Errors
/// Those of network and cost.
pub fn skipped_gradient(
    velocity: &dyn Velocity,
    x: &Tensor,
    t: f64,
    condition: &Condition,
    cost: &dyn Cost,
) -> Result<Tensor> {
    let v = ask(velocity, x, t, condition)?.detach();
    cost.grad(&linear_combination(&[(1.0, x), (1.0 - t, &v)])?)
}

/// The same through the network.
///
/// # Errors
/// As [`skipped_gradient`]; a gradient that the network loses is named.
pub fn exact_gradient(
    velocity: &dyn Velocity,
    x: &Tensor,
    t: f64,
    condition: &Condition,
    cost: &dyn Cost,
) -> Result<Tensor> {
    let at = Var::from_tensor(&x.detach())?;
    let v = ask(velocity, at.as_tensor(), t, condition)?;
    Ok(gradient_through(&at, &v, t, cost)?.0)
}

/// `J^T grad cost`, from a velocity with its graph, and `grad cost`.
fn gradient_through(at: &Var, v: &Tensor, t: f64, cost: &dyn Cost) -> Result<(Tensor, Tensor)> {
    let x1 = (at.as_tensor() + v.affine(1.0 - t, 0.0)?)?;
    let outer = cost.grad(&x1.detach())?;
    let through = gradient(at, &(x1 * &outer)?.sum_all()?)?;
    Ok((through, outer))
}

/// The same loop with the exact gradient (DPS, FreeDoM): what FlowChef is compared with. Every guided
/// step costs a backward pass through the network and its activations.
#[derive(Default)]
pub struct BackpropGuidance {
    /// The settings; Euler's rule, one correction a step, and no Adam.
    pub settings: FlowChef,
}

impl BackpropGuidance {
    /// Guidance with these settings.
    pub fn new(settings: FlowChef) -> Self {
        Self { settings }
    }

    /// Samples from standard normal noise `[rows, ...]`.
    ///
    /// # Errors
    /// As [`FlowChef::sample`]; [`Error::Unsupported`] for Heun's rule, several corrections or Adam.
    pub fn sample(
        &self,
        velocity: &dyn Velocity,
        noise: &Tensor,
        condition: &Condition,
        cost: &dyn Cost,
        callback: Option<StepCallback>,
    ) -> Result<GuidedOutput> {
        let settings = &self.settings;
        let adam = matches!(settings.rule, StepRule::Adam { .. });
        if settings.solver != Solver::Euler || settings.inner_steps > 1 || adam {
            return Err(Error::unsupported(
                "Heun's rule, several corrections or Adam with backpropagation",
                "take Euler's rule and one correction a step",
            ));
        }
        let correction = |run: &mut Run, here: &Here| {
            let (Scale::Plain(s), Some((at, v))) = (&here.scale, &here.graph) else {
                return Err(Error::unsupported(
                    "Adam with backpropagation",
                    "take StepRule::Gd",
                ));
            };
            let (g, outer) = gradient_through(at, v, here.t, cost)?;
            let far = |x: &Tensor| {
                let v = ask(velocity, x, here.t, &condition.for_rows(here.rows)?)?;
                Ok(((x + v.affine(1.0 - here.t, 0.0)?)? * &outer)?)
            };
            let checks = settings
                .gradient_check
                .run("the velocity", far, &run.x, &g)?;
            run.out.nfe.main += checks * here.rows;
            run.out.nfe.sequential_calls += checks;
            run.out.nfe.denoiser_backward += here.rows;
            run.out.grad_evals += here.rows;
            Ok(linear_combination(&[(1.0, &run.x), (-s, &g)])?)
        };
        let asked = (velocity, noise, condition, cost);
        settings.run(asked, true, correction, callback)
    }
}

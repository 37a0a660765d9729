//! What gradients through a whole sampler are for: optimizing the start noise (guided sampling, audits),
//! tuning a condition or weights to a sample, and guidance by a prediction of several steps.
//!
//! The gradients are those of [`flows::adjoint`], in the memory of one network evaluation and a sample
//! per step. *AdjointDPM*, Pan et al., ICLR 2024, arXiv 2307.10711; the guidance by several steps is its
//! follow-up's, *Towards Accurate Guided Diffusion Sampling through Symplectic Adjoint Method*, arXiv
//! 2312.12030.
//!
//! ```text
//! NoiseOptimizer      x_T <- Clip(x_T -+ lr g / |g|)           g = grad of the loss of x_0 at x_T, per row
//! Tuner               theta <- optimizer(theta, grad theta)      a condition or weights
//! SymplecticGuidance  x_{t-1} <- x_{t-1} - s w rms(eps_c - eps_u) / rms(g) g
//!                                                              g = grad |r(x0_n(x_t))| at x_t
//! ```
//!
//! Losses are summed over the rows, so that each row is optimized by itself.
//!
//! ```
//! # extern crate flows as thalweg_flows;
//! use candle_core::{DType, Device, Tensor};
//! use thalweg_flows::adjoint::{AdjointSolver, RhoOde};
//! use thalweg_flows::schedule::VpSde;
//! use thalweg_flows::{AnalyticMixture, Condition, Grid, RandomStream};
//! use thalweg_guidance::adjoint_guidance::{Bound, NoiseOptimizer};
//!
//! let means = Tensor::new(&[[1.0_f64, 0.0], [-1.0, 0.5]], &Device::Cpu)?;
//! let model = AnalyticMixture::new(&means, &[0.1, 0.1], &[1.0, 1.0])?;
//! let schedule = VpSde::default();
//! let ode = RhoOde::new(&model, &schedule, &Condition::Null);
//! let solver = AdjointSolver::new(Grid::uniform_lambda_between(&schedule, 1.0, 0.02, 15)?);
//!
//! let noise = RandomStream::new(1).normal(0.0, 1.0, (4, 2), DType::F64, &Device::Cpu)?;
//! let goal = Tensor::new(&[[0.9_f64, 0.1]], &Device::Cpu)?;
//! let loss = |x: &Tensor| Ok(x.broadcast_sub(&goal)?.sqr()?.sum(1)?);
//! let search = NoiseOptimizer { lr: 0.1, iters: 30, bound: Bound::None, ..NoiseOptimizer::new(&solver) };
//! let found = search.minimize(&ode, &noise, loss)?;
//! assert!(found.losses[29].iter().sum::<f64>() < found.losses[0].iter().sum::<f64>());
//! # Ok::<(), thalweg_guidance::Error>(())
//! ```

use crate::error::{check, Error};
use crate::Result;
use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};
use candle_nn::Optimizer;
use flows::adjoint::{AdjointSolver, Form, GradientMode, Gradients, RhoOde};
use flows::combine::linear_combination;
use flows::ode::Method;
use flows::sampler::Hook;
use flows::{
    Condition, Ddim, Denoised, Denoiser, GradientCheck, Grid, Levels, Noise, Schedule, StepCx,
};
use std::cell::RefCell;
use tensor_core::random::RandomStream;

/// How far noise may go from where it started.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Bound {
    /// Each number by so much at most; 0.1 in the paper's audit.
    LInf(f64),
    /// Each row keeps its norm.
    Norm,
    /// As far as it goes.
    #[default]
    None,
}

/// Steps on the start noise along the normalized gradient of a loss on the sample.
#[derive(Debug, Clone)]
pub struct NoiseOptimizer<'a> {
    /// The sampler that is differentiated.
    pub solver: &'a AdjointSolver,
    /// Steps; 30 in the paper's audit.
    pub iters: usize,
    /// Length of a step, in the norm of a row; 0.01 in the paper's audit.
    pub lr: f64,
    /// How far noise may go.
    pub bound: Bound,
}

/// What an optimization of noise gives.
#[derive(Debug, Clone)]
pub struct OptimizedNoise {
    /// The noise after the last step.
    pub noise: Tensor,
    /// Its samples.
    pub sample: Tensor,
    /// The losses of the rows before every step, and at the end.
    pub losses: Vec<Vec<f64>>,
}

/// A loss `[rows]` of samples whose first value since it was last read is kept.
struct Watched<F> {
    loss: F,
    seen: RefCell<Option<Vec<f64>>>,
}

impl<F: Fn(&Tensor) -> Result<Tensor>> Watched<F> {
    fn new(loss: F) -> Self {
        Self {
            loss,
            seen: RefCell::default(),
        }
    }

    /// The sum, after the rows have been written down.
    fn sum(&self, x: &Tensor) -> flows::Result<Tensor> {
        let rows = (self.loss)(x)?;
        if rows.dims() != [x.dims()[0]] {
            let expected = format!("[{}]", x.dims()[0]);
            return Err(Error::shape("the loss", rows.dims(), expected).into());
        }
        let mut seen = self.seen.borrow_mut();
        if seen.is_none() {
            *seen = Some(rows.detach().to_dtype(DType::F64)?.to_vec1()?);
        }
        Ok(rows.sum_all()?)
    }

    fn rows(&self) -> Vec<f64> {
        self.seen.take().unwrap_or_default()
    }
}

impl<'a> NoiseOptimizer<'a> {
    /// The paper's audit without its bound.
    pub fn new(solver: &'a AdjointSolver) -> Self {
        Self {
            solver,
            iters: 30,
            lr: 0.01,
            bound: Bound::None,
        }
    }

    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`].
    pub fn validate(&self) -> Result<()> {
        check::require(
            self.iters > 0,
            "NoiseOptimizer::iters",
            self.iters,
            "at least 1",
        )?;
        check::positive("NoiseOptimizer::lr", self.lr)?;
        match self.bound {
            Bound::LInf(limit) => check::positive("Bound::LInf", limit),
            Bound::Norm | Bound::None => Ok(()),
        }
    }

    /// Lowers the loss `[rows]` of the samples, from noise at the first level.
    ///
    /// # Errors
    /// As [`validate`](Self::validate); those of solver and loss.
    pub fn minimize(
        &self,
        ode: &RhoOde,
        noise: &Tensor,
        loss: impl Fn(&Tensor) -> Result<Tensor>,
    ) -> Result<OptimizedNoise> {
        self.run(ode, noise, loss, -1.0)
    }

    /// Raises it: an audit finds noise near the given one whose sample a classifier gets wrong.
    ///
    /// # Errors
    /// As [`minimize`](Self::minimize).
    pub fn maximize(
        &self,
        ode: &RhoOde,
        noise: &Tensor,
        loss: impl Fn(&Tensor) -> Result<Tensor>,
    ) -> Result<OptimizedNoise> {
        self.run(ode, noise, loss, 1.0)
    }

    fn run(
        &self,
        ode: &RhoOde,
        noise: &Tensor,
        loss: impl Fn(&Tensor) -> Result<Tensor>,
        sign: f64,
    ) -> Result<OptimizedNoise> {
        self.validate()?;
        let watched = Watched::new(loss);
        let solver = checked_anew(self.solver);
        let start = noise.detach();
        let mut x = start.clone();
        let mut losses = Vec::new();
        for step in 0..self.iters {
            let (_, gradients) = solver.value_and_grad(ode, &x, &[], |x| watched.sum(x))?;
            losses.push(watched.rows());
            let moved = normalized(&gradients.start, step)?.affine(sign * self.lr, 0.0)?;
            x = self.bounded(&(x + moved)?, &start)?;
        }
        let sample = self.solver.solve(ode, &x)?.x_end;
        watched.sum(&sample)?;
        losses.push(watched.rows());
        Ok(OptimizedNoise {
            noise: x,
            sample,
            losses,
        })
    }

    fn bounded(&self, x: &Tensor, start: &Tensor) -> Result<Tensor> {
        match self.bound {
            Bound::None => Ok(x.clone()),
            Bound::LInf(limit) => Ok((start + (x - start)?.clamp(-limit, limit)?)?),
            Bound::Norm => {
                let ratio = (row_norms(start)? / row_norms(x)?.maximum(1e-12)?)?;
                Ok(x.broadcast_mul(&ratio)?)
            }
        }
    }
}

/// The solver with a check of this run's model and loss.
fn checked_anew(solver: &AdjointSolver) -> AdjointSolver {
    let check = solver.gradient_check.fresh();
    solver.clone().gradient_check(check)
}

/// Norms of the rows, as a column that is broadcast.
fn row_norms(x: &Tensor) -> Result<Tensor> {
    let axes: Vec<usize> = (1..x.rank()).collect();
    Ok(x.sqr()?.sum_keepdim(axes)?.sqrt()?)
}

/// Rows of norm 1; a zero row stays zero.
fn normalized(g: &Tensor, step: usize) -> Result<Tensor> {
    if !tensor_core::kernels::sum_squares(g)?.is_finite() {
        return Err(Error::NonFinite {
            rule: "the adjoint",
            what: "the gradient of the noise".into(),
            step,
        });
    }
    Ok(g.broadcast_div(&row_norms(g)?.maximum(1e-30)?)?)
}

/// Training through the sampler: variables of a condition (prompt inversion), of a network (stylization,
/// low-rank adapters), or the start noise (vocabulary expansion) follow a loss on the samples.
#[derive(Debug, Clone)]
pub struct Tuner<'a> {
    /// The sampler that is differentiated.
    pub solver: &'a AdjointSolver,
    /// Updates; 50 in the paper's prompt inversion, with AdamW at 0.05.
    pub iters: usize,
}

impl Tuner<'_> {
    /// Tunes `vars`, which the equation's condition or model must have in its graph, with any optimizer
    /// over them. Returns the losses before each update.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for no iterations; [`Error::InvalidArgument`] for no variables;
    /// [`Error::NonFinite`] before such a loss reaches a variable; those of solver and loss.
    pub fn tune(
        &self,
        ode: &RhoOde,
        noise: &Tensor,
        vars: &[Var],
        optimizer: &mut impl Optimizer,
        loss: impl Fn(&Tensor) -> Result<Tensor>,
    ) -> Result<Vec<f64>> {
        if vars.is_empty() {
            return Err(Error::argument("number of variables", 0, "at least one"));
        }
        let step = |gradients: Gradients| -> Result<()> {
            Ok(optimizer.step(&store(vars, gradients.vars))?)
        };
        self.descend(ode, noise, vars, loss, step)
    }

    /// Tunes the start noise itself with any optimizer over it: in the paper's vocabulary expansion AdamW
    /// at 0.01 for 30 iterations, on 0.05 times the cross entropy of a classifier of fine classes.
    ///
    /// # Errors
    /// As [`tune`](Self::tune).
    pub fn tune_noise(
        &self,
        ode: &RhoOde,
        noise: &Var,
        optimizer: &mut impl Optimizer,
        loss: impl Fn(&Tensor) -> Result<Tensor>,
    ) -> Result<Vec<f64>> {
        let step = |gradients: Gradients| -> Result<()> {
            let start = vec![gradients.start];
            Ok(optimizer.step(&store(std::slice::from_ref(noise), start))?)
        };
        self.descend(ode, noise.as_tensor(), &[], loss, step)
    }

    fn descend(
        &self,
        ode: &RhoOde,
        noise: &Tensor,
        vars: &[Var],
        loss: impl Fn(&Tensor) -> Result<Tensor>,
        mut update: impl FnMut(Gradients) -> Result<()>,
    ) -> Result<Vec<f64>> {
        check::require(self.iters > 0, "Tuner::iters", self.iters, "at least 1")?;
        let solver = checked_anew(self.solver);
        let mut losses = Vec::new();
        for step in 0..self.iters {
            let sum = |x: &Tensor| Ok(loss(x)?.sum_all()?);
            let (value, gradients) = solver.value_and_grad(ode, noise, vars, sum)?;
            if !value.is_finite() {
                return Err(Error::NonFinite {
                    rule: "Tuner",
                    what: "the loss".into(),
                    step,
                });
            }
            losses.push(value);
            update(gradients)?;
        }
        Ok(losses)
    }
}

fn store(vars: &[Var], gradients: Vec<Tensor>) -> GradStore {
    let mut grads = GradStore::default();
    for (var, gradient) in vars.iter().zip(gradients) {
        grads.insert(var.as_tensor(), gradient);
    }
    grads
}

/// What the length of a correction is a multiple of.
#[derive(Debug, Clone)]
pub enum StepLength {
    /// `w rms(eps_c - eps_u)`, the paper's: what classifier-free guidance of the same step adds. Costs two
    /// evaluations, under the condition and under this one.
    Guidance {
        /// The negative or null condition.
        against: Condition,
        /// The guidance scale; 1 where the model hands on a guided prediction already.
        w: f64,
    },
    /// `rms(eps)`: for models without a condition.
    Noise,
}

/// Guidance at each step by the gradient of a residual of the finished sample, as the model makes it in
/// a few steps from the present one: nearer to the truth than the one-step prediction. A hook of the
/// sampler.
///
/// The prediction integrates the data form of the equation. With [`repeat`](Self::repeat) a corrected sample
/// is noised back to its level, `x_t = (alpha_t / alpha_{t-1}) x_{t-1} + noise`, and the step made again, by
/// DDIM with this model (hand a [`Guided`](flows::Guided) one to repeat guided steps).
pub struct SymplecticGuidance<'a, F> {
    /// The model.
    pub model: &'a dyn Denoiser,
    /// Its schedule.
    pub schedule: &'a dyn Schedule,
    /// The condition of the prediction.
    pub condition: Condition,
    /// Residuals `[rows, ...]` of finished samples, whose norms are lowered.
    pub residual: F,
    /// Steps of the prediction; 4 in the paper.
    pub inner_steps: usize,
    /// The length of a correction in units of `length`; 0.2 in the paper.
    pub scale: f64,
    /// What `scale` is relative to.
    pub length: StepLength,
    /// How often a step is made; 1 is once.
    pub repeat: usize,
    /// The level that predictions run to: a little noise above the end of the run.
    pub end: flows::Level,
    /// The noise of repeated steps, each row from a stream of its own.
    pub rng: RandomStream,
    /// The comparison of the first gradient with differences.
    pub gradient_check: GradientCheck,
    /// The correction of the step in progress.
    change: Option<Tensor>,
}

impl<'a, F: Fn(&Tensor) -> Result<Tensor>> SymplecticGuidance<'a, F> {
    /// Four steps, scale 0.2, every step once.
    pub fn new(
        model: &'a dyn Denoiser,
        schedule: &'a dyn Schedule,
        (condition, length): (Condition, StepLength),
        end: flows::Level,
        residual: F,
    ) -> Self {
        Self {
            model,
            schedule,
            condition,
            residual,
            inner_steps: 4,
            scale: 0.2,
            length,
            repeat: 1,
            end,
            rng: RandomStream::new(0),
            gradient_check: GradientCheck::default(),
            change: None,
        }
    }

    fn validate(&self) -> Result<()> {
        let steps = self.inner_steps;
        let one = "at least 1";
        check::require(steps > 0, "SymplecticGuidance::inner_steps", steps, one)?;
        let repeat = self.repeat;
        check::require(repeat > 0, "SymplecticGuidance::repeat", repeat, one)?;
        check::finite("SymplecticGuidance::scale", self.scale)?;
        match self.length {
            StepLength::Guidance { w, .. } => check::finite("StepLength::Guidance::w", w),
            StepLength::Noise => Ok(()),
        }
    }

    /// Norms of the rows that `scale` is relative to, as a column.
    fn lengths(&self, d: &Denoised) -> Result<Tensor> {
        let StepLength::Guidance { against, w } = &self.length else {
            return row_norms(&d.eps()?);
        };
        let rows = d.x.dims()[0];
        let eps = |condition: &Condition| -> Result<Tensor> {
            let condition = condition.for_rows(rows)?;
            Ok(self.model.denoise(&d.x, &d.levels, &condition)?.eps()?)
        };
        let difference = (eps(&self.condition)? - eps(against)?)?.detach();
        Ok(row_norms(&difference)?.affine(*w, 0.0)?)
    }

    fn correction(&self, cx: &StepCx, d: &Denoised) -> Result<Option<Tensor>> {
        self.validate()?;
        let steps = self.inner_steps;
        let (from, to) = (cx.level.lambda(), self.end.lambda());
        if from >= to || self.scale == 0.0 {
            return Ok(None);
        }
        let inner = (1..steps)
            .map(|i| {
                self.schedule
                    .at_lambda(from + (to - from) * i as f64 / steps as f64)
            })
            .collect::<flows::Result<Vec<_>>>()?;
        let levels = [vec![cx.level], inner, vec![self.end]].concat();
        let solver = AdjointSolver::new(Grid::custom(levels)?)
            .method(Method::Euler)
            .mode(GradientMode::Symplectic)
            .gradient_check(self.gradient_check.clone());
        let rows = d.x.dims()[0];
        let condition = self.condition.for_rows(rows)?;
        let ode = RhoOde::new(self.model, self.schedule, &condition).form(Form::Data);
        let norms = |x: &Tensor| -> flows::Result<Tensor> {
            let square = (self.residual)(x)?.sqr()?.flatten_from(1)?.sum(1)?;
            // The slope of a root at zero is no number.
            Ok(square.affine(1.0, 1e-24)?.sqrt()?.sum_all()?)
        };
        let (_, gradients) = solver.value_and_grad(&ode, &d.x, &[], norms)?;
        let unit = normalized(&gradients.start, cx.step)?;
        let size = self.lengths(d)?.affine(self.scale, 0.0)?;
        Ok(Some(unit.broadcast_mul(&size)?))
    }

    /// The step once more: back to its level by fresh noise, DDIM, correction.
    fn again(&self, cx: &StepCx, x: &Tensor, noise: &mut Noise) -> Result<Tensor> {
        let ratio = cx.level.alpha / cx.next.alpha;
        let added = cx.level.sigma.powi(2) - (ratio * cx.next.sigma).powi(2);
        let back = linear_combination(&[(ratio, x), (added.max(0.0).sqrt(), &noise.next(x)?)])?;
        let condition = self.condition.for_rows(x.dims()[0])?;
        let d = self
            .model
            .denoise(&back, &Levels::Same(cx.level), &condition)?;
        let d = d.with_x0(d.x0.detach());
        let (x, _) = Ddim::default().kernel(&d, &cx.level, &cx.next)?;
        match self.correction(cx, &d)? {
            Some(change) => Ok((x - change)?),
            None => Ok(x),
        }
    }
}

impl<F: Fn(&Tensor) -> Result<Tensor>> Hook for SymplecticGuidance<'_, F> {
    fn after_denoise(&mut self, cx: &StepCx, d: Denoised) -> flows::Result<Denoised> {
        self.change = self.correction(cx, &d)?;
        Ok(d)
    }

    fn after_step(&mut self, cx: &StepCx, x: Tensor) -> flows::Result<Tensor> {
        let Some(change) = self.change.take() else {
            return Ok(x);
        };
        let mut x = (x - change)?;
        let stream = self.rng.split_index("step", cx.step as u64);
        let mut noise = Noise::rows(&stream, x.dims()[0]);
        for _ in 1..self.repeat {
            x = self.again(cx, &x, &mut noise)?;
        }
        Ok(x)
    }
}

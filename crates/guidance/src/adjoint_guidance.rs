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
//! SymplecticGuidance  x_{t-1} <- x_{t-1} - s rms(eps) / rms(g) g   g = grad |r(x0_n(x_t))| at x_t
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
use flows::adjoint::{AdjointSolver, GradientMode, Gradients, RhoOde};
use flows::ode::Method;
use flows::sampler::Hook;
use flows::{Condition, Denoised, Denoiser, Grid, Schedule, StepCx};
use std::cell::RefCell;

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

/// A loss `[rows]` of samples that is also read.
struct Watched<F> {
    loss: F,
    seen: RefCell<(Vec<f64>, Option<Tensor>)>,
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
        let numbers = rows.detach().to_dtype(DType::F64)?.to_vec1()?;
        *self.seen.borrow_mut() = (numbers, Some(x.detach()));
        Ok(rows.sum_all()?)
    }

    fn rows(&self) -> Vec<f64> {
        self.seen.borrow().0.clone()
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
        let start = noise.detach();
        let mut x = start.clone();
        let mut losses = Vec::new();
        for step in 0..self.iters {
            let (_, gradients) = self
                .solver
                .value_and_grad(ode, &x, &[], |x| watched.sum(x))?;
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

/// Training through the sampler: variables of a condition (prompt inversion) or of a network
/// (stylization, low-rank adapters) follow a loss on the samples.
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
        check::require(self.iters > 0, "Tuner::iters", self.iters, "at least 1")?;
        if vars.is_empty() {
            return Err(Error::argument("number of variables", 0, "at least one"));
        }
        let mut losses = Vec::new();
        for step in 0..self.iters {
            let (value, gradients) = self
                .solver
                .value_and_grad(ode, noise, vars, |x| Ok(loss(x)?.sum_all()?))?;
            if !value.is_finite() {
                return Err(Error::NonFinite {
                    rule: "Tuner",
                    what: "the loss".into(),
                    step,
                });
            }
            losses.push(value);
            optimizer.step(&store(vars, gradients))?;
        }
        Ok(losses)
    }
}

fn store(vars: &[Var], gradients: Gradients) -> GradStore {
    let mut grads = GradStore::default();
    for (var, gradient) in vars.iter().zip(gradients.vars) {
        grads.insert(var.as_tensor(), gradient);
    }
    grads
}

/// Guidance at each step by the gradient of a residual of the finished sample, as the model makes it in
/// a few steps from the present one: nearer to the truth than the one-step prediction. A hook of the
/// sampler.
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
    /// The length of a correction, in units of the noise prediction's size; 0.2 in the paper, times the
    /// guidance scale.
    pub scale: f64,
    /// The level that predictions run to: a little noise above the end of the run.
    pub end: flows::Level,
    /// The correction of the step in progress.
    change: Option<Tensor>,
}

impl<'a, F: Fn(&Tensor) -> Result<Tensor>> SymplecticGuidance<'a, F> {
    /// Four steps, scale 0.2.
    pub fn new(
        model: &'a dyn Denoiser,
        schedule: &'a dyn Schedule,
        condition: Condition,
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
            end,
            change: None,
        }
    }

    fn correction(&self, cx: &StepCx, d: &Denoised) -> Result<Option<Tensor>> {
        let steps = self.inner_steps;
        check::require(
            steps > 0,
            "SymplecticGuidance::inner_steps",
            steps,
            "at least 1",
        )?;
        check::finite("SymplecticGuidance::scale", self.scale)?;
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
            .mode(GradientMode::Symplectic);
        let rows = d.x.dims()[0];
        let condition = self.condition.for_rows(rows)?;
        let ode = RhoOde::new(self.model, self.schedule, &condition);
        let norms = |x: &Tensor| -> flows::Result<Tensor> {
            let square = (self.residual)(x)?.sqr()?.flatten_from(1)?.sum(1)?;
            // The slope of a root at zero is no number.
            Ok(square.affine(1.0, 1e-24)?.sqrt()?.sum_all()?)
        };
        let (_, gradients) = solver.value_and_grad(&ode, &d.x, &[], norms)?;
        let unit = normalized(&gradients.start, cx.step)?;
        let size = row_norms(&d.eps()?)?.affine(self.scale, 0.0)?;
        Ok(Some(unit.broadcast_mul(&size)?))
    }
}

impl<F: Fn(&Tensor) -> Result<Tensor>> Hook for SymplecticGuidance<'_, F> {
    fn after_denoise(&mut self, cx: &StepCx, d: Denoised) -> flows::Result<Denoised> {
        self.change = self.correction(cx, &d)?;
        Ok(d)
    }

    fn after_step(&mut self, _: &StepCx, x: Tensor) -> flows::Result<Tensor> {
        match self.change.take() {
            Some(change) => Ok((x - change)?),
            None => Ok(x),
        }
    }
}

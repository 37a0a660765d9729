//! The search for the steps that need guidance: a differentiable mixture of options per step.
//!
//! Per step `i` the options are `F = [e_u, e_c, cfg(w/2), cfg(w), cfg(2w)]` with the costs `[1, 1, 2,
//! 2, 2]`. With logits `a` and `p_i = softmax(a_i / tau)`:
//!
//! ```text
//! loss = mean_b |x_soft - x_cfg|^2 + lambda sum_i sum_k p_ik cost_k
//! ```
//!
//! Every option is the unconditional prediction plus a multiple of the difference, so a soft step
//! costs two evaluations whatever the number of options. The temperature falls during the search;
//! without that the largest option of a mixture is far from the mixture.

use crate::basic::extrapolate;
use crate::error::{check, Error};
use crate::Result;
use candle_core::{DType, Tensor, Var, D};
use candle_nn::{AdamW, Optimizer, ParamsAdamW};
use flows::guidance::{CondRole, Query, RunInfo};
use flows::{
    Condition, Denoised, Denoiser, Evaluator, Grid, Guidance, RandomStream, Sampler, StepCx,
};
use nn::softmax::softmax;

/// One option of a step: a guidance scale and its evaluations.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Choice {
    /// The scale: 0 is unconditional, 1 conditional.
    pub scale: f64,
    /// What it costs.
    pub cost: f64,
}

/// The options of the paper for a scale: unconditional, conditional, and guidance at half, once
/// and twice the scale.
pub fn options(w: f64) -> Vec<Choice> {
    let scales = [
        (0.0, 1.0),
        (1.0, 1.0),
        (0.5 * w, 2.0),
        (w, 2.0),
        (2.0 * w, 2.0),
    ];
    scales.map(|(scale, cost)| Choice { scale, cost }).to_vec()
}

/// A fixed option per step.
#[derive(Debug, Clone, PartialEq)]
pub struct Policy {
    /// The logits that the choice was made from, `[steps][options]`.
    pub logits: Vec<Vec<f64>>,
    /// The options.
    pub options: Vec<Choice>,
    /// The option of each step.
    pub choice: Vec<usize>,
}

impl Policy {
    /// The most likely option of each step.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for rows that are not as long as the options.
    pub fn new(logits: Vec<Vec<f64>>, options: Vec<Choice>) -> Result<Self> {
        let best = |row: &Vec<f64>| {
            if row.len() != options.len() || row.is_empty() {
                let expected = format!("{} logits per step", options.len());
                return Err(Error::argument("logits", row.len(), expected));
            }
            let first = (0, row[0]);
            let larger = |best: (usize, f64), (k, v): (usize, &f64)| {
                if *v > best.1 {
                    (k, *v)
                } else {
                    best
                }
            };
            Ok(row.iter().enumerate().fold(first, larger).0)
        };
        Ok(Self {
            choice: logits.iter().map(best).collect::<Result<_>>()?,
            logits,
            options,
        })
    }

    /// Evaluations per sample.
    pub fn nfe(&self) -> f64 {
        self.choice.iter().map(|k| self.options[*k].cost).sum()
    }
}

impl Guidance for Policy {
    fn begin(&mut self, info: &RunInfo) -> flows::Result<()> {
        match info.grid.steps() == self.choice.len() {
            true => Ok(()),
            false => Err(Error::Mismatch {
                what: "a policy",
                reason: format!(
                    "{} steps for a grid of {}",
                    self.choice.len(),
                    info.grid.steps()
                ),
            }
            .into()),
        }
    }

    fn guide(&mut self, cx: &StepCx, net: &mut Evaluator) -> flows::Result<Denoised> {
        let scale = self.options[self.choice[cx.step]].scale;
        if scale == 1.0 {
            return net.conditional();
        }
        if scale == 0.0 {
            return net.one(Query::main(CondRole::Negative));
        }
        let answers = net.ask(&[
            Query::main(CondRole::Positive),
            Query::main(CondRole::Negative),
        ])?;
        let x0 = extrapolate(&answers[1].x0, &answers[0].x0, scale)?;
        Ok(answers[0].with_x0(x0))
    }
}

/// The mixture of all options, to be differentiated with respect to its logits.
pub struct SoftPolicy {
    /// `[steps, options]`.
    pub logits: Tensor,
    /// The temperature.
    pub tau: f64,
    /// The options.
    pub options: Vec<Choice>,
}

impl SoftPolicy {
    /// `p`, `[steps, options]`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn probabilities(&self) -> Result<Tensor> {
        Ok(softmax(
            &self.logits.affine(1.0 / self.tau, 0.0)?,
            D::Minus1,
        )?)
    }

    /// `sum_k p_ik value_k`, `[steps]`.
    fn expected(&self, value: impl Fn(&Choice) -> f64) -> Result<Tensor> {
        let p = self.probabilities()?;
        let values: Vec<f64> = self.options.iter().map(value).collect();
        let values = Tensor::new(values, p.device())?.to_dtype(p.dtype())?;
        Ok(p.broadcast_mul(&values)?.sum(1)?)
    }

    /// The expected cost of all steps, a scalar.
    ///
    /// # Errors
    /// Those of candle.
    pub fn cost(&self) -> Result<Tensor> {
        Ok(self.expected(|o| o.cost)?.sum_all()?)
    }
}

impl Guidance for SoftPolicy {
    fn guide(&mut self, cx: &StepCx, net: &mut Evaluator) -> flows::Result<Denoised> {
        let answers = net.ask(&[
            Query::main(CondRole::Positive),
            Query::main(CondRole::Negative),
        ])?;
        let scale = self.expected(|o| o.scale)?.get(cx.step)?;
        let delta = (&answers[0].x0 - &answers[1].x0)?;
        let shape = vec![1; delta.rank()];
        let scale = scale.reshape(shape)?.to_dtype(delta.dtype())?;
        let x0 = (&answers[1].x0 + delta.broadcast_mul(&scale)?)?;
        Ok(answers[0].with_x0(x0))
    }
}

/// The search; see the [module](self) page.
#[derive(Debug, Clone, PartialEq)]
pub struct PolicySearch {
    /// The options of every step.
    pub options: Vec<Choice>,
    /// The scale of the guidance that is to be matched.
    pub w: f64,
    /// Weight of the cost.
    pub lambda: f64,
    /// First and last temperature; it falls geometrically.
    pub tau: (f64, f64),
    /// Steps of Adam.
    pub iterations: usize,
    /// Samples of each step.
    pub batch: usize,
    /// Adam's learning rate.
    pub lr: f64,
}

impl PolicySearch {
    /// The defaults for a scale.
    pub fn new(w: f64) -> Self {
        Self {
            options: options(w),
            w,
            lambda: 1e-3,
            tau: (1.0, 0.1),
            iterations: 250,
            batch: 64,
            lr: 0.1,
        }
    }

    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`].
    pub fn validate(&self) -> Result<()> {
        check::finite("PolicySearch::w", self.w)?;
        check::require(
            !self.options.is_empty(),
            "PolicySearch::options",
            0,
            "at least one",
        )?;
        let cost = self.lambda.is_finite() && self.lambda >= 0.0;
        check::require(
            cost,
            "PolicySearch::lambda",
            self.lambda,
            "a finite number >= 0",
        )?;
        check::positive("PolicySearch::tau", self.tau.0)?;
        check::positive("PolicySearch::tau", self.tau.1)?;
        check::positive("PolicySearch::lr", self.lr)?;
        let counts = self.iterations > 0 && self.batch > 0;
        check::require(
            counts,
            "PolicySearch::iterations and batch",
            0,
            "at least 1",
        )
    }

    /// The loss of a mixture against guided samples `target`, and its samples.
    ///
    /// # Errors
    /// Those of the run.
    pub fn loss(
        &self,
        soft: &mut SoftPolicy,
        sampler: Sampler,
        noise: &Tensor,
        (condition, negative): (&Condition, Option<&Condition>),
        target: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        let cost = soft.cost()?.affine(self.lambda, 0.0)?;
        let x = sampler
            .guidance(soft)
            .keep_graph(true)
            .sample(noise, condition, negative, &RandomStream::new(0))?
            .x;
        let distance = (&x - target)?.flatten_from(1)?.sqr()?.sum(1)?.mean_all()?;
        Ok(((distance + cost.to_dtype(x.dtype())?)?, x))
    }

    /// Searches the options of each step of a grid, with DDIM steps.
    ///
    /// `draw` gives noise `[batch, ...]` and the condition of a batch. The denoiser must be
    /// differentiable throughout; a layer that is not is found before the search.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`]; [`flows::Error::WrongGradient`]; those of the runs.
    pub fn search(
        &self,
        denoiser: &dyn Denoiser,
        grid: &Grid,
        null: &Condition,
        mut draw: impl FnMut(usize, &mut RandomStream) -> flows::Result<(Tensor, Condition)>,
        rng: &mut RandomStream,
    ) -> Result<Policy> {
        self.validate()?;
        let (noise, condition) = draw(self.batch, rng)?;
        let first = grid.levels()[0];
        let x = grid.start(&noise)?;
        flows::denoiser::grad_check(denoiser, &x, &first.into(), &condition, rng)?;
        let shape = (grid.steps(), self.options.len());
        let logits = Var::zeros(shape, noise.dtype(), noise.device())?;
        let adam = ParamsAdamW {
            lr: self.lr,
            weight_decay: 0.0,
            ..ParamsAdamW::default()
        };
        let mut optimizer = AdamW::new(vec![logits.clone()], adam)?;
        let sampler = || Sampler::new(denoiser, grid.clone()).null(null.clone());
        for n in 0..self.iterations {
            let (noise, condition) = draw(self.batch, rng)?;
            let mut guided = sampler().guidance(crate::Cfg::new(self.w));
            let target = guided
                .sample(&noise, &condition, None, &RandomStream::new(0))?
                .x;
            let part = n as f64 / self.iterations as f64;
            let mut soft = SoftPolicy {
                logits: logits.as_tensor().clone(),
                tau: self.tau.0 * (self.tau.1 / self.tau.0).powf(part),
                options: self.options.clone(),
            };
            let (loss, _) = self.loss(&mut soft, sampler(), &noise, (&condition, None), &target)?;
            let value = loss.to_dtype(DType::F64)?.to_scalar::<f64>()?;
            if !value.is_finite() {
                return Err(Error::NonFinite {
                    rule: "policy search",
                    what: "the loss".into(),
                    step: n,
                });
            }
            optimizer.backward_step(&loss)?;
        }
        let found = logits
            .as_detached_tensor()
            .to_dtype(DType::F64)?
            .to_vec2()?;
        Policy::new(found, self.options.clone())
    }
}

//! ReNO: better samples of a fixed one-step generator by gradient descent on its input noise.
//!
//! For anyone with a distilled one-step (or few-step) model and differentiable rewards: some 50
//! evaluations per sample find noise whose sample they like, without any training. *ReNO: Enhancing
//! One-step Text-to-Image Models through Reward-based Noise Optimization*, Eyring et al., NeurIPS 2024,
//! arXiv 2406.04312.
//!
//! For `z` of `d` numbers per sample, starting from `N(0, I)`:
//!
//! ```text
//! L(z) = sum_i lambda_i l_i(G(z))           R(z) = lambda_reg (|z|^2 / 2 - (d - 1) ln |z|)
//! g = grad (L + R)                          g <- g min(1, c / (|g| + 1e-6))
//! b <- 0.9 b + g                            z <- z - lr (g + 0.9 b)
//! ```
//!
//! and the sample of the least `L` (without `R`) is the result. `R` is the negative log-density of a
//! normal vector's radius: it holds `|z|` near `sqrt(d - 1)`.
//!
//! | symbol | here |
//! | --- | --- |
//! | `G` | [`Generator`]: closures; all randomness inside must be the same at every call ([`Seeded`]) |
//! | `l_i`, `lambda_i` | [`RewardLoss`], lower is better, with its weight |
//! | `lr`, `c`, `lambda_reg` | [`RenoConfig`] |
//!
//! The clip is smaller than nearly every gradient, so a step is `c lr` long whatever the reward: what
//! `lr` means depends on `|z|`. The paper's 5 belongs to `d = 16384`; [`LrMode::RelativeToNorm`], the
//! default, scales it with `sqrt(d)`. Clip, norm, regularizer and best sample are per row, so a batch
//! is as many single runs; norms and logarithms are taken in at least single precision.
//!
//! One strong reward over many iterations finds its faults: weigh several, keep `R`, and judge by one
//! that was held out. Saturating rewards want [`RenoConfig::early_stop`].
//!
//! ```
//! # extern crate flows as thalweg_flows;
//! use candle_core::{DType, Device, Tensor};
//! use thalweg_flows::{Condition, RandomStream};
//! use thalweg_guidance::reno::{Named, Reno, RenoConfig};
//!
//! // In the place of a network and a reward model.
//! let generator = |z: &Tensor, _: &Condition| Ok(z.tanh()?);
//! let bright = Named::new("bright", |x: &Tensor, _: &Condition| Ok(x.mean(1)?.affine(-1.0, 1.0)?));
//! let reno = Reno::new(&generator, vec![(1.0, &bright)], RenoConfig { lr: 20.0, ..RenoConfig::default() })?;
//!
//! let z = RandomStream::new(1).normal(0.0, 1.0, (4, 64), DType::F32, &Device::Cpu)?;
//! let out = reno.optimize(&z, &Condition::Null)?;
//! let last = out.best_loss();
//! assert!(last.iter().zip(&out.losses[0]).all(|(best, first)| best < first));
//! # Ok::<(), thalweg_guidance::Error>(())
//! ```

mod best;
mod numbers;
mod preprocess;
mod reward;
mod run;
mod update;

pub use best::{best_of_n, BestOf};
pub use preprocess::ImagePreprocess;
pub use reward::{CosineScore, FeatureCosine, LogProb, Named, RewardLoss, Score};
pub use run::{Reno, RenoOutput, RenoRun, StepReport};

use crate::error::check;
use crate::Result;
use candle_core::Tensor;
use flows::Condition;
use tensor_core::random::RandomStream;

/// A generator that can be differentiated in its noise. Closures are generators.
pub trait Generator {
    /// Samples from noise `[rows, ...]`; the same ones at every call.
    ///
    /// # Errors
    /// Whatever the network's own are.
    fn generate(&self, z: &Tensor, condition: &Condition) -> Result<Tensor>;
}

impl<F: Fn(&Tensor, &Condition) -> Result<Tensor>> Generator for F {
    fn generate(&self, z: &Tensor, condition: &Condition) -> Result<Tensor> {
        self(z, condition)
    }
}

/// A generator with random numbers inside, which are drawn anew from the same seed at every call: else the
/// best sample is luck.
#[derive(Debug, Clone)]
pub struct Seeded<F> {
    /// Samples from noise, a condition and a stream.
    pub generate: F,
    /// The seed of the stream.
    pub seed: u64,
}

impl<F: Fn(&Tensor, &Condition, &mut RandomStream) -> Result<Tensor>> Generator for Seeded<F> {
    fn generate(&self, z: &Tensor, condition: &Condition) -> Result<Tensor> {
        (self.generate)(z, condition, &mut RandomStream::new(self.seed))
    }
}

/// Which sample is the result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Select {
    /// That of the least loss, without the regularizer.
    #[default]
    BestReward,
    /// The last one that had a loss.
    Last,
}

/// What a learning rate is relative to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LrMode {
    /// `lr sqrt(d) / 128`: the paper's rate at the paper's size, the same part of `|z|` at others.
    #[default]
    RelativeToNorm,
    /// `lr` itself.
    Absolute,
}

/// How noise moves along the clipped gradient.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum NoiseOptimizer {
    /// Gradient descent with momentum; 0.9 with Nesterov's look-ahead in the paper.
    Sgd {
        /// How much of the last step stays.
        momentum: f64,
        /// Whether the step looks ahead.
        nesterov: bool,
    },
    /// Adam (0.9, 0.999).
    Adam {
        /// What is added to the root of the second moment; 1e-2 in the paper's code.
        eps: f64,
    },
    /// L-BFGS with backtracking, each row by itself: up to `max_iter` steps an iteration, each of them
    /// an evaluation and more where it has to go back. Gradients are not clipped; `lr` is the length of the
    /// first step.
    Lbfgs {
        /// Steps per iteration; 10 in the paper's code.
        max_iter: usize,
        /// Pairs of steps and gradients that are remembered; 3 in the paper's code.
        history: usize,
    },
}

impl Default for NoiseOptimizer {
    fn default() -> Self {
        Self::Sgd {
            momentum: 0.9,
            nesterov: true,
        }
    }
}

/// Settings of [`Reno`].
#[derive(Debug, Clone, PartialEq)]
pub struct RenoConfig {
    /// Evaluations `n`; one update less.
    pub iters: usize,
    /// The learning rate.
    pub lr: f64,
    /// What it is relative to.
    pub lr_mode: LrMode,
    /// How noise moves.
    pub optimizer: NoiseOptimizer,
    /// The largest norm of a row's gradient.
    pub grad_clip: f64,
    /// The weight of the regularizer; 0 switches it off.
    pub reg_weight: f64,
    /// Which sample is the result.
    pub select: Select,
    /// A row whose loss is below is done.
    pub early_stop: Option<f64>,
    /// A row that found nothing better for so many iterations is done.
    pub patience: Option<usize>,
    /// Whether the first gradient of a run is compared with differences: two more evaluations, which are
    /// counted. Off for gradients that are no derivatives on purpose.
    pub gradient_check: bool,
}

impl Default for RenoConfig {
    fn default() -> Self {
        Self {
            iters: 50,
            lr: 5.0,
            lr_mode: LrMode::RelativeToNorm,
            optimizer: NoiseOptimizer::default(),
            grad_clip: 0.1,
            reg_weight: 0.01,
            select: Select::BestReward,
            early_stop: None,
            patience: None,
            gradient_check: true,
        }
    }
}

impl RenoConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`](crate::Error::InvalidConfig).
    pub fn validate(&self) -> Result<()> {
        check::require(
            self.iters > 0,
            "RenoConfig::iters",
            self.iters,
            "at least 1",
        )?;
        check::positive("RenoConfig::lr", self.lr)?;
        check::positive("RenoConfig::grad_clip", self.grad_clip)?;
        let reg = self.reg_weight.is_finite() && self.reg_weight >= 0.0;
        let words = "a finite number >= 0";
        check::require(reg, "RenoConfig::reg_weight", self.reg_weight, words)?;
        if let Some(limit) = self.early_stop {
            check::finite("RenoConfig::early_stop", limit)?;
        }
        let patience = self.patience.is_none_or(|p| p > 0);
        check::require(
            patience,
            "RenoConfig::patience",
            self.patience,
            "at least 1",
        )?;
        match self.optimizer {
            NoiseOptimizer::Sgd { momentum, nesterov } => {
                let holds = (0.0..1.0).contains(&momentum);
                check::require(holds, "Sgd::momentum", momentum, "a number in [0, 1)")?;
                let holds = momentum > 0.0 || !nesterov;
                check::require(
                    holds,
                    "Sgd::nesterov",
                    nesterov,
                    "momentum to look ahead with",
                )
            }
            NoiseOptimizer::Adam { eps } => check::positive("Adam::eps", eps),
            NoiseOptimizer::Lbfgs { max_iter, history } => {
                let holds = max_iter > 0 && history > 0;
                let got = (max_iter, history);
                check::require(holds, "Lbfgs (max_iter, history)", got, "at least 1 each")
            }
        }
    }

    /// The learning rate for samples of `d` numbers.
    pub fn rate(&self, d: usize) -> f64 {
        match self.lr_mode {
            LrMode::Absolute => self.lr,
            LrMode::RelativeToNorm => self.lr * (d as f64).sqrt() / 128.0,
        }
    }
}

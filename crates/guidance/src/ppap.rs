//! PPAP: practical plug-and-play guidance. Any classifier or regressor of clean samples becomes a guide
//! for noisy ones, without labels and without its training data.
//!
//! For anyone with an unconditional diffusion model and an off-the-shelf network that judges clean
//! samples. Its own gradients are useless at high noise; a network retrained for all noise levels needs
//! labels. Here several small experts, each for one range of levels, share the frozen network and learn
//! from it on samples of the diffusion model itself. *Towards Practical Plug-and-Play Diffusion Models*,
//! Go et al., CVPR 2023, arXiv 2212.05973.
//!
//! ```text
//! expert n owns the steps floor(n T / N) <= t < floor((n + 1) T / N)
//! x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps,  x0 generated, t uniform in the range
//! L   = mean_b mean_k q_k (ln q_k - ln p_k)      q = softmax(teacher(x0) / tau), p = softmax(expert(x_t))
//! eps_guided = eps - sqrt(1 - abar) s grad log p_n(y | x_t)
//! ```
//!
//! | symbol | here |
//! | --- | --- |
//! | `N`, `T` | [`Ranges::new`] |
//! | the experts | [`ExpertBank`] over [`Adapters`] (rank 16, `alpha` 8 by default) |
//! | `tau`, `L` | [`Transfer`], [`TransferLoss`] |
//! | `s` | the scale of [`ClassifierGuidance`](crate::ClassifierGuidance) around an [`ExpertGuide`] |
//!
//! The network is whatever builds itself from a [`VarBuilder`]: its tensors are looked up, never changed.
//! It must be differentiable throughout; several layers of candle-nn are not (`thalweg-nn` has those
//! that are). Experts start from the frozen network, or each from the one before ([`Init::Chained`]),
//! as the authors' program does. The mean over the classes makes the loss `1 / K` of the usual one,
//! which an adaptive optimizer hardly notices.
//!
//! Statistics of batch norms stay those of the frozen network: a network is built anew from its tensors
//! for every step of training.
//!
//! ```
//! # extern crate flows as thalweg_flows;
//! # extern crate nn as thalweg_nn;
//! use candle_core::{DType, Device, Tensor};
//! use candle_nn::{AdamW, Optimizer, ParamsAdamW, VarBuilder};
//! use thalweg_flows::schedule::{Beta, Ddpm};
//! use thalweg_flows::RandomStream;
//! use thalweg_guidance::ppap::{ExpertBank, Ranges, Transfer};
//! use thalweg_nn::linear::{linear, Linear};
//! use thalweg_nn::lora::PeftSpec;
//!
//! let mut rng = RandomStream::new(1);
//! let tensors = [("l.weight".to_string(), rng.normal(0.0, 1.0, (3, 8), DType::F32, &Device::Cpu)?),
//!     ("l.bias".to_string(), Tensor::zeros(3, DType::F32, &Device::Cpu)?)];
//! let build = |vb: VarBuilder| Ok(linear(8, 3, vb.pp("l"))?);
//! let spec = PeftSpec { rank: 2, ..PeftSpec::default() };
//! let schedule = Ddpm::new(Beta::SquaredCosine, 100)?;
//! let mut bank = ExpertBank::<Linear>::new(build, tensors.into(), Ranges::new(2, 100)?, &spec, &mut rng)?;
//!
//! let mut data = RandomStream::new(2);
//! let mut generated = |rows| Ok(data.normal(0.0, 1.0, (rows, 8), DType::F32, &Device::Cpu)?);
//! let transfer = Transfer { iterations: 20, batch: 16, lr: 1e-2, ..Transfer::default() };
//! let adam = |vars, lr| Ok(AdamW::new(vars, ParamsAdamW { lr, ..ParamsAdamW::default() })?);
//! let losses = transfer.run(&mut bank, &schedule, &mut generated, adam, &mut rng)?;
//! assert_eq!((losses.len(), losses[0].len()), (2, 20));
//! # Ok::<(), thalweg_guidance::Error>(())
//! ```

use crate::basic::NoisyModel;
use crate::error::{check, Error};
use crate::Result;
use candle_core::{DType, Module, Tensor, D};
use candle_nn::{Optimizer, VarBuilder};
use flows::prediction::select_rows;
use flows::schedule::Ddpm;
use flows::{Condition, Ddim, Denoiser, Grid, Level, Levels, Sampler};
use nn::lora::{Adapters, PeftSpec};
use nn::softmax::log_softmax;
use std::collections::BTreeMap;
use std::path::Path;
use tensor_core::checkpoint::{Checkpoint, State};
use tensor_core::random::RandomStream;

/// Which steps belong to which expert.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ranges(Vec<(usize, usize)>);

impl Ranges {
    /// `experts` ranges of nearly equal size over `steps` steps. 5 over 1000 are the paper's.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] unless there are at least as many steps as experts, and an expert.
    pub fn new(experts: usize, steps: usize) -> Result<Self> {
        let holds = experts > 0 && steps >= experts;
        let words = "at least one expert, and a step for each";
        check::require(holds, "Ranges (experts, steps)", (experts, steps), words)?;
        let edge = |n: usize| n * steps / experts;
        Ok(Self((0..experts).map(|n| (edge(n), edge(n + 1))).collect()))
    }

    /// The ranges, each without its upper end.
    pub fn all(&self) -> &[(usize, usize)] {
        &self.0
    }

    /// Number of steps.
    pub fn steps(&self) -> usize {
        self.0.last().map_or(0, |r| r.1)
    }

    /// The expert of step `t`, always an index of the training schedule. Where steps are counted from 1
    /// the last one is `T`, which belongs to the last expert too.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a step beyond that.
    pub fn route(&self, t: usize) -> Result<usize> {
        let steps = self.steps();
        if t > steps {
            return Err(Error::argument("t", t, format!("at most {steps}")));
        }
        let last = self.0.len() - 1;
        let found = self.0.iter().position(|(_, hi)| t < *hi);
        Ok(found.unwrap_or(last))
    }

    /// The expert that the authors' program takes: at a boundary the lower one, which has not been
    /// trained there. To compare runs.
    ///
    /// # Errors
    /// As [`route`](Self::route).
    pub fn route_inclusive(&self, t: usize) -> Result<usize> {
        let found = self.0.iter().position(|(lo, hi)| (*lo..=*hi).contains(&t));
        found.ok_or_else(|| Error::argument("t", t, format!("up to {}", self.steps())))
    }
}

/// Makes a network from its tensors.
type Build<'a, M> = Box<dyn Fn(VarBuilder) -> Result<M> + 'a>;

/// Experts over one frozen network; only their adapters are stored for each.
pub struct ExpertBank<'a, M> {
    build: Build<'a, M>,
    base: M,
    adapters: Vec<Adapters>,
    /// Networks with merged adapters, for use.
    experts: Vec<M>,
    ranges: Ranges,
}

impl<'a, M: Module> ExpertBank<'a, M> {
    /// Experts over the network that `build` makes of `weights` (by the names that it asks for).
    ///
    /// # Errors
    /// As [`Adapters::new`]; those of `build`.
    pub fn new(
        build: impl Fn(VarBuilder) -> Result<M> + 'a,
        weights: BTreeMap<String, Tensor>,
        ranges: Ranges,
        spec: &PeftSpec,
        rng: &mut RandomStream,
    ) -> Result<Self> {
        let build: Build<'a, M> = Box::new(build);
        let first = Adapters::new(weights, spec, rng)?;
        let mut plain = first.clone();
        plain.set_enabled(false);
        let base = build(plain.builder()?)?;
        let count = ranges.all().len();
        let adapters = (0..count)
            .map(|_| Ok(first.fork()?))
            .collect::<Result<Vec<_>>>()?;
        let mut bank = Self {
            build,
            base,
            adapters,
            experts: Vec::new(),
            ranges,
        };
        bank.merge()?;
        Ok(bank)
    }

    /// Builds the experts from the present values of their adapters.
    fn merge(&mut self) -> Result<()> {
        let one = |adapters: &Adapters| {
            let weights = adapters.merge()?.into_iter().collect();
            let (dtype, device) = dtype_and_device(adapters)?;
            (self.build)(VarBuilder::from_tensors(weights, dtype, &device))
        };
        self.experts = self.adapters.iter().map(one).collect::<Result<_>>()?;
        Ok(())
    }

    /// The frozen network.
    pub fn base(&self) -> &M {
        &self.base
    }

    /// The ranges.
    pub fn ranges(&self) -> &Ranges {
        &self.ranges
    }

    /// The adapters of an expert, where there is one of this number.
    pub fn adapters(&self, expert: usize) -> Option<&Adapters> {
        self.adapters.get(expert)
    }

    /// What an expert adds, as a part of the network.
    pub fn trainable_fraction(&self) -> f64 {
        self.adapters
            .first()
            .map_or(0.0, Adapters::trainable_fraction)
    }

    /// The experts' outputs for noisy samples, each row at its own step: the rows of an expert go
    /// through it together.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a step beyond the last or another number of steps than rows;
    /// those of the network.
    pub fn forward(&self, x: &Tensor, t: &[usize]) -> Result<Tensor> {
        let rows = x.dims().first().copied().unwrap_or(0);
        if t.len() != rows || rows == 0 {
            let expected = format!("{rows}, one per row, and a row");
            return Err(Error::argument("number of steps", t.len(), expected));
        }
        let routes = t.iter().map(|t| self.ranges.route(*t));
        let routes = routes.collect::<Result<Vec<_>>>()?;
        if routes.iter().all(|r| *r == routes[0]) {
            return Ok(self.experts[routes[0]].forward(x)?);
        }
        let (mut parts, mut place) = (Vec::new(), vec![0u32; rows]);
        let mut done = 0;
        for (n, expert) in self.experts.iter().enumerate() {
            let own: Vec<u32> = (0..rows)
                .filter(|i| routes[*i] == n)
                .map(|i| i as u32)
                .collect();
            if own.is_empty() {
                continue;
            }
            for row in &own {
                place[*row as usize] = done;
                done += 1;
            }
            parts.push(expert.forward(&select_rows(x, &own)?)?);
        }
        Ok(select_rows(&Tensor::cat(&parts, 0)?, &place)?)
    }

    /// Writes the adapters of all experts, without the network.
    ///
    /// # Errors
    /// Those of the file.
    pub fn save_adapters(&self, path: impl AsRef<Path>) -> Result<()> {
        let mut all = State::new();
        for (n, adapters) in self.adapters.iter().enumerate() {
            for (name, tensor) in adapters.state()? {
                all.insert(format!("{n}.{name}"), tensor);
            }
        }
        let checkpoint = Checkpoint::new("ppap", all)
            .with("experts", self.adapters.len())
            .with("steps", self.ranges.steps());
        Ok(checkpoint.save(path)?)
    }

    /// Reads them back.
    ///
    /// # Errors
    /// Those of the file; [`Error::Mismatch`] for other ranges; a mismatch that lists what differs.
    pub fn load_adapters(&mut self, path: impl AsRef<Path>) -> Result<()> {
        let (_, device) = dtype_and_device(&self.adapters[0])?;
        let checkpoint = Checkpoint::load(path, &device)?;
        let found = (
            checkpoint.number::<usize>("experts")?,
            checkpoint.number::<usize>("steps")?,
        );
        let wanted = (self.adapters.len(), self.ranges.steps());
        if found != wanted || checkpoint.kind != "ppap" {
            return Err(Error::Mismatch {
                what: "the file of adapters",
                reason: format!("{found:?} experts and steps where the bank has {wanted:?}"),
            });
        }
        let part = |n: usize| -> State {
            let prefix = format!("{n}.");
            let own = |(name, t): (&String, &Tensor)| {
                Some((name.strip_prefix(&prefix)?.to_string(), t.clone()))
            };
            checkpoint.tensors.iter().filter_map(own).collect()
        };
        for (n, adapters) in self.adapters.iter().enumerate() {
            adapters.load_state(&part(n))?;
        }
        self.merge()
    }
}

fn dtype_and_device(adapters: &Adapters) -> Result<(DType, candle_core::Device)> {
    let var = adapters.vars().into_iter().next();
    let var = var.ok_or_else(|| Error::argument("adapters", 0, "at least one"))?;
    Ok((var.dtype(), var.device().clone()))
}

/// What an expert learns from the frozen network.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum TransferLoss {
    /// The divergence of classes' probabilities, the teacher's over a temperature.
    KlLogits {
        /// The teacher's temperature; below 1 it is sharper. 0.25 in the paper.
        tau: f64,
        /// Whether classes are averaged (the paper's code) or summed.
        reduction: KlReduction,
    },
    /// The mean square of the difference: depth maps, features.
    Mse,
    /// Cross entropy with the teacher's likeliest class at each place of `[rows, classes, ...]`:
    /// segmentation.
    CrossEntropyPixels,
}

/// How the classes' terms of a divergence are collected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KlReduction {
    /// Their mean: `1 / K` of the divergence.
    #[default]
    PaperMean,
    /// Their sum: the divergence.
    Sum,
}

impl Default for TransferLoss {
    fn default() -> Self {
        Self::KlLogits {
            tau: 0.25,
            reduction: KlReduction::PaperMean,
        }
    }
}

impl TransferLoss {
    fn validate(&self) -> Result<()> {
        match self {
            Self::KlLogits { tau, .. } => check::positive("TransferLoss::KlLogits::tau", *tau),
            _ => Ok(()),
        }
    }

    /// The loss of each sample, `[rows]`.
    ///
    /// # Errors
    /// [`Error::Shape`] when the two outputs differ in shape.
    pub fn per_sample(&self, teacher: &Tensor, student: &Tensor) -> Result<Tensor> {
        if teacher.dims() != student.dims() || teacher.rank() < 2 {
            let expected = format!("{:?}, the expert's", student.dims());
            return Err(Error::shape(
                "the teacher's output",
                teacher.dims(),
                expected,
            ));
        }
        let teacher = teacher.detach();
        match self {
            Self::KlLogits { tau, reduction } => {
                let log_q = log_softmax(&teacher.affine(1.0 / tau, 0.0)?, D::Minus1)?;
                let log_p = log_softmax(student, D::Minus1)?;
                let terms = (log_q.exp()? * (log_q - log_p)?)?;
                let classes = *terms.dims().last().unwrap_or(&1) as f64;
                let sum = terms.sum(D::Minus1)?;
                let sum = match sum.rank() {
                    1 => sum,
                    _ => sum.flatten_from(1)?.mean(D::Minus1)?,
                };
                match reduction {
                    KlReduction::PaperMean => Ok(sum.affine(1.0 / classes, 0.0)?),
                    KlReduction::Sum => Ok(sum),
                }
            }
            Self::Mse => {
                let off = (student - teacher)?.sqr()?.flatten_from(1)?;
                Ok(off.mean(D::Minus1)?)
            }
            Self::CrossEntropyPixels => {
                // Classes last, for the softmax.
                let last = |x: &Tensor| -> Result<Tensor> {
                    let (rows, classes) = (x.dims()[0], x.dims()[1]);
                    Ok(x.reshape((rows, classes, ()))?
                        .transpose(1, 2)?
                        .contiguous()?)
                };
                let class = last(&teacher)?.argmax_keepdim(D::Minus1)?;
                let log_p = log_softmax(&last(student)?, D::Minus1)?;
                let own = log_p.gather(&class, D::Minus1)?;
                Ok(own.flatten_from(1)?.mean(D::Minus1)?.neg()?)
            }
        }
    }
}

/// Where an expert starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Init {
    /// At the frozen network, as the paper describes.
    #[default]
    FromBase,
    /// At the expert before, as the authors' program does.
    Chained,
}

/// The transfer of the frozen network to its experts, without data.
#[derive(Debug, Clone, PartialEq)]
pub struct Transfer {
    /// Updates per expert; the paper's 300 000 over the number of experts.
    pub iterations: usize,
    /// Samples of an update.
    pub batch: usize,
    /// The first learning rate of an expert, which falls to 0 in a line. The paper's optimizer is AdamW
    /// with a weight decay of 0.05.
    pub lr: f64,
    /// What is learned.
    pub loss: TransferLoss,
    /// Where experts start.
    pub init: Init,
}

impl Default for Transfer {
    fn default() -> Self {
        Self {
            iterations: 60_000,
            batch: 256,
            lr: 1e-4,
            loss: TransferLoss::default(),
            init: Init::FromBase,
        }
    }
}

impl Transfer {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`].
    pub fn validate(&self) -> Result<()> {
        let one = "at least 1";
        check::require(
            self.iterations > 0,
            "Transfer::iterations",
            self.iterations,
            one,
        )?;
        check::require(self.batch > 0, "Transfer::batch", self.batch, one)?;
        check::positive("Transfer::lr", self.lr)?;
        self.loss.validate()
    }

    /// Trains all experts; `data` gives so many generated clean samples (see [`generate`]), `optimizer`
    /// is made anew for each expert from its variables and the learning rate. Returns the losses of
    /// every update, by expert.
    ///
    /// # Errors
    /// As [`validate`](Self::validate); [`Error::Mismatch`] for a schedule of other steps;
    /// [`Error::NonFinite`] for a loss that is not finite, before it reaches the adapters.
    pub fn run<M: Module, O: Optimizer>(
        &self,
        bank: &mut ExpertBank<M>,
        schedule: &Ddpm,
        data: &mut dyn FnMut(usize) -> Result<Tensor>,
        optimizer: impl Fn(Vec<candle_core::Var>, f64) -> Result<O>,
        rng: &mut RandomStream,
    ) -> Result<Vec<Vec<f64>>> {
        self.validate()?;
        if schedule.train_steps() != bank.ranges.steps() {
            return Err(Error::Mismatch {
                what: "the schedule",
                reason: format!(
                    "{} steps where the experts have {}",
                    schedule.train_steps(),
                    bank.ranges.steps()
                ),
            });
        }
        let mut all = Vec::new();
        for n in 0..bank.adapters.len() {
            if n > 0 && self.init == Init::Chained {
                let before = bank.adapters[n - 1].state()?;
                bank.adapters[n].load_state(&before)?;
            }
            let mut optimizer = optimizer(bank.adapters[n].vars(), self.lr)?;
            let mut losses = Vec::with_capacity(self.iterations);
            for k in 0..self.iterations {
                let done = k as f64 / self.iterations as f64;
                optimizer.set_learning_rate(self.lr * (1.0 - done));
                let x0 = data(self.batch)?.detach();
                let loss = self.loss(bank, n, &x0, schedule, rng)?;
                let number = loss.to_dtype(DType::F64)?.to_scalar::<f64>()?;
                if !number.is_finite() {
                    return Err(Error::NonFinite {
                        rule: "PPAP",
                        what: format!("the transfer loss of expert {n}"),
                        step: k,
                    });
                }
                optimizer.backward_step(&loss)?;
                losses.push(number);
            }
            all.push(losses);
        }
        bank.merge()?;
        Ok(all)
    }

    /// The loss of expert `n` on clean samples that are noised by steps of its range.
    fn loss<M: Module>(
        &self,
        bank: &ExpertBank<M>,
        n: usize,
        x0: &Tensor,
        schedule: &Ddpm,
        rng: &mut RandomStream,
    ) -> Result<Tensor> {
        let (lo, hi) = bank.ranges.all()[n];
        let rows = x0.dims().first().copied().unwrap_or(0);
        let level = |_| -> Result<Level> {
            let t = lo + rng.below(hi - lo)?;
            Ok(flows::Schedule::level(schedule, t as f64)?)
        };
        let levels = Levels::PerRow((0..rows).map(level).collect::<Result<_>>()?);
        let noise = rng.normal(0.0, 1.0, x0.shape(), x0.dtype(), x0.device())?;
        let noisy = flows::level::mix(x0, &noise, &levels)?;
        let expert = (bank.build)(bank.adapters[n].builder()?)?;
        let teacher = bank.base.forward(x0)?;
        let losses = self.loss.per_sample(&teacher, &expert.forward(&noisy)?)?;
        Ok(losses.mean_all()?)
    }
}

/// Samples of the unconditional model to learn from: DDIM, 25 steps in the paper, `batch` at a time.
///
/// # Errors
/// Those of the sampler.
pub fn generate(
    denoiser: &dyn Denoiser,
    grid: &Grid,
    like: &Tensor,
    count: usize,
    batch: usize,
    rng: &RandomStream,
) -> Result<Tensor> {
    check::require(count > 0, "generate::count", count, "at least 1")?;
    check::require(batch > 0, "generate::batch", batch, "at least 1")?;
    let mut shape = like.dims().to_vec();
    let mut parts = Vec::new();
    let mut done = 0;
    while done < count {
        shape[0] = (count - done).min(batch);
        let stream = rng.split_index("generated", done as u64);
        let noise =
            stream
                .split("start")
                .normal(0.0, 1.0, shape.clone(), like.dtype(), like.device())?;
        let mut sampler = Sampler::new(denoiser, grid.clone()).stepper(Ddim::default());
        parts.push(sampler.sample(&noise, &Condition::Null, None, &stream)?.x);
        done += shape[0];
    }
    Ok(Tensor::cat(&parts, 0)?)
}

/// A log-likelihood `[rows]` of a guide's output under the wanted condition.
pub type Likelihood<'a> = Box<dyn Fn(&Tensor, &Condition) -> Result<Tensor> + 'a>;

/// What a guide is to say.
pub enum Objective<'a> {
    /// The class of the run's condition: `log p`.
    LogProb,
    /// A map: minus half the sum of squares to it, `[rows or 1, ...]`.
    Map(Tensor),
    /// Any log-likelihood `[rows]` of the guide's output.
    Custom(Likelihood<'a>),
}

/// A bank of experts as the model of [`ClassifierGuidance`](crate::ClassifierGuidance).
pub struct ExpertGuide<'b, 'a, M> {
    /// The experts.
    pub bank: &'b ExpertBank<'a, M>,
    /// What they are to say.
    pub objective: Objective<'b>,
    /// From a level to the step of the training schedule: its model time rounded, for levels of a
    /// discrete schedule.
    pub step: fn(&Level) -> f64,
}

impl<'b, 'a, M: Module> ExpertGuide<'b, 'a, M> {
    /// A guide to classes, on levels of a discrete schedule.
    pub fn new(bank: &'b ExpertBank<'a, M>) -> Self {
        Self {
            bank,
            objective: Objective::LogProb,
            step: |level| level.model_time,
        }
    }

    fn log_likelihood(&self, x: &Tensor, level: &Level, wanted: &Condition) -> Result<Tensor> {
        let t = (self.step)(level).round();
        if !(t.is_finite() && t >= 0.0) {
            return Err(Error::argument("step of the level", t, "a number >= 0"));
        }
        let out = self.bank.forward(x, &vec![t as usize; x.dims()[0]])?;
        match &self.objective {
            Objective::LogProb => {
                let Condition::Class(classes) = wanted else {
                    let reason = "sample under Condition::Class, or take another objective";
                    return Err(Error::unsupported("a guide to no class", reason));
                };
                let log_p = log_softmax(&out, D::Minus1)?;
                Ok(log_p.gather(&classes.unsqueeze(1)?, 1)?.squeeze(1)?)
            }
            Objective::Map(target) => {
                let off = out.broadcast_sub(target)?.sqr()?.flatten_from(1)?;
                Ok(off.sum(D::Minus1)?.affine(-0.5, 0.0)?)
            }
            Objective::Custom(f) => f(&out, wanted),
        }
    }
}

impl<M: Module> NoisyModel for ExpertGuide<'_, '_, M> {
    fn log_prob(&self, x: &Tensor, level: &Level, wanted: &Condition) -> flows::Result<Tensor> {
        Ok(self.log_likelihood(x, level, wanted)?)
    }
}

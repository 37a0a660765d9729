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
//! Experts train in training mode (`forward_t(x, true)`): running statistics of batch norms become those
//! of the expert's noise and are saved with it. The frozen network and finished experts run in evaluation
//! mode. What the frozen network and the experts see of a sample is each one's [`Preprocess`], stored with
//! the adapters.
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
//! let adam = |vars, t: &Transfer| {
//!     let (lr, weight_decay) = (t.lr, t.weight_decay);
//!     Ok(AdamW::new(vars, ParamsAdamW { lr, weight_decay, ..ParamsAdamW::default() })?)
//! };
//! let losses = transfer.run(&mut bank, &schedule, &mut generated, adam, &mut rng)?;
//! assert_eq!((losses.len(), losses[0].len()), (2, 20));
//! # Ok::<(), thalweg_guidance::Error>(())
//! ```

mod generate;
mod guide;
mod preprocess;
mod transfer;

pub use generate::{generate, generate_shards, Shards};
pub use guide::{ExpertGuide, Likelihood, Objective};
pub use preprocess::{Preprocess, Roles};
pub use transfer::{Init, KlReduction, Transfer, TransferLoss};

use crate::error::{check, Error};
use crate::Result;
use candle_core::{DType, ModuleT, Tensor};
use candle_nn::VarBuilder;
use flows::prediction::select_rows;
use nn::lora::{Adapters, PeftSpec};
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
type Build<'a, M> = Box<dyn Fn(VarBuilder) -> Result<M> + Send + Sync + 'a>;

/// Experts over one frozen network; only their adapters are stored for each.
pub struct ExpertBank<'a, M> {
    build: Build<'a, M>,
    base: M,
    adapters: Vec<Adapters>,
    /// Networks with merged adapters, for use.
    experts: Vec<M>,
    ranges: Ranges,
    preprocess: Roles,
}

impl<'a, M: ModuleT> ExpertBank<'a, M> {
    /// Experts over the network that `build` makes of `weights` (by the names that it asks for).
    ///
    /// # Errors
    /// As [`Adapters::new`]; those of `build`.
    pub fn new(
        build: impl Fn(VarBuilder) -> Result<M> + Send + Sync + 'a,
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
            preprocess: Roles::default(),
        };
        bank.merge()?;
        Ok(bank)
    }

    /// What the frozen network and the experts see of a sample; by default both see the sample itself.
    ///
    /// # Errors
    /// As [`Preprocess::validate`].
    pub fn with_preprocess(self, preprocess: Roles) -> Result<Self> {
        preprocess.teacher.validate()?;
        preprocess.student.validate()?;
        Ok(Self { preprocess, ..self })
    }

    /// What the frozen network and the experts see of a sample.
    pub fn preprocess(&self) -> &Roles {
        &self.preprocess
    }

    /// The frozen network's output for clean samples.
    ///
    /// # Errors
    /// Those of the network.
    pub fn teach(&self, x0: &Tensor) -> Result<Tensor> {
        let seen = self.preprocess.teacher.apply(x0)?;
        Ok(self.base.forward_t(&seen, false)?.detach())
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
        let x = &self.preprocess.student.apply(x)?;
        let routes = t.iter().map(|t| self.ranges.route(*t));
        let routes = routes.collect::<Result<Vec<_>>>()?;
        if routes.iter().all(|r| *r == routes[0]) {
            return Ok(self.experts[routes[0]].forward_t(x, false)?);
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
            parts.push(expert.forward_t(&select_rows(x, &own)?, false)?);
        }
        Ok(select_rows(&Tensor::cat(&parts, 0)?, &place)?)
    }

    /// Writes the adapters of all experts and what they see of a sample, without the network.
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
        self.preprocess.store(&mut all)?;
        let checkpoint = Checkpoint::new("ppap", all)
            .with("experts", self.adapters.len())
            .with("steps", self.ranges.steps());
        Ok(checkpoint.save(path)?)
    }

    /// Reads them back, all or nothing.
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
        let preprocess = Roles::read(&checkpoint.tensors)?;
        let parts: Vec<State> = (0..self.adapters.len()).map(part).collect();
        // On copies first: a part that does not fit must not leave the others changed.
        for (adapters, part) in self.adapters.iter().zip(&parts) {
            adapters.fork()?.load_state(part)?;
        }
        for (adapters, part) in self.adapters.iter().zip(&parts) {
            adapters.load_state(part)?;
        }
        self.preprocess = preprocess;
        self.merge()
    }
}

fn dtype_and_device(adapters: &Adapters) -> Result<(DType, candle_core::Device)> {
    let var = adapters.vars().into_iter().next();
    let var = var.ok_or_else(|| Error::argument("adapters", 0, "at least one"))?;
    Ok((var.dtype(), var.device().clone()))
}

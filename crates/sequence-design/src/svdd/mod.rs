//! Soft value-based decoding (SVDD) of masked diffusion: samples are steered towards a reward that
//! need not be differentiable, without any training of the model.
//!
//! For whoever has a generator of sequences and a black box that judges them. The decoder, its values
//! and its baselines are those of [`guidance::svdd`], which knows nothing of tokens; this is the
//! kernel between the two. *Derivative-Free Guidance in Continuous and Discrete Diffusion Models with
//! Soft Value-Based Decoding*, Li et al., 2024, arXiv 2408.08252.
//!
//! ```text
//! x'_1 .. x'_M ~ p(. | x_t)         at masked positions: token k with weight p_k (a - s), mask with s
//! w_m = exp(v(x'_m) / alpha)        SVDD-PM: v = r(most likely clean sequence of x'_m)
//! ```
//!
//! | symbol | here |
//! | --- | --- |
//! | `p` | [`MaskedKernel`] over a [`MaskedDiffusion`] |
//! | `x` | [`Tokens`] |
//! | `r` | [`token_reward`] around a function of sequences; [`guidance::svdd::Cached`] and the others around it |
//! | `v` | [`guidance::svdd::PosteriorMeanValue`], or [`guidance::svdd::LearnedValue`] on [`Tokens::padded`] |
//!
//! Where the reward can be differentiated, [`GradientKernel`] is what one would try first: guidance by
//! its gradient, alone or with weights.
//!
//! The network's answer about a candidate is kept with it: the candidate that goes on needs no second
//! one, and neither does a sequence that did not change (unless the network sees the noise level).
//!
//! ```
//! # extern crate guidance as thalweg_guidance;
//! use candle_core::{DType, Device, Tensor};
//! use thalweg_guidance::svdd::{PosteriorMeanValue, Svdd};
//! use thalweg_sequence_design::masked_diffusion::{DiscreteDenoiser, MaskedDiffusion};
//! use thalweg_sequence_design::svdd::{token_reward, MaskedKernel};
//! use thalweg_sequence_design::{RandomStream, Result};
//!
//! // Your trained network in the place of this one, which finds all letters equally likely.
//! struct Even;
//! impl DiscreteDenoiser for Even {
//!     fn logits(&self, x: &Tensor, _: &Tensor, _: bool) -> Result<Tensor> {
//!         Ok(x.zeros_like()?)
//!     }
//! }
//! let model = MaskedDiffusion::new(Even, 4, DType::F32, &Device::Cpu)?;
//! let kernel = MaskedKernel::new(&model, 8, 16)?;
//! // A black box: how many letters are G (number 2).
//! let reward = token_reward(|sequences: &[Vec<u32>]| {
//!     Ok(sequences.iter().map(|s| s.iter().filter(|t| **t == 2).count() as f64).collect())
//! });
//! let value = PosteriorMeanValue::new(&kernel, &reward);
//! let out = Svdd::new(&kernel, &value).duplicates(8).sample(4, &RandomStream::new(1))?;
//! let sequences = out.states.sequences();
//! assert!(sequences.iter().flatten().filter(|t| **t == 2).count() > 16);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod guided;

pub use guided::{GradientKernel, Twisted, Weighed};

use crate::masked_diffusion::{
    filled, next_tokens, one_hot, Candidate, DiscreteDenoiser, MaskedDiffusion, Step,
};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use guidance::svdd::{Batch, ReverseKernel};
use rayon::prelude::*;
use std::sync::{Arc, OnceLock};
use tensor_core::random::RandomStream;

/// A sequence, with the network's answer about it once that is known.
#[derive(Debug, Clone)]
struct Row {
    tokens: Arc<Vec<u32>>,
    logits: Arc<OnceLock<Vec<f64>>>,
}

impl Row {
    fn new(tokens: Vec<u32>) -> Self {
        Self {
            tokens: Arc::new(tokens),
            logits: Arc::new(OnceLock::new()),
        }
    }

    /// What a step makes of it; without logits, which rows without masks need not have, nothing. A
    /// network that is `timed` is asked about the same tokens again.
    fn next(&self, mask: u32, step: &Step, uniforms: &[f64], timed: bool) -> Self {
        let Some(logits) = self.logits.get() else {
            return self.clone();
        };
        match next_tokens(mask, &self.tokens, logits, step, uniforms) {
            Candidate::Same if !timed => self.clone(),
            Candidate::Same => Self::new(self.tokens.to_vec()),
            Candidate::Changed(tokens) => Self::new(tokens),
        }
    }
}

/// Sequences of one length, masks among them.
#[derive(Debug, Clone)]
pub struct Tokens {
    rows: Vec<Row>,
    length: usize,
}

impl Tokens {
    /// From tokens `[B, L]`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn new(tokens: &Tensor) -> Result<Self> {
        let (_, length) = tokens.dims2()?;
        let rows = tokens.to_dtype(DType::U32)?.to_vec2::<u32>()?;
        Ok(Self {
            rows: rows.into_iter().map(Row::new).collect(),
            length,
        })
    }

    /// The sequences.
    pub fn sequences(&self) -> Vec<Vec<u32>> {
        self.rows.iter().map(|r| r.tokens.to_vec()).collect()
    }

    /// The sequences as a tensor `[B, L]` (u32).
    ///
    /// # Errors
    /// Those of candle.
    pub fn tensor(&self, device: &Device) -> Result<Tensor> {
        let tokens: Vec<u32> = self.rows.iter().flat_map(|r| r.tokens.to_vec()).collect();
        Ok(Tensor::from_vec(
            tokens,
            (self.rows.len(), self.length),
            device,
        )?)
    }

    /// One-hot sequences `[B, L, K]` in which masks are rows of zeros: what a value network sees.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for tokens beyond the mask.
    pub fn padded(&self, vocab: usize, dtype: DType, device: &Device) -> Result<Tensor> {
        let all = one_hot(&self.tensor(device)?, vocab + 1, dtype)?;
        Ok(all.narrow(2, 0, vocab)?.contiguous()?)
    }
}

impl Batch for Tokens {
    fn rows(&self) -> guidance::Result<usize> {
        Ok(self.rows.len())
    }

    fn take(&self, rows: &[u32]) -> guidance::Result<Self> {
        let one = |k: &u32| {
            let row = self.rows.get(*k as usize).cloned();
            row.ok_or_else(|| Error::argument("row", k, format!("below {}", self.rows.len())))
        };
        let rows: Result<Vec<Row>> = rows.iter().map(one).collect();
        Ok(Self {
            rows: rows.map_err(outside)?,
            length: self.length,
        })
    }

    fn concat(parts: &[Self]) -> guidance::Result<Self> {
        let length = parts.first().map_or(0, |p| p.length);
        if let Some(other) = parts.iter().find(|p| p.length != length) {
            let expected = format!("{length} tokens");
            return Err(outside(Error::shape(
                "a sequence",
                &[other.length],
                expected,
            )));
        }
        Ok(Self {
            rows: parts.iter().flat_map(|p| p.rows.clone()).collect(),
            length,
        })
    }
}

/// The decoder's traits return its error: ours travels inside it.
fn outside(error: Error) -> guidance::Error {
    match error {
        Error::Candle(inner) => inner.into(),
        Error::Core(inner) => inner.into(),
        Error::Nn(inner) => inner.into(),
        other => candle_core::Error::wrap(other).into(),
    }
}

/// A function of sequences as the decoder's reward. NaN counts as worst.
pub fn token_reward(
    reward: impl Fn(&[Vec<u32>]) -> Result<Vec<f64>>,
) -> impl Fn(&Tokens) -> guidance::Result<Tensor> {
    move |tokens: &Tokens| {
        let rewards = reward(&tokens.sequences()).map_err(outside)?;
        let count = rewards.len();
        Ok(Tensor::from_vec(rewards, count, &Device::Cpu)?)
    }
}

/// The reverse process of a masked diffusion model.
pub struct MaskedKernel<'a, D> {
    model: &'a MaskedDiffusion<D>,
    length: usize,
    grid: Vec<Step>,
    fixed: Vec<u32>,
    chunk: usize,
}

impl<'a, D: DiscreteDenoiser> MaskedKernel<'a, D> {
    /// Sequences of `length` tokens in `steps` steps.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for no token or no step.
    pub fn new(model: &'a MaskedDiffusion<D>, length: usize, steps: usize) -> Result<Self> {
        if length == 0 {
            return Err(Error::argument("length", length, "at least 1"));
        }
        model.schedule.validate()?;
        Ok(Self {
            model,
            length,
            grid: model.schedule.steps(steps, model.clean_time)?,
            fixed: vec![model.mask(); length],
            chunk: 512,
        })
    }

    /// Keeps these tokens where they are not the mask's number.
    ///
    /// # Errors
    /// [`Error::Shape`] for another length, [`Error::InvalidArgument`] for a token beyond the mask.
    pub fn fixed(self, fixed: &[u32]) -> Result<Self> {
        if fixed.len() != self.length {
            let expected = format!("[{}]", self.length);
            return Err(Error::shape("fixed tokens", &[fixed.len()], expected));
        }
        if let Some(token) = fixed.iter().find(|t| **t > self.model.mask()) {
            let expected = format!("at most {}, the mask", self.model.mask());
            return Err(Error::argument("fixed token", token, expected));
        }
        Ok(Self {
            fixed: fixed.to_vec(),
            ..self
        })
    }

    /// Rows that the network sees at once; 512 if nothing is said.
    #[must_use]
    pub fn chunk(self, chunk: usize) -> Self {
        Self {
            chunk: chunk.max(1),
            ..self
        }
    }

    /// The steps.
    pub fn grid(&self) -> &[Step] {
        &self.grid
    }

    /// The noise level after so many steps.
    fn sigma(&self, done: usize) -> f64 {
        match self.grid.get(done) {
            Some(step) => step.sigma,
            None => self.model.schedule.total(self.model.clean_time),
        }
    }

    /// Asks the network about all rows with masks that it has not been asked about.
    fn ask(&self, x: &Tokens, done: usize) -> Result<()> {
        let mask = self.model.mask();
        let open = |row: &&Row| row.logits.get().is_none() && row.tokens.contains(&mask);
        let wanted: Vec<&Row> = x.rows.iter().filter(open).collect();
        let width = self.model.vocab + 1;
        for rows in wanted.chunks(self.chunk) {
            let tokens: Vec<u32> = rows.iter().flat_map(|r| r.tokens.to_vec()).collect();
            let tokens = Tensor::from_vec(tokens, (rows.len(), x.length), &self.model.device)?;
            let logits = self.model.host_logits(&tokens, self.sigma(done))?;
            for (row, logits) in rows.iter().zip(logits.chunks(x.length * width)) {
                // A row that occurs twice has its answer already: the same one.
                let _ = row.logits.set(logits.to_vec());
            }
        }
        Ok(())
    }

    /// [`ReverseKernel::propose`] where a function for each row fills in the uniform numbers
    /// `[L, K + 1]` of its candidates, one after the other.
    pub(crate) fn propose_with<F: FnMut(usize, &mut [f64]) + Send>(
        &self,
        x: &Tokens,
        step: usize,
        m: usize,
        uniforms: Vec<F>,
    ) -> Result<Tokens> {
        if uniforms.len() != x.rows.len() {
            let expected = format!("[{}], one for each row", x.rows.len());
            return Err(Error::shape("streams", &[uniforms.len()], expected));
        }
        self.ask(x, step)?;
        let (mask, step) = (self.model.mask(), &self.grid[step]);
        let timed = self.model.time_conditioning;
        let candidates = |(row, mut uniforms): (&Row, F)| {
            let mut u = vec![0.0; x.length * (mask as usize + 1)];
            let one = |j: usize| {
                uniforms(j, &mut u);
                row.next(mask, step, &u, timed)
            };
            (0..m).map(one).collect::<Vec<Row>>()
        };
        let rows = x.rows.par_iter().zip(uniforms).map(candidates);
        Ok(Tokens {
            rows: rows.collect::<Vec<_>>().concat(),
            length: x.length,
        })
    }
}

impl<D: DiscreteDenoiser> ReverseKernel for MaskedKernel<'_, D> {
    type State = Tokens;

    fn steps(&self) -> usize {
        self.grid.len()
    }

    fn init(&self, streams: &mut [RandomStream]) -> guidance::Result<Tokens> {
        // All rows are the same: the network is asked about one of them.
        let row = Row::new(self.fixed.clone());
        Ok(Tokens {
            rows: vec![row; streams.len()],
            length: self.length,
        })
    }

    fn propose(
        &self,
        x: &Tokens,
        step: usize,
        m: usize,
        streams: &mut [RandomStream],
    ) -> guidance::Result<Tokens> {
        let streams = streams.iter_mut();
        let draws = streams.map(|stream| move |_, u: &mut [f64]| stream.fill_uniform(u));
        self.propose_with(x, step, m, draws.collect())
            .map_err(outside)
    }

    fn predict_clean(&self, x: &Tokens, done: usize) -> guidance::Result<Tokens> {
        self.ask(x, done).map_err(outside)?;
        let clean = |row: &Row| match row.logits.get() {
            Some(logits) => Row::new(filled(self.model.mask(), &row.tokens, logits)),
            None => row.clone(),
        };
        Ok(Tokens {
            rows: x.rows.iter().map(clean).collect(),
            length: x.length,
        })
    }

    fn finish(&self, x: Tokens) -> guidance::Result<Tokens> {
        self.predict_clean(&x, self.grid.len())
    }
}

//! Sampling: from all masks to sequences, step by step.

use super::model::{one_hot, DiscreteDenoiser, MaskedDiffusion, NEVER};
use super::schedule::Step;
use crate::error::check;
use crate::{Error, Result};
use candle_core::{DType, Tensor};
use rayon::prelude::*;
use tensor_core::random::RandomStream;

/// Keeps logarithms finite.
const TINY: f64 = 1e-10;

/// How sequences are sampled.
#[derive(Debug, Clone, PartialEq)]
pub struct SampleConfig {
    /// Steps `S`.
    pub steps: usize,
    /// Asks the network only about rows in which a token has changed. The samples are the same;
    /// refused for a network that sees the noise level.
    pub cache: bool,
    /// Rows that the network sees at once.
    pub chunk: usize,
}

impl Default for SampleConfig {
    fn default() -> Self {
        Self {
            steps: 128,
            cache: true,
            chunk: 512,
        }
    }
}

impl SampleConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`].
    pub fn validate(&self) -> Result<()> {
        check::at_least("SampleConfig::steps", self.steps, 1)?;
        check::at_least("SampleConfig::chunk", self.chunk, 1)
    }
}

/// Sequences and what they cost.
#[derive(Debug, Clone)]
pub struct Sampled {
    /// Tokens `[B, L]` (u32), no masks among them.
    pub tokens: Tensor,
    /// Rows that the network was asked about.
    pub evaluations: usize,
}

/// A batch of tokens on the host, with the network's answers that still hold.
pub(super) struct State {
    pub tokens: Vec<u32>,
    pub length: usize,
    /// Logits of each row, where its tokens have not changed since.
    logits: Vec<Option<Vec<f64>>>,
    pub evaluations: usize,
}

impl State {
    pub fn new(tokens: Vec<u32>, length: usize) -> Self {
        let rows = tokens.len() / length;
        Self {
            tokens,
            length,
            logits: vec![None; rows],
            evaluations: 0,
        }
    }
}

/// What a step made of a sequence.
pub(crate) enum Candidate {
    /// Nothing changed.
    Same,
    /// The next tokens.
    Changed(Vec<u32>),
}

/// A token for a masked position: the real ones weigh `p (a - s)`, the mask `s`. The weights are
/// divided by exponential numbers, and the largest quotient wins. `weights` is room for them.
fn draw(logits: &[f64], step: &Step, uniforms: &[f64], weights: &mut [f64]) -> u32 {
    let real = logits.len() - 1;
    let max = logits[..real]
        .iter()
        .copied()
        .fold(f64::NEG_INFINITY, f64::max);
    for (weight, z) in weights.iter_mut().zip(&logits[..real]) {
        *weight = (z - max).exp();
    }
    let sum: f64 = weights[..real].iter().sum();
    let gain = (step.masked - step.masked_after) / sum;
    let (mut best, mut token) = (f64::NEG_INFINITY, 0);
    for (k, u) in uniforms.iter().enumerate() {
        let weight = match k == real {
            true => step.masked_after,
            false => gain * weights[k],
        };
        let quotient = weight / exponential(*u);
        if quotient > best {
            (best, token) = (quotient, k as u32);
        }
    }
    token
}

/// `-log u`, guarded at both ends.
pub(crate) fn exponential(u: f64) -> f64 {
    (TINY - (u + TINY).ln()).max(1e-30)
}

/// The most likely real token.
fn most_likely(logits: &[f64]) -> u32 {
    let real = &logits[..logits.len() - 1];
    let better = |best: usize, (k, z): (usize, &f64)| if *z > real[best] { k } else { best };
    real.iter().enumerate().fold(0, better) as u32
}

/// A draw of the next tokens of a sequence with known logits; `uniforms` `[L, K + 1]`.
pub(crate) fn next_tokens(
    mask: u32,
    tokens: &[u32],
    logits: &[f64],
    step: &Step,
    uniforms: &[f64],
) -> Candidate {
    let v = mask as usize + 1;
    let rows = logits.chunks(v).zip(uniforms.chunks(v));
    let mut weights = vec![0.0; v];
    let next = |(token, (z, u)): (&u32, (&[f64], &[f64]))| match *token == mask {
        true => draw(z, step, u, &mut weights),
        false => *token,
    };
    let drawn: Vec<u32> = tokens.iter().zip(rows).map(next).collect();
    match drawn == tokens {
        true => Candidate::Same,
        false => Candidate::Changed(drawn),
    }
}

/// A sequence with the most likely tokens in the place of its masks.
pub(crate) fn filled(mask: u32, tokens: &[u32], logits: &[f64]) -> Vec<u32> {
    let places = tokens.iter().zip(logits.chunks(mask as usize + 1));
    let fill = |(token, z): (&u32, &[f64])| match *token == mask {
        true => most_likely(z),
        false => *token,
    };
    places.map(fill).collect()
}

impl<D: DiscreteDenoiser> MaskedDiffusion<D> {
    /// Tokens of given rows.
    fn rows(&self, state: &State, rows: &[usize]) -> Result<Tensor> {
        let l = state.length;
        let tokens: Vec<u32> = rows
            .iter()
            .flat_map(|r| state.tokens[r * l..(r + 1) * l].to_vec())
            .collect();
        Ok(Tensor::from_vec(tokens, (rows.len(), l), &self.device)?)
    }

    /// Makes every row that still has masks know its logits.
    pub(super) fn evaluate(
        &self,
        state: &mut State,
        sigma: f64,
        config: &SampleConfig,
    ) -> Result<()> {
        if config.cache && self.time_conditioning {
            return Err(Error::unsupported(
                "SampleConfig::cache",
                "the network sees the noise level, so that its answer changes at every step",
            ));
        }
        if !config.cache {
            state.logits.fill(None);
        }
        let l = state.length;
        let open = |r: &usize| {
            state.logits[*r].is_none() && state.tokens[r * l..(r + 1) * l].contains(&self.mask())
        };
        let wanted: Vec<usize> = (0..state.logits.len()).filter(open).collect();
        for rows in wanted.chunks(config.chunk) {
            let z = self.host_logits(&self.rows(state, rows)?, sigma)?;
            for (row, z) in rows.iter().zip(z.chunks(l * (self.vocab + 1))) {
                state.logits[*row] = Some(z.to_vec());
            }
            state.evaluations += rows.len();
        }
        Ok(())
    }

    /// One hard step with given uniform numbers `[B, L, K + 1]`.
    pub(super) fn hard_step(
        &self,
        state: &mut State,
        step: &Step,
        uniforms: &[f64],
        config: &SampleConfig,
    ) -> Result<()> {
        self.evaluate(state, step.sigma, config)?;
        self.hard_draw(state, step, uniforms);
        Ok(())
    }

    /// The draws of a hard step, where every row with masks knows its logits.
    pub(super) fn hard_draw(&self, state: &mut State, step: &Step, uniforms: &[f64]) {
        let (l, v, mask) = (state.length, self.vocab + 1, self.mask());
        let rows = state.tokens.par_chunks_mut(l).zip(&mut state.logits);
        rows.zip(uniforms.par_chunks(l * v))
            .for_each(|((tokens, known), u)| {
                let Some(logits) = known else { return };
                if let Candidate::Changed(next) = next_tokens(mask, tokens, logits, step, u) {
                    tokens.copy_from_slice(&next);
                    *known = None;
                }
            });
    }

    /// Takes the network's logits of all rows, from a pass that was made for another purpose.
    pub(super) fn answered(&self, state: &mut State, logits: &Tensor) -> Result<()> {
        let z = checked(logits)?;
        let rows = z.chunks(state.length * (self.vocab + 1));
        for (known, z) in state.logits.iter_mut().zip(rows) {
            *known = Some(z.to_vec());
        }
        state.evaluations += state.logits.len();
        Ok(())
    }

    /// The network's logits for tokens `[B, L]`, on the host.
    pub(crate) fn host_logits(&self, tokens: &Tensor, sigma: f64) -> Result<Vec<f64>> {
        let x = one_hot(tokens, self.vocab + 1, self.dtype)?;
        checked(&self.logits(&x, &vec![sigma; x.dims()[0]], false)?)
    }

    /// Replaces what is still masked by the most likely tokens.
    pub(super) fn fill(&self, state: &mut State, sigma: f64, config: &SampleConfig) -> Result<()> {
        self.evaluate(state, sigma, config)?;
        let rows = state.tokens.chunks_mut(state.length).zip(&state.logits);
        for (tokens, known) in rows {
            if let Some(logits) = known {
                tokens.copy_from_slice(&filled(self.mask(), tokens, logits));
            }
        }
        Ok(())
    }

    /// Where sampling starts: all masks, or what is fixed. `fixed` `[B, L]` holds tokens, and the
    /// mask's number where a token is wanted.
    pub(super) fn start(
        &self,
        batch: usize,
        length: usize,
        fixed: Option<&Tensor>,
    ) -> Result<State> {
        if batch == 0 || length == 0 {
            return Err(Error::shape(
                "samples",
                &[batch, length],
                "a non-empty [B, L]",
            ));
        }
        let Some(fixed) = fixed else {
            return Ok(State::new(vec![self.mask(); batch * length], length));
        };
        if fixed.dims() != [batch, length] {
            return Err(Error::shape(
                "fixed tokens",
                fixed.dims(),
                format!("[{batch}, {length}]"),
            ));
        }
        let tokens = fixed
            .to_dtype(DType::U32)?
            .flatten_all()?
            .to_vec1::<u32>()?;
        match tokens.iter().find(|t| **t > self.mask()) {
            None => Ok(State::new(tokens, length)),
            Some(token) => {
                let expected = format!("at most {}, the mask", self.mask());
                Err(Error::argument("fixed token", token, expected))
            }
        }
    }

    /// Samples sequences. `fixed` `[B, L]` holds tokens that stay, and the mask's number elsewhere.
    /// Each row has its own stream, so that it does not depend on its batch.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`], [`Error::Shape`], [`Error::NonFinite`] for logits that are not
    /// numbers, [`Error::Unsupported`] for a cache with a network that sees the noise level.
    pub fn sample(
        &self,
        batch: usize,
        length: usize,
        fixed: Option<&Tensor>,
        config: &SampleConfig,
        rng: &RandomStream,
    ) -> Result<Sampled> {
        let per_row = length * (self.vocab + 1);
        let mut streams = row_streams(rng, batch);
        self.sample_steps(batch, length, fixed, config, |_| {
            let mut uniforms = vec![0.0; batch * per_row];
            let rows = uniforms.par_chunks_mut(per_row.max(1)).zip(&mut streams);
            rows.for_each(|(out, stream)| stream.fill_uniform(out));
            uniforms
        })
    }

    /// [`sample`](Self::sample) with given uniform numbers `[S, B, L, K + 1]`.
    ///
    /// # Errors
    /// As [`sample`](Self::sample), and [`Error::Shape`] for another count of numbers.
    pub fn sample_with(
        &self,
        batch: usize,
        length: usize,
        config: &SampleConfig,
        uniforms: &[f64],
    ) -> Result<Sampled> {
        let per_step = batch * length * (self.vocab + 1);
        if uniforms.len() != config.steps * per_step {
            let expected = format!("[{}]", config.steps * per_step);
            return Err(Error::shape("uniform numbers", &[uniforms.len()], expected));
        }
        let step = |i: usize| uniforms[i * per_step..(i + 1) * per_step].to_vec();
        self.sample_steps(batch, length, None, config, step)
    }

    fn sample_steps(
        &self,
        batch: usize,
        length: usize,
        fixed: Option<&Tensor>,
        config: &SampleConfig,
        mut uniforms: impl FnMut(usize) -> Vec<f64>,
    ) -> Result<Sampled> {
        config.validate()?;
        self.schedule.validate()?;
        let mut state = self.start(batch, length, fixed)?;
        let grid = self.schedule.steps(config.steps, self.clean_time)?;
        for (i, step) in grid.iter().enumerate() {
            self.hard_step(&mut state, step, &uniforms(i), config)?;
        }
        self.fill(&mut state, self.schedule.total(self.clean_time), config)?;
        Ok(Sampled {
            tokens: Tensor::from_vec(state.tokens, (batch, length), &self.device)?,
            evaluations: state.evaluations,
        })
    }

    /// The unnormalized law of the next tokens `[B, L, K + 1]` of tokens `[B, L]`: `p (a - s)` for the
    /// real tokens and `s` for the mask. Where a position is not masked, `p` is certain about the token
    /// that is there, and a step copies it instead of drawing.
    ///
    /// # Errors
    /// Those of the network.
    pub fn next_law(&self, tokens: &Tensor, step: &Step) -> Result<Tensor> {
        let (b, _) = tokens.dims2()?;
        let x = one_hot(tokens, self.vocab + 1, self.dtype)?;
        let log_p = self.log_p_x0(&x, &vec![step.sigma; b], false)?.detach();
        let real = log_p.narrow(2, 0, self.vocab)?.exp()?;
        let real = real.affine(step.masked - step.masked_after, 0.0)?;
        let stay = log_p
            .narrow(2, self.vocab, 1)?
            .affine(0.0, step.masked_after)?;
        Ok(Tensor::cat(&[&real, &stay], 2)?)
    }
}

/// Logits on the host.
fn checked(logits: &Tensor) -> Result<Vec<f64>> {
    let z = super::drakes::numbers(logits)?;
    match z.iter().any(|z| z.is_nan()) {
        true => Err(Error::non_finite("a logit of the network")),
        false => Ok(z),
    }
}

/// A stream for each row.
pub(super) fn row_streams(rng: &RandomStream, rows: usize) -> Vec<RandomStream> {
    (0..rows)
        .map(|i| rng.split_index("row", i as u64))
        .collect()
}

/// `log(0)` in the place of impossible tokens, as everywhere here.
pub(crate) fn log_or_never(x: f64) -> f64 {
    match x > 0.0 {
        true => x.ln(),
        false => NEVER,
    }
}

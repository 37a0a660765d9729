//! Guidance by the gradient of a reward.

use super::outside;
use crate::error::check;
use crate::masked_diffusion::{
    exponential, filled, log_or_never, one_hot, DifferentiableReward, DiscreteDenoiser,
    MaskedDiffusion, Step,
};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor, Var};
use guidance::svdd::{Batch, ReverseKernel, Value};
use tensor_core::random::RandomStream;

/// Sequences of one length, each with what its guided draws must be weighed by.
#[derive(Debug, Clone)]
pub struct Weighed {
    tokens: Vec<Vec<u32>>,
    /// `sum log q - log q~` over the draws so far.
    corrections: Vec<f64>,
}

impl Weighed {
    /// The sequences.
    pub fn sequences(&self) -> &[Vec<u32>] {
        &self.tokens
    }

    /// For each sequence the logarithm of how likely the model was to draw it as the guidance did,
    /// less that of the guidance itself.
    pub fn corrections(&self) -> &[f64] {
        &self.corrections
    }
}

impl Batch for Weighed {
    fn rows(&self) -> guidance::Result<usize> {
        Ok(self.tokens.len())
    }

    fn take(&self, rows: &[u32]) -> guidance::Result<Self> {
        let mut out = Self {
            tokens: vec![],
            corrections: vec![],
        };
        for k in rows {
            let Some(tokens) = self.tokens.get(*k as usize) else {
                let expected = format!("below {}", self.tokens.len());
                return Err(outside(Error::argument("row", k, expected)));
            };
            out.tokens.push(tokens.clone());
            out.corrections.push(self.corrections[*k as usize]);
        }
        Ok(out)
    }

    fn concat(parts: &[Self]) -> guidance::Result<Self> {
        Ok(Self {
            tokens: parts.iter().flat_map(|p| p.tokens.clone()).collect(),
            corrections: parts.iter().flat_map(|p| p.corrections.clone()).collect(),
        })
    }
}

/// The reverse process of a masked diffusion model, pushed along the gradient of a reward at every
/// step: classifier guidance, where [`guidance::svdd::sample`] draws from it. With [`Twisted`] as the
/// value of [`guidance::svdd::SmcSampler`] it is twisted sequential Monte Carlo (TDS), whose weights
/// make up for what the push distorts. Both need a reward that can be differentiated, and neither
/// trains anything.
///
/// ```text
/// g    = d r(p(x)) / d x                 p(x): the law of clean tokens given one-hot tokens x
/// q~_k ~ q_k exp(scale (g_k - g_mask))   q: real tokens p (a - s), mask s
/// w    = exp((r_after - r_before) / alpha) prod q / q~
/// ```
///
/// The authors of DRAKES, whose baselines these are, take the gradient of the mean over a batch of
/// `B`: their scale of 1000 is `1000 / B` here, where a row does not depend on its batch. Their
/// weights leave out what normalizes `q` and `q~`; these do not.
///
/// ```
/// # extern crate guidance as thalweg_guidance;
/// use candle_core::{DType, Device, Tensor};
/// use thalweg_guidance::svdd::{sample, SmcSampler};
/// use thalweg_sequence_design::masked_diffusion::{DiscreteDenoiser, MaskedDiffusion};
/// use thalweg_sequence_design::svdd::{GradientKernel, Twisted};
/// use thalweg_sequence_design::{RandomStream, Result};
///
/// // Your network in the place of this one, in which a letter pulls its neighbors towards itself.
/// struct Alike;
/// impl DiscreteDenoiser for Alike {
///     fn logits(&self, x: &Tensor, _: &Tensor, _: bool) -> Result<Tensor> {
///         Ok(x.broadcast_add(&x.mean_keepdim(1)?)?)
///     }
/// }
/// let model = MaskedDiffusion::new(Alike, 4, DType::F32, &Device::Cpu)?;
/// // A differentiable reward: how much of the sequence is letter 2.
/// let reward = |x: &Tensor| -> Result<Tensor> { Ok(x.narrow(2, 2, 1)?.sum(2)?.sum(1)?) };
/// let kernel = GradientKernel::new(&model, &reward, 4.0, 8, 16)?;
/// let rng = RandomStream::new(1);
/// let guided = sample(&kernel, 16, &rng)?;
/// let weights = Twisted { kernel: &kernel, alpha: 1.0 };
/// let smc = SmcSampler { kernel: &kernel, value: &weights, alpha: 1.0, threshold: 0.5 };
/// let twisted = smc.sample(16, &rng)?.states;
/// let count = |all: &[Vec<u32>]| all.iter().flatten().filter(|t| **t == 2).count();
/// assert!(count(guided.sequences()) > 32 && count(twisted.sequences()) > 32);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct GradientKernel<'a, D> {
    model: &'a MaskedDiffusion<D>,
    reward: &'a dyn DifferentiableReward,
    scale: f64,
    length: usize,
    grid: Vec<Step>,
    chunk: usize,
}

/// What the model and the reward say of a position: log-probabilities of all tokens, and slopes.
struct Slopes {
    /// `[rows, L, K + 1]`.
    log_p: Vec<f64>,
    /// The same shape.
    slopes: Vec<f64>,
}

impl<'a, D: DiscreteDenoiser> GradientKernel<'a, D> {
    /// Sequences of `length` tokens in `steps` steps, pushed by `scale` times the gradient.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for a scale that is no number; [`Error::InvalidArgument`] for no token
    /// or no step.
    pub fn new(
        model: &'a MaskedDiffusion<D>,
        reward: &'a dyn DifferentiableReward,
        scale: f64,
        length: usize,
        steps: usize,
    ) -> Result<Self> {
        let finite = scale.is_finite();
        check::require(finite, "GradientKernel::scale", scale, "a finite number")?;
        if length == 0 {
            return Err(Error::argument("length", length, "at least 1"));
        }
        model.schedule.validate()?;
        Ok(Self {
            model,
            reward,
            scale,
            length,
            grid: model.schedule.steps(steps, model.clean_time)?,
            chunk: 256,
        })
    }

    fn sigma(&self, done: usize) -> f64 {
        match self.grid.get(done) {
            Some(step) => step.sigma,
            None => self.model.schedule.total(self.model.clean_time),
        }
    }

    fn hot(&self, tokens: &[Vec<u32>]) -> Result<Tensor> {
        let tokens = Tensor::new(tokens.to_vec(), &self.model.device)?;
        one_hot(&tokens, self.model.vocab + 1, self.model.dtype)
    }

    /// Rewards `[B]` of relaxed sequences.
    fn scored(&self, p: &Tensor) -> Result<Tensor> {
        let score = self.reward.score(&p.to_dtype(self.model.dtype)?)?;
        let rows = p.dims()[0];
        match score.dims() == [rows] {
            true => Ok(score),
            false => Err(Error::shape(
                "the rewards",
                score.dims(),
                format!("[{rows}]"),
            )),
        }
    }

    fn slopes(&self, tokens: &[Vec<u32>], sigma: f64) -> Result<Slopes> {
        let x = Var::from_tensor(&self.hot(tokens)?)?;
        let log_p = self
            .model
            .log_p_x0(x.as_tensor(), &vec![sigma; tokens.len()], false)?;
        let p = log_p.narrow(2, 0, self.model.vocab)?.exp()?;
        let grads = self.scored(&p)?.sum_all()?.backward()?;
        let slopes = grads.get(&x).ok_or_else(|| {
            let reason =
                "the first layers of network and reward must be products with one-hot numbers";
            Error::unsupported("guidance without a gradient in the tokens", reason)
        })?;
        let host = |t: &Tensor| -> Result<Vec<f64>> {
            let values = t
                .detach()
                .to_dtype(DType::F64)?
                .flatten_all()?
                .to_vec1::<f64>()?;
            match values.iter().any(|v| v.is_nan()) {
                true => Err(Error::non_finite(
                    "a log-probability or a slope of the reward",
                )),
                false => Ok(values),
            }
        };
        Ok(Slopes {
            log_p: host(&log_p)?,
            slopes: host(slopes)?,
        })
    }

    /// A token for a masked position, and `log q - log q~` of it.
    fn draw(&self, log_p: &[f64], slopes: &[f64], step: &Step, uniforms: &[f64]) -> (u32, f64) {
        let mask = self.model.vocab;
        let tilt = |k: usize| self.scale * (slopes[k] - slopes[mask]);
        let weight = |k: usize| match k == mask {
            true => log_or_never(step.masked_after),
            false => log_p[k] + log_or_never(step.masked - step.masked_after) + tilt(k),
        };
        let weights: Vec<f64> = (0..=mask).map(weight).collect();
        let top = weights.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let total = top + weights.iter().map(|w| (w - top).exp()).sum::<f64>().ln();
        let (mut best, mut token) = (f64::NEG_INFINITY, 0);
        for (k, (w, u)) in weights.iter().zip(uniforms).enumerate() {
            let quotient = (w - top).exp() / exponential(*u);
            if quotient > best {
                (best, token) = (quotient, k);
            }
        }
        let tilted = if token == mask { 0.0 } else { tilt(token) };
        (token as u32, total - step.masked.ln() - tilted)
    }

    fn proposed(
        &self,
        x: &Weighed,
        step: usize,
        m: usize,
        streams: &mut [RandomStream],
    ) -> Result<Weighed> {
        let (mask, width) = (self.model.mask(), self.model.vocab + 1);
        let mut out = Weighed {
            tokens: vec![],
            corrections: vec![],
        };
        let mut u = vec![0.0; self.length * width];
        let mut from = 0;
        for rows in x.tokens.chunks(self.chunk) {
            let known = self.slopes(rows, self.sigma(step))?;
            for (i, tokens) in rows.iter().enumerate() {
                for _ in 0..m {
                    streams[from + i].fill_uniform(&mut u);
                    let mut correction = x.corrections[from + i];
                    let mut next = tokens.clone();
                    for (l, token) in next.iter_mut().enumerate().filter(|(_, t)| **t == mask) {
                        let at = (i * self.length + l) * width;
                        let (log_p, slopes) =
                            (&known.log_p[at..][..width], &known.slopes[at..][..width]);
                        let u = &u[l * width..][..width];
                        let (drawn, gain) = self.draw(log_p, slopes, &self.grid[step], u);
                        (*token, correction) = (drawn, correction + gain);
                    }
                    out.tokens.push(next);
                    out.corrections.push(correction);
                }
            }
            from += rows.len();
        }
        Ok(out)
    }

    fn clean(&self, x: &Weighed, done: usize) -> Result<Weighed> {
        let mut out = x.clone();
        let size = self.length * (self.model.vocab + 1);
        for rows in out.tokens.chunks_mut(self.chunk) {
            let tokens = Tensor::new(rows.to_vec(), &self.model.device)?;
            let logits = self.model.host_logits(&tokens, self.sigma(done))?;
            for (tokens, logits) in rows.iter_mut().zip(logits.chunks(size)) {
                *tokens = filled(self.model.mask(), tokens, logits);
            }
        }
        Ok(out)
    }

    /// The rewards of what the model expects of states: its law of clean tokens, and of finished ones
    /// themselves.
    fn expected(&self, x: &Weighed, done: usize) -> Result<Vec<f64>> {
        let mut out = vec![];
        let finished = done == self.grid.len();
        let tokens = if finished {
            self.clean(x, done)?.tokens
        } else {
            x.tokens.clone()
        };
        for rows in tokens.chunks(self.chunk) {
            let hot = self.hot(rows)?;
            let sigma = vec![self.sigma(done); rows.len()];
            let p = match finished {
                true => hot,
                false => self.model.log_p_x0(&hot, &sigma, false)?.exp()?,
            };
            let score = self.scored(&p.narrow(2, 0, self.model.vocab)?.contiguous()?)?;
            out.extend(score.detach().to_dtype(DType::F64)?.to_vec1::<f64>()?);
        }
        Ok(out)
    }
}

impl<D: DiscreteDenoiser> ReverseKernel for GradientKernel<'_, D> {
    type State = Weighed;

    fn steps(&self) -> usize {
        self.grid.len()
    }

    fn init(&self, streams: &mut [RandomStream]) -> guidance::Result<Weighed> {
        Ok(Weighed {
            tokens: vec![vec![self.model.mask(); self.length]; streams.len()],
            corrections: vec![0.0; streams.len()],
        })
    }

    fn propose(
        &self,
        x: &Weighed,
        step: usize,
        m: usize,
        streams: &mut [RandomStream],
    ) -> guidance::Result<Weighed> {
        self.proposed(x, step, m, streams).map_err(outside)
    }

    fn predict_clean(&self, x: &Weighed, done: usize) -> guidance::Result<Weighed> {
        self.clean(x, done).map_err(outside)
    }

    fn finish(&self, x: Weighed) -> guidance::Result<Weighed> {
        self.predict_clean(&x, self.grid.len())
    }
}

/// The value that makes [`guidance::svdd::SmcSampler`] over a [`GradientKernel`] twisted: the reward
/// of what the model expects, and what the guided draws must be weighed by. The sampler must have the
/// same `alpha`.
pub struct Twisted<'a, D> {
    /// The kernel.
    pub kernel: &'a GradientKernel<'a, D>,
    /// The temperature, in units of the reward.
    pub alpha: f64,
}

impl<D: DiscreteDenoiser> Value<Weighed> for Twisted<'_, D> {
    fn value(&self, x: &Weighed, done: usize) -> guidance::Result<Tensor> {
        let rewards = self.kernel.expected(x, done).map_err(outside)?;
        let pairs = rewards.iter().zip(&x.corrections);
        let values: Vec<f64> = pairs.map(|(r, c)| r + self.alpha * c).collect();
        Ok(Tensor::new(values, &Device::Cpu)?)
    }

    fn reward_calls(&self, rows: usize) -> usize {
        rows
    }
}

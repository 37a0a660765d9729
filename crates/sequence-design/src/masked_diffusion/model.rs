//! The model: a network behind one method, its conditional law of clean tokens, its training loss
//! and its likelihood.

use super::NoiseSchedule;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use tensor_core::random::RandomStream;

/// Far below every logit, and what an impossible token's log-probability is.
pub(super) const NEVER: f64 = -1e6;

/// Any network that guesses clean tokens from masked ones.
///
/// It must take *relaxed* one-hot tokens: its first layer is a product or a convolution with the
/// one-hot numbers, never a look-up by index.
pub trait DiscreteDenoiser {
    /// Logits `[B, L, K + 1]` for tokens `x` `[B, L, K + 1]` (one-hot, the last for the mask, or a
    /// relaxation) at noise levels `sigma` `[B]`. `train` switches dropout on.
    ///
    /// # Errors
    /// The network's own.
    fn logits(&self, x: &Tensor, sigma: &Tensor, train: bool) -> Result<Tensor>;
}

impl<D: DiscreteDenoiser + ?Sized> DiscreteDenoiser for &D {
    fn logits(&self, x: &Tensor, sigma: &Tensor, train: bool) -> Result<Tensor> {
        (**self).logits(x, sigma, train)
    }
}

/// Classifier-free guidance of two networks (or of one under two conditions):
/// `(1 + w) conditional - w unconditional` on the logits.
#[derive(Debug, Clone)]
pub struct ClassifierFree<C, U> {
    /// The network that sees the condition.
    pub conditional: C,
    /// The network that does not.
    pub unconditional: U,
    /// The weight `w`; 0 is the conditional network alone.
    pub weight: f64,
}

impl<C: DiscreteDenoiser, U: DiscreteDenoiser> DiscreteDenoiser for ClassifierFree<C, U> {
    fn logits(&self, x: &Tensor, sigma: &Tensor, train: bool) -> Result<Tensor> {
        let with = self.conditional.logits(x, sigma, train)?;
        let without = self.unconditional.logits(x, sigma, train)?;
        Ok((with.affine(1.0 + self.weight, 0.0)? - without.affine(self.weight, 0.0)?)?)
    }
}

/// Masked (absorbing-state) diffusion over sequences of `K` tokens; token `K` is the mask.
#[derive(Debug, Clone)]
pub struct MaskedDiffusion<D> {
    /// The network.
    pub denoiser: D,
    /// Real tokens `K`.
    pub vocab: usize,
    /// The noise.
    pub schedule: NoiseSchedule,
    /// Whether the network is told the noise level; otherwise it sees zeros, which lets the sampler
    /// reuse its answer while no token changes.
    pub time_conditioning: bool,
    /// The time at which the last step of a sampler ends.
    pub clean_time: f64,
    /// The earliest time of training.
    pub earliest_time: f64,
    /// Dtype of the network.
    pub dtype: DType,
    /// Device of the network.
    pub device: Device,
}

/// One-hot tokens `[.., classes]` of indices `[..]` below `classes`.
///
/// # Errors
/// [`Error::InvalidArgument`] for an index out of range.
pub fn one_hot(tokens: &Tensor, classes: usize, dtype: DType) -> Result<Tensor> {
    let flat = tokens
        .to_dtype(DType::U32)?
        .flatten_all()?
        .to_vec1::<u32>()?;
    let mut out = vec![0f32; flat.len() * classes];
    for (token, row) in flat.iter().zip(out.chunks_mut(classes.max(1))) {
        match row.get_mut(*token as usize) {
            Some(one) => *one = 1.0,
            None => {
                let expected = format!("below {classes}");
                return Err(Error::argument("token", token, expected));
            }
        }
    }
    let mut dims = tokens.dims().to_vec();
    dims.push(classes);
    Ok(Tensor::from_vec(out, dims, tokens.device())?.to_dtype(dtype)?)
}

impl<D: DiscreteDenoiser> MaskedDiffusion<D> {
    /// A model with the log-linear schedule whose network does not see the noise level.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for fewer than two tokens.
    pub fn new(denoiser: D, vocab: usize, dtype: DType, device: &Device) -> Result<Self> {
        if vocab < 2 {
            return Err(Error::config("MaskedDiffusion::vocab", vocab, "at least 2"));
        }
        Ok(Self {
            denoiser,
            vocab,
            schedule: NoiseSchedule::default(),
            time_conditioning: false,
            clean_time: 1e-5,
            earliest_time: 1e-3,
            dtype,
            device: device.clone(),
        })
    }

    /// The number of the mask token.
    pub fn mask(&self) -> u32 {
        self.vocab as u32
    }

    /// The network's logits for `x` `[B, L, K + 1]`, in f32 at least, checked.
    pub(super) fn logits(&self, x: &Tensor, sigma: &[f64], train: bool) -> Result<Tensor> {
        let (b, l, v) = x.dims3()?;
        if b == 0 || l == 0 || v != self.vocab + 1 {
            let expected = format!("a non-empty [B, L, {}]", self.vocab + 1);
            return Err(Error::shape("tokens", x.dims(), expected));
        }
        let seen = match self.time_conditioning {
            true => sigma.to_vec(),
            false => vec![0.0; b],
        };
        let seen = Tensor::from_vec(seen, b, &self.device)?.to_dtype(self.dtype)?;
        let z = self
            .denoiser
            .logits(&x.to_dtype(self.dtype)?, &seen, train)?;
        if z.dims() != x.dims() {
            return Err(Error::shape(
                "the network's logits",
                z.dims(),
                format!("{:?}", x.dims()),
            ));
        }
        // The constants of what follows overflow 16-bit floats.
        Ok(match z.dtype() {
            DType::F16 | DType::BF16 => z.to_dtype(DType::F32)?,
            _ => z,
        })
    }

    /// `log p(x0 | x)` of each position, `[B, L, K + 1]`: where the largest entry of `x` is the mask,
    /// the network's law over the real tokens; elsewhere certainty about the token that is there (a
    /// constant, without gradient).
    ///
    /// # Errors
    /// [`Error::Shape`]; those of the network.
    pub fn log_p_x0(&self, x: &Tensor, sigma: &[f64], train: bool) -> Result<Tensor> {
        let z = self.logits(x, sigma, train)?;
        self.substituted(&z, x)
    }

    /// The substitution parameterization: the mask is never an answer, and what is not masked stays.
    pub(super) fn substituted(&self, z: &Tensor, x: &Tensor) -> Result<Tensor> {
        let v = self.vocab + 1;
        let mut low = vec![0.0; v];
        low[self.vocab] = NEVER;
        let low = Tensor::from_vec(low, v, z.device())?.to_dtype(z.dtype())?;
        let log_p = nn::softmax::log_softmax(&z.broadcast_add(&low)?, 2)?;
        let here = x.detach().argmax(2)?;
        let certain = one_hot(&here, v, z.dtype())?.affine(-NEVER, NEVER)?;
        let masked = here
            .eq(self.mask())?
            .unsqueeze(2)?
            .broadcast_as(z.shape())?;
        Ok(masked.where_cond(&log_p, &certain)?)
    }

    /// Masks tokens `[B, L]` each with its row's probability; `uniforms` `[B L]` decide.
    pub(super) fn noisy(
        &self,
        tokens: &[u32],
        length: usize,
        chance: &[f64],
        uniforms: &[f64],
    ) -> Vec<u32> {
        let place = tokens.iter().zip(uniforms).enumerate();
        place
            .map(|(i, (token, u))| {
                if *u < chance[i / length] {
                    self.mask()
                } else {
                    *token
                }
            })
            .collect()
    }

    fn clean(&self, x0: &Tensor) -> Result<(Vec<u32>, usize, usize)> {
        let (b, l) = x0.dims2()?;
        if b == 0 || l == 0 {
            return Err(Error::shape("sequences", x0.dims(), "a non-empty [B, L]"));
        }
        let tokens = x0.to_dtype(DType::U32)?.flatten_all()?.to_vec1::<u32>()?;
        if let Some(token) = tokens.iter().find(|t| **t >= self.mask()) {
            let expected = format!("below {}, the mask not among them", self.mask());
            return Err(Error::argument("token", token, expected));
        }
        Ok((tokens, b, l))
    }

    /// [`nll_with`](Self::nll_with) on random times and masks.
    ///
    /// # Errors
    /// As [`nll_with`](Self::nll_with).
    pub fn nll(
        &self,
        x0: &Tensor,
        attention: Option<&Tensor>,
        rng: &mut RandomStream,
    ) -> Result<Nll> {
        let (b, l) = x0.dims2()?;
        let (mut times, mut masks) = (vec![0.0; b], vec![0.0; b * l]);
        rng.fill_uniform(&mut times);
        rng.fill_uniform(&mut masks);
        self.nll_with(x0, attention, &times, &masks)
    }

    /// The continuous-time bound on the negative log-likelihood of tokens `[B, L]`, with its graph:
    /// a time per row, stratified over the batch, a random mask, and
    /// `-log p(x0 | x_t) sigma' / (e^sigma - 1)` at masked positions. `attention` `[B, L]` weighs
    /// positions (0 for padding).
    ///
    /// # Errors
    /// [`Error::Shape`] and [`Error::InvalidArgument`] for tokens that do not fit or an attention of
    /// zeros; those of the network.
    pub fn nll_with(
        &self,
        x0: &Tensor,
        attention: Option<&Tensor>,
        uniform_times: &[f64],
        uniform_masks: &[f64],
    ) -> Result<Nll> {
        let earliest = self.earliest_time;
        let (tokens, b, l) = self.clean(x0)?;
        if uniform_times.len() != b || uniform_masks.len() != b * l {
            let got = [uniform_times.len(), uniform_masks.len()];
            return Err(Error::shape(
                "uniform numbers",
                &got,
                format!("[{b}] and [{}]", b * l),
            ));
        }
        let stratum = |(i, u): (usize, &f64)| (u / b as f64 + i as f64 / b as f64).fract();
        let times: Vec<f64> = uniform_times.iter().enumerate().map(stratum).collect();
        let times: Vec<f64> = times
            .iter()
            .map(|t| (1.0 - earliest) * t + earliest)
            .collect();
        let chance: Vec<f64> = times
            .iter()
            .map(|t| self.schedule.move_chance(*t))
            .collect();
        let sigma: Vec<f64> = times.iter().map(|t| self.schedule.total(*t)).collect();
        let noisy = self.noisy(&tokens, l, &chance, uniform_masks);
        let x = Tensor::from_vec(noisy, (b, l), &self.device)?;
        let x = one_hot(&x, self.vocab + 1, self.dtype)?;
        let log_p = self.log_p_x0(&x, &sigma, true)?;
        let index = Tensor::from_vec(tokens, (b, l, 1), &self.device)?;
        let picked = log_p.gather(&index, 2)?.squeeze(2)?;
        let weights: Vec<f64> = times.iter().map(|t| -self.schedule.weight(*t)).collect();
        let weights = Tensor::from_vec(weights, (b, 1), &self.device)?.to_dtype(picked.dtype())?;
        let tokens = picked.broadcast_mul(&weights)?;
        let loss = match attention {
            None => tokens.mean_all()?,
            Some(attention) => {
                let attention = attention.to_dtype(tokens.dtype())?;
                let total = attention.sum_all()?;
                if total.to_dtype(DType::F64)?.to_scalar::<f64>()? <= 0.0 {
                    return Err(Error::argument("attention", 0, "a positive sum"));
                }
                (&tokens * &attention)?.sum_all()?.div(&total)?
            }
        };
        Ok(Nll {
            times,
            tokens,
            loss,
        })
    }

    /// A Monte-Carlo estimate of `log p(x0)` of tokens `[B, L]`, in nats, one number a row: the mean over
    /// `samples` of `sum_i sum_l log p(x0_l | x_t) (m(t_i) - m(t_{i+1})) / m(t_i)` over masked
    /// positions, freshly masked at each of `steps` times.
    ///
    /// # Errors
    /// As [`nll_with`](Self::nll_with).
    pub fn log_likelihood(
        &self,
        x0: &Tensor,
        steps: usize,
        samples: usize,
        rng: &mut RandomStream,
    ) -> Result<Vec<f64>> {
        if samples == 0 {
            return Err(Error::argument("samples", samples, "at least 1"));
        }
        let mut sum = vec![0.0; x0.dims2()?.0];
        for _ in 0..samples {
            let mut uniforms = vec![0.0; steps * x0.elem_count()];
            rng.fill_uniform(&mut uniforms);
            let one = self.log_likelihood_with(x0, steps, &uniforms)?;
            sum.iter_mut()
                .zip(one)
                .for_each(|(s, x)| *s += x / samples as f64);
        }
        Ok(sum)
    }

    /// One sample of [`log_likelihood`](Self::log_likelihood) with given masks `[steps B L]`.
    ///
    /// # Errors
    /// As [`nll_with`](Self::nll_with).
    pub fn log_likelihood_with(
        &self,
        x0: &Tensor,
        steps: usize,
        uniforms: &[f64],
    ) -> Result<Vec<f64>> {
        let (tokens, b, l) = self.clean(x0)?;
        if uniforms.len() != steps * b * l {
            return Err(Error::shape(
                "uniform numbers",
                &[uniforms.len()],
                format!("[{}]", steps * b * l),
            ));
        }
        let mut out = vec![0.0; b];
        let grid = self.schedule.steps(steps, self.clean_time)?;
        for (step, u) in grid.iter().zip(uniforms.chunks(b * l)) {
            let noisy = self.noisy(&tokens, l, &vec![step.masked; b], u);
            let x = Tensor::from_slice(&noisy, (b, l), &self.device)?;
            let x = one_hot(&x, self.vocab + 1, self.dtype)?;
            let log_p = self.log_p_x0(&x, &vec![step.sigma; b], false)?;
            let index = Tensor::from_slice(&tokens, (b, l, 1), &self.device)?;
            let rows = log_p.gather(&index, 2)?.squeeze(2)?.sum(1)?;
            let rows = rows.to_dtype(DType::F64)?.to_vec1::<f64>()?;
            let weight = (step.masked - step.masked_after) / step.masked;
            out.iter_mut().zip(rows).for_each(|(o, r)| *o += weight * r);
        }
        Ok(out)
    }
}

/// What [`MaskedDiffusion::nll_with`] gives.
#[derive(Debug, Clone)]
pub struct Nll {
    /// The time of each row.
    pub times: Vec<f64>,
    /// The loss of each position `[B, L]`.
    pub tokens: Tensor,
    /// The mean over positions: what to minimize.
    pub loss: Tensor,
}

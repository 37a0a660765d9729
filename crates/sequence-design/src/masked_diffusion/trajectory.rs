//! A denoising trajectory whose last steps are relaxed, so that a reward's gradient reaches the
//! network; and the divergence of two models along it.

use super::model::{one_hot, DiscreteDenoiser, MaskedDiffusion};
use super::sample::{exponential, log_or_never, SampleConfig, State};
use super::schedule::Step;
use crate::{Error, Result};
use candle_core::{DType, Tensor};
use nn::activation::Activation;

/// Which divergence from the frozen model is penalized.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KlForm {
    /// The exact divergence between the two chains given the visited states,
    /// `sum_i sum_l w_il (a_i - s_i) / a_i sum_k p_k (log p_k - log p_old_k)` with the mask weight
    /// `w` of the visited state.
    #[default]
    Path,
    /// The form of the authors' code, `sum_i 1 / a_i sum_{l, k} c_il x_ik (-p_k + p_old_k + p_k (log
    /// p_k - log p_old_k))`: zero on every hard step, and without the factor of the step's size, so
    /// that weights do not carry over from one form to the other.
    Released,
    /// None.
    None,
}

/// How relaxed steps are taken.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Relaxation {
    /// Steps `S`.
    pub steps: usize,
    /// The last `n` of them are relaxed.
    pub truncate_steps: usize,
    /// Temperature of the Gumbel softmax.
    pub temperature: f64,
    /// Replaces the copy weight `1 - x_mask` of relaxed steps by `sigmoid((1 - x_mask) / temp)`.
    pub copy_flag_temp: Option<f64>,
}

/// Uniform numbers as `-log(exponential)`: a Gumbel draw.
pub(super) fn gumbel(uniforms: &[f64]) -> Vec<f64> {
    uniforms.iter().map(|u| -exponential(*u).ln()).collect()
}

/// What a step needs to know of the state it starts from.
pub(super) struct Visited {
    /// The state `[B, L, K + 1]`.
    pub x: Tensor,
    /// How much of each position is kept, `[B, L, 1]`.
    pub copy: Tensor,
    /// The model's logits there.
    pub logits: Tensor,
    /// The model's law there.
    pub log_p: Tensor,
}

impl<D: DiscreteDenoiser> MaskedDiffusion<D> {
    /// How much of each position of a state `[B, L, K + 1]` a step keeps, `[B, L, 1]`: what is not
    /// mask, or in relaxed steps its sigmoid.
    pub(crate) fn copy_weights(&self, x: &Tensor, soft: Option<&Relaxation>) -> Result<Tensor> {
        let kept = x.narrow(2, self.vocab, 1)?.affine(-1.0, 1.0)?;
        match soft.and_then(|r| r.copy_flag_temp) {
            Some(temp) => Ok(Activation::Sigmoid.of(&kept.affine(1.0 / temp, 0.0)?)?),
            None => Ok(kept),
        }
    }

    /// The state's law and copy weights, with the graph; `train` switches dropout on.
    pub(super) fn visit(
        &self,
        x: Tensor,
        step: &Step,
        soft: Option<&Relaxation>,
        train: bool,
    ) -> Result<Visited> {
        let b = x.dims()[0];
        let logits = self.logits(&x, &vec![step.sigma; b], train)?;
        let log_p = self.substituted(&logits, &x)?;
        let x = x.to_dtype(log_p.dtype())?;
        let copy = self.copy_weights(&x, soft)?;
        Ok(Visited {
            x,
            copy,
            logits,
            log_p,
        })
    }

    /// One relaxed step: a Gumbel softmax over the next tokens, mixed with what is kept.
    pub(super) fn soft_step(
        &self,
        at: &Visited,
        step: &Step,
        relaxation: &Relaxation,
        gumbel: &Tensor,
    ) -> Result<Tensor> {
        let gain = log_or_never(step.masked - step.masked_after);
        let real = at.log_p.narrow(2, 0, self.vocab)?.affine(1.0, gain)?;
        let stay = at.log_p.narrow(2, self.vocab, 1)?;
        let stay = stay.detach().affine(0.0, log_or_never(step.masked_after))?;
        let scores = (Tensor::cat(&[&real, &stay], 2)? + gumbel)?;
        let y = nn::softmax::softmax(&scores.affine(1.0 / relaxation.temperature, 0.0)?, 2)?;
        let fresh = at.copy.affine(-1.0, 1.0)?;
        Ok((at.x.broadcast_mul(&at.copy)? + y.broadcast_mul(&fresh)?)?)
    }

    /// The divergence at one state, `[B]`.
    pub(super) fn divergence<F: DiscreteDenoiser>(
        &self,
        frozen: &MaskedDiffusion<F>,
        at: &Visited,
        step: &Step,
        form: KlForm,
    ) -> Result<Tensor> {
        let b = at.x.dims()[0];
        let (p, log_p) = (at.log_p.exp()?, &at.log_p);
        if form == KlForm::None {
            return Ok(Tensor::zeros(b, p.dtype(), &self.device)?);
        }
        let old = frozen.log_p_x0(&at.x, &vec![step.sigma; b], false)?;
        // On hard states nothing of the frozen model is differentiated, whatever it is made of.
        let old = match at.x.track_op() {
            true => old,
            false => old.detach(),
        };
        let gap = (&p * (log_p - &old)?)?;
        let (weights, inner, factor) = match form {
            KlForm::Path | KlForm::None => {
                let masked = at.x.narrow(2, self.vocab, 1)?;
                (masked, gap, (step.masked - step.masked_after) / step.masked)
            }
            KlForm::Released => {
                let inner = ((old.exp()? - &p)? + gap)?;
                let real = self.vocab;
                let inner = (inner.narrow(2, 0, real)? * at.x.narrow(2, 0, real)?)?;
                (at.copy.clone(), inner, 1.0 / step.masked)
            }
        };
        let sum = inner.broadcast_mul(&weights)?.sum(2)?.sum(1)?;
        Ok(sum.affine(factor, 0.0)?)
    }

    /// The states before each step of a trajectory with given uniform numbers `[S, B, L, K + 1]`, and
    /// the one after the last, without a graph.
    ///
    /// # Errors
    /// [`Error::Shape`] for another count of numbers; those of the network.
    pub fn relaxed_trajectory_with(
        &self,
        batch: usize,
        length: usize,
        relaxation: &Relaxation,
        uniforms: &[f64],
    ) -> Result<Vec<Tensor>> {
        let per_step = batch * length * (self.vocab + 1);
        if uniforms.len() != relaxation.steps * per_step {
            let expected = format!("[{}]", relaxation.steps * per_step);
            return Err(Error::shape("uniform numbers", &[uniforms.len()], expected));
        }
        let grid = self.schedule.steps(relaxation.steps, self.clean_time)?;
        let (mut states, mut state) = (vec![], self.start(batch, length, None)?);
        let hard = relaxation.steps.saturating_sub(relaxation.truncate_steps);
        let config = SampleConfig {
            cache: !self.time_conditioning,
            ..SampleConfig::default()
        };
        for (step, u) in grid.iter().zip(uniforms.chunks(per_step)).take(hard) {
            states.push(self.as_input(&state)?);
            self.hard_step(&mut state, step, u, &config)?;
        }
        let mut x = self.as_input(&state)?;
        for (step, u) in grid.iter().zip(uniforms.chunks(per_step)).skip(hard) {
            states.push(x.clone());
            let at = self.visit(x, step, Some(relaxation), false)?;
            let noise = self.noise(u, at.x.dims(), at.x.dtype())?;
            x = self.soft_step(&at, step, relaxation, &noise)?.detach();
        }
        states.push(x);
        Ok(states)
    }

    /// The exact divergence of this model's sampling chain from another's, in nats: a Monte-Carlo
    /// estimate over the trajectories of given uniform numbers `[S, B, L, K + 1]`, hard at every step.
    ///
    /// # Errors
    /// [`Error::Shape`] for another count of numbers; those of the networks.
    pub fn path_kl<F: DiscreteDenoiser>(
        &self,
        other: &MaskedDiffusion<F>,
        (batch, length): (usize, usize),
        steps: usize,
        uniforms: &[f64],
    ) -> Result<f64> {
        let per_step = batch * length * (self.vocab + 1);
        if uniforms.len() != steps * per_step || per_step == 0 {
            let expected = format!("[{}], not empty", steps * per_step);
            return Err(Error::shape("uniform numbers", &[uniforms.len()], expected));
        }
        let (mut state, mut sum) = (self.start(batch, length, None)?, 0.0);
        let grid = self.schedule.steps(steps, self.clean_time)?;
        for (step, u) in grid.iter().zip(uniforms.chunks(per_step)) {
            let at = self.visit(self.as_input(&state)?, step, None, false)?;
            let kl = self.divergence(other, &at, step, KlForm::Path)?;
            sum += kl
                .detach()
                .mean_all()?
                .to_dtype(DType::F64)?
                .to_scalar::<f64>()?;
            self.answered(&mut state, &at.logits)?;
            self.hard_draw(&mut state, step, u);
        }
        Ok(sum)
    }

    pub(super) fn noise(&self, uniforms: &[f64], dims: &[usize], dtype: DType) -> Result<Tensor> {
        Ok(Tensor::from_vec(gumbel(uniforms), dims, &self.device)?.to_dtype(dtype)?)
    }

    /// Tokens as the network's input.
    pub(super) fn as_input(&self, state: &State) -> Result<Tensor> {
        let shape = (state.tokens.len() / state.length, state.length);
        let tokens = Tensor::from_slice(&state.tokens, shape, &self.device)?;
        one_hot(&tokens, self.vocab + 1, self.dtype)
    }
}

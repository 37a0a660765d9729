//! The surrogates as functions of the model's outputs.

use super::{Divergence, Normalization};
use crate::{Error, Result};
use candle_core::{Tensor, D};

/// Probabilities below this are taken as this in logarithms.
const MIN_PROBABILITY: f64 = 1e-12;

/// The paper's Euclidean surrogate `(1/n) sum_i [<g_i, f_i - z_i> + |f_i - z_i|^2 / (2 eta)]`, a
/// scalar with graph, for outputs `f`, old outputs `z` and per-example gradients `g`, all `[n, c]`.
///
/// # Errors
/// [`Error::Shape`] unless the three shapes agree.
pub fn surrogate_squared(f: &Tensor, z: &Tensor, g: &Tensor, eta: f64) -> Result<Tensor> {
    Anchor::new(z, g)?.squared(f, eta, None, None)
}

/// The Euclidean surrogate of the authors' code: the mean over all entries of
/// `eta g f + (f - z)^2`.
///
/// # Errors
/// [`Error::Shape`] unless the three shapes agree.
pub fn surrogate_official(f: &Tensor, z: &Tensor, g: &Tensor, eta: f64) -> Result<Tensor> {
    Anchor::new(z, g)?.official(f, eta, None, None)
}

/// The paper's surrogate in mirror form, `(1/n) sum_i [<g_i, p_i - q_i> + KL(p_i || q_i) / eta]`
/// with `p = softmax(f)` and `q = softmax(f_t)`; `g` are per-example gradients in the
/// probabilities.
///
/// # Errors
/// [`Error::Shape`] unless the three shapes agree.
pub fn surrogate_kl(f: &Tensor, f_t: &Tensor, g: &Tensor, eta: f64) -> Result<Tensor> {
    Anchor::new(&softmax(&as_rows(f_t)?.detach())?, g)?.kl(f, eta)
}

/// Outputs as `[n, c]`: examples in rows.
pub(super) fn as_rows(f: &Tensor) -> Result<Tensor> {
    match f.dims() {
        [] => Err(Error::shape("targets", f.dims(), "[n, c]")),
        &[n] => Ok(f.reshape((n, 1))?),
        [_, _] => Ok(f.clone()),
        _ => Ok(f.flatten_from(1)?),
    }
}

/// `softmax` over the last dimension, differentiable.
pub(super) fn softmax(f: &Tensor) -> Result<Tensor> {
    Ok(log_softmax(f)?.exp()?)
}

fn log_softmax(f: &Tensor) -> Result<Tensor> {
    // The shift is a constant: its gradient cancels.
    let shifted = f.broadcast_sub(&f.detach().max_keepdim(D::Minus1)?)?;
    let log_sum = shifted.exp()?.sum_keepdim(D::Minus1)?.log()?;
    Ok(shifted.broadcast_sub(&log_sum)?)
}

/// The point at which the oracle was asked: targets `z` and gradient `g`, `[n, c]`, detached.
#[derive(Debug)]
pub(super) struct Anchor {
    z: Tensor,
    g: Tensor,
}

impl Anchor {
    pub(super) fn new(z: &Tensor, g: &Tensor) -> Result<Self> {
        let (z, g) = (as_rows(&z.detach())?, as_rows(&g.detach())?);
        if z.dims() != g.dims() {
            return Err(Error::shape(
                "gradient of the targets",
                g.dims(),
                format!("{:?}", z.dims()),
            ));
        }
        Ok(Self { z, g })
    }

    pub(super) fn z(&self) -> &Tensor {
        &self.z
    }

    pub(super) fn g(&self) -> &Tensor {
        &self.g
    }

    fn rows(&self, f: &Tensor) -> Result<Tensor> {
        let f = as_rows(f)?;
        if f.dims() != self.z.dims() {
            return Err(Error::shape(
                "targets",
                f.dims(),
                format!("{:?} as at the start of the step", self.z.dims()),
            ));
        }
        Ok(f)
    }

    /// `mean_i [<step g_i, f_i - z_i> + weight |f_i - z_i|^2 / (2 eta)]`
    fn squared(
        &self,
        f: &Tensor,
        eta: f64,
        step: Option<&Tensor>,
        weight: Option<&Tensor>,
    ) -> Result<Tensor> {
        let difference = (self.rows(f)? - &self.z)?;
        let linear = (times(&self.g, step)? * &difference)?;
        let square = times(&difference.sqr()?, weight)?;
        let sum = (linear + square.affine(0.5 / eta, 0.0)?)?.sum_all()?;
        Ok(sum.affine(1.0 / self.z.dim(0)? as f64, 0.0)?)
    }

    /// Mean over all entries of `eta step g f + weight (f - z)^2`.
    fn official(
        &self,
        f: &Tensor,
        eta: f64,
        step: Option<&Tensor>,
        weight: Option<&Tensor>,
    ) -> Result<Tensor> {
        let f = self.rows(f)?;
        let linear = (times(&self.g, step)?.affine(eta, 0.0)? * &f)?;
        let square = times(&(f - &self.z)?.sqr()?, weight)?;
        Ok((linear + square)?.mean_all()?)
    }

    /// Here `z` holds probabilities and `f` logits.
    fn kl(&self, f: &Tensor, eta: f64) -> Result<Tensor> {
        let (p, log_ratio) = self.ratio(f)?;
        let linear = (&self.g * (&p - &self.z)?)?;
        let divergence = (p * log_ratio)?.affine(1.0 / eta, 0.0)?;
        let sum = (linear + divergence)?.sum_all()?;
        Ok(sum.affine(1.0 / self.z.dim(0)? as f64, 0.0)?)
    }

    /// Mean over all entries of `p (ln p - ln z + eta g)`.
    fn official_kl(&self, f: &Tensor, eta: f64) -> Result<Tensor> {
        let (p, log_ratio) = self.ratio(f)?;
        let inner = (log_ratio + self.g.affine(eta, 0.0)?)?;
        Ok((p * inner)?.mean_all()?)
    }

    /// `p` and `ln p - ln z`.
    fn ratio(&self, f: &Tensor) -> Result<(Tensor, Tensor)> {
        let log_p = log_softmax(&self.rows(f)?)?.maximum(MIN_PROBABILITY.ln())?;
        let log_z = self.z.maximum(MIN_PROBABILITY)?.log()?;
        let p = log_p.exp()?;
        Ok((p, (log_p - log_z)?))
    }

    /// The surrogate that a configuration asks for. `scales` are the factors of the step sizes of
    /// single coordinates, where they are adapted.
    pub(super) fn surrogate(
        &self,
        f: &Tensor,
        divergence: Divergence,
        normalization: Normalization,
        eta: f64,
        scales: Option<&Scales>,
    ) -> Result<Tensor> {
        let (step, weight) = match (divergence, scales) {
            (Divergence::DiagonalAdaptive, Some(scales)) => (None, Some(&scales.weight)),
            (_, Some(scales)) => (Some(&scales.step), None),
            (_, None) => (None, None),
        };
        match (divergence, normalization) {
            (Divergence::Kl, Normalization::Paper) => self.kl(f, eta),
            (Divergence::Kl, Normalization::Official) => self.official_kl(f, eta),
            (_, Normalization::Paper) => self.squared(f, eta, step, weight),
            (_, Normalization::Official) => self.official(f, eta, step, weight),
        }
    }
}

/// Per-coordinate factors `[n, c]` of the step size, and their reciprocals.
#[derive(Debug)]
pub(super) struct Scales {
    pub step: Tensor,
    pub weight: Tensor,
}

fn times(x: &Tensor, factor: Option<&Tensor>) -> Result<Tensor> {
    match factor {
        Some(factor) => Ok((x * factor)?),
        None => Ok(x.clone()),
    }
}

//! Multiplicative gradient noise.

use crate::error::check;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use tensor_core::random::RandomStream;

/// Noise that gives the gradient of a large batch the covariance of a small one's: each example's
/// loss is weighted by `z ~ N(1, sigma^2)`, so no per-example gradients are needed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MultiplicativeNoise {
    sigma2: f64,
}

impl MultiplicativeNoise {
    /// Noise of variance `sigma2`.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for a negative or non-finite variance.
    pub fn new(sigma2: f64) -> Result<Self> {
        check::non_negative("MultiplicativeNoise::sigma2", sigma2)?;
        Ok(Self { sigma2 })
    }

    /// The variance `large / small - 1`, at which a batch of `large` has the covariance of one of
    /// `small` where the second moment dominates.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] unless `large >= small >= 1`.
    pub fn matching(large: usize, small: usize) -> Result<Self> {
        if small == 0 || large < small {
            return Err(Error::argument(
                "(large, small)",
                (large, small),
                "large >= small >= 1",
            ));
        }
        Self::new(large as f64 / small as f64 - 1.0)
    }

    /// The variance `sigma^2`.
    pub fn sigma2(&self) -> f64 {
        self.sigma2
    }

    /// One weight `z` per example, `[batch]`. Weights may be negative.
    ///
    /// # Errors
    /// Those of [`RandomStream::normal`].
    pub fn weights(
        &self,
        batch: usize,
        dtype: DType,
        device: &Device,
        rng: &mut RandomStream,
    ) -> Result<Tensor> {
        Ok(rng.normal(1.0, self.sigma2.sqrt(), batch, dtype, device)?)
    }

    /// The noisy loss `(1/M) sum_n z_n l_n` of per-example losses `[M]`: a scalar to differentiate.
    ///
    /// # Errors
    /// [`Error::Shape`] unless the losses have shape `[M]` with `M >= 1`.
    pub fn apply(&self, losses: &Tensor, rng: &mut RandomStream) -> Result<Tensor> {
        let batch = match losses.dims() {
            &[batch] if batch > 0 => batch,
            dims => return Err(Error::shape("per-example losses", dims, "[M] with M >= 1")),
        };
        let weights = self.weights(batch, losses.dtype(), losses.device(), rng)?;
        // The mean divides by M, not by the sum of the weights: that keeps the gradient unbiased.
        Ok((losses * weights)?.mean_all()?)
    }
}

/// The covariance that the noisy gradient of `batch` examples has, drawn with replacement from
/// per-example gradients `[N, d]`: `((1 + sigma^2) E[g g^T] - gbar gbar^T) / batch`, `[d, d]`.
///
/// # Errors
/// [`Error::Shape`] unless the gradients have shape `[N, d]` with `N >= 1`,
/// [`Error::InvalidArgument`] for `batch = 0` or a negative variance.
pub fn gradient_covariance(gradients: &Tensor, batch: usize, sigma2: f64) -> Result<Tensor> {
    let n = match gradients.dims() {
        &[n, _] if n > 0 => n,
        dims => return Err(Error::shape("gradients", dims, "[N, d] with N >= 1")),
    };
    if batch == 0 {
        return Err(Error::argument("batch", batch, "at least 1"));
    }
    if !(sigma2.is_finite() && sigma2 >= 0.0) {
        return Err(Error::argument("sigma2", sigma2, "a finite number >= 0"));
    }
    let second = gradients
        .t()?
        .matmul(gradients)?
        .affine(1.0 / n as f64, 0.0)?;
    let mean = gradients.mean_keepdim(0)?;
    let outer = mean.t()?.matmul(&mean)?;
    let covariance = (second.affine(1.0 + sigma2, 0.0)? - outer)?;
    Ok(covariance.affine(1.0 / batch as f64, 0.0)?)
}

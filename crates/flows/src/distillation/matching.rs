//! The losses of score distillation, as functions of tensors.

use super::{GradWeight, OneStepGenerator};
use crate::condition::Condition;
use crate::denoiser::Denoiser;
use crate::error::{check, Error, Result};
use crate::level::{mix, Levels};
use crate::prediction::with_noise;
use candle_core::{DType, Tensor};
use tensor_core::kernels::sum_squares;

/// The student's gradient and what it was made from; all without a graph, in the shape of the samples.
#[derive(Debug, Clone)]
pub struct Matching {
    /// The target's clean samples.
    pub real: Tensor,
    /// The fake denoiser's, at the same noisy samples.
    pub fake: Tensor,
    /// `g`: towards the fake and away from the target, so it is to be descended.
    pub gradient: Tensor,
}

impl Matching {
    /// `mean |g|^2 / 2`: the value of the loss `|x - stopgrad(x - g)|^2 / 2`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn loss(&self) -> Result<f64> {
        let count = self.gradient.elem_count().max(1) as f64;
        Ok(0.5 * sum_squares(&self.gradient)? / count)
    }

    /// A scalar with the gradient `g / numel` at `x`, which has the student's graph: the gradient of
    /// that loss.
    ///
    /// # Errors
    /// [`Error::Shape`] when the samples are others.
    pub fn surrogate(&self, x: &Tensor) -> Result<Tensor> {
        check::same_shape("x", x, &self.gradient)?;
        Ok((x * &self.gradient)?.mean_all()?)
    }
}

/// Half precision loses the sample at the largest levels.
fn full_precision(x: &Tensor) -> Result<usize> {
    let rows = check::rows("x", x)?;
    match x.dtype() {
        _ if x.elem_count() == 0 => Err(Error::argument("x", "empty", "at least one sample")),
        DType::F32 | DType::F64 => Ok(rows),
        other => Err(Error::unsupported(
            format!("distillation of samples in {other:?}"),
            "keep samples in F32 and convert inside the network",
        )),
    }
}

/// Compares target and fake denoiser at the same noisy versions of the samples `x` `[rows, ...]`.
///
/// # Errors
/// [`Error::Shape`] when shapes or the number of levels differ, [`Error::Unsupported`] for samples in
/// half precision, and those of the denoisers.
pub fn matching(
    (target, fake): (&dyn Denoiser, &dyn Denoiser),
    x: &Tensor,
    noise: &Tensor,
    levels: &Levels,
    weight: GradWeight,
    condition: &Condition,
) -> Result<Matching> {
    let rows = full_precision(x)?;
    let x = x.detach();
    let x_t = mix(&x, noise, levels)?;
    let clean = |d: &dyn Denoiser| Ok::<_, Error>(d.denoise(&x_t, levels, condition)?.x0.detach());
    let (real, fake) = (clean(target)?, clean(fake)?);
    check::same_shape("the target's sample", &real, &x)?;
    check::same_shape("the fake denoiser's sample", &fake, &x)?;
    let difference = (&fake - &real)?;
    let gradient = match weight {
        GradWeight::DiffInstruct(w) => {
            with_noise(levels, "the score")?;
            levels.scale(&difference, |l| w.at(l) * l.alpha / l.sigma.powi(2))?
        }
        GradWeight::DmdL1Norm => {
            let per_row = |t: Tensor| t.reshape((rows, ()));
            let size = per_row((&x - &real)?.abs()?)?.mean_keepdim(1)?;
            let smallest = per_row(x.abs()?)?.max_keepdim(1)?.affine(1e-12, 1e-12)?;
            let usable = size.gt(&smallest)?;
            let inverse = usable.where_cond(&size.recip()?, &size.zeros_like()?)?;
            let flat = per_row(difference)?.broadcast_mul(&inverse)?;
            flat.reshape(x.shape())?
        }
    };
    Ok(Matching {
        real,
        fake,
        gradient,
    })
}

/// `mean[(rho^-2 + sigma_data^-2) (D(alpha x + sigma noise) - x)^2]`, a scalar with the graph of the
/// denoiser and none of the samples.
///
/// # Errors
/// As [`matching`]; [`Error::Undetermined`] where a level has no noise.
pub fn fake_loss(
    fake: &dyn Denoiser,
    x: &Tensor,
    noise: &Tensor,
    levels: &Levels,
    sigma_data: f64,
    condition: &Condition,
) -> Result<Tensor> {
    full_precision(x)?;
    check::positive("sigma_data", sigma_data)?;
    with_noise(levels, "the weight of the loss")?;
    let x = x.detach();
    let x_t = mix(&x, noise, levels)?;
    let d = fake.denoise(&x_t, levels, condition)?.x0;
    check::same_shape("the fake denoiser's sample", &d, &x)?;
    let error = (d - &x)?;
    let weighted = levels.scale(&error, |l| l.rho().recip().hypot(sigma_data.recip()))?;
    Ok(weighted.sqr()?.mean_all()?)
}

/// `ln(1 + e^x)` without overflow, with the right gradient at 0 too.
fn softplus(x: &Tensor) -> Result<Tensor> {
    let size = x.abs()?;
    let tail = (size.neg()?.exp()? + 1.0)?.log()?;
    Ok(((x + &size)?.affine(0.5, 0.0)? + tail)?)
}

/// `mean softplus(-D(fake))`, what the student adds to its loss.
///
/// # Errors
/// Those of candle.
pub fn generator_gan_loss(fake_logits: &Tensor) -> Result<Tensor> {
    Ok(softplus(&fake_logits.neg()?)?.mean_all()?)
}

/// `mean softplus(D(fake)) + mean softplus(-D(real))`.
///
/// # Errors
/// Those of candle.
pub fn discriminator_loss(real_logits: &Tensor, fake_logits: &Tensor) -> Result<Tensor> {
    let real = softplus(&real_logits.neg()?)?.mean_all()?;
    Ok((softplus(fake_logits)?.mean_all()? + real)?)
}

/// The student's samples, checked.
pub(super) fn generate(
    generator: &dyn OneStepGenerator,
    z: &Tensor,
    condition: &Condition,
) -> Result<Tensor> {
    let x = generator.generate(z, condition)?;
    match x.dims().first() == z.dims().first() {
        true => Ok(x),
        false => {
            let expected = format!("as many rows as the latents {:?}", z.dims());
            Err(Error::shape("the generated sample", x.dims(), expected))
        }
    }
}

//! Students, and guided teachers.

use crate::combine::linear_combination;
use crate::condition::Condition;
use crate::denoiser::Denoiser;
use crate::error::{check, Result};
use crate::level::{Level, Levels};
use crate::prediction::Prediction;
use crate::schedule::Edm;
use candle_core::Tensor;

/// Makes samples from latents in one evaluation. Closures `Fn(&Tensor, &Condition) -> Result<Tensor>`
/// are generators.
pub trait OneStepGenerator {
    /// Samples `[rows, ...]` from standard normal latents `[rows, ...]`, with the graph.
    ///
    /// # Errors
    /// Whatever the network's own are.
    fn generate(&self, z: &Tensor, condition: &Condition) -> Result<Tensor>;
}

impl<F: Fn(&Tensor, &Condition) -> Result<Tensor>> OneStepGenerator for F {
    fn generate(&self, z: &Tensor, condition: &Condition) -> Result<Tensor> {
        self(z, condition)
    }
}

/// A denoiser at one level as a generator, `G(z) = D(scale z, level)`: the student starts with the
/// teacher's weights.
#[derive(Debug, Clone, Copy)]
pub struct DenoiserGenerator<D> {
    denoiser: D,
    level: Level,
    scale: f64,
}

impl<D: Denoiser> DenoiserGenerator<D> {
    /// `G(z) = D(sigma z, sigma)` of a variance-exploding denoiser; `sigma` is often the largest level
    /// of the teacher (80), smaller where the data is small.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`](crate::Error::InvalidConfig) unless `sigma` is positive.
    pub fn edm(denoiser: D, sigma: f64) -> Result<Self> {
        check::positive("DenoiserGenerator sigma", sigma)?;
        Self::new(denoiser, Edm::at_sigma(sigma)?, sigma)
    }

    /// A denoiser at any level; latents are multiplied by `scale` first. (The published text-to-image
    /// student hands its latents over unscaled, at step 399 of the discrete schedule.)
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) for a bad level,
    /// [`Error::InvalidConfig`](crate::Error::InvalidConfig) for a bad scale.
    pub fn new(denoiser: D, level: Level, scale: f64) -> Result<Self> {
        level.validate()?;
        check::positive("DenoiserGenerator scale", scale)?;
        Ok(Self {
            denoiser,
            level,
            scale,
        })
    }
}

impl<D: Denoiser> OneStepGenerator for DenoiserGenerator<D> {
    fn generate(&self, z: &Tensor, condition: &Condition) -> Result<Tensor> {
        let x = z.affine(self.scale, 0.0)?;
        let levels = Levels::Same(self.level);
        Ok(self.denoiser.denoise(&x, &levels, condition)?.x0)
    }
}

/// Classifier-free guidance at any levels, `D_null + scale (D - D_null)`: for the teacher alone, as
/// published for text to image (scale 8; the fake denoiser is not guided).
#[derive(Debug, Clone)]
pub struct ClassifierFree<D> {
    /// The model.
    pub denoiser: D,
    /// 1 is the conditional model.
    pub scale: f64,
    /// Its null condition, one row for all.
    pub null: Condition,
}

impl<D: Denoiser> Denoiser for ClassifierFree<D> {
    fn prediction(&self) -> Prediction {
        Prediction::X0
    }

    fn raw(&self, x: &Tensor, levels: &Levels, condition: &Condition) -> Result<Tensor> {
        check::finite("ClassifierFree::scale", self.scale)?;
        let null = self.null.for_rows(check::rows("x", x)?)?;
        let wanted = self.denoiser.denoise(x, levels, condition)?.x0;
        let null = self.denoiser.denoise(x, levels, &null)?.x0;
        linear_combination(&[(self.scale, &wanted), (1.0 - self.scale, &null)])
    }
}

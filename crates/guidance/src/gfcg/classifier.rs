//! Classifiers that are asked.

use crate::error::check;
use crate::Result;
use candle_core::{DType, Tensor, D};
use flows::{Denoised, Levels};
use nn::softmax::softmax;

/// A classifier that is asked at every step. It is never differentiated.
pub trait StepClassifier {
    /// Probabilities of the classes `[rows, classes]` for unguided predictions.
    ///
    /// # Errors
    /// Whatever the classifier's own are.
    fn probs(&self, d: &Denoised) -> Result<Tensor>;
}

/// Logits over a temperature as probabilities.
fn probabilities(logits: &Tensor, temperature: f64) -> Result<Tensor> {
    check::positive("temperature", temperature)?;
    let wide = logits.detach().to_dtype(DType::F64)?;
    Ok(softmax(&wide.affine(1.0 / temperature, 0.0)?, D::Minus1)?)
}

/// From latents to what a classifier reads.
type Decode<'a> = Box<dyn Fn(&Tensor) -> Result<Tensor> + 'a>;

/// A classifier of clean samples, asked about the model's clean prediction.
pub struct OnDenoised<'a, F> {
    net: F,
    clip: Option<f64>,
    temperature: f64,
    decode: Option<Decode<'a>>,
}

impl<'a, F: Fn(&Tensor) -> Result<Tensor>> OnDenoised<'a, F> {
    /// A network that returns logits `[rows, classes]` of clean samples, as it expects them: the
    /// prediction is cut to `[-1, 1]` before, and nothing else.
    pub fn new(net: F) -> Self {
        Self {
            net,
            clip: Some(1.0),
            temperature: 1.0,
            decode: None,
        }
    }

    /// Another range of the data, `[-limit, limit]`; `None` cuts nothing.
    #[must_use]
    pub fn clip(self, limit: Option<f64>) -> Self {
        Self {
            clip: limit,
            ..self
        }
    }

    /// Divides the logits: more than 1 for a classifier that is too sure.
    #[must_use]
    pub fn temperature(self, temperature: f64) -> Self {
        Self {
            temperature,
            ..self
        }
    }

    /// Decodes latents before they are cut and classified: the cost of a decoder at every step. A
    /// small classifier of latents, or [`Gfcg::every`](super::Gfcg::every), is cheaper.
    #[must_use]
    pub fn decode(self, decode: impl Fn(&Tensor) -> Result<Tensor> + 'a) -> Self {
        Self {
            decode: Some(Box::new(decode)),
            ..self
        }
    }

    fn seen(&self, d: &Denoised) -> Result<Tensor> {
        let mut x = d.x0.detach();
        if let Some(decode) = &self.decode {
            x = decode(&x)?;
        }
        match self.clip {
            Some(limit) => {
                check::positive("OnDenoised::clip", limit)?;
                Ok(x.clamp(-limit, limit)?)
            }
            None => Ok(x),
        }
    }
}

impl<F: Fn(&Tensor) -> Result<Tensor>> StepClassifier for OnDenoised<'_, F> {
    fn probs(&self, d: &Denoised) -> Result<Tensor> {
        probabilities(&(self.net)(&self.seen(d)?)?, self.temperature)
    }
}

/// A classifier that knows noisy samples and their level.
#[derive(Debug, Clone)]
pub struct OnNoisy<F> {
    /// Logits `[rows, classes]` of a noisy sample at its levels.
    pub net: F,
    /// Divides the logits.
    pub temperature: f64,
}

impl<F: Fn(&Tensor, &Levels) -> Result<Tensor>> StepClassifier for OnNoisy<F> {
    fn probs(&self, d: &Denoised) -> Result<Tensor> {
        probabilities(&(self.net)(&d.x, &d.levels)?, self.temperature)
    }
}

/// Prompts as classes, by the cosines of an image's embedding with theirs (CLIP).
#[derive(Debug, Clone)]
pub struct ZeroShot<F> {
    /// Embeddings `[rows, d]` of clean samples.
    pub image_encoder: F,
    /// Embeddings `[classes, d]` of the prompts.
    pub text_embeddings: Tensor,
    /// What cosines are divided by; 0.01 for CLIP.
    pub temperature: f64,
}

impl<F: Fn(&Tensor) -> Result<Tensor>> StepClassifier for ZeroShot<F> {
    fn probs(&self, d: &Denoised) -> Result<Tensor> {
        let unit = |x: &Tensor| -> Result<Tensor> {
            let x = x.detach().to_dtype(DType::F64)?;
            let norm = x.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?.maximum(1e-12)?;
            Ok(x.broadcast_div(&norm)?)
        };
        let image = unit(&(self.image_encoder)(&d.x0.detach())?)?;
        let cosines = image.matmul(&unit(&self.text_embeddings)?.t()?)?;
        probabilities(&cosines, self.temperature)
    }
}

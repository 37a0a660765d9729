//! Rewards as losses: lower is better.

use crate::error::Error;
use crate::Result;
use candle_core::{DType, Tensor, D};
use flows::Condition;
use nn::softmax::log_softmax;

/// A differentiable reward.
pub trait RewardLoss {
    /// What reports call it.
    fn name(&self) -> &str;

    /// The loss of each sample, `[rows]`, lower being better.
    ///
    /// # Errors
    /// Whatever the reward's own are.
    fn loss(&self, sample: &Tensor, condition: &Condition) -> Result<Tensor>;
}

/// A closure with a name.
#[derive(Debug, Clone)]
pub struct Named<F> {
    name: String,
    loss: F,
}

impl<F: Fn(&Tensor, &Condition) -> Result<Tensor>> Named<F> {
    /// The loss `[rows]` of samples under their condition.
    pub fn new(name: &str, loss: F) -> Self {
        Self {
            name: name.to_string(),
            loss,
        }
    }
}

impl<F: Fn(&Tensor, &Condition) -> Result<Tensor>> RewardLoss for Named<F> {
    fn name(&self) -> &str {
        &self.name
    }

    fn loss(&self, sample: &Tensor, condition: &Condition) -> Result<Tensor> {
        (self.loss)(sample, condition)
    }
}

/// Cosines of the rows of two tensors, `[rows]`, in at least single precision; `b` may have one row.
fn cosines(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let unit = |x: &Tensor| -> Result<Tensor> {
        let x = wide(&x.flatten_from(1)?)?;
        let norm = x.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?.maximum(1e-12)?;
        Ok(x.broadcast_div(&norm)?)
    };
    if a.rank() == 0 || b.rank() == 0 {
        return Err(Error::shape("features", a.dims(), "[rows, ...]"));
    }
    Ok(unit(a)?.broadcast_mul(&unit(b)?)?.sum(D::Minus1)?)
}

/// In at least single precision.
pub(super) fn wide(x: &Tensor) -> Result<Tensor> {
    match x.dtype() {
        DType::F16 | DType::BF16 => Ok(x.to_dtype(DType::F32)?),
        _ => Ok(x.clone()),
    }
}

/// `1 - cos(features(x), target)`.
#[derive(Debug, Clone)]
pub struct FeatureCosine<F> {
    /// Features `[rows, ...]`, differentiable.
    pub encoder: F,
    /// The wanted features, `[rows or 1, ...]`: of a text, a style, a picture.
    pub target: Tensor,
    /// What reports call it.
    pub name: String,
}

impl<F: Fn(&Tensor) -> Result<Tensor>> RewardLoss for FeatureCosine<F> {
    fn name(&self) -> &str {
        &self.name
    }

    fn loss(&self, sample: &Tensor, _: &Condition) -> Result<Tensor> {
        let cos = cosines(&(self.encoder)(sample)?, &self.target)?;
        Ok(cos.affine(-1.0, 1.0)?)
    }
}

/// `-log p(label)` of a classifier. It saturates: stop early.
#[derive(Debug, Clone)]
pub struct LogProb<F> {
    /// Logits `[rows, classes]`, differentiable.
    pub classifier: F,
    /// The wanted classes, `u32 [rows]`.
    pub labels: Tensor,
    /// What reports call it.
    pub name: String,
}

impl<F: Fn(&Tensor) -> Result<Tensor>> RewardLoss for LogProb<F> {
    fn name(&self) -> &str {
        &self.name
    }

    fn loss(&self, sample: &Tensor, _: &Condition) -> Result<Tensor> {
        let logits = (self.classifier)(sample)?;
        let rows = logits.dims().first().copied().unwrap_or(0);
        if self.labels.dims() != [rows] {
            return Err(Error::shape(
                "the labels",
                self.labels.dims(),
                format!("[{rows}]"),
            ));
        }
        let own = log_softmax(&logits, D::Minus1)?.gather(&self.labels.unsqueeze(1)?, 1)?;
        Ok(own.squeeze(1)?.neg()?)
    }
}

/// `offset - scale cos(image(x), text)`: the rewards of CLIP's family, given their image encoder and
/// the embedding of the prompt.
#[derive(Debug, Clone)]
pub struct CosineScore<F> {
    image: F,
    text: Tensor,
    scale: f64,
    offset: f64,
    name: &'static str,
    weight: f64,
}

impl<F: Fn(&Tensor) -> Result<Tensor>> CosineScore<F> {
    /// HPS v2.1: `1 - cos`, weight 5 in the paper.
    pub fn hps(image: F, text: &Tensor) -> Self {
        Self::new("hps", image, text, (1.0, 1.0, 5.0))
    }

    /// CLIP ViT-H/14: `100 - exp(s) cos`, weight 0.01; `scale` is `exp(s)`, 100 in released weights.
    pub fn clip(image: F, text: &Tensor, scale: f64) -> Self {
        Self::new("clip", image, text, (scale, 100.0, 0.01))
    }

    /// PickScore: `30 - exp(s) cos`, weight 0.05.
    pub fn pick(image: F, text: &Tensor, scale: f64) -> Self {
        Self::new("pick-score", image, text, (scale, 30.0, 0.05))
    }

    fn new(
        name: &'static str,
        image: F,
        text: &Tensor,
        (scale, offset, weight): (f64, f64, f64),
    ) -> Self {
        Self {
            image,
            text: text.detach(),
            scale,
            offset,
            name,
            weight,
        }
    }

    /// The weight that the paper gives it.
    pub fn paper_weight(&self) -> f64 {
        self.weight
    }
}

impl<F: Fn(&Tensor) -> Result<Tensor>> RewardLoss for CosineScore<F> {
    fn name(&self) -> &str {
        self.name
    }

    fn loss(&self, sample: &Tensor, _: &Condition) -> Result<Tensor> {
        let cos = cosines(&(self.image)(sample)?, &self.text)?;
        Ok(cos.affine(-self.scale, self.offset)?)
    }
}

/// `offset - score(x)`: rewards that are a network's number.
#[derive(Debug, Clone)]
pub struct Score<F> {
    net: F,
    offset: f64,
    name: &'static str,
}

impl<F: Fn(&Tensor) -> Result<Tensor>> Score<F> {
    /// ImageReward: `2 - r`, weight 1 in the paper.
    pub fn image_reward(net: F) -> Self {
        Self {
            net,
            offset: 2.0,
            name: "image-reward",
        }
    }

    /// An aesthetic score: `10 - r`, off in the paper.
    pub fn aesthetic(net: F) -> Self {
        Self {
            net,
            offset: 10.0,
            name: "aesthetic",
        }
    }
}

impl<F: Fn(&Tensor) -> Result<Tensor>> RewardLoss for Score<F> {
    fn name(&self) -> &str {
        self.name
    }

    fn loss(&self, sample: &Tensor, _: &Condition) -> Result<Tensor> {
        Ok((self.net)(sample)?.affine(-1.0, self.offset)?)
    }
}

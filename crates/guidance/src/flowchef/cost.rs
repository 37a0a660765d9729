//! What a guided sample is to satisfy.

use crate::error::{check, Error};
use crate::Result;
use candle_core::{DType, Tensor, Var, D};
use nn::softmax::log_softmax;
use tensor_core::operator::LinearOperator;
use tensor_core::random::RandomStream;

/// Applications of power iteration for the norm of an operator.
const NORM_ITERATIONS: usize = 50;

/// A cost of clean samples.
pub trait Cost {
    /// The cost of each sample, `[rows]`.
    ///
    /// # Errors
    /// Whatever the cost's own are.
    fn value(&self, x1: &Tensor) -> Result<Tensor>;

    /// The gradient of the sum of the costs; by backpropagation where there is no formula.
    ///
    /// # Errors
    /// As [`value`](Self::value); a gradient that does not arrive is named.
    fn grad(&self, x1: &Tensor) -> Result<Tensor> {
        let at = Var::from_tensor(&x1.detach())?;
        gradient(&at, &self.value(at.as_tensor())?.sum_all()?)
    }

    /// Whether the gradient goes through a network of the caller's, so that it is checked once: yes, unless
    /// a cost says otherwise.
    fn through_network(&self) -> bool {
        true
    }

    /// The largest eigenvalue of the cost's second derivative, where it is a constant:
    /// [`StepRule::Normalized`](super::StepRule::Normalized) divides by it.
    ///
    /// # Errors
    /// Those of the operator.
    fn curvature(&self, _x1: &Tensor) -> Result<Option<f64>> {
        Ok(None)
    }
}

/// The gradient of a scalar at a variable.
pub(super) fn gradient(at: &Var, scalar: &Tensor) -> Result<Tensor> {
    match scalar.backward()?.get(at) {
        Some(gradient) => Ok(gradient.detach()),
        None => Err(
            tensor_core::Error::LostGradient(vec!["the sample, through the cost".into()]).into(),
        ),
    }
}

/// How squares are collected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Reduction {
    /// Their mean over each sample: the paper's, for a batch of one, and the same in every batch.
    #[default]
    MeanPerSample,
    /// Their sum over each sample.
    SumPerSample,
    /// Their mean over the whole batch, as the authors' code computes: a sample in a batch of `B` is
    /// corrected `B` times less. The cost of a row is its part.
    MeanAll,
}

impl Reduction {
    /// The factor on the sum of squares of a tensor `[rows, ...]`.
    fn factor(self, of: &Tensor) -> f64 {
        let rows = of.dims().first().copied().unwrap_or(1).max(1);
        let count = (of.elem_count().max(1)) as f64;
        match self {
            Self::MeanPerSample => rows as f64 / count,
            Self::SumPerSample => 1.0,
            Self::MeanAll => 1.0 / count,
        }
    }
}

/// Sums of squares of the rows, `[rows]`.
fn row_squares(x: &Tensor) -> Result<Tensor> {
    Ok(x.sqr()?.flatten_from(1)?.sum(D::Minus1)?)
}

/// `weight * mean (A x - y)^2`: measurements that are to hold.
pub struct LinearMeasurement<'a> {
    operator: &'a dyn LinearOperator,
    y: Tensor,
    reduction: Reduction,
    weight: f64,
    noise: f64,
}

impl<'a> LinearMeasurement<'a> {
    /// Measurements `y` `[rows or 1, ...]`. Noise belongs into `y`, once, not into the operator.
    pub fn new(operator: &'a dyn LinearOperator, y: &Tensor) -> Self {
        Self {
            operator,
            y: y.detach(),
            reduction: Reduction::MeanPerSample,
            weight: 1.0,
            noise: 0.0,
        }
    }

    /// Another way to collect squares.
    #[must_use]
    pub fn reduction(self, reduction: Reduction) -> Self {
        Self { reduction, ..self }
    }

    /// A factor.
    #[must_use]
    pub fn weight(self, weight: f64) -> Self {
        Self { weight, ..self }
    }

    /// The standard deviation of the noise in `y`: a sample whose measurements are nearer than that
    /// (in the mean square) is not corrected any more.
    #[must_use]
    pub fn noise_floor(self, sigma: f64) -> Self {
        Self {
            noise: sigma,
            ..self
        }
    }

    fn residual(&self, x1: &Tensor) -> Result<Tensor> {
        check::finite("LinearMeasurement::weight", self.weight)?;
        let noise = self.noise.is_finite() && self.noise >= 0.0;
        let words = "a finite number >= 0";
        check::require(noise, "LinearMeasurement::noise_floor", self.noise, words)?;
        let image = self.operator.apply(x1)?;
        let fits = image.rank() == self.y.rank()
            && image.dims()[1..] == self.y.dims()[1..]
            && (self.y.dims()[0] == 1 || self.y.dims()[0] == image.dims()[0]);
        match fits {
            true => Ok(image.broadcast_sub(&self.y)?),
            false => {
                let expected = format!("{:?}, or one row for all", image.dims());
                Err(Error::shape("the measurements", self.y.dims(), expected))
            }
        }
    }
}

impl Cost for LinearMeasurement<'_> {
    fn value(&self, x1: &Tensor) -> Result<Tensor> {
        let residual = self.residual(x1)?;
        let factor = self.weight * self.reduction.factor(&residual);
        Ok(row_squares(&residual)?.affine(factor, 0.0)?)
    }

    fn through_network(&self) -> bool {
        false
    }

    /// `2 weight / n A^T (A x - y)`.
    fn grad(&self, x1: &Tensor) -> Result<Tensor> {
        let mut residual = self.residual(&x1.detach())?;
        let factor = 2.0 * self.weight * self.reduction.factor(&residual);
        if self.noise > 0.0 && residual.elem_count() > 0 {
            let rows = residual.dims()[0];
            let per_row = (residual.elem_count() / rows) as f64;
            let far = row_squares(&residual)?.gt(per_row * self.noise * self.noise)?;
            let mut shape = vec![1; residual.rank()];
            shape[0] = rows;
            let far = far.to_dtype(residual.dtype())?.reshape(shape)?;
            residual = residual.broadcast_mul(&far)?;
        }
        Ok(self.operator.adjoint(&residual)?.affine(factor, 0.0)?)
    }

    fn curvature(&self, x1: &Tensor) -> Result<Option<f64>> {
        let factor = 2.0 * self.weight * self.reduction.factor(&self.residual(x1)?);
        // The start of a power iteration may be any fixed one.
        let mut stream = RandomStream::new(0);
        let norm = self
            .operator
            .norm_squared(x1, NORM_ITERATIONS, &mut stream)?;
        Ok(Some(factor * norm))
    }
}

/// `weight * mean keep (x - target)^2`: what is to stay as it was.
#[derive(Debug, Clone)]
pub struct MaskedTarget {
    /// The samples that are to be met, `[rows or 1, ...]`.
    pub target: Tensor,
    /// 1 where they are to be met, 0 elsewhere (masks of painting programs mark what is edited: the
    /// opposite); broadcast over the target.
    pub keep: Tensor,
    /// A factor.
    pub weight: f64,
    /// How squares are collected.
    pub reduction: Reduction,
}

impl MaskedTarget {
    /// `keep (x - target)`.
    fn masked(&self, x1: &Tensor) -> Result<Tensor> {
        check::finite("MaskedTarget::weight", self.weight)?;
        let off = x1.broadcast_sub(&self.target)?;
        if off.dims() != x1.dims() {
            let expected = format!("rows of {:?}", x1.dims());
            return Err(Error::shape("the target", self.target.dims(), expected));
        }
        Ok(off.broadcast_mul(&self.keep)?)
    }
}

impl Cost for MaskedTarget {
    fn value(&self, x1: &Tensor) -> Result<Tensor> {
        let off = x1.broadcast_sub(&self.target)?;
        let square = (self.masked(x1)? * off)?.flatten_from(1)?;
        let factor = self.weight * self.reduction.factor(x1);
        Ok(square.sum(D::Minus1)?.affine(factor, 0.0)?)
    }

    fn through_network(&self) -> bool {
        false
    }

    fn grad(&self, x1: &Tensor) -> Result<Tensor> {
        let factor = 2.0 * self.weight * self.reduction.factor(x1);
        Ok(self.masked(&x1.detach())?.affine(factor, 0.0)?)
    }

    fn curvature(&self, x1: &Tensor) -> Result<Option<f64>> {
        let keep = self
            .keep
            .to_dtype(DType::F64)?
            .max_all()?
            .to_scalar::<f64>()?;
        let factor = 2.0 * self.weight * self.reduction.factor(x1);
        Ok(Some(factor * keep))
    }
}

/// Cross entropy of a classifier of clean samples.
pub struct ClassifierCost<F> {
    /// Logits `[rows, classes]`, differentiable.
    pub net: F,
    /// The wanted classes, `u32 [rows]`.
    pub labels: Tensor,
}

impl<F: Fn(&Tensor) -> Result<Tensor>> Cost for ClassifierCost<F> {
    fn value(&self, x1: &Tensor) -> Result<Tensor> {
        let log_probs = log_softmax(&(self.net)(x1)?, D::Minus1)?;
        let rows = log_probs.dims().first().copied().unwrap_or(0);
        if self.labels.dims() != [rows] {
            return Err(Error::shape(
                "the labels",
                self.labels.dims(),
                format!("[{rows}]"),
            ));
        }
        let own = log_probs.gather(&self.labels.unsqueeze(1)?, 1)?;
        Ok(own.squeeze(1)?.neg()?)
    }
}

/// `weight * mean (features(x) - target)^2`: style, identity, whatever an encoder sees.
pub struct FeatureCost<F> {
    /// Features `[rows, ...]`, differentiable.
    pub encoder: F,
    /// The wanted features, `[rows or 1, ...]`.
    pub target: Tensor,
    /// A factor.
    pub weight: f64,
}

impl<F: Fn(&Tensor) -> Result<Tensor>> Cost for FeatureCost<F> {
    fn value(&self, x1: &Tensor) -> Result<Tensor> {
        check::finite("FeatureCost::weight", self.weight)?;
        let off = (self.encoder)(x1)?.broadcast_sub(&self.target)?;
        let square = off.sqr()?.flatten_from(1)?.mean(D::Minus1)?;
        Ok(square.affine(self.weight, 0.0)?)
    }
}

/// A cost of decoded samples, for flows of latents: backpropagation goes through the decoder alone.
pub struct LatentCost<'a, F> {
    /// From latents to samples, differentiable.
    pub decoder: F,
    /// The cost of samples.
    pub inner: &'a dyn Cost,
}

impl<F: Fn(&Tensor) -> Result<Tensor>> Cost for LatentCost<'_, F> {
    fn value(&self, x1: &Tensor) -> Result<Tensor> {
        self.inner.value(&(self.decoder)(x1)?)
    }

    fn grad(&self, x1: &Tensor) -> Result<Tensor> {
        let at = Var::from_tensor(&x1.detach())?;
        let decoded = (self.decoder)(at.as_tensor())?;
        let inner = self.inner.grad(&decoded.detach())?;
        gradient(&at, &(decoded * inner)?.sum_all()?)
    }
}

/// Several costs, each with its weight.
pub struct SumCost<'a>(pub Vec<(f64, &'a dyn Cost)>);

impl SumCost<'_> {
    fn sum(&self, part: impl Fn(&dyn Cost) -> Result<Tensor>) -> Result<Tensor> {
        let mut sum: Option<Tensor> = None;
        for (weight, cost) in &self.0 {
            check::finite("SumCost weight", *weight)?;
            let term = part(*cost)?.affine(*weight, 0.0)?;
            sum = Some(match sum {
                Some(sum) => (sum + term)?,
                None => term,
            });
        }
        sum.ok_or_else(|| Error::argument("number of costs", 0, "at least one"))
    }
}

impl Cost for SumCost<'_> {
    fn value(&self, x1: &Tensor) -> Result<Tensor> {
        self.sum(|cost| cost.value(x1))
    }

    fn through_network(&self) -> bool {
        self.0.iter().any(|(_, cost)| cost.through_network())
    }

    fn grad(&self, x1: &Tensor) -> Result<Tensor> {
        self.sum(|cost| cost.grad(x1))
    }
}

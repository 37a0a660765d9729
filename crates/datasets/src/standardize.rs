//! Shift and scale inputs to mean zero and variance one, fitted on the training part only.

use crate::{Classification, Error, Result};
use candle_core::{DType, Tensor};

/// Over which values one mean and one standard deviation are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Axis {
    /// One pair for each feature: over the examples (dimension 0).
    Feature,
    /// One pair for each channel: over everything but dimension 1 (images `[n, c, h, w]`).
    Channel,
    /// One pair for all values.
    Whole,
}

/// An affine map `(x - mean) / std` with the moments of the tensor that it was fitted on.
///
/// A feature without spread (a border pixel that is always zero) gets `std = 1`, so that it becomes
/// zero instead of NaN.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use thalweg_datasets::standardize::{Axis, Standardizer};
///
/// let train = Tensor::new(&[[1f32, 5.0], [3.0, 5.0]], &Device::Cpu)?;
/// let fitted = Standardizer::fit(&train, Axis::Feature)?;
/// assert_eq!(fitted.apply(&train)?.to_vec2::<f32>()?, [[-1.0, 0.0], [1.0, 0.0]]);
/// # Ok::<(), thalweg_datasets::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Standardizer {
    /// Means, broadcastable to the inputs (f64).
    pub mean: Tensor,
    /// Standard deviations (divisor n), broadcastable to the inputs (f64).
    pub std: Tensor,
}

impl Standardizer {
    /// Moments of `inputs` along `axis`, taken in f64.
    ///
    /// # Errors
    /// [`Error::BadTensor`] without examples or (for [`Axis::Channel`]) without channels,
    /// [`Error::NonFinite`] for NaN or infinity among the inputs.
    pub fn fit(inputs: &Tensor, axis: Axis) -> Result<Self> {
        let (rank, least) = (inputs.rank(), 1 + usize::from(axis == Axis::Channel));
        if rank < least || inputs.elem_count() == 0 {
            let expected = format!("at least one example and {least} dimensions");
            return Err(Error::tensor("inputs", inputs, expected));
        }
        let x = inputs.to_dtype(DType::F64)?;
        let over: Vec<usize> = match axis {
            Axis::Feature => vec![0],
            Axis::Channel => (0..rank).filter(|d| *d != 1).collect(),
            Axis::Whole => (0..rank).collect(),
        };
        let mean = x.mean_keepdim(over.as_slice())?;
        let variance = x
            .broadcast_sub(&mean)?
            .sqr()?
            .mean_keepdim(over.as_slice())?;
        let std = variance.sqrt()?;
        let bad = std.flatten_all()?.to_vec1::<f64>()?;
        let count = bad.iter().filter(|s| !s.is_finite()).count();
        if count > 0 {
            let name = "the moments of the inputs";
            return Err(Error::NonFinite { name, count });
        }
        // Rounding leaves a spread of about eps * |mean| on a constant feature.
        let floor = mean.abs()?.affine(1e-12, 1e-30)?;
        let std = std.gt(&floor)?.where_cond(&std, &std.ones_like()?)?;
        Ok(Self { mean, std })
    }

    /// `(x - mean) / std` in the dtype of `x`.
    ///
    /// # Errors
    /// candle's error when the shapes do not broadcast.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let (mean, std) = self.like(x)?;
        Ok(x.broadcast_sub(&mean)?.broadcast_div(&std)?)
    }

    /// `x * std + mean`: undoes [`apply`](Self::apply).
    ///
    /// # Errors
    /// candle's error when the shapes do not broadcast.
    pub fn invert(&self, x: &Tensor) -> Result<Tensor> {
        let (mean, std) = self.like(x)?;
        Ok(x.broadcast_mul(&std)?.broadcast_add(&mean)?)
    }

    fn like(&self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        let to = |t: &Tensor| t.to_device(x.device())?.to_dtype(x.dtype());
        Ok((to(&self.mean)?, to(&self.std)?))
    }
}

impl Classification {
    /// This data set and `others`, all standardized with the moments of this one.
    ///
    /// # Errors
    /// Those of [`Standardizer::fit`] and [`Standardizer::apply`].
    pub fn standardize(&self, axis: Axis, others: &[&Self]) -> Result<(Self, Vec<Self>)> {
        let fitted = Standardizer::fit(&self.inputs, axis)?;
        let map = |data: &Self| data.map_inputs(|x| fitted.apply(x));
        let others: Result<Vec<Self>> = others.iter().map(|data| map(data)).collect();
        Ok((map(self)?, others?))
    }
}

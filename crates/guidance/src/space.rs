//! In which form of the prediction a rule works.

use crate::Result;
use candle_core::{DType, Tensor};
use flows::{Denoised, Prediction};

/// The form of the prediction that a rule combines, compares or projects.
///
/// A linear combination is the same in every form; projections, norms, cosines and clipping are not.
#[derive(Debug, Clone, Copy, Default)]
pub enum Space {
    /// The clean sample.
    #[default]
    X0,
    /// The noise.
    Eps,
    /// `v = alpha eps - sigma x0`.
    V,
    /// What the model itself predicts.
    Native(Prediction),
}

impl Space {
    /// The prediction of the form.
    pub fn prediction(&self) -> Prediction {
        match self {
            Self::X0 => Prediction::X0,
            Self::Eps => Prediction::Eps,
            Self::V => Prediction::V,
            Self::Native(prediction) => *prediction,
        }
    }

    /// A denoised sample in this form.
    ///
    /// # Errors
    /// [`flows::Error::Undetermined`] where the level has no noise.
    pub fn read(&self, d: &Denoised) -> Result<Tensor> {
        Ok(d.to_raw(self.prediction())?)
    }

    /// Back to a denoised sample, at the sample and level of `like`.
    ///
    /// # Errors
    /// [`flows::Error::Undetermined`] where the level has no signal.
    pub fn write(&self, form: &Tensor, like: &Denoised) -> Result<Denoised> {
        let prediction = self.prediction();
        Ok(Denoised::from_raw(form, prediction, &like.x, &like.levels)?)
    }
}

/// Sums over these dimensions of a batch `[rows, ...]`, never over the rows.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum ReduceDims {
    /// Everything that belongs to one sample.
    #[default]
    AllNonBatch,
    /// These axes (1 and up): norms per channel, per token, per frame.
    Axes(Vec<usize>),
}

impl ReduceDims {
    /// The axes for a tensor of this rank.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`](crate::Error::InvalidConfig) for axis 0, an axis beyond the rank or
    /// one given twice.
    pub fn axes(&self, rank: usize) -> Result<Vec<usize>> {
        let axes = match self {
            Self::AllNonBatch => return Ok((1..rank).collect()),
            Self::Axes(axes) => axes,
        };
        let mut sorted = axes.clone();
        sorted.sort_unstable();
        sorted.dedup();
        let holds = sorted.len() == axes.len() && sorted.iter().all(|a| (1..rank).contains(a));
        let expected = format!("distinct axes in 1..{rank}");
        crate::error::check::require(holds, "ReduceDims::Axes", axes, &expected)?;
        Ok(sorted)
    }

    /// The sum, in at least single precision, with the reduced dimensions kept as 1.
    ///
    /// # Errors
    /// As [`axes`](Self::axes).
    pub fn sum(&self, x: &Tensor) -> Result<Tensor> {
        let axes = self.axes(x.rank())?;
        let wide = match x.dtype() {
            DType::F16 | DType::BF16 => x.to_dtype(DType::F32)?,
            _ => x.clone(),
        };
        match axes.is_empty() {
            true => Ok(wide),
            false => Ok(wide.sum_keepdim(axes)?),
        }
    }
}

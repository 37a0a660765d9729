//! What networks see of a sample.

use crate::error::{check, Error};
use crate::Result;
use candle_core::{DType, Device, Tensor};
use tensor_core::checkpoint::State;

/// `(scale x + shift - mean) / std` with means and deviations of the channels, which are the second axis.
#[derive(Debug, Clone, PartialEq)]
pub struct Preprocess {
    /// The factor on all numbers.
    pub scale: f64,
    /// What is added to them.
    pub shift: f64,
    /// Means of the channels; none is 0.
    pub mean: Vec<f64>,
    /// Standard deviations of the channels; none is 1.
    pub std: Vec<f64>,
}

impl Default for Preprocess {
    /// The sample itself.
    fn default() -> Self {
        Self {
            scale: 1.0,
            shift: 0.0,
            mean: Vec::new(),
            std: Vec::new(),
        }
    }
}

impl Preprocess {
    /// For networks of images: from `[-1, 1]` to `[0, 1]`, `(x + 1) / 2`, and from there by means and
    /// deviations of the channels.
    pub fn image(mean: &[f64], std: &[f64]) -> Self {
        Self {
            scale: 0.5,
            shift: 0.5,
            mean: mean.to_vec(),
            std: std.to_vec(),
        }
    }

    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`].
    pub fn validate(&self) -> Result<()> {
        check::finite("Preprocess::scale", self.scale)?;
        check::finite("Preprocess::shift", self.shift)?;
        let same = self.mean.len() == self.std.len() && self.mean.iter().all(|m| m.is_finite());
        check::require(
            same,
            "Preprocess::mean",
            &self.mean,
            "a finite number for each of `std`",
        )?;
        let std = self.std.iter().all(|s| s.is_finite() && *s > 0.0);
        check::require(std, "Preprocess::std", &self.std, "finite numbers > 0")
    }

    /// Samples `[rows, channels, ...]` as the network sees them.
    ///
    /// # Errors
    /// [`Error::Shape`] for another number of channels.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let x = match (self.scale, self.shift) {
            (1.0, 0.0) => x.clone(),
            (scale, shift) => x.affine(scale, shift)?,
        };
        let channels = self.mean.len();
        if channels == 0 {
            return Ok(x);
        }
        if x.dims().get(1) != Some(&channels) {
            return Err(Error::shape(
                "the samples",
                x.dims(),
                format!("[rows, {channels}, ...]"),
            ));
        }
        let mut shape = vec![1; x.rank()];
        shape[1] = channels;
        let column = |values: Vec<f64>| -> Result<Tensor> {
            let column = Tensor::from_vec(values, shape.clone(), &Device::Cpu)?;
            Ok(column.to_dtype(x.dtype())?.to_device(x.device())?)
        };
        let inverse = column(self.std.iter().map(|s| 1.0 / s).collect())?;
        Ok(x.broadcast_sub(&column(self.mean.clone())?)?
            .broadcast_mul(&inverse)?)
    }
}

/// What the two roles of a transfer see of a sample. The authors' classifiers differ in it: the frozen one
/// normalizes `(x + 1) / 2`, the expert of a ResNet sees the noisy sample itself.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Roles {
    /// The frozen network, of clean samples.
    pub teacher: Preprocess,
    /// The experts, of noisy ones.
    pub student: Preprocess,
}

impl Roles {
    /// Adds both to a state.
    pub(super) fn store(&self, state: &mut State) -> Result<()> {
        for (role, p) in [("teacher", &self.teacher), ("student", &self.student)] {
            let parts = [
                ("affine", &vec![p.scale, p.shift]),
                ("mean", &p.mean),
                ("std", &p.std),
            ];
            for (part, values) in parts.into_iter().filter(|(_, values)| !values.is_empty()) {
                let values = Tensor::new(values.as_slice(), &Device::Cpu)?;
                state.insert(format!("{role}.{part}"), values);
            }
        }
        Ok(())
    }

    /// Reads both from a state.
    pub(super) fn read(state: &State) -> Result<Self> {
        let role = |role: &str| -> Result<Preprocess> {
            let values = |part: &str| -> Result<Vec<f64>> {
                match state.get(&format!("{role}.{part}")) {
                    Some(values) => Ok(values.to_dtype(DType::F64)?.to_vec1()?),
                    None => Ok(Vec::new()),
                }
            };
            let [scale, shift] = values("affine")?[..] else {
                return Err(Error::Mismatch {
                    what: "the file of adapters",
                    reason: format!("no `{role}.affine` of two numbers"),
                });
            };
            let read = Preprocess {
                scale,
                shift,
                mean: values("mean")?,
                std: values("std")?,
            };
            read.validate()?;
            Ok(read)
        };
        Ok(Self {
            teacher: role("teacher")?,
            student: role("student")?,
        })
    }
}

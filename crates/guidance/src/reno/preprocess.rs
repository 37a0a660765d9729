//! From generated images to what image encoders read.

use crate::error::{check, Error};
use crate::Result;
use candle_core::{DType, Device, Tensor};

/// Resizing by bicubic interpolation, a square from the middle, and normalization: differentiable,
/// as two products with matrices.
#[derive(Debug, Clone, PartialEq)]
pub struct ImagePreprocess {
    /// The shorter side after resizing, and the side of the square.
    pub size: usize,
    /// Means of the channels, for values in `[0, 1]`.
    pub mean: Vec<f64>,
    /// Standard deviations of the channels.
    pub std: Vec<f64>,
}

impl Default for ImagePreprocess {
    /// CLIP's: 224, with its means and deviations.
    fn default() -> Self {
        Self {
            size: 224,
            mean: vec![0.481_454_66, 0.457_827_5, 0.408_210_73],
            std: vec![0.268_629_54, 0.261_302_58, 0.275_777_11],
        }
    }
}

/// Keys' cubic kernel with `a = -1/2`.
fn cubic(x: f64) -> f64 {
    let x = x.abs();
    match x {
        _ if x < 1.0 => (1.5 * x - 2.5) * x * x + 1.0,
        _ if x < 2.0 => ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0,
        _ => 0.0,
    }
}

/// Weights `[to, from]` of an interpolation that averages where it shrinks, cut to `keep` rows from
/// the middle.
fn weights(from: usize, to: usize, keep: usize) -> Vec<f64> {
    let ratio = from as f64 / to as f64;
    let width = ratio.max(1.0);
    let first = (to - keep) / 2;
    let mut all = Vec::with_capacity(keep * from);
    for i in first..first + keep {
        let center = (i as f64 + 0.5) * ratio;
        let row: Vec<f64> = (0..from)
            .map(|j| cubic((j as f64 + 0.5 - center) / width))
            .collect();
        let total: f64 = row.iter().sum();
        all.extend(row.into_iter().map(|w| w / total));
    }
    all
}

impl ImagePreprocess {
    /// Images `[rows, channels, height, width]` in `[0, 1]` as `[rows, channels, size, size]`.
    ///
    /// # Errors
    /// [`Error::Shape`] for another form or number of channels; [`Error::InvalidConfig`] for bad
    /// settings.
    pub fn apply(&self, images: &Tensor) -> Result<Tensor> {
        check::require(
            self.size > 0,
            "ImagePreprocess::size",
            self.size,
            "at least 1",
        )?;
        let scale = self.std.iter().all(|s| s.is_finite() && *s > 0.0);
        check::require(scale, "ImagePreprocess::std", &self.std, "numbers > 0")?;
        let channels = self.mean.len();
        let (height, width) = match images.dims() {
            [_, c, h, w] if *c == channels && self.std.len() == channels && *h > 0 && *w > 0 => {
                (*h, *w)
            }
            other => {
                let expected = format!("[rows, {channels}, height, width]");
                return Err(Error::shape("the images", other, expected));
            }
        };
        let short = height.min(width);
        let scaled = |side: usize| side * self.size / short;
        let (dtype, device) = (images.dtype(), images.device());
        let matrix = |side: usize| -> Result<Tensor> {
            let values = weights(side, scaled(side), self.size);
            let matrix = Tensor::from_vec(values, (self.size, side), &Device::Cpu)?;
            Ok(matrix.to_dtype(dtype)?.to_device(device)?)
        };
        let rows = matrix(height)?;
        let columns = matrix(width)?.t()?;
        let resized = rows.broadcast_matmul(&images.broadcast_matmul(&columns)?)?;
        let channel = |values: Vec<f64>| -> Result<Tensor> {
            let column = Tensor::from_vec(values, (1, channels, 1, 1), &Device::Cpu)?;
            Ok(column.to_dtype(dtype)?.to_device(device)?)
        };
        let mean = channel(self.mean.clone())?;
        let inverse = channel(self.std.iter().map(|s| 1.0 / s).collect())?;
        Ok(resized.broadcast_sub(&mean)?.broadcast_mul(&inverse)?)
    }

    /// A decoder's output in `[-1, 1]` as images in `[0, 1]`, cut at both ends. Beyond them the
    /// gradient is zero.
    ///
    /// # Errors
    /// Those of candle.
    pub fn from_decoder(images: &Tensor) -> Result<Tensor> {
        let images = match images.dtype() {
            DType::F16 | DType::BF16 => images.to_dtype(DType::F32)?,
            _ => images.clone(),
        };
        Ok(images.affine(0.5, 0.5)?.clamp(0.0, 1.0)?)
    }
}

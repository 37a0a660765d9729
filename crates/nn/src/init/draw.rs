//! The draws that take more than one call of the stream.

use super::{Fan, Gain};
use crate::{Error, Result};
use candle_core::{DType, Device, Shape, Tensor};
use tensor_core::random::RandomStream;

/// `gain / sqrt(fan)`.
pub(super) fn scale(fan: Fan, gain: Gain, dims: &[usize]) -> Result<f64> {
    let gain = gain.value();
    if !(gain.is_finite() && gain >= 0.0) {
        return Err(Error::config("Gain", gain, "a finite number >= 0"));
    }
    // An empty tensor has fan 0 and no entries to draw.
    Ok(gain / fan.of(dims).max(1.0).sqrt())
}

/// A matrix with orthonormal rows or columns from the Haar measure: Gram-Schmidt on normal
/// vectors, twice per vector, which is as good as orthogonal to rounding.
pub(super) fn orthogonal(
    gain: Gain,
    shape: Shape,
    stream: &mut RandomStream,
    dtype: DType,
    device: &Device,
) -> Result<Tensor> {
    let dims = shape.dims();
    if dims.len() < 2 {
        return Err(Error::shape(
            "orthogonal weight",
            dims,
            "at least two dimensions",
        ));
    }
    let (rows, cols) = (dims[0], dims[1..].iter().product::<usize>());
    let (count, length) = (rows.min(cols), rows.max(cols));
    let mut basis = vec![0.0; count * length];
    stream.fill_normal(&mut basis);
    for i in 0..count {
        let (done, rest) = basis.split_at_mut(i * length);
        let vector = &mut rest[..length];
        for _ in 0..2 {
            for other in done.chunks_exact(length) {
                let along: f64 = vector.iter().zip(other).map(|(v, o)| v * o).sum();
                vector
                    .iter_mut()
                    .zip(other)
                    .for_each(|(v, o)| *v -= along * o);
            }
            let norm = vector.iter().map(|v| v * v).sum::<f64>().sqrt();
            vector.iter_mut().for_each(|v| *v /= norm);
        }
    }
    let matrix = Tensor::from_vec(basis, (count, length), &Device::Cpu)?;
    let matrix = if rows <= cols { matrix } else { matrix.t()? };
    let scaled = (matrix * gain.value())?.reshape(shape)?;
    Ok(scaled.to_dtype(dtype)?.to_device(device)?)
}

/// A normal distribution restricted to `[low, high]`.
pub(super) struct Truncation {
    mean: f64,
    std: f64,
    low: f64,
    high: f64,
}

impl Truncation {
    pub(super) fn new(mean: f64, std: f64, low: f64, high: f64) -> Result<Self> {
        if !(std.is_finite() && std > 0.0) {
            return Err(Error::config(
                "Initializer::TruncatedNormal::std",
                std,
                "a finite number > 0",
            ));
        }
        if !(low <= mean && mean <= high && low < high) {
            return Err(Error::config(
                "Initializer::TruncatedNormal",
                format!("mean {mean} and interval [{low}, {high}]"),
                "low < high and an interval that contains the mean",
            ));
        }
        Ok(Self {
            mean,
            std,
            low,
            high,
        })
    }

    fn sample(&self, stream: &mut RandomStream) -> f64 {
        let (a, b) = (
            (self.low - self.mean) / self.std,
            (self.high - self.mean) / self.std,
        );
        // A narrow interval rejects most normal draws but few uniform ones; both loops accept at
        // least a quarter of their draws.
        if b - a < 1.5 {
            loop {
                let z = a + (b - a) * stream.next_uniform();
                if stream.next_uniform() < (-0.5 * z * z).exp() {
                    return self.mean + self.std * z;
                }
            }
        }
        loop {
            let z = stream.next_normal();
            if (a..=b).contains(&z) {
                return self.mean + self.std * z;
            }
        }
    }

    pub(super) fn tensor(
        &self,
        shape: Shape,
        stream: &mut RandomStream,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        let draws: Vec<f64> = (0..shape.elem_count())
            .map(|_| self.sample(stream))
            .collect();
        Ok(Tensor::from_vec(draws, shape, &Device::Cpu)?
            .to_dtype(dtype)?
            .to_device(device)?)
    }
}

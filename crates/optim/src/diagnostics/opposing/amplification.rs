//! How strongly a network's layers react to a direction of its input.

use crate::{Error, Result};
use candle_core::{DType, Tensor};

/// Root mean square response of each layer to a small step along a direction of the input, per unit
/// of step: a feature that the network has amplified shows up as a response that grows from layer
/// to layer and over training.
#[derive(Debug, Clone, PartialEq)]
pub struct FeatureAmplification {
    /// `sqrt(mean_i |a_l(x_i + h u) - a_l(x_i - h u)|^2) / (2 h)` for each layer `l`.
    pub response: Vec<f64>,
}

impl FeatureAmplification {
    /// Measures the layers' outputs (`layers(x)` gives one tensor `[B, ..]` per layer) around inputs
    /// `x` `[B, ..]` along `direction` (the shape of one example), which is scaled to norm 1.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a step that is not positive or a direction of norm 0;
    /// [`Error::Shape`]; those of `layers`.
    pub fn measure(
        layers: impl Fn(&Tensor) -> candle_core::Result<Vec<Tensor>>,
        x: &Tensor,
        direction: &Tensor,
        step: f64,
    ) -> Result<Self> {
        if !(step.is_finite() && step > 0.0) {
            return Err(Error::argument("step", step, "a finite number > 0"));
        }
        let example = x.dims().get(1..).unwrap_or(&[]);
        if direction.dims() != example || x.elem_count() == 0 {
            let expected = format!("{example:?}, one of the inputs");
            return Err(Error::shape("direction", direction.dims(), expected));
        }
        let norm = tensor_core::kernels::sum_squares(direction)?.sqrt();
        if norm == 0.0 {
            return Err(Error::argument("direction", norm, "a norm > 0"));
        }
        let shift = (direction.to_dtype(x.dtype())? * (step / norm))?.unsqueeze(0)?;
        let (plus, minus) = (
            layers(&x.broadcast_add(&shift)?)?,
            layers(&x.broadcast_sub(&shift)?)?,
        );
        let examples = x.dims()[0] as f64;
        let one = |(a, b): (&Tensor, &Tensor)| {
            let squares = (a - b)?.sqr()?.sum_all()?.to_dtype(DType::F64)?;
            Ok((squares.to_scalar::<f64>()? / examples).sqrt() / (2.0 * step))
        };
        let response: Result<Vec<f64>> = plus.iter().zip(&minus).map(one).collect();
        Ok(Self {
            response: response?,
        })
    }
}

//! The perceptron inside other layers.

use super::{linear, linear_then, torch_linear, weight};
use crate::{Error, Result};
use candle_core::Tensor;
use candle_nn::{Activation, Init, Module, VarBuilder};
use nn::activation::Activation as Fused;

/// Linear layers with an activation between them (and after the last one, if asked for).
///
/// Parameters are named as in a PyTorch `Sequential(Linear, act, Linear, ..)`: `0.weight`,
/// `0.bias`, `2.weight`, ...
#[derive(Debug, Clone)]
pub struct Mlp {
    layers: Vec<(Tensor, Tensor)>,
    activation: Activation,
    last: Option<Activation>,
}

impl Mlp {
    /// Layers between `widths`, which are at least two: input, hidden ones, output.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for fewer than two widths or a width of 0.
    pub fn new(widths: &[usize], activation: Activation, vb: VarBuilder) -> Result<Self> {
        Self::with_output_bias(widths, activation, None, vb)
    }

    /// With a constant for the initial bias of the last layer.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_output_bias(
        widths: &[usize],
        activation: Activation,
        output_bias: Option<f64>,
        vb: VarBuilder,
    ) -> Result<Self> {
        if widths.len() < 2 {
            return Err(Error::argument(
                "widths",
                format!("{widths:?}"),
                "at least two",
            ));
        }
        let last = widths.len() - 2;
        let layer = |(i, pair): (usize, &[usize])| -> Result<(Tensor, Tensor)> {
            let (vb, init) = (vb.pp(2 * i), torch_linear(pair[0]));
            let w = weight(&vb, "weight", (pair[0], pair[1]), init)?;
            let bias = output_bias.filter(|_| i == last).map_or(init, Init::Const);
            Ok((w, vb.get_with_hints(pair[1], "bias", bias)?))
        };
        Ok(Self {
            layers: widths
                .windows(2)
                .enumerate()
                .map(layer)
                .collect::<Result<_>>()?,
            activation,
            last: None,
        })
    }

    /// With an activation after the last layer too.
    #[must_use]
    pub fn with_last(self, activation: Activation) -> Self {
        Self {
            last: Some(activation),
            ..self
        }
    }

    /// The first layer's weight and bias, for inputs whose product is computed elsewhere.
    pub fn first(&self) -> (&Tensor, &Tensor) {
        // There is at least one layer.
        (&self.layers[0].0, &self.layers[0].1)
    }

    /// Everything after the first linear map.
    ///
    /// # Errors
    /// Those of candle.
    pub fn after_first(&self, y: &Tensor) -> Result<Tensor> {
        self.after_first_with(y, Ok)
    }

    /// The same with `then` after every activation.
    pub(crate) fn after_first_with(
        &self,
        y: &Tensor,
        mut then: impl FnMut(Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let y = match self.activation(0) {
            Some(activation) => then(apply(activation, y)?)?,
            None => y.clone(),
        };
        self.beginning_at(1, y, then)
    }

    /// All of it with `then` after every activation.
    pub(crate) fn forward_with(
        &self,
        x: &Tensor,
        then: impl FnMut(Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        self.beginning_at(0, x.clone(), then)
    }

    fn beginning_at(
        &self,
        first: usize,
        mut y: Tensor,
        mut then: impl FnMut(Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        for (i, (w, b)) in self.layers.iter().enumerate().skip(first) {
            let b = Some(b);
            y = match self.activation(i) {
                None => linear(&y, w, b)?,
                Some(activation) => then(match fused(activation) {
                    Some(activation) => linear_then(&y, w, b, activation)?,
                    None => activation.forward(&linear(&y, w, b)?)?,
                })?,
            };
        }
        Ok(y)
    }

    /// What follows a layer.
    fn activation(&self, layer: usize) -> Option<Activation> {
        match layer + 1 < self.layers.len() {
            true => Some(self.activation),
            false => self.last,
        }
    }
}

impl Module for Mlp {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        Ok(self.forward_with(x, Ok)?)
    }
}

fn apply(activation: Activation, y: &Tensor) -> Result<Tensor> {
    Ok(match fused(activation) {
        Some(activation) => activation.forward(y)?,
        None => activation.forward(y)?,
    })
}

/// The activation as one pass, where there is one: candle's leaky ReLU takes five.
fn fused(activation: Activation) -> Option<Fused> {
    Some(match activation {
        Activation::Relu => Fused::Relu,
        Activation::LeakyRelu(slope) => Fused::LeakyRelu(slope),
        Activation::Gelu => Fused::Gelu,
        Activation::NewGelu | Activation::GeluPytorchTanh => Fused::GeluTanh,
        Activation::Silu | Activation::Swish => Fused::Silu,
        Activation::Mish => Fused::Mish,
        Activation::Sigmoid => Fused::Sigmoid,
        _ => return None,
    })
}

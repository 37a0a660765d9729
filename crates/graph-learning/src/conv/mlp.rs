//! The perceptron inside other layers.

use super::{leaky_relu, torch_linear, weight};
use crate::{Error, Result};
use candle_core::Tensor;
use candle_nn::{Activation, Init, Module, VarBuilder};

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
        let mut y = y.clone();
        let last = self.layers.len() - 1;
        for (i, (w, b)) in self.layers.iter().enumerate() {
            if i > 0 {
                y = y.matmul(&w.t()?)?.broadcast_add(b)?;
            }
            let activation = if i < last {
                Some(&self.activation)
            } else {
                self.last.as_ref()
            };
            match activation {
                // Candle's takes five passes.
                Some(Activation::LeakyRelu(slope)) => y = then(leaky_relu(&y, *slope)?)?,
                Some(activation) => y = then(activation.forward(&y)?)?,
                None => {}
            }
        }
        Ok(y)
    }
}

impl Module for Mlp {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let (w, b) = self.first();
        let y = x.matmul(&w.t()?)?.broadcast_add(b)?;
        Ok(self.after_first(&y)?)
    }
}

//! A multi-layer perceptron.

use super::layers::{linear, Activation};
use crate::init::Initializer;
use crate::{Error, Result};
use candle_core::{Module, ModuleT, Tensor};
use candle_nn::{Linear, VarBuilder};

/// Configuration of [`Mlp`].
#[derive(Debug, Clone, PartialEq)]
pub struct MlpConfig {
    /// Widths of the layers: inputs, hidden layers, outputs. At least two.
    pub widths: Vec<usize>,
    /// After each hidden layer.
    pub activation: Activation,
    /// Whether the linear layers have biases.
    pub bias: bool,
    /// Initial weights.
    pub init: Initializer,
}

impl Default for MlpConfig {
    /// 784-128-10 with ReLU and PyTorch's initial weights.
    fn default() -> Self {
        Self {
            widths: vec![784, 128, 10],
            activation: Activation::Relu,
            bias: true,
            init: Initializer::torch_linear(),
        }
    }
}

impl MlpConfig {
    /// The default with these widths.
    pub fn new(widths: &[usize]) -> Self {
        Self {
            widths: widths.to_vec(),
            ..Self::default()
        }
    }

    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`].
    pub fn validate(&self) -> Result<()> {
        if self.widths.len() < 2 || self.widths.contains(&0) {
            return Err(Error::config(
                "MlpConfig::widths",
                format!("{:?}", self.widths),
                "at least two widths, none of them 0",
            ));
        }
        Ok(())
    }
}

/// Linear layers with an activation between them; variables `layers.0.weight`, `layers.0.bias`,
/// `layers.1.weight`, ...
///
/// Inputs of more than two dimensions are flattened from the second on.
#[derive(Debug, Clone)]
pub struct Mlp {
    layers: Vec<Linear>,
    activation: Activation,
}

impl Mlp {
    /// Takes its variables from `vb`.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`], and candle's when variables do not fit.
    pub fn new(config: &MlpConfig, vb: VarBuilder) -> Result<Self> {
        config.validate()?;
        let vb_layers = vb.pp("layers");
        let make = |(i, w): (usize, &[usize])| {
            linear(w[0], w[1], config.bias, config.init, vb_layers.pp(i))
        };
        let layers: Result<Vec<Linear>> = config.widths.windows(2).enumerate().map(make).collect();
        Ok(Self {
            layers: layers?,
            activation: config.activation,
        })
    }
}

impl ModuleT for Mlp {
    fn forward_t(&self, x: &Tensor, _train: bool) -> candle_core::Result<Tensor> {
        let mut h = if x.rank() > 2 {
            x.flatten_from(1)?
        } else {
            x.clone()
        };
        for (i, layer) in self.layers.iter().enumerate() {
            h = layer.forward(&h)?;
            if i + 1 < self.layers.len() {
                h = self.activation.forward(&h)?;
            }
        }
        Ok(h)
    }
}

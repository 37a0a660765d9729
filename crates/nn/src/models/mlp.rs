//! A multi-layer perceptron.

use super::layers::{linear, BatchNormKind};
use crate::activation::Activation;
use crate::init::Initializer;
use crate::linear::Linear;
use crate::norm::ghost_batch::GhostBatchNorm;
use crate::{Error, Result};
use candle_core::{Module, ModuleT, Tensor};
use candle_nn::VarBuilder;

/// Configuration of [`Mlp`].
#[derive(Debug, Clone, PartialEq)]
pub struct MlpConfig {
    /// Widths of the layers: inputs, hidden layers, outputs. At least two.
    pub widths: Vec<usize>,
    /// After each hidden layer.
    pub activation: Activation,
    /// Between each hidden layer and its activation.
    pub norm: BatchNormKind,
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
            norm: BatchNormKind::None,
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
/// `layers.1.weight`, ..., and `norms.0.weight`, ... where hidden layers are normalized.
///
/// Inputs of more than two dimensions are flattened from the second on.
#[derive(Debug, Clone)]
pub struct Mlp {
    layers: Vec<Linear>,
    norms: Vec<Option<GhostBatchNorm>>,
}

impl Mlp {
    /// Takes its variables from `vb`.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`], and candle's when variables do not fit.
    pub fn new(config: &MlpConfig, vb: VarBuilder) -> Result<Self> {
        config.validate()?;
        let last = config.widths.len() - 2;
        let make = |(i, w): (usize, &[usize])| {
            let layer = linear(w[0], w[1], config.bias, config.init, vb.pp("layers").pp(i))?;
            // A norm stands between the layer and its activation.
            Ok(match i < last && config.norm == BatchNormKind::None {
                true => layer.with_activation(config.activation),
                false => layer,
            })
        };
        let layers: Result<Vec<Linear>> = config.widths.windows(2).enumerate().map(make).collect();
        let hidden = &config.widths[1..config.widths.len() - 1];
        let norm = |(i, n): (usize, &usize)| {
            let vb = vb.pp("norms").pp(i);
            config.norm.build(*n, config.activation, vb)
        };
        let norms: Result<Vec<_>> = hidden.iter().enumerate().map(norm).collect();
        Ok(Self {
            layers: layers?,
            norms: norms?,
        })
    }
}

impl ModuleT for Mlp {
    fn forward_t(&self, x: &Tensor, train: bool) -> candle_core::Result<Tensor> {
        let mut h = match x.rank() {
            0..=2 => x.clone(),
            _ => x.flatten_from(1)?,
        };
        for (i, layer) in self.layers.iter().enumerate() {
            h = layer.forward(&h)?;
            if let Some(Some(norm)) = self.norms.get(i) {
                h = norm.forward_t(&h, train)?;
            }
        }
        Ok(h)
    }
}

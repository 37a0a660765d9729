//! What the networks are put together from.

use crate::activation::Activation;
use crate::conv::Conv2d;
use crate::init::Initializer;
use crate::linear::Linear;
use crate::norm::ghost_batch::{ghost_batch_norm, GhostBatchNorm, GhostBatchNormConfig};
use crate::norm::power::{PowerNorm, PowerNormConfig, PowerNormV, SequenceLayout};
use crate::norm::{layer_norm, rms_norm, LayerNorm, LayerNormConfig, RmsNorm};
use crate::Result;
use candle_core::{Module, ModuleT, Tensor};
use candle_nn::{Conv2dConfig, VarBuilder};

/// A linear layer with variables `weight` `[out, in]` and, if wanted, `bias` `[out]` (drawn from
/// PyTorch's default for biases).
pub(super) fn linear(
    inputs: usize,
    outputs: usize,
    bias: bool,
    init: Initializer,
    vb: VarBuilder,
) -> Result<Linear> {
    let weight = vb.get_with_hints((outputs, inputs), "weight", init.hint(&[outputs, inputs])?)?;
    let bias = match bias {
        true => {
            let hint = Initializer::torch_bias(inputs).hint(&[outputs])?;
            Some(vb.get_with_hints(outputs, "bias", hint)?)
        }
        false => None,
    };
    Ok(Linear::new(weight, bias))
}

/// A 3x3 (or 1x1) convolution that keeps the size at stride 1; variables `weight` `[out, in, k, k]`
/// and, if wanted, `bias` `[out]`.
pub(super) fn conv(
    (inputs, outputs): (usize, usize),
    (kernel, stride): (usize, usize),
    bias: bool,
    init: Initializer,
    vb: VarBuilder,
) -> Result<Conv2d> {
    let shape = [outputs, inputs, kernel, kernel];
    let weight = vb.get_with_hints(&shape, "weight", init.hint(&shape)?)?;
    let bias = match bias {
        true => {
            let hint = Initializer::torch_bias(inputs * kernel * kernel).hint(&[outputs])?;
            Some(vb.get_with_hints(outputs, "bias", hint)?)
        }
        false => None,
    };
    let config = Conv2dConfig {
        padding: kernel / 2,
        stride,
        ..Default::default()
    };
    Ok(Conv2d::new(weight, bias, config))
}

/// The normalization over a batch that follows a linear layer or a convolution.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum BatchNormKind {
    /// None.
    #[default]
    None,
    /// Batch norm.
    Batch,
    /// Ghost batch norm.
    Ghost(GhostBatchNormConfig),
}

impl BatchNormKind {
    /// The norm with the activation after it; without one the layer before applies it.
    pub(super) fn build(
        &self,
        channels: usize,
        activation: Activation,
        vb: VarBuilder,
    ) -> Result<Option<GhostBatchNorm>> {
        let config = match self {
            BatchNormKind::None => return Ok(None),
            // One group of all examples.
            BatchNormKind::Batch => GhostBatchNormConfig::batch_norm(),
            BatchNormKind::Ghost(config) => *config,
        };
        let norm = ghost_batch_norm(channels, config, vb)?;
        Ok(Some(norm.with_activation(activation)))
    }
}

/// The normalization of a transformer's token vectors.
#[derive(Debug, Clone, PartialEq)]
pub enum TokenNorm {
    /// Layer norm.
    Layer(LayerNormConfig),
    /// RMS norm with this epsilon.
    Rms(f64),
    /// Batch norm (or ghost batch norm) over all tokens of all sequences.
    Batch(GhostBatchNormConfig),
    /// Power normalization; its layout is set to `(B, T, C)`.
    Power(PowerNormConfig),
    /// PN-V, power normalization without running statistics.
    PowerV(PowerNormConfig),
}

/// A built [`TokenNorm`] over `[B, T, C]`.
#[derive(Debug, Clone)]
pub(super) enum TokenNormLayer {
    Layer(LayerNorm),
    Rms(RmsNorm),
    Batch(GhostBatchNorm),
    Power(PowerNorm),
    PowerV(PowerNormV),
}

impl TokenNorm {
    pub(super) fn build(&self, channels: usize, vb: VarBuilder) -> Result<TokenNormLayer> {
        let batch_first = |config: &PowerNormConfig| PowerNormConfig {
            layout: SequenceLayout::BatchFirst,
            ..config.clone()
        };
        Ok(match self {
            Self::Layer(config) => TokenNormLayer::Layer(layer_norm(channels, *config, vb)?),
            Self::Rms(eps) => TokenNormLayer::Rms(rms_norm(channels, *eps, vb)?),
            Self::Batch(config) => TokenNormLayer::Batch(ghost_batch_norm(channels, *config, vb)?),
            Self::Power(config) => {
                TokenNormLayer::Power(PowerNorm::new(channels, batch_first(config), vb)?)
            }
            Self::PowerV(config) => {
                TokenNormLayer::PowerV(PowerNormV::new(channels, batch_first(config), vb)?)
            }
        })
    }
}

impl TokenNormLayer {
    pub(super) fn power(&self) -> Option<&PowerNorm> {
        match self {
            Self::Power(norm) => Some(norm),
            _ => None,
        }
    }
}

impl ModuleT for TokenNormLayer {
    fn forward_t(&self, x: &Tensor, train: bool) -> candle_core::Result<Tensor> {
        match self {
            Self::Layer(norm) => norm.forward(x),
            Self::Rms(norm) => norm.forward(x),
            Self::Batch(norm) => {
                let tokens = x.flatten_to(x.rank() - 2)?;
                norm.forward_t(&tokens, train)?.reshape(x.shape())
            }
            Self::Power(norm) => ModuleT::forward_t(norm, x, train),
            Self::PowerV(norm) => norm.forward_t(x, train),
        }
    }
}

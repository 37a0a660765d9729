//! Denoisers: the dilated convolutions of the paper, and a transformer.

use super::model::DiscreteDenoiser;
use crate::error::check;
use crate::{Error, Result};
use candle_core::{Module, ModuleT, Tensor};
use candle_nn::{Conv1dConfig, Init, VarBuilder};
use nn::activation::Activation;
use nn::attention::{multi_head_attention, AttentionConfig};
use nn::conv::{conv1d, Conv1d};
use nn::dropout::Dropout;
use nn::linear::{linear, Linear};
use nn::norm::{layer_norm, LayerNorm, LayerNormConfig};
use tensor_core::random::RandomStream;

/// Settings of a [`CnnDenoiser`].
#[derive(Debug, Clone, PartialEq)]
pub struct CnnConfig {
    /// Real tokens `K`.
    pub vocab: usize,
    /// Channels.
    pub hidden: usize,
    /// Width of the convolutions, odd.
    pub kernel: usize,
    /// Dilations of the blocks; the whole list is repeated `stacks` times, each dilation's blocks
    /// one after the other.
    pub dilations: Vec<usize>,
    /// Blocks of each dilation.
    pub stacks: usize,
    /// Probability of dropping a number at the head of each block, while training.
    pub dropout: f64,
    /// Whether the blocks see the noise level, through random Fourier features.
    pub time: bool,
}

impl CnnConfig {
    /// The paper's network for DNA: 128 channels, 20 blocks.
    pub fn dna() -> Self {
        Self {
            vocab: 4,
            hidden: 128,
            kernel: 9,
            dilations: vec![1, 1, 4, 16, 64],
            stacks: 4,
            dropout: 0.0,
            time: true,
        }
    }

    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] that names the first bad one.
    pub fn validate(&self) -> Result<()> {
        check::at_least("CnnConfig::vocab", self.vocab, 2)?;
        check::at_least("CnnConfig::hidden", self.hidden, 1)?;
        let odd = self.kernel % 2 == 1;
        check::require(odd, "CnnConfig::kernel", self.kernel, "an odd number")?;
        let holds = self.dilations.iter().all(|d| *d > 0);
        check::require(
            holds,
            "CnnConfig::dilations",
            &self.dilations,
            "numbers >= 1",
        )?;
        let holds = (0.0..1.0).contains(&self.dropout);
        check::require(
            holds,
            "CnnConfig::dropout",
            self.dropout,
            "a number in [0, 1)",
        )
    }
}

/// One-hot tokens through a convolution, residual blocks of layer norm, dilated convolution and
/// ReLU, and two pointwise layers.
pub struct CnnDenoiser {
    first: Conv1d,
    time: Option<TimeFeatures>,
    blocks: Vec<Block>,
    head: [Linear; 2],
    dropout: Option<Dropout>,
}

struct TimeFeatures {
    frequencies: Tensor,
    embed: Linear,
}

struct Block {
    time: Option<Linear>,
    norm: LayerNorm,
    conv: Conv1d,
}

fn same(kernel: usize, dilation: usize) -> Conv1dConfig {
    Conv1dConfig {
        padding: dilation * (kernel / 2),
        dilation,
        ..Conv1dConfig::default()
    }
}

impl CnnDenoiser {
    /// A network from variables of the builder; `rng` is only split, for dropout.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`]; those of candle.
    pub fn new(config: &CnnConfig, vb: VarBuilder, rng: &RandomStream) -> Result<Self> {
        config.validate()?;
        let (h, v) = (config.hidden, config.vocab + 1);
        let time = match config.time {
            true => {
                // Fixed: frequencies of a random Fourier feature with scale 30.
                let init = Init::Randn {
                    mean: 0.0,
                    stdev: 30.0,
                };
                let frequencies = vb
                    .get_with_hints(h.div_ceil(2), "frequencies", init)?
                    .detach();
                let embed = linear(2 * h.div_ceil(2), h, vb.pp("embed"))?;
                Some(TimeFeatures {
                    frequencies,
                    embed: embed.with_activation(Activation::Relu),
                })
            }
            false => None,
        };
        let mut blocks = vec![];
        let dilations = config.dilations.iter();
        for dilation in dilations.flat_map(|d| std::iter::repeat_n(*d, config.stacks)) {
            let vb = vb.pp("blocks").pp(blocks.len());
            let conv = conv1d(
                h,
                h,
                config.kernel,
                same(config.kernel, dilation),
                vb.pp("conv"),
            )?;
            blocks.push(Block {
                time: config
                    .time
                    .then(|| linear(h, h, vb.pp("time")))
                    .transpose()?,
                norm: layer_norm(h, LayerNormConfig::default(), vb.pp("norm"))?,
                conv: conv.with_activation(Activation::Relu),
            });
        }
        let first = conv1d(v, h, config.kernel, same(config.kernel, 1), vb.pp("first"))?;
        let inner = linear(h, h, vb.pp("head.0"))?.with_activation(Activation::Relu);
        Ok(Self {
            first: first.with_activation(Activation::Relu),
            time,
            blocks,
            head: [inner, linear(h, v, vb.pp("head.1"))?],
            dropout: match config.dropout > 0.0 {
                true => Some(Dropout::new(config.dropout, rng.split("dropout"))?),
                false => None,
            },
        })
    }
}

impl DiscreteDenoiser for CnnDenoiser {
    fn logits(&self, x: &Tensor, sigma: &Tensor, train: bool) -> Result<Tensor> {
        let mut f = self.first.forward_rows(x)?;
        let time = match &self.time {
            Some(features) => {
                let angle = sigma
                    .unsqueeze(1)?
                    .matmul(&features.frequencies.unsqueeze(0)?)?;
                let angle = angle.affine(std::f64::consts::TAU, 0.0)?;
                let waves = Tensor::cat(&[angle.sin()?, angle.cos()?], 1)?;
                Some(features.embed.forward(&waves)?)
            }
            None => None,
        };
        for block in &self.blocks {
            let mut h = f.clone();
            if let Some(dropout) = &self.dropout {
                h = dropout.forward_t(&h, train)?;
            }
            if let (Some(time), Some(layer)) = (&time, &block.time) {
                h = h.broadcast_add(&layer.forward(time)?.unsqueeze(1)?)?;
            }
            f = (f + block.conv.forward_rows(&block.norm.forward(&h)?)?)?;
        }
        Ok(self.head[1].forward(&self.head[0].forward(&f)?)?)
    }
}

/// Settings of a [`TransformerDenoiser`].
#[derive(Debug, Clone, PartialEq)]
pub struct TransformerConfig {
    /// Real tokens `K`.
    pub vocab: usize,
    /// Longest sequence.
    pub length: usize,
    /// Numbers a position.
    pub width: usize,
    /// Attention heads.
    pub heads: usize,
    /// Layers.
    pub layers: usize,
}

impl TransformerConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] that names the first bad one.
    pub fn validate(&self) -> Result<()> {
        check::at_least("TransformerConfig::vocab", self.vocab, 2)?;
        check::at_least("TransformerConfig::length", self.length, 1)?;
        check::at_least("TransformerConfig::heads", self.heads, 1)?;
        let holds = self.width > 0 && self.width.is_multiple_of(self.heads);
        let expected = "a positive multiple of the heads";
        check::require(holds, "TransformerConfig::width", self.width, expected)
    }
}

/// A bidirectional pre-norm transformer with learned positions; it does not see the noise level,
/// which the number of masks tells.
pub struct TransformerDenoiser {
    embed: Linear,
    positions: Tensor,
    layers: Vec<Layer>,
    norm: LayerNorm,
    head: Linear,
    heads: usize,
}

struct Layer {
    norms: [LayerNorm; 2],
    attention: [Linear; 4],
    feed: [Linear; 2],
}

impl TransformerDenoiser {
    /// A network from variables of the builder.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`]; those of candle.
    pub fn new(config: &TransformerConfig, vb: VarBuilder) -> Result<Self> {
        config.validate()?;
        let (w, v) = (config.width, config.vocab + 1);
        let norm = |vb| layer_norm(w, LayerNormConfig::default(), vb);
        let mut layers = vec![];
        for k in 0..config.layers {
            let vb = vb.pp("layers").pp(k);
            let square = |name: &str| linear(w, w, vb.pp(name));
            layers.push(Layer {
                norms: [norm(vb.pp("norm.0"))?, norm(vb.pp("norm.1"))?],
                attention: [
                    square("query")?,
                    square("key")?,
                    square("value")?,
                    square("out")?,
                ],
                feed: [
                    linear(w, 4 * w, vb.pp("feed.0"))?.with_activation(Activation::Gelu),
                    linear(4 * w, w, vb.pp("feed.1"))?,
                ],
            });
        }
        let init = Init::Randn {
            mean: 0.0,
            stdev: 0.02,
        };
        Ok(Self {
            embed: linear(v, w, vb.pp("embed"))?,
            positions: vb.get_with_hints((config.length, w), "positions", init)?,
            layers,
            norm: norm(vb.pp("norm"))?,
            head: linear(w, v, vb.pp("head"))?,
            heads: config.heads,
        })
    }
}

impl DiscreteDenoiser for TransformerDenoiser {
    fn logits(&self, x: &Tensor, _: &Tensor, _: bool) -> Result<Tensor> {
        let (_, l, _) = x.dims3()?;
        if l > self.positions.dims()[0] {
            let expected = format!("at most {} positions", self.positions.dims()[0]);
            return Err(Error::shape("tokens", x.dims(), expected));
        }
        let mut h = self.embed.forward(&x.contiguous()?)?;
        h = h.broadcast_add(&self.positions.narrow(0, 0, l)?)?;
        for layer in &self.layers {
            let rows = layer.norms[0].forward(&h)?;
            let [q, k, v, out] = &layer.attention;
            let (q, k, v) = (q.forward(&rows)?, k.forward(&rows)?, v.forward(&rows)?);
            let mixed = multi_head_attention(&q, &k, &v, self.heads, &AttentionConfig::default())?;
            h = (h + out.forward(&mixed)?)?;
            let rows = layer.norms[1].forward(&h)?;
            h = (h + layer.feed[1].forward(&layer.feed[0].forward(&rows)?)?)?;
        }
        Ok(self.head.forward(&self.norm.forward(&h)?)?)
    }
}

//! A small causal transformer language model.

use super::layers::{linear, TokenNorm, TokenNormLayer};
use crate::activation::Activation;
use crate::attention::{multi_head_attention, AttentionConfig};
use crate::embedding::rows_of;
use crate::init::{Gain, Initializer};
use crate::linear::Linear;
use crate::norm::power::PowerNorm;
use crate::norm::LayerNormConfig;
use crate::{Error, Result};
use candle_core::{DType, Module, ModuleT, Tensor};
use candle_nn::VarBuilder;

/// Configuration of [`TransformerLm`].
#[derive(Debug, Clone, PartialEq)]
pub struct TransformerConfig {
    /// Number of tokens in the vocabulary.
    pub vocabulary: usize,
    /// Width of the token vectors.
    pub dim: usize,
    /// Number of blocks.
    pub layers: usize,
    /// Attention heads; they divide `dim`.
    pub heads: usize,
    /// Width of the hidden layer of the feed-forward part.
    pub feed_forward: usize,
    /// Longest sequence (positions are learned).
    pub max_length: usize,
    /// The norm of every block.
    pub norm: TokenNorm,
    /// Normalize each part's input, and once more at the end, instead of each residual sum.
    pub pre_norm: bool,
    /// Of the feed-forward part.
    pub activation: Activation,
    /// Standard deviation of the initial embeddings of tokens and positions.
    pub embedding_std: f64,
}

impl Default for TransformerConfig {
    /// Two post-norm blocks of width 32 with 4 heads and layer norm.
    fn default() -> Self {
        Self {
            vocabulary: 32,
            dim: 32,
            layers: 2,
            heads: 4,
            feed_forward: 128,
            max_length: 128,
            norm: TokenNorm::Layer(LayerNormConfig::default()),
            pre_norm: false,
            activation: Activation::Relu,
            embedding_std: 1.0,
        }
    }
}

impl TransformerConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`].
    pub fn validate(&self) -> Result<()> {
        let sizes = [
            ("TransformerConfig::vocabulary", self.vocabulary),
            ("TransformerConfig::dim", self.dim),
            ("TransformerConfig::layers", self.layers),
            ("TransformerConfig::heads", self.heads),
            ("TransformerConfig::feed_forward", self.feed_forward),
            ("TransformerConfig::max_length", self.max_length),
        ];
        for (field, size) in sizes {
            if size == 0 {
                return Err(Error::config(field, 0, "at least 1"));
            }
        }
        if !self.dim.is_multiple_of(self.heads) {
            let field = "TransformerConfig::heads";
            let expected = format!("a divisor of dim = {}", self.dim);
            return Err(Error::config(field, self.heads, expected));
        }
        if !(self.embedding_std.is_finite() && self.embedding_std >= 0.0) {
            let field = "TransformerConfig::embedding_std";
            return Err(Error::config(
                field,
                self.embedding_std,
                "a finite number >= 0",
            ));
        }
        Ok(())
    }
}

/// Multi-head self-attention over `[B, T, C]`.
#[derive(Debug, Clone)]
struct Attention {
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    heads: usize,
}

impl Attention {
    fn new(config: &TransformerConfig, vb: VarBuilder) -> Result<Self> {
        let init = Initializer::xavier_uniform(Gain::Linear);
        let make = |name: &str| linear(config.dim, config.dim, true, init, vb.pp(name));
        Ok(Self {
            query: make("query")?,
            key: make("key")?,
            value: make("value")?,
            output: make("output")?,
            heads: config.heads,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (q, k) = (self.query.forward(x)?, self.key.forward(x)?);
        let v = self.value.forward(x)?;
        let causal = AttentionConfig {
            causal: true,
            ..Default::default()
        };
        let mixed = multi_head_attention(&q, &k, &v, self.heads, &causal)?;
        Ok(self.output.forward(&mixed)?)
    }
}

#[derive(Debug, Clone)]
struct Block {
    attention: Attention,
    attention_norm: TokenNormLayer,
    inner: Linear,
    outer: Linear,
    feed_forward_norm: TokenNormLayer,
    pre_norm: bool,
}

impl Block {
    fn new(config: &TransformerConfig, vb: VarBuilder) -> Result<Self> {
        let (dim, hidden) = (config.dim, config.feed_forward);
        let init = Initializer::xavier_uniform(Gain::Linear);
        Ok(Self {
            attention: Attention::new(config, vb.pp("attention"))?,
            attention_norm: config.norm.build(dim, vb.pp("attention_norm"))?,
            inner: linear(dim, hidden, true, init, vb.pp("inner"))?
                .with_activation(config.activation),
            outer: linear(hidden, dim, true, init, vb.pp("outer"))?,
            feed_forward_norm: config.norm.build(dim, vb.pp("feed_forward_norm"))?,
            pre_norm: config.pre_norm,
        })
    }

    fn feed_forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(self.outer.forward(&self.inner.forward(x)?)?)
    }

    fn forward(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        let (first, second) = (&self.attention_norm, &self.feed_forward_norm);
        if self.pre_norm {
            let x = (x + self.attention.forward(&first.forward_t(x, train)?)?)?;
            return Ok((&x + self.feed_forward(&second.forward_t(&x, train)?)?)?);
        }
        let x = first.forward_t(&(x + self.attention.forward(x)?)?, train)?;
        Ok(second.forward_t(&(&x + self.feed_forward(&x)?)?, train)?)
    }
}

/// Learned token and position embeddings, blocks of causal self-attention and a feed-forward
/// part, and a linear layer to logits. No dropout.
///
/// Variables `tokens`, `positions`, `blocks.0.attention.query.weight`,
/// `blocks.0.attention_norm.weight`, ..., `norm.weight` (pre-norm), `head.weight`, `head.bias`.
#[derive(Debug, Clone)]
pub struct TransformerLm {
    tokens: Tensor,
    positions: Tensor,
    blocks: Vec<Block>,
    norm: Option<TokenNormLayer>,
    head: Linear,
}

impl TransformerLm {
    /// Takes its variables from `vb`.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`], and candle's when variables do not fit.
    pub fn new(config: &TransformerConfig, vb: VarBuilder) -> Result<Self> {
        config.validate()?;
        let embedding = Initializer::Normal {
            mean: 0.0,
            std: config.embedding_std,
        };
        let embed = |rows: usize, name: &str| -> Result<Tensor> {
            let shape = [rows, config.dim];
            Ok(vb.get_with_hints(&shape, name, embedding.hint(&shape)?)?)
        };
        let block = |i: usize| Block::new(config, vb.pp("blocks").pp(i));
        let blocks: Result<Vec<Block>> = (0..config.layers).map(block).collect();
        let norm = match config.pre_norm {
            true => Some(config.norm.build(config.dim, vb.pp("norm"))?),
            false => None,
        };
        let init = Initializer::xavier_uniform(Gain::Linear);
        Ok(Self {
            tokens: embed(config.vocabulary, "tokens")?,
            positions: embed(config.max_length, "positions")?,
            blocks: blocks?,
            norm,
            head: linear(config.dim, config.vocabulary, true, init, vb.pp("head"))?,
        })
    }

    /// Logits `[B, T, vocabulary]` of each next token after `tokens` `[B, T]` (`u32`).
    ///
    /// # Errors
    /// [`Error::Shape`] for sequences that are empty, too long or not two-dimensional;
    /// [`Error::LabelOutOfRange`] (on the CPU) for a token outside the vocabulary; those of the
    /// norms.
    pub fn forward(&self, tokens: &Tensor, train: bool) -> Result<Tensor> {
        let longest = self.positions.dim(0)?;
        let time = match tokens.dims() {
            [batch, time] if *batch > 0 && (1..=longest).contains(time) => *time,
            other => {
                let expected = format!("[B, T] with T from 1 to {longest}");
                return Err(Error::shape("tokens", other, expected));
            }
        };
        if tokens.dtype() != DType::U32 {
            return Err(Error::dtype("tokens", tokens.dtype(), "U32"));
        }
        let words = rows_of(&self.tokens, tokens)?;
        let mut h = words.broadcast_add(&self.positions.narrow(0, 0, time)?)?;
        for block in &self.blocks {
            h = block.forward(&h, train)?;
        }
        if let Some(norm) = &self.norm {
            h = norm.forward_t(&h, train)?;
        }
        Ok(self.head.forward(&h)?)
    }

    /// The power normalization layers, from input to output; empty with another norm.
    pub fn power_norms(&self) -> Vec<&PowerNorm> {
        let inner = self.blocks.iter();
        let norms = inner.flat_map(|b| [&b.attention_norm, &b.feed_forward_norm]);
        norms
            .chain(&self.norm)
            .filter_map(TokenNormLayer::power)
            .collect()
    }
}

impl ModuleT for TransformerLm {
    fn forward_t(&self, tokens: &Tensor, train: bool) -> candle_core::Result<Tensor> {
        Ok(self.forward(tokens, train)?)
    }
}

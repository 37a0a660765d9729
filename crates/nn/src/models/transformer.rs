//! A small causal transformer language model.

use super::layers::{linear, Activation, TokenNorm, TokenNormLayer};
use crate::init::{Gain, Initializer};
use crate::norm::power::PowerNorm;
use crate::norm::LayerNormConfig;
use crate::softmax::softmax;
use crate::{Error, Result};
use candle_core::{DType, Device, Module, ModuleT, Tensor, D};
use candle_nn::{Linear, VarBuilder};

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

    /// `mask` `[T, T]` is added to the scores.
    fn forward(&self, x: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let (batch, time, dim) = x.dims3()?;
        let width = dim / self.heads;
        let split = |t: Tensor| -> Result<Tensor> {
            let heads = t.reshape((batch, time, self.heads, width))?;
            Ok(heads.transpose(1, 2)?.contiguous()?)
        };
        let q = split((self.query.forward(x)? * (width as f64).powf(-0.5))?)?;
        let k = split(self.key.forward(x)?)?;
        let v = split(self.value.forward(x)?)?;
        let scores = q.matmul(&k.transpose(2, 3)?.contiguous()?)?;
        let weights = softmax(&scores.broadcast_add(mask)?, D::Minus1)?;
        let mixed = weights
            .matmul(&v)?
            .transpose(1, 2)?
            .reshape((batch, time, dim))?;
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
    activation: Activation,
    pre_norm: bool,
}

impl Block {
    fn new(config: &TransformerConfig, vb: VarBuilder) -> Result<Self> {
        let (dim, hidden) = (config.dim, config.feed_forward);
        let init = Initializer::xavier_uniform(Gain::Linear);
        Ok(Self {
            attention: Attention::new(config, vb.pp("attention"))?,
            attention_norm: config.norm.build(dim, vb.pp("attention_norm"))?,
            inner: linear(dim, hidden, true, init, vb.pp("inner"))?,
            outer: linear(hidden, dim, true, init, vb.pp("outer"))?,
            feed_forward_norm: config.norm.build(dim, vb.pp("feed_forward_norm"))?,
            activation: config.activation,
            pre_norm: config.pre_norm,
        })
    }

    fn feed_forward(&self, x: &Tensor) -> Result<Tensor> {
        let hidden = self.activation.forward(&self.inner.forward(x)?)?;
        Ok(self.outer.forward(&hidden)?)
    }

    fn forward(&self, x: &Tensor, mask: &Tensor, train: bool) -> Result<Tensor> {
        let (first, second) = (&self.attention_norm, &self.feed_forward_norm);
        if self.pre_norm {
            let x = (x + self.attention.forward(&first.forward_t(x, train)?, mask)?)?;
            return Ok((&x + self.feed_forward(&second.forward_t(&x, train)?)?)?);
        }
        let x = first.forward_t(&(x + self.attention.forward(x, mask)?)?, train)?;
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
        let (batch, time) = match tokens.dims() {
            [batch, time] if *batch > 0 && (1..=longest).contains(time) => (*batch, *time),
            other => {
                let expected = format!("[B, T] with T from 1 to {longest}");
                return Err(Error::shape("tokens", other, expected));
            }
        };
        let flat = tokens.flatten_all()?;
        check_tokens(&flat, self.tokens.dim(0)?)?;
        let words = self.tokens.embedding(&flat)?.reshape((batch, time, ()))?;
        let mut h = words.broadcast_add(&self.positions.narrow(0, 0, time)?)?;
        let mask = causal_mask(time, h.dtype(), h.device())?;
        for block in &self.blocks {
            h = block.forward(&h, &mask, train)?;
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

fn check_tokens(tokens: &Tensor, vocabulary: usize) -> Result<()> {
    if tokens.dtype() != DType::U32 {
        return Err(Error::dtype("tokens", tokens.dtype(), "U32"));
    }
    if !tokens.device().is_cpu() {
        return Ok(());
    }
    let values = tokens.to_vec1::<u32>()?;
    match values.iter().position(|t| *t as usize >= vocabulary) {
        Some(position) => Err(Error::LabelOutOfRange {
            label: i64::from(values[position]),
            position,
            classes: vocabulary,
        }),
        None => Ok(()),
    }
}

/// `-inf` where the column lies after the row.
fn causal_mask(time: usize, dtype: DType, device: &Device) -> Result<Tensor> {
    let value = |i: usize| {
        if i % time > i / time {
            f32::NEG_INFINITY
        } else {
            0.0
        }
    };
    let mask: Vec<f32> = (0..time * time).map(value).collect();
    Ok(Tensor::from_vec(mask, (time, time), device)?.to_dtype(dtype)?)
}

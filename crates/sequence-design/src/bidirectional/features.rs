//! Frozen language models as features of soft tokens.

use super::Encoding;
use crate::error::check;
use crate::{Error, Result};
use candle_core::{DType, Device, Module, Tensor};
use candle_nn::{Init, VarBuilder};
use nn::activation::Activation;
use nn::attention::{multi_head_attention, AttentionConfig};
use nn::linear::{linear, Linear};
use nn::norm::{layer_norm, LayerNorm, LayerNormConfig};

/// A frozen model that turns tokens into a vector, differentiable in the tokens: its first layer is
/// a product with one-hot numbers, never a look-up. Dropout is off.
pub trait SequenceFeatures {
    /// Features `[B, d]` of tokens `[B, T, V]` (one-hot or straight-through).
    ///
    /// # Errors
    /// The model's own.
    fn features(&self, tokens: &Tensor) -> Result<Tensor>;

    /// Dtype and device of the tokens.
    fn place(&self) -> (DType, Device);
}

/// Sizes of a [`KmerTransformer`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EncoderConfig {
    /// Longest sequence in tokens.
    pub tokens: usize,
    /// Tokens there are.
    pub alphabet: usize,
    /// Numbers a token.
    pub width: usize,
    /// Attention heads.
    pub heads: usize,
    /// Numbers in the middle of a feed-forward layer.
    pub feed: usize,
    /// Layers.
    pub layers: usize,
}

impl EncoderConfig {
    /// A small one for sequences of `length` letters: 2 layers of 64 numbers, 4 heads, 128 in the
    /// middle.
    pub fn small(encoding: Encoding, length: usize) -> Self {
        Self {
            tokens: (length + 1).saturating_sub(encoding.order()),
            alphabet: encoding.vocabulary(),
            width: 64,
            heads: 4,
            feed: 128,
            layers: 2,
        }
    }

    fn validate(&self) -> Result<()> {
        check::at_least("EncoderConfig::tokens", self.tokens, 1)?;
        check::at_least("EncoderConfig::alphabet", self.alphabet, 2)?;
        check::at_least("EncoderConfig::heads", self.heads, 1)?;
        check::at_least("EncoderConfig::feed", self.feed, 1)?;
        let holds = self.width > 0 && self.width.is_multiple_of(self.heads);
        let expected = "a positive multiple of the heads";
        check::require(holds, "EncoderConfig::width", self.width, expected)
    }
}

/// One post-norm layer of BERT.
struct EncoderLayer {
    query: Linear,
    key: Linear,
    value: Linear,
    out: Linear,
    first: LayerNorm,
    up: Linear,
    down: Linear,
    second: LayerNorm,
}

impl EncoderLayer {
    fn forward(&self, h: &Tensor, heads: usize) -> Result<Tensor> {
        let (q, k, v) = (
            self.query.forward(h)?,
            self.key.forward(h)?,
            self.value.forward(h)?,
        );
        let mixed = multi_head_attention(&q, &k, &v, heads, &AttentionConfig::default())?;
        let h = self.first.forward(&(h + self.out.forward(&mixed)?)?)?;
        let fed = self.down.forward(&self.up.forward(&h)?)?;
        Ok(self.second.forward(&(h + fed)?)?)
    }
}

fn uniform(bound: f64) -> Init {
    Init::Uniform {
        lo: -bound,
        up: bound,
    }
}

/// A linear layer whose weights are uniform within a bound.
fn dense(
    (inputs, outputs): (usize, usize),
    bound: f64,
    bias: Init,
    vb: VarBuilder,
) -> Result<Linear> {
    let weight = vb.get_with_hints((outputs, inputs), "weight", uniform(bound))?;
    Ok(Linear::new(
        weight,
        Some(vb.get_with_hints(outputs, "bias", bias)?),
    ))
}

/// A small BERT of one's own over soft tokens, mean over the positions. With random weights it is a
/// random feature map; it can be trained like any network. Tokens and positions begin with
/// BERT's values, the layers with those of PyTorch's `TransformerEncoderLayer`: of a random feature map
/// the scales are all there is, and wider ones make it rougher.
pub struct KmerTransformer {
    embed: Linear,
    positions: Tensor,
    layers: Vec<EncoderLayer>,
    heads: usize,
    place: (DType, Device),
}

impl KmerTransformer {
    /// A transformer from variables of the builder.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`]; those of candle.
    pub fn new(config: &EncoderConfig, vb: VarBuilder) -> Result<Self> {
        config.validate()?;
        let w = config.width;
        let mut layers = vec![];
        for k in 0..config.layers {
            let vb = vb.pp("layers").pp(k);
            let norm = |name: &str| layer_norm(w, LayerNormConfig::default(), vb.pp(name));
            // One matrix makes all three, as far as Glorot's bound is concerned.
            let glorot = (6.0 / (4 * w) as f64).sqrt();
            let square = |name: &str, bound| dense((w, w), bound, Init::Const(0.0), vb.pp(name));
            let fed = |name: &str, inputs: usize, outputs| {
                let bound = 1.0 / (inputs as f64).sqrt();
                dense((inputs, outputs), bound, uniform(bound), vb.pp(name))
            };
            layers.push(EncoderLayer {
                query: square("query", glorot)?,
                key: square("key", glorot)?,
                value: square("value", glorot)?,
                out: square("out", 1.0 / (w as f64).sqrt())?,
                first: norm("norm.0")?,
                up: fed("up", w, config.feed)?.with_activation(Activation::Gelu),
                down: fed("down", config.feed, w)?,
                second: norm("norm.1")?,
            });
        }
        let small = Init::Randn {
            mean: 0.0,
            stdev: 0.02,
        };
        let embed = vb.get_with_hints((w, config.alphabet), "embed", small)?;
        Ok(Self {
            embed: Linear::new(embed, None),
            positions: vb.get_with_hints((config.tokens, w), "positions", small)?,
            layers,
            heads: config.heads,
            place: (vb.dtype(), vb.device().clone()),
        })
    }

    /// The vectors of all positions, `[B, T, width]`.
    ///
    /// # Errors
    /// [`Error::Shape`] for longer sequences; those of candle.
    pub fn hidden(&self, tokens: &Tensor) -> Result<Tensor> {
        let (_, t, _) = tokens.dims3()?;
        let positions = positions(&self.positions, 0, t, tokens)?;
        let mut h = self
            .embed
            .forward(&tokens.contiguous()?)?
            .broadcast_add(&positions)?;
        for layer in &self.layers {
            h = layer.forward(&h, self.heads)?;
        }
        Ok(h)
    }
}

fn positions(table: &Tensor, from: usize, count: usize, tokens: &Tensor) -> Result<Tensor> {
    let rows = table.dims()[0];
    match from + count <= rows {
        true => Ok(table.narrow(0, from, count)?),
        false => Err(Error::shape(
            "tokens",
            tokens.dims(),
            format!("at most {rows} positions"),
        )),
    }
}

impl SequenceFeatures for KmerTransformer {
    fn features(&self, tokens: &Tensor) -> Result<Tensor> {
        Ok(self.hidden(tokens)?.mean(1)?)
    }

    fn place(&self) -> (DType, Device) {
        self.place.clone()
    }
}

/// Sizes and special tokens of a [`SafetensorsBert`]; the defaults are DNABERT's for 3-mers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BertConfig {
    /// Tokens of the model's vocabulary, special ones included.
    pub vocabulary: usize,
    /// Numbers a token.
    pub hidden: usize,
    /// Layers.
    pub layers: usize,
    /// Attention heads.
    pub heads: usize,
    /// Numbers in the middle of a feed-forward layer.
    pub intermediate: usize,
    /// Longest sequence, special tokens included.
    pub positions: usize,
    /// Kinds of segments.
    pub segments: usize,
    /// Added to variances.
    pub norm_eps: f64,
    /// The token in front.
    pub cls: usize,
    /// The token at the end.
    pub sep: usize,
    /// The number of the first real token; design token `i` is the model's `first + i`.
    pub first: usize,
}

impl Default for BertConfig {
    fn default() -> Self {
        Self {
            vocabulary: 69,
            hidden: 768,
            layers: 12,
            heads: 12,
            intermediate: 3072,
            positions: 512,
            segments: 2,
            norm_eps: 1e-12,
            cls: 2,
            sep: 3,
            first: 5,
        }
    }
}

/// BERT with the parameter names of its usual safetensors files
/// (`embeddings.word_embeddings.weight`, `encoder.layer.0.attention.self.query.weight`, ...), frozen:
/// the mean of the last layer over the real positions.
///
/// Which letter a design token is, is the caller's alphabet: DNABERT's 3-mers count the letters in
/// the order `A, T, C, G`.
pub struct SafetensorsBert {
    words: Tensor,
    /// What position and segment add, and the norm behind it.
    places: Tensor,
    norm: LayerNorm,
    layers: Vec<EncoderLayer>,
    config: BertConfig,
    place: (DType, Device),
}

impl SafetensorsBert {
    /// Reads the parameters, with or without the prefix `bert.`.
    ///
    /// ```no_run
    /// use candle_core::{DType, Device};
    /// use candle_nn::VarBuilder;
    /// use thalweg_sequence_design::bidirectional::{BertConfig, SafetensorsBert};
    ///
    /// let tensors = candle_core::safetensors::load("dnabert3.safetensors", &Device::Cpu)?;
    /// let vb = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    /// let model = SafetensorsBert::new(&BertConfig::default(), vb)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::InvalidConfig`]; candle's for parameters that are missing or of another shape.
    pub fn new(config: &BertConfig, vb: VarBuilder) -> Result<Self> {
        let c = *config;
        check::at_least("BertConfig::heads", c.heads, 1)?;
        let holds = c.hidden > 0 && c.hidden.is_multiple_of(c.heads);
        check::require(
            holds,
            "BertConfig::hidden",
            c.hidden,
            "a positive multiple of the heads",
        )?;
        let holds = c.cls < c.vocabulary && c.sep < c.vocabulary && c.first < c.vocabulary;
        check::require(
            holds,
            "BertConfig::first",
            (c.cls, c.sep, c.first),
            "below the vocabulary",
        )?;
        let vb = match vb.contains_tensor("bert.embeddings.word_embeddings.weight") {
            true => vb.pp("bert"),
            false => vb,
        };
        let config_norm = LayerNormConfig {
            eps: c.norm_eps,
            ..LayerNormConfig::default()
        };
        let norm = |vb| layer_norm(c.hidden, config_norm, vb);
        let embeddings = vb.pp("embeddings");
        let table = |name: &str, rows| embeddings.get((rows, c.hidden), name);
        let segment = table("token_type_embeddings.weight", c.segments)?.narrow(0, 0, 1)?;
        let places = table("position_embeddings.weight", c.positions)?.broadcast_add(&segment)?;
        let mut layers = vec![];
        for k in 0..c.layers {
            let vb = vb.pp("encoder.layer").pp(k);
            let square = |name: &str| linear(c.hidden, c.hidden, vb.pp(name));
            let up = linear(c.hidden, c.intermediate, vb.pp("intermediate.dense"))?;
            layers.push(EncoderLayer {
                query: square("attention.self.query")?,
                key: square("attention.self.key")?,
                value: square("attention.self.value")?,
                out: square("attention.output.dense")?,
                first: norm(vb.pp("attention.output.LayerNorm"))?,
                up: up.with_activation(Activation::Gelu),
                down: linear(c.intermediate, c.hidden, vb.pp("output.dense"))?,
                second: norm(vb.pp("output.LayerNorm"))?,
            });
        }
        Ok(Self {
            words: table("word_embeddings.weight", c.vocabulary)?,
            places,
            norm: norm(embeddings.pp("LayerNorm"))?,
            layers,
            config: c,
            place: (vb.dtype(), vb.device().clone()),
        })
    }
}

impl SequenceFeatures for SafetensorsBert {
    fn features(&self, tokens: &Tensor) -> Result<Tensor> {
        let (b, t, v) = tokens.dims3()?;
        let c = &self.config;
        if c.first + v > c.vocabulary {
            let expected = format!(
                "at most {} tokens behind the special ones",
                c.vocabulary - c.first
            );
            return Err(Error::shape("tokens", tokens.dims(), expected));
        }
        let real = self.words.narrow(0, c.first, v)?;
        let flat = tokens.contiguous()?.reshape((b * t, v))?;
        let real = flat.matmul(&real)?.reshape((b, t, c.hidden))?;
        let special = |id| -> Result<Tensor> {
            Ok(self
                .words
                .narrow(0, id, 1)?
                .unsqueeze(0)?
                .broadcast_as((b, 1, c.hidden))?)
        };
        let words = Tensor::cat(&[&special(c.cls)?, &real, &special(c.sep)?], 1)?;
        let places = positions(&self.places, 0, t + 2, tokens)?;
        let mut h = self.norm.forward(&words.broadcast_add(&places)?)?;
        for layer in &self.layers {
            h = layer.forward(&h, c.heads)?;
        }
        Ok(h.narrow(1, 1, t)?.mean(1)?)
    }

    fn place(&self) -> (DType, Device) {
        self.place.clone()
    }
}

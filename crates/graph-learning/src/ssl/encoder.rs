//! The encoders that all methods share.

use crate::contrastive::EncoderActivation;
use crate::conv::{dropout, GatConfig, GatConv, GcnConfig, GcnConv, Mlp};
use crate::graph::Graph;
use crate::sample::NeighborSampler;
use crate::sparse::Features;
use crate::{Error, RandomStream, Result};
use candle_core::Tensor;
use candle_nn::{Activation, Module, VarBuilder};
use nn::norm::ghost_batch::GhostBatchNorm;

/// The convolution of each layer.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum EncoderConv {
    /// Graph convolutions.
    #[default]
    Gcn,
    /// Graph attention, heads side by side.
    Gat {
        /// Number of heads; it must divide the widths.
        heads: usize,
        /// Probability that an attention weight is dropped in training.
        dropout: f64,
    },
}

/// What follows a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EncoderAct {
    /// `max(x, 0)`.
    #[default]
    Relu,
    /// With a trained slope below 0.
    PRelu,
    /// Nothing.
    Identity,
}

/// Settings of [`Encoder`].
#[derive(Debug, Clone, PartialEq)]
pub struct EncoderConfig {
    /// The convolutions.
    pub conv: EncoderConv,
    /// The width of each layer's output.
    pub widths: Vec<usize>,
    /// What follows each layer but the last.
    pub act: EncoderAct,
    /// What follows the last layer.
    pub last_act: EncoderAct,
    /// A trained bias behind each convolution.
    pub bias: bool,
    /// Batch norm before each activation.
    pub batch_norm: bool,
    /// Probability that an input feature of a layer is dropped in training (dense ones only).
    pub dropout: f64,
}

impl Default for EncoderConfig {
    /// Two graph convolutions of width 128 with a ReLU between them.
    fn default() -> Self {
        Self {
            conv: EncoderConv::Gcn,
            widths: vec![128, 128],
            act: EncoderAct::Relu,
            last_act: EncoderAct::Identity,
            bias: true,
            batch_norm: false,
            dropout: 0.0,
        }
    }
}

impl EncoderConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] that names the first bad one.
    pub fn validate(&self) -> Result<()> {
        if self.widths.is_empty() || self.widths.contains(&0) {
            let value = format!("{:?}", self.widths);
            let expected = "at least one width, none of them 0";
            return Err(Error::config("EncoderConfig::widths", value, expected));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            let expected = "a probability in [0, 1)";
            return Err(Error::config(
                "EncoderConfig::dropout",
                self.dropout,
                expected,
            ));
        }
        if let EncoderConv::Gat { heads, .. } = self.conv {
            let whole = |w: &usize| heads > 0 && w.is_multiple_of(heads);
            if !self.widths.iter().all(whole) {
                let expected = format!("a divisor of all of {:?}", self.widths);
                return Err(Error::config("EncoderConv::Gat::heads", heads, expected));
            }
        }
        Ok(())
    }
}

/// Inside the root of the batch norm.
pub(super) const NORM_EPS: f64 = 1e-5;

#[derive(Debug, Clone)]
enum Conv {
    Gcn(GcnConv),
    Gat(GatConv),
}

#[derive(Debug)]
struct Layer {
    conv: Conv,
    norm: Option<GhostBatchNorm>,
    act: Option<EncoderActivation>,
}

impl Layer {
    /// What follows the convolution.
    fn after(&self, h: Tensor, train: bool) -> Result<Tensor> {
        let h = match &self.norm {
            Some(norm) if train => norm.forward_train(&h)?,
            Some(norm) => norm.forward_eval(&h)?,
            None => h,
        };
        match &self.act {
            Some(act) => act.apply(&h),
            None => Ok(h),
        }
    }

    /// The output of all nodes without training, `batch` of them at a time with all their neighbors.
    fn in_batches(&self, graph: &Graph, x: &Features, batch: usize) -> Result<Tensor> {
        let looped = match &self.conv {
            Conv::Gcn(_) => graph.with_loops()?,
            Conv::Gat(_) => graph.with_fresh_loops()?,
        };
        let mut sampler = NeighborSampler::new(looped, &[None])?;
        // All neighbors are taken, so that nothing is drawn.
        let rng = &mut RandomStream::new(0);
        let nodes: Vec<u32> = (0..graph.num_nodes() as u32).collect();
        let mut parts = Vec::with_capacity(nodes.len().div_ceil(batch));
        for seeds in nodes.chunks(batch) {
            let drawn = sampler.sample(seeds, rng)?;
            // One block for the one fan-out.
            let block = &drawn.blocks[0].graph;
            let x = x.select_rows(&drawn.n_id)?;
            let h = match &self.conv {
                Conv::Gcn(conv) => conv.apply_block(looped, block, &drawn.n_id, &x)?,
                Conv::Gat(conv) => conv.apply_looped(block, &x, None, None)?,
            };
            parts.push(self.after(h, false)?.detach());
        }
        Ok(Tensor::cat(&parts, 0)?)
    }
}

/// A stack of convolutions. Parameters `layers.L.*` of the convolution, `norm.*` and `act.*`.
#[derive(Debug)]
pub struct Encoder {
    layers: Vec<Layer>,
    dropout: f64,
}

impl Encoder {
    /// An encoder of `inputs` features.
    ///
    /// # Errors
    /// Those of [`EncoderConfig::validate`], and of the builder.
    pub fn new(inputs: usize, config: &EncoderConfig, vb: VarBuilder) -> Result<Self> {
        config.validate()?;
        let last = config.widths.len() - 1;
        let mut layers = Vec::with_capacity(config.widths.len());
        let mut width = inputs;
        for (i, outputs) in config.widths.iter().enumerate() {
            let vb = vb.pp(format!("layers.{i}"));
            let conv = match config.conv {
                EncoderConv::Gcn => {
                    let gcn = GcnConfig {
                        bias: config.bias,
                        ..GcnConfig::default()
                    };
                    Conv::Gcn(GcnConv::new(width, *outputs, gcn, vb.clone())?)
                }
                EncoderConv::Gat { heads, dropout } => {
                    let gat = GatConfig {
                        heads,
                        dropout,
                        bias: config.bias,
                        ..GatConfig::default()
                    };
                    Conv::Gat(GatConv::new(width, outputs / heads, gat, vb.clone())?)
                }
            };
            let norm = match config.batch_norm {
                true => Some(nn::norm::batch_norm(*outputs, NORM_EPS, vb.pp("norm"))?),
                false => None,
            };
            let act = match if i == last {
                config.last_act
            } else {
                config.act
            } {
                EncoderAct::Relu => Some(EncoderActivation::Relu),
                EncoderAct::PRelu => Some(EncoderActivation::prelu(vb.pp("act"))?),
                EncoderAct::Identity => None,
            };
            layers.push(Layer { conv, norm, act });
            width = *outputs;
        }
        Ok(Self {
            layers,
            dropout: config.dropout,
        })
    }

    /// The outputs of all layers. A stream means training: dropout draws from it, and batch norm takes
    /// (and keeps) the statistics of this batch.
    ///
    /// # Errors
    /// Shapes and dtypes that do not fit.
    pub fn layers(
        &self,
        graph: &Graph,
        x: &Features,
        mut train: Option<&mut RandomStream>,
    ) -> Result<Vec<Tensor>> {
        let mut outputs: Vec<Tensor> = Vec::with_capacity(self.layers.len());
        for layer in &self.layers {
            let input = match outputs.last() {
                None => x.clone(),
                Some(h) => Features::Dense(h.clone()),
            };
            let input = match input {
                Features::Dense(h) => dropout(&h, self.dropout, train.as_deref_mut())?.into(),
                sparse => sparse,
            };
            let h = match &layer.conv {
                Conv::Gcn(conv) => conv.apply(graph, &input, None)?,
                Conv::Gat(conv) => conv.apply(graph, &input, None, train.as_deref_mut())?,
            };
            outputs.push(layer.after(h, train.is_some())?);
        }
        Ok(outputs)
    }

    /// The output of the last layer.
    ///
    /// # Errors
    /// As [`layers`](Self::layers).
    pub fn forward(
        &self,
        graph: &Graph,
        x: &Features,
        train: Option<&mut RandomStream>,
    ) -> Result<Tensor> {
        let mut outputs = self.layers(graph, x, train)?;
        // There is at least one layer.
        outputs
            .pop()
            .ok_or_else(|| Error::argument("layers", 0, "at least 1"))
    }

    /// The output of the last layer without training and without a graph behind it. With a batch size,
    /// layer by layer and so many nodes at a time, each with all its neighbors: the same numbers but for
    /// rounding, in the memory of two layers' outputs and of one batch.
    ///
    /// # Errors
    /// Shapes and dtypes that do not fit; [`Error::InvalidArgument`] for a batch of 0.
    pub fn embed(&self, graph: &Graph, x: &Features, batch: Option<usize>) -> Result<Tensor> {
        let (Some(batch), [first, rest @ ..]) = (part(batch, graph.num_nodes())?, &*self.layers)
        else {
            return Ok(self.forward(graph, x, None)?.detach());
        };
        let mut h = first.in_batches(graph, x, batch)?;
        for layer in rest {
            h = layer.in_batches(graph, &h.into(), batch)?;
        }
        Ok(h)
    }
}

/// The size of a batch of nodes, where it is not all of them.
pub(super) fn part(batch: Option<usize>, nodes: usize) -> Result<Option<usize>> {
    match batch {
        Some(0) => Err(Error::argument("batch", 0, "at least 1")),
        batch => Ok(batch.filter(|b| *b < nodes)),
    }
}

/// `W_2 prelu(W_0 x + b_0) + b_2` with a trained slope. Parameters `first.0.*`, `act.weight`,
/// `last.0.*`.
#[derive(Debug)]
pub(super) struct PReluPerceptron {
    first: Mlp,
    act: EncoderActivation,
    last: Mlp,
}

impl PReluPerceptron {
    pub fn new([inputs, hidden, outputs]: [usize; 3], vb: VarBuilder) -> Result<Self> {
        // One linear layer each, so that their own activation never runs.
        let linear = |widths: [usize; 2], vb| Mlp::new(&widths, Activation::Relu, vb);
        Ok(Self {
            first: linear([inputs, hidden], vb.pp("first"))?,
            act: EncoderActivation::prelu(vb.pp("act"))?,
            last: linear([hidden, outputs], vb.pp("last"))?,
        })
    }

    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let h = self.act.apply(&self.first.forward(x)?)?;
        Ok(self.last.forward(&h)?)
    }
}

//! Methods without two views: GraphECL and DGI.

use super::encoder::{part, Encoder, EncoderAct, EncoderConfig, NORM_EPS};
use super::losses::{efficient_contrast, mutual_information};
use super::two_views::below;
use super::{GraphView, SslMethod};
use crate::conv::Mlp;
use crate::graph::Graph;
use crate::sparse::Features;
use crate::{Error, RandomStream, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{Activation, Init, Module};
use nn::init::SeededVars;
use nn::norm::ghost_batch::GhostBatchNorm;

/// Settings of [`GraphEcl`].
#[derive(Debug, Clone, PartialEq)]
pub struct GraphEclConfig {
    /// The graph encoder; its last width is the embeddings'.
    pub encoder: EncoderConfig,
    /// Hidden width of the graph-free encoder.
    pub hidden: usize,
    /// Temperature.
    pub temperature: f64,
    /// Weight of the sums across encoders.
    pub lambda: f64,
    /// Random nodes in the sums, drawn anew in each step; all of them when `None`.
    pub negatives: Option<usize>,
}

impl Default for GraphEclConfig {
    fn default() -> Self {
        Self {
            encoder: EncoderConfig {
                widths: vec![128, 128, 128],
                ..EncoderConfig::default()
            },
            hidden: 128,
            temperature: 0.8,
            lambda: 5e-6,
            negatives: None,
        }
    }
}

/// GraphECL: a graph encoder teaches a perceptron, which needs no graph afterwards; the embedding is
/// the perceptron's.
#[derive(Debug)]
pub struct GraphEcl {
    encoder: Encoder,
    first: (Tensor, Tensor),
    norm: GhostBatchNorm,
    second: Mlp,
    projector: Mlp,
    config: GraphEclConfig,
    params: Vec<(String, Var)>,
}

impl GraphEcl {
    /// With variables `encoder.*`, `perceptron.*` and `projector.*`.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`], and those of the builder.
    pub fn new(
        inputs: usize,
        config: GraphEclConfig,
        vars: &SeededVars,
        (dtype, device): (DType, &Device),
    ) -> Result<Self> {
        config.encoder.validate()?;
        for (field, value) in [
            ("GraphEclConfig::temperature", config.temperature),
            ("GraphEclConfig::lambda", config.lambda),
        ] {
            if !(value.is_finite() && value > 0.0) {
                return Err(Error::config(field, value, "a positive number"));
            }
        }
        if config.hidden == 0 || config.negatives == Some(0) {
            let value = format!("{} hidden, {:?} negatives", config.hidden, config.negatives);
            return Err(Error::config("GraphEclConfig", value, "at least 1 of each"));
        }
        let vb = vars.builder(dtype, device);
        let width = config.encoder.widths[config.encoder.widths.len() - 1];
        let perceptron = vb.pp("perceptron");
        let bound = 1.0 / (inputs.max(1) as f64).sqrt();
        let uniform = Init::Uniform {
            lo: -bound,
            up: bound,
        };
        let relu = Activation::Relu;
        Ok(Self {
            encoder: Encoder::new(inputs, &config.encoder, vb.pp("encoder"))?,
            first: (
                perceptron.get_with_hints((config.hidden, inputs), "0.weight", uniform)?,
                perceptron.get_with_hints(config.hidden, "0.bias", uniform)?,
            ),
            norm: nn::norm::batch_norm(config.hidden, NORM_EPS, perceptron.pp("1"))?,
            second: Mlp::new(&[config.hidden, width], relu, perceptron.pp("3"))?,
            projector: Mlp::new(&[width, width], relu, vb.pp("projector"))?,
            params: below(vars, &["encoder.", "perceptron.", "projector."]),
            config,
        })
    }

    fn perceptron(&self, x: &Features, train: bool) -> Result<Tensor> {
        let h = x.linear(&self.first.0)?.broadcast_add(&self.first.1)?;
        let h = match train {
            true => self.norm.forward_train(&h)?,
            false => self.norm.forward_eval(&h)?,
        };
        Ok(self.second.forward(&h.relu()?)?)
    }
}

impl SslMethod for GraphEcl {
    fn params(&self) -> &[(String, Var)] {
        &self.params
    }

    fn loss(&mut self, view: &GraphView<'_>, rng: &mut RandomStream) -> Result<Tensor> {
        let h = self.encoder.forward(view.graph, view.x, Some(rng))?;
        let q = self.projector.forward(&self.perceptron(view.x, true)?)?;
        let others = match self.config.negatives {
            Some(count) if count < h.dims()[0] => {
                let mut order = rng.permutation(h.dims()[0])?;
                order.truncate(count);
                Some(Tensor::from_vec(order, count, h.device())?)
            }
            _ => None,
        };
        let looped = view.graph.with_loops()?;
        let (t, lambda) = (self.config.temperature, self.config.lambda);
        efficient_contrast(looped, &h, &q, t, lambda, others.as_ref())
    }

    fn embed(&self, _: &Graph, x: &Features, batch: Option<usize>) -> Result<Tensor> {
        let rows = x.dims()?.0;
        let Some(batch) = part(batch, rows)? else {
            return Ok(self.perceptron(x, false)?.detach());
        };
        let nodes: Vec<u32> = (0..rows as u32).collect();
        let embed = |nodes: &[u32]| -> Result<Tensor> {
            Ok(self.perceptron(&x.select_rows(nodes)?, false)?.detach())
        };
        let parts: Vec<Tensor> = nodes.chunks(batch).map(embed).collect::<Result<_>>()?;
        Ok(Tensor::cat(&parts, 0)?)
    }
}

/// Deep Graph Infomax: tells real nodes from those of shuffled features by a summary of the graph.
#[derive(Debug)]
pub struct Dgi {
    encoder: Encoder,
    weight: Tensor,
    params: Vec<(String, Var)>,
}

impl Dgi {
    /// With variables `encoder.*` and `discriminator.weight`. As published: one layer of width 512
    /// with a PReLU ([`published_encoder`](Self::published_encoder)).
    ///
    /// # Errors
    /// [`Error::InvalidConfig`], and those of the builder.
    pub fn new(
        inputs: usize,
        encoder: &EncoderConfig,
        vars: &SeededVars,
        (dtype, device): (DType, &Device),
    ) -> Result<Self> {
        encoder.validate()?;
        let vb = vars.builder(dtype, device);
        let width = encoder.widths[encoder.widths.len() - 1];
        let bound = 1.0 / (width as f64).sqrt();
        let uniform = Init::Uniform {
            lo: -bound,
            up: bound,
        };
        Ok(Self {
            encoder: Encoder::new(inputs, encoder, vb.pp("encoder"))?,
            weight: vb.get_with_hints((width, width), "discriminator.weight", uniform)?,
            params: below(vars, &["encoder.", "discriminator."]),
        })
    }

    /// One layer of width 512 with a PReLU.
    pub fn published_encoder() -> EncoderConfig {
        EncoderConfig {
            widths: vec![512],
            last_act: EncoderAct::PRelu,
            ..EncoderConfig::default()
        }
    }
}

impl SslMethod for Dgi {
    fn params(&self) -> &[(String, Var)] {
        &self.params
    }

    fn loss(&mut self, view: &GraphView<'_>, rng: &mut RandomStream) -> Result<Tensor> {
        let real = self.encoder.forward(view.graph, view.x, Some(rng))?;
        let shuffled = view.x.select_rows(&rng.permutation(real.dims()[0])?)?;
        let corrupted = self.encoder.forward(view.graph, &shuffled, Some(rng))?;
        mutual_information(&real, &corrupted, &self.weight)
    }

    fn embed(&self, graph: &Graph, x: &Features, batch: Option<usize>) -> Result<Tensor> {
        self.encoder.embed(graph, x, batch)
    }
}

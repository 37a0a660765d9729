//! The whole models: encoder, fixed point, decoder.

use super::{
    contracting_edge_weights, fixed_point, CgsConfig, Encoder, EncoderConfig, FixedPoint,
    SolveReport,
};
use crate::conv::Mlp;
use crate::graph::GraphBatch;
use crate::readout::global;
use crate::sparse::Reduce;
use crate::{RandomStream, Result};
use candle_core::Tensor;
use candle_nn::{Activation, Module, VarBuilder};

/// A prediction for every node; see the [module](super) page.
#[derive(Debug, Clone)]
pub struct Cgs {
    encoder: Encoder,
    decoder: Mlp,
    config: CgsConfig,
}

impl Cgs {
    /// A model from node and edge features to `outputs` numbers per node, with a decoder of the given
    /// hidden widths (`[64, 32]` as published) and leaky ReLU between them.
    ///
    /// # Errors
    /// Those of [`CgsConfig::validate`], [`EncoderConfig::validate`], and of a width of 0.
    pub fn new(
        node_features: usize,
        edge_features: usize,
        outputs: usize,
        config: CgsConfig,
        encoder: EncoderConfig,
        decoder: &[usize],
        vb: VarBuilder,
    ) -> Result<Self> {
        config.validate()?;
        let widths = [&[config.heads], decoder, &[outputs]].concat();
        let activation = Activation::LeakyRelu(0.01);
        let inputs = (node_features, edge_features);
        Ok(Self {
            encoder: Encoder::new(inputs, config.heads, &encoder, vb.pp("encoder"))?,
            decoder: Mlp::new(&widths, activation, vb.pp("decoder"))?,
            config,
        })
    }

    /// The outputs `[n, outputs]` for node features `[n, ..]` and edge features `[E, ..]`, and how
    /// the fixed point was found. A stream means training: dropout draws from it.
    ///
    /// # Errors
    /// Those of [`fixed_point`], shapes and dtypes that do not fit.
    pub fn forward(
        &self,
        batch: &GraphBatch,
        x: &Tensor,
        u: &Tensor,
        train: Option<&mut RandomStream>,
    ) -> Result<(Tensor, SolveReport)> {
        let (h, report) = self.states(batch, x, u, train)?;
        Ok((self.decoder.forward(&h)?, report))
    }

    /// The fixed points `[n, heads]`.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn states(
        &self,
        batch: &GraphBatch,
        x: &Tensor,
        u: &Tensor,
        train: Option<&mut RandomStream>,
    ) -> Result<(Tensor, SolveReport)> {
        let (graph, config) = (batch.graph(), self.config);
        let (bias, logits) = self.encoder.forward(graph, x, u, train)?;
        let weights =
            contracting_edge_weights(graph, &logits, config.normalizer, config.orientation)?;
        let how = FixedPoint {
            gamma: config.gamma,
            activation: config.activation,
            orientation: config.orientation,
            solver: config.solver,
            backward: config.backward.unwrap_or(config.solver),
        };
        fixed_point(graph, Some(batch.ptr()), &weights, &bias, how)
    }

    /// The outputs without the fixed point: encoder and decoder alone, the baseline that has as many
    /// parameters.
    ///
    /// # Errors
    /// Shapes and dtypes that do not fit.
    pub fn without_fixed_point(
        &self,
        batch: &GraphBatch,
        x: &Tensor,
        u: &Tensor,
        train: Option<&mut RandomStream>,
    ) -> Result<Tensor> {
        let (bias, _) = self.encoder.forward(batch.graph(), x, u, train)?;
        Ok(self.decoder.forward(&bias)?)
    }
}

/// A prediction for every graph: the fixed points of its nodes are reduced before the decoder.
#[derive(Debug, Clone)]
pub struct GraphCgs {
    nodes: Cgs,
    readout: Reduce,
}

impl GraphCgs {
    /// A model whose decoder takes the sum, mean or maximum of each graph's fixed points.
    pub fn new(nodes: Cgs, readout: Reduce) -> Self {
        Self { nodes, readout }
    }

    /// The outputs `[graphs, outputs]`.
    ///
    /// # Errors
    /// As [`Cgs::forward`].
    pub fn forward(
        &self,
        batch: &GraphBatch,
        x: &Tensor,
        u: &Tensor,
        train: Option<&mut RandomStream>,
    ) -> Result<(Tensor, SolveReport)> {
        let (h, report) = self.nodes.states(batch, x, u, train)?;
        let pooled = global(batch, &h, self.readout)?;
        Ok((self.nodes.decoder.forward(&pooled)?, report))
    }
}

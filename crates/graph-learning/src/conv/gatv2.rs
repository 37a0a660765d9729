//! Graph attention whose scores depend on both ends together.

use super::gat::loops_with_features;
use super::{
    add_bias, dropout, glorot, leaky_relu, linear, of_targets, weight, GatConfig, GraphModule,
    ZEROS,
};
use crate::graph::Graph;
use crate::sparse::{gather, segment_softmax, spmm, Features, Reduce, Side};
use crate::{Error, RandomStream, Result};
use candle_core::Tensor;
use candle_nn::VarBuilder;

/// Settings of [`Gatv2Conv`].
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Gatv2Config {
    /// What it shares with [`GatConv`](super::GatConv).
    pub gat: GatConfig,
    /// Take `W_r = W_l`.
    pub share_weights: bool,
}

/// `sum_s alpha_ts W_l x_s + b`, `alpha` the softmax over the edges into `t` of
/// `<a, leaky(W_l x_s + W_r x_t (+ W_edge u_e))>`, for each head.
///
/// Parameters `lin_l.weight`, `lin_l.bias`, `lin_r.weight`, `lin_r.bias`, `att` `[1, heads, out]`,
/// `bias`, and `lin_edge.weight` with edge features.
#[derive(Debug, Clone)]
pub struct Gatv2Conv {
    left: (Tensor, Option<Tensor>),
    right: (Tensor, Option<Tensor>),
    attention: Tensor,
    edge: Option<Tensor>,
    bias: Option<Tensor>,
    outputs: usize,
    config: Gatv2Config,
}

impl Gatv2Conv {
    /// A layer from `inputs` features to `outputs` for each head.
    ///
    /// # Errors
    /// Those of [`GatConfig::validate`], [`Error::InvalidArgument`] for a width of 0, and those of
    /// the builder.
    pub fn new(inputs: usize, outputs: usize, config: Gatv2Config, vb: VarBuilder) -> Result<Self> {
        config.gat.validate()?;
        let heads = config.gat.heads;
        let wide = heads * outputs;
        let projection = |name: &str| -> Result<(Tensor, Option<Tensor>)> {
            let vb = vb.pp(name);
            let bias = match config.gat.bias {
                true => Some(vb.get_with_hints(wide, "bias", ZEROS)?),
                false => None,
            };
            Ok((
                weight(&vb, "weight", (inputs, wide), glorot(inputs, wide))?,
                bias,
            ))
        };
        let left = projection("lin_l")?;
        let right = match config.share_weights {
            true => left.clone(),
            false => projection("lin_r")?,
        };
        let shown = if config.gat.concat { wide } else { outputs };
        Ok(Self {
            left,
            right,
            attention: vb.get_with_hints((1, heads, outputs), "att", glorot(heads, outputs))?,
            edge: match config.gat.edge_dim {
                Some(d) => Some(weight(&vb, "lin_edge.weight", (d, wide), glorot(d, wide))?),
                None => None,
            },
            bias: match config.gat.bias {
                true => Some(vb.get_with_hints(shown, "bias", ZEROS)?),
                false => None,
            },
            outputs,
            config,
        })
    }

    /// The output without dropout: `[targets, heads * out]` or `[targets, out]`.
    ///
    /// # Errors
    /// Shapes and dtypes that do not fit.
    pub fn forward(&self, graph: &Graph, x: &Tensor) -> Result<Tensor> {
        self.apply(graph, &Features::Dense(x.clone()), None, None)
    }

    /// As [`GatConv::apply`](super::GatConv::apply).
    ///
    /// # Errors
    /// As [`GatConv::apply`](super::GatConv::apply).
    pub fn apply(
        &self,
        graph: &Graph,
        x: &Features,
        edge_features: Option<&Tensor>,
        train: Option<&mut RandomStream>,
    ) -> Result<Tensor> {
        if edge_features.is_some() != self.edge.is_some() {
            let has = if self.edge.is_some() {
                "given"
            } else {
                "none: the layer has no edge_dim"
            };
            return Err(Error::argument(
                "edge features",
                edge_features.is_some(),
                has,
            ));
        }
        let config = self.config.gat;
        let sent = self.project(&self.left, x)?;
        let received = of_targets(graph, &self.project(&self.right, x)?)?;
        let (graph, u) = loops_with_features(graph, edge_features, config.add_self_loops)?;
        let mut joint =
            (gather(&graph, &sent, Side::Source)? + gather(&graph, &received, Side::Target)?)?;
        if let (Some(w), Some(u)) = (&self.edge, u) {
            let u = linear(&u, w, None)?;
            joint = (joint + u.reshape((graph.num_edges(), config.heads, self.outputs))?)?;
        }
        let joint = leaky_relu(&joint, config.negative_slope)?;
        let logits = joint.broadcast_mul(&self.attention)?.sum(2)?;
        let alpha = dropout(&segment_softmax(&graph, &logits)?, config.dropout, train)?;
        let y = spmm(&graph, Some(&alpha), &sent, Reduce::Sum)?;
        let y = match config.concat {
            true => y.flatten_from(1)?,
            false => y.mean(1)?,
        };
        add_bias(y, self.bias.as_ref())
    }

    fn project(&self, (w, bias): &(Tensor, Option<Tensor>), x: &Features) -> Result<Tensor> {
        let z = add_bias(x.linear(w)?, bias.as_ref())?;
        let rows = z.dims()[0];
        Ok(z.reshape((rows, self.config.gat.heads, self.outputs))?)
    }
}

impl GraphModule for Gatv2Conv {
    fn forward_t(
        &self,
        graph: &Graph,
        x: &Tensor,
        train: Option<&mut RandomStream>,
    ) -> Result<Tensor> {
        self.apply(graph, &Features::Dense(x.clone()), None, train)
    }
}

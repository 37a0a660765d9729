//! Graph attention.

use super::{
    add_bias, dropout, glorot, leaky_relu, linear, of_targets, weight, GraphModule, ZEROS,
};
use crate::graph::Graph;
use crate::sparse::{edge_reduce, gather, segment_softmax, spmm, Features, Reduce, Side};
use crate::{Error, RandomStream, Result};
use candle_core::Tensor;
use candle_nn::VarBuilder;

/// Settings of [`GatConv`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GatConfig {
    /// Number of heads.
    pub heads: usize,
    /// Heads side by side (`[n, heads * out]`); otherwise their mean (`[n, out]`).
    pub concat: bool,
    /// Slope of the leaky ReLU below 0.
    pub negative_slope: f64,
    /// Probability that an attention weight is dropped in training, after the softmax.
    pub dropout: f64,
    /// Replace whatever self-loops there are by one on each node.
    pub add_self_loops: bool,
    /// Number of edge features that take part in the attention.
    pub edge_dim: Option<usize>,
    /// Add a trained bias.
    pub bias: bool,
}

impl Default for GatConfig {
    fn default() -> Self {
        Self {
            heads: 1,
            concat: true,
            negative_slope: 0.2,
            dropout: 0.0,
            add_self_loops: true,
            edge_dim: None,
            bias: true,
        }
    }
}

impl GatConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] that names the first bad one.
    pub fn validate(&self) -> Result<()> {
        if self.heads == 0 {
            return Err(Error::config("GatConfig::heads", 0, "at least 1"));
        }
        if !self.negative_slope.is_finite() {
            let field = "GatConfig::negative_slope";
            return Err(Error::config(field, self.negative_slope, "a finite number"));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            let field = "GatConfig::dropout";
            return Err(Error::config(
                field,
                self.dropout,
                "a probability in [0, 1)",
            ));
        }
        if self.edge_dim == Some(0) {
            return Err(Error::config(
                "GatConfig::edge_dim",
                0,
                "at least 1, or None",
            ));
        }
        Ok(())
    }
}

/// `sum_s alpha_ts W x_s + b`, `alpha` the softmax over the edges into `t` of
/// `leaky(<a_src, W x_s> + <a_dst, W x_t> (+ <a_edge, W_edge u_e>))`, for each head.
///
/// Parameters `lin.weight` `[heads * out, in]`, `att_src`, `att_dst` `[1, heads, out]`, `bias`, and
/// `lin_edge.weight`, `att_edge` with edge features.
#[derive(Debug, Clone)]
pub struct GatConv {
    weight: Tensor,
    source: Tensor,
    target: Tensor,
    edge: Option<(Tensor, Tensor)>,
    bias: Option<Tensor>,
    outputs: usize,
    config: GatConfig,
}

impl GatConv {
    /// A layer from `inputs` features to `outputs` for each head.
    ///
    /// # Errors
    /// Those of [`GatConfig::validate`], [`Error::InvalidArgument`] for a width of 0, and those of
    /// the builder.
    pub fn new(inputs: usize, outputs: usize, config: GatConfig, vb: VarBuilder) -> Result<Self> {
        config.validate()?;
        let heads = config.heads;
        let wide = heads * outputs;
        let attention =
            |name: &str| vb.get_with_hints((1, heads, outputs), name, glorot(heads, outputs));
        let edge = match config.edge_dim {
            Some(d) => Some((
                weight(&vb, "lin_edge.weight", (d, wide), glorot(d, wide))?,
                attention("att_edge")?,
            )),
            None => None,
        };
        let shown = if config.concat { wide } else { outputs };
        Ok(Self {
            weight: weight(&vb, "lin.weight", (inputs, wide), glorot(inputs, wide))?,
            source: attention("att_src")?,
            target: attention("att_dst")?,
            edge,
            bias: match config.bias {
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

    /// The output for dense or sparse features, optional edge features `[E, edge_dim]` (a self-loop
    /// that is added gets the mean of the edges into its node), and dropout from a stream.
    ///
    /// # Errors
    /// Shapes and dtypes that do not fit; [`Error::InvalidArgument`] where edge features are given
    /// and the layer has none, or the other way round.
    pub fn apply(
        &self,
        graph: &Graph,
        x: &Features,
        edge_features: Option<&Tensor>,
        train: Option<&mut RandomStream>,
    ) -> Result<Tensor> {
        let (graph, edge_features) = self.with_loops(graph, edge_features)?;
        self.apply_looped(&graph, x, edge_features.as_ref(), train)
    }

    /// [`apply`](Self::apply) on a graph that has its self-loops: also a block of one.
    pub(crate) fn apply_looped(
        &self,
        graph: &Graph,
        x: &Features,
        edge_features: Option<&Tensor>,
        train: Option<&mut RandomStream>,
    ) -> Result<Tensor> {
        let z = x.linear(&self.weight)?;
        let alpha = self.attention(graph, &z, edge_features)?;
        let alpha = dropout(&alpha, self.config.dropout, train)?;
        let z = z.reshape((graph.num_sources(), self.config.heads, self.outputs))?;
        let y = spmm(graph, Some(&alpha), &z, Reduce::Sum)?;
        let y = match self.config.concat {
            true => y.flatten_from(1)?,
            false => y.mean(1)?,
        };
        add_bias(y, self.bias.as_ref())
    }

    /// Attention weights `[E', heads]` of projected features `[sources, heads * out]`, before
    /// dropout.
    fn attention(&self, graph: &Graph, z: &Tensor, edge: Option<&Tensor>) -> Result<Tensor> {
        let sent = self.scores(&self.source, z)?;
        let received = self.scores(&self.target, &of_targets(graph, z)?)?;
        let mut logits =
            (gather(graph, &sent, Side::Source)? + gather(graph, &received, Side::Target)?)?;
        if let (Some((w, a)), Some(u)) = (&self.edge, edge) {
            logits = (logits + self.scores(a, &linear(u, w, None)?)?)?;
        }
        segment_softmax(graph, &leaky_relu(&logits, self.config.negative_slope)?)
    }

    /// `<a_h, z_h>` for each head `h`: `[rows, heads]` from `[rows, heads * out]`, as one product with
    /// the matrix that holds `a_h` at the columns of head `h` in row `h`.
    fn scores(&self, a: &Tensor, z: &Tensor) -> Result<Tensor> {
        let (heads, outputs) = (self.config.heads, self.outputs);
        let own = Tensor::eye(heads, a.dtype(), a.device())?.unsqueeze(2)?;
        let a = own.broadcast_mul(a)?.reshape((heads, heads * outputs))?;
        linear(z, &a, None)
    }

    fn with_loops(&self, graph: &Graph, edge: Option<&Tensor>) -> Result<(Graph, Option<Tensor>)> {
        if edge.is_some() != self.edge.is_some() {
            let has = if self.edge.is_some() {
                "given"
            } else {
                "none: the layer has no edge_dim"
            };
            return Err(Error::argument("edge features", edge.is_some(), has));
        }
        loops_with_features(graph, edge, self.config.add_self_loops)
    }
}

/// Fresh self-loops where asked for, with the mean feature of the other edges into each node.
pub(super) fn loops_with_features(
    graph: &Graph,
    edge: Option<&Tensor>,
    add: bool,
) -> Result<(Graph, Option<Tensor>)> {
    if let Some(u) = edge.filter(|u| u.dims().first() != Some(&graph.num_edges())) {
        let expected = format!("[{}, edge_dim]", graph.num_edges());
        return Err(Error::shape("edge features", u.dims(), expected));
    }
    if !add {
        return Ok((graph.clone(), edge.cloned()));
    }
    let looped = graph.with_fresh_loops()?.clone();
    let Some(u) = edge else {
        return Ok((looped, None));
    };
    let (proper, ids) = graph.remove_self_loops()?;
    let kept = u.index_select(&Tensor::from_slice(&ids, ids.len(), u.device())?, 0)?;
    let means = edge_reduce(&proper, &kept, Reduce::Mean)?;
    Ok((looped, Some(Tensor::cat(&[kept, means], 0)?)))
}

impl GraphModule for GatConv {
    fn forward_t(
        &self,
        graph: &Graph,
        x: &Tensor,
        train: Option<&mut RandomStream>,
    ) -> Result<Tensor> {
        self.apply(graph, &Features::Dense(x.clone()), None, train)
    }
}

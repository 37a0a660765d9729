//! The message-passing layers that give logits and biases.

use crate::conv::{dropout, linear, Mlp};
use crate::graph::Graph;
use crate::sparse::{edge_reduce, gather, segment_softmax, Reduce, Side};
use crate::{Error, RandomStream, Result};
use candle_core::Tensor;
use candle_nn::{Activation, VarBuilder};

/// Settings of [`Encoder`].
#[derive(Debug, Clone, PartialEq)]
pub struct EncoderConfig {
    /// Layers before the last one.
    pub hidden_layers: usize,
    /// Node features between layers.
    pub node_hidden: usize,
    /// Edge features between layers.
    pub edge_hidden: usize,
    /// Hidden widths of the three perceptrons of a layer.
    pub mlp: Vec<usize>,
    /// The activation inside them.
    pub activation: Activation,
    /// The activation after their last layer.
    pub out_activation: Activation,
    /// How messages are made one; the mean divides by the number of in-edges.
    pub aggregation: Reduce,
    /// Dropout after every activation, in training.
    pub dropout: f64,
    /// The initial bias of the last edge layer, which is drawn otherwise. Clipped logits start near 0,
    /// where half of them have no gradient; 0.5 starts them in the middle.
    pub logit_bias: Option<f64>,
}

impl Default for EncoderConfig {
    fn default() -> Self {
        Self {
            hidden_layers: 0,
            node_hidden: 64,
            edge_hidden: 64,
            mlp: vec![64, 64],
            activation: Activation::LeakyRelu(0.01),
            out_activation: Activation::LeakyRelu(0.01),
            aggregation: Reduce::Sum,
            dropout: 0.0,
            logit_bias: None,
        }
    }
}

impl EncoderConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] that names the first bad one.
    pub fn validate(&self) -> Result<()> {
        for (field, width) in [
            ("EncoderConfig::node_hidden", self.node_hidden),
            ("EncoderConfig::edge_hidden", self.edge_hidden),
        ] {
            if width == 0 {
                return Err(Error::config(field, 0, "at least 1"));
            }
        }
        if self.mlp.contains(&0) {
            let value = format!("{:?}", self.mlp);
            return Err(Error::config(
                "EncoderConfig::mlp",
                value,
                "widths of at least 1",
            ));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            let expected = "a probability in [0, 1)";
            return Err(Error::config(
                "EncoderConfig::dropout",
                self.dropout,
                expected,
            ));
        }
        match self.logit_bias {
            Some(b) if !b.is_finite() => Err(Error::config(
                "EncoderConfig::logit_bias",
                b,
                "a finite number",
            )),
            _ => Ok(()),
        }
    }
}

/// One layer: with `z_e = [u_e, x_s, x_t]`,
///
/// ```text
/// u'_e = edge(z_e)    alpha_e = softmax of attention(z_e) over the edges into t
/// x'_t = node([agg_e alpha_e u'_e, x_t])
/// ```
#[derive(Debug, Clone)]
pub struct EncoderLayer {
    edge: Mlp,
    attention: Mlp,
    node: Mlp,
    aggregation: Reduce,
    dropout: f64,
}

impl EncoderLayer {
    /// A layer from its three perceptrons: `edge` and `attention` take `[u, x_s, x_t]`, `node` takes
    /// `[m, x]`.
    pub fn new(edge: Mlp, attention: Mlp, node: Mlp, aggregation: Reduce, dropout: f64) -> Self {
        Self {
            edge,
            attention,
            node,
            aggregation,
            dropout,
        }
    }

    /// New nodes `[n, ..]` and edges `[E, ..]`.
    ///
    /// # Errors
    /// Shapes and dtypes that do not fit.
    pub fn forward(
        &self,
        graph: &Graph,
        x: &Tensor,
        u: &Tensor,
        mut train: Option<&mut RandomStream>,
    ) -> Result<(Tensor, Tensor)> {
        let logit = self.on_edges(graph, &self.attention, x, u, train.as_deref_mut())?;
        let alpha = segment_softmax(graph, &logit)?;
        let u = self.on_edges(graph, &self.edge, x, u, train.as_deref_mut())?;
        let received = edge_reduce(graph, &u.broadcast_mul(&alpha)?, self.aggregation)?;
        let joint = Tensor::cat(&[&received, x], 1)?;
        let dropped = |y: Tensor| dropout(&y, self.dropout, train.as_deref_mut());
        Ok((self.node.forward_with(&joint, dropped)?, u))
    }

    /// Attention weights `[E, 1]` of inputs.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn attention(&self, graph: &Graph, x: &Tensor, u: &Tensor) -> Result<Tensor> {
        segment_softmax(graph, &self.on_edges(graph, &self.attention, x, u, None)?)
    }

    /// A perceptron of `[u, x_s, x_t]` whose first product is taken once per node, not per edge.
    fn on_edges(
        &self,
        graph: &Graph,
        mlp: &Mlp,
        x: &Tensor,
        u: &Tensor,
        mut train: Option<&mut RandomStream>,
    ) -> Result<Tensor> {
        let (w, b) = mlp.first();
        let (of_u, of_x) = (u.dims2()?.1, x.dims2()?.1);
        if w.dims2()?.1 != of_u + 2 * of_x {
            let expected = format!("[.., {of_u} + 2 * {of_x}]");
            return Err(Error::shape(
                "first weight of the encoder",
                w.dims(),
                expected,
            ));
        }
        let part = |from: usize, width: usize| w.narrow(1, from, width);
        let sent = linear(x, &part(of_u, of_x)?, None)?;
        let sent = gather(graph, &sent, Side::Source)?;
        // The bias is added once per node as well.
        let received = linear(x, &part(of_u + of_x, of_x)?, Some(b))?;
        let received = gather(graph, &received, Side::Target)?;
        let y = ((linear(u, &part(0, of_u)?, None)? + sent)? + received)?;
        mlp.after_first_with(&y, |y| dropout(&y, self.dropout, train.as_deref_mut()))
    }
}

/// Layers that end in one bias per node and one logit per edge for each head.
#[derive(Debug, Clone)]
pub struct Encoder {
    layers: Vec<EncoderLayer>,
}

impl Encoder {
    /// From node and edge widths to `heads` of both. Parameters are `layers.L.{edge,attn,node}.I.*`.
    ///
    /// # Errors
    /// Those of [`EncoderConfig::validate`] and of [`Mlp::new`].
    pub fn new(
        (nodes, edges): (usize, usize),
        heads: usize,
        config: &EncoderConfig,
        vb: VarBuilder,
    ) -> Result<Self> {
        config.validate()?;
        let (mut nodes, mut edges) = (nodes, edges);
        let mut layers = Vec::new();
        for l in 0..=config.hidden_layers {
            let last = l == config.hidden_layers;
            let out = if last {
                (heads, heads)
            } else {
                (config.node_hidden, config.edge_hidden)
            };
            let vb = vb.pp("layers").pp(l);
            let joint = edges + 2 * nodes;
            let mlp = |inputs: usize, outputs: usize, name: &str, bias: Option<f64>| {
                let widths = [&[inputs], config.mlp.as_slice(), &[outputs]].concat();
                let mlp = Mlp::with_output_bias(&widths, config.activation, bias, vb.pp(name))?;
                Ok::<_, Error>(mlp.with_last(config.out_activation))
            };
            layers.push(EncoderLayer {
                edge: mlp(joint, out.1, "edge", config.logit_bias.filter(|_| last))?,
                attention: mlp(joint, 1, "attn", None)?,
                node: mlp(out.1 + nodes, out.0, "node", None)?,
                aggregation: config.aggregation,
                dropout: config.dropout,
            });
            (nodes, edges) = out;
        }
        Ok(Self { layers })
    }

    /// Biases `[n, heads]` and logits `[E, heads]`.
    ///
    /// # Errors
    /// Shapes and dtypes that do not fit.
    pub fn forward(
        &self,
        graph: &Graph,
        x: &Tensor,
        u: &Tensor,
        mut train: Option<&mut RandomStream>,
    ) -> Result<(Tensor, Tensor)> {
        let (mut x, mut u) = (x.clone(), u.clone());
        for layer in &self.layers {
            (x, u) = layer.forward(graph, &x, &u, train.as_deref_mut())?;
        }
        Ok((x, u))
    }
}

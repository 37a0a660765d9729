//! GraphSAGE.

use super::{add_bias, linear, normalize_rows, of_targets, torch_linear, weight, GraphModule};
use crate::graph::Graph;
use crate::sparse::{spmm, Features, Reduce};
use crate::{RandomStream, Result};
use candle_core::Tensor;
use candle_nn::VarBuilder;

/// Settings of [`SageConv`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SageConfig {
    /// How messages are made one.
    pub aggregation: Reduce,
    /// Divide each output row by its Euclidean norm.
    pub normalize: bool,
    /// Add the node's own features, `W_r x`.
    pub root_weight: bool,
    /// Send `relu(P x + p)` instead of `x`.
    pub project: bool,
    /// Add a trained bias.
    pub bias: bool,
}

impl Default for SageConfig {
    fn default() -> Self {
        Self {
            aggregation: Reduce::Mean,
            normalize: false,
            root_weight: true,
            project: false,
            bias: true,
        }
    }
}

/// `W_l agg_s x_s + b + W_r x_t`; no self-loop is added, and a node without in-edges keeps its root
/// term.
///
/// Parameters `lin_l.weight`, `lin_l.bias`, `lin_r.weight`, and `lin.weight`, `lin.bias` of the
/// projection.
#[derive(Debug, Clone)]
pub struct SageConv {
    left: Tensor,
    bias: Option<Tensor>,
    right: Option<Tensor>,
    project: Option<(Tensor, Tensor)>,
    config: SageConfig,
}

impl SageConv {
    /// A layer from `inputs` to `outputs` features.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) for a width of 0, and those of the
    /// builder.
    pub fn new(inputs: usize, outputs: usize, config: SageConfig, vb: VarBuilder) -> Result<Self> {
        let init = torch_linear(inputs);
        let get = |name: &str| weight(&vb, name, (inputs, outputs), init);
        let project = match config.project {
            true => Some((
                weight(&vb, "lin.weight", (inputs, inputs), init)?,
                vb.get_with_hints(inputs, "lin.bias", init)?,
            )),
            false => None,
        };
        Ok(Self {
            left: get("lin_l.weight")?,
            bias: match config.bias {
                true => Some(vb.get_with_hints(outputs, "lin_l.bias", init)?),
                false => None,
            },
            right: match config.root_weight {
                true => Some(get("lin_r.weight")?),
                false => None,
            },
            project,
            config,
        })
    }

    /// The output `[targets, out]` for features `[sources, in]`.
    ///
    /// # Errors
    /// Shapes and dtypes that do not fit.
    pub fn forward(&self, graph: &Graph, x: &Tensor) -> Result<Tensor> {
        self.apply(graph, &Features::Dense(x.clone()))
    }

    /// The output for dense or sparse features. Sparse ones are multiplied by the weights before
    /// they are sent; for a maximum, whose order matters, they are made dense.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn apply(&self, graph: &Graph, x: &Features) -> Result<Tensor> {
        let (outputs, inputs) = self.left.dims2()?;
        let commutes = matches!(self.config.aggregation, Reduce::Sum | Reduce::Mean);
        let device = self.left.device();
        let received = match (&self.project, x) {
            (None, x @ Features::Sparse(_)) if commutes => {
                self.aggregate(graph, &x.linear(&self.left)?)?
            }
            (None, x) => {
                let x = x.to_dense(device)?;
                if commutes && outputs < inputs {
                    self.aggregate(graph, &linear(&x, &self.left, None)?)?
                } else {
                    linear(&self.aggregate(graph, &x)?, &self.left, None)?
                }
            }
            (Some((p, bias)), x) => {
                let sent = x.linear(p)?.broadcast_add(bias)?.relu()?;
                linear(&self.aggregate(graph, &sent)?, &self.left, None)?
            }
        };
        self.combine(graph, received, x)
    }

    /// The aggregated features `[targets, in]`: constant while the features are, so that a loop over
    /// one layer computes them once and goes on with [`transform`](Self::transform).
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn aggregate(&self, graph: &Graph, x: &Tensor) -> Result<Tensor> {
        spmm(graph, None, x, self.config.aggregation)
    }

    /// The output from aggregated features and the targets' own, `[targets, in]` both.
    ///
    /// # Errors
    /// Those of candle.
    pub fn transform(&self, aggregated: &Tensor, own: &Tensor) -> Result<Tensor> {
        let mut y = linear(aggregated, &self.left, self.bias.as_ref())?;
        if let Some(right) = &self.right {
            y = (y + linear(own, right, None)?)?;
        }
        self.finish(y)
    }

    fn combine(&self, graph: &Graph, received: Tensor, x: &Features) -> Result<Tensor> {
        let mut y = add_bias(received, self.bias.as_ref())?;
        if let Some(right) = &self.right {
            let own = match x {
                Features::Dense(x) => linear(&of_targets(graph, x)?, right, None)?,
                sparse => of_targets(graph, &sparse.linear(right)?)?,
            };
            y = (y + own)?;
        }
        self.finish(y)
    }

    fn finish(&self, y: Tensor) -> Result<Tensor> {
        if self.config.normalize {
            normalize_rows(&y)
        } else {
            Ok(y)
        }
    }
}

impl GraphModule for SageConv {
    fn forward_t(&self, graph: &Graph, x: &Tensor, _: Option<&mut RandomStream>) -> Result<Tensor> {
        self.forward(graph, x)
    }
}

//! The graph isomorphism network's layer.

use super::{of_targets, GraphModule};
use crate::graph::Graph;
use crate::sparse::{spmm, Reduce};
use crate::{RandomStream, Result};
use candle_core::Tensor;
use candle_nn::{Init, ModuleT, VarBuilder};

/// Settings of [`GinConv`].
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct GinConfig {
    /// The weight of a node beside its neighbors is `1 + eps`.
    pub eps: f64,
    /// Train `eps` (parameter `eps` `[1]`).
    pub train_eps: bool,
}

/// `nn((1 + eps) x_t + sum_s x_s)` with any network `nn`, an [`Mlp`](super::Mlp) for example; no
/// self-loop is added.
#[derive(Debug, Clone)]
pub struct GinConv<M> {
    nn: M,
    eps: Eps,
}

#[derive(Debug, Clone)]
enum Eps {
    Fixed(f64),
    Trained(Tensor),
}

impl<M: ModuleT> GinConv<M> {
    /// A layer around `nn`; the builder is asked for `eps` where it is trained.
    ///
    /// # Errors
    /// Those of the builder.
    pub fn new(nn: M, config: GinConfig, vb: VarBuilder) -> Result<Self> {
        let eps = match config.train_eps {
            true => Eps::Trained(vb.get_with_hints(1, "eps", Init::Const(config.eps))?),
            false => Eps::Fixed(config.eps),
        };
        Ok(Self { nn, eps })
    }

    /// The output `[targets, ..]` in evaluation mode.
    ///
    /// # Errors
    /// Shapes and dtypes that do not fit.
    pub fn forward(&self, graph: &Graph, x: &Tensor) -> Result<Tensor> {
        Ok(self.nn.forward_t(&self.combine(graph, x)?, false)?)
    }

    fn combine(&self, graph: &Graph, x: &Tensor) -> Result<Tensor> {
        let own = of_targets(graph, x)?;
        let own = match &self.eps {
            Eps::Fixed(eps) => (own * (1.0 + eps))?,
            Eps::Trained(eps) => own.broadcast_mul(&(eps + 1.0)?)?,
        };
        Ok((own + spmm(graph, None, x, Reduce::Sum)?)?)
    }
}

impl<M: ModuleT> GraphModule for GinConv<M> {
    fn forward_t(
        &self,
        graph: &Graph,
        x: &Tensor,
        train: Option<&mut RandomStream>,
    ) -> Result<Tensor> {
        Ok(self
            .nn
            .forward_t(&self.combine(graph, x)?, train.is_some())?)
    }
}

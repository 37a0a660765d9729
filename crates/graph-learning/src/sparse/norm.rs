//! Normalized adjacencies.

use super::{edge_sum, gather, Side};
use crate::graph::Graph;
use crate::{Error, Result};
use candle_core::{DType, Tensor};

/// How the weights of a node's edges are scaled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Norm {
    /// `w_e / sqrt(d_s d_t)`: the graph convolution's.
    #[default]
    Sym,
    /// `w_e / d_t`: weights into a node add up to 1.
    Row,
    /// As they are.
    None,
}

/// The graph with a self-loop on every node and its normalized edge weights `[E']`: a node's own
/// loop keeps its weight (the last of several), the others get 1, or 2 when `improved`; then with
/// `d_t = sum_e w_e` over the edges into `t`, weights become those of `norm`. A degree of 0 gives
/// weight 0.
///
/// Without weights all edges weigh 1 (in f32; give ones for another dtype). The result is
/// differentiable in the weights.
///
/// # Errors
/// [`Error::Shape`] for weights that are not `[E]`, [`Error::Unsupported`] for graphs between two
/// sets of nodes.
pub fn gcn_norm(
    graph: &Graph,
    weights: Option<&Tensor>,
    norm: Norm,
    improved: bool,
) -> Result<(Graph, Tensor)> {
    graph.require_square("the normalization of a graph convolution")?;
    let ones;
    let weights = match weights {
        Some(w) => w,
        None => {
            ones = Tensor::ones(graph.num_edges(), DType::F32, &candle_core::Device::Cpu)?;
            &ones
        }
    };
    let fill = if improved { 2.0 } else { 1.0 };
    let (graph, weights) = graph.add_remaining_self_loops(Some(weights), fill)?;
    // Weights were given, so they come back.
    let weights = weights.ok_or_else(|| Error::unsupported("gcn_norm", "without weights"))?;
    scale_by_degrees(&graph, &weights, norm)
}

/// The normalization without added loops.
pub(crate) fn scale_by_degrees(
    graph: &Graph,
    weights: &Tensor,
    norm: Norm,
) -> Result<(Graph, Tensor)> {
    let degrees = edge_sum(graph, weights, Side::Target)?;
    let power = match norm {
        Norm::None => return Ok((graph.clone(), weights.clone())),
        Norm::Row => -1.0,
        Norm::Sym => -0.5,
    };
    // Zero degrees (weights may cancel) are moved to 1 before the power, so that no gradient is NaN.
    let positive = degrees.detach().gt(0.0)?;
    let safe = positive.where_cond(&degrees, &degrees.ones_like()?)?;
    let scale = (safe.powf(power)? * positive.to_dtype(safe.dtype())?)?;
    let weights = (weights * gather(graph, &scale, Side::Target)?)?;
    let weights = match norm {
        Norm::Sym => (weights * gather(graph, &scale, Side::Source)?)?,
        _ => weights,
    };
    Ok((graph.clone(), weights))
}

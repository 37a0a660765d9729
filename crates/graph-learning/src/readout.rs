//! One vector for each graph of a batch, and for each node from several layers.

use crate::graph::GraphBatch;
use crate::sparse::{segment_softmax, spmm, Reduce};
use crate::{Error, Result};
use candle_core::Tensor;

/// The nodes `[n, ..]` of each graph reduced to one row: `[graphs, ..]`. A graph without nodes gets
/// zeros.
///
/// # Errors
/// [`Error::Shape`] unless there is one row per node.
pub fn global(batch: &GraphBatch, x: &Tensor, reduce: Reduce) -> Result<Tensor> {
    spmm(batch.members(), None, x, reduce)
}

/// The sum over each graph's nodes.
///
/// # Errors
/// As [`global`].
pub fn global_add(batch: &GraphBatch, x: &Tensor) -> Result<Tensor> {
    global(batch, x, Reduce::Sum)
}

/// The mean over each graph's nodes.
///
/// # Errors
/// As [`global`].
pub fn global_mean(batch: &GraphBatch, x: &Tensor) -> Result<Tensor> {
    global(batch, x, Reduce::Mean)
}

/// The maximum over each graph's nodes.
///
/// # Errors
/// As [`global`].
pub fn global_max(batch: &GraphBatch, x: &Tensor) -> Result<Tensor> {
    global(batch, x, Reduce::Max)
}

/// A weighted mean over each graph's nodes, with weights `softmax(gate)` of logits `[n]` that a
/// network of yours gives (Li et al., ICLR 2016).
///
/// # Errors
/// As [`global`].
pub fn global_attention(batch: &GraphBatch, gate: &Tensor, x: &Tensor) -> Result<Tensor> {
    let weights = segment_softmax(batch.members(), gate)?;
    spmm(batch.members(), Some(&weights), x, Reduce::Sum)
}

/// How the outputs of several layers become one (Xu et al., ICML 2018).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JumpingKnowledge {
    /// Side by side.
    Concat,
    /// The largest of each channel.
    Max,
}

impl JumpingKnowledge {
    /// One tensor from those of the layers, `[n, d]` each (of one shape for the maximum).
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for no layer, shapes that do not fit.
    pub fn forward(self, layers: &[Tensor]) -> Result<Tensor> {
        let (first, rest) = layers
            .split_first()
            .ok_or_else(|| Error::argument("layers", 0, "at least 1"))?;
        match self {
            Self::Concat => Ok(Tensor::cat(layers, first.rank() - 1)?),
            Self::Max => {
                let larger = |max: Tensor, layer: &Tensor| Ok(max.maximum(layer)?);
                rest.iter().try_fold(first.clone(), larger)
            }
        }
    }
}

//! Edge weights that contract.

use super::{Normalizer, Orientation};
use crate::graph::Graph;
use crate::sparse::segment_softmax;
use crate::{Error, Result};
use candle_core::{Device, Tensor};

/// Weights `[E, m]` from logits `[E, m]`, such that the weights of every row of the matrix add up to at
/// most 1 for each head. A row is a source or a target, as the orientation says; the degree is the
/// number of its edges, duplicates counted, since duplicates are summed.
///
/// The gradient of a clipped logit outside `[0, 1]` is 0.
///
/// # Errors
/// [`Error::Shape`] unless there is one row per edge, [`Error::DType`] for integers.
pub fn contracting_edge_weights(
    graph: &Graph,
    logits: &Tensor,
    normalizer: Normalizer,
    orientation: Orientation,
) -> Result<Tensor> {
    let edges = graph.num_edges();
    if logits.rank() != 2 || logits.dims()[0] != edges {
        return Err(Error::shape(
            "logits",
            logits.dims(),
            format!("[{edges}, heads]"),
        ));
    }
    match normalizer {
        Normalizer::Attention => match orientation {
            Orientation::RowIsTarget => segment_softmax(graph, logits),
            Orientation::RowIsSource => segment_softmax(graph.reversed(), logits),
        },
        Normalizer::DegreeClip => {
            let (degrees, rows) = match orientation {
                Orientation::RowIsSource => (graph.out_degrees(), graph.src()),
                Orientation::RowIsTarget => (graph.in_degrees(), graph.dst()),
            };
            // Every row that has an edge has a degree of at least 1.
            let inverse = |r: &u32| 1.0 / f64::from(degrees[*r as usize]);
            let inverse: Vec<f64> = rows.iter().map(inverse).collect();
            let inverse = Tensor::from_vec(inverse, (edges, 1), &Device::Cpu)?;
            let inverse = inverse
                .to_dtype(logits.dtype())?
                .to_device(logits.device())?;
            Ok(clip(logits)?.broadcast_mul(&inverse)?)
        }
    }
}

/// `min(max(x, 0), 1)` with slope 1 on all of `[0, 1]` and 0 outside.
fn clip(x: &Tensor) -> Result<Tensor> {
    let fixed = x.detach();
    let above = fixed.gt(1.0)?.to_dtype(x.dtype())?;
    let inside = (fixed.ge(0.0)?.to_dtype(x.dtype())? - &above)?;
    Ok(((x * inside)? + above)?)
}

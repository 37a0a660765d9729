//! Parts of large graphs, drawn from a stream.
//!
//! | type | what a batch is | source |
//! | --- | --- | --- |
//! | [`NeighborSampler`] | a block per layer around some seeds | Hamilton et al., NeurIPS 2017 |
//! | [`ClusterSampler`] | the union of a few parts of a partition | Chiang et al., KDD 2019 |
//! | [`SaintSampler`] | a subgraph from random nodes, edges or walks, with its normalization | Zeng et al., ICLR 2020 |
//! | [`negative::negative_sampling`] | pairs that are no edges | |
//! | [`random_walk`] | walks along the edges | |
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use candle_nn::{VarBuilder, VarMap};
//! use thalweg_graph_learning::conv::{SageConfig, SageConv};
//! use thalweg_graph_learning::generate::erdos_renyi;
//! use thalweg_graph_learning::sample::NeighborSampler;
//! use thalweg_graph_learning::RandomStream;
//!
//! let rng = &mut RandomStream::new(1);
//! let graph = erdos_renyi(1000, 0.02, rng)?;
//! let x = rng.normal(0.0, 1.0, (1000, 16), DType::F32, &Device::Cpu)?;
//! let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
//! let layers = [
//!     SageConv::new(16, 8, SageConfig::default(), vb.pp(0))?,
//!     SageConv::new(8, 4, SageConfig::default(), vb.pp(1))?,
//! ];
//! let mut sampler = NeighborSampler::new(&graph, &[Some(10), Some(5)])?;
//! let batch = sampler.sample(&[3, 14, 15], rng)?;
//! let mut h = x.index_select(&batch.node_ids(&Device::Cpu)?, 0)?;
//! for (layer, block) in layers.iter().zip(&batch.blocks) {
//!     h = layer.forward(&block.graph, &h)?.relu()?;
//! }
//! assert_eq!(h.dims(), &[3, 4]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod cluster;
pub mod negative;
mod neighbor;
mod saint;

pub use cluster::{partition, ClusterSampler};
pub use neighbor::{Block, LayerBatch, NeighborSampler};
pub use saint::{SaintBatch, SaintMethod, SaintSampler};

use crate::graph::Graph;
use crate::{Error, RandomStream, Result};

/// `length` steps along the edges from each start; a walk stays where no edge leads on. One walk of
/// `length + 1` nodes after the other.
///
/// # Errors
/// [`Error::InvalidArgument`] for a start that is no node, [`Error::Unsupported`] for graphs between
/// two sets of nodes.
pub fn random_walk(
    graph: &Graph,
    starts: &[u32],
    length: usize,
    rng: &mut RandomStream,
) -> Result<Vec<u32>> {
    graph.require_square("a random walk")?;
    check_nodes(graph, starts)?;
    let out = graph.outgoing();
    let mut walks = Vec::with_capacity(starts.len() * (length + 1));
    for start in starts {
        let mut at = *start;
        walks.push(at);
        for _ in 0..length {
            let next = out.neighbors(at as usize);
            if !next.is_empty() {
                at = next[rng.below(next.len())?];
            }
            walks.push(at);
        }
    }
    Ok(walks)
}

fn check_nodes(graph: &Graph, nodes: &[u32]) -> Result<()> {
    let n = graph.num_nodes();
    match nodes.iter().find(|v| **v as usize >= n) {
        Some(bad) => Err(Error::argument("node", bad, format!("below {n}"))),
        None => Ok(()),
    }
}

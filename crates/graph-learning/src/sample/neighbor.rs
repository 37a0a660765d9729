//! Sampled neighborhoods, layer by layer.

use super::check_nodes;
use crate::graph::{Csr, Direction, Graph};
use crate::{Error, RandomStream, Result};
use candle_core::{DType, Device, Tensor};

/// Draws a block per layer around seeds.
///
/// From the seeds outwards, each node that is known at a layer draws `min(fan-out, degree)` of its
/// in-edges, without replacement unless asked for. With all neighbors (`None`) the last block's
/// outputs are those of the full graph.
#[derive(Debug, Clone)]
pub struct NeighborSampler {
    graph: Graph,
    fanouts: Vec<Option<usize>>,
    replace: bool,
    direction: Direction,
    /// The place of each node in the batch under way, `u32::MAX` for none.
    place: Vec<u32>,
}

/// The edges of one layer: from the nodes known before to the nodes computed by it.
#[derive(Debug, Clone)]
pub struct Block {
    /// From sources to targets, which are the first of the sources.
    pub graph: Graph,
    /// The edge of the whole graph behind each edge.
    pub edge_ids: Vec<u32>,
    /// `degree / drawn` of each edge's target: as edge weights of a sum they make it unbiased.
    pub weights: Vec<f64>,
}

impl Block {
    /// [`weights`](Self::weights) as a tensor `[E]`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn weight_tensor(&self, dtype: DType, device: &Device) -> Result<Tensor> {
        let weights = Tensor::from_slice(&self.weights, self.weights.len(), &Device::Cpu)?;
        Ok(weights.to_dtype(dtype)?.to_device(device)?)
    }
}

/// What a model with one layer per block needs for the seeds.
#[derive(Debug, Clone)]
pub struct LayerBatch {
    /// The nodes whose features the first layer takes: seeds first, then by first appearance.
    pub n_id: Vec<u32>,
    /// The blocks in the order of the layers; the targets of the last are the seeds.
    pub blocks: Vec<Block>,
    /// Number of seeds.
    pub seeds: usize,
}

impl LayerBatch {
    /// [`n_id`](Self::n_id) as a tensor, ready for `index_select`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn node_ids(&self, device: &Device) -> Result<Tensor> {
        Ok(Tensor::from_slice(&self.n_id, self.n_id.len(), device)?)
    }
}

impl NeighborSampler {
    /// One fan-out per layer, the first for the layer next to the seeds (PyTorch Geometric's order);
    /// `None` takes all neighbors.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] without layers; [`Error::Unsupported`] for graphs between two sets
    /// of nodes.
    pub fn new(graph: &Graph, fanouts: &[Option<usize>]) -> Result<Self> {
        graph.require_square("neighbor sampling")?;
        if fanouts.is_empty() {
            return Err(Error::argument("fanouts", "none", "one for each layer"));
        }
        Ok(Self {
            place: vec![u32::MAX; graph.num_nodes()],
            graph: graph.clone(),
            fanouts: fanouts.to_vec(),
            replace: false,
            direction: Direction::Incoming,
        })
    }

    /// Draws with replacement: always the fan-out, where there is any edge.
    #[must_use]
    pub fn with_replacement(self) -> Self {
        Self {
            replace: true,
            ..self
        }
    }

    /// Takes out-edges as messages to their sources, for graphs that are stored the other way.
    #[must_use]
    pub fn against_edges(self) -> Self {
        Self {
            direction: Direction::Outgoing,
            ..self
        }
    }

    /// The blocks around distinct seeds.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a seed that is no node or named twice.
    pub fn sample(&mut self, seeds: &[u32], rng: &mut RandomStream) -> Result<LayerBatch> {
        check_nodes(&self.graph, seeds)?;
        let mut n_id = Vec::with_capacity(seeds.len());
        let drawn = self.draw(seeds, &mut n_id, rng);
        // The scratch is clean again whatever happened.
        for v in seeds.iter().chain(&n_id) {
            self.place[*v as usize] = u32::MAX;
        }
        let mut blocks = drawn?;
        blocks.reverse();
        Ok(LayerBatch {
            n_id,
            blocks,
            seeds: seeds.len(),
        })
    }

    fn draw(
        &mut self,
        seeds: &[u32],
        n_id: &mut Vec<u32>,
        rng: &mut RandomStream,
    ) -> Result<Vec<Block>> {
        for v in seeds {
            if self.place[*v as usize] != u32::MAX {
                return Err(Error::argument("seed", v, "distinct nodes"));
            }
            self.place[*v as usize] = n_id.len() as u32;
            n_id.push(*v);
        }
        let csr: &Csr = match self.direction {
            Direction::Outgoing => self.graph.outgoing(),
            _ => self.graph.incoming(),
        };
        let mut blocks = Vec::with_capacity(self.fanouts.len());
        let mut picks = Vec::new();
        for fanout in &self.fanouts {
            let targets = n_id.len();
            let (mut src, mut dst) = (Vec::new(), Vec::new());
            let (mut edge_ids, mut weights) = (Vec::new(), Vec::new());
            for t in 0..targets {
                let row = csr.row(n_id[t] as usize);
                pick(row.len(), *fanout, self.replace, rng, &mut picks)?;
                let weight = row.len() as f64 / picks.len().max(1) as f64;
                for p in picks.iter().map(|k| row.start + k) {
                    let s = csr.indices()[p];
                    let slot = &mut self.place[s as usize];
                    if *slot == u32::MAX {
                        *slot = n_id.len() as u32;
                        n_id.push(s);
                    }
                    src.push(*slot);
                    dst.push(t as u32);
                    edge_ids.push(csr.perm()[p]);
                    weights.push(weight);
                }
            }
            blocks.push(Block {
                graph: Graph::checked(n_id.len(), targets, src, dst),
                edge_ids,
                weights,
            });
        }
        Ok(blocks)
    }
}

/// Positions below `n`: all, or `fanout` of them, ascending where they are distinct.
fn pick(
    n: usize,
    fanout: Option<usize>,
    replace: bool,
    rng: &mut RandomStream,
    picks: &mut Vec<usize>,
) -> Result<()> {
    picks.clear();
    match fanout {
        Some(k) if replace && n > 0 => {
            for _ in 0..k {
                picks.push(rng.below(n)?);
            }
        }
        Some(k) if k < n && !replace => {
            // Floyd's algorithm: a uniform subset with k draws and no list of n.
            for last in n - k..n {
                let at = rng.below(last + 1)?;
                picks.push(if picks.contains(&at) { last } else { at });
            }
            picks.sort_unstable();
        }
        _ => picks.extend(0..n),
    }
    Ok(())
}

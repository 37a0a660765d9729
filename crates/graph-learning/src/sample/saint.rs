//! GraphSAINT: subgraphs with the normalization that makes them unbiased.

use super::random_walk;
use crate::graph::Graph;
use crate::{Error, RandomStream, Result};
use std::collections::BTreeSet;

/// How the nodes of a subgraph are drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SaintMethod {
    /// This many nodes, in proportion to their in-degree, with replacement.
    Node {
        /// Draws.
        budget: usize,
    },
    /// The ends of this many edges, in proportion to `1 / deg(s) + 1 / deg(t)`, with replacement.
    Edge {
        /// Draws.
        budget: usize,
    },
    /// The nodes of random walks.
    RandomWalk {
        /// Walks.
        roots: usize,
        /// Steps of each.
        length: usize,
    },
}

/// One subgraph.
#[derive(Debug, Clone)]
pub struct SaintBatch {
    /// Its nodes, ascending.
    pub nodes: Vec<u32>,
    /// The graph between them.
    pub graph: Graph,
    /// The edges of the whole graph that it has.
    pub edge_ids: Vec<u32>,
    /// A factor for the loss of each node: `samples / (times drawn * n)`.
    pub node_weights: Vec<f64>,
    /// A factor for each edge: `times the target was drawn / times the edge was`.
    pub edge_weights: Vec<f64>,
}

/// Draws subgraphs, with frequencies counted once.
#[derive(Debug, Clone)]
pub struct SaintSampler {
    graph: Graph,
    method: SaintMethod,
    /// Cumulated weights of nodes or edges.
    cumulated: Vec<f64>,
    node_counts: Vec<u32>,
    edge_counts: Vec<u32>,
    samples: u32,
}

impl SaintSampler {
    /// Counts nodes and edges in `samples` subgraphs.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a budget or number of samples of 0, or a graph without edges;
    /// [`Error::Unsupported`] for graphs between two sets of nodes.
    pub fn new(
        graph: &Graph,
        method: SaintMethod,
        samples: u32,
        rng: &mut RandomStream,
    ) -> Result<Self> {
        graph.require_square("subgraph sampling")?;
        let budget = match method {
            SaintMethod::Node { budget } | SaintMethod::Edge { budget } => budget,
            SaintMethod::RandomWalk { roots, .. } => roots,
        };
        if budget == 0 || samples == 0 || graph.num_edges() == 0 {
            let value = format!(
                "{budget} draws, {samples} samples, {} edges",
                graph.num_edges()
            );
            return Err(Error::argument(
                "subgraph sampling",
                value,
                "at least 1 of each",
            ));
        }
        let mut sampler = Self {
            cumulated: cumulated(graph, method),
            node_counts: vec![0; graph.num_nodes()],
            edge_counts: vec![0; graph.num_edges()],
            graph: graph.clone(),
            method,
            samples,
        };
        for _ in 0..samples {
            let nodes = sampler.draw(rng)?;
            let (_, edges) = graph.induced_subgraph(&nodes)?;
            nodes
                .iter()
                .for_each(|v| sampler.node_counts[*v as usize] += 1);
            edges
                .iter()
                .for_each(|e| sampler.edge_counts[*e as usize] += 1);
        }
        Ok(sampler)
    }

    /// One subgraph. What was never drawn while counting counts as drawn once.
    ///
    /// # Errors
    /// Those of the stream, which cannot occur here.
    pub fn sample(&self, rng: &mut RandomStream) -> Result<SaintBatch> {
        let nodes = self.draw(rng)?;
        let (graph, edge_ids) = self.graph.induced_subgraph(&nodes)?;
        let n = self.graph.num_nodes() as f64;
        let drawn = |v: u32| f64::from(self.node_counts[v as usize].max(1));
        let edge = |e: &u32| {
            let target = self.graph.dst()[*e as usize];
            drawn(target) / f64::from(self.edge_counts[*e as usize].max(1))
        };
        Ok(SaintBatch {
            node_weights: nodes
                .iter()
                .map(|v| f64::from(self.samples) / (drawn(*v) * n))
                .collect(),
            edge_weights: edge_ids.iter().map(edge).collect(),
            nodes,
            graph,
            edge_ids,
        })
    }

    fn draw(&self, rng: &mut RandomStream) -> Result<Vec<u32>> {
        let weighted = |rng: &mut RandomStream| {
            let total = self.cumulated.last().copied().unwrap_or(0.0);
            let goal = rng.next_uniform() * total;
            let at = self.cumulated.partition_point(|c| *c <= goal);
            at.min(self.cumulated.len() - 1)
        };
        let mut nodes = BTreeSet::new();
        match self.method {
            SaintMethod::Node { budget } => {
                nodes.extend((0..budget).map(|_| weighted(rng) as u32));
            }
            SaintMethod::Edge { budget } => {
                for _ in 0..budget {
                    let e = weighted(rng);
                    nodes.extend([self.graph.src()[e], self.graph.dst()[e]]);
                }
            }
            SaintMethod::RandomWalk { roots, length } => {
                let starts: Result<Vec<u32>> = (0..roots)
                    .map(|_| Ok(rng.below(self.graph.num_nodes())? as u32))
                    .collect();
                nodes.extend(random_walk(&self.graph, &starts?, length, rng)?);
            }
        }
        Ok(nodes.into_iter().collect())
    }
}

fn cumulated(graph: &Graph, method: SaintMethod) -> Vec<f64> {
    let sum = |weights: &mut dyn Iterator<Item = f64>| {
        let running = weights.scan(0.0, |sum, w| {
            *sum += w;
            Some(*sum)
        });
        running.collect()
    };
    let degrees = graph.in_degrees();
    match method {
        SaintMethod::Node { .. } => sum(&mut degrees.into_iter().map(f64::from)),
        SaintMethod::Edge { .. } => {
            let out = graph.out_degrees();
            let inverse = |d: u32| 1.0 / f64::from(d.max(1));
            let one = |(s, t): (u32, u32)| inverse(out[s as usize]) + inverse(degrees[t as usize]);
            sum(&mut graph.edges().map(one))
        }
        SaintMethod::RandomWalk { .. } => Vec::new(),
    }
}

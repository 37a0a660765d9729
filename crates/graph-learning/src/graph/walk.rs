//! What can be reached from where.

use super::Graph;
use crate::{Error, Result};

/// Along which way edges are followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Direction {
    /// From a node to the nodes that send to it: what its representation depends on.
    #[default]
    Incoming,
    /// From a node to the nodes that it sends to.
    Outgoing,
    /// Both ways.
    Both,
}

/// The nodes around some seeds and the graph between them.
#[derive(Debug, Clone, PartialEq)]
pub struct Neighborhood {
    /// The nodes, ascending; node `i` of `graph` is `nodes[i]`.
    pub nodes: Vec<u32>,
    /// The induced graph.
    pub graph: Graph,
    /// The edges of the whole graph that it has.
    pub edge_ids: Vec<u32>,
    /// Where the seeds are in `nodes`.
    pub seeds: Vec<u32>,
}

/// Connected components.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Components {
    /// How many there are.
    pub count: usize,
    /// The component of each node; components are numbered by their first node.
    pub of_node: Vec<u32>,
}

impl Graph {
    /// Everything within `k` steps of the seeds.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a seed that is no node, [`Error::Unsupported`] for a graph
    /// between two sets of nodes.
    pub fn k_hop(&self, seeds: &[u32], k: usize, direction: Direction) -> Result<Neighborhood> {
        self.require_square("a neighborhood")?;
        let mut seen = vec![false; self.num_nodes()];
        for v in seeds {
            let slot = seen.get_mut(*v as usize);
            *slot.ok_or_else(|| {
                Error::argument("seed", v, format!("a node below {}", self.num_nodes()))
            })? = true;
        }
        let mut nodes: Vec<u32> = Vec::new();
        let mut frontier: Vec<u32> = (0..self.num_nodes() as u32)
            .filter(|v| seen[*v as usize])
            .collect();
        for _ in 0..k {
            let mut next = Vec::new();
            for v in &frontier {
                self.for_neighbors(*v, direction, |u| {
                    if !std::mem::replace(&mut seen[u as usize], true) {
                        next.push(u);
                    }
                });
            }
            nodes.append(&mut frontier);
            frontier = next;
        }
        nodes.append(&mut frontier);
        nodes.sort_unstable();
        let (graph, edge_ids) = self.induced_subgraph(&nodes)?;
        // Every seed is among the nodes.
        let place = |v: &u32| nodes.binary_search(v).unwrap_or(0) as u32;
        let seeds = seeds.iter().map(place).collect();
        Ok(Neighborhood {
            nodes,
            graph,
            edge_ids,
            seeds,
        })
    }

    pub(crate) fn for_neighbors(&self, v: u32, direction: Direction, mut visit: impl FnMut(u32)) {
        if direction != Direction::Outgoing {
            self.incoming()
                .neighbors(v as usize)
                .iter()
                .copied()
                .for_each(&mut visit);
        }
        if direction != Direction::Incoming {
            self.outgoing()
                .neighbors(v as usize)
                .iter()
                .copied()
                .for_each(&mut visit);
        }
    }

    /// Components of the graph with all edges taken as undirected.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a graph between two sets of nodes.
    pub fn connected_components(&self) -> Result<Components> {
        self.require_square("connected components")?;
        let mut of_node = vec![u32::MAX; self.num_nodes()];
        let mut count = 0;
        let mut stack = Vec::new();
        for v in 0..self.num_nodes() as u32 {
            if of_node[v as usize] != u32::MAX {
                continue;
            }
            of_node[v as usize] = count;
            stack.push(v);
            while let Some(u) = stack.pop() {
                self.for_neighbors(u, Direction::Both, |w| {
                    if of_node[w as usize] == u32::MAX {
                        of_node[w as usize] = count;
                        stack.push(w);
                    }
                });
            }
            count += 1;
        }
        Ok(Components {
            count: count as usize,
            of_node,
        })
    }
}

//! Many small graphs as one.

use super::Graph;
use crate::{Error, Result};

/// Graphs side by side: one graph whose parts have no edges between them.
#[derive(Debug, Clone)]
pub struct GraphBatch {
    graph: Graph,
    graph_id: Vec<u32>,
    ptr: Vec<u32>,
    members: Graph,
}

impl GraphBatch {
    /// All nodes and edges, those of the first graph first.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// Which graph each node belongs to.
    pub fn graph_id(&self) -> &[u32] {
        &self.graph_id
    }

    /// The first node of each graph, and the number of nodes: `len + 1` numbers.
    pub fn ptr(&self) -> &[u32] {
        &self.ptr
    }

    /// Number of graphs, those without nodes included.
    pub fn len(&self) -> usize {
        self.ptr.len() - 1
    }

    /// Whether there is no graph.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// One edge from each node to its graph: what [`readout`](crate::readout) sums over.
    pub fn members(&self) -> &Graph {
        &self.members
    }

    /// From one graph and the graph that each node belongs to; an id that no node has is a graph
    /// without nodes.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] unless there is one id per node, the ids do not decrease, and no
    /// edge runs between two graphs; [`Error::EdgeOutOfRange`] for an id that is not below `graphs`.
    pub fn new(graph: Graph, graph_id: Vec<u32>, graphs: usize) -> Result<Self> {
        graph.require_square("a batch of graphs")?;
        if graph_id.len() != graph.num_nodes() {
            let expected = format!("one for each of {} nodes", graph.num_nodes());
            return Err(Error::argument("graph ids", graph_id.len(), expected));
        }
        if let Some(w) = graph_id.windows(2).find(|w| w[0] > w[1]) {
            return Err(Error::argument(
                "graph id",
                w[1],
                format!("at least {}", w[0]),
            ));
        }
        let id = |v: u32| graph_id[v as usize];
        if let Some((s, t)) = graph.edges().find(|(s, t)| id(*s) != id(*t)) {
            let value = format!("{s} -> {t}");
            return Err(Error::argument("edge", value, "both ends in one graph"));
        }
        let members = Graph::segments(graph_id.clone(), graphs)?;
        Ok(Self {
            ptr: members.incoming().indptr().to_vec(),
            graph,
            graph_id,
            members,
        })
    }
}

impl Graph {
    /// Several graphs as one; graphs without nodes keep their place.
    ///
    /// # Errors
    /// [`Error::TooLarge`], [`Error::Unsupported`] for graphs between two sets of nodes.
    pub fn batch(graphs: &[Graph]) -> Result<GraphBatch> {
        let nodes: usize = graphs.iter().map(Graph::num_nodes).sum();
        let edges: usize = graphs.iter().map(Graph::num_edges).sum();
        for (what, count) in [("nodes", nodes), ("edges", edges)] {
            if count > u32::MAX as usize {
                return Err(Error::TooLarge { what, count });
            }
        }
        let (mut src, mut dst) = (Vec::with_capacity(edges), Vec::with_capacity(edges));
        let mut graph_id = Vec::with_capacity(nodes);
        for (i, graph) in graphs.iter().enumerate() {
            graph.require_square("a batch")?;
            let first = graph_id.len() as u32;
            src.extend(graph.src().iter().map(|v| v + first));
            dst.extend(graph.dst().iter().map(|v| v + first));
            graph_id.extend(std::iter::repeat_n(i as u32, graph.num_nodes()));
        }
        GraphBatch::new(
            Graph::checked(nodes, nodes, src, dst),
            graph_id,
            graphs.len(),
        )
    }
}

//! The graph type: a directed edge list with its compressed rows in both directions.
//!
//! Edge `e` goes from `src[e]` to `dst[e]`, and messages travel that way (PyTorch Geometric's
//! `edge_index[0]` and `edge_index[1]`). An undirected graph holds each edge in both directions.
//! Duplicated edges are separate messages until [coalesced](Graph::coalesce), and self-loops are
//! edges like others.
//!
//! A [`Graph`] never changes: what is derived from it (rows, transposes, normalizations, self-loops)
//! is computed once, when it is first needed, and shared by all clones. Tensors with one row per edge
//! are always in the order of the edge list.
//!
//! ```
//! use thalweg_graph_learning::Graph;
//!
//! // 0 -> 1 <- 2
//! let graph = Graph::from_edges(3, vec![0, 2], vec![1, 1])?;
//! assert_eq!(graph.incoming().neighbors(1), &[0, 2]);
//! assert_eq!(graph.in_degrees(), vec![0, 2, 0]);
//! let (both_ways, _) = graph.to_undirected()?;
//! assert_eq!(both_ways.num_edges(), 4);
//! # Ok::<(), thalweg_graph_learning::Error>(())
//! ```

mod batch;
mod csr;
mod edit;
mod walk;

pub use batch::GraphBatch;
pub use csr::Csr;
pub use edit::EdgeMap;
pub use walk::{Components, Direction, Neighborhood};

use crate::{Error, Result};
use candle_core::{DType, Device, DeviceLocation, Tensor};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// A directed graph; see the [module](self) page. Clones share everything.
#[derive(Clone)]
pub struct Graph {
    inner: Arc<Inner>,
}

struct Inner {
    sources: usize,
    targets: usize,
    src: Vec<u32>,
    dst: Vec<u32>,
    incoming: OnceLock<Csr>,
    outgoing: OnceLock<Csr>,
    reverse: OnceLock<Option<Vec<u32>>>,
    reversed: OnceLock<Graph>,
    with_loops: OnceLock<Graph>,
    with_fresh_loops: OnceLock<Graph>,
    inverse_in_degrees: OnceLock<Arc<Vec<f64>>>,
    inverse_sqrt_in_degrees: OnceLock<Arc<Vec<f64>>>,
    on_device: Mutex<Vec<(DeviceLocation, EdgeTensors)>>,
}

/// The two ends of all edges as index tensors.
#[derive(Clone)]
pub(crate) struct EdgeTensors {
    pub src: Tensor,
    pub dst: Tensor,
}

impl Graph {
    /// A graph of `n` nodes with the edges `src[e] -> dst[e]`.
    ///
    /// # Errors
    /// [`Error::EdgeOutOfRange`], [`Error::TooLarge`], and [`Error::InvalidArgument`] when the lists
    /// have different lengths.
    pub fn from_edges(n: usize, src: Vec<u32>, dst: Vec<u32>) -> Result<Self> {
        Self::bipartite(n, n, src, dst)
    }

    /// Edges from `sources` nodes to `targets` other ones. Layers take the first `targets` of the
    /// sources for the targets themselves, which is how sampled blocks are laid out.
    ///
    /// # Errors
    /// As [`from_edges`](Self::from_edges).
    pub fn bipartite(sources: usize, targets: usize, src: Vec<u32>, dst: Vec<u32>) -> Result<Self> {
        for (what, count) in [("nodes", sources), ("nodes", targets), ("edges", src.len())] {
            if count > u32::MAX as usize {
                return Err(Error::TooLarge { what, count });
            }
        }
        if src.len() != dst.len() {
            let value = format!("{} targets", dst.len());
            return Err(Error::argument("dst", value, format!("{}", src.len())));
        }
        for (end, list, nodes) in [("source", &src, sources), ("target", &dst, targets)] {
            if let Some(edge) = list.iter().position(|v| *v as usize >= nodes) {
                return Err(Error::EdgeOutOfRange {
                    edge,
                    end,
                    index: u64::from(list[edge]),
                    nodes,
                });
            }
        }
        Ok(Self::checked(sources, targets, src, dst))
    }

    /// Without looking: all indices are in range.
    pub(crate) fn checked(sources: usize, targets: usize, src: Vec<u32>, dst: Vec<u32>) -> Self {
        let inner = Inner {
            sources,
            targets,
            src,
            dst,
            incoming: OnceLock::new(),
            outgoing: OnceLock::new(),
            reverse: OnceLock::new(),
            reversed: OnceLock::new(),
            with_loops: OnceLock::new(),
            with_fresh_loops: OnceLock::new(),
            inverse_in_degrees: OnceLock::new(),
            inverse_sqrt_in_degrees: OnceLock::new(),
            on_device: Mutex::new(Vec::new()),
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    /// `n` nodes and no edge.
    ///
    /// # Errors
    /// [`Error::TooLarge`].
    pub fn empty(n: usize) -> Result<Self> {
        Self::from_edges(n, Vec::new(), Vec::new())
    }

    /// From an integer tensor `[2, E]` of sources and targets.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::DType`] for floating point, [`Error::InvalidArgument`] for
    /// negative indices, and those of [`from_edges`](Self::from_edges).
    pub fn from_edge_index(n: usize, edge_index: &Tensor) -> Result<Self> {
        let (two, _) = edge_index
            .dims2()
            .map_err(|_| Error::shape("edge_index", edge_index.dims(), "[2, edges]"))?;
        if two != 2 {
            return Err(Error::shape("edge_index", edge_index.dims(), "[2, edges]"));
        }
        if edge_index.dtype().is_float() {
            return Err(Error::dtype("edge_index", edge_index.dtype(), "integers"));
        }
        let ends = edge_index.to_dtype(DType::I64)?.to_vec2::<i64>()?;
        let narrow = |list: &[i64]| -> Result<Vec<u32>> {
            let one = |v: &i64| {
                u32::try_from(*v).map_err(|_| Error::argument("edge_index", v, "0 to 2^32 - 1"))
            };
            list.iter().map(one).collect()
        };
        Self::from_edges(n, narrow(&ends[0])?, narrow(&ends[1])?)
    }

    /// The entries of a dense matrix `[targets, sources]` that are not zero, as edges and their weights
    /// in the order of the edges: what [`to_dense`](Self::to_dense) undoes. A matrix with rows for
    /// sources, as NetworkX and PyTorch Geometric write it, must be transposed first.
    ///
    /// # Errors
    /// [`Error::Shape`] unless it is a matrix, [`Error::NonFinite`], [`Error::TooLarge`].
    pub fn from_dense(adjacency: &Tensor) -> Result<(Self, Vec<f64>)> {
        let (rows, cols) = adjacency
            .dims2()
            .map_err(|_| Error::shape("adjacency", adjacency.dims(), "[targets, sources]"))?;
        let entries = adjacency.to_dtype(DType::F64)?.flatten_all()?;
        let entries = entries.to_vec1::<f64>()?;
        let count = entries.iter().filter(|v| !v.is_finite()).count();
        if count > 0 {
            let (what, total) = ("adjacency", entries.len());
            return Err(Error::NonFinite { what, count, total });
        }
        let (mut src, mut dst, mut weights) = (Vec::new(), Vec::new(), Vec::new());
        for (at, weight) in entries.into_iter().enumerate().filter(|(_, w)| *w != 0.0) {
            src.push((at % cols) as u32);
            dst.push((at / cols) as u32);
            weights.push(weight);
        }
        let graph = match rows == cols {
            true => Self::from_edges(rows, src, dst)?,
            false => Self::bipartite(cols, rows, src, dst)?,
        };
        Ok((graph, weights))
    }

    /// Items `0..ids.len()`, each with one edge to its group: what sums, means and softmax over
    /// groups need (nodes of a graph in a batch, edges that merge into one). Groups may be empty.
    ///
    /// # Errors
    /// [`Error::EdgeOutOfRange`] for an id that is not below `groups`, [`Error::TooLarge`].
    pub fn segments(ids: Vec<u32>, groups: usize) -> Result<Self> {
        let items = u32::try_from(ids.len()).map_err(|_| Error::TooLarge {
            what: "nodes",
            count: ids.len(),
        })?;
        Self::bipartite(ids.len(), groups, (0..items).collect(), ids)
    }

    /// Number of nodes; of targets where the two sides differ.
    pub fn num_nodes(&self) -> usize {
        self.inner.targets
    }

    /// Number of source nodes: rows of what is sent.
    pub fn num_sources(&self) -> usize {
        self.inner.sources
    }

    /// Number of target nodes: rows of what is received.
    pub fn num_targets(&self) -> usize {
        self.inner.targets
    }

    /// Number of directed edges.
    pub fn num_edges(&self) -> usize {
        self.inner.src.len()
    }

    /// Whether sources and targets are the same nodes.
    pub fn is_square(&self) -> bool {
        self.inner.sources == self.inner.targets
    }

    /// The source of each edge.
    pub fn src(&self) -> &[u32] {
        &self.inner.src
    }

    /// The target of each edge.
    pub fn dst(&self) -> &[u32] {
        &self.inner.dst
    }

    /// All edges as `(source, target)`.
    pub fn edges(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        self.src().iter().copied().zip(self.dst().iter().copied())
    }

    /// Edges by target: row `t` names the sources that send to `t`.
    pub fn incoming(&self) -> &Csr {
        let g = &*self.inner;
        g.incoming
            .get_or_init(|| Csr::build(g.targets, g.sources, &g.dst, &g.src))
    }

    /// Edges by source: row `s` names the targets that `s` sends to. This is the transpose of
    /// [`incoming`](Self::incoming).
    pub fn outgoing(&self) -> &Csr {
        let g = &*self.inner;
        g.outgoing
            .get_or_init(|| Csr::build(g.sources, g.targets, &g.src, &g.dst))
    }

    /// The same edges in the other direction, in the same order, kept.
    pub fn reversed(&self) -> &Graph {
        let g = &*self.inner;
        let turn = || Graph::checked(g.targets, g.sources, g.dst.clone(), g.src.clone());
        g.reversed.get_or_init(turn)
    }

    /// Number of edges into each target.
    pub fn in_degrees(&self) -> Vec<u32> {
        self.incoming().degrees()
    }

    /// Number of edges out of each source.
    pub fn out_degrees(&self) -> Vec<u32> {
        self.outgoing().degrees()
    }

    /// The edge list as an `i64` tensor `[2, E]`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn edge_index(&self, device: &Device) -> Result<Tensor> {
        let ends = self.src().iter().chain(self.dst());
        let ends: Vec<i64> = ends.map(|v| i64::from(*v)).collect();
        Ok(Tensor::from_vec(ends, (2, self.num_edges()), device)?)
    }

    /// For a graph that holds each edge in both directions (as often in the one as in the other),
    /// the edge that runs against each edge; a self-loop is its own. `None` for other graphs.
    pub fn reverse_edges(&self) -> Option<&[u32]> {
        let find = || {
            if !self.is_square() {
                return None;
            }
            let (incoming, outgoing) = (self.incoming(), self.outgoing());
            let same =
                incoming.indptr() == outgoing.indptr() && incoming.indices() == outgoing.indices();
            same.then(|| {
                let mut reverse = vec![0u32; self.num_edges()];
                for (forth, back) in incoming.perm().iter().zip(outgoing.perm()) {
                    reverse[*forth as usize] = *back;
                }
                reverse
            })
        };
        self.inner.reverse.get_or_init(find).as_deref()
    }

    /// Whether each edge is there in both directions.
    pub fn is_undirected(&self) -> bool {
        self.reverse_edges().is_some()
    }

    /// Whether an edge ends where it begins.
    pub fn has_self_loops(&self) -> bool {
        self.edges().any(|(s, t)| s == t)
    }

    /// The dense matrix `[targets, sources]` with the sum of the weights of the edges from `s` to
    /// `t` at `(t, s)`, in `f64` on the CPU: for small graphs and tests.
    ///
    /// # Errors
    /// [`Error::Shape`] unless `weights` has one number per edge.
    pub fn to_dense(&self, weights: Option<&[f64]>) -> Result<Tensor> {
        if let Some(w) = weights.filter(|w| w.len() != self.num_edges()) {
            return Err(Error::shape("weights", &[w.len()], self.num_edges()));
        }
        let (rows, cols) = (self.num_targets(), self.num_sources());
        let mut dense = vec![0.0; rows * cols];
        for (e, (s, t)) in self.edges().enumerate() {
            dense[t as usize * cols + s as usize] += weights.map_or(1.0, |w| w[e]);
        }
        Ok(Tensor::from_vec(dense, (rows, cols), &Device::Cpu)?)
    }

    /// Whether both are clones of one graph.
    pub fn is_same(&self, other: &Graph) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    /// `1 / in-degree`, 0 for a node without in-edges.
    pub(crate) fn inverse_in_degrees(&self) -> &Arc<Vec<f64>> {
        let one = |d: u32| if d == 0 { 0.0 } else { 1.0 / f64::from(d) };
        let compute = || Arc::new(self.in_degrees().into_iter().map(one).collect());
        self.inner.inverse_in_degrees.get_or_init(compute)
    }

    /// `in-degree^(-1/2)`, 0 for a node without in-edges.
    pub(crate) fn inverse_sqrt_in_degrees(&self) -> &Arc<Vec<f64>> {
        let one = |d: u32| {
            if d == 0 {
                0.0
            } else {
                1.0 / f64::from(d).sqrt()
            }
        };
        let compute = || Arc::new(self.in_degrees().into_iter().map(one).collect());
        self.inner.inverse_sqrt_in_degrees.get_or_init(compute)
    }

    /// The ends as `u32` tensors on a device, uploaded once.
    pub(crate) fn edge_tensors(&self, device: &Device) -> Result<EdgeTensors> {
        let mut cache = self
            .inner
            .on_device
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let location = device.location();
        if let Some((_, tensors)) = cache.iter().find(|(at, _)| *at == location) {
            return Ok(tensors.clone());
        }
        let tensors = EdgeTensors {
            src: Tensor::from_slice(self.src(), self.num_edges(), device)?,
            dst: Tensor::from_slice(self.dst(), self.num_edges(), device)?,
        };
        cache.push((location, tensors.clone()));
        Ok(tensors)
    }
}

impl std::fmt::Debug for Graph {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Graph")
            .field("sources", &self.num_sources())
            .field("targets", &self.num_targets())
            .field("edges", &self.num_edges())
            .finish()
    }
}

/// Equal numbers of nodes and equal edge lists.
impl PartialEq for Graph {
    fn eq(&self, other: &Self) -> bool {
        self.is_same(other)
            || (self.num_sources() == other.num_sources()
                && self.num_targets() == other.num_targets()
                && self.src() == other.src()
                && self.dst() == other.dst())
    }
}

//! Graphs made from a graph: other edges, fewer nodes.

use super::Graph;
use crate::sparse::{spmm, Reduce};
use crate::{Error, Result};
use candle_core::Tensor;

/// Which edges of an old graph became which edge of a new one.
#[derive(Debug, Clone)]
pub struct EdgeMap {
    /// Old edges -> new edges; with reverses added, the list of old edges is repeated.
    groups: Graph,
    repeats: usize,
    first: Vec<u32>,
}

impl EdgeMap {
    /// Values of the new edges from values of the old ones (`[E]` or `[E, d]`).
    ///
    /// # Errors
    /// [`Error::Shape`] unless there is one row per old edge.
    pub fn merge(&self, values: &Tensor, reduce: Reduce) -> Result<Tensor> {
        let old = self.groups.num_sources() / self.repeats;
        if values.dims().first() != Some(&old) {
            return Err(Error::shape(
                "edge values",
                values.dims(),
                format!("[{old}, ..]"),
            ));
        }
        let all = Tensor::cat(&vec![values; self.repeats], 0)?;
        spmm(&self.groups, None, &all, reduce)
    }

    /// The value of the first old edge of each new one.
    ///
    /// # Errors
    /// Those of candle, for values with fewer rows than old edges.
    pub fn first(&self, values: &Tensor) -> Result<Tensor> {
        let ids = Tensor::from_slice(&self.first, self.first.len(), values.device())?;
        Ok(values.index_select(&ids, 0)?)
    }

    /// The first old edge of each new one.
    pub fn first_edges(&self) -> &[u32] {
        &self.first
    }
}

impl Graph {
    /// The square graph, or an error that says what needs one.
    pub(crate) fn require_square(&self, operation: &str) -> Result<()> {
        if self.is_square() {
            return Ok(());
        }
        let sides = format!(
            "between {} sources and {} targets: it needs one set of nodes",
            self.num_sources(),
            self.num_targets()
        );
        Err(Error::unsupported(operation, sides))
    }

    /// Each edge in both directions, duplicates merged, sorted by target and source.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a graph between two sets of nodes, [`Error::TooLarge`].
    pub fn to_undirected(&self) -> Result<(Graph, EdgeMap)> {
        self.require_square("making both directions")?;
        let src = [self.src(), self.dst()].concat();
        let dst = [self.dst(), self.src()].concat();
        let both = Graph::from_edges(self.num_nodes(), src, dst)?;
        both.merged(2)
    }

    /// Duplicated edges merged into one, sorted by target and source.
    ///
    /// # Errors
    /// [`Error::TooLarge`] cannot occur for a graph that exists.
    pub fn coalesce(&self) -> Result<(Graph, EdgeMap)> {
        self.merged(1)
    }

    fn merged(&self, repeats: usize) -> Result<(Graph, EdgeMap)> {
        let csr = self.incoming();
        let old = (self.num_edges() / repeats) as u32;
        let (mut src, mut dst, mut first) = (Vec::new(), Vec::new(), Vec::new());
        let mut ids = vec![0u32; self.num_edges()];
        for t in 0..self.num_targets() {
            let mut last = None;
            for p in csr.row(t) {
                let s = csr.indices()[p];
                if last != Some(s) {
                    last = Some(s);
                    src.push(s);
                    dst.push(t as u32);
                    first.push(csr.perm()[p] % old.max(1));
                }
                ids[csr.perm()[p] as usize] = (src.len() - 1) as u32;
            }
        }
        let groups = Graph::segments(ids, src.len())?;
        let graph = Graph::checked(self.num_sources(), self.num_targets(), src, dst);
        let map = EdgeMap {
            groups,
            repeats,
            first,
        };
        Ok((graph, map))
    }

    /// The edges with these ids, in this order, between the same nodes.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for an id that is no edge.
    pub fn select_edges(&self, ids: &[u32]) -> Result<Graph> {
        if let Some(bad) = ids.iter().find(|e| **e as usize >= self.num_edges()) {
            return Err(Error::argument(
                "edge id",
                bad,
                format!("below {}", self.num_edges()),
            ));
        }
        let pick = |list: &[u32]| ids.iter().map(|e| list[*e as usize]).collect();
        let (src, dst) = (pick(self.src()), pick(self.dst()));
        Ok(Graph::checked(
            self.num_sources(),
            self.num_targets(),
            src,
            dst,
        ))
    }

    /// Without self-loops, and the ids of the edges that are left.
    ///
    /// # Errors
    /// None for a graph that exists.
    pub fn remove_self_loops(&self) -> Result<(Graph, Vec<u32>)> {
        let proper = |(e, (s, t)): (usize, (u32, u32))| (s != t).then_some(e as u32);
        let ids: Vec<u32> = self.edges().enumerate().filter_map(proper).collect();
        Ok((self.select_edges(&ids)?, ids))
    }

    /// One more self-loop on every node, after all edges, whatever loops there are. Given weights
    /// `[E]` get `fill` for the new edges.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a graph between two sets of nodes, [`Error::TooLarge`],
    /// [`Error::Shape`] for weights that do not fit.
    pub fn add_self_loops(
        &self,
        weights: Option<&Tensor>,
        fill: f64,
    ) -> Result<(Graph, Option<Tensor>)> {
        let ids: Vec<u32> = (0..self.num_edges() as u32).collect();
        self.loops_after(&ids, &vec![None; self.num_targets()], weights, fill)
    }

    /// A self-loop on every node: one that is there keeps its weight (the last of several), the
    /// others get `fill`. Loops come after all other edges, by node.
    ///
    /// # Errors
    /// As [`add_self_loops`](Self::add_self_loops).
    pub fn add_remaining_self_loops(
        &self,
        weights: Option<&Tensor>,
        fill: f64,
    ) -> Result<(Graph, Option<Tensor>)> {
        let mut ids = Vec::with_capacity(self.num_edges());
        let mut loops = vec![None; self.num_targets()];
        for (e, (s, t)) in self.edges().enumerate() {
            if s == t {
                loops[t as usize] = Some(e as u32);
            } else {
                ids.push(e as u32);
            }
        }
        self.loops_after(&ids, &loops, weights, fill)
    }

    /// The edges `ids`, then a self-loop for every target, with the weight of the edge in `loops`
    /// or `fill`.
    fn loops_after(
        &self,
        ids: &[u32],
        loops: &[Option<u32>],
        weights: Option<&Tensor>,
        fill: f64,
    ) -> Result<(Graph, Option<Tensor>)> {
        if self.num_targets() > self.num_sources() {
            self.require_square("adding self-loops")?;
        }
        let nodes = 0..self.num_targets() as u32;
        let extend = |list: &[u32]| -> Vec<u32> {
            let kept = ids.iter().map(|e| list[*e as usize]);
            kept.chain(nodes.clone()).collect()
        };
        let (sources, targets) = (self.num_sources(), self.num_targets());
        let graph = Graph::bipartite(sources, targets, extend(self.src()), extend(self.dst()))?;
        let Some(weights) = weights else {
            return Ok((graph, None));
        };
        let edges = self.num_edges();
        if weights.dims() != [edges] {
            return Err(Error::shape(
                "edge weights",
                weights.dims(),
                format!("[{edges}]"),
            ));
        }
        // The fill stands behind the weights, so that one selection makes all of the new ones.
        let filled = Tensor::full(fill, 1, weights.device())?.to_dtype(weights.dtype())?;
        let pool = Tensor::cat(&[weights, &filled], 0)?;
        let of_loop = loops.iter().map(|e| e.unwrap_or(edges as u32));
        let from: Vec<u32> = ids.iter().copied().chain(of_loop).collect();
        let from = Tensor::from_vec(from, graph.num_edges(), weights.device())?;
        Ok((graph, Some(pool.index_select(&from, 0)?)))
    }

    /// [`add_remaining_self_loops`](Self::add_remaining_self_loops) without weights, kept.
    pub(crate) fn with_loops(&self) -> Result<&Graph> {
        keep(&self.inner.with_loops, || {
            Ok(self.add_remaining_self_loops(None, 1.0)?.0)
        })
    }

    /// All self-loops removed, then one added to every node, kept.
    pub(crate) fn with_fresh_loops(&self) -> Result<&Graph> {
        keep(&self.inner.with_fresh_loops, || {
            Ok(self.remove_self_loops()?.0.add_self_loops(None, 1.0)?.0)
        })
    }

    /// The graph between `nodes`, which are renamed to their place in this list, and the ids of its
    /// edges.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a node that does not exist or is named twice,
    /// [`Error::Unsupported`] for a graph between two sets of nodes.
    pub fn induced_subgraph(&self, nodes: &[u32]) -> Result<(Graph, Vec<u32>)> {
        self.require_square("an induced subgraph")?;
        let mut place = vec![u32::MAX; self.num_nodes()];
        for (i, v) in nodes.iter().enumerate() {
            let slot = place.get_mut(*v as usize);
            let slot = slot.filter(|s| **s == u32::MAX).ok_or_else(|| {
                let expected = format!("distinct nodes below {}", self.num_nodes());
                Error::argument("nodes", v, expected)
            })?;
            *slot = i as u32;
        }
        let csr = self.incoming();
        let mut ids = Vec::new();
        for v in nodes {
            let row = csr.row(*v as usize);
            let inside = row.filter(|p| place[csr.indices()[*p] as usize] != u32::MAX);
            ids.extend(inside.map(|p| csr.perm()[p]));
        }
        ids.sort_unstable();
        let rename = |list: &[u32]| -> Vec<u32> {
            let ends = ids.iter().map(|e| list[*e as usize] as usize);
            ends.map(|v| place[v]).collect()
        };
        let (src, dst) = (rename(self.src()), rename(self.dst()));
        Ok((Graph::checked(nodes.len(), nodes.len(), src, dst), ids))
    }

    /// Node `v` renamed to `order[v]`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] unless `order` is a permutation of the nodes.
    pub fn relabel(&self, order: &[u32]) -> Result<Graph> {
        self.require_square("renaming nodes")?;
        let mut seen = vec![false; self.num_nodes()];
        let fresh = |v: &u32| {
            let slot = seen.get_mut(*v as usize);
            slot.is_some_and(|s| !std::mem::replace(s, true))
        };
        if order.len() != self.num_nodes() || !order.iter().all(fresh) {
            let expected = format!("a permutation of {} nodes", self.num_nodes());
            return Err(Error::argument(
                "order",
                format!("{} nodes", order.len()),
                expected,
            ));
        }
        let rename = |list: &[u32]| list.iter().map(|v| order[*v as usize]).collect();
        let (src, dst) = (rename(self.src()), rename(self.dst()));
        Ok(Graph::checked(order.len(), order.len(), src, dst))
    }
}

/// A value that is computed at the first call; a failure is not kept.
fn keep(
    cell: &std::sync::OnceLock<Graph>,
    compute: impl FnOnce() -> Result<Graph>,
) -> Result<&Graph> {
    match cell.get() {
        Some(graph) => Ok(graph),
        None => {
            let graph = compute()?;
            Ok(cell.get_or_init(|| graph))
        }
    }
}

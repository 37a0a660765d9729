//! Graphs brought into one order, and what estimators take of them.

use crate::graph::Graph;
use crate::{Error, Result};
use faer::Mat;

/// The adjacency of an undirected graph with its nodes by descending degree.
#[derive(Debug, Clone)]
pub struct Aligned {
    adjacency: Mat<f64>,
    shares: Vec<f64>,
    order: Vec<u32>,
}

impl Aligned {
    /// Nodes of equal degree keep the order of their numbers; estimates depend on it.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a graph without edges or a directed one, [`Error::Unsupported`]
    /// for one between two sets of nodes.
    pub fn new(graph: &Graph) -> Result<Self> {
        let degrees = graph.in_degrees();
        let mut order: Vec<u32> = (0..graph.num_nodes() as u32).collect();
        order.sort_by_key(|v| std::cmp::Reverse(degrees[*v as usize]));
        Self::with_order(graph, &order)
    }

    /// With an order of your own.
    ///
    /// # Errors
    /// As [`new`](Self::new), and [`Error::InvalidArgument`] for another order than of all nodes.
    pub fn with_order(graph: &Graph, order: &[u32]) -> Result<Self> {
        graph.require_square("an aligned graph")?;
        if !graph.is_undirected() {
            let expected = "each edge in both directions";
            return Err(Error::argument("graph", "directed", expected));
        }
        if graph.num_edges() == 0 {
            return Err(Error::argument("graph", "no edge", "at least one edge"));
        }
        let n = graph.num_nodes();
        let mut place = vec![usize::MAX; n];
        for (at, v) in order.iter().enumerate() {
            let slot = place.get_mut(*v as usize).filter(|p| **p == usize::MAX);
            let expected = || format!("each of {n} nodes once");
            *slot.ok_or_else(|| Error::argument("order", v, expected()))? = at;
        }
        if order.len() != n {
            let expected = format!("each of {n} nodes once");
            return Err(Error::argument("order", order.len(), expected));
        }
        let mut adjacency = Mat::zeros(n, n);
        for (s, t) in graph.edges() {
            adjacency[(place[t as usize], place[s as usize])] = 1.0;
        }
        let degrees: Vec<f64> = (0..n).map(|i| adjacency.row(i).iter().sum()).collect();
        let total: f64 = degrees.iter().sum();
        Ok(Self {
            shares: degrees.iter().map(|d| d / total).collect(),
            adjacency,
            order: order.to_vec(),
        })
    }

    /// Number of nodes.
    pub fn nodes(&self) -> usize {
        self.shares.len()
    }

    /// The nodes in their order.
    pub fn order(&self) -> &[u32] {
        &self.order
    }

    /// Degree over the sum of degrees, in the order.
    pub fn shares(&self) -> &[f64] {
        &self.shares
    }

    pub(crate) fn adjacency(&self) -> &Mat<f64> {
        &self.adjacency
    }

    /// The adjacency in the order, with zeros up to `n` nodes.
    pub(crate) fn padded(&self, n: usize) -> Mat<f64> {
        let own = self.nodes();
        let entry = |i: usize, j: usize| match i < own && j < own {
            true => self.adjacency[(i, j)],
            false => 0.0,
        };
        Mat::from_fn(n, n, entry)
    }
}

/// The graphs of a collection that have edges, aligned; the others are left out, as a `tracing`
/// warning says.
///
/// # Errors
/// [`Error::InvalidArgument`] where none is left, and for directed graphs.
pub fn align_by_degree(graphs: &[Graph]) -> Result<Vec<Aligned>> {
    let kept = graphs.iter().filter(|g| g.num_edges() > 0);
    let aligned: Vec<Aligned> = kept.map(Aligned::new).collect::<Result<_>>()?;
    let dropped = graphs.len() - aligned.len();
    if dropped > 0 {
        tracing::warn!(dropped, "graphs without edges were left out");
    }
    match aligned.is_empty() {
        true => Err(Error::argument("graphs", "none with edges", "at least one")),
        false => Ok(aligned),
    }
}

/// The sizes that follow from the largest graph: nodes, block side and number of blocks.
pub(crate) fn sizes(graphs: &[Aligned]) -> (usize, usize, usize) {
    let n = graphs.iter().map(Aligned::nodes).max().unwrap_or(0);
    let block = ((n.max(1) as f64).log2() + 1.0).floor() as usize;
    (n, block, n / block.max(1))
}

/// The mean of the padded adjacencies.
pub(crate) fn mean(graphs: &[Aligned]) -> Mat<f64> {
    let (n, _, _) = sizes(graphs);
    let mut sum = Mat::zeros(n, n);
    for graph in graphs {
        let own = graph.nodes();
        let mut corner = sum.as_mut().submatrix_mut(0, 0, own, own);
        corner += graph.adjacency();
    }
    faer::Scale(1.0 / graphs.len() as f64) * sum
}

/// The weights of `k` cells: descending degree shares, interpolated at `k` positions, plus `1e-3`, added
/// over the graphs and divided by their sum.
///
/// # Errors
/// [`Error::InvalidArgument`] for no list, an empty one, or no cell.
pub fn target_distribution(shares: &[Vec<f64>], k: usize) -> Result<Vec<f64>> {
    if k == 0 || shares.is_empty() || shares.iter().any(Vec::is_empty) {
        let value = format!("{} lists, {k} cells", shares.len());
        return Err(Error::argument("shares", value, "one of each, none empty"));
    }
    let mut sum = vec![0.0; k];
    for list in shares {
        let mut list = list.clone();
        list.sort_by(|a, b| b.total_cmp(a));
        let last = list.len() - 1;
        for (j, sum) in sum.iter_mut().enumerate() {
            let x = match k {
                1 => 0.0,
                _ => j as f64 / (k - 1) as f64 * last as f64,
            };
            let low = (x.floor() as usize).min(last);
            let high = (low + 1).min(last);
            let t = x - low as f64;
            *sum += list[low] * (1.0 - t) + list[high] * t + 1e-3;
        }
    }
    let total: f64 = sum.iter().sum();
    Ok(sum.into_iter().map(|s| s / total).collect())
}

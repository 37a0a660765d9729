//! What the normalized adjacency can become when edges are dropped.

use crate::graph::Graph;
use crate::sparse::{spmm, Reduce};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};

/// How many edges may be dropped at each node.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Budget<'a> {
    /// `round(p deg)`, halves to even: the expectation of dropping with this rate.
    Rate(f64),
    /// A number for each node: the rounded sum of its edges' rates, where they differ (GCA).
    PerNode(&'a [usize]),
}

/// `L <= A <= U` entrywise for every normalized adjacency `A` within the budget.
#[derive(Debug, Clone)]
pub struct AdjacencyBounds {
    /// The graph without self-loops and then one on every node: the pattern of `U`.
    graph: Graph,
    upper: Vec<f64>,
    lower: Vec<f64>,
    max_delete: Vec<usize>,
}

impl AdjacencyBounds {
    /// Bounds of an undirected graph; self-loops and duplicates are taken out first.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a graph that is not undirected, a rate outside `[0, 1]`, or
    /// another number of budgets than nodes.
    pub fn from_graph(graph: &Graph, budget: Budget) -> Result<Self> {
        if !graph.is_undirected() {
            return Err(Error::argument(
                "graph",
                "directed",
                "each edge in both directions",
            ));
        }
        let simple = graph.coalesce()?.0.remove_self_loops()?.0;
        let degrees = simple.in_degrees();
        let wanted: Vec<usize> = match budget {
            Budget::Rate(p) => {
                if !(0.0..=1.0).contains(&p) {
                    return Err(Error::argument("rate", p, "a number in [0, 1]"));
                }
                let one = |d: &u32| (p * f64::from(*d)).round_ties_even() as usize;
                degrees.iter().map(one).collect()
            }
            Budget::PerNode(budgets) => {
                if budgets.len() != degrees.len() {
                    let expected = format!("{} nodes", degrees.len());
                    return Err(Error::argument("budgets", budgets.len(), expected));
                }
                budgets.to_vec()
            }
        };
        // Of d + 1 entries (the loop counts) at least two are left.
        let one = |(d, m): (&u32, &usize)| (*m).min((*d as usize).saturating_sub(1));
        let max_delete: Vec<usize> = degrees.iter().zip(&wanted).map(one).collect();
        let left: Vec<f64> = degrees
            .iter()
            .zip(&max_delete)
            .map(|(d, m)| f64::from(*d) + 1.0 - *m as f64)
            .collect();
        let graph = simple.add_self_loops(None, 1.0)?.0;
        let upper = |(s, t): (u32, u32)| 1.0 / (left[s as usize] * left[t as usize]).sqrt();
        let lower = |(s, t): (u32, u32)| match s == t {
            true => 1.0 / (f64::from(degrees[t as usize]) + 1.0),
            false => 0.0,
        };
        Ok(Self {
            upper: graph.edges().map(upper).collect(),
            lower: graph.edges().map(lower).collect(),
            graph,
            max_delete,
        })
    }

    /// The bounds between some nodes, in this order.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a node that does not exist or is named twice.
    pub fn restrict(&self, nodes: &[u32]) -> Result<Self> {
        let (graph, ids) = self.graph.induced_subgraph(nodes)?;
        let pick = |list: &[f64]| ids.iter().map(|e| list[*e as usize]).collect();
        Ok(Self {
            graph,
            upper: pick(&self.upper),
            lower: pick(&self.lower),
            max_delete: nodes.iter().map(|v| self.max_delete[*v as usize]).collect(),
        })
    }

    /// Number of nodes.
    pub fn num_nodes(&self) -> usize {
        self.graph.num_nodes()
    }

    /// How many edges may be dropped at each node.
    pub fn max_delete(&self) -> &[usize] {
        &self.max_delete
    }

    /// The pattern: the graph with a self-loop on every node.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// Upper bounds of the entries, one per edge of [`graph`](Self::graph); others are 0.
    pub fn upper(&self) -> &[f64] {
        &self.upper
    }

    /// Lower bounds of the entries.
    pub fn lower(&self) -> &[f64] {
        &self.lower
    }

    /// `U y` or another combination `sum_e f(U_e, L_e) y_s`.
    pub(super) fn product(&self, y: &Tensor, entry: impl Fn(f64, f64) -> f64) -> Result<Tensor> {
        let entries = self
            .upper
            .iter()
            .zip(&self.lower)
            .map(|(u, l)| entry(*u, *l));
        let entries: Vec<f64> = entries.collect();
        let count = entries.len();
        let entries = Tensor::from_vec(entries, count, &Device::Cpu)?;
        let entries = entries.to_dtype(y.dtype())?.to_device(y.device())?;
        spmm(&self.graph, Some(&entries), y, Reduce::Sum)
    }

    /// Both ends of `A y + b` over all `A`, for an exact `y`: `C y -+ R |y| + b`.
    pub(super) fn interval(&self, y: &Tensor, bias: &Tensor) -> Result<(Tensor, Tensor)> {
        let center = self.product(y, |u, l| (u + l) / 2.0)?.broadcast_add(bias)?;
        let radius = self.product(&y.abs()?, |u, l| (u - l) / 2.0)?;
        Ok(((&center - &radius)?, (center + radius)?))
    }

    /// Both ends of `A y + b` over all `A` and all `y` between `low` and `high`.
    pub(super) fn sound_interval(
        &self,
        low: &Tensor,
        high: &Tensor,
        bias: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        let (u, l) = (|u: f64, _: f64| u, |_: f64, l: f64| l);
        let negative = |y: &Tensor| -> Result<Tensor> { Ok(y.neg()?.relu()?.neg()?) };
        let least = (self.product(&negative(low)?, u)? + self.product(&low.relu()?, l)?)?;
        let most = (self.product(&high.relu()?, u)? + self.product(&negative(high)?, l)?)?;
        Ok((least.broadcast_add(bias)?, most.broadcast_add(bias)?))
    }

    /// The dense matrices `(U, L)` in f64: for small graphs.
    ///
    /// # Errors
    /// Those of candle.
    pub fn to_dense(&self) -> Result<(Tensor, Tensor)> {
        let dense = |entries: &[f64]| -> Result<Tensor> {
            Ok(self.graph.to_dense(Some(entries))?.to_dtype(DType::F64)?)
        };
        Ok((dense(&self.upper)?, dense(&self.lower)?))
    }
}

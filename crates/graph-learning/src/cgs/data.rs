//! Stationary states with a known answer.

use crate::generate::delaunay;
use crate::graph::Graph;
use crate::{Error, RandomStream, Result};
use candle_core::{DType, Device, Tensor};
use faer::linalg::solvers::Solve;

/// Points in the unit square, joined by Delaunay's edges with random conductances, between two
/// potentials.
#[derive(Debug, Clone)]
pub struct ConductanceNetwork {
    /// Both directions of each edge.
    pub graph: Graph,
    /// The points.
    pub points: Vec<(f64, f64)>,
    /// `ln` of the conductance of each directed edge; the same in both directions.
    pub log_conductance: Vec<f64>,
    /// The potential of nodes that have one: 1 on the left, 0 on the right.
    pub fixed: Vec<Option<f64>>,
    /// The potential of every node by Kirchhoff's laws.
    pub potential: Vec<f64>,
}

impl ConductanceNetwork {
    /// Node features `[n, 2]` (whether the potential is fixed, and to what) and edge features
    /// `[E, 1]` (`ln` of the conductance).
    ///
    /// # Errors
    /// Those of candle.
    pub fn features(&self, dtype: DType, device: &Device) -> Result<(Tensor, Tensor)> {
        let node = |f: &Option<f64>| [f64::from(u8::from(f.is_some())), f.unwrap_or(0.0)];
        let nodes: Vec<f64> = self.fixed.iter().flat_map(node).collect();
        let x = Tensor::from_vec(nodes, (self.fixed.len(), 2), &Device::Cpu)?;
        let edges = self.log_conductance.len();
        let u = Tensor::from_slice(&self.log_conductance, (edges, 1), &Device::Cpu)?;
        let place = |t: Tensor| -> Result<Tensor> { Ok(t.to_dtype(dtype)?.to_device(device)?) };
        Ok((place(x)?, place(u)?))
    }

    /// The potentials as `[n, 1]`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn target(&self, dtype: DType, device: &Device) -> Result<Tensor> {
        let n = self.potential.len();
        let y = Tensor::from_slice(&self.potential, (n, 1), &Device::Cpu)?;
        Ok(y.to_dtype(dtype)?.to_device(device)?)
    }
}

/// `n` uniform points, log-conductances `N(0, 1)`, the leftmost tenth of the nodes at potential 1 and
/// the rightmost tenth at 0.
///
/// # Errors
/// [`Error::InvalidArgument`] for fewer than 3 nodes.
pub fn conductance_network(n: usize, rng: &mut RandomStream) -> Result<ConductanceNetwork> {
    let points: Vec<(f64, f64)> = (0..n)
        .map(|_| (rng.next_uniform(), rng.next_uniform()))
        .collect();
    let graph = delaunay(&points)?;
    // The second half of the edges runs against the first.
    let half: Vec<f64> = (0..graph.num_edges() / 2)
        .map(|_| rng.next_normal())
        .collect();
    let log_conductance = [half.clone(), half].concat();
    let mut by_x: Vec<usize> = (0..n).collect();
    by_x.sort_by(|a, b| points[*a].0.total_cmp(&points[*b].0));
    let held = (n / 10).max(1);
    let mut fixed = vec![None; n];
    by_x[..held].iter().for_each(|v| fixed[*v] = Some(1.0));
    by_x[n - held..].iter().for_each(|v| fixed[*v] = Some(0.0));
    let potential = kirchhoff(&graph, &log_conductance, &fixed);
    Ok(ConductanceNetwork {
        graph,
        points,
        log_conductance,
        fixed,
        potential,
    })
}

/// Potentials for which no current is lost at a free node.
fn kirchhoff(graph: &Graph, log_conductance: &[f64], fixed: &[Option<f64>]) -> Vec<f64> {
    let free: Vec<usize> = (0..fixed.len()).filter(|v| fixed[*v].is_none()).collect();
    let mut place = vec![usize::MAX; fixed.len()];
    free.iter().enumerate().for_each(|(i, v)| place[*v] = i);
    let mut matrix = faer::Mat::<f64>::zeros(free.len(), free.len());
    let mut right = faer::Mat::<f64>::zeros(free.len(), 1);
    for ((s, t), log_k) in graph.edges().zip(log_conductance) {
        let (s, t, k) = (s as usize, t as usize, log_k.exp());
        if fixed[t].is_some() {
            continue;
        }
        matrix[(place[t], place[t])] += k;
        match fixed[s] {
            Some(v) => right[(place[t], 0)] += k * v,
            None => matrix[(place[t], place[s])] -= k,
        }
    }
    let x = matrix.partial_piv_lu().solve(&right);
    let value = |v: usize| fixed[v].unwrap_or_else(|| x[(place[v], 0)]);
    (0..fixed.len()).map(value).collect()
}

/// A deterministic decision process on a graph.
#[derive(Debug, Clone)]
pub struct GviGraph {
    /// `actions` edges into each node, node by node, from sources that may repeat.
    pub graph: Graph,
    /// The reward of each edge.
    pub reward: Vec<f64>,
    /// The value of each node.
    pub value: Vec<f64>,
}

/// A random process with rewards uniform in `(-1, 1)`, solved by [`value_iteration`] until changes are
/// below `1e-3` (200 sweeps at most), as published.
///
/// # Errors
/// [`Error::InvalidArgument`] unless there are 2 states and 1 action at least, and `0 <= discount < 1`.
pub fn gvi_graph(
    states: usize,
    actions: usize,
    discount: f64,
    rng: &mut RandomStream,
) -> Result<GviGraph> {
    if states < 2 || actions == 0 {
        let value = format!("{states} states, {actions} actions");
        return Err(Error::argument(
            "size",
            value,
            "at least 2 states and 1 action",
        ));
    }
    let (mut src, mut dst) = (Vec::new(), Vec::new());
    for t in 0..states {
        for _ in 0..actions {
            // One of the others.
            let s = rng.below(states - 1)?;
            src.push((s + usize::from(s >= t)) as u32);
            dst.push(t as u32);
        }
    }
    let graph = Graph::from_edges(states, src, dst)?;
    let reward: Vec<f64> = (0..graph.num_edges())
        .map(|_| 2.0 * rng.next_uniform() - 1.0)
        .collect();
    let value = value_iteration(&graph, &reward, discount, 1e-3, 200)?;
    Ok(GviGraph {
        graph,
        reward,
        value,
    })
}

fn check(graph: &Graph, reward: &[f64], discount: f64) -> Result<()> {
    graph.require_square("value iteration")?;
    if reward.len() != graph.num_edges() {
        return Err(Error::shape("reward", &[reward.len()], graph.num_edges()));
    }
    let count = reward.iter().filter(|r| !r.is_finite()).count();
    if count > 0 {
        let (what, total) = ("reward", reward.len());
        return Err(Error::NonFinite { what, count, total });
    }
    if !(0.0..1.0).contains(&discount) {
        return Err(Error::argument("discount", discount, "a number in [0, 1)"));
    }
    Ok(())
}

/// `v_t = max over the edges into t of r_e + discount v_s`, from 0, until no value changes by more than
/// `tol`, `max_sweeps` times at most. A node without in-edges has value 0.
///
/// # Errors
/// [`Error::Shape`] unless there is one reward per edge, [`Error::NonFinite`],
/// [`Error::InvalidArgument`] unless `0 <= discount < 1`.
pub fn value_iteration(
    graph: &Graph,
    reward: &[f64],
    discount: f64,
    tol: f64,
    max_sweeps: usize,
) -> Result<Vec<f64>> {
    check(graph, reward, discount)?;
    let csr = graph.incoming();
    let mut value = vec![0.0; graph.num_nodes()];
    for _ in 0..max_sweeps {
        let best = |t: usize| {
            let one =
                |p| reward[csr.perm()[p] as usize] + discount * value[csr.indices()[p] as usize];
            let best = csr.row(t).map(one).fold(f64::NEG_INFINITY, f64::max);
            if best.is_finite() {
                best
            } else {
                0.0
            }
        };
        let next: Vec<f64> = (0..value.len()).map(best).collect();
        let change = next
            .iter()
            .zip(&value)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f64::max);
        value = next;
        if change <= tol {
            break;
        }
    }
    Ok(value)
}

/// The best edge into each node, as its place among the node's in-edges in the order of the edge list
/// (the first among equals); `u32::MAX` without in-edges.
///
/// # Errors
/// As [`value_iteration`], and [`Error::Shape`] unless there is one value per node.
pub fn policy(graph: &Graph, reward: &[f64], value: &[f64], discount: f64) -> Result<Vec<u32>> {
    check(graph, reward, discount)?;
    if value.len() != graph.num_nodes() {
        return Err(Error::shape("value", &[value.len()], graph.num_nodes()));
    }
    let mut best = vec![(f64::NEG_INFINITY, u32::MAX); value.len()];
    let mut seen = vec![0u32; value.len()];
    for (e, (s, t)) in graph.edges().enumerate() {
        let quality = reward[e] + discount * value[s as usize];
        let (best, seen) = (&mut best[t as usize], &mut seen[t as usize]);
        if quality > best.0 {
            *best = (quality, *seen);
        }
        *seen += 1;
    }
    Ok(best.into_iter().map(|(_, k)| k).collect())
}

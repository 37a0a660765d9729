//! A few numbers that describe the shape of a graph.

use crate::graph::{Direction, Graph};
use crate::{Error, Result};

/// Numbers about an undirected graph; self-loops and duplicates are left out.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Topology {
    /// Mean degree.
    pub mean_degree: f64,
    /// Standard deviation of the degrees, over all nodes.
    pub degree_deviation: f64,
    /// Edges over pairs of nodes.
    pub density: f64,
    /// Mean closeness, each node's scaled by the share of nodes that it reaches (Wasserman and Faust).
    pub closeness: f64,
    /// Correlation of the degrees at the two ends of an edge; 0 where all degrees are equal.
    pub assortativity: f64,
    /// Three times the triangles over the connected triples.
    pub transitivity: f64,
    /// Mean share of a node's pairs of neighbors that are connected.
    pub clustering: f64,
}

impl Topology {
    /// Of an undirected graph with an edge.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a directed graph or one without edges.
    pub fn of(graph: &Graph) -> Result<Self> {
        if !graph.is_undirected() {
            let expected = "each edge in both directions";
            return Err(Error::argument("graph", "directed", expected));
        }
        let (simple, _) = graph.remove_self_loops()?.0.coalesce()?;
        if simple.num_edges() == 0 {
            return Err(Error::argument("graph", "no edge", "at least one edge"));
        }
        let n = simple.num_nodes();
        let degrees: Vec<f64> = simple.in_degrees().into_iter().map(f64::from).collect();
        let mean = degrees.iter().sum::<f64>() / n as f64;
        let variance = degrees.iter().map(|d| (d - mean) * (d - mean)).sum::<f64>() / n as f64;
        let (triangles, triples, clustering) = triangles(&simple, &degrees);
        Ok(Self {
            mean_degree: mean,
            degree_deviation: variance.sqrt(),
            density: simple.num_edges() as f64 / (n * (n - 1)) as f64,
            closeness: closeness(&simple),
            assortativity: assortativity(&simple, &degrees),
            transitivity: if triples > 0.0 {
                triangles / triples
            } else {
                0.0
            },
            clustering,
        })
    }

    /// As eight features: the seven numbers, the degree correlation twice (as the published code has
    /// it, under two names).
    pub fn features(&self) -> [f64; 8] {
        [
            self.mean_degree,
            self.degree_deviation,
            self.density,
            self.closeness,
            self.assortativity,
            self.assortativity,
            self.transitivity,
            self.clustering,
        ]
    }
}

/// The mean over nodes of `(r - 1)^2 / ((n - 1) sum of distances)` with `r` nodes in reach.
fn closeness(graph: &Graph) -> f64 {
    let n = graph.num_nodes();
    let mut distance = vec![usize::MAX; n];
    let mut total = 0.0;
    for start in 0..n {
        distance.fill(usize::MAX);
        distance[start] = 0;
        let mut queue = vec![start as u32];
        let (mut at, mut sum) = (0, 0);
        while at < queue.len() {
            let v = queue[at];
            at += 1;
            let next = distance[v as usize] + 1;
            graph.for_neighbors(v, Direction::Incoming, |u| {
                if distance[u as usize] == usize::MAX {
                    distance[u as usize] = next;
                    sum += next;
                    queue.push(u);
                }
            });
        }
        if sum > 0 {
            let others = (queue.len() - 1) as f64;
            total += others * others / ((n - 1) as f64 * sum as f64);
        }
    }
    total / n as f64
}

fn assortativity(graph: &Graph, degrees: &[f64]) -> f64 {
    let m = graph.num_edges() as f64;
    let ends = || {
        graph
            .edges()
            .map(|(s, t)| (degrees[s as usize], degrees[t as usize]))
    };
    let mean = ends().map(|(a, _)| a).sum::<f64>() / m;
    let covariance: f64 = ends().map(|(a, b)| (a - mean) * (b - mean)).sum();
    let variance: f64 = ends().map(|(a, _)| (a - mean) * (a - mean)).sum();
    if variance > 0.0 {
        covariance / variance
    } else {
        0.0
    }
}

/// Closed triples, all triples, and the mean clustering.
fn triangles(graph: &Graph, degrees: &[f64]) -> (f64, f64, f64) {
    let csr = graph.incoming();
    let (mut closed, mut all, mut clustering) = (0.0, 0.0, 0.0);
    for (v, d) in degrees.iter().enumerate() {
        let around = csr.neighbors(v);
        // Ordered pairs of neighbors that are neighbors of each other.
        let own: usize = around
            .iter()
            .map(|u| common(csr.neighbors(*u as usize), around))
            .sum();
        let pairs = d * (d - 1.0);
        closed += own as f64;
        all += pairs;
        if pairs > 0.0 {
            clustering += own as f64 / pairs;
        }
    }
    (closed, all, clustering / degrees.len() as f64)
}

/// Entries that two ascending lists share.
fn common(a: &[u32], b: &[u32]) -> usize {
    let (mut i, mut j, mut count) = (0, 0, 0);
    while i < a.len() && j < b.len() {
        match a[i].cmp(&b[j]) {
            std::cmp::Ordering::Less => i += 1,
            std::cmp::Ordering::Greater => j += 1,
            std::cmp::Ordering::Equal => {
                count += 1;
                i += 1;
                j += 1;
            }
        }
    }
    count
}

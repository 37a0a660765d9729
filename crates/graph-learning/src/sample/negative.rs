//! Pairs that are no edges.

use crate::graph::Graph;
use crate::{Error, RandomStream, Result};
use std::collections::HashSet;

/// How non-edges are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Method {
    /// Random pairs, rejected where they are edges: for sparse graphs.
    #[default]
    Sparse,
    /// A random subset of the list of all non-edges: `n^2` bits of memory, exact for dense graphs.
    Dense,
}

/// Settings of [`negative_sampling`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Negatives {
    /// How they are found.
    pub method: Method,
    /// Pairs `u < v` only; both directions count as an edge.
    pub undirected: bool,
}

/// Rejections before a sparse search gives up, per pair.
const PATIENCE: usize = 1000;

/// `count` distinct pairs of different nodes that are no edges.
///
/// # Errors
/// [`Error::InvalidArgument`] where there are fewer non-edges (or the sparse method finds none after
/// many attempts: take [`Method::Dense`]); [`Error::Unsupported`] for graphs between two sets of nodes.
pub fn negative_sampling(
    graph: &Graph,
    count: usize,
    how: Negatives,
    rng: &mut RandomStream,
) -> Result<Vec<(u32, u32)>> {
    graph.require_square("negative sampling")?;
    let n = graph.num_nodes() as u64;
    // Pairs as one number: the product of two u32 needs 64 bits.
    let key = |u: u32, v: u32| {
        let (u, v) = if how.undirected {
            (u.min(v), u.max(v))
        } else {
            (u, v)
        };
        u64::from(u) * n + u64::from(v)
    };
    let mut taken: HashSet<u64> = graph
        .edges()
        .filter(|(u, v)| u != v)
        .map(|(u, v)| key(u, v))
        .collect();
    let pairs = n * n.saturating_sub(1) / if how.undirected { 2 } else { 1 };
    let free = pairs - taken.len() as u64;
    if count as u64 > free {
        return Err(Error::argument(
            "negative pairs",
            count,
            format!("at most {free}"),
        ));
    }
    let mut found = Vec::with_capacity(count);
    if how.method == Method::Dense {
        for u in 0..n as u32 {
            let first = if how.undirected { u + 1 } else { 0 };
            let others = (first..n as u32).filter(|v| *v != u);
            found.extend(
                others
                    .filter(|v| !taken.contains(&key(u, *v)))
                    .map(|v| (u, v)),
            );
        }
        // The first `count` of a shuffle, no more.
        for i in 0..count {
            let j = i + rng.below(found.len() - i)?;
            found.swap(i, j);
        }
        found.truncate(count);
        return Ok(found);
    }
    let mut attempts = 0;
    while found.len() < count {
        let (u, v) = (rng.below(n as usize)? as u32, rng.below(n as usize)? as u32);
        attempts += 1;
        if u != v && taken.insert(key(u, v)) {
            found.push(if how.undirected {
                (u.min(v), u.max(v))
            } else {
                (u, v)
            });
        } else if attempts > PATIENCE * (count + 1) {
            let expected = "fewer in so dense a graph, or Method::Dense";
            return Err(Error::argument("negative pairs", count, expected));
        }
    }
    Ok(found)
}

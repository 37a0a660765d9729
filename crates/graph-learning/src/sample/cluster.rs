//! Partitions and unions of their parts.

use crate::graph::{Direction, Graph};
use crate::{Error, RandomStream, Result};

/// Rounds of moves between neighboring parts.
const ROUNDS: usize = 10;

/// Cuts the nodes into `parts` with few edges between them, none larger than an even share by more
/// than a twentieth and one node: nodes join the cluster that most of their neighbors are in (label
/// propagation, clusters bounded by an even share), clusters are packed into parts, largest first, each
/// where most of its edges lead, and nodes move once more. METIS would cut fewer edges.
///
/// # Errors
/// [`Error::InvalidArgument`] unless `1 <= parts <= n`; [`Error::Unsupported`] for graphs between two
/// sets of nodes.
pub fn partition(graph: &Graph, parts: usize, rng: &mut RandomStream) -> Result<Vec<Vec<u32>>> {
    graph.require_square("a partition")?;
    let n = graph.num_nodes();
    if parts == 0 || parts > n {
        return Err(Error::argument("parts", parts, format!("1 to {n}")));
    }
    let share = n.div_ceil(parts);
    let order = rng.permutation(n)?;
    let mut label: Vec<u32> = (0..n as u32).collect();
    propagate(graph, &order, &mut label, n, share);
    let mut part_of = pack(graph, &label, parts, share);
    propagate(graph, &order, &mut part_of, parts, share + share / 20 + 1);
    let mut lists = vec![Vec::new(); parts];
    for (v, p) in part_of.iter().enumerate() {
        lists[*p as usize].push(v as u32);
    }
    lists.retain(|list| !list.is_empty());
    Ok(lists)
}

/// Moves nodes to the label that most of their neighbors have, while there is room.
fn propagate(graph: &Graph, order: &[u32], label: &mut [u32], labels: usize, capacity: usize) {
    let (mut sizes, mut votes) = (vec![0usize; labels], vec![0u32; labels]);
    label.iter().for_each(|l| sizes[*l as usize] += 1);
    for _ in 0..ROUNDS {
        let mut moved = false;
        for v in order {
            let old = label[*v as usize];
            let best = favorite(graph, *v, label, &sizes, capacity, &mut votes);
            if best != old {
                sizes[old as usize] -= 1;
                sizes[best as usize] += 1;
                label[*v as usize] = best;
                moved = true;
            }
        }
        if !moved {
            return;
        }
    }
}

/// Clusters into parts of at most `share` nodes, largest first; one that fits nowhere is spread over
/// what is free.
fn pack(graph: &Graph, label: &[u32], parts: usize, share: usize) -> Vec<u32> {
    let mut clusters = vec![Vec::new(); label.len()];
    label
        .iter()
        .enumerate()
        .for_each(|(v, l)| clusters[*l as usize].push(v as u32));
    clusters.sort_by_key(|c| std::cmp::Reverse(c.len()));
    let mut part_of = vec![u32::MAX; label.len()];
    let mut sizes = vec![0usize; parts];
    let mut put = |nodes: &[u32], part_of: &mut Vec<u32>| {
        let mut votes = vec![0u32; parts];
        for v in nodes {
            graph.for_neighbors(*v, Direction::Both, |u| {
                if let Some(vote) = votes.get_mut(part_of[u as usize] as usize) {
                    *vote += 1;
                }
            });
        }
        let fits = (0..parts).filter(|p| sizes[*p] + nodes.len() <= share);
        // Most edges first, then most room.
        let best = fits.max_by_key(|p| (votes[*p], std::cmp::Reverse(sizes[*p])));
        if let Some(p) = best {
            sizes[p] += nodes.len();
            nodes.iter().for_each(|v| part_of[*v as usize] = p as u32);
        }
        best.is_some()
    };
    for cluster in clusters.iter().take_while(|c| !c.is_empty()) {
        if !put(cluster, &mut part_of) {
            // There is room for every single node: the parts hold `parts * share >= n` of them.
            cluster.iter().for_each(|v| {
                put(&[*v], &mut part_of);
            });
        }
    }
    part_of
}

/// The part with most neighbors of `v` among those with room; its own among equals.
fn favorite(
    graph: &Graph,
    v: u32,
    part_of: &[u32],
    sizes: &[usize],
    capacity: usize,
    votes: &mut [u32],
) -> u32 {
    let own = part_of[v as usize];
    let mut seen = Vec::new();
    graph.for_neighbors(v, Direction::Both, |u| {
        let p = part_of[u as usize];
        if votes[p as usize] == 0 {
            seen.push(p);
        }
        votes[p as usize] += 1;
    });
    let mut best = (votes[own as usize], own);
    for p in &seen {
        if votes[*p as usize] > best.0 && sizes[*p as usize] < capacity {
            best = (votes[*p as usize], *p);
        }
    }
    seen.iter().for_each(|p| votes[*p as usize] = 0);
    best.1
}

/// Batches of nodes that are unions of parts; edges between the parts of a batch are in it.
#[derive(Debug, Clone)]
pub struct ClusterSampler {
    parts: Vec<Vec<u32>>,
    per_batch: usize,
}

impl ClusterSampler {
    /// Batches of `per_batch` parts.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] unless there is a part and `per_batch` is at least 1.
    pub fn new(parts: Vec<Vec<u32>>, per_batch: usize) -> Result<Self> {
        if parts.is_empty() || per_batch == 0 {
            let value = format!("{per_batch} of {}", parts.len());
            return Err(Error::argument("parts", value, "at least 1 of 1"));
        }
        Ok(Self { parts, per_batch })
    }

    /// The nodes of each batch of one pass over all parts, in random order: take
    /// [`Graph::induced_subgraph`] of each.
    ///
    /// # Errors
    /// Those of the stream, which cannot occur here.
    pub fn epoch(&self, rng: &mut RandomStream) -> Result<Vec<Vec<u32>>> {
        let order = rng.permutation(self.parts.len())?;
        let union = |chunk: &[u32]| {
            let parts = chunk.iter().map(|p| &self.parts[*p as usize]);
            parts.flatten().copied().collect()
        };
        Ok(order.chunks(self.per_batch).map(union).collect())
    }
}

//! Graphs made from a seed or a formula, and Zachary's karate club.
//!
//! All of them are undirected: each edge is there in both directions, and there are no self-loops and
//! no duplicates ([`uniform_edges`] is the exception).
//!
//! | function | model |
//! | --- | --- |
//! | [`karate_club`] | Zachary, *J. Anthropological Research*, 1977: 34 members, 78 ties, the split of 1972 |
//! | [`erdos_renyi`] | each pair with probability `p` (Gilbert, 1959) |
//! | [`stochastic_block_model`] | pairs of blocks with probabilities of their own (Holland et al., 1983) |
//! | [`barabasi_albert`] | `m` edges of each new node to old ones in proportion to their degree (1999) |
//! | [`watts_strogatz`] | a ring of `k` neighbors, rewired with probability `beta` (1998) |
//! | [`ring`], [`star`], [`grid`], [`complete`] | regular |
//! | [`from_graphon`] | pair `(i, j)` with probability `W(u_i, u_j)`, `u` uniform |
//! | [`delaunay`] | the triangulation of points in the plane |
//! | [`citation_network`] | communities with a skewed degree and words of their own |
//! | [`uniform_edges`] | directed, both ends of each edge uniform: for measurements of speed |

use crate::graph::Graph;
use crate::io::NodeData;
use crate::sparse::SparseFeatures;
use crate::{Error, RandomStream, Result};
use candle_core::DType;
use std::collections::BTreeSet;

/// Zachary's karate club.
#[derive(Debug, Clone)]
pub struct KarateClub {
    graph: Graph,
    weights: Vec<f64>,
    labels: Vec<u32>,
}

impl KarateClub {
    /// 34 nodes, 78 ties in both directions.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// How many contexts each tie was seen in, one number per directed edge.
    pub fn weights(&self) -> &[f64] {
        &self.weights
    }

    /// The side of each member: 0 with the instructor, 1 with the officer.
    pub fn labels(&self) -> &[u32] {
        &self.labels
    }
}

/// The karate club, which is inside the crate.
///
/// # Errors
/// None: the embedded text is well-formed, which a test holds.
pub fn karate_club() -> Result<KarateClub> {
    let bad = |line: &str| Error::argument("karate club", line, "`u v weight` or `node class`");
    let numbers = |line: &str| -> Result<Vec<u32>> {
        let parsed = line.split_whitespace().map(|n| n.parse::<u32>());
        parsed.map(|n| n.map_err(|_| bad(line))).collect()
    };
    let (mut pairs, mut ties) = (Vec::new(), Vec::new());
    for line in include_str!("../assets/karate-edges.txt").lines() {
        let [u, v, w] = numbers(line)?[..] else {
            return Err(bad(line));
        };
        pairs.push((u, v));
        ties.push(f64::from(w));
    }
    let mut labels = vec![0; 34];
    for line in include_str!("../assets/karate-labels.txt").lines() {
        let [node, class] = numbers(line)?[..] else {
            return Err(bad(line));
        };
        *labels.get_mut(node as usize).ok_or_else(|| bad(line))? = class;
    }
    let graph = both_ways(labels.len(), &pairs)?;
    let weights = [ties.clone(), ties].concat();
    Ok(KarateClub {
        graph,
        weights,
        labels,
    })
}

/// Each pair as two edges: first all `u -> v`, then all `v -> u`.
fn both_ways(n: usize, pairs: &[(u32, u32)]) -> Result<Graph> {
    let forth = pairs.iter().map(|(u, _)| *u);
    let src = forth.chain(pairs.iter().map(|(_, v)| *v)).collect();
    let back = pairs.iter().map(|(_, v)| *v);
    let dst = back.chain(pairs.iter().map(|(u, _)| *u)).collect();
    Graph::from_edges(n, src, dst)
}

fn probability(name: &'static str, p: f64) -> Result<()> {
    if (0.0..=1.0).contains(&p) {
        return Ok(());
    }
    Err(Error::argument(name, p, "a probability in [0, 1]"))
}

fn nodes(n: usize) -> Result<()> {
    if n > u32::MAX as usize {
        return Err(Error::TooLarge {
            what: "nodes",
            count: n,
        });
    }
    Ok(())
}

/// The indices of `0..total` that come out with probability `p`, by geometric steps.
fn chosen(total: u64, p: f64, rng: &mut RandomStream, mut visit: impl FnMut(u64)) {
    if p <= 0.0 || total == 0 {
        return;
    }
    if p >= 1.0 {
        (0..total).for_each(visit);
        return;
    }
    let scale = 1.0 / (-p).ln_1p();
    let mut at = 0u64;
    loop {
        let skip = ((1.0 - rng.next_uniform()).ln() * scale).floor();
        if skip >= (total - at) as f64 {
            return;
        }
        at += skip as u64;
        visit(at);
        at += 1;
        if at >= total {
            return;
        }
    }
}

/// Pair number `k` of `u < v`, in the order (0,1), (0,2), (1,2), (0,3), ...
fn pair(k: u64) -> (u32, u32) {
    let mut v = ((1.0 + (1.0 + 8.0 * k as f64).sqrt()) / 2.0) as u64;
    // The root is rounded: step to the exact one.
    while v * (v - 1) / 2 > k {
        v -= 1;
    }
    while (v + 1) * v / 2 <= k {
        v += 1;
    }
    ((k - v * (v - 1) / 2) as u32, v as u32)
}

/// Each of the `n (n - 1) / 2` pairs with probability `p`.
///
/// # Errors
/// [`Error::InvalidArgument`] unless `0 <= p <= 1`; [`Error::TooLarge`].
pub fn erdos_renyi(n: usize, p: f64, rng: &mut RandomStream) -> Result<Graph> {
    probability("p", p)?;
    nodes(n)?;
    let n64 = n as u64;
    let mut pairs = Vec::new();
    chosen(n64 * n64.saturating_sub(1) / 2, p, rng, |k| {
        pairs.push(pair(k))
    });
    both_ways(n, &pairs)
}

/// Blocks of the given sizes; a pair of nodes in blocks `a` and `b` is connected with probability
/// `probabilities[a][b]`. Nodes are numbered block by block; the second result is the block of each.
///
/// # Errors
/// [`Error::InvalidArgument`] unless `probabilities` is a symmetric square matrix of probabilities
/// with one row per block; [`Error::TooLarge`].
pub fn stochastic_block_model(
    sizes: &[usize],
    probabilities: &[Vec<f64>],
    rng: &mut RandomStream,
) -> Result<(Graph, Vec<u32>)> {
    let k = sizes.len();
    if probabilities.len() != k || probabilities.iter().any(|row| row.len() != k) {
        let value = format!("{} rows", probabilities.len());
        return Err(Error::argument(
            "probabilities",
            value,
            format!("a {k} x {k} matrix"),
        ));
    }
    let n: usize = sizes.iter().sum();
    nodes(n)?;
    let first: Vec<usize> = sizes
        .iter()
        .scan(0, |sum, s| Some(std::mem::replace(sum, *sum + s)))
        .collect();
    let mut pairs = Vec::new();
    for a in 0..k {
        for b in a..k {
            let p = probabilities[a][b];
            probability("probabilities", p)?;
            if p != probabilities[b][a] {
                return Err(Error::argument("probabilities", p, "a symmetric matrix"));
            }
            let (sa, sb) = (sizes[a] as u64, sizes[b] as u64);
            let (fa, fb) = (first[a] as u32, first[b] as u32);
            if a == b {
                chosen(sa * sa.saturating_sub(1) / 2, p, rng, |k| {
                    let (u, v) = pair(k);
                    pairs.push((fa + u, fa + v));
                });
            } else {
                chosen(sa * sb, p, rng, |k| {
                    pairs.push((fa + (k / sb) as u32, fb + (k % sb) as u32));
                });
            }
        }
    }
    let block = |(b, s): (usize, &usize)| std::iter::repeat_n(b as u32, *s);
    let blocks = sizes.iter().enumerate().flat_map(block).collect();
    Ok((both_ways(n, &pairs)?, blocks))
}

/// Preferential attachment: a star of `m + 1` nodes, then each node joins `m` different ones in
/// proportion to their degree.
///
/// # Errors
/// [`Error::InvalidArgument`] unless `1 <= m < n`; [`Error::TooLarge`].
pub fn barabasi_albert(n: usize, m: usize, rng: &mut RandomStream) -> Result<Graph> {
    nodes(n)?;
    if m == 0 || m >= n {
        return Err(Error::argument(
            "m",
            m,
            format!("1 to {}", n.saturating_sub(1)),
        ));
    }
    let mut pairs: Vec<(u32, u32)> = (1..=m as u32).map(|v| (0, v)).collect();
    // Each node stands here as often as it has edges.
    let mut ends: Vec<u32> = pairs.iter().flat_map(|(u, v)| [*u, *v]).collect();
    for v in m as u32 + 1..n as u32 {
        let mut picked = Vec::with_capacity(m);
        while picked.len() < m {
            let u = ends[rng.below(ends.len())?];
            if !picked.contains(&u) {
                picked.push(u);
            }
        }
        for u in picked {
            pairs.push((u, v));
            ends.extend([u, v]);
        }
    }
    both_ways(n, &pairs)
}

/// A ring on which each node is tied to its `k` nearest (`k` even), with the far end of each tie
/// moved to a random node with probability `beta`.
///
/// # Errors
/// [`Error::InvalidArgument`] unless `k` is even and below `n`, and `0 <= beta <= 1`;
/// [`Error::TooLarge`].
pub fn watts_strogatz(n: usize, k: usize, beta: f64, rng: &mut RandomStream) -> Result<Graph> {
    nodes(n)?;
    probability("beta", beta)?;
    if k % 2 == 1 || k >= n {
        return Err(Error::argument("k", k, format!("an even number below {n}")));
    }
    let ordered = |u: usize, v: usize| (u.min(v) as u32, u.max(v) as u32);
    let ring = |step: usize| (0..n).map(move |u| (u, (u + step) % n));
    let mut ties: BTreeSet<(u32, u32)> = (1..=k / 2)
        .flat_map(ring)
        .map(|(u, v)| ordered(u, v))
        .collect();
    let mut degree = vec![k; n];
    for (u, v) in (1..=k / 2).flat_map(ring) {
        // A node that is tied to all others has nowhere to go.
        if rng.next_uniform() >= beta || degree[u] >= n - 1 {
            continue;
        }
        let w = loop {
            let w = rng.below(n)?;
            if w != u && !ties.contains(&ordered(u, w)) {
                break w;
            }
        };
        if ties.remove(&ordered(u, v)) {
            ties.insert(ordered(u, w));
            degree[v] -= 1;
            degree[w] += 1;
        }
    }
    both_ways(n, &ties.into_iter().collect::<Vec<_>>())
}

/// A cycle; two nodes share one tie, fewer have none.
///
/// # Errors
/// [`Error::TooLarge`].
pub fn ring(n: usize) -> Result<Graph> {
    nodes(n)?;
    let n32 = n as u32;
    let mut pairs: Vec<_> = (1..n32).map(|v| (v - 1, v)).collect();
    if n > 2 {
        pairs.push((0, n32 - 1));
    }
    both_ways(n, &pairs)
}

/// Node 0 tied to all others.
///
/// # Errors
/// [`Error::TooLarge`].
pub fn star(n: usize) -> Result<Graph> {
    nodes(n)?;
    both_ways(n, &(1..n as u32).map(|v| (0, v)).collect::<Vec<_>>())
}

/// `rows x cols` nodes, row by row, each tied to the next in its row and in its column.
///
/// # Errors
/// [`Error::TooLarge`].
pub fn grid(rows: usize, cols: usize) -> Result<Graph> {
    let count = rows.saturating_mul(cols);
    nodes(count)?;
    let at = |r: usize, c: usize| (r * cols + c) as u32;
    let mut pairs = Vec::new();
    for r in 0..rows {
        for c in 0..cols {
            if c + 1 < cols {
                pairs.push((at(r, c), at(r, c + 1)));
            }
            if r + 1 < rows {
                pairs.push((at(r, c), at(r + 1, c)));
            }
        }
    }
    both_ways(count, &pairs)
}

/// Every pair.
///
/// # Errors
/// [`Error::TooLarge`].
pub fn complete(n: usize) -> Result<Graph> {
    nodes(n)?;
    let pairs: Vec<_> = (0..n as u32)
        .flat_map(|v| (0..v).map(move |u| (u, v)))
        .collect();
    both_ways(n, &pairs)
}

/// `n` positions uniform in `[0, 1)`, each pair connected with the probability that `graphon` gives
/// for its positions. The second result are the positions.
///
/// # Errors
/// [`Error::InvalidArgument`] where the graphon gives no probability; [`Error::TooLarge`].
pub fn from_graphon(
    n: usize,
    graphon: impl Fn(f64, f64) -> f64,
    rng: &mut RandomStream,
) -> Result<(Graph, Vec<f64>)> {
    nodes(n)?;
    let mut at = vec![0.0; n];
    rng.fill_uniform(&mut at);
    let mut pairs = Vec::new();
    for v in 0..n {
        for u in 0..v {
            let p = graphon(at[u], at[v]);
            probability("graphon", p)?;
            if rng.next_uniform() < p {
                pairs.push((u as u32, v as u32));
            }
        }
    }
    Ok((both_ways(n, &pairs)?, at))
}

/// `edges` directed edges whose ends are uniform: duplicates and self-loops occur.
///
/// # Errors
/// [`Error::InvalidArgument`] for edges without nodes; [`Error::TooLarge`].
pub fn uniform_edges(n: usize, edges: usize, rng: &mut RandomStream) -> Result<Graph> {
    nodes(n)?;
    if n == 0 && edges > 0 {
        return Err(Error::argument("n", 0, "at least 1 node for an edge"));
    }
    let mut ends =
        || -> Result<Vec<u32>> { (0..edges).map(|_| Ok(rng.below(n)? as u32)).collect() };
    let src = ends()?;
    let dst = ends()?;
    Graph::from_edges(n, src, dst)
}

/// Delaunay's triangulation of points in the plane: an edge for each side of a triangle (Bowyer and
/// Watson's insertion, quadratic in the number of points). All `u -> v` with `u < v` come first, then
/// their reverses.
///
/// # Errors
/// [`Error::InvalidArgument`] for fewer than 3 points, [`Error::NonFinite`].
pub fn delaunay(points: &[(f64, f64)]) -> Result<Graph> {
    let n = points.len();
    nodes(n)?;
    if n < 3 {
        return Err(Error::argument("points", n, "at least 3"));
    }
    let count = points
        .iter()
        .filter(|(x, y)| !(x.is_finite() && y.is_finite()))
        .count();
    if count > 0 {
        let (what, total) = ("points", n);
        return Err(Error::NonFinite { what, count, total });
    }
    let size = points
        .iter()
        .fold(1.0f64, |s, (x, y)| s.max(x.abs()).max(y.abs()));
    // A triangle around everything; what touches it in the end is outside.
    let far = 1e3 * size;
    let mut all = points.to_vec();
    all.extend([(-far, -far), (far, -far), (0.0, far)]);
    let mut triangles = vec![[n, n + 1, n + 2]];
    for p in 0..n {
        let (inside, outside): (Vec<_>, Vec<_>) = triangles
            .into_iter()
            .partition(|t| in_circle(&all, *t, all[p]));
        triangles = outside;
        let sides = inside
            .iter()
            .flat_map(|[a, b, c]| [(*a, *b), (*b, *c), (*c, *a)]);
        let sides: Vec<(usize, usize)> = sides.collect();
        let present: BTreeSet<_> = sides.iter().copied().collect();
        // The border of the hole: sides whose reverse is no side.
        for (a, b) in sides {
            if !present.contains(&(b, a)) {
                triangles.push([a, b, p]);
            }
        }
    }
    let inner = triangles.iter().filter(|t| t.iter().all(|v| *v < n));
    let ordered = |(u, v): (usize, usize)| (u.min(v) as u32, u.max(v) as u32);
    let pairs: BTreeSet<(u32, u32)> = inner
        .flat_map(|[a, b, c]| [(*a, *b), (*b, *c), (*c, *a)])
        .map(ordered)
        .collect();
    both_ways(n, &pairs.into_iter().collect::<Vec<_>>())
}

/// Whether `p` is inside the circle through the corners of a triangle that is numbered
/// counterclockwise.
fn in_circle(points: &[(f64, f64)], triangle: [usize; 3], p: (f64, f64)) -> bool {
    let row = |v: usize| {
        let (x, y) = (points[v].0 - p.0, points[v].1 - p.1);
        (x, y, x * x + y * y)
    };
    let (a, b, c) = (row(triangle[0]), row(triangle[1]), row(triangle[2]));
    let det = a.0 * (b.1 * c.2 - b.2 * c.1) - a.1 * (b.0 * c.2 - b.2 * c.0)
        + a.2 * (b.0 * c.1 - b.1 * c.0);
    det > 0.0
}

/// Settings of [`citation_network`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CitationConfig {
    /// Number of nodes.
    pub nodes: usize,
    /// Number of classes, of about equal size.
    pub classes: usize,
    /// Mean number of neighbors.
    pub degree: f64,
    /// Share of the edges between nodes of one class.
    pub homophily: f64,
    /// Number of words.
    pub words: usize,
    /// Words of each node, before repetitions are merged.
    pub length: usize,
    /// Share of a node's words that come from its class's own part of the vocabulary.
    pub topical: f64,
}

impl Default for CitationConfig {
    /// About the proportions of Cora at a third of its size.
    fn default() -> Self {
        Self {
            nodes: 900,
            classes: 7,
            degree: 3.9,
            homophily: 0.81,
            words: 480,
            length: 18,
            topical: 0.35,
        }
    }
}

impl CitationConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] that names the first bad one.
    pub fn validate(&self) -> Result<()> {
        if self.classes == 0 || self.nodes < 2 * self.classes {
            let value = format!("{} for {} classes", self.nodes, self.classes);
            return Err(Error::config(
                "CitationConfig::nodes",
                value,
                "two for each of 1 or more",
            ));
        }
        if self.words < self.classes {
            return Err(Error::config(
                "CitationConfig::words",
                self.words,
                "one for each class",
            ));
        }
        if !(self.degree >= 0.0 && self.degree * 4.0 <= self.nodes as f64) {
            let expected = "0 to a quarter of the nodes";
            return Err(Error::config(
                "CitationConfig::degree",
                self.degree,
                expected,
            ));
        }
        for (field, share) in [
            ("CitationConfig::homophily", self.homophily),
            ("CitationConfig::topical", self.topical),
        ] {
            if !(0.0..=1.0).contains(&share) {
                return Err(Error::config(field, share, "a share in [0, 1]"));
            }
        }
        Ok(())
    }
}

/// A network like one of citations: classes with more edges inside than between, degrees with a heavy
/// tail (a node's appeal is `1 / sqrt(u)`, `u` uniform), and binary word features, some of which are
/// typical of the class. Without a split.
///
/// # Errors
/// Those of [`CitationConfig::validate`]; [`Error::TooLarge`].
pub fn citation_network(config: CitationConfig, rng: &mut RandomStream) -> Result<NodeData> {
    config.validate()?;
    nodes(config.nodes)?;
    let (n, classes) = (config.nodes, config.classes);
    let y: Vec<u32> = (0..n).map(|v| (v % classes) as u32).collect();
    // Cumulated appeal of the nodes of each class.
    let mut pools = vec![(Vec::new(), Vec::new()); classes];
    for (v, class) in y.iter().enumerate() {
        let (members, sums): &mut (Vec<u32>, Vec<f64>) = &mut pools[*class as usize];
        let appeal = 1.0 / (1.0 - rng.next_uniform()).sqrt();
        members.push(v as u32);
        sums.push(sums.last().copied().unwrap_or(0.0) + appeal.min(20.0));
    }
    let draw = |class: usize, rng: &mut RandomStream| -> u32 {
        let (members, sums) = &pools[class];
        let goal = rng.next_uniform() * sums.last().copied().unwrap_or(0.0);
        members[sums.partition_point(|s| *s <= goal).min(members.len() - 1)]
    };
    let wanted = (config.degree * n as f64 / 2.0).round() as usize;
    let mut pairs = BTreeSet::new();
    // Pairs that are there already are drawn again, a bounded number of times.
    for _ in 0..20 * wanted {
        if pairs.len() == wanted {
            break;
        }
        let class = rng.below(classes)?;
        let inside = classes == 1 || rng.next_uniform() < config.homophily;
        let other = match inside {
            true => class,
            false => (class + 1 + rng.below(classes - 1)?) % classes,
        };
        let (u, v) = (draw(class, rng), draw(other, rng));
        if u != v {
            pairs.insert((u.min(v), u.max(v)));
        }
    }
    let (mut indptr, mut indices) = (vec![0u32], Vec::new());
    let part = config.words / classes;
    for class in &y {
        let mut words = BTreeSet::new();
        for _ in 0..config.length {
            let typical = rng.next_uniform() < config.topical;
            words.insert(match typical {
                true => *class as usize * part + rng.below(part)?,
                false => rng.below(config.words)?,
            } as u32);
        }
        indices.extend(words);
        indptr.push(indices.len() as u32);
    }
    let ones = vec![1.0; indices.len()];
    let x = SparseFeatures::from_csr(config.words, &indptr, &indices, ones, DType::F32)?;
    Ok(NodeData {
        graph: both_ways(n, &pairs.into_iter().collect::<Vec<_>>())?,
        x: x.into(),
        y,
        classes,
        split: None,
    })
}

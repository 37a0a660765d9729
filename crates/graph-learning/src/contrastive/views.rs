//! Views of a graph: some edges and some features less.

use crate::graph::Graph;
use crate::sparse::{spmm, Features, Reduce};
use crate::{Error, RandomStream, Result};
use candle_core::{DType, Device, Tensor};

fn probability(name: &'static str, p: f64) -> Result<()> {
    if (0.0..=1.0).contains(&p) {
        return Ok(());
    }
    Err(Error::argument(name, p, "a probability in [0, 1]"))
}

/// Each edge dropped with probability `p`, and the ids of those that are left. With `symmetric` both
/// directions of an edge are dropped together; otherwise each by itself, as the published methods do.
///
/// # Errors
/// [`Error::InvalidArgument`] unless `0 <= p <= 1`, or where `symmetric` is asked of a graph that is
/// not undirected.
pub fn drop_edges(
    graph: &Graph,
    p: f64,
    symmetric: bool,
    rng: &mut RandomStream,
) -> Result<(Graph, Vec<u32>)> {
    probability("edge drop rate", p)?;
    keep_edges(graph, symmetric, rng, |_| p)
}

/// Each edge `e` dropped with probability `min(p w_e / mean w, threshold)`.
///
/// # Errors
/// [`Error::InvalidArgument`] for another number of weights, negative or infinite ones, or rates outside
/// `[0, 1]`.
pub fn drop_edges_weighted(
    graph: &Graph,
    weights: &[f64],
    p: f64,
    threshold: f64,
    rng: &mut RandomStream,
) -> Result<(Graph, Vec<u32>)> {
    if weights.len() != graph.num_edges() {
        return Err(Error::shape(
            "edge weights",
            &[weights.len()],
            graph.num_edges(),
        ));
    }
    let rates = drop_rates(weights, p, threshold)?;
    keep_edges(graph, false, rng, |e| rates[e])
}

fn keep_edges(
    graph: &Graph,
    symmetric: bool,
    rng: &mut RandomStream,
    rate: impl Fn(usize) -> f64,
) -> Result<(Graph, Vec<u32>)> {
    let mut draws = vec![0.0; graph.num_edges()];
    rng.fill_uniform(&mut draws);
    if symmetric {
        let reverse = graph
            .reverse_edges()
            .ok_or_else(|| Error::argument("graph", "directed", "each edge in both directions"))?;
        // The draw of the first of the two decides.
        for e in 0..draws.len() {
            draws[e] = draws[(reverse[e] as usize).min(e)];
        }
    }
    let kept = (0..draws.len()).filter(|e| draws[*e] >= rate(*e));
    let kept: Vec<u32> = kept.map(|e| e as u32).collect();
    Ok((graph.select_edges(&kept)?, kept))
}

/// `min(p w / mean w, threshold)` of each weight: the probabilities with which
/// [`drop_edges_weighted`] drops.
///
/// # Errors
/// [`Error::InvalidArgument`] for negative or infinite weights, or rates outside `[0, 1]`.
pub fn drop_rates(weights: &[f64], p: f64, threshold: f64) -> Result<Vec<f64>> {
    probability("drop rate", p)?;
    probability("threshold", threshold)?;
    if let Some(bad) = weights.iter().find(|w| !(w.is_finite() && **w >= 0.0)) {
        return Err(Error::argument("weight", bad, "finite numbers >= 0"));
    }
    let mean = weights.iter().sum::<f64>() / weights.len().max(1) as f64;
    // All weights 0: everything is equally central.
    let scale = if mean > 0.0 { p / mean } else { 0.0 };
    Ok(weights.iter().map(|w| (w * scale).min(threshold)).collect())
}

/// Each feature set to 0 for all nodes with probability `p`.
///
/// # Errors
/// [`Error::InvalidArgument`] unless `0 <= p <= 1`.
pub fn drop_features(x: &Features, p: f64, rng: &mut RandomStream) -> Result<Features> {
    probability("feature drop rate", p)?;
    mask_columns(x, rng, |_| p)
}

/// Each feature `f` set to 0 for all nodes with probability `min(p w_f / mean w, threshold)`.
///
/// # Errors
/// As [`drop_edges_weighted`].
pub fn drop_features_weighted(
    x: &Features,
    weights: &[f64],
    p: f64,
    threshold: f64,
    rng: &mut RandomStream,
) -> Result<Features> {
    let (_, d) = x.dims()?;
    if weights.len() != d {
        return Err(Error::shape("feature weights", &[weights.len()], d));
    }
    let rates = drop_rates(weights, p, threshold)?;
    mask_columns(x, rng, |f| rates[f])
}

fn mask_columns(
    x: &Features,
    rng: &mut RandomStream,
    rate: impl Fn(usize) -> f64,
) -> Result<Features> {
    let (_, d) = x.dims()?;
    let mut draws = vec![0.0; d];
    rng.fill_uniform(&mut draws);
    let mask: Vec<f64> = (0..d)
        .map(|f| f64::from(u8::from(draws[f] >= rate(f))))
        .collect();
    Ok(match x {
        Features::Sparse(x) => x.scale_columns(&mask)?.into(),
        Features::Dense(x) => {
            let mask = Tensor::from_vec(mask, (1, d), &Device::Cpu)?;
            let mask = mask.to_dtype(x.dtype())?.to_device(x.device())?;
            x.broadcast_mul(&mask)?.into()
        }
    })
}

/// How central a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Centrality {
    /// Its in-degree.
    Degree,
    /// `k` steps of `c <- 0.15 c + 0.85 sum_s c_s / out-degree(s)` from ones: the published method's
    /// "PageRank", a lazy walk without teleports.
    PageRank {
        /// Steps; 10 as published.
        steps: usize,
    },
    /// The leading eigenvector of the adjacency, by power iteration with self-loops (which moves
    /// eigenvalues and no eigenvector, so that bipartite graphs converge).
    Eigenvector,
}

impl Centrality {
    /// The centrality of every node.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for graphs between two sets of nodes.
    pub fn of(self, graph: &Graph) -> Result<Vec<f64>> {
        graph.require_square("a centrality")?;
        let n = graph.num_nodes();
        let column =
            |v: Vec<f64>| -> Result<Tensor> { Ok(Tensor::from_vec(v, (n, 1), &Device::Cpu)?) };
        let values = |t: &Tensor| -> Result<Vec<f64>> { Ok(t.flatten_all()?.to_vec1()?) };
        match self {
            Self::Degree => Ok(graph.in_degrees().into_iter().map(f64::from).collect()),
            Self::PageRank { steps } => {
                let inverse = |d: u32| 1.0 / f64::from(d.max(1));
                let share = column(graph.out_degrees().into_iter().map(inverse).collect())?;
                let mut c = column(vec![1.0; n])?;
                for _ in 0..steps {
                    let sent = spmm(graph, None, &(&c * &share)?, Reduce::Sum)?;
                    c = ((c * 0.15)? + (sent * 0.85)?)?;
                }
                values(&c)
            }
            Self::Eigenvector => {
                let mut c = vec![1.0 / (n.max(1) as f64).sqrt(); n];
                for _ in 0..1000 {
                    let sent = values(&spmm(graph, None, &column(c.clone())?, Reduce::Sum)?)?;
                    let next: Vec<f64> = sent.iter().zip(&c).map(|(a, b)| a + b).collect();
                    let norm = next.iter().map(|v| v * v).sum::<f64>().sqrt();
                    let next: Vec<f64> = next.iter().map(|v| v / norm.max(1e-300)).collect();
                    let change: f64 = next.iter().zip(&c).map(|(a, b)| (a - b).abs()).sum();
                    c = next;
                    if change < 1e-10 {
                        break;
                    }
                }
                Ok(c)
            }
        }
    }
}

/// The smallest centrality that a logarithm is taken of.
const FLOOR: f64 = 1e-8;

/// `(max s - s) / (max s - mean s)` of `s = ln c`; zeros where all are equal.
fn spread(centrality: impl Iterator<Item = f64>) -> Vec<f64> {
    let s: Vec<f64> = centrality.map(|c| c.max(FLOOR).ln()).collect();
    let max = s.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let mean = s.iter().sum::<f64>() / s.len().max(1) as f64;
    let width = max - mean;
    let one = |s: f64| if width > 0.0 { (max - s) / width } else { 0.0 };
    s.into_iter().map(one).collect()
}

/// How readily each edge may be dropped: large where its target is peripheral.
///
/// # Errors
/// Those of [`Centrality::of`].
pub fn edge_weights(graph: &Graph, centrality: Centrality) -> Result<Vec<f64>> {
    let c = centrality.of(graph)?;
    Ok(spread(graph.dst().iter().map(|t| c[*t as usize])))
}

/// How readily each feature may be dropped: large where peripheral nodes have it, by `|x|^T c`.
///
/// # Errors
/// Those of [`Centrality::of`]; [`Error::Shape`] unless there is one row per node.
pub fn feature_weights(graph: &Graph, x: &Features, centrality: Centrality) -> Result<Vec<f64>> {
    let c = centrality.of(graph)?;
    let (n, _) = x.dims()?;
    if n != c.len() {
        return Err(Error::shape("x", &[n], format!("[{}, ..]", c.len())));
    }
    let sums = match x {
        Features::Sparse(x) => x.column_sums(&c),
        Features::Dense(x) => {
            let c = Tensor::from_vec(c, (1, n), &Device::Cpu)?;
            let x = x.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.abs()?;
            c.matmul(&x)?.flatten_all()?.to_vec1()?
        }
    };
    Ok(spread(sums.into_iter()))
}

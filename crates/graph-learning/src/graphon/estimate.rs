//! Estimators of one graphon from many graphs.

use super::align::{align_by_degree, mean, sizes, Aligned};
use super::barycenter::{barycenter, BarycenterConfig};
use super::step::StepFunction;
use super::total_variation::denoise;
use crate::graph::Graph;
use crate::{Error, RandomStream, Result};
use faer::{Mat, MatRef};

/// How a graphon is estimated.
#[derive(Debug, Clone, PartialEq)]
pub enum GraphonEstimator {
    /// Means over blocks of about `log2 n` nodes ("sorting and smoothing"), then denoised by total
    /// variation where a weight is given. The published code takes the block's side for the weight,
    /// which flattens everything to the mean; the default is none.
    Sas {
        /// The weight of the total variation.
        tv_weight: Option<f64>,
    },
    /// Blocks between the largest gaps of the degrees. The published choice takes the largest signed
    /// gaps of the descending degrees, which are the smallest steps down.
    LargestGap {
        /// As published; otherwise the largest gaps by size.
        signed: bool,
    },
    /// A matrix of low rank.
    MatrixCompletion {
        /// The rank; `n / floor(ln n)` where none is given.
        rank: Option<usize>,
    },
    /// Singular values below `threshold sqrt(n)` are dropped (Chatterjee, 2015).
    Usvt {
        /// The threshold; 2.02 by its theory.
        threshold: f64,
    },
    /// Nodes that meet the others alike share a block (Airoldi et al., 2013). Needs two graphs.
    Sba {
        /// The squared distance up to which they do.
        threshold: f64,
    },
    /// A Gromov-Wasserstein barycenter: GWB, SGWB (smooth), FGWB (fused), SFGWB (both) by its settings.
    Gwb(BarycenterConfig),
}

impl GraphonEstimator {
    /// Checks every number.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] that names the first bad one.
    pub fn validate(&self) -> Result<()> {
        let positive = |field, value: f64| match value.is_finite() && value > 0.0 {
            true => Ok(()),
            false => Err(Error::config(field, value, "a positive number")),
        };
        match self {
            Self::Sas { tv_weight } => match tv_weight {
                Some(w) => positive("GraphonEstimator::Sas::tv_weight", *w),
                None => Ok(()),
            },
            Self::MatrixCompletion { rank: Some(0) } => {
                let field = "GraphonEstimator::MatrixCompletion::rank";
                Err(Error::config(field, 0, "at least 1"))
            }
            Self::Usvt { threshold } => positive("GraphonEstimator::Usvt::threshold", *threshold),
            Self::Sba { threshold } => positive("GraphonEstimator::Sba::threshold", *threshold),
            Self::Gwb(config) => config.validate(),
            Self::LargestGap { .. } | Self::MatrixCompletion { .. } => Ok(()),
        }
    }
}

/// The graphon of undirected graphs; those without edges are left out. Only [`GraphonEstimator::Sba`]
/// draws from the stream (its order of visits).
///
/// # Errors
/// [`Error::InvalidConfig`], [`Error::InvalidArgument`] where no graph has an edge, for directed graphs,
/// and where the graphs are too small for the estimator; those of the transport solvers.
pub fn estimate(
    graphs: &[Graph],
    estimator: &GraphonEstimator,
    rng: &mut RandomStream,
) -> Result<StepFunction> {
    estimator.validate()?;
    let aligned = align_by_degree(graphs)?;
    let visits = match estimator {
        GraphonEstimator::Sba { .. } => rng.permutation(sizes(&aligned).0)?,
        _ => Vec::new(),
    };
    estimate_aligned(&aligned, estimator, &visits)
}

pub(crate) fn estimate_aligned(
    graphs: &[Aligned],
    estimator: &GraphonEstimator,
    visits: &[u32],
) -> Result<StepFunction> {
    let (n, block, k) = sizes(graphs);
    let blocks = match estimator {
        GraphonEstimator::Sas { .. } | GraphonEstimator::LargestGap { .. } => 1,
        // Second differences need three.
        GraphonEstimator::Gwb(_) => 3,
        _ => 0,
    };
    if k < blocks || n < 3 {
        let value = format!("{n} nodes in the largest, {k} blocks");
        let expected = format!("3 nodes and {blocks} blocks at least");
        return Err(Error::argument("graphs", value, expected));
    }
    match estimator {
        GraphonEstimator::Sas { tv_weight } => {
            let histogram = histogram(mean(graphs).as_ref(), block);
            match tv_weight {
                Some(weight) => StepFunction::checked(denoise(&histogram, *weight)),
                None => StepFunction::checked(histogram),
            }
        }
        GraphonEstimator::LargestGap { signed } => {
            let mean = mean(graphs);
            let borders = gaps(&mean, k - 1, *signed);
            StepFunction::checked(block_means(&mean, &labels_of(&borders, n)))
        }
        GraphonEstimator::MatrixCompletion { rank } => {
            let rank = rank.unwrap_or_else(|| n / ((n as f64).ln().floor() as usize).max(1));
            let doubled = mean(graphs);
            let doubled = Mat::from_fn(n, n, |i, j| 2.0 * doubled[(i, j)] - 1.0);
            let low = spectral(&doubled, |place, _| place < rank)?;
            StepFunction::checked(Mat::from_fn(n, n, |i, j| {
                (0.5 * (low[(i, j)] + 1.0)).clamp(0.0, 1.0)
            }))
        }
        GraphonEstimator::Usvt { threshold } => {
            let least = threshold * (n as f64).sqrt();
            let low = spectral(&mean(graphs), |_, size| size >= least)?;
            StepFunction::checked(Mat::from_fn(n, n, |i, j| low[(i, j)].clamp(0.0, 1.0)))
        }
        GraphonEstimator::Sba { threshold } => {
            let blocks = sba_blocks(graphs, visits, *threshold)?;
            StepFunction::checked(block_means(&mean(graphs), &blocks))
        }
        GraphonEstimator::Gwb(config) => barycenter(graphs, k, config),
    }
}

/// Means over blocks of `side` rows and columns; what is left over at the end is dropped.
pub(crate) fn histogram(mean: MatRef<'_, f64>, side: usize) -> Mat<f64> {
    let k = mean.nrows() / side;
    let area = (side * side) as f64;
    Mat::from_fn(k, k, |a, b| {
        let cells = mean.submatrix(a * side, b * side, side, side);
        cells.col_iter().flat_map(|c| c.iter()).sum::<f64>() / area
    })
}

/// The first nodes of the blocks behind the first one, ascending.
fn gaps(mean: &Mat<f64>, count: usize, signed: bool) -> Vec<usize> {
    let n = mean.nrows();
    let share = |i: usize| mean.row(i).iter().sum::<f64>() / (n - 1) as f64;
    let shares: Vec<f64> = (0..n).map(share).collect();
    let gap = |i: usize| shares[i + 1] - shares[i];
    let size = |i: usize| if signed { gap(i) } else { gap(i).abs() };
    let mut places: Vec<usize> = (0..n - 1).collect();
    places.sort_by(|a, b| size(*b).total_cmp(&size(*a)));
    let mut borders: Vec<usize> = places.into_iter().take(count).map(|i| i + 1).collect();
    borders.sort_unstable();
    borders
}

/// The block of each node from the first nodes of the later blocks.
pub(crate) fn labels_of(borders: &[usize], n: usize) -> Vec<usize> {
    (0..n)
        .map(|i| borders.iter().filter(|b| **b <= i).count())
        .collect()
}

/// Each entry replaced by the mean over its pair of blocks.
pub(crate) fn block_means(mean: &Mat<f64>, block: &[usize]) -> Mat<f64> {
    let count = block.iter().max().map_or(0, |b| b + 1);
    let (mut sums, mut sizes) = (Mat::<f64>::zeros(count, count), vec![0.0; count]);
    for (i, a) in block.iter().enumerate() {
        sizes[*a] += 1.0;
        for (j, b) in block.iter().enumerate() {
            sums[(*a, *b)] += mean[(i, j)];
        }
    }
    Mat::from_fn(block.len(), block.len(), |i, j| {
        let (a, b) = (block[i], block[j]);
        sums[(a, b)] / (sizes[a] * sizes[b])
    })
}

/// The sum of the singular components that `keep` (place by descending size, size) lets through, of a
/// symmetric matrix: its eigenvalues without their signs.
fn spectral(matrix: &Mat<f64>, keep: impl Fn(usize, f64) -> bool) -> Result<Mat<f64>> {
    let n = matrix.nrows();
    let failed = |e| Error::argument("adjacency", format!("{e:?}"), "a matrix with eigenvalues");
    let found = matrix
        .self_adjoint_eigen(faer::Side::Lower)
        .map_err(failed)?;
    let (u, s) = (found.U(), found.S().column_vector());
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|a, b| s[*b].abs().total_cmp(&s[*a].abs()));
    let mut kept = Mat::<f64>::zeros(n, n);
    for (place, i) in order.into_iter().enumerate() {
        if keep(place, s[i].abs()) {
            for r in 0..n {
                kept[(r, i)] = u[(r, i)] * s[i];
            }
        }
    }
    Ok(&kept * u.transpose())
}

/// The block of each node: visited in order, a node joins the nearest pivot (its squared distance below
/// the threshold; the
/// earliest of equals), or becomes one.
pub(crate) fn sba_blocks(graphs: &[Aligned], visits: &[u32], threshold: f64) -> Result<Vec<usize>> {
    let (n, _, _) = sizes(graphs);
    let half = graphs.len() / 2;
    if half == 0 {
        let expected = "at least 2, whose halves are compared";
        return Err(Error::argument("graphs", graphs.len(), expected));
    }
    if visits.len() != n {
        let expected = format!("each of {n} nodes once");
        return Err(Error::argument("visits", visits.len(), expected));
    }
    // Sums of zeros and ones: exact, so that ties are ties.
    let sum = |part: &[Aligned]| {
        let mut sum = Mat::<f64>::zeros(n, n);
        part.iter().for_each(|g| sum += g.padded(n));
        sum
    };
    let (first, second) = (sum(&graphs[..half]), sum(&graphs[half..]));
    let weight = 1.0 / ((half + 1) * (graphs.len() - half)) as f64;
    let mut pivots: Vec<usize> = Vec::new();
    let mut block = vec![usize::MAX; n];
    for v in visits {
        let i = *v as usize;
        let mut nearest: Option<(f64, usize)> = None;
        for (label, b) in pivots.iter().enumerate() {
            let distance = alike(&first, &second, i, *b) * weight;
            if nearest.is_none_or(|(d, _)| distance < d) {
                nearest = Some((distance, label));
            }
        }
        block[i] = match nearest.filter(|(d, _)| *d < threshold) {
            Some((_, label)) => label,
            None => {
                pivots.push(i);
                pivots.len() - 1
            }
        };
    }
    Ok(block)
}

/// How differently two nodes meet all others, without its weight.
fn alike(first: &Mat<f64>, second: &Mat<f64>, i: usize, b: usize) -> f64 {
    let n = first.nrows();
    let others = || (0..n).filter(|s| *s != i && *s != b);
    let side = |a: &dyn Fn(usize, usize) -> f64, c: &dyn Fn(usize, usize) -> f64| -> f64 {
        others()
            .map(|s| a(i, s) * c(i, s) + a(b, s) * c(b, s) - a(i, s) * c(b, s) - a(b, s) * c(i, s))
            .sum::<f64>()
            .abs()
    };
    let rows = side(&|x, s| first[(x, s)], &|x, s| second[(x, s)]);
    let columns = side(&|x, s| first[(s, x)], &|x, s| second[(s, x)]);
    (rows + columns) / 2.0 / others().count().max(1) as f64
}

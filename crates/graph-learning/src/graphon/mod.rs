//! Graphons: what a collection of graphs looks like when the graphs grow.
//!
//! A graphon gives the probability of an edge between two positions in `[0, 1]`. Here it is a
//! [`StepFunction`]: estimated from graphs ([`estimate`]), sampled into graphs, resized, compared.
//! Distances between two of them are Gromov-Wasserstein distances (`thalweg-convex`,
//! `transport::gromov_wasserstein`), which need no common order of nodes.
//!
//! Graphs are aligned by descending degree and padded to the largest size `n`; with the mean `M` of
//! the padded adjacencies, blocks of `h = floor(log2 n + 1)` nodes and `k = floor(n / h)` blocks:
//!
//! | estimator | what it is |
//! | --- | --- |
//! | [`Sas`](GraphonEstimator::Sas) | means of `M` over blocks (Chan and Airoldi, 2014) |
//! | [`LargestGap`](GraphonEstimator::LargestGap) | block means between gaps of the degrees (Channarond et al., 2012) |
//! | [`MatrixCompletion`](GraphonEstimator::MatrixCompletion) | `M` cut to a rank (Keshavan et al., 2010) |
//! | [`Usvt`](GraphonEstimator::Usvt) | `M` without small singular values (Chatterjee, 2015) |
//! | [`Sba`](GraphonEstimator::Sba) | block means of nodes that meet the others alike (Airoldi et al., 2013) |
//! | [`Gwb`](GraphonEstimator::Gwb) | a Gromov-Wasserstein barycenter on `k` cells (Xu et al., AAAI 2021) |
//!
//! ```
//! use thalweg_graph_learning::graphon::{estimate, synthesize_graphon, GraphonEstimator};
//! use thalweg_graph_learning::RandomStream;
//!
//! let rng = &mut RandomStream::new(1);
//! // Twelve graphs in which positions u and v are connected with probability u v.
//! let truth = synthesize_graphon(0, 50)?;
//! let graphs = truth.sample_graphs(&[60; 12], rng)?;
//! let found = estimate(&graphs, &GraphonEstimator::Sas { tv_weight: None }, rng)?;
//! // The estimate runs from large degrees to small ones.
//! assert!(found.get(0, 0).unwrap() > 0.7);
//! assert!((found.density() - truth.density()).abs() < 0.05);
//! # Ok::<(), thalweg_graph_learning::Error>(())
//! ```

mod align;
mod barycenter;
mod estimate;
mod step;
mod total_variation;

pub use align::{align_by_degree, target_distribution, Aligned};
#[cfg(feature = "verify")]
pub(crate) use align::{mean, sizes};
pub(crate) use barycenter::to_tensor;
pub use barycenter::BarycenterConfig;
#[cfg(feature = "verify")]
pub(crate) use estimate::{block_means, estimate_aligned, histogram, labels_of, sba_blocks};
pub use estimate::{estimate, GraphonEstimator};
pub use step::{synthesize_graphon, StepFunction};

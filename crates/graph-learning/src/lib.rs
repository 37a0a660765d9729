//! Graphs for [candle](candle_core), which has no sparse tensors: a compressed graph, differentiable
//! kernels over its edges, the standard layers, sampling, splits, loaders, and published methods on
//! top.
//!
//! | module | what it gives |
//! | --- | --- |
//! | [`graph`] | [`Graph`]: edge lists, compressed rows in both directions, batches, subgraphs |
//! | [`sparse`] | products along edges, dot products on edges, softmax over neighbors, all with gradients |
//! | [`conv`] | GCN, GraphSAGE, GAT, GATv2, GIN with the parameter names of PyTorch Geometric |
//! | [`readout`] | sums, means, maxima and attention over the nodes of a graph; jumping knowledge |
//! | [`sample`] | neighborhoods layer by layer, clusters, GraphSAINT, random walks, non-edges |
//! | [`split`] | training, validation and test parts of nodes, graphs and links |
//! | [`io`] | Planetoid, npz, TUDataset, OGB, edge lists, NetworkX's JSON, safetensors |
//! | [`metrics`] | ROC area, average precision, mutual information, Rand index; k-means |
//! | [`generate`] | the karate club, random and regular graphs |
//! | [`cgs`] | convergent graph solvers: layers whose output is a fixed point |
//! | [`ssl`] | self-supervised methods: BGRL, CCA-SSG, Barlow Twins, GRACE, GraphECL, DGI, masked autoencoders |
//! | [`graphon`] | the limit of a collection of graphs: estimators, barycenters, sampling |
//! | [`feasibility`] | when to pre-train: distance from what a collection can generate |
//! | [`topology`] | degrees, closeness, transitivity of a graph |
//! | [`forward`] | layers trained one at a time, with no gradient between them |
//! | [`contrastive`] | GRACE, GCA's views, ProGCL, COSTA; a linear probe |
//! | [`contrastive::pot`] | node compactness: a bound on how well a node is trained, and its loss |
//!
//! Layers are plain structs over tensors of the caller, built from a `VarBuilder`; nothing here knows
//! a trainer. Every random choice comes from a [`RandomStream`] that the caller passes in.

pub mod cgs;
pub mod contrastive;
pub mod conv;
mod error;
pub mod feasibility;
pub mod forward;
pub mod generate;
pub mod graph;
pub mod graphon;
pub mod io;
pub mod metrics;
pub mod readout;
pub mod sample;
pub mod sparse;
pub mod split;
pub mod ssl;
pub mod topology;
#[cfg(feature = "verify")]
pub mod verify;

pub use error::{Error, Result};
pub use graph::{Graph, GraphBatch};
/// Variables whose initial values depend on a seed and their names, from `thalweg-nn`: what models
/// with an optimizer for each layer are built from.
pub use nn::init::SeededVars;
/// The seeded stream that random choices are drawn from, from `thalweg-tensor-core`.
pub use tensor_core::random::RandomStream;

/// The README's example, compiled and run.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

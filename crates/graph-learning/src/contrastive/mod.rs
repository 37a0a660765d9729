//! Graph contrastive learning: two views of a graph, an encoder, and a loss by which a node's two
//! embeddings find each other.
//!
//! | part | what it is | source |
//! | --- | --- | --- |
//! | [`GcnEncoder`] | two graph convolutions with an activation after each | all of them |
//! | [`drop_edges`], [`drop_features`] | uniform views | GRACE, Zhu et al., 2020 |
//! | [`Centrality`], [`drop_edges_weighted`] | views that keep what is central | GCA, Zhu et al., WWW 2021 |
//! | [`Grace`] | InfoNCE over all nodes of both views | GRACE |
//! | [`ProGcl`] | negatives weighted, or mixed, by how likely they are true ones | ProGCL, Xia et al., ICML 2022 |
//! | [`Costa`] | InfoNCE between random sketches of the embeddings | COSTA, Zhang et al., KDD 2022 |
//! | [`pot`] | a bound on how well a node is trained, and the loss that raises it | POT, Yu et al., NeurIPS 2023 |
//! | [`linear_probe`] | logistic regression on frozen embeddings | all of them |

mod encoder;
mod objective;
pub mod pot;
mod probe;
mod progcl;
mod views;

pub use encoder::{EncoderActivation, GcnEncoder};
pub use objective::{ContrastiveObjective, Costa, Grace, GraceConfig};
pub use probe::{f1_macro, linear_probe, ProbeConfig, ProbeReport};
pub use progcl::{BetaMixture, Hardness, ProGcl, ProGclConfig};
pub use views::{
    drop_edges, drop_edges_weighted, drop_features, drop_features_weighted, drop_rates,
    edge_weights, feature_weights, Centrality,
};

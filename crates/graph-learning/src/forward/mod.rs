//! Forward learning of graph networks: one layer at a time, with no gradient between layers.
//!
//! For whoever trains a stack of graph convolutions and wants the memory of one layer, whatever the
//! depth, and a usable classifier after each layer. *Forward Learning of Graph Neural Networks*,
//! Park et al., ICLR 2024, arXiv 2403.11004.
//!
//! A virtual node `N + c` stands for each class `c`, with features drawn once and edges to (and from)
//! the training nodes of its class ([`GraphAugmenter`]). With `norm(x)_i = x_i / (||x_i|| + 1e-8)`,
//! layer `l` maps `h` to `Z = ReLU(conv_l(norm(h)))` and has a loss and an optimizer of its own; the
//! next layer takes `Z` without its graph.
//!
//! | model | loss of a layer | answer |
//! | --- | --- | --- |
//! | [`SingleForward`] | `mean_i CE(Z_i . Z_(N + c) / T, y_i)` over training nodes | the mean over layers of `softmax_c` |
//! | [`ForwardForward`] | `mean softplus(theta - g+) + mean softplus(g- - theta)`, `g = sum_j Z_ij^2`, `-` with wrong labels | the label with the largest `sum_l (mean_j Z_ij^2 - theta)` |
//! | [`TopDownToInput`] | as single-forward; layer `l` takes `[norm(h_(l-1)) norm(h_(l+1))]`, labels on top | probabilities over layers and updates |
//! | [`TopDownToLoss`] | as single-forward, of the mean of `Z` and the states above | the mean over layers |
//! | [`LinkForward`], [`LinkTopDown`] | logistic, of `sum_j Z_uj Z_vj` (or goodness) | the mean of `sigmoid` |
//!
//! | symbol | field |
//! | --- | --- |
//! | `T` | [`ForwardGnnConfig::temperature`] |
//! | `theta` | [`ForwardGnnConfig::theta`] |
//! | number of wrong labelings | [`ForwardGnnConfig::num_negatives`] |
//!
//! Forward-forward costs a forward pass for each wrong labeling in training and for each class in
//! use; single-forward costs one and is more accurate. With virtual nodes and graph convolutions a label
//! is a small part of what a node receives, `1 / sqrt(d_i d_c)` with `d_c` the size of the class, and
//! forward-forward hardly learns; give it [`ConvKind::Sage`], whose means weigh all neighbors alike.
//! Goodness is a sum in the loss and a mean in the answer, as published. A layer's best weights on the
//! validation nodes are kept (strict improvement). Forward-forward may be shown the labels of validation
//! nodes when it is tested ([`ForwardForward::goodness`]); the others never are.
//!
//! ```
//! use candle_core::{DType, Device};
//! use std::ops::ControlFlow;
//! use thalweg_graph_learning::forward::{ForwardGnnConfig, NodeShape, SingleForward};
//! use thalweg_graph_learning::generate::{citation_network, CitationConfig};
//! use thalweg_graph_learning::split::random_nodes;
//! use thalweg_graph_learning::RandomStream;
//! use thalweg_graph_learning::SeededVars;
//!
//! let rng = &mut RandomStream::new(3);
//! let small = CitationConfig { nodes: 140, words: 70, ..Default::default() };
//! let mut data = citation_network(small, rng)?;
//! data.split = Some(random_nodes(140, 20, 40, rng)?);
//! let config = ForwardGnnConfig { hidden: 16, lr: 0.01, epochs: 30, ..Default::default() };
//! let vars = SeededVars::new(rng);
//! let shape = NodeShape::of(&data)?;
//! let mut model = SingleForward::new(config, shape, &vars, DType::F32, &Device::Cpu)?;
//! let report = model.fit(&data, rng, &mut |_| ControlFlow::Continue(()))?;
//! assert!(report.per_layer[1].best_validation.unwrap() > 0.4);
//! let proba = model.predict_proba(&[0, 1, 2], None)?;
//! assert_eq!(proba.dims(), &[3, 7]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod augment;
mod config;
mod fit;
mod forward_forward;
pub(crate) mod layer;
mod link;
pub(crate) mod node;
mod single;
pub(crate) mod top_down;

pub use augment::{AugmentedGraph, GraphAugmenter};
pub use config::{AppendLabel, AugDirection, ConvKind, ForwardGnnConfig};
pub use fit::{FitReport, LayerReport, Observer, Progress};
pub use forward_forward::{ForwardForward, LabelCarrier};
pub use layer::{adam, ForwardLayer, LinkLoss};
pub use link::{LinkForward, LinkTask, LinkTopDown};
pub use node::{accuracy, NodeShape};
pub use single::SingleForward;
pub use top_down::{TopDownToInput, TopDownToLoss};

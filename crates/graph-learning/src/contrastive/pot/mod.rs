//! Node compactness: how much closer a node is to its own other view than to the rest, at least, whatever
//! edges are dropped; and a loss that raises it for every node.
//!
//! For anyone who trains with a contrastive loss on graphs: as a second term it trains evenly, and by
//! itself it audits which nodes are not trained reliably. *Provable Training for Graph Contrastive
//! Learning*, Yu et al., NeurIPS 2023, arXiv 2309.13944.
//!
//! With degrees `d` that count the self-loop, a budget of `m_i = min(max(d_i - 2, 0), round(p deg_i))`
//! deletions, and `f_i = <w_i, z1_i>` for `w_i = z'_i - mean_{k != i} z'_k` over the normalized
//! embeddings `z'` of the other view:
//!
//! ```text
//! U_ij = 1 / sqrt((d_i - m_i)(d_j - m_j)) on edges and loops    L = diag(1 / d_i)
//! p    in  (U + L)/2 Y -+ (U - L)/2 |Y| + b                      Y = X W1, then H W2
//! s(x) between k x and k (x + beta) on [l, u]                    k = (u - a l)/(u - l), beta = (a - 1) u l / (u - a l)
//! W~2 = (k2 w) W2^T    b~2 = <k2 w, beta2 + b2>    W~1 = (k1 W~2) W1^T    b~1 = <k1 W~2, beta1 + b1>
//! score = A1 (A1 <x, W~1> + b~1) + b~2           loss = mean softplus(-score)
//! ```
//!
//! | symbol | field |
//! | --- | --- |
//! | `p` | [`Budget::Rate`] |
//! | `kappa`, the weight of the term | [`PotConfig::kappa`] |
//!
//! The published score is no bound: it takes the coefficients of a message's source where the target's
//! belong, and its second intervals hold only while the first layer's outputs stay what they are on the
//! whole graph. It works as a regularizer. [`PotScore::Certified`] with [`Intervals::Sound`] is a lower
//! bound of `f_i` for every view within the budget, when the activation's slope is in `[0, 1]`; random
//! dropping exceeds the budget for some nodes.
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use candle_nn::{Optimizer, VarBuilder, VarMap};
//! use thalweg_graph_learning::contrastive::pot::{combined, AdjacencyBounds, Budget, Pot, PotConfig, PotInputs};
//! use thalweg_graph_learning::contrastive::{drop_edges, ContrastiveObjective, EncoderActivation, GcnEncoder, Grace, GraceConfig};
//! use thalweg_graph_learning::{generate::karate_club, sparse::Features, RandomStream};
//!
//! let club = karate_club()?;
//! let x = Features::from(Tensor::eye(34, DType::F32, &Device::Cpu)?);
//! let vars = VarMap::new();
//! let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
//! let encoder = GcnEncoder::new(34, 8, EncoderActivation::Relu, vb.pp("encoder"))?;
//! let grace = Grace::new(8, 8, GraceConfig::default(), vb.pp("grace"))?;
//! let bounds = AdjacencyBounds::from_graph(club.graph(), Budget::Rate(0.3))?;
//! let pot = Pot::new(PotConfig::default())?;
//! let mut sgd = candle_nn::SGD::new(vars.all_vars(), 0.05)?;
//! let rng = &mut RandomStream::new(0);
//! for _ in 0..3 {
//!     let (one, _) = drop_edges(club.graph(), 0.3, true, rng)?;
//!     let (two, _) = drop_edges(club.graph(), 0.3, true, rng)?;
//!     let (z1, z2) = (encoder.forward(&one, &x)?, encoder.forward(&two, &x)?);
//!     let term = |view, other| {
//!         pot.loss(&encoder, &PotInputs { x: &x, graph: club.graph(), view, other, bounds: &bounds, nodes: None })
//!     };
//!     let loss = combined(&grace.loss(&z1, &z2, rng)?, &term(&one, &z2)?, &term(&two, &z1)?, pot.config().kappa)?;
//!     sgd.backward_step(&loss)?;
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod bounds;
mod relax;
mod report;
mod score;

pub use bounds::{AdjacencyBounds, Budget};
pub use relax::{ActivationIntervals, Relaxation};
pub use report::{node_compactness, CompactnessReport};
pub use score::{
    anchor_direction, combined, Intervals, Pot, PotConfig, PotInputs, PotScore, PublishedTerms,
};

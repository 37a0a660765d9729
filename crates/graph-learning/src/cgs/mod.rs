//! Convergent graph solvers: a layer whose output is the fixed point of contracting maps that the
//! input chooses.
//!
//! For predicting stationary states of networked systems (pressures, potentials, values of states)
//! and for graph classification: an unbounded receptive field with the parameters of one
//! message-passing layer, a solution that exists and is unique, and training memory that does not
//! grow with the number of iterations. *Convergent Graph Solvers*, Park et al., ICLR 2022, arXiv
//! 2106.01680.
//!
//! With `m` heads, logits `L_e` and biases `B` from an encoder, per head:
//!
//! ```text
//! A_e = clip(L_e, 0, 1) / deg(row of e)        or  exp(L_e) / sum of exp(L) in its row
//! H   = phi(gamma A H + B)                      phi 1-Lipschitz, 0 < gamma < 1
//! ```
//!
//! Rows of `A` add up to at most 1, so that the map contracts by `gamma` in the maximum norm, and
//! `|H_k - H|_inf <= gamma^k / (1 - gamma) |H_1 - H_0|_inf`. With `g` the gradient of `H` and `D =
//! phi'(gamma A H + B)`, the implicit gradient solves `y = gamma A^T (D y) + g` in the same way, but
//! columns of `A^T` are what adds up to at most 1: it contracts in the sum over the nodes, and is measured
//! there. Then `dB = D y` and `dA_e = gamma (D y)_row H_col`.
//!
//! | symbol | field |
//! | --- | --- |
//! | `m` | [`CgsConfig::heads`] |
//! | `gamma` | [`CgsConfig::gamma`] |
//! | `phi` | [`CgsConfig::activation`] |
//!
//! As published an edge `s -> t` is the entry at row `s` and column `t`
//! ([`Orientation::RowIsSource`]): fixed points then carry information from targets to sources, the
//! other way than the encoder. On undirected graphs the two differ by degrees only.
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use candle_nn::{Optimizer, VarBuilder, VarMap};
//! use thalweg_graph_learning::cgs::{conductance_network, Cgs, CgsConfig, EncoderConfig};
//! use thalweg_graph_learning::{Graph, RandomStream};
//!
//! let network = conductance_network(30, &mut RandomStream::new(1))?;
//! let batch = Graph::batch(&[network.graph.clone()])?;
//! let (x, u) = network.features(DType::F32, &Device::Cpu)?;
//! let target = network.target(DType::F32, &Device::Cpu)?;
//! let vars = VarMap::new();
//! let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
//! let encoder = EncoderConfig { node_hidden: 16, edge_hidden: 16, mlp: vec![16], ..Default::default() };
//! let config = CgsConfig { heads: 4, ..Default::default() };
//! let model = Cgs::new(2, 1, 1, config, encoder, &[16], vb)?;
//! let mut sgd = candle_nn::SGD::new(vars.all_vars(), 0.05)?;
//! for _ in 0..5 {
//!     let (potential, report) = model.forward(&batch, &x, &u, None)?;
//!     assert!(report.converged);
//!     sgd.backward_step(&(potential - &target)?.sqr()?.mean_all()?)?;
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod config;
mod data;
mod encoder;
mod model;
mod solve;
mod weights;

pub use config::{CgsConfig, Contraction, Normalizer, Orientation, Solver, StopRule};
pub use data::{
    conductance_network, gvi_graph, policy, value_iteration, ConductanceNetwork, GviGraph,
};
pub use encoder::{Encoder, EncoderConfig, EncoderLayer};
pub use model::{Cgs, GraphCgs};
pub use solve::{fixed_point, FixedPoint, SolveReport};
pub use weights::contracting_edge_weights;

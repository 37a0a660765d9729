//! Ghost batch normalization: batch norm whose training statistics come from small groups of a
//! large batch, each normalized alone, so that a batch of 4096 keeps the noise (and the accuracy)
//! of batches of 128. Evaluation uses running statistics and no groups.
//!
//! Hoffer, Hubara, Soudry: "Train longer, generalize better: closing the generalization gap in
//! large batch training of neural networks", NeurIPS 2017, arXiv 1705.08741.
//!
//! The batch is cut in order into `k` groups ([`GhostPlan`]). For group `j` and each channel, over
//! its examples and all spatial positions (`n_j` numbers):
//!
//! ```text
//! mu_j = mean,   var_j = biased variance
//! y    = weight (x - mu_j) / sqrt(var_j + eps) + bias
//! R   <- (1 - q) R + q S_j    for j = 1..k,   S_j = mu_j, or n_j / (n_j - 1) var_j
//! dx   = weight / sqrt(var_j + eps) (dy - mean_j(dy) - xhat mean_j(dy xhat))
//! ```
//!
//! | symbol | field of [`GhostBatchNormConfig`] |
//! | --- | --- |
//! | ghost batch size `|B_S|` | [`ghost_size`](GhostBatchNormConfig::ghost_size) |
//! | `q` (the paper's eta) | [`momentum`](GhostBatchNormConfig::momentum) |
//! | `eps` | [`eps`](GhostBatchNormConfig::eps) |
//!
//! The last group weighs most in the running statistics: shuffle the data. Replicas that train in
//! parallel are ghost batches of their own already; statistics synchronized between them undo it.
//!
//! ```
//! use candle_core::{DType, Device};
//! use candle_nn::{Module, ModuleT, Optimizer};
//! use thalweg_nn::norm::ghost_batch::{ghost_batch_norm, GhostBatchNormConfig};
//! use thalweg_nn::{init::SeededVars, RandomStream};
//!
//! let vars = SeededVars::new(&RandomStream::new(7));
//! let vb = vars.builder(DType::F32, &Device::Cpu);
//! let config = GhostBatchNormConfig { ghost_size: 16, ..Default::default() };
//! let norm = ghost_batch_norm(8, config, vb.pp("norm"))?;
//! let head = candle_nn::linear(8, 1, vb.pp("head"))?;
//! let params = vars.trainable().into_iter().map(|(_, var)| var).collect();
//! let mut sgd = candle_nn::SGD::new(params, 0.1)?;
//!
//! let mut data = RandomStream::new(1);
//! for _ in 0..5 {
//!     let x = data.normal(3.0, 2.0, (64, 8), DType::F32, &Device::Cpu)?;
//!     let y = head.forward(&norm.forward_t(&x, true)?)?;
//!     sgd.backward_step(&(y - 1.0)?.sqr()?.mean_all()?)?;
//! }
//! // Evaluation takes any number of examples.
//! let x = data.normal(3.0, 2.0, (1, 8), DType::F32, &Device::Cpu)?;
//! assert_eq!(norm.forward_t(&x, false)?.dims(), &[1, 8]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod composed;
mod config;
mod kernel;
mod layer;
mod plan;
mod sums;

pub use config::{GhostBatchNormConfig, Remainder, RunningUpdate};
pub use layer::{ghost_batch_norm, GhostBatchNorm};
pub use plan::GhostPlan;

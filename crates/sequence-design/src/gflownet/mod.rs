//! GFlowNets: samplers of discrete objects that are built step by step, trained on a reward or on
//! nothing but an order.
//!
//! A trajectory `s_0 -> s_1 -> .. -> s_n = x -> stop` builds an object `x`. The policy `P_F` is
//! trained so that objects come with probability `R(x) / Z`. With a reward one chooses an exponent
//! (`R^beta`), and with several objectives a scalarization. *Order-Preserving GFlowNets* (Chen and
//! Mauch, ICLR 2024, arXiv 2310.00386) need neither: better or worse, or Pareto dominance, is enough.
//!
//! Base losses, for `P_F`, `P_B` and the state flow `F`:
//!
//! ```text
//! TB      (log Z + sum log P_F - sum log P_B - log R(x))^2
//! DB      (log F(s) + log P_F(s'|s) - log F(s') - log P_B(s|s'))^2,  at the end  log R(x)
//! SubTB   the same over every part of a trajectory, weights lambda^length
//! FM      (log flow into s - log flow out of s)^2 on edge flows
//! VarGrad the variance over the batch of  sum log P_F - sum log P_B - log R(x)
//! ```
//!
//! The learned log reward `l(x)` is what solves the condition at the end: `log Z + sum log P_F - sum
//! log P_B` for TB, `log F(x) + log P_F(stop|x)` for DB and SubTB, the logarithm of the stop edge's
//! flow for FM. The ordering loss compares it with "uniform over the best of a set":
//!
//! ```text
//! L_OP = CE(softmax over X of l, 1[x maximal in X] / #maximal),   X = pairs, or the whole batch
//! ```
//!
//! and trains together with the reward-free part of the base loss and `w KL(uniform || P_B)`.
//!
//! | symbol | field |
//! | --- | --- |
//! | base loss | [`GflowConfig::loss`] |
//! | `R`, `beta`, or the order | [`GflowConfig::signal`] |
//! | weight of `L_OP` | `weight` in [`RewardSignal`] |
//! | `w` | [`GflowConfig::backward_kl`] |
//! | `lambda` | [`SubTrajectoryWeights`] |
//! | `epsilon` | [`Exploration::epsilon`] |
//!
//! `log Z` gets no gradient from an order and stays what it is. On a total order the gaps of `l` grow
//! for ever and the sampler sharpens for ever: stop early, or set `max_gap`.
//!
//! ```
//! # extern crate nn as thalweg_nn;
//! # extern crate optim as thalweg_optim;
//! use candle_core::{DType, Device};
//! use candle_nn::{Optimizer, VarBuilder};
//! use thalweg_nn::init::SeededVars;
//! use thalweg_optim::{AdamW, AdamWConfig, ParamGroup};
//! use thalweg_sequence_design::gflownet::{Environment, GflowConfig, GflowTrainer, HyperGrid, Policy, PolicyConfig};
//! use thalweg_sequence_design::RandomStream;
//!
//! let grid = HyperGrid::new(2, 8)?;
//! let vars = SeededVars::new(&RandomStream::new(1));
//! let config = PolicyConfig { hidden: vec![32], ..PolicyConfig::default() };
//! let vb = vars.builder(DType::F32, &Device::Cpu);
//! let policy = Policy::new(grid.feature_width(), grid.actions(), &config, vb)?;
//! let optimizer = AdamW::with_groups(vec![ParamGroup::named(vars.trainable(), AdamWConfig::adam(1e-2))])?;
//!
//! let rewards = grid.clone();
//! let score = move |points: &[Vec<u16>]| Ok(points.iter().map(|p| vec![rewards.reward(p)]).collect());
//! let mut trainer = GflowTrainer::new(grid, policy, optimizer, GflowConfig::default(), score)?;
//! let mut rng = RandomStream::new(2);
//! let before = trainer.step(&mut rng)?.mean_score;
//! let mut after = before;
//! for _ in 0..150 {
//!     after = trainer.step(&mut rng)?.mean_score;
//! }
//! assert!(after > 2.0 * before, "{before} -> {after}");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod env;
pub mod environments;
mod evaluate;
mod exact;
mod hypervolume;
pub mod loss;
pub mod order;
pub mod pareto;
mod policy;
mod replay;
mod sampler;
mod trainer;

pub use env::{Environment, Trajectories};
pub use environments::*;
pub use evaluate::{EdgeFlows, Evaluated};
pub use exact::{total_variation, Enumeration, Tabular};
pub use loss::{BaseLoss, SubTrajectoryWeights};
pub use nn::masked::{masked_log_prob, Wanted};
pub use policy::{Heads, Policy, PolicyConfig, PolicyNet};
pub use replay::{Replay, ReplayConfig};
pub use sampler::{roll_back, roll_out, Exploration};
pub use trainer::{
    Comparator, Contexts, GflowConfig, GflowTrainer, Objective, ParetoForm, RewardSignal,
    StepReport,
};

//! Scenarios that put published methods against their baselines, the runner, the results database,
//! verdicts and the report.
//!
//! | module | what it gives |
//! | --- | --- |
//! | [`scenario`] | what an experiment declares: arms, tuning grids, claims, one trial |
//! | [`registry`] | the list of all scenarios and the filters |
//! | [`runner`] | runs what is missing, stores each trial as it ends |
//! | [`store`] | the SQLite database: one row a trial |
//! | [`verdict`] | claims judged by a paired bootstrap over seeds |
//! | [`report`] | one self-contained HTML page |
//! | [`export`] | JSON, CSV and TensorBoard event files |
//! | [`compare`] | two databases, runs or versions side by side |
//! | [`verify`] | implementations against files of reference numbers |
//! | [`perf`] | our kernels against the machine's ceilings |
//! | [`peers`] | the same operations in other packages |
//! | [`methods`] | the table of methods in the documentation |
//! | [`training_page`] | the page of whole training steps beside other packages |
//! | `graph_scale` | the page of training time and memory against the size of a graph |
//! | `graph_ssl` | the protocol that compares self-supervised methods on graphs |
//! | [`cli`] | the command line of `thalweg-bench` |
//!
//! Adding an experiment is one file under `src/scenarios` and one line in its `all` function.

pub mod cli;
pub mod compare;
mod error;
pub mod export;
#[cfg(feature = "graph-learning")]
pub mod graph_scale;
#[cfg(feature = "graph-learning")]
pub mod graph_ssl;
pub mod machine;
pub mod methods;
pub mod peers;
pub mod perf;
pub mod registry;
pub mod report;
pub mod runner;
pub mod scenario;
pub mod scenarios;
pub mod statistics;
pub mod store;
pub mod summary;
pub mod training_page;
pub mod verdict;
pub mod verify;

pub use error::{Error, Result};

/// The version of this crate: part of every trial's key.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

//! Program discovery: a search for update rules on one's own task.
//!
//! Programs are straight-line functions of the weights, the gradients and two carried trees; they
//! are written as text, checked by abstract execution, simplified, hashed, mutated, evolved, and run
//! as optimizers. The language and the search are those of *Symbolic Discovery of Optimization
//! Algorithms*, Chen et al., NeurIPS 2023, arXiv 2302.06675, which found Lion.
//!
//! ```text
//! population <- P copies of the warm start
//! repeat     parent = the best of T drawn with replacement
//!            child  = insert, delete or modify a statement of the parent, until it is well typed
//!            simplify, hash: known fitness, or train the proxy task
//!            append the child, drop the oldest
//! after R evaluations without a better one: start again from AdamW or from the best
//! ```
//!
//! | symbol | field |
//! | --- | --- |
//! | `P`, `T`, `R` | [`Evolution::population`], [`Evolution::tournament`], [`Evolution::restart_after`] |
//!
//! | part | here |
//! | --- | --- |
//! | programs as text and data | [`Program`], [`Op`], [`Signature`] |
//! | abstract execution | [`typecheck`] |
//! | simplification, hashes | [`simplify`], [`hash`](fn@hash), [`fingerprint`] |
//! | running them | [`CompiledProgram`], [`ProgramRun`], [`ProgramOptimizer`] |
//! | mutation | [`Mutator`] |
//! | searches | [`Evolution`], [`RandomSearch`], [`ConstantTuning`] |
//! | against overfitting the proxy task | [`Funnel`] |
//!
//! The caller does `w <- w - update` and feeds `m` and `v` to the next step. `lr` is the value of a
//! schedule in `[0, 1]`: the base rate is a constant inside the program, so that the search can
//! change it. Division is `a / (b + 1e-8)` and logarithms and roots take `|x|`, as in the official
//! library, so a program can still run into infinity: the abort rule of the task deals with it.
//!
//! Use the same data order and initial weights for all programs of a seed: the cache keeps one
//! fitness for each program. A good rank on the proxy task does not carry over by itself; that is
//! what the funnel is for, and [`SearchOptions::meta`] shows it while the search runs.
//!
//! ```
//! use thalweg_optim::discovery::{AbortRule, CompiledProgram, Evolution, Fitness, Program, ProxyTask};
//! use thalweg_optim::{RandomStream, Result};
//!
//! /// Descent on an ill-conditioned bowl.
//! struct Bowl;
//! impl ProxyTask for Bowl {
//!     fn fitness(&self, program: &CompiledProgram, _seed: u64, abort: &AbortRule) -> Result<Fitness> {
//!         let scale = [1.0, 10.0, 100.0];
//!         let mut w = [1f32; 3];
//!         let mut run = program.run::<f32>(&[3]);
//!         for step in 0..50 {
//!             let g: Vec<f32> = w.iter().zip(scale).map(|(w, s)| s * w).collect();
//!             run.update(&mut w, &g, 1.0 - step as f64 / 50.0)?;
//!             let loss: f32 = w.iter().zip(scale).map(|(w, s)| s * w * w).sum();
//!             if abort.stops(step + 1, f64::from(loss), &w) {
//!                 return Ok(Fitness::aborted(step + 1));
//!             }
//!         }
//!         Ok(Fitness::of(w.iter().zip(scale).map(|(w, s)| f64::from(s * w * w)).sum()))
//!     }
//! }
//! let search = Evolution { budget: 60, population: 10, ..Default::default() };
//! let report = search.run(&Bowl, &Program::adamw()?, &RandomStream::new(0))?;
//! // A hundred times better than AdamW at its tiny learning rate.
//! assert!(report.best_fitness < 0.5 * report.history[0].best);
//! # Ok::<(), thalweg_optim::Error>(())
//! ```

mod check;
mod evolve;
mod funnel;
mod interpret;
mod mutate;
mod ops;
mod optimizer;
mod program;
mod simplify;
mod state;
mod task;

pub use check::{typecheck, OpSet, Signature, Ty, TypeMap};
pub use evolve::{
    ConstantTuning, Evolution, HistoryPoint, Individual, MetaBest, Progress, RandomSearch,
    SearchOptions, SearchReport,
};
pub use funnel::{Funnel, FunnelStage, Selected};
pub use interpret::{CompiledProgram, ProgramRun};
pub use mutate::{FreshConst, Mutator};
pub use ops::{Number, Op};
pub use optimizer::{ProgramConfig, ProgramOptimizer};
pub use program::{Arg, Program, Stmt, VarId};
pub use simplify::{fingerprint, hash, simplify, HashMode};
pub use task::{AbortRule, Fitness, ProxyTask};

//! Selection over tasks of growing size, against overfitting the first one.

use super::check::Signature;
use super::interpret::CompiledProgram;
use super::program::{Arg, Program};
use super::simplify::simplify;
use super::task::ProxyTask;
use crate::error::check;
use crate::{Error, RandomStream, Result};
use rayon::prelude::*;

/// One task, about ten times as large as the one before and on other data.
pub struct FunnelStage<'a> {
    /// The task.
    pub task: Box<dyn ProxyTask + 'a>,
    /// Programs that go on, at most.
    pub keep: usize,
    /// The fitness of tuned AdamW on it ([`Funnel::tuned_adamw`]): those that beat it go on; where
    /// none does, the best `keep`.
    pub baseline: Option<f64>,
    /// The seed that all evaluations get.
    pub seed: u64,
}

impl std::fmt::Debug for FunnelStage<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FunnelStage")
            .field("keep", &self.keep)
            .field("baseline", &self.baseline)
            .field("seed", &self.seed)
            .finish_non_exhaustive()
    }
}

/// Stages in order.
#[derive(Debug)]
pub struct Funnel<'a> {
    /// The stages.
    pub stages: Vec<FunnelStage<'a>>,
}

/// A program that reached the end.
#[derive(Debug, Clone, PartialEq)]
pub struct Selected {
    /// The program, simplified.
    pub program: Program,
    /// Its fitness on each stage.
    pub fitness: Vec<f64>,
}

impl Funnel<'_> {
    /// The programs that pass all stages, the best on the last one first.
    ///
    /// # Errors
    /// [`Error::TooFew`] for no programs or stages; programs that are not well typed; those of the
    /// tasks.
    pub fn select(&self, programs: &[Program], signature: &Signature) -> Result<Vec<Selected>> {
        for (of, got) in [("programs", programs.len()), ("stages", self.stages.len())] {
            if got == 0 {
                return Err(Error::TooFew {
                    what: "a funnel",
                    of,
                    needed: 1,
                    got,
                });
            }
        }
        let start = |program: &Program| Selected {
            program: simplify(program, signature),
            fitness: Vec::new(),
        };
        let mut left: Vec<Selected> = programs.iter().map(start).collect();
        for (number, stage) in self.stages.iter().enumerate() {
            check::at_least_one("FunnelStage::keep", stage.keep)?;
            let one = |selected: &Selected| {
                let compiled = CompiledProgram::new(&selected.program, signature)?;
                let abort = stage.task.abort();
                Ok(stage.task.fitness(&compiled, stage.seed, &abort)?.value)
            };
            let found: Result<Vec<f64>> = left.par_iter().map(one).collect();
            for (selected, fitness) in left.iter_mut().zip(found?) {
                selected.fitness.push(fitness);
            }
            left.sort_by(|a, b| a.fitness[number].total_cmp(&b.fitness[number]));
            if let Some(baseline) = stage.baseline {
                let better = left.iter().filter(|s| s.fitness[number] < baseline).count();
                if better > 0 {
                    left.truncate(better);
                }
            }
            left.truncate(stage.keep);
            tracing::debug!(stage = number, left = left.len(), "funnel");
        }
        Ok(left)
    }

    /// AdamW with the best of `draws` random learning rates (log-uniform from 1e-4 to 3e-2) and
    /// decays (1e-3 to 1e-1) on a task, with its fitness.
    ///
    /// # Errors
    /// Those of the task; [`Error::TooFew`] for no draws.
    pub fn tuned_adamw(
        task: &dyn ProxyTask,
        draws: usize,
        seed: u64,
        rng: &mut RandomStream,
    ) -> Result<(Program, f64)> {
        let signature = Signature::optimizer();
        let mut programs = Vec::with_capacity(draws);
        for _ in 0..draws {
            let mut between =
                |low: f64, high: f64| (low.ln() + rng.next_uniform() * (high / low).ln()).exp();
            let (lr, decay) = (between(1e-4, 3e-2), between(1e-3, 1e-1));
            let mut program = Program::adamw()?;
            for stmt in &mut program.body {
                for arg in &mut stmt.args {
                    if *arg == Arg::Const(0.001) {
                        *arg = Arg::Const(lr);
                    } else if *arg == Arg::Const(0.01) {
                        *arg = Arg::Const(decay);
                    }
                }
            }
            programs.push(program);
        }
        let one = |program: &Program| {
            let compiled = CompiledProgram::new(program, &signature)?;
            let fitness = task.fitness(&compiled, seed, &task.abort())?.value;
            Ok((program.clone(), fitness))
        };
        let tried: Result<Vec<(Program, f64)>> = programs.par_iter().map(one).collect();
        let best = tried?.into_iter().min_by(|a, b| a.1.total_cmp(&b.1));
        best.ok_or(Error::TooFew {
            what: "a tuned baseline",
            of: "draws",
            needed: 1,
            got: draws,
        })
    }
}

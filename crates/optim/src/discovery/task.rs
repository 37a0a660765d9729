//! What a search optimizes.

use super::interpret::CompiledProgram;
use super::ops::Number;
use crate::Result;

/// How well a program did; lower is better.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Fitness {
    /// The validation loss or error; infinite for a run that was stopped.
    pub value: f64,
    /// The step at which the run was stopped, if it was.
    pub aborted: Option<usize>,
}

impl Fitness {
    /// A finished run's; infinite for NaN.
    pub fn of(value: f64) -> Self {
        let value = if value.is_nan() { f64::INFINITY } else { value };
        Self {
            value,
            aborted: None,
        }
    }

    /// The worst, of a run that was stopped at a step.
    pub fn aborted(step: usize) -> Self {
        Self {
            value: f64::INFINITY,
            aborted: Some(step),
        }
    }
}

/// When a run is given up.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AbortRule {
    /// Steps between two checks.
    pub every: usize,
    /// A loss above this stops the run.
    pub max_loss: f64,
}

impl Default for AbortRule {
    /// Every 10 steps; the loss has no bound but must be a number.
    fn default() -> Self {
        Self {
            every: 10,
            max_loss: f64::MAX,
        }
    }
}

impl AbortRule {
    /// For cross entropy over so many classes: ten times that of guessing.
    pub fn for_classes(classes: usize) -> Self {
        Self {
            max_loss: 10.0 * (classes as f64).ln(),
            ..Self::default()
        }
    }

    /// Whether a run is to be stopped after `step` steps: at every `every`-th one, when the loss is
    /// above the bound or a weight is not finite.
    pub fn stops<T: Number>(&self, step: usize, loss: f64, weights: &[T]) -> bool {
        if self.every == 0 || !step.is_multiple_of(self.every) {
            return false;
        }
        let within = loss <= self.max_loss;
        !within || weights.iter().any(|w| !w.to_f64().is_finite())
    }
}

/// A task that update rules are tried on.
pub trait ProxyTask: Sync {
    /// Trains with the program and says how well it went. The same program and seed must give the
    /// same number; programs of one search see the same seed.
    ///
    /// # Errors
    /// The implementor's: a program that diverges is no error but a [`Fitness::aborted`].
    fn fitness(&self, program: &CompiledProgram, seed: u64, abort: &AbortRule) -> Result<Fitness>;

    /// The rule by which runs are given up.
    fn abort(&self) -> AbortRule {
        AbortRule::default()
    }

    /// What one evaluation costs beside others, in any unit.
    fn cost(&self) -> f64 {
        1.0
    }
}

//! Schedules made of schedules.

use super::Schedule;
use crate::error::check;
use crate::{Error, Result};

/// Linear warm-up in front of another schedule: step `t < steps` gets
/// `then(0) * (start + (1 - start) (t + 1) / steps)`, later ones `then(t - steps)`.
#[derive(Debug, Clone, PartialEq)]
pub struct Warmup<S> {
    steps: usize,
    start: f64,
    then: S,
}

impl<S: Schedule> Warmup<S> {
    /// Rises from 0 (before the first step) to `then.at(0)` (at the last step of the warm-up).
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for `steps = 0`.
    pub fn new(steps: usize, then: S) -> Result<Self> {
        Self::from_factor(steps, 0.0, then)
    }

    /// Rises from `start * then.at(0)`.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for `steps = 0` or a factor outside `[0, 1]`.
    pub fn from_factor(steps: usize, start: f64, then: S) -> Result<Self> {
        check::at_least_one("Warmup::steps", steps)?;
        check::require(
            (0.0..=1.0).contains(&start),
            "Warmup::start",
            start,
            "a factor in [0, 1]",
        )?;
        Ok(Self { steps, start, then })
    }
}

impl<S: Schedule> Schedule for Warmup<S> {
    fn at(&self, step: usize) -> f64 {
        if step >= self.steps {
            return self.then.at(step - self.steps);
        }
        let fraction = (step + 1) as f64 / self.steps as f64;
        self.then.at(0) * (self.start + (1.0 - self.start) * fraction)
    }
}

/// Schedules one after the other; each counts its steps from its own beginning.
#[derive(Debug)]
pub struct Sequence {
    /// First step and schedule of each part.
    parts: Vec<(usize, Box<dyn Schedule>)>,
}

impl Sequence {
    /// Starts with `first`.
    pub fn new(first: impl Schedule + 'static) -> Self {
        Self {
            parts: vec![(0, Box::new(first))],
        }
    }

    /// Goes over to `next` at step `step` of the whole.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] unless `step` lies behind the beginning of the part before.
    pub fn then_at(mut self, step: usize, next: impl Schedule + 'static) -> Result<Self> {
        let before = self.parts.last().map_or(0, |(start, _)| *start);
        if step <= before {
            return Err(Error::config(
                "Sequence::then_at",
                step,
                format!("a step after {before}"),
            ));
        }
        self.parts.push((step, Box::new(next)));
        Ok(self)
    }
}

impl Schedule for Sequence {
    fn at(&self, step: usize) -> f64 {
        let index = self.parts.partition_point(|(start, _)| *start <= step);
        // The first part begins at step 0, so there is always one that has begun.
        let (start, part) = &self.parts[index.saturating_sub(1)];
        part.at(step - start)
    }
}

/// The product of two schedules.
#[derive(Debug, Clone, PartialEq)]
pub struct Product<A, B>(
    /// One factor.
    pub A,
    /// The other factor.
    pub B,
);

impl<A: Schedule, B: Schedule> Schedule for Product<A, B> {
    fn at(&self, step: usize) -> f64 {
        self.0.at(step) * self.1.at(step)
    }
}

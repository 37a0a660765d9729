//! Learning-rate schedules, and schedules of any other scalar (a perturbation radius, a momentum).
//!
//! A [`Schedule`] is a pure function of the step: it has no state, so resuming at step `t` is
//! calling `at(t)`. Constructors check their arguments; schedules compose by
//! [`Warmup`], [`Sequence`] and [`Product`].
//!
//! ```
//! use candle_nn::Optimizer;
//! use thalweg_optim::schedule::{Cosine, Schedule, Warmup};
//!
//! // 10 steps up, then down to a tenth within 90 more.
//! let schedule = Warmup::new(10, Cosine::new(3e-3, 3e-4, 90)?)?;
//! assert!((schedule.at(4) - 1.5e-3).abs() < 1e-12);
//! assert_eq!(schedule.at(10), 3e-3);
//! assert_eq!(schedule.at(1000), 3e-4);
//! # let mut optimizer = thalweg_optim::lion::Lion::new(vec![], Default::default())?;
//! for step in 0..3 {
//!     optimizer.set_learning_rate(schedule.at(step));
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod compose;
mod decay;
mod one_cycle;

pub use compose::{Product, Sequence, Warmup};
pub use decay::{Constant, Cosine, Exponential, InverseSqrt, Linear, MultiStep, Polynomial, Step};
pub use one_cycle::{Anneal, OneCycle, OneCycleConfig};

/// A scalar as a pure function of the step, counted from 0.
///
/// Every schedule is defined for every step: beyond its end it keeps its last value.
pub trait Schedule: std::fmt::Debug + Send + Sync {
    /// The value for the step `step` (the first step is step 0).
    fn at(&self, step: usize) -> f64;
}

impl<S: Schedule + ?Sized> Schedule for Box<S> {
    fn at(&self, step: usize) -> f64 {
        (**self).at(step)
    }
}

impl<S: Schedule + ?Sized> Schedule for std::sync::Arc<S> {
    fn at(&self, step: usize) -> f64 {
        (**self).at(step)
    }
}

impl<S: Schedule + ?Sized> Schedule for &S {
    fn at(&self, step: usize) -> f64 {
        (**self).at(step)
    }
}

/// A plain number is the constant schedule.
impl Schedule for f64 {
    fn at(&self, _: usize) -> f64 {
        *self
    }
}

/// How far `step` is on the way of `total` steps, in `[0, 1]`.
fn progress(step: usize, total: usize) -> f64 {
    if step >= total {
        1.0
    } else {
        step as f64 / total as f64
    }
}

/// From `start` at 0 to `end` at 1 along half a cosine; exact at both ends.
fn cosine_between(start: f64, end: f64, fraction: f64) -> f64 {
    if fraction >= 1.0 {
        return end;
    }
    end + (start - end) * (0.5 * (1.0 + (std::f64::consts::PI * fraction).cos()))
}

/// From `start` at 0 to `end` at 1 along a line; exact at both ends.
fn linear_between(start: f64, end: f64, fraction: f64) -> f64 {
    if fraction >= 1.0 {
        return end;
    }
    start + (end - start) * fraction
}

//! Solvers of `dy/dt = f(y, t)` over tensors.
//!
//! | solver | order | evaluations per step |
//! | --- | --- | --- |
//! | [`FixedStep`] with [`Method::Euler`] | 1 | 1 |
//! | [`Method::Midpoint`], [`Method::Heun`] | 2 | 2 |
//! | [`Method::Rk4`], [`Method::Rk38`] | 4 | 4 |
//! | [`Method::AdamsBashforth`] (2 to 4) | 2 to 4 | 1 |
//! | [`Rk45`] | 5(4), adaptive | 6 |
//!
//! A [`Velocity`] is a field by itself; for a conditional one take
//! [`Conditioned`](crate::velocity::Conditioned). No solver keeps a graph: states are detached at
//! every step.
//!
//! ```
//! use candle_core::{Device, Tensor};
//! use thalweg_flows::ode::{FixedStep, OdeSolver, Rk45};
//!
//! let decay = |y: &Tensor, _t: &Tensor| y.neg();
//! let start = Tensor::new(&[[1.0_f64]], &Device::Cpu)?;
//! let exact = (-1.0_f64).exp();
//! for solver in [&FixedStep::rk4(20) as &dyn OdeSolver, &Rk45::default()] {
//!     let end = solver.solve(&decay, &start, 0.0, 1.0)?.x.to_vec2::<f64>()?;
//!     assert!((end[0][0] - exact).abs() < 1e-5);
//! }
//! # Ok::<(), thalweg_flows::Error>(())
//! ```

mod fixed;
mod rk45;
mod sde;

pub use fixed::{FixedStep, Method, Steps};
pub use rk45::{ErrorNorm, Rk45};
pub use sde::{sde_step, EulerMaruyama};

pub(crate) use fixed::{adams_order, adams_weights, runge_kutta, step, History, Tableau, RK38};

use crate::combine::linear_combination;
use crate::condition::Condition;
use crate::error::{check, Error, Result};
use crate::velocity::Velocity;
use candle_core::Tensor;

/// The times of the rows of a batch.
#[derive(Debug, Clone, PartialEq)]
pub enum Times {
    /// All rows are at the same time.
    Same(f64),
    /// One time per row.
    PerRow(Vec<f64>),
}

impl Times {
    /// As a tensor `[rows]` like `x`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn tensor(&self, x: &Tensor) -> Result<Tensor> {
        let rows = check::rows("x", x)?;
        let values = match self {
            Self::Same(t) => vec![*t; rows],
            Self::PerRow(times) => times.clone(),
        };
        let count = values.len();
        Ok(Tensor::from_vec(values, count, x.device())?.to_dtype(x.dtype())?)
    }
}

/// The right side of an ordinary differential equation.
pub trait OdeField {
    /// `f(y, t)`, in the shape of `y` `[rows, ...]`.
    ///
    /// # Errors
    /// Whatever the field's own are.
    fn eval(&self, y: &Tensor, t: &Times) -> Result<Tensor>;
}

impl<V: Velocity> OdeField for V {
    fn eval(&self, y: &Tensor, t: &Times) -> Result<Tensor> {
        self.velocity(y, &t.tensor(y)?, &Condition::Null)
    }
}

/// What a solver gives.
#[derive(Debug, Clone)]
pub struct Solution {
    /// The state at the end.
    pub x: Tensor,
    /// Calls of the field.
    pub nfe: usize,
    /// The start and the end of every step taken, in order; start and end alone where rows have
    /// steps of their own.
    pub times: Vec<f64>,
    /// The states at these times, where they were to be recorded.
    pub trajectory: Option<Vec<Tensor>>,
    /// Steps taken (over all rows, where they have steps of their own).
    pub accepted: usize,
    /// Steps tried and given up.
    pub rejected: usize,
}

/// A solver, from any time to any other: backwards where `t1 < t0`.
pub trait OdeSolver {
    /// Integrates from `x0` `[rows, ...]` at `t0` to `t1`.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for settings that make no sense, [`Error::NonFinite`] or
    /// [`Error::Solver`] when the solution leaves the numbers, and those of the field.
    fn solve(&self, field: &dyn OdeField, x0: &Tensor, t0: f64, t1: f64) -> Result<Solution>;
}

/// The field, checked for its shape.
pub(crate) fn evaluate(field: &dyn OdeField, y: &Tensor, t: &Times) -> Result<Tensor> {
    let slope = field.eval(y, t)?;
    check::same_shape("the field's value", &slope, y)?;
    Ok(slope)
}

/// `y + sum_j c_j k_j`, leaving out zeros.
pub(crate) fn add_scaled(y: &Tensor, terms: &[(f64, &Tensor)]) -> Result<Tensor> {
    let terms = terms.iter().copied().filter(|(c, _)| *c != 0.0);
    let all: Vec<_> = std::iter::once((1.0, y)).chain(terms).collect();
    linear_combination(&all)
}

/// Checks of a call of a solver.
fn check_call(x0: &Tensor, t0: f64, t1: f64) -> Result<()> {
    check::rows("x0", x0)?;
    for (name, t) in [("t0", t0), ("t1", t1)] {
        if !t.is_finite() {
            return Err(Error::argument(name, t, "a finite time"));
        }
    }
    Ok(())
}

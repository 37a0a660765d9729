//! Fixed points `x = g(x)` by Picard and Anderson iteration.
//!
//! With `f(x) = g(x) - x` and mixing `b`, Picard iteration is `x_{k+1} = x_k + b f(x_k)`. Anderson
//! acceleration (Anderson 1965; type II in Fang & Saad 2009) keeps the last `m` differences of `x`
//! and of `f` as columns of `X` and `F`:
//!
//! ```text
//! c = argmin |f(x_k) - F c|^2 + regularization    x_{k+1} = x_k + b f(x_k) - (X + b F) c
//! ```
//!
//! Residuals are `|f(x_k)|` relative to the largest of `|x_0|`, `|g(x_0)|` and `|g(x_k)|`, so that
//! a fixed point at zero can be reached too.

use super::{
    add_scaled, check_growth, check_limits, check_residual, check_vector, norm, Operator, Solution,
};
use crate::kernels::dot;
use crate::{Error, Result};
use candle_core::Tensor;
use faer::{Mat, Side};
use std::collections::VecDeque;

/// Settings of [`picard`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PicardConfig {
    /// The mixing `b` in (0, 1]; below 1 the iteration is damped.
    pub mixing: f64,
    /// Stop when the relative residual is at most this.
    pub tolerance: f64,
    /// Steps, at most.
    pub max_iterations: usize,
    /// A residual above `max_growth` times the first one is divergence.
    pub max_growth: f64,
}

impl Default for PicardConfig {
    fn default() -> Self {
        Self {
            mixing: 1.0,
            tolerance: 1e-5,
            max_iterations: 1000,
            max_growth: 1e6,
        }
    }
}

impl PicardConfig {
    /// Refuses settings that make no sense.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a mixing outside (0, 1], a negative or non-finite tolerance,
    /// no iterations, or `max_growth <= 1`.
    pub fn validate(&self) -> Result<()> {
        if !(self.mixing > 0.0 && self.mixing <= 1.0) {
            return Err(Error::invalid("mixing", self.mixing, "a number in (0, 1]"));
        }
        check_limits(self.tolerance, self.max_iterations)?;
        check_growth(self.max_growth)
    }
}

/// Settings of [`anderson`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AndersonConfig {
    /// Differences kept (`m`); 0 is Picard iteration.
    pub memory: usize,
    /// Ridge of the least squares, relative to its largest eigenvalue with columns of norm 1.
    pub regularization: f64,
    /// The mixing `b` in (0, 1].
    pub mixing: f64,
    /// Stop when the relative residual is at most this.
    pub tolerance: f64,
    /// Steps, at most.
    pub max_iterations: usize,
    /// A residual above `max_growth` times the first one is divergence.
    pub max_growth: f64,
}

impl Default for AndersonConfig {
    fn default() -> Self {
        Self {
            memory: 5,
            regularization: 1e-10,
            mixing: 1.0,
            tolerance: 1e-5,
            max_iterations: 1000,
            max_growth: 1e6,
        }
    }
}

impl AndersonConfig {
    /// Refuses settings that make no sense.
    ///
    /// # Errors
    /// As [`PicardConfig::validate`]; [`Error::InvalidArgument`] also for a regularization that is
    /// negative or not finite.
    pub fn validate(&self) -> Result<()> {
        if !(self.regularization.is_finite() && self.regularization >= 0.0) {
            return Err(Error::invalid(
                "regularization",
                self.regularization,
                "a finite number >= 0",
            ));
        }
        self.picard().validate()
    }

    fn picard(&self) -> PicardConfig {
        PicardConfig {
            mixing: self.mixing,
            tolerance: self.tolerance,
            max_iterations: self.max_iterations,
            max_growth: self.max_growth,
        }
    }
}

/// Iterates `x <- x + mixing (g(x) - x)` from `start`. The solution is the last `x` at which `g`
/// was evaluated, and its residual is exact.
///
/// # Errors
/// [`Error::Diverged`] when a residual is not finite or above `max_growth` times the first one;
/// [`Error::InvalidArgument`] for a bad configuration; errors for a start that is empty, not finite
/// or not f32 or f64, and for a `g` that changes shape or dtype; those of `g`.
pub fn picard<G>(g: G, start: &Tensor, config: &PicardConfig) -> Result<Solution>
where
    G: FnMut(&Tensor) -> Result<Tensor>,
{
    config.validate()?;
    iterate("Picard iteration", g, start, config, None)
}

/// Anderson acceleration of [`picard`].
///
/// # Errors
/// As [`picard`].
pub fn anderson<G>(g: G, start: &Tensor, config: &AndersonConfig) -> Result<Solution>
where
    G: FnMut(&Tensor) -> Result<Tensor>,
{
    config.validate()?;
    let history = History {
        columns: VecDeque::new(),
        last: None,
        memory: config.memory,
        regularization: config.regularization,
    };
    iterate(
        "Anderson acceleration",
        g,
        start,
        &config.picard(),
        Some(history),
    )
}

fn iterate<G>(
    method: &'static str,
    g: G,
    start: &Tensor,
    config: &PicardConfig,
    mut history: Option<History>,
) -> Result<Solution>
where
    G: FnMut(&Tensor) -> Result<Tensor>,
{
    check_vector("start", start)?;
    let start = &start.detach();
    let mut g = Operator {
        name: "g(x)",
        apply: g,
        like: start,
    };
    let mut x = start.clone();
    let (mut residuals, mut iterations) = (Vec::new(), 0);
    let (mut floor, mut first) = (norm(start)?, None);
    let converged = loop {
        let image = g.call(&x)?;
        let f = (&image - &x)?;
        let (size, reach) = (norm(&f)?, norm(&image)?);
        let first = *first.get_or_insert_with(|| {
            floor = floor.max(reach);
            size
        });
        check_residual(method, iterations, size, config.max_growth * first)?;
        let scale = floor.max(reach);
        let relative = if scale > 0.0 { size / scale } else { 0.0 };
        residuals.push(relative);
        if relative <= config.tolerance {
            break true;
        }
        if iterations == config.max_iterations {
            break false;
        }
        let mut next = add_scaled(&x, config.mixing, &f)?;
        if let Some(history) = &mut history {
            next = history.accelerate(method, next, &x, &f, config.mixing, iterations)?;
        }
        x = next;
        iterations += 1;
    };
    tracing::debug!(
        method,
        iterations,
        converged,
        residual = residuals.last(),
        "fixed point"
    );
    Ok(Solution {
        x,
        residuals,
        iterations,
        converged,
    })
}

/// One difference of `x` with the difference of `f`, and the norm of the latter.
struct Column {
    x: Tensor,
    f: Tensor,
    norm: f64,
}

/// The last differences, the oldest first.
struct History {
    columns: VecDeque<Column>,
    last: Option<(Tensor, Tensor)>,
    memory: usize,
    regularization: f64,
}

impl History {
    /// Takes in the pair `x`, `f` and corrects the Picard step `next`.
    fn accelerate(
        &mut self,
        method: &'static str,
        mut next: Tensor,
        x: &Tensor,
        f: &Tensor,
        mixing: f64,
        iteration: usize,
    ) -> Result<Tensor> {
        if let Some((last_x, last_f)) = self.last.replace((x.clone(), f.clone())) {
            let (x, f) = ((x - last_x)?, (f - last_f)?);
            let norm = norm(&f)?;
            // A step that changed nothing says nothing.
            if norm > 0.0 {
                self.columns.push_back(Column { x, f, norm });
            }
        }
        while self.columns.len() > self.memory {
            self.columns.pop_front();
        }
        let diverged = || Error::Diverged {
            method,
            iteration,
            residual: f64::NAN,
        };
        let weights = self.weights(f)?.ok_or_else(diverged)?;
        for (column, c) in self.columns.iter().zip(weights) {
            next = add_scaled(&next, -c, &add_scaled(&column.x, mixing, &column.f)?)?;
        }
        Ok(next)
    }

    /// The least-squares weights, from the eigenvalues of the Gram matrix of the columns scaled to
    /// norm 1; nothing when its eigenvalues cannot be found.
    fn weights(&self, f: &Tensor) -> Result<Option<Vec<f64>>> {
        let m = self.columns.len();
        if m == 0 {
            return Ok(Some(Vec::new()));
        }
        let mut gram = Mat::<f64>::identity(m, m);
        let mut right = Vec::with_capacity(m);
        for (i, a) in self.columns.iter().enumerate() {
            for (j, b) in self.columns.iter().enumerate().take(i) {
                let value = dot(&a.f, &b.f)? / (a.norm * b.norm);
                gram[(i, j)] = value;
                gram[(j, i)] = value;
            }
            right.push(dot(&a.f, f)? / a.norm);
        }
        let Ok(eigen) = gram.self_adjoint_eigen(Side::Lower) else {
            return Ok(None);
        };
        let (vectors, values) = (eigen.U(), eigen.S().column_vector());
        let largest = values[m - 1];
        let mut weights = vec![0.0; m];
        for j in 0..m {
            // Below this an eigenvalue is rounding, and its direction noise.
            if values[j] <= m as f64 * f64::EPSILON * largest {
                continue;
            }
            let along: f64 = (0..m).map(|i| vectors[(i, j)] * right[i]).sum();
            let along = along / (values[j] + self.regularization * largest);
            for (i, weight) in weights.iter_mut().enumerate() {
                *weight += vectors[(i, j)] * along;
            }
        }
        for (weight, column) in weights.iter_mut().zip(&self.columns) {
            *weight /= column.norm;
        }
        Ok(Some(weights))
    }
}

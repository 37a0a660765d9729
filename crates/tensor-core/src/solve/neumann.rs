//! Neumann series: `A x = b` by a sum of powers.
//!
//! With a step `a` for which the spectral radius of `I - a A` is below 1,
//!
//! ```text
//! A^-1 b = a sum_{k >= 0} (I - a A)^k b
//! ```
//!
//! and the `k`-th power of the sum is the residual after `k` terms: `r_0 = b`,
//! `x_{k+1} = x_k + a r_k`, `r_{k+1} = r_k - a A r_k`. A truncated sum is the usual approximation of
//! the inverse Hessian in bilevel optimization (Lorraine, Vicol & Duvenaud 2020).

use super::{
    add_scaled, check_growth, check_limits, check_residual, check_vector, norm, Operator, Solution,
};
use crate::{Error, Result};
use candle_core::Tensor;

const METHOD: &str = "Neumann series";

/// Settings of [`neumann`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NeumannConfig {
    /// The step `a`; below 2 over the largest eigenvalue of a symmetric positive definite `A`.
    pub step: f64,
    /// Stop when `|b - A x| <= tolerance |b|`; 0 sums all terms.
    pub tolerance: f64,
    /// Terms of the sum, at most.
    pub max_terms: usize,
    /// A residual above `max_growth |b|` is divergence.
    pub max_growth: f64,
}

impl Default for NeumannConfig {
    fn default() -> Self {
        Self {
            step: 1.0,
            tolerance: 1e-6,
            max_terms: 1000,
            max_growth: 1e6,
        }
    }
}

impl NeumannConfig {
    /// Refuses settings that make no sense.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a step or tolerance that is negative or not finite, a zero
    /// step, no terms, or `max_growth <= 1`.
    pub fn validate(&self) -> Result<()> {
        if !(self.step.is_finite() && self.step > 0.0) {
            return Err(Error::invalid("step", self.step, "a finite number > 0"));
        }
        if self.max_terms == 0 {
            return Err(Error::invalid("max_terms", 0, "at least 1"));
        }
        check_limits(self.tolerance, self.max_terms)?;
        check_growth(self.max_growth)
    }
}

/// Sums the series for `A x = b`. `apply` is `x -> A x`; it is called once per term.
///
/// # Errors
/// [`Error::Diverged`] when a residual is not finite or above `max_growth |b|`, and when the sum of
/// all terms is worse than zero (its residual is above `|b|`); otherwise as
/// [`conjugate_gradient`](super::conjugate_gradient).
pub fn neumann<A>(apply: A, b: &Tensor, config: &NeumannConfig) -> Result<Solution>
where
    A: FnMut(&Tensor) -> Result<Tensor>,
{
    config.validate()?;
    check_vector("b", b)?;
    let b = &b.detach();
    let mut apply = Operator {
        name: "A x",
        apply,
        like: b,
    };
    let b_norm = norm(b)?;
    let (mut x, mut r) = (b.zeros_like()?, b.clone());
    let (mut residuals, mut iterations) = (Vec::new(), 0);
    let converged = loop {
        let relative = if b_norm > 0.0 {
            norm(&r)? / b_norm
        } else {
            0.0
        };
        check_residual(METHOD, iterations, relative, config.max_growth)?;
        residuals.push(relative);
        if relative <= config.tolerance {
            break true;
        }
        if iterations == config.max_terms {
            // Rounding may lift a residual that cannot move (A = 0).
            check_residual(METHOD, iterations, relative, 1.0 + 1e-3)?;
            break false;
        }
        x = add_scaled(&x, config.step, &r)?;
        r = add_scaled(&r, -config.step, &apply.call(&r)?)?;
        iterations += 1;
    };
    tracing::debug!(
        iterations,
        converged,
        residual = residuals.last(),
        "Neumann series"
    );
    Ok(Solution {
        x,
        residuals,
        iterations,
        converged,
    })
}

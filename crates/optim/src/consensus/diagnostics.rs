//! How close a consensus point moves to gradient descent, and how a cloud contracts.
//!
//! With `tau = alpha sigma^2`, consensus hopping is an implicit gradient step
//! `x_k = argmin_y E(y) + |y - x_{k-1}|^2 / (2 tau)` up to an error that falls with the number of
//! particles as `N^{-1/2}`, hence `x_k = x_{k-1} - tau grad E(x_{k-1})` up to `O(tau)` more.

use super::objective::{rows, with_slice};
use super::point::{effective, host};
use crate::{Error, Result};
use candle_core::Tensor;
use tensor_core::solve::{anderson, AndersonConfig};

/// The effective number `(sum w)^2 / sum w^2` of weighted particles: `N` for equal weights, 1 where
/// one has all.
///
/// # Errors
/// [`Error::InvalidArgument`] for a negative or non-finite weight, or none that is positive.
pub fn effective_sample_size(weights: &[f64]) -> Result<f64> {
    let bad = weights.iter().find(|w| !(w.is_finite() && **w >= 0.0));
    if let Some(bad) = bad {
        return Err(Error::argument("weights", bad, "finite numbers >= 0"));
    }
    if !weights.iter().any(|w| *w > 0.0) {
        return Err(Error::argument("weights", "all zero", "a positive sum"));
    }
    Ok(effective(weights))
}

/// `1 / (2 N) sum_i |V_i - v*|^2` of particles `[N, d]` around a point `[d]`: what the theory shows
/// to fall exponentially.
///
/// # Errors
/// [`Error::Shape`].
pub fn variance_functional(particles: &Tensor, point: &Tensor) -> Result<f64> {
    let (n, d) = rows(particles)?;
    let point = host(point)?;
    if point.len() != d {
        return Err(Error::shape("point", &[point.len()], format!("[{d}]")));
    }
    let squares = |v: &[f64]| -> f64 {
        v.chunks_exact(d)
            .flat_map(|row| row.iter().zip(&point))
            .map(|(x, c)| (x - c) * (x - c))
            .sum()
    };
    Ok(with_slice(particles, squares)? / (2 * n) as f64)
}

/// The implicit gradient step from `x` `[d]`: the `y` with `y = x - tau grad E(y)`, by Anderson
/// acceleration from the explicit step. `grad` gives `grad E` at a point `[d]`.
///
/// # Errors
/// [`Error::InvalidArgument`] for a bad `tau` or when the iteration has not converged (`tau` too
/// large for the curvature); those of `grad`.
pub fn implicit_step(
    mut grad: impl FnMut(&Tensor) -> Result<Tensor>,
    x: &Tensor,
    tau: f64,
) -> Result<Tensor> {
    check_tau(tau)?;
    let start = (x - (grad(x)? * tau)?)?;
    let config = AndersonConfig {
        tolerance: 1e-12,
        max_iterations: 500,
        ..AndersonConfig::default()
    };
    let map = |y: &Tensor| {
        let g = grad(y).map_err(candle_core::Error::from)?;
        Ok((x - (g * tau)?)?)
    };
    let solution = anderson(map, &start, &config)?;
    let residual = solution.residuals.last().copied().unwrap_or(0.0);
    // Rounding may keep the last digits apart.
    if !solution.converged && residual > 1e-6 {
        let expected = "small enough beside the curvature for the iteration to converge";
        return Err(Error::argument("tau", tau, expected));
    }
    Ok(solution.x)
}

fn check_tau(tau: f64) -> Result<()> {
    if tau.is_finite() && tau > 0.0 {
        Ok(())
    } else {
        Err(Error::argument("tau", tau, "a finite number > 0"))
    }
}

/// Distances of the steps of a trajectory from gradient steps.
#[derive(Debug, Clone, PartialEq)]
pub struct Relaxation {
    /// `|x_k - (x_{k-1} - tau grad E(x_{k-1}))|` for every step.
    pub explicit: Vec<f64>,
    /// `|x_k - x_{k-1}|`: what the residuals are to be seen beside.
    pub steps: Vec<f64>,
}

/// How far the steps of a trajectory `[K, d]` are from gradient steps of length `tau`. `grad` gives
/// `grad E` at points `[K - 1, d]`.
///
/// # Errors
/// [`Error::TooFew`] for fewer than two points; [`Error::InvalidArgument`] for a bad `tau`; those
/// of `grad`.
pub fn relaxation_residual(
    trajectory: &Tensor,
    grad: impl FnOnce(&Tensor) -> Result<Tensor>,
    tau: f64,
) -> Result<Relaxation> {
    check_tau(tau)?;
    let (k, _) = rows(trajectory)?;
    if k < 2 {
        return Err(Error::TooFew {
            what: "a relaxation residual",
            of: "points of the trajectory",
            needed: 2,
            got: k,
        });
    }
    let (from, to) = (
        trajectory.narrow(0, 0, k - 1)?,
        trajectory.narrow(0, 1, k - 1)?,
    );
    let expected = (&from - (grad(&from)? * tau)?)?;
    let norms = |x: Tensor| host(&x.sqr()?.sum(1)?.sqrt()?);
    Ok(Relaxation {
        explicit: norms((&to - expected)?)?,
        steps: norms((to - from)?)?,
    })
}

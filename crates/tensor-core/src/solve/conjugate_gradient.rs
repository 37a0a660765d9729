//! Conjugate gradient: `A x = b` for symmetric positive (semi-)definite `A`.
//!
//! Hestenes & Stiefel 1952, with a preconditioner `M` in the place of `A^-1`. With
//! `r_0 = b - A x_0`, `z_k = M r_k`, `p_0 = z_0`:
//!
//! ```text
//! a_k = <r_k, z_k> / <p_k, A p_k>    x_{k+1} = x_k + a_k p_k    r_{k+1} = r_k - a_k A p_k
//! p_{k+1} = z_{k+1} + <r_{k+1}, z_{k+1}> / <r_k, z_k> p_k
//! ```
//!
//! `r_k` drifts from `b - A x_k` by rounding, so convergence is only believed after computing the
//! latter: where it is not small enough the iteration starts again from it, until that no longer
//! halves it.

use super::{
    add_scaled, check_limits, check_residual, check_vector, epsilon, norm, same_form, Operator,
    Solution,
};
use crate::kernels::{dot, sum_squares};
use crate::{Error, Result};
use candle_core::Tensor;

const METHOD: &str = "conjugate gradient";

/// Settings of [`conjugate_gradient`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CgConfig {
    /// Stop when `|b - A x| <= tolerance |b|`.
    pub tolerance: f64,
    /// Applications of `A` to a direction, at most.
    pub max_iterations: usize,
}

impl Default for CgConfig {
    fn default() -> Self {
        Self {
            tolerance: 1e-6,
            max_iterations: 1000,
        }
    }
}

impl CgConfig {
    /// Refuses settings that make no sense.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a negative or non-finite tolerance or no iterations.
    pub fn validate(&self) -> Result<()> {
        check_limits(self.tolerance, self.max_iterations)
    }
}

/// Solves `A x = b` from `start` (zeros where none is given). `apply` is `x -> A x`.
///
/// The residual history is that of the recursion; where the solution is converged, its last entry
/// is computed from `x`.
///
/// A direction that `A` maps to zero (a singular `A` with `b` outside its range) ends the
/// iteration: what has been found is returned, not converged.
///
/// # Errors
/// [`Error::NegativeCurvature`] when `A` turns out not to be positive semi-definite, with the
/// Rayleigh quotient; [`Error::Diverged`]; [`Error::InvalidArgument`], [`Error::ShapeMismatch`] and
/// [`Error::DTypeMismatch`] for a `b` or `start` that is empty, not finite or does not fit; those
/// of `apply`.
pub fn conjugate_gradient<A>(
    apply: A,
    b: &Tensor,
    start: Option<&Tensor>,
    config: &CgConfig,
) -> Result<Solution>
where
    A: FnMut(&Tensor) -> Result<Tensor>,
{
    preconditioned_conjugate_gradient(apply, |r: &Tensor| Ok(r.clone()), b, start, config)
}

/// [`conjugate_gradient`] with a preconditioner: `precondition` is `r -> M r`, with `M` symmetric
/// positive definite and close to `A^-1`.
///
/// # Errors
/// As [`conjugate_gradient`]; [`Error::NegativeCurvature`] also when `M` is not positive definite.
pub fn preconditioned_conjugate_gradient<A, M>(
    apply: A,
    precondition: M,
    b: &Tensor,
    start: Option<&Tensor>,
    config: &CgConfig,
) -> Result<Solution>
where
    A: FnMut(&Tensor) -> Result<Tensor>,
    M: FnMut(&Tensor) -> Result<Tensor>,
{
    config.validate()?;
    check_vector("b", b)?;
    let b = &b.detach();
    let b_norm = norm(b)?;
    if b_norm == 0.0 {
        return Ok(Solution {
            x: b.zeros_like()?,
            residuals: vec![0.0],
            iterations: 0,
            converged: true,
        });
    }
    let mut state = Iterate::new(apply, precondition, b, start)?;
    let goal = config.tolerance * b_norm;
    let (mut residuals, mut iterations) = (Vec::new(), 0);
    // The last residual that was computed from `x`, after the first.
    let mut last_exact = f64::INFINITY;
    let converged = loop {
        let mut size = norm(&state.r)?;
        if size <= goal && !state.exact {
            state.restart()?;
            size = norm(&state.r)?;
        }
        check_residual(METHOD, iterations, size / b_norm, f64::INFINITY)?;
        residuals.push(size / b_norm);
        if size <= goal {
            break true;
        }
        let stagnates = state.exact && size > 0.5 * last_exact;
        if stagnates || iterations == config.max_iterations {
            break false;
        }
        if state.exact && iterations > 0 {
            last_exact = size;
        }
        if !state.step(iterations)? {
            break false;
        }
        iterations += 1;
    };
    let residual = residuals.last();
    tracing::debug!(iterations, converged, residual, "conjugate gradient");
    Ok(Solution {
        x: state.x,
        residuals,
        iterations,
        converged,
    })
}

/// What one iteration hands to the next.
struct Iterate<'a, A, M> {
    apply: Operator<'a, A>,
    precondition: Operator<'a, M>,
    b: &'a Tensor,
    x: Tensor,
    r: Tensor,
    /// Whether `r` is `b - A x` itself and not the recursion.
    exact: bool,
    /// The last direction with its `<r, z>`.
    previous: Option<(Tensor, f64)>,
    /// The largest `|A p| / |p|` so far.
    scale: f64,
}

impl<'a, A, M> Iterate<'a, A, M>
where
    A: FnMut(&Tensor) -> Result<Tensor>,
    M: FnMut(&Tensor) -> Result<Tensor>,
{
    fn new(apply: A, precondition: M, b: &'a Tensor, start: Option<&Tensor>) -> Result<Self> {
        let mut state = Self {
            apply: Operator {
                name: "A x",
                apply,
                like: b,
            },
            precondition: Operator {
                name: "M r",
                apply: precondition,
                like: b,
            },
            b,
            x: b.zeros_like()?,
            r: b.clone(),
            exact: true,
            previous: None,
            scale: 0.0,
        };
        if let Some(start) = start {
            same_form("start", start, b)?;
            check_vector("start", start)?;
            state.x = start.detach();
            state.restart()?;
        }
        Ok(state)
    }

    /// Forgets the recursion: the residual from `x`, and no direction.
    fn restart(&mut self) -> Result<()> {
        self.r = (self.b - self.apply.call(&self.x)?)?;
        (self.exact, self.previous) = (true, None);
        Ok(())
    }

    /// One iteration; false, with nothing changed, where the direction has no curvature.
    fn step(&mut self, iteration: usize) -> Result<bool> {
        let z = self.precondition.call(&self.r)?;
        let rz = dot(&self.r, &z)?;
        if rz.is_nan() || rz <= 0.0 {
            let value = rz / sum_squares(&self.r)?;
            return Err(not_positive(
                "preconditioner of conjugate gradient",
                iteration,
                value,
            ));
        }
        let p = match &self.previous {
            None => z,
            Some((p, before)) => add_scaled(&z, rz / before, p)?,
        };
        let ap = self.apply.call(&p)?;
        let Some(curvature) = curvature(&p, &ap, &mut self.scale, iteration)? else {
            return Ok(false);
        };
        self.x = add_scaled(&self.x, rz / curvature, &p)?;
        self.r = add_scaled(&self.r, -rz / curvature, &ap)?;
        (self.previous, self.exact) = (Some((p, rz)), false);
        Ok(true)
    }
}

/// `<p, A p>`; nothing where it is zero within rounding. `scale` is the largest `|A p| / |p|` so
/// far: in the null space `A p` itself is rounding.
fn curvature(p: &Tensor, ap: &Tensor, scale: &mut f64, iteration: usize) -> Result<Option<f64>> {
    let (value, squares) = (dot(p, ap)?, sum_squares(p)?);
    check_residual(METHOD, iteration, value.abs(), f64::MAX)?;
    *scale = scale.max((sum_squares(ap)? / squares).sqrt());
    let rounding = 4.0 * epsilon(p.dtype()) * *scale * squares;
    if value < -rounding {
        return Err(not_positive(METHOD, iteration, value / squares));
    }
    Ok((value > rounding).then_some(value))
}

fn not_positive(method: &'static str, iteration: usize, value: f64) -> Error {
    if value.is_nan() {
        return Error::Diverged {
            method,
            iteration,
            residual: value,
        };
    }
    Error::NegativeCurvature {
        method,
        iteration,
        value,
    }
}

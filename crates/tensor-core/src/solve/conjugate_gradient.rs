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
    let mut apply = Operator {
        name: "A x",
        apply,
        like: b,
    };
    let mut precondition = Operator {
        name: "M r",
        apply: precondition,
        like: b,
    };
    let b_norm = norm(b)?;
    if b_norm == 0.0 {
        return Ok(Solution {
            x: b.zeros_like()?,
            residuals: vec![0.0],
            iterations: 0,
            converged: true,
        });
    }
    let (mut x, mut r) = match start {
        None => (b.zeros_like()?, b.clone()),
        Some(start) => {
            same_form("start", start, b)?;
            check_vector("start", start)?;
            (start.detach(), (b - apply.call(&start.detach())?)?)
        }
    };
    let goal = config.tolerance * b_norm;
    let (mut residuals, mut iterations, mut converged) = (Vec::new(), 0, false);
    // Whether `r` is b - A x itself; its norm when that was last so; the direction with <r, z>.
    let (mut exact, mut last_exact, mut previous) = (true, f64::INFINITY, None::<(Tensor, f64)>);
    let mut scale = 0.0;
    loop {
        let mut size = norm(&r)?;
        if size <= goal && !exact {
            r = (b - apply.call(&x)?)?;
            size = norm(&r)?;
            (exact, previous) = (true, None);
        }
        check_residual(METHOD, iterations, size / b_norm, f64::INFINITY)?;
        residuals.push(size / b_norm);
        converged |= size <= goal;
        let stagnates = exact && size > 0.5 * last_exact;
        if converged || stagnates || iterations == config.max_iterations {
            break;
        }
        if exact && iterations > 0 {
            last_exact = size;
        }
        let z = precondition.call(&r)?;
        let rz = dot(&r, &z)?;
        if rz.is_nan() || rz <= 0.0 {
            return Err(not_positive(
                "preconditioner of conjugate gradient",
                iterations,
                rz / (size * size),
            ));
        }
        let p = match &previous {
            None => z,
            Some((p, before)) => add_scaled(&z, rz / before, p)?,
        };
        let ap = apply.call(&p)?;
        let Some(curvature) = curvature(&p, &ap, &mut scale, iterations)? else {
            break;
        };
        x = add_scaled(&x, rz / curvature, &p)?;
        r = add_scaled(&r, -rz / curvature, &ap)?;
        (previous, exact) = (Some((p, rz)), false);
        iterations += 1;
    }
    tracing::debug!(
        iterations,
        converged,
        residual = residuals.last(),
        "conjugate gradient"
    );
    Ok(Solution {
        x,
        residuals,
        iterations,
        converged,
    })
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

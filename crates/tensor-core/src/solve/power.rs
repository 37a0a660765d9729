//! Power iteration: the eigenvalue of largest magnitude.
//!
//! `v_{k+1} = A v_k / |A v_k|` from a random start, with the Rayleigh quotient `<v, A v>` as
//! eigenvalue. Converges like the ratio of the two largest magnitudes; where two of opposite sign
//! share the largest magnitude it does not, and says so. [`lanczos`](super::lanczos) needs fewer
//! applications and more memory.

use super::{
    add_scaled, check_limits, check_residual, check_vector, norm, random_unit, EigenPair, Operator,
};
use crate::kernels::dot;
use crate::random::RandomStream;
use crate::Result;
use candle_core::Tensor;

const METHOD: &str = "power iteration";

/// Settings of [`power_iteration`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PowerConfig {
    /// Stop when `|A v - value v| <= tolerance |A v|`.
    pub tolerance: f64,
    /// Applications of `A`, at most.
    pub max_iterations: usize,
}

impl Default for PowerConfig {
    fn default() -> Self {
        Self {
            tolerance: 1e-4,
            max_iterations: 1000,
        }
    }
}

impl PowerConfig {
    /// Refuses settings that make no sense.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) for a negative or non-finite
    /// tolerance or no iterations.
    pub fn validate(&self) -> Result<()> {
        check_limits(self.tolerance, self.max_iterations)
    }
}

/// What [`power_iteration`] found.
#[derive(Debug, Clone)]
pub struct Dominant {
    /// The eigenvalue of largest magnitude with its vector.
    pub pair: EigenPair,
    /// `|A v - value v| / |A v|` per application.
    pub residuals: Vec<f64>,
    /// Applications of `A`.
    pub iterations: usize,
    /// Whether the tolerance was met.
    pub converged: bool,
}

/// The eigenvalue of largest magnitude of a symmetric operator on tensors of the form of `like`
/// (whose values are not used). `apply` is `x -> A x`. An operator that maps the start to zero is
/// taken for the zero operator.
///
/// # Errors
/// [`Error::Diverged`](crate::Error::Diverged) when the operator returns numbers that are not
/// finite; errors for a `like` that is empty or not f32 or f64; those of `apply`.
pub fn power_iteration<A>(
    apply: A,
    like: &Tensor,
    config: &PowerConfig,
    stream: &mut RandomStream,
) -> Result<Dominant>
where
    A: FnMut(&Tensor) -> Result<Tensor>,
{
    config.validate()?;
    let like = &like.zeros_like()?;
    check_vector("like", like)?;
    let mut apply = Operator {
        name: "A x",
        apply,
        like,
    };
    let mut vector = random_unit(like, stream)?;
    let (mut residuals, mut iterations) = (Vec::new(), 0);
    loop {
        let image = apply.call(&vector)?;
        iterations += 1;
        let (size, value) = (norm(&image)?, dot(&vector, &image)?);
        check_residual(METHOD, iterations, size, f64::MAX)?;
        let distance = norm(&add_scaled(&image, -value, &vector)?)?;
        let residual = if size > 0.0 { distance / size } else { 0.0 };
        residuals.push(residual);
        let converged = residual <= config.tolerance;
        if converged || iterations == config.max_iterations {
            tracing::debug!(iterations, converged, residual, value, "power iteration");
            let pair = EigenPair {
                value,
                vector,
                residual,
            };
            return Ok(Dominant {
                pair,
                residuals,
                iterations,
                converged,
            });
        }
        vector = (image / size)?;
    }
}

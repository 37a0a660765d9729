//! Iterative solvers on candle tensors and an operator given as a closure.
//!
//! | function | solves | needs |
//! | --- | --- | --- |
//! | [`conjugate_gradient`] | `A x = b` | `A` symmetric positive (semi-)definite |
//! | [`neumann`] | `A x = b` | spectral radius of `I - step A` below 1 |
//! | [`power_iteration`] | the eigenvalue of largest magnitude | `A` symmetric |
//! | [`lanczos`] | both ends of the spectrum | `A` symmetric |
//! | [`picard`] | `x = g(x)` | `g` a contraction (or damped enough) |
//! | [`anderson`] | `x = g(x)` | the same, in fewer evaluations |
//!
//! Vectors are tensors of any one shape (usually flat) in f32 or f64, on any device; operators
//! must return that shape and dtype. Scalars are `f64`, and sums are taken in a fixed order. What
//! an operator returns is cut from its graph. All tolerances are relative. Every solver returns
//! its residual history and whether it converged: a cap that was reached is not an error, numbers
//! that are not finite or grow without bound are ([`Error::Diverged`]).
//!
//! ```
//! use candle_core::{Device, Tensor};
//! use thalweg_tensor_core::solve::{conjugate_gradient, CgConfig};
//!
//! let a = Tensor::new(&[[4.0_f64, 1.0], [1.0, 3.0]], &Device::Cpu)?;
//! let b = Tensor::new(&[1.0_f64, 2.0], &Device::Cpu)?;
//! let apply = |x: &Tensor| Ok(a.matmul(&x.reshape((2, 1))?)?.flatten_all()?);
//! let solution = conjugate_gradient(apply, &b, None, &CgConfig::default())?;
//! assert!(solution.converged && solution.iterations == 2);
//! let x = solution.x.to_vec1::<f64>()?;
//! assert!((x[0] - 1.0 / 11.0).abs() < 1e-12 && (x[1] - 7.0 / 11.0).abs() < 1e-12);
//! # Ok::<(), thalweg_tensor_core::Error>(())
//! ```

mod conjugate_gradient;
mod fixed_point;
mod lanczos;
mod neumann;
mod power;

pub use conjugate_gradient::{conjugate_gradient, preconditioned_conjugate_gradient, CgConfig};
pub use fixed_point::{anderson, picard, AndersonConfig, PicardConfig};
pub use lanczos::{lanczos, LanczosConfig, Spectrum};
pub use neumann::{neumann, NeumannConfig};
pub use power::{power_iteration, Dominant, PowerConfig};

use crate::autograd::epsilon;
use crate::kernels::{moments, sum_squares, GradMap};
use crate::random::RandomStream;
use crate::{Error, Result};
use candle_core::{DType, Tensor};

/// What a solver of an equation found.
#[derive(Debug, Clone)]
pub struct Solution {
    /// The last iterate.
    pub x: Tensor,
    /// Relative residuals: that of the start first, that of `x` last.
    pub residuals: Vec<f64>,
    /// Iterations made.
    pub iterations: usize,
    /// Whether the tolerance was met.
    pub converged: bool,
}

/// An eigenvalue with its eigenvector.
#[derive(Debug, Clone)]
pub struct EigenPair {
    /// The eigenvalue.
    pub value: f64,
    /// The eigenvector, of Euclidean norm 1.
    pub vector: Tensor,
    /// `|A v - value v|`, relative to the largest eigenvalue that the solver has seen.
    pub residual: f64,
}

/// A closure with the shape and dtype that its results must have.
struct Operator<'a, F> {
    name: &'static str,
    apply: F,
    like: &'a Tensor,
}

impl<F: FnMut(&Tensor) -> Result<Tensor>> Operator<'_, F> {
    fn call(&mut self, x: &Tensor) -> Result<Tensor> {
        let out = (self.apply)(x)?.detach();
        same_form(self.name, &out, self.like)?;
        Ok(out)
    }
}

fn same_form(name: &str, tensor: &Tensor, like: &Tensor) -> Result<()> {
    if tensor.dims() != like.dims() {
        return Err(Error::ShapeMismatch {
            name: name.to_string(),
            got: tensor.dims().to_vec(),
            expected: like.dims().to_vec(),
        });
    }
    if tensor.dtype() != like.dtype() {
        return Err(Error::DTypeMismatch {
            name: name.to_string(),
            got: tensor.dtype(),
            expected: format!("{:?}", like.dtype()),
        });
    }
    Ok(())
}

/// Refuses what no solver can start from.
fn check_vector(name: &'static str, tensor: &Tensor) -> Result<()> {
    if !matches!(tensor.dtype(), DType::F32 | DType::F64) {
        return Err(Error::DTypeMismatch {
            name: name.to_string(),
            got: tensor.dtype(),
            expected: "F32 or F64".to_string(),
        });
    }
    if tensor.elem_count() == 0 {
        return Err(Error::invalid(
            name,
            "an empty tensor",
            "at least one element",
        ));
    }
    let nonfinite: u64 = moments(&[(None, tensor, GradMap::default())])?
        .iter()
        .map(|m| m.nonfinite)
        .sum();
    if nonfinite > 0 {
        let value = format!("{nonfinite} entries that are NaN or infinite");
        return Err(Error::invalid(name, value, "finite numbers"));
    }
    Ok(())
}

fn check_limits(tolerance: f64, max_iterations: usize) -> Result<()> {
    if !(tolerance.is_finite() && tolerance >= 0.0) {
        return Err(Error::invalid(
            "tolerance",
            tolerance,
            "a finite number >= 0",
        ));
    }
    if max_iterations == 0 {
        return Err(Error::invalid("max_iterations", 0, "at least 1"));
    }
    Ok(())
}

fn check_growth(max_growth: f64) -> Result<()> {
    if max_growth.is_nan() || max_growth <= 1.0 {
        return Err(Error::invalid("max_growth", max_growth, "a number > 1"));
    }
    Ok(())
}

/// An error unless `residual` is a number that has not grown beyond `limit`.
fn check_residual(method: &'static str, iteration: usize, residual: f64, limit: f64) -> Result<()> {
    if residual.is_finite() && residual <= limit {
        return Ok(());
    }
    Err(Error::Diverged {
        method,
        iteration,
        residual,
    })
}

fn norm(x: &Tensor) -> Result<f64> {
    Ok(sum_squares(x)?.sqrt())
}

/// `x + a y`.
fn add_scaled(x: &Tensor, a: f64, y: &Tensor) -> Result<Tensor> {
    Ok((x + (y * a)?)?)
}

/// A random direction of norm 1 with the form of `like`.
fn random_unit(like: &Tensor, stream: &mut RandomStream) -> Result<Tensor> {
    loop {
        let x = stream.normal(0.0, 1.0, like.shape(), like.dtype(), like.device())?;
        let length = norm(&x)?;
        // Zero only by rounding; the next draw is another one.
        if length > 0.0 {
            return Ok((x / length)?);
        }
    }
}

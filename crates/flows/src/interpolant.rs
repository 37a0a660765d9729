//! Paths between a source sample `x0` and a target sample `x1`: `x_t = alpha_t x1 + beta_t x0`.

use crate::error::{check, Error, Result};
use crate::velocity::column;
use candle_core::Tensor;

/// The path's coefficients and their derivatives at times `[rows]`, each `[rows]`.
#[derive(Debug, Clone)]
pub struct Coefficients {
    /// Of the target sample.
    pub alpha: Tensor,
    /// Of the source sample.
    pub beta: Tensor,
    /// Derivative of `alpha`.
    pub d_alpha: Tensor,
    /// Derivative of `beta`.
    pub d_beta: Tensor,
}

/// A path.
pub trait Interpolant {
    /// The coefficients at times `[rows]`.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for bad parameters; those of candle.
    fn coefficients(&self, t: &Tensor) -> Result<Coefficients>;
}

/// The straight path of rectified flow: `alpha = t`, `beta = 1 - t`.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Linear;

impl Interpolant for Linear {
    fn coefficients(&self, t: &Tensor) -> Result<Coefficients> {
        let one = t.ones_like()?;
        Ok(Coefficients {
            alpha: t.clone(),
            beta: t.affine(-1.0, 1.0)?,
            d_beta: one.neg()?,
            d_alpha: one,
        })
    }
}

/// The path of the variance-preserving equation: `alpha = exp(-a (1-t)^2 / 4 - b (1-t) / 2)`,
/// `beta = sqrt(1 - alpha^2)`. The derivative of `beta` diverges at `t = 1`: times above
/// `1 - 1e-5` are read as that.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct VpOde {
    /// The quadratic rate.
    pub a: f64,
    /// The linear rate.
    pub b: f64,
}

impl Default for VpOde {
    fn default() -> Self {
        Self { a: 19.9, b: 0.1 }
    }
}

/// `alpha` and its derivative.
fn vp_alpha(a: f64, b: f64, t: &Tensor) -> Result<(Tensor, Tensor)> {
    check::positive("a", a)?;
    check::positive("b", b)?;
    let rest = t.affine(-1.0, 1.0)?;
    let exponent = (rest.sqr()?.affine(-0.25 * a, 0.0)? + rest.affine(-0.5 * b, 0.0)?)?;
    let alpha = exponent.exp()?;
    let d_alpha = (&alpha * rest.affine(0.5 * a, 0.5 * b)?)?;
    Ok((alpha, d_alpha))
}

impl Interpolant for VpOde {
    fn coefficients(&self, t: &Tensor) -> Result<Coefficients> {
        let t = t.minimum(1.0 - 1e-5)?;
        let (alpha, d_alpha) = vp_alpha(self.a, self.b, &t)?;
        let beta = alpha.sqr()?.affine(-1.0, 1.0)?.sqrt()?;
        let d_beta = ((&alpha * &d_alpha)? / &beta)?.neg()?;
        Ok(Coefficients {
            alpha,
            beta,
            d_alpha,
            d_beta,
        })
    }
}

/// The sub-variance-preserving path: `alpha` as in [`VpOde`], `beta = 1 - alpha^2`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SubVpOde {
    /// The quadratic rate.
    pub a: f64,
    /// The linear rate.
    pub b: f64,
}

impl Default for SubVpOde {
    fn default() -> Self {
        Self { a: 19.9, b: 0.1 }
    }
}

impl Interpolant for SubVpOde {
    fn coefficients(&self, t: &Tensor) -> Result<Coefficients> {
        let (alpha, d_alpha) = vp_alpha(self.a, self.b, t)?;
        Ok(Coefficients {
            beta: alpha.sqr()?.affine(-1.0, 1.0)?,
            d_beta: (&alpha * &d_alpha)?.affine(-2.0, 0.0)?,
            alpha,
            d_alpha,
        })
    }
}

/// A quarter of a circle: `alpha = sin(pi t / 2)`, `beta = cos(pi t / 2)`.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Cosine;

impl Interpolant for Cosine {
    fn coefficients(&self, t: &Tensor) -> Result<Coefficients> {
        let quarter = std::f64::consts::FRAC_PI_2;
        let angle = t.affine(quarter, 0.0)?;
        let (alpha, beta) = (angle.sin()?, angle.cos()?);
        Ok(Coefficients {
            d_alpha: beta.affine(quarter, 0.0)?,
            d_beta: alpha.affine(-quarter, 0.0)?,
            alpha,
            beta,
        })
    }
}

/// The point of the path at times `t` `[rows]` and its velocity, both like `x0` `[rows, ...]`.
///
/// # Errors
/// [`Error::Shape`] when the shapes do not fit together.
pub fn interpolate(
    path: &dyn Interpolant,
    x0: &Tensor,
    x1: &Tensor,
    t: &Tensor,
) -> Result<(Tensor, Tensor)> {
    check::same_shape("x1", x1, x0)?;
    if t.rank() != 1 {
        return Err(Error::shape("t", t.dims(), "[rows]"));
    }
    let c = path.coefficients(t)?;
    let mixed = |a: &Tensor, b: &Tensor| -> Result<Tensor> {
        let (a, b) = (column(a, x1)?, column(b, x0)?);
        Ok((x1.broadcast_mul(&a)? + x0.broadcast_mul(&b)?)?)
    };
    Ok((mixed(&c.alpha, &c.beta)?, mixed(&c.d_alpha, &c.d_beta)?))
}

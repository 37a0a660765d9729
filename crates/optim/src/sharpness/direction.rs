//! The directions, pass by pass.

use super::vectors::{combine, dot, norm};
use super::Sharpness;
use crate::closure::loss_value;
use crate::{Error, Result};
use candle_core::Tensor;
use tensor_core::params::{Params, Snapshot};

/// Added to norms in denominators.
const TINY: f64 = 1e-12;

/// A loss to be evaluated at perturbed parameters. The parameters start from `start` in every
/// pass; whoever made this puts them back at the end.
pub(super) struct Landscape<'a> {
    pub params: &'a Params,
    pub start: &'a Snapshot,
    pub loss: &'a mut dyn FnMut() -> candle_core::Result<Tensor>,
    pub before_pass: Option<&'a mut (dyn FnMut(usize) + Send + 'static)>,
    /// Passes so far.
    pub passes: usize,
    /// Which parameters had a gradient in some pass.
    pub present: Vec<bool>,
}

impl Landscape<'_> {
    /// Loss and gradient at the present parameters.
    pub(super) fn evaluate(&mut self) -> Result<(f64, Vec<Tensor>)> {
        if let Some(hook) = self.before_pass.as_deref_mut() {
            hook(self.passes);
        }
        let loss = (self.loss)()?;
        let value = loss_value(&loss, format!("the loss of pass {}", self.passes))?;
        let store = loss.backward()?;
        self.passes += 1;
        for (present, (_, var)) in self.present.iter_mut().zip(self.params.named()) {
            *present |= store.get(var).is_some();
        }
        Ok((value, self.params.gradients(&store)?))
    }

    /// Loss and gradient at `start + scale * direction`.
    fn at(&mut self, scale: f64, direction: &[Tensor]) -> Result<(f64, Vec<Tensor>)> {
        self.params.restore(self.start)?;
        self.params.axpy(scale, direction)?;
        self.evaluate()
    }

    /// The norm of a gradient, which must be a number.
    pub(super) fn finite_norm(&self, gradient: &[Tensor]) -> Result<f64> {
        let norm = norm(gradient)?;
        if norm.is_finite() {
            return Ok(norm);
        }
        let mut bad = Vec::new();
        for ((name, _), gradient) in self.params.named().iter().zip(gradient) {
            if !tensor_core::kernels::sum_squares(gradient)?.is_finite() {
                bad.push(format!("`{name}`"));
            }
        }
        Err(Error::NonFiniteGradient(bad))
    }
}

/// A direction, and the loss at the first perturbed point.
pub(super) struct Direction {
    pub direction: Vec<Tensor>,
    pub perturbed_loss: f64,
}

impl Sharpness {
    /// The direction of a step from the gradient `g` at the start, with radius `rho`.
    pub(super) fn direction(
        &self,
        land: &mut Landscape<'_>,
        rho: f64,
        g: Vec<Tensor>,
    ) -> Result<Direction> {
        let size = land.finite_norm(&g)?;
        match *self {
            Self::Sam { .. } => {
                let (perturbed_loss, direction) = land.at(rho / (size + TINY), &g)?;
                Ok(Direction {
                    direction,
                    perturbed_loss,
                })
            }
            Self::Asam { eta, .. } => {
                let (perturbed_loss, direction) = adaptive(land, rho, eta, &g)?;
                Ok(Direction {
                    direction,
                    perturbed_loss,
                })
            }
            Self::Gsam {
                alpha,
                adaptive: in_metric,
                ..
            } => {
                let (perturbed_loss, gp) = if in_metric {
                    adaptive(land, rho, 0.0, &g)?
                } else {
                    land.at(rho / (size + TINY), &g)?
                };
                let direction = minus_orthogonal(&gp, alpha, &g, land)?;
                Ok(Direction {
                    direction,
                    perturbed_loss,
                })
            }
            Self::Sagm { alpha, .. } => {
                let (perturbed_loss, gp) = land.at(rho / (size + TINY) - alpha, &g)?;
                Ok(Direction {
                    direction: combine(0.5, &g, 0.5, &gp)?,
                    perturbed_loss,
                })
            }
            Self::Gam {
                norm_rho,
                beta0,
                beta1,
                gamma,
                ..
            } => {
                let (perturbed_loss, g1) = land.at(rho / (size + TINY), &g)?;
                // To where the gradient norm grows, and once more to where the loss grows there.
                let u = combine(1.0, &g1, -1.0, &g)?;
                let to_norm = norm_rho / (land.finite_norm(&u)? + TINY);
                let (_, g2) = land.at(to_norm, &u)?;
                let to_loss = rho / (land.finite_norm(&g2)? + TINY);
                let both = combine(to_norm, &u, to_loss, &g2)?;
                let (_, g3) = land.at(1.0, &both)?;
                let m = combine(1.0, &g, 1.0 - beta0, &g2)?;
                let n = combine(beta1, &g1, 1.0 - beta1, &g3)?;
                Ok(Direction {
                    direction: minus_orthogonal(&n, gamma, &m, land)?,
                    perturbed_loss,
                })
            }
        }
    }
}

/// The gradient at `theta + rho T^2 g / |T g|` with `T = |theta| + eta`.
fn adaptive(
    land: &mut Landscape<'_>,
    rho: f64,
    eta: f64,
    g: &[Tensor],
) -> Result<(f64, Vec<Tensor>)> {
    let (mut scaled, mut twice) = (Vec::with_capacity(g.len()), Vec::with_capacity(g.len()));
    for (theta, g) in land.start.tensors().iter().zip(g) {
        let t = theta.abs()?.affine(1.0, eta)?;
        let tg = (&t * g)?;
        twice.push((t * &tg)?);
        scaled.push(tg);
    }
    let size = land.finite_norm(&scaled)?;
    land.at(rho / (size + TINY), &twice)
}

/// `n - weight v`, where `v` is the part of `m` that is orthogonal to `n`.
fn minus_orthogonal(
    n: &[Tensor],
    weight: f64,
    m: &[Tensor],
    land: &Landscape<'_>,
) -> Result<Vec<Tensor>> {
    let (size_m, size_n) = (land.finite_norm(m)?, land.finite_norm(n)?);
    let cosine = dot(m, n)? / (size_m * size_n + TINY);
    let along = cosine * size_m / (size_n + TINY);
    combine(1.0 + weight * along, n, -weight, m)
}

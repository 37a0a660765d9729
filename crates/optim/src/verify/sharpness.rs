//! The reference of the sharpness methods, which shares a file with a later method.

use super::bad;
use crate::sgd::{SgdConfig, SgdMomentum};
use crate::sharpness::{Sharpness, SharpnessAware};
use crate::{ClosureOptimizer, Result};
use candle_core::{DType, Tensor, Var, D};
use candle_nn::Optimizer;
use tensor_core::verify::{Reference, Tolerance};

const TOLERANCE: Tolerance = Tolerance::Mixed(1e-9);

/// Checks the plain gradient and one step of each method; names the `udim_*` tensors as
/// uncovered.
///
/// # Errors
/// An error when the file lacks an input; a difference is a failed comparison instead.
pub fn sharpness(reference: &mut Reference) -> Result<()> {
    let rho: f64 = reference.number("rho")?;
    let kinds = [
        ("sam_theta", Sharpness::Sam { rho }),
        (
            "asam_theta",
            Sharpness::Asam {
                rho: reference.number("asam_rho")?,
                eta: reference.number("asam_eta")?,
            },
        ),
        (
            "gsam_theta",
            Sharpness::Gsam {
                rho,
                alpha: reference.number("gsam_alpha")?,
                adaptive: false,
            },
        ),
        (
            "sagm_theta",
            Sharpness::Sagm {
                rho,
                alpha: reference.number("sagm_alpha")?,
            },
        ),
        (
            "gam_theta",
            Sharpness::Gam {
                rho: reference.number("gam_rho")?,
                norm_rho: reference.number("gam_norm_rho")?,
                beta0: reference.number("gam_beta0")?,
                beta1: reference.number("gam_beta1")?,
                gamma: reference.number("gam_gamma")?,
            },
        ),
    ];
    let net = Net::read(reference)?;
    let start = net.flat()?;
    reference.compare_tensor("theta0", &start, Tolerance::Absolute(0.0))?;
    let grads = net.loss()?.backward()?;
    let mut plain = Vec::new();
    for var in &net.vars {
        let grad = grads.get(var);
        plain.push(grad.ok_or_else(|| bad(reference, "a weight gets no gradient"))?);
    }
    let plain: candle_core::Result<Vec<Tensor>> = plain.iter().map(|g| g.flatten_all()).collect();
    reference.compare_tensor("sgd_grad", &Tensor::cat(&plain?, 0)?, TOLERANCE)?;

    let lr: f64 = reference.number("lr")?;
    for (name, kind) in kinds {
        if !reference.has(name) {
            continue;
        }
        let net = Net::read(reference)?;
        let config = SgdConfig {
            lr,
            momentum: 0.0,
            ..SgdConfig::default()
        };
        let sgd = SgdMomentum::new(net.vars.clone(), config)?;
        let mut sharp = SharpnessAware::new(net.vars.clone(), kind, sgd)?;
        sharp.step(&mut || net.loss())?;
        reference.compare_tensor(name, &net.flat()?, TOLERANCE)?;
    }
    for name in reference.names() {
        if name.starts_with("udim_") {
            reference.uncovered(&name, "unknown domain inconsistency minimization")?;
        }
    }
    Ok(())
}

/// `h = tanh(x w1^T + b1)`, `z = h w2^T + b2`, mean cross entropy; flat order w1, b1, w2, b2.
struct Net {
    x: Tensor,
    y: Tensor,
    vars: Vec<Var>,
}

impl Net {
    fn read(reference: &mut Reference) -> Result<Self> {
        let mut vars = Vec::new();
        for name in ["w1", "b1", "w2", "b2"] {
            let tensor = reference.input(name)?.tensor(DType::F64)?;
            vars.push(Var::from_tensor(&tensor)?);
        }
        Ok(Self {
            x: reference.input("x")?.tensor(DType::F64)?,
            y: reference.input("y")?.tensor(DType::U32)?,
            vars,
        })
    }

    fn loss(&self) -> candle_core::Result<Tensor> {
        let layer = |x: &Tensor, i: usize| {
            x.matmul(&self.vars[i].t()?)?
                .broadcast_add(&self.vars[i + 1])
        };
        let z = layer(&layer(&self.x, 0)?.tanh()?, 2)?;
        let shifted = z.broadcast_sub(&z.detach().max_keepdim(D::Minus1)?)?;
        let log_sum = shifted.exp()?.sum_keepdim(D::Minus1)?.log()?;
        let log_p = shifted.broadcast_sub(&log_sum)?;
        log_p.gather(&self.y.unsqueeze(1)?, 1)?.mean_all()?.neg()
    }

    fn flat(&self) -> Result<Tensor> {
        let parts: candle_core::Result<Vec<Tensor>> = self
            .vars
            .iter()
            .map(|var| var.detach().flatten_all())
            .collect();
        Ok(Tensor::cat(&parts?, 0)?)
    }
}

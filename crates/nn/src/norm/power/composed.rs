//! The path of candle operations, for devices without a fused kernel.

use super::config::{BackwardDenominator, PowerNormConfig};
use super::group_scaling::GroupScaling;
use super::kernel::GROUP_EPS;
use super::rows::Rows;
use super::state::{check_finite, State, BACKWARD_HINT, FORWARD_HINT};
use crate::kernel::host;
use crate::Result;
use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp3, Layout, MetalStorage, Module, Shape, Tensor,
};
use std::sync::Arc;

/// `weight` and `bias` `[C]` in the dtype of the rows.
pub(super) fn forward(
    config: &PowerNormConfig,
    state: &Arc<State>,
    rows: &Rows,
    weight: &Tensor,
    bias: &Tensor,
    train: bool,
) -> Result<Tensor> {
    let h = match config.group_scaling {
        true => GroupScaling {
            groups: config.groups,
            eps: GROUP_EPS,
        }
        .forward(&rows.x)?,
        false => rows.x.clone(),
    };
    let tokens = match (&rows.keep, train) {
        (Some(keep), true) => host(&keep.sum_all()?)?.first().copied().unwrap_or(0.0),
        _ => rows.x.dim(0)? as f64,
    };
    let scaled = if train && tokens > 0.0 {
        training(config, state, &h, weight, rows.keep.as_ref(), tokens)?
    } else {
        let phi = state.phi.as_detached_tensor();
        h.broadcast_mul(&inverse(&phi, config.eps)?)?
            .broadcast_mul(weight)?
    };
    Ok(scaled.broadcast_add(bias)?)
}

fn inverse(v: &Tensor, eps: f64) -> Result<Tensor> {
    Ok((v + eps)?.sqrt()?.recip()?)
}

fn training(
    config: &PowerNormConfig,
    state: &Arc<State>,
    h: &Tensor,
    weight: &Tensor,
    keep: Option<&Tensor>,
    tokens: f64,
) -> Result<Tensor> {
    let fixed = h.detach();
    let squares = fixed.sqr()?;
    let squares = match keep {
        Some(keep) => squares.broadcast_mul(&keep.unsqueeze(1)?)?,
        None => squares,
    };
    let q = (squares.sum(0)? / tokens)?;
    if config.check_finite {
        check_finite("the quadratic means of the batch", &host(&q)?, FORWARD_HINT)?;
    }
    let _guard = state.lock();
    let t = state.iters()? + 1;
    let phi = state.phi.as_detached_tensor().copy()?;
    let d = if t <= config.warmup_iters { &q } else { &phi };
    let inv_d = inverse(d, config.eps)?;
    let z = fixed.broadcast_mul(&inv_d)?;
    let node = Approximate {
        config: config.clone(),
        state: state.clone(),
        z: z.clone(),
        inv_q: match config.denominator {
            BackwardDenominator::BatchQuadraticMean => inverse(&q, config.eps)?,
            BackwardDenominator::RunningQuadraticMean => inv_d,
        },
    };
    let steps = t as f64;
    let average = match t < config.warmup_iters {
        true => ((&phi * ((steps - 1.0) / steps))? + (&q / steps)?)?,
        false => phi,
    };
    let next = ((average * config.alpha_fwd)? + (q * (1.0 - config.alpha_fwd))?)?;
    state.phi.set(&next)?;
    state.set_iters(t)?;
    let value = z.broadcast_mul(&weight.detach())?;
    Ok(h.apply_op3(weight, &value, node)?)
}

/// Takes `(h, weight, z weight)` to `z weight`, with the approximate gradient for `h` and the
/// exact one for the weight. The weight is an argument so that the statistic moves also where the
/// input needs no gradient.
struct Approximate {
    config: PowerNormConfig,
    state: Arc<State>,
    z: Tensor,
    inv_q: Tensor,
}

impl Approximate {
    fn gradients(&self, weight: &Tensor, dy: &Tensor) -> Result<(Tensor, Tensor)> {
        let (config, state, z) = (&self.config, &self.state, &self.z);
        let (weight, dy) = (weight.detach(), dy.detach());
        let _guard = state.lock();
        let nu = state.ema_gz.as_detached_tensor().copy()?;
        let keep = 1.0 - config.alpha_bkw;
        let rows = z.dim(0)? as f64;
        let dweight = (&dy * z)?.sum(0)?;
        let lambda = ((&dweight * &weight)? / rows)?;
        let gamma = z.sqr()?.mean(0)?;
        let gamma = match config.max_gamma {
            Some(bound) => gamma.minimum(bound)?,
            None => gamma,
        };
        let gh = (dy.broadcast_mul(&weight)? - z.broadcast_mul(&(&nu * keep)?)?)?;
        let next = ((&nu + lambda)? - ((nu * gamma)? * keep)?)?;
        if config.check_finite {
            check_finite("the running `ema_gz`", &host(&next)?, BACKWARD_HINT)?;
        }
        state.ema_gz.set(&next)?;
        Ok((gh.broadcast_mul(&self.inv_q)?, dweight))
    }
}

/// A copy of the value by an operation that every backend has.
fn copy<S: BackendStorage>(storage: &S, layout: &Layout) -> candle_core::Result<(S, Shape)> {
    Ok((storage.affine(layout, 1.0, 0.0)?, layout.shape().clone()))
}

impl CustomOp3 for Approximate {
    fn name(&self) -> &'static str {
        "power-norm-approximate"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        value: &CpuStorage,
        layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        copy(value, layout)
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        value: &CudaStorage,
        layout: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        copy(value, layout)
    }

    fn metal_fwd(
        &self,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
        value: &MetalStorage,
        layout: &Layout,
    ) -> candle_core::Result<(MetalStorage, Shape)> {
        copy(value, layout)
    }

    fn bwd(
        &self,
        _: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (dh, dweight) = self.gradients(weight, grad)?;
        Ok((Some(dh), Some(dweight), None))
    }
}

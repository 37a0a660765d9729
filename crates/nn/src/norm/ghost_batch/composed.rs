//! The path of candle operations: for devices without a fused kernel and for second derivatives.

use super::kernel::Geometry;
use crate::kernel::vector;
use crate::Result;
use candle_core::Tensor;

/// Normalizes `x` `[B, C, S]` group by group; returns `([B, C, S], mean [k, C], variance [k, C])`,
/// the statistics detached.
pub(super) fn normalize(
    x: &Tensor,
    geometry: Geometry,
    groups: &[usize],
    eps: f64,
    remove_mean: bool,
) -> Result<(Tensor, Tensor, Tensor)> {
    let Geometry { channels, spatial } = geometry;
    let (mut ys, mut means, mut vars) = (vec![], vec![], vec![]);
    let (mut start, mut rest) = (0, groups);
    while let Some(&size) = rest.first() {
        // Groups of the same size are one operation.
        let k = rest.iter().take_while(|n| **n == size).count();
        let part = x.narrow(0, start, k * size)?;
        let part = part.reshape((k, size, channels, spatial))?;
        let mean = part.mean_keepdim((1, 3))?;
        let centered = match remove_mean {
            true => part.broadcast_sub(&mean)?,
            false => part,
        };
        let var = centered.sqr()?.mean_keepdim((1, 3))?;
        let y = centered.broadcast_div(&(&var + eps)?.sqrt()?)?;
        ys.push(y.reshape((k * size, channels, spatial))?);
        means.push(mean.detach().reshape((k, channels))?);
        vars.push(var.detach().reshape((k, channels))?);
        start += k * size;
        rest = &rest[k..];
    }
    Ok((
        Tensor::cat(&ys, 0)?,
        Tensor::cat(&means, 0)?,
        Tensor::cat(&vars, 0)?,
    ))
}

/// `decay R + sum_j weights_j S_j` on the tensors' own device.
pub(super) fn take_in(
    running: &Tensor,
    statistics: &Tensor,
    decay: f64,
    weights: Vec<f64>,
) -> Result<Tensor> {
    let weights = vector(weights, running.dtype(), running.device())?.unsqueeze(0)?;
    let taken = weights.matmul(statistics)?.squeeze(0)?;
    Ok(((running * decay)? + taken)?)
}

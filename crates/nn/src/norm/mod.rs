//! Normalization layers, all with gradients.

mod fused;
pub mod ghost_batch;
mod group;
mod layer;
pub mod power;

pub use group::{group_norm, GroupNorm};
pub use layer::{layer_norm, rms_norm, LayerNorm, LayerNormConfig, RmsNorm};

use crate::Result;
use candle_nn::VarBuilder;

/// Batch norm over `channels` channels of `[B, C, ..]`: one group of the whole batch, whatever its
/// size. The variables of [`candle_nn::BatchNorm`]: `weight`, `bias`, `running_mean`,
/// `running_var`; checkpoints interchange. Call it with `forward_t(x, train)`.
///
/// # Errors
/// [`Error::InvalidConfig`](crate::Error::InvalidConfig), and candle's when variables do not fit.
pub fn batch_norm(
    channels: usize,
    eps: f64,
    vb: VarBuilder,
) -> Result<ghost_batch::GhostBatchNorm> {
    let config = ghost_batch::GhostBatchNormConfig {
        eps,
        ..ghost_batch::GhostBatchNormConfig::batch_norm()
    };
    ghost_batch::ghost_batch_norm(channels, config, vb)
}

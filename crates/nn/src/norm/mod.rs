//! Normalization layers, all with gradients.

mod fused;
pub mod ghost_batch;
mod group;
mod layer;
pub mod power;

pub use group::{group_norm, GroupNorm};
pub use layer::{layer_norm, rms_norm, LayerNorm, LayerNormConfig, RmsNorm};

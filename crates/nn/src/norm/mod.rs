//! Normalization layers, all with gradients.

pub mod ghost_batch;
mod layer;
pub mod power;

pub use layer::{layer_norm, rms_norm, LayerNorm, LayerNormConfig, RmsNorm};

//! Normalization layers, all with gradients.

mod layer;

pub use layer::{layer_norm, rms_norm, LayerNorm, LayerNormConfig, RmsNorm};

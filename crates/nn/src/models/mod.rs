//! Small reference networks that experiments and tests share.
//!
//! | network | input | output |
//! | --- | --- | --- |
//! | [`Mlp`] | `[B, inputs]` | `[B, outputs]` |
//! | [`ConvNet`] | `[B, channels, H, W]` | `[B, classes]` |
//! | [`ResNet`] | `[B, channels, H, W]` | `[B, classes]` |
//! | [`TransformerLm`] | tokens `[B, T]` | `[B, T, vocabulary]` |
//!
//! Every layer on the way has a gradient. Weights come through candle's `VarBuilder`, so
//! [`SeededVars`](crate::init::SeededVars) makes them reproducible.

mod conv;
mod layers;
mod mlp;
mod transformer;

pub use conv::{ConvNet, ConvNetConfig, ResNet, ResNetConfig};
pub use layers::{Activation, BatchNormKind, TokenNorm};
pub use mlp::{Mlp, MlpConfig};
pub use transformer::{TransformerConfig, TransformerLm};

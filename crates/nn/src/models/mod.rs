//! Small reference networks that experiments and tests share.
//!
//! | network | input | output |
//! | --- | --- | --- |
//! | [`Mlp`] | `[B, inputs]` | `[B, outputs]` |
//! | [`ConvNet`] | `[B, channels, H, W]` | `[B, classes]` |
//! | [`ResNet`] | `[B, channels, H, W]` | `[B, classes]` |
//! | [`TransformerLm`] | tokens `[B, T]` | `[B, T, vocabulary]` |
//! | [`UNet`] | `[B, channels, H, W]`, a level and maybe a label per image | the same size |
//!
//! Every layer on the way has a gradient. Weights come through candle's `VarBuilder`, so
//! [`SeededVars`](crate::init::SeededVars) makes them reproducible.

mod conv;
mod layers;
mod mlp;
mod transformer;
mod unet;

pub use crate::activation::Activation;
pub use conv::{ConvNet, ConvNetConfig, ResNet, ResNetConfig};
pub use layers::{BatchNormKind, TokenNorm};
pub use mlp::{Mlp, MlpConfig};
pub use transformer::{TransformerConfig, TransformerLm};
pub use unet::{UNet, UNetConfig};

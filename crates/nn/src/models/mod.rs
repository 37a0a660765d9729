//! Small reference networks that experiments and tests share.
//!
//! Every layer on the way has a gradient. Weights come through candle's `VarBuilder`, so
//! [`SeededVars`](crate::init::SeededVars) makes them reproducible.

mod layers;
mod mlp;

pub use layers::Activation;
pub use mlp::{Mlp, MlpConfig};

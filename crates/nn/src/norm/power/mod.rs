//! Power normalization: a normalization layer for transformers that, like batch norm, normalizes
//! each channel over tokens (at inference a fixed scale per channel), but does not collapse on
//! text. It does not subtract the mean, divides by a *running* quadratic mean in the forward pass,
//! and has a matching approximate backward pass.
//!
//! Shen, Yao, Gholami, Mahoney, Keutzer: "PowerNorm: Rethinking Batch Normalization in
//! Transformers", ICML 2020, arXiv 2003.07845.
//!
//! For `M` rows (tokens) of `C` channels, at training step `t = 1, 2, ...`:
//!
//! ```text
//! h    = x / sqrt(mean over the token's group of x^2 + 1e-5)      group scaling, per token
//! q    = mean over unpadded rows of h^2                           per channel, a constant for the gradient
//! d    = q  if t <= warmup_iters,  else phi                       phi as before this step
//! z    = h / sqrt(d + eps),     y = weight z + bias
//! phi <- phi (t-1)/t + q/t      if t < warmup_iters
//! phi <- alpha_fwd phi + (1 - alpha_fwd) q                        always
//!
//! g    = dy weight
//! gh   = g - (1 - alpha_bkw) nu' z
//! dh   = gh / sqrt(q + eps)
//! nu' <- nu' + mean over all rows of gh z  =  nu' + Lambda - (1 - alpha_bkw) nu' Gamma
//! ```
//!
//! with `Lambda = mean(g z)` and `Gamma = mean(z^2)`. In evaluation `d = phi` and nothing moves.
//!
//! | symbol | here |
//! | --- | --- |
//! | `psi^2`, phi | [`PowerNorm::running_phi`] |
//! | `nu' = nu / (1 - alpha_bkw)` | [`PowerNorm::ema_gz`] |
//! | `t` | [`PowerNorm::iters`] |
//! | `alpha_fwd`, `alpha_bkw`, `eps` | the same fields of [`PowerNormConfig`] |
//! | the divisor of `dh` | [`PowerNormConfig::denominator`] |
//!
//! Padded rows are left out of `q` only: they are normalized, and they count in `nu'` and in the
//! parameters' gradients.
//!
//! **Stability.** `nu'` is multiplied by `1 - (1 - alpha_bkw) Gamma`: when the batch's second
//! moment exceeds the running one by more than `2 / (1 - alpha_bkw)` (20 times at 0.9) it grows.
//! Raise `alpha_bkw`, keep group scaling on, or bound `Gamma` by [`PowerNormConfig::max_gamma`];
//! watch [`PowerNorm::statistics`].
//!
//! **Several forward passes before one backward**: `t` and phi advance with each training forward,
//! `nu'` with each backward. Evaluate without `train` where nothing should move.
//!
//! **Second order**: the backward pass is not the derivative of the forward pass and is cut from
//! the graph; there is no meaningful second derivative through this layer. [`PowerNormV`] has one.
//!
//! ```
//! use candle_core::{DType, Device};
//! use candle_nn::{Module, ModuleT, Optimizer};
//! use thalweg_nn::norm::power::{PowerNorm, PowerNormConfig};
//! use thalweg_nn::{init::SeededVars, RandomStream};
//!
//! let vars = SeededVars::new(&RandomStream::new(7));
//! let vb = vars.builder(DType::F32, &Device::Cpu);
//! let config = PowerNormConfig { groups: 2, warmup_iters: 5, ..Default::default() };
//! let norm = PowerNorm::new(8, config, vb.pp("norm"))?;
//! let head = candle_nn::linear(8, 1, vb.pp("head"))?;
//! let params = vars.trainable().into_iter().map(|(_, var)| var).collect();
//! let mut adam = candle_nn::AdamW::new_lr(params, 1e-2)?;
//!
//! let mut data = RandomStream::new(1);
//! for _ in 0..10 {
//!     // (time, batch, channels)
//!     let x = data.normal(0.0, 1.0, (6, 4, 8), DType::F32, &Device::Cpu)?;
//!     let y = head.forward(&norm.forward_t(&x, None, true)?)?;
//!     adam.backward_step(&(y - 1.0)?.sqr()?.mean_all()?)?;
//! }
//! assert_eq!(norm.iters()?, 10);
//! let x = data.normal(0.0, 1.0, (6, 4, 8), DType::F32, &Device::Cpu)?;
//! assert_eq!(norm.forward_t(&x, None, false)?.dims(), &[6, 4, 8]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod composed;
mod config;
mod fused;
mod group_scaling;
mod kernel;
mod layer;
mod rows;
mod state;
mod variant;

pub use config::{BackwardDenominator, PowerNormConfig, SequenceLayout};
pub use group_scaling::GroupScaling;
pub use layer::PowerNorm;
pub use state::PowerNormStatistics;
pub use variant::PowerNormV;

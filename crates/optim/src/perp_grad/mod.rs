//! Gradients without the part that only scales the network, and the diagnoses that say whether it
//! is needed: for training that has reached 100 % on the training set and stays at chance on the
//! test set, or whose loss reads exactly 0.
//!
//! Prieto et al., "Grokking at the Edge of Numerical Stability" (ICLR 2025, arXiv 2501.04697).
//! Once every example is classified right, the gradient turns towards the weights themselves
//! ("naive loss minimization": the logits grow, nothing else changes), until the softmax absorbs
//! all wrong classes in floating point and the gradient is exactly zero ("softmax collapse").
//! [`PerpGrad`] removes that direction, per tensor:
//!
//! ```text
//! p      = <w, g> / (<w, w> + eps)
//! g_perp = g - p w
//! g'     = g_perp |g| / (|g_perp| + 1e-30)          rescale
//! ```
//!
//! | symbol | field |
//! | --- | --- |
//! | `eps` | [`PerpGradConfig::eps`] |
//! | the last line | [`PerpGradConfig::rescale`] |
//!
//! The optimizer underneath takes `g'`; its weight decay still acts along `w`, and its
//! preconditioner may bend the direction again. Clipping belongs before the projection
//! ([`PerpGrad::with_transforms`]), which keeps each tensor's norm.
//!
//! Over this crate's optimizers the projection costs one reading of parameters and gradients: its
//! two scalars per tensor go into the fused step. A nearly parallel gradient, where the scalars
//! would lose their digits, is projected twice and written out instead.
//!
//! [`SoftmaxCollapse`] counts the examples whose softmax has collapsed in a given precision,
//! [`NlmMonitor`] measures how far the gradient has turned towards the weights.
//!
//! ```
//! use candle_core::{Device, Var};
//! use candle_nn::Optimizer;
//! use thalweg_optim::adamw::{AdamW, AdamWConfig};
//! use thalweg_optim::perp_grad::{NlmMonitor, PerpGrad, PerpGradConfig};
//!
//! let w = Var::new(&[[1f64, 2.0], [0.5, -1.0]], &Device::Cpu)?;
//! let config = (PerpGradConfig::default(), AdamWConfig { weight_decay: 0.0, ..Default::default() });
//! let mut optimizer = PerpGrad::<AdamW>::new(vec![w.clone()], config)?;
//! let loss = || w.sqr()?.sum_all()?.sqr();
//! let report = NlmMonitor::measure(&[("w".into(), w.clone())], &loss()?.backward()?)?;
//! assert!((report.cos_global + 1.0).abs() < 1e-12, "the gradient only shrinks w");
//! let before = w.to_vec2::<f64>()?;
//! optimizer.backward_step(&loss()?)?;
//! assert_eq!(w.to_vec2::<f64>()?, before, "nothing is left of it");
//! # Ok::<(), thalweg_optim::Error>(())
//! ```

mod collapse;
mod nlm;
mod optimizer;
mod projection;

pub use collapse::{CollapseFlags, CollapseReport, SoftmaxCollapse};
pub use nlm::{NlmMonitor, NlmReport};
pub use optimizer::PerpGrad;
pub use projection::{orthogonalize, Degenerate, OrthogonalProjection, PerpGradConfig};

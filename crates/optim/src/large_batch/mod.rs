//! Tools for large batches: keep the generalization of small ones, and see whether training is
//! still in its diffusive phase.
//!
//! Hoffer, Hubara and Soudry, "Train longer, generalize better: closing the generalization gap in
//! large batch training of neural networks" (NeurIPS 2017, arXiv 1705.08741). With `B_S` the small
//! and `B_L` the large batch:
//!
//! ```text
//! learning rate       lr_L = lr_S sqrt(B_L / B_S)                                      (scale_lr)
//! regime adaptation   epoch e -> e ceil(B_L / B_S)                                     (Regime)
//! noise               g^ = (1/M) sum_n z_n g_n,  z_n ~ N(1, sigma^2)                   (MultiplicativeNoise)
//!                     cov g^ = ((1 + sigma^2) E[g g^T] - gbar gbar^T) / M
//! ghost batches       gradients averaged over micro-batches, clipped to norm 5        (GhostAccumulator)
//! diffusion           |w_t - w_0| ~ (log t)^(2/alpha),  std of L(w_0 + r u) ~ r^(alpha/2)
//! ```
//!
//! | symbol | field |
//! | --- | --- |
//! | `sigma^2` | [`MultiplicativeNoise::sigma2`] |
//! | `M` | the number of per-example losses |
//! | `alpha` | [`DiffusionFit::alpha`], [`LandscapeReport::alpha`] |
//!
//! Ghost batch normalization itself is a layer and lives in `thalweg-nn`. Root scaling of the
//! learning rate and multiplicative noise are alternatives: both together count the same noise
//! twice and can ruin training.

mod accumulator;
mod diffusion;
mod landscape;
mod noise;
mod regime;

pub use accumulator::{GhostAccumulator, GhostAccumulatorConfig, GhostStep};
pub use diffusion::{fit_diffusion, log_spaced_steps, DiffusionFit, DiffusionTracker};
pub use landscape::{LandscapeProbe, LandscapeReport};
pub use noise::{gradient_covariance, MultiplicativeNoise};
pub use regime::{scale_lr, LrScaling, Regime, RegimeSchedule, Setting};

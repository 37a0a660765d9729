//! Opposing signals: the examples whose losses move against each other and make training
//! oscillate.
//!
//! For a loss that oscillates or spikes: finds the paired groups of outliers that drive it, the
//! sharpness, how much of their gradients lies along the top curvature direction, and whether
//! training is at the edge of stability. *Outliers with Opposing Signals Have an Outsized Effect on
//! Neural Network Optimization*, Rosenfeld & Risteski, ICLR 2024, arXiv 2311.04163.
//!
//! With losses `l_i(t)` of the same examples at recorded steps:
//!
//! ```text
//! d_i(t) = l_i(t+1) - l_i(t), minus its median over i        what an example does beside the trend
//! t*     = argmax_t max_i |d_i(t)|                             the step
//! up, down = the k largest and the k smallest d_i(t*)          the groups
//! corr   = correlation of the groups' mean d over t*-window..t*
//! share  = part of sum_i |d_i(t*)| in the 5 % of examples that change most
//! ```
//!
//! A pair is reported for `corr <= -min_abs_corr` and `share >= min_share` ([`OpposingConfig`]), and,
//! where the sharpness is known, near the edge of stability only: the changes of smooth losses are
//! trends, and the correlation of two trends over a short window is large and of either sign.
//!
//! The groups need not be two classes with one feature: look at them. Losses must be those of the
//! same examples in evaluation mode; without the centering all losses fall together and every two
//! groups correlate positively. At the spike itself the groups' gradients may point the same way:
//! their opposition is measured in the valley, `window` steps before ([`group_gradients`]).
//!
//! ```
//! use thalweg_optim::diagnostics::opposing::{detect, LossRecorder, OpposingConfig, TopK, ToyOpposing};
//! use thalweg_optim::RandomStream;
//!
//! // A linear model on data in which one strong feature predicts nothing.
//! let toy = ToyOpposing::default();
//! let mut rng = RandomStream::new(0);
//! let data = toy.sample(400, &mut rng)?;
//! let mut model = toy.model(&mut rng)?;
//! let mut recorder = LossRecorder::new(400, 400)?;
//! for step in 0..400 {
//!     recorder.record(step, &data.losses(&model)?)?;
//!     model = data.descend(&model, 0.06)?;
//! }
//! let config = OpposingConfig { k: TopK::Count(20), ..Default::default() };
//! let pairs = detect(&recorder, &config)?;
//! let outliers = pairs[0].up.iter().filter(|i| data.group[**i] != 0).count();
//! assert!(outliers >= 17, "{outliers} of 20");
//! # Ok::<(), thalweg_optim::Error>(())
//! ```

mod amplification;
mod detect;
mod gradients;
mod recorder;
mod sharpness;
mod split_sgd;
mod toy;

pub use amplification::FeatureAmplification;
pub(crate) use detect::pearson;
pub use detect::{
    analyze, detect, Center, GroupCurves, OpposingConfig, OpposingPair, Selection, TopK, Weighting,
};
pub use gradients::{group_gradients, GroupGradReport};
pub use recorder::LossRecorder;
pub use sharpness::{
    loss_sharpness, sharpness, EdgeOfStability, LanczosConfig, StabilityRule, TopEigen,
};
pub use split_sgd::{SplitSgd, SplitSgdConfig};
pub use toy::{ToyData, ToyModel, ToyOpposing};

//! The scenarios, by the crate that holds the method.

#[cfg(feature = "convex")]
mod convex;
#[cfg(feature = "nn")]
mod nn;
#[cfg(feature = "optim")]
mod optim;
pub mod training;

use crate::scenario::Scenario;

/// All scenarios of this build: one line each.
pub fn all() -> Vec<Box<dyn Scenario>> {
    vec![
        #[cfg(feature = "optim")]
        Box::new(optim::lion::Lion),
        #[cfg(feature = "optim")]
        Box::new(optim::spam::Spam),
        #[cfg(feature = "optim")]
        Box::new(optim::perp_grad::PerpGrad),
        #[cfg(feature = "optim")]
        Box::new(optim::large_batch::LargeBatch),
        #[cfg(feature = "optim")]
        Box::new(optim::sso::Sso),
        #[cfg(feature = "nn")]
        Box::new(nn::power_norm::PowerNorm),
        #[cfg(feature = "convex")]
        Box::new(convex::sparse_ot::SparseOt),
        #[cfg(feature = "convex")]
        Box::new(convex::bcd::Bcd),
        #[cfg(feature = "convex")]
        Box::new(convex::convex_relu::ConvexRelu),
        #[cfg(feature = "convex")]
        Box::new(convex::attention_svm::AttentionSvm),
    ]
}

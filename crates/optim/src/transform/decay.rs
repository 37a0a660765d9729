//! Weight decay as part of the gradient.

use super::{Flow, GradientTransform};
use crate::error::check;
use crate::gradients::Gradients;
use crate::{DecayMask, Result};

/// Adds `rate * w` to the gradient of `w` (an L2 penalty), for optimizers that have no decay of
/// their own, or so that later transforms see it. Decoupled decay is the optimizers' own
/// ([`WeightDecay::Decoupled`](crate::WeightDecay::Decoupled)): it needs the learning rate.
#[derive(Debug, Clone)]
pub struct AddWeightDecay {
    rate: f64,
    mask: DecayMask,
}

impl AddWeightDecay {
    /// Decay of the parameters that `mask` admits.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`](crate::Error::InvalidConfig) for a negative or non-finite rate.
    pub fn new(rate: f64, mask: DecayMask) -> Result<Self> {
        check::non_negative("AddWeightDecay::rate", rate)?;
        Ok(Self { rate, mask })
    }
}

impl GradientTransform for AddWeightDecay {
    fn apply(&mut self, gradients: &mut Gradients<'_>) -> Result<Flow> {
        for i in 0..gradients.len() {
            if self.mask.admits(gradients.name(i), gradients.var(i)) {
                if let Some((_, map)) = gradients.get(i) {
                    gradients.set_map(i, map.then_affine(1.0, -self.rate));
                }
            }
        }
        Ok(Flow::Continue)
    }
}

//! What to do about NaN and infinity before anything else sees them.

use super::{Flow, GradientTransform, Withheld};
use crate::gradients::{finite_or_zero, Gradients};
use crate::{Error, Result};

/// What [`NonFiniteGuard`] does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Guard {
    /// Leaves the step out.
    #[default]
    SkipStep,
    /// Refuses the step with an error that names the tensors.
    Error,
    /// Replaces entries that are not finite by zero.
    Zero,
}

/// Looks for NaN and infinity in the gradients, in one pass. Useful in front of transforms with a
/// state; the optimizers' own [`NonFinite`](crate::NonFinite) policy looks behind the chain.
#[derive(Debug, Clone, Copy, Default)]
pub struct NonFiniteGuard {
    guard: Guard,
    found: u64,
}

impl NonFiniteGuard {
    /// A guard.
    pub fn new(guard: Guard) -> Self {
        Self { guard, found: 0 }
    }

    /// Steps in which something was found.
    pub fn found(&self) -> u64 {
        self.found
    }
}

impl GradientTransform for NonFiniteGuard {
    fn apply(&mut self, gradients: &mut Gradients<'_>) -> Result<Flow> {
        let squares = gradients.squares()?;
        if squares.iter().all(|m| m.nonfinite == 0) {
            return Ok(Flow::Continue);
        }
        self.found += 1;
        let bad = squares.iter().enumerate().filter(|(_, m)| m.nonfinite > 0);
        match self.guard {
            Guard::SkipStep => Ok(Flow::Withhold(Withheld::NonFinite)),
            Guard::Error => Err(Error::NonFiniteGradient(
                bad.map(|(i, m)| format!("`{}` ({} entries)", gradients.name(i), m.nonfinite))
                    .collect(),
            )),
            Guard::Zero => {
                for (i, _) in bad {
                    if let Some(tensor) = gradients.materialized(i)? {
                        gradients.replace(i, finite_or_zero(&tensor)?);
                    }
                }
                Ok(Flow::Continue)
            }
        }
    }
}

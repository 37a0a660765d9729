//! Clipping by norm and by value.

use super::{Flow, GradientTransform};
use crate::error::check;
use crate::gradients::Gradients;
use crate::{global_norm, Result};
use candle_core::backprop::GradStore;
use candle_core::Var;

/// `min(1, limit / norm)`.
pub(crate) fn factor(norm: f64, limit: f64) -> f64 {
    if norm > limit {
        limit / norm
    } else {
        1.0
    }
}

/// Scales the gradients of some variables in a store by `min(1, limit / (norm + 1e-6))`, where `norm` is
/// that of all of them together, and gives the norm: PyTorch's `clip_grad_norm_`, small number
/// included, for loops whose optimizer takes no transforms and for groups that are clipped apart. A
/// norm that is not finite scales nothing.
///
/// # Errors
/// [`Error::InvalidConfig`](crate::Error::InvalidConfig) unless the limit is positive and finite.
pub fn clip_grad_norm(grads: &mut GradStore, params: &[(String, Var)], limit: f64) -> Result<f64> {
    check::positive("clip_grad_norm::limit", limit)?;
    let norm = global_norm(params, grads)?;
    let factor = limit / (norm + 1e-6);
    if norm.is_finite() && factor < 1.0 {
        for (_, var) in params {
            if let Some(grad) = grads.remove(var) {
                grads.insert(var, (grad * factor)?);
            }
        }
    }
    Ok(norm)
}

/// Scales all gradients by `min(1, limit / norm)`, where `norm` is that of all of them together.
/// Entries that are NaN or infinite count as zero in the norm, and stay what they are for the
/// optimizer's policy to treat.
#[derive(Debug, Clone, Copy)]
pub struct ClipByGlobalNorm {
    limit: f64,
    last: Option<f64>,
}

impl ClipByGlobalNorm {
    /// A clip to `limit`.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`](crate::Error::InvalidConfig) unless the limit is positive and
    /// finite.
    pub fn new(limit: f64) -> Result<Self> {
        check::positive("ClipByGlobalNorm::limit", limit)?;
        Ok(Self { limit, last: None })
    }

    /// The norm before clipping that was found last.
    pub fn last_norm(&self) -> Option<f64> {
        self.last
    }
}

impl GradientTransform for ClipByGlobalNorm {
    fn apply(&mut self, gradients: &mut Gradients<'_>) -> Result<Flow> {
        let squares = gradients.finite_squares()?;
        let norm = squares.iter().map(|m| m.gg).sum::<f64>().sqrt();
        self.last = Some(norm);
        let factor = factor(norm, self.limit);
        if factor < 1.0 {
            tracing::debug!(norm, limit = self.limit, "gradients clipped");
            for i in 0..gradients.len() {
                gradients.scale(i, factor);
            }
        }
        Ok(Flow::Continue)
    }
}

/// Scales each gradient by `min(1, limit / norm)` with its own norm. Entries that are not finite
/// are treated as in [`ClipByGlobalNorm`].
#[derive(Debug, Clone, Copy)]
pub struct ClipByNorm {
    limit: f64,
}

impl ClipByNorm {
    /// A clip to `limit`.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`](crate::Error::InvalidConfig) unless the limit is positive and
    /// finite.
    pub fn new(limit: f64) -> Result<Self> {
        check::positive("ClipByNorm::limit", limit)?;
        Ok(Self { limit })
    }
}

impl GradientTransform for ClipByNorm {
    fn apply(&mut self, gradients: &mut Gradients<'_>) -> Result<Flow> {
        let squares = gradients.finite_squares()?;
        for (i, square) in squares.iter().enumerate() {
            let factor = factor(square.gg.sqrt(), self.limit);
            if factor < 1.0 {
                gradients.scale(i, factor);
            }
        }
        Ok(Flow::Continue)
    }
}

/// Bounds every entry to `[-limit, limit]`. NaN stays NaN, infinity becomes the limit.
#[derive(Debug, Clone, Copy)]
pub struct ClipByValue {
    limit: f64,
}

impl ClipByValue {
    /// A clip to `limit`.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`](crate::Error::InvalidConfig) unless the limit is positive and
    /// finite.
    pub fn new(limit: f64) -> Result<Self> {
        check::positive("ClipByValue::limit", limit)?;
        Ok(Self { limit })
    }
}

impl GradientTransform for ClipByValue {
    fn apply(&mut self, gradients: &mut Gradients<'_>) -> Result<Flow> {
        for i in 0..gradients.len() {
            let Some((_, map)) = gradients.get(i) else {
                continue;
            };
            if let Some(clipped) = map.then_clip(self.limit) {
                gradients.set_map(i, clipped);
            } else if let Some(tensor) = gradients.materialized(i)? {
                // After a projection a clip is no map any more.
                gradients.replace(i, tensor.clamp(-self.limit, self.limit)?);
            }
        }
        Ok(Flow::Continue)
    }
}

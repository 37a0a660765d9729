//! The scaling of each token's channel groups that precedes power normalization.

use crate::norm::layer::check_eps;
use crate::{Error, Result};
use candle_core::{Module, Tensor, D};

/// Divides each group of channels of each row by its root mean square:
/// `h = x / sqrt(mean(x^2) + eps)`, the mean over the `C / groups` channels of the group.
///
/// Built from candle operations: any device, gradients of any order. `eps` is a constant of its
/// own, 1e-5, and not the layer's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GroupScaling {
    /// Number of groups of neighboring channels.
    pub groups: usize,
    /// Added to the second moment under the square root.
    pub eps: f64,
}

impl Default for GroupScaling {
    fn default() -> Self {
        Self {
            groups: 1,
            eps: 1e-5,
        }
    }
}

impl GroupScaling {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`].
    pub fn validate(&self) -> Result<()> {
        if self.groups == 0 {
            return Err(Error::config("GroupScaling::groups", 0, "at least 1"));
        }
        check_eps("GroupScaling::eps", self.eps)
    }

    /// Checks that `channels` split into the groups.
    pub(super) fn check_channels(&self, channels: usize) -> Result<()> {
        if channels == 0 || !channels.is_multiple_of(self.groups) {
            return Err(Error::config(
                "groups",
                self.groups,
                format!("a divisor of the {channels} channels"),
            ));
        }
        Ok(())
    }
}

impl Module for GroupScaling {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        self.validate()?;
        let channels = x.dims().last().copied().unwrap_or(0);
        self.check_channels(channels)?;
        let grouped = x.reshape(((), self.groups, channels / self.groups))?;
        let rms = (grouped.sqr()?.mean_keepdim(D::Minus1)? + self.eps)?.sqrt()?;
        grouped.broadcast_div(&rms)?.reshape(x.shape())
    }
}

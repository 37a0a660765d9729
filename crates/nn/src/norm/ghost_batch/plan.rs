//! How a batch is cut into ghost batches.

use super::config::Remainder;
use crate::{Error, Result};

/// The sizes of the ghost batches of a batch, in order.
///
/// A pure function of the batch size; with `k = max(1, batch / ghost_size)` groups, a batch of
/// less than `2 ghost_size` examples is one group.
///
/// ```
/// use thalweg_nn::norm::ghost_batch::{GhostPlan, Remainder};
/// assert_eq!(GhostPlan::new(10, 3, Remainder::Balanced)?, [4, 3, 3]);
/// assert_eq!(GhostPlan::new(10, 3, Remainder::Official)?, [4, 4, 2]);
/// assert!(GhostPlan::new(10, 3, Remainder::Strict).is_err());
/// assert_eq!(GhostPlan::new(5, 3, Remainder::Balanced)?, [5]);
/// # Ok::<(), thalweg_nn::Error>(())
/// ```
#[derive(Debug, Clone, Copy)]
pub struct GhostPlan;

impl GhostPlan {
    /// Group sizes that add up to `batch`.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for an empty batch or a ghost size of 0,
    /// [`Error::IndivisibleBatch`] under [`Remainder::Strict`].
    #[allow(clippy::new_ret_no_self)]
    pub fn new(batch: usize, ghost_size: usize, remainder: Remainder) -> Result<Vec<usize>> {
        if batch == 0 {
            return Err(Error::config("GhostPlan::batch", 0, "at least 1"));
        }
        if ghost_size == 0 {
            return Err(Error::config("GhostPlan::ghost_size", 0, "at least 1"));
        }
        let k = (batch / ghost_size).max(1);
        Ok(match remainder {
            Remainder::Balanced => {
                let size = |j: usize| batch / k + usize::from(j < batch % k);
                (0..k).map(size).collect()
            }
            Remainder::Official => {
                let size = batch.div_ceil(k);
                (0..batch)
                    .step_by(size)
                    .map(|start| size.min(batch - start))
                    .collect()
            }
            Remainder::Strict if k > 1 && !batch.is_multiple_of(ghost_size) => {
                return Err(Error::IndivisibleBatch { batch, ghost_size })
            }
            Remainder::Strict => vec![batch / k; k],
        })
    }
}

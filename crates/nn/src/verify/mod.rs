//! Checks against reference files; each adaptor takes what belongs to its method and leaves the
//! rest of the file alone.

mod ghost_batch_norm;
mod power_norm;
mod record;
mod stablemax;

pub use ghost_batch_norm::ghost_batch_norm;
pub use power_norm::power_norm;
pub use stablemax::stablemax;

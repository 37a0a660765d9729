//! Scenarios of the methods in `thalweg-optim`.

pub(super) mod bo_rep;
pub(super) mod cbo;
mod discovery;
pub(super) mod gradsign;
pub(super) mod large_batch;
pub(super) mod lion;
pub(super) mod opposing_signals;
pub(super) mod perp_grad;
mod pictures;
pub(super) mod spam;
pub(super) mod sso;

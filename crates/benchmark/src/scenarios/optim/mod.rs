//! Scenarios of the methods in `thalweg-optim`.

pub(super) mod large_batch;
pub(super) mod lion;
pub(super) mod perp_grad;
pub(super) mod spam;
pub(super) mod sso;

//! Scenarios of `thalweg-flows`.

pub(crate) mod disback;
pub(super) mod rectified_flow;

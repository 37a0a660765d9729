//! Scenarios of `thalweg-flows`.

pub(super) mod disback;
pub(super) mod rectified_flow;

//! Scenarios of `thalweg-flows`.

pub(super) mod rectified_flow;

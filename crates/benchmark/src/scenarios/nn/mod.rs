//! Scenarios of the methods in `thalweg-nn`.

pub(super) mod power_norm;

//! Scenarios of the methods in `thalweg-graph-learning`.

pub(super) mod cgs;
mod citation;
pub(super) mod pot;

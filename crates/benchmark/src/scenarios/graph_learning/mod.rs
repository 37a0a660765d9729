//! Scenarios of the methods in `thalweg-graph-learning`.

pub(super) mod cgs;
mod citation;
pub(super) mod convolutions;
pub(super) mod forward_gnn;
pub(super) mod graphfm;
mod molecules;
mod pictures;
pub(super) mod pot;
pub(super) mod w2pgnn;

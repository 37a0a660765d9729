//! Scenarios of `thalweg-sequence-design`.

pub(super) mod bib;
mod data;
pub(super) mod drakes;
pub(super) mod op_gfn;
mod pictures;
mod regulatory;
pub(super) mod svdd;
mod tilted;

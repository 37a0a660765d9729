//! Scenarios of `thalweg-guidance`.

pub(super) mod adaptive;
pub(super) mod adjoint_dpm;
pub(super) mod apg;
mod clouds;
mod digit_flow;
pub(super) mod flowchef;
pub(super) mod gfcg;
mod judge;
pub(super) mod ppap;
pub(super) mod reno;
pub(super) mod samplers;

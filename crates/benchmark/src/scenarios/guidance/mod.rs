//! Scenarios of `thalweg-guidance`.

pub(super) mod adaptive;
pub(super) mod apg;

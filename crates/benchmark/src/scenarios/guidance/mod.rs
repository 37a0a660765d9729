//! Scenarios of `thalweg-guidance`.

pub(super) mod apg;

//! The reference files, and variants of them.

use crate::support::*;
use flows::verify;

#[test]
fn guidance_core() {
    let report = verify_file("guidance-core", verify::guidance_core);
    assert_passed(&report, |name| {
        name.starts_with("g_") || name == "mix_var_weak" || name == "interval_cfg_final"
    });
}

#[test]
fn rectified_flow() {
    assert_passed(
        &verify_file("rectified-flow", verify::rectified_flow),
        |_| false,
    );
}

#[test]
fn adjoint_dpm() {
    assert_passed(&verify_file("adjoint-dpm", verify::adjoint_dpm), |_| false);
}

use crate::support::verify as verify_file;

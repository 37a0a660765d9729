//! The reference files, and variants of them.

use crate::support::*;
use flows::verify;
use std::collections::BTreeMap;
use tensor_core::verify::Array;

fn of_the_rules(name: &str) -> bool {
    name.starts_with("g_") || name == "mix_var_weak" || name == "interval_cfg_final"
}

#[test]
fn guidance_core() {
    let report = FILES.verify("guidance-core", verify::guidance_core);
    assert_passed(&report, of_the_rules);
}

/// The samples of a batch are independent: a file with fewer of them is as good.
#[test]
fn guidance_core_with_fewer_samples() {
    let fewer = |tensors: &mut BTreeMap<String, Array>, _: &mut BTreeMap<String, String>| {
        for raw in tensors.values_mut() {
            if let Some(axis) = raw.shape.iter().position(|n| *n == 5) {
                raw.shorten(axis, 3).unwrap();
            }
        }
    };
    let report = FILES.verify_variant("guidance-core", fewer, verify::guidance_core);
    assert_passed(&report, of_the_rules);
}

#[test]
fn rectified_flow() {
    assert_passed(
        &FILES.verify("rectified-flow", verify::rectified_flow),
        |_| false,
    );
}

#[test]
fn adjoint_dpm() {
    assert_passed(&FILES.verify("adjoint-dpm", verify::adjoint_dpm), |_| false);
}

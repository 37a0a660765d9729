//! The reference files.

use crate::support::*;
use guidance::verify;
use std::collections::BTreeMap;
use tensor_core::verify::Array;

fn of_the_floor(name: &str) -> bool {
    let starts = [
        "abar", "conv", "flow", "ddim", "dpmpp", "euler", "heun", "karras",
    ];
    starts.iter().any(|start| name.starts_with(start))
}

#[test]
fn guidance_core() {
    let report = FILES.verify("guidance-core", verify::guidance_core);
    assert_passed(&report, of_the_floor);
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
    assert_passed(&report, of_the_floor);
}

/// Cases are found by their tensors, whatever they are called and however many there are.
#[test]
fn apg_with_other_cases() {
    let change = |tensors: &mut BTreeMap<String, Array>,
                  metadata: &mut BTreeMap<String, String>| {
        tensors.retain(|name, _| !name.starts_with("case1"));
        metadata.remove("case1");
        for name in tensors.keys().cloned().collect::<Vec<_>>() {
            if let Some(rest) = name.strip_prefix("case0") {
                let raw = tensors.remove(&name).unwrap();
                tensors.insert(format!("high.b{rest}"), raw);
            }
        }
        let settings = metadata.remove("case0").unwrap();
        metadata.insert("high.b".into(), settings);
        for raw in tensors.values_mut() {
            let samples = if raw.shape.len() == 5 { 1 } else { 0 };
            raw.shorten(samples, 2).unwrap();
        }
    };
    assert_passed(&FILES.verify_variant("apg", change, verify::apg), |_| false);
}

#[test]
fn apg() {
    assert_passed(&FILES.verify("apg", verify::apg), |_| false);
}

#[test]
fn adaptive_guidance() {
    assert_passed(
        &FILES.verify("adaptive-guidance", verify::adaptive_guidance),
        |_| false,
    );
}

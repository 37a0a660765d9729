//! The reference files.

use crate::support::verify as verify_file;
use crate::support::*;
use guidance::verify;
use std::collections::{BTreeMap, HashMap};

fn of_the_floor(name: &str) -> bool {
    let starts = [
        "abar", "conv", "flow", "ddim", "dpmpp", "euler", "heun", "karras",
    ];
    starts.iter().any(|start| name.starts_with(start))
}

#[test]
fn guidance_core() {
    let report = verify_file("guidance-core", verify::guidance_core);
    assert_passed(&report, of_the_floor);
}

/// The samples of a batch are independent: a file with fewer of them is as good.
#[test]
fn guidance_core_with_fewer_samples() {
    let fewer = |tensors: &mut BTreeMap<String, Raw>, _: &mut HashMap<String, String>| {
        for raw in tensors.values_mut() {
            if let Some(axis) = raw.1.iter().position(|n| *n == 5) {
                shorten(raw, axis, 3);
            }
        }
    };
    let report = verify_variant("guidance-core", fewer, verify::guidance_core);
    assert_passed(&report, of_the_floor);
}

/// Cases are found by their tensors, whatever they are called and however many there are.
#[test]
fn apg_with_other_cases() {
    let change = |tensors: &mut BTreeMap<String, Raw>, metadata: &mut HashMap<String, String>| {
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
            let samples = if raw.1.len() == 5 { 1 } else { 0 };
            shorten(raw, samples, 2);
        }
    };
    assert_passed(&verify_variant("apg", change, verify::apg), |_| false);
}

#[test]
fn apg() {
    assert_passed(&verify_file("apg", verify::apg), |_| false);
}

#[test]
fn adaptive_guidance() {
    assert_passed(
        &verify_file("adaptive-guidance", verify::adaptive_guidance),
        |_| false,
    );
}

#[test]
fn svdd() {
    let report = verify_file("svdd", verify::svdd);
    assert!(report.unknown.iter().all(|name| !name.starts_with("cont_")));
    let whole = |reference: &mut tensor_core::verify::Reference| {
        verify::svdd(reference)?;
        verify::svdd_without_tokens(reference)
    };
    assert_passed(&verify_file("svdd", whole), |_| false);
}

/// Fewer samples, and fewer candidates where the run does not depend on the others.
#[test]
fn svdd_with_fewer_samples() {
    let fewer = |tensors: &mut BTreeMap<String, Raw>, _: &mut HashMap<String, String>| {
        let axes = [
            ("cont_index", 1),
            ("cont_states", 1),
            ("cont_values", 1),
            ("u_select_cont", 1),
            ("x_T", 0),
            ("z", 2),
        ];
        for (name, axis) in axes {
            shorten(tensors.get_mut(name).unwrap(), axis, 2);
        }
    };
    let report = verify_variant("svdd", fewer, verify::svdd);
    assert_passed(&report, |name| !name.starts_with("cont_"));
}

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

/// Another shift, whose number is in the tensor's name, beside the file's own.
#[test]
fn guidance_core_with_another_shift() {
    let more = |tensors: &mut BTreeMap<String, Array>, _: &mut BTreeMap<String, String>| {
        let mut raw = tensors["flow_shift3"].clone();
        let n = raw.values.len();
        for (i, value) in raw.values.iter_mut().enumerate() {
            let s = (n - i) as f64 / n as f64;
            *value = 2.5 * s / (1.0 + 1.5 * s);
        }
        tensors.insert("flow_shift2p5".into(), raw);
    };
    let report = FILES.verify_variant("guidance-core", more, verify::guidance_core);
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

/// Some of the methods, fewer samples, no parameter.
#[test]
fn adjoint_dpm_with_fewer_parts() {
    let change = |tensors: &mut BTreeMap<String, Array>,
                  metadata: &mut BTreeMap<String, String>| {
        tensors.retain(|name, _| !name.starts_with("theta") && !name.starts_with("midpoint"));
        metadata.insert("methods".into(), "rk4, euler".into());
        for (name, raw) in tensors.iter_mut() {
            let of_samples = ["c", "x_T", "target"].contains(&name.as_str());
            if of_samples || name.starts_with("rk4") || name.starts_with("euler") {
                raw.shorten(0, 1).unwrap();
            }
        }
    };
    let report = FILES.verify_variant("adjoint-dpm", change, verify::adjoint_dpm);
    assert_passed(&report, |_| false);
}

/// Other numbers of adaptive solves, of times and of draws.
#[test]
fn rectified_flow_with_other_cases() {
    let change = |tensors: &mut BTreeMap<String, Array>,
                  metadata: &mut BTreeMap<String, String>| {
        tensors.retain(|name, _| !name.starts_with("rk45_1") && name != "loss_reflow_t1");
        metadata.remove("rk45_1");
        for part in ["final", "times"] {
            let raw = tensors.remove(&format!("rk45_0_{part}")).unwrap();
            tensors.insert(format!("rk45_17_{part}"), raw);
        }
        let settings = metadata.remove("rk45_0").unwrap();
        metadata.insert("rk45_17".into(), settings);
        for (name, raw) in tensors.iter_mut() {
            let times = ["v_t", "v_at_x0", "div_at_x0"].contains(&name.as_str());
            if times || name.starts_with("ts_") {
                raw.shorten(0, 4).unwrap();
            }
        }
    };
    let report = FILES.verify_variant("rectified-flow", change, verify::rectified_flow);
    assert_passed(&report, |_| false);
}

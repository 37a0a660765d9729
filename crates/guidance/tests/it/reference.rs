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

#[test]
fn svdd() {
    let report = FILES.verify("svdd", verify::svdd);
    assert!(report.unknown.iter().all(|name| !name.starts_with("cont_")));
    let whole = |reference: &mut tensor_core::verify::Reference| {
        verify::svdd(reference)?;
        verify::svdd_without_tokens(reference)
    };
    assert_passed(&FILES.verify("svdd", whole), |_| false);
}

/// Fewer samples, and fewer candidates where the run does not depend on the others.
#[test]
fn svdd_with_fewer_samples() {
    let fewer = |tensors: &mut BTreeMap<String, Array>, _: &mut BTreeMap<String, String>| {
        let axes = [
            ("cont_index", 1),
            ("cont_states", 1),
            ("cont_values", 1),
            ("u_select_cont", 1),
            ("x_T", 0),
            ("z", 2),
        ];
        for (name, axis) in axes {
            tensors.get_mut(name).unwrap().shorten(axis, 2).unwrap();
        }
    };
    let report = FILES.verify_variant("svdd", fewer, verify::svdd);
    assert_passed(&report, |name| !name.starts_with("cont_"));
}

#[test]
fn gfcg() {
    assert_passed(&FILES.verify("gfcg", verify::gfcg), |_| false);
}

/// Fewer samples, and a file with some of the modes only.
#[test]
fn gfcg_with_fewer_samples_and_modes() {
    let fewer = |tensors: &mut BTreeMap<String, Array>, _: &mut BTreeMap<String, String>| {
        tensors.retain(|name, _| !name.starts_with("gfcg_const") && !name.starts_with("atg_swap"));
        for (name, raw) in tensors.iter_mut() {
            let starts = ["cond", "cfg", "atg", "gfcg"];
            let axis = match name.as_str() {
                "z" | "c" => 0,
                n if n.ends_with("_final") => 0,
                n if starts.iter().any(|s| n.starts_with(s)) => 1,
                _ => continue,
            };
            raw.shorten(axis, 2).unwrap();
        }
    };
    assert_passed(&FILES.verify_variant("gfcg", fewer, verify::gfcg), |_| {
        false
    });
}

#[test]
fn flowchef() {
    assert_passed(&FILES.verify("flowchef", verify::flowchef), |_| false);
}

/// Other operators' names and another number of early steps; no editing.
#[test]
fn flowchef_with_fewer_parts() {
    let change = |tensors: &mut BTreeMap<String, Array>,
                  metadata: &mut BTreeMap<String, String>| {
        tensors.retain(|name, _| !name.starts_with("edit") && !name.starts_with("deblur"));
        metadata.retain(|name, _| !name.starts_with("edit"));
        let early = tensors.remove("sr2_after3");
        assert!(early.is_some());
    };
    assert_passed(
        &FILES.verify_variant("flowchef", change, verify::flowchef),
        |_| false,
    );
}

/// Another picture: a pixel with a zero in one channel is seen, and so is a black one away from the hole.
#[test]
fn flowchef_with_zeros_in_the_picture() {
    use candle_core::{DType, Device};
    use flows::{AnalyticMixture, Condition};
    use guidance::flowchef::{FlowChef, LinearMeasurement, Reduction, StepRule};
    use tensor_core::operator::{LinearOperator, Mask};
    let change = |tensors: &mut BTreeMap<String, Array>,
                  metadata: &mut BTreeMap<String, String>| {
        tensors.retain(|name, _| {
            !["sr", "deblur", "grad", "edit"]
                .iter()
                .any(|s| name.starts_with(s))
        });
        tensors.remove("inpaint_after3");
        tensors.remove("inpaint_x1hat_last");
        let pixels = tensors["image"].shape[1] * tensors["image"].shape[2];
        let image = tensors.get_mut("image").unwrap();
        image.values[1] = 0.0;
        (0..3).for_each(|c| image.values[c * pixels] = 0.0);
        let read = |name: &str| tensors[name].tensor(DType::F64).unwrap();
        let hole = Mask::hide_box((8, 8), 4, None, DType::F64, &Device::Cpu).unwrap();
        let y = hole.apply(&read("image").unsqueeze(0).unwrap()).unwrap();
        let std: f64 = metadata["mix_std"].parse().unwrap();
        let weights = &tensors["mix_weights"].values;
        let variances = vec![std * std; weights.len()];
        let flow = AnalyticMixture::new(&read("mix_centers"), &variances, weights).unwrap();
        let chef = FlowChef {
            steps: metadata["N"].parse().unwrap(),
            rule: StepRule::Gd {
                scale: metadata["gradient_scale"].parse().unwrap(),
            },
            ..FlowChef::default()
        };
        let noise = (read("x_noise") / (1.0 - 1e-5)).unwrap();
        let cost = LinearMeasurement::new(&hole, &y).reduction(Reduction::MeanAll);
        let out = chef
            .sample(&flow, &noise, &Condition::Null, &cost, None)
            .unwrap();
        tensors.get_mut("inpaint_y").unwrap().values = values(&y);
        tensors.get_mut("inpaint_final").unwrap().values = values(&out.x);
    };
    assert_passed(
        &FILES.verify_variant("flowchef", change, verify::flowchef),
        |_| false,
    );
}

/// Editing in a batch, where the authors' mean over all elements is a smaller cost for each sample, and with
/// other constants of Adam.
#[test]
fn flowchef_edits_as_its_metadata_say() {
    let twice = |tensors: &mut BTreeMap<String, Array>, metadata: &mut BTreeMap<String, String>| {
        for (name, raw) in tensors.iter_mut().filter(|(n, _)| n.starts_with("edit_")) {
            raw.values.extend(raw.values.clone());
            raw.shape[0] *= 2;
            assert!(raw.shape.len() == 4, "{name}");
        }
        // Half the cost for each sample: twice the weight.
        metadata.insert("edit_loss_weight".into(), "2e-05".into());
    };
    let report = FILES.verify_variant("flowchef", twice, verify::flowchef);
    assert_passed(&report, |_| false);
    let other = |_: &mut BTreeMap<String, Array>, metadata: &mut BTreeMap<String, String>| {
        metadata.insert("adam".into(), "b1=.5 b2=.9 eps=1e-3".into());
    };
    let report = FILES.verify_variant("flowchef", other, verify::flowchef);
    let failed = report.comparisons.iter().filter(|c| !c.passed);
    let failed: Vec<&str> = failed.map(|c| c.name.as_str()).collect();
    assert_eq!(failed, ["edit_out"]);
}

/// Settings that the rule itself refuses have a combination all the same.
#[test]
fn apg_with_unusual_settings() {
    let change = |_: &mut BTreeMap<String, Array>, metadata: &mut BTreeMap<String, String>| {
        let settings = metadata.get_mut("case2").unwrap();
        *settings = settings.replace("eta=1.0", "eta=1.5");
        assert!(settings.contains("eta=1.5"), "{settings}");
    };
    let report = FILES.verify_variant("apg", change, verify::apg);
    let failed = report.comparisons.iter().filter(|c| !c.passed);
    assert!(failed.clone().count() > 0 && failed.into_iter().all(|c| c.name.starts_with("case2")));
}

/// Fewer samples of the runs, and a name of the levels' file that no schedule depends on.
#[test]
fn adaptive_guidance_with_fewer_samples() {
    let fewer = |tensors: &mut BTreeMap<String, Array>, metadata: &mut BTreeMap<String, String>| {
        for (name, raw) in tensors.iter_mut() {
            let axis = match name.as_str() {
                "z" | "c" | "nas_x0" | "lag_final" => 0,
                n if n.ends_with("_final") || n.ends_with("_nfe") => 0,
                n if n.starts_with("cfg_") || n.ends_with("_active") => 1,
                _ => continue,
            };
            raw.shorten(axis, 2).unwrap();
        }
        // The search's loss is a mean over the batch.
        tensors.retain(|name, _| !name.starts_with("nas_"));
        metadata.retain(|name, _| !name.starts_with("nas_"));
    };
    let report = FILES.verify_variant("adaptive-guidance", fewer, verify::adaptive_guidance);
    assert_passed(&report, |_| false);
}

#[test]
fn reno() {
    assert_passed(&FILES.verify("reno", verify::reno), |_| false);
}

/// Cases under other names.
#[test]
fn reno_with_other_cases() {
    let change = |tensors: &mut BTreeMap<String, Array>,
                  metadata: &mut BTreeMap<String, String>| {
        tensors.retain(|name, _| !name.starts_with("case0"));
        metadata.remove("case0");
        for name in tensors.keys().cloned().collect::<Vec<_>>() {
            if let Some(rest) = name.strip_prefix("case2") {
                let raw = tensors.remove(&name).unwrap();
                tensors.insert(format!("run.b{rest}"), raw);
            }
        }
        let settings = metadata.remove("case2").unwrap();
        metadata.insert("run.b".into(), settings);
    };
    assert_passed(&FILES.verify_variant("reno", change, verify::reno), |_| {
        false
    });
}

#[test]
fn ppap() {
    assert_passed(&FILES.verify("ppap", verify::ppap), |_| false);
}

/// Twice the batch with the same means, other experts, and a linear layer with fewer outputs.
#[test]
fn ppap_with_another_batch_and_other_experts() {
    let change = |tensors: &mut BTreeMap<String, Array>,
                  metadata: &mut BTreeMap<String, String>| {
        let rows = [
            "x0",
            "noise",
            "alpha_bar",
            "xt",
            "conv_out",
            "eps",
            "eps_guided",
            "guidance_grad",
            "label",
            "kd_per_sample",
            "student_logits",
            "teacher_logits",
        ];
        for name in rows {
            let raw = tensors.get_mut(name).unwrap();
            raw.values.extend(raw.values.clone());
            raw.shape[0] *= 2;
        }
        for name in ["lin_in", "lin_out", "lin_out_official_unmerged"] {
            tensors.get_mut(name).unwrap().shorten(0, 1).unwrap();
        }
        let outputs = [("lin_bias", 0), ("lin_lora_b", 0), ("lin_weight", 0)];
        let results = [("lin_out", 1), ("lin_out_official_unmerged", 1)];
        for (name, axis) in outputs.into_iter().chain(results) {
            tensors.get_mut(name).unwrap().shorten(axis, 2).unwrap();
        }
        metadata.insert("n_experts".into(), "3".into());
        metadata.insert("num_timesteps".into(), "600".into());
        let routes = [
            ("expert_t", [0, 199, 200, 201, 400, 599]),
            ("expert_index", [0, 0, 1, 1, 2, 2]),
            ("expert_index_official", [0, 0, 0, 1, 1, 2]),
        ];
        for (name, values) in routes {
            let raw = tensors.get_mut(name).unwrap();
            raw.values = values.iter().map(|v| f64::from(*v)).collect();
            raw.shape = vec![values.len()];
        }
    };
    assert_passed(&FILES.verify_variant("ppap", change, verify::ppap), |_| {
        false
    });
}

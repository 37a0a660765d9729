//! The reference of `lion`: the authors' class on small tensors, half-precision momentum, programs.

use super::{bad, json_number, rows, step_on};
use crate::discovery::{CompiledProgram, Program, Signature};
use crate::lion::{Lion, LionConfig};
use crate::{ParamGroup, Result, Stateful};
use candle_core::{DType, Tensor, Var};
use serde_json::Value;
use tensor_core::verify::{Reference, Tolerance};

const TOLERANCE: Tolerance = Tolerance::Mixed(1e-12);
const PROGRAM: Tolerance = Tolerance::Mixed(1e-10);

/// Checks every run with groups (metadata `NAME.groups`) and every run with half-precision momentum
/// (tensors `NAME.momentum_as_f32`), and every program (`NAME.w_final`).
///
/// # Errors
/// An error when the file lacks an input; a difference is a failed comparison instead.
pub fn lion(reference: &mut Reference) -> Result<()> {
    let keys: Vec<String> = reference.metadata().keys().cloned().collect();
    for run in keys.iter().filter_map(|key| key.strip_suffix(".groups")) {
        groups(reference, run)?;
    }
    for run in reference.cases(".momentum_as_f32") {
        half_precision(reference, &run)?;
    }
    for case in reference.cases(".w_final") {
        program(reference, &case)?;
    }
    Ok(())
}

/// Runs the text of a program (metadata `CASE.text`) over the file's gradients, with the carried
/// trees zero at the start.
fn program(reference: &mut Reference, case: &str) -> Result<()> {
    let text = reference.text(&format!("{case}.text"))?;
    let signature = Signature::optimizer();
    let source = Program::parse(text)?;
    let compiled = CompiledProgram::new(&source, &signature)?;
    let mut w = reference.input(&format!("{case}.w0"))?.values;
    let n = w.len();
    let grads = rows(&reference.input(&format!("{case}.g"))?)?;
    let schedule = reference.input(&format!("{case}.lr"))?.values;
    let (mut m, mut v) = (vec![0.0; n], vec![0.0; n]);
    let mut found: [Vec<f64>; 3] = Default::default();
    for (g, lr) in grads.iter().zip(schedule) {
        let outputs = compiled.evaluate::<f64>(&[&w, &g.values, &m, &v], &[lr], &[n])?;
        for (found, output) in found.iter_mut().zip(&outputs) {
            found.extend(output);
        }
        w.iter_mut().zip(&outputs[0]).for_each(|(w, u)| *w -= u);
        (m, v) = (outputs[1].clone(), outputs[2].clone());
    }
    for (part, values) in ["update", "m", "v"].iter().zip(&found) {
        reference.compare(&format!("{case}.{part}"), values, PROGRAM)?;
    }
    reference.compare(&format!("{case}.w_final"), &w, PROGRAM)?;
    Ok(())
}

/// `[[[0, 2], {"lr": .., "betas": [.., ..], "weight_decay": ..}], ..]`
fn read_groups(reference: &Reference, run: &str) -> Result<Vec<(Vec<usize>, LionConfig)>> {
    let key = format!("{run}.groups");
    let value = reference.json(&key)?;
    let malformed = || bad(reference, format!("metadata `{key}` has another form"));
    let mut groups = Vec::new();
    for group in value.as_array().ok_or_else(malformed)? {
        let (indices, config) = (&group[0], &group[1]);
        let mut members = Vec::new();
        for index in indices.as_array().ok_or_else(malformed)? {
            members.push(index.as_u64().ok_or_else(malformed)? as usize);
        }
        let number = |value: &Value| value.as_f64().ok_or_else(malformed);
        let config = LionConfig {
            lr: number(&config["lr"])?,
            beta1: number(&config["betas"][0])?,
            beta2: number(&config["betas"][1])?,
            weight_decay: number(&config["weight_decay"])?,
            ..LionConfig::default()
        };
        groups.push((members, config));
    }
    Ok(groups)
}

fn groups(reference: &mut Reference, run: &str) -> Result<()> {
    let mut cases = Vec::new();
    let mut groups = Vec::new();
    for (members, config) in read_groups(reference, run)? {
        let mut params = Vec::new();
        for index in members {
            let case = format!("{run}.p{index}");
            let init = reference.input(&format!("{case}.init"))?;
            let var = Var::from_tensor(&init.tensor(DType::F64)?)?;
            params.push((case.clone(), var.clone()));
            cases.push((case, var));
        }
        groups.push(ParamGroup::named(params, config));
    }
    let mut lion = Lion::with_groups(groups)?;
    trajectory(
        reference, &mut lion, &cases, "momentum", TOLERANCE, TOLERANCE,
    )
}

fn half_precision(reference: &mut Reference, run: &str) -> Result<()> {
    let settings = reference.json(run)?;
    let number = |key: &str| json_number(reference, run, &settings, key);
    let config = LionConfig {
        lr: number("lr")?,
        beta1: number("beta1")?,
        beta2: number("beta2")?,
        weight_decay: number("weight_decay")?,
        momentum_dtype: Some(DType::BF16),
        ..LionConfig::default()
    };
    let init = reference.input(&format!("{run}.init"))?;
    let var = Var::from_tensor(&init.tensor(DType::F32)?)?;
    let cases = vec![(run.to_string(), var)];
    let group = ParamGroup::named(cases.clone(), config);
    let mut lion = Lion::with_groups(vec![group])?;
    // The momentum bit for bit, the parameters to the last bit of `f32`.
    let (momentum, params) = (
        Tolerance::Mismatches(0),
        Tolerance::Mixed(f64::from(f32::EPSILON)),
    );
    trajectory(
        reference,
        &mut lion,
        &cases,
        "momentum_as_f32",
        momentum,
        params,
    )
}

/// Steps through the gradients of all cases together, and compares parameters and momentum after
/// each step.
fn trajectory(
    reference: &mut Reference,
    lion: &mut Lion,
    cases: &[(String, Var)],
    momentum: &str,
    momentum_tolerance: Tolerance,
    params_tolerance: Tolerance,
) -> Result<()> {
    let mut grads = Vec::new();
    for (case, var) in cases {
        let all = reference.input(&format!("{case}.grads"))?;
        let steps: Result<Vec<Tensor>> = rows(&all)?
            .iter()
            .map(|row| Ok(row.tensor(var.dtype())?))
            .collect();
        grads.push(steps?);
    }
    let steps = grads.iter().map(Vec::len).max().unwrap_or(0);
    let mut found = vec![(Vec::new(), Vec::new()); cases.len()];
    for t in 0..steps {
        step_on(lion, cases, &grads, t)?;
        let state = lion.state()?;
        for ((case, var), (params, moments)) in cases.iter().zip(&mut found) {
            params.extend(super::values(var)?);
            if let Some(m) = state.get(&format!("m.{case}")) {
                moments.extend(super::values(m)?);
            }
        }
    }
    for ((case, _), (params, moments)) in cases.iter().zip(&found) {
        reference.compare(&format!("{case}.params"), params, params_tolerance)?;
        let name = format!("{case}.{momentum}");
        reference.compare(&name, moments, momentum_tolerance)?;
    }
    Ok(())
}

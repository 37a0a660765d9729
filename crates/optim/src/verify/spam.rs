//! The reference of `spam`: the authors' class on dense and sparse tensors, and spike scores.

use super::{rows, step_on, values};
use crate::spam::{spike_scores, DecayMode, Spam, SpamConfig};
use crate::{ParamGroup, RandomStream, Result, Stateful};
use candle_core::{DType, Tensor, Var};
use tensor_core::kernels::Mask;
use tensor_core::verify::{Array, Reference, Tolerance};

const TOLERANCE: Tolerance = Tolerance::Mixed(1e-12);

/// Checks every trajectory (a prefix with `.init`; sparse where it has a `.mask`), the warm-up
/// factors, the counts of clipped entries, and the spike scores `gss.*`.
///
/// # Errors
/// An error when the file lacks an input; a difference is a failed comparison instead.
pub fn spam(reference: &mut Reference) -> Result<()> {
    let (mut dense, mut sparse) = (Vec::new(), Vec::new());
    for case in reference.cases(".init") {
        if reference.has(&format!("{case}.mask")) {
            sparse.push(case);
        } else {
            dense.push(case);
        }
    }
    run_dense(reference, &dense)?;
    for case in sparse {
        run_sparse(reference, &case)?;
    }
    for case in reference.cases(".spike") {
        scores(reference, &case)?;
    }
    Ok(())
}

fn config(reference: &Reference) -> Result<SpamConfig> {
    Ok(SpamConfig {
        lr: reference.number("lr")?,
        beta1: reference.number("beta1")?,
        beta2: reference.number("beta2")?,
        eps: reference.number("eps")?,
        delta_t: reference.number("delta_t")?,
        warmup: reference.number("warmup")?,
        threshold: reference.number("threshold")?,
        clip_after: reference.number("grad_accu_steps")?,
        ..SpamConfig::default()
    })
}

fn parameter(reference: &mut Reference, case: &str) -> Result<(Var, Vec<Tensor>)> {
    let init = reference.input(&format!("{case}.init"))?;
    let grads = reference.input(&format!("{case}.grads"))?;
    let steps: Result<Vec<Tensor>> = rows(&grads)?
        .iter()
        .map(|row| Ok(row.tensor(DType::F64)?))
        .collect();
    Ok((Var::from_tensor(&init.tensor(DType::F64)?)?, steps?))
}

fn run_dense(reference: &mut Reference, names: &[String]) -> Result<()> {
    let config = SpamConfig {
        weight_decay: reference.number("weight_decay_dense")?,
        ..config(reference)?
    };
    let (mut cases, mut grads) = (Vec::new(), Vec::new());
    for name in names {
        let (var, steps) = parameter(reference, name)?;
        cases.push((name.clone(), var));
        grads.push(steps);
    }
    let group = ParamGroup::named(cases.clone(), config);
    let mut spam = Spam::with_groups(vec![group], &RandomStream::new(0))?;
    let steps = grads.iter().map(Vec::len).max().unwrap_or(0);
    // Per tensor: parameters, first and second moments.
    let mut found = vec![[Vec::new(), Vec::new(), Vec::new()]; cases.len()];
    let (mut scale, mut clipped) = (Vec::new(), Vec::new());
    for t in 0..steps {
        step_on(&mut spam, &cases, &grads, t)?;
        scale.push(spam.stats().scale);
        clipped.push(spam.stats().clipped as f64);
        let state = spam.state()?;
        for ((name, var), [params, m, v]) in cases.iter().zip(&mut found) {
            params.extend(values(var)?);
            for (slot, out) in [("m", m), ("v", v)] {
                if let Some(tensor) = state.get(&format!("{slot}.{name}")) {
                    out.extend(values(tensor)?);
                }
            }
        }
    }
    for (name, parts) in names.iter().zip(&found) {
        for (part, got) in ["params", "m", "v"].iter().zip(parts) {
            reference.compare(&format!("{name}.{part}"), got, TOLERANCE)?;
        }
    }
    // Without dense tensors the file has nothing to say about them.
    if !names.is_empty() {
        reference.compare("scale", &scale, TOLERANCE)?;
        reference.compare("n_clipped_dense", &clipped, Tolerance::Mismatches(0))?;
    }
    Ok(())
}

fn run_sparse(reference: &mut Reference, name: &str) -> Result<()> {
    let config = SpamConfig {
        weight_decay: reference.number("weight_decay_sparse")?,
        density: Some(reference.number("density")?),
        // What the authors' class does, which decays a copy.
        decay_mode: DecayMode::Nothing,
        ..config(reference)?
    };
    let (var, grads) = parameter(reference, name)?;
    let cases = [(name.to_string(), var.clone())];
    let grads = [grads];
    // The masks in force during each step are random draws, given as input.
    let masks: Vec<Array> = rows(&reference.input(&format!("{name}.mask"))?)?;
    let group = ParamGroup::named(cases.clone(), config);
    let mut spam = Spam::with_groups(vec![group], &RandomStream::new(0))?;
    let mut params = Vec::new();
    for (t, mask) in masks.iter().enumerate() {
        let flags: Vec<bool> = mask.values.iter().map(|x| *x != 0.0).collect();
        spam.set_masks(&[(name.to_string(), Mask::from_bools(&flags)?)])?;
        step_on(&mut spam, &cases, &grads, t)?;
        params.extend(values(&var)?);
    }
    reference.compare(&format!("{name}.params"), &params, TOLERANCE)?;
    Ok(())
}

fn scores(reference: &mut Reference, case: &str) -> Result<()> {
    let threshold: f64 = reference.number(&format!("{case}.threshold"))?;
    let series = reference.input(&format!("{case}.grads"))?;
    let scores = spike_scores(&series.tensor(DType::F64)?)?;
    reference.compare_tensor(&format!("{case}.value"), &scores, TOLERANCE)?;
    let spikes: Vec<f64> = values(&scores)?
        .iter()
        .map(|score| f64::from(u8::from(*score > threshold)))
        .collect();
    reference.compare(&format!("{case}.spike"), &spikes, Tolerance::Mismatches(0))?;
    Ok(())
}

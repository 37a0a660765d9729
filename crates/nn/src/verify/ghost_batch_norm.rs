//! Ghost batch normalization: training steps per case, then an evaluation of the first input.

use super::record::{gradient, Record};
use crate::norm::ghost_batch::{
    ghost_batch_norm as new_layer, GhostBatchNorm, GhostBatchNormConfig, GhostPlan, Remainder,
};
use crate::Result;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::VarBuilder;
use std::collections::HashMap;
use tensor_core::verify::{Reference, Tolerance};

/// In f64; the file holds numbers of order 1.
const TOLERANCE: Tolerance = Tolerance::Mixed(1e-10);

/// Runs every case `P` of the file (those with `P.x`, `P.gamma` and `P.cotangent`) through
/// [`GhostBatchNorm`]: outputs, gradients and running statistics of every step, and the evaluation
/// of the first input. Other tensors belong to other adaptors.
///
/// # Errors
/// Those of the file and of the layer. A wrong number is a failed comparison.
pub fn ghost_batch_norm(reference: &mut Reference) -> Result<()> {
    for case in reference.cases(".gamma") {
        let has = |name: &str| reference.has(&format!("{case}.{name}"));
        if has("x") && has("cotangent") {
            run(reference, &case)?;
        }
    }
    Ok(())
}

/// A hyper-parameter of a case: the metadata key is `case.name`, or the name with the case's
/// suffix (`ghost1d` for `gbn1d`), or the name alone.
fn key(reference: &Reference, case: &str, name: &str) -> String {
    let mut candidates = vec![format!("{case}.{name}")];
    let suffixes = case
        .char_indices()
        .map(|(at, _)| format!("{name}{}", &case[at..]));
    candidates.extend(suffixes);
    let known = |k: &String| reference.metadata().contains_key(k);
    candidates
        .into_iter()
        .find(known)
        .unwrap_or_else(|| name.to_string())
}

fn run(reference: &mut Reference, case: &str) -> Result<()> {
    let name = |name: &str| format!("{case}.{name}");
    let config = GhostBatchNormConfig {
        ghost_size: reference.number(&key(reference, case, "ghost"))?,
        momentum: reference.number(&key(reference, case, "momentum"))?,
        eps: reference.number(&key(reference, case, "eps"))?,
        ..Default::default()
    };
    let weight = Var::from_tensor(&reference.input(&name("gamma"))?.tensor(DType::F64)?)?;
    let bias = Var::from_tensor(&reference.input(&name("beta"))?.tensor(DType::F64)?)?;
    let xs = reference.input(&name("x"))?;
    let cotangents = reference.input(&name("cotangent"))?;
    let batch = xs.shape.get(1).copied().unwrap_or(0);
    let layer = layer(&weight, &bias, cut(reference, case, batch, config)?)?;
    let mut record = Record::default();
    for step in 0..xs.shape.first().copied().unwrap_or(0) {
        let x = Var::from_tensor(&xs.row(step)?.tensor(DType::F64)?)?;
        let y = layer.forward_train(&x)?;
        let cotangent = cotangents.row(step)?.tensor(DType::F64)?;
        let store = (&y * cotangent)?.sum_all()?.backward()?;
        record.push("y", &y)?;
        record.push("grad_x", &gradient(&store, "x", &x)?)?;
        record.push("grad_gamma", &gradient(&store, "gamma", &weight)?)?;
        record.push("grad_beta", &gradient(&store, "beta", &bias)?)?;
        record.push("running_mean", layer.running_mean())?;
        record.push("running_var", layer.running_var())?;
    }
    record.compare(reference, case, TOLERANCE)?;
    let y = layer.forward_eval(&xs.row(0)?.tensor(DType::F64)?)?;
    reference.compare_tensor(&name("eval_y0"), &y, TOLERANCE)?;
    Ok(())
}

/// The way of cutting that gives the file's group sizes; the default where it has none.
fn cut(
    reference: &Reference,
    case: &str,
    batch: usize,
    config: GhostBatchNormConfig,
) -> Result<GhostBatchNormConfig> {
    let key = key(reference, case, "split");
    if !reference.metadata().contains_key(&key) {
        return Ok(config);
    }
    let text = reference.text(&key)?.to_string();
    let digits = text.split(|c: char| !c.is_ascii_digit());
    let sizes: Vec<usize> = digits.filter_map(|d| d.parse().ok()).collect();
    for remainder in [Remainder::Balanced, Remainder::Official] {
        if GhostPlan::new(batch, config.ghost_size, remainder)? == sizes {
            return Ok(GhostBatchNormConfig {
                remainder,
                ..config
            });
        }
    }
    Err(reference
        .bad(format!(
            "metadata `{key}` = {text} is no cut of {batch} examples"
        ))
        .into())
}

fn layer(weight: &Var, bias: &Var, config: GhostBatchNormConfig) -> Result<GhostBatchNorm> {
    let (n, device) = (weight.elem_count(), Device::Cpu);
    let tensors = HashMap::from([
        ("weight".to_string(), weight.as_tensor().clone()),
        ("bias".to_string(), bias.as_tensor().clone()),
        (
            "running_mean".to_string(),
            Tensor::zeros(n, DType::F64, &device)?,
        ),
        (
            "running_var".to_string(),
            Tensor::ones(n, DType::F64, &device)?,
        ),
    ]);
    new_layer(
        n,
        config,
        VarBuilder::from_tensors(tensors, DType::F64, &device),
    )
}

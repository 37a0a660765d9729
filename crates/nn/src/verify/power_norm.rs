//! Power normalization: a sequence of training steps per case, then an evaluation.

use super::record::{gradient, Record};
use crate::norm::power::{PowerNorm, PowerNormConfig};
use crate::Result;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::VarBuilder;
use std::collections::HashMap;
use tensor_core::verify::{Reference, Tolerance};

/// In f64; the file holds numbers of order 1.
const TOLERANCE: Tolerance = Tolerance::Mixed(1e-10);

/// Runs every case `P` of the file (those with `P.x` and `P.grad_y`) through
/// [`PowerNorm`]: all outputs, gradients and statistics of every step.
///
/// # Errors
/// Those of the file and of the layer. A wrong number is a failed comparison.
pub fn power_norm(reference: &mut Reference) -> Result<()> {
    for case in reference.cases(".grad_y") {
        if reference.has(&format!("{case}.x")) {
            run(reference, &case)?;
        }
    }
    Ok(())
}

fn run(reference: &mut Reference, case: &str) -> Result<()> {
    let key = |name: &str| format!("{case}.{name}");
    let config = PowerNormConfig {
        eps: reference.number(&key("eps"))?,
        alpha_fwd: reference.number(&key("alpha_fwd"))?,
        alpha_bkw: reference.number(&key("alpha_bkw"))?,
        warmup_iters: reference.number(&key("warmup_iters"))?,
        groups: reference.number(&key("groups"))?,
        ..Default::default()
    };
    let masked = match reference.metadata().contains_key(&key("masked")) {
        true => reference.flag(&key("masked"))?,
        false => reference.has(&key("pad")),
    };
    let weight = Var::from_tensor(&reference.input(&key("weight"))?.tensor(DType::F64)?)?;
    let bias = Var::from_tensor(&reference.input(&key("bias"))?.tensor(DType::F64)?)?;
    let layer = layer(&weight, &bias, config)?;
    let (xs, cotangents) = (
        reference.input(&key("x"))?,
        reference.input(&key("grad_y"))?,
    );
    let pads = match masked || reference.has(&key("pad")) {
        true => Some(reference.input(&key("pad"))?),
        false => None,
    };
    let mut record = Record::default();
    for step in 0..xs.shape.first().copied().unwrap_or(0) {
        let x = Var::from_tensor(&xs.row(step)?.tensor(DType::F64)?)?;
        let pad = match pads.as_ref().filter(|_| masked) {
            Some(pads) => Some(pads.row(step)?.tensor(DType::U8)?),
            None => None,
        };
        let y = layer.forward_t(&x, pad.as_ref(), true)?;
        let cotangent = cotangents.row(step)?.tensor(DType::F64)?;
        let store = (&y * cotangent)?.sum_all()?.backward()?;
        record.push("y", &y)?;
        record.push("grad_x", &gradient(&store, "x", &x)?)?;
        record.push("grad_weight", &gradient(&store, "weight", &weight)?)?;
        record.push("grad_bias", &gradient(&store, "bias", &bias)?)?;
        record.push("running_phi", &layer.running_phi()?)?;
        record.push("ema_gz", &layer.ema_gz()?)?;
    }
    record.compare(reference, case, TOLERANCE)?;
    let x = reference.input(&key("eval_x"))?.tensor(DType::F64)?;
    let y = layer.forward_t(&x, None, false)?;
    reference.compare_tensor(&key("eval_y"), &y, TOLERANCE)?;
    Ok(())
}

fn layer(weight: &Var, bias: &Var, config: PowerNormConfig) -> Result<PowerNorm> {
    let (n, device) = (weight.elem_count(), Device::Cpu);
    let tensors = HashMap::from([
        ("weight".to_string(), weight.as_tensor().clone()),
        ("bias".to_string(), bias.as_tensor().clone()),
        (
            "running_phi".to_string(),
            Tensor::ones(n, DType::F64, &device)?,
        ),
        ("ema_gz".to_string(), Tensor::zeros(n, DType::F64, &device)?),
        ("iters".to_string(), Tensor::zeros(1, DType::F64, &device)?),
    ]);
    PowerNorm::new(
        n,
        config,
        VarBuilder::from_tensors(tensors, DType::F64, &device),
    )
}

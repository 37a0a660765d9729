//! The reference of `perp-grad`: the projection, runs over two optimizers, and the diagnoses.

use super::{bad, rows, step_on, values};
use crate::adamw::{AdamW, AdamWConfig};
use crate::perp_grad::{
    orthogonalize, CollapseFlags, NlmMonitor, PerpGrad, PerpGradConfig, SoftmaxCollapse,
};
use crate::sgd::{SgdConfig, SgdMomentum};
use crate::{ParamGroup, Result, StepWith};
use candle_core::{DType, Tensor, Var, D};
use tensor_core::verify::{Reference, Tolerance};

/// Checks `orth.*`, `train.*`, `sc.*` and `nlm.*`; the StableMax tensors belong to the crate that
/// has the loss, and are left alone.
///
/// # Errors
/// An error when the file lacks an input; a difference is a failed comparison instead.
pub fn perp_grad(reference: &mut Reference) -> Result<()> {
    for case in reference.cases(".out_f64") {
        orth(reference, &case)?;
    }
    let train = reference.cases(".init");
    if !train.is_empty() {
        train_adamw(reference, &train)?;
        train_sgd(reference, &train)?;
    }
    for case in reference.cases(".logits_f32") {
        collapse(reference, &case)?;
    }
    for case in reference.cases(".cos_global") {
        nlm(reference, &case)?;
    }
    Ok(())
}

fn orth(reference: &mut Reference, case: &str) -> Result<()> {
    let w = reference.input(&format!("{case}.w"))?;
    let g = reference.input(&format!("{case}.g"))?;
    let scale = g.values.iter().fold(0.0_f64, |max, x| max.max(x.abs()));
    let precisions = [
        (DType::F64, "out_f64", 1e-12),
        (DType::F32, "out_f32", 1e-5),
    ];
    for (dtype, out, tol) in precisions {
        let name = format!("{case}.{out}");
        if reference.has(&name) {
            let config = PerpGradConfig::default();
            let got = orthogonalize(&w.tensor(dtype)?, &g.tensor(dtype)?, &config)?;
            reference.compare_tensor(&name, &got, Tolerance::Scaled { tol, scale })?;
        }
    }
    Ok(())
}

fn train_adamw(reference: &mut Reference, names: &[String]) -> Result<()> {
    let config = AdamWConfig {
        lr: reference.number("adamw_lr")?,
        beta1: reference.number("adamw_beta1")?,
        beta2: reference.number("adamw_beta2")?,
        eps: reference.number("adamw_eps")?,
        weight_decay: reference.number("adamw_weight_decay")?,
        ..AdamWConfig::default()
    };
    train(reference, names, "adamw_params", |params| {
        AdamW::with_groups(vec![ParamGroup::named(params, config)])
    })
}

fn train_sgd(reference: &mut Reference, names: &[String]) -> Result<()> {
    let config = SgdConfig {
        lr: reference.number("sgd_lr")?,
        momentum: reference.number("sgd_momentum")?,
        ..SgdConfig::default()
    };
    train(reference, names, "sgd_params", |params| {
        SgdMomentum::with_groups(vec![ParamGroup::named(params, config)])
    })
}

fn train<O: StepWith>(
    reference: &mut Reference,
    names: &[String],
    out: &str,
    optimizer: impl FnOnce(Vec<(String, Var)>) -> Result<O>,
) -> Result<()> {
    let (mut cases, mut grads) = (Vec::new(), Vec::new());
    for name in names {
        let init = reference.input(&format!("{name}.init"))?;
        cases.push((name.clone(), Var::from_tensor(&init.tensor(DType::F64)?)?));
        let steps: Result<Vec<Tensor>> = rows(&reference.input(&format!("{name}.grads"))?)?
            .iter()
            .map(|row| Ok(row.tensor(DType::F64)?))
            .collect();
        grads.push(steps?);
    }
    let mut perp = PerpGrad::wrap(PerpGradConfig::default(), optimizer(cases.clone())?)?;
    let steps = grads.iter().map(Vec::len).max().unwrap_or(0);
    let mut found = vec![Vec::new(); cases.len()];
    for t in 0..steps {
        step_on(&mut perp, &cases, &grads, t)?;
        for ((_, var), params) in cases.iter().zip(&mut found) {
            params.extend(values(var)?);
        }
    }
    for (name, params) in names.iter().zip(&found) {
        reference.compare(&format!("{name}.{out}"), params, Tolerance::Mixed(1e-11))?;
    }
    Ok(())
}

fn collapse(reference: &mut Reference, case: &str) -> Result<()> {
    let logits = reference.input(&format!("{case}.logits_f32"))?;
    let labels = reference.input(&format!("{case}.labels"))?;
    let (logits, labels) = (logits.tensor(DType::F32)?, labels.tensor(DType::I64)?);
    let precisions = [
        // Where a sum lies within one rounding of 1, the order of summation decides.
        ("f64", DType::F64, 0),
        ("f32", DType::F32, 1),
        ("f16", DType::F16, 2),
        ("bf16", DType::BF16, 2),
    ];
    let of = |kind: &str, flags: &CollapseFlags| match kind {
        "collapsed" => flags.collapsed,
        _ => flags.zero_loss,
    };
    for (suffix, dtype, allowed) in precisions {
        let flags = SoftmaxCollapse::flags(&logits, &labels, dtype)?;
        for kind in ["collapsed", "zero_loss"] {
            let name = format!("{case}.{kind}_{suffix}");
            if reference.has(&name) {
                let flag = |f| f64::from(u8::from(of(kind, f)));
                let got: Vec<f64> = flags.iter().map(flag).collect();
                reference.compare(&name, &got, Tolerance::Mismatches(allowed))?;
            }
        }
    }
    Ok(())
}

/// A bias-free ReLU network with mean softmax cross entropy.
fn nlm(reference: &mut Reference, case: &str) -> Result<()> {
    const TOLERANCE: Tolerance = Tolerance::Mixed(1e-12);
    let name = |part: &str| format!("{case}.{part}");
    let x = reference.input(&name("x"))?.tensor(DType::F64)?;
    let labels = reference.input(&name("labels"))?.tensor(DType::U32)?;
    let mut params = Vec::new();
    while reference.has(&name(&format!("w{}", params.len()))) {
        let layer = format!("w{}", params.len());
        let w = reference.input(&name(&layer))?.tensor(DType::F64)?;
        params.push((layer, Var::from_tensor(&w)?));
    }
    let mut z = x;
    for (i, (_, w)) in params.iter().enumerate() {
        if i > 0 {
            z = z.relu()?;
        }
        z = z.matmul(&w.t()?)?;
    }
    reference.compare_tensor(&name("logits"), &z, TOLERANCE)?;
    let shifted = z.broadcast_sub(&z.detach().max_keepdim(D::Minus1)?)?;
    let log_sum = shifted.exp()?.sum_keepdim(D::Minus1)?.log()?;
    let log_p = shifted.broadcast_sub(&log_sum)?;
    let loss = log_p.gather(&labels.unsqueeze(1)?, 1)?.mean_all()?.neg()?;
    let grads = loss.backward()?;
    for (i, (_, w)) in params.iter().enumerate() {
        let grad = grads.get(w);
        let grad = grad.ok_or_else(|| bad(reference, format!("no gradient for w{i}")))?;
        reference.compare_tensor(&name(&format!("grad{i}")), grad, TOLERANCE)?;
    }
    let report = NlmMonitor::measure(&params, &grads)?;
    let each: Vec<f64> = report.cos_per_tensor.iter().map(|(_, cos)| *cos).collect();
    reference.compare(&name("cos_per_tensor"), &each, TOLERANCE)?;
    reference.compare(&name("cos_global"), &[report.cos_global], TOLERANCE)?;
    Ok(())
}

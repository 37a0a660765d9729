//! The reference of `opposing-signals`: the toy model, the detection on its losses, a Hessian.

use super::{bad, values};
use crate::diagnostics::opposing::{
    analyze, group_gradients, loss_sharpness, Center, LanczosConfig, LossRecorder, OpposingConfig,
    OpposingPair, TopK, ToyData, ToyModel,
};
use crate::{RandomStream, Result};
use candle_core::{DType, Device, Tensor, Var, D};
use tensor_core::autograd::{hvp, Method};
use tensor_core::verify::{Reference, Tolerance};

const TOY: Tolerance = Tolerance::Absolute(1e-5);
const DETECT: Tolerance = Tolerance::Absolute(1e-4);
const EXACT: Tolerance = Tolerance::Mismatches(0);

/// Checks every toy trajectory (a prefix with `.b0`), what is detected in it (the same prefix with
/// `detect` in the place of `toy`), and the Hessian of every small network (`.hv`).
///
/// # Errors
/// An error when the file lacks an input; a difference is a failed comparison instead.
pub fn opposing_signals(reference: &mut Reference) -> Result<()> {
    for case in reference.cases(".b0") {
        toy(reference, &case)?;
    }
    for case in reference.cases(".hv") {
        hessian(reference, &case)?;
    }
    Ok(())
}

fn toy(reference: &mut Reference, case: &str) -> Result<()> {
    let sign = |g: &f64| {
        if *g == 0.0 {
            0
        } else if *g > 0.0 {
            1
        } else {
            -1
        }
    };
    let data = ToyData {
        x: reference.input(&format!("{case}.X"))?.tensor(DType::F64)?,
        y: reference.input(&format!("{case}.y"))?.tensor(DType::F64)?,
        group: reference
            .input(&format!("{case}.group"))?
            .values
            .iter()
            .map(sign)
            .collect(),
    };
    let eta: f64 = reference.number("eta")?;
    let steps = reference.expected(&format!("{case}.c"))?.shape[0];
    let mut model = ToyModel {
        c: reference.number("c0")?,
        b: reference.input(&format!("{case}.b0"))?.tensor(DType::F64)?,
    };
    let mut recorder = LossRecorder::new(data.group.len(), steps.max(2))?;
    let (mut models, mut losses) = (Vec::new(), Vec::new());
    let (mut c, mut b, mut sharpness) = (Vec::new(), Vec::new(), Vec::new());
    for t in 0..steps {
        let own = data.losses(&model)?;
        recorder.record(t, &own)?;
        losses.extend(values(&own)?);
        c.push(model.c);
        b.extend(values(&model.b)?);
        sharpness.push(data.sharpness(&model)?.0);
        let next = data.descend(&model, eta)?;
        models.push(std::mem::replace(&mut model, next));
    }
    for (name, found) in [
        ("c", &c),
        ("b", &b),
        ("loss", &losses),
        ("sharpness", &sharpness),
    ] {
        reference.compare(&format!("{case}.{name}"), found, TOY)?;
    }
    let case = case.replace("toy", "detect");
    if reference.has(&format!("{case}.step")) {
        detection(reference, &case, &data, &models, &recorder)?;
    }
    Ok(())
}

fn detection(
    reference: &mut Reference,
    case: &str,
    data: &ToyData,
    models: &[ToyModel],
    recorder: &LossRecorder,
) -> Result<()> {
    let config = OpposingConfig {
        k: TopK::Count(reference.number("k")?),
        window: reference.number("window")?,
        center: Center::Median,
        // The file says that something is to be found, however quiet it is.
        min_change: 0.0,
        ..OpposingConfig::default()
    };
    let Some(pair) = OpposingPair::strongest(recorder, &config)? else {
        return Err(bad(reference, "nothing moves in the toy trajectory"));
    };
    let again = analyze(recorder, pair.row, &config)?;
    let indices = |of: &[usize]| of.iter().map(|i| *i as f64).collect::<Vec<_>>();
    reference.compare(&format!("{case}.step"), &[pair.step as f64], EXACT)?;
    reference.compare(&format!("{case}.increase_idx"), &indices(&pair.up), EXACT)?;
    reference.compare(
        &format!("{case}.decrease_idx"),
        &indices(&again.down),
        EXACT,
    )?;
    reference.compare(&format!("{case}.changes"), &pair.changes, DETECT)?;
    reference.compare(&format!("{case}.corr"), &[pair.corr], DETECT)?;
    reference.compare(
        &format!("{case}.valley_step"),
        &[pair.valley_row as f64],
        EXACT,
    )?;
    for (prefix, row) in [("", pair.row), ("valley_", pair.valley_row)] {
        let report = at(data, &models[row], &pair)?;
        let cos = if prefix.is_empty() {
            "group_cos"
        } else {
            "valley_cos"
        };
        reference.compare(&format!("{case}.{cos}"), &[report.cos], DETECT)?;
        let ratio = [report.norm_ratio.0, report.norm_ratio.1];
        reference.compare(&format!("{case}.{prefix}norm_ratio"), &ratio, DETECT)?;
        if let (true, Some((up, down, all))) = (prefix.is_empty(), report.eig_alignment) {
            reference.compare(&format!("{case}.eig_alignment"), &[up, down, all], DETECT)?;
        }
    }
    Ok(())
}

/// The groups' gradients at one model of the trajectory.
fn at(
    data: &ToyData,
    model: &ToyModel,
    pair: &OpposingPair,
) -> Result<crate::diagnostics::opposing::GroupGradReport> {
    let c = Var::from_tensor(&Tensor::new(&[model.c], &Device::Cpu)?)?;
    let b = Var::from_tensor(&model.b)?;
    let loss = |examples: &[usize]| {
        let chosen: Vec<u32> = examples.iter().map(|i| *i as u32).collect();
        let chosen = Tensor::new(chosen, &Device::Cpu)?;
        let (x, y) = (
            data.x.index_select(&chosen, 0)?,
            data.y.index_select(&chosen, 0)?,
        );
        let out = x.matmul(&b.unsqueeze(1)?)?.squeeze(1)?.broadcast_mul(&c)?;
        (out - y)?.sqr()?.mean_all()? * 0.5
    };
    let (_, top) = data.sharpness(model)?;
    let d = b.elem_count();
    let direction = [top.narrow(0, 0, 1)?, top.narrow(0, 1, d)?];
    let all: Vec<usize> = (0..data.group.len()).collect();
    let vars = [("c".to_string(), c.clone()), ("b".to_string(), b.clone())];
    group_gradients(loss, &vars, pair, &all, Some(&direction))
}

/// Mean cross entropy of `tanh(x w1^T) w2^T`.
fn hessian(reference: &mut Reference, case: &str) -> Result<()> {
    let x = reference.input(&format!("{case}.x"))?.tensor(DType::F64)?;
    let y = reference.input(&format!("{case}.y"))?.tensor(DType::U32)?;
    let mut vars = Vec::new();
    while reference.has(&format!("{case}.w{}", vars.len() + 1)) {
        let name = format!("{case}.w{}", vars.len() + 1);
        vars.push(Var::from_tensor(
            &reference.input(&name)?.tensor(DType::F64)?,
        )?);
    }
    let loss = || {
        let mut h = x.clone();
        for (i, w) in vars.iter().enumerate() {
            h = h.matmul(&w.t()?)?;
            if i + 1 < vars.len() {
                h = h.tanh()?;
            }
        }
        let shifted = h.broadcast_sub(&h.detach().max_keepdim(D::Minus1)?)?;
        let log_sum = shifted.exp()?.sum_keepdim(D::Minus1)?.log()?;
        let log_p = shifted.broadcast_sub(&log_sum)?;
        log_p.gather(&y.unsqueeze(1)?, 1)?.mean_all()?.neg()
    };
    let v = reference.input(&format!("{case}.v"))?.tensor(DType::F64)?;
    let product = |v: &Tensor| -> Result<(Vec<f64>, Method)> {
        let (mut parts, mut from) = (Vec::new(), 0);
        for var in &vars {
            let part = v.narrow(0, from, var.elem_count())?;
            parts.push(part.reshape(var.shape())?);
            from += var.elem_count();
        }
        let hv = hvp(loss, &vars, &parts)?;
        let mut flat = Vec::new();
        for part in &hv.value {
            flat.extend(values(part)?);
        }
        Ok((flat, hv.method))
    };
    let (hv, method) = product(&v)?;
    // Differences of gradients have an error of their own.
    let tolerance = match method {
        Method::Exact => Tolerance::Mixed(1e-8),
        Method::CentralDifferences { .. } => Tolerance::Mixed(1e-3),
    };
    reference.compare(&format!("{case}.hv"), &hv, tolerance)?;
    let dim = hv.len();
    let mut trace = 0.0;
    for i in 0..dim {
        let mut unit = vec![0.0; dim];
        unit[i] = 1.0;
        trace += product(&Tensor::from_vec(unit, dim, &Device::Cpu)?)?.0[i];
    }
    reference.compare(&format!("{case}.trace"), &[trace], tolerance)?;
    let config = LanczosConfig {
        k: reference.expected(&format!("{case}.top3"))?.shape[0],
        iters: dim,
        tol: 1e-12,
    };
    let top = loss_sharpness(loss, &vars, config, &mut RandomStream::new(0))?;
    reference.compare(&format!("{case}.top3"), &top.values, tolerance)?;
    if let Some(vector) = top.vectors.first() {
        reference.compare_tensor(&format!("{case}.top_vec"), vector, tolerance)?;
    }
    Ok(())
}

//! The reference of `gradsign`: scores of small networks, per-example gradients, sign counts.

use super::{bad, rows, values};
use crate::diagnostics::gradsign::{
    gradsign as score, GradSignConfig, Method, SignCounter, SignReduction, SignTape,
};
use crate::Result;
use candle_core::{DType, Module, Tensor, Var, D};
use candle_nn::Conv2dConfig;
use tensor_core::verify::{Reference, Tolerance};

const GRADIENTS: Tolerance = Tolerance::Mixed(1e-12);
const EXACT: Tolerance = Tolerance::Mismatches(0);

/// Checks every perceptron (a prefix with `.w0`), every convolutional network (`.c1.weight`) and
/// every list of gradients (`.score_nansum`); networks by both methods.
///
/// # Errors
/// An error when the file lacks an input; a difference is a failed comparison instead.
pub fn gradsign(reference: &mut Reference) -> Result<()> {
    for case in reference.cases(".w0") {
        perceptron(reference, &case)?;
    }
    for case in reference.cases(".c1.weight") {
        convolutional(reference, &case)?;
    }
    for case in reference.cases(".score_nansum") {
        listed(reference, &case)?;
    }
    Ok(())
}

fn var(reference: &mut Reference, name: &str) -> Result<Var> {
    Ok(Var::from_tensor(
        &reference.input(name)?.tensor(DType::F64)?,
    )?)
}

/// Mean cross entropy.
fn cross_entropy(logits: &Tensor, y: &Tensor) -> candle_core::Result<Tensor> {
    let shifted = logits.broadcast_sub(&logits.detach().max_keepdim(D::Minus1)?)?;
    let log_sum = shifted.exp()?.sum_keepdim(D::Minus1)?.log()?;
    let log_p = shifted.broadcast_sub(&log_sum)?;
    log_p.gather(&y.unsqueeze(1)?, 1)?.mean_all()?.neg()
}

fn inputs(reference: &mut Reference, case: &str) -> Result<(Tensor, Tensor)> {
    let x = reference.input(&format!("{case}.x"))?.tensor(DType::F64)?;
    let y = reference.input(&format!("{case}.y"))?.tensor(DType::U32)?;
    Ok((x, y))
}

/// The score by one method.
fn by(
    method: Method,
    tape: &SignTape,
    model: impl Fn(&Tensor) -> candle_core::Result<Tensor>,
    params: &[(String, Var)],
    (x, y): (&Tensor, &Tensor),
) -> Result<f64> {
    let config = GradSignConfig {
        method,
        tape: Some(tape.clone()),
        ..GradSignConfig::default()
    };
    Ok(score(model, params, x, y, cross_entropy, &config)?.score)
}

/// Linear layers `w{i}`, `b{i}` with ReLU between them.
fn perceptron(reference: &mut Reference, case: &str) -> Result<()> {
    let (x, y) = inputs(reference, case)?;
    let (tape, mut layers, mut params) = (SignTape::new(), Vec::new(), Vec::new());
    while reference.has(&format!("{case}.w{}", layers.len())) {
        let i = layers.len();
        let weight = var(reference, &format!("{case}.w{i}"))?;
        let bias = format!("{case}.b{i}");
        let bias = match reference.has(&bias) {
            true => Some(reference.input(&bias)?.tensor(DType::F64)?),
            false => None,
        };
        layers.push(tape.linear(&weight, bias.as_ref())?);
        params.push((format!("w{i}"), weight));
    }
    let model = |x: &Tensor| {
        let mut h = x.clone();
        for (i, layer) in layers.iter().enumerate() {
            h = layer.forward(&h)?;
            if i + 1 < layers.len() {
                h = h.relu()?;
            }
        }
        Ok(h)
    };
    let mut counter = SignCounter::for_params(&params);
    let mut gradients = Vec::new();
    for i in 0..x.dim(0)? {
        let out = model(&x.narrow(0, i, 1)?)?;
        let grads = cross_entropy(&out, &y.narrow(0, i, 1)?)?.backward()?;
        counter.push(&params, &grads)?;
        for (name, var) in &params {
            let grad = grads
                .get(var)
                .ok_or_else(|| bad(reference, format!("`{case}.{name}` gets no gradient")))?;
            gradients.extend(values(grad)?);
        }
    }
    reference.compare(&format!("{case}.grads"), &gradients, GRADIENTS)?;
    let counts = |negative: bool| -> Vec<f64> {
        let of = (0..params.len()).filter_map(|i| counter.counts(i));
        of.flat_map(|(p, n)| if negative { n } else { p }.iter().map(|x| f64::from(*x)))
            .collect()
    };
    let both = [counts(false), counts(true)].concat();
    reference.compare(&format!("{case}.sign_counts"), &both, EXACT)?;
    for method in [Method::PerExample, Method::Factored] {
        let tau = by(method, &tape, model, &params, (&x, &y))?;
        reference.compare(&format!("{case}.score"), &[tau], EXACT)?;
    }
    Ok(())
}

/// Batch norm over images: by the batch's own statistics (a batch of one, or every example by
/// itself), or by given ones.
fn batch_norm(
    x: &Tensor,
    (weight, bias): (&Tensor, &Tensor),
    given: Option<(&Tensor, &Tensor)>,
    eps: f64,
) -> candle_core::Result<Tensor> {
    let (batch, channels, height, width) = x.dims4()?;
    let (mean, variance) = match given {
        Some((mean, variance)) => (
            mean.reshape((1, channels, 1))?,
            variance.reshape((1, channels, 1))?,
        ),
        None => {
            let flat = x.reshape((batch, channels, height * width))?;
            let mean = flat.mean_keepdim(2)?;
            let variance = flat.broadcast_sub(&mean)?.sqr()?.mean_keepdim(2)?;
            (mean, variance)
        }
    };
    let flat = x.reshape((batch, channels, height * width))?;
    let normal = flat
        .broadcast_sub(&mean)?
        .broadcast_div(&(variance + eps)?.sqrt()?)?;
    normal
        .broadcast_mul(&weight.reshape((1, channels, 1))?)?
        .broadcast_add(&bias.reshape((1, channels, 1))?)?
        .reshape((batch, channels, height, width))
}

/// Convolution, batch norm, ReLU, convolution, ReLU, mean over space, linear; and a layer that is
/// not used.
fn convolutional(reference: &mut Reference, case: &str) -> Result<()> {
    let (x, y) = inputs(reference, case)?;
    let settings = reference.json(case)?;
    let eps = super::json_number(reference, case, &settings, "bn_eps")?;
    let name = |part: &str| format!("{case}.{part}");
    let mut get = |part: &str| var(reference, &name(part));
    let (c1, c1_bias) = (get("c1.weight")?, get("c1.bias")?);
    let (bn_weight, bn_bias) = (get("bn.weight")?, get("bn.bias")?);
    let (bn_mean, bn_var) = (get("bn.running_mean")?, get("bn.running_var")?);
    let (c2, f, f_bias) = (get("c2.weight")?, get("f.weight")?, get("f.bias")?);
    let unused = get("unused.weight")?;
    get("unused.bias")?;
    let tape = SignTape::new();
    let padded = |weight: &Var| Conv2dConfig {
        padding: weight.dims()[3] / 2,
        ..Conv2dConfig::default()
    };
    let first = tape.conv2d(&c1, Some(c1_bias.as_tensor()), padded(&c1))?;
    let second = tape.conv2d(&c2, None, padded(&c2))?;
    let head = tape.linear(&f, Some(f_bias.as_tensor()))?;
    tape.linear(&unused, None)?;
    let params: Vec<(String, Var)> = [("c1", c1), ("c2", c2), ("f", f), ("unused", unused)]
        .map(|(name, var)| (name.to_string(), var))
        .into();
    for (result, train) in [("score_train_bn", true), ("score_eval_bn", false)] {
        let running = (bn_mean.as_tensor(), bn_var.as_tensor());
        let model = |x: &Tensor| {
            let h = first.forward(x)?;
            let affine = (bn_weight.as_tensor(), bn_bias.as_tensor());
            let h = batch_norm(&h, affine, (!train).then_some(running), eps)?.relu()?;
            let h = second.forward(&h)?.relu()?;
            head.forward(&h.mean((2, 3))?)
        };
        for method in [Method::PerExample, Method::Factored] {
            let tau = by(method, &tape, model, &params, (&x, &y))?;
            reference.compare(&name(result), &[tau], EXACT)?;
        }
    }
    Ok(())
}

/// Gradients as rows, with zeros and NaN among them.
fn listed(reference: &mut Reference, case: &str) -> Result<()> {
    let grads = reference.input(&format!("{case}.grads"))?;
    let width = grads.shape.get(1).copied().unwrap_or(0);
    let mut counter = SignCounter::new(&[("all".to_string(), vec![width])]);
    for row in rows(&grads)? {
        counter.push_row(&row.tensor(DType::F64)?)?;
    }
    let sum = counter.score(SignReduction::Sum);
    reference.compare(&format!("{case}.score_nansum"), &[sum], EXACT)?;
    let mean = counter.score(SignReduction::Mean);
    let name = format!("{case}.score_nanmean");
    Ok(reference.compare(&name, &[mean], GRADIENTS)?)
}

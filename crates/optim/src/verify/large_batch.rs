//! The reference of `large_batch`: noise, diffusion fits, adapted regimes.

use super::bad;
use crate::large_batch::{fit_diffusion, gradient_covariance, Regime, Setting};
use crate::Result;
use candle_core::DType;
use std::collections::BTreeMap;
use tensor_core::verify::{Reference, Tolerance};

const TOLERANCE: Tolerance = Tolerance::Mixed(1e-10);

/// Checks every noise (`P.noisy_grad`), diffusion (`P.log_fit`) and regime case (`P.epoch` and
/// `P.lr`) with the metadata of its prefix (`P_M`); the ghost batch normalization tensors belong to
/// the crate that has the layer, and are left alone.
///
/// # Errors
/// An error when the file lacks an input; a difference is a failed comparison instead.
pub fn large_batch(reference: &mut Reference) -> Result<()> {
    for case in reference.cases(".noisy_grad") {
        noise(reference, &case)?;
    }
    for case in reference.cases(".log_fit") {
        diffusion(reference, &case)?;
    }
    for case in reference.cases(".epoch") {
        regime(reference, &case)?;
    }
    Ok(())
}

fn noise(reference: &mut Reference, case: &str) -> Result<()> {
    let batch: usize = reference.number(&format!("{case}_M"))?;
    let sigma2: f64 = reference.number(&format!("{case}_sigma2"))?;
    let grads = reference
        .input(&format!("{case}.grads"))?
        .tensor(DType::F64)?;
    let covariance = gradient_covariance(&grads, batch, sigma2)?;
    reference.compare_tensor(&format!("{case}.cov"), &covariance, TOLERANCE)?;

    let chosen = reference.input(&format!("{case}.batch_idx"))?;
    let picked = grads.index_select(&chosen.tensor(DType::U32)?, 0)?;
    let z = reference.input(&format!("{case}.z"))?.tensor(DType::F64)?;
    // The gradient of the mean of z_n l_n, where the gradient of l_n is a row.
    let noisy = picked.broadcast_mul(&z.unsqueeze(1)?)?.mean(0)?;
    reference.compare_tensor(&format!("{case}.noisy_grad"), &noisy, TOLERANCE)?;
    Ok(())
}

fn diffusion(reference: &mut Reference, case: &str) -> Result<()> {
    let t = reference.input(&format!("{case}.t"))?.values;
    let d = reference.input(&format!("{case}.dist"))?.values;
    let fit = fit_diffusion(&t, &d)?;
    let line = [fit.slope, fit.intercept, fit.r2_log];
    reference.compare(&format!("{case}.log_fit"), &line, TOLERANCE)?;
    reference.compare(&format!("{case}.lin_r2"), &[fit.r2_linear], TOLERANCE)?;
    let power = [fit.exponent, fit.alpha];
    reference.compare(&format!("{case}.exponent"), &power, TOLERANCE)?;
    Ok(())
}

fn regime(reference: &mut Reference, case: &str) -> Result<()> {
    let (large, small) = (
        reference.number(&format!("{case}_B"))?,
        reference.number(&format!("{case}_S"))?,
    );
    let key = format!("{case}_base");
    let base = reference.json(&key)?;
    let pairs = base
        .as_object()
        .ok_or_else(|| bad(reference, format!("metadata `{key}` is not an object")))?;
    let mut milestones = BTreeMap::new();
    for (epoch, lr) in pairs {
        let parsed = epoch.parse::<usize>().ok().zip(lr.as_f64());
        let (epoch, lr) = parsed.ok_or_else(|| bad(reference, format!("{key}: {epoch}: {lr}")))?;
        milestones.insert(epoch, Setting::lr(lr));
    }
    let total = milestones.keys().last().map_or(1, |last| last + 1);
    let adapted = Regime::new(milestones, total)?.adapt(large, small, true, true)?;
    let (mut epochs, mut rates) = (Vec::new(), Vec::new());
    for (epoch, setting) in adapted.milestones() {
        epochs.push(*epoch as f64);
        rates.push(setting.lr.unwrap_or(f64::NAN));
    }
    reference.compare(&format!("{case}.epoch"), &epochs, TOLERANCE)?;
    reference.compare(&format!("{case}.lr"), &rates, TOLERANCE)?;
    Ok(())
}

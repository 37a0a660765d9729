//! The reference of `large_batch`: noise, diffusion fits, adapted regimes.

use super::bad;
use crate::large_batch::{fit_diffusion, gradient_covariance, Regime, Setting};
use crate::Result;
use candle_core::DType;
use std::collections::BTreeMap;
use tensor_core::verify::{Reference, Tolerance};

const TOLERANCE: Tolerance = Tolerance::Mixed(1e-10);

/// Checks `noise.*`, `diffusion.*` and `regime.*`; the ghost batch normalization tensors belong to
/// the crate that has the layer, and are left alone.
///
/// # Errors
/// An error when the file lacks an input; a difference is a failed comparison instead.
pub fn large_batch(reference: &mut Reference) -> Result<()> {
    if reference.has("noise.grads") {
        noise(reference)?;
    }
    if reference.has("diffusion.t") {
        diffusion(reference)?;
    }
    if reference.has("regime.lr") {
        regime(reference)?;
    }
    Ok(())
}

fn noise(reference: &mut Reference) -> Result<()> {
    let batch: usize = reference.number("noise_M")?;
    let sigma2: f64 = reference.number("noise_sigma2")?;
    let grads = reference.input("noise.grads")?.tensor(DType::F64)?;
    let covariance = gradient_covariance(&grads, batch, sigma2)?;
    reference.compare_tensor("noise.cov", &covariance, TOLERANCE)?;

    let chosen = reference.input("noise.batch_idx")?;
    let picked = grads.index_select(&chosen.tensor(DType::U32)?, 0)?;
    let z = reference.input("noise.z")?.tensor(DType::F64)?;
    // The gradient of the mean of z_n l_n, where the gradient of l_n is a row.
    let noisy = picked.broadcast_mul(&z.unsqueeze(1)?)?.mean(0)?;
    reference.compare_tensor("noise.noisy_grad", &noisy, TOLERANCE)?;
    Ok(())
}

fn diffusion(reference: &mut Reference) -> Result<()> {
    let t = reference.input("diffusion.t")?.values;
    let d = reference.input("diffusion.dist")?.values;
    let fit = fit_diffusion(&t, &d)?;
    let line = [fit.slope, fit.intercept, fit.r2_log];
    reference.compare("diffusion.log_fit", &line, TOLERANCE)?;
    reference.compare("diffusion.lin_r2", &[fit.r2_linear], TOLERANCE)?;
    let power = [fit.exponent, fit.alpha];
    reference.compare("diffusion.exponent", &power, TOLERANCE)?;
    Ok(())
}

fn regime(reference: &mut Reference) -> Result<()> {
    let (large, small) = (reference.number("regime_B")?, reference.number("regime_S")?);
    let base = reference.json("regime_base")?;
    let pairs = base
        .as_object()
        .ok_or_else(|| bad(reference, "metadata `regime_base` is not an object"))?;
    let mut milestones = BTreeMap::new();
    for (epoch, lr) in pairs {
        let parsed = epoch.parse::<usize>().ok().zip(lr.as_f64());
        let (epoch, lr) =
            parsed.ok_or_else(|| bad(reference, format!("regime_base: {epoch}: {lr}")))?;
        milestones.insert(epoch, Setting::lr(lr));
    }
    let total = milestones.keys().last().map_or(1, |last| last + 1);
    let adapted = Regime::new(milestones, total)?.adapt(large, small, true, true)?;
    let (mut epochs, mut rates) = (Vec::new(), Vec::new());
    for (epoch, setting) in adapted.milestones() {
        epochs.push(*epoch as f64);
        rates.push(setting.lr.unwrap_or(f64::NAN));
    }
    reference.compare("regime.epoch", &epochs, TOLERANCE)?;
    reference.compare("regime.lr", &rates, TOLERANCE)?;
    Ok(())
}

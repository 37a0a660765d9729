//! The reference of APG: the combination over several steps, in two conventions.

use crate::apg::{Apg, Convention, Threshold};
use crate::Result;
use candle_core::{DType, Tensor};
use flows::verify::{setting, setting_text, values};
use tensor_core::verify::{Array, Reference, Tolerance};

const TOLERANCE: Tolerance = Tolerance::Mixed(1e-10);

/// Checks every case of the file in the paper's convention and in diffusers'.
///
/// # Errors
/// An error when the file lacks an input; a difference is a failed comparison instead.
pub fn apg(reference: &mut Reference) -> Result<()> {
    let wanted = reference.input("pred_cond")?;
    let unwanted = reference.input("pred_uncond")?;
    for case in reference.cases("_paper") {
        let mut rule = Apg::new(setting(reference, &case, "w")?);
        rule.eta = setting(reference, &case, "eta")?;
        rule.momentum = optional(reference, &case, "beta")?;
        let r = optional(reference, &case, "r")?.filter(|r| *r != 0.0);
        rule.norm_threshold = r.map(Threshold::Norm);
        let (found, running) = run(&rule, &wanted, &unwanted, DType::F64)?;
        reference.compare(&format!("{case}_paper"), &found, TOLERANCE)?;
        let buffer = format!("{case}_buffer_final");
        if reference.has(&buffer) {
            reference.compare(&buffer, &running, TOLERANCE)?;
        }
        let single = format!("{case}_paper_f32");
        if reference.has(&single) {
            let (found, _) = run(&rule, &wanted, &unwanted, DType::F32)?;
            reference.compare(&single, &found, Tolerance::Mixed(2e-5))?;
        }
        let native = rule.convention(Convention::DiffusersNative);
        let (found, _) = run(&native, &wanted, &unwanted, DType::F64)?;
        reference.compare(&format!("{case}_diffusers"), &found, TOLERANCE)?;
    }
    Ok(())
}

/// A number, or `None` or `off`.
fn optional(reference: &Reference, case: &str, key: &str) -> Result<Option<f64>> {
    match setting_text(reference, case, key)?.as_str() {
        "None" | "off" => Ok(None),
        _ => Ok(Some(setting(reference, case, key)?)),
    }
}

/// All steps one after the other, and the running sum at the end.
fn run(rule: &Apg, wanted: &Array, unwanted: &Array, dtype: DType) -> Result<(Vec<f64>, Vec<f64>)> {
    let mut running: Option<Tensor> = None;
    let mut found = Vec::new();
    for step in 0..wanted.shape.first().copied().unwrap_or(0) {
        let (c, u) = (
            wanted.row(step)?.tensor(dtype)?,
            unwanted.row(step)?.tensor(dtype)?,
        );
        let (guided, delta) = rule.combine(&c, &u, running.as_ref())?;
        found.extend(values(&guided)?);
        running = Some(delta);
    }
    let running = running.map_or(Ok(Vec::new()), |r| values(&r))?;
    Ok((found, running))
}

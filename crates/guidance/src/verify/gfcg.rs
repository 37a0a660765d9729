//! The reference of gradient-free classifier guidance: whole runs in every mode of the file.

use crate::gfcg::{Decision, Gfcg, OnDenoised, ScaleRule, SwapMode};
use crate::{Autoguidance, Cfg, Result};
use candle_core::Tensor;
use flows::verify::{bad, classes, grid, input, mixture};
use flows::{Guidance, Noise, Sampler};
use tensor_core::verify::{Reference, Tolerance};

const TOLERANCE: Tolerance = Tolerance::Mixed(1e-9);

/// Checks the guided predictions of every step, the samples, references and weights.
///
/// # Errors
/// An error when the file lacks an input; a difference is a failed comparison instead.
pub fn gfcg(reference: &mut Reference) -> Result<()> {
    let model = mixture(reference, "mix_var")?.with_leak(reference.number("leak")?)?;
    let weak = mixture(reference, "mix_var_weak")?.with_leak(reference.number("leak_weak")?)?;
    let (weights, bias) = (input(reference, "clf_w")?, input(reference, "clf_b")?);
    let (start, wanted) = (input(reference, "z")?, classes(reference, "c")?);
    let grid = grid(reference)?;
    let (w, w_cfg) = (reference.number("w")?, reference.number("w_cfg")?);
    let swap = SwapMode::WhenUnsure {
        p: reference.number("p_swap")?,
    };
    let logits = |x: &Tensor| Ok(x.matmul(&weights.t()?)?.broadcast_add(&bias)?);
    let rule = || {
        let classifier = OnDenoised::new(&logits).clip(None);
        Gfcg::new(classifier).scale(w).skip_below(0.0)
    };
    for mode in reference.cases("_final") {
        let mut gfcg = match mode.as_str() {
            "gfcg_const" => Some(rule().rule(ScaleRule::Constant)),
            "gfcg_1mp" => Some(rule()),
            "gfcg_cfg" => Some(rule().with_cfg(w_cfg)),
            "gfcg_atg" => Some(rule().with_weak(SwapMode::Adaptive)),
            "atg_swap" => Some(rule().with_weak(swap)),
            _ => None,
        };
        let guidance: Box<dyn Guidance> = match (mode.as_str(), &mut gfcg) {
            (_, Some(rule)) => Box::new(rule),
            ("cond", None) => Box::new(flows::guidance::Unguided),
            ("cfg", None) => Box::new(Cfg::new(w)),
            ("atg", None) => Box::new(Autoguidance { w }),
            (other, None) => return Err(bad(reference, format!("mode `{other}`")).into()),
        };
        let out = Sampler::new(&model, grid.clone())
            .weak(&weak)
            .guidance(guidance)
            .record(true)
            .sample_from(&start, &wanted, None, Noise::given(vec![]))?;
        let guided = Tensor::stack(&out.trace.unwrap_or_default().x0, 0)?;
        reference.compare_tensor(&format!("{mode}_denoised"), &guided, TOLERANCE)?;
        reference.compare_tensor(&format!("{mode}_final"), &out.x, TOLERANCE)?;
        if let Some(rule) = gfcg {
            decisions(reference, &mode, rule.trace())?;
        }
    }
    Ok(())
}

fn decisions(reference: &mut Reference, mode: &str, trace: &[Decision]) -> Result<()> {
    let weights: Vec<f64> = trace.iter().flat_map(|d| d.weight.clone()).collect();
    reference.compare(&format!("{mode}_weight"), &weights, TOLERANCE)?;
    // No reference is no class of any file.
    let classes = trace.iter().flat_map(|d| &d.reference);
    let classes: Vec<f64> = classes.map(|r| r.map_or(f64::NAN, f64::from)).collect();
    let exact = Tolerance::Mismatches(0);
    Ok(reference.compare(&format!("{mode}_ref"), &classes, exact)?)
}

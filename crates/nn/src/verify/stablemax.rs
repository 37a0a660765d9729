//! StableMax: scores, log-probabilities, the mean loss and its gradient.

use super::record::gradient;
use crate::loss::Reduction;
use crate::stablemax::{log_stablemax, stablemax_cross_entropy, stablemax_score, StableMaxConfig};
use crate::Result;
use candle_core::{DType, Device, Tensor, Var};
use tensor_core::verify::{Reference, Tolerance};

/// Relative above 1: logits may be as large as 1e6.
const TOLERANCE: Tolerance = Tolerance::Mixed(1e-12);

/// Checks every case `P` of the file (those with `P.s` and `P.log_probs`). Other tensors belong to
/// other adaptors.
///
/// # Errors
/// Those of the file and of the functions. A wrong number is a failed comparison.
pub fn stablemax(reference: &mut Reference) -> Result<()> {
    for case in reference.cases(".log_probs") {
        if reference.has(&format!("{case}.s")) {
            run(reference, &case)?;
        }
    }
    Ok(())
}

fn run(reference: &mut Reference, case: &str) -> Result<()> {
    let name = |name: &str| format!("{case}.{name}");
    let config = StableMaxConfig {
        eps: reference.number(&format!("{case}_epsilon"))?,
        ..Default::default()
    };
    let logits = Var::from_tensor(&reference.input(&name("logits"))?.tensor(DType::F64)?)?;
    let labels = reference.input(&name("labels"))?.indices()?;
    let labels = Tensor::new(labels, &Device::Cpu)?;
    reference.compare_tensor(&name("s"), &stablemax_score(&logits)?, TOLERANCE)?;
    let log_probs = log_stablemax(&logits, 1)?;
    reference.compare_tensor(&name("log_probs"), &log_probs, TOLERANCE)?;
    let loss = stablemax_cross_entropy(&logits, &labels, Reduction::Mean, &config)?;
    let store = loss.backward()?;
    let value = [loss.to_scalar::<f64>()?];
    reference.compare(&name("loss_mean"), &value, TOLERANCE)?;
    let gradient = gradient(&store, "logits", &logits)?;
    reference.compare_tensor(&name("grad_mean"), &gradient, TOLERANCE)?;
    Ok(())
}

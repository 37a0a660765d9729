//! Checks that no gradient is lost or wrong.

use super::{hvp_with, keeps_graph, read, scalar, Mode, Restore};
use crate::{Error, Result};
use candle_core::{DType, Tensor, Var};
use std::collections::HashSet;

/// Checks that a gradient arrives at each variable from at least one of the outputs.
///
/// Several operations of candle have no backward and say nothing (`softmax_last_dim` and the fused
/// norms among them): what lies behind them is never trained. Call this once, on the outputs of a
/// first forward pass.
///
/// # Errors
/// [`Error::LostGradient`] that names every variable without a gradient.
pub fn grad_check(outputs: &[&Tensor], vars: &[(String, Var)]) -> Result<()> {
    let mut reached = HashSet::new();
    for output in outputs {
        reached.extend(output.backward()?.get_ids().copied());
    }
    let lost = |(name, var): &(String, Var)| (!reached.contains(&var.id())).then(|| name.clone());
    let lost: Vec<String> = vars.iter().filter_map(lost).collect();
    if lost.is_empty() {
        Ok(())
    } else {
        Err(Error::LostGradient(lost))
    }
}

/// Settings of [`check_gradients`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CheckConfig {
    /// An entry `x` moves by `step * max(1, |x|)`.
    pub step: f64,
    /// Allowed difference: `tol * max(1, |numeric|)`.
    pub tol: f64,
    /// Entries checked per variable, evenly spread over it.
    pub max_entries: usize,
}

impl Default for CheckConfig {
    /// For f64.
    fn default() -> Self {
        Self {
            step: 1e-5,
            tol: 1e-6,
            max_entries: 64,
        }
    }
}

impl CheckConfig {
    /// Settings for losses and variables in f32 of magnitude around 1.
    pub fn single_precision() -> Self {
        Self {
            step: 1e-2,
            tol: 1e-2,
            ..Self::default()
        }
    }

    /// Refuses settings that make no sense.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] unless `step` and `tol` are finite and positive and
    /// `max_entries` is at least 1.
    pub fn validate(&self) -> Result<()> {
        for (name, value) in [("step", self.step), ("tol", self.tol)] {
            if !(value.is_finite() && value > 0.0) {
                return Err(Error::invalid(name, value, "a finite number > 0"));
            }
        }
        if self.max_entries == 0 {
            return Err(Error::invalid("max_entries", 0, "at least 1"));
        }
        Ok(())
    }
}

/// Compares the gradients of the scalar `f` with central differences, entry by entry, and returns
/// the largest error relative to `max(1, |numeric|)`. For tests; the variables keep their bits.
///
/// # Errors
/// [`Error::WrongGradient`] with the worst entry; [`Error::LostGradient`];
/// [`Error::InvalidArgument`] for a bad configuration or when there is no entry to check; those of
/// `f`.
pub fn check_gradients<F>(mut f: F, vars: &[(String, Var)], config: CheckConfig) -> Result<f64>
where
    F: FnMut() -> candle_core::Result<Tensor>,
{
    config.validate()?;
    let loss = scalar(f()?)?;
    grad_check(&[&loss], vars)?;
    let gradients = loss.backward()?;
    let mut worst: Option<(f64, Error)> = None;
    for (name, var) in vars {
        let Some(gradient) = gradients.get(var) else {
            continue;
        };
        let analytic = host(gradient)?;
        let values = host(var)?;
        for index in spread(values.len(), config.max_entries) {
            let step = config.step * values[index].abs().max(1.0);
            let numeric = slope(&mut f, var, &values, index, step)?;
            let error = (analytic[index] - numeric).abs() / numeric.abs().max(1.0);
            // NaN is the worst of all.
            let error = if error.is_nan() { f64::INFINITY } else { error };
            if worst.as_ref().is_none_or(|(w, _)| error > *w) {
                let wrong = Error::WrongGradient {
                    name: name.clone(),
                    index,
                    analytic: analytic[index],
                    numeric,
                };
                worst = Some((error, wrong));
            }
        }
    }
    match worst {
        None => Err(Error::invalid("vars", "no entry", "at least one to check")),
        Some((error, wrong)) if error > config.tol => Err(wrong),
        Some((error, _)) => Ok(error),
    }
}

fn slope<F>(f: &mut F, var: &Var, values: &[f64], index: usize, step: f64) -> Result<f64>
where
    F: FnMut() -> candle_core::Result<Tensor>,
{
    let mut restore = Restore::new(std::slice::from_ref(var))?;
    let mut moved = values.to_vec();
    let mut at = |x: f64| {
        moved[index] = x;
        let tensor = Tensor::from_slice(&moved, var.shape(), &candle_core::Device::Cpu)?;
        // The conversion comes first: not every device has f64.
        let tensor = tensor.to_dtype(var.dtype())?;
        // What the variable holds after rounding is what the slope is taken over.
        let reached = host(&tensor)?[index];
        var.set(&tensor.to_device(var.device())?)?;
        Ok::<_, Error>((reached, read(&scalar(f()?)?.flatten_all()?.get(0)?)?))
    };
    let (right, plus) = at(values[index] + step)?;
    let (left, minus) = at(values[index] - step)?;
    restore.put_back()?;
    Ok((plus - minus) / (right - left))
}

fn host(tensor: &Tensor) -> Result<Vec<f64>> {
    let flat = tensor
        .detach()
        .to_device(&candle_core::Device::Cpu)?
        .flatten_all()?;
    Ok(flat.to_dtype(DType::F64)?.to_vec1()?)
}

/// At most `max` of `0..n`, evenly spread, the first and the last included.
fn spread(n: usize, max: usize) -> Vec<usize> {
    match n {
        0 => Vec::new(),
        _ if n <= max => (0..n).collect(),
        _ if max == 1 => vec![0],
        _ => (0..max).map(|i| i * (n - 1) / (max - 1)).collect(),
    }
}

/// Compares the exact Hessian-vector product of `f` with the one by central differences: an
/// operation whose backward cannot be differentiated again loses second-order terms in silence.
/// Returns the largest difference of an entry relative to the largest entry of the product, or
/// nothing where gradients keep no graph (there the exact form is never used).
///
/// # Errors
/// [`Error::WrongGradient`] with the worst entry (`analytic` is the exact form's) when its error is
/// above `tol`; those of [`hvp`](super::hvp).
pub fn check_second_order<F>(
    mut f: F,
    vars: &[(String, Var)],
    v: &[Tensor],
    tol: f64,
) -> Result<Option<f64>>
where
    F: FnMut() -> candle_core::Result<Tensor>,
{
    if !(tol.is_finite() && tol > 0.0) {
        return Err(Error::invalid("tol", tol, "a finite number > 0"));
    }
    if !keeps_graph()? {
        return Ok(None);
    }
    let only: Vec<Var> = vars.iter().map(|(_, var)| var.clone()).collect();
    let exact = hvp_with(Mode::Exact, &mut f, &only, v)?.value;
    let mode = Mode::CentralDifferences { step: None };
    let numeric = hvp_with(mode, &mut f, &only, v)?.value;
    let mut entries = Vec::new();
    for (((name, _), exact), numeric) in vars.iter().zip(&exact).zip(&numeric) {
        let pairs = host(exact)?.into_iter().zip(host(numeric)?);
        entries.extend(
            pairs
                .enumerate()
                .map(|(index, (analytic, numeric))| (name, index, analytic, numeric)),
        );
    }
    let scale = entries
        .iter()
        .map(|e| e.3.abs())
        .fold(f64::MIN_POSITIVE, f64::max);
    let error = |e: &(&String, usize, f64, f64)| (e.2 - e.3).abs() / scale;
    let worst = entries.iter().max_by(|a, b| error(a).total_cmp(&error(b)));
    match worst {
        None => Ok(Some(0.0)),
        Some(worst) if error(worst) > tol => Err(Error::WrongGradient {
            name: format!("the Hessian-vector product in {}", worst.0),
            index: worst.1,
            analytic: worst.2,
            numeric: worst.3,
        }),
        Some(worst) => Ok(Some(error(worst))),
    }
}

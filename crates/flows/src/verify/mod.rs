//! Checks against reference files, one function per method.
//!
//! Each runs this crate on the file's inputs with the file's hyper-parameters and compares with
//! the file's outputs. Cases, counts and shapes are discovered in the file.

mod adjoint_dpm;
mod disback;
mod guidance_core;
mod rectified_flow;

pub use adjoint_dpm::adjoint_dpm;
pub use disback::disback;
pub use guidance_core::guidance_core;
pub use rectified_flow::rectified_flow;

use crate::condition::Condition;
use crate::error::{Error, Result};
use crate::grid::Grid;
use crate::level::Level;
use crate::mixture::AnalyticMixture;
use candle_core::{DType, Device, Tensor};
use tensor_core::verify::{Array, Reference};

/// The values of a tensor, row-major.
pub fn values(tensor: &Tensor) -> Result<Vec<f64>> {
    Ok(tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?)
}

/// An input as a tensor of doubles.
///
/// # Errors
/// As [`Reference::input`].
pub fn input(reference: &mut Reference, name: &str) -> Result<Tensor> {
    Ok(reference.input(name)?.tensor(DType::F64)?)
}

/// Rows along the first axis as tensors of doubles.
///
/// # Errors
/// Those of candle.
pub fn rows(array: &Array) -> Result<Vec<Tensor>> {
    let count = array.shape.first().copied().unwrap_or(0);
    let one = |i| Ok(array.row(i)?.tensor(DType::F64)?);
    (0..count).map(one).collect()
}

/// An error about the file.
pub fn bad(reference: &Reference, reason: impl ToString) -> Error {
    reference.bad(reason).into()
}

/// A classed mixture under the names `mix_mu`, `mix_weight`, `mix_class` and the given variances.
///
/// # Errors
/// As [`Reference::input`], and those of the mixture.
pub fn mixture(reference: &mut Reference, variances: &str) -> Result<AnalyticMixture> {
    let means = input(reference, "mix_mu")?;
    let variances = reference.input(variances)?.values;
    let weights = reference.input("mix_weight")?.values;
    let classes = reference.input("mix_class")?.indices()?;
    AnalyticMixture::new(&means, &variances, &weights)?.with_classes(&classes)
}

/// Classes of the rows.
///
/// # Errors
/// As [`Reference::input`].
pub fn classes(reference: &mut Reference, name: &str) -> Result<Condition> {
    Condition::classes(&reference.input(name)?.indices()?, &Device::Cpu)
}

/// The grid of `alpha` and `sigma`.
///
/// # Errors
/// As [`Reference::input`]; a grid that makes no sense.
pub fn grid(reference: &mut Reference) -> Result<Grid> {
    let alpha = reference.input("alpha")?.values;
    let sigma = reference.input("sigma")?.values;
    let levels = alpha
        .iter()
        .zip(&sigma)
        .map(|(a, s)| Level::new(*a, *s, 0.0));
    Grid::custom(levels.collect::<Result<_>>()?)
}

/// A level stored as `[alpha, sigma]`.
///
/// # Errors
/// As [`Reference::input`].
pub fn level(reference: &mut Reference, name: &str) -> Result<Level> {
    match reference.input(name)?.values[..] {
        [alpha, sigma] => Level::new(alpha, sigma, 0.0),
        _ => Err(bad(reference, format!("`{name}` is not alpha and sigma"))),
    }
}

/// The number behind `key=` in a metadata value of the form `a=1,b=2.5,c=name`.
///
/// # Errors
/// An error about the file where it is missing or no number.
pub fn setting(reference: &Reference, name: &str, key: &str) -> Result<f64> {
    let text = setting_text(reference, name, key)?;
    let number = text.parse();
    number.map_err(|_| {
        bad(
            reference,
            format!("`{key}` of metadata `{name}` is no number"),
        )
    })
}

/// The text behind `key=` in such a value.
///
/// # Errors
/// An error about the file where it is missing.
pub fn setting_text(reference: &Reference, name: &str, key: &str) -> Result<String> {
    let text = reference.text(name)?;
    let pair = text.split([',', ' ']).find_map(|part| {
        let (k, v) = part.split_once('=')?;
        (k.trim() == key).then(|| v.trim().to_string())
    });
    pair.ok_or_else(|| bad(reference, format!("metadata `{name}` has no `{key}`")))
}

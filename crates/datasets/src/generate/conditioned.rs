//! Linear and logistic regression whose conditioning is chosen, exactly.
//!
//! The inputs are `X = sqrt(n) U diag(sqrt(s)) V^T` with random orthonormal `U [n, d]` and
//! `V [d, d]`, so that `X^T X / n = V diag(s) V^T` has the spectrum `s` and nothing else. That
//! matrix is the Hessian of `|X w - y|^2 / (2 n)` everywhere, and four times the Hessian of the
//! mean logistic loss at `w = 0`.
//!
//! ```
//! use candle_core::{DType, Device};
//! use thalweg_datasets::generate::{linear_regression, ConditionedConfig, Spectrum};
//! use thalweg_datasets::RandomStream;
//!
//! let config = ConditionedConfig { spectrum: Spectrum::Condition(100.0), ..Default::default() };
//! let problem = linear_regression(&config, 0.1, &mut RandomStream::new(0), DType::F64, &Device::Cpu)?;
//! assert_eq!(problem.data.inputs.dims(), &[256, 16]);
//! assert!((problem.spectrum[0] / problem.spectrum[15] - 100.0).abs() < 1e-9);
//! # Ok::<(), thalweg_datasets::Error>(())
//! ```

use crate::{Classification, Error, Regression, Result};
use candle_core::{DType, Device, Tensor};
use tensor_core::random::RandomStream;

/// Eigenvalues of `X^T X / n`.
#[derive(Debug, Clone, PartialEq)]
pub enum Spectrum {
    /// From 1 down to `1 / condition`, evenly on a logarithmic scale.
    Condition(f64),
    /// These values, one for each feature.
    Values(Vec<f64>),
}

impl Spectrum {
    /// The eigenvalues for `features` features.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a condition below 1 or not finite, for another number of
    /// values than of features, and for values that are negative or not finite.
    pub fn values(&self, features: usize) -> Result<Vec<f64>> {
        match self {
            Self::Condition(condition) => {
                if !(condition.is_finite() && *condition >= 1.0) {
                    let expected = "a finite number >= 1";
                    return Err(Error::invalid("condition", condition, expected));
                }
                let last = features.saturating_sub(1).max(1) as f64;
                Ok((0..features)
                    .map(|i| condition.powf(-(i as f64) / last))
                    .collect())
            }
            Self::Values(values) => {
                let valid = values.iter().all(|v| v.is_finite() && *v >= 0.0);
                if values.len() != features || !valid {
                    let expected = format!("{features} finite numbers >= 0");
                    return Err(Error::invalid("spectrum", format!("{values:?}"), expected));
                }
                Ok(values.clone())
            }
        }
    }
}

/// Size and spectrum of a problem.
#[derive(Debug, Clone, PartialEq)]
pub struct ConditionedConfig {
    /// Number of examples, at least that of the features. Default 256.
    pub examples: usize,
    /// Number of features. Default 16.
    pub features: usize,
    /// Eigenvalues of `X^T X / n`. Default: condition 10.
    pub spectrum: Spectrum,
}

impl Default for ConditionedConfig {
    fn default() -> Self {
        Self {
            examples: 256,
            features: 16,
            spectrum: Spectrum::Condition(10.0),
        }
    }
}

impl ConditionedConfig {
    /// Checks sizes and spectrum.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for no features, fewer examples than features (which could not
    /// have the spectrum), and those of [`Spectrum::values`].
    pub fn validate(&self) -> Result<()> {
        if self.features == 0 {
            return Err(Error::invalid("features", 0, "at least 1"));
        }
        if self.examples < self.features {
            let expected = format!("at least {}, the number of features", self.features);
            return Err(Error::invalid("examples", self.examples, expected));
        }
        self.spectrum.values(self.features).map(|_| ())
    }
}

/// A problem with its truth.
#[derive(Debug, Clone)]
pub struct Conditioned<D> {
    /// Inputs `[n, d]` and answers `[n]`.
    pub data: D,
    /// The weights `[d]` that made the answers.
    pub weights: Tensor,
    /// The eigenvalues of `X^T X / n` in the order of the configuration (largest first for
    /// [`Spectrum::Condition`]).
    pub spectrum: Vec<f64>,
}

/// `y = X w + noise N(0, 1)` with `w ~ N(0, I)`.
///
/// The spectrum holds to the rounding of `dtype`: in `f32` conditions beyond about 1e5 drown.
///
/// # Errors
/// Those of [`ConditionedConfig::validate`]; [`Error::InvalidArgument`] for noise that is negative
/// or not finite.
pub fn linear_regression(
    config: &ConditionedConfig,
    noise: f64,
    rng: &mut RandomStream,
    dtype: DType,
    device: &Device,
) -> Result<Conditioned<Regression>> {
    if !(noise.is_finite() && noise >= 0.0) {
        return Err(Error::invalid("noise", noise, "a finite number >= 0"));
    }
    let (inputs, spectrum) = inputs(config, rng)?;
    let weights = rng.normal(0.0, 1.0, config.features, DType::F64, &Device::Cpu)?;
    let clean = product(&inputs, &weights)?;
    let errors = rng.normal(0.0, noise, config.examples, DType::F64, &Device::Cpu)?;
    let to = |t: Tensor| t.to_dtype(dtype)?.to_device(device);
    Ok(Conditioned {
        data: Regression::new(to(inputs)?, to((clean + errors)?)?)?,
        weights: to(weights)?,
        spectrum,
    })
}

/// Labels that are 1 with probability `sigmoid(x . w)`, where `w` is a random direction, scaled so
/// that the logits `x . w` have root mean square `margin`: about 1 is noisy, 10 nearly separable.
///
/// # Errors
/// Those of [`ConditionedConfig::validate`]; [`Error::InvalidArgument`] for a margin that is
/// negative or not finite.
pub fn logistic_regression(
    config: &ConditionedConfig,
    margin: f64,
    rng: &mut RandomStream,
    dtype: DType,
    device: &Device,
) -> Result<Conditioned<Classification>> {
    if !(margin.is_finite() && margin >= 0.0) {
        return Err(Error::invalid("margin", margin, "a finite number >= 0"));
    }
    let (inputs, spectrum) = inputs(config, rng)?;
    let direction = rng.normal(0.0, 1.0, config.features, DType::F64, &Device::Cpu)?;
    let logits = product(&inputs, &direction)?;
    let rms = logits.sqr()?.mean_all()?.to_scalar::<f64>()?.sqrt();
    // A spectrum of zeros leaves no logits to scale.
    let scale = if rms > 0.0 { margin / rms } else { 0.0 };
    let label = |logit: f64| {
        let probability = 1.0 / (1.0 + (-scale * logit).exp());
        u32::from(rng.next_uniform() < probability)
    };
    let labels: Vec<u32> = logits.to_vec1::<f64>()?.into_iter().map(label).collect();
    let labels = Tensor::from_vec(labels, config.examples, device)?;
    let to = |t: Tensor| t.to_dtype(dtype)?.to_device(device);
    Ok(Conditioned {
        data: Classification::new(to(inputs)?, labels, 2)?,
        weights: to((direction * scale)?)?,
        spectrum,
    })
}

/// `X w` for `X [n, d]`, `w [d]`.
fn product(inputs: &Tensor, weights: &Tensor) -> Result<Tensor> {
    Ok(inputs.matmul(&weights.unsqueeze(1)?)?.squeeze(1)?)
}

/// `X [n, d]` in f64 and the spectrum of `X^T X / n`.
fn inputs(config: &ConditionedConfig, rng: &mut RandomStream) -> Result<(Tensor, Vec<f64>)> {
    config.validate()?;
    let (n, d) = (config.examples, config.features);
    let spectrum = config.spectrum.values(d)?;
    let mut left = orthonormal_rows(d, n, rng);
    for (row, s) in left.iter_mut().zip(&spectrum) {
        let scale = (n as f64 * s).sqrt();
        row.iter_mut().for_each(|x| *x *= scale);
    }
    let left = Tensor::from_vec(left.concat(), (d, n), &Device::Cpu)?;
    let right = orthonormal_rows(d, d, rng).concat();
    let right = Tensor::from_vec(right, (d, d), &Device::Cpu)?;
    Ok((left.t()?.matmul(&right)?, spectrum))
}

/// `count` orthonormal vectors of length `length >= count`, uniformly random: Gram-Schmidt on
/// Gaussian vectors, each projection done twice, which brings the error down to rounding.
fn orthonormal_rows(count: usize, length: usize, rng: &mut RandomStream) -> Vec<Vec<f64>> {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
    let mut rows: Vec<Vec<f64>> = Vec::with_capacity(count);
    while rows.len() < count {
        let mut row = vec![0.0; length];
        rng.fill_normal(&mut row);
        let before = dot(&row, &row).sqrt();
        for _ in 0..2 {
            for other in &rows {
                let along = dot(&row, other);
                row.iter_mut().zip(other).for_each(|(x, y)| *x -= along * y);
            }
        }
        let norm = dot(&row, &row).sqrt();
        // A vector that lies in the span of the others but for rounding is drawn again.
        if norm > 1e-8 * before {
            row.iter_mut().for_each(|x| *x /= norm);
            rows.push(row);
        }
    }
    rows
}

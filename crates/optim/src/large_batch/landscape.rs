//! How fast the loss fluctuates with the distance from a point.

use super::diffusion::line;
use crate::error::check;
use crate::{Error, Result};
use candle_core::{DType, Tensor};
use tensor_core::params::Params;
use tensor_core::random::RandomStream;

/// Measures the spread of the loss at random directions and given distances from the present
/// parameters: on a random potential with `E (L(w_1) - L(w_2))^2 ~ |w_1 - w_2|^alpha` the standard
/// deviation grows like `r^(alpha/2)`.
#[derive(Debug, Clone, PartialEq)]
pub struct LandscapeProbe {
    /// Distances `r > 0`, at least two different ones.
    pub distances: Vec<f64>,
    /// Random directions per distance, at least 2.
    pub directions: usize,
}

impl Default for LandscapeProbe {
    fn default() -> Self {
        Self {
            distances: vec![0.1, 0.2, 0.4, 0.8, 1.6],
            directions: 16,
        }
    }
}

/// What [`LandscapeProbe::measure`] found.
#[derive(Debug, Clone, PartialEq)]
pub struct LandscapeReport {
    /// The distances.
    pub distances: Vec<f64>,
    /// Standard deviation of `L(w_0 + r u) - L(w_0)` over the directions, per distance.
    pub std: Vec<f64>,
    /// Twice the slope of `ln std` against `ln r`.
    pub alpha: f64,
    /// Coefficient of determination of that line.
    pub r2: f64,
}

impl LandscapeProbe {
    /// # Errors
    /// [`Error::InvalidConfig`] naming the first value that makes no sense.
    pub fn validate(&self) -> Result<()> {
        let mut sorted = self.distances.clone();
        sorted.sort_by(f64::total_cmp);
        sorted.dedup();
        let positive = self.distances.iter().all(|r| r.is_finite() && *r > 0.0);
        check::require(
            positive && sorted.len() >= 2,
            "LandscapeProbe::distances",
            &self.distances,
            "at least two different finite numbers > 0",
        )?;
        check::require(
            self.directions >= 2,
            "LandscapeProbe::directions",
            self.directions,
            "at least 2",
        )
    }

    /// Evaluates `loss` (a function of the variables in `params`) at every distance along every
    /// direction. The parameters are the same bits afterwards, also when the loss fails.
    ///
    /// # Errors
    /// [`Error::NonFiniteLoss`] when a loss is not finite, [`Error::InvalidArgument`] when the
    /// loss does not vary; those of `loss`.
    pub fn measure(
        &self,
        params: &Params,
        loss: &mut dyn FnMut() -> candle_core::Result<Tensor>,
        rng: &mut RandomStream,
    ) -> Result<LandscapeReport> {
        self.validate()?;
        let start = params.snapshot()?;
        let measured = self.spread(params, loss, rng);
        params.restore(&start)?;
        let std = measured?;
        if std.iter().any(|s| *s <= 0.0) {
            return Err(Error::argument(
                "standard deviations",
                std,
                "a loss that varies with the parameters",
            ));
        }
        let ln = |values: &[f64]| -> Vec<f64> { values.iter().map(|x| x.ln()).collect() };
        let (slope, _, r2) = line(&ln(&self.distances), &ln(&std));
        Ok(LandscapeReport {
            distances: self.distances.clone(),
            std,
            alpha: 2.0 * slope,
            r2,
        })
    }

    fn spread(
        &self,
        params: &Params,
        loss: &mut dyn FnMut() -> candle_core::Result<Tensor>,
        rng: &mut RandomStream,
    ) -> Result<Vec<f64>> {
        let start = params.snapshot()?;
        let center = crate::closure::loss_value(&loss()?, "the loss at the center")?;
        let mut differences = vec![Vec::with_capacity(self.directions); self.distances.len()];
        for _ in 0..self.directions {
            let direction = unit_direction(params, rng)?;
            for (r, found) in self.distances.iter().zip(&mut differences) {
                params.restore(&start)?;
                params.axpy(*r, &direction)?;
                let there = crate::closure::loss_value(&loss()?, "the loss at a distance")?;
                found.push(there - center);
            }
        }
        Ok(differences.iter().map(|d| deviation(d)).collect())
    }
}

/// A direction drawn uniformly from the unit sphere of all parameters together.
fn unit_direction(params: &Params, rng: &mut RandomStream) -> Result<Vec<Tensor>> {
    let mut parts = Vec::with_capacity(params.len());
    let mut square = 0.0;
    for (_, var) in params.named() {
        let part = rng.normal(0.0, 1.0, var.shape(), DType::F64, var.device())?;
        square += tensor_core::kernels::sum_squares(&part)?;
        parts.push(part.to_dtype(var.dtype())?);
    }
    let scale = 1.0 / square.sqrt();
    let scaled: candle_core::Result<_> = parts.iter().map(|p| p.affine(scale, 0.0)).collect();
    Ok(scaled?)
}

/// Sample standard deviation.
fn deviation(values: &[f64]) -> f64 {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let square: f64 = values.iter().map(|x| (x - mean).powi(2)).sum();
    (square / (n - 1.0)).sqrt()
}

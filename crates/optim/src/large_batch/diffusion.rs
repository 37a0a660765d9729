//! How far the weights have wandered, and whether they do it like a random walk on a random
//! potential.

use crate::{Error, Result};
use candle_core::Var;
use candle_nn::VarMap;
use tensor_core::params::{Params, Snapshot};

/// Distance from the start against time: `d = slope ln t + intercept`, and how well it fits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DiffusionFit {
    /// Slope of `d` against `ln t`.
    pub slope: f64,
    /// `d` at `t = 1`.
    pub intercept: f64,
    /// Coefficient of determination of that fit.
    pub r2_log: f64,
    /// Coefficient of determination of `d` against `t` itself.
    pub r2_linear: f64,
    /// `p` in `d ~ (ln t)^p`, from the points with `t >= 3`.
    pub exponent: f64,
    /// `2 / p`: the exponent of the potential's fluctuations. About 2 in the paper, for every
    /// batch size.
    pub alpha: f64,
}

/// Least squares `y = slope x + intercept`: (slope, intercept, R^2).
pub(super) fn line(x: &[f64], y: &[f64]) -> (f64, f64, f64) {
    let n = x.len() as f64;
    let (mx, my) = (x.iter().sum::<f64>() / n, y.iter().sum::<f64>() / n);
    let (mut xx, mut xy, mut yy) = (0.0, 0.0, 0.0);
    for (x, y) in x.iter().zip(y) {
        xx += (x - mx) * (x - mx);
        xy += (x - mx) * (y - my);
        yy += (y - my) * (y - my);
    }
    let slope = if xx > 0.0 { xy / xx } else { 0.0 };
    let intercept = my - slope * mx;
    let residual: f64 = x
        .iter()
        .zip(y)
        .map(|(x, y)| (y - slope * x - intercept).powi(2))
        .sum();
    let r2 = match (residual > 0.0, yy > 0.0) {
        (false, _) => 1.0,
        (true, true) => 1.0 - residual / yy,
        (true, false) => 0.0,
    };
    (slope, intercept, r2)
}

/// Fits distances `d` at steps `t` (counted from 1).
///
/// # Errors
/// [`Error::TooFew`] below 3 points, or below 2 with `t >= 3` and `d > 0`;
/// [`Error::InvalidArgument`] for unequal lengths, `t < 1`, or values that are not finite.
pub fn fit_diffusion(t: &[f64], d: &[f64]) -> Result<DiffusionFit> {
    if t.len() != d.len() {
        return Err(Error::argument("distances", d.len(), t.len()));
    }
    let too_few = |of, needed, got| Error::TooFew {
        what: "a diffusion fit",
        of,
        needed,
        got,
    };
    if t.len() < 3 {
        return Err(too_few("points", 3, t.len()));
    }
    for (t, d) in t.iter().zip(d) {
        if !(t.is_finite() && *t >= 1.0 && d.is_finite() && *d >= 0.0) {
            return Err(Error::argument(
                "point (t, d)",
                (t, d),
                "finite, with t >= 1 and d >= 0",
            ));
        }
    }
    let ln_t: Vec<f64> = t.iter().map(|t| t.ln()).collect();
    let (slope, intercept, r2_log) = line(&ln_t, d);
    let (_, _, r2_linear) = line(t, d);
    let (mut x, mut y) = (Vec::new(), Vec::new());
    for (t, d) in t.iter().zip(d).filter(|(t, d)| **t >= 3.0 && **d > 0.0) {
        x.push(t.ln().ln());
        y.push(d.ln());
    }
    if x.len() < 2 {
        return Err(too_few("points with t >= 3 and d > 0", 2, x.len()));
    }
    let (exponent, _, _) = line(&x, &y);
    Ok(DiffusionFit {
        slope,
        intercept,
        r2_log,
        r2_linear,
        exponent,
        alpha: 2.0 / exponent,
    })
}

/// At most `points` steps between 1 and `total`, evenly spaced in the logarithm, without
/// repetitions: when to call [`DiffusionTracker::record`].
pub fn log_spaced_steps(total: usize, points: usize) -> Vec<usize> {
    let last = points.saturating_sub(1).max(1) as f64;
    let step = |i: usize| ((total as f64).ln() * i as f64 / last).exp().round() as usize;
    let mut steps: Vec<usize> = (0..points).map(step).collect();
    steps.retain(|s| (1..=total).contains(s));
    steps.dedup();
    steps
}

/// Follows the distance `|w_t - w_0|` of a model from where it started.
///
/// ```
/// use candle_core::{DType, Device, Var};
/// use thalweg_optim::large_batch::DiffusionTracker;
///
/// let w = Var::zeros(4, DType::F64, &Device::Cpu)?;
/// let mut tracker = DiffusionTracker::from_params(vec![("w".into(), w.clone())])?;
/// for t in 1..50 {
///     w.set(&w.ones_like()?.affine((t as f64).ln(), 0.0)?)?;
///     tracker.record(t)?;
/// }
/// let fit = tracker.fit()?;
/// assert!((fit.slope - 2.0).abs() < 1e-12 && fit.r2_log > fit.r2_linear);
/// assert!((fit.alpha - 2.0).abs() < 1e-9);
/// # Ok::<(), thalweg_optim::Error>(())
/// ```
#[derive(Debug)]
pub struct DiffusionTracker {
    params: Params,
    start: Snapshot,
    steps: Vec<f64>,
    /// One distance per tensor and record.
    distances: Vec<Vec<f64>>,
}

impl DiffusionTracker {
    /// Takes the present values of all variables as `w_0` (one copy of the parameters).
    ///
    /// # Errors
    /// Those of [`Params::from_named`].
    pub fn new(vars: &VarMap) -> Result<Self> {
        Self::from_params(crate::param_group::named(vars))
    }

    /// [`new`](Self::new) for named variables.
    ///
    /// # Errors
    /// Those of [`Params::new`].
    pub fn from_params(named: Vec<(String, Var)>) -> Result<Self> {
        let params = Params::new(named)?;
        Ok(Self {
            start: params.snapshot()?,
            distances: vec![Vec::new(); params.len()],
            params,
            steps: Vec::new(),
        })
    }

    /// Records the distance after step `step` (counted from 1), and returns it.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] unless `step` is at least 1 and larger than the step before.
    pub fn record(&mut self, step: usize) -> Result<f64> {
        let last = self.steps.last().copied().unwrap_or(0.0);
        if step as f64 <= last {
            return Err(Error::argument("step", step, format!("above {last}")));
        }
        let mut differences = Vec::with_capacity(self.params.len());
        for ((_, var), start) in self.params.named().iter().zip(self.start.tensors()) {
            differences.push((var.as_tensor().detach() - start)?);
        }
        let mut total = 0.0;
        for (difference, distances) in differences.iter().zip(&mut self.distances) {
            let square = tensor_core::kernels::sum_squares(difference)?;
            total += square;
            distances.push(square.sqrt());
        }
        self.steps.push(step as f64);
        Ok(total.sqrt())
    }

    /// The recorded steps.
    pub fn steps(&self) -> &[f64] {
        &self.steps
    }

    /// The recorded distances over all tensors together.
    pub fn distances(&self) -> Vec<f64> {
        let at = |i: usize| {
            let squares: f64 = self.distances.iter().map(|d| d[i] * d[i]).sum();
            squares.sqrt()
        };
        (0..self.steps.len()).map(at).collect()
    }

    /// The recorded distances of one tensor.
    pub fn tensor_distances(&self, name: &str) -> Option<&[f64]> {
        let place = self.params.named().iter().position(|(n, _)| n == name)?;
        Some(&self.distances[place])
    }

    /// The fit over all tensors together.
    ///
    /// # Errors
    /// Those of [`fit_diffusion`].
    pub fn fit(&self) -> Result<DiffusionFit> {
        fit_diffusion(&self.steps, &self.distances())
    }

    /// The fit of one tensor's distances.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a name that is not tracked; those of [`fit_diffusion`].
    pub fn fit_tensor(&self, name: &str) -> Result<DiffusionFit> {
        let distances = self
            .tensor_distances(name)
            .ok_or_else(|| Error::argument("tensor", name, "a tracked parameter"))?;
        fit_diffusion(&self.steps, distances)
    }
}

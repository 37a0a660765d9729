//! The table that is known, and the ridge regression that it allows.

use crate::error::check;
use crate::{Error, Result};
use candle_core::{DType, Tensor};
use faer::linalg::solvers::Solve;
use faer::{Mat, Side};
use tensor_core::random::RandomStream;

/// The ridge of a regression.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RidgeConfig {
    /// The ridge is this times the mean squared length of the features.
    pub rel: f64,
}

impl Default for RidgeConfig {
    fn default() -> Self {
        Self { rel: 1e-6 }
    }
}

/// A linear head: `score = w . phi + b`.
#[derive(Debug, Clone, PartialEq)]
pub struct LinearHead {
    /// Weights `[d]`.
    pub weight: Vec<f64>,
    /// The constant.
    pub bias: f64,
}

/// A table of features and scores, fitted.
#[derive(Debug, Clone)]
pub struct OfflineTable {
    /// Features `[N][d]`.
    phi: Vec<Vec<f64>>,
    /// Normalized scores.
    y: Vec<f64>,
    mean: f64,
    std: f64,
    rel: f64,
    ridge: f64,
    weights: Vec<f64>,
    /// `Phi' Phi / N` and `Phi' y / N`: all that the backward loss needs of the table.
    gram: Mat<f64>,
    cross: Vec<f64>,
    mean_square: f64,
}

/// Features as rows of f64.
fn rows(phi: &Tensor) -> Result<Vec<Vec<f64>>> {
    let phi = phi.detach().to_dtype(DType::F64)?.to_vec2::<f64>()?;
    match phi.iter().flatten().all(|x| x.is_finite()) {
        true => Ok(phi),
        false => Err(Error::non_finite("a feature")),
    }
}

pub(super) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// The solution of a ridge regression, by whichever of the two forms is smaller:
/// `(Phi' Phi + ridge I)^-1 Phi' y = Phi' (Phi Phi' + ridge I)^-1 y`.
fn solve(phi: &[Vec<f64>], y: &[f64], ridge: f64) -> Result<Vec<f64>> {
    let (n, d) = (phi.len(), phi[0].len());
    let x = Mat::from_fn(n, d, |i, j| phi[i][j]);
    let primal = d <= n;
    let mut normal = if primal {
        x.transpose() * &x
    } else {
        &x * x.transpose()
    };
    (0..normal.nrows()).for_each(|i| normal[(i, i)] += ridge);
    let target = Mat::from_fn(n, 1, |i, _| y[i]);
    let right = if primal {
        x.transpose() * &target
    } else {
        target
    };
    let factor = normal.llt(Side::Lower).map_err(|e| {
        let reason = format!("the factorization of the normal equations failed ({e:?})");
        Error::unsupported("a ridge this small", reason)
    })?;
    let solution = factor.solve(&right);
    let weights = if primal {
        solution
    } else {
        x.transpose() * solution
    };
    Ok((0..d).map(|j| weights[(j, 0)]).collect())
}

/// Mean and unbiased standard deviation.
fn moments(scores: &[f64]) -> (f64, f64) {
    let n = scores.len() as f64;
    let mean = scores.iter().sum::<f64>() / n;
    let square: f64 = scores.iter().map(|s| (s - mean).powi(2)).sum();
    (mean, (square / (n - 1.0)).sqrt())
}

impl OfflineTable {
    /// Fits features `[N, d]` to scores `[N]`, which are normalized.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for fewer than two rows, scores that are all the same or features
    /// that are all zero; [`Error::Shape`] for other counts; [`Error::NonFinite`].
    pub fn fit(features: &Tensor, scores: &[f64], config: RidgeConfig) -> Result<Self> {
        check::positive("RidgeConfig::rel", config.rel)?;
        let (n, d) = features.dims2()?;
        if scores.len() != n || d == 0 {
            return Err(Error::shape(
                "scores",
                &[scores.len()],
                format!("[{n}], features [{n}, {d}]"),
            ));
        }
        if n < 2 {
            return Err(Error::argument("rows of the table", n, "at least 2"));
        }
        if scores.iter().any(|s| !s.is_finite()) {
            return Err(Error::non_finite("a score of the table"));
        }
        let (mean, std) = moments(scores);
        if std <= 0.0 {
            return Err(Error::argument("scores", scores[0], "scores that differ"));
        }
        let phi = rows(features)?;
        let trace: f64 = phi.iter().map(|p| dot(p, p)).sum();
        if trace <= 0.0 {
            return Err(Error::argument(
                "features",
                0,
                "features that are not all zero",
            ));
        }
        // The constant keeps the division of nearly equal scores finite, as published.
        let y: Vec<f64> = scores.iter().map(|s| (s - mean) / (std + 1e-9)).collect();
        let ridge = config.rel * trace / n as f64;
        let weights = solve(&phi, &y, ridge)?;
        let x = Mat::from_fn(n, d, |i, j| phi[i][j]);
        let gram = x.transpose() * &x;
        let share = 1.0 / n as f64;
        Ok(Self {
            gram: Mat::from_fn(d, d, |i, j| share * gram[(i, j)]),
            cross: (0..d)
                .map(|j| share * (0..n).map(|i| phi[i][j] * y[i]).sum::<f64>())
                .collect(),
            mean_square: share * dot(&y, &y),
            phi,
            y,
            mean,
            std,
            rel: config.rel,
            ridge,
            weights,
        })
    }

    /// Normalized scores.
    pub fn normalized(&self) -> &[f64] {
        &self.y
    }

    /// Mean and standard deviation of the scores.
    pub fn moments(&self) -> (f64, f64) {
        (self.mean, self.std)
    }

    /// The ridge.
    pub fn ridge(&self) -> f64 {
        self.ridge
    }

    /// The weights of the regression, `[d]`.
    pub fn weights(&self) -> &[f64] {
        &self.weights
    }

    /// Predictions for features `[B, d]`, in the units of the table's scores.
    ///
    /// # Errors
    /// [`Error::Shape`] for features of another width.
    pub fn predict(&self, phi: &Tensor) -> Result<Vec<f64>> {
        let rows = rows(phi)?;
        rows.iter()
            .map(|p| Ok(self.mean + self.std * dot(self.fits(p)?, &self.weights)))
            .collect()
    }

    pub(super) fn fits<'a>(&self, phi: &'a [f64]) -> Result<&'a [f64]> {
        match phi.len() == self.weights.len() {
            true => Ok(phi),
            false => Err(Error::shape(
                "features",
                &[phi.len()],
                format!("[{}]", self.weights.len()),
            )),
        }
    }

    /// Heads fitted to resamples of the table, to judge designs by another opinion than the table's
    /// own weights.
    ///
    /// # Errors
    /// Those of the factorization and of the stream.
    pub fn bootstrap_heads(&self, count: usize, rng: &mut RandomStream) -> Result<Vec<LinearHead>> {
        let n = self.phi.len();
        let mut heads = vec![];
        for _ in 0..count {
            let picked: std::result::Result<Vec<usize>, _> = (0..n).map(|_| rng.below(n)).collect();
            let picked = picked?;
            let phi: Vec<Vec<f64>> = picked.iter().map(|i| self.phi[*i].clone()).collect();
            let y: Vec<f64> = picked.iter().map(|i| self.y[*i]).collect();
            heads.push(LinearHead {
                weight: solve(&phi, &y, self.ridge)?,
                bias: 0.0,
            });
        }
        Ok(heads)
    }

    /// `(phi . w - target)^2` and its gradient in `phi`.
    pub(super) fn forward_loss(&self, phi: &[f64], target: f64) -> (f64, Vec<f64>) {
        let off = dot(phi, &self.weights) - target;
        (
            off * off,
            self.weights.iter().map(|w| 2.0 * off * w).collect(),
        )
    }

    /// The backward loss of one design and its gradient in `phi`. With `k = |phi|^2` and
    /// `s = target / (1 + rel)` it is `s^2 / k^2 phi' G phi - 2 s / k g . phi + mean y^2`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for features that are zero.
    pub(super) fn backward_loss(&self, phi: &[f64], target: f64) -> Result<(f64, Vec<f64>)> {
        let k = dot(phi, phi);
        if k <= 0.0 {
            return Err(Error::argument(
                "features of a design",
                0,
                "features that are not all zero",
            ));
        }
        let d = phi.len();
        let scale = target / (1.0 + self.rel);
        let product: Vec<f64> = (0..d)
            .map(|i| (0..d).map(|j| self.gram[(i, j)] * phi[j]).sum())
            .collect();
        let (square, cross) = (dot(phi, &product), dot(phi, &self.cross));
        let loss = scale * scale / (k * k) * square - 2.0 * scale / k * cross + self.mean_square;
        let along = 4.0 * scale / (k * k) * (cross - scale / k * square);
        let part = |i: usize| {
            2.0 * scale * scale / (k * k) * product[i] - 2.0 * scale / k * self.cross[i]
                + along * phi[i]
        };
        Ok((loss, (0..d).map(part).collect()))
    }
}

/// The backward loss of several designs together, `mean_n ((K_lh (K_hh + ridge I)^-1 y_h)_n - y_n)^2`
/// with the kernel `K(a, b) = phi(a) . phi(b)`, for designs `[M, d]` with one target.
///
/// # Errors
/// [`Error::Shape`] for features of another width, [`Error::InvalidArgument`] for zero features.
pub fn joint_backward_loss(table: &OfflineTable, designs: &Tensor, target: f64) -> Result<f64> {
    let phi = rows(designs)?;
    for p in &phi {
        table.fits(p)?;
    }
    let m = phi.len();
    let trace: f64 = phi.iter().map(|p| dot(p, p)).sum();
    if trace <= 0.0 {
        return Err(Error::argument(
            "features of designs",
            0,
            "features that are not all zero",
        ));
    }
    let ridge = table.rel * trace / m as f64;
    let kernel = |i: usize, j: usize| dot(&phi[i], &phi[j]) + if i == j { ridge } else { 0.0 };
    let factor = Mat::from_fn(m, m, kernel).llt(Side::Lower).map_err(|e| {
        let reason = format!("their kernel cannot be factored ({e:?})");
        Error::unsupported("designs that are nearly the same", reason)
    })?;
    let solution = factor.solve(&Mat::from_fn(m, 1, |_, _| target));
    let miss = |(p, y): (&Vec<f64>, &f64)| {
        let predicted: f64 = (0..m).map(|i| dot(p, &phi[i]) * solution[(i, 0)]).sum();
        (predicted - y).powi(2)
    };
    Ok(table.phi.iter().zip(&table.y).map(miss).sum::<f64>() / table.y.len() as f64)
}

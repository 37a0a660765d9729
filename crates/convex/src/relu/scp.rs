//! The sampled program: a lasso over random units.

use super::fista::accelerate;
use super::{inputs, sample_weights, ConvexLoss, Data, Targets, TwoLayerRelu};
use crate::block_cd::{
    BlockCd, BlockCdConfig, Columns, LeastSquares, Logistic, Penalty, Select, SmoothObjective,
    Update,
};
use crate::error::check;
use crate::linalg::{largest_eigenvalue, matrix, norm, product};
use crate::{Error, RandomStream, Result};
use candle_core::{Device, Tensor};
use faer::{Mat, MatMut, MatRef};

/// How the lasso is solved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScpSolver {
    /// Accelerated proximal gradients with restarts where the objective rises.
    Fista,
    /// Greedy blocks with proximal Newton steps: for few units and one output. Slow where many nearly
    /// agree.
    CoordinateDescent,
}

/// Settings of [`ScpRelu`].
#[derive(Debug, Clone, PartialEq)]
pub struct ScpConfig {
    /// The loss: squared or logistic.
    pub loss: ConvexLoss,
    /// Weight of `|alpha|_1`.
    pub beta: f64,
    /// Units that are drawn where none are given.
    pub n_samples: usize,
    /// How the lasso is solved.
    pub solver: ScpSolver,
    /// Most iterations.
    pub max_iter: usize,
    /// Largest proximal step, in units of the gradient, at which it stops.
    pub tol: f64,
    /// A weight of at least 0 for each sample's loss; `None` = all 1.
    pub sample_weights: Option<Vec<f64>>,
}

impl Default for ScpConfig {
    fn default() -> Self {
        Self {
            loss: ConvexLoss::Squared,
            beta: 1e-4,
            n_samples: 256,
            solver: ScpSolver::Fista,
            max_iter: 20_000,
            tol: 1e-9,
            sample_weights: None,
        }
    }
}

/// Trains the second layer over fixed random units: no global optimum, but a convex program without
/// constraints. With at least `min((n + 1) / (psi xi) - 1, 2/xi (n + 1 - log psi))` units, with
/// probability `1 - xi` a fresh unit violates the dual constraint with probability at most `psi`.
///
/// With `c` outputs each unit has a row of weights, and the penalty is the sum of the rows' norms: what
/// weight decay of both layers amounts to.
#[derive(Debug, Clone)]
pub struct ScpRelu {
    config: ScpConfig,
}

/// The trained network with its certificate.
#[derive(Debug, Clone)]
pub struct ScpModel {
    /// The units, unscaled, `[N, d]`, and their weights.
    pub network: TwoLayerRelu,
    /// `l(Phi alpha, y) + beta sum_j |alpha_j|`
    pub objective: f64,
    /// `objective` minus a proven lower bound over these units; infinite for the logistic loss.
    pub gap: f64,
    /// The largest proximal step, in units of the gradient.
    pub residual: f64,
    /// Iterations of the solver.
    pub iterations: usize,
    /// Whether the solver met its tolerance.
    pub converged: bool,
}

/// Uniformly distributed unit vectors `[count, d]`. The first of a longer draw from the same stream
/// are the same.
///
/// # Errors
/// [`Error::InvalidConfig`] for no dimension.
pub fn sample_units(count: usize, d: usize, stream: &mut RandomStream) -> Result<Tensor> {
    check::at_least("d", d, 1)?;
    let mut out = Vec::with_capacity(count * d);
    for _ in 0..count {
        let mut unit: Vec<f64> = (0..d).map(|_| stream.next_normal()).collect();
        let size = norm(&unit);
        unit.iter_mut().for_each(|x| *x /= size);
        out.extend(unit);
    }
    Ok(Tensor::from_vec(out, (count, d), &Device::Cpu)?)
}

impl ScpRelu {
    /// A solver.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] that names the first bad field, [`Error::Unsupported`] for the hinge
    /// loss, which is not smooth.
    pub fn new(config: ScpConfig) -> Result<Self> {
        check::positive("ScpConfig::beta", config.beta)?;
        check::at_least("ScpConfig::n_samples", config.n_samples, 1)?;
        check::at_least("ScpConfig::max_iter", config.max_iter, 1)?;
        check::positive("ScpConfig::tol", config.tol)?;
        if config.loss == ConvexLoss::Hinge {
            return Err(Error::unsupported(
                "the hinge loss",
                "for the sampled program",
            ));
        }
        Ok(Self { config })
    }

    /// Trains over units that are drawn.
    ///
    /// # Errors
    /// As [`fit_units`](Self::fit_units).
    pub fn fit(&self, x: &Tensor, y: &Tensor, stream: &mut RandomStream) -> Result<ScpModel> {
        let d = x.dims().last().copied().unwrap_or(0);
        self.fit_units(x, y, &sample_units(self.config.n_samples, d, stream)?)
    }

    /// Trains over given units `[N, d]`, on targets `[n]`, or `[n, c]` with the squared loss.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::NonFinite`], [`Error::InvalidConfig`] for labels that the loss does
    /// not take, [`Error::Unsupported`] for several outputs with another loss or with coordinate
    /// descent.
    pub fn fit_units(&self, x: &Tensor, y: &Tensor, units: &Tensor) -> Result<ScpModel> {
        let rows = inputs(x)?;
        let (count, d, u) = matrix("units", units)?;
        check::length("columns of units", d, rows.ncols())?;
        check::at_least("units", count, 1)?;
        let phi = hidden(rows.as_ref(), &u);
        let (alpha, end) = match self.config.loss {
            ConvexLoss::Squared => self.squared(phi, y)?,
            _ => self.logistic(phi, x, y)?,
        };
        let units = Tensor::from_vec(u, (count, d), &Device::Cpu)?;
        let alpha = Tensor::from_vec(alpha, [&[count], &y.dims()[1..]].concat(), &Device::Cpu)?;
        Ok(ScpModel {
            network: TwoLayerRelu::new(units, alpha)?,
            objective: end.objective,
            gap: end.gap,
            residual: end.residual,
            iterations: end.iterations,
            converged: end.residual <= self.config.tol,
        })
    }

    /// `1/2 |Phi A - Y|^2`, the weights of the samples inside `Phi` and `Y`.
    fn squared(&self, mut phi: Mat<f64>, y: &Tensor) -> Result<(Vec<f64>, End)> {
        let config = &self.config;
        let weights = sample_weights(config.sample_weights.as_deref(), phi.nrows())?;
        let targets = Targets::new(y, &weights)?;
        check::length("y", targets.values.nrows(), phi.nrows())?;
        for (k, weight) in weights.iter().enumerate() {
            let root = weight.sqrt();
            phi.row_mut(k).iter_mut().for_each(|x| *x *= root);
        }
        let outputs = targets.values.ncols();
        if config.solver == ScpSolver::CoordinateDescent {
            if outputs > 1 {
                return Err(Error::unsupported(
                    "coordinate descent",
                    "with several outputs: take Fista",
                ));
            }
            let columns = as_columns(&phi)?;
            let y: Vec<f64> = targets.values.col(0).iter().copied().collect();
            return self.blocks(&mut LeastSquares::new(columns, &y)?, 1.0);
        }
        let l = curvature(phi.as_ref())?;
        let gradient = |a: &[f64]| {
            let residual = misfit(phi.as_ref(), a, &targets.values);
            let mut out = vec![0.0; a.len()];
            let place = MatMut::from_row_major_slice_mut(&mut out, phi.ncols(), outputs);
            product(place, phi.transpose(), residual.as_ref());
            out
        };
        let alpha = accelerate(
            phi.ncols() * outputs,
            l,
            gradient,
            |a| shrink_rows(a, outputs, config.beta / l),
            config.max_iter,
            config.tol,
        );
        let residual = misfit(phi.as_ref(), &alpha.x, &targets.values);
        let forces = phi.transpose() * &residual;
        let largest = forces.row_iter().map(|r| r.norm_l2()).fold(0.0, f64::max);
        let sizes: f64 = alpha.x.chunks(outputs).map(norm).sum();
        let objective = 0.5 * residual.squared_norm_l2() + config.beta * sizes;
        let bound = targets.bound(&residual, largest, config.beta);
        let end = End {
            objective,
            gap: objective - bound,
            residual: alpha.residual,
            iterations: alpha.iterations,
        };
        Ok((alpha.x, end))
    }

    fn logistic(&self, phi: Mat<f64>, x: &Tensor, y: &Tensor) -> Result<(Vec<f64>, End)> {
        let config = &self.config;
        let data = Data::new(x, y, config.loss, config.sample_weights.as_deref())?;
        let n = data.y.len() as f64;
        if config.solver == ScpSolver::CoordinateDescent {
            if config.sample_weights.is_some() {
                return Err(Error::unsupported(
                    "coordinate descent",
                    "with the logistic loss and weights of samples: take Fista",
                ));
            }
            let columns = as_columns(&phi)?;
            // The objective's loss is a sum: everything times `n`.
            return self.blocks(&mut Logistic::new(columns, &data.y)?, n);
        }
        let heaviest = data.weights.iter().copied().fold(0.0, f64::max);
        let l = 0.25 * heaviest / n * curvature(phi.as_ref())?;
        let outputs = |a: &[f64]| -> Vec<f64> {
            (0..phi.nrows())
                .map(|k| phi.row(k).iter().zip(a).map(|(x, a)| x * a).sum())
                .collect()
        };
        let gradient = |a: &[f64]| -> Vec<f64> {
            let slopes = data.slopes(config.loss, &outputs(a));
            (0..phi.ncols())
                .map(|j| phi.col(j).iter().zip(&slopes).map(|(x, g)| x * g).sum())
                .collect()
        };
        let alpha = accelerate(
            phi.ncols(),
            l,
            gradient,
            |a| shrink_rows(a, 1, config.beta / l),
            config.max_iter,
            config.tol,
        );
        let sizes: f64 = alpha.x.iter().map(|a| a.abs()).sum();
        let loss = data.loss(config.loss, &outputs(&alpha.x), None);
        let end = End {
            objective: loss + config.beta * sizes,
            gap: f64::INFINITY,
            residual: alpha.residual,
            iterations: alpha.iterations,
        };
        Ok((alpha.x, end))
    }

    /// Coordinate descent on an objective that is `scale` times ours.
    fn blocks(&self, objective: &mut impl SmoothObjective, scale: f64) -> Result<(Vec<f64>, End)> {
        let config = BlockCdConfig {
            penalty: Penalty::L1(self.config.beta * scale),
            select: Select::ProxGsq,
            update: Update::ProxNewton,
            block_size: objective.dim().min(32),
            max_iter: self.config.max_iter,
            tol: self.config.tol * scale,
            ..BlockCdConfig::default()
        };
        let start = vec![0.0; objective.dim()];
        let report = BlockCd::new(config)?.solve(objective, &start, &mut RandomStream::new(0))?;
        let end = End {
            objective: report.f_history.last().copied().unwrap_or(f64::NAN) / scale,
            gap: report.gap.map_or(f64::INFINITY, |gap| gap / scale),
            residual: report.residual / scale,
            iterations: report.f_history.len() - 1,
        };
        Ok((report.x, end))
    }
}

/// What a solver ended with beside the weights.
struct End {
    objective: f64,
    gap: f64,
    residual: f64,
    iterations: usize,
}

fn as_columns(phi: &Mat<f64>) -> Result<Columns> {
    let rows = (0..phi.nrows()).flat_map(|k| phi.row(k).iter().copied());
    let values: Vec<f64> = rows.collect();
    Columns::from_slice(phi.nrows(), phi.ncols(), &values)
}

/// `relu(X U')` for units `[N, d]`, row-major.
fn hidden(x: MatRef<'_, f64>, units: &[f64]) -> Mat<f64> {
    let d = x.ncols();
    let mut out = Mat::zeros(x.nrows(), units.len() / d);
    let units = MatRef::from_row_major_slice(units, out.ncols(), d);
    product(out.as_mut(), x, units.transpose());
    for column in out.col_iter_mut() {
        column.iter_mut().for_each(|h| *h = h.max(0.0));
    }
    out
}

/// `Phi A - Y` for `A` `[N, c]`, row-major.
fn misfit(phi: MatRef<'_, f64>, a: &[f64], y: &Mat<f64>) -> Mat<f64> {
    let mut out = Mat::zeros(y.nrows(), y.ncols());
    let a = MatRef::from_row_major_slice(a, phi.ncols(), y.ncols());
    product(out.as_mut(), phi, a);
    out -= y;
    out
}

/// `lambda_max(Phi' Phi)`
fn curvature(phi: MatRef<'_, f64>) -> Result<f64> {
    let gram = if phi.nrows() < phi.ncols() {
        phi * phi.transpose()
    } else {
        phi.transpose() * phi
    };
    Ok(largest_eigenvalue(gram.as_ref())?.max(f64::MIN_POSITIVE))
}

fn shrink_rows(a: &mut [f64], width: usize, by: f64) {
    a.chunks_mut(width).for_each(|row| shrink(row, by));
}

/// The proximal step of `by |x|`.
pub(super) fn shrink(x: &mut [f64], by: f64) {
    let size = norm(x);
    let factor = if size > by { 1.0 - by / size } else { 0.0 };
    x.iter_mut().for_each(|x| *x *= factor);
}

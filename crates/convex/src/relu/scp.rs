//! The sampled program: a lasso over random units.

use super::{ConvexLoss, Data, TwoLayerRelu};
use crate::block_cd::{
    BlockCd, BlockCdConfig, Columns, LeastSquares, Logistic, Penalty, Report, Select,
    SmoothObjective, Update,
};
use crate::error::check;
use crate::linalg::{axpy, dot, largest_eigenvalue, matrix, max_abs, norm};
use crate::{Error, RandomStream, Result};
use candle_core::{Device, Tensor};

/// How the lasso is solved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScpSolver {
    /// Accelerated proximal gradients with restarts where the objective rises.
    Fista,
    /// Greedy blocks with proximal Newton steps.
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
}

impl Default for ScpConfig {
    fn default() -> Self {
        Self {
            loss: ConvexLoss::Squared,
            beta: 1e-4,
            n_samples: 256,
            solver: ScpSolver::CoordinateDescent,
            max_iter: 20_000,
            tol: 1e-9,
        }
    }
}

/// Trains the second layer over fixed random units: no global optimum, but a convex program without
/// constraints. With at least `min((n + 1) / (psi xi) - 1, 2/xi (n + 1 - log psi))` units, with
/// probability `1 - xi` a fresh unit violates the dual constraint with probability at most `psi`.
#[derive(Debug, Clone)]
pub struct ScpRelu {
    config: ScpConfig,
}

/// The trained network with its certificate.
#[derive(Debug, Clone)]
pub struct ScpModel {
    /// The units, unscaled, `[N, d]`, and their weights.
    pub network: TwoLayerRelu,
    /// `l(Phi alpha, y) + beta |alpha|_1`
    pub objective: f64,
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

    /// Trains over given units `[N, d]`.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::NonFinite`], [`Error::InvalidConfig`] for labels that the loss does
    /// not take.
    pub fn fit_units(&self, x: &Tensor, y: &Tensor, units: &Tensor) -> Result<ScpModel> {
        let data = Data::new(x, y, self.config.loss)?;
        let (count, d, u) = matrix("units", units)?;
        check::length("columns of units", d, data.x.ncols())?;
        check::at_least("units", count, 1)?;
        let n = data.y.len();
        let feature = |e: usize| -> f64 {
            let (k, unit) = (e / count, &u[e % count * d..(e % count + 1) * d]);
            (0..d)
                .map(|j| data.x[(k, j)] * unit[j])
                .sum::<f64>()
                .max(0.0)
        };
        let phi: Vec<f64> = (0..n * count).map(feature).collect();
        let phi = Columns::from_slice(n, count, &phi)?;
        // The solvers' logistic loss is a sum: everything times `n`.
        let scale = match self.config.loss {
            ConvexLoss::Squared => 1.0,
            _ => n as f64,
        };
        let report = match self.config.loss {
            ConvexLoss::Squared => self.solve(&mut LeastSquares::new(phi, &data.y)?, scale)?,
            _ => self.solve(&mut Logistic::new(phi, &data.y)?, scale)?,
        };
        let alpha = Tensor::from_vec(report.x, count, &Device::Cpu)?;
        let units = Tensor::from_vec(u, (count, d), &Device::Cpu)?;
        Ok(ScpModel {
            network: TwoLayerRelu::new(units, alpha)?,
            objective: report.f_history.last().copied().unwrap_or(f64::NAN) / scale,
            residual: report.residual / scale,
            iterations: report.f_history.len() - 1,
            converged: report.converged,
        })
    }

    fn solve(&self, objective: &mut impl SmoothObjective, scale: f64) -> Result<Report> {
        let l1 = self.config.beta * scale;
        let (tol, max_iter) = (self.config.tol * scale, self.config.max_iter);
        if self.config.solver == ScpSolver::CoordinateDescent {
            let config = BlockCdConfig {
                penalty: Penalty::L1(l1),
                select: Select::ProxGsq,
                update: Update::ProxNewton,
                block_size: objective.dim().min(32),
                max_iter,
                tol,
                ..BlockCdConfig::default()
            };
            let start = vec![0.0; objective.dim()];
            return BlockCd::new(config)?.solve(objective, &start, &mut RandomStream::new(0));
        }
        fista(objective, l1, max_iter, tol)
    }
}

/// Beck and Teboulle's method, restarted where the step turns against the momentum (O'Donoghue and
/// Candes).
fn fista(
    objective: &mut impl SmoothObjective,
    l1: f64,
    max_iter: usize,
    tol: f64,
) -> Result<Report> {
    let start = std::time::Instant::now();
    let dim = objective.dim();
    let all: Vec<usize> = (0..dim).collect();
    let l = largest_eigenvalue(objective.bound_block(&all).as_ref())?.max(f64::MIN_POSITIVE);
    let penalty = Penalty::L1(l1);
    let (mut x, mut y, mut momentum) = (vec![0.0; dim], vec![0.0; dim], 1.0f64);
    let mut history = vec![];
    let mut residual = f64::INFINITY;
    for _ in 0..max_iter {
        objective.reset(&x);
        history.push(objective.value() + penalty.value(&x));
        objective.reset(&y);
        let grad = objective.grad();
        let next: Vec<f64> = (0..dim)
            .map(|i| penalty.prox(y[i] - grad[i] / l, 1.0 / l))
            .collect();
        let moved: Vec<f64> = next.iter().zip(&y).map(|(a, b)| a - b).collect();
        let along: Vec<f64> = next.iter().zip(&x).map(|(a, b)| a - b).collect();
        residual = l * max_abs(&moved);
        if dot(&moved, &along) < 0.0 {
            momentum = 1.0;
        }
        let following = 0.5 * (1.0 + (1.0 + 4.0 * momentum * momentum).sqrt());
        y = next.clone();
        axpy((momentum - 1.0) / following, &along, &mut y);
        (x, momentum) = (next, following);
        if residual <= tol {
            break;
        }
    }
    objective.reset(&x);
    history.push(objective.value() + penalty.value(&x));
    Ok(Report {
        gap: objective.duality_gap(&penalty, &objective.grad()),
        converged: residual <= tol,
        f_history: history,
        blocks: vec![],
        support_history: vec![],
        active_set_iter: 0,
        residual,
        lipschitz_estimates: vec![],
        seconds: start.elapsed().as_secs_f64(),
        x,
    })
}

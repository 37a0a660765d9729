//! Networks with gates that stay as they were drawn: the convex program without its cones.

use super::fista::accelerate;
use super::scp::shrink;
use super::{inputs, sample_weights, ConvexLoss, Data, Patterns, Targets};
use crate::error::check;
use crate::linalg::{largest_eigenvalue, norm, product};
use crate::{Error, Result};
use candle_core::{DType, Device, Module, Tensor};
use faer::{Mat, MatMut, MatRef};

/// What the penalty adds up, for units with several outputs. For one output both are `sum_i |w_i|`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutputNorm {
    /// The Euclidean norm of each output's weights in each unit: units serve one output each.
    Rows,
    /// The nuclear norm of each unit's matrix: what weight decay of both layers amounts to where units
    /// share their gate.
    Nuclear,
}

/// Settings of [`GatedRelu`].
#[derive(Debug, Clone, PartialEq)]
pub struct GatedConfig {
    /// The loss: squared, or logistic with one output.
    pub loss: ConvexLoss,
    /// Weight of the norms.
    pub beta: f64,
    /// What they are of.
    pub norm: OutputNorm,
    /// Most iterations.
    pub max_iter: usize,
    /// Largest proximal step, in units of the gradient, at which it stops.
    pub tol: f64,
    /// A weight of at least 0 for each sample's loss; `None` = all 1.
    pub sample_weights: Option<Vec<f64>>,
}

impl Default for GatedConfig {
    fn default() -> Self {
        Self {
            loss: ConvexLoss::Squared,
            beta: 1e-4,
            norm: OutputNorm::Rows,
            max_iter: 20_000,
            tol: 1e-8,
            sample_weights: None,
        }
    }
}

/// Trains `f(x) = sum_i [x' a_i >= 0] W_i' x` over given gates: a group lasso without constraints.
///
/// ```text
/// min l(sum_i D_i X W_i, Y) + beta sum_i |W_i|        W_i [d, c]
/// ```
///
/// For the squared loss with several outputs `Y` is `[n, c]`. Its optimum is at most that of the ReLU
/// program over the same patterns, since that one has the cones besides.
///
/// ```
/// use candle_core::{Device, Module, Tensor};
/// use thalweg_convex::relu::{GatedConfig, GatedRelu, Patterns};
///
/// let x = Tensor::new(&[[-1.5, 1.0], [-0.5, 1.0], [0.2, 1.0], [0.9, 1.0], [1.6, 1.0]], &Device::Cpu)?;
/// let y = Tensor::new(&[[0.9, -1.0], [0.1, 0.0], [0.0, 0.0], [0.5, 1.0], [1.2, 2.0]], &Device::Cpu)?;
/// let gates = Patterns::enumerate(&x)?;
/// let model = GatedRelu::new(GatedConfig { beta: 0.01, ..Default::default() })?.fit(&x, &y, &gates)?;
/// assert!(model.gap < 1e-4);
/// assert_eq!(model.to_network(1e-6)?.forward(&x)?.dims(), &[5, 2]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct GatedRelu {
    config: GatedConfig,
}

/// The trained network with its certificate.
#[derive(Debug, Clone)]
pub struct GatedModel {
    patterns: Patterns,
    outputs: usize,
    /// Whether the targets had one dimension.
    scalar: bool,
    /// `[P, c, d]` row-major.
    pub weights: Vec<f64>,
    /// The objective.
    pub objective: f64,
    /// `objective` minus a proven lower bound; infinite for the logistic loss.
    pub gap: f64,
    /// The last proximal step, in units of the gradient.
    pub residual: f64,
    /// Iterations of the solver.
    pub iterations: usize,
    /// Whether the solver met its tolerance.
    pub converged: bool,
}

impl GatedRelu {
    /// A solver.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] that names the first bad field, [`Error::Unsupported`] for the hinge
    /// loss, which is not smooth.
    pub fn new(config: GatedConfig) -> Result<Self> {
        check::positive("GatedConfig::beta", config.beta)?;
        check::at_least("GatedConfig::max_iter", config.max_iter, 1)?;
        check::positive("GatedConfig::tol", config.tol)?;
        if config.loss == ConvexLoss::Hinge {
            return Err(Error::unsupported("the hinge loss", "for gated networks"));
        }
        Ok(Self { config })
    }

    /// Trains on `x` `[n, d]` and `y` `[n]` or `[n, c]`.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::NonFinite`], [`Error::InvalidConfig`] for labels that the loss does
    /// not take or weights that are negative, [`Error::Numerical`] where a decomposition fails.
    pub fn fit(&self, x: &Tensor, y: &Tensor, patterns: &Patterns) -> Result<GatedModel> {
        let config = &self.config;
        let rows = inputs(x)?;
        patterns.fits(rows.nrows(), rows.ncols())?;
        let squared = config.loss == ConvexLoss::Squared;
        let weights = sample_weights(config.sample_weights.as_deref(), rows.nrows())?;
        let data = match squared {
            true => None,
            false => Some(Data::new(
                x,
                y,
                config.loss,
                config.sample_weights.as_deref(),
            )?),
        };
        let targets = Targets::new(y, &weights)?;
        let absorbed = if squared { &weights[..] } else { &[] };
        let gated = Gated::new(&rows, patterns, absorbed, targets.values.ncols());
        let misfit = |w: &[f64]| {
            let outputs = gated.outputs(w);
            match &data {
                None => outputs - &targets.values,
                Some(data) => {
                    let flat: Vec<f64> = outputs.col(0).iter().copied().collect();
                    let slopes = data.slopes(config.loss, &flat);
                    Mat::from_fn(slopes.len(), 1, |k, _| slopes[k])
                }
            }
        };
        let heaviest = weights.iter().copied().fold(0.0, f64::max);
        let curvature = match squared {
            true => 1.0,
            false => 0.25 * heaviest / rows.nrows() as f64,
        };
        let l = curvature * gated.largest()?;
        let mut failed = None;
        let found = accelerate(
            patterns.len() * gated.outputs * gated.d,
            l,
            |w| gated.adjoint(&misfit(w)),
            |w| {
                if let Err(error) = gated.prox(w, config.norm, config.beta / l) {
                    failed.get_or_insert(error);
                }
            },
            config.max_iter,
            config.tol,
        );
        if let Some(error) = failed {
            return Err(error);
        }
        let sizes = config.beta * gated.norms(&found.x, config.norm, Size::Penalty)?;
        let residual = misfit(&found.x);
        let (objective, gap) = match &data {
            None => {
                let forces = gated.adjoint(&residual);
                let largest = gated.norms(&forces, config.norm, Size::Dual)?;
                let value = 0.5 * residual.squared_norm_l2() + sizes;
                (
                    value,
                    value - targets.bound(&residual, largest, config.beta),
                )
            }
            Some(data) => {
                let outputs = gated.outputs(&found.x);
                let flat: Vec<f64> = outputs.col(0).iter().copied().collect();
                (data.loss(config.loss, &flat, None) + sizes, f64::INFINITY)
            }
        };
        Ok(GatedModel {
            patterns: patterns.clone(),
            outputs: gated.outputs,
            scalar: y.rank() == 1,
            objective,
            gap,
            residual: found.residual,
            iterations: found.iterations,
            converged: found.residual <= config.tol,
            weights: found.x,
        })
    }
}

/// The linear map from weights `[P, c, d]` to outputs.
struct Gated {
    x: Mat<f64>,
    /// `D`, `[n, P]`.
    gates: Mat<f64>,
    outputs: usize,
    d: usize,
}

/// Which norm is summed up or the largest of.
#[derive(Clone, Copy)]
enum Size {
    Penalty,
    Dual,
}

impl Gated {
    fn new(x: &Mat<f64>, patterns: &Patterns, weights: &[f64], outputs: usize) -> Self {
        let root = |k: usize| weights.get(k).map_or(1.0, |w| w.sqrt());
        let gate = |k: usize, i: usize| f64::from(u8::from(patterns.columns[i][k]));
        Self {
            x: Mat::from_fn(x.nrows(), x.ncols(), |k, j| root(k) * x[(k, j)]),
            gates: Mat::from_fn(x.nrows(), patterns.len(), gate),
            outputs,
            d: x.ncols(),
        }
    }

    /// `sum_i D_i X W_i`, `[n, c]`.
    fn outputs(&self, w: &[f64]) -> Mat<f64> {
        let columns = w.len() / self.d;
        let mut scores = Mat::zeros(self.x.nrows(), columns);
        let w = MatRef::from_column_major_slice(w, self.d, columns);
        product(scores.as_mut(), self.x.as_ref(), w);
        let mut out = Mat::zeros(self.x.nrows(), self.outputs);
        for (e, column) in scores.col_iter().enumerate() {
            let gates = self.gates.col(e / self.outputs);
            let place = out.col_mut(e % self.outputs);
            for ((o, s), g) in place.iter_mut().zip(column.iter()).zip(gates.iter()) {
                *o += g * s;
            }
        }
        out
    }

    /// `X' D_i R` of each unit.
    fn adjoint(&self, r: &Mat<f64>) -> Vec<f64> {
        let columns = self.gates.ncols() * self.outputs;
        let inner = Mat::from_fn(self.x.nrows(), columns, |k, e| {
            self.gates[(k, e / self.outputs)] * r[(k, e % self.outputs)]
        });
        let mut out = vec![0.0; columns * self.d];
        let place = MatMut::from_column_major_slice_mut(&mut out, self.d, columns);
        product(place, self.x.transpose(), inner.as_ref());
        out
    }

    /// The largest eigenvalue of `F F'`, which is `X X'` times the number of shared gates, by entry.
    fn largest(&self) -> Result<f64> {
        let n = self.x.nrows();
        let (kernel, shared) = (
            &self.x * self.x.transpose(),
            &self.gates * self.gates.transpose(),
        );
        let both = Mat::from_fn(n, n, |k, l| kernel[(k, l)] * shared[(k, l)]);
        Ok(largest_eigenvalue(both.as_ref())?.max(f64::MIN_POSITIVE))
    }

    fn prox(&self, w: &mut [f64], kind: OutputNorm, by: f64) -> Result<()> {
        if kind == OutputNorm::Rows || self.outputs == 1 {
            w.chunks_mut(self.d).for_each(|w| shrink(w, by));
            return Ok(());
        }
        for unit in w.chunks_mut(self.d * self.outputs) {
            let svd = MatRef::from_column_major_slice(unit, self.d, self.outputs)
                .thin_svd()
                .map_err(|e| Error::numerical("a singular value decomposition", e))?;
            let values = svd.S().column_vector();
            let shrunk = Mat::from_fn(values.nrows(), self.outputs, |r, o| {
                (values[r] - by).max(0.0) * svd.V()[(o, r)]
            });
            let place = MatMut::from_column_major_slice_mut(unit, self.d, self.outputs);
            product(place, svd.U(), shrunk.as_ref());
        }
        Ok(())
    }

    /// The penalty of weights, or the largest dual norm of forces.
    fn norms(&self, w: &[f64], kind: OutputNorm, size: Size) -> Result<f64> {
        let join = |sizes: Vec<f64>| match size {
            Size::Penalty => sizes.iter().sum(),
            Size::Dual => sizes.into_iter().fold(0.0, f64::max),
        };
        if kind == OutputNorm::Rows || self.outputs == 1 {
            return Ok(join(w.chunks(self.d).map(norm).collect()));
        }
        let values = |unit: &[f64]| -> Result<f64> {
            let values = MatRef::from_column_major_slice(unit, self.d, self.outputs)
                .singular_values()
                .map_err(|e| Error::numerical("a singular value decomposition", e))?;
            Ok(join(values))
        };
        let units = w.chunks(self.d * self.outputs);
        Ok(join(units.map(values).collect::<Result<_>>()?))
    }
}

impl GatedModel {
    /// The patterns that it was trained with.
    pub fn patterns(&self) -> &Patterns {
        &self.patterns
    }

    /// The network; units with a norm of at most `prune_tol` are left out.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for a negative tolerance.
    pub fn to_network(&self, prune_tol: f64) -> Result<GatedNetwork> {
        check::non_negative("prune_tol", prune_tol)?;
        let d = self.patterns.d;
        let (mut gates, mut weights) = (vec![], vec![]);
        let units = self.weights.chunks(self.outputs * d);
        for (unit, direction) in units.zip(&self.patterns.directions) {
            if norm(unit) > prune_tol {
                gates.extend_from_slice(direction);
                weights.extend_from_slice(unit);
            }
        }
        let count = gates.len() / d;
        let weights = Tensor::from_vec(weights, (count, self.outputs, d), &Device::Cpu)?;
        Ok(GatedNetwork {
            gates: Tensor::from_vec(gates, (count, d), &Device::Cpu)?,
            weights,
            scalar: self.scalar,
        })
    }
}

/// `sum_i [x' a_i >= 0] W_i' x`
#[derive(Debug, Clone)]
pub struct GatedNetwork {
    /// Directions of the gates, `[m, d]`: constants.
    pub gates: Tensor,
    /// Weights, `[m, c, d]`.
    pub weights: Tensor,
    scalar: bool,
}

impl GatedNetwork {
    /// Number of units.
    pub fn width(&self) -> usize {
        self.gates.dims()[0]
    }

    /// The same network in another precision or place.
    ///
    /// # Errors
    /// Those of candle.
    pub fn to(&self, dtype: DType, device: &Device) -> Result<Self> {
        Ok(Self {
            gates: self.gates.to_dtype(dtype)?.to_device(device)?,
            weights: self.weights.to_dtype(dtype)?.to_device(device)?,
            scalar: self.scalar,
        })
    }
}

impl Module for GatedNetwork {
    /// Outputs `[n]`, or `[n, c]` where the targets had two dimensions, for `[n, d]`.
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let (m, c, d) = self.weights.dims3()?;
        let out = if m == 0 {
            Tensor::zeros((x.dim(0)?, c), x.dtype(), x.device())?
        } else {
            let open = x.matmul(&self.gates.t()?)?.ge(0.0)?.to_dtype(x.dtype())?;
            let scores = x.matmul(&self.weights.reshape((m * c, d))?.t()?)?;
            let scores = scores.reshape(((), m, c))?;
            scores.broadcast_mul(&open.unsqueeze(2)?)?.sum(1)?
        };
        match self.scalar {
            true => out.squeeze(1),
            false => Ok(out),
        }
    }
}

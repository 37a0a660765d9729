//! What training returns: the solution of the convex program and the network read off it.

use super::{ConvexLoss, Patterns};
use crate::error::check;
use crate::linalg::{matrix, norm, values};
use crate::{Error, Result};
use candle_core::{DType, Device, Module, Tensor};
use faer::Mat;

/// The solution of the convex program, with its certificate.
#[derive(Debug, Clone)]
pub struct ConvexReluModel {
    pub(super) patterns: Patterns,
    /// Positive units, `[P, d]` row-major.
    pub v: Vec<f64>,
    /// Negative units, `[P, d]` row-major.
    pub w: Vec<f64>,
    /// The objective of the convex program at `v`, `w`.
    pub objective: f64,
    /// `objective` minus a proven lower bound of the optimum over these patterns; infinite where the
    /// solver gives no bound.
    pub gap: f64,
    /// The largest violation of a cone constraint; the gated outputs are the network's where it is 0.
    pub violation: f64,
    /// Iterations of the solver.
    pub iterations: usize,
    /// Whether the solver met its tolerance.
    pub converged: bool,
}

impl ConvexReluModel {
    /// The patterns that it was trained with.
    pub fn patterns(&self) -> &Patterns {
        &self.patterns
    }

    /// The network with the same outputs; units with a norm of at most `prune_tol` are left out.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`](crate::Error::InvalidConfig) for a negative tolerance.
    pub fn to_network(&self, prune_tol: f64) -> Result<TwoLayerRelu> {
        check::non_negative("prune_tol", prune_tol)?;
        let d = self.patterns.d;
        let (mut u, mut alpha) = (vec![], vec![]);
        for (units, sign) in [(&self.v, 1.0), (&self.w, -1.0)] {
            for unit in units.chunks(d) {
                let size = norm(unit);
                if size > prune_tol {
                    u.extend(unit.iter().map(|x| x / size.sqrt()));
                    alpha.push(sign * size.sqrt());
                }
            }
        }
        let m = alpha.len();
        TwoLayerRelu::new(
            Tensor::from_vec(u, (m, d), &Device::Cpu)?,
            Tensor::from_vec(alpha, m, &Device::Cpu)?,
        )
    }

    /// The network's outputs `[n]` for `x` `[n, d]`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn predict(&self, x: &Tensor) -> Result<Tensor> {
        let network = self.to_network(0.0)?;
        let out = network.forward(&x.to_dtype(DType::F64)?.to_device(&Device::Cpu)?)?;
        Ok(out.to_dtype(x.dtype())?.to_device(x.device())?)
    }

    /// The gated outputs `sum_i [x' a_i >= 0] x' (v_i - w_i)` for `x` `[n, d]`: the convex program's
    /// own, which are the network's only where the cone constraints hold.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) for other columns.
    pub fn predict_gated(&self, x: &Tensor) -> Result<Vec<f64>> {
        let (_, d, values) = matrix("x", x)?;
        check::length("columns of x", d, self.patterns.d)?;
        let dot = crate::linalg::dot;
        let output = |row: &[f64]| -> f64 {
            let units = self.v.chunks(d).zip(self.w.chunks(d));
            let gated = self.patterns.directions.iter().zip(units);
            gated
                .filter(|(a, _)| dot(a, row) >= 0.0)
                .map(|(_, (v, w))| dot(row, v) - dot(row, w))
                .sum()
        };
        Ok(values.chunks(d).map(output).collect())
    }
}

/// `sum_j relu(x' u_j) alpha_j`
#[derive(Debug, Clone)]
pub struct TwoLayerRelu {
    /// First layer, `[m, d]`.
    pub u: Tensor,
    /// Second layer, `[m]`, or `[m, c]` for `c` outputs.
    pub alpha: Tensor,
}

impl TwoLayerRelu {
    /// From both layers' weights.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) where they do not fit.
    pub fn new(u: Tensor, alpha: Tensor) -> Result<Self> {
        let &[units, _] = u.dims() else {
            return Err(Error::shape("u", u.dims(), "[m, d]"));
        };
        if alpha.rank() > 2 || alpha.dims().first() != Some(&units) {
            let expected = format!("[{units}] or [{units}, c]");
            return Err(Error::shape("alpha", alpha.dims(), expected));
        }
        Ok(Self { u, alpha })
    }

    /// Number of units.
    pub fn width(&self) -> usize {
        self.alpha.dims()[0]
    }

    /// The same network in another precision or place.
    ///
    /// # Errors
    /// Those of candle.
    pub fn to(&self, dtype: DType, device: &Device) -> Result<Self> {
        Ok(Self {
            u: self.u.to_dtype(dtype)?.to_device(device)?,
            alpha: self.alpha.to_dtype(dtype)?.to_device(device)?,
        })
    }

    /// `beta/2 sum_j (|u_j|^2 + alpha_j^2)`, plus the loss: what gradient descent would minimise.
    ///
    /// # Errors
    /// Weights, outputs or labels that are not finite, and those of candle.
    pub fn objective(&self, x: &Tensor, y: &Tensor, loss: ConvexLoss, beta: f64) -> Result<f64> {
        let outputs = values("outputs", &self.forward(x)?)?;
        let y = values("y", y)?;
        check::length("y", y.len(), outputs.len())?;
        let squares =
            |t: &Tensor| -> Result<f64> { Ok(values("weights", t)?.iter().map(|x| x * x).sum()) };
        let decay = 0.5 * beta * (squares(&self.u)? + squares(&self.alpha)?);
        let pairs = outputs.iter().zip(&y);
        let sum: f64 = pairs.map(|(f, y)| loss.one(*f, *y, 0.0)).sum();
        Ok(sum / loss.divisor(x.dim(0)?) + decay)
    }
}

impl Module for TwoLayerRelu {
    /// Outputs `[n]`, or `[n, c]`, for `[n, d]`.
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        if self.width() == 0 {
            let shape = [&[x.dim(0)?], &self.alpha.dims()[1..]].concat();
            return Tensor::zeros(shape, x.dtype(), x.device());
        }
        let hidden = x.matmul(&self.u.t()?)?.relu()?;
        match self.alpha.rank() {
            1 => hidden.matmul(&self.alpha.unsqueeze(1)?)?.squeeze(1),
            _ => hidden.matmul(&self.alpha),
        }
    }
}

/// `y_k f(x_k) - eps |Q_k|_1` of each sample: no perturbation of at most `eps` a column makes the
/// margin of a model from adversarial training with this `eps` smaller. `perturbed` names the columns
/// that may change; labels are -1 and 1.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) where the sizes do not fit.
pub fn certificate(
    model: &ConvexReluModel,
    x: &Tensor,
    y: &Tensor,
    eps: f64,
    perturbed: &[bool],
) -> Result<Vec<f64>> {
    check::non_negative("eps", eps)?;
    let (n, d, x) = matrix("x", x)?;
    model.patterns.fits(n, d)?;
    check::length("perturbed", perturbed.len(), d)?;
    let y = values("y", y)?;
    check::length("y", y.len(), n)?;
    let x = crate::linalg::from_rows(n, d, &x);
    let (outputs, slack) = outputs_and_slack(&x, &model.patterns, &model.v, &model.w, perturbed);
    Ok((0..n).map(|k| y[k] * outputs[k] - eps * slack[k]).collect())
}

/// `x_k' Q_k` and `|Q_k|_1` over the perturbed columns, with `Q_k = sum_i d_ik (v_i - w_i)`.
pub(super) fn outputs_and_slack(
    x: &Mat<f64>,
    patterns: &Patterns,
    v: &[f64],
    w: &[f64],
    perturbed: &[bool],
) -> (Vec<f64>, Vec<f64>) {
    let d = patterns.d;
    (0..patterns.n)
        .map(|k| {
            let mut q = vec![0.0; d];
            for (i, column) in patterns.columns.iter().enumerate() {
                if column[k] {
                    for j in 0..d {
                        q[j] += v[i * d + j] - w[i * d + j];
                    }
                }
            }
            let output: f64 = (0..d).map(|j| x[(k, j)] * q[j]).sum();
            let sizes = q.iter().zip(perturbed).filter(|(_, p)| **p);
            (output, sizes.map(|(q, _)| q.abs()).sum::<f64>())
        })
        .unzip()
}

/// The largest violation of `(2 D_i - I) X v_i >= eps |v_i|_1`.
pub(super) fn violation(
    x: &Mat<f64>,
    patterns: &Patterns,
    units: &[f64],
    eps: f64,
    perturbed: &[bool],
) -> f64 {
    let d = patterns.d;
    let mut worst = 0.0f64;
    for (unit, column) in units.chunks(d).zip(&patterns.columns) {
        let sizes = unit.iter().zip(perturbed).filter(|(_, p)| **p);
        let size: f64 = sizes.map(|(x, _)| x.abs()).sum();
        for (k, active) in column.iter().enumerate() {
            let score: f64 = (0..d).map(|j| x[(k, j)] * unit[j]).sum();
            let signed = if *active { score } else { -score };
            worst = worst.max(eps * size - signed);
        }
    }
    worst
}

/// `beta sum |v_i|`
pub(super) fn group_norms(units: &[f64], d: usize) -> f64 {
    units.chunks(d).map(norm).sum()
}

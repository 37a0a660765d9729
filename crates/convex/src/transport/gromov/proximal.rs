//! Entropic transport by scaling a kernel, with a prior plan inside it.

use super::tensor_of;
use crate::error::check;
use crate::linalg::{axpy, dot, from_rows, matrix, values};
use crate::transport::balanced;
use crate::{Error, Result};
use candle_core::Tensor;
use faer::Mat;

/// Settings of [`proximal_transport`].
#[derive(Debug, Clone, PartialEq)]
pub struct ProximalConfig {
    /// Temperature of the kernel, in units of the cost.
    pub beta: f64,
    /// Most iterations.
    pub max_iter: usize,
    /// Change of the row scales, relative to their sum, at which it stops.
    pub tol: f64,
}

impl Default for ProximalConfig {
    fn default() -> Self {
        Self {
            beta: 0.025,
            max_iter: 50,
            tol: 1e-10,
        }
    }
}

impl ProximalConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] that names the first bad one.
    pub fn validate(&self) -> Result<()> {
        check::positive("ProximalConfig::beta", self.beta)?;
        check::at_least("ProximalConfig::max_iter", self.max_iter, 1)?;
        check::non_negative("ProximalConfig::tol", self.tol)
    }
}

/// A few steps of Sinkhorn's scaling on `K = exp(-C / beta) * prior`: the proximal step of transport
/// problems that are solved by a sequence of them (Gromov-Wasserstein barycenters, say). With
/// `a = 1 / m` at first, repeats `b = q / K'a`, `a = p / K b`, and gives `a_i K_ij b_j` with the last
/// `a` and the `b` before it, so that the rows' sums are `p` exactly. `cost` and `prior` are `[m, n]`.
///
/// # Errors
/// Those of [`ProximalConfig::validate`], [`Error::Shape`], [`Error::NonFinite`], [`Error::UnequalMass`],
/// [`Error::InvalidConfig`] for a negative weight or prior, and [`Error::Numerical`] where the kernel
/// leaves a row or column with mass empty.
pub fn proximal_transport(
    cost: &Tensor,
    p: &Tensor,
    q: &Tensor,
    prior: Option<&Tensor>,
    config: &ProximalConfig,
) -> Result<Tensor> {
    config.validate()?;
    let p = values("p", p)?;
    let q = balanced(["p", "q"], &p, &values("q", q)?)?;
    let mut kernel = shaped("cost", cost, &p, &q)?;
    for column in kernel.col_iter_mut() {
        column
            .iter_mut()
            .for_each(|c| *c = (-*c / config.beta).exp());
    }
    if let Some(prior) = prior {
        let prior = shaped("prior", prior, &p, &q)?;
        for (column, prior) in kernel.col_iter_mut().zip(prior.col_iter()) {
            for (k, t) in column.iter_mut().zip(prior.iter()) {
                if *t < 0.0 {
                    return Err(Error::config("prior", t, "entries of at least 0"));
                }
                *k *= t;
            }
        }
    }
    let mut a = vec![1.0 / p.len() as f64; p.len()];
    let mut b = vec![0.0; q.len()];
    for _ in 0..config.max_iter {
        let mut rows = vec![0.0; p.len()];
        for (j, column) in kernel.col_iter().enumerate() {
            let column = column
                .try_as_col_major()
                .map_or(&[][..], |column| column.as_slice());
            b[j] = share("column", j, q[j], dot(column, &a), config.beta)?;
            axpy(b[j], column, &mut rows);
        }
        let (mut change, mut size) = (0.0, 0.0);
        for (i, a) in a.iter_mut().enumerate() {
            let next = share("row", i, p[i], rows[i], config.beta)?;
            change += (next - *a).abs();
            size += next.abs();
            *a = next;
        }
        if change <= config.tol * size {
            break;
        }
    }
    let plan = Mat::from_fn(p.len(), q.len(), |i, j| a[i] * kernel[(i, j)] * b[j]);
    tensor_of(plan.as_ref())
}

fn shaped(what: &'static str, x: &Tensor, p: &[f64], q: &[f64]) -> Result<Mat<f64>> {
    let (rows, columns, values) = matrix(what, x)?;
    if (rows, columns) != (p.len(), q.len()) {
        let expected = format!("[{}, {}]", p.len(), q.len());
        return Err(Error::shape(what, x.dims(), expected));
    }
    Ok(from_rows(rows, columns, &values))
}

/// `mass / sum`, which must be a number.
fn share(what: &str, index: usize, mass: f64, sum: f64, beta: f64) -> Result<f64> {
    if mass == 0.0 {
        return Ok(0.0);
    }
    let scale = mass / sum;
    if scale.is_finite() {
        return Ok(scale);
    }
    Err(Error::numerical(
        "proximal transport",
        format!("{what} {index} of the kernel sums to {sum} at beta = {beta}: raise it, or scale the costs"),
    ))
}

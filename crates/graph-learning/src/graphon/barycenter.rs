//! Gromov-Wasserstein barycenters of graphs.

use super::align::{target_distribution, Aligned};
use super::step::StepFunction;
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use convex::transport::{proximal_transport, ProximalConfig};
use faer::Mat;

/// Settings of the barycenter family.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BarycenterConfig {
    /// Temperature of the proximal steps.
    pub beta: f64,
    /// Scaling iterations of a proximal step.
    pub inner: usize,
    /// Updates of the barycenter.
    pub outer: usize,
    /// Share of the structure in the cost; the rest compares degrees. 1 is pure Gromov-Wasserstein.
    pub gamma: f64,
    /// Weight of the squared second differences; 0 for none.
    pub alpha: f64,
}

impl Default for BarycenterConfig {
    /// GWB.
    fn default() -> Self {
        Self {
            beta: 0.025,
            inner: 50,
            outer: 5,
            gamma: 1.0,
            alpha: 0.0,
        }
    }
}

impl BarycenterConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] that names the first bad one.
    pub fn validate(&self) -> Result<()> {
        if !(self.beta.is_finite() && self.beta > 0.0) {
            let field = "BarycenterConfig::beta";
            return Err(Error::config(field, self.beta, "a positive number"));
        }
        for (field, count) in [
            ("BarycenterConfig::inner", self.inner),
            ("BarycenterConfig::outer", self.outer),
        ] {
            if count == 0 {
                return Err(Error::config(field, 0, "at least 1"));
            }
        }
        if !(0.0..=1.0).contains(&self.gamma) {
            let field = "BarycenterConfig::gamma";
            return Err(Error::config(field, self.gamma, "a share in [0, 1]"));
        }
        if !(self.alpha.is_finite() && self.alpha >= 0.0) {
            let field = "BarycenterConfig::alpha";
            return Err(Error::config(field, self.alpha, "a number >= 0"));
        }
        Ok(())
    }
}

/// One graph beside the barycenter.
struct Member<'a> {
    graph: &'a Aligned,
    /// The squared distance of degree shares, over its largest entry.
    degrees: Mat<f64>,
    start: Mat<f64>,
    plan: Mat<f64>,
}

/// The barycenter on `k` cells.
pub(super) fn barycenter(
    graphs: &[Aligned],
    k: usize,
    config: &BarycenterConfig,
) -> Result<StepFunction> {
    let shares: Vec<Vec<f64>> = graphs.iter().map(|g| g.shares().to_vec()).collect();
    let p = target_distribution(&shares, k)?;
    let smooth = (config.alpha > 0.0)
        .then(|| Smoothing::new(&p, config.alpha))
        .transpose()?;
    let mut members: Vec<Member<'_>> = graphs
        .iter()
        .map(|graph| Member::new(graph, &p, config))
        .collect::<Result<_>>()?;
    let mut center = Mat::<f64>::zeros(k, k);
    for _ in 0..config.outer {
        let mut sum = Mat::<f64>::zeros(k, k);
        for member in &members {
            let half = &member.plan * member.graph.adjacency();
            sum += &half * member.plan.transpose();
        }
        let sum = faer::Scale(1.0 / graphs.len() as f64) * sum;
        center = match &smooth {
            Some(smooth) => smooth.apply(&sum),
            None => Mat::from_fn(k, k, |i, j| sum[(i, j)] / (p[i] * p[j])),
        };
        for member in &mut members {
            member.update(&center, &p, config)?;
        }
    }
    StepFunction::checked(Mat::from_fn(k, k, |i, j| center[(i, j)].clamp(0.0, 1.0)))
}

impl<'a> Member<'a> {
    fn new(graph: &'a Aligned, p: &[f64], config: &BarycenterConfig) -> Result<Self> {
        let q = graph.shares();
        let squares = Mat::from_fn(p.len(), q.len(), |i, j| (p[i] - q[j]) * (p[i] - q[j]));
        let degrees = scaled(squares);
        let start = proximal(&degrees, p, q, None, config)?;
        Ok(Self {
            plan: start.clone(),
            graph,
            degrees,
            start,
        })
    }

    /// A proximal step at the cost of the current plan, from the first plan.
    fn update(&mut self, center: &Mat<f64>, p: &[f64], config: &BarycenterConfig) -> Result<()> {
        let (g, q) = (self.graph.adjacency(), self.graph.shares());
        let cross = &(center * &self.plan) * g.transpose();
        let rows = squared_times(center, p);
        let columns = squared_times(g, q);
        let structure = Mat::from_fn(p.len(), q.len(), |i, j| {
            rows[i] + columns[j] - 2.0 * cross[(i, j)]
        });
        let gamma = config.gamma;
        let cost = Mat::from_fn(p.len(), q.len(), |i, j| {
            gamma * structure[(i, j)] + (1.0 - gamma) * self.degrees[(i, j)]
        });
        self.plan = proximal(&scaled(cost), p, q, Some(&self.start), config)?;
        Ok(())
    }
}

/// `A^2 w`, the square by entries.
fn squared_times(a: &Mat<f64>, w: &[f64]) -> Vec<f64> {
    let row = |i: usize| {
        let terms = a.row(i).iter().zip(w).map(|(a, w)| a * a * w);
        terms.sum::<f64>()
    };
    (0..a.nrows()).map(row).collect()
}

/// Over its largest entry, where that is positive.
fn scaled(cost: Mat<f64>) -> Mat<f64> {
    let entries = cost.col_iter().flat_map(|c| c.iter().copied());
    let max = entries.fold(f64::NEG_INFINITY, f64::max);
    if max > 0.0 {
        faer::Scale(1.0 / max) * cost
    } else {
        cost
    }
}

/// Added to a plan that is a prior.
const PRIOR_FLOOR: f64 = 1e-16;

fn proximal(
    cost: &Mat<f64>,
    p: &[f64],
    q: &[f64],
    prior: Option<&Mat<f64>>,
    config: &BarycenterConfig,
) -> Result<Mat<f64>> {
    let how = ProximalConfig {
        beta: config.beta,
        max_iter: config.inner,
        ..ProximalConfig::default()
    };
    let vector = |v: &[f64]| Tensor::from_slice(v, v.len(), &Device::Cpu);
    let prior = prior.map(|t| {
        to_tensor(&Mat::from_fn(t.nrows(), t.ncols(), |i, j| {
            t[(i, j)] + PRIOR_FLOOR
        }))
    });
    let prior = prior.transpose()?;
    let (p, q) = (vector(p)?, vector(q)?);
    to_matrix(&proximal_transport(
        &to_tensor(cost)?,
        &p,
        &q,
        prior.as_ref(),
        &how,
    )?)
}

pub(crate) fn to_tensor(m: &Mat<f64>) -> Result<Tensor> {
    let (rows, columns) = (m.nrows(), m.ncols());
    let values: Vec<f64> = (0..rows * columns)
        .map(|p| m[(p / columns, p % columns)])
        .collect();
    Ok(Tensor::from_vec(values, (rows, columns), &Device::Cpu)?)
}

pub(crate) fn to_matrix(t: &Tensor) -> Result<Mat<f64>> {
    let (rows, columns) = t.dims2()?;
    let values = t.to_vec2::<f64>()?;
    Ok(Mat::from_fn(rows, columns, |i, j| values[i][j]))
}

/// `argmin_B` of the barycenter's quadratic plus `alpha` times the squared second differences, in the
/// published splitting `B = L A L' + P A P'`.
struct Smoothing {
    left: Mat<f64>,
    weights: Vec<f64>,
}

impl Smoothing {
    fn new(p: &[f64], alpha: f64) -> Result<Self> {
        let k = p.len();
        let mut difference = Mat::<f64>::zeros(k - 2, k);
        for i in 0..k - 2 {
            difference[(i, i)] = 1.0;
            difference[(i, i + 1)] = -2.0;
            difference[(i, i + 2)] = 1.0;
        }
        let square = faer::Scale(alpha) * (difference.transpose() * &difference);
        let failed = |e| Error::argument("second differences", format!("{e:?}"), "eigenvalues");
        let found = square
            .self_adjoint_eigen(faer::Side::Lower)
            .map_err(failed)?;
        // Singular values come in descending order, and that order meets the weights.
        let mut order: Vec<usize> = (0..k).collect();
        let s = found.S().column_vector();
        order.sort_by(|a, b| s[*b].total_cmp(&s[*a]));
        let s: Vec<f64> = order.iter().map(|i| s[*i].max(0.0)).collect();
        let u = Mat::from_fn(k, k, |i, j| found.U()[(i, order[j])]);
        let share = |i: usize| s[i] * s[i] + p[i] * p[i];
        let scaled = Mat::from_fn(k, k, |i, j| u[(i, j)] * s[j] / share(j));
        Ok(Self {
            left: &scaled * u.transpose(),
            weights: (0..k).map(|i| p[i] / share(i)).collect(),
        })
    }

    fn apply(&self, a: &Mat<f64>) -> Mat<f64> {
        let half = &self.left * a;
        let smooth = &half * self.left.transpose();
        let w = &self.weights;
        Mat::from_fn(a.nrows(), a.ncols(), |i, j| {
            smooth[(i, j)] + w[i] * a[(i, j)] * w[j]
        })
    }
}

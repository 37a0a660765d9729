//! Gromov-Wasserstein distances; the page is [`GwProblem`]'s.

mod conditional;
mod entropic;
mod loss;
mod proximal;

pub use conditional::{gromov_wasserstein, GwConfig};
pub use entropic::{entropic_gromov_wasserstein, EntropicGwConfig};
pub use loss::GwLoss;
pub use proximal::{proximal_transport, ProximalConfig};

use super::balanced;
use crate::linalg::{dot, from_rows, matrix, product, values};
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use faer::{Mat, MatRef};

/// How two entries of the structure matrices are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GroundLoss {
    /// `(a - b)^2`
    Square,
    /// `(a - b)^2 / 2`
    HalfSquare,
    /// `a ln(a / b) - a + b`, for entries of at least 0; `1e-15` is added inside the logarithms. Not
    /// symmetric in its arguments.
    Kl,
}

/// Inside the logarithms of [`GroundLoss::Kl`].
const TINY: f64 = 1e-15;

impl GroundLoss {
    fn f1(self, a: f64) -> f64 {
        match self {
            Self::Square => a * a,
            Self::HalfSquare => 0.5 * a * a,
            Self::Kl => a * (a + TINY).ln() - a,
        }
    }

    fn f1_slope(self, a: f64) -> f64 {
        match self {
            Self::Square => 2.0 * a,
            Self::HalfSquare => a,
            Self::Kl => (a + TINY).ln() + a / (a + TINY) - 1.0,
        }
    }

    fn f2(self, b: f64) -> f64 {
        match self {
            Self::Square => b * b,
            Self::HalfSquare => 0.5 * b * b,
            Self::Kl => b,
        }
    }

    fn f2_slope(self, b: f64) -> f64 {
        match self {
            Self::Square => 2.0 * b,
            Self::HalfSquare => b,
            Self::Kl => 1.0,
        }
    }

    /// `h1` is the identity for all of them.
    fn h2(self, b: f64) -> f64 {
        match self {
            Self::Square => 2.0 * b,
            Self::HalfSquare => b,
            Self::Kl => (b + TINY).ln(),
        }
    }

    fn h2_slope(self, b: f64) -> f64 {
        match self {
            Self::Square => 2.0,
            Self::HalfSquare => 1.0,
            Self::Kl => 1.0 / (b + TINY),
        }
    }
}

/// Two weighted sets, each with a matrix that says how its members are related (the adjacency matrices of
/// two graphs, say): optimal transport between sets that are known only by their own structure.
///
/// *Gromov-Wasserstein Averaging of Kernel and Distance Matrices*, Peyré, Cuturi, Solomon, ICML 2016;
/// *Optimal Transport for structured data*, Vayer, Chapel, Flamary, Tavenard, Courty, ICML 2019 (fused
/// form, conditional gradients); *Gromov-Wasserstein Learning for Graph Matching and Node Embedding*,
/// Xu, Luo, Zha, Carin, ICML 2019 (proximal form).
///
/// ```text
/// min (1 - w) <M, T> + w sum_{ijkl} loss(C1_ik, C2_jl) T_ij T_kl   over   T >= 0, T 1 = p, T' 1 = q
/// loss(a, b) = f1(a) + f2(b) - h1(a) h2(b)
/// L o T      = (f1(C1) p) 1' + 1 (f2(C2) q)' - h1(C1) T h2(C2)'
/// ```
///
/// The problem is not convex: [`gromov_wasserstein`] ends at a stationary point, the one that its start
/// leads to, and [`GwSolution::gap`] is the certificate of that. Each step solves an exact transport
/// problem from the last one's basis and searches the line exactly.
///
/// | symbol | field |
/// | --- | --- |
/// | `C1`, `C2`, `p`, `q`, `loss` | [`GwProblem::new`] |
/// | `M`, `w` | [`GwProblem::fused`] |
/// | `T` | [`GwSolution::plan`] |
///
/// ```
/// use candle_core::{Device, Tensor};
/// use thalweg_convex::transport::{gromov_wasserstein, GroundLoss, GwConfig, GwProblem};
///
/// // A path of three nodes, and the same with its middle named first.
/// let path = Tensor::new(&[[0.0f64, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]], &Device::Cpu)?;
/// let star = Tensor::new(&[[0.0f64, 1.0, 1.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]], &Device::Cpu)?;
/// let problem = GwProblem::uniform(&path, &star, GroundLoss::Square)?;
/// let found = gromov_wasserstein(&problem, &GwConfig::default(), None)?;
/// assert!(found.value < 1e-9);
/// # Ok::<(), thalweg_convex::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct GwProblem {
    c1: Mat<f64>,
    c2: Mat<f64>,
    /// `h2(C2)`
    h2: Mat<f64>,
    p: Vec<f64>,
    q: Vec<f64>,
    loss: GroundLoss,
    symmetric: bool,
    /// Costs between members `[m, n]`, and the weight of the structure beside them.
    features: Option<(Mat<f64>, f64)>,
}

/// The derivatives of the value by the structure matrices, the plan held fixed: by the envelope theorem
/// those of the optimal value.
#[derive(Debug, Clone)]
pub struct GwGradients {
    /// By `C1`: `[m, m]`, `f64` on the CPU.
    pub c1: Tensor,
    /// By `C2`: `[n, n]`.
    pub c2: Tensor,
    /// By the costs between members `[m, n]`, where the problem is fused.
    pub features: Option<Tensor>,
}

/// A stationary plan.
#[derive(Debug, Clone)]
pub struct GwSolution {
    /// The plan `[m, n]`, `f64` on the CPU.
    pub plan: Tensor,
    /// The objective at the plan; its root is the distance for [`GroundLoss::Square`].
    pub value: f64,
    /// Potential of each row at the linear problem of the plan, centered: the derivative of the value
    /// by `p` (a change that keeps the mass).
    pub alpha: Vec<f64>,
    /// Potential of each column, likewise by `q`.
    pub beta: Vec<f64>,
    /// By how much the linear model at the plan could decrease: 0 at a stationary point, and for the
    /// entropic form what the entropy costs.
    pub gap: f64,
    /// `|T 1 - p|_1 + |T' 1 - q|_1`
    pub marginal_error: f64,
    /// Whether the solver's own tolerance was met.
    pub converged: bool,
    /// Iterations done.
    pub iterations: usize,
    /// The objective before each iteration, and after the last.
    pub history: Vec<f64>,
}

impl GwProblem {
    /// Structure matrices `c1` `[m, m]` and `c2` `[n, n]`, weights `p` `[m]` and `q` `[n]` of at least
    /// 0 with the same sum, of any floating-point dtype on any device; they are copied to the CPU in
    /// `f64`.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::NonFinite`], [`Error::InvalidConfig`] for a negative weight, no mass,
    /// or a negative entry under [`GroundLoss::Kl`], [`Error::UnequalMass`].
    pub fn new(c1: &Tensor, c2: &Tensor, p: &Tensor, q: &Tensor, loss: GroundLoss) -> Result<Self> {
        let p = values("GwProblem::p", p)?;
        let q = values("GwProblem::q", q)?;
        let q = balanced(["GwProblem::p", "GwProblem::q"], &p, &q)?;
        let c1 = structure("GwProblem::c1", c1, p.len(), loss)?;
        let c2 = structure("GwProblem::c2", c2, q.len(), loss)?;
        let symmetric = is_symmetric(c1.as_ref()) && is_symmetric(c2.as_ref());
        Ok(Self {
            h2: map(&c2, |b| loss.h2(b)),
            c1,
            c2,
            p,
            q,
            loss,
            symmetric,
            features: None,
        })
    }

    /// Equal weights that sum to one on each side.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn uniform(c1: &Tensor, c2: &Tensor, loss: GroundLoss) -> Result<Self> {
        let equal = |c: &Tensor| -> Result<Tensor> {
            let n = c.dims().first().copied().unwrap_or(0);
            Ok(Tensor::from_vec(vec![1.0 / n as f64; n], n, &Device::Cpu)?)
        };
        Self::new(c1, c2, &equal(c1)?, &equal(c2)?, loss)
    }

    /// Adds costs between members `[m, n]`: `weight` is the share of the structure, `1 - weight` that
    /// of the costs.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::NonFinite`], and [`Error::InvalidConfig`] unless the weight lies in
    /// `[0, 1]`.
    pub fn fused(mut self, features: &Tensor, weight: f64) -> Result<Self> {
        if !(0.0..=1.0).contains(&weight) {
            return Err(Error::config(
                "GwProblem::fused weight",
                weight,
                "a number in [0, 1]",
            ));
        }
        let costs = self.plan_shaped("GwProblem::features", features)?;
        self.features = Some((costs, weight));
        Ok(self)
    }

    /// Weights of the rows.
    pub fn p(&self) -> &[f64] {
        &self.p
    }

    /// Weights of the columns.
    pub fn q(&self) -> &[f64] {
        &self.q
    }

    /// The objective at a plan `[m, n]` and the tensor product `L o T` `[m, n]` (`f64` on the CPU),
    /// whose inner product with the plan is the structure's part of the objective. The marginals of the
    /// plan are taken to be right.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::NonFinite`].
    pub fn objective(&self, plan: &Tensor) -> Result<(f64, Tensor)> {
        let plan = self.plan_shaped("the plan", plan)?;
        let cross = self.cross(plan.as_ref());
        let costs = self.marginal_costs();
        let tensor = Mat::from_fn(self.p.len(), self.q.len(), |i, j| {
            costs.0[i] + costs.1[j] - cross[(i, j)]
        });
        Ok((
            self.value(plan.as_ref(), cross.as_ref(), &costs),
            tensor_of(tensor.as_ref())?,
        ))
    }

    /// The derivatives at a plan.
    ///
    /// # Errors
    /// As [`objective`](Self::objective).
    pub fn gradients(&self, plan: &Tensor) -> Result<GwGradients> {
        let plan = self.plan_shaped("the plan", plan)?;
        let (m, n) = (self.p.len(), self.q.len());
        let weight = self.weight();
        let rows: Vec<f64> = (0..m).map(|i| plan.row(i).iter().sum()).collect();
        let columns: Vec<f64> = (0..n).map(|j| plan.col(j).iter().sum()).collect();
        // T h2(C2) T' and T' C1 T.
        let mut half = Mat::zeros(m, n);
        product(half.as_mut(), plan.as_ref(), self.h2.as_ref());
        let mut c1 = Mat::zeros(m, m);
        product(c1.as_mut(), half.as_ref(), plan.transpose());
        let mut half = Mat::zeros(n, m);
        product(half.as_mut(), plan.transpose(), self.c1.as_ref());
        let mut c2 = Mat::zeros(n, n);
        product(c2.as_mut(), half.as_ref(), plan.as_ref());
        let c1 = Mat::from_fn(m, m, |i, k| {
            weight * (self.loss.f1_slope(self.c1[(i, k)]) * rows[i] * self.p[k] - c1[(i, k)])
        });
        let c2 = Mat::from_fn(n, n, |j, l| {
            let b = self.c2[(j, l)];
            let outer = self.loss.f2_slope(b) * columns[j] * self.q[l];
            weight * (outer - self.loss.h2_slope(b) * c2[(j, l)])
        });
        let features = match &self.features {
            None => None,
            Some((_, weight)) => {
                let share = map(&plan, |t| (1.0 - weight) * t);
                Some(tensor_of(share.as_ref())?)
            }
        };
        Ok(GwGradients {
            c1: tensor_of(c1.as_ref())?,
            c2: tensor_of(c2.as_ref())?,
            features,
        })
    }

    fn plan_shaped(&self, what: &'static str, x: &Tensor) -> Result<Mat<f64>> {
        let (m, n) = (self.p.len(), self.q.len());
        let (rows, columns, values) = matrix(what, x)?;
        if (rows, columns) != (m, n) {
            return Err(Error::shape(what, x.dims(), format!("[{m}, {n}]")));
        }
        Ok(from_rows(rows, columns, &values))
    }

    /// The share of the structure.
    fn weight(&self) -> f64 {
        self.features.as_ref().map_or(1.0, |(_, weight)| *weight)
    }

    /// `p q' / mass`, where no plan is given.
    fn start(&self, given: Option<&Tensor>) -> Result<Mat<f64>> {
        let Some(given) = given else {
            let mass: f64 = self.p.iter().sum();
            return Ok(Mat::from_fn(self.p.len(), self.q.len(), |i, j| {
                self.p[i] * self.q[j] / mass
            }));
        };
        let plan = self.plan_shaped("the first plan", given)?;
        let bad = plan
            .col_iter()
            .flat_map(|c| c.iter().copied())
            .find(|t| *t < 0.0);
        if let Some(bad) = bad {
            return Err(Error::config(
                "the first plan",
                bad,
                "entries of at least 0",
            ));
        }
        let (missed, mass) = (self.missed(plan.as_ref()), self.p.iter().sum::<f64>());
        if missed > 1e-6 * mass {
            let expected = "a plan with the problem's marginals";
            return Err(Error::config(
                "marginal error of the first plan",
                missed,
                expected,
            ));
        }
        Ok(plan)
    }

    /// `f1(C1) p` and `f2(C2) q`.
    fn marginal_costs(&self) -> (Vec<f64>, Vec<f64>) {
        let of = |c: &Mat<f64>, w: &[f64], f: &dyn Fn(f64) -> f64| -> Vec<f64> {
            (0..c.nrows())
                .map(|i| (0..c.ncols()).map(|k| f(c[(i, k)]) * w[k]).sum())
                .collect()
        };
        (
            of(&self.c1, &self.p, &|a| self.loss.f1(a)),
            of(&self.c2, &self.q, &|b| self.loss.f2(b)),
        )
    }

    /// The same for transposed structures.
    fn transposed_marginal_costs(&self) -> (Vec<f64>, Vec<f64>) {
        let of = |c: &Mat<f64>, w: &[f64], f: &dyn Fn(f64) -> f64| -> Vec<f64> {
            (0..c.ncols())
                .map(|k| (0..c.nrows()).map(|i| f(c[(i, k)]) * w[i]).sum())
                .collect()
        };
        (
            of(&self.c1, &self.p, &|a| self.loss.f1(a)),
            of(&self.c2, &self.q, &|b| self.loss.f2(b)),
        )
    }

    /// `h1(C1) T h2(C2)'`
    fn cross(&self, plan: MatRef<'_, f64>) -> Mat<f64> {
        let mut half = Mat::zeros(plan.nrows(), plan.ncols());
        product(half.as_mut(), self.c1.as_ref(), plan);
        let mut out = Mat::zeros(plan.nrows(), plan.ncols());
        product(out.as_mut(), half.as_ref(), self.h2.transpose());
        out
    }

    /// `h1(C1)' T h2(C2)`
    fn transposed_cross(&self, plan: MatRef<'_, f64>) -> Mat<f64> {
        let mut half = Mat::zeros(plan.nrows(), plan.ncols());
        product(half.as_mut(), self.c1.transpose(), plan);
        let mut out = Mat::zeros(plan.nrows(), plan.ncols());
        product(out.as_mut(), half.as_ref(), self.h2.as_ref());
        out
    }

    fn value(
        &self,
        plan: MatRef<'_, f64>,
        cross: MatRef<'_, f64>,
        costs: &(Vec<f64>, Vec<f64>),
    ) -> f64 {
        let weight = self.weight();
        let mut sum = 0.0;
        for j in 0..plan.ncols() {
            for i in 0..plan.nrows() {
                let structure = costs.0[i] + costs.1[j] - cross[(i, j)];
                let member = self.features.as_ref().map_or(0.0, |(m, _)| m[(i, j)]);
                sum += plan[(i, j)] * (weight * structure + (1.0 - weight) * member);
            }
        }
        sum
    }

    /// `|T 1 - p|_1 + |T' 1 - q|_1`
    fn missed(&self, plan: MatRef<'_, f64>) -> f64 {
        let rows = self.p.iter().enumerate();
        let columns = self.q.iter().enumerate();
        rows.map(|(i, p)| (plan.row(i).iter().sum::<f64>() - p).abs())
            .sum::<f64>()
            + columns
                .map(|(j, q)| (plan.col(j).iter().sum::<f64>() - q).abs())
                .sum::<f64>()
    }
}

fn structure(what: &'static str, c: &Tensor, weights: usize, loss: GroundLoss) -> Result<Mat<f64>> {
    let (rows, columns, values) = matrix(what, c)?;
    if rows != columns || rows != weights {
        let expected = format!("[{weights}, {weights}]");
        return Err(Error::shape(what, c.dims(), expected));
    }
    if loss == GroundLoss::Kl {
        if let Some(bad) = values.iter().find(|x| **x < 0.0) {
            return Err(Error::config(what, bad, "entries of at least 0 under Kl"));
        }
    }
    Ok(from_rows(rows, columns, &values))
}

fn is_symmetric(c: MatRef<'_, f64>) -> bool {
    let scale = c.norm_max().max(f64::MIN_POSITIVE);
    (0..c.nrows()).all(|i| (0..i).all(|k| (c[(i, k)] - c[(k, i)]).abs() <= 1e-12 * scale))
}

fn map(x: &Mat<f64>, f: impl Fn(f64) -> f64) -> Mat<f64> {
    Mat::from_fn(x.nrows(), x.ncols(), |i, j| f(x[(i, j)]))
}

fn tensor_of(x: MatRef<'_, f64>) -> Result<Tensor> {
    let rows = (0..x.nrows()).flat_map(|i| x.row(i).iter().copied());
    let values: Vec<f64> = rows.collect();
    Ok(Tensor::from_vec(
        values,
        (x.nrows(), x.ncols()),
        &Device::Cpu,
    )?)
}

/// `sum a_ij b_ij`
fn inner(a: MatRef<'_, f64>, b: MatRef<'_, f64>) -> f64 {
    let mut sum = 0.0;
    for (a, b) in a.col_iter().zip(b.col_iter()) {
        sum += match (a.try_as_col_major(), b.try_as_col_major()) {
            (Some(a), Some(b)) => dot(a.as_slice(), b.as_slice()),
            _ => a.iter().zip(b.iter()).map(|(a, b)| a * b).sum(),
        };
    }
    sum
}

/// Without the mean of its finite entries.
fn centered(mut potential: Vec<f64>) -> Vec<f64> {
    let finite = || potential.iter().filter(|x| x.is_finite());
    let mean = finite().sum::<f64>() / finite().count().max(1) as f64;
    potential.iter_mut().for_each(|x| *x -= mean);
    potential
}

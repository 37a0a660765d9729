//! Hyper-gradients by solving one linear system.

use super::problem::{axpy, finite, norm, BatchRequest, BilevelProblem, Oracle, UpperGrads};
use crate::error::check;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use faer::linalg::solvers::Solve;
use faer::Mat;
use tensor_core::solve::{conjugate_gradient, CgConfig};

/// How `(d2_yy g) z = grad_y f` is solved.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum LinearSolve {
    /// `z = nu sum_{k < terms} (I - nu H)^k b`: `terms - 1` products; needs `nu <= 1 / L_g`. A start
    /// is not used.
    Neumann {
        /// Terms of the sum.
        terms: usize,
        /// The step `nu`.
        lr: f64,
    },
    /// Conjugate gradient on `H + damping I`.
    ConjugateGradient {
        /// Iterations, at most.
        iters: usize,
        /// Stop at this residual relative to `|b|`.
        tol: f64,
        /// Added to the Hessian.
        damping: f64,
    },
    /// `z <- z - nu (H z - b)`, `iters` times.
    FixedPoint {
        /// Iterations.
        iters: usize,
        /// The step `nu`.
        lr: f64,
    },
    /// The Hessian column by column and a dense factorization: for tests, up to a few hundred
    /// entries.
    Exact,
}

/// Entries of `y` up to which [`LinearSolve::Exact`] is allowed.
const DENSE: usize = 1000;

/// A hyper-gradient with the solution it was made from.
#[derive(Debug, Clone)]
pub struct HyperGradient {
    /// `grad_x f - (d2_xy g) z`.
    pub grad_x: Tensor,
    /// `z`.
    pub z: Tensor,
    /// `|H z - b|`, by one product more.
    pub residual_norm: f64,
    /// Hessian-vector products that the solution took.
    pub hvps: usize,
    /// The upper loss, where the problem gives it.
    pub value: Option<f64>,
}

impl LinearSolve {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] that names the first bad one.
    pub fn validate(&self) -> Result<()> {
        match *self {
            Self::Neumann { terms, lr } => {
                check::at_least_one("Neumann::terms", terms)?;
                check::positive("Neumann::lr", lr)
            }
            Self::ConjugateGradient {
                iters,
                tol,
                damping,
            } => {
                check::at_least_one("ConjugateGradient::iters", iters)?;
                check::non_negative("ConjugateGradient::tol", tol)?;
                check::non_negative("ConjugateGradient::damping", damping)
            }
            Self::FixedPoint { iters, lr } => {
                check::at_least_one("FixedPoint::iters", iters)?;
                check::positive("FixedPoint::lr", lr)
            }
            Self::Exact => Ok(()),
        }
    }

    /// Solves `H z = b` for `hvp` as `v -> H v`, from `warm` or zero; gives `z` and the number of
    /// products.
    ///
    /// # Errors
    /// Those of [`validate`](Self::validate) and of `hvp`;
    /// [`tensor_core::Error::NegativeCurvature`] where conjugate gradient meets an indefinite
    /// Hessian; [`Error::NonFiniteGradient`] for a solution that has diverged.
    pub fn solve(
        &self,
        mut hvp: impl FnMut(&Tensor) -> Result<Tensor>,
        b: &Tensor,
        warm: Option<&Tensor>,
    ) -> Result<(Tensor, usize)> {
        self.validate()?;
        let mut count = 0;
        let mut product = |v: &Tensor| {
            count += 1;
            hvp(v)
        };
        let z = match *self {
            Self::Neumann { terms, lr } => {
                let (mut power, mut sum) = (b.clone(), b.clone());
                for _ in 1..terms {
                    power = axpy(&power, -lr, &product(&power)?)?;
                    sum = (sum + &power)?;
                }
                (sum * lr)?
            }
            Self::FixedPoint { iters, lr } => {
                let mut z = start(b, warm)?;
                for _ in 0..iters {
                    z = axpy(&z, -lr, &(product(&z)? - b)?)?;
                }
                z
            }
            Self::ConjugateGradient {
                iters,
                tol,
                damping,
            } => {
                let config = CgConfig {
                    tolerance: tol,
                    max_iterations: iters,
                };
                let apply = |v: &Tensor| {
                    let hv = product(v).map_err(candle_core::Error::from)?;
                    Ok((hv + (v * damping)?)?)
                };
                conjugate_gradient(apply, b, warm, &config)?.x
            }
            Self::Exact => dense(&mut product, b)?,
        };
        let z = z.detach();
        finite("the solution z of the linear system", &z)?;
        Ok((z, count))
    }
}

fn start(b: &Tensor, warm: Option<&Tensor>) -> Result<Tensor> {
    match warm {
        None => Ok(b.zeros_like()?),
        Some(z) if z.dims() == b.dims() => Ok(z.detach()),
        Some(z) => Err(Error::shape("start", z.dims(), format!("{:?}", b.dims()))),
    }
}

fn dense(product: &mut impl FnMut(&Tensor) -> Result<Tensor>, b: &Tensor) -> Result<Tensor> {
    let n = b.elem_count();
    if n > DENSE {
        let expected = format!("at most {DENSE} entries of y for LinearSolve::Exact");
        return Err(Error::argument("entries", n, expected));
    }
    let host = |x: &Tensor| -> Result<Vec<f64>> {
        let flat = x.flatten_all()?.to_dtype(DType::F64)?;
        Ok(flat.to_device(&Device::Cpu)?.to_vec1()?)
    };
    let mut columns = Vec::with_capacity(n);
    for j in 0..n {
        let mut unit = vec![0.0; n];
        unit[j] = 1.0;
        let unit = Tensor::from_vec(unit, b.shape(), &Device::Cpu)?;
        let unit = unit.to_dtype(b.dtype())?.to_device(b.device())?;
        columns.push(host(&product(&unit)?)?);
    }
    let matrix = Mat::from_fn(n, n, |i, j| columns[j][i]);
    let values = host(b)?;
    let rhs = Mat::from_fn(n, 1, |i, _| values[i]);
    let solution = matrix.partial_piv_lu().solve(&rhs);
    let z: Vec<f64> = (0..n).map(|i| solution[(i, 0)]).collect();
    let z = Tensor::from_vec(z, b.shape(), &Device::Cpu)?;
    Ok(z.to_dtype(b.dtype())?.to_device(b.device())?)
}

/// The hyper-gradient at `(x, y)`: exact for `y = y*(x)` and a converged solution. `warm` is a start
/// for `z`. Every product gets a batch of its own.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use thalweg_optim::bilevel::{hypergradient, LinearSolve, QuadraticProblem};
///
/// // y*(x) = x, judged by half its squared distance to 3.
/// let one = Tensor::new(&[[1f64]], &Device::Cpu)?;
/// let zero = Tensor::new(&[0f64], &Device::Cpu)?;
/// let mut problem = QuadraticProblem::new(&one, &one, &zero, &Tensor::new(&[3f64], &Device::Cpu)?)?;
/// let x = Tensor::new(&[1f64], &Device::Cpu)?;
/// let y = problem.minimizer(&x)?;
/// let found = hypergradient(&mut problem, &x, &y, &LinearSolve::Exact, None)?;
/// assert!((found.grad_x.to_vec1::<f64>()?[0] + 2.0).abs() < 1e-12);
/// # Ok::<(), thalweg_optim::Error>(())
/// ```
///
/// # Errors
/// Those of [`LinearSolve::solve`] and of the problem.
pub fn hypergradient<P: BilevelProblem>(
    problem: &mut P,
    x: &Tensor,
    y: &Tensor,
    solve: &LinearSolve,
    warm: Option<&Tensor>,
) -> Result<HyperGradient> {
    estimate(problem, (x, y), solve, warm, 0)
}

/// [`hypergradient`] at a method's step.
pub(super) fn estimate<P: BilevelProblem>(
    problem: &mut P,
    (x, y): (&Tensor, &Tensor),
    solve: &LinearSolve,
    warm: Option<&Tensor>,
    iteration: usize,
) -> Result<HyperGradient> {
    let request = |oracle, index| BatchRequest {
        oracle,
        iteration,
        index,
    };
    let batch = problem.batch(request(Oracle::Upper, 0))?;
    let upper = problem.upper_grads(x, y, &batch)?;
    finite("the upper loss in y", &upper.y)?;
    let mut index = 0;
    let mut hvp = |v: &Tensor| {
        let batch = problem.batch(request(Oracle::Hessian, index))?;
        index += 1;
        problem.lower_hvp(x, y, v, &batch)
    };
    let (z, hvps) = solve.solve(&mut hvp, &upper.y, warm)?;
    let residual_norm = norm(&(hvp(&z)? - &upper.y)?)?;
    let batch = problem.batch(request(Oracle::Cross, 0))?;
    let cross = problem.cross_vjp(x, y, &z, &batch)?;
    let value = upper.value;
    Ok(HyperGradient {
        grad_x: combine(upper, &cross)?,
        z,
        residual_norm,
        hvps,
        value,
    })
}

/// `grad_x f - cross`.
pub(super) fn combine(upper: UpperGrads, cross: &Tensor) -> Result<Tensor> {
    let direction = match upper.x {
        Some(direct) => (direct - cross)?,
        None => cross.neg()?,
    };
    Ok(direction.detach())
}

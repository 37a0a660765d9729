//! The largest eigenvalues of the Hessian, and what step size they allow.

use crate::error::check;
use crate::{Error, RandomStream, Result};
use candle_core::{DType, Device, Tensor, Var};
use tensor_core::autograd::hvp;
use tensor_core::solve::lanczos;

/// Settings of [`sharpness`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LanczosConfig {
    /// How many of the largest eigenvalues.
    pub k: usize,
    /// Hessian-vector products, at most.
    pub iters: usize,
    /// Stop when the residuals are at most this part of the largest magnitude of an eigenvalue.
    pub tol: f64,
}

impl Default for LanczosConfig {
    fn default() -> Self {
        Self {
            k: 3,
            iters: 40,
            tol: 1e-4,
        }
    }
}

/// The largest eigenvalues, in the algebraic order (a large negative one is not among them).
#[derive(Debug, Clone)]
pub struct TopEigen {
    /// Eigenvalues, descending.
    pub values: Vec<f64>,
    /// Their eigenvectors `[dim]`, of norm 1, with the entry of largest magnitude positive.
    pub vectors: Vec<Tensor>,
    /// Whether the tolerance was met.
    pub converged: bool,
}

/// The largest eigenvalues of a symmetric operator `hvp` on vectors `[dim]` in double precision, by
/// Lanczos iteration with full reorthogonalization.
///
/// # Errors
/// [`tensor_core::Error::InvalidArgument`] for settings that make no sense; those of `hvp`.
pub fn sharpness(
    mut hvp: impl FnMut(&Tensor) -> Result<Tensor>,
    dim: usize,
    config: LanczosConfig,
    rng: &mut RandomStream,
) -> Result<TopEigen> {
    let settings = tensor_core::solve::LanczosConfig {
        smallest: 0,
        largest: config.k,
        tolerance: config.tol,
        max_iterations: config.iters,
    };
    let like = Tensor::zeros(dim, DType::F64, &Device::Cpu)?;
    let apply = |v: &Tensor| Ok(hvp(v).map_err(candle_core::Error::from)?);
    let spectrum = lanczos(apply, &like, &settings, rng)?;
    let mut vectors = Vec::with_capacity(spectrum.largest.len());
    for pair in &spectrum.largest {
        let values = pair.vector.to_vec1::<f64>()?;
        let largest = values
            .iter()
            .copied()
            .reduce(|a, b| if b.abs() > a.abs() { b } else { a });
        let flip = largest.is_some_and(|x| x < 0.0);
        vectors.push(pair.vector.affine(if flip { -1.0 } else { 1.0 }, 0.0)?);
    }
    Ok(TopEigen {
        values: spectrum.largest.iter().map(|pair| pair.value).collect(),
        vectors,
        converged: spectrum.converged,
    })
}

/// [`sharpness`] of a scalar loss in its variables, by `tensor_core::autograd`: exact where candle
/// keeps the graph of gradients, otherwise central differences (good to about 1e-2 in `f32`;
/// kinks such as ReLU's add noise). Run it every 50 to 100 steps on a probe set: each of the
/// `iters` products costs about two backward passes.
///
/// [`TopEigen::split`] gives an eigenvector as one tensor for each variable.
///
/// # Errors
/// As [`sharpness`]; [`tensor_core::Error::LostGradient`] when a variable gets no gradient.
pub fn loss_sharpness(
    mut loss: impl FnMut() -> candle_core::Result<Tensor>,
    vars: &[Var],
    config: LanczosConfig,
    rng: &mut RandomStream,
) -> Result<TopEigen> {
    let dim = vars.iter().map(|var| var.elem_count()).sum();
    if dim == 0 {
        return Err(Error::argument("vars", dim, "at least one entry"));
    }
    let product = |v: &Tensor| {
        let parts = cut(v, vars)?;
        let hv = hvp(&mut loss, vars, &parts)?.value;
        let mut flat = Vec::with_capacity(hv.len());
        for part in &hv {
            let part = part.flatten_all()?.to_dtype(DType::F64)?;
            flat.push(part.to_device(&Device::Cpu)?);
        }
        Ok(Tensor::cat(&flat, 0)?)
    };
    sharpness(product, dim, config, rng)
}

/// A flat vector as tensors like the variables.
fn cut(v: &Tensor, vars: &[Var]) -> Result<Vec<Tensor>> {
    let (mut parts, mut from) = (Vec::with_capacity(vars.len()), 0);
    for var in vars {
        let part = v.narrow(0, from, var.elem_count())?.reshape(var.shape())?;
        parts.push(part.to_dtype(var.dtype())?.to_device(var.device())?);
        from += var.elem_count();
    }
    Ok(parts)
}

impl TopEigen {
    /// Eigenvector `i` as one tensor for each of the variables that it was computed for.
    ///
    /// # Errors
    /// [`Error::Shape`] when it has another length; [`Error::InvalidArgument`] when there is none.
    pub fn split(&self, i: usize, vars: &[Var]) -> Result<Vec<Tensor>> {
        let count = self.vectors.len();
        let vector = self
            .vectors
            .get(i)
            .ok_or_else(|| Error::argument("eigenvector", i, format!("below {count}")))?;
        let dim: usize = vars.iter().map(|var| var.elem_count()).sum();
        if vector.elem_count() != dim {
            let expected = format!("[{dim}]");
            return Err(Error::shape("eigenvector", vector.dims(), expected));
        }
        cut(vector, vars)
    }
}

/// The update rule whose stability is asked for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum StabilityRule {
    /// Gradient descent: stable below `2 / lr`.
    GradientDescent,
    /// Heavy ball with momentum `b`: below `2 (1 + b) / lr`.
    HeavyBall(f64),
    /// Adam with `beta1`: below `(2 + 2 beta1) / ((1 - beta1) lr)`, of the Hessian preconditioned
    /// with Adam's own scaling.
    Adam(f64),
}

/// The sharpness beside what the step size tolerates.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EdgeOfStability {
    /// The largest stable sharpness.
    pub threshold: f64,
    /// `sharpness / threshold`: about 1 at the edge of stability.
    pub ratio: f64,
}

impl EdgeOfStability {
    /// Compares a sharpness with the threshold of a rule at a learning rate.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] unless the rate is positive and the momentum in `[0, 1)`.
    pub fn check(sharpness: f64, lr: f64, rule: StabilityRule) -> Result<Self> {
        check::positive("lr", lr)?;
        let threshold = match rule {
            StabilityRule::GradientDescent => 2.0 / lr,
            StabilityRule::HeavyBall(b) => {
                check::rate("StabilityRule::HeavyBall", b)?;
                2.0 * (1.0 + b) / lr
            }
            StabilityRule::Adam(b) => {
                check::rate("StabilityRule::Adam", b)?;
                (2.0 + 2.0 * b) / ((1.0 - b) * lr)
            }
        };
        Ok(Self {
            threshold,
            ratio: sharpness / threshold,
        })
    }
}

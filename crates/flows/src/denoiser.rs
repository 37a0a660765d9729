//! The user's network behind one method.

use crate::condition::Condition;
use crate::error::{check, Error, Result};
use crate::level::{Level, Levels, MIN_ALPHA};
use crate::prediction::{Denoised, Prediction};
use crate::velocity::Velocity;
use candle_core::{DType, Tensor, Var};
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use tensor_core::kernels::{dot, sum_squares};
use tensor_core::random::RandomStream;

/// A network that sees the clean sample, or the noise, in a noisy one.
///
/// Levels come per batch or per row, so that the same implementation samples and trains.
pub trait Denoiser {
    /// What [`raw`](Self::raw) returns.
    fn prediction(&self) -> Prediction;

    /// The network's output for `x` `[rows, ...]`, in the shape of `x`. Where the network wants the
    /// time as a tensor, [`Levels::model_time`] makes it.
    ///
    /// # Errors
    /// Whatever the network's own are.
    fn raw(&self, x: &Tensor, levels: &Levels, condition: &Condition) -> Result<Tensor>;

    /// The output as a clean sample.
    ///
    /// # Errors
    /// Those of [`raw`](Self::raw) and of [`Denoised::from_raw`].
    fn denoise(&self, x: &Tensor, levels: &Levels, condition: &Condition) -> Result<Denoised> {
        let raw = self.raw(x, levels, condition)?;
        Denoised::from_raw(&raw, self.prediction(), x, levels)
    }
}

impl<D: Denoiser + ?Sized> Denoiser for &D {
    fn prediction(&self) -> Prediction {
        (**self).prediction()
    }

    fn raw(&self, x: &Tensor, levels: &Levels, condition: &Condition) -> Result<Tensor> {
        (**self).raw(x, levels, condition)
    }
}

/// A closure as a [`Denoiser`].
///
/// ```
/// use candle_core::{Device, Tensor};
/// use thalweg_flows::{Closure, Condition, Denoiser, Level, Prediction};
///
/// // For standard normal data and alpha^2 + sigma^2 = 1 the noise is seen as sigma * x.
/// let denoiser = Closure::new(Prediction::Eps, |x, levels, _| levels.scale(x, |l| l.sigma));
/// let level = Level::new(0.6, 0.8, 0.0)?;
/// let x = Tensor::new(&[[1.0_f64, -2.0]], &Device::Cpu)?;
/// let clean = denoiser.denoise(&x, &level.into(), &Condition::Null)?.x0.to_vec2::<f64>()?;
/// assert!((clean[0][0] - 0.6).abs() < 1e-12);
/// # Ok::<(), thalweg_flows::Error>(())
/// ```
pub struct Closure<F> {
    prediction: Prediction,
    function: F,
}

impl<F: Fn(&Tensor, &Levels, &Condition) -> Result<Tensor>> Closure<F> {
    /// A denoiser that calls `function(x, levels, condition)`.
    pub fn new(prediction: Prediction, function: F) -> Self {
        Self {
            prediction,
            function,
        }
    }
}

impl<F: Fn(&Tensor, &Levels, &Condition) -> Result<Tensor>> Denoiser for Closure<F> {
    fn prediction(&self) -> Prediction {
        self.prediction
    }

    fn raw(&self, x: &Tensor, levels: &Levels, condition: &Condition) -> Result<Tensor> {
        (self.function)(x, levels, condition)
    }
}

/// The preconditioning of *Elucidating the Design Space of Diffusion-Based Generative Models*
/// (Karras et al., arXiv 2206.00364, table 1) around a network `F(input, c_noise, condition)`:
///
/// ```text
/// D = c_skip x + c_out F(c_in x, c_noise)
/// c_skip = s^2 / (sigma^2 + s^2)    c_out = sigma s / sqrt(sigma^2 + s^2)
/// c_in   = 1 / sqrt(sigma^2 + s^2)  c_noise = ln(sigma) / 4        s = sigma_data
/// ```
///
/// At a level with `alpha != 1` it works on `x / alpha` with `sigma / alpha`.
pub struct EdmPrecond<F> {
    net: F,
    sigma_data: f64,
}

impl<F: Fn(&Tensor, &Tensor, &Condition) -> Result<Tensor>> EdmPrecond<F> {
    /// Wraps a network; `sigma_data` is the standard deviation of the data (0.5 in the paper).
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] unless `sigma_data` is positive.
    pub fn new(net: F, sigma_data: f64) -> Result<Self> {
        check::positive("EdmPrecond::sigma_data", sigma_data)?;
        Ok(Self { net, sigma_data })
    }

    /// The standard deviation of the data.
    pub fn sigma_data(&self) -> f64 {
        self.sigma_data
    }
}

impl<F: Fn(&Tensor, &Tensor, &Condition) -> Result<Tensor>> Denoiser for EdmPrecond<F> {
    fn prediction(&self) -> Prediction {
        Prediction::X0
    }

    fn raw(&self, x: &Tensor, levels: &Levels, condition: &Condition) -> Result<Tensor> {
        if !levels.all(|l| l.alpha >= MIN_ALPHA && l.sigma > 0.0) {
            return Err(Error::unsupported(
                "a preconditioned network at pure noise or without noise",
                "it needs a finite sigma / alpha > 0",
            ));
        }
        let data = self.sigma_data;
        let norm = |l: &Level| l.rho().hypot(data);
        let input = levels.scale(x, |l| 1.0 / (l.alpha * norm(l)))?;
        let times = levels.values(x.dims()[0], |l| 0.25 * l.rho().ln());
        let count = times.len();
        let times = Tensor::from_vec(times, count, x.device())?.to_dtype(x.dtype())?;
        let out = (self.net)(&input, &times, condition)?;
        check::same_shape("the network's output", &out, x)?;
        levels.combine(
            |l| (data / norm(l)).powi(2) / l.alpha,
            x,
            |l| l.rho() * data / norm(l),
            &out,
        )
    }
}

/// A [`Velocity`] as a denoiser. Every level is a point of a straight path: `x / (alpha + sigma)` at
/// time `alpha / (alpha + sigma)`, so any schedule can be sampled with a flow network.
pub struct FromVelocity<V>(pub V);

impl<V: Velocity> Denoiser for FromVelocity<V> {
    fn prediction(&self) -> Prediction {
        Prediction::X0
    }

    fn raw(&self, x: &Tensor, levels: &Levels, condition: &Condition) -> Result<Tensor> {
        let total = |l: &Level| l.alpha + l.sigma;
        let on_path = levels.scale(x, |l| 1.0 / total(l))?;
        let times = levels.values(x.dims()[0], |l| l.alpha / total(l));
        let count = times.len();
        let times = Tensor::from_vec(times, count, x.device())?.to_dtype(x.dtype())?;
        let velocity = self.0.velocity(&on_path, &times, condition)?;
        check::same_shape("the velocity", &velocity, x)?;
        levels.combine(|_| 1.0, &on_path, |l| l.sigma / total(l), &velocity)
    }
}

/// Compares the derivative of the clean sample along a random direction with central differences.
///
/// Several layers of candle-nn cut the graph and say nothing. Whoever differentiates through a
/// denoiser calls this once before; the rules of `thalweg-guidance` and the adjoints here check the first
/// gradient that they compute themselves ([`GradientCheck`]).
///
/// # Errors
/// [`Error::WrongGradient`] when the two differ by more than 5 %; those of the denoiser.
pub fn grad_check(
    denoiser: &dyn Denoiser,
    x: &Tensor,
    levels: &Levels,
    condition: &Condition,
    rng: &mut RandomStream,
) -> Result<()> {
    let f = |x: &Tensor| Ok(denoiser.denoise(x, levels, condition)?.x0);
    directional_check("the denoiser", f, x, rng)
}

/// [`grad_check`] for any function of a tensor.
///
/// # Errors
/// As [`grad_check`].
pub fn directional_check(
    what: &str,
    f: impl Fn(&Tensor) -> Result<Tensor>,
    x: &Tensor,
    rng: &mut RandomStream,
) -> Result<()> {
    let var = Var::from_tensor(x)?;
    let out = f(var.as_tensor())?;
    let weight = rng.normal(0.0, 1.0, out.shape(), out.dtype(), out.device())?;
    let gradient = match (&out * &weight)?.sum_all()?.backward()?.get(&var) {
        Some(gradient) => gradient.detach(),
        None => x.zeros_like()?,
    };
    let weighted = |x: &Tensor| Ok((f(x)? * &weight)?);
    gradient_check(what, weighted, x, &gradient, rng)?;
    Ok(())
}

/// The gradient check of every function, once each: what a rule that differentiates through somebody's
/// network holds, on by default. Clones share what has been checked.
///
/// A check costs two more evaluations (more where the function is rough), of the first gradient alone; it
/// draws its direction from a stream of its own and changes nothing in the run.
#[derive(Debug, Clone)]
pub struct GradientCheck(Option<Arc<Mutex<BTreeSet<&'static str>>>>);

impl Default for GradientCheck {
    fn default() -> Self {
        Self(Some(Arc::default()))
    }
}

impl GradientCheck {
    /// No check: for gradients that are not derivatives on purpose (straight-through estimators).
    pub fn off() -> Self {
        Self(None)
    }

    /// The same choice with nothing checked yet: for a run with functions of its own.
    #[must_use]
    pub fn fresh(&self) -> Self {
        match self.0 {
            Some(_) => Self::default(),
            None => Self::off(),
        }
    }

    /// Checks a gradient of `sum f` at `x` unless one of this name has been; the evaluations of `f`
    /// that it took.
    ///
    /// # Errors
    /// [`Error::WrongGradient`]; those of `f`.
    pub fn run(
        &self,
        what: &'static str,
        f: impl Fn(&Tensor) -> Result<Tensor>,
        x: &Tensor,
        gradient: &Tensor,
    ) -> Result<usize> {
        let Some(done) = &self.0 else {
            return Ok(0);
        };
        let seen = || done.lock().unwrap_or_else(PoisonError::into_inner);
        if seen().contains(what) || x.elem_count() == 0 {
            return Ok(0);
        }
        let evaluations = gradient_check(what, f, x, gradient, &mut RandomStream::new(0))?;
        if evaluations > 0 {
            seen().insert(what);
        }
        Ok(evaluations)
    }
}

/// Compares a gradient of `sum f` at `x` with central differences along a random direction; the
/// evaluations of `f` that it took. A gradient is refused when differences of two lengths agree with
/// each other and not with it.
///
/// # Errors
/// [`Error::WrongGradient`] when they differ by more than 5 %; those of `f`.
fn gradient_check(
    what: &str,
    f: impl Fn(&Tensor) -> Result<Tensor>,
    x: &Tensor,
    gradient: &Tensor,
    rng: &mut RandomStream,
) -> Result<usize> {
    const LENGTHS: [f64; 3] = [1.0, 0.3, 0.1];
    let direction = rng.normal(0.0, 1.0, x.shape(), x.dtype(), x.device())?;
    let analytic = dot(gradient, &direction)?;
    if !analytic.is_finite() {
        // Whoever uses the gradient says what is not finite.
        return Ok(0);
    }
    // The longest step relative to x, and the rounding errors of f.
    let (longest, rounding) = match x.dtype() {
        DType::F64 => (1e-5, 1e-9),
        DType::F32 => (3e-3, 1e-5),
        _ => (1e-1, 2e-2),
    };
    let size = sum_squares(x)?.sqrt().max(1.0) / sum_squares(&direction)?.sqrt().max(1e-12);
    let value = |h: f64| -> Result<(f64, f64)> {
        let out = f(&(x + direction.affine(h, 0.0)?)?)?.detach();
        let out = out.to_dtype(DType::F64)?;
        Ok((out.sum_all()?.to_scalar()?, sum_squares(&out)?.sqrt()))
    };
    let mut before: Option<f64> = None;
    for (k, length) in LENGTHS.iter().enumerate() {
        let h = length * longest * size;
        let ((plus, more), (minus, less)) = (value(h)?, value(-h)?);
        let numeric = (plus - minus) / (2.0 * h);
        // A difference of nearly equal sums has this much noise.
        let noise = rounding * (more + less + 1e-3) / h;
        let near =
            |other: f64| (other - numeric).abs() <= 0.05 * numeric.abs().max(other.abs()) + noise;
        if near(analytic) {
            return Ok(2 * (k + 1));
        }
        if before.is_some_and(near) {
            return Err(Error::WrongGradient {
                what: what.to_string(),
                analytic,
                numeric,
            });
        }
        before = Some(numeric);
    }
    tracing::warn!(what, "too rough for differences to judge its gradient");
    Ok(2 * LENGTHS.len())
}

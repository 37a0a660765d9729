//! The user's network behind one method.

use crate::condition::Condition;
use crate::error::{check, Error, Result};
use crate::level::{Level, Levels, MIN_ALPHA};
use crate::prediction::{Denoised, Prediction};
use crate::velocity::Velocity;
use candle_core::{Tensor, Var};
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
/// denoiser (classifier guidance, noise optimization, adjoints) calls this once before.
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
    let direction = rng.normal(0.0, 1.0, x.shape(), x.dtype(), x.device())?;
    let var = Var::from_tensor(x)?;
    let out = f(var.as_tensor())?;
    let weight = rng.normal(0.0, 1.0, out.shape(), out.dtype(), out.device())?;
    let scalar = |out: &Tensor| -> Result<f64> {
        let sum = (out * &weight)?.sum_all()?;
        Ok(sum.to_dtype(candle_core::DType::F64)?.to_scalar()?)
    };
    let analytic = match (&out * &weight)?.sum_all()?.backward()?.get(&var) {
        Some(gradient) => tensor_core::kernels::dot(gradient, &direction)?,
        None => 0.0,
    };
    let size = tensor_core::kernels::sum_squares(x)?.sqrt().max(1.0);
    let relative = if x.dtype() == candle_core::DType::F64 {
        1e-5
    } else {
        3e-3
    };
    let h = relative * size
        / tensor_core::kernels::sum_squares(&direction)?
            .sqrt()
            .max(1e-12);
    let plus = scalar(&f(&(x + (&direction * h)?)?)?.detach())?;
    let minus = scalar(&f(&(x - (&direction * h)?)?)?.detach())?;
    let numeric = (plus - minus) / (2.0 * h);
    // In single precision a difference of nearly equal sums has this much noise.
    let noise = match x.dtype() {
        candle_core::DType::F64 => 1e-9,
        _ => 1e-5,
    } * (plus.abs() + minus.abs() + 1e-3)
        / h;
    let allowed = 0.05 * numeric.abs().max(analytic.abs()) + noise;
    if (analytic - numeric).abs() <= allowed {
        return Ok(());
    }
    Err(Error::WrongGradient {
        what: what.to_string(),
        analytic,
        numeric,
    })
}

//! Distributions of the training time.
//!
//! | sampler | from `u` uniform on `[0, 1)` or `z` standard normal |
//! | --- | --- |
//! | [`Uniform`](TimeSampler::Uniform) | `t = u (1 - eps) + eps` |
//! | [`LogitNormal`](TimeSampler::LogitNormal) | `t = 1 / (1 + exp(-(mean + std z)))` |
//! | [`Mode`](TimeSampler::Mode) | `t = 1 - u - s (cos^2(pi u / 2) - 1 + u)` |
//! | [`CoshTails`](TimeSampler::CoshTails) | density proportional to `cosh(a (t - c))` |
//! | [`Discrete`](TimeSampler::Discrete) | `t = j (1 - eps) / k + eps`, `j` uniform in `0..k` |
//! | [`Fixed`](TimeSampler::Fixed) | one time |
//!
//! A sampler that is to make one step needs the velocity at `t = 0` exactly, where `LogitNormal` puts
//! nearly no mass: for reflow and distillation take `Uniform` or `CoshTails`.

use crate::error::{check, Error, Result};
use candle_core::{DType, Device, Tensor};
use tensor_core::random::RandomStream;

/// A distribution of times; see the [module](self) page.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum TimeSampler {
    /// Uniform on `[eps, 1)`.
    Uniform {
        /// The earliest time; 1e-3 in the paper's code.
        eps: f64,
    },
    /// The logistic function of a normal number.
    LogitNormal {
        /// Its mean.
        mean: f64,
        /// Its standard deviation.
        std: f64,
    },
    /// Heavy tails with a mode, for `-1 <= scale <= 2 / (pi - 2)`; 1.29 is usual.
    Mode {
        /// Negative pushes to the ends, positive to the middle.
        scale: f64,
    },
    /// Density proportional to `cosh(a (t - center))`. With `a = 4` and the center 0.5 both ends are
    /// trained most, the choice for reflow of *Improving the Training of Rectified Flows* (arXiv
    /// 2405.20320); with the center 0, the end only.
    CoshTails {
        /// Steepness.
        a: f64,
        /// The least likely time.
        center: f64,
    },
    /// The times of a sampler with `k` steps.
    Discrete {
        /// Number of steps.
        k: usize,
        /// The earliest time.
        eps: f64,
    },
    /// One time.
    Fixed(f64),
}

impl Default for TimeSampler {
    fn default() -> Self {
        Self::Uniform { eps: 1e-3 }
    }
}

impl TimeSampler {
    /// Checks the parameters.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`].
    pub fn validate(&self) -> Result<()> {
        let unit = |field: &'static str, x: f64| {
            check::require((0.0..1.0).contains(&x), field, x, "a number in [0, 1)")
        };
        match *self {
            Self::Uniform { eps } => unit("TimeSampler::Uniform eps", eps),
            Self::LogitNormal { mean, std } => {
                check::finite("TimeSampler::LogitNormal mean", mean)?;
                check::positive("TimeSampler::LogitNormal std", std)
            }
            Self::Mode { scale } => {
                let top = 2.0 / (std::f64::consts::PI - 2.0);
                let holds = (-1.0..=top).contains(&scale);
                let expected = "a number in [-1, 2 / (pi - 2)], where t is monotone in u";
                check::require(holds, "TimeSampler::Mode scale", scale, expected)
            }
            Self::CoshTails { a, center } => {
                check::positive("TimeSampler::CoshTails a", a)?;
                let holds = (0.0..=1.0).contains(&center);
                let field = "TimeSampler::CoshTails center";
                check::require(holds, field, center, "a number in [0, 1]")
            }
            Self::Discrete { k, eps } => {
                check::at_least_one("TimeSampler::Discrete k", k)?;
                unit("TimeSampler::Discrete eps", eps)
            }
            Self::Fixed(t) => {
                let holds = (0.0..=1.0).contains(&t);
                check::require(holds, "TimeSampler::Fixed", t, "a number in [0, 1]")
            }
        }
    }

    /// The time of a uniform number in `[0, 1)`.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`]; [`Error::Unsupported`] for [`LogitNormal`](Self::LogitNormal),
    /// which comes from a normal number.
    pub fn from_uniform(&self, u: f64) -> Result<f64> {
        self.validate()?;
        Ok(match *self {
            Self::Uniform { eps } => u * (1.0 - eps) + eps,
            Self::Mode { scale } => {
                let cos = (std::f64::consts::FRAC_PI_2 * u).cos();
                1.0 - u - scale * (cos * cos - 1.0 + u)
            }
            Self::CoshTails { a, center } => {
                let (left, right) = ((a * center).sinh(), (a * (1.0 - center)).sinh());
                center + (u * (left + right) - left).asinh() / a
            }
            Self::Discrete { k, eps } => {
                let j = (u * k as f64).floor().min(k as f64 - 1.0);
                j * (1.0 - eps) / k as f64 + eps
            }
            Self::Fixed(t) => t,
            Self::LogitNormal { .. } => {
                return Err(Error::unsupported(
                    "a logit-normal time from a uniform number",
                    "take from_normal",
                ))
            }
        })
    }

    /// The time of a standard normal number.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`]; [`Error::Unsupported`] for all but
    /// [`LogitNormal`](Self::LogitNormal).
    pub fn from_normal(&self, z: f64) -> Result<f64> {
        self.validate()?;
        match *self {
            Self::LogitNormal { mean, std } => Ok(1.0 / (1.0 + (-(mean + std * z)).exp())),
            _ => Err(Error::unsupported(
                "this distribution of times from a normal number",
                "take from_uniform",
            )),
        }
    }

    /// `n` times, `[n]`.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`]; those of candle.
    pub fn sample(
        &self,
        n: usize,
        rng: &mut RandomStream,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        self.validate()?;
        let mut numbers = vec![0.0; n];
        let normal = matches!(self, Self::LogitNormal { .. });
        match normal {
            true => rng.fill_normal(&mut numbers),
            false => rng.fill_uniform(&mut numbers),
        }
        for x in &mut numbers {
            *x = if normal {
                self.from_normal(*x)?
            } else {
                self.from_uniform(*x)?
            };
        }
        Ok(Tensor::from_vec(numbers, n, device)?.to_dtype(dtype)?)
    }

    /// The density at a time.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`]; [`Error::Unsupported`] for [`Discrete`](Self::Discrete) and
    /// [`Fixed`](Self::Fixed), which have none.
    pub fn density(&self, t: f64) -> Result<f64> {
        self.validate()?;
        let inside = (0.0..=1.0).contains(&t);
        Ok(match *self {
            _ if !inside => 0.0,
            Self::Uniform { eps } if t < eps => 0.0,
            Self::Uniform { eps } => 1.0 / (1.0 - eps),
            Self::LogitNormal { mean, std } => {
                let (logit, tau) = ((t / (1.0 - t)).ln(), std::f64::consts::TAU);
                let exponent = -(logit - mean).powi(2) / (2.0 * std * std);
                match t == 0.0 || t == 1.0 {
                    true => 0.0,
                    false => exponent.exp() / (std * tau.sqrt() * t * (1.0 - t)),
                }
            }
            Self::CoshTails { a, center } => {
                let total = (a * (1.0 - center)).sinh() + (a * center).sinh();
                a * (a * (t - center)).cosh() / total
            }
            Self::Mode { scale } => {
                // t falls with u; by bisection the u of this t, then 1 / |dt/du|.
                let (mut low, mut high) = (0.0, 1.0);
                for _ in 0..60 {
                    let middle = 0.5 * (low + high);
                    match self.from_uniform(middle)? > t {
                        true => low = middle,
                        false => high = middle,
                    }
                }
                let pi = std::f64::consts::PI;
                let slope = 1.0 + scale * (1.0 - 0.5 * pi * (pi * low).sin());
                1.0 / slope.abs()
            }
            Self::Discrete { .. } | Self::Fixed(_) => {
                return Err(Error::unsupported(
                    "the density of a distribution on single times",
                    "it has none",
                ))
            }
        })
    }
}

//! Initial values of weights, drawn from a [`RandomStream`].
//!
//! candle draws initial values from a generator that cannot be seeded on the CPU. Here an
//! [`Initializer`] is a distribution as plain data that fills a tensor from a stream, and
//! [`SeededVars`] is a source of variables for any network built on candle's `VarBuilder`, whose
//! values depend on a seed and on each variable's name, and on nothing else.
//!
//! With `fan_in` and `fan_out` the number of inputs and outputs of one unit (for a weight
//! `[out, in, k..]`: `in * prod(k)` and `out * prod(k)`):
//!
//! | initializer | distribution | source |
//! | --- | --- | --- |
//! | [`xavier_uniform`](Initializer::xavier_uniform) | `U(-a, a)`, `a = gain sqrt(6 / (fan_in + fan_out))` | Glorot and Bengio, 2010 |
//! | [`xavier_normal`](Initializer::xavier_normal) | `N(0, gain^2 * 2 / (fan_in + fan_out))` | the same |
//! | [`he_uniform`](Initializer::he_uniform) | `U(-a, a)`, `a = gain sqrt(3 / fan)` | He et al., 2015 |
//! | [`he_normal`](Initializer::he_normal) | `N(0, gain^2 / fan)` | the same |
//! | [`lecun_uniform`](Initializer::lecun_uniform), [`lecun_normal`](Initializer::lecun_normal) | variance `1 / fan_in` | LeCun et al., 1998 |
//! | [`torch_linear`](Initializer::torch_linear) | `U(-a, a)`, `a = 1 / sqrt(fan_in)` | PyTorch's default for linear layers and convolutions |
//! | [`Orthogonal`](Initializer::Orthogonal) | a random matrix with orthonormal rows or columns, times gain | Saxe et al., 2014 |
//! | [`TruncatedNormal`](Initializer::TruncatedNormal) | a normal distribution restricted to an interval | |
//!
//! ```
//! use candle_core::{DType, Device};
//! use thalweg_nn::init::{Gain, Initializer};
//! use thalweg_nn::RandomStream;
//!
//! let mut stream = RandomStream::new(1);
//! let he = Initializer::he_normal(Gain::Relu);
//! let weight = he.tensor((64, 32), &mut stream, DType::F32, &Device::Cpu)?;
//! assert_eq!(weight.dims(), &[64, 32]);
//! # Ok::<(), thalweg_nn::Error>(())
//! ```

mod draw;
mod seeded;

pub use seeded::{frozen, is_buffer, trainable, SeededVars};

use crate::{Error, Result};
use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::init::{FanInOut, NormalOrUniform};
use candle_nn::Init;
use tensor_core::random::RandomStream;

/// Which number of connections sets the scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fan {
    /// Inputs of a unit: keeps the variance of activations in the forward pass.
    In,
    /// Outputs of a unit: keeps the variance of gradients in the backward pass.
    Out,
    /// The mean of both: Glorot's compromise.
    Average,
}

impl Fan {
    /// The fan of a weight of this shape, `[out, in, kernel..]`; a vector counts as `[n, 1]`.
    pub fn of(self, dims: &[usize]) -> f64 {
        let receptive: usize = dims.iter().skip(2).product();
        let outputs = (dims.first().copied().unwrap_or(1) * receptive) as f64;
        let inputs = (dims.get(1).copied().unwrap_or(1) * receptive) as f64;
        match self {
            Fan::In => inputs,
            Fan::Out => outputs,
            Fan::Average => 0.5 * (inputs + outputs),
        }
    }
}

/// The factor that makes up for the activation which follows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Gain {
    /// 1: no activation, or sigmoid.
    Linear,
    /// `sqrt(2)`.
    Relu,
    /// `sqrt(2 / (1 + slope^2))` for a leaky ReLU of this negative slope.
    LeakyRelu(f64),
    /// `5/3`.
    Tanh,
    /// `3/4`.
    Selu,
    /// Any other factor.
    Explicit(f64),
}

impl Gain {
    /// The factor.
    pub fn value(self) -> f64 {
        match self {
            Gain::Linear => 1.0,
            Gain::Relu => std::f64::consts::SQRT_2,
            Gain::LeakyRelu(slope) => (2.0 / (1.0 + slope * slope)).sqrt(),
            Gain::Tanh => 5.0 / 3.0,
            Gain::Selu => 0.75,
            Gain::Explicit(gain) => gain,
        }
    }
}

/// The shape of a distribution whose variance is set by a fan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Spread {
    /// Uniform on a symmetric interval.
    Uniform,
    /// Normal with mean 0.
    Normal,
}

/// A distribution of initial values, as plain data; see the [module](self) page.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Initializer {
    /// The same value everywhere.
    Constant(f64),
    /// Uniform in `[low, high)`.
    Uniform {
        /// The lower end.
        low: f64,
        /// The upper end.
        high: f64,
    },
    /// Normal.
    Normal {
        /// Its mean.
        mean: f64,
        /// Its standard deviation.
        std: f64,
    },
    /// Mean 0 and standard deviation `gain / sqrt(fan)`.
    Scaled {
        /// Which fan.
        fan: Fan,
        /// The gain.
        gain: Gain,
        /// Uniform or normal.
        spread: Spread,
    },
    /// The first dimension against all others as a matrix with orthonormal rows (or columns,
    /// whichever are fewer), uniformly distributed, times `gain`.
    Orthogonal {
        /// The gain.
        gain: Gain,
    },
    /// Normal, with draws outside `[low, high]` repeated. The interval is in the units of the
    /// values, not of the standard deviation, and must contain the mean.
    TruncatedNormal {
        /// Mean before truncation.
        mean: f64,
        /// Standard deviation before truncation.
        std: f64,
        /// The lower end.
        low: f64,
        /// The upper end.
        high: f64,
    },
}

impl Initializer {
    /// All zero.
    pub const ZEROS: Self = Self::Constant(0.0);
    /// All one.
    pub const ONES: Self = Self::Constant(1.0);

    fn scaled(fan: Fan, gain: Gain, spread: Spread) -> Self {
        Self::Scaled { fan, gain, spread }
    }

    /// Glorot's uniform distribution.
    pub fn xavier_uniform(gain: Gain) -> Self {
        Self::scaled(Fan::Average, gain, Spread::Uniform)
    }

    /// Glorot's normal distribution.
    pub fn xavier_normal(gain: Gain) -> Self {
        Self::scaled(Fan::Average, gain, Spread::Normal)
    }

    /// He's uniform distribution over the fan-in.
    pub fn he_uniform(gain: Gain) -> Self {
        Self::scaled(Fan::In, gain, Spread::Uniform)
    }

    /// He's normal distribution over the fan-in.
    pub fn he_normal(gain: Gain) -> Self {
        Self::scaled(Fan::In, gain, Spread::Normal)
    }

    /// The same distribution over another fan; no effect on those without one.
    pub fn with_fan(self, fan: Fan) -> Self {
        match self {
            Self::Scaled { gain, spread, .. } => Self::scaled(fan, gain, spread),
            other => other,
        }
    }

    /// LeCun's uniform distribution: variance `1 / fan_in`.
    pub fn lecun_uniform() -> Self {
        Self::he_uniform(Gain::Linear)
    }

    /// LeCun's normal distribution: variance `1 / fan_in`.
    pub fn lecun_normal() -> Self {
        Self::he_normal(Gain::Linear)
    }

    /// PyTorch's default for the weights of linear layers and convolutions:
    /// `U(-1/sqrt(fan_in), 1/sqrt(fan_in))`.
    pub fn torch_linear() -> Self {
        // a = sqrt(3) * gain / sqrt(fan_in) with gain^2 = 1/3.
        Self::he_uniform(Gain::Explicit((1.0_f64 / 3.0).sqrt()))
    }

    /// PyTorch's default for the biases of linear layers and convolutions, given the fan-in of
    /// their weight.
    pub fn torch_bias(fan_in: usize) -> Self {
        let bound = 1.0 / (fan_in.max(1) as f64).sqrt();
        Self::Uniform {
            low: -bound,
            high: bound,
        }
    }

    /// Draws a tensor of this shape; the stream moves by an amount that depends on the shape
    /// only, except for [`TruncatedNormal`](Self::TruncatedNormal).
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for parameters that make no sense,
    /// [`Error::Shape`] for an orthogonal tensor with fewer than two dimensions, and an error for
    /// integer dtypes.
    pub fn tensor(
        &self,
        shape: impl Into<Shape>,
        stream: &mut RandomStream,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        let shape = shape.into();
        match *self {
            Self::Constant(value) => Ok(Tensor::full(value, shape, device)?.to_dtype(dtype)?),
            Self::Uniform { low, high } => Ok(stream.uniform(low, high, shape, dtype, device)?),
            Self::Normal { mean, std } => Ok(stream.normal(mean, std, shape, dtype, device)?),
            Self::Scaled { fan, gain, spread } => {
                let std = draw::scale(fan, gain, shape.dims())?;
                match spread {
                    Spread::Normal => Ok(stream.normal(0.0, std, shape, dtype, device)?),
                    Spread::Uniform => {
                        let bound = 3.0_f64.sqrt() * std;
                        Ok(stream.uniform(-bound, bound, shape, dtype, device)?)
                    }
                }
            }
            Self::Orthogonal { gain } => draw::orthogonal(gain, shape, stream, dtype, device),
            Self::TruncatedNormal {
                mean,
                std,
                low,
                high,
            } => {
                let range = draw::Truncation::new(mean, std, low, high)?;
                range.tensor(shape, stream, dtype, device)
            }
        }
    }

    /// The hint for candle's `VarBuilder` that stands for this distribution at this shape, for
    /// use with any source of variables.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for orthogonal and truncated normal, which candle's hints cannot
    /// express: use [`SeededVars::with_rule`] for those.
    pub fn hint(&self, dims: &[usize]) -> Result<Init> {
        match *self {
            Self::Constant(value) => Ok(Init::Const(value)),
            Self::Uniform { low, high } => Ok(Init::Uniform { lo: low, up: high }),
            Self::Normal { mean, std } => Ok(Init::Randn { mean, stdev: std }),
            Self::Scaled { fan, gain, spread } => {
                let std = draw::scale(fan, gain, dims)?;
                let bound = 3.0_f64.sqrt() * std;
                Ok(match spread {
                    Spread::Uniform => Init::Uniform {
                        lo: -bound,
                        up: bound,
                    },
                    Spread::Normal => Init::Randn {
                        mean: 0.0,
                        stdev: std,
                    },
                })
            }
            Self::Orthogonal { .. } | Self::TruncatedNormal { .. } => Err(Error::Unsupported {
                operation: format!("{self:?}"),
                context: "as a hint of candle's VarBuilder; set it by SeededVars::with_rule".into(),
            }),
        }
    }
}

/// candle's hints mean the same distributions here.
impl From<Init> for Initializer {
    fn from(init: Init) -> Self {
        match init {
            Init::Const(value) => Self::Constant(value),
            Init::Randn { mean, stdev } => Self::Normal { mean, std: stdev },
            Init::Uniform { lo, up } => Self::Uniform { low: lo, high: up },
            Init::Kaiming {
                dist,
                fan,
                non_linearity,
            } => Self::Scaled {
                fan: match fan {
                    FanInOut::FanIn => Fan::In,
                    FanInOut::FanOut => Fan::Out,
                },
                gain: Gain::Explicit(non_linearity.gain()),
                spread: match dist {
                    NormalOrUniform::Normal => Spread::Normal,
                    NormalOrUniform::Uniform => Spread::Uniform,
                },
            },
        }
    }
}

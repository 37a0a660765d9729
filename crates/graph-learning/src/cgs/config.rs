//! Settings.

use crate::sparse::{real, Scalar};
use crate::{Error, Result};
use candle_nn::Activation;
use tensor_core::kernels::Real;

/// How logits become weights whose rows add up to at most 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Normalizer {
    /// `clip(L, 0, 1)` divided by the number of entries of the row: the published experiments.
    #[default]
    DegreeClip,
    /// Softmax over the row.
    Attention,
}

/// Where an edge `s -> t` stands in the matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Orientation {
    /// Row `s`, column `t`: as published.
    #[default]
    RowIsSource,
    /// Row `t`, column `s`: along the messages.
    RowIsTarget,
}

/// The function inside the fixed point, with a slope of at most 1.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Contraction {
    /// A linear map: as published.
    #[default]
    Identity,
    /// Hyperbolic tangent.
    Tanh,
    /// `max(x, 0)`.
    Relu,
    /// `max(x, slope x)` for a slope in `[0, 1]`.
    LeakyRelu(f64),
    /// `1 / (1 + exp(-x))`.
    Sigmoid,
}

impl Contraction {
    /// Checks the slope.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for a slope outside `[0, 1]`.
    pub fn validate(self) -> Result<()> {
        match self {
            Self::LeakyRelu(slope) if !(0.0..=1.0).contains(&slope) => Err(Error::config(
                "CgsConfig::activation",
                format!("LeakyRelu({slope})"),
                "a slope in [0, 1]",
            )),
            _ => Ok(()),
        }
    }

    /// The function.
    #[inline(always)]
    pub(super) fn apply<T: Scalar>(self, x: T) -> T {
        let zero = <T as Real>::ZERO;
        match self {
            Self::Identity => x,
            Self::Tanh => real(Real::to_f64(x).tanh()),
            Self::Relu => {
                if x > zero {
                    x
                } else {
                    zero * x
                }
            }
            Self::LeakyRelu(slope) => {
                if x > zero {
                    x
                } else {
                    real::<T>(slope) * x
                }
            }
            Self::Sigmoid => real(1.0 / (1.0 + (-Real::to_f64(x)).exp())),
        }
    }

    /// The slope, from the value of the function.
    pub(super) fn slope_at<T: Scalar>(self, y: T) -> T {
        let (zero, one) = (<T as Real>::ZERO, <T as Real>::ONE);
        match self {
            Self::Identity => one,
            Self::Tanh => one - y * y,
            Self::Relu => {
                if y > zero {
                    one
                } else {
                    zero
                }
            }
            Self::LeakyRelu(slope) => {
                if y > zero {
                    one
                } else {
                    real(slope)
                }
            }
            Self::Sigmoid => y * (one - y),
        }
    }
}

/// Functions that are steeper than 1 somewhere (GELU, SiLU) are refused: a fixed point of them need
/// not exist.
impl TryFrom<Activation> for Contraction {
    type Error = Error;

    fn try_from(activation: Activation) -> Result<Self> {
        Ok(match activation {
            Activation::Relu => Self::Relu,
            Activation::Sigmoid => Self::Sigmoid,
            Activation::LeakyRelu(slope) => Self::LeakyRelu(slope),
            other => {
                let expected =
                    "a function with slopes of at most 1: ReLU, leaky ReLU, sigmoid, tanh";
                let value = format!("{other:?}");
                return Err(Error::config("CgsConfig::activation", value, expected));
            }
        })
    }
}

/// When an iteration has arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum StopRule {
    /// `max |f(H) - H| <= tol max(1, max |B|)` for each graph of a batch by itself, so that a graph's
    /// result does not depend on its company. The implicit gradient contracts in another norm, the sum
    /// over nodes, and takes `sum |y' - y| <= tol sum |g|` (the largest of the heads on both sides), so that
    /// the size of the loss does not matter.
    #[default]
    MaxNorm,
    /// `|f(H) - H|_F < tol` over all nodes and heads of the batch: the published rule.
    FrobeniusAbs,
}

/// How a fixed point is found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Solver {
    /// By iteration from zero.
    Iterate {
        /// The tolerance of `stop`.
        tol: f64,
        /// Iterations at most; `None` takes what the contraction needs at most for `tol`.
        max_iter: Option<usize>,
        /// When to stop.
        stop: StopRule,
    },
    /// By a dense LU factorization per graph and head; linear maps only (`Identity`).
    Direct,
    /// By stabilized bi-conjugate gradients per graph and head; linear maps only (`Identity`).
    BiCgStab {
        /// The residual relative to the right-hand side.
        tol: f64,
        /// Iterations at most.
        max_iter: usize,
    },
}

impl Default for Solver {
    fn default() -> Self {
        Self::Iterate {
            tol: 1e-6,
            max_iter: None,
            stop: StopRule::MaxNorm,
        }
    }
}

impl Solver {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] that names the first bad one.
    pub fn validate(self) -> Result<()> {
        let (tol, max_iter) = match self {
            Self::Iterate { tol, max_iter, .. } => (tol, max_iter),
            Self::BiCgStab { tol, max_iter } => (tol, Some(max_iter)),
            Self::Direct => return Ok(()),
        };
        if !(tol.is_finite() && tol > 0.0) {
            return Err(Error::config("Solver::tol", tol, "a positive number"));
        }
        match max_iter {
            Some(0) => Err(Error::config("Solver::max_iter", 0, "at least 1, or None")),
            _ => Ok(()),
        }
    }
}

/// Settings of the fixed point.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CgsConfig {
    /// Number of maps `m`, which are solved side by side.
    pub heads: usize,
    /// The contraction `gamma`, in `(0, 1)`. Information travels about `1 / (1 - gamma)` steps.
    pub gamma: f64,
    /// How logits become weights.
    pub normalizer: Normalizer,
    /// Where an edge stands in the matrix.
    pub orientation: Orientation,
    /// The function `phi`.
    pub activation: Contraction,
    /// How the fixed point is found.
    pub solver: Solver,
    /// How the implicit gradient is found; `None` for the same way.
    pub backward: Option<Solver>,
}

impl Default for CgsConfig {
    fn default() -> Self {
        Self {
            heads: 16,
            gamma: 0.5,
            normalizer: Normalizer::DegreeClip,
            orientation: Orientation::RowIsSource,
            activation: Contraction::Identity,
            solver: Solver::default(),
            backward: None,
        }
    }
}

impl CgsConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] that names the first bad one.
    pub fn validate(&self) -> Result<()> {
        if self.heads == 0 {
            return Err(Error::config("CgsConfig::heads", 0, "at least 1"));
        }
        if !(self.gamma > 0.0 && self.gamma < 1.0) {
            return Err(Error::config(
                "CgsConfig::gamma",
                self.gamma,
                "a number in (0, 1)",
            ));
        }
        self.activation.validate()?;
        self.solver.validate()?;
        let linear = self.activation == Contraction::Identity;
        let iterates = matches!(self.solver, Solver::Iterate { .. });
        if !linear && !iterates {
            let value = format!("{:?} with {:?}", self.solver, self.activation);
            return Err(Error::config(
                "CgsConfig::solver",
                value,
                "Iterate for this activation",
            ));
        }
        // The adjoint system is linear whatever the activation is.
        self.backward.map_or(Ok(()), Solver::validate)
    }
}

//! The crate's one error type.

/// Result with this crate's [`enum@Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Everything that can go wrong in `thalweg-flows`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An operation of candle failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),

    /// An operation of `thalweg-tensor-core` failed.
    #[error(transparent)]
    Core(#[from] tensor_core::Error),

    /// An operation of `thalweg-nn` failed.
    #[error(transparent)]
    Nn(#[from] nn::Error),

    /// A field of a configuration has a value that makes no sense.
    #[error("{field} = {value}: expected {expected}")]
    InvalidConfig {
        /// The field, with its type.
        field: &'static str,
        /// The value that was given.
        value: String,
        /// What would have been right.
        expected: String,
    },

    /// An argument has a value that makes no sense.
    #[error("{name} = {value}: expected {expected}")]
    InvalidArgument {
        /// The argument.
        name: &'static str,
        /// The value that was given.
        value: String,
        /// What would have been right.
        expected: String,
    },

    /// A tensor has another shape than needed.
    #[error("{tensor} has shape {got:?}: expected {expected}")]
    Shape {
        /// The tensor.
        tensor: String,
        /// The shape that was given.
        got: Vec<usize>,
        /// What was needed.
        expected: String,
    },

    /// A quantity that the level does not determine: the clean sample at pure noise, say.
    #[error("{what} is not determined at alpha = {alpha}, sigma = {sigma}: {advice}")]
    Undetermined {
        /// What was asked for.
        what: &'static str,
        /// The level's signal scale.
        alpha: f64,
        /// The level's noise scale.
        sigma: f64,
        /// What to do instead.
        advice: &'static str,
    },

    /// A tensor holds NaN or infinity.
    #[error("{what} is not finite at step {step}")]
    NonFinite {
        /// Which tensor, and what made it.
        what: String,
        /// The step of the sampler or solver, from 0.
        step: usize,
    },

    /// A solver could not go on.
    #[error("{solver} stopped at t = {t}: {reason}")]
    Solver {
        /// Which solver.
        solver: &'static str,
        /// Where.
        t: f64,
        /// Why.
        reason: String,
    },

    /// A combination that does not exist.
    #[error("{what} is not supported: {reason}")]
    Unsupported {
        /// What was asked for.
        what: String,
        /// Why not, and what to do instead.
        reason: String,
    },

    /// A derivative through the caller's network disagrees with finite differences: a layer of it
    /// has no gradient.
    #[error("the gradient of {what} is wrong: along a random direction {analytic:e}, by finite differences {numeric:e}; a layer without a gradient (softmax_last_dim, LayerNorm, RmsNorm of candle-nn) is the usual reason")]
    WrongGradient {
        /// What was differentiated.
        what: String,
        /// The directional derivative by backpropagation.
        analytic: f64,
        /// The same by central differences.
        numeric: f64,
    },

    /// An error of the caller's own code: a reward, a classifier, a guidance rule.
    #[error(transparent)]
    Other(Box<dyn std::error::Error + Send + Sync>),
}

impl Error {
    /// Wraps an error of another crate, for implementations of this crate's traits.
    pub fn other(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Other(error.into())
    }

    pub(crate) fn config(
        field: &'static str,
        value: impl std::fmt::Debug,
        expected: impl ToString,
    ) -> Self {
        Self::InvalidConfig {
            field,
            value: format!("{value:?}"),
            expected: expected.to_string(),
        }
    }

    pub(crate) fn argument(
        name: &'static str,
        value: impl std::fmt::Debug,
        expected: impl ToString,
    ) -> Self {
        Self::InvalidArgument {
            name,
            value: format!("{value:?}"),
            expected: expected.to_string(),
        }
    }

    pub(crate) fn shape(tensor: impl ToString, got: &[usize], expected: impl ToString) -> Self {
        Self::Shape {
            tensor: tensor.to_string(),
            got: got.to_vec(),
            expected: expected.to_string(),
        }
    }

    pub(crate) fn unsupported(what: impl ToString, reason: impl ToString) -> Self {
        Self::Unsupported {
            what: what.to_string(),
            reason: reason.to_string(),
        }
    }
}

/// candle's traits return candle's error: ours travels inside it.
impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(inner) => inner,
            Error::Core(inner) => inner.into(),
            other => candle_core::Error::wrap(other),
        }
    }
}

/// Checks of single values, so that every `validate()` reads as a list.
pub(crate) mod check {
    use super::{Error, Result};
    use candle_core::Tensor;

    pub(crate) fn positive(field: &'static str, value: f64) -> Result<()> {
        let holds = value.is_finite() && value > 0.0;
        require(holds, field, value, "a finite number > 0")
    }

    pub(crate) fn non_negative(field: &'static str, value: f64) -> Result<()> {
        let holds = value.is_finite() && value >= 0.0;
        require(holds, field, value, "a finite number >= 0")
    }

    pub(crate) fn finite(field: &'static str, value: f64) -> Result<()> {
        require(value.is_finite(), field, value, "a finite number")
    }

    pub(crate) fn at_least_one(field: &'static str, value: usize) -> Result<()> {
        require(value >= 1, field, value, "at least 1")
    }

    pub(crate) fn require(
        holds: bool,
        field: &'static str,
        value: impl std::fmt::Debug,
        expected: &str,
    ) -> Result<()> {
        match holds {
            true => Ok(()),
            false => Err(Error::config(field, value, expected)),
        }
    }

    /// A batch: at least one dimension.
    pub(crate) fn rows(name: &str, x: &Tensor) -> Result<usize> {
        x.dims()
            .first()
            .copied()
            .ok_or_else(|| Error::shape(name, x.dims(), "[rows, ...]"))
    }

    /// Two tensors of one shape.
    pub(crate) fn same_shape(name: &str, got: &Tensor, like: &Tensor) -> Result<()> {
        match got.dims() == like.dims() {
            true => Ok(()),
            false => Err(Error::shape(name, got.dims(), format!("{:?}", like.dims()))),
        }
    }
}

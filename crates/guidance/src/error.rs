//! The crate's one error type.

/// Result with this crate's [`enum@Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Everything that can go wrong in `thalweg-guidance`.
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

    /// The sampling loop or a model failed.
    #[error(transparent)]
    Flows(#[from] flows::Error),

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

    /// A combination that does not exist.
    #[error("{what} is not supported: {reason}")]
    Unsupported {
        /// What was asked for.
        what: String,
        /// Why not, and what to do instead.
        reason: String,
    },

    /// NaN or infinity where a rule needs numbers.
    #[error("{rule}: {what} is not finite at step {step}")]
    NonFinite {
        /// The rule.
        rule: &'static str,
        /// What is not finite.
        what: String,
        /// The step of the sampler, from 0.
        step: usize,
    },

    /// Saved coefficients do not belong to this run.
    #[error("{what} does not fit: {reason}")]
    Mismatch {
        /// What was loaded.
        what: &'static str,
        /// What differs.
        reason: String,
    },
}

impl Error {
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

/// The loop's traits return its error: ours travels inside it.
impl From<Error> for flows::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Flows(inner) => inner,
            Error::Candle(inner) => inner.into(),
            Error::Core(inner) => inner.into(),
            Error::Nn(inner) => inner.into(),
            other => flows::Error::other(other),
        }
    }
}

/// Checks of single values, so that every `validate()` reads as a list.
pub(crate) mod check {
    use super::{Error, Result};

    pub(crate) fn positive(field: &'static str, value: f64) -> Result<()> {
        let holds = value.is_finite() && value > 0.0;
        require(holds, field, value, "a finite number > 0")
    }

    pub(crate) fn finite(field: &'static str, value: f64) -> Result<()> {
        require(value.is_finite(), field, value, "a finite number")
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
}

//! The crate's one error type.

/// Result with this crate's [`enum@Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Everything that can go wrong in `thalweg-sequence-design`.
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

    /// An operation of `thalweg-optim` failed.
    #[error(transparent)]
    Optim(Box<optim::Error>),

    /// The decoder of `thalweg-guidance` failed.
    #[error(transparent)]
    Guidance(Box<guidance::Error>),

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

    /// A tensor or a list has another shape than needed.
    #[error("{what} has shape {got:?}: expected {expected}")]
    Shape {
        /// The tensor or list.
        what: String,
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

    /// NaN or infinity where numbers are needed.
    #[error("{what} is not finite")]
    NonFinite {
        /// What is not finite.
        what: String,
    },

    /// An environment contradicts itself: a cycle, a dead end, an object that cannot be reached.
    #[error("environment: {reason}")]
    Environment {
        /// What is wrong, with the state.
        reason: String,
    },

    /// A sequence that cannot be read.
    #[error("{record}, position {position}: {reason}")]
    Sequence {
        /// The sequence's name.
        record: String,
        /// The letter, counted from 1.
        position: usize,
        /// What is wrong with it.
        reason: String,
    },

    /// A file or a stream of sequences that cannot be read or written.
    #[error("{what}: {reason}")]
    Format {
        /// The file, or the kind of text.
        what: String,
        /// What is wrong with it.
        reason: String,
    },

    /// A saved state does not fit.
    #[error("saved state: {0}")]
    State(String),
}

/// Boxed: it is by far the largest.
impl From<optim::Error> for Error {
    fn from(error: optim::Error) -> Self {
        Self::Optim(Box::new(error))
    }
}

impl From<guidance::Error> for Error {
    fn from(error: guidance::Error) -> Self {
        Self::Guidance(Box::new(error))
    }
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

    pub(crate) fn shape(what: impl ToString, got: &[usize], expected: impl ToString) -> Self {
        Self::Shape {
            what: what.to_string(),
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

    pub(crate) fn non_finite(what: impl ToString) -> Self {
        Self::NonFinite {
            what: what.to_string(),
        }
    }

    pub(crate) fn sequence(record: &str, index: usize, reason: impl ToString) -> Self {
        Self::Sequence {
            record: record.to_string(),
            position: index + 1,
            reason: reason.to_string(),
        }
    }

    pub(crate) fn format(what: impl ToString, reason: impl ToString) -> Self {
        Self::Format {
            what: what.to_string(),
            reason: reason.to_string(),
        }
    }

    pub(crate) fn environment(reason: impl ToString) -> Self {
        Self::Environment {
            reason: reason.to_string(),
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

    pub(crate) fn non_negative(field: &'static str, value: f64) -> Result<()> {
        let holds = value.is_finite() && value >= 0.0;
        require(holds, field, value, "a finite number >= 0")
    }

    pub(crate) fn unit(field: &'static str, value: f64) -> Result<()> {
        require(
            (0.0..=1.0).contains(&value),
            field,
            value,
            "a number in [0, 1]",
        )
    }

    pub(crate) fn at_least(field: &'static str, value: usize, least: usize) -> Result<()> {
        let expected = format!("at least {least}");
        require(value >= least, field, value, &expected)
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

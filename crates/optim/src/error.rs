//! The crate's one error type.

/// Result with this crate's [`enum@Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Everything that can go wrong in `thalweg-optim`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An operation of candle failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),

    /// An operation of `thalweg-tensor-core` failed.
    #[error(transparent)]
    Core(#[from] tensor_core::Error),

    /// A field of a configuration has a value that makes no sense.
    #[error("{field} = {value}: expected {expected}")]
    InvalidConfig {
        /// The field, with its type (`LionConfig::beta1`).
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

    /// A tensor has another dtype than needed.
    #[error("{tensor} has dtype {got:?}: expected {expected}")]
    DType {
        /// The tensor.
        tensor: String,
        /// The dtype that was given.
        got: candle_core::DType,
        /// What was needed.
        expected: String,
    },

    /// Two parameters of one optimizer have the same name, or are the same variable.
    #[error("parameter `{0}` is given twice")]
    DuplicateParameter(String),

    /// Gradients hold NaN or infinity, and the policy is to refuse them.
    #[error("non-finite gradient in {}; nothing was changed", .0.join(", "))]
    NonFiniteGradient(Vec<String>),

    /// A loss is NaN or infinite.
    #[error("{what} is {value}: expected a finite number; nothing was changed")]
    NonFiniteLoss {
        /// Which evaluation of the loss.
        what: String,
        /// Its value.
        value: f64,
    },

    /// Too few data for a fit or a statistic.
    #[error("{what} needs at least {needed} {of}, got {got}")]
    TooFew {
        /// What was to be computed.
        what: &'static str,
        /// What it is computed from.
        of: &'static str,
        /// How many it takes.
        needed: usize,
        /// How many there are.
        got: usize,
    },

    /// The text of a program cannot be read.
    #[error("line {line}: {reason}")]
    Program {
        /// The line, from 1.
        line: usize,
        /// What is wrong.
        reason: String,
    },

    /// A program is not well typed.
    #[error("statement {statement}: {reason}")]
    ProgramType {
        /// The statement, from 0; the number of statements for what is returned.
        statement: usize,
        /// What is wrong.
        reason: String,
    },

    /// A saved state does not fit the optimizer that it is loaded into.
    #[error("state does not fit:\n  {}", .0.join("\n  "))]
    StateMismatch(Vec<String>),
}

impl Error {
    /// An [`Error::InvalidConfig`].
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

    /// An [`Error::InvalidArgument`].
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

    /// An [`Error::Shape`].
    pub(crate) fn shape(tensor: impl ToString, got: &[usize], expected: impl ToString) -> Self {
        Self::Shape {
            tensor: tensor.to_string(),
            got: got.to_vec(),
            expected: expected.to_string(),
        }
    }
}

/// candle's traits (`Optimizer`, `Module`) return candle's error: ours travels inside it.
impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(inner) => inner,
            Error::Core(inner) => inner.into(),
            other => candle_core::Error::wrap(other),
        }
    }
}

/// Checks of single configuration values, so that every `validate()` reads as a list.
pub(crate) mod check {
    use super::{Error, Result};

    /// A finite number `>= 0`.
    pub(crate) fn non_negative(field: &'static str, value: f64) -> Result<()> {
        require(
            value.is_finite() && value >= 0.0,
            field,
            value,
            "a finite number >= 0",
        )
    }

    /// A finite number `> 0`.
    pub(crate) fn positive(field: &'static str, value: f64) -> Result<()> {
        require(
            value.is_finite() && value > 0.0,
            field,
            value,
            "a finite number > 0",
        )
    }

    /// Any finite number.
    pub(crate) fn finite(field: &'static str, value: f64) -> Result<()> {
        require(value.is_finite(), field, value, "a finite number")
    }

    /// A decay rate in `[0, 1)`.
    pub(crate) fn rate(field: &'static str, value: f64) -> Result<()> {
        require(
            (0.0..1.0).contains(&value),
            field,
            value,
            "a number in [0, 1)",
        )
    }

    /// A count `>= 1`.
    pub(crate) fn at_least_one(field: &'static str, value: usize) -> Result<()> {
        require(value >= 1, field, value, "at least 1")
    }

    /// `holds`, or an error about the field.
    pub(crate) fn require(
        holds: bool,
        field: &'static str,
        value: impl std::fmt::Debug,
        expected: &str,
    ) -> Result<()> {
        if holds {
            Ok(())
        } else {
            Err(Error::config(field, value, expected))
        }
    }
}

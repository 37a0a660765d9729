//! The crate's one error type.

/// Result with this crate's [`enum@Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Everything that can go wrong in `thalweg-convex`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An operation of candle failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),

    /// An operation of `thalweg-tensor-core` failed.
    #[error(transparent)]
    Core(#[from] tensor_core::Error),

    /// A field of a configuration or an argument has a value that makes no sense.
    #[error("{field} = {value}: expected {expected}")]
    InvalidConfig {
        /// The field, with its type (`OtReg::KSparse::k`), or the argument.
        field: &'static str,
        /// The value that was given.
        value: String,
        /// What would have been right.
        expected: String,
    },

    /// Data has another shape than needed.
    #[error("{what} has shape {got:?}: expected {expected}")]
    Shape {
        /// The tensor or slice.
        what: &'static str,
        /// The shape that was given.
        got: Vec<usize>,
        /// What was needed.
        expected: String,
    },

    /// Numbers that should be finite are not.
    #[error("{what}: entry {position} is {value}, expected a finite number")]
    NonFinite {
        /// What was looked at.
        what: &'static str,
        /// Index of the first such entry, row-major.
        position: usize,
        /// Its value.
        value: f64,
    },

    /// The two sides of a transport problem have different mass.
    #[error("the rows carry mass {rows} and the columns {columns}: expected the same")]
    UnequalMass {
        /// Sum of the row weights.
        rows: f64,
        /// Sum of the column weights.
        columns: f64,
    },

    /// No point satisfies all constraints.
    #[error("{problem} is infeasible: {certificate}")]
    Infeasible {
        /// What was to be solved.
        problem: &'static str,
        /// The proof, in words and numbers.
        certificate: String,
        /// The weights of the constraints whose combination is impossible; empty where there are
        /// none.
        multipliers: Vec<f64>,
    },

    /// The objective falls without end.
    #[error("{problem} is unbounded below: {certificate}")]
    Unbounded {
        /// What was to be solved.
        problem: &'static str,
        /// The direction along which it falls.
        certificate: String,
    },

    /// A matrix that must be positive semi-definite or definite is not.
    #[error("{what} is not positive {kind}: {detail}")]
    Indefinite {
        /// The matrix.
        what: &'static str,
        /// `definite` or `semi-definite`.
        kind: &'static str,
        /// What showed it.
        detail: String,
    },

    /// An iteration that must reach its tolerance did not.
    #[error("{solver} stopped after {iterations} iterations with {residual:.3e}: expected at most {tolerance:.3e}")]
    NotConverged {
        /// The solver.
        solver: &'static str,
        /// Iterations done.
        iterations: usize,
        /// The residual it had.
        residual: f64,
        /// The residual it should have had.
        tolerance: f64,
    },

    /// A numerical library gave up.
    #[error("{operation} failed: {reason}")]
    Numerical {
        /// What was computed.
        operation: &'static str,
        /// What the library said.
        reason: String,
    },

    /// A combination has no implementation.
    #[error("{operation} is not supported {context}")]
    Unsupported {
        /// What was asked for.
        operation: String,
        /// Where: "on cuda", "with an L1 penalty", ...
        context: String,
    },
}

impl Error {
    /// An [`Error::InvalidConfig`].
    pub(crate) fn config(
        field: &'static str,
        value: impl ToString,
        expected: impl ToString,
    ) -> Self {
        Self::InvalidConfig {
            field,
            value: value.to_string(),
            expected: expected.to_string(),
        }
    }

    /// An [`Error::Shape`].
    pub(crate) fn shape(what: &'static str, got: &[usize], expected: impl ToString) -> Self {
        Self::Shape {
            what,
            got: got.to_vec(),
            expected: expected.to_string(),
        }
    }

    /// An [`Error::Numerical`].
    pub(crate) fn numerical(operation: &'static str, reason: impl std::fmt::Debug) -> Self {
        Self::Numerical {
            operation,
            reason: format!("{reason:?}"),
        }
    }

    /// An [`Error::Unsupported`].
    pub(crate) fn unsupported(operation: impl ToString, context: impl ToString) -> Self {
        Self::Unsupported {
            operation: operation.to_string(),
            context: context.to_string(),
        }
    }
}

/// candle's traits (`Module`, `CustomOp3`) return candle's error: ours travels inside.
impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(inner) => inner,
            Error::Core(inner) => inner.into(),
            other => candle_core::Error::wrap(other),
        }
    }
}

/// Checks that name what they found.
pub(crate) mod check {
    use super::{Error, Result};

    pub(crate) fn positive(field: &'static str, value: f64) -> Result<()> {
        if value.is_finite() && value > 0.0 {
            return Ok(());
        }
        Err(Error::config(field, value, "a finite number above 0"))
    }

    pub(crate) fn non_negative(field: &'static str, value: f64) -> Result<()> {
        if value.is_finite() && value >= 0.0 {
            return Ok(());
        }
        Err(Error::config(field, value, "a finite number of at least 0"))
    }

    pub(crate) fn rate(field: &'static str, value: f64) -> Result<()> {
        if (0.0..1.0).contains(&value) {
            return Ok(());
        }
        Err(Error::config(field, value, "a number in [0, 1)"))
    }

    pub(crate) fn at_least(field: &'static str, value: usize, least: usize) -> Result<()> {
        if value >= least {
            return Ok(());
        }
        Err(Error::config(field, value, format!("at least {least}")))
    }

    pub(crate) fn finite(what: &'static str, values: &[f64]) -> Result<()> {
        match values.iter().position(|x| !x.is_finite()) {
            None => Ok(()),
            Some(position) => Err(Error::NonFinite {
                what,
                position,
                value: values[position],
            }),
        }
    }

    pub(crate) fn length(what: &'static str, got: usize, expected: usize) -> Result<()> {
        if got == expected {
            return Ok(());
        }
        Err(Error::shape(what, &[got], format!("[{expected}]")))
    }
}

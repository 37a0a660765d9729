//! The crate's one error type.

use candle_core::DType;

/// Result with this crate's [`enum@Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Everything that can go wrong in `thalweg-nn`.
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
        /// The field, with its type (`PowerNormConfig::eps`).
        field: &'static str,
        /// The value that was given.
        value: String,
        /// What would have been right.
        expected: String,
    },

    /// A tensor has another shape than needed.
    #[error("{tensor} has shape {got:?}: expected {expected}")]
    Shape {
        /// The tensor.
        tensor: &'static str,
        /// The shape that was given.
        got: Vec<usize>,
        /// What was needed.
        expected: String,
    },

    /// A tensor has another dtype than needed.
    #[error("{tensor} has dtype {got:?}: expected {expected}")]
    DType {
        /// The tensor.
        tensor: &'static str,
        /// The dtype that was given.
        got: DType,
        /// What was needed.
        expected: String,
    },

    /// A class index is not below the number of classes.
    #[error("label {label} at position {position}: expected a class below {classes}")]
    LabelOutOfRange {
        /// The label.
        label: i64,
        /// Its position in the flattened labels.
        position: usize,
        /// The number of classes.
        classes: usize,
    },

    /// A row of a masked softmax has no possible entry, or not the one that is wanted.
    #[error("row {row}: {reason}")]
    Impossible {
        /// The row.
        row: usize,
        /// What is impossible.
        reason: String,
    },

    /// Numbers that should be finite are not.
    #[error("{count} of {total} entries of {what} are NaN or infinite{hint}")]
    NonFinite {
        /// What was looked at.
        what: &'static str,
        /// How many entries are not finite.
        count: usize,
        /// How many entries there are.
        total: usize,
        /// What the reader could do about it; empty or starting with `: `.
        hint: &'static str,
    },

    /// A batch does not split into the groups that were asked for.
    #[error("batch of {batch} examples: expected a multiple of the ghost size {ghost_size}")]
    IndivisibleBatch {
        /// The number of examples.
        batch: usize,
        /// The size of a ghost batch.
        ghost_size: usize,
    },

    /// Named state does not fit what it is loaded into.
    #[error("state does not fit:\n  {}", .0.join("\n  "))]
    StateMismatch(Vec<String>),

    /// An operation has no implementation for this combination.
    #[error("{operation} is not supported {context}")]
    Unsupported {
        /// What was asked for.
        operation: String,
        /// Where: "on metal", "with group scaling", ...
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
    pub(crate) fn shape(tensor: &'static str, got: &[usize], expected: impl ToString) -> Self {
        Self::Shape {
            tensor,
            got: got.to_vec(),
            expected: expected.to_string(),
        }
    }

    /// An [`Error::DType`].
    pub(crate) fn dtype(tensor: &'static str, got: DType, expected: impl ToString) -> Self {
        Self::DType {
            tensor,
            got,
            expected: expected.to_string(),
        }
    }
}

/// candle's traits (`Module`, `ModuleT`, `CustomOp1`) return candle's error: ours travels inside.
impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(inner) => inner,
            Error::Core(inner) => inner.into(),
            other => candle_core::Error::wrap(other),
        }
    }
}

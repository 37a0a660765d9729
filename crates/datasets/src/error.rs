//! The crate's one error type.

use std::path::Path;

/// Result with this crate's [`enum@Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Everything that can go wrong in `thalweg-datasets`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An operation of candle failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),

    /// A random stream or another part of `thalweg-tensor-core` failed.
    #[error(transparent)]
    Core(#[from] tensor_core::Error),

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

    /// A tensor has another shape or dtype than needed.
    #[error("{name} is {found}: expected {expected}")]
    BadTensor {
        /// The tensor.
        name: &'static str,
        /// Its shape and dtype.
        found: String,
        /// What was needed.
        expected: String,
    },

    /// Inputs and labels count different numbers of examples.
    #[error("{inputs} inputs but {labels} labels")]
    LengthMismatch {
        /// Examples among the inputs.
        inputs: usize,
        /// Examples among the labels.
        labels: usize,
    },

    /// A label that is not a class.
    #[error("label {label} at index {index}: expected a class in 0..{classes}")]
    LabelOutOfRange {
        /// The label.
        label: u64,
        /// Where it stands.
        index: usize,
        /// How many classes there are.
        classes: usize,
    },

    /// NaN or infinity in data that must be finite.
    #[error("{count} non-finite values in {name}: expected finite numbers")]
    NonFinite {
        /// The tensor.
        name: &'static str,
        /// How many.
        count: usize,
    },

    /// A saved state does not fit.
    #[error("saved state: {0}")]
    State(String),

    /// Files that a data set consists of are not there.
    #[error("{dataset}: missing in {dir}: {}", .missing.join(", "))]
    MissingFiles {
        /// The data set.
        dataset: &'static str,
        /// The folder that was searched.
        dir: String,
        /// The names that were looked for.
        missing: Vec<String>,
    },

    /// A file begins with other bytes than its format does.
    #[error("{path}: begins with {found}: expected {expected}")]
    Magic {
        /// The file.
        path: String,
        /// Its first bytes.
        found: String,
        /// What was expected.
        expected: String,
    },

    /// A file ends before its content does.
    #[error("{path}: ends after {found} bytes: expected {expected}")]
    Truncated {
        /// The file.
        path: String,
        /// Bytes that are there.
        found: u64,
        /// Bytes that the format or the header asks for.
        expected: String,
    },

    /// A file goes on where its content ends.
    #[error("{path}: {found} bytes or more: expected {expected}")]
    TooLong {
        /// The file.
        path: String,
        /// Bytes that are there, at least.
        found: u64,
        /// Bytes that the format or the header asks for.
        expected: String,
    },

    /// A cell of a table is not what its column needs.
    #[error("{path}: line {line}, column {column}: `{value}`: expected {expected}")]
    Cell {
        /// The file.
        path: String,
        /// The line, counted from 1.
        line: u64,
        /// Name of the column, or its index counted from 0.
        column: String,
        /// The text of the cell.
        value: String,
        /// What was expected.
        expected: &'static str,
    },

    /// A table has no such column.
    #[error("{path}: no column {column}: the table has {available}")]
    UnknownColumn {
        /// The file.
        path: String,
        /// Name or index that was asked for.
        column: String,
        /// The columns that exist.
        available: String,
    },

    /// A file is not what it should be in another way.
    #[error("{path}: {reason}")]
    BadFile {
        /// The file.
        path: String,
        /// What is wrong with it and what was expected.
        reason: String,
    },

    /// Reading or writing failed.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// The error of the operating system.
        source: std::io::Error,
    },

    /// A name that is not in the catalog.
    #[error("no data set `{name}` in the catalog: it has {}", .known.join(", "))]
    UnknownDataset {
        /// The name.
        name: String,
        /// The names that exist.
        known: Vec<&'static str>,
    },

    /// A download failed; what has arrived is kept and the next attempt continues from there.
    #[error(
        "cannot download {url}: {reason}; {kept} bytes are kept and the next attempt continues there"
    )]
    Network {
        /// The address.
        url: String,
        /// What happened.
        reason: String,
        /// Bytes of the partial file.
        kept: u64,
    },

    /// A file has another SHA-256 than published.
    #[error("{path}: SHA-256 {found}: expected {expected}")]
    Checksum {
        /// The file.
        path: String,
        /// The SHA-256 of what is there.
        found: String,
        /// The published one.
        expected: String,
    },

    /// Another process writes the same file.
    #[error("{path}: another process is downloading this file: wait for it to end")]
    Busy {
        /// The partial file.
        path: String,
    },
}

impl Error {
    /// An [`Error::InvalidArgument`].
    pub(crate) fn invalid(
        name: &'static str,
        value: impl ToString,
        expected: impl ToString,
    ) -> Self {
        Self::InvalidArgument {
            name,
            value: value.to_string(),
            expected: expected.to_string(),
        }
    }

    /// An [`Error::BadTensor`] that describes `tensor`.
    pub(crate) fn tensor(
        name: &'static str,
        tensor: &candle_core::Tensor,
        expected: impl ToString,
    ) -> Self {
        Self::BadTensor {
            name,
            found: format!("{:?} of shape {:?}", tensor.dtype(), tensor.dims()),
            expected: expected.to_string(),
        }
    }

    /// An [`Error::Io`] with the file's name.
    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        Self::Io {
            path: path.display().to_string(),
            source,
        }
    }

    /// An [`Error::BadFile`].
    pub(crate) fn bad_file(path: &Path, reason: impl ToString) -> Self {
        Self::BadFile {
            path: path.display().to_string(),
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

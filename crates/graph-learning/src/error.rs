//! The crate's one error type.

use candle_core::DType;
use std::path::Path;

/// Result with this crate's [`enum@Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Everything that can go wrong in `thalweg-graph-learning`.
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

    /// An operation of `thalweg-convex` failed.
    #[error(transparent)]
    Convex(Box<convex::Error>),

    /// Whoever watched the training asked it to stop.
    #[error("stopped by the observer at {at}")]
    Stopped {
        /// Where.
        at: String,
    },

    /// A field of a configuration has a value that makes no sense.
    #[error("{field} = {value}: expected {expected}")]
    InvalidConfig {
        /// The field, with its type (`CgsConfig::gamma`).
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

    /// An edge ends at a node that does not exist.
    #[error("edge {edge}: {end} {index}: expected a node below {nodes}")]
    EdgeOutOfRange {
        /// The position of the edge in the list.
        edge: usize,
        /// `source` or `target`.
        end: &'static str,
        /// The node that was given.
        index: u64,
        /// How many nodes there are.
        nodes: usize,
    },

    /// More nodes or edges than 32-bit indices can name.
    #[error("{count} {what}: expected at most {}", u32::MAX)]
    TooLarge {
        /// `nodes` or `edges`.
        what: &'static str,
        /// How many.
        count: usize,
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
    #[error("label {label} of node {node}: expected a class below {classes}")]
    LabelOutOfRange {
        /// The label.
        label: u32,
        /// The node, or the graph for labels of graphs.
        node: usize,
        /// The number of classes.
        classes: usize,
    },

    /// A class without a single training node where each class needs one.
    #[error("class {class} has no training node: expected at least one of each class")]
    MissingClass {
        /// The class.
        class: usize,
    },

    /// Numbers that should be finite are not.
    #[error("{count} of {total} entries of {what} are NaN or infinite")]
    NonFinite {
        /// What was looked at.
        what: &'static str,
        /// How many entries are not finite.
        count: usize,
        /// How many entries there are.
        total: usize,
    },

    /// A file is not what it should be.
    #[error("{path}: {reason}")]
    BadFile {
        /// The file.
        path: String,
        /// What is wrong with it and what was expected.
        reason: String,
    },

    /// Reading failed.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// The error of the operating system.
        source: std::io::Error,
    },

    /// An operation has no implementation for this combination.
    #[error("{operation} is not supported {context}")]
    Unsupported {
        /// What was asked for.
        operation: String,
        /// Where: "on CUDA", "with three layers", ...
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

    /// An [`Error::InvalidArgument`].
    pub(crate) fn argument(
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

    /// An [`Error::Unsupported`].
    pub(crate) fn unsupported(operation: impl ToString, context: impl ToString) -> Self {
        Self::Unsupported {
            operation: operation.to_string(),
            context: context.to_string(),
        }
    }

    /// An [`Error::BadFile`].
    pub(crate) fn bad_file(path: &Path, reason: impl ToString) -> Self {
        Self::BadFile {
            path: path.display().to_string(),
            reason: reason.to_string(),
        }
    }

    /// An [`Error::Io`].
    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        Self::Io {
            path: path.display().to_string(),
            source,
        }
    }
}

impl From<convex::Error> for Error {
    fn from(error: convex::Error) -> Self {
        Self::Convex(Box::new(error))
    }
}

impl From<optim::Error> for Error {
    fn from(error: optim::Error) -> Self {
        Self::Optim(Box::new(error))
    }
}

/// candle's traits (`Module`, `CustomOp1`) return candle's error: ours travels inside.
impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(inner) => inner,
            Error::Core(inner) => inner.into(),
            Error::Nn(inner) => inner.into(),
            Error::Optim(inner) => (*inner).into(),
            Error::Convex(inner) => (*inner).into(),
            other => candle_core::Error::wrap(other),
        }
    }
}

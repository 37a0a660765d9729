//! The crate's one error type.

/// Result with this crate's [`enum@Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Everything that can go wrong in `thalweg-tensor-core`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An operation of candle failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),

    /// A device string is not one of `cpu`, `cuda`, `cuda:N`, `metal`, `metal:N`.
    #[error("unknown device `{0}`: expected `cpu`, `cuda`, `cuda:N`, `metal` or `metal:N`")]
    UnknownDevice(String),

    /// The device exists, but this build has no code for it.
    #[error("device `{device}` needs a build with the cargo feature `{feature}`")]
    FeatureMissing {
        /// The device that was asked for.
        device: String,
        /// The cargo feature to enable.
        feature: &'static str,
    },

    /// An operation has no implementation for this device, dtype or combination.
    #[error("{operation} is not supported {context}")]
    Unsupported {
        /// What was asked for.
        operation: String,
        /// Where: "on metal", "for dtype U8", ...
        context: String,
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
    #[error("{name} has shape {got:?}, expected {expected:?}")]
    ShapeMismatch {
        /// The tensor.
        name: String,
        /// The shape that was given.
        got: Vec<usize>,
        /// The shape that was needed.
        expected: Vec<usize>,
    },

    /// A tensor has another dtype than needed.
    #[error("{name} has dtype {got:?}, expected {expected}")]
    DTypeMismatch {
        /// The tensor.
        name: String,
        /// The dtype that was given.
        got: candle_core::DType,
        /// What was needed.
        expected: String,
    },

    /// Two variables of one view share their memory.
    #[error("parameters `{first}` and `{second}` share their storage; pass tied weights once")]
    SharedStorage {
        /// One of the two.
        first: String,
        /// The other one.
        second: String,
    },

    /// A gradient holds NaN or infinity.
    #[error("{count} non-finite entries in the gradient of {tensor}")]
    NonFinite {
        /// Name or index of the parameter.
        tensor: String,
        /// How many entries.
        count: u64,
    },

    /// Variables that should receive a gradient and receive none.
    #[error("no gradient arrives at {}: an operation on the way has no backward", .0.join(", "))]
    LostGradient(Vec<String>),

    /// An analytic gradient disagrees with finite differences.
    #[error(
        "gradient of {name} at index {index}: {analytic} by backward, {numeric} by differences"
    )]
    WrongGradient {
        /// The variable.
        name: String,
        /// Flat index of the worst entry.
        index: usize,
        /// The value that backward gave.
        analytic: f64,
        /// The value of the central difference.
        numeric: f64,
    },

    /// An iterative method left the numbers or grew without bound.
    #[error("{method} diverged at iteration {iteration} (residual {residual:e})")]
    Diverged {
        /// The method.
        method: &'static str,
        /// The iteration at which it was noticed.
        iteration: usize,
        /// The residual there.
        residual: f64,
    },

    /// A direction along which a quadratic form that should be positive is negative.
    #[error("{method}: curvature {value:e} at iteration {iteration}: the operator is not positive semi-definite")]
    NegativeCurvature {
        /// The method.
        method: &'static str,
        /// The iteration at which it was noticed.
        iteration: usize,
        /// The Rayleigh quotient along the direction.
        value: f64,
    },

    /// A checkpoint does not fit what it is loaded into.
    #[error("checkpoint does not fit:\n  {}", .0.join("\n  "))]
    CheckpointMismatch(Vec<String>),

    /// A checkpoint was written in a format that this version does not know yet.
    #[error(
        "{path}: checkpoint format {found}, this version reads up to {supported}; update the crate"
    )]
    NewerFormat {
        /// The file.
        path: String,
        /// The format version in the file.
        found: u32,
        /// The newest format version that can be read.
        supported: u32,
    },

    /// A file is not what it should be.
    #[error("{path}: {reason}")]
    BadFile {
        /// The file.
        path: String,
        /// What is wrong with it.
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
}

impl Error {
    /// An [`Error::InvalidArgument`].
    pub fn invalid(name: &'static str, value: impl ToString, expected: impl ToString) -> Self {
        Self::InvalidArgument {
            name,
            value: value.to_string(),
            expected: expected.to_string(),
        }
    }

    /// An [`Error::Unsupported`].
    pub fn unsupported(operation: impl ToString, context: impl ToString) -> Self {
        Self::Unsupported {
            operation: operation.to_string(),
            context: context.to_string(),
        }
    }

    /// An [`Error::Io`] with the file's name.
    pub fn io(path: &std::path::Path, source: std::io::Error) -> Self {
        Self::Io {
            path: path.display().to_string(),
            source,
        }
    }
}

/// candle's traits (`Optimizer`, `Module`) return candle's error: ours travels inside it.
impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(inner) => inner,
            other => candle_core::Error::wrap(other),
        }
    }
}

//! The crate's one error type.

/// Result with this crate's [`enum@Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Everything that can go wrong between a command line and a stored trial.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A name on the command line is not in the registry.
    #[error("unknown {kind} `{name}`: known are {}", .known.join(", "))]
    Unknown {
        /// What was looked up: `scenario`, `crate`, `tag`, `run`, ...
        kind: &'static str,
        /// The name that was given.
        name: String,
        /// All names that would have been found.
        known: Vec<String>,
    },

    /// Two scenarios claim the same slug, or a claim names an arm that does not exist.
    #[error("scenario `{slug}`: {reason}")]
    BadDefinition {
        /// The scenario.
        slug: String,
        /// What contradicts itself.
        reason: String,
    },

    /// The suite or data source is not one this scenario has.
    #[error("scenario `{slug}` {reason}")]
    Unavailable {
        /// The scenario.
        slug: String,
        /// What it lacks, and what it has.
        reason: String,
    },

    /// The results database cannot be read or written.
    #[error("results database {path}: {reason}")]
    Store {
        /// The file.
        path: String,
        /// What went wrong and what to do about it.
        reason: String,
    },

    /// Reading or writing a file failed.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// The error of the operating system.
        source: std::io::Error,
    },

    /// A file does not hold what it should.
    #[error("{path}: {reason}")]
    BadFile {
        /// The file.
        path: String,
        /// What is wrong with it.
        reason: String,
    },

    /// A plot, a page or a table could not be drawn.
    #[error("cannot draw {what}: {reason}")]
    Draw {
        /// The picture or page.
        what: String,
        /// Why not.
        reason: String,
    },

    /// The user asked to stop.
    #[error("interrupted")]
    Cancelled,

    /// A trial ended without a usable number.
    #[error("{0}")]
    Trial(String),

    /// A loss is not finite.
    #[error("the loss is {loss} in epoch {epoch}")]
    Diverged {
        /// The epoch, from 0.
        epoch: usize,
        /// The loss.
        loss: f64,
    },

    /// An operation of candle failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),

    /// An operation of tensor-core failed.
    #[error(transparent)]
    TensorCore(#[from] tensor_core::Error),

    /// Data could not be read or drawn.
    #[error(transparent)]
    Datasets(#[from] datasets::Error),

    /// A layer or loss of nn failed.
    #[error(transparent)]
    Nn(#[from] nn::Error),

    /// A graph, a kernel or a method of graph-learning failed.
    #[cfg(feature = "graph-learning")]
    #[error(transparent)]
    Graph(#[from] graph_learning::Error),

    /// A flow or its sampler failed.
    #[cfg(feature = "flows")]
    #[error(transparent)]
    Flows(#[from] flows::Error),

    /// A guidance rule failed.
    #[cfg(feature = "guidance")]
    #[error(transparent)]
    Guidance(#[from] guidance::Error),

    /// A sampler or an optimizer of sequences failed.
    #[cfg(feature = "sequence-design")]
    #[error(transparent)]
    SequenceDesign(#[from] sequence_design::Error),

    /// An optimizer failed.
    #[error(transparent)]
    Optim(#[from] optim::Error),

    /// A convex solver failed.
    #[cfg(feature = "convex")]
    #[error(transparent)]
    Convex(#[from] convex::Error),
}

impl Error {
    /// An [`Error::Io`] with the file's name.
    pub fn io(path: &std::path::Path, source: std::io::Error) -> Self {
        Self::Io {
            path: path.display().to_string(),
            source,
        }
    }

    /// An [`Error::Draw`].
    pub fn draw(what: impl ToString, reason: impl ToString) -> Self {
        Self::Draw {
            what: what.to_string(),
            reason: reason.to_string(),
        }
    }
}

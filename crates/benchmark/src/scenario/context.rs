//! What a trial is given.

use super::Definition;
use crate::{Error, Result};
use candle_core::Device;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use tensor_core::random::RandomStream;

/// How much is run.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, ValueEnum, Serialize, Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum Suite {
    /// As many of the seeds 0, 1, 2 as fit into the time for one scenario; at least one.
    Quick,
    /// Five seeds or more, none of them 0, 1 or 2: verdicts are made here.
    Standard,
    /// The paper's size; needs `--data` and a GPU.
    Full,
}

impl Suite {
    /// The name on the command line and in the database.
    pub fn name(self) -> &'static str {
        match self {
            Self::Quick => "quick",
            Self::Standard => "standard",
            Self::Full => "full",
        }
    }

    /// The suite of this name.
    pub fn parse(name: &str) -> Option<Self> {
        [Self::Quick, Self::Standard, Self::Full]
            .into_iter()
            .find(|s| s.name() == name)
    }
}

/// Where data comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DataSource {
    /// The data in the binary, or generated from the seed.
    Embedded,
    /// A folder in the layout that the data-sets crate documents.
    Directory(PathBuf),
}

impl DataSource {
    /// The name of the data that `definition` uses from this source: part of a trial's key.
    ///
    /// A scenario without a real form runs on its embedded data whatever the source.
    pub fn name_for(&self, definition: &Definition) -> String {
        match (self, definition.data.real) {
            (Self::Directory(_), Some(real)) => real.to_string(),
            _ => definition.data.embedded.to_string(),
        }
    }

    /// The folder, for a scenario that has a real form.
    pub fn directory_for(&self, definition: &Definition) -> Option<PathBuf> {
        match (self, definition.data.real) {
            (Self::Directory(path), Some(_)) => Some(path.clone()),
            _ => None,
        }
    }
}

/// What one trial is given: seed, streams, device, data, progress and the request to stop.
pub struct TrialContext<'a> {
    /// The seed that pairs the arms.
    pub seed: u64,
    /// How much is run.
    pub suite: Suite,
    /// Where tensors live.
    pub device: Device,
    /// The folder to read data from; `None` = embedded.
    pub data: Option<PathBuf>,
    root: RandomStream,
    progress: &'a (dyn Fn(usize, usize) + Sync),
    cancelled: &'a AtomicBool,
}

impl<'a> TrialContext<'a> {
    /// A context for one trial of the scenario `slug`.
    pub fn new(
        slug: &str,
        seed: u64,
        suite: Suite,
        device: Device,
        data: Option<PathBuf>,
        progress: &'a (dyn Fn(usize, usize) + Sync),
        cancelled: &'a AtomicBool,
    ) -> Self {
        let root = RandomStream::new(seed).split(slug);
        Self {
            seed,
            suite,
            device,
            data,
            root,
            progress,
            cancelled,
        }
    }

    /// The stream for one purpose (`"weights"`, `"batches"`): the same for every arm of a seed.
    pub fn stream(&self, purpose: &str) -> RandomStream {
        self.root.split(purpose)
    }

    /// Says that `done` of `total` steps are behind us; to be called at every step.
    ///
    /// # Errors
    /// [`Error::Cancelled`] when the user asked to stop.
    pub fn step(&self, done: usize, total: usize) -> Result<()> {
        if self.cancelled.load(Ordering::Relaxed) {
            return Err(Error::Cancelled);
        }
        (self.progress)(done, total);
        Ok(())
    }
}

//! Snapshots of a denoiser's variables, in memory or in files.

use crate::error::{Error, Result};
use candle_core::{Device, Tensor, Var};
use std::path::{Path as FilePath, PathBuf};
use tensor_core::checkpoint::{Checkpoint, State};

const KIND: &str = "degradation path";

/// One snapshot.
#[derive(Debug, Clone)]
enum Kept {
    Memory(State),
    File(PathBuf),
}

/// The recorded weights `s'_0 = theta, s'_1, .., s'_N` of a degrading teacher, or those in reverse.
///
/// Snapshots are copies: later training does not change them. A path that was [opened](Self::open)
/// from a folder reads each snapshot when it is loaded, so it costs no memory.
#[derive(Debug, Clone)]
pub struct Path(Vec<Kept>);

fn file_name(index: usize) -> String {
    format!("checkpoint-{index:05}.safetensors")
}

impl Path {
    /// The path of length one of these variables: plain score distillation.
    ///
    /// # Errors
    /// Those of candle.
    pub fn of(vars: &[(String, Var)]) -> Result<Self> {
        let mut path = Self(Vec::new());
        path.record(vars)?;
        Ok(path)
    }

    /// Appends a copy of the variables.
    ///
    /// # Errors
    /// Those of candle.
    pub fn record(&mut self, vars: &[(String, Var)]) -> Result<()> {
        let copy = |(name, var): &(String, Var)| -> Result<(String, Tensor)> {
            Ok((name.clone(), var.as_detached_tensor().copy()?))
        };
        let state = vars.iter().map(copy).collect::<Result<State>>()?;
        self.0.push(Kept::Memory(state));
        Ok(())
    }

    /// Number of snapshots.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none; never, for a path that was made or opened here.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The other direction.
    #[must_use]
    pub fn reversed(&self) -> Self {
        Self(self.0.iter().rev().cloned().collect())
    }

    /// The variables of a snapshot by name, on `device`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when there is no such snapshot; those of the file.
    pub fn state(&self, index: usize, device: &Device) -> Result<State> {
        let kept = self.0.get(index).ok_or_else(|| {
            Error::argument(
                "index of a snapshot",
                index,
                format!("below {}", self.len()),
            )
        })?;
        match kept {
            Kept::Memory(state) => Ok(state.clone()),
            Kept::File(path) => {
                let checkpoint = Checkpoint::load(path, device)?;
                match checkpoint.kind == KIND {
                    true => Ok(checkpoint.tensors),
                    false => {
                        let found = format!("a {} in {}", checkpoint.kind, path.display());
                        Err(Error::argument("snapshot", found, KIND))
                    }
                }
            }
        }
    }

    /// Sets variables to a snapshot; nothing is changed unless all fit.
    ///
    /// # Errors
    /// [`Error::Core`] listing every missing or unexpected variable and every wrong shape or dtype.
    pub fn load_into(&self, index: usize, vars: &[(String, Var)]) -> Result<()> {
        let device = vars
            .first()
            .map_or(Device::Cpu, |(_, v)| v.device().clone());
        let state = self.state(index, &device)?;
        let wanted = vars
            .iter()
            .map(|(name, var)| (name.as_str(), var.shape(), var.dtype()));
        tensor_core::checkpoint::expect_state(&state, wanted)?;
        for (name, var) in vars {
            if let Some(tensor) = state.get(name) {
                var.set(&tensor.to_device(var.device())?)?;
            }
        }
        Ok(())
    }

    /// Writes `checkpoint-00000.safetensors`, ... into a folder, which is made where it is missing.
    ///
    /// # Errors
    /// Those of the files; [`Error::InvalidArgument`] for a folder that holds a path already.
    pub fn save(&self, folder: impl AsRef<FilePath>) -> Result<()> {
        let folder = folder.as_ref();
        std::fs::create_dir_all(folder).map_err(|e| tensor_core::Error::io(folder, e))?;
        if folder.join(file_name(0)).exists() {
            let expected = "a folder without checkpoints";
            return Err(Error::argument("folder", folder.display(), expected));
        }
        // The first one last: a folder whose writing was cut short is no path.
        for index in (0..self.len()).rev() {
            Checkpoint::new(KIND, self.state(index, &Device::Cpu)?)
                .with("index", index)
                .with("length", self.len())
                .save(folder.join(file_name(index)))?;
        }
        Ok(())
    }

    /// The path in a folder. Only its presence is checked; snapshots are read when they are loaded.
    ///
    /// # Errors
    /// Those of the first file; [`Error::InvalidArgument`] naming a file that is missing.
    pub fn open(folder: impl AsRef<FilePath>) -> Result<Self> {
        let folder = folder.as_ref();
        let first = Checkpoint::load(folder.join(file_name(0)), &Device::Cpu)?;
        let files: Vec<PathBuf> = (0..first.number::<usize>("length")?)
            .map(|i| folder.join(file_name(i)))
            .collect();
        if let Some(missing) = files.iter().find(|f| !f.exists()) {
            let expected = format!("{} files of a path", files.len());
            return Err(Error::argument("missing file", missing.display(), expected));
        }
        Ok(Self(files.into_iter().map(Kept::File).collect()))
    }
}

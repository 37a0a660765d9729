//! Checked, resumable downloads (feature `download`).
//!
//! [`fetch`] brings a data set of the [`catalog`] into a folder in the layout of
//! [`data_dir`](crate::data_dir); [`download`] brings any one file. A download goes to `NAME.part`
//! beside the target, is compared with its SHA-256, and only then gets its name, so a file that is
//! there is whole. An interrupted download continues where it stopped, within one call and in the
//! next, where the server knows byte ranges. Proxies are taken from the environment
//! (`HTTPS_PROXY`, `NO_PROXY`).
//!
//! ```no_run
//! use thalweg_datasets::download::{fetch, find};
//!
//! let folder = fetch(find("mnist")?, "/data", &mut |p| {
//!     eprintln!("{}: {} of {:?} bytes", p.file, p.done, p.total);
//! })?;
//! let mnist = thalweg_datasets::mnist(folder)?;
//! # Ok::<(), thalweg_datasets::Error>(())
//! ```

mod catalog;
mod checksum;
mod transfer;
mod unpack;

pub use catalog::{catalog, find, CatalogEntry, Content, RemoteFile};
pub use checksum::{Checksum, Hashed};
pub use transfer::download;

use crate::{Error, Result};
use std::path::{Path, PathBuf};

/// How far a download is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress<'a> {
    /// Name of the file.
    pub file: &'a str,
    /// Bytes that have arrived, those of earlier attempts included.
    pub done: u64,
    /// Bytes of the whole file, where the server tells.
    pub total: Option<u64>,
}

/// Brings all files of a data set into its folder under `root` and returns the folder. Files that
/// are there already are checked (single files by SHA-256, unpacked ones by size) and left alone.
///
/// # Errors
/// [`Error::Network`] (what has arrived is kept), [`Error::Checksum`], [`Error::Busy`],
/// [`Error::Io`], [`Error::BadFile`] for an archive without the expected files.
pub fn fetch(
    entry: &CatalogEntry,
    root: impl AsRef<Path>,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<PathBuf> {
    let folder = root.as_ref().join(entry.folder);
    std::fs::create_dir_all(&folder).map_err(|e| Error::io(&folder, e))?;
    for remote in entry.files {
        let target = folder.join(remote.name);
        let mut report = |done, total| {
            progress(Progress {
                file: remote.name,
                done,
                total,
            });
        };
        let checksum = remote.checksum();
        match remote.content {
            Content::Gzip { .. } | Content::Plain => {
                download(remote.urls, &target, checksum, &mut report)?;
            }
            Content::TarGz { members } if unpack::complete(&folder, members) => {
                tracing::debug!(file = remote.name, "already unpacked");
            }
            Content::TarGz { members } => {
                download(remote.urls, &target, checksum, &mut report)?;
                unpack::unpack(&target, &folder, members)?;
                std::fs::remove_file(&target).map_err(|e| Error::io(&target, e))?;
            }
        }
    }
    Ok(folder)
}

//! Loaders of the file formats that data really comes in.
//!
//! Every loader checks before it believes: a missing, truncated, over-long or foreign file is an
//! error that names the file and what was expected, and no memory is reserved on the word of a
//! header alone.

pub mod cifar;
pub mod idx;
pub mod npy;
pub mod table;
pub mod tfbind;

use crate::{Error, Result};
use flate2::read::MultiGzDecoder;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

/// Opens a file for reading, [`decompressed`].
pub(crate) fn open(path: &Path) -> Result<Box<dyn Read>> {
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    let reader = BufReader::with_capacity(1 << 16, file);
    decompressed(reader).map_err(|e| Error::io(path, e))
}

/// The content of a stream: gzip is recognised by its first two bytes, not by a name.
pub(crate) fn decompressed<'a>(
    mut reader: impl BufRead + 'a,
) -> std::io::Result<Box<dyn Read + 'a>> {
    if reader.fill_buf()?.starts_with(&[0x1f, 0x8b]) {
        Ok(Box::new(MultiGzDecoder::new(reader)))
    } else {
        Ok(Box::new(reader))
    }
}

/// Reads exactly `size` bytes and the end of the file. The buffer grows with what arrives, so a
/// header that promises too much costs nothing.
pub(crate) fn read_to_end_exact(path: &Path, reader: impl Read, size: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = reader.take(size.saturating_add(1)).read_to_end(&mut bytes);
    let found = bytes.len() as u64;
    let expected = format!("{size} bytes");
    let path_name = || path.display().to_string();
    match read {
        // A gzip stream that is cut off ends with this error.
        Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => Err(Error::Truncated {
            path: path_name(),
            found,
            expected,
        }),
        Err(e) => Err(Error::io(path, e)),
        Ok(_) if found < size => Err(Error::Truncated {
            path: path_name(),
            found,
            expected,
        }),
        Ok(_) if found > size => Err(Error::TooLong {
            path: path_name(),
            found,
            expected,
        }),
        Ok(_) => Ok(bytes),
    }
}

/// Where each of `names` lies in one of `folders`, plain or with `.gz` appended.
///
/// # Errors
/// [`Error::MissingFiles`] with all names that are nowhere.
pub(crate) fn locate(
    dataset: &'static str,
    folders: &[PathBuf],
    names: &[&str],
) -> Result<Vec<PathBuf>> {
    let found = |name: &str| {
        let candidates = folders
            .iter()
            .flat_map(|folder| [folder.join(name), folder.join(format!("{name}.gz"))]);
        candidates.into_iter().find(|path| path.is_file())
    };
    let paths: Vec<Option<PathBuf>> = names.iter().map(|name| found(name)).collect();
    let missing: Vec<String> = names
        .iter()
        .zip(&paths)
        .filter(|(_, path)| path.is_none())
        .map(|(name, _)| (*name).to_string())
        .collect();
    if missing.is_empty() {
        return Ok(paths.into_iter().flatten().collect());
    }
    let dir = folders.first().map(|f| f.display().to_string());
    Err(Error::MissingFiles {
        dataset,
        dir: dir.unwrap_or_default(),
        missing,
    })
}

//! Taking known files out of an archive.

use crate::{Error, Result};
use flate2::read::GzDecoder;
use std::fs::File;
use std::io::{BufReader, Read, Write};
use std::path::{Path, PathBuf};

/// Where a member of an archive is stored: in `folder`, without the archive's own folders.
fn place(folder: &Path, member: &str) -> PathBuf {
    folder.join(member.rsplit('/').next().unwrap_or(member))
}

/// True when all members lie in `folder` with their sizes.
pub(super) fn complete(folder: &Path, members: &[(&str, u64)]) -> bool {
    members.iter().all(|(name, bytes)| {
        let file = place(folder, name).metadata();
        file.is_ok_and(|file| file.is_file() && file.len() == *bytes)
    })
}

/// Takes `members` out of a `.tar.gz` archive into `folder`. Nothing else is unpacked, and no name
/// from the archive is ever used as a path.
pub(super) fn unpack(archive: &Path, folder: &Path, members: &[(&str, u64)]) -> Result<()> {
    let file = File::open(archive).map_err(|e| Error::io(archive, e))?;
    let mut tar = tar::Archive::new(GzDecoder::new(BufReader::new(file)));
    let bad = |e: std::io::Error| Error::bad_file(archive, e);
    let mut missing: Vec<&(&str, u64)> = members.iter().collect();
    for entry in tar.entries().map_err(bad)? {
        let entry = entry.map_err(bad)?;
        let path = entry.path_bytes();
        let found = missing
            .iter()
            .position(|(name, _)| name.as_bytes() == &*path);
        let Some((name, bytes)) = found.map(|i| missing.swap_remove(i)) else {
            continue;
        };
        drop(path);
        store(archive, &place(folder, name), name, *bytes, entry)?;
    }
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<&str> = missing.iter().map(|(name, _)| *name).collect();
    let reason = format!("the archive lacks {}", names.join(", "));
    Err(Error::bad_file(archive, reason))
}

/// Writes one member to a temporary file and gives it its name when it is whole.
fn store(archive: &Path, target: &Path, name: &str, bytes: u64, entry: impl Read) -> Result<()> {
    let folder = target.parent().unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(folder).map_err(|e| Error::io(folder, e))?;
    let mut reader = entry.take(bytes.saturating_add(1));
    let mut buffer = vec![0; 1 << 16];
    let mut copied = 0;
    loop {
        let n = match reader.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(Error::bad_file(archive, format!("{name}: {e}"))),
        };
        file.write_all(&buffer[..n])
            .map_err(|e| Error::io(target, e))?;
        copied += n as u64;
    }
    if copied != bytes {
        let reason = format!("{name} has {copied} bytes: expected {bytes}");
        return Err(Error::bad_file(archive, reason));
    }
    file.as_file()
        .sync_all()
        .map_err(|e| Error::io(target, e))?;
    file.persist(target)
        .map_err(|e| Error::io(target, e.error))?;
    Ok(())
}

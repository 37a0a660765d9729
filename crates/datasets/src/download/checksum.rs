//! Comparing a file with its published SHA-256.

use crate::load::decompressed;
use crate::{Error, Result};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{BufReader, Read, Seek};
use std::path::Path;

/// What a file must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checksum<'a> {
    /// SHA-256 in hexadecimal digits.
    pub sha256: &'a str,
    /// Of which bytes.
    pub of: Hashed,
}

/// The bytes that a [`Checksum`] is taken of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hashed {
    /// The file as it is.
    File,
    /// What the gzip file decompresses to, which has this size.
    Decompressed {
        /// Size after decompression.
        bytes: u64,
    },
}

impl Checksum<'_> {
    /// Compares an open file, read from its start; `path` is its name for messages.
    ///
    /// # Errors
    /// [`Error::Checksum`] when the bytes differ, [`Error::Io`].
    pub fn verify(&self, path: &Path, mut file: &File) -> Result<()> {
        file.rewind().map_err(|e| Error::io(path, e))?;
        let reader = BufReader::with_capacity(1 << 16, file);
        let found = match self.of {
            Hashed::File => hash(reader).map_err(|e| Error::io(path, e))?,
            // A stream that does not decompress, or to too much, is not the file either.
            Hashed::Decompressed { bytes } => decompressed(reader)
                .and_then(|stream| hash(stream.take(bytes.saturating_add(1))))
                .unwrap_or_else(|e| format!("not computable ({e})")),
        };
        if found.eq_ignore_ascii_case(self.sha256) {
            return Ok(());
        }
        Err(Error::Checksum {
            path: path.display().to_string(),
            found,
            expected: self.sha256.to_string(),
        })
    }
}

fn hash(mut reader: impl Read) -> std::io::Result<String> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        match reader.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => hash.update(&buffer[..n]),
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect())
}

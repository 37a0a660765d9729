//! A piece of English prose and verse inside this crate: text for language models without a download.
//!
//! The beginning of a collection of William Shakespeare's plays, which are in the public domain.

use crate::{Error, Result};
use flate2::read::GzDecoder;
use std::io::Read;
use std::path::Path;

/// Characters of [`shakespeare`], all of them ASCII.
pub const CHARACTERS: usize = 199_995;

static PACKED: &[u8] = include_bytes!("../assets/shakespeare.txt.gz");

/// The text, in ASCII.
///
/// ```
/// let text = thalweg_datasets::text::shakespeare()?;
/// assert!(text.starts_with("First Citizen:\nBefore we proceed any further, hear me speak.\n"));
/// # Ok::<(), thalweg_datasets::Error>(())
/// ```
///
/// # Errors
/// [`Error::BadFile`] if the embedded bytes are damaged.
pub fn shakespeare() -> Result<String> {
    let mut text = String::with_capacity(CHARACTERS);
    let damaged = |reason: String| Error::bad_file(Path::new("assets/shakespeare.txt.gz"), reason);
    GzDecoder::new(PACKED)
        .read_to_string(&mut text)
        .map_err(|e| damaged(e.to_string()))?;
    if text.len() != CHARACTERS {
        return Err(damaged(format!("{} characters", text.len())));
    }
    Ok(text)
}

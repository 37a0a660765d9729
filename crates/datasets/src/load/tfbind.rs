//! Tables of protein-binding microarrays: how strongly a transcription factor binds each DNA 8-mer.
//!
//! Tab-separated text with a header: an 8-mer, its reverse complement, and the scores `E-score`,
//! `Median` and `Z-score` that both strands share.

use super::open;
use crate::{Error, Result};
use csv::{ReaderBuilder, StringRecord};
use std::path::Path;

/// Letters of a sequence.
pub const LENGTH: usize = 8;

/// The letters by their code: `A`, `C`, `G`, `T` are 0 to 3.
pub const LETTERS: [u8; 4] = *b"ACGT";

/// Scores of 8-mers.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct BindingTable {
    /// Both strands of every row, one after the other, as codes.
    pub sequences: Vec<[u8; LENGTH]>,
    /// The E-score of each: a rank statistic between -0.5 and 0.5, higher binds better.
    pub scores: Vec<f64>,
}

/// Reads a table, gzipped or not. A sequence that is its own reverse complement occurs once.
///
/// # Errors
/// [`Error::BadFile`] that names the row with other letters than `ACGT`, another length, a second
/// strand that is not the reverse complement of the first, or a score that is no number; for a file
/// without rows.
///
/// ```
/// use thalweg_datasets::load::tfbind::read_binding;
/// # let dir = tempfile::tempdir().unwrap();
/// # let path = dir.path().join("table.txt");
/// # std::fs::write(&path, "8-mer\t8-mer\tE-score\tMedian\tZ-score\nAAAAAAAC\tGTTTTTTT\t-0.12\t65293.2\t0.28\n").unwrap();
/// let table = read_binding(&path)?;
/// assert_eq!(table.sequences, [[0, 0, 0, 0, 0, 0, 0, 1], [2, 3, 3, 3, 3, 3, 3, 3]]);
/// assert_eq!(table.scores, [-0.12, -0.12]);
/// # Ok::<(), thalweg_datasets::Error>(())
/// ```
pub fn read_binding(path: impl AsRef<Path>) -> Result<BindingTable> {
    let path = path.as_ref();
    let mut reader = ReaderBuilder::new()
        .delimiter(b'\t')
        .from_reader(open(path)?);
    let mut table = BindingTable::default();
    for (row, record) in reader.records().enumerate() {
        let bad = |what: String| Error::bad_file(path, format!("row {}: {what}", row + 1));
        let record = record.map_err(|e| bad(e.to_string()))?;
        let (first, second, score) = parse(&record).map_err(bad)?;
        table.sequences.push(first);
        table.scores.push(score);
        if second != first {
            table.sequences.push(second);
            table.scores.push(score);
        }
    }
    match table.scores.is_empty() {
        true => Err(Error::bad_file(path, "a table without rows")),
        false => Ok(table),
    }
}

type Row = ([u8; LENGTH], [u8; LENGTH], f64);

fn parse(record: &StringRecord) -> std::result::Result<Row, String> {
    let cell = |i: usize| {
        record
            .get(i)
            .ok_or_else(|| format!("{} columns: expected at least 3", record.len()))
    };
    let (first, second) = (codes(cell(0)?)?, codes(cell(1)?)?);
    let mut reverse = first.map(|c| 3 - c);
    reverse.reverse();
    if reverse != second {
        let strands = (cell(0)?, cell(1)?);
        return Err(format!(
            "{} is not the other strand of {}",
            strands.1, strands.0
        ));
    }
    let text = cell(2)?.trim();
    let score = text.parse::<f64>().ok().filter(|s| s.is_finite());
    let score = score.ok_or_else(|| format!("the E-score `{text}` is no number"))?;
    Ok((first, second, score))
}

fn codes(text: &str) -> std::result::Result<[u8; LENGTH], String> {
    let code = |byte: u8| LETTERS.iter().position(|l| *l == byte);
    let found: Option<Vec<u8>> = text.bytes().map(|b| code(b).map(|c| c as u8)).collect();
    found
        .and_then(|codes| codes.try_into().ok())
        .ok_or_else(|| format!("`{text}`: expected {LENGTH} of the letters ACGT"))
}

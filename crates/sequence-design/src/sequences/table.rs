//! Tables of sequences and scores as CSV.

use super::{Alphabet, Ambiguous, Record};
use crate::{Error, Result};
use csv::{ReaderBuilder, StringRecord, Trim, WriterBuilder};
use std::io::{Read, Write};

/// Which columns of a table to read, by their names in its first line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Columns {
    /// The column of names; rows are called by their number without one.
    pub name: Option<String>,
    /// The column of sequences.
    pub sequence: String,
    /// The columns of scores; may be none.
    pub scores: Vec<String>,
    /// The byte between two cells.
    pub delimiter: u8,
}

impl Default for Columns {
    fn default() -> Self {
        Self {
            name: None,
            sequence: "sequence".into(),
            scores: vec!["score".into()],
            delimiter: b',',
        }
    }
}

/// Sequences with their scores.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Table {
    /// The sequences.
    pub records: Vec<Record>,
    /// The scores of each, in the order of [`Columns::scores`].
    pub scores: Vec<Vec<f64>>,
}

impl Table {
    /// The codes of all sequences.
    pub fn codes(&self) -> Vec<Vec<u8>> {
        self.records.iter().map(|r| r.codes.clone()).collect()
    }

    /// One score of every sequence.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a score that some row lacks.
    pub fn column(&self, score: usize) -> Result<Vec<f64>> {
        let one = |row: &Vec<f64>| {
            row.get(score).copied().ok_or_else(|| {
                let expected = format!("below {}, the scores of a row", row.len());
                Error::argument("score", score, expected)
            })
        };
        self.scores.iter().map(one).collect()
    }
}

/// Reads a table whose first line names its columns.
///
/// ```
/// use thalweg_sequence_design::sequences::{read_table, Alphabet, Ambiguous, Columns};
///
/// let text = "id,sequence,score\nfirst,ACGT,0.5\nsecond,GGGA,-1\n";
/// let columns = Columns { name: Some("id".into()), ..Columns::default() };
/// let table = read_table(text.as_bytes(), &Alphabet::dna(), Ambiguous::Refuse, &columns)?;
/// assert_eq!(table.records[1].name, "second");
/// assert_eq!(table.column(0)?, [0.5, -1.0]);
/// # Ok::<(), thalweg_sequence_design::Error>(())
/// ```
///
/// # Errors
/// [`Error::Format`] for a column that is not there, rows of unequal length, a score that is no finite
/// number (with row and column), a table without rows; [`Error::Sequence`] for a sequence that is
/// empty or has bytes that are no letters.
pub fn read_table(
    reader: impl Read,
    alphabet: &Alphabet,
    ambiguous: Ambiguous,
    columns: &Columns,
) -> Result<Table> {
    let mut reader = ReaderBuilder::new()
        .delimiter(columns.delimiter)
        .trim(Trim::All)
        .from_reader(reader);
    let bad = |reason: String| Error::format("a table", reason);
    let header = reader.headers().map_err(|e| bad(e.to_string()))?.clone();
    let place = |name: &String| {
        let found = header.iter().position(|h| h == name);
        found.ok_or_else(|| {
            let known: Vec<&str> = header.iter().collect();
            bad(format!("no column `{name}` among {}", known.join(", ")))
        })
    };
    let name = columns.name.as_ref().map(place).transpose()?;
    let sequence = place(&columns.sequence)?;
    let scores: Result<Vec<usize>> = columns.scores.iter().map(place).collect();
    let scores = scores?;
    let mut table = Table::default();
    for (row, line) in reader.records().enumerate() {
        let line: StringRecord = line.map_err(|e| bad(e.to_string()))?;
        let cell = |k: usize| line.get(k).unwrap_or_default();
        let name = name.map_or_else(|| format!("row {}", row + 1), |k| cell(k).to_string());
        let codes = alphabet.encode(cell(sequence), &name, ambiguous)?;
        if codes.is_empty() {
            return Err(Error::sequence(&name, 0, "a sequence without letters"));
        }
        let number = |k: &usize| {
            let parsed = cell(*k).parse::<f64>().ok().filter(|s| s.is_finite());
            parsed.ok_or_else(|| {
                let (text, column) = (cell(*k), &header[*k]);
                bad(format!(
                    "row {}: {column} = `{text}` is no finite number",
                    row + 1
                ))
            })
        };
        table
            .scores
            .push(scores.iter().map(number).collect::<Result<_>>()?);
        table.records.push(Record {
            name,
            codes,
            ..Record::default()
        });
    }
    match table.records.is_empty() {
        true => Err(bad("no rows".into())),
        false => Ok(table),
    }
}

/// Writes a table with the columns `name`, that of the sequences, and those of the scores.
///
/// # Errors
/// [`Error::Shape`] for other numbers of scores than of columns or of rows than of sequences;
/// [`Error::InvalidArgument`] for codes outside the alphabet; [`Error::Format`] for a stream that
/// takes no more.
pub fn write_table(
    out: impl Write,
    alphabet: &Alphabet,
    table: &Table,
    columns: &Columns,
) -> Result<()> {
    if table.scores.len() != table.records.len() {
        let expected = format!("[{}], one row a sequence", table.records.len());
        return Err(Error::shape("scores", &[table.scores.len()], expected));
    }
    let bad = |e: csv::Error| Error::format("a table", e);
    let mut writer = WriterBuilder::new()
        .delimiter(columns.delimiter)
        .from_writer(out);
    let name = columns.name.as_deref().unwrap_or("name");
    let header = [name, &columns.sequence];
    let header = header
        .into_iter()
        .chain(columns.scores.iter().map(String::as_str));
    writer.write_record(header).map_err(bad)?;
    for (record, scores) in table.records.iter().zip(&table.scores) {
        if scores.len() != columns.scores.len() {
            let expected = format!("[{}], as many as columns", columns.scores.len());
            return Err(Error::shape("scores of a row", &[scores.len()], expected));
        }
        let mut row = vec![record.name.clone(), alphabet.decode(&record.codes)?];
        row.extend(scores.iter().map(f64::to_string));
        writer.write_record(&row).map_err(bad)?;
    }
    writer.flush().map_err(|e| Error::format("a table", e))
}

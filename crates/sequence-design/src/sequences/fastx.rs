//! FASTA and FASTQ.

use super::{Alphabet, Ambiguous};
use crate::{Error, Result};
use needletail::parser::LineEnding;
use std::io::{Read, Write};
use std::path::Path;

/// One sequence with its name.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Record {
    /// The first word of the header.
    pub name: String,
    /// The rest of the header.
    pub description: String,
    /// The letters by their codes in the alphabet.
    pub codes: Vec<u8>,
    /// FASTQ's Phred score of each letter: `-10 log10` of the chance that it is wrong.
    pub quality: Option<Vec<u8>>,
}

/// Where FASTQ's scores begin.
const PHRED: u8 = 33;
/// The largest score that a printable character can say.
const BEST: u8 = b'~' - PHRED;

impl Record {
    /// The codes with a mask wherever the quality is below a score; those themselves where no quality
    /// is known.
    pub fn masked_below(&self, score: u8, alphabet: &Alphabet) -> Vec<u8> {
        let Some(quality) = &self.quality else {
            return self.codes.clone();
        };
        let sure = |(code, q): (&u8, &u8)| if *q < score { alphabet.mask() } else { *code };
        self.codes.iter().zip(quality).map(sure).collect()
    }

    fn header(&self) -> Result<String> {
        let header = match self.description.is_empty() {
            true => self.name.clone(),
            false => format!("{} {}", self.name, self.description),
        };
        match header.contains(['\n', '\r']) {
            false => Ok(header),
            true => Err(Error::argument("header", header, "one line")),
        }
    }
}

/// Reads FASTA or FASTQ, gzipped or not: whichever it is. Sequences may be spread over lines, and
/// letters of DNA, RNA and proteins may be in lower case.
///
/// # Errors
/// [`Error::Format`] for text that is neither, with the line where there is one; [`Error::Sequence`]
/// with the name of a record that is empty, or with the place of a byte that is no letter of the
/// alphabet.
pub fn read_fastx(
    reader: impl Read + Send,
    alphabet: &Alphabet,
    ambiguous: Ambiguous,
) -> Result<Vec<Record>> {
    let broken = |e: needletail::errors::ParseError| Error::format("FASTA or FASTQ", e);
    let mut reader = needletail::parse_fastx_reader(reader).map_err(broken)?;
    let mut records = vec![];
    while let Some(found) = reader.next() {
        let found = found.map_err(broken)?;
        let header = String::from_utf8_lossy(found.id()).into_owned();
        let (name, description) = match header.split_once(char::is_whitespace) {
            Some((name, rest)) => (name.to_string(), rest.trim().to_string()),
            None => (header, String::new()),
        };
        let codes = alphabet.encode(found.seq(), &name, ambiguous)?;
        if codes.is_empty() {
            return Err(Error::sequence(&name, 0, "a sequence without letters"));
        }
        let phred = |(i, byte): (usize, &u8)| {
            let score = byte.checked_sub(PHRED).filter(|q| *q <= BEST);
            let reason = format!("`{}` is no quality", byte.escape_ascii());
            score.ok_or_else(|| Error::sequence(&name, i, reason))
        };
        let quality = found
            .qual()
            .map(|q| q.iter().enumerate().map(phred).collect());
        records.push(Record {
            quality: quality.transpose()?,
            name,
            description,
            codes,
        });
    }
    Ok(records)
}

/// [`read_fastx`] of a file.
///
/// # Errors
/// [`Error::Format`] for a file that cannot be opened; those of [`read_fastx`].
pub fn read_fastx_file(
    path: impl AsRef<Path>,
    alphabet: &Alphabet,
    ambiguous: Ambiguous,
) -> Result<Vec<Record>> {
    let path = path.as_ref();
    let file = std::fs::File::open(path).map_err(|e| Error::format(path.display(), e))?;
    read_fastx(file, alphabet, ambiguous)
}

/// Writes FASTA, a line a sequence.
///
/// # Errors
/// [`Error::InvalidArgument`] for codes outside the alphabet or a header of several lines;
/// [`Error::Format`] for a stream that takes no more.
pub fn write_fasta(out: &mut impl Write, alphabet: &Alphabet, records: &[Record]) -> Result<()> {
    for record in records {
        let (header, text) = (record.header()?, alphabet.decode(&record.codes)?);
        needletail::parser::write_fasta(header.as_bytes(), text.as_bytes(), out, LineEnding::Unix)
            .map_err(|e| Error::format("FASTA", e))?;
    }
    Ok(())
}

/// Writes FASTQ.
///
/// # Errors
/// As [`write_fasta`], and [`Error::InvalidArgument`] for a record without a score from 0 to 93 for
/// each letter.
pub fn write_fastq(out: &mut impl Write, alphabet: &Alphabet, records: &[Record]) -> Result<()> {
    for record in records {
        let (header, text) = (record.header()?, alphabet.decode(&record.codes)?);
        let quality = record.quality.as_deref().unwrap_or(&[]);
        if quality.len() != record.codes.len() || quality.iter().any(|q| *q > BEST) {
            let expected = format!(
                "a quality of 0 to {BEST} for each of {} letters",
                text.len()
            );
            return Err(Error::argument("record", &record.name, expected));
        }
        let quality: Vec<u8> = quality.iter().map(|q| q + PHRED).collect();
        let (header, text) = (header.as_bytes(), text.as_bytes());
        needletail::parser::write_fastq(header, text, Some(&quality), out, LineEnding::Unix)
            .map_err(|e| Error::format("FASTQ", e))?;
    }
    Ok(())
}

//! Sequences in and out: alphabets with their ambiguity codes, FASTA, FASTQ and CSV files, tokens and
//! one-hot numbers.
//!
//! For whoever has a file of sequences and wants the numbers that the rest of this crate takes, and
//! designs back in a file. A letter is its *code*, its place in the [`Alphabet`]; the code behind the
//! last letter is the mask ([`Alphabet::mask`]), which is also the mask of
//! [`masked_diffusion`](crate::masked_diffusion). Files are parsed by `needletail` and `csv`.
//!
//! | you have | you want | |
//! | --- | --- | --- |
//! | FASTA or FASTQ, gzipped or not | codes with names | [`read_fastx`] |
//! | a table of sequences and scores | the same, with the scores | [`read_table`] |
//! | codes `[L]` | tokens `[B, L]` for [`MaskedDiffusion`](crate::masked_diffusion::MaskedDiffusion) | [`Alphabet::tokens`] |
//! | its samples | codes again | [`Alphabet::codes`] |
//! | codes, masks among them | `[B, L, K]` for a predictor | [`Alphabet::one_hot`] |
//! | text with ambiguity codes | the same, each code spread over what it stands for | [`Alphabet::soft_one_hot`] |
//! | designs | a file | [`write_fasta`], [`write_fastq`], [`write_table`] |
//!
//! ```
//! use thalweg_sequence_design::sequences::{read_fastx, write_fasta, Alphabet, Ambiguous};
//!
//! let dna = Alphabet::dna();
//! let file = ">left a comment\nACG\nTn\n>right\nGATTA\n";
//! let records = read_fastx(file.as_bytes(), &dna, Ambiguous::Mask)?;
//! assert_eq!((records[0].name.as_str(), records[0].description.as_str()), ("left", "a comment"));
//! assert_eq!(records[0].codes, [0, 1, 2, 3, 4]); // N is the mask, number 4
//! assert_eq!(dna.reverse_complement(&records[1].codes)?, dna.encode("TAATC", "right", Ambiguous::Refuse)?);
//!
//! // Where a mask is no use, a letter that is not one is an error that says where.
//! let error = read_fastx(file.as_bytes(), &dna, Ambiguous::Refuse).unwrap_err();
//! assert_eq!(error.to_string(), "left, position 5: `n` stands for several letters of ACGT");
//!
//! let mut out = vec![];
//! write_fasta(&mut out, &dna, &records)?;
//! assert_eq!(out, b">left a comment\nACGTN\n>right\nGATTA\n");
//! # Ok::<(), thalweg_sequence_design::Error>(())
//! ```

mod alphabet;
mod fastx;
mod table;

pub use alphabet::{Alphabet, Ambiguous};
pub use fastx::{read_fastx, read_fastx_file, write_fasta, write_fastq, Record};
pub use table::{read_table, write_table, Columns, Table};

//! Tables as text: CSV and its relatives.
//!
//! Every column but one is a feature and must be a finite number in every row; the remaining one
//! is the class or the target.
//!
//! ```
//! use thalweg_datasets::load::table::{read_classification, Column, CsvOptions};
//! # let dir = tempfile::tempdir().unwrap();
//! # let path = dir.path().join("iris.csv");
//! # std::fs::write(&path, "length,width,kind\n5.1,3.5,setosa\n6.2,2.8,virginica\n").unwrap();
//! let options = CsvOptions { answer: Column::Name("kind".into()), ..Default::default() };
//! let table = read_classification(&path, &options)?;
//! assert_eq!((table.data.len(), table.data.classes), (2, 2));
//! assert_eq!(table.classes, ["setosa", "virginica"]);
//! # Ok::<(), thalweg_datasets::Error>(())
//! ```

use super::open;
use crate::{Classification, Error, Regression, Result};
use candle_core::{DType, Device, Tensor};
use csv::{ReaderBuilder, StringRecord, Trim};
use std::path::Path;

/// A column of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Column {
    /// By its name in the header.
    Name(String),
    /// By its place, counted from 0.
    Index(usize),
    /// The last one.
    Last,
}

/// How to read a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CsvOptions {
    /// The first line holds the names of the columns. Default: true.
    pub header: bool,
    /// The byte between two cells. Default: a comma.
    pub delimiter: u8,
    /// The class or the target. Default: the last column.
    pub answer: Column,
    /// Float dtype of the inputs and targets. Default: `F32`.
    pub dtype: DType,
}

impl Default for CsvOptions {
    fn default() -> Self {
        Self {
            header: true,
            delimiter: b',',
            answer: Column::Last,
            dtype: DType::F32,
        }
    }
}

/// A table whose answer is a class.
#[derive(Debug, Clone)]
pub struct ClassTable {
    /// Inputs `[n, features]` and labels.
    pub data: Classification,
    /// Names of the features; their indices where the table has no header.
    pub features: Vec<String>,
    /// Names of the classes by label: in numeric order where all are integers, else in
    /// alphabetical order.
    pub classes: Vec<String>,
}

/// A table whose answer is a number.
#[derive(Debug, Clone)]
pub struct TargetTable {
    /// Inputs `[n, features]` and targets `[n]`.
    pub data: Regression,
    /// Names of the features; their indices where the table has no header.
    pub features: Vec<String>,
}

/// Reads a table (plain or gzip) whose answer is a class; any text may be a class.
///
/// # Errors
/// [`Error::Io`], [`Error::UnknownColumn`], [`Error::Cell`] for a feature that is not a finite
/// number (`NaN` included) and for an empty class, [`Error::BadFile`] for rows of different
/// lengths, no rows, no features, or text that is not UTF-8; [`Error::InvalidArgument`] for an
/// integer dtype.
pub fn read_classification(path: impl AsRef<Path>, options: &CsvOptions) -> Result<ClassTable> {
    let class = |cell: &str| (!cell.is_empty()).then(|| cell.to_string());
    let table = Table::read(path.as_ref(), options, "a class", class)?;
    let mut classes = table.answers.clone();
    let integer = |class: &String| class.parse::<i64>().ok();
    if classes.iter().all(|class| integer(class).is_some()) {
        // "7" and "07" are one number but two names: the name decides between them.
        classes.sort_by_cached_key(|class| (integer(class), class.clone()));
    } else {
        classes.sort();
    }
    classes.dedup();
    let place: std::collections::HashMap<&String, u32> = classes.iter().zip(0..).collect();
    let labels: Vec<u32> = table
        .answers
        .iter()
        .filter_map(|a| place.get(a).copied())
        .collect();
    let labels = Tensor::from_vec(labels, table.answers.len(), &Device::Cpu)?;
    let data = Classification::new(table.inputs(options.dtype)?, labels, classes.len())?;
    Ok(ClassTable {
        data,
        features: table.features,
        classes,
    })
}

/// Reads a table (plain or gzip) whose answer is a number.
///
/// # Errors
/// Those of [`read_classification`], and [`Error::Cell`] for a target that is not a finite number.
pub fn read_regression(path: impl AsRef<Path>, options: &CsvOptions) -> Result<TargetTable> {
    let table = Table::read(path.as_ref(), options, FINITE, number)?;
    let targets = Tensor::from_slice(&table.answers, table.answers.len(), &Device::Cpu)?;
    let targets = targets.to_dtype(options.dtype)?;
    Ok(TargetTable {
        data: Regression::new(table.inputs(options.dtype)?, targets)?,
        features: table.features,
    })
}

/// What a feature and a target must be.
const FINITE: &str = "a finite number";

fn number(cell: &str) -> Option<f64> {
    cell.parse().ok().filter(|x: &f64| x.is_finite())
}

/// The cells of a table, parsed.
struct Table<A> {
    features: Vec<String>,
    values: Vec<f64>,
    answers: Vec<A>,
}

impl<A> Table<A> {
    fn read(
        path: &Path,
        options: &CsvOptions,
        answer_expected: &'static str,
        parse_answer: impl Fn(&str) -> Option<A>,
    ) -> Result<Self> {
        if !options.dtype.is_float() {
            return Err(Error::invalid(
                "dtype",
                options.dtype.as_str(),
                "a float dtype",
            ));
        }
        let mut reader = ReaderBuilder::new()
            .has_headers(options.header)
            .delimiter(options.delimiter)
            .trim(Trim::All)
            .from_reader(open(path)?);
        let mut names: Option<Vec<String>> = None;
        if options.header {
            let header = reader.headers().map_err(|e| csv_error(path, e))?;
            names = Some(header.iter().map(str::to_string).collect());
        }
        let mut record = StringRecord::new();
        let mut columns: Option<(usize, usize)> = None;
        let (mut values, mut answers) = (Vec::new(), Vec::new());
        while reader
            .read_record(&mut record)
            .map_err(|e| csv_error(path, e))?
        {
            let (width, answer) = match columns {
                Some(known) => known,
                None => {
                    let names = names
                        .get_or_insert_with(|| (0..record.len()).map(|i| i.to_string()).collect());
                    let found = (record.len(), find(path, options, names)?);
                    *columns.insert(found)
                }
            };
            let line = record.position().map_or(0, csv::Position::line);
            for (i, cell) in record.iter().enumerate().take(width) {
                let bad = |expected| Error::Cell {
                    path: path.display().to_string(),
                    line,
                    column: names.as_ref().map_or_else(String::new, |n| n[i].clone()),
                    value: cell.to_string(),
                    expected,
                };
                if i == answer {
                    answers.push(parse_answer(cell).ok_or_else(|| bad(answer_expected))?);
                } else {
                    values.push(number(cell).ok_or_else(|| bad(FINITE))?);
                }
            }
        }
        let (Some((width, answer)), Some(mut features)) = (columns, names) else {
            return Err(Error::bad_file(path, "no rows: expected at least one"));
        };
        if width < 2 {
            return Err(Error::bad_file(
                path,
                "one column: expected a feature beside it",
            ));
        }
        features.remove(answer);
        Ok(Self {
            features,
            values,
            answers,
        })
    }

    fn inputs(&self, dtype: DType) -> Result<Tensor> {
        let shape = (self.answers.len(), self.features.len());
        Ok(Tensor::from_slice(&self.values, shape, &Device::Cpu)?.to_dtype(dtype)?)
    }
}

/// Index of the answer's column.
fn find(path: &Path, options: &CsvOptions, names: &[String]) -> Result<usize> {
    let found = match &options.answer {
        Column::Last => names.len().checked_sub(1),
        Column::Index(i) => Some(*i).filter(|i| *i < names.len()),
        Column::Name(name) if options.header => names.iter().position(|n| n == name),
        Column::Name(_) => None,
    };
    found.ok_or_else(|| Error::UnknownColumn {
        path: path.display().to_string(),
        column: match &options.answer {
            Column::Name(name) => format!("`{name}`"),
            Column::Index(i) => i.to_string(),
            Column::Last => "at all".to_string(),
        },
        available: if options.header {
            names.join(", ")
        } else {
            format!("{} columns without names", names.len())
        },
    })
}

fn csv_error(path: &Path, error: csv::Error) -> Error {
    let reason = error.to_string();
    match error.into_kind() {
        csv::ErrorKind::Io(source) => Error::io(path, source),
        _ => Error::bad_file(path, reason),
    }
}

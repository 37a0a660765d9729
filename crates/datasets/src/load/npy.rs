//! NumPy's files: `.npy` with one array, `.npz` with several (stored or compressed).
//!
//! Versions 1 to 3, both byte orders, C and Fortran order. Types keep their candle dtype where
//! there is one; `bool` becomes `U8`, `uint16` `U32`, `int8` and `uint64` `I64`.

use super::read_to_end_exact;
use crate::{Classification, Error, Result};
use candle_core::{DType, Device, Tensor};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};
use zip::ZipArchive;

const MAGIC: &[u8] = b"\x93NUMPY";
/// The longest header that is read; NumPy itself stops at 10,000 characters.
const MAX_HEADER: u64 = 1 << 16;

/// Reads a `.npy` file as a tensor on the CPU.
///
/// # Errors
/// [`Error::Io`], [`Error::Magic`] for another format, [`Error::Truncated`], [`Error::TooLong`],
/// [`Error::BadFile`] for a header that makes no sense or a type without counterpart (complex
/// numbers, text, objects).
pub fn read_npy(path: impl AsRef<Path>) -> Result<Tensor> {
    let path = path.as_ref();
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    read_array(path, BufReader::new(file))
}

/// Reads all arrays of a `.npz` file by name (without `.npy`).
///
/// # Errors
/// Those of [`read_npy`]; [`Error::BadFile`] for a damaged archive.
pub fn read_npz(path: impl AsRef<Path>) -> Result<BTreeMap<String, Tensor>> {
    let path = path.as_ref();
    let mut archive = open_archive(path)?;
    let mut arrays = BTreeMap::new();
    for i in 0..archive.len() {
        let entry = archive.by_index(i).map_err(|e| Error::bad_file(path, e))?;
        let name = entry.name().map_err(|e| Error::bad_file(path, e))?;
        let name = array_name(&name);
        let tensor = read_array(&member(path, &name), entry)?;
        arrays.insert(name, tensor);
    }
    Ok(arrays)
}

/// Reads one array of a `.npz` file.
///
/// # Errors
/// Those of [`read_npz`]; [`Error::BadFile`] that lists the arrays when `name` is not among them.
pub fn read_npz_array(path: impl AsRef<Path>, name: &str) -> Result<Tensor> {
    let path = path.as_ref();
    let mut archive = open_archive(path)?;
    let names: Vec<String> = archive
        .file_names()
        .map(|name| Ok(array_name(&name?)))
        .collect::<zip::result::ZipResult<_>>()
        .map_err(|e| Error::bad_file(path, e))?;
    let Some(index) = names.iter().position(|n| n == name) else {
        let reason = format!("no array `{name}`: it has {}", names.join(", "));
        return Err(Error::bad_file(path, reason));
    };
    let entry = archive
        .by_index(index)
        .map_err(|e| Error::bad_file(path, e))?;
    read_array(&member(path, name), entry)
}

fn open_archive(path: &Path) -> Result<ZipArchive<BufReader<File>>> {
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    ZipArchive::new(BufReader::new(file)).map_err(|e| Error::bad_file(path, e))
}

/// An entry's name without the extension.
fn array_name(entry: &str) -> String {
    entry.strip_suffix(".npy").unwrap_or(entry).to_string()
}

/// A name for messages: `file.npz[array]`.
fn member(path: &Path, name: &str) -> PathBuf {
    PathBuf::from(format!("{}[{name}]", path.display()))
}

/// What the header says.
#[derive(Debug, PartialEq)]
struct Header {
    big_endian: bool,
    /// Kind and bytes of an element, such as `f4`.
    kind: char,
    bytes: usize,
    fortran: bool,
    shape: Vec<usize>,
}

fn read_array(path: &Path, mut reader: impl Read) -> Result<Tensor> {
    let header = read_header(path, &mut reader)?;
    let dtype = header.dtype(path)?;
    let size = header
        .shape
        .iter()
        .try_fold(header.bytes as u64, |n, d| n.checked_mul(*d as u64))
        .ok_or_else(|| Error::bad_file(path, format!("shape {:?} is too large", header.shape)))?;
    let mut bytes = read_to_end_exact(path, reader, size)?;
    if header.big_endian == cfg!(target_endian = "little") {
        bytes
            .chunks_exact_mut(header.bytes)
            .for_each(<[u8]>::reverse);
    }
    let mut shape = header.shape.clone();
    if header.fortran {
        shape.reverse();
    }
    let tensor = header.tensor(path, &bytes, dtype, &shape)?;
    if !header.fortran {
        return Ok(tensor);
    }
    let axes: Vec<usize> = (0..shape.len()).rev().collect();
    Ok(tensor.permute(axes)?.contiguous()?)
}

impl Header {
    /// The candle dtype of the result.
    fn dtype(&self, path: &Path) -> Result<DType> {
        Ok(match (self.kind, self.bytes) {
            ('f', 2) => DType::F16,
            ('f', 4) => DType::F32,
            ('f', 8) => DType::F64,
            ('i', 2) => DType::I16,
            ('i', 4) => DType::I32,
            ('i', 1 | 8) | ('u', 8) => DType::I64,
            ('u' | 'b', 1) => DType::U8,
            ('u', 2 | 4) => DType::U32,
            (kind, bytes) => {
                let expected = "expected bool, integers or floats of at most 64 bits";
                let reason = format!("elements of type {kind}{bytes}: {expected}");
                return Err(Error::bad_file(path, reason));
            }
        })
    }

    fn tensor(&self, path: &Path, bytes: &[u8], dtype: DType, shape: &[usize]) -> Result<Tensor> {
        let device = &Device::Cpu;
        let pairs = || {
            bytes
                .chunks_exact(2)
                .map(|b| u16::from_ne_bytes([b[0], b[1]]))
        };
        Ok(match (self.kind, self.bytes) {
            _ if bytes.is_empty() => Tensor::zeros(shape, dtype, device)?,
            ('i', 1) => {
                let wide: Vec<i64> = bytes.iter().map(|b| i64::from(*b as i8)).collect();
                Tensor::from_vec(wide, shape, device)?
            }
            ('u', 2) => {
                let wide: Vec<u32> = pairs().map(u32::from).collect();
                Tensor::from_vec(wide, shape, device)?
            }
            ('u', 8) => {
                let tensor = Tensor::from_raw_buffer(bytes, dtype, shape, device)?;
                let values = tensor.flatten_all()?.to_vec1::<i64>()?;
                if let Some(bad) = values.iter().find(|v| **v < 0) {
                    let reason = format!("value {}: expected at most {}", *bad as u64, i64::MAX);
                    return Err(Error::bad_file(path, reason));
                }
                tensor
            }
            _ => Tensor::from_raw_buffer(bytes, dtype, shape, device)?,
        })
    }

    /// Parses the Python dictionary of a header.
    fn parse(path: &Path, text: &str) -> Result<Self> {
        let bad = |what: &str| Error::bad_file(path, format!("{what} in the header {text:?}"));
        let value = |key: &str| {
            let quoted = format!("'{key}':");
            let start = text.find(&quoted)? + quoted.len();
            Some(text[start..].trim_start())
        };
        let descr = value("descr").and_then(|v| v.strip_prefix('\''));
        let descr = descr.and_then(|v| v.split('\'').next());
        let descr = descr.ok_or_else(|| bad("no simple 'descr'"))?;
        let code = descr.trim_start_matches(['<', '>', '|', '=']);
        let mut letters = code.chars();
        let kind = letters.next().ok_or_else(|| bad("an empty 'descr'"))?;
        let bytes: usize = letters.as_str().parse().map_err(|_| bad("a bad 'descr'"))?;
        let fortran = match value("fortran_order") {
            Some(v) if v.starts_with("False") => false,
            Some(v) if v.starts_with("True") => true,
            _ => return Err(bad("no 'fortran_order'")),
        };
        let shape = value("shape").and_then(|v| v.strip_prefix('('));
        let shape = shape.and_then(|v| v.split_once(')'));
        let (shape, _) = shape.ok_or_else(|| bad("no 'shape'"))?;
        let sizes = shape.split(',').map(str::trim).filter(|s| !s.is_empty());
        let shape: std::result::Result<Vec<usize>, _> = sizes.map(str::parse).collect();
        Ok(Self {
            big_endian: descr.starts_with('>'),
            kind,
            bytes,
            fortran,
            shape: shape.map_err(|_| bad("a bad 'shape'"))?,
        })
    }
}

fn read_header(path: &Path, reader: &mut impl Read) -> Result<Header> {
    let mut take = |n: u64, what: &str| -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let read = reader.by_ref().take(n).read_to_end(&mut bytes);
        read.map_err(|e| Error::io(path, e))?;
        if (bytes.len() as u64) < n {
            return Err(Error::Truncated {
                path: path.display().to_string(),
                found: bytes.len() as u64,
                expected: format!("{n} bytes of {what}"),
            });
        }
        Ok(bytes)
    };
    let start = take(8, "magic and version")?;
    if !start.starts_with(MAGIC) {
        return Err(Error::Magic {
            path: path.display().to_string(),
            found: format!("{:02x?}", &start[..6]),
            expected: "93 and NUMPY, as .npy files do".to_string(),
        });
    }
    let length_bytes = match start[6] {
        1 => 2,
        2 | 3 => 4,
        other => {
            let reason = format!("format version {other}: expected 1, 2 or 3");
            return Err(Error::bad_file(path, reason));
        }
    };
    let length = take(length_bytes, "header length")?;
    let length = length
        .iter()
        .rev()
        .fold(0u64, |n, b| n << 8 | u64::from(*b));
    if length > MAX_HEADER {
        let reason = format!("a header of {length} bytes: expected at most {MAX_HEADER}");
        return Err(Error::bad_file(path, reason));
    }
    let text = take(length, "header")?;
    let text =
        String::from_utf8(text).map_err(|_| Error::bad_file(path, "a header that is not text"))?;
    Header::parse(path, &text)
}

/// Inputs and integer labels (any integer dtype, `[n]` or `[n, 1]`) as a data set; the number of
/// classes is the largest label plus one.
///
/// # Errors
/// [`Error::BadTensor`] for labels of another form, [`Error::InvalidArgument`] for negative ones,
/// [`Error::LengthMismatch`].
pub fn classification(inputs: Tensor, labels: &Tensor) -> Result<Classification> {
    let flat = match labels.dims() {
        [_] => labels.clone(),
        [_, 1] => labels.squeeze(1)?,
        _ => {
            return Err(Error::tensor(
                "labels",
                labels,
                "integers of shape [n] or [n, 1]",
            ))
        }
    };
    if flat.dtype().is_float() {
        return Err(Error::tensor(
            "labels",
            labels,
            "integers of shape [n] or [n, 1]",
        ));
    }
    let values = flat.to_dtype(DType::I64)?.to_vec1::<i64>()?;
    let narrow = |y: &i64| {
        let expected = "0 to 2^32 - 2";
        let class = u32::try_from(*y).ok().filter(|c| *c < u32::MAX);
        class.ok_or_else(|| Error::invalid("label", y, expected))
    };
    let values: Vec<u32> = values.iter().map(narrow).collect::<Result<_>>()?;
    let classes = values.iter().max().map_or(0, |y| *y as usize + 1);
    let labels = Tensor::from_vec(values, flat.shape(), inputs.device())?;
    Classification::new(inputs, labels, classes)
}

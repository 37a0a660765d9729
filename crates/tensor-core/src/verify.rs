//! Reading reference files and comparing against them, with a record of what was used.
//!
//! A reference file is a safetensors file of numbers that a right implementation gives, with
//! hyper-parameters in its metadata. An adaptor (one per method, in the method's crate) takes a
//! [`Reference`], reads [inputs](Reference::input), and [compares](Reference::compare) what its
//! crate computes. Every tensor must be an input, compared, or declared
//! [uncovered](Reference::uncovered) with a reason: [`Reference::finish`] reports the rest as
//! unknown, which is a failure.

use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use safetensors::{Dtype, SafeTensors};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::str::FromStr;

/// A tensor of a reference file: its values as `f64` (exact for every dtype that occurs), its
/// shape and the dtype it was stored with.
#[derive(Debug, Clone, PartialEq)]
pub struct Array {
    /// Row-major values.
    pub values: Vec<f64>,
    /// The shape.
    pub shape: Vec<usize>,
    /// The dtype in the file.
    pub dtype: Dtype,
}

impl Array {
    /// A CPU tensor of the given dtype.
    ///
    /// # Errors
    /// Those of candle.
    pub fn tensor(&self, dtype: DType) -> Result<Tensor> {
        let data = Tensor::from_slice(&self.values, self.shape.as_slice(), &Device::Cpu)?;
        Ok(data.to_dtype(dtype)?)
    }

    /// Row `i` along the first axis.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when there is no such row.
    pub fn row(&self, i: usize) -> Result<Array> {
        let rows = self.shape.first().copied().unwrap_or(0);
        if i >= rows {
            return Err(Error::invalid("row", i, format!("below {rows}")));
        }
        let width: usize = self.shape[1..].iter().product();
        Ok(Array {
            values: self.values[i * width..(i + 1) * width].to_vec(),
            shape: self.shape[1..].to_vec(),
            dtype: self.dtype,
        })
    }

    /// Keeps the first `keep` entries along an axis: the same data in another shape.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when there is no such axis or it is shorter.
    pub fn shorten(&mut self, axis: usize, keep: usize) -> Result<()> {
        let length = self.shape.get(axis).copied().unwrap_or(0);
        if keep == 0 || keep > length {
            let expected = format!("1 to {length} entries along axis {axis}");
            return Err(Error::invalid("keep", keep, expected));
        }
        let inner: usize = self.shape[axis + 1..].iter().product();
        let blocks = self.values.chunks(length * inner);
        self.values = blocks.flat_map(|b| &b[..keep * inner]).copied().collect();
        self.shape[axis] = keep;
        Ok(())
    }

    /// The values as non-negative integers (labels, indices, masks).
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a negative or fractional value.
    pub fn indices(&self) -> Result<Vec<u32>> {
        let convert = |x: &f64| {
            if *x >= 0.0 && x.fract() == 0.0 && *x <= f64::from(u32::MAX) {
                Ok(*x as u32)
            } else {
                Err(Error::invalid("index", x, "a non-negative integer"))
            }
        };
        self.values.iter().map(convert).collect()
    }
}

/// How close two numbers must be: `|a - b| <= tol * max(1, |b|)`, unless a rule says otherwise.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Tolerance {
    /// `|a - b| <= tol * max(1, |b|)`.
    Mixed(f64),
    /// `|a - b| <= tol`.
    Absolute(f64),
    /// `|a - b| <= tol * scale` with one scale for the whole tensor (`max |input|`, say).
    Scaled {
        /// The relative tolerance.
        tol: f64,
        /// What it is relative to.
        scale: f64,
    },
    /// At most this many entries may differ, by any amount (flags, counts, masks).
    Mismatches(usize),
}

/// The outcome of one comparison.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    /// The tensor's name in the file.
    pub name: String,
    /// Largest error in units in which 1 is exactly the tolerance; the number of mismatches for
    /// [`Tolerance::Mismatches`].
    pub worst: f64,
    /// Largest absolute difference.
    pub max_abs: f64,
    /// Whether the tolerance was met.
    pub passed: bool,
    /// What is wrong where it failed.
    pub detail: String,
}

/// Everything that one verification found.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Report {
    /// All comparisons in the order they were made.
    pub comparisons: Vec<Comparison>,
    /// Tensors used as inputs.
    pub inputs: usize,
    /// Tensors that are not covered yet, with the reason.
    pub uncovered: Vec<(String, String)>,
    /// Tensors in the file that the adaptor does not know.
    pub unknown: Vec<String>,
}

impl Report {
    /// Whether something was compared, everything passed and nothing is unknown.
    pub fn passed(&self) -> bool {
        !self.comparisons.is_empty()
            && self.unknown.is_empty()
            && self.comparisons.iter().all(|c| c.passed)
    }

    /// The failures as text, one per line; empty when [`passed`](Self::passed).
    pub fn failures(&self) -> Vec<String> {
        let mut out: Vec<String> = self
            .comparisons
            .iter()
            .filter(|c| !c.passed)
            .map(|c| format!("{}: {}", c.name, c.detail))
            .collect();
        out.extend(self.unknown.iter().map(|n| format!("{n}: unknown tensor")));
        if self.comparisons.is_empty() {
            out.push("nothing was compared".to_string());
        }
        out
    }
}

/// An open reference file; see the [module](self) page.
#[derive(Debug)]
pub struct Reference {
    path: String,
    tensors: BTreeMap<String, Array>,
    metadata: BTreeMap<String, String>,
    used: BTreeSet<String>,
    report: Report,
}

impl Reference {
    /// Reads a whole file.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::BadFile`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
        let bad = |reason: String| Error::BadFile {
            path: path.display().to_string(),
            reason,
        };
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| bad(e.to_string()))?;
        let metadata = header.metadata().clone().unwrap_or_default();
        let file = SafeTensors::deserialize(&bytes).map_err(|e| bad(e.to_string()))?;
        let mut tensors = BTreeMap::new();
        for (name, view) in file.tensors() {
            let values = decode(view.dtype(), view.data())
                .ok_or_else(|| bad(format!("{name}: dtype {:?} is not read", view.dtype())))?;
            let array = Array {
                values,
                shape: view.shape().to_vec(),
                dtype: view.dtype(),
            };
            tensors.insert(name, array);
        }
        Ok(Self {
            path: path.display().to_string(),
            tensors,
            metadata: metadata.into_iter().collect(),
            used: BTreeSet::new(),
            report: Report::default(),
        })
    }

    /// A changed copy with a fresh record: another file of the same form, for tests of adaptors.
    pub fn variant(
        &self,
        change: impl FnOnce(&mut BTreeMap<String, Array>, &mut BTreeMap<String, String>),
    ) -> Self {
        let (mut tensors, mut metadata) = (self.tensors.clone(), self.metadata.clone());
        change(&mut tensors, &mut metadata);
        Self {
            path: self.path.clone(),
            tensors,
            metadata,
            used: BTreeSet::new(),
            report: Report::default(),
        }
    }

    /// All tensor names, sorted.
    pub fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    /// All metadata.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Whether the file has a tensor of this name.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The distinct prefixes `P` for which a tensor `P` + `suffix` exists, sorted: the cases of a
    /// file (`cases(".init")` finds `dense0`, `dense1`, ...).
    pub fn cases(&self, suffix: &str) -> Vec<String> {
        self.tensors
            .keys()
            .filter_map(|name| name.strip_suffix(suffix))
            .map(str::to_string)
            .collect()
    }

    /// A metadata value as text.
    ///
    /// # Errors
    /// [`Error::BadFile`] when it is missing.
    pub fn text(&self, key: &str) -> Result<&str> {
        self.metadata
            .get(key)
            .map(String::as_str)
            .ok_or_else(|| self.bad(format!("metadata `{key}` is missing")))
    }

    /// A metadata value parsed as a number, or from JSON where it is a one-element form of it.
    /// `True` and `False` are read as 1 and 0 by [`flag`](Self::flag).
    ///
    /// # Errors
    /// [`Error::BadFile`] when it is missing or malformed.
    pub fn number<T: FromStr>(&self, key: &str) -> Result<T> {
        let text = self.text(key)?.trim();
        if let Ok(value) = text.parse() {
            return Ok(value);
        }
        // `5.0` where an integer is wanted.
        let whole = text.parse::<f64>().ok().filter(|x| x.fract() == 0.0);
        whole
            .and_then(|x| format!("{x:.0}").parse().ok())
            .ok_or_else(|| self.bad(format!("metadata `{key}` = `{text}` is not a number")))
    }

    /// A metadata value as a truth value (`True`/`true`/`1`, `False`/`false`/`0`).
    ///
    /// # Errors
    /// [`Error::BadFile`] when it is missing or something else.
    pub fn flag(&self, key: &str) -> Result<bool> {
        match self.text(key)?.trim() {
            "True" | "true" | "1" => Ok(true),
            "False" | "false" | "0" => Ok(false),
            other => Err(self.bad(format!("metadata `{key}` = `{other}` is not a truth value"))),
        }
    }

    /// A metadata value as JSON.
    ///
    /// # Errors
    /// [`Error::BadFile`] when it is missing or not JSON.
    pub fn json(&self, key: &str) -> Result<serde_json::Value> {
        serde_json::from_str(self.text(key)?)
            .map_err(|e| self.bad(format!("metadata `{key}`: {e}")))
    }

    /// An input of the computation.
    ///
    /// # Errors
    /// [`Error::BadFile`] when it is missing.
    pub fn input(&mut self, name: &str) -> Result<Array> {
        let array = self.expected(name)?.clone();
        if self.used.insert(name.to_string()) {
            self.report.inputs += 1;
        }
        Ok(array)
    }

    /// The file's values for a tensor that will be compared, without marking it.
    ///
    /// # Errors
    /// [`Error::BadFile`] when it is missing.
    pub fn expected(&self, name: &str) -> Result<&Array> {
        self.tensors
            .get(name)
            .ok_or_else(|| self.bad(format!("tensor `{name}` is missing")))
    }

    /// Compares computed values (row-major) with the file's tensor `name`. NaN matches NaN.
    ///
    /// # Errors
    /// [`Error::BadFile`] when the file has no such tensor. A wrong length or value is not an
    /// error but a failed comparison.
    pub fn compare(&mut self, name: &str, got: &[f64], tolerance: Tolerance) -> Result<()> {
        let comparison = judge(name, got, self.expected(name)?, tolerance);
        self.used.insert(name.to_string());
        self.report.comparisons.push(comparison);
        Ok(())
    }

    /// [`compare`](Self::compare) for a tensor, its shape included.
    ///
    /// # Errors
    /// As [`compare`](Self::compare).
    pub fn compare_tensor(&mut self, name: &str, got: &Tensor, tol: Tolerance) -> Result<()> {
        let expected = self.expected(name)?.shape.clone();
        if got.dims() != expected.as_slice() {
            self.used.insert(name.to_string());
            self.report.comparisons.push(Comparison {
                name: name.to_string(),
                worst: f64::INFINITY,
                max_abs: f64::INFINITY,
                passed: false,
                detail: format!("shape {:?}, expected {expected:?}", got.dims()),
            });
            return Ok(());
        }
        let values = got.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
        self.compare(name, &values, tol)
    }

    /// Declares a tensor that this version does not cover, and why.
    ///
    /// # Errors
    /// [`Error::BadFile`] when the file has no such tensor.
    pub fn uncovered(&mut self, name: &str, reason: &str) -> Result<()> {
        self.expected(name)?;
        self.used.insert(name.to_string());
        self.report
            .uncovered
            .push((name.to_string(), reason.to_string()));
        Ok(())
    }

    /// Closes the record.
    pub fn finish(mut self) -> Report {
        let used = &self.used;
        self.report.unknown = self
            .tensors
            .keys()
            .filter(|name| !used.contains(*name))
            .cloned()
            .collect();
        self.report
    }

    /// An [`Error::BadFile`] about this file.
    pub fn bad(&self, reason: impl ToString) -> Error {
        Error::BadFile {
            path: self.path.clone(),
            reason: reason.to_string(),
        }
    }
}

fn judge(name: &str, got: &[f64], expected: &Array, tolerance: Tolerance) -> Comparison {
    let mut result = Comparison {
        name: name.to_string(),
        worst: f64::INFINITY,
        max_abs: f64::INFINITY,
        passed: false,
        detail: String::new(),
    };
    if got.len() != expected.values.len() {
        result.detail = format!("{} values, expected {}", got.len(), expected.values.len());
        return result;
    }
    let same = |a: f64, b: f64| a == b || (a.is_nan() && b.is_nan());
    let (mut worst, mut max_abs, mut mismatches, mut at) = (0.0_f64, 0.0_f64, 0, None);
    for (i, (&a, &b)) in got.iter().zip(&expected.values).enumerate() {
        if same(a, b) {
            continue;
        }
        mismatches += 1;
        let difference = (a - b).abs();
        let allowed = match tolerance {
            Tolerance::Mixed(tol) => tol * b.abs().max(1.0),
            Tolerance::Absolute(tol) => tol,
            Tolerance::Scaled { tol, scale } => tol * scale,
            Tolerance::Mismatches(_) => 0.0,
        };
        // A NaN on one side, an infinity, or a zero allowance is an infinite error: an infinite
        // allowance (a large number where the file has infinity) must not pass.
        let ratio = if difference <= allowed && allowed.is_finite() {
            difference / allowed.max(f64::MIN_POSITIVE)
        } else if difference.is_finite() && allowed > 0.0 && allowed.is_finite() {
            difference / allowed
        } else {
            f64::INFINITY
        };
        max_abs = if difference.is_nan() {
            f64::INFINITY
        } else {
            max_abs.max(difference)
        };
        if ratio > worst {
            worst = ratio;
            at = Some((i, a, b));
        }
    }
    if let Tolerance::Mismatches(allowed) = tolerance {
        result.passed = mismatches <= allowed;
        result.worst = mismatches as f64;
    } else {
        result.passed = worst <= 1.0;
        result.worst = worst;
    }
    result.max_abs = max_abs;
    if !result.passed {
        let place = at.map_or(String::new(), |(i, a, b)| {
            format!(", worst at {i}: {a} for {b}")
        });
        result.detail = format!("{mismatches} of {} differ{place}", got.len());
    }
    result
}

fn decode(dtype: Dtype, bytes: &[u8]) -> Option<Vec<f64>> {
    fn each<const N: usize>(bytes: &[u8], read: impl Fn([u8; N]) -> f64) -> Vec<f64> {
        let one = |chunk: &[u8]| {
            let mut word = [0; N];
            word.copy_from_slice(chunk);
            read(word)
        };
        bytes.chunks_exact(N).map(one).collect()
    }
    Some(match dtype {
        Dtype::BOOL | Dtype::U8 => bytes.iter().map(|b| f64::from(*b)).collect(),
        Dtype::I8 => each::<1>(bytes, |b| f64::from(i8::from_le_bytes(b))),
        Dtype::I16 => each(bytes, |b| f64::from(i16::from_le_bytes(b))),
        Dtype::U16 => each(bytes, |b| f64::from(u16::from_le_bytes(b))),
        Dtype::I32 => each(bytes, |b| f64::from(i32::from_le_bytes(b))),
        Dtype::U32 => each(bytes, |b| f64::from(u32::from_le_bytes(b))),
        Dtype::I64 => each(bytes, |b| i64::from_le_bytes(b) as f64),
        Dtype::U64 => each(bytes, |b| u64::from_le_bytes(b) as f64),
        Dtype::F16 => each(bytes, |b| half::f16::from_le_bytes(b).to_f64()),
        Dtype::BF16 => each(bytes, |b| half::bf16::from_le_bytes(b).to_f64()),
        Dtype::F32 => each(bytes, |b| f64::from(f32::from_le_bytes(b))),
        Dtype::F64 => each(bytes, f64::from_le_bytes),
        _ => return None,
    })
}

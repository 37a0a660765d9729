//! Has the softmax collapsed?

use crate::{Error, Result};
use candle_core::{DType, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;

/// Measures softmax collapse: whether `sum_k exp(z_k - max z)`, evaluated in a given precision, is
/// exactly 1. Then all other classes have been absorbed; the loss of a correctly classified
/// example is exactly 0, and so is the gradient of its own class, `p_y - 1`.
///
/// It says something about the softmax only: under another loss logits may grow without harm.
/// Gaps between logits that suffice are about 16.6 + ln(C - 1) in `f32`, 7.6 in `f16`, 5.5 in
/// `bf16` and 36.7 in `f64`.
#[derive(Debug, Clone, Copy)]
pub struct SoftmaxCollapse;

/// Fractions of examples, from [`SoftmaxCollapse::measure`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CollapseReport {
    /// The sum is exactly 1.
    pub collapsed: f64,
    /// The loss is exactly 0.
    pub zero_loss: f64,
    /// The gradient of the right class is exactly 0.
    pub zero_correct_grad: f64,
    /// The logits hold NaN or positive infinity; such examples count as none of the above.
    pub nonfinite: f64,
}

/// The same for each example, from [`SoftmaxCollapse::flags`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CollapseFlags {
    /// The sum is exactly 1.
    pub collapsed: bool,
    /// The loss is exactly 0.
    pub zero_loss: bool,
    /// The gradient of the right class is exactly 0.
    pub zero_correct_grad: bool,
    /// The logits hold NaN or positive infinity.
    pub nonfinite: bool,
}

impl SoftmaxCollapse {
    /// Fractions over all examples of logits `[.., C]` with labels `[..]` (integers below `C`), as
    /// if the softmax were evaluated in `dtype` (`F16`, `BF16`, `F32` or `F64`).
    ///
    /// # Errors
    /// [`Error::Shape`] when shapes do not fit or there are no examples, [`Error::DType`] for
    /// another dtype, [`Error::InvalidArgument`] for a label that is not below `C`.
    pub fn measure(logits: &Tensor, labels: &Tensor, dtype: DType) -> Result<CollapseReport> {
        let flags = Self::flags(logits, labels, dtype)?;
        if flags.is_empty() {
            return Err(Error::shape(
                "logits",
                logits.dims(),
                "at least one example",
            ));
        }
        let fraction = |of: fn(&CollapseFlags) -> bool| {
            flags.iter().filter(|f| of(f)).count() as f64 / flags.len() as f64
        };
        Ok(CollapseReport {
            collapsed: fraction(|f| f.collapsed),
            zero_loss: fraction(|f| f.zero_loss),
            zero_correct_grad: fraction(|f| f.zero_correct_grad),
            nonfinite: fraction(|f| f.nonfinite),
        })
    }

    /// What [`measure`](Self::measure) counts, per example.
    ///
    /// # Errors
    /// Those of [`measure`](Self::measure), but for no examples.
    pub fn flags(logits: &Tensor, labels: &Tensor, dtype: DType) -> Result<Vec<CollapseFlags>> {
        let classes = match logits.dims().last() {
            Some(&classes) if classes > 0 && logits.rank() >= 1 => classes,
            _ => return Err(Error::shape("logits", logits.dims(), "[.., C] with C >= 1")),
        };
        let examples = logits.elem_count() / classes;
        if labels.elem_count() != examples {
            let expected = format!("{examples} labels");
            return Err(Error::shape("labels", labels.dims(), expected));
        }
        let labels = labels
            .flatten_all()?
            .to_dtype(DType::I64)?
            .to_vec1::<i64>()?;
        let outside = |y: &&i64| usize::try_from(**y).map_or(true, |y| y >= classes);
        if let Some(label) = labels.iter().find(outside) {
            return Err(Error::argument("label", label, format!("below {classes}")));
        }
        let rows = logits.detach().flatten_all()?;
        if dtype == DType::F64 {
            let values = rows.to_dtype(DType::F64)?.to_vec1::<f64>()?;
            return Ok(each_row(&values, &labels, classes, row_f64));
        }
        let round: fn(f32) -> f32 = match dtype {
            DType::F32 => |x| x,
            DType::F16 => |x| f16::from_f32(x).to_f32(),
            DType::BF16 => |x| bf16::from_f32(x).to_f32(),
            got => {
                return Err(Error::DType {
                    tensor: "softmax".into(),
                    got,
                    expected: "F16, BF16, F32 or F64".into(),
                })
            }
        };
        let values = rows.to_dtype(DType::F32)?.to_vec1::<f32>()?;
        let row = |row: &[f32], label: usize| row_f32(row, label, round);
        Ok(each_row(&values, &labels, classes, row))
    }
}

fn each_row<T: Sync>(
    values: &[T],
    labels: &[i64],
    classes: usize,
    row: impl Fn(&[T], usize) -> CollapseFlags + Sync,
) -> Vec<CollapseFlags> {
    values
        .par_chunks(classes)
        .zip(labels)
        .map(|(values, label)| row(values, *label as usize))
        .collect()
}

/// Every operation in `f64`.
fn row_f64(row: &[f64], label: usize) -> CollapseFlags {
    let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if max == f64::INFINITY || row.iter().any(|z| z.is_nan()) {
        return nonfinite();
    }
    let sum: f64 = row.iter().map(|z| (z - max).exp()).sum();
    let own = row[label] - max;
    CollapseFlags {
        collapsed: sum == 1.0,
        zero_loss: own - sum.ln() == 0.0,
        zero_correct_grad: own.exp() / sum - 1.0 == 0.0,
        nonfinite: false,
    }
}

/// Every operation in `f32`, its result rounded to the narrower type; sums are kept in `f32` and
/// rounded at the end, as libraries do.
fn row_f32(row: &[f32], label: usize, round: fn(f32) -> f32) -> CollapseFlags {
    let max = row
        .iter()
        .map(|z| round(*z))
        .fold(f32::NEG_INFINITY, f32::max);
    if max == f32::INFINITY || row.iter().any(|z| z.is_nan()) {
        return nonfinite();
    }
    let shifted = |z: f32| round(round(z) - max);
    let sum = round(row.iter().map(|z| round(shifted(*z).exp())).sum());
    let own = shifted(row[label]);
    let p = round(round(own.exp()) / sum);
    CollapseFlags {
        collapsed: sum == 1.0,
        zero_loss: round(own - round(sum.ln())) == 0.0,
        zero_correct_grad: round(p - 1.0) == 0.0,
        nonfinite: false,
    }
}

fn nonfinite() -> CollapseFlags {
    CollapseFlags {
        nonfinite: true,
        ..CollapseFlags::default()
    }
}

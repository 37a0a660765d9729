//! Losses over class indices.

use crate::softmax::log_softmax;
use crate::{Error, Result};
use candle_core::{DType, Tensor};

/// How the losses of single examples become the result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Reduction {
    /// Their mean, a scalar.
    #[default]
    Mean,
    /// Their sum, a scalar.
    Sum,
    /// One number per example.
    None,
}

impl Reduction {
    /// Applies to losses of single examples `[N]`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn apply(self, losses: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Reduction::Mean => losses.mean_all()?,
            Reduction::Sum => losses.sum_all()?,
            Reduction::None => losses.clone(),
        })
    }
}

/// Cross entropy `-log softmax(logits)_label` over logits `[N, C]` (or `[.., C]`, labels `[..]`)
/// and integer class labels.
///
/// Built on [`log_softmax`], hence with a gradient of any order on any device. The result is a
/// scalar, or has the labels' shape for [`Reduction::None`].
///
/// ```
/// use candle_core::{Device, Tensor};
/// use thalweg_nn::loss::{cross_entropy, Reduction};
/// let logits = Tensor::new(&[[0f64, 0.0], [3.0, 3.0]], &Device::Cpu)?;
/// let labels = Tensor::new(&[0u32, 1], &Device::Cpu)?;
/// let loss = cross_entropy(&logits, &labels, Reduction::Mean)?.to_scalar::<f64>()?;
/// assert!((loss - 2f64.ln()).abs() < 1e-15);
/// # Ok::<(), thalweg_nn::Error>(())
/// ```
///
/// # Errors
/// [`Error::Shape`] when labels and logits do not fit or the batch is empty, [`Error::DType`] for
/// labels that are no integers, and on the CPU [`Error::LabelOutOfRange`] and
/// [`Error::NonFinite`] (a NaN among the logits, or a label whose logit is `-inf`). On other
/// devices the values are not looked at, which would wait for the device.
pub fn cross_entropy(logits: &Tensor, labels: &Tensor, reduction: Reduction) -> Result<Tensor> {
    let (logits, index) = rows(logits, labels)?;
    let log_probs = log_softmax(&logits, 1)?;
    let losses = log_probs
        .gather(&index.unsqueeze(1)?, 1)?
        .squeeze(1)?
        .neg()?;
    check_losses(&losses)?;
    reduction.apply(&losses.reshape(labels.shape())?)
}

/// Fraction of rows of `[.., C]` whose largest logit is the label's.
///
/// # Errors
/// As [`cross_entropy`].
pub fn accuracy(logits: &Tensor, labels: &Tensor) -> Result<f64> {
    let (logits, index) = rows(logits, labels)?;
    let right = logits.argmax(1)?.eq(&index)?.to_dtype(DType::F32)?;
    Ok(f64::from(right.sum_all()?.to_scalar::<f32>()?) / index.elem_count() as f64)
}

/// Logits as `[N, C]` and labels as `u32` `[N]`, checked against each other.
pub(crate) fn rows(logits: &Tensor, labels: &Tensor) -> Result<(Tensor, Tensor)> {
    let (leading, classes) = match logits.dims() {
        [leading @ .., classes] if !leading.is_empty() => (leading, *classes),
        other => return Err(Error::shape("logits", other, "[.., classes]")),
    };
    if labels.dims() != leading {
        return Err(Error::shape(
            "labels",
            labels.dims(),
            format!("{leading:?}"),
        ));
    }
    if logits.elem_count() == 0 {
        return Err(Error::shape("logits", logits.dims(), "at least one entry"));
    }
    if !matches!(labels.dtype(), DType::U8 | DType::U32 | DType::I64) {
        return Err(Error::dtype("labels", labels.dtype(), "U8, U32 or I64"));
    }
    let flat = labels.flatten_all()?;
    if flat.device().is_cpu() {
        let values = flat.to_dtype(DType::I64)?.to_vec1::<i64>()?;
        let bad = values.iter().position(|l| *l < 0 || *l >= classes as i64);
        if let Some(position) = bad {
            return Err(Error::LabelOutOfRange {
                label: values[position],
                position,
                classes,
            });
        }
    }
    Ok((logits.reshape(((), classes))?, flat.to_dtype(DType::U32)?))
}

/// On the CPU, where it costs no wait: the losses of single examples must be finite.
pub(crate) fn check_losses(losses: &Tensor) -> Result<()> {
    if !losses.device().is_cpu() {
        return Ok(());
    }
    let values = losses.to_dtype(DType::F64)?.to_vec1::<f64>()?;
    let count = values.iter().filter(|x| !x.is_finite()).count();
    if count > 0 {
        return Err(Error::NonFinite {
            what: "the losses",
            count,
            total: values.len(),
            hint: ": look for NaN among the logits, or a masked label",
        });
    }
    Ok(())
}

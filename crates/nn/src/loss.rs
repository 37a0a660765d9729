//! Cross entropy over class indices or soft labels, and accuracy.
//!
//! With `p = softmax(x)`, a target distribution `t` over `C` classes and the smoothing `s`:
//!
//! ```text
//! t'   = (1 - s) t + s / C
//! loss = ln sum_j e^(x_j) - sum_j t'_j x_j        (t sums to 1)
//! dx   = dloss (p sum_j t'_j - t')
//! ```
//!
//! On the CPU, in f32 and f64, one pass over the logits gives the losses and one the gradient; no
//! probabilities are kept. Other devices, and gradients that keep their graph, take candle
//! operations, differentiable any number of times.

use crate::kernel::{
    filled, has_kernel, host, pieces, sum, sum2, tensor, vectorized, Computed, Scalar, View,
};
use crate::softmax::{log_softmax, log_sum_exp};
use crate::{Error, Result};
use candle_core::{DType, Shape, Tensor};
use tensor_core::autograd::keeps_graph;

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

/// Configuration of [`cross_entropy_with`].
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct CrossEntropyConfig {
    /// Of the losses of single examples. The mean is over examples that are not ignored.
    pub reduction: Reduction,
    /// The share of the target that is spread evenly over all classes, in `[0, 1]` (Szegedy,
    /// Vanhoucke, Ioffe, Shlens, Wojna 2016, section 7).
    pub label_smoothing: f64,
    /// Examples with this label, which need be no class, have loss and gradient 0.
    pub ignore_index: Option<i64>,
}

impl CrossEntropyConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`].
    pub fn validate(&self) -> Result<()> {
        if (0.0..=1.0).contains(&self.label_smoothing) {
            return Ok(());
        }
        let field = "CrossEntropyConfig::label_smoothing";
        Err(Error::config(
            field,
            self.label_smoothing,
            "a number in [0, 1]",
        ))
    }
}

/// Cross entropy `-log softmax(logits)_label` over logits `[N, C]` (or `[.., C]`, labels `[..]`)
/// and integer class labels. The result is a scalar, or has the labels' shape for
/// [`Reduction::None`].
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
    let config = CrossEntropyConfig {
        reduction,
        ..Default::default()
    };
    cross_entropy_with(logits, labels, &config)
}

/// [`cross_entropy`] with label smoothing and an ignored label.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use thalweg_nn::loss::{cross_entropy_with, CrossEntropyConfig};
/// let logits = Tensor::new(&[[0f64, 0.0], [9.0, 1.0]], &Device::Cpu)?;
/// let labels = Tensor::new(&[0i64, -100], &Device::Cpu)?;
/// let config = CrossEntropyConfig { ignore_index: Some(-100), ..Default::default() };
/// let loss = cross_entropy_with(&logits, &labels, &config)?.to_scalar::<f64>()?;
/// assert!((loss - 2f64.ln()).abs() < 1e-15);
/// # Ok::<(), thalweg_nn::Error>(())
/// ```
///
/// # Errors
/// [`Error::InvalidConfig`], those of [`cross_entropy`], and [`Error::Shape`] for a mean over no
/// example because all are ignored. Ignored labels need the labels' values: on another device
/// this waits for it.
pub fn cross_entropy_with(
    logits: &Tensor,
    labels: &Tensor,
    config: &CrossEntropyConfig,
) -> Result<Tensor> {
    config.validate()?;
    let (rows, index, kept) = rows_kept(logits, labels, config.ignore_index)?;
    let fused = has_kernel(&rows) && !keeps_graph()?;
    let losses = match (fused, rows.dtype()) {
        (true, DType::F64) => {
            Indices::new(&index, &kept, config)?.losses::<f64>(&rows.contiguous()?)?
        }
        (true, _) => Indices::new(&index, &kept, config)?.losses::<f32>(&rows.contiguous()?)?,
        (false, _) => composed(&rows, &index, kept.as_deref(), config.label_smoothing)?,
    };
    check_losses(&losses)?;
    match (&kept, config.reduction) {
        (Some(kept), Reduction::Mean) => {
            let count = kept.iter().filter(|k| **k).count();
            if count == 0 {
                let expected = "at least one label that is not ignored";
                return Err(Error::shape("labels", labels.dims(), expected));
            }
            Ok((losses.sum_all()? / count as f64)?)
        }
        _ => config.reduction.apply(&losses.reshape(labels.shape())?),
    }
}

/// Cross entropy `-sum_j t_j log softmax(logits)_j` of logits `[.., C]` and target distributions
/// `t` of the same shape and dtype. The result is a scalar, or `[..]` for [`Reduction::None`].
///
/// The targets need not sum to 1, and get a gradient too if they are part of a graph.
///
/// # Errors
/// [`Error::Shape`] and [`Error::DType`] when the two do not fit or are empty, and on the CPU
/// [`Error::NonFinite`].
pub fn soft_cross_entropy(
    logits: &Tensor,
    targets: &Tensor,
    reduction: Reduction,
) -> Result<Tensor> {
    if logits.rank() < 2 || logits.elem_count() == 0 {
        let expected = "a non-empty [.., classes]";
        return Err(Error::shape("logits", logits.dims(), expected));
    }
    if targets.dims() != logits.dims() {
        let expected = format!("{:?}, as the logits", logits.dims());
        return Err(Error::shape("targets", targets.dims(), expected));
    }
    if targets.dtype() != logits.dtype() {
        let expected = format!("{:?}, as the logits", logits.dtype());
        return Err(Error::dtype("targets", targets.dtype(), expected));
    }
    let leading = &logits.dims()[..logits.rank() - 1];
    let classes = logits.dims()[logits.rank() - 1];
    let (x, t) = (
        logits.reshape(((), classes))?.contiguous()?,
        targets.reshape(((), classes))?.contiguous()?,
    );
    let fused = has_kernel(&x) && !targets.track_op() && !keeps_graph()?;
    let losses = match (fused, x.dtype()) {
        (true, DType::F64) => soft::<f64>(&x, &t)?,
        (true, _) => soft::<f32>(&x, &t)?,
        (false, _) => (log_softmax(&x, 1)? * t)?.sum(1)?.neg()?,
    };
    check_losses(&losses)?;
    reduction.apply(&losses.reshape(leading)?)
}

/// By candle operations; `kept` tells rows that count from ignored ones.
fn composed(x: &Tensor, index: &Tensor, kept: Option<&[bool]>, smoothing: f64) -> Result<Tensor> {
    let log_probs = log_softmax(x, 1)?;
    let right = log_probs.gather(&index.unsqueeze(1)?, 1)?.squeeze(1)?;
    let losses = match smoothing {
        0.0 => right.neg()?,
        s => ((right * (s - 1.0))? - (log_probs.mean(1)? * s)?)?,
    };
    Ok(match kept {
        Some(kept) => {
            let ones: Vec<u8> = kept.iter().map(|k| u8::from(*k)).collect();
            let mask = Tensor::from_vec(ones, losses.shape(), losses.device())?;
            mask.where_cond(&losses, &losses.zeros_like()?)?
        }
        None => losses,
    })
}

/// Class indices, for the fused kernel.
struct Indices {
    /// None for an ignored row.
    labels: Vec<Option<u32>>,
    smoothing: f64,
}

impl Indices {
    fn new(index: &Tensor, kept: &Option<Vec<bool>>, config: &CrossEntropyConfig) -> Result<Self> {
        let index = index.to_vec1::<u32>()?.into_iter();
        let labels = match kept {
            Some(kept) => index.zip(kept).map(|(l, k)| k.then_some(l)).collect(),
            None => index.map(Some).collect(),
        };
        Ok(Self {
            labels,
            smoothing: config.label_smoothing,
        })
    }

    /// The losses `[N]` of logits `[N, C]`.
    fn losses<T: Scalar>(self, x: &Tensor) -> Result<Tensor> {
        let (n, classes) = x.dims2()?;
        let (right, even) = (
            T::from_f64(1.0 - self.smoothing),
            T::from_f64(self.smoothing / classes as f64),
        );
        let mut sums = vec![T::ZERO; n];
        let losses = {
            let view = View::new(x)?;
            let x = view.slice::<T>()?;
            by_row(
                &mut sums,
                x,
                classes,
                #[inline(always)]
                |i, x, log_sum| {
                    let Some(label) = self.labels[i] else {
                        return T::ZERO;
                    };
                    let (top, log) = log_sum_exp(x);
                    *log_sum = top + log;
                    let mut loss = right * ((top - x[label as usize]) + log);
                    if even > T::ZERO {
                        // The sum of differences, not the difference of sums: no cancellation.
                        loss = loss + even * sum(x, |x| (top - x) + log);
                    }
                    loss
                },
            )
        };
        let backward = move |arguments: &[&Tensor], _: &Tensor, dy: &Tensor| {
            let x = arguments[0];
            let dx = {
                let (xv, dyv) = (View::new(x)?, View::new(dy)?);
                let (x, dy) = (xv.slice::<T>()?, dyv.slice::<T>()?);
                gradient_rows(
                    x,
                    classes,
                    #[inline(always)]
                    |i, x, dx| {
                        let Some(label) = self.labels[i] else {
                            dx.fill(T::ZERO);
                            return;
                        };
                        let (log_sum, g) = (sums[i], dy[i]);
                        for (dx, x) in dx.iter_mut().zip(x) {
                            *dx = g * ((*x - log_sum).exp_of_negative() - even);
                        }
                        dx[label as usize] = dx[label as usize] - g * right;
                    },
                )
            };
            Ok(vec![Some(tensor(dx, x.shape())?)])
        };
        let node = Computed::new("cross-entropy", losses, &Shape::from(n), backward);
        Ok(x.apply_op1(node)?)
    }
}

/// The losses `[N]` of logits and targets `[N, C]`.
fn soft<T: Scalar>(x: &Tensor, t: &Tensor) -> Result<Tensor> {
    let (n, classes) = x.dims2()?;
    let mut sums = vec![T::ZERO; n];
    let losses = {
        let (xv, tv) = (View::new(x)?, View::new(t)?);
        let (x, t) = (xv.slice::<T>()?, tv.slice::<T>()?);
        by_row(
            &mut sums,
            x,
            classes,
            #[inline(always)]
            |i, x, log_sum| {
                let t = &t[i * classes..(i + 1) * classes];
                let (top, log) = log_sum_exp(x);
                *log_sum = top + log;
                // A class of target 0 has no say, whatever its logit.
                sum2(x, t, |x, t| {
                    T::select(t == T::ZERO, T::ZERO, t * ((top - x) + log))
                })
            },
        )
    };
    let t = t.detach();
    let backward = move |arguments: &[&Tensor], _: &Tensor, dy: &Tensor| {
        let x = arguments[0];
        let dx = {
            let (xv, tv, dyv) = (View::new(x)?, View::new(&t)?, View::new(dy)?);
            let (x, t, dy) = (xv.slice::<T>()?, tv.slice::<T>()?, dyv.slice::<T>()?);
            gradient_rows(
                x,
                classes,
                #[inline(always)]
                |i, x, dx| {
                    let t = &t[i * classes..(i + 1) * classes];
                    let (log_sum, g) = (sums[i], dy[i]);
                    let mass = sum(t, |t| t);
                    for ((dx, x), t) in dx.iter_mut().zip(x).zip(t) {
                        *dx = g * (mass * (*x - log_sum).exp_of_negative() - *t);
                    }
                },
            )
        };
        Ok(vec![Some(tensor(dx, x.shape())?)])
    };
    let node = Computed::new("soft-cross-entropy", losses, &Shape::from(n), backward);
    Ok(x.apply_op1(node)?)
}

/// One number per row, and a second one into `kept`.
fn by_row<T: Scalar>(
    kept: &mut [T],
    x: &[T],
    classes: usize,
    f: impl Fn(usize, &[T], &mut T) -> T + Sync,
) -> Vec<T> {
    use rayon::prelude::*;
    let one = |(i, (x, kept)): (usize, (&[T], &mut T))| {
        vectorized(
            #[inline(always)]
            || f(i, x, kept),
        )
    };
    let few = crate::kernel::piece_of(classes);
    if kept.len() <= few {
        return x.chunks(classes).zip(kept).enumerate().map(one).collect();
    }
    let rows = x.par_chunks(classes).zip(kept).enumerate();
    rows.with_min_len(few).map(one).collect()
}

/// A matrix of gradients, row by row.
fn gradient_rows<T: Scalar>(
    x: &[T],
    classes: usize,
    f: impl Fn(usize, &[T], &mut [T]) + Sync,
) -> Vec<T> {
    filled(x.len(), |dx| {
        pieces(dx, classes, |first, dx| {
            vectorized(
                #[inline(always)]
                || {
                    for (i, dx) in dx.chunks_exact_mut(classes).enumerate() {
                        let at = (first + i) * classes;
                        f(first + i, &x[at..at + classes], dx);
                    }
                },
            );
        });
    })
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
    let (logits, index, _) = rows_kept(logits, labels, None)?;
    Ok((logits, index))
}

/// [`rows`], with a 0 for each ignored label, and which labels count (none where all do).
fn rows_kept(
    logits: &Tensor,
    labels: &Tensor,
    ignored: Option<i64>,
) -> Result<(Tensor, Tensor, Option<Vec<bool>>)> {
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
    let rows = logits.reshape(((), classes))?;
    let flat = labels.flatten_all()?;
    if !flat.device().is_cpu() && ignored.is_none() {
        return Ok((rows, flat.to_dtype(DType::U32)?, None));
    }
    let device = flat.device();
    let values = flat.to_device(&candle_core::Device::Cpu)?;
    let mut values = values.to_dtype(DType::I64)?.to_vec1::<i64>()?;
    let kept = ignored.map(|ignored| {
        let kept: Vec<bool> = values.iter().map(|l| *l != ignored).collect();
        for (l, kept) in values.iter_mut().zip(&kept) {
            *l = if *kept { *l } else { 0 };
        }
        kept
    });
    let bad = values.iter().position(|l| *l < 0 || *l >= classes as i64);
    if let Some(position) = bad {
        return Err(Error::LabelOutOfRange {
            label: values[position],
            position,
            classes,
        });
    }
    let index: Vec<u32> = values.into_iter().map(|l| l as u32).collect();
    let index = Tensor::from_vec(index, rows.dim(0)?, device)?;
    Ok((rows, index, kept))
}

/// On the CPU, where it costs no wait: the losses of single examples must be finite.
pub(crate) fn check_losses(losses: &Tensor) -> Result<()> {
    if !losses.device().is_cpu() {
        return Ok(());
    }
    let values = host(losses)?;
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

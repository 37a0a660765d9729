//! StableMax: a replacement for softmax whose cross entropy keeps training where softmax's
//! gradient is absorbed by rounding ("softmax collapse": the loss reads exactly 0 in f32, and the
//! right class gets no signal any more).
//!
//! Prieto, Barsbey, Mediano, Birdal: "Grokking at the Edge of Numerical Stability", ICLR 2025,
//! arXiv 2501.04697.
//!
//! ```text
//! s(x)         = x + 1        for x >= 0
//!                1 / (1 - x)  for x < 0
//! StableMax_i  = s(x_i) / sum_j s(x_j)
//! L            = -mean_b ln StableMax_(y_b)
//! dL/dx_k      = 1/B s'(x_k) (1 / sum_j s(x_j) - [k = y] / s(x_k)),   s' = 1, or s^2 for x < 0
//! ```
//!
//! It is softmax applied to `h(x) = ln(1 + x)` for `x >= 0`, `-ln(1 - x)` for `x < 0`. As `s` grows
//! linearly, logits of about 1e16 are needed before a sum in f64 absorbs a term (1.7e7 in f32).
//!
//! | symbol | here |
//! | --- | --- |
//! | `s` | [`stablemax_score`] |
//! | the 1e-30 beside `1 - x` | [`StableMaxConfig::eps`] |
//! | precision of the loss | [`StableMaxConfig::compute_dtype`] |
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use candle_nn::{Module, Optimizer};
//! use thalweg_nn::loss::Reduction;
//! use thalweg_nn::stablemax::{stablemax_cross_entropy, StableMaxConfig};
//! use thalweg_nn::{init::SeededVars, RandomStream};
//!
//! let vars = SeededVars::new(&RandomStream::new(7));
//! let layer = candle_nn::linear(4, 4, vars.builder(DType::F32, &Device::Cpu))?;
//! let params = vars.trainable().into_iter().map(|(_, var)| var).collect();
//! let mut adam = candle_nn::AdamW::new_lr(params, 0.05)?;
//! let x = Tensor::eye(4, DType::F32, &Device::Cpu)?;
//! let labels = Tensor::new(&[2u32, 0, 3, 1], &Device::Cpu)?;
//! let config = StableMaxConfig::default();
//! let mut losses = vec![];
//! for _ in 0..50 {
//!     let logits = layer.forward(&x)?;
//!     let loss = stablemax_cross_entropy(&logits, &labels, Reduction::Mean, &config)?;
//!     adam.backward_step(&loss)?;
//!     losses.push(loss.to_scalar::<f64>()?);
//! }
//! assert!(losses[49] < 0.5 * losses[0]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use crate::kernel::{has_kernel, tensor, vectorized, wide, Computed, Scalar, View, PARALLEL_FROM};
use crate::loss::{check_losses, rows, Reduction};
use crate::{Error, Result};
use candle_core::shape::Dim;
use candle_core::{DType, Tensor};
use rayon::prelude::*;
use tensor_core::autograd::keeps_graph;

/// Configuration of [`stablemax_cross_entropy`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StableMaxConfig {
    /// The dtype of the loss, and of the computation where no fused kernel runs (the kernel always
    /// computes in f64). Metal has no f64: use F32 there.
    pub compute_dtype: DType,
    /// Added to `1 - x` in the negative branch. In f64 and f32 it changes no bit, as `1 - x > 1`.
    pub eps: f64,
}

impl Default for StableMaxConfig {
    fn default() -> Self {
        Self {
            compute_dtype: DType::F64,
            eps: 1e-30,
        }
    }
}

impl StableMaxConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`].
    pub fn validate(&self) -> Result<()> {
        if !matches!(self.compute_dtype, DType::F32 | DType::F64) {
            let field = "StableMaxConfig::compute_dtype";
            let got = format!("{:?}", self.compute_dtype);
            return Err(Error::config(field, got, "F32 or F64"));
        }
        if !(self.eps.is_finite() && self.eps >= 0.0) {
            let field = "StableMaxConfig::eps";
            return Err(Error::config(field, self.eps, "a finite number >= 0"));
        }
        Ok(())
    }
}

/// The two branches as a sum without a selection: `max(x, 0)` and `1 - min(x, 0)`. Autograd through
/// a selection gives NaN at `x = 1`, where the branch not taken divides by zero.
fn branches(x: &Tensor) -> Result<(Tensor, Tensor)> {
    let positive = x.relu()?;
    let negative = (x - &positive)?;
    Ok((positive, (1.0 - negative)?))
}

/// In f32 for half precision.
fn widened(x: &Tensor) -> Result<Tensor> {
    Ok(x.to_dtype(wide(x.dtype())?)?)
}

/// `s(x)`, elementwise: positive, monotone, with a continuous derivative. The shape and dtype stay.
///
/// Candle operations: any device, gradients of any order.
///
/// # Errors
/// [`Error::DType`] for an integer dtype.
pub fn stablemax_score(x: &Tensor) -> Result<Tensor> {
    let (positive, inverse) = branches(&widened(x)?)?;
    Ok((positive + inverse.recip()?)?.to_dtype(x.dtype())?)
}

/// `StableMax(x)_i = s(x_i) / sum_j s(x_j)` along `dim`; the shape stays.
///
/// Candle operations: any device, gradients of any order.
///
/// # Errors
/// [`Error::DType`] for an integer dtype, candle's for a `dim` that does not exist.
pub fn stablemax(x: &Tensor, dim: impl Dim) -> Result<Tensor> {
    let dim = dim.to_index(x.shape(), "stablemax")?;
    let s = stablemax_score(&widened(x)?)?;
    let p = s.broadcast_div(&s.sum_keepdim(dim)?)?;
    Ok(p.to_dtype(x.dtype())?)
}

/// `ln StableMax(x)` along `dim`, without underflow for scores far below the sum; the shape stays.
///
/// Candle operations: any device, gradients of any order.
///
/// # Errors
/// As [`stablemax`].
pub fn log_stablemax(x: &Tensor, dim: impl Dim) -> Result<Tensor> {
    let dim = dim.to_index(x.shape(), "log_stablemax")?;
    let (positive, inverse) = branches(&widened(x)?)?;
    let sum = (&positive + inverse.recip()?)?.sum_keepdim(dim)?;
    let log_s = ((positive + 1.0)?.log()? - inverse.log()?)?;
    Ok(log_s.broadcast_sub(&sum.log()?)?.to_dtype(x.dtype())?)
}

/// StableMax cross entropy `-ln StableMax_label` over logits `[.., C]` and integer labels `[..]`,
/// in `config.compute_dtype` whatever the dtype of the logits.
///
/// On the CPU a fused kernel computes rows in f64 with the closed-form gradient (in the logits'
/// dtype). Its gradient is cut from the graph; where gradients keep their graph
/// ([`keeps_graph`]), and on other devices, candle operations are used, which can be
/// differentiated any number of times.
///
/// # Errors
/// [`Error::InvalidConfig`]; [`Error::Shape`], [`Error::DType`] and [`Error::LabelOutOfRange`] for
/// inputs that do not fit or are empty; [`Error::NonFinite`] (on the CPU) when a loss is NaN or
/// infinite. As [`cross_entropy`](crate::loss::cross_entropy), values on other devices are not
/// looked at.
pub fn stablemax_cross_entropy(
    logits: &Tensor,
    labels: &Tensor,
    reduction: Reduction,
    config: &StableMaxConfig,
) -> Result<Tensor> {
    config.validate()?;
    wide(logits.dtype())?;
    let (logits, index) = rows(logits, labels)?;
    let losses = if has_kernel(&logits) && !keeps_graph()? {
        let logits = logits.contiguous()?;
        let labels = index.to_vec1::<u32>()?;
        match logits.dtype() {
            DType::F64 => fused::<f64>(&logits, labels, config)?,
            _ => fused::<f32>(&logits, labels, config)?,
        }
    } else {
        let log_probs = log_stablemax(&logits.to_dtype(config.compute_dtype)?, 1)?;
        log_probs
            .gather(&index.unsqueeze(1)?, 1)?
            .squeeze(1)?
            .neg()?
    };
    check_losses(&losses)?;
    reduction.apply(&losses.reshape(labels.shape())?)
}

fn fused<T: Scalar>(logits: &Tensor, labels: Vec<u32>, config: &StableMaxConfig) -> Result<Tensor> {
    let (n, classes) = logits.dims2()?;
    let eps = config.eps;
    let (losses, sums): (Vec<f64>, Vec<f64>) = {
        let view = View::new(logits)?;
        let x = view.slice::<T>()?;
        let one = |(x, label): (&[T], &u32)| {
            vectorized(
                #[inline(always)]
                || row_loss(x, *label as usize, eps),
            )
        };
        if x.len() >= PARALLEL_FROM {
            x.par_chunks(classes).zip(&labels).map(one).unzip()
        } else {
            x.chunks(classes).zip(&labels).map(one).unzip()
        }
    };
    let backward = move |arguments: &[&Tensor], _: &Tensor, grad: &Tensor| {
        let logits = arguments[0];
        let grad = grad.to_dtype(DType::F64)?.to_vec1::<f64>()?;
        let mut dx = vec![T::ZERO; logits.elem_count()];
        {
            let view = View::new(logits)?;
            let x = view.slice::<T>()?;
            let one = |((x, dx), ((label, sum), grad)): GradientRow<'_, T>| {
                vectorized(
                    #[inline(always)]
                    || row_gradient(x, dx, *label as usize, *sum, *grad, eps),
                );
            };
            if x.len() >= PARALLEL_FROM {
                let rows = x.par_chunks(classes).zip(dx.par_chunks_mut(classes));
                rows.zip(labels.par_iter().zip(&sums).zip(&grad))
                    .for_each(one);
            } else {
                let rows = x.chunks(classes).zip(dx.chunks_mut(classes));
                rows.zip(labels.iter().zip(&sums).zip(&grad)).for_each(one);
            }
        }
        Ok(vec![Some(tensor(dx, logits.shape())?)])
    };
    // The node's value has the compute dtype, its gradient the dtype of the logits.
    let shape = n.into();
    let name = "stablemax-cross-entropy";
    Ok(match config.compute_dtype {
        DType::F64 => logits.apply_op1(Computed::new(name, losses, &shape, backward))?,
        _ => {
            let single: Vec<f32> = losses.into_iter().map(|l| l as f32).collect();
            logits.apply_op1(Computed::new(name, single, &shape, backward))?
        }
    })
}

type GradientRow<'a, T> = ((&'a [T], &'a mut [T]), ((&'a u32, &'a f64), &'a f64));

const LANES: usize = 8;

#[inline(always)]
fn score(x: f64, eps: f64) -> f64 {
    x.max(0.0) + 1.0 / (1.0 - x.min(0.0) + eps)
}

/// The loss of one row and the sum of its scores.
#[inline(always)]
fn row_loss<T: Scalar>(x: &[T], label: usize, eps: f64) -> (f64, f64) {
    let mut lanes = [0.0; LANES];
    let mut nan = false;
    let full = x.chunks_exact(LANES);
    for (lane, x) in lanes.iter_mut().zip(full.remainder()) {
        *lane += score(x.to_f64(), eps);
        nan |= x.to_f64().is_nan();
    }
    for x in full {
        for l in 0..LANES {
            lanes[l] += score(x[l].to_f64(), eps);
        }
        // Maximum and minimum drop NaN.
        nan |= x.iter().fold(false, |nan, x| nan | x.to_f64().is_nan());
    }
    let sum: f64 = lanes.into_iter().sum();
    let right = x[label].to_f64();
    // ln s without rounding s first: s is as small as 1e-300.
    let log_s = if right >= 0.0 {
        right.ln_1p()
    } else {
        -(eps - right).ln_1p()
    };
    let loss = if nan { f64::NAN } else { sum.ln() - log_s };
    (loss, sum)
}

#[inline(always)]
fn row_gradient<T: Scalar>(x: &[T], dx: &mut [T], label: usize, sum: f64, grad: f64, eps: f64) {
    let scale = grad / sum;
    for (x, dx) in x.iter().zip(dx.iter_mut()) {
        let x = x.to_f64();
        // s' is 1 for x >= 0 and s^2 below.
        let inverse = 1.0 / (1.0 - x.min(0.0) + eps);
        *dx = T::from_f64(scale * (inverse * inverse));
    }
    let right = x[label].to_f64();
    let s = score(right, eps);
    // s'/s is 1/s for x >= 0 and s below: no overflow.
    let (slope, ratio) = if right >= 0.0 {
        (1.0, 1.0 / s)
    } else {
        (s * s, s)
    };
    dx[label] = T::from_f64(scale * slope - grad * ratio);
}

//! Log-probabilities of a softmax over the possible actions of each row, in one pass.

use crate::{Error, Result};
use candle_core::{CpuStorage, CustomOp1, CustomOp2, DType, Layout, Shape, Tensor};
use std::sync::Arc;
use tensor_core::autograd::keeps_graph;

/// Which log-probability of a row is wanted.
#[derive(Debug, Clone)]
pub enum Wanted {
    /// That of one action a row.
    Action(Vec<u32>),
    /// The mean over the possible actions.
    Mean,
}

/// A number in the place of minus infinity, whose exponential is 0 in every dtype.
pub(super) const IMPOSSIBLE: f64 = -1e30;

/// Row `i` of `logits` `[n, width]` gives `log softmax(logits_i over mask_i)` at the wanted action,
/// or the mean of it over the mask: `[n]`.
///
/// f32 and f64 on the CPU take one fused pass; everything else, and gradients that keep their graph,
/// candle operations.
///
/// # Errors
/// [`Error::Shape`] when mask or actions do not fit, [`Error::Environment`] for a row without a
/// possible action or a wanted action that is impossible.
pub fn masked_log_prob(logits: &Tensor, mask: &[bool], wanted: &Wanted) -> Result<Tensor> {
    let (n, width) = logits.dims2()?;
    check(n, width, mask, wanted)?;
    let fused = matches!(logits.dtype(), DType::F32 | DType::F64) && logits.device().is_cpu();
    if !fused || n == 0 || keeps_graph()? {
        return composed(logits, mask, wanted);
    }
    let row = Rows {
        mask: Arc::new(mask.to_vec()),
        wanted: Arc::new(wanted.clone()),
        width,
    };
    Ok(logits.contiguous()?.apply_op1(row)?)
}

fn check(n: usize, width: usize, mask: &[bool], wanted: &Wanted) -> Result<()> {
    if mask.len() != n * width {
        let expected = format!("{n} rows of {width}");
        return Err(Error::shape("mask", &[mask.len()], expected));
    }
    let mut rows = mask.chunks(width.max(1)).enumerate();
    if let Some((i, _)) = rows.find(|(_, row)| !row.contains(&true)) {
        let reason = format!("row {i} has no possible action");
        return Err(Error::environment(reason));
    }
    let Wanted::Action(actions) = wanted else {
        return Ok(());
    };
    if actions.len() != n {
        return Err(Error::shape("actions", &[actions.len()], format!("[{n}]")));
    }
    for (i, a) in actions.iter().enumerate() {
        let a = *a as usize;
        if a >= width || !mask[i * width + a] {
            let reason = format!("action {a} of row {i} is impossible");
            return Err(Error::environment(reason));
        }
    }
    Ok(())
}

/// `logits` with the impossible actions out of the way.
pub(super) fn hide(logits: &Tensor, mask: &[bool]) -> Result<Tensor> {
    let mask: Vec<u8> = mask.iter().map(|m| u8::from(*m)).collect();
    let mask = Tensor::from_vec(mask, logits.shape(), logits.device())?;
    let low = Tensor::full(IMPOSSIBLE, logits.shape(), logits.device())?;
    Ok(mask.where_cond(logits, &low.to_dtype(logits.dtype())?)?)
}

fn composed(logits: &Tensor, mask: &[bool], wanted: &Wanted) -> Result<Tensor> {
    let (n, width) = logits.dims2()?;
    let log_p = nn::softmax::log_softmax(&hide(logits, mask)?, 1)?;
    match wanted {
        Wanted::Action(actions) => {
            let index = Tensor::from_slice(actions, (n, 1), logits.device())?;
            Ok(log_p.gather(&index, 1)?.squeeze(1)?)
        }
        Wanted::Mean => {
            let weights: Vec<f64> = mask.chunks(width).flat_map(uniform).collect();
            let weights = Tensor::from_vec(weights, (n, width), logits.device())?;
            let weights = weights.to_dtype(logits.dtype())?;
            Ok((log_p * weights)?.sum(1)?)
        }
    }
}

fn uniform(mask: &[bool]) -> Vec<f64> {
    let count = mask.iter().filter(|m| **m).count() as f64;
    mask.iter()
        .map(|m| f64::from(u8::from(*m)) / count)
        .collect()
}

/// The numbers of the kernel; sums are taken in f64.
trait Real: Copy {
    fn wide(self) -> f64;
    fn narrow(x: f64) -> Self;
}

impl Real for f32 {
    fn wide(self) -> f64 {
        f64::from(self)
    }
    fn narrow(x: f64) -> Self {
        x as f32
    }
}

impl Real for f64 {
    fn wide(self) -> f64 {
        self
    }
    fn narrow(x: f64) -> Self {
        x
    }
}

#[derive(Clone)]
struct Rows {
    mask: Arc<Vec<bool>>,
    wanted: Arc<Wanted>,
    width: usize,
}

impl Rows {
    fn masked(&self, i: usize) -> &[bool] {
        &self.mask[i * self.width..(i + 1) * self.width]
    }

    /// The logarithm of the sum of exponentials over the mask.
    fn log_sum<T: Real>(&self, i: usize, row: &[T]) -> f64 {
        let possible = || row.iter().zip(self.masked(i)).filter(|(_, m)| **m);
        let max = possible().fold(f64::NEG_INFINITY, |a, (x, _)| a.max(x.wide()));
        let sum: f64 = possible().map(|(x, _)| (x.wide() - max).exp()).sum();
        max + sum.ln()
    }

    fn forward<T: Real>(&self, logits: &[T]) -> Vec<T> {
        let rows = logits.chunks(self.width).enumerate();
        rows.map(|(i, row)| {
            let picked = match &*self.wanted {
                Wanted::Action(actions) => row[actions[i] as usize].wide(),
                Wanted::Mean => {
                    let possible = row.iter().zip(self.masked(i)).filter(|(_, m)| **m);
                    let (sum, count) =
                        possible.fold((0.0, 0.0), |(s, n), (x, _)| (s + x.wide(), n + 1.0));
                    sum / count
                }
            };
            T::narrow(picked - self.log_sum(i, row))
        })
        .collect()
    }

    fn backward<T: Real>(&self, logits: &[T], grad: &[T]) -> Vec<T> {
        let mut out = vec![T::narrow(0.0); logits.len()];
        let rows = logits.chunks(self.width).zip(out.chunks_mut(self.width));
        for (i, (row, out)) in rows.enumerate() {
            let (mask, g) = (self.masked(i), grad[i].wide());
            let log_sum = self.log_sum(i, row);
            let share = match &*self.wanted {
                Wanted::Action(_) => 0.0,
                Wanted::Mean => 1.0 / mask.iter().filter(|m| **m).count() as f64,
            };
            for ((x, o), _) in row
                .iter()
                .zip(out.iter_mut())
                .zip(mask)
                .filter(|(_, m)| **m)
            {
                *o = T::narrow(g * (share - (x.wide() - log_sum).exp()));
            }
            if let Wanted::Action(actions) = &*self.wanted {
                let o = &mut out[actions[i] as usize];
                *o = T::narrow(o.wide() + g);
            }
        }
        out
    }
}

fn part<'a, T>(slice: &'a [T], layout: &Layout) -> candle_core::Result<&'a [T]> {
    let (start, end) = layout
        .contiguous_offsets()
        .ok_or_else(|| candle_core::Error::Msg("the kernel needs contiguous rows".into()).bt())?;
    Ok(&slice[start..end])
}

impl CustomOp1 for Rows {
    fn name(&self) -> &'static str {
        "masked-log-prob"
    }

    fn cpu_fwd(
        &self,
        storage: &CpuStorage,
        layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let out = match storage {
            CpuStorage::F32(x) => CpuStorage::F32(self.forward(part(x, layout)?)),
            CpuStorage::F64(x) => CpuStorage::F64(self.forward(part(x, layout)?)),
            _ => candle_core::bail!("masked-log-prob is for f32 and f64"),
        };
        let rows = layout.shape().elem_count() / self.width;
        Ok((out, Shape::from(rows)))
    }

    fn bwd(&self, arg: &Tensor, _: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let backward = Backward(self.clone());
        let logits = arg.detach();
        Ok(Some(logits.apply_op2_no_bwd(
            &grad.detach().contiguous()?,
            &backward,
        )?))
    }
}

struct Backward(Rows);

impl CustomOp2 for Backward {
    fn name(&self) -> &'static str {
        "masked-log-prob-backward"
    }

    fn cpu_fwd(
        &self,
        logits: &CpuStorage,
        logits_layout: &Layout,
        grad: &CpuStorage,
        grad_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let out = match (logits, grad) {
            (CpuStorage::F32(x), CpuStorage::F32(g)) => CpuStorage::F32(
                self.0
                    .backward(part(x, logits_layout)?, part(g, grad_layout)?),
            ),
            (CpuStorage::F64(x), CpuStorage::F64(g)) => CpuStorage::F64(
                self.0
                    .backward(part(x, logits_layout)?, part(g, grad_layout)?),
            ),
            _ => candle_core::bail!("masked-log-prob is for f32 and f64"),
        };
        Ok((out, logits_layout.shape().clone()))
    }
}

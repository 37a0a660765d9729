//! One pass over memory for operators on images, on the CPU in f32 and f64.

use candle_core::{bail, CpuStorage, CustomOp1, DType, Layout, Shape, Tensor, WithDType};
use rayon::prelude::*;
use std::mem::MaybeUninit;

/// Numbers that one task writes, about.
const PIECE: usize = 1 << 15;

/// A node of the graph. Each is linear, and its backward pass is the transposed one.
pub(super) enum Pass {
    /// Every row times these contiguous weights.
    Mask(Tensor),
    /// Sums over squares of `factor` pixels, times `share`.
    Sum { factor: usize, share: f64 },
    /// Squares of `factor` pixels with the value of one, times `share`.
    Spread { factor: usize, share: f64 },
}

/// Whether a pass can take this tensor.
pub(super) fn has_pass(x: &Tensor) -> bool {
    x.device().is_cpu() && matches!(x.dtype(), DType::F32 | DType::F64) && x.elem_count() > 0
}

impl Pass {
    pub(super) fn of(self, x: &Tensor) -> candle_core::Result<Tensor> {
        x.contiguous()?.apply_op1(self)
    }

    fn shape(&self, x: &Shape) -> candle_core::Result<Shape> {
        Ok(match *self {
            Self::Mask(_) => x.clone(),
            Self::Sum { factor, .. } => {
                let (n, c, h, w) = x.dims4()?;
                Shape::from((n, c, h / factor, w / factor))
            }
            Self::Spread { factor, .. } => {
                let (n, c, h, w) = x.dims4()?;
                Shape::from((n, c, h * factor, w * factor))
            }
        })
    }

    fn run<T: Number>(&self, x: &[T], from: &Shape, to: &Shape) -> candle_core::Result<Vec<T>> {
        let width = |s: &Shape| s.dims().last().copied().unwrap_or(1);
        Ok(match self {
            Self::Mask(weights) => masked(x, &weights.flatten_all()?.to_vec1::<T>()?),
            Self::Sum { factor, share } => {
                sums(x, width(from), width(to), (*factor, T::from_f64(*share)))
            }
            Self::Spread { factor, share } => {
                squares(x, width(from), (*factor, T::from_f64(*share)))
            }
        })
    }
}

impl CustomOp1 for Pass {
    fn name(&self) -> &'static str {
        "linear-operator"
    }

    fn cpu_fwd(&self, x: &CpuStorage, at: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let Some((start, end)) = at.contiguous_offsets() else {
            bail!("a linear operator over a tensor that is not contiguous");
        };
        let to = self.shape(at.shape())?;
        let data = match x {
            CpuStorage::F32(x) => CpuStorage::F32(self.run(&x[start..end], at.shape(), &to)?),
            CpuStorage::F64(x) => CpuStorage::F64(self.run(&x[start..end], at.shape(), &to)?),
            _ => bail!("a linear operator over another dtype than F32 and F64"),
        };
        Ok((data, to))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let transposed = match self {
            Self::Mask(weights) => Self::Mask(weights.clone()),
            Self::Sum { factor, share } => Self::Spread {
                factor: *factor,
                share: *share,
            },
            Self::Spread { factor, share } => Self::Sum {
                factor: *factor,
                share: *share,
            },
        };
        transposed.of(grad).map(Some)
    }
}

trait Number: WithDType + Send + Sync {}

impl Number for f32 {}
impl Number for f64 {}

/// Fills a vector of `n` numbers piece by piece, on all threads: `fill` is given the index of the first
/// unit of a piece, and its place. Pieces are whole units of `unit` numbers.
fn filled<T: Number>(
    n: usize,
    unit: usize,
    fill: impl Fn(usize, &mut [MaybeUninit<T>]) + Sync,
) -> Vec<T> {
    let units = (PIECE / unit.max(1)).max(1);
    let mut out = Vec::with_capacity(n);
    let places = &mut out.spare_capacity_mut()[..n];
    let piece = |(k, part): (usize, &mut [MaybeUninit<T>])| {
        pulp::Arch::new().dispatch(
            #[inline(always)]
            || fill(k * units, part),
        );
    };
    match n <= PIECE || rayon::current_num_threads() == 1 {
        true => places.chunks_mut(units * unit).enumerate().for_each(piece),
        false => {
            let pieces = places.par_chunks_mut(units * unit).enumerate();
            pieces.for_each(piece);
        }
    }
    // SAFETY: every `fill` here writes all of its place, and the pieces are all places.
    unsafe { out.set_len(n) };
    out
}

/// Rows of as many numbers as there are weights, or several such after each other.
fn masked<T: Number>(x: &[T], weights: &[T]) -> Vec<T> {
    filled(x.len(), weights.len(), |first, out| {
        let from = first * weights.len();
        let rows = out.chunks_mut(weights.len());
        for (k, row) in rows.enumerate() {
            let x = &x[from + k * weights.len()..][..row.len()];
            for ((out, x), w) in row.iter_mut().zip(x).zip(weights) {
                out.write(*x * *w);
            }
        }
    })
}

/// Lines of `width` numbers; `factor` of them make one line of sums.
fn sums<T: Number>(x: &[T], width: usize, to: usize, (factor, share): (usize, T)) -> Vec<T> {
    let block = factor * width;
    filled(x.len() / (factor * factor), to, |first, out| {
        let mut down = vec![T::zero(); width];
        for (k, line) in out.chunks_mut(to).enumerate() {
            let lines = &x[(first + k) * block..][..block];
            down.copy_from_slice(&lines[..width]);
            for line in lines[width..].chunks_exact(width) {
                for (sum, x) in down.iter_mut().zip(line) {
                    *sum += *x;
                }
            }
            for (out, group) in line.iter_mut().zip(down.chunks_exact(factor)) {
                let sum = group[1..].iter().fold(group[0], |sum, x| sum + *x);
                out.write(sum * share);
            }
        }
    })
}

/// Each line of `width` numbers becomes `factor` equal lines.
fn squares<T: Number>(x: &[T], width: usize, (factor, share): (usize, T)) -> Vec<T> {
    let (to, block) = (width * factor, width * factor * factor);
    filled(x.len() * factor * factor, block, |first, out| {
        let mut wide = vec![T::zero(); to];
        for (k, lines) in out.chunks_mut(block).enumerate() {
            let line = &x[(first + k) * width..][..width];
            for (group, x) in wide.chunks_exact_mut(factor).zip(line) {
                group.fill(*x * share);
            }
            for out in lines.chunks_exact_mut(to) {
                for (out, x) in out.iter_mut().zip(&wide) {
                    out.write(*x);
                }
            }
        }
    })
}

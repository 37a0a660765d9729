//! Linear combinations of tensors in one pass over memory.
//!
//! Steps of samplers, conversions between predictions and most guidance rules are sums `sum_i c_i x_i`
//! over samples. Written with tensor operations each term costs a pass and a temporary of its own; here
//! every term is read once and the sum is written once, by vector code and on all threads, and the
//! whole is one node of the graph.
//!
//! ```
//! use candle_core::{Device, Tensor};
//! use thalweg_flows::combine::{linear_combination, row_combination};
//!
//! // Classifier-free guidance at scale 3, and at a scale of its own for each row.
//! let wanted = Tensor::new(&[[1.0_f32, 2.0], [3.0, 0.0]], &Device::Cpu)?;
//! let unwanted = Tensor::new(&[[0.5_f32, 1.0], [1.0, 1.0]], &Device::Cpu)?;
//! let guided = linear_combination(&[(3.0, &wanted), (-2.0, &unwanted)])?;
//! assert_eq!(guided.to_vec2::<f32>()?, [[2.0, 4.0], [7.0, -2.0]]);
//! let guided = row_combination(&[(&[3.0, 1.0], &wanted), (&[-2.0, 0.0], &unwanted)])?;
//! assert_eq!(guided.to_vec2::<f32>()?, [[2.0, 4.0], [3.0, 0.0]]);
//! # Ok::<(), thalweg_flows::Error>(())
//! ```

use crate::error::{check, Error, Result};
use candle_core::{
    bail, CpuStorage, CustomOp2, CustomOp3, DType, Layout, Shape, Tensor, WithDType,
};
use rayon::prelude::*;
use std::mem::MaybeUninit;
use std::ops::{Add, Mul};

/// Elements that one task handles.
const PIECE: usize = 1 << 14;

/// `sum_i c_i x_i` of tensors of one shape, dtype and device, term by term in their order.
///
/// One pass on the CPU in f32 and f64; candle operations for other dtypes and devices. It can be
/// differentiated any number of times.
///
/// # Errors
/// [`Error::InvalidArgument`] for no terms; [`Error::Shape`] for tensors of different shapes; those of
/// candle for different dtypes or devices.
pub fn linear_combination(terms: &[(f64, &Tensor)]) -> Result<Tensor> {
    let all = terms.iter().map(|(c, x)| (std::slice::from_ref(c), *x));
    combination(&all.collect::<Vec<_>>())
}

/// [`linear_combination`] of tensors `[rows, ...]` with coefficients of its own for each row.
///
/// # Errors
/// As there; [`Error::InvalidArgument`] for another number of coefficients than rows.
pub fn row_combination(terms: &[(&[f64], &Tensor)]) -> Result<Tensor> {
    for (c, x) in terms {
        let rows = check::rows("a term of the sum", x)?;
        if c.len() != rows {
            let expected = format!("{rows}, one per row");
            return Err(Error::argument("number of coefficients", c.len(), expected));
        }
    }
    combination(terms)
}

/// The sum with one coefficient per term, or one per row and term.
fn combination(terms: &[(&[f64], &Tensor)]) -> Result<Tensor> {
    let Some(((first, x), rest)) = terms.split_first() else {
        return Err(Error::argument("number of terms", 0, "at least one"));
    };
    for (_, y) in rest {
        check::same_shape("a term of the sum", y, x)?;
    }
    let fused = |t: &Tensor| {
        t.device().is_cpu()
            && t.dtype() == x.dtype()
            && matches!(t.dtype(), DType::F32 | DType::F64)
    };
    if rest.is_empty() || !terms.iter().all(|(_, t)| fused(t)) {
        let mut sum = scaled(first, x)?;
        for (c, y) in rest {
            sum = (sum + scaled(c, y)?)?;
        }
        return Ok(sum);
    }
    let x = x.contiguous()?;
    let (mut sum, rest) = match rest {
        [(c, y), (d, z), rest @ ..] => (triple([*first, *c, *d], &x, y, z)?, rest),
        [(c, y), rest @ ..] => (pair([*first, *c], &x, y)?, rest),
        [] => (x, rest),
    };
    for more in rest.chunks(2) {
        sum = match more {
            [(c, y), (d, z)] => triple([&[1.0], *c, *d], &sum, y, z)?,
            [(c, y)] => pair([&[1.0], *c], &sum, y)?,
            _ => sum,
        };
    }
    Ok(sum)
}

/// `c x`, by tensor operations.
fn scaled(c: &[f64], x: &Tensor) -> candle_core::Result<Tensor> {
    match c {
        [c] if *c == 1.0 => Ok(x.clone()),
        [c] => x.affine(*c, 0.0),
        _ => {
            let mut shape = vec![1; x.rank()];
            shape[0] = c.len();
            let column = Tensor::from_slice(c, shape, x.device())?.to_dtype(x.dtype())?;
            x.broadcast_mul(&column)
        }
    }
}

fn pair(c: [&[f64]; 2], x: &Tensor, y: &Tensor) -> Result<Tensor> {
    Ok(x.apply_op2(&y.contiguous()?, Combination::new(c))?)
}

fn triple(c: [&[f64]; 3], x: &Tensor, y: &Tensor, z: &Tensor) -> Result<Tensor> {
    Ok(x.apply_op3(&y.contiguous()?, &z.contiguous()?, Combination::new(c))?)
}

/// The numbers of contiguous tensors.
fn slices<'s, T: WithDType, const N: usize>(
    operands: &[(&'s CpuStorage, &Layout); N],
) -> candle_core::Result<[&'s [T]; N]> {
    let mut slices: [&[T]; N] = [&[]; N];
    for (slice, (storage, layout)) in slices.iter_mut().zip(operands) {
        let Some((start, end)) = layout.contiguous_offsets() else {
            bail!("a linear combination of tensors that are not contiguous");
        };
        *slice = &storage.as_slice()?[start..end];
    }
    Ok(slices)
}

/// The node of a sum: its coefficients, once or for each row.
struct Combination<const N: usize>(Vec<[f64; N]>);

impl<const N: usize> Combination<N> {
    fn new(terms: [&[f64]; N]) -> Self {
        let rows = terms.iter().map(|c| c.len()).max().unwrap_or(1);
        let at = |c: &[f64], row: usize| if c.len() == 1 { c[0] } else { c[row] };
        Self((0..rows).map(|row| terms.map(|c| at(c, row))).collect())
    }

    fn forward(
        &self,
        operands: [(&CpuStorage, &Layout); N],
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let data = match operands[0].0 {
            CpuStorage::F32(_) => {
                let single: Vec<_> = self.0.iter().map(|c| c.map(|c| c as f32)).collect();
                CpuStorage::F32(sum(slices(&operands)?, &single))
            }
            CpuStorage::F64(_) => CpuStorage::F64(sum(slices(&operands)?, &self.0)),
            _ => bail!("a linear combination of another dtype than F32 and F64"),
        };
        Ok((data, operands[0].1.shape().clone()))
    }

    fn backward(
        &self,
        terms: [&Tensor; N],
        grad: &Tensor,
    ) -> candle_core::Result<[Option<Tensor>; N]> {
        let mut grads = [const { None }; N];
        for (j, _) in terms.iter().enumerate().filter(|(_, t)| t.track_op()) {
            let c: Vec<f64> = self.0.iter().map(|c| c[j]).collect();
            grads[j] = Some(scaled(&c, grad)?);
        }
        Ok(grads)
    }
}

impl CustomOp2 for Combination<2> {
    fn name(&self) -> &'static str {
        "linear-combination"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        at_x: &Layout,
        y: &CpuStorage,
        at_y: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.forward([(x, at_x), (y, at_y)])
    }

    fn bwd(
        &self,
        x: &Tensor,
        y: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let [dx, dy] = self.backward([x, y], grad)?;
        Ok((dx, dy))
    }
}

impl CustomOp3 for Combination<3> {
    fn name(&self) -> &'static str {
        "linear-combination"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        at_x: &Layout,
        y: &CpuStorage,
        at_y: &Layout,
        z: &CpuStorage,
        at_z: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.forward([(x, at_x), (y, at_y), (z, at_z)])
    }

    fn bwd(
        &self,
        x: &Tensor,
        y: &Tensor,
        z: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [dx, dy, dz] = self.backward([x, y, z], grad)?;
        Ok((dx, dy, dz))
    }
}

/// `sum_j c_j x_j` of slices of one length that hold as many rows as there are coefficients. Products are
/// not fused with sums, so that every processor gives the same bits.
fn sum<T, const N: usize>(sources: [&[T]; N], c: &[[T; N]]) -> Vec<T>
where
    T: Copy + Send + Sync + Add<Output = T> + Mul<Output = T>,
{
    let n = sources[0].len();
    let width = (n / c.len().max(1)).max(1);
    let mut out = Vec::with_capacity(n);
    let mut pieces = Vec::new();
    for (row, values) in out.spare_capacity_mut()[..n].chunks_mut(width).enumerate() {
        for (k, part) in values.chunks_mut(PIECE).enumerate() {
            pieces.push((&c[row], row * width + k * PIECE, part));
        }
    }
    let piece = |(c, from, part): (&[T; N], usize, &mut [MaybeUninit<T>])| {
        let x = sources.map(|s| &s[from..from + part.len()]);
        let c = *c;
        pulp::Arch::new().dispatch(
            #[inline(always)]
            move || {
                // Copies of the closure's own: what lies behind a reference could be what is written.
                let (x, c) = (x, c);
                for (i, out) in part.iter_mut().enumerate() {
                    // SAFETY: every slice has the length of `part`.
                    let at = |j: usize| unsafe { *x[j].get_unchecked(i) };
                    let first = c[0] * at(0);
                    out.write((1..N).fold(first, |value, j| value + c[j] * at(j)));
                }
            },
        );
    };
    match n <= PIECE || rayon::current_num_threads() == 1 {
        true => pieces.into_iter().for_each(piece),
        false => pieces.into_par_iter().for_each(piece),
    }
    // SAFETY: every one of the first `n` places has been written.
    unsafe { out.set_len(n) };
    out
}

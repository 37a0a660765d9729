//! Numbers of the rows of a batch.

use super::reward::wide;
use crate::Result;
use candle_core::{DType, Tensor};
use tensor_core::kernels::{moments, GradMap};

/// Numbers per row of a batch.
pub(super) fn per_row(z: &Tensor) -> usize {
    z.elem_count() / z.dims()[0]
}

/// The values `[rows]`.
pub(super) fn numbers(x: &Tensor) -> Result<Vec<f64>> {
    Ok(x.detach().to_dtype(DType::F64)?.to_vec1()?)
}

/// Numbers of the rows as a column that is broadcast over `like`.
pub(super) fn column(values: Vec<f64>, like: &Tensor) -> Result<Tensor> {
    let mut shape = vec![1; like.rank()];
    shape[0] = values.len();
    let column = Tensor::from_vec(values, shape, like.device())?;
    Ok(column.to_dtype(like.dtype())?)
}

/// Products of the rows of two tensors.
pub(super) fn row_dots(a: &Tensor, b: &Tensor) -> Result<Vec<f64>> {
    let sums = row_moments(a, b)?;
    Ok(sums.into_iter().map(|[_, ab, _]| ab).collect())
}

/// `|a|^2`, `<a, b>` and `|b|^2` of the rows, in one pass on the CPU.
pub(super) fn row_moments(a: &Tensor, b: &Tensor) -> Result<Vec<[f64; 3]>> {
    let (a, b) = (wide(&a.detach())?, wide(&b.detach())?);
    if !a.device().is_cpu() {
        let dots = |a: &Tensor, b: &Tensor| numbers(&(a * b)?.flatten_from(1)?.sum(1)?);
        let (aa, ab, bb) = (dots(&a, &a)?, dots(&a, &b)?, dots(&b, &b)?);
        return Ok((0..aa.len()).map(|i| [aa[i], ab[i], bb[i]]).collect());
    }
    let (a, b) = (a.contiguous()?, b.contiguous()?);
    let rows = (0..a.dims()[0])
        .map(|i| Ok((a.narrow(0, i, 1)?, b.narrow(0, i, 1)?)))
        .collect::<Result<Vec<_>>>()?;
    let pairs: Vec<_> = rows
        .iter()
        .map(|(a, b)| (Some(a), b, GradMap::default()))
        .collect();
    let sums = moments(&pairs)?.into_iter();
    Ok(sums.map(|m| [m.pp, m.pg, m.gg]).collect())
}

/// The rows of `yes` where the flag is set, those of `no` elsewhere.
pub(super) fn choose(flags: &[bool], yes: &Tensor, no: &Tensor) -> Result<Tensor> {
    if flags.iter().all(|f| !*f) {
        return Ok(no.clone());
    }
    if flags.iter().all(|f| *f) {
        return Ok(yes.clone());
    }
    let mut shape = vec![1; no.rank()];
    shape[0] = flags.len();
    let flags: Vec<u8> = flags.iter().map(|f| u8::from(*f)).collect();
    let flags = Tensor::from_vec(flags, shape, no.device())?;
    Ok(flags.broadcast_as(no.shape())?.where_cond(yes, no)?)
}

//! Inputs as rows of channels, with their padding.

use super::config::SequenceLayout;
use crate::kernel::wide;
use crate::{Error, Result};
use candle_core::{DType, Tensor};

/// An input checked and flattened.
pub(super) struct Rows {
    /// `[M, C]`, contiguous, in the dtype of the statistics.
    pub x: Tensor,
    /// `[M]` in the same dtype: 1 for a token, 0 for padding.
    pub keep: Option<Tensor>,
}

impl Rows {
    pub(super) fn new(
        x: &Tensor,
        pad: Option<&Tensor>,
        channels: usize,
        layout: SequenceLayout,
    ) -> Result<Self> {
        let dtype = wide(x.dtype())?;
        if x.rank() < 2 || x.dims().last() != Some(&channels) || x.elem_count() == 0 {
            let expected = format!("a non-empty (T, B, {channels}) or (N, {channels})");
            return Err(Error::shape("input", x.dims(), expected));
        }
        let keep = match pad {
            Some(pad) => Some(keep(x, pad, layout, dtype)?),
            None => None,
        };
        let x = x.to_dtype(dtype)?.reshape(((), channels))?.contiguous()?;
        Ok(Self { x, keep })
    }
}

/// The padding mask as a weight per row.
fn keep(x: &Tensor, pad: &Tensor, layout: SequenceLayout, dtype: DType) -> Result<Tensor> {
    let pad = match (x.dims(), layout) {
        ([rows, _], _) => match pad.dims() {
            [n] | [n, 1] if n == rows => pad.clone(),
            other => return Err(Error::shape("pad", other, format!("[{rows}]"))),
        },
        ([t, b, _], SequenceLayout::TimeFirst) => checked(pad, *b, *t)?.t()?,
        ([b, t, _], SequenceLayout::BatchFirst) => checked(pad, *b, *t)?,
        (other, _) => {
            let expected = "two or three dimensions where a padding mask is given";
            return Err(Error::shape("input", other, expected));
        }
    };
    if !pad.dtype().is_int() {
        return Err(Error::dtype("pad", pad.dtype(), "U8, 1 for padding"));
    }
    let keep = pad.contiguous()?.flatten_all()?.eq(0u8)?;
    Ok(keep.to_dtype(dtype)?)
}

fn checked(pad: &Tensor, batch: usize, time: usize) -> Result<Tensor> {
    if pad.dims() != [batch, time] {
        let expected = format!("(batch, time) = [{batch}, {time}]");
        return Err(Error::shape("pad", pad.dims(), expected));
    }
    Ok(pad.clone())
}

//! Counts of gradient signs, one example after the other.

use super::score::SignReduction;
use crate::host::vectorized;
use crate::{Error, Result};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Storage, Tensor, Var};
use rayon::prelude::*;

/// The signs seen at one parameter tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Signs {
    pub(super) positive: Vec<i32>,
    pub(super) negative: Vec<i32>,
    pub(super) nan: Vec<bool>,
}

impl Signs {
    pub(super) fn zeros(len: usize) -> Self {
        Self {
            positive: vec![0; len],
            negative: vec![0; len],
            nan: vec![false; len],
        }
    }

    /// `sum_k |P_k - N_k|` over the columns without a NaN.
    pub(super) fn score(&self) -> u64 {
        let one = |((p, n), nan): ((&i32, &i32), &bool)| {
            if *nan {
                0
            } else {
                u64::from((p - n).unsigned_abs())
            }
        };
        let counts = self.positive.iter().zip(&self.negative);
        counts.zip(&self.nan).map(one).sum()
    }

    /// Adds the counts of other examples.
    pub(super) fn merge(&mut self, more: &Self) {
        let add = |a: &mut [i32], b: &[i32]| a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
        add(&mut self.positive, &more.positive);
        add(&mut self.negative, &more.negative);
        let flags = self.nan.iter_mut().zip(&more.nan);
        flags.for_each(|(a, b)| *a |= b);
    }

    /// The entries at these places, in this order.
    pub(super) fn picked(&self, places: impl Iterator<Item = usize> + Clone) -> Self {
        Self {
            positive: places.clone().map(|i| self.positive[i]).collect(),
            negative: places.clone().map(|i| self.negative[i]).collect(),
            nan: places.map(|i| self.nan[i]).collect(),
        }
    }

    pub(super) fn nans(&self) -> usize {
        self.nan.iter().filter(|nan| **nan).count()
    }
}

/// Counts positive and negative gradient entries per parameter, streaming: two `i32` and a flag for
/// each, whatever the number of examples.
///
/// A NaN spoils its parameter's whole column, which is then left out of the score.
#[derive(Debug, Clone)]
pub struct SignCounter {
    names: Vec<String>,
    signs: Vec<Signs>,
    examples: usize,
}

/// Entries that one task counts.
const CHUNK: usize = 16 * 1024;

impl SignCounter {
    /// For parameters of these names and shapes.
    pub fn new(shapes: &[(String, Vec<usize>)]) -> Self {
        let numel = |(_, shape): &(String, Vec<usize>)| shape.iter().product();
        Self {
            names: shapes.iter().map(|(name, _)| name.clone()).collect(),
            signs: shapes.iter().map(|s| Signs::zeros(numel(s))).collect(),
            examples: 0,
        }
    }

    /// For these parameters.
    pub fn for_params(params: &[(String, Var)]) -> Self {
        let shape = |(name, var): &(String, Var)| (name.clone(), var.dims().to_vec());
        Self::new(&params.iter().map(shape).collect::<Vec<_>>())
    }

    /// Examples counted.
    pub fn examples(&self) -> usize {
        self.examples
    }

    /// Positive and negative entries at each element of parameter `i`.
    pub fn counts(&self, i: usize) -> Option<(&[i32], &[i32])> {
        let signs = self.signs.get(i)?;
        Some((&signs.positive, &signs.negative))
    }

    /// Adds the gradients of one example; a parameter without one counts as zeros.
    ///
    /// # Errors
    /// [`Error::Shape`] when parameters or gradients are not those of [`new`](Self::new).
    pub fn push(&mut self, params: &[(String, Var)], grads: &GradStore) -> Result<()> {
        if params.len() != self.signs.len() {
            let expected = format!("{} parameters", self.signs.len());
            return Err(Error::shape("gradients", &[params.len()], expected));
        }
        for (i, (_, var)) in params.iter().enumerate() {
            if let Some(grad) = grads.get(var) {
                self.add(i, grad)?;
            }
        }
        self.examples += 1;
        Ok(())
    }

    /// Adds one example's gradients as a row `[m]` over all parameters, one after the other.
    ///
    /// # Errors
    /// [`Error::Shape`] for another length.
    pub fn push_row(&mut self, row: &Tensor) -> Result<()> {
        let total: usize = self.signs.iter().map(|s| s.nan.len()).sum();
        if row.elem_count() != total {
            return Err(Error::shape("gradients", row.dims(), format!("[{total}]")));
        }
        let (row, mut from) = (row.flatten_all()?, 0);
        for i in 0..self.signs.len() {
            let len = self.signs[i].nan.len();
            self.add(i, &row.narrow(0, from, len)?)?;
            from += len;
        }
        self.examples += 1;
        Ok(())
    }

    fn add(&mut self, i: usize, grad: &Tensor) -> Result<()> {
        let signs = &mut self.signs[i];
        if grad.elem_count() != signs.nan.len() {
            let expected = format!("{} entries", signs.nan.len());
            let name = format!("gradient of `{}`", self.names[i]);
            return Err(Error::shape(name, grad.dims(), expected));
        }
        let grad = grad.detach().to_device(&Device::Cpu)?.contiguous()?;
        // Half precision is exact in single precision.
        let grad = match grad.dtype() {
            DType::F32 | DType::F64 => grad,
            _ => grad.to_dtype(DType::F32)?,
        };
        let (storage, layout) = grad.storage_and_layout();
        let Storage::Cpu(cpu) = &*storage else {
            return Err(Error::argument("gradient", "on a device", "host memory"));
        };
        let range = layout.start_offset()..layout.start_offset() + grad.elem_count();
        match grad.dtype() {
            DType::F64 => count(signs, &cpu.as_slice::<f64>()?[range]),
            _ => count(signs, &cpu.as_slice::<f32>()?[range]),
        }
        Ok(())
    }

    /// The score `tau` (or its mean per parameter without NaN) of what has been counted.
    pub fn score(&self, reduction: SignReduction) -> f64 {
        let tau: u64 = self.signs.iter().map(Signs::score).sum();
        match reduction {
            SignReduction::Sum => tau as f64,
            SignReduction::Mean => {
                let all: usize = self.signs.iter().map(|s| s.nan.len()).sum();
                tau as f64 / (all - self.nan_params()) as f64
            }
        }
    }

    /// Parameters whose column holds a NaN.
    pub fn nan_params(&self) -> usize {
        self.signs.iter().map(Signs::nans).sum()
    }

    /// Name and score of each tensor.
    pub fn per_tensor(&self) -> Vec<(String, f64)> {
        let scores = self.signs.iter().map(|s| s.score() as f64);
        self.names.iter().cloned().zip(scores).collect()
    }

    /// Names of the tensors with a NaN.
    pub(super) fn spoiled(&self) -> Vec<String> {
        let with = self.names.iter().zip(&self.signs);
        with.filter(|(_, signs)| signs.nans() > 0)
            .map(|(name, signs)| format!("`{name}` ({} columns)", signs.nans()))
            .collect()
    }

    /// Takes over the counts of `examples` examples at tensor `i`.
    pub(super) fn merge(&mut self, i: usize, more: &Signs) {
        self.signs[i].merge(more);
    }

    pub(super) fn set_examples(&mut self, examples: usize) {
        self.examples = examples;
    }
}

/// Adds the signs of one gradient, on all cores.
pub(super) fn count<T: Copy + PartialOrd + Default + Sync>(signs: &mut Signs, grad: &[T]) {
    let chunks = signs
        .positive
        .par_chunks_mut(CHUNK)
        .zip(signs.negative.par_chunks_mut(CHUNK))
        .zip(signs.nan.par_chunks_mut(CHUNK))
        .zip(grad.par_chunks(CHUNK));
    chunks.for_each(|(((positive, negative), nan), grad)| add(positive, negative, nan, grad));
}

/// Adds the signs of one gradient, on this thread.
pub(super) fn count_into<T: Copy + PartialOrd + Default>(signs: &mut Signs, grad: &[T]) {
    add(
        &mut signs.positive,
        &mut signs.negative,
        &mut signs.nan,
        grad,
    );
}

fn add<T: Copy + PartialOrd + Default>(
    positive: &mut [i32],
    negative: &mut [i32],
    nan: &mut [bool],
    grad: &[T],
) {
    let zero = T::default();
    vectorized(
        #[inline(always)]
        || {
            for (p, g) in positive.iter_mut().zip(grad) {
                *p = p.wrapping_add(i32::from(*g > zero));
            }
            for (n, g) in negative.iter_mut().zip(grad) {
                *n = n.wrapping_add(i32::from(*g < zero));
            }
            for (nan, g) in nan.iter_mut().zip(grad) {
                // Neither above, below nor equal: NaN.
                *nan |= g.partial_cmp(&zero).is_none();
            }
        },
    );
}

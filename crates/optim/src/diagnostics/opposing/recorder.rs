//! Losses of the same examples over the course of training.

use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use std::collections::VecDeque;

/// A ring buffer of per-example losses: the last `capacity` recordings of `n` examples in `f32`.
///
/// Record every step or every `s`-th; the examples may be all of the data, a probe set of 1 to 5 %,
/// or the tokens `[B, L]` of a probe text. Compute the losses in evaluation mode.
#[derive(Debug, Clone)]
pub struct LossRecorder {
    n: usize,
    capacity: usize,
    steps: VecDeque<usize>,
    rows: VecDeque<Vec<f32>>,
}

impl LossRecorder {
    /// For `examples` examples and at most `capacity` recordings; older ones are dropped.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for no examples or a capacity below 2.
    pub fn new(examples: usize, capacity: usize) -> Result<Self> {
        if examples == 0 {
            return Err(Error::argument("examples", 0, "at least 1"));
        }
        if capacity < 2 {
            return Err(Error::argument("capacity", capacity, "at least 2"));
        }
        Ok(Self {
            n: examples,
            capacity,
            steps: VecDeque::new(),
            rows: VecDeque::new(),
        })
    }

    /// Records the losses (any shape with as many entries as examples) before step `step`.
    ///
    /// # Errors
    /// [`Error::Shape`] for another number of losses; [`Error::InvalidArgument`] for a step that
    /// is not after the last one; [`Error::NonFiniteLoss`] for a loss that is no number. Nothing is
    /// recorded then.
    pub fn record(&mut self, step: usize, losses: &Tensor) -> Result<()> {
        if losses.elem_count() != self.n {
            let expected = format!("{} entries", self.n);
            return Err(Error::shape("losses", losses.dims(), expected));
        }
        if let Some(last) = self.steps.back().filter(|last| **last >= step) {
            return Err(Error::argument("step", step, format!("after {last}")));
        }
        let row = losses.detach().to_device(&Device::Cpu)?.flatten_all()?;
        let row = row.to_dtype(DType::F32)?.to_vec1::<f32>()?;
        if let Some(i) = row.iter().position(|l| !l.is_finite()) {
            return Err(Error::NonFiniteLoss {
                what: format!("the loss of example {i}"),
                value: f64::from(row[i]),
            });
        }
        if self.rows.len() == self.capacity {
            self.rows.pop_front();
            self.steps.pop_front();
        }
        self.rows.push_back(row);
        self.steps.push_back(step);
        Ok(())
    }

    /// Number of examples.
    pub fn examples(&self) -> usize {
        self.n
    }

    /// Number of recordings kept.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether nothing has been recorded.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The step of recording `t`.
    pub fn step(&self, t: usize) -> Option<usize> {
        self.steps.get(t).copied()
    }

    /// The losses of recording `t`.
    pub fn losses(&self, t: usize) -> Option<&[f32]> {
        self.rows.get(t).map(Vec::as_slice)
    }

    /// `l_i(t + 1) - l_i(t)` for all examples.
    pub(super) fn changes(&self, t: usize) -> Option<Vec<f64>> {
        let (now, next) = (self.rows.get(t)?, self.rows.get(t + 1)?);
        let change = |(a, b): (&f32, &f32)| f64::from(*b) - f64::from(*a);
        Some(now.iter().zip(next).map(change).collect())
    }
}

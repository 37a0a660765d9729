//! The noise of stochastic steps.

use crate::error::{check, Error, Result};
use candle_core::Tensor;
use tensor_core::random::RandomStream;

/// Where a sampler's noise comes from.
#[derive(Debug, Clone)]
pub enum Noise {
    /// One stream per row, so that a row does not depend on which others share its batch.
    Rows(Vec<RandomStream>),
    /// These tensors in turn, to repeat a run of another program.
    Given(std::vec::IntoIter<Tensor>),
}

impl Noise {
    /// Streams for `rows` rows; row `i` depends on the stream and `i` alone.
    pub fn rows(rng: &RandomStream, rows: usize) -> Self {
        let one = |i| rng.split_index("row", i as u64);
        Self::Rows((0..rows).map(one).collect())
    }

    /// These tensors in turn.
    pub fn given(tensors: Vec<Tensor>) -> Self {
        Self::Given(tensors.into_iter())
    }

    /// Standard normal noise like `x`, `[rows, ...]`.
    ///
    /// # Errors
    /// [`Error::Shape`] when the rows are not those of the streams, or a given tensor does not fit;
    /// [`Error::InvalidArgument`] when the given tensors are used up.
    pub fn next(&mut self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Given(tensors) => {
                let next = tensors.next().ok_or_else(|| {
                    Error::argument("given noise", "used up", "a tensor per stochastic step")
                })?;
                check::same_shape("the given noise", &next, x)?;
                Ok(next)
            }
            Self::Rows(streams) => {
                if check::rows("x", x)? != streams.len() {
                    let expected = format!("{} rows, one per noise stream", streams.len());
                    return Err(Error::shape("x", x.dims(), expected));
                }
                let shape = &x.dims()[1..];
                let rows = streams
                    .iter_mut()
                    .map(|s| s.normal(0.0, 1.0, shape, x.dtype(), x.device()))
                    .collect::<std::result::Result<Vec<_>, _>>()?;
                match rows.is_empty() {
                    true => Ok(x.zeros_like()?),
                    false => Ok(Tensor::stack(&rows, 0)?),
                }
            }
        }
    }
}

//! One vector for each graph of a batch, and for each node from several layers.

use crate::graph::GraphBatch;
use crate::sparse::{segment_softmax, spmm, Reduce};
use crate::{Error, Result};
use candle_core::Tensor;
use candle_nn::rnn::{Direction, LSTMConfig, LSTM, RNN};
use candle_nn::{Init, VarBuilder};

/// The nodes `[n, ..]` of each graph reduced to one row: `[graphs, ..]`. A graph without nodes gets
/// zeros.
///
/// # Errors
/// [`Error::Shape`] unless there is one row per node.
pub fn global(batch: &GraphBatch, x: &Tensor, reduce: Reduce) -> Result<Tensor> {
    spmm(batch.members(), None, x, reduce)
}

/// The sum over each graph's nodes.
///
/// # Errors
/// As [`global`].
pub fn global_add(batch: &GraphBatch, x: &Tensor) -> Result<Tensor> {
    global(batch, x, Reduce::Sum)
}

/// The mean over each graph's nodes.
///
/// # Errors
/// As [`global`].
pub fn global_mean(batch: &GraphBatch, x: &Tensor) -> Result<Tensor> {
    global(batch, x, Reduce::Mean)
}

/// The maximum over each graph's nodes.
///
/// # Errors
/// As [`global`].
pub fn global_max(batch: &GraphBatch, x: &Tensor) -> Result<Tensor> {
    global(batch, x, Reduce::Max)
}

/// A weighted mean over each graph's nodes, with weights `softmax(gate)` of logits `[n]` that a
/// network of yours gives (Li et al., ICLR 2016).
///
/// # Errors
/// As [`global`].
pub fn global_attention(batch: &GraphBatch, gate: &Tensor, x: &Tensor) -> Result<Tensor> {
    let weights = segment_softmax(batch.members(), gate)?;
    spmm(batch.members(), Some(&weights), x, Reduce::Sum)
}

/// How the outputs of several layers become one (Xu et al., ICML 2018).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JumpingKnowledge {
    /// Side by side.
    Concat,
    /// The largest of each channel.
    Max,
}

impl JumpingKnowledge {
    /// One tensor from those of the layers, `[n, d]` each (of one shape for the maximum).
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for no layer, shapes that do not fit.
    pub fn forward(self, layers: &[Tensor]) -> Result<Tensor> {
        let (first, rest) = layers
            .split_first()
            .ok_or_else(|| Error::argument("layers", 0, "at least 1"))?;
        match self {
            Self::Concat => Ok(Tensor::cat(layers, first.rank() - 1)?),
            Self::Max => {
                let larger = |max: Tensor, layer: &Tensor| Ok(max.maximum(layer)?);
                rest.iter().try_fold(first.clone(), larger)
            }
        }
    }
}

/// Jumping knowledge by attention over the layers (Xu et al., ICML 2018): a bidirectional LSTM reads a
/// node's outputs from the first layer to the last, and a softmax over its states weighs them.
///
/// Parameters as in PyTorch Geometric: `lstm.weight_ih_l0`, .., `lstm.bias_hh_l0_reverse`,
/// `att.weight`, `att.bias`.
#[derive(Debug, Clone)]
pub struct LstmJumpingKnowledge {
    forth: LSTM,
    back: LSTM,
    attention: (Tensor, Tensor),
    channels: usize,
    layers: usize,
}

impl LstmJumpingKnowledge {
    /// For `layers` layers of `channels` channels; the LSTM has `layers channels / 2` in each
    /// direction.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for none of either, those of the builder.
    pub fn new(channels: usize, layers: usize, vb: VarBuilder) -> Result<Self> {
        let hidden = layers * channels / 2;
        if hidden == 0 {
            let value = format!("{layers} of {channels} channels");
            return Err(Error::argument("layers", value, "two numbers at least"));
        }
        let uniform = |n: usize| {
            let bound = 1.0 / (n as f64).sqrt();
            Init::Uniform {
                lo: -bound,
                up: bound,
            }
        };
        let lstm = |direction| {
            let config = LSTMConfig {
                w_ih_init: uniform(hidden),
                w_hh_init: uniform(hidden),
                b_ih_init: Some(uniform(hidden)),
                b_hh_init: Some(uniform(hidden)),
                layer_idx: 0,
                direction,
            };
            LSTM::new(channels, hidden, config, vb.pp("lstm"))
        };
        let att = vb.pp("att");
        Ok(Self {
            forth: lstm(Direction::Forward)?,
            back: lstm(Direction::Backward)?,
            attention: (
                att.get_with_hints((1, 2 * hidden), "weight", uniform(2 * hidden))?,
                att.get_with_hints(1, "bias", uniform(2 * hidden))?,
            ),
            channels,
            layers,
        })
    }

    /// The weighted mean `[n, channels]` of the layers' outputs, `[n, channels]` each.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for another number of layers, [`Error::Shape`].
    pub fn forward(&self, outputs: &[Tensor]) -> Result<Tensor> {
        if outputs.len() != self.layers {
            return Err(Error::argument("layers", outputs.len(), self.layers));
        }
        let n = outputs[0].dims()[0];
        if let Some(bad) = outputs.iter().find(|h| h.dims() != [n, self.channels]) {
            let expected = format!("[{n}, {}]", self.channels);
            return Err(Error::shape("layer output", bad.dims(), expected));
        }
        let states =
            |lstm: &LSTM, order: &mut dyn Iterator<Item = &Tensor>| -> Result<Vec<Tensor>> {
                let mut state = lstm.zero_state(n)?;
                let mut all = Vec::with_capacity(self.layers);
                for h in order {
                    state = lstm.step(h, &state)?;
                    all.push(state.h().clone());
                }
                Ok(all)
            };
        let forth = states(&self.forth, &mut outputs.iter())?;
        let mut back = states(&self.back, &mut outputs.iter().rev())?;
        back.reverse();
        let (w, b) = &self.attention;
        let mut scores = Vec::with_capacity(self.layers);
        for pair in forth.iter().zip(&back) {
            let state = Tensor::cat(&[pair.0, pair.1], 1)?;
            scores.push(state.matmul(&w.t()?)?.broadcast_add(b)?);
        }
        let weights = nn::softmax::softmax(&Tensor::cat(&scores, 1)?, 1)?.unsqueeze(2)?;
        Ok(Tensor::stack(outputs, 1)?.broadcast_mul(&weights)?.sum(1)?)
    }
}

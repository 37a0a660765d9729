//! The encoder that all methods share.

use crate::conv::{leaky_relu, GcnConfig, GcnConv};
use crate::graph::Graph;
use crate::sparse::Features;
use crate::{Error, Result};
use candle_core::{DType, Tensor};
use candle_nn::{Init, VarBuilder};

/// The activation after both layers.
#[derive(Debug, Clone)]
pub enum EncoderActivation {
    /// `max(x, 0)`.
    Relu,
    /// `max(x, 0) + a min(x, 0)` with a trained `a` `[1]`.
    PRelu(Tensor),
}

impl EncoderActivation {
    /// A trained slope that starts at 0.25, under the name `weight`.
    ///
    /// # Errors
    /// Those of the builder.
    pub fn prelu(vb: VarBuilder) -> Result<Self> {
        Ok(Self::PRelu(vb.get_with_hints(
            1,
            "weight",
            Init::Const(0.25),
        )?))
    }

    /// The function itself.
    ///
    /// # Errors
    /// Those of candle.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Relu => Ok(x.relu()?),
            Self::PRelu(a) => Ok((x.relu()? - x.neg()?.relu()?.broadcast_mul(a)?)?),
        }
    }

    /// The slope below 0 as a number, cut from the graph.
    ///
    /// # Errors
    /// Those of candle.
    pub fn slope(&self) -> Result<f64> {
        match self {
            Self::Relu => Ok(0.0),
            Self::PRelu(a) => {
                let a = a
                    .detach()
                    .to_dtype(DType::F64)?
                    .flatten_all()?
                    .to_vec1::<f64>()?;
                a.first()
                    .copied()
                    .ok_or_else(|| Error::shape("PReLU slope", &[0], "[1]"))
            }
        }
    }

    /// The function with the slope as a constant.
    pub(super) fn apply_fixed(&self, x: &Tensor) -> Result<Tensor> {
        leaky_relu(x, self.slope()?)
    }
}

/// `Z = s(A s(A X W1 + b1) W2 + b2)`, from `in` over `2 h` to `h` features; `A` is the normalized
/// adjacency with self-loops.
///
/// Parameters `conv.0.*` and `conv.1.*` of [`GcnConv`].
#[derive(Debug, Clone)]
pub struct GcnEncoder {
    conv: [GcnConv; 2],
    activation: EncoderActivation,
}

impl GcnEncoder {
    /// An encoder to `hidden` features.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a width of 0, and those of the builder.
    pub fn new(
        inputs: usize,
        hidden: usize,
        activation: EncoderActivation,
        vb: VarBuilder,
    ) -> Result<Self> {
        let config = GcnConfig::default();
        let vb = vb.pp("conv");
        Ok(Self {
            conv: [
                GcnConv::new(inputs, 2 * hidden, config, vb.pp(0))?,
                GcnConv::new(2 * hidden, hidden, config, vb.pp(1))?,
            ],
            activation,
        })
    }

    /// Embeddings `[n, h]`.
    ///
    /// # Errors
    /// Shapes and dtypes that do not fit.
    pub fn forward(&self, graph: &Graph, x: &Features) -> Result<Tensor> {
        let h = self
            .activation
            .apply(&self.conv[0].apply(graph, x, None)?)?;
        self.activation.apply(&self.conv[1].forward(graph, &h)?)
    }

    /// The two layers.
    pub fn layers(&self) -> &[GcnConv; 2] {
        &self.conv
    }

    /// The activation.
    pub fn activation(&self) -> &EncoderActivation {
        &self.activation
    }
}

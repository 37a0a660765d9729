//! What the networks are put together from.

use crate::init::Initializer;
use crate::Result;
use candle_core::{Module, Tensor};
use candle_nn::{Linear, VarBuilder};

/// A nonlinearity between layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Activation {
    /// None.
    Identity,
    /// `max(x, 0)`.
    #[default]
    Relu,
    /// `x Phi(x)` with the exact normal distribution function.
    Gelu,
    /// `x sigmoid(x)`.
    Silu,
    /// `tanh x`.
    Tanh,
}

impl Module for Activation {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        match self {
            Activation::Identity => Ok(x.clone()),
            Activation::Relu => x.relu(),
            // By the error function: the gradient of candle's `gelu_erf` has only 7 digits.
            Activation::Gelu => {
                let phi = ((x * std::f64::consts::FRAC_1_SQRT_2)?.erf()? + 1.0)?;
                (x * phi)? * 0.5
            }
            Activation::Silu => x.silu(),
            Activation::Tanh => x.tanh(),
        }
    }
}

/// A linear layer with variables `weight` `[out, in]` and, if wanted, `bias` `[out]` (drawn from
/// PyTorch's default for biases).
pub(super) fn linear(
    inputs: usize,
    outputs: usize,
    bias: bool,
    init: Initializer,
    vb: VarBuilder,
) -> Result<Linear> {
    let weight = vb.get_with_hints((outputs, inputs), "weight", init.hint(&[outputs, inputs])?)?;
    let bias = match bias {
        true => {
            let hint = Initializer::torch_bias(inputs).hint(&[outputs])?;
            Some(vb.get_with_hints(outputs, "bias", hint)?)
        }
        false => None,
    };
    Ok(Linear::new(weight, bias))
}

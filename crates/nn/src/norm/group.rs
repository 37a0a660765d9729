//! Group norm, with a gradient.

use super::fused::{self, Groups};
use super::layer::check_eps;
use crate::activation::Activation;
use crate::kernel::{has_kernel, wide};
use crate::linear::same_dtype;
use crate::{Error, Result};
use candle_core::{Module, Tensor};
use candle_nn::{Init, VarBuilder};
use tensor_core::autograd::keeps_graph;

/// Group norm (Wu, He 2018): the channels of `[B, C, ..]` in groups of `C / groups`, each group of
/// each example normalized by its mean and (biased) variance over channels and positions, then
/// scaled and shifted per channel.
///
/// The parameters `weight` and `bias` `[C]` of [`candle_nn::GroupNorm`]. One pass over memory forward
/// and one backward on the CPU in f32 and f64; candle operations elsewhere and where gradients
/// keep their graph, differentiable any number of times. f16 and bf16 are computed in f32.
#[derive(Debug, Clone)]
pub struct GroupNorm {
    weight: Tensor,
    bias: Tensor,
    groups: usize,
    eps: f64,
    activation: Activation,
}

/// A [`GroupNorm`] from the variables `weight` (ones) and `bias` (zeros).
///
/// # Errors
/// [`Error::InvalidConfig`], and candle's when the variables do not fit.
pub fn group_norm(groups: usize, channels: usize, eps: f64, vb: VarBuilder) -> Result<GroupNorm> {
    let weight = vb.get_with_hints(channels, "weight", Init::Const(1.0))?;
    let bias = vb.get_with_hints(channels, "bias", Init::Const(0.0))?;
    GroupNorm::new(weight, bias, groups, eps)
}

impl GroupNorm {
    /// From existing tensors `[C]`.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] and [`Error::Shape`].
    pub fn new(weight: Tensor, bias: Tensor, groups: usize, eps: f64) -> Result<Self> {
        check_eps("GroupNorm::eps", eps)?;
        if weight.rank() != 1 || weight.dims() != bias.dims() {
            let expected = format!("{:?}, one dimension", weight.dims());
            return Err(Error::shape("bias", bias.dims(), expected));
        }
        let channels = weight.elem_count();
        if groups == 0 || channels == 0 || !channels.is_multiple_of(groups) {
            let expected = format!("a divisor of {channels} channels");
            return Err(Error::config("GroupNorm::groups", groups, expected));
        }
        Ok(Self {
            weight,
            bias,
            groups,
            eps,
            activation: Activation::Identity,
        })
    }

    /// The same layer followed by an activation, fused.
    #[must_use]
    pub fn with_activation(self, activation: Activation) -> Self {
        Self { activation, ..self }
    }

    /// The weight `[C]`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// The bias `[C]`.
    pub fn bias(&self) -> &Tensor {
        &self.bias
    }

    /// By candle operations.
    fn composed(&self, x: &Tensor) -> Result<Tensor> {
        let dtype = wide(x.dtype())?;
        let batch = x.dims()[0];
        let rows = x.to_dtype(dtype)?.reshape((batch, self.groups, ()))?;
        let centered = rows.broadcast_sub(&rows.mean_keepdim(2)?)?;
        let variance = centered.sqr()?.mean_keepdim(2)?;
        let h = centered.broadcast_div(&(variance + self.eps)?.sqrt()?)?;
        let mut dims = vec![1; x.rank()];
        dims[1] = self.weight.elem_count();
        let scaled = h
            .reshape(x.shape())?
            .to_dtype(x.dtype())?
            .broadcast_mul(&self.weight.reshape(dims.as_slice())?)?;
        let shifted = scaled.broadcast_add(&self.bias.reshape(dims)?)?;
        self.activation.composed(&shifted)
    }
}

impl Module for GroupNorm {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let channels = self.weight.elem_count();
        if x.rank() < 2 || x.elem_count() == 0 || x.dims()[1] != channels {
            let expected = format!("a non-empty [B, {channels}, ..]");
            return Err(Error::shape("input", x.dims(), expected).into());
        }
        same_dtype(x, [Some(&self.weight), Some(&self.bias)])?;
        Ok(match has_kernel(x) && !keeps_graph()? {
            true => {
                let groups = Groups {
                    groups: self.groups,
                    eps: self.eps,
                    activation: self.activation,
                };
                fused::normalize_groups(x, &self.weight, &self.bias, groups)?
            }
            false => self.composed(x)?,
        })
    }
}

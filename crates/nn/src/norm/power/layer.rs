//! The layer.

use super::config::PowerNormConfig;
use super::group_scaling::GroupScaling;
use super::rows::Rows;
use super::state::{PowerNormStatistics, State};
use super::{composed, fused, kernel::GROUP_EPS};
use crate::kernel::has_kernel;
use crate::{Error, Result};
use candle_core::{ModuleT, Tensor};
use candle_nn::{Init, Linear, VarBuilder};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Power normalization; see the [module](super) page.
///
/// Variables: `weight` and `bias` `[C]`, trained; `running_phi` and `ema_gz` `[C]` and `iters`
/// `[1]`, buffers that are saved with the weights and that no optimizer may see
/// ([`init::trainable`](crate::init::trainable) leaves them out). Clones share all of them.
///
/// On the CPU one fused kernel for group scaling, normalization and affine map reads the input once
/// (twice in warm-up), and one backward kernel gives all three gradients in one pass; the bits do
/// not depend on the number of threads. Other devices run the same mathematics in candle
/// operations. f16 and bf16 inputs are computed in f32.
#[derive(Debug, Clone)]
pub struct PowerNorm {
    weight: Tensor,
    bias: Tensor,
    config: PowerNormConfig,
    state: Arc<State>,
}

impl PowerNorm {
    /// A layer over `channels` channels from the variables of `vb`.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] (also when the groups do not divide the channels), and candle's
    /// when variables do not fit.
    pub fn new(channels: usize, config: PowerNormConfig, vb: VarBuilder) -> Result<Self> {
        config.validate()?;
        let scaling = GroupScaling {
            groups: config.groups,
            eps: GROUP_EPS,
        };
        scaling.check_channels(channels)?;
        Ok(Self {
            weight: vb.get_with_hints(channels, "weight", Init::Const(1.0))?,
            bias: vb.get_with_hints(channels, "bias", Init::Const(0.0))?,
            state: Arc::new(State::new(channels, &vb)?),
            config,
        })
    }

    /// Normalizes `x`: `(T, B, C)` or `(B, T, C)` by the configured layout, `(N, C)`, or without a
    /// mask any shape that ends in `C`. `pad` is `(B, T)` (or `[N]`) of integers, nonzero for
    /// padding.
    ///
    /// With `train` the statistics move: phi and the step count now, `ema_gz` in the backward
    /// pass. A batch of nothing but padding is divided by phi and moves nothing.
    ///
    /// # Errors
    /// [`Error::Shape`] and [`Error::DType`] for inputs that do not fit or are empty,
    /// [`Error::NonFinite`] for NaN or infinity (in the backward pass too, inside candle's error);
    /// the statistics then stay as they were.
    pub fn forward_t(&self, x: &Tensor, pad: Option<&Tensor>, train: bool) -> Result<Tensor> {
        let rows = Rows::new(x, pad, self.weight.elem_count(), self.config.layout)?;
        let dtype = rows.x.dtype();
        let (weight, bias) = (self.weight.to_dtype(dtype)?, self.bias.to_dtype(dtype)?);
        let path = match has_kernel(&rows.x) {
            true => fused::forward,
            false => composed::forward,
        };
        let y = path(&self.config, &self.state, &rows, &weight, &bias, train)?;
        Ok(y.reshape(x.shape())?.to_dtype(x.dtype())?)
    }

    /// [`forward_t`](Self::forward_t) by candle operations on every device: the path that devices
    /// without a fused kernel take, for comparisons.
    ///
    /// # Errors
    /// As [`forward_t`](Self::forward_t).
    pub fn forward_composed(
        &self,
        x: &Tensor,
        pad: Option<&Tensor>,
        train: bool,
    ) -> Result<Tensor> {
        let rows = Rows::new(x, pad, self.weight.elem_count(), self.config.layout)?;
        let dtype = rows.x.dtype();
        let (weight, bias) = (self.weight.to_dtype(dtype)?, self.bias.to_dtype(dtype)?);
        let y = composed::forward(&self.config, &self.state, &rows, &weight, &bias, train)?;
        Ok(y.reshape(x.shape())?.to_dtype(x.dtype())?)
    }

    /// The evaluation map as `y = scale * x + shift` per channel, `([C], [C])`:
    /// `scale = weight / sqrt(phi + eps)`, `shift = bias`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with group scaling, which stays a per-token scale in evaluation.
    pub fn to_affine(&self) -> Result<(Tensor, Tensor)> {
        if self.config.group_scaling {
            return Err(Error::Unsupported {
                operation: "folding power norm into an affine map".into(),
                context: "with group scaling, which depends on each token".into(),
            });
        }
        let phi = self.state.phi.as_detached_tensor();
        let inverse = (phi + self.config.eps)?.sqrt()?.recip()?;
        let scale = (self.weight.detach() * inverse.to_dtype(self.weight.dtype())?)?;
        Ok((scale, self.bias.detach().copy()?))
    }

    /// The linear layer that does in evaluation what this layer followed by `next` does:
    /// `W' = W diag(scale)`, `b' = b + W shift`.
    ///
    /// # Errors
    /// As [`to_affine`](Self::to_affine); [`Error::Shape`] when `next` does not take `C` inputs.
    pub fn fold_into(&self, next: &Linear) -> Result<Linear> {
        let (scale, shift) = self.to_affine()?;
        let weight = next.weight().detach();
        if weight.dim(1)? != scale.elem_count() {
            let expected = format!("[_, {}]", scale.elem_count());
            return Err(Error::shape(
                "weight of the linear layer",
                weight.dims(),
                expected,
            ));
        }
        let moved = weight.matmul(&shift.unsqueeze(1)?)?.squeeze(1)?;
        let bias = match next.bias() {
            Some(bias) => (bias.detach() + moved)?,
            None => moved,
        };
        Ok(Linear::new(weight.broadcast_mul(&scale)?, Some(bias)))
    }

    /// The weight `[C]`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// The bias `[C]`.
    pub fn bias(&self) -> &Tensor {
        &self.bias
    }

    /// The configuration.
    pub fn config(&self) -> &PowerNormConfig {
        &self.config
    }

    /// The running quadratic mean phi `[C]`, a copy.
    ///
    /// # Errors
    /// Those of candle.
    pub fn running_phi(&self) -> Result<Tensor> {
        let _guard = self.state.lock();
        Ok(self.state.phi.copy()?.detach())
    }

    /// The backward statistic `nu'` `[C]`, a copy.
    ///
    /// # Errors
    /// Those of candle.
    pub fn ema_gz(&self) -> Result<Tensor> {
        let _guard = self.state.lock();
        Ok(self.state.ema_gz.copy()?.detach())
    }

    /// Training steps so far.
    ///
    /// # Errors
    /// Those of candle.
    pub fn iters(&self) -> Result<u64> {
        let _guard = self.state.lock();
        self.state.iters()
    }

    /// All statistics as numbers, for monitoring.
    ///
    /// # Errors
    /// Those of candle.
    pub fn statistics(&self) -> Result<PowerNormStatistics> {
        self.state.statistics()
    }

    /// The buffers by name (`running_phi`, `ema_gz`, `iters`), copied. Weight and bias are the
    /// variable builder's to save, and a saved `VarMap` holds the buffers as well.
    ///
    /// # Errors
    /// Those of candle.
    pub fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        self.state.save()
    }

    /// Puts back what [`state`](Self::state) returned.
    ///
    /// # Errors
    /// [`Error::StateMismatch`] names everything that is missing, unknown, or of another shape or
    /// dtype; nothing is changed then.
    pub fn load_state(&self, state: &BTreeMap<String, Tensor>) -> Result<()> {
        self.state.load(state)
    }
}

/// Without a padding mask.
impl ModuleT for PowerNorm {
    fn forward_t(&self, x: &Tensor, train: bool) -> candle_core::Result<Tensor> {
        Ok(PowerNorm::forward_t(self, x, None, train)?)
    }
}

//! PN-V: the paper's ablation without running statistics.

use super::config::{PowerNormConfig, SequenceLayout};
use super::group_scaling::GroupScaling;
use super::kernel::GROUP_EPS;
use super::rows::Rows;
use crate::Result;
use candle_core::{Module, ModuleT, Tensor};
use candle_nn::{Init, VarBuilder};

/// PN-V: power normalization that always divides by the quadratic mean of the batch at hand,
/// `y = weight h / sqrt(q + eps) + bias`, with the exact gradient (through `q` too).
///
/// The paper's ablation between batch norm and [`PowerNorm`](super::PowerNorm). There are no
/// running statistics: the output depends on the batch in evaluation as well. Built from candle
/// operations: any device, gradients of any order.
#[derive(Debug, Clone)]
pub struct PowerNormV {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
    scaling: Option<GroupScaling>,
    layout: SequenceLayout,
}

impl PowerNormV {
    /// From the variables `weight` (ones) and `bias` (zeros). Of the configuration only `eps`,
    /// `groups`, `group_scaling` and `layout` matter.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`](crate::Error::InvalidConfig), and candle's when the variables do
    /// not fit.
    pub fn new(channels: usize, config: PowerNormConfig, vb: VarBuilder) -> Result<Self> {
        config.validate()?;
        let scaling = GroupScaling {
            groups: config.groups,
            eps: GROUP_EPS,
        };
        if config.group_scaling {
            scaling.check_channels(channels)?;
        }
        Ok(Self {
            weight: vb.get_with_hints(channels, "weight", Init::Const(1.0))?,
            bias: vb.get_with_hints(channels, "bias", Init::Const(0.0))?,
            eps: config.eps,
            scaling: config.group_scaling.then_some(scaling),
            layout: config.layout,
        })
    }

    /// Normalizes; shapes as for [`PowerNorm::forward_t`](super::PowerNorm::forward_t). A batch of
    /// nothing but padding has no quadratic mean: it is divided by `sqrt(eps)`.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) and [`Error::DType`](crate::Error::DType).
    pub fn forward(&self, x: &Tensor, pad: Option<&Tensor>) -> Result<Tensor> {
        let rows = Rows::new(x, pad, self.weight.elem_count(), self.layout)?;
        let h = match &self.scaling {
            Some(scaling) => scaling.forward(&rows.x)?,
            None => rows.x,
        };
        let q = match &rows.keep {
            Some(keep) => {
                let kept = h
                    .sqr()?
                    .broadcast_mul(&keep.unsqueeze(1)?)?
                    .sum_keepdim(0)?;
                kept.broadcast_div(&keep.sum_all()?.maximum(1.0)?)?
            }
            None => h.sqr()?.mean_keepdim(0)?,
        };
        let z = h.broadcast_div(&(q + self.eps)?.sqrt()?)?;
        let dtype = z.dtype();
        let y = z
            .broadcast_mul(&self.weight.to_dtype(dtype)?)?
            .broadcast_add(&self.bias.to_dtype(dtype)?)?;
        Ok(y.reshape(x.shape())?.to_dtype(x.dtype())?)
    }
}

impl ModuleT for PowerNormV {
    fn forward_t(&self, x: &Tensor, _train: bool) -> candle_core::Result<Tensor> {
        Ok(self.forward(x, None)?)
    }
}

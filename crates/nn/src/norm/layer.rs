//! Layer norm and RMS norm over the last dimension, with a gradient.
//!
//! ```text
//! h  = (x - mean) r,   r = 1 / sqrt(mean (x - mean)^2 + eps),   y = h weight + bias
//! g  = dy weight,      dx = r (g - mean g - h mean(g h))
//! ```
//!
//! RMS norm is the same without the two means of `x` and `g`.

use super::fused::{self, Rows};
use crate::kernel::has_kernel;
use crate::{Error, Result};
use candle_core::{DType, Module, Tensor, D};
use candle_nn::{Init, VarBuilder};
use tensor_core::autograd::keeps_graph;

/// Configuration of [`LayerNorm`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LayerNormConfig {
    /// Added to the variance under the square root.
    pub eps: f64,
    /// Subtract the mean; without it this is RMS norm with a bias.
    pub remove_mean: bool,
    /// Have a bias; the weight is always there.
    pub affine: bool,
}

impl Default for LayerNormConfig {
    fn default() -> Self {
        Self {
            eps: 1e-5,
            remove_mean: true,
            affine: true,
        }
    }
}

impl LayerNormConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`].
    pub fn validate(&self) -> Result<()> {
        check_eps("LayerNormConfig::eps", self.eps)
    }
}

pub(super) fn check_eps(field: &'static str, eps: f64) -> Result<()> {
    if eps.is_finite() && eps >= 0.0 {
        return Ok(());
    }
    Err(Error::config(field, eps, "a finite number >= 0"))
}

/// Layer norm (Ba, Kiros, Hinton 2016): `y = (x - mean) / sqrt(var + eps) * weight + bias` with
/// mean and (biased) variance over the last dimension of each row.
///
/// The same parameter names and shapes as candle_nn's, whose fused path returns no gradient. One
/// pass over memory forward and one backward on the CPU in f32 and f64; candle operations on other
/// devices and where gradients keep their graph, differentiable any number of times. The variance
/// is taken from deviations, so `|mean| >> std` loses nothing. f16 and bf16 are computed in f32.
#[derive(Debug, Clone)]
pub struct LayerNorm {
    weight: Tensor,
    bias: Option<Tensor>,
    config: LayerNormConfig,
}

/// A [`LayerNorm`] over the last dimension `size`, from the variables `weight` (ones) and `bias`
/// (zeros).
///
/// # Errors
/// [`Error::InvalidConfig`], and candle's when the variables do not fit.
pub fn layer_norm(size: usize, config: LayerNormConfig, vb: VarBuilder) -> Result<LayerNorm> {
    config.validate()?;
    let weight = vb.get_with_hints(size, "weight", Init::Const(1.0))?;
    let bias = match config.affine {
        true => Some(vb.get_with_hints(size, "bias", Init::Const(0.0))?),
        false => None,
    };
    Ok(LayerNorm {
        weight,
        bias,
        config,
    })
}

impl LayerNorm {
    /// From existing tensors `[size]`; `config.affine` is not looked at.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] and [`Error::Shape`].
    pub fn new(weight: Tensor, bias: Option<Tensor>, config: LayerNormConfig) -> Result<Self> {
        config.validate()?;
        if weight.rank() != 1 {
            return Err(Error::shape("weight", weight.dims(), "one dimension"));
        }
        if let Some(bias) = bias.as_ref().filter(|b| b.dims() != weight.dims()) {
            let expected = format!("{:?}, as the weight", weight.dims());
            return Err(Error::shape("bias", bias.dims(), expected));
        }
        Ok(Self {
            weight,
            bias,
            config,
        })
    }

    /// The weight `[size]`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// The bias `[size]`, where there is one.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }
}

impl Module for LayerNorm {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let x_wide = rows(x, &self.weight)?;
        if is_fused(x, &self.weight)? {
            let rows = Rows {
                eps: self.config.eps,
                remove_mean: self.config.remove_mean,
            };
            return Ok(fused::normalize(x, &self.weight, self.bias.as_ref(), rows)?);
        }
        let centered = match self.config.remove_mean {
            true => x_wide.broadcast_sub(&x_wide.mean_keepdim(D::Minus1)?)?,
            false => x_wide,
        };
        let y = scale(&centered, self.config.eps, x.dtype(), &self.weight)?;
        match &self.bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }
}

/// RMS norm (Zhang, Sennrich 2019): `y = x / sqrt(mean(x^2) + eps) * weight` over the last
/// dimension.
///
/// The same parameter name and shape as candle_nn's, whose forward returns no gradient; paths as
/// those of [`LayerNorm`].
#[derive(Debug, Clone)]
pub struct RmsNorm {
    weight: Tensor,
    eps: f64,
}

/// An [`RmsNorm`] over the last dimension `size`, from the variable `weight` (ones).
///
/// # Errors
/// [`Error::InvalidConfig`], and candle's when the variable does not fit.
pub fn rms_norm(size: usize, eps: f64, vb: VarBuilder) -> Result<RmsNorm> {
    let weight = vb.get_with_hints(size, "weight", Init::Const(1.0))?;
    RmsNorm::new(weight, eps)
}

impl RmsNorm {
    /// From an existing weight `[size]`.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] and [`Error::Shape`].
    pub fn new(weight: Tensor, eps: f64) -> Result<Self> {
        check_eps("RmsNorm::eps", eps)?;
        if weight.rank() != 1 {
            return Err(Error::shape("weight", weight.dims(), "one dimension"));
        }
        Ok(Self { weight, eps })
    }

    /// The weight `[size]`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }
}

impl Module for RmsNorm {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let wide = rows(x, &self.weight)?;
        if is_fused(x, &self.weight)? {
            let rows = Rows {
                eps: self.eps,
                remove_mean: false,
            };
            return Ok(fused::normalize(x, &self.weight, None, rows)?);
        }
        scale(&wide, self.eps, x.dtype(), &self.weight)
    }
}

fn is_fused(x: &Tensor, weight: &Tensor) -> Result<bool> {
    Ok(has_kernel(x) && weight.dtype() == x.dtype() && !keeps_graph()?)
}

/// `x` in the dtype to compute in, its last dimension checked against the weight.
fn rows(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    if x.rank() == 0 || x.elem_count() == 0 || x.dims().last() != weight.dims().last() {
        let expected = format!("a non-empty [.., {}]", weight.elem_count());
        return Err(Error::shape("input", x.dims(), expected));
    }
    Ok(match x.dtype() {
        DType::F16 | DType::BF16 => x.to_dtype(DType::F32)?,
        DType::F32 | DType::F64 => x.clone(),
        other => return Err(Error::dtype("input", other, "a floating-point dtype")),
    })
}

fn scale(x: &Tensor, eps: f64, out: DType, weight: &Tensor) -> candle_core::Result<Tensor> {
    let rms = (x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
    x.broadcast_div(&rms)?.to_dtype(out)?.broadcast_mul(weight)
}

//! Optimizers that evaluate the loss more than once per step.

use crate::{Error, Result};
use candle_core::{DType, Tensor};

/// An optimizer whose step evaluates the loss itself, as often as it needs: line searches,
/// sharpness-aware minimization. candle's `Optimizer` takes gradients that were computed before,
/// which these methods cannot use.
///
/// The closure builds the loss (a tensor with one element) of the present parameters; within one
/// step it must always use the same batch.
///
/// ```
/// use candle_core::{Device, Var};
/// use thalweg_optim::sso::{ArmijoGd, ArmijoGdConfig};
/// use thalweg_optim::ClosureOptimizer;
///
/// let w = Var::new(&[3f64, -2.0], &Device::Cpu)?;
/// let mut optimizer = ArmijoGd::new(vec![w.clone()], ArmijoGdConfig::default())?;
/// for _ in 0..20 {
///     optimizer.step(&mut || w.sqr()?.sum_all())?;
/// }
/// assert!(w.sqr()?.sum_all()?.to_scalar::<f64>()? < 1e-6);
/// # Ok::<(), thalweg_optim::Error>(())
/// ```
pub trait ClosureOptimizer {
    /// What one step tells about itself.
    type Report;

    /// One step on the loss that the closure builds.
    ///
    /// # Errors
    /// [`Error::NonFiniteLoss`] when the loss is NaN or infinite; those of the closure. The
    /// parameters are then what they were before the step.
    fn step(
        &mut self,
        loss: &mut dyn FnMut() -> candle_core::Result<Tensor>,
    ) -> Result<Self::Report>;

    /// The learning rate, or what stands for it.
    fn learning_rate(&self) -> f64;

    /// Sets the learning rate.
    fn set_learning_rate(&mut self, lr: f64);
}

/// The value of a loss of one element.
pub(crate) fn loss_value(loss: &Tensor, what: impl Into<String>) -> Result<f64> {
    if loss.elem_count() != 1 {
        return Err(Error::shape(what.into(), loss.dims(), "one element"));
    }
    let value = loss
        .detach()
        .flatten_all()?
        .to_dtype(DType::F64)?
        .get(0)?
        .to_scalar::<f64>()?;
    if value.is_finite() {
        Ok(value)
    } else {
        Err(Error::NonFiniteLoss {
            what: what.into(),
            value,
        })
    }
}

//! The expensive loss and the cheap model.

use crate::closure::loss_value;
use crate::{Error, Result};
use candle_core::{Tensor, Var};
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A loss of the model's outputs `z` (shape `[n, c]`, one row per example) whose every call is
/// expensive.
pub trait TargetLoss {
    /// The loss at `targets`.
    ///
    /// # Errors
    /// The implementor's.
    fn value(&self, targets: &Tensor) -> Result<f64>;

    /// The loss at `targets` and its gradient, of the same shape. Over a batch the loss is the
    /// mean for [`Normalization::Paper`](super::Normalization::Paper) and the sum for
    /// [`Normalization::Official`](super::Normalization::Official).
    ///
    /// # Errors
    /// The implementor's.
    fn value_and_grad(&self, targets: &Tensor) -> Result<(f64, Tensor)>;
}

impl<L: TargetLoss + ?Sized> TargetLoss for &L {
    fn value(&self, targets: &Tensor) -> Result<f64> {
        (**self).value(targets)
    }

    fn value_and_grad(&self, targets: &Tensor) -> Result<(f64, Tensor)> {
        (**self).value_and_grad(targets)
    }
}

/// The model on the present batch: parameters to targets `[n, c]`. Every closure that returns a
/// tensor is one.
pub trait TargetModel {
    /// The outputs for the present parameters, with their graph.
    ///
    /// # Errors
    /// The implementor's.
    fn forward(&self) -> candle_core::Result<Tensor>;
}

impl<F: Fn() -> candle_core::Result<Tensor>> TargetModel for F {
    fn forward(&self) -> candle_core::Result<Tensor> {
        self()
    }
}

/// A [`TargetLoss`] from a function of tensors, differentiated by candle. Counts its calls.
pub struct AutogradLoss<F> {
    loss: F,
    gradient_calls: AtomicUsize,
    value_calls: AtomicUsize,
}

impl<F: Fn(&Tensor) -> candle_core::Result<Tensor>> AutogradLoss<F> {
    /// The loss `loss(targets)`, a tensor of one element.
    pub fn new(loss: F) -> Self {
        Self {
            loss,
            gradient_calls: AtomicUsize::new(0),
            value_calls: AtomicUsize::new(0),
        }
    }

    /// How often a gradient was asked for.
    pub fn calls(&self) -> usize {
        self.gradient_calls.load(Ordering::Relaxed)
    }

    /// How often a value alone was asked for.
    pub fn value_calls(&self) -> usize {
        self.value_calls.load(Ordering::Relaxed)
    }
}

impl<F> fmt::Debug for AutogradLoss<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AutogradLoss")
            .field("gradient_calls", &self.gradient_calls)
            .field("value_calls", &self.value_calls)
            .finish_non_exhaustive()
    }
}

impl<F: Fn(&Tensor) -> candle_core::Result<Tensor>> TargetLoss for AutogradLoss<F> {
    fn value(&self, targets: &Tensor) -> Result<f64> {
        self.value_calls.fetch_add(1, Ordering::Relaxed);
        loss_value(&(self.loss)(&targets.detach())?, "the loss of the targets")
    }

    fn value_and_grad(&self, targets: &Tensor) -> Result<(f64, Tensor)> {
        self.gradient_calls.fetch_add(1, Ordering::Relaxed);
        let z = Var::from_tensor(&targets.detach())?;
        let loss = (self.loss)(z.as_tensor())?;
        let value = loss_value(&loss, "the loss of the targets")?;
        let grads = loss.backward()?;
        let grad = grads.get(&z).ok_or_else(|| {
            let names = vec!["the targets".to_string()];
            Error::Core(tensor_core::Error::LostGradient(names))
        })?;
        Ok((value, grad.detach()))
    }
}

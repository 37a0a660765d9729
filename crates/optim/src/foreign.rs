//! Optimizers of other crates behind our wrappers.

use crate::fused::{StepReport, StepWith};
use crate::gradients::Gradients;
use crate::param_group::numbered;
use crate::transform::{Flow, GradientTransform};
use crate::Result;
use candle_core::backprop::GradStore;
use candle_core::Var;
use candle_nn::Optimizer;

/// Makes any candle optimizer one that takes a gradient transform along ([`StepWith`]): the
/// transformed gradients are written out as tensors first.
///
/// ```
/// use candle_core::{Device, Var};
/// use candle_nn::{Optimizer, SGD};
/// use thalweg_optim::perp_grad::{PerpGrad, PerpGradConfig};
/// use thalweg_optim::Foreign;
///
/// let w = Var::new(&[3f64, 4.0], &Device::Cpu)?;
/// let config = (PerpGradConfig::default(), 0.1);
/// let mut optimizer = PerpGrad::<Foreign<SGD>>::new(vec![w.clone()], config)?;
/// // The gradient of <w, w> lies along w: nothing is left of it.
/// optimizer.backward_step(&w.sqr()?.sum_all()?)?;
/// assert_eq!(w.to_vec1::<f64>()?, [3.0, 4.0]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Foreign<O> {
    params: Vec<(String, Var)>,
    optimizer: O,
}

impl<O: Optimizer> Foreign<O> {
    /// Wraps an optimizer that exists already, over these parameters.
    pub fn wrap(params: Vec<(String, Var)>, optimizer: O) -> Self {
        Self { params, optimizer }
    }

    /// The optimizer itself.
    pub fn optimizer(&self) -> &O {
        &self.optimizer
    }

    /// The optimizer itself.
    pub fn optimizer_mut(&mut self) -> &mut O {
        &mut self.optimizer
    }
}

impl<O: Optimizer> Optimizer for Foreign<O> {
    type Config = O::Config;

    fn new(vars: Vec<Var>, config: O::Config) -> candle_core::Result<Self> {
        let optimizer = O::new(vars.clone(), config)?;
        Ok(Self::wrap(numbered(vars), optimizer))
    }

    fn step(&mut self, grads: &GradStore) -> candle_core::Result<()> {
        self.optimizer.step(grads)
    }

    fn learning_rate(&self) -> f64 {
        self.optimizer.learning_rate()
    }

    fn set_learning_rate(&mut self, lr: f64) {
        self.optimizer.set_learning_rate(lr);
    }
}

impl<O: Optimizer> StepWith for Foreign<O> {
    fn params(&self) -> &[(String, Var)] {
        &self.params
    }

    fn step_with(
        &mut self,
        grads: &GradStore,
        transform: &mut dyn GradientTransform,
    ) -> Result<StepReport> {
        let mut gradients = Gradients::collect(&self.params, grads);
        if let Flow::Withhold(why) = transform.apply(&mut gradients)? {
            return Ok(StepReport::withheld(why));
        }
        let absent = (0..gradients.len()).filter(|i| gradients.get(*i).is_none());
        let without_gradient = absent.count();
        self.optimizer.step(&gradients.to_store()?)?;
        Ok(StepReport {
            without_gradient,
            ..StepReport::default()
        })
    }
}

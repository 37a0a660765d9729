//! Momentum steps of a fixed length.

use crate::error::check;
use crate::fused::{part, State};
use crate::param_group::numbered;
use crate::{Error, Result};
use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};
use candle_nn::Optimizer;
use tensor_core::checkpoint::{expect_state, TensorSpec};
use tensor_core::params::Params;

/// Hyper-parameters of [`NormalizedMomentumSgd`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NormalizedMomentumSgdConfig {
    /// Length of the step, over all parameters together.
    pub lr: f64,
    /// Momentum `beta`.
    pub beta: f64,
    /// Added to the norm.
    pub eps: f64,
}

impl Default for NormalizedMomentumSgdConfig {
    fn default() -> Self {
        Self {
            lr: 1e-2,
            beta: 0.9,
            eps: 1e-10,
        }
    }
}

/// `m <- beta m + (1 - beta) g`, `w <- w - lr m / (|m| + eps)` with one norm over all parameters: the
/// upper step of BO-REP for an ordinary loss whose smoothness grows with its gradient.
///
/// A parameter without gradient counts as a gradient of zero. Gradients that are not finite are an
/// error, and nothing is changed.
///
/// ```
/// use candle_core::{Device, Var};
/// use candle_nn::Optimizer;
/// use thalweg_optim::bilevel::{NormalizedMomentumSgd, NormalizedMomentumSgdConfig};
///
/// let w = Var::new(&[12f64], &Device::Cpu)?;
/// let config = NormalizedMomentumSgdConfig { lr: 0.1, ..Default::default() };
/// let mut optimizer = NormalizedMomentumSgd::new(vec![w.clone()], config)?;
/// for _ in 0..200 {
///     optimizer.backward_step(&(w.exp()? + w.neg()?.exp()?)?.sum_all()?)?;
/// }
/// assert!(w.to_vec1::<f64>()?[0].abs() < 1.0);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug)]
pub struct NormalizedMomentumSgd {
    config: NormalizedMomentumSgdConfig,
    params: Params,
    momentum: Params,
}

impl NormalizedMomentumSgd {
    /// Named parameters.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`]; those of `Params::new`.
    pub fn named(params: Vec<(String, Var)>, config: NormalizedMomentumSgdConfig) -> Result<Self> {
        check::non_negative("NormalizedMomentumSgdConfig::lr", config.lr)?;
        check::rate("NormalizedMomentumSgdConfig::beta", config.beta)?;
        check::positive("NormalizedMomentumSgdConfig::eps", config.eps)?;
        let zeros = |(name, var): &(String, Var)| {
            Ok((
                name.clone(),
                Var::zeros(var.shape(), var.dtype(), var.device())?,
            ))
        };
        let momentum: candle_core::Result<Vec<_>> = params.iter().map(zeros).collect();
        Ok(Self {
            config,
            momentum: Params::new(momentum?)?,
            params: Params::new(params)?,
        })
    }

    /// The momentum by name.
    ///
    /// # Errors
    /// Those of candle.
    pub fn state(&self) -> Result<State> {
        let copy = |(name, m): &(String, Var)| Ok((format!("m.{name}"), m.as_tensor().copy()?));
        self.momentum.named().iter().map(copy).collect()
    }

    /// Restores what [`state`](Self::state) returned.
    ///
    /// # Errors
    /// A list of everything that does not fit; nothing is changed then.
    pub fn load_state(&mut self, state: &State) -> Result<()> {
        let spec = |(name, m): &(String, Var)| {
            TensorSpec::from((format!("m.{name}"), m.dims(), m.dtype()))
        };
        expect_state(state, self.momentum.named().iter().map(spec))?;
        for (name, m) in self.momentum.named() {
            m.set(part(state, &format!("m.{name}"))?)?;
        }
        Ok(())
    }

    fn advance(&mut self, grads: &GradStore) -> Result<()> {
        let grads = self.params.gradients(grads)?;
        let mut bad = Vec::new();
        for ((name, _), grad) in self.params.named().iter().zip(&grads) {
            if !tensor_core::kernels::sum_squares(grad)?.is_finite() {
                bad.push(name.clone());
            }
        }
        if !bad.is_empty() {
            return Err(Error::NonFiniteGradient(bad));
        }
        let beta = self.config.beta;
        self.momentum.combine(beta, 1.0 - beta, &grads)?;
        let length = self.config.lr / (self.momentum.norm()? + self.config.eps);
        let moments = self.momentum.named().iter();
        let moments: Vec<Tensor> = moments.map(|(_, m)| m.as_detached_tensor()).collect();
        Ok(self.params.axpy(-length, &moments)?)
    }
}

impl Optimizer for NormalizedMomentumSgd {
    type Config = NormalizedMomentumSgdConfig;

    fn new(vars: Vec<Var>, config: Self::Config) -> candle_core::Result<Self> {
        Ok(Self::named(numbered(vars), config)?)
    }

    fn step(&mut self, grads: &GradStore) -> candle_core::Result<()> {
        Ok(self.advance(grads)?)
    }

    fn learning_rate(&self) -> f64 {
        self.config.lr
    }

    fn set_learning_rate(&mut self, lr: f64) {
        self.config.lr = lr;
    }
}

//! The layer.

use super::composed;
use super::config::{GhostBatchNormConfig, RunningUpdate};
use super::kernel::{Geometry, Pairs, Plan};
use super::plan::GhostPlan;
use crate::activation::Activation;
use crate::kernel::{has_kernel, host, tensor, vector, wide, Computed, Scalar, View};
use crate::{Error, Result};
use candle_core::{DType, ModuleT, Tensor, Var};
use candle_nn::{BatchNorm, Init, VarBuilder};
use tensor_core::autograd::keeps_graph;

/// Ghost batch normalization; see the [module](super) page.
///
/// Inputs are `[B, C]` or `[B, C, spatial..]`. Variables: `weight` and `bias` `[C]`, trained, and
/// the buffers `running_mean` and `running_var` `[C]`: the names and shapes of
/// [`candle_nn::BatchNorm`], so checkpoints interchange. Clones share all of them.
///
/// On the CPU one fused kernel forward and one backward, whose bits do not depend on the number of
/// threads. Other devices, and processes that keep the graph of gradients
/// ([`keeps_graph`]), run the same mathematics in candle operations: then the layer is
/// differentiable any number of times. f16 and bf16 inputs are computed in f32.
#[derive(Debug, Clone)]
pub struct GhostBatchNorm {
    running_mean: Var,
    running_var: Var,
    weight_and_bias: Option<(Tensor, Tensor)>,
    config: GhostBatchNormConfig,
    activation: Activation,
}

/// A [`GhostBatchNorm`] over `num_features` channels from the variables of `vb`.
///
/// # Errors
/// [`Error::InvalidConfig`], and candle's when variables do not fit.
pub fn ghost_batch_norm(
    num_features: usize,
    config: GhostBatchNormConfig,
    vb: VarBuilder,
) -> Result<GhostBatchNorm> {
    config.validate()?;
    if num_features == 0 {
        return Err(Error::config("num_features", 0, "at least 1"));
    }
    let dtype = wide(vb.dtype())?;
    let get = |name, init| vb.get_with_hints_dtype(num_features, name, Init::Const(init), dtype);
    let running_mean = Var::from_tensor(&get("running_mean", 0.0)?)?;
    let running_var = Var::from_tensor(&get("running_var", 1.0)?)?;
    let weight_and_bias = match config.affine {
        true => Some((
            vb.get_with_hints(num_features, "weight", Init::Const(1.0))?,
            vb.get_with_hints(num_features, "bias", Init::Const(0.0))?,
        )),
        false => None,
    };
    Ok(GhostBatchNorm {
        running_mean,
        running_var,
        weight_and_bias,
        config,
        activation: Activation::Identity,
    })
}

impl GhostBatchNorm {
    /// The same layer with ghost batches: parameters and running statistics are shared with
    /// `norm`, not copied. The running statistics of a `BatchNorm` made from plain tensors are
    /// its own variables and are shared as well.
    ///
    /// candle does not tell whether a `BatchNorm` subtracts the mean; it is taken to do so.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for a ghost size of 0.
    pub fn from_batch_norm(norm: &BatchNorm, ghost_size: usize) -> Result<Self> {
        let config = GhostBatchNormConfig {
            ghost_size,
            momentum: norm.momentum(),
            eps: norm.eps(),
            affine: norm.weight_and_bias().is_some(),
            ..Default::default()
        };
        config.validate()?;
        Ok(Self {
            running_mean: Var::from_tensor(norm.running_mean())?,
            running_var: Var::from_tensor(norm.running_var())?,
            weight_and_bias: norm.weight_and_bias().map(|(w, b)| (w.clone(), b.clone())),
            config,
            activation: Activation::Identity,
        })
    }

    /// The same layer followed by an activation, fused.
    #[must_use]
    pub fn with_activation(self, activation: Activation) -> Self {
        Self { activation, ..self }
    }

    /// What follows.
    pub fn activation(&self) -> Activation {
        self.activation
    }

    /// candle's layer over the same variables.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a layer that does not subtract the mean, which candle's
    /// constructors cannot express, or that is followed by an activation; candle's own checks.
    pub fn into_batch_norm(self) -> Result<BatchNorm> {
        if self.activation != Activation::Identity {
            return Err(Error::Unsupported {
                operation: "making a candle_nn::BatchNorm".into(),
                context: format!("followed by {:?}", self.activation),
            });
        }
        let GhostBatchNormConfig {
            eps,
            momentum,
            remove_mean,
            ..
        } = self.config;
        if !remove_mean {
            return Err(Error::Unsupported {
                operation: "making a candle_nn::BatchNorm".into(),
                context: "without subtracting the mean".into(),
            });
        }
        let n = self.running_mean.elem_count();
        let mean = self.running_mean.as_tensor().clone();
        let var = self.running_var.as_tensor().clone();
        Ok(match self.weight_and_bias {
            Some((w, b)) => BatchNorm::new_with_momentum(n, mean, var, w, b, eps, momentum)?,
            None => BatchNorm::new_no_bias_with_momentum(n, mean, var, eps, momentum)?,
        })
    }

    /// The running mean `[C]`.
    pub fn running_mean(&self) -> &Tensor {
        self.running_mean.as_tensor()
    }

    /// The running (unbiased) variance `[C]`.
    pub fn running_var(&self) -> &Tensor {
        self.running_var.as_tensor()
    }

    /// Weight and bias `[C]`, where the layer has them.
    pub fn weight_and_bias(&self) -> Option<(&Tensor, &Tensor)> {
        self.weight_and_bias.as_ref().map(|(w, b)| (w, b))
    }

    /// The configuration.
    pub fn config(&self) -> &GhostBatchNormConfig {
        &self.config
    }

    /// Normalizes group by group and moves the running statistics.
    ///
    /// # Errors
    /// [`Error::Shape`] and [`Error::DType`] for inputs that do not fit or are empty,
    /// [`Error::IndivisibleBatch`] under [`Remainder::Strict`](super::Remainder::Strict), and
    /// [`Error::NonFinite`] for statistics that are NaN or infinite (the running ones then stay
    /// as they were).
    pub fn forward_train(&self, x: &Tensor) -> Result<Tensor> {
        let (flat, geometry) = self.flatten(x)?;
        let config = &self.config;
        let groups = GhostPlan::new(flat.dim(0)?, config.ghost_size, config.remainder)?;
        if groups.iter().any(|n| n * geometry.spatial == 1) {
            tracing::warn!(
                ?groups,
                "ghost batch norm: a group of one number has no variance"
            );
        }
        let y = if has_kernel(&flat) && !keeps_graph()? {
            match flat.dtype() {
                DType::F64 => self.fused::<f64>(&flat, geometry, groups)?,
                _ => self.fused::<f32>(&flat, geometry, groups)?,
            }
        } else {
            let z = self.composed(&flat, geometry, &groups)?;
            self.activation.composed(&z)?
        };
        Ok(y.reshape(x.shape())?.to_dtype(x.dtype())?)
    }

    /// [`forward_train`](Self::forward_train) by candle operations on every device: the path that
    /// devices without a fused kernel and second derivatives take, for comparisons.
    ///
    /// # Errors
    /// As [`forward_train`](Self::forward_train).
    pub fn forward_train_composed(&self, x: &Tensor) -> Result<Tensor> {
        let (flat, geometry) = self.flatten(x)?;
        let config = &self.config;
        let groups = GhostPlan::new(flat.dim(0)?, config.ghost_size, config.remainder)?;
        let z = self.composed(&flat, geometry, &groups)?;
        let y = self.activation.composed(&z)?;
        Ok(y.reshape(x.shape())?.to_dtype(x.dtype())?)
    }

    /// Normalizes by the running statistics: no groups, any batch size.
    ///
    /// # Errors
    /// [`Error::Shape`] and [`Error::DType`] for inputs that do not fit or are empty.
    pub fn forward_eval(&self, x: &Tensor) -> Result<Tensor> {
        let (flat, _) = self.flatten(x)?;
        let column = |t: Tensor| -> Result<Tensor> { Ok(t.reshape((1, (), 1))?) };
        let var = column(
            self.running_var
                .as_detached_tensor()
                .to_dtype(flat.dtype())?,
        )?;
        let inverse = (var + self.config.eps)?.sqrt()?.recip()?;
        let centered = match self.config.remove_mean {
            true => {
                let mean = self
                    .running_mean
                    .as_detached_tensor()
                    .to_dtype(flat.dtype())?;
                flat.broadcast_sub(&column(mean)?)?
            }
            false => flat,
        };
        let y = match self.parameters(centered.dtype())? {
            Some((w, b)) => {
                let scale = (inverse * column(w)?)?;
                centered.broadcast_mul(&scale)?.broadcast_add(&column(b)?)?
            }
            None => centered.broadcast_mul(&inverse)?,
        };
        let y = self.activation.of(&y)?;
        Ok(y.reshape(x.shape())?.to_dtype(x.dtype())?)
    }

    /// `[B, C, S]`, contiguous, in the dtype to compute in.
    fn flatten(&self, x: &Tensor) -> Result<(Tensor, Geometry)> {
        let channels = self.running_mean.elem_count();
        if x.rank() < 2 || x.dims()[1] != channels || x.elem_count() == 0 {
            let expected = format!("a non-empty [B, {channels}, ..]");
            return Err(Error::shape("input", x.dims(), expected));
        }
        let spatial = x.dims()[2..].iter().product();
        let dtype = wide(x.dtype())?;
        let flat = x
            .to_dtype(dtype)?
            .reshape((x.dims()[0], channels, spatial))?;
        Ok((flat.contiguous()?, Geometry { channels, spatial }))
    }

    fn parameters(&self, dtype: DType) -> Result<Option<(Tensor, Tensor)>> {
        Ok(match &self.weight_and_bias {
            Some((w, b)) => Some((w.to_dtype(dtype)?, b.to_dtype(dtype)?)),
            None => None,
        })
    }

    fn fused<T: Scalar>(
        &self,
        x: &Tensor,
        geometry: Geometry,
        groups: Vec<usize>,
    ) -> Result<Tensor> {
        let (weight, bias) = match self.parameters(x.dtype())? {
            Some(parameters) => parameters,
            None => {
                let ones = Tensor::ones(geometry.channels, x.dtype(), x.device())?;
                (ones.clone(), ones.zeros_like()?)
            }
        };
        let (w, b) = (host(&weight)?, host(&bias)?);
        let GhostBatchNormConfig {
            eps, remove_mean, ..
        } = self.config;
        let activation = self.activation;
        let (y, moments) = {
            let plan = Plan {
                geometry,
                groups: &groups,
                weight: &w,
                bias: &b,
                eps,
                remove_mean,
                activation,
            };
            plan.forward(View::new(x)?.slice::<T>()?)
        };
        self.update_running(&groups, geometry, &moments)?;
        let backward = move |arguments: &[&Tensor], _: &Tensor, grad: &Tensor| {
            let [x, weight, bias] = [0, 1, 2].map(|i| arguments[i]);
            let (w, b) = (host(weight)?, host(bias)?);
            let plan = Plan {
                geometry,
                groups: &groups,
                weight: &w,
                bias: &b,
                eps,
                remove_mean,
                activation,
            };
            let (dx, sums) = {
                let (x, dy) = (View::new(x)?, View::new(grad)?);
                plan.backward::<T>(x.slice()?, dy.slice()?, &moments)
            };
            let (dtype, device) = (weight.dtype(), weight.device());
            Ok(vec![
                Some(tensor(dx, x.shape())?),
                Some(vector(sums.second, dtype, device)?),
                Some(vector(sums.first, dtype, device)?),
            ])
        };
        let node = Computed::new("ghost-batch-norm", y, x.shape(), backward);
        Ok(x.apply_op3(&weight, &bias, node)?)
    }

    /// The unbiased factor of a group; a single number keeps its variance of 0.
    fn unbiased(size: usize, geometry: Geometry) -> f64 {
        let n = (size * geometry.spatial) as f64;
        if n > 1.0 {
            n / (n - 1.0)
        } else {
            1.0
        }
    }

    fn update_running(&self, groups: &[usize], geometry: Geometry, m: &[Pairs]) -> Result<()> {
        let momentum = self.config.momentum;
        let (decay, weights) = closed(momentum, m.len());
        let advance = |running: &Var, of: &dyn Fn(usize, usize) -> f64| -> Result<Vec<f64>> {
            let mut values = host(running)?;
            for (c, r) in values.iter_mut().enumerate() {
                *r = match self.config.update {
                    RunningUpdate::Sequential => {
                        (0..m.len()).fold(*r, |r, j| (1.0 - momentum) * r + momentum * of(j, c))
                    }
                    RunningUpdate::Closed => {
                        let taken: f64 =
                            weights.iter().enumerate().map(|(j, w)| w * of(j, c)).sum();
                        decay * *r + taken
                    }
                };
            }
            Ok(values)
        };
        let mean = advance(&self.running_mean, &|j, c| m[j].first[c])?;
        let var = advance(&self.running_var, &|j, c| {
            m[j].second[c] * Self::unbiased(groups[j], geometry)
        })?;
        check_statistics(&mean, &var)?;
        let store = |running: &Var, values: Vec<f64>| -> Result<()> {
            Ok(running.set(&vector(values, running.dtype(), running.device())?)?)
        };
        if self.config.remove_mean {
            store(&self.running_mean, mean)?;
        }
        store(&self.running_var, var)
    }

    fn composed(&self, x: &Tensor, geometry: Geometry, groups: &[usize]) -> Result<Tensor> {
        let GhostBatchNormConfig {
            eps,
            remove_mean,
            momentum,
            ..
        } = self.config;
        let (y, mean, var) = composed::normalize(x, geometry, groups, eps, remove_mean)?;
        let factors = groups.iter().map(|n| Self::unbiased(*n, geometry));
        let factors = vector(factors.collect(), var.dtype(), var.device())?;
        let var = var.broadcast_mul(&factors.unsqueeze(1)?)?;
        if x.device().is_cpu() {
            check_statistics(&host(&mean)?, &host(&var)?)?;
        }
        let store = |running: &Var, statistics: Tensor| -> Result<()> {
            let (decay, weights) = closed(momentum, groups.len());
            let old = running.as_detached_tensor().copy()?;
            let statistics = statistics.to_dtype(running.dtype())?;
            Ok(running.set(&composed::take_in(&old, &statistics, decay, weights)?)?)
        };
        if remove_mean {
            store(&self.running_mean, mean)?;
        }
        store(&self.running_var, var)?;
        Ok(match self.parameters(y.dtype())? {
            Some((w, b)) => {
                let (w, b) = (w.reshape((1, (), 1))?, b.reshape((1, (), 1))?);
                y.broadcast_mul(&w)?.broadcast_add(&b)?
            }
            None => y,
        })
    }
}

/// `(1 - q)^k` and `q (1 - q)^(k - j)` for `j = 1..k`.
fn closed(momentum: f64, k: usize) -> (f64, Vec<f64>) {
    let keep = 1.0 - momentum;
    let power = |n: usize| (0..n).fold(1.0, |p, _| p * keep);
    let weights = (1..=k).map(|j| momentum * power(k - j)).collect();
    (power(k), weights)
}

fn check_statistics(mean: &[f64], var: &[f64]) -> Result<()> {
    let all = mean.iter().chain(var);
    let count = all.filter(|x| !x.is_finite()).count();
    if count == 0 {
        return Ok(());
    }
    Err(Error::NonFinite {
        what: "the batch statistics",
        count,
        total: mean.len() + var.len(),
        hint: ": the batch holds NaN or overflows",
    })
}

impl ModuleT for GhostBatchNorm {
    fn forward_t(&self, x: &Tensor, train: bool) -> candle_core::Result<Tensor> {
        Ok(match train {
            true => self.forward_train(x)?,
            false => self.forward_eval(x)?,
        })
    }
}

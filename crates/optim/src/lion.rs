//! Lion: sign of an interpolated momentum, one state buffer.
//!
//! For anyone who trains a network and wants the quality of AdamW with half of its state (a
//! quarter with `bf16` momentum) and a cheaper step. *Symbolic Discovery of Optimization
//! Algorithms*, Chen et al., NeurIPS 2023, arXiv 2302.06675.
//!
//! Per step, for every parameter `w` with gradient `g` and momentum `m` (zero at the start):
//!
//! ```text
//! c  = beta1 m + (1 - beta1) g
//! w <- w - eta (sign(c) + lambda w)    sign(0) = 0
//! m <- beta2 m + (1 - beta2) g         from the old m
//! ```
//!
//! | symbol | field |
//! | --- | --- |
//! | `eta` | [`LionConfig::lr`] |
//! | `beta1`, `beta2` | [`LionConfig::beta1`], [`LionConfig::beta2`] |
//! | `lambda` | [`LionConfig::weight_decay`] |
//!
//! There is no bias correction, no epsilon and no counter: the state is exactly `m`. Every entry
//! moves by `eta` whatever the gradient's size, so against a tuned AdamW the learning rate is 3 to
//! 10 times smaller and the decay as much larger ([`LionConfig::from_adamw`]); for stability lower
//! the rate or `beta2` (0.95, 0.98 for language models). Clipping by norm changes only how the
//! gradients are weighted in `m`.
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use candle_nn::{linear, loss, Module, Optimizer, VarBuilder, VarMap};
//! use thalweg_optim::lion::{Lion, LionConfig};
//!
//! let vars = VarMap::new();
//! let model = linear(4, 3, VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu))?;
//! let (x, y) = (Tensor::ones((8, 4), DType::F32, &Device::Cpu)?, Tensor::zeros(8, DType::U32, &Device::Cpu)?);
//! let mut optimizer = Lion::new(vars.all_vars(), LionConfig { lr: 1e-2, ..Default::default() })?;
//! let first = loss::cross_entropy(&model.forward(&x)?, &y)?.to_scalar::<f32>()?;
//! for _ in 0..20 {
//!     optimizer.backward_step(&loss::cross_entropy(&model.forward(&x)?, &y)?)?;
//! }
//! assert!(loss::cross_entropy(&model.forward(&x)?, &y)?.to_scalar::<f32>()? < first);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use crate::error::check;
use crate::fused::{delegate, Core, Rates, State};
use crate::gradients::Gradients;
use crate::param_group::{flatten, shared};
use crate::transform::GradientTransform;
use crate::{DecayMask, NonFinite, ParamGroup, Result, StepReport};
use candle_core::backprop::GradStore;
use candle_core::DType;
use tensor_core::flat::FlatTensor;
use tensor_core::kernels::{sum_squares, GradMap, Real, Rule, StateDType, Updated, Work};

/// Hyper-parameters of [`Lion`].
#[derive(Debug, Clone)]
pub struct LionConfig {
    /// Learning rate `eta`; also the size of every entry's step.
    pub lr: f64,
    /// Weight of the momentum in the update.
    pub beta1: f64,
    /// Weight of the momentum in the new momentum.
    pub beta2: f64,
    /// Decoupled weight decay `lambda`; multiplied by `lr`.
    pub weight_decay: f64,
    /// What the momentum is stored as: `None` for the parameter's precision (`f32` for half
    /// precision), `Some(DType::BF16)` for half of the memory. Arithmetic is not affected.
    pub momentum_dtype: Option<DType>,
    /// Which parameters are decayed.
    pub decay_mask: DecayMask,
    /// The cautious variant of Liang et al. (arXiv 2411.16085), off by default: entries whose
    /// `sign(c)` disagrees with the gradient do not move, and the others move by `eta` over the
    /// fraction of each tensor that does. Costs one more pass, which counts them.
    pub cautious: bool,
    /// What happens to gradients that are not finite.
    pub nonfinite: NonFinite,
}

impl Default for LionConfig {
    fn default() -> Self {
        Self {
            lr: 1e-4,
            beta1: 0.9,
            beta2: 0.99,
            weight_decay: 0.0,
            momentum_dtype: None,
            decay_mask: DecayMask::All,
            cautious: false,
            nonfinite: NonFinite::Hold,
        }
    }
}

impl LionConfig {
    /// The paper's translation of a tuned AdamW: `lr / ratio` and `weight_decay * ratio`, which
    /// keeps their product. A ratio of 3 to 10 is usual.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`](crate::Error::InvalidConfig) unless the ratio is positive.
    pub fn from_adamw(adamw: &candle_nn::ParamsAdamW, ratio: f64) -> Result<Self> {
        check::positive("ratio", ratio)?;
        let config = Self {
            lr: adamw.lr / ratio,
            weight_decay: adamw.weight_decay * ratio,
            ..Self::default()
        };
        config.validate()?;
        Ok(config)
    }

    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`](crate::Error::InvalidConfig) that names the first bad one.
    pub fn validate(&self) -> Result<()> {
        check::non_negative("LionConfig::lr", self.lr)?;
        check::rate("LionConfig::beta1", self.beta1)?;
        check::rate("LionConfig::beta2", self.beta2)?;
        check::non_negative("LionConfig::weight_decay", self.weight_decay)?;
        check::require(
            matches!(
                self.momentum_dtype,
                None | Some(DType::F32 | DType::BF16 | DType::F64)
            ),
            "LionConfig::momentum_dtype",
            self.momentum_dtype,
            "F32, BF16 or F64 (small gradients vanish in F16)",
        )
    }
}

/// The update of one element.
#[derive(Debug, Clone, Copy)]
struct LionRule {
    lr: f64,
    beta1: f64,
    beta2: f64,
    weight_decay: f64,
}

impl Rule<1, 6> for LionRule {
    const NAME: &'static str = "lion";
    const DEVICE_BODY: Option<&'static str> = Some(
        "const T c = k[2] * s0 + k[3] * g; p = p - k[1] * (sign(c) + k[0] * p); s0 = k[4] * s0 + k[5] * g;",
    );

    fn scalars(&self) -> [f64; 6] {
        [
            self.weight_decay,
            self.lr,
            self.beta1,
            1.0 - self.beta1,
            self.beta2,
            1.0 - self.beta2,
        ]
    }

    #[inline(always)]
    fn update<T: Real>(k: &[T; 6], param: T, grad: T, [m]: [T; 1]) -> Updated<T, 1> {
        let c = k[2] * m + k[3] * grad;
        Updated {
            // Decay and step together: rounded once where `w (1 - eta lambda)` rounds twice.
            param: param - k[1] * (c.sign() + k[0] * param),
            state: [k[4] * m + k[5] * grad],
            event: false,
        }
    }
}

/// [`LionRule`] in which only entries that agree with their gradient move.
#[derive(Debug, Clone, Copy)]
struct CautiousRule {
    lion: LionRule,
    /// What the sign of an agreeing entry is multiplied by: 1 over their fraction.
    scale: f64,
    /// Whether entries that disagree are held.
    cautious: bool,
}

impl Rule<1, 8> for CautiousRule {
    const NAME: &'static str = "cautious-lion";
    const DEVICE_BODY: Option<&'static str> = Some(
        "const T c = k[2] * s0 + k[3] * g; const T keep = sign(c) * g > 0 || k[7] == 0 ? k[6] * sign(c) : 0; p = p - k[1] * (keep + k[0] * p); event = sign(c) * g > 0 || k[7] == 0; s0 = k[4] * s0 + k[5] * g;",
    );

    fn scalars(&self) -> [f64; 8] {
        let [decay, lr, b1, c1, b2, c2] = self.lion.scalars();
        let cautious = f64::from(u8::from(self.cautious));
        [decay, lr, b1, c1, b2, c2, self.scale, cautious]
    }

    #[inline(always)]
    fn update<T: Real>(k: &[T; 8], param: T, grad: T, [m]: [T; 1]) -> Updated<T, 1> {
        let c = k[2] * m + k[3] * grad;
        let agrees = (c.sign() * grad > T::ZERO) | (k[7] == T::ZERO);
        let sign = T::select(agrees, k[6] * c.sign(), T::ZERO);
        Updated {
            param: param - k[1] * (sign + k[0] * param),
            state: [k[4] * m + k[5] * grad],
            event: agrees,
        }
    }
}

/// Counts the entries that agree with their gradient; nothing moves.
#[derive(Debug, Clone, Copy)]
struct Agreement {
    beta1: f64,
}

impl Rule<1, 2> for Agreement {
    const NAME: &'static str = "lion-agreement";
    const DEVICE_BODY: Option<&'static str> =
        Some("const T c = k[0] * s0 + k[1] * g; event = sign(c) * g > 0;");

    fn scalars(&self) -> [f64; 2] {
        [self.beta1, 1.0 - self.beta1]
    }

    #[inline(always)]
    fn update<T: Real>(k: &[T; 2], param: T, grad: T, [m]: [T; 1]) -> Updated<T, 1> {
        let c = k[0] * m + k[1] * grad;
        Updated {
            param,
            state: [m],
            event: c.sign() * grad > T::ZERO,
        }
    }
}

/// The Lion optimizer; see the [module](self) page.
#[derive(Debug)]
pub struct Lion {
    core: Core<1>,
    rates: Rates,
    configs: Vec<LionConfig>,
    owner: Vec<usize>,
}

impl Lion {
    /// Groups of parameters with hyper-parameters of their own. Momentum type and non-finite policy
    /// are one for all.
    ///
    /// # Errors
    /// Those of [`LionConfig::validate`], for groups that differ in what is one for all, and for
    /// parameters that are given twice, share memory or are not floating point.
    pub fn with_groups(groups: Vec<ParamGroup<LionConfig>>) -> Result<Self> {
        for group in &groups {
            group.config.validate()?;
        }
        let (params, owner, configs) = flatten(groups)?;
        let dtypes = configs.iter().map(|c| c.momentum_dtype);
        let dtype = shared("LionConfig::momentum_dtype", dtypes)?
            .map_or(StateDType::Compute, StateDType::Fixed);
        let nonfinite = shared("LionConfig::nonfinite", configs.iter().map(|c| c.nonfinite))?;
        Ok(Self {
            core: Core::new(params, ["m"], dtype, nonfinite)?,
            rates: Rates::new(configs.iter().map(|c| c.lr)),
            configs,
            owner,
        })
    }

    /// The hyper-parameters of group `i`.
    pub fn config(&self, group: usize) -> Option<&LionConfig> {
        self.configs.get(group)
    }

    /// One step on parameters and gradients in flat buffers with this optimizer's parameters as
    /// layout (`tensor_core::params::Params::flatten`); the variables are not touched, the momentum
    /// is this optimizer's. Transforms do not apply.
    ///
    /// # Errors
    /// When a layout differs.
    pub fn step_flat(&mut self, params: &mut FlatTensor, grads: &FlatTensor) -> Result<()> {
        if self.configs.iter().any(|config| config.cautious) {
            let expected = "false for a flat step";
            return Err(crate::Error::argument("cautious", true, expected));
        }
        let rules = self.rules();
        let hold = self.core.nonfinite == NonFinite::Hold;
        if matches!(self.core.nonfinite, NonFinite::SkipStep | NonFinite::Error) {
            return Err(crate::Error::argument(
                "nonfinite",
                self.core.nonfinite,
                "Hold or Propagate for a flat step",
            ));
        }
        self.core.update.step_flat(params, grads, hold, |i| {
            Ok(Some((rules(i), GradMap::default())))
        })?;
        self.core.counts.taken += 1;
        Ok(())
    }

    /// `eta sqrt(d) / |w|` per parameter: how large a step is beside the weights. A cheap number to
    /// tune by; about `1e-3` is usual. Infinite for a parameter of zeros.
    ///
    /// # Errors
    /// Those of candle.
    pub fn update_ratios(&self) -> Result<Vec<(String, f64)>> {
        let one = |(i, (name, var)): (usize, &(String, candle_core::Var))| {
            let norm = sum_squares(var)?.sqrt();
            let step = self.rates.of(self.owner[i]) * (var.elem_count() as f64).sqrt();
            Ok((name.clone(), step / norm))
        };
        self.core.params().iter().enumerate().map(one).collect()
    }

    fn rules(&self) -> impl Fn(usize) -> LionRule {
        let params = self.core.params();
        let rules: Vec<LionRule> = (0..params.len())
            .map(|i| {
                let config = &self.configs[self.owner[i]];
                let (name, var) = &params[i];
                let decays = config.decay_mask.admits(name, var);
                LionRule {
                    lr: self.rates.of(self.owner[i]),
                    beta1: config.beta1,
                    beta2: config.beta2,
                    weight_decay: if decays { config.weight_decay } else { 0.0 },
                }
            })
            .collect();
        move |i| rules[i]
    }

    fn from_group(group: ParamGroup<LionConfig>) -> Result<Self> {
        Self::with_groups(vec![group])
    }

    fn advance(
        &mut self,
        grads: &GradStore,
        first: Option<&mut dyn GradientTransform>,
    ) -> Result<StepReport> {
        let params = self.core.shared_params();
        let set = match self.core.gather(&params, grads, first)? {
            Ok(set) => set,
            Err(why) => return Ok(StepReport::withheld(why)),
        };
        let rules = self.rules();
        if !self.configs.iter().any(|config| config.cautious) {
            return self.core.run(&set, rules);
        }
        let scales = self.agreement(&set, &rules)?;
        let (configs, owner) = (&self.configs, &self.owner);
        self.core.run(&set, |i| CautiousRule {
            lion: rules(i),
            scale: scales[i],
            cautious: configs[owner[i]].cautious,
        })
    }

    /// 1 over the fraction of each tensor that agrees with its gradient; 1 where it is not asked for.
    fn agreement(
        &mut self,
        set: &Gradients<'_>,
        rules: &impl Fn(usize) -> LionRule,
    ) -> Result<Vec<f64>> {
        let (configs, owner) = (&self.configs, &self.owner);
        self.core.update.step(true, |i| {
            let cautious = configs[owner[i]].cautious;
            Ok(set.get(i).filter(|_| cautious).map(|(grad, map)| Work {
                grad,
                rule: Agreement {
                    beta1: rules(i).beta1,
                },
                map,
            }))
        })?;
        let update = &self.core.update;
        let scale = |i: usize| {
            let agreeing = update.events(i);
            if configs[owner[i]].cautious && agreeing > 0 {
                update.var(i).elem_count() as f64 / agreeing as f64
            } else {
                1.0
            }
        };
        Ok((0..update.len()).map(scale).collect())
    }

    fn own_state(&self) -> Result<State> {
        Ok(State::new())
    }

    fn load(&mut self, state: &State) -> Result<()> {
        self.core.load_state(state, &State::new())
    }
}

delegate!(Lion, LionConfig);

#[cfg(all(test, feature = "verify"))]
mod tests {
    use super::*;

    #[test]
    fn the_device_text_computes_the_same_bits() -> Result<()> {
        let rule = LionRule {
            lr: 1e-2,
            beta1: 0.9,
            beta2: 0.99,
            weight_decay: 0.1,
        };
        tensor_core::kernels::check_on_host(rule)?;
        tensor_core::kernels::check_on_host(Agreement { beta1: 0.9 })?;
        for cautious in [false, true] {
            let lion = rule;
            let scale = 1.7;
            tensor_core::kernels::check_on_host(CautiousRule {
                lion,
                scale,
                cautious,
            })?;
        }
        Ok(())
    }
}

//! Adam and AdamW on the fused engine.
//!
//! The baseline of nearly every claim about training, here as fast as memory allows. *Adam: A
//! Method for Stochastic Optimization*, Kingma and Ba, ICLR 2015; decoupled decay from *Decoupled
//! Weight Decay Regularization*, Loshchilov and Hutter, ICLR 2019. Conventions are torch's.
//!
//! ```text
//! decoupled: w <- w (1 - eta lambda)        coupled: g <- g + lambda w
//! m <- beta1 m + (1 - beta1) g
//! v <- beta2 v + (1 - beta2) g^2
//! w <- w - eta / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + epsilon)
//! ```
//!
//! | symbol | field |
//! | --- | --- |
//! | `eta` | [`AdamWConfig::lr`] |
//! | `beta1`, `beta2`, `epsilon` | the fields of these names (`eps`) |
//! | `lambda` | [`AdamWConfig::weight_decay`] |
//!
//! `t` counts the steps in which the parameter had a gradient. Adam is [`AdamW`] with
//! [`WeightDecay::Coupled`] and, by default there, no decay: [`AdamWConfig::adam`].

use crate::error::check;
use crate::fused::{counters, delegate, Core, Rates, State};
use crate::gradients::Gradients;
use crate::param_group::{flatten, shared};
use crate::transform::GradientTransform;
use crate::{DecayMask, NonFinite, ParamGroup, Result, StepReport, WeightDecay};
use candle_core::backprop::GradStore;
use candle_core::Var;
use tensor_core::kernels::{Real, Rule, StateDType, Updated};

/// Hyper-parameters of [`AdamW`].
#[derive(Debug, Clone)]
pub struct AdamWConfig {
    /// Learning rate `eta`.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the corrected second moment.
    pub eps: f64,
    /// Weight decay `lambda`.
    pub weight_decay: f64,
    /// How the decay acts.
    pub decay: WeightDecay,
    /// Which parameters are decayed.
    pub decay_mask: DecayMask,
    /// What happens to gradients that are not finite.
    pub nonfinite: NonFinite,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self {
            lr: 1e-3,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.01,
            decay: WeightDecay::Decoupled,
            decay_mask: DecayMask::All,
            nonfinite: NonFinite::Hold,
        }
    }
}

impl From<&candle_nn::ParamsAdamW> for AdamWConfig {
    fn from(params: &candle_nn::ParamsAdamW) -> Self {
        Self {
            lr: params.lr,
            beta1: params.beta1,
            beta2: params.beta2,
            eps: params.eps,
            weight_decay: params.weight_decay,
            ..Self::default()
        }
    }
}

impl AdamWConfig {
    /// Adam: no decay, and coupled (an L2 penalty) when one is set.
    pub fn adam(lr: f64) -> Self {
        Self {
            lr,
            weight_decay: 0.0,
            decay: WeightDecay::Coupled,
            ..Self::default()
        }
    }

    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`](crate::Error::InvalidConfig) that names the first bad one.
    pub fn validate(&self) -> Result<()> {
        check::non_negative("AdamWConfig::lr", self.lr)?;
        check::rate("AdamWConfig::beta1", self.beta1)?;
        check::rate("AdamWConfig::beta2", self.beta2)?;
        check::non_negative("AdamWConfig::eps", self.eps)?;
        check::non_negative("AdamWConfig::weight_decay", self.weight_decay)
    }
}

/// The update of one element.
#[derive(Debug, Clone, Copy)]
struct AdamRule {
    keep: f64,
    beta1: f64,
    beta2: f64,
    /// `eta / (1 - beta1^t)`.
    step: f64,
    /// `sqrt(1 - beta2^t)`.
    root: f64,
    eps: f64,
}

impl Rule<2, 8> for AdamRule {
    const NAME: &'static str = "adamw";
    const DEVICE_BODY: Option<&'static str> = Some(
        "s0 = k[1] * s0 + k[2] * g; s1 = k[3] * s1 + k[4] * g * g;
            p = p * k[0] - k[5] * s0 / (SQRT(s1) * k[6] + k[7]);",
    );

    fn scalars(&self) -> [f64; 8] {
        [
            self.keep,
            self.beta1,
            1.0 - self.beta1,
            self.beta2,
            1.0 - self.beta2,
            self.step,
            1.0 / self.root,
            self.eps,
        ]
    }

    #[inline(always)]
    fn update<T: Real>(k: &[T; 8], param: T, grad: T, [m, v]: [T; 2]) -> Updated<T, 2> {
        let m = k[1] * m + k[2] * grad;
        let v = k[3] * v + k[4] * grad * grad;
        Updated {
            param: param * k[0] - k[5] * m / (v.sqrt() * k[6] + k[7]),
            state: [m, v],
            event: false,
        }
    }
}

/// Adam with decoupled (or coupled) weight decay; see the [module](self) page.
#[derive(Debug)]
pub struct AdamW {
    core: Core<2>,
    rates: Rates,
    configs: Vec<AdamWConfig>,
    owner: Vec<usize>,
    /// Steps that each parameter has taken.
    steps: Vec<u64>,
}

impl AdamW {
    /// Groups of parameters with hyper-parameters of their own. The non-finite policy is one for
    /// all.
    ///
    /// # Errors
    /// Those of [`AdamWConfig::validate`], for groups that differ in the non-finite policy, and for
    /// parameters that are given twice, share memory or are not floating point.
    pub fn with_groups(groups: Vec<ParamGroup<AdamWConfig>>) -> Result<Self> {
        for group in &groups {
            group.config.validate()?;
        }
        let (params, owner, configs) = flatten(groups)?;
        let nonfinite = shared(
            "AdamWConfig::nonfinite",
            configs.iter().map(|c| c.nonfinite),
        )?;
        Ok(Self {
            steps: vec![0; params.len()],
            core: Core::new(params, ["m", "v"], StateDType::Compute, nonfinite)?,
            rates: Rates::new(configs.iter().map(|c| c.lr)),
            configs,
            owner,
        })
    }

    fn from_group(group: ParamGroup<AdamWConfig>) -> Result<Self> {
        Self::with_groups(vec![group])
    }

    fn advance(
        &mut self,
        grads: &GradStore,
        first: Option<&mut dyn GradientTransform>,
    ) -> Result<StepReport> {
        let params = self.core.shared_params();
        let mut set = match self.core.gather(&params, grads, first)? {
            Ok(set) => set,
            Err(why) => return Ok(StepReport::withheld(why)),
        };
        let mut rules = Vec::with_capacity(set.len());
        for i in 0..set.len() {
            let config = &self.configs[self.owner[i]];
            let decay = decay_of(config, set.name(i), set.var(i));
            if config.decay == WeightDecay::Coupled && decay > 0.0 {
                couple(&mut set, i, decay);
            }
            let t = self.steps[i] + u64::from(set.get(i).is_some());
            rules.push(rule(config, self.rates.of(self.owner[i]), decay, t));
        }
        let report = self.core.run(&set, |i| rules[i])?;
        for (i, steps) in self.steps.iter_mut().enumerate() {
            *steps += u64::from(set.get(i).is_some());
        }
        Ok(report)
    }

    fn own_state(&self) -> Result<State> {
        Ok(State::from([("steps".to_string(), counters(&self.steps)?)]))
    }

    fn load(&mut self, state: &State) -> Result<()> {
        self.core.load_state(state, &self.own_state()?)?;
        let steps = state["steps"].to_vec1::<i64>()?;
        self.steps = steps.iter().map(|t| (*t).max(0) as u64).collect();
        Ok(())
    }
}

/// `g <- g + lambda w`, in registers.
pub(crate) fn couple(gradients: &mut Gradients<'_>, i: usize, decay: f64) {
    if let Some((_, map)) = gradients.get(i) {
        gradients.set_map(i, map.then_affine(1.0, -decay));
    }
}

fn decay_of(config: &AdamWConfig, name: &str, var: &Var) -> f64 {
    if config.decay_mask.admits(name, var) {
        config.weight_decay
    } else {
        0.0
    }
}

fn rule(config: &AdamWConfig, lr: f64, decay: f64, t: u64) -> AdamRule {
    let t = t.max(1) as f64;
    AdamRule {
        keep: match config.decay {
            WeightDecay::Decoupled => 1.0 - lr * decay,
            WeightDecay::Coupled => 1.0,
        },
        beta1: config.beta1,
        beta2: config.beta2,
        step: lr / (1.0 - config.beta1.powf(t)),
        root: (1.0 - config.beta2.powf(t)).sqrt(),
        eps: config.eps,
    }
}

delegate!(AdamW, AdamWConfig);

#[cfg(all(test, feature = "verify"))]
mod tests {
    use super::*;

    #[test]
    fn the_device_text_computes_the_same_bits() -> Result<()> {
        let rule = rule(&AdamWConfig::default(), 1e-2, 0.1, 3);
        Ok(tensor_core::kernels::check_on_host(rule)?)
    }
}

//! Stochastic gradient descent with momentum on the fused engine.
//!
//! The other baseline: plain, heavy-ball or Nesterov, with torch's conventions (the rate multiplies
//! the momentum, not the gradient inside it).
//!
//! ```text
//! coupled: g <- g + lambda w                decoupled: w <- w (1 - eta lambda)
//! b <- mu b + (1 - tau) g                   (b <- g in a parameter's first step)
//! w <- w - eta b                            Nesterov: w <- w - eta (g + mu b)
//! ```
//!
//! | symbol | field |
//! | --- | --- |
//! | `eta` | [`SgdConfig::lr`] |
//! | `mu`, `tau` | [`SgdConfig::momentum`], [`SgdConfig::dampening`] |
//! | `lambda` | [`SgdConfig::weight_decay`] |

use crate::adamw::couple;
use crate::error::check;
use crate::fused::{counters, delegate, Core, Rates, State};
use crate::param_group::{flatten, shared};
use crate::transform::GradientTransform;
use crate::{DecayMask, NonFinite, ParamGroup, Result, StepReport, WeightDecay};
use candle_core::backprop::GradStore;
use tensor_core::kernels::{Real, Rule, StateDType, Updated};

/// Hyper-parameters of [`SgdMomentum`].
#[derive(Debug, Clone)]
pub struct SgdConfig {
    /// Learning rate `eta`.
    pub lr: f64,
    /// Momentum `mu`.
    pub momentum: f64,
    /// Dampening `tau` of the gradient in the momentum.
    pub dampening: f64,
    /// Looks ahead along the momentum; needs momentum and no dampening.
    pub nesterov: bool,
    /// Weight decay `lambda`.
    pub weight_decay: f64,
    /// How the decay acts; coupled (an L2 penalty) by default.
    pub decay: WeightDecay,
    /// Which parameters are decayed.
    pub decay_mask: DecayMask,
    /// What happens to gradients that are not finite.
    pub nonfinite: NonFinite,
}

impl Default for SgdConfig {
    fn default() -> Self {
        Self {
            lr: 1e-2,
            momentum: 0.9,
            dampening: 0.0,
            nesterov: false,
            weight_decay: 0.0,
            decay: WeightDecay::Coupled,
            decay_mask: DecayMask::All,
            nonfinite: NonFinite::Hold,
        }
    }
}

impl SgdConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`](crate::Error::InvalidConfig) that names the first bad one.
    pub fn validate(&self) -> Result<()> {
        check::non_negative("SgdConfig::lr", self.lr)?;
        check::rate("SgdConfig::momentum", self.momentum)?;
        check::finite("SgdConfig::dampening", self.dampening)?;
        check::non_negative("SgdConfig::weight_decay", self.weight_decay)?;
        check::require(
            !self.nesterov || (self.momentum > 0.0 && self.dampening == 0.0),
            "SgdConfig::nesterov",
            self.nesterov,
            "false, or momentum > 0 with dampening 0",
        )
    }
}

/// The update of one element.
#[derive(Debug, Clone, Copy)]
struct SgdRule {
    keep: f64,
    lr: f64,
    momentum: f64,
    gain: f64,
    nesterov: bool,
}

impl Rule<1, 5> for SgdRule {
    const NAME: &'static str = "sgd";
    const DEVICE_BODY: Option<&'static str> =
        Some("s0 = k[2] * s0 + k[3] * g; p = p * k[0] - k[1] * (k[4] > 0 ? g + k[2] * s0 : s0);");

    fn scalars(&self) -> [f64; 5] {
        [
            self.keep,
            self.lr,
            self.momentum,
            self.gain,
            f64::from(u8::from(self.nesterov)),
        ]
    }

    #[inline(always)]
    fn update<T: Real>(k: &[T; 5], param: T, grad: T, [b]: [T; 1]) -> Updated<T, 1> {
        let b = k[2] * b + k[3] * grad;
        let direction = T::select(k[4] > T::ZERO, grad + k[2] * b, b);
        Updated {
            param: param * k[0] - k[1] * direction,
            state: [b],
            event: false,
        }
    }
}

/// Gradient descent with momentum; see the [module](self) page.
#[derive(Debug)]
pub struct SgdMomentum {
    core: Core<1>,
    rates: Rates,
    configs: Vec<SgdConfig>,
    owner: Vec<usize>,
    /// Steps that each parameter has taken.
    steps: Vec<u64>,
}

impl SgdMomentum {
    /// Groups of parameters with hyper-parameters of their own. The non-finite policy is one for
    /// all.
    ///
    /// # Errors
    /// Those of [`SgdConfig::validate`], for groups that differ in the non-finite policy, and for
    /// parameters that are given twice, share memory or are not floating point.
    pub fn with_groups(groups: Vec<ParamGroup<SgdConfig>>) -> Result<Self> {
        for group in &groups {
            group.config.validate()?;
        }
        let (params, owner, configs) = flatten(groups)?;
        let nonfinite = shared("SgdConfig::nonfinite", configs.iter().map(|c| c.nonfinite))?;
        Ok(Self {
            steps: vec![0; params.len()],
            core: Core::new(params, ["b"], StateDType::Compute, nonfinite)?,
            rates: Rates::new(configs.iter().map(|c| c.lr)),
            configs,
            owner,
        })
    }

    /// Gives one group other hyper-parameters, for regimes that switch them between epochs; the
    /// momentum buffers stay. The non-finite policy does not change.
    ///
    /// # Errors
    /// Those of [`SgdConfig::validate`], and for a group that does not exist.
    pub fn set_config(&mut self, group: usize, config: SgdConfig) -> Result<()> {
        config.validate()?;
        let count = self.configs.len();
        let slot = self
            .configs
            .get_mut(group)
            .ok_or_else(|| crate::Error::argument("group", group, format!("below {count}")))?;
        self.rates.configure(group, config.lr);
        *slot = config;
        Ok(())
    }

    fn from_group(group: ParamGroup<SgdConfig>) -> Result<Self> {
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
            let lr = self.rates.of(self.owner[i]);
            let decays = config.decay_mask.admits(set.name(i), set.var(i));
            let decay = if decays { config.weight_decay } else { 0.0 };
            let mut keep = 1.0;
            match config.decay {
                WeightDecay::Decoupled => keep -= lr * decay,
                WeightDecay::Coupled if decay > 0.0 => couple(&mut set, i, decay),
                WeightDecay::Coupled => {}
            }
            rules.push(SgdRule {
                keep,
                lr,
                momentum: config.momentum,
                // The first gradient enters the momentum undamped.
                gain: if self.steps[i] == 0 {
                    1.0
                } else {
                    1.0 - config.dampening
                },
                nesterov: config.nesterov,
            });
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

delegate!(SgdMomentum, SgdConfig);

#[cfg(all(test, feature = "verify"))]
mod tests {
    use super::*;

    #[test]
    fn the_device_text_computes_the_same_bits() -> Result<()> {
        for nesterov in [false, true] {
            tensor_core::kernels::check_on_host(SgdRule {
                keep: 0.999,
                lr: 0.1,
                momentum: 0.8,
                gain: 0.5,
                nesterov,
            })?;
        }
        Ok(())
    }
}

//! SplitSGD: momentum descent that moves its few largest entries by their sign.
//!
//! The paper's stand-in for Adam, whose advantage over plain descent is mostly that it damps the
//! few coordinates which carry the opposing signals. Per tensor:
//!
//! ```text
//! m <- b m + (1 - b) g
//! r  = the (1 - q) quantile of |m|, from at most 65,536 entries, evenly spread
//! w <- w - lr_sign sign(m)   where |m| > r,      w <- w - lr m   elsewhere
//! ```
//!
//! | symbol | field |
//! | --- | --- |
//! | `b`, `q` | [`SplitSgdConfig::momentum`], [`SplitSgdConfig::quantile`] |
//! | `lr`, `lr_sign` | [`SplitSgdConfig::lr`], [`SplitSgdConfig::lr_sign`] |

use crate::error::check;
use crate::fused::{delegate, Core, Rates, State};
use crate::gradients::Gradients;
use crate::param_group::{flatten, shared};
use crate::transform::GradientTransform;
use crate::{NonFinite, ParamGroup, Result, StepReport};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor};
use tensor_core::kernels::{Real, Rule, StateDType, Updated};

/// Entries from which the quantile is estimated.
const SAMPLE: usize = 65_536;

/// Hyper-parameters of [`SplitSgd`].
#[derive(Debug, Clone, PartialEq)]
pub struct SplitSgdConfig {
    /// Learning rate of ordinary entries.
    pub lr: f64,
    /// Size of the step of the largest entries, relative to nothing: their weights move by this.
    pub lr_sign: f64,
    /// Momentum.
    pub momentum: f64,
    /// Fraction of entries that move by their sign.
    pub quantile: f64,
    /// What happens to gradients that are not finite.
    pub nonfinite: NonFinite,
}

impl Default for SplitSgdConfig {
    fn default() -> Self {
        Self {
            lr: 0.1,
            lr_sign: 1e-3,
            momentum: 0.9,
            quantile: 0.1,
            nonfinite: NonFinite::Hold,
        }
    }
}

impl SplitSgdConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`](crate::Error::InvalidConfig) that names the first bad one.
    pub fn validate(&self) -> Result<()> {
        check::non_negative("SplitSgdConfig::lr", self.lr)?;
        check::non_negative("SplitSgdConfig::lr_sign", self.lr_sign)?;
        check::rate("SplitSgdConfig::momentum", self.momentum)?;
        let q = self.quantile;
        let holds = (0.0..=1.0).contains(&q);
        check::require(holds, "SplitSgdConfig::quantile", q, "a number in [0, 1]")
    }
}

/// The update of one element.
#[derive(Debug, Clone, Copy)]
struct SplitRule {
    lr: f64,
    lr_sign: f64,
    momentum: f64,
    threshold: f64,
}

impl Rule<1, 5> for SplitRule {
    const NAME: &'static str = "split-sgd";
    const DEVICE_BODY: Option<&'static str> = Some(
        "s0 = k[2] * s0 + k[3] * g; const T size = s0 > 0 ? s0 : -s0; p = p - (size > k[4] ? k[1] * sign(s0) : k[0] * s0); event = size > k[4];",
    );

    fn scalars(&self) -> [f64; 5] {
        [
            self.lr,
            self.lr_sign,
            self.momentum,
            1.0 - self.momentum,
            self.threshold,
        ]
    }

    #[inline(always)]
    fn update<T: Real>(k: &[T; 5], param: T, grad: T, [m]: [T; 1]) -> Updated<T, 1> {
        let m = k[2] * m + k[3] * grad;
        let size = T::select(m > T::ZERO, m, T::ZERO - m);
        let split = size > k[4];
        Updated {
            param: param - T::select(split, k[1] * m.sign(), k[0] * m),
            state: [m],
            event: split,
        }
    }
}

/// SplitSGD; see the [module](super) page.
///
/// ```
/// use candle_core::{Device, Var};
/// use candle_nn::Optimizer;
/// use thalweg_optim::diagnostics::opposing::{SplitSgd, SplitSgdConfig};
///
/// let w = Var::new(&[3f64, -2.0, 0.5], &Device::Cpu)?;
/// let mut optimizer = SplitSgd::new(vec![w.clone()], SplitSgdConfig::default())?;
/// for _ in 0..400 {
///     optimizer.backward_step(&w.sqr()?.sum_all()?)?;
/// }
/// assert!(w.sqr()?.sum_all()?.to_scalar::<f64>()? < 1.0);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug)]
pub struct SplitSgd {
    core: Core<1>,
    rates: Rates,
    configs: Vec<SplitSgdConfig>,
    owner: Vec<usize>,
    /// Where each tensor is sampled; `None` for all of it.
    places: Vec<Option<Tensor>>,
}

impl SplitSgd {
    /// Groups of parameters with hyper-parameters of their own. The non-finite policy is one for
    /// all; a schedule moves `lr_sign` in proportion to `lr`.
    ///
    /// # Errors
    /// Those of [`SplitSgdConfig::validate`], for groups that differ in the non-finite policy, and for
    /// parameters that are given twice, share memory or are not floating point.
    pub fn with_groups(groups: Vec<ParamGroup<SplitSgdConfig>>) -> Result<Self> {
        for group in &groups {
            group.config.validate()?;
        }
        let (params, owner, configs) = flatten(groups)?;
        let nonfinite = shared(
            "SplitSgdConfig::nonfinite",
            configs.iter().map(|c| c.nonfinite),
        )?;
        let mut places = Vec::with_capacity(params.len());
        for (_, var) in &params {
            let n = var.elem_count();
            places.push(match n <= SAMPLE {
                true => None,
                false => {
                    let at: Vec<u32> = (0..n)
                        .step_by(n.div_ceil(SAMPLE))
                        .map(|i| i as u32)
                        .collect();
                    Some(Tensor::new(at, var.device())?)
                }
            });
        }
        Ok(Self {
            core: Core::new(params, ["m"], StateDType::Compute, nonfinite)?,
            rates: Rates::new(configs.iter().map(|c| c.lr)),
            configs,
            owner,
            places,
        })
    }

    /// Entries that moved by their sign in the last step.
    pub fn split_entries(&self) -> u64 {
        let update = &self.core.update;
        (0..update.len()).map(|i| update.events(i)).sum()
    }

    /// The `(1 - q)` quantile of the sampled `|m|` after this step's gradient.
    fn threshold(&self, set: &Gradients<'_>, i: usize, config: &SplitSgdConfig) -> Result<f64> {
        let Some((grad, map)) = set.get(i) else {
            return Ok(f64::INFINITY);
        };
        let pick = |x: &Tensor| -> Result<Tensor> {
            let flat = x.detach().flatten_all()?;
            Ok(match &self.places[i] {
                Some(places) => flat.index_select(places, 0)?,
                None => flat,
            })
        };
        let grad = map.apply(&pick(grad)?, &pick(set.var(i))?)?;
        let grad = grad.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
        let grad = grad.to_vec1::<f64>()?;
        let n = set.var(i).elem_count();
        let stride = if n <= SAMPLE { 1 } else { n.div_ceil(SAMPLE) };
        let m = self.core.update.sample_state(i, 0, stride)?;
        let b = config.momentum;
        let size = |(m, g): (f64, f64)| (b * m + (1.0 - b) * g).abs();
        let sizes = m.into_iter().zip(grad).map(size);
        let mut sizes: Vec<f64> = sizes.filter(|x| x.is_finite()).collect();
        if sizes.is_empty() {
            return Ok(f64::INFINITY);
        }
        let place = ((1.0 - config.quantile) * (sizes.len() - 1) as f64).round() as usize;
        let (_, threshold, _) = sizes.select_nth_unstable_by(place, f64::total_cmp);
        Ok(*threshold)
    }

    fn from_group(group: ParamGroup<SplitSgdConfig>) -> Result<Self> {
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
        let mut rules = Vec::with_capacity(set.len());
        for i in 0..set.len() {
            let config = &self.configs[self.owner[i]];
            let lr = self.rates.of(self.owner[i]);
            let scale = if config.lr > 0.0 { lr / config.lr } else { 1.0 };
            rules.push(SplitRule {
                lr,
                lr_sign: config.lr_sign * scale,
                momentum: config.momentum,
                threshold: self.threshold(&set, i, config)?,
            });
        }
        self.core.run(&set, |i| rules[i])
    }

    fn own_state(&self) -> Result<State> {
        Ok(State::new())
    }

    fn load(&mut self, state: &State) -> Result<()> {
        self.core.load_state(state, &State::new())
    }
}

delegate!(SplitSgd, SplitSgdConfig);

#[cfg(all(test, feature = "verify"))]
mod tests {
    use super::*;

    #[test]
    fn the_device_text_computes_the_same_bits() -> Result<()> {
        Ok(tensor_core::kernels::check_on_host(SplitRule {
            lr: 0.1,
            lr_sign: 1e-3,
            momentum: 0.9,
            threshold: 0.05,
        })?)
    }
}

//! SPAM: Adam with spike clipping, momentum reset and optional sparse momentum.
//!
//! For anyone whose training loss spikes (language models, anything with heavy-tailed gradients)
//! and who now restarts from checkpoints. *SPAM: Spike-Aware Adam with Momentum Reset for Stable
//! LLM Training*, Huang et al., ICLR 2025, arXiv 2501.06842.
//!
//! Per step `t = 1, 2, ...`, with `k` steps since the last reset (`k = 0` in the reset step):
//!
//! ```text
//! s = 1 - 0.99 (1 + cos(pi k / (N + 1))) / 2     for k < N after a reset, else 1
//! if t mod D = 0:  m <- 0, v <- 0
//! if t >= a and t mod D >= a:  where g^2 > theta v:  g <- sign(g) sqrt(theta v)
//! m <- beta1 m + (1 - beta1) g
//! v <- beta2 v + (1 - beta2) g^2
//! alpha = eta sqrt(1 - beta2^t) / (1 - beta1^t)
//! w <- w - alpha s m / (sqrt(v) + epsilon)
//! w <- w - eta lambda w
//! ```
//!
//! | symbol | field |
//! | --- | --- |
//! | `eta`, `beta1`, `beta2`, `epsilon`, `lambda` | `lr`, `beta1`, `beta2`, `eps`, `weight_decay` |
//! | `D`, `N` | [`SpamConfig::delta_t`], [`SpamConfig::warmup`] |
//! | `theta`, `a` | [`SpamConfig::threshold`], [`SpamConfig::clip_after`] |
//!
//! With a [`density`](SpamConfig::density) `d`, only a random fraction `d` of a tensor's entries
//! carries moments and moves between two resets: the state shrinks to about `d` of Adam's. A new
//! mask is drawn at the end of the step before each reset.
//!
//! The published training script passes the schedule's warm-up (1000) where this warm-up (150) is
//! meant, so that `s` never reaches 1 with `D = 500`; comparisons with its losses should know.

mod config;
mod masks;
mod monitor;
mod rule;

pub use config::{DecayMode, SpamConfig};
pub use monitor::{spike_scores, SpikeMonitor, SpikeReport, TensorSpikes};

use crate::fused::{counters, delegate, read_counters, Core, Rates, State};
use crate::gradients::Gradients;
use crate::param_group::{flatten, shared};
use crate::transform::GradientTransform;
use crate::{Error, NonFinite, ParamGroup, Result, StepReport};
use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor, Var};
use rule::{DecayRule, SpamRule};
use tensor_core::kernels::{FusedUpdate, Mask, StateDType, Work};
use tensor_core::random::{RandomState, RandomStream};

/// What the last step of [`Spam`] did.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct SpamStats {
    /// Entries that were clipped; on a device, in the step before.
    pub clipped: u64,
    /// Entries that were updated.
    pub total: u64,
    /// The step of the last reset; 0 before the first.
    pub last_reset: u64,
    /// The warm-up factor `s`.
    pub scale: f64,
    /// Of the entries of the previous masks, the fraction that the present masks kept; `None`
    /// before the first change.
    pub mask_overlap: Option<f64>,
}

/// The SPAM optimizer; see the [module](self) page.
#[derive(Debug)]
pub struct Spam {
    core: Core<2>,
    rates: Rates,
    configs: Vec<SpamConfig>,
    owner: Vec<usize>,
    /// Decays all entries of sparse parameters; over those parameters only.
    decay: FusedUpdate<0>,
    stream: RandomStream,
    step: u64,
    /// `k` per group; before the first reset it lies beyond the warm-up.
    since_reset: Vec<u64>,
    /// How often the masks of a group have been redrawn.
    period: Vec<u64>,
    stats: SpamStats,
}

impl Spam {
    /// Groups of parameters with hyper-parameters of their own; the non-finite policy is one
    /// for all. Masks are drawn from streams split from `stream` by tensor and period, so
    /// that replicas with one seed draw the same masks.
    ///
    /// # Errors
    /// Those of [`SpamConfig::validate`], for groups that differ in the non-finite policy, and for
    /// parameters that are given twice, share memory or are not floating point.
    pub fn with_groups(groups: Vec<ParamGroup<SpamConfig>>, stream: &RandomStream) -> Result<Self> {
        for group in &groups {
            group.config.validate()?;
        }
        let (params, owner, configs) = flatten(groups)?;
        let nonfinite = shared("SpamConfig::nonfinite", configs.iter().map(|c| c.nonfinite))?;
        let sparse = params
            .iter()
            .zip(&owner)
            .filter(|(_, g)| configs[**g].density.is_some());
        let sparse: Vec<(String, Var)> = sparse.map(|(param, _)| param.clone()).collect();
        let mut spam = Self {
            core: Core::new(params, ["m", "v"], StateDType::Compute, nonfinite)?,
            rates: Rates::new(configs.iter().map(|c| c.lr)),
            decay: FusedUpdate::new(sparse, StateDType::Compute)?,
            since_reset: configs.iter().map(|c| c.warmup + 1).collect(),
            period: vec![0; configs.len()],
            configs,
            owner,
            stream: stream.split("spam"),
            step: 0,
            stats: SpamStats {
                scale: 1.0,
                ..SpamStats::default()
            },
        };
        for i in 0..spam.owner.len() {
            spam.draw_mask(i)?;
        }
        Ok(spam)
    }

    /// The usual split for a language model: matrices whose name contains `attn`, `attention` or
    /// `mlp` keep moments for a fraction `density` of their entries; embeddings, norms, biases and
    /// the head stay dense.
    pub fn llm_groups(
        params: impl IntoIterator<Item = (String, Var)>,
        config: SpamConfig,
        density: f64,
    ) -> Vec<ParamGroup<SpamConfig>> {
        let in_block = |name: &str| {
            ["attn", "attention", "mlp"]
                .iter()
                .any(|s| name.contains(s))
        };
        let (sparse, dense): (Vec<_>, Vec<_>) = params
            .into_iter()
            .partition(|(name, var)| var.rank() == 2 && in_block(name));
        let sparse_config = SpamConfig {
            density: Some(density),
            ..config.clone()
        };
        vec![
            ParamGroup::named(
                dense,
                SpamConfig {
                    density: None,
                    ..config
                },
            ),
            ParamGroup::named(sparse, sparse_config),
        ]
    }

    /// What the last step did.
    pub fn stats(&self) -> SpamStats {
        self.stats
    }

    /// Entries whose second moment is zero: from `clip_after` on their gradients are clipped to zero
    /// until the next reset, unless [`SpamConfig::min_v`] is positive. Reads all of `v`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn frozen(&self) -> Result<u64> {
        let mut count = 0;
        for i in 0..self.owner.len() {
            let zero = self.core.update.state(i, 1)?.eq(0.0)?;
            count += u64::from(
                zero.to_dtype(candle_core::DType::U32)?
                    .sum_all()?
                    .to_scalar::<u32>()?,
            );
        }
        Ok(count)
    }

    /// The masks in force, by parameter; `None` for dense ones.
    pub fn masks(&self) -> Vec<(String, Option<Mask>)> {
        let one = |(i, (name, _)): (usize, &(String, Var))| {
            (name.clone(), self.core.update.mask(i).cloned())
        };
        self.core.params().iter().enumerate().map(one).collect()
    }

    /// Replaces masks by name, with zeroed moments where a mask differs from the one in force.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a parameter that is unknown or dense, and for a mask of
    /// another length.
    pub fn set_masks(&mut self, masks: &[(String, Mask)]) -> Result<()> {
        for (name, mask) in masks {
            let place = self.core.params().iter().position(|(n, _)| n == name);
            let sparse = place.filter(|i| self.core.update.mask(*i).is_some());
            let i = sparse.ok_or_else(|| Error::argument("masks", name, "a sparse parameter"))?;
            if self.core.update.mask(i) != Some(mask) {
                self.core.update.set_mask(i, Some(mask.clone()))?;
            }
        }
        Ok(())
    }

    /// Without a stream there are no masks to draw.
    fn from_group(group: ParamGroup<SpamConfig>) -> Result<Self> {
        if let Some(density) = group.config.density {
            return Err(Error::config(
                "SpamConfig::density",
                density,
                "None here; sparse momentum draws masks: use `Spam::with_groups` with a stream",
            ));
        }
        Self::with_groups(vec![group], &RandomStream::new(0))
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
        let t = self.step + 1;
        let resets: Vec<bool> = self.configs.iter().map(|c| c.resets_at(t)).collect();
        if resets.contains(&true) {
            self.stats.last_reset = t;
        }
        let rules: Vec<SpamRule> = (0..self.owner.len()).map(|i| self.rule(i, t)).collect();
        let report = self.core.run(&set, |i| rules[i])?;
        self.decay_sparse(&set)?;
        self.count(&set);
        self.step = t;
        self.after(t)?;
        Ok(report)
    }

    fn rule(&self, i: usize, t: u64) -> SpamRule {
        let group = self.owner[i];
        let (config, lr) = (&self.configs[group], self.rates.of(group));
        let reset = config.resets_at(t);
        let counted = match (config.reset_bias_correction, self.stats.last_reset) {
            (true, last) if last > 0 => t - last + 1,
            _ => t,
        };
        let n = counted as f64;
        let correction = if config.correct_bias {
            (1.0 - config.beta2.powf(n)).sqrt() / (1.0 - config.beta1.powf(n))
        } else {
            1.0
        };
        let fused_decay = config.density.is_none() || config.decay_mode == DecayMode::Masked;
        SpamRule {
            step: lr * correction * config.warmup_factor(self.since_reset[group]),
            beta1: config.beta1,
            beta2: config.beta2,
            eps: config.eps,
            threshold: if config.clips_at(t) {
                config.threshold
            } else {
                f64::INFINITY
            },
            min_v: config.min_v,
            decay: if fused_decay {
                lr * config.weight_decay
            } else {
                0.0
            },
            reset,
        }
    }

    /// The sparse step touches set entries only; [`DecayMode::All`] decays the others too.
    fn decay_sparse(&mut self, set: &Gradients<'_>) -> Result<()> {
        let all = |config: &SpamConfig| {
            config.density.is_some()
                && config.decay_mode == DecayMode::All
                && config.weight_decay > 0.0
        };
        if !self.configs.iter().any(all) {
            return Ok(());
        }
        let sparse: Vec<usize> = (0..set.len())
            .filter(|i| self.configs[self.owner[*i]].density.is_some())
            .collect();
        let hold = self.core.nonfinite == NonFinite::Hold;
        Ok(self.decay.step(hold, |j| {
            let i = sparse[j];
            let group = self.owner[i];
            let config = &self.configs[group];
            let rule = DecayRule(self.rates.of(group) * config.weight_decay);
            let work = set.get(i).filter(|_| all(config));
            let work = work.map(|(grad, map)| Work { grad, rule, map });
            Ok(work)
        })?)
    }

    fn count(&mut self, set: &Gradients<'_>) {
        let update = &self.core.update;
        let active = |i: &usize| set.get(*i).is_some();
        let numel = |i: usize| update.mask(i).map_or(set.var(i).elem_count(), Mask::count);
        self.stats.total = (0..set.len()).filter(active).map(|i| numel(i) as u64).sum();
        self.stats.clipped = (0..set.len())
            .filter(active)
            .map(|i| update.events(i))
            .sum();
        self.stats.scale = match self.configs.first() {
            Some(config) => config.warmup_factor(self.since_reset[0]),
            None => 1.0,
        };
    }

    /// New masks in the step before a reset; otherwise one more step since the last.
    fn after(&mut self, t: u64) -> Result<()> {
        let (mut kept, mut before) = (0, 0);
        for group in 0..self.configs.len() {
            if !self.configs[group].resets_at(t + 1) {
                self.since_reset[group] += 1;
                continue;
            }
            self.since_reset[group] = 0;
            self.period[group] += 1;
            for i in (0..self.owner.len())
                .filter(|i| self.owner[*i] == group)
                .collect::<Vec<_>>()
            {
                let Some(old) = self.core.update.mask(i).cloned() else {
                    continue;
                };
                self.draw_mask(i)?;
                before += old.count();
                kept += match self.core.update.mask(i) {
                    Some(new) => new.overlap(&old)?,
                    None => 0,
                };
            }
        }
        if before > 0 {
            self.stats.mask_overlap = Some(kept as f64 / before as f64);
        }
        Ok(())
    }

    fn draw_mask(&mut self, i: usize) -> Result<()> {
        let group = self.owner[i];
        let config = &self.configs[group];
        let Some(density) = config.density else {
            return Ok(());
        };
        let len = self.core.update.var(i).elem_count();
        let mask = masks::draw(
            &self.stream,
            i,
            self.period[group],
            len,
            density,
            config.mask_block,
        )?;
        Ok(self.core.update.set_mask(i, Some(mask))?)
    }

    fn own_state(&self) -> Result<State> {
        let mut state = State::new();
        let overlap = self.stats.mask_overlap.map_or(u64::MAX >> 1, f64::to_bits);
        let own = [
            self.step,
            self.stats.last_reset,
            self.stats.clipped,
            self.stats.total,
            overlap,
            self.stats.scale.to_bits(),
        ];
        state.insert("step".into(), counters(&own)?);
        state.insert("since_reset".into(), counters(&self.since_reset)?);
        state.insert("period".into(), counters(&self.period)?);
        state.insert("stream".into(), self.stream.state().to_tensor()?);
        for (name, mask) in self.masks() {
            if let Some(mask) = mask {
                let flags: Vec<u8> = mask.to_bools().iter().map(|b| u8::from(*b)).collect();
                let len = flags.len();
                state.insert(
                    format!("mask.{name}"),
                    Tensor::from_vec(flags, len, &Device::Cpu)?,
                );
            }
        }
        Ok(state)
    }

    fn load(&mut self, state: &State) -> Result<()> {
        let masks = self.masks_in(state);
        let shape = |i: usize| match &masks[i] {
            Some(mask) => vec![mask.count()],
            None => self.core.update.var(i).dims().to_vec(),
        };
        self.core.check_state(state, &self.own_state()?, shape)?;
        for (i, mask) in masks.into_iter().enumerate() {
            self.core.update.set_mask(i, mask)?;
        }
        self.core.install(state)?;
        let [step, last_reset, clipped, total, overlap, scale] = read_counters(&state["step"])?;
        self.step = step;
        self.stats = SpamStats {
            clipped,
            total,
            last_reset,
            scale: f64::from_bits(scale),
            mask_overlap: (overlap != u64::MAX >> 1).then(|| f64::from_bits(overlap)),
        };
        let read = |name: &str| -> Result<Vec<u64>> {
            let values = state[name].to_vec1::<i64>()?;
            Ok(values.iter().map(|x| (*x).max(0) as u64).collect())
        };
        self.since_reset = read("since_reset")?;
        self.period = read("period")?;
        self.stream = RandomStream::from_state(&RandomState::from_tensor(&state["stream"])?);
        Ok(())
    }

    /// The masks of the sparse parameters in a saved state; a missing or malformed one is left as
    /// it is, for the check to report.
    fn masks_in(&self, state: &State) -> Vec<Option<Mask>> {
        let read = |name: &str, old: &Mask| {
            let flags = state.get(&format!("mask.{name}"))?.to_vec1::<u8>().ok()?;
            let flags: Vec<bool> = flags.iter().map(|b| *b != 0).collect();
            Mask::from_bools(&flags)
                .ok()
                .filter(|m| m.len() == old.len())
        };
        let one =
            |(name, old): (String, Option<Mask>)| old.map(|old| read(&name, &old).unwrap_or(old));
        self.masks().into_iter().map(one).collect()
    }
}

delegate!(Spam, SpamConfig);

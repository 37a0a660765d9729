//! Objects seen before, with the trajectories that led to them.

use super::pareto::dominates;
use super::{Environment, Trajectories};
use crate::error::check;
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use std::collections::{BTreeMap, HashMap};
use tensor_core::random::RandomStream;

/// How a batch is filled from the buffer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ReplayConfig {
    /// Share of a batch that comes from the buffer.
    pub share: f64,
    /// Part of the buffer that counts as good: the best of this share by the first objective.
    pub top: f64,
    /// Share of what is drawn that comes from the good part; the rest comes from all of it.
    pub top_share: f64,
    /// Objects that are kept; beyond it the worst goes.
    pub capacity: usize,
}

impl Default for ReplayConfig {
    fn default() -> Self {
        Self {
            share: 0.5,
            top: 0.1,
            top_share: 0.5,
            capacity: 100_000,
        }
    }
}

impl ReplayConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`].
    pub fn validate(&self) -> Result<()> {
        check::unit("ReplayConfig::share", self.share)?;
        check::unit("ReplayConfig::top", self.top)?;
        check::unit("ReplayConfig::top_share", self.top_share)?;
        check::at_least("ReplayConfig::capacity", self.capacity, 1)
    }
}

#[derive(Debug, Clone)]
struct Entry {
    actions: Vec<u32>,
    context: Vec<f32>,
    objectives: Vec<f64>,
}

/// A buffer of distinct objects, best first by their first objective.
#[derive(Debug, Clone)]
pub struct Replay<S> {
    config: ReplayConfig,
    entries: HashMap<S, Entry>,
    /// Objects, best first; ties in the order of arrival.
    order: Vec<S>,
    width: usize,
}

impl<S: Clone + Eq + std::hash::Hash + std::fmt::Debug> Replay<S> {
    /// An empty buffer for trajectories with so many context numbers.
    ///
    /// # Errors
    /// Those of [`ReplayConfig::validate`].
    pub fn new(config: ReplayConfig, context_width: usize) -> Result<Self> {
        config.validate()?;
        Ok(Self {
            config,
            entries: HashMap::new(),
            order: vec![],
            width: context_width,
        })
    }

    /// Distinct objects in the buffer.
    pub fn len(&self) -> usize {
        self.order.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.order.is_empty()
    }

    /// The settings.
    pub fn config(&self) -> &ReplayConfig {
        &self.config
    }

    /// Objects and their objectives, best first.
    pub fn iter(&self) -> impl Iterator<Item = (&S, &[f64])> {
        let entry = |x| self.entries.get(x).map(|e| (x, e.objectives.as_slice()));
        self.order.iter().filter_map(entry)
    }

    /// The objects that no other one in the buffer dominates.
    pub fn front(&self) -> Vec<(&S, &[f64])> {
        let all: Vec<_> = self.iter().collect();
        let free = |p: &[f64]| !all.iter().any(|(_, q)| dominates(q, p));
        all.iter().filter(|(_, p)| free(p)).copied().collect()
    }

    /// Adds trajectories with the objectives of their objects; one with NaN is left out, and of an
    /// object that is there already the newer trajectory stays.
    pub fn extend(&mut self, batch: &Trajectories<S>, objectives: &[Vec<f64>]) {
        for (i, values) in objectives.iter().enumerate().take(batch.len()) {
            if values.iter().any(|v| v.is_nan()) {
                continue;
            }
            let entry = Entry {
                actions: batch.actions_of(i).to_vec(),
                context: batch.context_of(i).to_vec(),
                objectives: values.clone(),
            };
            self.insert(batch.object(i).clone(), entry);
        }
        while self.order.len() > self.config.capacity {
            if let Some(worst) = self.order.pop() {
                self.entries.remove(&worst);
            }
        }
    }

    fn insert(&mut self, object: S, entry: Entry) {
        let rank = |e: &Entry| e.objectives.first().copied().unwrap_or(0.0);
        let score = rank(&entry);
        let known = self.entries.insert(object.clone(), entry);
        if let Some(old) = known {
            if rank(&old) == score {
                return;
            }
            self.order.retain(|x| *x != object);
        }
        let better = |x: &S| self.entries.get(x).is_some_and(|e| rank(e) >= score);
        let at = self.order.partition_point(better);
        self.order.insert(at, object);
    }

    /// Draws trajectories, with replacement: a share from the good part and the rest from all.
    ///
    /// # Errors
    /// [`Error::Environment`] when the environment refuses an action that it once allowed.
    pub fn draw<E: Environment<State = S>>(
        &self,
        env: &E,
        count: usize,
        rng: &mut RandomStream,
    ) -> Result<Trajectories<S>> {
        let mut out = Trajectories::new(self.width);
        if self.is_empty() {
            return Ok(out);
        }
        let good = ((self.len() as f64 * self.config.top).ceil() as usize).clamp(1, self.len());
        let from_good = (count as f64 * self.config.top_share).round() as usize;
        for k in 0..count {
            let among = if k < from_good { good } else { self.len() };
            if let Some(entry) = self.entries.get(&self.order[rng.below(among)?]) {
                out.push_actions(env, &entry.actions, &entry.context)?;
            }
        }
        Ok(out)
    }

    /// Draws objects of the good part, with replacement.
    ///
    /// # Errors
    /// Those of the stream.
    pub fn draw_good(&self, count: usize, rng: &mut RandomStream) -> Result<Vec<S>> {
        let good = ((self.len() as f64 * self.config.top).ceil() as usize).max(1);
        let among = good.min(self.len());
        if among == 0 {
            return Ok(vec![]);
        }
        (0..count)
            .map(|_| Ok(self.order[rng.below(among)?].clone()))
            .collect()
    }

    /// The buffer as named tensors on the CPU.
    ///
    /// # Errors
    /// Those of candle.
    pub fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        let entries: Vec<&Entry> = self
            .order
            .iter()
            .filter_map(|x| self.entries.get(x))
            .collect();
        let lengths: Vec<u32> = entries.iter().map(|e| e.actions.len() as u32).collect();
        let actions: Vec<u32> = entries.iter().flat_map(|e| e.actions.clone()).collect();
        let contexts: Vec<f32> = entries.iter().flat_map(|e| e.context.clone()).collect();
        let values: Vec<f64> = entries.iter().flat_map(|e| e.objectives.clone()).collect();
        let mut out = BTreeMap::new();
        let cpu = &Device::Cpu;
        let mut put = |name: &str, tensor: Tensor| out.insert(name.to_string(), tensor);
        let (a, c, v) = (actions.len(), contexts.len(), values.len());
        put(
            "replay.lengths",
            Tensor::from_vec(lengths, entries.len(), cpu)?,
        );
        put("replay.actions", Tensor::from_vec(actions, a, cpu)?);
        put("replay.contexts", Tensor::from_vec(contexts, c, cpu)?);
        put("replay.objectives", Tensor::from_vec(values, v, cpu)?);
        Ok(out)
    }

    /// Fills the buffer with what [`state`](Self::state) returned.
    ///
    /// # Errors
    /// [`Error::State`] for tensors that are missing or do not fit; nothing is changed then.
    pub fn load_state<E: Environment<State = S>>(
        &mut self,
        env: &E,
        state: &BTreeMap<String, Tensor>,
    ) -> Result<()> {
        let get = |name: &str| {
            state
                .get(name)
                .ok_or_else(|| Error::State(format!("`{name}` is missing")))
        };
        let lengths = get("replay.lengths")?.to_vec1::<u32>()?;
        let actions = get("replay.actions")?.to_vec1::<u32>()?;
        let contexts = get("replay.contexts")?.to_vec1::<f32>()?;
        let values = get("replay.objectives")?.to_vec1::<f64>()?;
        let total: usize = lengths.iter().map(|l| *l as usize).sum();
        let n = lengths.len();
        if total != actions.len()
            || contexts.len() != n * self.width
            || (n > 0 && values.len() % n != 0)
        {
            return Err(Error::State(
                "the replay buffer's tensors contradict each other".into(),
            ));
        }
        let objectives = values.len().checked_div(n).unwrap_or(0);
        let (mut entries, mut order, mut at) = (HashMap::new(), vec![], 0);
        for (i, length) in lengths.iter().enumerate() {
            let actions = actions[at..at + *length as usize].to_vec();
            at += actions.len();
            let mut one = Trajectories::new(0);
            one.push_actions(env, &actions, &[])?;
            let entry = Entry {
                actions,
                context: contexts[i * self.width..(i + 1) * self.width].to_vec(),
                objectives: values[i * objectives..(i + 1) * objectives].to_vec(),
            };
            order.push(one.object(0).clone());
            entries.insert(one.object(0).clone(), entry);
        }
        (self.entries, self.order) = (entries, order);
        Ok(())
    }
}

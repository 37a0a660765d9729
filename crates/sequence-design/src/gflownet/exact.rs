//! Exact distributions where the states can be listed.

use super::evaluate::host;
use super::policy::heads_of;
use super::{Environment, PolicyNet};
use crate::{Error, Result};
use nn::masked::hide;
use std::collections::HashMap;

/// Rows that the network sees at once.
const CHUNK: usize = 4096;

/// All states of an environment, parents before children.
#[derive(Debug, Clone)]
pub struct Enumeration<S> {
    states: Vec<S>,
    index: HashMap<S, usize>,
    /// Children of each state by action; stop is not among them.
    children: Vec<Vec<(usize, usize)>>,
    terminal: Vec<bool>,
}

impl<S: Clone + Eq + std::hash::Hash + std::fmt::Debug> Enumeration<S> {
    /// Lists the states that can be reached, and checks the environment on the way.
    ///
    /// # Errors
    /// [`Error::Environment`] for more than `limit` states, a cycle, a state without any action, two
    /// actions between the same states, a step that its undoing does not take back or that the
    /// backward mask does not name, and a backward mask that names a step from nowhere.
    pub fn new<E: Environment<State = S>>(env: &E, limit: usize) -> Result<Self> {
        let (mut found, mut index) = (vec![env.initial()], HashMap::new());
        index.insert(env.initial(), 0);
        let (mut children, mut terminal) = (vec![], vec![]);
        let stop = env.actions() - 1;
        let mut mask = vec![false; stop + 1];
        let mut at = 0;
        while at < found.len() {
            let state = found[at].clone();
            mask.fill(false);
            env.forward_mask(&state, &mut mask);
            terminal.push(mask[stop]);
            let mut edges: Vec<(usize, usize)> = vec![];
            for action in (0..stop).filter(|a| mask[*a]) {
                let next = stepped(env, &state, action)?;
                let count = found.len();
                let to = *index.entry(next.clone()).or_insert(count);
                if to == count {
                    if count == limit {
                        let reason = format!("more than {limit} states");
                        return Err(Error::environment(reason));
                    }
                    found.push(next);
                }
                if edges.iter().any(|(_, other)| *other == to) {
                    let reason = format!("two actions lead from {state:?} to {:?}", found[to]);
                    return Err(Error::environment(reason));
                }
                edges.push((action, to));
            }
            if edges.is_empty() && !mask[stop] {
                return Err(Error::environment(format!("{state:?} is a dead end")));
            }
            children.push(edges);
            at += 1;
        }
        let all = Self {
            states: found,
            index,
            children,
            terminal,
        };
        let sorted = all.sorted()?;
        sorted.check_parents(env)?;
        Ok(sorted)
    }

    /// Parents before children.
    fn sorted(self) -> Result<Self> {
        let n = self.states.len();
        let mut parents = vec![0usize; n];
        self.children
            .iter()
            .flatten()
            .for_each(|(_, c)| parents[*c] += 1);
        if parents[0] > 0 {
            let reason = format!("a cycle through the root {:?}", self.states[0]);
            return Err(Error::environment(reason));
        }
        let mut order = vec![0usize];
        let mut at = 0;
        while at < order.len() {
            for (_, child) in &self.children[order[at]] {
                parents[*child] -= 1;
                if parents[*child] == 0 {
                    order.push(*child);
                }
            }
            at += 1;
        }
        if let Some(stuck) = (0..n).find(|k| parents[*k] > 0 && order.len() < n) {
            let reason = format!("a cycle near {:?}", self.states[stuck]);
            return Err(Error::environment(reason));
        }
        let mut place = vec![0; n];
        order
            .iter()
            .enumerate()
            .for_each(|(new, old)| place[*old] = new);
        let moved =
            |edges: &Vec<(usize, usize)>| edges.iter().map(|(a, c)| (*a, place[*c])).collect();
        let states: Vec<S> = order.iter().map(|k| self.states[*k].clone()).collect();
        Ok(Self {
            index: states.iter().cloned().zip(0..).collect(),
            children: order.iter().map(|k| moved(&self.children[*k])).collect(),
            terminal: order.iter().map(|k| self.terminal[*k]).collect(),
            states,
        })
    }

    /// Every step back leads to a listed parent, and there are as many as steps forward.
    fn check_parents<E: Environment<State = S>>(&self, env: &E) -> Result<()> {
        let mut arriving = vec![0usize; self.states.len()];
        self.children
            .iter()
            .flatten()
            .for_each(|(_, c)| arriving[*c] += 1);
        let mut mask = vec![false; env.actions() - 1];
        for (state, arriving) in self.states.iter().zip(arriving) {
            mask.fill(false);
            env.backward_mask(state, &mut mask);
            let back = mask.iter().filter(|m| **m).count();
            if back != arriving {
                let reason = format!("{state:?} has {arriving} parents and {back} steps back");
                return Err(Error::environment(reason));
            }
        }
        Ok(())
    }

    /// All states, parents before children, the root first.
    pub fn states(&self) -> &[S] {
        &self.states
    }

    /// The place of a state.
    pub fn position(&self, state: &S) -> Option<usize> {
        self.index.get(state).copied()
    }

    /// Places of the objects: states that may be stopped at.
    pub fn objects(&self) -> Vec<usize> {
        (0..self.states.len())
            .filter(|k| self.terminal[*k])
            .collect()
    }

    /// The probability that a policy's trajectories end in each state, by one sweep in topological
    /// order; 0 at states that are no objects.
    ///
    /// # Errors
    /// Those of the network.
    pub fn terminating<E: Environment<State = S>>(
        &self,
        env: &E,
        policy: &impl PolicyNet,
        context: &[f32],
    ) -> Result<Vec<f64>> {
        let (n, a) = (self.states.len(), env.actions());
        let mut probabilities = Vec::with_capacity(n * a);
        for states in self.states.chunks(CHUNK) {
            let heads = heads_of(env, policy, states, |_| context.to_vec())?;
            let mut mask = vec![false; states.len() * a];
            for (state, row) in states.iter().zip(mask.chunks_mut(a)) {
                env.forward_mask(state, row);
            }
            let p = nn::softmax::softmax(&hide(&heads.forward, &mask)?, 1)?;
            probabilities.extend(host(&p)?);
        }
        let (mut arriving, mut ending) = (vec![0.0; n], vec![0.0; n]);
        arriving[0] = 1.0;
        for k in 0..n {
            let p = &probabilities[k * a..(k + 1) * a];
            for (action, child) in &self.children[k] {
                arriving[*child] += arriving[k] * p[*action];
            }
            if self.terminal[k] {
                ending[k] = arriving[k] * p[a - 1];
            }
        }
        Ok(ending)
    }

    /// The law that is aimed at: `R(x) / Z` on objects, and `Z`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a reward that is negative or not finite, or all zero.
    pub fn target(&self, reward: impl Fn(&S) -> f64) -> Result<(Vec<f64>, f64)> {
        let mut law = vec![0.0; self.states.len()];
        for k in self.objects() {
            let r = reward(&self.states[k]);
            if !(r.is_finite() && r >= 0.0) {
                return Err(Error::argument("reward", r, "a finite number >= 0"));
            }
            law[k] = r;
        }
        let z: f64 = law.iter().sum();
        if z <= 0.0 {
            return Err(Error::argument("reward", "all zero", "a positive sum"));
        }
        law.iter_mut().for_each(|p| *p /= z);
        Ok((law, z))
    }
}

fn stepped<E: Environment>(env: &E, state: &E::State, action: usize) -> Result<E::State> {
    let mut next = state.clone();
    env.step(&mut next, action);
    let mut mask = vec![false; env.actions() - 1];
    env.backward_mask(&next, &mut mask);
    let mut back = next.clone();
    if mask[action] {
        env.undo(&mut back, action);
    }
    if !mask[action] || back != *state {
        let reason = format!("action {action} from {state:?} to {next:?} has no way back");
        return Err(Error::environment(reason));
    }
    Ok(next)
}

/// Half the sum of absolute differences of two laws.
pub fn total_variation(p: &[f64], q: &[f64]) -> f64 {
    0.5 * p.iter().zip(q).map(|(p, q)| (p - q).abs()).sum::<f64>()
}

/// An environment whose features are one-hot states: a linear policy on them is a table.
#[derive(Debug, Clone)]
pub struct Tabular<E: Environment> {
    env: E,
    enumeration: Enumeration<E::State>,
}

impl<E: Environment> Tabular<E> {
    /// Lists the states of an environment; row `k` of a table belongs to state `k` of
    /// [`enumeration`](Self::enumeration).
    ///
    /// # Errors
    /// Those of [`Enumeration::new`].
    pub fn new(env: E, limit: usize) -> Result<Self> {
        let enumeration = Enumeration::new(&env, limit)?;
        Ok(Self { env, enumeration })
    }

    /// The states.
    pub fn enumeration(&self) -> &Enumeration<E::State> {
        &self.enumeration
    }
}

impl<E: Environment> Environment for Tabular<E> {
    type State = E::State;

    fn actions(&self) -> usize {
        self.env.actions()
    }

    fn initial(&self) -> E::State {
        self.env.initial()
    }

    fn max_steps(&self) -> usize {
        self.env.max_steps()
    }

    fn forward_mask(&self, state: &E::State, mask: &mut [bool]) {
        self.env.forward_mask(state, mask);
    }

    fn backward_mask(&self, state: &E::State, mask: &mut [bool]) {
        self.env.backward_mask(state, mask);
    }

    fn step(&self, state: &mut E::State, action: usize) {
        self.env.step(state, action);
    }

    fn undo(&self, state: &mut E::State, action: usize) {
        self.env.undo(state, action);
    }

    fn feature_width(&self) -> usize {
        self.enumeration.states.len()
    }

    fn write_features(&self, state: &E::State, out: &mut [f32]) {
        if let Some(k) = self.enumeration.position(state) {
            out[k] = 1.0;
        }
    }
}

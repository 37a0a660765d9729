//! Trajectories forward from the root and backward from objects, all of a batch together: one call
//! of the network a step.

use super::evaluate::host;
use super::policy::heads_of;
use super::{Environment, PolicyNet, Trajectories};
use crate::error::check;
use crate::{Error, Result};
use tensor_core::random::RandomStream;

/// How actions are chosen while exploring.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Exploration {
    /// Probability of a uniformly random possible action.
    pub epsilon: f64,
    /// Logits are divided by it.
    pub temperature: f64,
}

impl Default for Exploration {
    fn default() -> Self {
        Self {
            epsilon: 0.0,
            temperature: 1.0,
        }
    }
}

impl Exploration {
    /// Checks both numbers.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`].
    pub fn validate(&self) -> Result<()> {
        check::unit("Exploration::epsilon", self.epsilon)?;
        check::positive("Exploration::temperature", self.temperature)
    }

    /// An action of a row: one uniform number decides. With probability epsilon it is one of the
    /// possible actions at random.
    fn choose(&self, logits: Option<&[f64]>, mask: &[bool], u: f64) -> Option<usize> {
        let possible = || (0..mask.len()).filter(|a| mask[*a]);
        let count = possible().count();
        let Some(logits) = logits else {
            return possible().nth((u * count as f64) as usize);
        };
        if count < 2 {
            return possible().next();
        }
        let max = possible().fold(f64::NEG_INFINITY, |m, a| m.max(logits[a]));
        let weight = |a: usize| ((logits[a] - max) / self.temperature).exp();
        let total: f64 = possible().map(weight).sum();
        let (keep, share) = (1.0 - self.epsilon, self.epsilon / count as f64);
        let (mut sum, mut last) = (0.0, None);
        for a in possible() {
            sum += keep * weight(a) / total + share;
            last = Some(a);
            if u < sum {
                break;
            }
        }
        last
    }
}

/// Samples one trajectory for each row of `contexts` (rows may be empty) from a policy.
///
/// # Errors
/// [`Error::Environment`] for a dead end or a trajectory longer than
/// [`Environment::max_steps`]; [`Error::NonFinite`] for logits that are not numbers.
pub fn roll_out<E: Environment>(
    env: &E,
    policy: &impl PolicyNet,
    contexts: &[Vec<f32>],
    exploration: Exploration,
    rng: &mut RandomStream,
) -> Result<Trajectories<E::State>> {
    exploration.validate()?;
    let (n, a) = (contexts.len(), env.actions());
    let mut states: Vec<Vec<E::State>> = vec![vec![env.initial()]; n];
    let mut actions: Vec<Vec<u32>> = vec![vec![]; n];
    let mut open: Vec<usize> = (0..n).collect();
    let mut mask = vec![false; a];
    for _ in 0..=env.max_steps() {
        if open.is_empty() {
            break;
        }
        let now: Vec<E::State> = open
            .iter()
            .map(|i| states[*i][states[*i].len() - 1].clone())
            .collect();
        let heads = heads_of(env, policy, &now, |k| contexts[open[k]].clone())?;
        let logits = finite(host(&heads.forward)?)?;
        let mut uniforms = vec![0.0; open.len()];
        rng.fill_uniform(&mut uniforms);
        let mut still = Vec::with_capacity(open.len());
        for (k, mut state) in now.into_iter().enumerate() {
            mask.fill(false);
            env.forward_mask(&state, &mut mask);
            let row = &logits[k * a..(k + 1) * a];
            let Some(action) = exploration.choose(Some(row), &mask, uniforms[k]) else {
                return Err(Error::environment(format!("{state:?} is a dead end")));
            };
            let i = open[k];
            actions[i].push(action as u32);
            if action + 1 < a {
                env.step(&mut state, action);
                states[i].push(state);
                still.push(i);
            }
        }
        open = still;
    }
    if let Some(i) = open.first() {
        let state = &states[*i][states[*i].len() - 1];
        let reason = format!("{state:?} lies beyond {} steps", env.max_steps());
        return Err(Error::environment(reason));
    }
    let mut out = Trajectories::new(contexts.first().map_or(0, Vec::len));
    for ((states, actions), context) in states.into_iter().zip(actions).zip(contexts) {
        out.push(states, actions, context)?;
    }
    Ok(out)
}

fn finite(values: Vec<f64>) -> Result<Vec<f64>> {
    match values.iter().all(|x| x.is_finite()) {
        true => Ok(values),
        false => Err(Error::non_finite("a logit of the policy")),
    }
}

/// Samples one trajectory for each object, from the object back to the root by the policy's `P_B`.
///
/// # Errors
/// [`Error::Environment`] for an object that has no way to the root or that must not be stopped
/// at.
pub fn roll_back<E: Environment>(
    env: &E,
    policy: &impl PolicyNet,
    objects: &[E::State],
    contexts: &[Vec<f32>],
    rng: &mut RandomStream,
) -> Result<Trajectories<E::State>> {
    if contexts.len() != objects.len() {
        let expected = format!("{} rows", objects.len());
        return Err(Error::shape("contexts", &[contexts.len()], expected));
    }
    if let Some(other) = objects.iter().find(|x| !env.is_terminal(x)) {
        return Err(Error::environment(format!("{other:?} is no object")));
    }
    let (root, a) = (env.initial(), env.actions());
    let mut states: Vec<Vec<E::State>> = objects.iter().map(|x| vec![x.clone()]).collect();
    let mut actions: Vec<Vec<u32>> = vec![vec![(a - 1) as u32]; objects.len()];
    let mut open: Vec<usize> = (0..objects.len()).filter(|i| objects[*i] != root).collect();
    let mut mask = vec![false; a - 1];
    for _ in 0..env.max_steps() {
        if open.is_empty() {
            break;
        }
        let now: Vec<E::State> = open
            .iter()
            .map(|i| states[*i][states[*i].len() - 1].clone())
            .collect();
        let heads = heads_of(env, policy, &now, |k| contexts[open[k]].clone())?;
        let logits = heads
            .backward
            .as_ref()
            .map(host)
            .transpose()?
            .map(finite)
            .transpose()?;
        let mut uniforms = vec![0.0; open.len()];
        rng.fill_uniform(&mut uniforms);
        for (k, mut state) in now.into_iter().enumerate() {
            mask.fill(false);
            env.backward_mask(&state, &mut mask);
            let row = logits.as_ref().map(|l| &l[k * (a - 1)..(k + 1) * (a - 1)]);
            let plain = Exploration::default();
            let Some(action) = plain.choose(row, &mask, uniforms[k]) else {
                return Err(Error::environment(format!(
                    "{state:?} has no way back to the root"
                )));
            };
            env.undo(&mut state, action);
            actions[open[k]].push(action as u32);
            states[open[k]].push(state);
        }
        open.retain(|i| states[*i][states[*i].len() - 1] != root);
    }
    if let Some(i) = open.first() {
        let reason = format!("{:?} is too far from the root", objects[*i]);
        return Err(Error::environment(reason));
    }
    let mut out = Trajectories::new(contexts.first().map_or(0, Vec::len));
    for ((mut states, mut actions), context) in states.into_iter().zip(actions).zip(contexts) {
        states.reverse();
        actions.reverse();
        out.push(states, actions, context)?;
    }
    Ok(out)
}

//! Environments, and the trajectories that sampling leaves behind.

use crate::{Error, Result};
use std::fmt::Debug;
use std::hash::Hash;

/// Objects that are built step by step: states, actions, and the way back.
///
/// The states must form a directed acyclic graph with one root, and two states must be joined by
/// at most one action, so that an action also names the step back. The last action is *stop*: it
/// ends the building and makes the state an object.
/// [`Enumeration`](super::Enumeration) checks all of it where the states can be listed.
pub trait Environment {
    /// A partial object. Equal states are the same node of the graph.
    type State: Clone + Eq + Hash + Debug;

    /// Number of actions `A`; the last one is stop.
    fn actions(&self) -> usize;

    /// The root.
    fn initial(&self) -> Self::State;

    /// Steps of the longest trajectory, stop not counted.
    fn max_steps(&self) -> usize;

    /// Sets the entries of the actions that are possible in `state`. `mask` has length `A` and
    /// arrives all `false`.
    fn forward_mask(&self, state: &Self::State, mask: &mut [bool]);

    /// Sets the entries of the actions by which `state` may have been reached. `mask` has length
    /// `A - 1` and arrives all `false`; it stays so for the root alone.
    fn backward_mask(&self, state: &Self::State, mask: &mut [bool]);

    /// Takes an action other than stop; only called where the mask allows it.
    fn step(&self, state: &mut Self::State, action: usize);

    /// Takes the action back; only called where the backward mask allows it.
    fn undo(&self, state: &mut Self::State, action: usize);

    /// Numbers that describe a state to a network.
    fn feature_width(&self) -> usize;

    /// Writes them. `out` has the width above and arrives all zero.
    fn write_features(&self, state: &Self::State, out: &mut [f32]);

    /// Whether stop is possible.
    fn is_terminal(&self, state: &Self::State) -> bool {
        let mut mask = vec![false; self.actions()];
        self.forward_mask(state, &mut mask);
        mask.last().copied().unwrap_or(false)
    }
}

/// Whole trajectories, one after the other: the states of trajectory `i`, root first and object
/// last, with the action taken in each; the last action is stop.
#[derive(Debug, Clone, PartialEq)]
pub struct Trajectories<S> {
    states: Vec<S>,
    actions: Vec<u32>,
    offsets: Vec<usize>,
    contexts: Vec<f32>,
    context_width: usize,
}

impl<S: Clone + Eq + Hash + Debug> Trajectories<S> {
    /// None yet, with so many context numbers a trajectory (0: the policy is not conditional).
    pub fn new(context_width: usize) -> Self {
        Self {
            states: vec![],
            actions: vec![],
            offsets: vec![0],
            contexts: vec![],
            context_width,
        }
    }

    /// The trajectories of these lists of actions (stop left out) from the root.
    ///
    /// # Errors
    /// [`Error::Environment`] for an action that is impossible where it is taken.
    pub fn from_actions<E: Environment<State = S>>(env: &E, lists: &[Vec<u32>]) -> Result<Self> {
        let mut out = Self::new(0);
        for list in lists {
            out.push_actions(env, list, &[])?;
        }
        Ok(out)
    }

    /// Adds the trajectory of a list of actions (stop left out).
    ///
    /// # Errors
    /// [`Error::Environment`] for an action that is impossible, [`Error::Shape`] for a context of
    /// another width; nothing is added then.
    pub fn push_actions<E: Environment<State = S>>(
        &mut self,
        env: &E,
        list: &[u32],
        context: &[f32],
    ) -> Result<()> {
        let stop = env.actions() - 1;
        let mut mask = vec![false; stop + 1];
        let mut states = vec![env.initial()];
        let mut state = env.initial();
        for (k, &action) in list.iter().chain([&(stop as u32)]).enumerate() {
            mask.fill(false);
            env.forward_mask(&state, &mut mask);
            if !mask.get(action as usize).copied().unwrap_or(false) {
                return Err(Error::environment(format!(
                    "action {action} is impossible in {state:?}"
                )));
            }
            if k < list.len() {
                env.step(&mut state, action as usize);
                states.push(state.clone());
            }
        }
        let actions = list.iter().copied().chain([stop as u32]).collect();
        self.push(states, actions, context)
    }

    /// Adds a trajectory whose states and actions belong together.
    pub(crate) fn push(
        &mut self,
        states: Vec<S>,
        actions: Vec<u32>,
        context: &[f32],
    ) -> Result<()> {
        if context.len() != self.context_width {
            let expected = format!("{} numbers", self.context_width);
            return Err(Error::shape("context", &[context.len()], expected));
        }
        debug_assert_eq!(states.len(), actions.len());
        self.states.extend(states);
        self.actions.extend(actions);
        self.offsets.push(self.states.len());
        self.contexts.extend_from_slice(context);
        Ok(())
    }

    /// Adds all of another batch with contexts of the same width.
    pub(crate) fn append(&mut self, other: Self) {
        let start = self.states.len();
        self.states.extend(other.states);
        self.actions.extend(other.actions);
        self.contexts.extend(other.contexts);
        self.offsets
            .extend(other.offsets[1..].iter().map(|o| start + o));
    }

    /// Number of trajectories `B`.
    pub fn len(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All states of all trajectories, `N` in all.
    pub fn states(&self) -> &[S] {
        &self.states
    }

    /// The action taken in each state.
    pub fn actions(&self) -> &[u32] {
        &self.actions
    }

    /// Trajectory `i` owns the states `offsets[i]..offsets[i + 1]`.
    pub fn offsets(&self) -> &[usize] {
        &self.offsets
    }

    /// The object that a trajectory ends in.
    pub fn object(&self, i: usize) -> &S {
        &self.states[self.offsets[i + 1] - 1]
    }

    /// All objects.
    pub fn objects(&self) -> Vec<S> {
        (0..self.len()).map(|i| self.object(i).clone()).collect()
    }

    /// The actions of a trajectory without stop.
    pub fn actions_of(&self, i: usize) -> &[u32] {
        &self.actions[self.offsets[i]..self.offsets[i + 1] - 1]
    }

    /// The context numbers of a trajectory.
    pub fn context_of(&self, i: usize) -> &[f32] {
        &self.contexts[i * self.context_width..(i + 1) * self.context_width]
    }

    /// Context numbers of each trajectory.
    pub fn context_width(&self) -> usize {
        self.context_width
    }

    /// The trajectory of each state.
    pub fn owners(&self) -> Vec<u32> {
        let spans = self.offsets.windows(2).enumerate();
        spans
            .flat_map(|(i, span)| std::iter::repeat_n(i as u32, span[1] - span[0]))
            .collect()
    }
}

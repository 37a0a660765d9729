//! The training loop: explore, score, remember, learn.

use super::evaluate::{host, EdgeFlows, Evaluated};
use super::loss::{self, BaseLoss};
use super::order::{binary_order_loss, compare_pairs, pair_order_loss, set_order_loss};
use super::pareto::pareto_mask;
use super::replay::{Replay, ReplayConfig};
use super::sampler::{roll_back, roll_out, Exploration};
use super::{Environment, PolicyNet, Trajectories};
use crate::error::check;
use crate::{Error, Result};
use candle_core::{backprop::GradStore, Tensor};
use candle_nn::Optimizer;
use std::cmp::Ordering;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use tensor_core::random::RandomStream;

/// Which form the loss on a partial order takes.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum ParetoForm {
    /// The whole batch is one set.
    #[default]
    Set,
    /// Random pairs, by whether each of the two is in the front.
    Pairs,
    /// Each object by itself: in the front or not.
    Binary,
}

/// A comparison of two objects: `Greater` when the first is better.
pub type Comparator<S> = Arc<dyn Fn(&S, &S) -> Ordering + Send + Sync>;

/// What is known about the objects.
#[derive(Clone)]
pub enum RewardSignal<S> {
    /// A positive reward: `log R = max(beta ln(first objective), clip_min)`. Zero counts as the
    /// minimum, a negative reward is an error.
    Scalar {
        /// The exponent.
        beta: f64,
        /// The lowest log reward.
        clip_min: f64,
    },
    /// Only the order of the first objective.
    TotalOrder {
        /// Weight of the ordering loss; `None` takes 1 for trajectory balance and 0.1 otherwise.
        weight: Option<f64>,
        /// The gap of learned log rewards beyond which a pair is left alone.
        max_gap: Option<f64>,
    },
    /// Pareto dominance among all objectives.
    ParetoOrder {
        /// As for the total order.
        weight: Option<f64>,
        /// The form of the loss.
        form: ParetoForm,
    },
    /// Any comparison, with ties: people's preferences, say.
    CustomOrder {
        /// As for the total order.
        weight: Option<f64>,
        /// As for the total order.
        max_gap: Option<f64>,
        /// The comparison.
        compare: Comparator<S>,
    },
}

impl<S> std::fmt::Debug for RewardSignal<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Scalar { .. } => "Scalar",
            Self::TotalOrder { .. } => "TotalOrder",
            Self::ParetoOrder { .. } => "ParetoOrder",
            Self::CustomOrder { .. } => "CustomOrder",
        })
    }
}

impl<S> RewardSignal<S> {
    /// The reward itself, to the power `beta`.
    pub fn scalar(beta: f64) -> Self {
        Self::Scalar {
            beta,
            clip_min: -12.0,
        }
    }

    /// The order of the first objective, with the default weight.
    pub fn total_order() -> Self {
        Self::TotalOrder {
            weight: None,
            max_gap: None,
        }
    }

    /// Pareto dominance, with the default weight.
    pub fn pareto_order() -> Self {
        Self::ParetoOrder {
            weight: None,
            form: ParetoForm::Set,
        }
    }

    fn weight(&self) -> Option<f64> {
        match self {
            Self::Scalar { .. } => None,
            Self::TotalOrder { weight, .. }
            | Self::ParetoOrder { weight, .. }
            | Self::CustomOrder { weight, .. } => *weight,
        }
    }

    fn max_gap(&self) -> Option<f64> {
        match self {
            Self::TotalOrder { max_gap, .. } | Self::CustomOrder { max_gap, .. } => *max_gap,
            _ => None,
        }
    }

    fn validate(&self) -> Result<()> {
        if let Self::Scalar { beta, clip_min } = self {
            check::positive("RewardSignal::beta", *beta)?;
            let holds = clip_min.is_finite();
            check::require(holds, "RewardSignal::clip_min", clip_min, "a finite number")?;
        }
        if let Some(weight) = self.weight() {
            check::positive("RewardSignal::weight", weight)?;
        }
        match self.max_gap() {
            Some(gap) => check::positive("RewardSignal::max_gap", gap),
            None => Ok(()),
        }
    }
}

/// Settings of a [`GflowTrainer`].
#[derive(Debug, Clone)]
pub struct GflowConfig<S> {
    /// The base loss.
    pub loss: BaseLoss,
    /// What the objectives mean.
    pub signal: RewardSignal<S>,
    /// Trajectories a step.
    pub batch: usize,
    /// Optimizer steps on each batch.
    pub updates: usize,
    /// How the policy explores.
    pub exploration: Exploration,
    /// The buffer, if there is one.
    pub replay: Option<ReplayConfig>,
    /// So many good objects of the buffer a step are walked back to the root by `P_B`, and the
    /// trajectories are trained on; needs a buffer.
    pub backward_augment: usize,
    /// Weight of `KL(uniform over the parents || P_B)`; needs a learned `P_B`.
    pub backward_kl: f64,
}

impl<S> Default for GflowConfig<S> {
    fn default() -> Self {
        Self {
            loss: BaseLoss::TrajectoryBalance,
            signal: RewardSignal::total_order(),
            batch: 32,
            updates: 1,
            exploration: Exploration {
                epsilon: 0.01,
                temperature: 1.0,
            },
            replay: None,
            backward_augment: 0,
            backward_kl: 0.0,
        }
    }
}

impl<S> GflowConfig<S> {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] that names the first bad one.
    pub fn validate(&self) -> Result<()> {
        self.loss.validate()?;
        self.signal.validate()?;
        self.exploration.validate()?;
        check::at_least("GflowConfig::batch", self.batch, 1)?;
        check::at_least("GflowConfig::updates", self.updates, 1)?;
        check::non_negative("GflowConfig::backward_kl", self.backward_kl)?;
        if let Some(replay) = &self.replay {
            replay.validate()?;
        }
        let holds = self.backward_augment == 0 || self.replay.is_some();
        let expected = "0, or a replay buffer";
        check::require(
            holds,
            "GflowConfig::backward_augment",
            self.backward_augment,
            expected,
        )
    }
}

/// What a step did.
#[derive(Debug, Clone, PartialEq)]
pub struct StepReport {
    /// The loss of the last update; NaN when the step was left out.
    pub loss: f64,
    /// Mean first objective of the objects sampled from the policy.
    pub mean_score: f64,
    /// Distinct objects seen so far, the ones beyond the buffer's capacity included.
    pub visited: usize,
    /// Objects of this step with an objective that is no number; they count as worst.
    pub not_numbers: usize,
    /// Whether the update was left out because one object makes no pair.
    pub skipped: bool,
}

/// Objectives of objects, one list each; all are maximized.
pub type Objective<'a, S> = Box<dyn FnMut(&[S], &[Vec<f32>]) -> Result<Vec<Vec<f64>>> + Send + 'a>;

/// Draws the context numbers of so many trajectories.
pub type Contexts<'a> =
    Box<dyn FnMut(usize, &mut RandomStream) -> Result<Vec<Vec<f32>>> + Send + 'a>;

/// Trains a policy; see the [module](super) page.
pub struct GflowTrainer<'a, E: Environment, P, O> {
    env: E,
    policy: P,
    optimizer: O,
    config: GflowConfig<E::State>,
    objective: Objective<'a, E::State>,
    contexts: Contexts<'a>,
    replay: Option<Replay<E::State>>,
    visited: HashMap<E::State, Vec<f64>>,
}

impl<'a, E: Environment, P: PolicyNet, O: Optimizer> GflowTrainer<'a, E, P, O> {
    /// A trainer. The optimizer holds the policy's variables (with groups of its own for `log_z`,
    /// whose learning rate is usually a hundred times the network's, and with whatever clipping is
    /// wanted); `objective` scores objects.
    ///
    /// # Errors
    /// Those of [`GflowConfig::validate`].
    pub fn new(
        env: E,
        policy: P,
        optimizer: O,
        config: GflowConfig<E::State>,
        mut objective: impl FnMut(&[E::State]) -> Result<Vec<Vec<f64>>> + Send + 'a,
    ) -> Result<Self> {
        config.validate()?;
        let replay = config.replay.map(|c| Replay::new(c, 0)).transpose()?;
        Ok(Self {
            env,
            policy,
            optimizer,
            config,
            objective: Box::new(move |objects, _| objective(objects)),
            contexts: Box::new(|count, _| Ok(vec![vec![]; count])),
            replay,
            visited: HashMap::new(),
        })
    }

    /// Makes the policy conditional: `contexts` draws numbers for each trajectory (a preference or a
    /// temperature), which the network sees behind the features and the objective beside the object.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for a width of 0.
    pub fn conditional(
        mut self,
        width: usize,
        contexts: impl FnMut(usize, &mut RandomStream) -> Result<Vec<Vec<f32>>> + Send + 'a,
        objective: impl FnMut(&[E::State], &[Vec<f32>]) -> Result<Vec<Vec<f64>>> + Send + 'a,
    ) -> Result<Self> {
        check::at_least("conditional::width", width, 1)?;
        self.contexts = Box::new(contexts);
        self.objective = Box::new(objective);
        self.replay = self
            .config
            .replay
            .map(|c| Replay::new(c, width))
            .transpose()?;
        Ok(self)
    }

    /// The policy.
    pub fn policy(&self) -> &P {
        &self.policy
    }

    /// The environment.
    pub fn env(&self) -> &E {
        &self.env
    }

    /// The optimizer, for its learning rate and its state.
    pub fn optimizer_mut(&mut self) -> &mut O {
        &mut self.optimizer
    }

    /// The buffer, if there is one.
    pub fn replay(&self) -> Option<&Replay<E::State>> {
        self.replay.as_ref()
    }

    /// All objects seen with their objectives.
    pub fn visited(&self) -> &HashMap<E::State, Vec<f64>> {
        &self.visited
    }

    /// One step: samples, scores, updates.
    ///
    /// # Errors
    /// [`Error::Shape`] when the objective gives another number of lists, [`Error::NonFinite`] for a
    /// loss that is no number (the policy is left as it was), those of environment and network.
    pub fn step(&mut self, rng: &mut RandomStream) -> Result<StepReport> {
        let (batch, scores, mean_score, not_numbers) = self.gather(rng)?;
        let mut report = StepReport {
            loss: f64::NAN,
            mean_score,
            visited: self.visited.len(),
            not_numbers,
            skipped: false,
        };
        if batch.len() < 2 && !matches!(self.config.signal, RewardSignal::Scalar { .. }) {
            tracing::warn!("one object makes no pair: the update is left out");
            report.skipped = true;
            return Ok(report);
        }
        for _ in 0..self.config.updates {
            let (loss, grads) = self.gradients(&batch, &scores, rng)?;
            self.optimizer.step(&grads)?;
            report.loss = loss;
        }
        Ok(report)
    }

    /// Trajectories of one step, from policy, buffer and the way back, with the objectives of their
    /// objects; and the mean first objective and the count of NaN of the new ones.
    #[allow(clippy::type_complexity)]
    fn gather(
        &mut self,
        rng: &mut RandomStream,
    ) -> Result<(Trajectories<E::State>, Vec<Vec<f64>>, f64, usize)> {
        let share = self.config.replay.map_or(0.0, |r| r.share);
        let ready = self.replay.as_ref().is_some_and(|r| !r.is_empty());
        let old = if ready {
            (self.config.batch as f64 * share).round() as usize
        } else {
            0
        };
        let contexts = (self.contexts)(self.config.batch - old, rng)?;
        let mut batch = roll_out(
            &self.env,
            &self.policy,
            &contexts,
            self.config.exploration,
            rng,
        )?;
        let mut scores = self.score(&batch)?;
        let first = |v: &Vec<f64>| v.first().copied().unwrap_or(f64::NAN);
        let numbers: Vec<f64> = scores.iter().map(first).filter(|s| s.is_finite()).collect();
        let mean = numbers.iter().sum::<f64>() / numbers.len() as f64;
        let spoiled = scores
            .iter()
            .filter(|v| v.iter().any(|x| x.is_nan()))
            .count();
        for (i, values) in scores.iter().enumerate() {
            self.visited.insert(batch.object(i).clone(), values.clone());
        }
        if let Some(replay) = &mut self.replay {
            let drawn = replay.draw(&self.env, old, rng)?;
            let objects = replay.draw_good(self.config.backward_augment, rng)?;
            replay.extend(&batch, &scores);
            batch.append(drawn);
            if !objects.is_empty() {
                let contexts = (self.contexts)(objects.len(), rng)?;
                batch.append(roll_back(
                    &self.env,
                    &self.policy,
                    &objects,
                    &contexts,
                    rng,
                )?);
            }
            // A buffer's objects have their score; with contexts it depends on the context too.
            let known = scores.len();
            if batch.context_width() > 0 {
                scores = self.score(&batch)?;
            } else {
                for i in known..batch.len() {
                    let score = self.visited.get(batch.object(i));
                    scores.push(score.cloned().unwrap_or_default());
                }
            }
        }
        Ok((batch, scores, mean, spoiled))
    }

    fn score(&mut self, batch: &Trajectories<E::State>) -> Result<Vec<Vec<f64>>> {
        let contexts: Vec<Vec<f32>> = (0..batch.len())
            .map(|i| batch.context_of(i).to_vec())
            .collect();
        let scores = (self.objective)(&batch.objects(), &contexts)?;
        let width = scores.first().map_or(0, Vec::len);
        let fits =
            scores.len() == batch.len() && width > 0 && scores.iter().all(|s| s.len() == width);
        match fits {
            true => Ok(scores),
            false => {
                let expected = format!("{} lists of the same length", batch.len());
                Err(Error::shape(
                    "the objectives",
                    &[scores.len(), width],
                    expected,
                ))
            }
        }
    }

    fn gradients(
        &self,
        batch: &Trajectories<E::State>,
        scores: &[Vec<f64>],
        rng: &mut RandomStream,
    ) -> Result<(f64, GradStore)> {
        let e = Evaluated::new(&self.env, &self.policy, batch)?;
        let mut loss = self.objective_loss(batch, scores, &e, rng)?;
        if self.config.backward_kl > 0.0 {
            let kl = e.backward_kl.as_ref().ok_or_else(|| {
                Error::unsupported(
                    "GflowConfig::backward_kl",
                    "the policy's P_B is uniform already",
                )
            })?;
            loss = (loss + kl.affine(self.config.backward_kl, 0.0)?)?;
        }
        let value = host(&loss)?[0];
        if !value.is_finite() {
            return Err(Error::non_finite("the loss"));
        }
        Ok((value, loss.backward()?))
    }

    fn objective_loss(
        &self,
        batch: &Trajectories<E::State>,
        scores: &[Vec<f64>],
        e: &Evaluated,
        rng: &mut RandomStream,
    ) -> Result<Tensor> {
        let flows = match self.config.loss {
            BaseLoss::FlowMatching { .. } => {
                Some(EdgeFlows::new(&self.env, &self.policy, batch, e)?)
            }
            _ => None,
        };
        if let RewardSignal::Scalar { beta, clip_min } = self.config.signal {
            let rewards = log_scores(scores, beta, clip_min)?;
            let rewards = loss::log_rewards(&rewards, &e.log_pf)?;
            return base_loss(self.config.loss, e, flows.as_ref(), &rewards);
        }
        let default = match self.config.loss {
            BaseLoss::TrajectoryBalance | BaseLoss::LogPartitionVariance => 1.0,
            _ => 0.1,
        };
        let weight = self.config.signal.weight().unwrap_or(default);
        let l = learned_log_reward(self.config.loss, e, flows.as_ref())?;
        let order = self
            .order_loss(&l, batch, scores, rng)?
            .affine(weight, 0.0)?;
        Ok(match interior_loss(self.config.loss, e, flows.as_ref())? {
            Some(interior) => (interior + order)?,
            None => order,
        })
    }

    fn order_loss(
        &self,
        l: &Tensor,
        batch: &Trajectories<E::State>,
        scores: &[Vec<f64>],
        rng: &mut RandomStream,
    ) -> Result<Tensor> {
        let front = || pareto_mask(scores);
        match &self.config.signal {
            RewardSignal::ParetoOrder {
                form: ParetoForm::Set,
                ..
            } => return set_order_loss(l, &front()),
            RewardSignal::ParetoOrder {
                form: ParetoForm::Binary,
                ..
            } => return binary_order_loss(l, &front()),
            _ => {}
        }
        let perm = rng.permutation(batch.len())?;
        let orders = match &self.config.signal {
            RewardSignal::CustomOrder { compare, .. } => {
                let pairs = perm.iter().enumerate();
                pairs
                    .map(|(i, j)| compare(batch.object(i), batch.object(*j as usize)))
                    .collect()
            }
            RewardSignal::ParetoOrder { .. } => {
                let front: Vec<f64> = front().iter().map(|m| f64::from(u8::from(*m))).collect();
                compare_pairs(&front, &perm)
            }
            _ => {
                let firsts: Vec<f64> = scores.iter().map(|s| s[0]).collect();
                compare_pairs(&firsts, &perm)
            }
        };
        pair_order_loss(l, &perm, &orders, self.config.signal.max_gap())
    }

    /// Samples objects from the policy as it is, without exploration and without learning.
    ///
    /// # Errors
    /// Those of [`roll_out`].
    pub fn sample(&mut self, count: usize, rng: &mut RandomStream) -> Result<Vec<E::State>> {
        let contexts = (self.contexts)(count, rng)?;
        let plain = Exploration::default();
        Ok(roll_out(&self.env, &self.policy, &contexts, plain, rng)?.objects())
    }

    /// The learned log rewards of objects, centered: ordering losses fix them up to a constant. Each
    /// object is walked back to the root once.
    ///
    /// # Errors
    /// Those of [`roll_back`].
    pub fn log_reward_hat(
        &mut self,
        objects: &[E::State],
        rng: &mut RandomStream,
    ) -> Result<Vec<f64>> {
        let contexts = (self.contexts)(objects.len(), rng)?;
        let batch = roll_back(&self.env, &self.policy, objects, &contexts, rng)?;
        let e = Evaluated::new(&self.env, &self.policy, &batch)?;
        let flows = match self.config.loss {
            BaseLoss::FlowMatching { .. } => {
                Some(EdgeFlows::new(&self.env, &self.policy, &batch, &e)?)
            }
            _ => None,
        };
        let mut l = host(&learned_log_reward(self.config.loss, &e, flows.as_ref())?)?;
        let mean = l.iter().sum::<f64>() / l.len() as f64;
        l.iter_mut().for_each(|x| *x -= mean);
        Ok(l)
    }

    /// The buffer as named tensors; with the policy's variables, the optimizer's state and the
    /// stream's, everything that a later run needs to continue with the same bits.
    ///
    /// # Errors
    /// Those of candle.
    pub fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        match &self.replay {
            Some(replay) => replay.state(),
            None => Ok(BTreeMap::new()),
        }
    }

    /// Restores what [`state`](Self::state) returned.
    ///
    /// # Errors
    /// [`Error::State`]; nothing is changed then.
    pub fn load_state(&mut self, state: &BTreeMap<String, Tensor>) -> Result<()> {
        let Some(replay) = &mut self.replay else {
            return match state.is_empty() {
                true => Ok(()),
                false => Err(Error::State(
                    "a replay buffer, but none is configured".into(),
                )),
            };
        };
        replay.load_state(&self.env, state)?;
        self.visited = replay
            .iter()
            .map(|(x, v)| (x.clone(), v.to_vec()))
            .collect();
        Ok(())
    }
}

/// `max(beta ln r, clip_min)` of the first objectives; NaN is the worst.
fn log_scores(scores: &[Vec<f64>], beta: f64, clip_min: f64) -> Result<Vec<f64>> {
    let one = |values: &Vec<f64>| match values[0] {
        r if r < 0.0 || r == f64::INFINITY => Err(Error::argument(
            "reward",
            r,
            "a finite number >= 0 for its logarithm",
        )),
        r if r.is_nan() => Ok(clip_min),
        r => Ok((beta * r.ln()).max(clip_min)),
    };
    scores.iter().map(one).collect()
}

fn flows_of(flows: Option<&EdgeFlows>) -> Result<&EdgeFlows> {
    flows.ok_or_else(|| Error::unsupported("flow matching", "the edge flows were not evaluated"))
}

/// A base loss against log rewards.
fn base_loss(
    base: BaseLoss,
    e: &Evaluated,
    flows: Option<&EdgeFlows>,
    log_reward: &Tensor,
) -> Result<Tensor> {
    match base {
        BaseLoss::TrajectoryBalance => loss::trajectory_balance(e, log_reward),
        BaseLoss::LogPartitionVariance => loss::log_partition_variance(e, log_reward),
        BaseLoss::DetailedBalance => loss::detailed_balance(e, Some(log_reward)),
        BaseLoss::SubTrajectory(weights) => {
            loss::sub_trajectory_balance(e, Some(log_reward), weights)
        }
        BaseLoss::FlowMatching { reward_weight } => {
            let flows = flows_of(flows)?;
            let reward = loss::flow_matching_reward(flows, log_reward)?;
            Ok((loss::flow_matching(flows)? + reward.affine(reward_weight, 0.0)?)?)
        }
    }
}

/// The part of a base loss that knows no reward; trajectory balance has none.
fn interior_loss(
    base: BaseLoss,
    e: &Evaluated,
    flows: Option<&EdgeFlows>,
) -> Result<Option<Tensor>> {
    Ok(match base {
        BaseLoss::TrajectoryBalance | BaseLoss::LogPartitionVariance => None,
        BaseLoss::DetailedBalance => Some(loss::detailed_balance(e, None)?),
        BaseLoss::SubTrajectory(weights) => Some(loss::sub_trajectory_balance(e, None, weights)?),
        BaseLoss::FlowMatching { .. } => Some(loss::flow_matching(flows_of(flows)?)?),
    })
}

/// The log reward that a base loss has learned. The partition function is left out: an ordering loss
/// cancels it up to rounding, which an adaptive optimizer would blow up to steps.
fn learned_log_reward(base: BaseLoss, e: &Evaluated, flows: Option<&EdgeFlows>) -> Result<Tensor> {
    match base {
        BaseLoss::TrajectoryBalance | BaseLoss::LogPartitionVariance => {
            Ok((e.sum_log_pf()? - e.sum_log_pb()?)?)
        }
        BaseLoss::DetailedBalance | BaseLoss::SubTrajectory(_) => loss::flow_log_reward(e),
        BaseLoss::FlowMatching { .. } => Ok(flows_of(flows)?.stop.clone()),
    }
}

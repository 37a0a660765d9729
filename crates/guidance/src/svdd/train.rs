//! Values that are learned from the model's own roll-outs: SVDD-MC and SVDD-Q.

use super::{numbers, row_streams, Batch, ReverseKernel, Reward, Value};
use crate::error::{check, Error};
use crate::Result;
use candle_core::{DType, Device, Tensor};
use candle_nn::Optimizer;
use tensor_core::random::RandomStream;

/// A network that values states. Closures of state and time are such networks.
pub trait ValueNet<S> {
    /// Values `[rows]` of states, with a graph to the network's variables. `time` `[rows]` runs from
    /// 0 (noise) to 1 (finished); `None` for a network that sees the time in the state itself (the
    /// number of masks).
    ///
    /// # Errors
    /// Whatever the network's own are.
    fn forward(&self, x: &S, time: Option<&Tensor>) -> Result<Tensor>;
}

impl<S, F: Fn(&S, Option<&Tensor>) -> Result<Tensor>> ValueNet<S> for F {
    fn forward(&self, x: &S, time: Option<&Tensor>) -> Result<Tensor> {
        self(x, time)
    }
}

/// A network as the decoder's value.
#[derive(Debug, Clone)]
pub struct LearnedValue<N> {
    /// The network.
    pub net: N,
    /// Whether it is told the time.
    pub timed: bool,
    /// Steps of the kernel that it was trained with: values fit that kernel alone.
    pub steps: usize,
    /// Where the network computes.
    pub device: Device,
}

impl<N> LearnedValue<N> {
    /// A network that is not told the time, on the CPU.
    pub fn new(net: N, steps: usize) -> Self {
        Self {
            net,
            timed: false,
            steps,
            device: Device::Cpu,
        }
    }

    /// Tells the network the time.
    #[must_use]
    pub fn timed(self, timed: bool) -> Self {
        Self { timed, ..self }
    }

    /// Another device.
    #[must_use]
    pub fn device(self, device: Device) -> Self {
        Self { device, ..self }
    }

    /// Values with their graph; row `i` has done `done[i]` steps.
    fn forward<S>(&self, x: &S, done: &[usize]) -> Result<Tensor>
    where
        N: ValueNet<S>,
    {
        if !self.timed {
            return self.net.forward(x, None);
        }
        let time = |d: &usize| *d as f32 / self.steps as f32;
        let times: Vec<f32> = done.iter().map(time).collect();
        let times = Tensor::from_vec(times, done.len(), &self.device)?;
        self.net.forward(x, Some(&times))
    }
}

impl<S: Batch, N: ValueNet<S>> Value<S> for LearnedValue<N> {
    fn value(&self, x: &S, done: usize) -> Result<Tensor> {
        let rows = x.rows()?;
        Ok(self.forward(x, &vec![done; rows])?.detach())
    }
}

/// What a value is trained towards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ValueTarget {
    /// The reward of the sample that a state became: SVDD-MC. It estimates `E[r | x_t]`, the soft
    /// value for large `alpha`.
    MonteCarlo,
    /// The mean of the network's own values over this many proposals of the next step, and the
    /// reward for finished samples: SVDD-Q.
    Bootstrap {
        /// Proposals; the last one continues the roll-out. The authors take 10.
        inner: usize,
    },
}

/// States of unguided samples after each step, the last ones finished.
#[derive(Debug, Clone)]
pub struct Rollout<S> {
    /// One batch per step.
    pub states: Vec<S>,
    /// All proposals for the next step from the state of the same place (none from the last), where
    /// several were drawn.
    pub proposals: Vec<S>,
    /// The rewards of the finished samples.
    pub rewards: Vec<f64>,
}

/// Regression of a value network on roll-outs of the kernel that will be steered.
#[derive(Debug, Clone)]
pub struct ValueTrainer {
    /// What is regressed on.
    pub target: ValueTarget,
    /// Roll-outs in all.
    pub rollouts: usize,
    /// Samples of a roll-out.
    pub samples: usize,
    /// Updates after each roll-out.
    pub updates: usize,
    /// States of an update.
    pub batch: usize,
}

impl Default for ValueTrainer {
    /// Monte-Carlo targets; 60 roll-outs of 64 samples, 4 updates on 256 states each.
    fn default() -> Self {
        Self {
            target: ValueTarget::MonteCarlo,
            rollouts: 60,
            samples: 64,
            updates: 4,
            batch: 256,
        }
    }
}

impl ValueTrainer {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`].
    pub fn validate(&self) -> Result<()> {
        let one = "at least 1";
        check::require(
            self.rollouts > 0,
            "ValueTrainer::rollouts",
            self.rollouts,
            one,
        )?;
        check::require(self.samples > 0, "ValueTrainer::samples", self.samples, one)?;
        check::require(self.updates > 0, "ValueTrainer::updates", self.updates, one)?;
        check::require(self.batch > 0, "ValueTrainer::batch", self.batch, one)?;
        match self.target {
            ValueTarget::Bootstrap { inner } => {
                check::require(inner > 0, "ValueTarget::Bootstrap::inner", inner, one)
            }
            ValueTarget::MonteCarlo => Ok(()),
        }
    }

    /// One batch of unguided samples with their states and rewards.
    ///
    /// # Errors
    /// Those of kernel and reward; [`Error::NonFinite`] for a reward that is not finite.
    pub fn rollout<K: ReverseKernel>(
        &self,
        kernel: &K,
        reward: &dyn Reward<K::State>,
        rng: &RandomStream,
    ) -> Result<Rollout<K::State>> {
        let n = self.samples;
        let inner = match self.target {
            ValueTarget::MonteCarlo => 1,
            ValueTarget::Bootstrap { inner } => inner,
        };
        let mut x = kernel.init(&mut row_streams(&rng.split("start"), 0, n))?;
        let mut draws = row_streams(rng, 0, n);
        let (mut states, mut proposals) = (Vec::new(), Vec::new());
        for step in 0..kernel.steps() {
            let drawn = kernel.propose(&x, step, inner, &mut draws)?;
            let last: Vec<u32> = (0..n).map(|i| (i * inner + inner - 1) as u32).collect();
            x = drawn.take(&last)?;
            // Proposals from the prior belong to no state that is valued.
            if step > 0 && inner > 1 {
                proposals.push(drawn);
            } else if step > 0 && matches!(self.target, ValueTarget::Bootstrap { .. }) {
                proposals.push(x.clone());
            }
            if step + 1 == kernel.steps() {
                x = kernel.finish(x)?;
            }
            states.push(x.clone());
        }
        let rewards = numbers(&reward.reward(&x)?, n, "the rewards")?;
        if rewards.iter().any(|r| !r.is_finite()) {
            return Err(Error::NonFinite {
                rule: "ValueTrainer",
                what: "a reward".into(),
                step: kernel.steps(),
            });
        }
        Ok(Rollout {
            states,
            proposals,
            rewards,
        })
    }

    /// Targets of all states of a roll-out, step after step.
    fn targets<S: Batch, N: ValueNet<S>>(
        &self,
        rollout: &Rollout<S>,
        value: &LearnedValue<N>,
    ) -> Result<Vec<f64>> {
        let steps = rollout.states.len();
        let ValueTarget::Bootstrap { inner } = self.target else {
            return Ok(rollout.rewards.repeat(steps));
        };
        let mut targets = Vec::new();
        for (i, drawn) in rollout.proposals.iter().enumerate() {
            let rows = drawn.rows()?;
            let values = numbers(&value.value(drawn, i + 2)?, rows, "the values")?;
            let mean = |group: &[f64]| group.iter().sum::<f64>() / inner as f64;
            targets.extend(values.chunks(inner).map(mean));
        }
        targets.extend(&rollout.rewards);
        Ok(targets)
    }

    /// Trains the network of `value` with any optimizer over its variables; returns the mean squared
    /// error before each update.
    ///
    /// # Errors
    /// As [`validate`](Self::validate) and [`rollout`](Self::rollout); [`Error::Mismatch`] for a
    /// value with another number of steps; [`Error::NonFinite`] for a loss that is not finite,
    /// before it reaches the variables.
    pub fn fit<K: ReverseKernel, N: ValueNet<K::State>>(
        &self,
        kernel: &K,
        reward: &dyn Reward<K::State>,
        value: &LearnedValue<N>,
        optimizer: &mut impl Optimizer,
        rng: &RandomStream,
    ) -> Result<Vec<f64>> {
        self.validate()?;
        if value.steps != kernel.steps() {
            return Err(Error::Mismatch {
                what: "LearnedValue::steps",
                reason: format!("{} where the kernel makes {}", value.steps, kernel.steps()),
            });
        }
        let mut losses = Vec::new();
        let mut order = rng.split("order");
        for k in 0..self.rollouts {
            let rollout = self.rollout(kernel, reward, &rng.split_index("rollout", k as u64))?;
            let targets = self.targets(&rollout, value)?;
            let states = K::State::concat(&rollout.states)?;
            for _ in 0..self.updates {
                let mut rows = order.permutation(targets.len())?;
                rows.truncate(self.batch);
                let done: Vec<usize> = rows
                    .iter()
                    .map(|r| *r as usize / self.samples + 1)
                    .collect();
                let wanted: Vec<f64> = rows.iter().map(|r| targets[*r as usize]).collect();
                let found = value.forward(&states.take(&rows)?, &done)?;
                let wanted = Tensor::from_vec(wanted, rows.len(), found.device())?;
                let loss = (&found - wanted.to_dtype(found.dtype())?)?
                    .sqr()?
                    .mean_all()?;
                let number = loss.to_dtype(DType::F64)?.to_scalar::<f64>()?;
                if !number.is_finite() {
                    return Err(Error::NonFinite {
                        rule: "ValueTrainer",
                        what: "the loss of the value network".into(),
                        step: losses.len(),
                    });
                }
                optimizer.backward_step(&loss)?;
                losses.push(number);
            }
        }
        Ok(losses)
    }
}

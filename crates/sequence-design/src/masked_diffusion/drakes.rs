//! Fine-tuning by back-propagating a reward through the trajectory.

use super::model::{one_hot, DiscreteDenoiser, MaskedDiffusion};
use super::sample::SampleConfig;
use super::schedule::Step;
use super::trajectory::{KlForm, Relaxation, Visited};
use crate::error::check;
use crate::{Error, Result};
use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};
use candle_nn::Optimizer;
use tensor_core::random::RandomStream;

/// A reward that can be differentiated in relaxed one-hot sequences. Closures are rewards.
pub trait DifferentiableReward {
    /// The rewards `[B]` of `x` `[B, L, K]`, larger being better, with the graph to `x`. Parameters
    /// of the reward are left alone by the trainer.
    ///
    /// # Errors
    /// The reward's own.
    fn score(&self, x: &Tensor) -> Result<Tensor>;
}

impl<F: Fn(&Tensor) -> Result<Tensor>> DifferentiableReward for F {
    fn score(&self, x: &Tensor) -> Result<Tensor> {
        self(x)
    }
}

/// A temperature over the updates.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Temperature {
    /// The same at every update.
    Constant(f64),
    /// From the first number to the second over so many updates.
    Linear {
        /// At the first update.
        from: f64,
        /// At the last one and after it.
        to: f64,
        /// Updates in between.
        updates: usize,
    },
}

impl Temperature {
    fn at(self, update: usize) -> f64 {
        match self {
            Self::Constant(value) => value,
            Self::Linear { from, to, updates } => {
                from + (to - from) * (update as f64 / updates.max(1) as f64).min(1.0)
            }
        }
    }
}

/// Settings of a [`DrakesTrainer`]; the defaults are the paper's for DNA.
#[derive(Debug, Clone, PartialEq)]
pub struct DrakesConfig {
    /// Steps of a trajectory `S`.
    pub steps_per_traj: usize,
    /// The gradient goes through the last so many steps, through all if there are fewer.
    pub truncate_steps: usize,
    /// Temperature of the Gumbel softmax.
    pub gumbel_temp: Temperature,
    /// Weight of the divergence.
    pub alpha: f64,
    /// Updates over which the weight grows to `alpha`.
    pub alpha_warmup: usize,
    /// Which divergence.
    pub kl: KlForm,
    /// Only the relaxed steps count in the divergence.
    pub kl_truncated: bool,
    /// Every so-many-th hard step counts in the divergence, that many times; 1 takes all.
    pub kl_stride: usize,
    /// Largest global norm of a gradient.
    pub grad_clip: f64,
    /// Sequences of a trajectory.
    pub batch: usize,
    /// Trajectories of an update.
    pub accumulate: usize,
    /// See [`Relaxation::copy_flag_temp`].
    pub copy_flag_temp: Option<f64>,
    /// The reward sees hard sequences, with the gradient of the relaxed ones.
    pub straight_through: bool,
    /// Keeps only the states of relaxed steps and computes each step again on the way back: memory
    /// of one step instead of all, for a second forward pass.
    pub checkpoint: bool,
}

impl Default for DrakesConfig {
    fn default() -> Self {
        Self {
            steps_per_traj: 128,
            truncate_steps: 50,
            gumbel_temp: Temperature::Constant(1.0),
            alpha: 1e-3,
            alpha_warmup: 0,
            kl: KlForm::Path,
            kl_truncated: false,
            kl_stride: 1,
            grad_clip: 1.0,
            batch: 32,
            accumulate: 4,
            copy_flag_temp: None,
            straight_through: true,
            checkpoint: false,
        }
    }
}

impl DrakesConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] that names the first bad one.
    pub fn validate(&self) -> Result<()> {
        check::at_least("DrakesConfig::steps_per_traj", self.steps_per_traj, 1)?;
        check::at_least("DrakesConfig::truncate_steps", self.truncate_steps, 1)?;
        let temperatures = match self.gumbel_temp {
            Temperature::Constant(value) => [value, value],
            Temperature::Linear { from, to, .. } => [from, to],
        };
        for value in temperatures {
            check::positive("DrakesConfig::gumbel_temp", value)?;
        }
        check::non_negative("DrakesConfig::alpha", self.alpha)?;
        check::positive("DrakesConfig::grad_clip", self.grad_clip)?;
        check::at_least("DrakesConfig::kl_stride", self.kl_stride, 1)?;
        check::at_least("DrakesConfig::batch", self.batch, 1)?;
        check::at_least("DrakesConfig::accumulate", self.accumulate, 1)?;
        match self.copy_flag_temp {
            Some(temp) => check::positive("DrakesConfig::copy_flag_temp", temp),
            None => Ok(()),
        }
    }

    fn relaxation(&self, update: usize) -> Relaxation {
        Relaxation {
            steps: self.steps_per_traj,
            truncate_steps: self.truncate_steps,
            temperature: self.gumbel_temp.at(update),
            copy_flag_temp: self.copy_flag_temp,
        }
    }
}

/// What an update did; means over its sequences.
#[derive(Debug, Clone, PartialEq)]
pub struct DrakesReport {
    /// The reward of what the reward saw: relaxed sequences, or hard ones with `straight_through`.
    pub reward_soft: f64,
    /// The reward of the most likely tokens.
    pub reward_hard: f64,
    /// What the [judge](DrakesTrainer::judged_by) says of them, where there is one.
    pub reward_eval: Option<f64>,
    /// The divergence of each step, in nats for [`KlForm::Path`].
    pub kl_per_step: Vec<f64>,
    /// The loss.
    pub loss: f64,
    /// The gradient's norm before clipping.
    pub grad_norm: f64,
}

/// The loss of one trajectory with its gradients.
pub struct Trajectory {
    /// What the reward saw, `[B, L, K]`, without a graph.
    pub sequences: Tensor,
    /// The rewards `[B]`.
    pub rewards: Vec<f64>,
    /// The divergence at each step and sequence, `[S][B]`.
    pub kl: Vec<Vec<f64>>,
    /// `-mean reward + alpha mean sum kl`.
    pub loss: f64,
    /// Gradients of the loss.
    pub grads: GradStore,
}

/// The trainer of DRAKES; see the [module](super) page.
///
/// ```
/// # extern crate nn as thalweg_nn;
/// # extern crate optim as thalweg_optim;
/// use candle_core::{DType, Device, Tensor};
/// use thalweg_nn::init::SeededVars;
/// use thalweg_optim::{AdamW, AdamWConfig, ParamGroup};
/// use thalweg_sequence_design::masked_diffusion::{
///     CnnConfig, CnnDenoiser, DrakesConfig, DrakesTrainer, MaskedDiffusion,
/// };
/// use thalweg_sequence_design::{RandomStream, Result};
///
/// // Your pre-trained network in the place of this one, whose letters are nearly even.
/// let rng = RandomStream::new(1);
/// let vars = SeededVars::new(&rng.split("weights"));
/// let config = CnnConfig { hidden: 8, kernel: 3, dilations: vec![1], stacks: 1, time: false, ..CnnConfig::dna() };
/// let over = |vb| -> Result<MaskedDiffusion<CnnDenoiser>> {
///     MaskedDiffusion::new(CnnDenoiser::new(&config, vb, &rng)?, 4, DType::F32, &Device::Cpu)
/// };
/// let model = over(vars.builder(DType::F32, &Device::Cpu))?;
/// let frozen = over(vars.frozen(DType::F32, &Device::Cpu)?)?;
///
/// // Any function of relaxed one-hot sequences with a gradient: here how many letters are G.
/// let reward = |x: &Tensor| -> Result<Tensor> { Ok(x.narrow(2, 2, 1)?.sum(2)?.sum(1)?) };
/// let adam = AdamW::with_groups(vec![ParamGroup::named(vars.trainable(), AdamWConfig::adam(1e-2))])?;
/// let config = DrakesConfig {
///     steps_per_traj: 8,
///     truncate_steps: 4,
///     alpha: 0.1,
///     batch: 16,
///     accumulate: 1,
///     ..DrakesConfig::default()
/// };
/// let mut trainer = DrakesTrainer::new(model, frozen, vars.trainable(), &reward, adam, config, 6)?;
/// let mut stream = RandomStream::new(2);
/// let mut reports = vec![];
/// for _ in 0..20 {
///     reports.push(trainer.step(&mut stream)?);
/// }
/// assert!(reports[19].reward_hard > reports[0].reward_hard + 1.0);
/// // What it costs, in nats.
/// assert!(reports[19].kl_per_step.iter().sum::<f64>() > reports[0].kl_per_step.iter().sum());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct DrakesTrainer<'a, D, F, O> {
    model: MaskedDiffusion<D>,
    frozen: MaskedDiffusion<F>,
    vars: Vec<(String, Var)>,
    reward: &'a dyn DifferentiableReward,
    judge: Option<&'a dyn DifferentiableReward>,
    optimizer: O,
    config: DrakesConfig,
    length: usize,
    updates: usize,
}

impl<'a, D: DiscreteDenoiser, F: DiscreteDenoiser, O: Optimizer> DrakesTrainer<'a, D, F, O> {
    /// A trainer of `model`, whose variables are `vars` and in `optimizer`, on sequences of `length`
    /// tokens; `frozen` is the pre-trained model, with parameters of its own: constants, for choice
    /// ([`nn::init::frozen`] makes them of a map's variables), as gradients of variables would be
    /// computed for nothing.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`]; [`Error::Unsupported`] for a reward that gives no gradient in
    /// relaxed sequences (one that looks tokens up), models over different tokens or schedules.
    pub fn new(
        model: MaskedDiffusion<D>,
        frozen: MaskedDiffusion<F>,
        vars: Vec<(String, Var)>,
        reward: &'a dyn DifferentiableReward,
        optimizer: O,
        config: DrakesConfig,
        length: usize,
    ) -> Result<Self> {
        config.validate()?;
        check::at_least("DrakesTrainer::length", length, 1)?;
        if model.vocab != frozen.vocab || model.schedule != frozen.schedule {
            let reason = "they must share tokens and schedule";
            return Err(Error::unsupported("two models that differ", reason));
        }
        model.schedule.validate()?;
        let trainer = Self {
            model,
            frozen,
            vars,
            reward,
            judge: None,
            optimizer,
            config,
            length,
            updates: 0,
        };
        trainer.check_reward()?;
        Ok(trainer)
    }

    /// Reports a second reward of the most likely tokens at every update, one that nothing is trained
    /// by: an independent oracle shows whether the gain is more than the steering oracle's errors.
    #[must_use]
    pub fn judged_by(self, judge: &'a dyn DifferentiableReward) -> Self {
        Self {
            judge: Some(judge),
            ..self
        }
    }

    fn check_reward(&self) -> Result<()> {
        let shape = (2, self.length, self.model.vocab);
        let even = 1.0 / self.model.vocab as f64;
        let x = Tensor::full(even, shape, &self.model.device)?.to_dtype(self.model.dtype)?;
        let x = Var::from_tensor(&x)?;
        let score = scored(self.reward, x.as_tensor())?;
        match score.sum_all()?.backward()?.get(&x) {
            Some(_) => Ok(()),
            None => Err(Error::unsupported(
                "a reward without a gradient in its sequences",
                "its first layer must be a product with one-hot numbers, not a look-up",
            )),
        }
    }

    /// The model that is trained.
    pub fn model(&self) -> &MaskedDiffusion<D> {
        &self.model
    }

    /// The pre-trained model.
    pub fn frozen(&self) -> &MaskedDiffusion<F> {
        &self.frozen
    }

    /// The optimizer, for its learning rate and its state.
    pub fn optimizer_mut(&mut self) -> &mut O {
        &mut self.optimizer
    }

    /// Updates done. With the variables, the optimizer's state and the stream's, what a later run
    /// needs to continue with the same bits.
    pub fn updates(&self) -> usize {
        self.updates
    }

    /// Goes on after so many updates.
    pub fn set_updates(&mut self, updates: usize) {
        self.updates = updates;
    }

    /// One update.
    ///
    /// # Errors
    /// [`Error::NonFinite`] for a loss or a gradient that is no number (nothing is changed); those of
    /// networks and reward.
    pub fn step(&mut self, rng: &mut RandomStream) -> Result<DrakesReport> {
        let c = &self.config;
        let count = c.steps_per_traj * c.batch * self.length * (self.model.vocab + 1);
        let mut grads = GradStore::default();
        let mut report = DrakesReport {
            reward_soft: 0.0,
            reward_hard: 0.0,
            reward_eval: self.judge.map(|_| 0.0),
            kl_per_step: vec![0.0; c.steps_per_traj],
            loss: 0.0,
            grad_norm: 0.0,
        };
        let share = 1.0 / c.accumulate as f64;
        for _ in 0..c.accumulate {
            let mut uniforms = vec![0.0; count];
            rng.fill_uniform(&mut uniforms);
            let first = rng.below(c.kl_stride)?;
            let one = self.trajectory_with(&uniforms, first)?;
            let hard = one.sequences.argmax(2)?;
            let hard = one_hot(&hard, self.model.vocab, one.sequences.dtype())?;
            let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
            report.reward_soft += share * mean(&one.rewards);
            report.reward_hard += share * mean(&numbers(&scored(self.reward, &hard)?)?);
            if let (Some(judge), Some(sum)) = (self.judge, &mut report.reward_eval) {
                *sum += share * mean(&numbers(&scored(judge, &hard)?)?);
            }
            report.loss += share * one.loss;
            let steps = report.kl_per_step.iter_mut().zip(&one.kl);
            steps.for_each(|(sum, kl)| *sum += share * mean(kl));
            self.collect(&mut grads, &one.grads, share)?;
        }
        report.grad_norm = optim::global_norm(&self.vars, &grads)?;
        if !(report.grad_norm.is_finite() && report.loss.is_finite()) {
            return Err(Error::non_finite("the loss or its gradient"));
        }
        if report.grad_norm > c.grad_clip {
            let factor = c.grad_clip / report.grad_norm;
            for (_, var) in &self.vars {
                if let Some(grad) = grads.remove(var) {
                    grads.insert(var, grad.affine(factor, 0.0)?);
                }
            }
        }
        self.optimizer.step(&grads)?;
        self.updates += 1;
        Ok(report)
    }

    /// Adds gradients of the trained variables.
    fn collect(&self, into: &mut GradStore, from: &GradStore, factor: f64) -> Result<()> {
        for (_, var) in &self.vars {
            let Some(grad) = from.get(var) else { continue };
            let grad = grad.detach().affine(factor, 0.0)?;
            let sum = match into.remove(var) {
                Some(known) => (known + grad)?,
                None => grad,
            };
            into.insert(var, sum);
        }
        Ok(())
    }

    /// The weight of the divergence at this update.
    fn alpha(&self) -> f64 {
        match self.config.alpha_warmup {
            0 => self.config.alpha,
            warmup => self.config.alpha * ((self.updates + 1) as f64 / warmup as f64).min(1.0),
        }
    }

    /// The loss of one trajectory and its gradients, with given uniform numbers `[S, B, L, K + 1]`;
    /// of the hard steps those count in the divergence whose number is `first` modulo
    /// [`DrakesConfig::kl_stride`].
    ///
    /// # Errors
    /// [`Error::Shape`] for another count of numbers; those of networks and reward.
    pub fn trajectory_with(&self, uniforms: &[f64], first: usize) -> Result<Trajectory> {
        let (c, model) = (&self.config, &self.model);
        let per_step = c.batch * self.length * (model.vocab + 1);
        if uniforms.len() != c.steps_per_traj * per_step {
            let expected = format!("[{}]", c.steps_per_traj * per_step);
            return Err(Error::shape("uniform numbers", &[uniforms.len()], expected));
        }
        let mut run = Run {
            trainer: self,
            grid: model.schedule.steps(c.steps_per_traj, model.clean_time)?,
            uniforms,
            per_step,
            relaxation: c.relaxation(self.updates),
            alpha: self.alpha(),
            grads: GradStore::default(),
            kl: vec![vec![0.0; c.batch]; c.steps_per_traj],
            penalty: 0.0,
        };
        let x = run.hard(first)?;
        match c.checkpoint {
            true => run.recomputed(x),
            false => run.kept(x),
        }
    }
}

/// One trajectory under way.
struct Run<'t, 'a, D, F, O> {
    trainer: &'t DrakesTrainer<'a, D, F, O>,
    grid: Vec<Step>,
    uniforms: &'t [f64],
    per_step: usize,
    relaxation: Relaxation,
    alpha: f64,
    grads: GradStore,
    kl: Vec<Vec<f64>>,
    /// `alpha` times the divergence of the steps that are done with.
    penalty: f64,
}

impl<D: DiscreteDenoiser, F: DiscreteDenoiser, O: Optimizer> Run<'_, '_, D, F, O> {
    fn hard_steps(&self) -> usize {
        self.relaxation
            .steps
            .saturating_sub(self.relaxation.truncate_steps)
    }

    /// The hard steps: tokens without a graph. The divergence there is differentiated at once, so
    /// that no two steps are in memory together.
    fn hard(&mut self, first: usize) -> Result<Tensor> {
        let (trainer, model) = (self.trainer, &self.trainer.model);
        let c = &trainer.config;
        let mut state = model.start(c.batch, trainer.length, None)?;
        let config = SampleConfig {
            cache: !model.time_conditioning,
            ..SampleConfig::default()
        };
        // The released form is zero on hard states.
        let counted = c.kl == KlForm::Path && !c.kl_truncated;
        for i in 0..self.hard_steps() {
            let step = self.grid[i];
            if counted && i % c.kl_stride == first {
                let at = model.visit(model.as_input(&state)?, &step, None, true)?;
                let kl = model.divergence(&trainer.frozen, &at, &step, c.kl)?;
                let kl = kl.affine(c.kl_stride as f64, 0.0)?;
                self.kl[i] = numbers(&kl)?;
                let loss = kl.mean_all()?.affine(self.alpha, 0.0)?;
                self.penalty += numbers(&loss)?[0];
                if self.alpha > 0.0 {
                    trainer.collect(&mut self.grads, &loss.backward()?, 1.0)?;
                }
                model.answered(&mut state, &at.logits)?;
            } else {
                model.evaluate(&mut state, step.sigma, &config)?;
            }
            let u = &self.uniforms[i * self.per_step..(i + 1) * self.per_step];
            model.hard_draw(&mut state, &step, u);
        }
        model.as_input(&state)
    }

    /// One relaxed step with its graph: the next state, and the divergence `[B]`.
    fn soft(&self, i: usize, x: Tensor) -> Result<(Tensor, Tensor)> {
        let (trainer, step) = (self.trainer, &self.grid[i]);
        let model = &trainer.model;
        let at: Visited = model.visit(x, step, Some(&self.relaxation), true)?;
        let kl = model.divergence(&trainer.frozen, &at, step, trainer.config.kl)?;
        let u = &self.uniforms[i * self.per_step..(i + 1) * self.per_step];
        let noise = model.noise(u, at.x.dims(), at.x.dtype())?;
        Ok((model.soft_step(&at, step, &self.relaxation, &noise)?, kl))
    }

    /// What the reward sees of the last state.
    fn sequences(&self, x: &Tensor) -> Result<Tensor> {
        let out = x.narrow(2, 0, self.trainer.model.vocab)?.contiguous()?;
        if !self.trainer.config.straight_through {
            return Ok(out);
        }
        let hard = one_hot(
            &out.detach().argmax(2)?,
            self.trainer.model.vocab,
            out.dtype(),
        )?;
        Ok((&out + (hard - &out)?.detach())?)
    }

    /// `-mean reward` with its graph, the rewards and the sequences.
    fn judged(&self, x: &Tensor) -> Result<(Tensor, Vec<f64>, Tensor)> {
        let sequences = self.sequences(x)?;
        let score = scored(self.trainer.reward, &sequences)?;
        let loss = score.mean_all()?.neg()?;
        Ok((loss, numbers(&score)?, sequences.detach()))
    }

    /// All relaxed steps in one graph.
    fn kept(mut self, mut x: Tensor) -> Result<Trajectory> {
        let mut penalty: Option<Tensor> = None;
        for i in self.hard_steps()..self.relaxation.steps {
            let (next, kl) = self.soft(i, x)?;
            self.kl[i] = numbers(&kl)?;
            let term = kl.mean_all()?.affine(self.alpha, 0.0)?;
            penalty = Some(match penalty {
                Some(sum) => (sum + term)?,
                None => term,
            });
            x = next;
        }
        let (mut loss, rewards, sequences) = self.judged(&x)?;
        if let Some(penalty) = penalty.filter(|_| self.alpha > 0.0) {
            loss = (loss + penalty)?;
        }
        let value = numbers(&loss)?[0] + self.penalty;
        self.trainer
            .collect(&mut self.grads, &loss.backward()?, 1.0)?;
        Ok(Trajectory {
            sequences,
            rewards,
            kl: self.kl,
            loss: value,
            grads: self.grads,
        })
    }

    /// The same without a graph on the way there, and one step's graph at a time on the way back.
    fn recomputed(mut self, mut x: Tensor) -> Result<Trajectory> {
        let from = self.hard_steps();
        let mut states = vec![];
        for i in from..self.relaxation.steps {
            states.push(x.clone());
            x = self.soft(i, x)?.0.detach();
        }
        let last = Var::from_tensor(&x)?;
        let (loss, rewards, sequences) = self.judged(last.as_tensor())?;
        let mut value = numbers(&loss)?[0] + self.penalty;
        let mut upstream = loss.backward()?.remove(&last).map(|g| g.detach());
        for (i, x) in (from..self.relaxation.steps).zip(states).rev() {
            let x = Var::from_tensor(&x)?;
            let (next, kl) = self.soft(i, x.as_tensor().clone())?;
            self.kl[i] = numbers(&kl)?;
            let mut through = kl.mean_all()?.affine(self.alpha, 0.0)?;
            value += numbers(&through)?[0];
            if let Some(upstream) = &upstream {
                through = (through + (next * upstream)?.sum_all()?)?;
            }
            let mut grads = through.backward()?;
            upstream = grads.remove(&x).map(|g| g.detach());
            self.trainer.collect(&mut self.grads, &grads, 1.0)?;
        }
        Ok(Trajectory {
            sequences,
            rewards,
            kl: self.kl,
            loss: value,
            grads: self.grads,
        })
    }
}

/// The rewards `[B]` of sequences.
fn scored(reward: &dyn DifferentiableReward, x: &Tensor) -> Result<Tensor> {
    let score = reward.score(x)?;
    match score.dims() == [x.dims()[0]] {
        true => Ok(score),
        false => {
            let expected = format!("[{}]", x.dims()[0]);
            Err(Error::shape("the rewards", score.dims(), expected))
        }
    }
}

pub(super) fn numbers(x: &Tensor) -> Result<Vec<f64>> {
    Ok(x.detach().to_dtype(DType::F64)?.flatten_all()?.to_vec1()?)
}

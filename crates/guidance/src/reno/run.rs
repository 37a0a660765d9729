//! The optimization.

use super::numbers::{choose, column, numbers, per_row, row_dots};
use super::reward::wide;
use super::update::{Pull, Update};
use super::{Generator, NoiseOptimizer, RenoConfig, RewardLoss, Select};
use crate::error::Error;
use crate::Result;
use candle_core::{DType, Device, Tensor, Var};
use flows::{row_combination, Condition, GradientCheck};
use tensor_core::checkpoint::State;

/// A row that gave so many losses in turn that are no numbers is done.
const STRIKES: usize = 3;

/// The optimizer of noise; see the [module](super) page.
pub struct Reno<'a> {
    generator: &'a dyn Generator,
    rewards: Vec<(f64, &'a dyn RewardLoss)>,
    config: RenoConfig,
}

/// What an iteration found.
#[derive(Debug, Clone)]
pub struct StepReport {
    /// The iteration, from 0.
    pub iteration: usize,
    /// Its samples.
    pub sample: Tensor,
    /// The weighted losses of the rows, without the regularizer.
    pub loss: Vec<f64>,
    /// The unweighted losses by reward and row.
    pub per_reward: Vec<Vec<f64>>,
    /// `|z|` of the rows.
    pub norms: Vec<f64>,
    /// Rows that have not come to an end.
    pub active: usize,
}

/// What [`Reno::optimize`] gives.
#[derive(Debug, Clone)]
pub struct RenoOutput {
    /// The noise of the best samples.
    pub best_z: Tensor,
    /// The best samples: what the generator made of that noise.
    pub best_sample: Tensor,
    /// The samples of the first noise.
    pub initial: Tensor,
    /// Weighted losses by iteration and row.
    pub losses: Vec<Vec<f64>>,
    /// Unweighted losses by iteration, reward and row.
    pub per_reward: Vec<Vec<Vec<f64>>>,
    /// `|z|` by iteration and row.
    pub norms: Vec<Vec<f64>>,
    /// The iteration of each row's best sample (of its last one with [`Select::Last`]).
    pub best_index: Vec<usize>,
    /// Rows through the generator and the rewards.
    pub evaluations: usize,
}

impl RenoOutput {
    /// The loss of each row's best sample.
    pub fn best_loss(&self) -> Vec<f64> {
        let at = |(row, k): (usize, &usize)| self.losses[*k][row];
        self.best_index.iter().enumerate().map(at).collect()
    }
}

impl<'a> Reno<'a> {
    /// An optimizer over the noise of `generator` under weighted rewards.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`]; [`Error::InvalidArgument`] for no rewards or a weight that is not
    /// finite.
    pub fn new(
        generator: &'a dyn Generator,
        rewards: Vec<(f64, &'a dyn RewardLoss)>,
        config: RenoConfig,
    ) -> Result<Self> {
        config.validate()?;
        if rewards.is_empty() {
            return Err(Error::argument("number of rewards", 0, "at least one"));
        }
        for (weight, reward) in &rewards {
            if !weight.is_finite() {
                let expected = format!("a finite number, for `{}`", reward.name());
                return Err(Error::argument("weight", weight, expected));
            }
        }
        Ok(Self {
            generator,
            rewards,
            config,
        })
    }

    /// All iterations from the noise `z` `[rows, ...]`, each row by itself.
    ///
    /// # Errors
    /// As [`RenoRun::step`]; [`Error::NonFinite`] for a row that never had a loss.
    pub fn optimize(&self, z: &Tensor, condition: &Condition) -> Result<RenoOutput> {
        let mut run = self.start(z, condition)?;
        while run.step()?.is_some() {}
        run.finish()
    }

    /// The same iteration by iteration: progress, previews.
    ///
    /// # Errors
    /// [`Error::Shape`] for noise without rows or numbers, or a condition of other rows.
    pub fn start(&self, z: &Tensor, condition: &Condition) -> Result<RenoRun<'_, 'a>> {
        if z.rank() < 2 || z.elem_count() == 0 {
            return Err(Error::shape(
                "the noise",
                z.dims(),
                "[rows, ...], not empty",
            ));
        }
        let rows = z.dims()[0];
        Ok(RenoRun {
            reno: self,
            condition: condition.for_rows(rows)?,
            z: wide(&z.detach())?,
            check: match self.config.gradient_check {
                true => GradientCheck::default(),
                false => GradientCheck::off(),
            },
            update: Update::default(),
            lost: vec![0; rows],
            done: vec![false; rows],
            best: vec![f64::INFINITY; rows],
            best_index: vec![0; rows],
            kept_index: vec![0; rows],
            kept: None,
            initial: None,
            losses: Vec::new(),
            per_reward: Vec::new(),
            norms: Vec::new(),
            evaluations: 0,
        })
    }

    /// Samples, losses by reward, and what is minimized, of each row.
    pub(super) fn evaluate(&self, z: &Tensor, condition: &Condition) -> Result<Evaluation> {
        let rows = z.dims()[0];
        let sample = self.generator.generate(z, condition)?;
        let mut per_reward = Vec::new();
        let mut total: Option<Tensor> = None;
        for (weight, reward) in &self.rewards {
            let loss = wide(&reward.loss(&sample, condition)?)?;
            if loss.dims() != [rows] {
                let what = format!("the loss of `{}`", reward.name());
                return Err(Error::shape(what, loss.dims(), format!("[{rows}]")));
            }
            per_reward.push(numbers(&loss)?);
            let term = loss.affine(*weight, 0.0)?;
            total = Some(match total {
                Some(total) => (total + term)?,
                None => term,
            });
        }
        let total = total.ok_or_else(|| Error::argument("number of rewards", 0, "at least one"))?;
        let norms = row_dots(z, z)?.into_iter().map(f64::sqrt);
        Ok(Evaluation {
            sample: sample.detach(),
            loss: numbers(&total)?,
            per_reward,
            norms: norms.collect(),
            total,
        })
    }

    /// An evaluation with the gradient of the rewards, and how many more its check took.
    fn differentiate(
        &self,
        z: &Tensor,
        condition: &Condition,
        check: &GradientCheck,
    ) -> Result<(Evaluation, Tensor, usize)> {
        let at = Var::from_tensor(z)?;
        let found = self.evaluate(at.as_tensor(), condition)?;
        let grads = found.total.sum_all()?.backward()?;
        let g = grads.get(&at).ok_or_else(|| {
            tensor_core::Error::LostGradient(
                vec!["the noise, through generator and rewards".into()],
            )
        })?;
        let g = g.detach();
        let total = |z: &Tensor| Ok(self.evaluate(z, condition)?.total);
        let checks = check.run("generator and rewards", total, z, &g)?;
        Ok((found, g, checks))
    }

    /// What is minimized in each row: rewards and regularizer `R`, the negative logarithm of the density of
    /// a normal vector's radius up to a constant.
    fn objective(&self, found: &Evaluation, d: usize) -> Vec<f64> {
        let weight = self.config.reg_weight;
        let penalty = |n: &f64| weight * (0.5 * n * n - (d as f64 - 1.0) * n.ln());
        let rows = found.loss.iter().zip(&found.norms);
        match weight == 0.0 {
            true => found.loss.clone(),
            false => rows.map(|(loss, n)| loss + penalty(n)).collect(),
        }
    }

    /// `grad R = c z`: the `c` of each row.
    fn along(&self, norms: &[f64], d: usize) -> Vec<f64> {
        let weight = self.config.reg_weight;
        let one = |n: &f64| match weight == 0.0 {
            true => 0.0,
            false => weight * (1.0 - (d as f64 - 1.0) / (n * n)),
        };
        norms.iter().map(one).collect()
    }

    /// The gradient of what is minimized, from that of the rewards.
    fn total_gradient(&self, found: &Evaluation, z: &Tensor, g: &Tensor) -> Result<Tensor> {
        let ones = vec![1.0; found.norms.len()];
        let along = self.along(&found.norms, per_row(z));
        Ok(row_combination(&[(&ones, g), (&along, z)])?)
    }

    /// A run that was stopped, from its [`state`](RenoRun::state): it goes on with the same bits. Its
    /// gradient is not checked again.
    ///
    /// # Errors
    /// [`Error::Mismatch`] for a state of other noise, rewards or a longer run.
    pub fn resume(&self, state: &State, condition: &Condition) -> Result<RenoRun<'_, 'a>> {
        RenoRun::read(self, state, condition)
    }
}

pub(super) struct Evaluation {
    pub sample: Tensor,
    pub loss: Vec<f64>,
    per_reward: Vec<Vec<f64>>,
    norms: Vec<f64>,
    /// The weighted losses `[rows]`, with their graph.
    total: Tensor,
}

/// A run in progress.
pub struct RenoRun<'r, 'a> {
    reno: &'r Reno<'a>,
    condition: Condition,
    z: Tensor,
    check: GradientCheck,
    update: Update,
    lost: Vec<usize>,
    done: Vec<bool>,
    best: Vec<f64>,
    best_index: Vec<usize>,
    /// The iteration of what is kept of each row.
    kept_index: Vec<usize>,
    /// The noise and samples that are kept.
    kept: Option<(Tensor, Tensor)>,
    initial: Option<Tensor>,
    losses: Vec<Vec<f64>>,
    per_reward: Vec<Vec<Vec<f64>>>,
    norms: Vec<Vec<f64>>,
    evaluations: usize,
}

impl RenoRun<'_, '_> {
    /// The noise that is evaluated next.
    pub fn z(&self) -> &Tensor {
        &self.z
    }

    /// One evaluation, and one update unless it was the last; `None` when all is done.
    ///
    /// # Errors
    /// Those of generator and rewards; a gradient that does not arrive is named.
    pub fn step(&mut self) -> Result<Option<StepReport>> {
        let config = &self.reno.config;
        let iteration = self.losses.len();
        if iteration >= config.iters || self.done.iter().all(|d| *d) {
            return Ok(None);
        }
        let last = iteration + 1 == config.iters;
        let (found, g) = match last {
            true => (self.reno.evaluate(&self.z, &self.condition)?, None),
            false => {
                let (z, condition) = (&self.z, &self.condition);
                let (found, g, checks) = self.reno.differentiate(z, condition, &self.check)?;
                self.evaluations += checks * found.loss.len();
                (found, Some(g))
            }
        };
        self.evaluations += found.loss.len();
        self.keep_best(iteration, &found)?;
        self.retire(iteration, &found.loss);
        if let Some(g) = g.filter(|_| !self.done.iter().all(|d| *d)) {
            self.advance(&found, g)?;
        }
        self.losses.push(found.loss.clone());
        self.per_reward.push(found.per_reward.clone());
        self.norms.push(found.norms.clone());
        Ok(Some(StepReport {
            iteration,
            sample: found.sample,
            loss: found.loss,
            per_reward: found.per_reward,
            norms: found.norms,
            active: self.done.iter().filter(|d| !**d).count(),
        }))
    }

    fn keep_best(&mut self, iteration: usize, found: &Evaluation) -> Result<()> {
        if self.initial.is_none() {
            self.initial = Some(found.sample.clone());
        }
        let better: Vec<bool> = found
            .loss
            .iter()
            .zip(&self.best)
            .map(|(l, b)| l < b)
            .collect();
        for (row, better) in better.iter().enumerate() {
            if *better {
                self.best[row] = found.loss[row];
                self.best_index[row] = iteration;
            }
        }
        let taken: Vec<bool> = match self.reno.config.select {
            Select::BestReward => better,
            Select::Last => found.loss.iter().map(|l| l.is_finite()).collect(),
        };
        for (row, _) in taken.iter().enumerate().filter(|(_, taken)| **taken) {
            self.kept_index[row] = iteration;
        }
        let (z, sample) = (self.z.clone(), found.sample.clone());
        self.kept = Some(match self.kept.take() {
            None => (z, sample),
            Some((kept_z, kept_sample)) => (
                choose(&taken, &z, &kept_z)?,
                choose(&taken, &sample, &kept_sample)?,
            ),
        });
        Ok(())
    }

    /// Marks rows that have come to an end.
    fn retire(&mut self, iteration: usize, loss: &[f64]) {
        let config = &self.reno.config;
        for (row, loss) in loss.iter().enumerate() {
            self.lost[row] = match loss.is_finite() {
                true => 0,
                false => self.lost[row] + 1,
            };
            let waited = iteration - self.best_index[row];
            self.done[row] |= self.lost[row] >= STRIKES
                || config.early_stop.is_some_and(|limit| *loss < limit)
                || config.patience.is_some_and(|p| waited >= p);
        }
    }

    fn advance(&mut self, found: &Evaluation, g: Tensor) -> Result<()> {
        let config = &self.reno.config;
        let rate = config.rate(per_row(&self.z));
        let next = match config.optimizer {
            NoiseOptimizer::Lbfgs { max_iter, history } => {
                let objective = self.reno.objective(found, per_row(&self.z));
                let g = self.reno.total_gradient(found, &self.z, &g)?;
                let next = self.lbfgs((max_iter, history, rate), objective, g)?;
                choose(&self.done, &self.z, &next)?
            }
            simple => {
                let pull = Pull {
                    z: &self.z,
                    g: &g,
                    along: &self.reno.along(&found.norms, per_row(&self.z)),
                    clip: config.grad_clip,
                    rate,
                    done: &self.done,
                };
                self.update.advance(simple, &pull)?
            }
        };
        self.z = next.detach();
        Ok(())
    }

    /// Some steps of L-BFGS, each row with its own step length.
    fn lbfgs(
        &mut self,
        (max_iter, history, rate): (usize, usize, f64),
        mut value: Vec<f64>,
        mut g: Tensor,
    ) -> Result<Tensor> {
        const HALVINGS: usize = 8;
        let mut z = self.z.clone();
        // A row that found no step has none in this iteration any more, whatever the others do.
        let mut stopped = vec![false; value.len()];
        for _ in 0..max_iter {
            let direction = self.update.two_loop(&g)?;
            let slope = row_dots(&g, &direction)?;
            let squares = row_dots(&g, &g)?;
            let curved = self.update.curved(value.len());
            let first = |i: usize| match curved[i] {
                true => 1.0,
                false => rate / squares[i].sqrt().max(1e-12),
            };
            let mut length: Vec<f64> = (0..value.len()).map(first).collect();
            for (i, t) in length.iter_mut().enumerate() {
                // Uphill, or no number at all: this row stays.
                if stopped[i] || !(slope[i].is_finite() && slope[i] < 0.0) {
                    *t = 0.0;
                }
            }
            let mut accepted = false;
            for _ in 0..HALVINGS {
                let trial = (&z + direction.broadcast_mul(&column(length.clone(), &z)?)?)?;
                let found = self.reno.evaluate(&trial, &self.condition)?;
                self.evaluations += value.len();
                let new = self.reno.objective(&found, per_row(&trial));
                let falls = |i: usize| new[i] <= value[i] + 1e-4 * length[i] * slope[i];
                let short: Vec<usize> = (0..value.len())
                    .filter(|i| length[*i] > 0.0 && !falls(*i))
                    .collect();
                accepted = short.is_empty();
                if accepted {
                    break;
                }
                short.into_iter().for_each(|i| length[i] *= 0.5);
            }
            if !accepted {
                // What does not fall after that many halvings does not move.
                let trial = (&z + direction.broadcast_mul(&column(length.clone(), &z)?)?)?;
                let found = self.reno.evaluate(&trial, &self.condition)?;
                let new = self.reno.objective(&found, per_row(&trial));
                self.evaluations += value.len();
                for (i, t) in length.iter_mut().enumerate() {
                    if new[i].is_nan() || new[i] > value[i] + 1e-4 * *t * slope[i] {
                        *t = 0.0;
                    }
                }
            }
            for (stopped, t) in stopped.iter_mut().zip(&length) {
                *stopped |= *t == 0.0;
            }
            if stopped.iter().all(|s| *s) {
                break;
            }
            let next = (&z + direction.broadcast_mul(&column(length, &z)?)?)?.detach();
            let (found, next_g, checks) =
                self.reno
                    .differentiate(&next, &self.condition, &self.check)?;
            self.evaluations += (1 + checks) * value.len();
            let next_g = self.reno.total_gradient(&found, &next, &next_g)?;
            self.update.remember(&next, &z, &next_g, &g, history)?;
            value = self.reno.objective(&found, per_row(&next));
            (z, g) = (next, next_g);
        }
        Ok(z)
    }

    /// The best of all that was evaluated.
    ///
    /// # Errors
    /// [`Error::NonFinite`] for a row that never had a loss; [`Error::InvalidArgument`] before the
    /// first step.
    pub fn finish(self) -> Result<RenoOutput> {
        let (Some((best_z, best_sample)), Some(initial)) = (self.kept, self.initial) else {
            return Err(Error::argument("iterations done", 0, "at least one"));
        };
        if let Some(row) = self.best.iter().position(|b| !b.is_finite()) {
            return Err(Error::NonFinite {
                rule: "ReNO",
                what: format!("every loss of row {row}"),
                step: self.losses.len(),
            });
        }
        Ok(RenoOutput {
            best_z,
            best_sample,
            initial,
            losses: self.losses,
            per_reward: self.per_reward,
            norms: self.norms,
            best_index: self.kept_index,
            evaluations: self.evaluations,
        })
    }

    /// Everything that the run needs to go on, as tensors: noise, moments, what was found so far. For
    /// [`Reno::resume`].
    ///
    /// # Errors
    /// Those of candle.
    pub fn state(&self) -> Result<State> {
        let cpu = &Device::Cpu;
        let (rows, k) = (self.best.len(), self.losses.len());
        let count = |values: &[usize]| -> Vec<f64> { values.iter().map(|v| *v as f64).collect() };
        let flags: Vec<f64> = self.done.iter().map(|d| f64::from(u8::from(*d))).collect();
        let mut state = State::from([("z".to_string(), self.z.clone())]);
        let lists = [
            ("lost", count(&self.lost)),
            ("done", flags),
            ("best", self.best.clone()),
            ("best_index", count(&self.best_index)),
            ("kept_index", count(&self.kept_index)),
            ("evaluations", vec![self.evaluations as f64]),
        ];
        for (name, values) in lists {
            state.insert(name.into(), Tensor::new(values, cpu)?);
        }
        if k > 0 {
            let rewards = self.per_reward[0].len();
            let rewarded = self
                .per_reward
                .iter()
                .flatten()
                .flatten()
                .copied()
                .collect();
            let tables = [
                ("losses", vec![k, rows], self.losses.concat()),
                ("norms", vec![k, rows], self.norms.concat()),
                ("per_reward", vec![k, rewards, rows], rewarded),
            ];
            for (name, shape, values) in tables {
                state.insert(name.into(), Tensor::from_vec(values, shape, cpu)?);
            }
        }
        if let (Some((z, sample)), Some(initial)) = (&self.kept, &self.initial) {
            let kept = [("best_z", z), ("best_sample", sample), ("initial", initial)];
            state.extend(kept.map(|(name, tensor)| (name.to_string(), tensor.clone())));
        }
        self.update.store(&mut state)?;
        Ok(state)
    }
}

impl<'r, 'a> RenoRun<'r, 'a> {
    /// A run from its [`state`](Self::state).
    fn read(reno: &'r Reno<'a>, state: &State, condition: &Condition) -> Result<Self> {
        let bad = |reason: String| Error::Mismatch {
            what: "the state of a run of ReNO",
            reason,
        };
        let z = state.get("z").ok_or_else(|| bad("no `z`".into()))?;
        let mut run = reno.start(z, condition)?;
        let rows = run.best.len();
        let values = |name: &str| -> Result<Vec<f64>> {
            match state.get(name) {
                Some(t) => Ok(t.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?),
                None => Ok(Vec::new()),
            }
        };
        let of_rows = |name: &str| -> Result<Vec<f64>> {
            let found = values(name)?;
            match found.len() == rows {
                true => Ok(found),
                false => Err(bad(format!(
                    "`{name}` has {} numbers for {rows} rows",
                    found.len()
                ))),
            }
        };
        let like_z = |name: &str| -> Result<Option<Tensor>> {
            match state.get(name) {
                Some(t) if t.dims() != z.dims() => Err(bad(format!("`{name}` is not like `z`"))),
                other => Ok(other.map(|t| t.to_device(z.device())).transpose()?),
            }
        };
        let count =
            |values: Vec<f64>| -> Vec<usize> { values.iter().map(|v| *v as usize).collect() };
        run.lost = count(of_rows("lost")?);
        run.done = of_rows("done")?.iter().map(|d| *d != 0.0).collect();
        run.best = of_rows("best")?;
        run.best_index = count(of_rows("best_index")?);
        run.kept_index = count(of_rows("kept_index")?);
        run.evaluations = values("evaluations")?.first().map_or(0, |n| *n as usize);
        let table = |name: &str| -> Result<Vec<Vec<f64>>> {
            Ok(values(name)?.chunks(rows).map(<[f64]>::to_vec).collect())
        };
        run.losses = table("losses")?;
        run.norms = table("norms")?;
        let (k, rewards) = (run.losses.len(), reno.rewards.len());
        let rewarded = table("per_reward")?;
        if run.norms.len() != k || rewarded.len() != k * rewards || k > reno.config.iters {
            return Err(bad(format!(
                "{k} iterations of other rewards, or more than there are to be"
            )));
        }
        run.per_reward = rewarded.chunks(rewards).map(<[Vec<f64>]>::to_vec).collect();
        let kept = (
            like_z("best_z")?,
            state.get("best_sample"),
            state.get("initial"),
        );
        match kept {
            (Some(best_z), Some(sample), Some(initial)) if k > 0 => {
                run.kept = Some((best_z, sample.clone()));
                run.initial = Some(initial.clone());
                run.check = GradientCheck::off();
            }
            (None, None, None) if k == 0 => {}
            _ => {
                return Err(bad(
                    "samples without iterations, or iterations without samples".into(),
                ))
            }
        }
        run.update = Update::read(&like_z, &values)?;
        Ok(run)
    }
}

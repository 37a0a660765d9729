//! The optimization.

use super::reward::wide;
use super::{Generator, NoiseOptimizer, RenoConfig, RewardLoss};
use crate::error::{check, Error};
use crate::Result;
use candle_core::{DType, Tensor, Var};
use flows::Condition;
use tensor_core::random::RandomStream;

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
    /// The iteration of each row's best sample.
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
            update: Update::default(),
            lost: vec![0; rows],
            done: vec![false; rows],
            best: vec![f64::INFINITY; rows],
            best_index: vec![0; rows],
            kept: None,
            initial: None,
            losses: Vec::new(),
            per_reward: Vec::new(),
            norms: Vec::new(),
            evaluations: 0,
        })
    }

    /// Samples, losses by reward, and what is minimized, of each row.
    fn evaluate(&self, z: &Tensor, condition: &Condition) -> Result<Evaluation> {
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
        let norm = row_norms(z)?;
        let mut objective = total.clone();
        if self.config.reg_weight > 0.0 {
            let penalty = regularizer(&norm, per_row(z), self.config.reg_weight)?;
            objective = (&objective + penalty.to_dtype(objective.dtype())?)?;
        }
        Ok(Evaluation {
            sample: sample.detach(),
            loss: numbers(&total)?,
            per_reward,
            norms: numbers(&norm)?,
            objective,
        })
    }

    /// An evaluation with the gradient of what is minimized.
    fn differentiate(&self, z: &Tensor, condition: &Condition) -> Result<(Evaluation, Tensor)> {
        let at = Var::from_tensor(z)?;
        let found = self.evaluate(at.as_tensor(), condition)?;
        let grads = found.objective.sum_all()?.backward()?;
        let g = grads.get(&at).ok_or_else(|| {
            tensor_core::Error::LostGradient(
                vec!["the noise, through generator and rewards".into()],
            )
        })?;
        let g = g.detach();
        Ok((found, g))
    }
}

struct Evaluation {
    sample: Tensor,
    loss: Vec<f64>,
    per_reward: Vec<Vec<f64>>,
    norms: Vec<f64>,
    /// `[rows]`, with its graph.
    objective: Tensor,
}

/// `weight (|z|^2 / 2 - (d - 1) ln |z|)` of norms `[rows]` of rows of `d` numbers: the negative
/// logarithm of the density of a normal vector's radius, up to a constant.
///
/// # Errors
/// Those of candle.
pub(super) fn regularizer(norm: &Tensor, d: usize, weight: f64) -> Result<Tensor> {
    let log = norm.log()?.affine(weight * (d as f64 - 1.0), 0.0)?;
    Ok((norm.sqr()?.affine(0.5 * weight, 0.0)? - log)?)
}

fn per_row(z: &Tensor) -> usize {
    z.elem_count() / z.dims()[0]
}

/// Norms of the rows, `[rows]`.
fn row_norms(x: &Tensor) -> Result<Tensor> {
    Ok(wide(x)?.sqr()?.flatten_from(1)?.sum(1)?.sqrt()?)
}

fn numbers(x: &Tensor) -> Result<Vec<f64>> {
    Ok(x.detach().to_dtype(DType::F64)?.to_vec1()?)
}

/// Numbers of the rows as a column that is broadcast over `like`.
fn column(values: Vec<f64>, like: &Tensor) -> Result<Tensor> {
    let mut shape = vec![1; like.rank()];
    shape[0] = values.len();
    let column = Tensor::from_vec(values, shape, like.device())?;
    Ok(column.to_dtype(like.dtype())?)
}

/// Products of the rows of two tensors.
fn row_dots(a: &Tensor, b: &Tensor) -> Result<Vec<f64>> {
    numbers(&(a * b)?.flatten_from(1)?.sum(1)?)
}

/// A run in progress.
pub struct RenoRun<'r, 'a> {
    reno: &'r Reno<'a>,
    condition: Condition,
    z: Tensor,
    update: Update,
    lost: Vec<usize>,
    done: Vec<bool>,
    best: Vec<f64>,
    best_index: Vec<usize>,
    /// The best noise and samples.
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
                let (found, g) = self.reno.differentiate(&self.z, &self.condition)?;
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
        let (z, sample) = (self.z.clone(), found.sample.clone());
        self.kept = Some(match self.kept.take() {
            None => (z, sample),
            Some((best_z, best_sample)) => (
                choose(&better, &z, &best_z)?,
                choose(&better, &sample, &best_sample)?,
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
                let objective = numbers(&found.objective)?;
                let limits = (max_iter, history, rate);
                self.lbfgs(limits, objective, g)?
            }
            simple => {
                let squares = row_dots(&g, &g)?;
                // A row without a finite gradient stays where it is, and its moments with it.
                let held: Vec<bool> = squares.iter().map(|s| !s.is_finite()).collect();
                let clip = |square: &f64| match square.is_finite() {
                    true => (config.grad_clip / (square.sqrt() + 1e-6)).min(1.0),
                    false => 0.0,
                };
                let factor = column(squares.iter().map(clip).collect(), &g)?;
                let clean = choose(&held, &g.zeros_like()?, &g)?;
                let clipped = clean.broadcast_mul(&factor)?;
                let change = self.update.change(simple, &clipped, rate, &held)?;
                (&self.z - choose(&held, &g.zeros_like()?, &change)?)?
            }
        };
        self.z = choose(&self.done, &self.z, &next)?.detach();
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
        for _ in 0..max_iter {
            let direction = self.update.two_loop(&g)?;
            let slope = row_dots(&g, &direction)?;
            let mut length: Vec<f64> = match self.update.pairs.is_empty() {
                true => row_dots(&g, &g)?
                    .iter()
                    .map(|s| rate / s.sqrt().max(1e-12))
                    .collect(),
                false => vec![1.0; slope.len()],
            };
            for (t, s) in length.iter_mut().zip(&slope) {
                // Uphill, or no number at all: this row stays.
                if !(s.is_finite() && *s < 0.0) {
                    *t = 0.0;
                }
            }
            let mut accepted = false;
            for _ in 0..HALVINGS {
                let trial = (&z + direction.broadcast_mul(&column(length.clone(), &z)?)?)?;
                let found = self.reno.evaluate(&trial, &self.condition)?;
                self.evaluations += value.len();
                let new = numbers(&found.objective)?;
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
                let new = numbers(&self.reno.evaluate(&trial, &self.condition)?.objective)?;
                self.evaluations += value.len();
                for (i, t) in length.iter_mut().enumerate() {
                    if new[i].is_nan() || new[i] > value[i] + 1e-4 * *t * slope[i] {
                        *t = 0.0;
                    }
                }
            }
            if length.iter().all(|t| *t == 0.0) {
                break;
            }
            let next = (&z + direction.broadcast_mul(&column(length, &z)?)?)?.detach();
            let (found, next_g) = self.reno.differentiate(&next, &self.condition)?;
            self.evaluations += value.len();
            self.update.remember(&next, &z, &next_g, &g, history)?;
            value = numbers(&found.objective)?;
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
            best_index: self.best_index,
            evaluations: self.evaluations,
        })
    }
}

/// The rows of `yes` where the flag is set, those of `no` elsewhere.
fn choose(flags: &[bool], yes: &Tensor, no: &Tensor) -> Result<Tensor> {
    if flags.iter().all(|f| !*f) {
        return Ok(no.clone());
    }
    if flags.iter().all(|f| *f) {
        return Ok(yes.clone());
    }
    let mut shape = vec![1; no.rank()];
    shape[0] = flags.len();
    let flags: Vec<u8> = flags.iter().map(|f| u8::from(*f)).collect();
    let flags = Tensor::from_vec(flags, shape, no.device())?;
    Ok(flags.broadcast_as(no.shape())?.where_cond(yes, no)?)
}

/// What optimizers remember.
#[derive(Default)]
struct Update {
    first: Option<Tensor>,
    second: Option<Tensor>,
    steps: i32,
    /// Steps and changes of the gradient, newest last, with `1 / <s, y>` of the rows.
    pairs: Vec<(Tensor, Tensor, Vec<f64>)>,
}

impl Update {
    /// The step along a clipped gradient.
    fn change(
        &mut self,
        rule: NoiseOptimizer,
        g: &Tensor,
        rate: f64,
        held: &[bool],
    ) -> Result<Tensor> {
        const BETA1: f64 = 0.9;
        const BETA2: f64 = 0.999;
        let mix = |old: &Option<Tensor>, new: &Tensor, keep: f64, add: f64| -> Result<Tensor> {
            let fresh = new.affine(add, 0.0)?;
            match old {
                Some(old) => choose(held, old, &(old.affine(keep, 0.0)? + fresh)?),
                None => Ok(fresh),
            }
        };
        self.steps += 1;
        match rule {
            NoiseOptimizer::Adam { eps } => {
                let m = mix(&self.first, g, BETA1, 1.0 - BETA1)?;
                let v = mix(&self.second, &g.sqr()?, BETA2, 1.0 - BETA2)?;
                let grown = |beta: f64| 1.0 - beta.powi(self.steps);
                let root = v
                    .affine(1.0 / grown(BETA2), 0.0)?
                    .sqrt()?
                    .affine(1.0, eps)?;
                let change = (m.affine(rate / grown(BETA1), 0.0)? / root)?;
                (self.first, self.second) = (Some(m.detach()), Some(v.detach()));
                Ok(change)
            }
            NoiseOptimizer::Sgd { momentum, nesterov } => {
                let b = mix(&self.first, g, momentum, 1.0)?;
                let step = match nesterov {
                    true => (g + b.affine(momentum, 0.0)?)?,
                    false => b.clone(),
                };
                self.first = Some(b.detach());
                Ok(step.affine(rate, 0.0)?)
            }
            NoiseOptimizer::Lbfgs { .. } => Err(Error::unsupported(
                "a single clipped step of L-BFGS",
                "it makes its own steps",
            )),
        }
    }

    /// `-H g` by the two loops over the remembered pairs.
    fn two_loop(&self, g: &Tensor) -> Result<Tensor> {
        let mut q = g.clone();
        let mut factors = Vec::new();
        for (s, y, inverse) in self.pairs.iter().rev() {
            let a: Vec<f64> = row_dots(s, &q)?
                .iter()
                .zip(inverse)
                .map(|(d, r)| d * r)
                .collect();
            q = (&q - y.broadcast_mul(&column(a.clone(), &q)?)?)?;
            factors.push(a);
        }
        if let Some((_, y, inverse)) = self.pairs.last() {
            let squares = row_dots(y, y)?;
            // Rows without curvature keep the plain gradient.
            let scale = |(r, yy): (&f64, &f64)| if *r > 0.0 { 1.0 / (r * yy) } else { 1.0 };
            q = q.broadcast_mul(&column(
                inverse.iter().zip(&squares).map(scale).collect(),
                &q,
            )?)?;
        }
        for ((s, y, inverse), a) in self.pairs.iter().zip(factors.iter().rev()) {
            let b = row_dots(y, &q)?;
            let c: Vec<f64> = (0..a.len()).map(|i| a[i] - b[i] * inverse[i]).collect();
            q = (&q + s.broadcast_mul(&column(c, &q)?)?)?;
        }
        Ok(q.neg()?)
    }

    fn remember(
        &mut self,
        next: &Tensor,
        z: &Tensor,
        next_g: &Tensor,
        g: &Tensor,
        history: usize,
    ) -> Result<()> {
        let (s, y) = ((next - z)?, (next_g - g)?);
        // A pair without positive curvature (or of a row that stayed) is left out for its row.
        let inverse = |d: &f64| {
            if d.is_finite() && *d > 1e-10 {
                1.0 / d
            } else {
                0.0
            }
        };
        let inverse = row_dots(&s, &y)?.iter().map(inverse).collect();
        self.pairs.push((s, y, inverse));
        if self.pairs.len() > history {
            self.pairs.remove(0);
        }
        Ok(())
    }
}

/// The best of several draws.
#[derive(Debug, Clone)]
pub struct BestOf {
    /// The noise of the best samples.
    pub z: Tensor,
    /// The best samples.
    pub sample: Tensor,
    /// Their weighted losses.
    pub loss: Vec<f64>,
}

/// What one would do without gradients: for each row, the best of `n` independent draws.
///
/// # Errors
/// [`Error::InvalidConfig`] for `n = 0`; those of generator and rewards; [`Error::NonFinite`] for a
/// row none of whose draws has a loss.
pub fn best_of_n(
    generator: &dyn Generator,
    rewards: &[(f64, &dyn RewardLoss)],
    like: &Tensor,
    condition: &Condition,
    n: usize,
    rng: &mut RandomStream,
) -> Result<BestOf> {
    check::require(n > 0, "best_of_n::n", n, "at least 1")?;
    let config = RenoConfig {
        iters: 1,
        reg_weight: 0.0,
        ..RenoConfig::default()
    };
    let reno = Reno::new(generator, rewards.to_vec(), config)?;
    let mut best: Option<BestOf> = None;
    for _ in 0..n {
        let z = rng.normal(0.0, 1.0, like.shape(), like.dtype(), like.device())?;
        let condition = condition.for_rows(like.dims().first().copied().unwrap_or(0))?;
        let found = reno.evaluate(&z, &condition)?;
        best = Some(match best {
            None => BestOf {
                z,
                sample: found.sample,
                loss: found.loss,
            },
            Some(old) => {
                let pairs = found.loss.iter().zip(&old.loss);
                let better: Vec<bool> = pairs.map(|(a, b)| a < b || b.is_nan()).collect();
                let loss = (0..better.len())
                    .map(|i| {
                        if better[i] {
                            found.loss[i]
                        } else {
                            old.loss[i]
                        }
                    })
                    .collect();
                BestOf {
                    z: choose(&better, &z, &old.z)?,
                    sample: choose(&better, &found.sample, &old.sample)?,
                    loss,
                }
            }
        });
    }
    let best = best.ok_or_else(|| Error::argument("n", n, "at least 1"))?;
    match best.loss.iter().position(|l| !l.is_finite()) {
        None => Ok(best),
        Some(row) => Err(Error::NonFinite {
            rule: "best of n",
            what: format!("every loss of row {row}"),
            step: n,
        }),
    }
}

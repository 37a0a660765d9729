//! Particles that drift to their consensus and diffuse.

use super::config::{Acceptance, BatchUpdate, Bounds, BoundsRule, CboConfig, Diffusion, Memory};
use super::noise::{NoiseRequest, NoiseSource, Purpose};
use super::objective::{finite_difference_gradients, rows, Objective};
use super::point::{alpha_for, effective, host, tensor_on, weighted_mean, weights};
use crate::fused::{counters, part, read_counters, State};
use crate::{Error, RandomStream, Result};
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use tensor_core::checkpoint::{expect_state, TensorSpec};
use tensor_core::random::RandomState;

/// What a step tells about itself.
#[derive(Debug, Clone)]
pub struct StepReport {
    /// The consensus point `[d]` that the particles moved towards (the last batch's).
    pub consensus: Tensor,
    /// The lowest energy seen so far.
    pub best: f64,
    /// Root mean square distance of the particles from the consensus, before the step.
    pub spread: f64,
    /// Effective number of particles in the consensus: 1 where one particle has all the weight.
    pub effective: f64,
    /// Evaluations of the objective so far, those for finite differences included.
    pub evaluations: u64,
}

/// Why [`Cbo::run`] ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// All steps were made.
    Steps,
    /// Another step would exceed the evaluations.
    Evaluations,
    /// The particles agree.
    Spread,
    /// A particle's energy is low enough.
    Energy,
}

/// What [`Cbo::run`] found.
#[derive(Debug, Clone)]
pub struct RunReport {
    /// The consensus of the final particles, `[d]`.
    pub consensus: Tensor,
    /// The consensus points that the steps used, `[steps, d]`; none for no steps.
    pub trajectory: Option<Tensor>,
    /// The best particle that was ever evaluated, `[d]`.
    pub best: Tensor,
    /// Its energy.
    pub best_energy: f64,
    /// Steps made.
    pub steps: usize,
    /// Evaluations of the objective.
    pub evaluations: u64,
    /// Why it ended.
    pub stopped: Stop,
}

/// What the particles remember.
#[derive(Debug, Clone)]
struct Memories {
    y: Vec<f64>,
    energies: Option<Vec<f64>>,
}

/// Consensus-based optimization; see the [module](super) page.
#[derive(Debug)]
pub struct Cbo<S = RandomStream> {
    config: CboConfig,
    noise: S,
    d: usize,
    dtype: DType,
    device: Device,
    v: Vec<f64>,
    memories: Option<Memories>,
    sigma: f64,
    alpha: f64,
    best: Option<(f64, Vec<f64>)>,
    last_consensus: Vec<f64>,
    steps: usize,
    /// Batches of particles so far: the index of the next noise.
    moves: usize,
    epochs: usize,
    evaluations: u64,
    variance: Option<f64>,
    buffer: Vec<f64>,
}

/// The consensus of a step and what it was made of.
struct Meeting {
    point: Vec<f64>,
    effective: f64,
}

impl<S: NoiseSource> Cbo<S> {
    /// Particles `[N, d]` (their dtype and device are what the objective gets).
    ///
    /// # Errors
    /// Those of [`CboConfig::validate`]; [`Error::Shape`]; [`Error::TooFew`] for a single particle,
    /// which would never move; [`Error::InvalidArgument`] for positions that are not finite or
    /// bounds of another dimension.
    pub fn new(particles: &Tensor, config: CboConfig, noise: S) -> Result<Self> {
        config.validate()?;
        let (n, d) = rows(particles)?;
        if n < 2 {
            return Err(Error::TooFew {
                what: "consensus-based optimization",
                of: "particles",
                needed: 2,
                got: n,
            });
        }
        if !particles.dtype().is_float() {
            let (tensor, got) = ("particles".to_string(), particles.dtype());
            let expected = "a floating-point dtype".to_string();
            return Err(Error::DType {
                tensor,
                got,
                expected,
            });
        }
        if let Some(bounds) = &config.bounds {
            check_bounds(bounds, d)?;
        }
        let v = host(particles)?;
        if let Some(bad) = v.iter().find(|x| !x.is_finite()) {
            return Err(Error::argument("particles", bad, "finite positions"));
        }
        if !config.contracts(d) {
            // Many runs of one setting are usual: said once.
            static SAID: std::sync::Once = std::sync::Once::new();
            let (lambda, sigma) = (config.lambda, config.sigma);
            SAID.call_once(|| {
                tracing::warn!(
                    d,
                    lambda,
                    sigma,
                    "the noise outweighs the drift: particles may never agree"
                );
            });
        }
        if v.chunks_exact(d).all(|row| row == &v[..d]) && config.stall_kick.is_none() {
            tracing::warn!("all particles are in one place and will stay there");
        }
        let memory = |v: &Vec<f64>| Memories {
            y: v.clone(),
            energies: None,
        };
        Ok(Self {
            memories: config.memory.is_some().then(|| memory(&v)),
            sigma: config.sigma,
            alpha: config.alpha,
            last_consensus: vec![0.0; d],
            noise,
            d,
            dtype: particles.dtype(),
            device: particles.device().clone(),
            v,
            best: None,
            steps: 0,
            moves: 0,
            epochs: 0,
            evaluations: 0,
            variance: None,
            buffer: Vec::new(),
            config,
        })
    }

    /// Number of particles.
    pub fn len(&self) -> usize {
        self.v.len() / self.d
    }

    /// Never true: there are at least two particles.
    pub fn is_empty(&self) -> bool {
        self.v.is_empty()
    }

    /// The particles `[N, d]`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn particles(&self) -> Result<Tensor> {
        self.tensor(&self.v)
    }

    /// The memories `[N, d]`, where particles have them.
    ///
    /// # Errors
    /// Those of candle.
    pub fn memories(&self) -> Result<Option<Tensor>> {
        self.memories
            .as_ref()
            .map(|m| self.tensor(&m.y))
            .transpose()
    }

    /// The present `sigma` and `alpha`, after any cooling (and any choice of `alpha` by the
    /// effective number).
    pub fn temperature(&self) -> (f64, f64) {
        (self.sigma, self.alpha)
    }

    /// Steps made.
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// Forgets the energies of the memories, so that the next step evaluates them again: for an
    /// objective that has changed.
    pub fn forget_energies(&mut self) {
        if let Some(memories) = &mut self.memories {
            memories.energies = None;
        }
    }

    fn tensor(&self, rows: &[f64]) -> Result<Tensor> {
        tensor_on(
            rows,
            &[rows.len() / self.d, self.d],
            self.dtype,
            &self.device,
        )
    }

    /// The numbers of some particles, or of all memories.
    fn rows(&self, rows: Rows) -> &[f64] {
        match (rows, &self.memories) {
            (Rows::Memories, Some(memories)) => &memories.y,
            (Rows::Range(from, count), _) => &self.v[from * self.d..(from + count) * self.d],
            _ => &self.v,
        }
    }

    fn evaluate(&mut self, objective: &dyn Objective, rows: Rows) -> Result<Vec<f64>> {
        let values = objective.values(&self.tensor(self.rows(rows))?)?;
        self.accept(&values, rows)
    }

    /// The energies of `rows` from the objective's answer.
    fn accept(&mut self, values: &Tensor, rows: Rows) -> Result<Vec<f64>> {
        let count = self.rows(rows).len() / self.d;
        if values.elem_count() != count {
            let expected = format!("[{count}]");
            let dims = values.dims();
            return Err(Error::shape("values of the objective", dims, expected));
        }
        let energies = host(values)?;
        self.evaluations += count as u64;
        let finite = |(_, e): &(usize, &f64)| e.is_finite();
        let lowest = energies.iter().enumerate().filter(finite);
        if let Some((i, e)) = lowest.min_by(|a, b| a.1.total_cmp(b.1)) {
            if self.best.as_ref().is_none_or(|best| *e < best.0) {
                let row = self.rows(rows)[i * self.d..(i + 1) * self.d].to_vec();
                self.best = Some((*e, row));
            }
        }
        Ok(energies)
    }

    fn meet(&mut self, rows: Rows, energies: &[f64]) -> Result<Meeting> {
        if let Some(fraction) = self.config.effective_fraction {
            self.alpha = alpha_for(energies, fraction)?;
        }
        let w = weights(energies, self.alpha)?;
        Ok(Meeting {
            point: weighted_mean(self.rows(rows), &w, self.d),
            effective: effective(&w),
        })
    }

    fn spread(&self, point: &[f64]) -> f64 {
        let squares: f64 = self
            .v
            .chunks_exact(self.d)
            .map(|row| distance(row, point).powi(2))
            .sum();
        (squares / self.len() as f64).sqrt()
    }

    fn report(&self, meeting: &Meeting, spread: f64) -> Result<StepReport> {
        Ok(StepReport {
            consensus: tensor_on(&meeting.point, &[self.d], self.dtype, &self.device)?,
            best: self.best.as_ref().map_or(f64::INFINITY, |b| b.0),
            spread,
            effective: meeting.effective,
            evaluations: self.evaluations,
        })
    }

    /// One step; with [`CboConfig::batching`], over all batches of particles.
    ///
    /// # Errors
    /// [`Error::NonFiniteLoss`] when no energy of a batch is finite; those of the objective and of
    /// the noise. Where the very first evaluation fails, nothing has changed.
    pub fn step(&mut self, objective: &dyn Objective) -> Result<StepReport> {
        if self.config.batching.is_some() {
            return self.batched_step(objective);
        }
        let energies = self.present_energies(objective)?;
        let report = self.advance(&energies, objective)?;
        if self.memories.is_some() {
            let positions = self.evaluate(objective, Rows::All)?;
            self.remember(&positions);
        }
        Ok(report)
    }

    /// Energies of what the consensus is taken over: the memories, cached, or the particles.
    fn present_energies(&mut self, objective: &dyn Objective) -> Result<Vec<f64>> {
        let Some(memories) = &self.memories else {
            return self.evaluate(objective, Rows::All);
        };
        if let Some(known) = &memories.energies {
            return Ok(known.clone());
        }
        let energies = self.evaluate(objective, Rows::Memories)?;
        if let Some(memories) = &mut self.memories {
            memories.energies = Some(energies.clone());
        }
        Ok(energies)
    }

    /// What the consensus is taken over.
    fn remembered(&self) -> Rows {
        match self.memories {
            Some(_) => Rows::Memories,
            None => Rows::All,
        }
    }

    /// Moves all particles, given the energies of what the consensus is taken over.
    fn advance(&mut self, energies: &[f64], objective: &dyn Objective) -> Result<StepReport> {
        let meeting = self.meet(self.remembered(), energies)?;
        let spread = self.spread(&meeting.point);
        let report = self.report(&meeting, spread)?;
        if let Some(memory) = self.config.memory {
            self.move_with_memory(&meeting.point, memory)?;
        } else {
            self.move_rows(&meeting.point, 0, self.len())?;
        }
        self.gradient_drift(objective)?;
        self.keep_inside();
        self.steps += 1;
        self.moves += 1;
        Ok(report)
    }

    fn draw(&mut self, purpose: Purpose, first_row: usize, count: usize) -> Result<Vec<f64>> {
        let mut noise = std::mem::take(&mut self.buffer);
        noise.resize(count * self.d, 0.0);
        let request = NoiseRequest {
            purpose,
            index: self.moves,
            first_row,
            columns: self.d,
        };
        self.noise.normals(request, &mut noise)?;
        Ok(noise)
    }

    /// Drift to the consensus and diffusion around it, of `count` particles.
    fn move_rows(&mut self, point: &[f64], from: usize, count: usize) -> Result<()> {
        let drift = self.config.lambda * self.config.dt;
        let kind = self.config.diffusion;
        let noisy = kind != Diffusion::None && self.sigma != 0.0;
        let noise = match noisy {
            true => self.draw(Purpose::Diffusion, from, count)?,
            false => Vec::new(),
        };
        let scale = self.sigma * self.config.dt.sqrt();
        let bound = self.config.truncation.unwrap_or(f64::INFINITY);
        let d = self.d;
        let rows = &mut self.v[from * d..(from + count) * d];
        for_rows(rows, &noise, d, |row, noise| {
            row.iter_mut()
                .zip(point)
                .for_each(|(x, c)| *x -= drift * (*x - c));
            diffuse(row, point, noise, scale, bound, kind);
        });
        self.buffer = noise;
        Ok(())
    }

    /// As [`move_rows`](Self::move_rows), with drift to and diffusion around the memories after it.
    fn move_with_memory(&mut self, point: &[f64], memory: Memory) -> Result<()> {
        let n = self.len();
        let mut second = vec![0.0; n * self.d];
        if memory.sigma2 != 0.0 && memory.diffusion2 != Diffusion::None {
            let request = NoiseRequest {
                purpose: Purpose::MemoryDiffusion,
                index: self.moves,
                first_row: 0,
                columns: self.d,
            };
            self.noise.normals(request, &mut second)?;
        }
        let noisy = self.sigma != 0.0 && self.config.diffusion != Diffusion::None;
        let first = match noisy {
            true => self.draw(Purpose::Diffusion, 0, n)?,
            false => vec![0.0; n * self.d],
        };
        let Some(memories) = &self.memories else {
            return Ok(());
        };
        let (config, d, sigma) = (&self.config, self.d, self.sigma);
        let root = config.dt.sqrt();
        let bound = config.truncation.unwrap_or(f64::INFINITY);
        let own = memories.y.chunks_exact(d);
        let noises = first.chunks_exact(d).zip(second.chunks_exact(d));
        for ((row, y), (one, two)) in self.v.chunks_exact_mut(d).zip(own).zip(noises) {
            for (j, x) in row.iter_mut().enumerate() {
                *x -= config.lambda * config.dt * (*x - point[j]);
                *x -= memory.lambda2 * config.dt * (*x - y[j]);
            }
            diffuse(row, point, one, sigma * root, bound, config.diffusion);
            let around = memory.sigma2 * root;
            diffuse(row, y, two, around, bound, memory.diffusion2);
        }
        self.buffer = first;
        Ok(())
    }

    fn gradient_drift(&mut self, objective: &dyn Objective) -> Result<()> {
        let Some(drift) = self.config.gradient_drift else {
            return Ok(());
        };
        let particles = self.particles()?;
        let grads = match objective.gradients(&particles)? {
            Some(grads) => grads,
            None => {
                self.evaluations += 2 * self.v.len() as u64;
                finite_difference_gradients(objective, &particles, drift.fd_step)?
            }
        };
        if grads.dims() != particles.dims() {
            let expected = format!("{:?}", particles.dims());
            return Err(Error::shape(
                "gradients of the objective",
                grads.dims(),
                expected,
            ));
        }
        let step = drift.gamma * drift.learning_rate * self.config.dt;
        for (x, g) in self.v.iter_mut().zip(host(&grads)?) {
            // A particle at a point without a gradient is moved by the others.
            if g.is_finite() {
                *x -= step * g;
            }
        }
        Ok(())
    }

    fn keep_inside(&mut self) {
        let Some(bounds) = &self.config.bounds else {
            return;
        };
        let end = |ends: &[f64], j: usize| ends[j % ends.len()];
        for row in self.v.chunks_exact_mut(self.d) {
            for (j, x) in row.iter_mut().enumerate() {
                let (low, high) = (end(&bounds.low, j), end(&bounds.high, j));
                if bounds.rule == BoundsRule::Reflect {
                    if *x < low {
                        *x = 2.0 * low - *x;
                    } else if *x > high {
                        *x = 2.0 * high - *x;
                    }
                }
                *x = x.clamp(low, high);
            }
        }
    }

    /// Lets the memories take over positions whose energies are these.
    fn remember(&mut self, positions: &[f64]) {
        let (Some(memory), Some(memories)) = (self.config.memory, &mut self.memories) else {
            return;
        };
        let Some(energies) = &mut memories.energies else {
            return;
        };
        let d = self.d;
        let rows = memories.y.chunks_exact_mut(d).zip(self.v.chunks_exact(d));
        let mut moved = false;
        for ((y, x), (ey, ex)) in rows.zip(energies.iter_mut().zip(positions)) {
            match memory.acceptance {
                Acceptance::Heaviside => {
                    let better = *ex < *ey || (ey.is_nan() && !ex.is_nan());
                    if better {
                        y.copy_from_slice(x);
                        *ey = *ex;
                    }
                }
                Acceptance::Tanh(beta) => {
                    let gain = *ey - *ex;
                    let share = if gain.is_nan() {
                        f64::from(u8::from(ey.is_nan() && !ex.is_nan()))
                    } else {
                        (1.0 + (beta * gain).tanh()) / 2.0
                    };
                    let rate = memory.kappa * self.config.dt * share;
                    y.iter_mut().zip(x).for_each(|(y, x)| *y += rate * (x - *y));
                    moved = true;
                }
            }
        }
        if moved {
            // They lie between points whose energies are known.
            memories.energies = None;
        }
    }

    fn batched_step(&mut self, objective: &dyn Objective) -> Result<StepReport> {
        let Some(batching) = self.config.batching else {
            return Err(Error::config("CboConfig::batching", "None", "batches"));
        };
        let n = self.len();
        if self.variance.is_none() {
            self.variance = Some(variance(&self.v, self.d));
        }
        let order = self.noise.permutation(self.steps, n)?;
        let mut permuted = Vec::with_capacity(self.v.len());
        for i in order {
            let i = i as usize;
            permuted.extend_from_slice(&self.v[i * self.d..(i + 1) * self.d]);
        }
        self.v = permuted;
        let mut report = None;
        for from in (0..n).step_by(batching.particles) {
            let count = batching.particles.min(n - from);
            let rows = Rows::Range(from, count);
            let energies = self.evaluate(objective, rows)?;
            let meeting = self.meet(rows, &energies)?;
            let spread = self.spread(&meeting.point);
            report = Some(self.report(&meeting, spread)?);
            match batching.update {
                BatchUpdate::Full => self.move_rows(&meeting.point, 0, n)?,
                BatchUpdate::Partial => self.move_rows(&meeting.point, from, count)?,
            }
            self.kick(&meeting.point)?;
            self.keep_inside();
            self.last_consensus = meeting.point;
            self.moves += 1;
        }
        self.steps += 1;
        report.ok_or_else(|| Error::argument("particles", n, "at least 1"))
    }

    /// Noise for all particles where the consensus has stalled.
    fn kick(&mut self, point: &[f64]) -> Result<()> {
        let Some(threshold) = self.config.stall_kick else {
            return Ok(());
        };
        let moved = point
            .iter()
            .zip(&self.last_consensus)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f64::max);
        if moved >= threshold {
            return Ok(());
        }
        let noise = self.draw(Purpose::Kick, 0, self.len())?;
        let scale = self.sigma * self.config.dt.sqrt();
        self.v
            .iter_mut()
            .zip(&noise)
            .for_each(|(x, xi)| *x += scale * xi);
        self.buffer = noise;
        tracing::debug!(moved, "the consensus has stalled: all particles kicked");
        Ok(())
    }

    /// Cools and removes particles, as the configuration says, at the end of a pass over the data.
    ///
    /// # Errors
    /// Those of the noise.
    pub fn end_epoch(&mut self) -> Result<()> {
        self.epochs += 1;
        if let Some(cooling) = self.config.cooling {
            let e = self.epochs as f64;
            if cooling.sigma {
                self.sigma *= (e + 1.0).log2() / (e + 2.0).log2();
            }
            self.alpha *= cooling.alpha_factor;
        }
        let before = self.variance.take();
        if let (Some(speed), Some(before)) = (self.config.particle_reduction, before) {
            self.reduce(speed, before)?;
        }
        Ok(())
    }

    /// Keeps a random part of the particles, by how much the variance has shrunk.
    fn reduce(&mut self, speed: f64, before: f64) -> Result<()> {
        let after = variance(&self.v, self.d);
        if before <= 0.0 {
            return Ok(());
        }
        let factor = (speed * after + (1.0 - speed) * before) / before;
        let factor = factor.clamp(1.0 - speed, 1.0);
        let unit = self.config.batching.map_or(1, |b| b.particles);
        let n = self.len();
        let batches = (n as f64 / unit as f64 * factor).ceil() as usize;
        let keep = (batches * unit).clamp(2, n);
        if keep < n {
            let order = self.noise.permutation(self.steps, n)?;
            let mut kept = Vec::with_capacity(keep * self.d);
            for i in order.into_iter().take(keep) {
                let i = i as usize;
                kept.extend_from_slice(&self.v[i * self.d..(i + 1) * self.d]);
            }
            self.v = kept;
            if let Some(memories) = &mut self.memories {
                // Which memory belonged to whom is gone with the others.
                memories.y = self.v.clone();
                memories.energies = None;
            }
            tracing::debug!(from = n, to = keep, "fewer particles");
        }
        Ok(())
    }

    /// The consensus `[d]` of the present particles (or memories), evaluated anew where their
    /// energies are not known.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn consensus(&mut self, objective: &dyn Objective) -> Result<Tensor> {
        let energies = self.present_energies(objective)?;
        let meeting = self.meet(self.remembered(), &energies)?;
        tensor_on(&meeting.point, &[self.d], self.dtype, &self.device)
    }

    /// The best particle that was ever evaluated `[d]`, with its energy.
    ///
    /// # Errors
    /// Those of candle.
    pub fn best(&self) -> Result<Option<(Tensor, f64)>> {
        let one = |(e, row): &(f64, Vec<f64>)| {
            let row = tensor_on(row, &[self.d], self.dtype, &self.device)?;
            Ok((row, *e))
        };
        self.best.as_ref().map(one).transpose()
    }

    fn evaluations_per_step(&self) -> u64 {
        let n = self.len() as u64;
        let fd = self.config.gradient_drift.map_or(0, |_| 2 * self.d as u64);
        let memories = match &self.memories {
            Some(memories) if memories.energies.is_none() => 1,
            _ => 0,
        };
        n * (1 + fd + memories)
    }

    /// Steps until the first of the configuration's limits.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn run(&mut self, objective: &dyn Objective) -> Result<RunReport> {
        let mut trajectory = Vec::new();
        let mut stopped = Stop::Steps;
        while trajectory.len() < self.config.max_steps {
            let next = self.evaluations + self.evaluations_per_step();
            if self
                .config
                .max_evaluations
                .is_some_and(|limit| next > limit)
            {
                stopped = Stop::Evaluations;
                break;
            }
            let report = self.step(objective)?;
            trajectory.push(report.consensus);
            if self.config.target_energy.is_some_and(|e| report.best <= e) {
                stopped = Stop::Energy;
                break;
            }
            if report.spread <= self.config.tol {
                stopped = Stop::Spread;
                break;
            }
        }
        let consensus = self.consensus(objective)?;
        let (best, best_energy) = match self.best()? {
            Some(found) => found,
            None => (consensus.clone(), f64::INFINITY),
        };
        Ok(RunReport {
            consensus,
            steps: trajectory.len(),
            trajectory: match trajectory.is_empty() {
                true => None,
                false => Some(Tensor::stack(&trajectory, 0)?),
            },
            best,
            best_energy,
            evaluations: self.evaluations,
            stopped,
        })
    }
}

impl Cbo<RandomStream> {
    /// Everything that a later run needs to continue with the same bits; not the configuration.
    ///
    /// # Errors
    /// Those of candle.
    pub fn state(&self) -> Result<State> {
        let double =
            |rows: &[f64], shape: &[usize]| tensor_on(rows, shape, DType::F64, &Device::Cpu);
        let shape = [self.len(), self.d];
        let mut state = State::new();
        state.insert("v".into(), double(&self.v, &shape)?);
        if let Some(memories) = &self.memories {
            state.insert("y".into(), double(&memories.y, &shape)?);
            if let Some(energies) = &memories.energies {
                state.insert("y_energies".into(), double(energies, &[self.len()])?);
            }
        }
        if let Some((energy, row)) = &self.best {
            state.insert("best".into(), double(row, &[self.d])?);
            state.insert("best_energy".into(), double(&[*energy], &[1])?);
        }
        let last = double(&self.last_consensus, &[self.d])?;
        state.insert("last_consensus".into(), last);
        let variance = self.variance.unwrap_or(f64::NAN);
        let numbers = [self.sigma, self.alpha, variance];
        state.insert("numbers".into(), double(&numbers, &[3])?);
        let counts = [
            self.steps as u64,
            self.moves as u64,
            self.epochs as u64,
            self.evaluations,
        ];
        state.insert("counts".into(), counters(&counts)?);
        state.insert("random".into(), self.noise.state().to_tensor()?);
        Ok(state)
    }

    /// Restores what [`state`](Self::state) returned.
    ///
    /// # Errors
    /// A list of everything that is missing, unexpected or of another shape; nothing is changed
    /// then.
    pub fn load_state(&mut self, state: &State) -> Result<()> {
        let n = part(state, "v")?.dims().first().copied().unwrap_or(0);
        let f = DType::F64;
        let mut expected = vec![
            TensorSpec::from(("v", &[n, self.d][..], f)),
            TensorSpec::from(("last_consensus", &[self.d][..], f)),
            TensorSpec::from(("numbers", &[3][..], f)),
            TensorSpec::from(("counts", &[4][..], DType::I64)),
            TensorSpec::from(("random", &[40][..], DType::U8)),
        ];
        if self.config.memory.is_some() {
            expected.push(TensorSpec::from(("y", &[n, self.d][..], f)));
        }
        for (name, shape) in [("y_energies", n), ("best", self.d), ("best_energy", 1)] {
            if state.contains_key(name) {
                expected.push(TensorSpec::from((name, &[shape][..], f)));
            }
        }
        expect_state(state, expected)?;
        let noise = RandomState::from_tensor(part(state, "random")?)?;
        let [steps, moves, epochs, evaluations] = read_counters(part(state, "counts")?)?;
        let read = |name: &str| host(part(state, name)?);
        let optional = |name: &str| state.get(name).map(host).transpose();
        let (v, numbers, last) = (read("v")?, read("numbers")?, read("last_consensus")?);
        let memories = match self.config.memory {
            Some(_) => Some(Memories {
                y: read("y")?,
                energies: optional("y_energies")?,
            }),
            None => None,
        };
        let best = optional("best")?.zip(optional("best_energy")?);
        self.best = best.map(|(row, energy)| (energy[0], row));
        (self.v, self.memories, self.last_consensus) = (v, memories, last);
        (self.sigma, self.alpha) = (numbers[0], numbers[1]);
        self.variance = Some(numbers[2]).filter(|x| !x.is_nan());
        (self.steps, self.moves) = (steps as usize, moves as usize);
        (self.epochs, self.evaluations) = (epochs as usize, evaluations);
        self.noise = RandomStream::from_state(&noise);
        Ok(())
    }
}

/// Several independent runs whose particles are evaluated in one batch: `M` runs cost the calls of
/// one.
#[derive(Debug)]
pub struct CboEnsemble<S = RandomStream> {
    runs: Vec<Cbo<S>>,
}

impl<S: NoiseSource> CboEnsemble<S> {
    /// Runs of one dimension, dtype and device, without batches of particles.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when there are none or they differ.
    pub fn new(runs: Vec<Cbo<S>>) -> Result<Self> {
        let Some(first) = runs.first() else {
            return Err(Error::argument("runs", 0, "at least one"));
        };
        let same = |run: &Cbo<S>| {
            run.d == first.d
                && run.dtype == first.dtype
                && run.device.same_device(&first.device)
                && run.config.batching.is_none()
        };
        if !runs.iter().all(same) {
            let expected = "one dimension, dtype and device, and no batches of particles";
            return Err(Error::argument("runs", runs.len(), expected));
        }
        Ok(Self { runs })
    }

    /// The runs.
    pub fn runs(&self) -> &[Cbo<S>] {
        &self.runs
    }

    /// One step of every run.
    ///
    /// # Errors
    /// As [`Cbo::step`].
    pub fn step(&mut self, objective: &dyn Objective) -> Result<Vec<StepReport>> {
        let energies = self.together(objective, |run| {
            let known = run.memories.as_ref().and_then(|m| m.energies.clone());
            (run.remembered(), known)
        })?;
        let mut reports = Vec::with_capacity(self.runs.len());
        for (run, energies) in self.runs.iter_mut().zip(energies) {
            reports.push(run.advance(&energies, objective)?);
            if let Some(memories) = &mut run.memories {
                memories.energies = Some(energies);
            }
        }
        if self.runs.iter().any(|run| run.memories.is_some()) {
            let positions = self.together(objective, |_| (Rows::All, None))?;
            for (run, positions) in self.runs.iter_mut().zip(&positions) {
                run.remember(positions);
            }
        }
        Ok(reports)
    }

    /// Energies in all runs: the known ones, and the others from one call.
    fn together(
        &mut self,
        objective: &dyn Objective,
        of: impl Fn(&Cbo<S>) -> (Rows, Option<Vec<f64>>),
    ) -> Result<Vec<Vec<f64>>> {
        let wanted: Vec<_> = self.runs.iter().map(of).collect();
        let mut all = Vec::new();
        for (run, (rows, known)) in self.runs.iter().zip(&wanted) {
            if known.is_none() {
                all.extend_from_slice(run.rows(*rows));
            }
        }
        let values = match self.runs.first() {
            Some(first) if !all.is_empty() => Some(objective.values(&first.tensor(&all)?)?),
            _ => None,
        };
        let mut from = 0;
        let mut energies = Vec::with_capacity(wanted.len());
        for (run, (rows, known)) in self.runs.iter_mut().zip(wanted) {
            energies.push(match (known, &values) {
                (Some(known), _) => known,
                (None, Some(values)) => {
                    let count = run.rows(rows).len() / run.d;
                    from += count;
                    if values.elem_count() < from {
                        let expected = format!("at least [{from}]");
                        let dims = values.dims();
                        return Err(Error::shape("values of the objective", dims, expected));
                    }
                    run.accept(&values.flatten_all()?.narrow(0, from - count, count)?, rows)?
                }
                (None, None) => Vec::new(),
            });
        }
        Ok(energies)
    }

    /// The consensus of each run, `[M, d]`.
    ///
    /// # Errors
    /// As [`Cbo::step`].
    pub fn consensus(&mut self, objective: &dyn Objective) -> Result<Tensor> {
        let mut points = Vec::with_capacity(self.runs.len());
        for run in &mut self.runs {
            points.push(run.consensus(objective)?);
        }
        Ok(Tensor::stack(&points, 0)?)
    }
}

/// Whose positions.
#[derive(Debug, Clone, Copy)]
enum Rows {
    All,
    /// So many particles from this one on.
    Range(usize, usize),
    Memories,
}

fn check_bounds(bounds: &Bounds, d: usize) -> Result<()> {
    for ends in [&bounds.low, &bounds.high] {
        if ends.len() != 1 && ends.len() != d {
            let expected = format!("1 or {d} ends");
            return Err(Error::argument("bounds", ends.len(), expected));
        }
    }
    for j in 0..d {
        let (low, high) = (
            bounds.low[j % bounds.low.len()],
            bounds.high[j % bounds.high.len()],
        );
        if !(low.is_finite() && high.is_finite() && low <= high) {
            let value = format!("[{low}, {high}]");
            return Err(Error::argument("bounds", value, "finite low <= high"));
        }
    }
    Ok(())
}

/// Entries that one task moves; fixed, and no influence on the numbers anyway.
const ENTRIES: usize = 16 * 1024;

/// Calls `one` with every row and its noise (empty where there is none), on all cores.
fn for_rows(v: &mut [f64], noise: &[f64], d: usize, one: impl Fn(&mut [f64], &[f64]) + Sync) {
    let width = (ENTRIES / d).max(1) * d;
    let task = |(i, rows): (usize, &mut [f64])| {
        for (j, row) in rows.chunks_exact_mut(d).enumerate() {
            let start = i * width + j * d;
            one(row, noise.get(start..start + d).unwrap_or(&[]));
        }
    };
    if v.len() <= width {
        task((0, v));
    } else {
        v.par_chunks_mut(width).enumerate().for_each(task);
    }
}

fn distance(row: &[f64], point: &[f64]) -> f64 {
    let squares: f64 = row.iter().zip(point).map(|(x, c)| (x - c) * (x - c)).sum();
    squares.sqrt()
}

/// `row += scale D noise`, with `D` from the distance of `row` to `point`, at most `bound`.
fn diffuse(row: &mut [f64], point: &[f64], noise: &[f64], scale: f64, bound: f64, kind: Diffusion) {
    match kind {
        Diffusion::None => {}
        Diffusion::Isotropic => {
            let factor = scale * distance(row, point).min(bound);
            row.iter_mut()
                .zip(noise)
                .for_each(|(x, xi)| *x += factor * xi);
        }
        Diffusion::Anisotropic => {
            for ((x, c), xi) in row.iter_mut().zip(point).zip(noise) {
                *x += scale * (*x - c).abs().min(bound) * xi;
            }
        }
    }
}

/// Norm of the coordinate-wise sample variance.
fn variance(v: &[f64], d: usize) -> f64 {
    let n = (v.len() / d) as f64;
    let mut total = 0.0;
    for j in 0..d {
        let column = || v.iter().skip(j).step_by(d);
        let mean = column().sum::<f64>() / n;
        let squares: f64 = column().map(|x| (x - mean).powi(2)).sum();
        total += (squares / (n - 1.0)).powi(2);
    }
    total.sqrt()
}

//! Particles that drift to their consensus and diffuse.

mod batches;
mod ensemble;
mod moves;
mod state;

use super::config::{Bounds, CboConfig};
use super::noise::NoiseSource;
use super::objective::{rows, Objective};
use super::point::{alpha_for, effective, host, tensor_on, weighted_mean, weights};
use crate::{Error, RandomStream, Result};
use candle_core::{DType, Device, Tensor};
pub use ensemble::CboEnsemble;
use moves::distance;

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
        self.begin_epoch();
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

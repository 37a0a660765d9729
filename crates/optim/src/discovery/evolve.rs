//! Regularized evolution and the two searches that it is compared with.

use super::check::{typecheck, Signature};
use super::interpret::CompiledProgram;
use super::mutate::Mutator;
use super::program::Program;
use super::simplify::{hash, simplify, HashMode};
use super::task::ProxyTask;
use crate::error::check;
use crate::{RandomStream, Result};
use rayon::prelude::*;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// A program with its fitness.
#[derive(Debug, Clone, PartialEq)]
pub struct Individual {
    /// The program, as it was mutated.
    pub program: Program,
    /// Its fitness; lower is better.
    pub fitness: f64,
}

/// A point of a search's history.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HistoryPoint {
    /// Programs trained so far.
    pub evaluated: usize,
    /// Programs generated so far.
    pub generated: usize,
    /// The best fitness so far.
    pub best: f64,
    /// The fitness of that program on the task of [`SearchOptions::meta`], which is asked after every
    /// batch with a better program. It falls at first and rises where the search begins to fit the
    /// accidents of its own task.
    pub meta: Option<f64>,
}

/// The program that did best on the task of [`SearchOptions::meta`].
#[derive(Debug, Clone, PartialEq)]
pub struct MetaBest {
    /// The program, simplified, with its fitness in the search.
    pub individual: Individual,
    /// Its fitness on that task.
    pub meta: f64,
}

/// What a search found.
#[derive(Debug, Clone, PartialEq)]
pub struct SearchReport {
    /// The warm start, and every improvement on it.
    pub history: Vec<HistoryPoint>,
    /// Well-typed programs generated.
    pub generated: usize,
    /// Mutations that were not well typed.
    pub type_invalid: usize,
    /// Programs whose fitness was known already.
    pub duplicates: usize,
    /// Programs trained.
    pub evaluated: usize,
    /// Fresh populations after the first.
    pub restarts: usize,
    /// The best program, simplified.
    pub best: Program,
    /// Its fitness.
    pub best_fitness: f64,
    /// Of the programs that were the best in their time, the one that did best on the task of
    /// [`SearchOptions::meta`].
    pub best_meta: Option<MetaBest>,
    /// The last population, from the oldest on; the best programs ever for the searches without one.
    pub population: Vec<Individual>,
    /// Whether the budget was used up (a progress function may have ended the search before).
    pub finished: bool,
    /// Wall time of this call.
    pub wall: Duration,
}

/// Where a search stands.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Progress {
    /// Programs trained.
    pub evaluated: usize,
    /// Programs to be trained.
    pub budget: usize,
    /// Programs generated.
    pub generated: usize,
    /// The best fitness.
    pub best: f64,
}

type Watch<'a> = Box<dyn FnMut(&Progress) -> bool + 'a>;

/// How a search is run.
#[derive(Default)]
pub struct SearchOptions<'a> {
    /// The seed that all evaluations get.
    pub seed: u64,
    /// A file that the search is saved to, and continued from when it exists. A search that was
    /// killed continues with the same bits.
    pub checkpoint: Option<PathBuf>,
    /// Evaluations between two saves; 0 saves after every batch.
    pub every: usize,
    /// Sees the progress after every batch; returns whether to go on.
    pub progress: Option<Watch<'a>>,
    /// A larger task on other data, by which fresh populations begin with the program that carries over
    /// best instead of the one that fits the search's own task best.
    pub meta: Option<&'a dyn ProxyTask>,
}

impl std::fmt::Debug for SearchOptions<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SearchOptions")
            .field("seed", &self.seed)
            .field("checkpoint", &self.checkpoint)
            .field("every", &self.every)
            .field("meta", &self.meta.is_some())
            .finish_non_exhaustive()
    }
}

/// Regularized evolution: the oldest dies, not the worst.
///
/// Children are made in batches of [`batch`](Self::batch) from one state of the population, trained
/// on all cores and committed in the order in which they were made: the result does not depend on
/// the number of threads.
#[derive(Debug, Clone, PartialEq)]
pub struct Evolution {
    /// Individuals.
    pub population: usize,
    /// Individuals among which a parent is the best.
    pub tournament: usize,
    /// Programs to train.
    pub budget: usize,
    /// Evaluations without a better program after which a fresh population begins; 0 for never.
    pub restart_after: usize,
    /// Children that are made at a time.
    pub batch: usize,
    /// Programs to generate, at most, for each one to train.
    pub max_generated: usize,
    /// How children are made.
    pub mutator: Mutator,
}

impl Default for Evolution {
    fn default() -> Self {
        Self {
            population: 30,
            tournament: 5,
            budget: 1000,
            restart_after: 300,
            batch: 4,
            max_generated: 100,
            mutator: Mutator::default(),
        }
    }
}

/// Programs that are up to [`mutations`](Self::mutations) mutations away from the warm start.
#[derive(Debug, Clone, PartialEq)]
pub struct RandomSearch {
    /// Programs to train.
    pub budget: usize,
    /// Mutations of the warm start, from 1 to this.
    pub mutations: usize,
    /// How children are made.
    pub mutator: Mutator,
}

impl Default for RandomSearch {
    fn default() -> Self {
        Self {
            budget: 1000,
            mutations: 5,
            mutator: Mutator::default(),
        }
    }
}

/// Evolution of the warm start's constants alone.
#[derive(Debug, Clone, PartialEq)]
pub struct ConstantTuning {
    /// Individuals.
    pub population: usize,
    /// Individuals among which a parent is the best.
    pub tournament: usize,
    /// Programs to train.
    pub budget: usize,
    /// How constants are changed.
    pub mutator: Mutator,
}

impl Default for ConstantTuning {
    fn default() -> Self {
        Self {
            population: 30,
            tournament: 5,
            budget: 1000,
            mutator: Mutator::default(),
        }
    }
}

impl Evolution {
    /// Searches from `warm` with the streams split from `rng`.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`](crate::Error::InvalidConfig); a warm start that is not well typed;
    /// those of the task.
    pub fn run(
        &self,
        task: &dyn ProxyTask,
        warm: &Program,
        rng: &RandomStream,
    ) -> Result<SearchReport> {
        self.run_with(task, warm, rng, SearchOptions::default())
    }

    /// [`run`](Self::run) with a checkpoint, a seed of the task, a progress function.
    ///
    /// # Errors
    /// Also those of the file: [`tensor_core::Error::CheckpointMismatch`] for one of another search.
    pub fn run_with(
        &self,
        task: &dyn ProxyTask,
        warm: &Program,
        rng: &RandomStream,
        options: SearchOptions<'_>,
    ) -> Result<SearchReport> {
        check::at_least_one("Evolution::batch", self.batch)?;
        check::at_least_one("Evolution::max_generated", self.max_generated)?;
        let search = Search {
            how: How::Evolve,
            population: self.population,
            tournament: self.tournament,
            budget: self.budget,
            restart_after: self.restart_after,
            batch: self.batch,
            max_generated: self.max_generated,
            mutator: &self.mutator,
        };
        search.run(task, warm, rng, options)
    }
}

impl RandomSearch {
    /// Searches around `warm`.
    ///
    /// # Errors
    /// As [`Evolution::run`].
    pub fn run(
        &self,
        task: &dyn ProxyTask,
        warm: &Program,
        rng: &RandomStream,
    ) -> Result<SearchReport> {
        self.run_with(task, warm, rng, SearchOptions::default())
    }

    /// [`run`](Self::run) with a checkpoint, a seed of the task, a progress function.
    ///
    /// # Errors
    /// As [`Evolution::run_with`].
    pub fn run_with(
        &self,
        task: &dyn ProxyTask,
        warm: &Program,
        rng: &RandomStream,
        options: SearchOptions<'_>,
    ) -> Result<SearchReport> {
        check::at_least_one("RandomSearch::mutations", self.mutations)?;
        let defaults = Evolution::default();
        let search = Search {
            how: How::Random(self.mutations),
            population: defaults.population,
            tournament: 1,
            budget: self.budget,
            restart_after: 0,
            batch: defaults.batch,
            max_generated: defaults.max_generated,
            mutator: &self.mutator,
        };
        search.run(task, warm, rng, options)
    }
}

impl ConstantTuning {
    /// Tunes the constants of `warm`.
    ///
    /// # Errors
    /// As [`Evolution::run`].
    pub fn run(
        &self,
        task: &dyn ProxyTask,
        warm: &Program,
        rng: &RandomStream,
    ) -> Result<SearchReport> {
        self.run_with(task, warm, rng, SearchOptions::default())
    }

    /// [`run`](Self::run) with a checkpoint, a seed of the task, a progress function.
    ///
    /// # Errors
    /// As [`Evolution::run_with`].
    pub fn run_with(
        &self,
        task: &dyn ProxyTask,
        warm: &Program,
        rng: &RandomStream,
        options: SearchOptions<'_>,
    ) -> Result<SearchReport> {
        let defaults = Evolution::default();
        let search = Search {
            how: How::Tune,
            population: self.population,
            tournament: self.tournament,
            budget: self.budget,
            restart_after: 0,
            batch: defaults.batch,
            max_generated: defaults.max_generated,
            mutator: &self.mutator,
        };
        search.run(task, warm, rng, options)
    }
}

#[derive(Debug, Clone, Copy)]
enum How {
    Evolve,
    Random(usize),
    Tune,
}

/// What the three searches share.
#[derive(Debug)]
pub(super) struct Search<'a> {
    how: How,
    population: usize,
    tournament: usize,
    budget: usize,
    restart_after: usize,
    batch: usize,
    max_generated: usize,
    mutator: &'a Mutator,
}

/// Everything that changes.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct SearchState {
    pub(super) population: VecDeque<Individual>,
    pub(super) cache: BTreeMap<u128, f64>,
    pub(super) best: Individual,
    pub(super) best_meta: Option<MetaBest>,
    pub(super) history: Vec<HistoryPoint>,
    /// Evaluations since the best, children made, well-typed ones, invalid tries, duplicates,
    /// evaluations, restarts.
    pub(super) since_best: usize,
    pub(super) issued: usize,
    pub(super) generated: usize,
    pub(super) invalid: usize,
    pub(super) duplicates: usize,
    pub(super) evaluated: usize,
    pub(super) restarts: usize,
}

/// A child on its way into the population.
struct Child {
    program: Program,
    simple: Program,
    key: u128,
}

impl Search<'_> {
    fn validate(&self, warm: &Program) -> Result<()> {
        check::at_least_one("population", self.population)?;
        check::at_least_one("tournament", self.tournament)?;
        check::at_least_one("budget", self.budget)?;
        self.mutator.validate()?;
        typecheck(warm, self.signature()).map(|_| ())
    }

    fn signature(&self) -> &Signature {
        &self.mutator.signature
    }

    fn run(
        &self,
        task: &dyn ProxyTask,
        warm: &Program,
        rng: &RandomStream,
        mut options: SearchOptions<'_>,
    ) -> Result<SearchReport> {
        let start = Instant::now();
        self.validate(warm)?;
        let id = self.identity(warm, rng, &options);
        let saved = match &options.checkpoint {
            Some(path) if path.exists() => Some(SearchState::load(path, &id)?),
            _ => None,
        };
        let mut state = match saved {
            Some(state) => state,
            None => self.begin(task, warm, &options)?,
        };
        let mut last_save = state.evaluated;
        let mut wanted = true;
        while wanted && self.goes_on(&state) {
            self.round(&mut state, task, warm, rng, &options)?;
            if let Some(path) = &options.checkpoint {
                if state.evaluated >= last_save + options.every.max(1) {
                    state.save(path, &id)?;
                    last_save = state.evaluated;
                }
            }
            if let Some(progress) = &mut options.progress {
                wanted = progress(&Progress {
                    evaluated: state.evaluated,
                    budget: self.budget,
                    generated: state.generated,
                    best: state.best.fitness,
                });
            }
        }
        if let Some(path) = &options.checkpoint {
            state.save(path, &id)?;
        }
        Ok(self.report(state, start.elapsed()))
    }

    /// What a checkpoint must agree on.
    fn identity(&self, warm: &Program, rng: &RandomStream, options: &SearchOptions<'_>) -> String {
        let (seed, meta) = (options.seed, options.meta.is_some());
        format!("{self:?} {warm} {:?} {seed} {meta}", rng.state())
    }

    fn goes_on(&self, state: &SearchState) -> bool {
        state.evaluated < self.budget
            && state.issued < self.max_generated.saturating_mul(self.budget)
    }

    fn begin(
        &self,
        task: &dyn ProxyTask,
        warm: &Program,
        options: &SearchOptions<'_>,
    ) -> Result<SearchState> {
        let simple = simplify(warm, self.signature());
        let fitness = self.evaluate(task, &simple, options.seed)?;
        let one = Individual {
            program: warm.clone(),
            fitness,
        };
        let key = hash(&simple, self.signature(), HashMode::Search);
        let mut state = SearchState {
            population: std::iter::repeat_n(one.clone(), self.population).collect(),
            cache: BTreeMap::from([(key, fitness)]),
            best: Individual {
                program: simple,
                fitness,
            },
            history: vec![HistoryPoint {
                evaluated: 1,
                generated: 0,
                best: fitness,
                meta: None,
            }],
            best_meta: None,
            since_best: 0,
            issued: 0,
            generated: 0,
            invalid: 0,
            duplicates: 0,
            evaluated: 1,
            restarts: 0,
        };
        self.validate_best(&mut state, options)?;
        Ok(state)
    }

    /// Tries a new best program on the larger task.
    fn validate_best(&self, state: &mut SearchState, options: &SearchOptions<'_>) -> Result<()> {
        let (Some(task), Some(last)) = (options.meta, state.history.last_mut()) else {
            return Ok(());
        };
        if last.meta.is_some() {
            return Ok(());
        }
        let meta = self.evaluate(task, &state.best.program, options.seed)?;
        last.meta = Some(meta);
        if state.best_meta.as_ref().is_none_or(|best| meta < best.meta) {
            let individual = state.best.clone();
            state.best_meta = Some(MetaBest { individual, meta });
        }
        Ok(())
    }

    fn evaluate(&self, task: &dyn ProxyTask, simple: &Program, seed: u64) -> Result<f64> {
        let compiled = CompiledProgram::new(simple, self.signature())?;
        Ok(task.fitness(&compiled, seed, &task.abort())?.value)
    }

    /// A batch of children: made, trained, committed.
    fn round(
        &self,
        state: &mut SearchState,
        task: &dyn ProxyTask,
        warm: &Program,
        rng: &RandomStream,
        options: &SearchOptions<'_>,
    ) -> Result<()> {
        let mut children = Vec::with_capacity(self.batch);
        for _ in 0..self.batch {
            let mut own = rng.split_index("child", state.issued as u64);
            state.issued += 1;
            let (child, invalid) = self.child(state, warm, &mut own)?;
            state.invalid += invalid;
            if let Some(program) = child {
                let simple = simplify(&program, self.signature());
                let key = hash(&simple, self.signature(), HashMode::Search);
                children.push(Child {
                    program,
                    simple,
                    key,
                });
            }
        }
        let mut seen = BTreeSet::new();
        let left = self.budget - state.evaluated;
        let open: Vec<&Child> = children
            .iter()
            .filter(|c| !state.cache.contains_key(&c.key) && seen.insert(c.key))
            .take(left)
            .collect();
        let seed = options.seed;
        let train = |child: &&Child| Ok((child.key, self.evaluate(task, &child.simple, seed)?));
        let trained: Result<Vec<(u128, f64)>> = open.par_iter().map(train).collect();
        let mut fresh: BTreeMap<u128, f64> = trained?.into_iter().collect();
        for child in children {
            let (fitness, duplicate) = match (state.cache.get(&child.key), fresh.remove(&child.key))
            {
                (Some(known), _) => (*known, true),
                (None, Some(found)) => (found, false),
                // Beyond the budget.
                (None, None) => continue,
            };
            self.commit(state, child, fitness, duplicate);
        }
        self.validate_best(state, options)?;
        self.restart(state, warm, rng)
    }

    fn commit(&self, state: &mut SearchState, child: Child, fitness: f64, duplicate: bool) {
        state.generated += 1;
        if duplicate {
            state.duplicates += 1;
        } else {
            state.evaluated += 1;
            state.since_best += 1;
            state.cache.insert(child.key, fitness);
        }
        if fitness < state.best.fitness {
            state.best = Individual {
                program: child.simple,
                fitness,
            };
            state.since_best = 0;
            state.history.push(HistoryPoint {
                evaluated: state.evaluated,
                generated: state.generated,
                best: fitness,
                meta: None,
            });
            tracing::debug!(evaluated = state.evaluated, fitness, "a better program");
        }
        let individual = Individual {
            program: child.program,
            fitness,
        };
        match self.how {
            How::Random(_) if duplicate => {}
            How::Random(_) => {
                // No parents: the best are kept for the report.
                state.population.push_back(individual);
                let worst = state.population.iter().enumerate();
                let worst = worst.max_by(|a, b| a.1.fitness.total_cmp(&b.1.fitness));
                if let Some((i, _)) = worst {
                    state.population.remove(i);
                }
            }
            How::Evolve | How::Tune => {
                state.population.push_back(individual);
                state.population.pop_front();
            }
        }
    }

    /// A fresh population after a long time without a better program, from the warm start or from
    /// the best: the one that carries over best, where that is known.
    fn restart(&self, state: &mut SearchState, warm: &Program, rng: &RandomStream) -> Result<()> {
        if self.restart_after == 0 || state.since_best < self.restart_after {
            return Ok(());
        }
        let mut own = rng.split_index("restart", state.restarts as u64);
        let from_best = own.below(2)? == 0;
        let start = match from_best {
            true => match &state.best_meta {
                Some(best) => best.individual.clone(),
                None => state.best.clone(),
            },
            false => Individual {
                program: warm.clone(),
                fitness: state.history.first().map_or(f64::INFINITY, |h| h.best),
            },
        };
        state.population = std::iter::repeat_n(start, self.population).collect();
        state.since_best = 0;
        state.restarts += 1;
        tracing::debug!(restarts = state.restarts, from_best, "a fresh population");
        Ok(())
    }

    fn child(
        &self,
        state: &SearchState,
        warm: &Program,
        rng: &mut RandomStream,
    ) -> Result<(Option<Program>, usize)> {
        match self.how {
            How::Evolve => self.mutator.mutate(self.parent(state, rng)?, rng),
            How::Tune => Ok((self.mutator.tune(self.parent(state, rng)?, rng)?, 0)),
            How::Random(most) => {
                let (mut program, mut invalid) = (warm.clone(), 0);
                for _ in 0..=rng.below(most)? {
                    let (child, tries) = self.mutator.mutate(&program, rng)?;
                    invalid += tries;
                    match child {
                        Some(child) => program = child,
                        None => return Ok((None, invalid)),
                    }
                }
                Ok((Some(program), invalid))
            }
        }
    }

    fn parent<'s>(&self, state: &'s SearchState, rng: &mut RandomStream) -> Result<&'s Program> {
        let mut best = &state.population[rng.below(state.population.len())?];
        for _ in 1..self.tournament {
            let other = &state.population[rng.below(state.population.len())?];
            if other.fitness < best.fitness {
                best = other;
            }
        }
        Ok(&best.program)
    }

    fn report(&self, state: SearchState, wall: Duration) -> SearchReport {
        SearchReport {
            finished: !self.goes_on(&state),
            history: state.history,
            generated: state.generated,
            type_invalid: state.invalid,
            duplicates: state.duplicates,
            evaluated: state.evaluated,
            restarts: state.restarts,
            best: state.best.program,
            best_fitness: state.best.fitness,
            best_meta: state.best_meta,
            population: state.population.into(),
            wall,
        }
    }
}

//! Runs trials, seed by seed, and stores each as soon as it ends.

use crate::registry::Entry;
use crate::scenario::{Arm, DataSource, Setting, Suite, TrialContext, TrialOutcome};
use crate::store::{now, Store, StoredTrial, TrialKey};
use crate::{Error, Result};
use candle_core::Device;
use std::any::Any;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::Instant;
use tracing::Span;
use tracing_indicatif::span_ext::IndicatifSpanExt;

/// Target of the spans that become progress bars.
pub const PROGRESS: &str = "thalweg::progress";
/// Target of the line about each trial that ended.
pub const TRIAL: &str = "thalweg::trial";

/// How a suite is run.
#[derive(Debug, Clone)]
pub struct Options {
    /// The suite.
    pub suite: Suite,
    /// Where tensors live.
    pub device: Device,
    /// Where data comes from.
    pub data: DataSource,
    /// Another number of seeds than the suite's.
    pub seeds: Option<usize>,
    /// Run trials again that are stored already.
    pub fresh: bool,
    /// Trials at a time.
    pub jobs: usize,
    /// Seconds for one scenario of the quick suite.
    pub quick_seconds: f64,
}

impl Options {
    /// The quick suite on the CPU with embedded data, one trial at a time.
    pub fn quick() -> Self {
        Self {
            suite: Suite::Quick,
            device: Device::Cpu,
            data: DataSource::Embedded,
            seeds: None,
            fresh: false,
            jobs: 1,
            quick_seconds: 20.0,
        }
    }

    /// The seeds of the suite, in the order in which they run.
    pub fn seed_list(&self) -> Vec<u64> {
        let (first, count) = match self.suite {
            Suite::Quick => (0, 3),
            Suite::Standard => (11, 5),
            Suite::Full => (21, 3),
        };
        (first..).take(self.seeds.unwrap_or(count)).collect()
    }
}

/// What a run did.
#[derive(Debug, Clone, Default)]
pub struct Summary {
    /// Trials that ran to their end.
    pub ran: usize,
    /// Trials found in the store.
    pub reused: usize,
    /// Trials that ended with an error, with their messages.
    pub failed: Vec<(TrialKey, String)>,
    /// Whether the user stopped it.
    pub interrupted: bool,
}

/// One trial to run.
struct Job<'a> {
    arm: &'a Arm,
    setting: &'a Setting,
    key: TrialKey,
}

/// What all trials of a run share.
struct Runner<'a> {
    options: &'a Options,
    cancelled: &'a AtomicBool,
    store: &'a mut Store,
    run: Option<i64>,
    summary: Summary,
    bar: Span,
    done: usize,
}

/// Runs the missing trials of `entries` and stores them.
///
/// # Errors
/// [`Error::Unavailable`] before anything runs when a scenario has no form for the suite;
/// [`Error::Store`] when the database cannot be written. A failed trial is no error: it is counted
/// in the summary.
pub fn run(
    entries: &[&Entry],
    options: &Options,
    store: &mut Store,
    cancelled: &AtomicBool,
) -> Result<Summary> {
    for entry in entries {
        check_available(entry, options)?;
    }
    let seeds = options.seed_list();
    let bar = tracing::info_span!(target: PROGRESS, "suite");
    let total: usize = entries
        .iter()
        .map(|e| e.definition.trials_per_seed() * seeds.len())
        .sum();
    bar.pb_set_length(total as u64);
    bar.pb_set_message(options.suite.name());
    let mut runner = Runner {
        options,
        cancelled,
        store,
        run: None,
        summary: Summary::default(),
        bar,
        done: 0,
    };
    let entered = runner.bar.clone();
    let _guard = entered.enter();
    let mut planned = 0;
    for entry in entries {
        planned += entry.definition.trials_per_seed() * seeds.len();
        runner.scenario(entry, &seeds)?;
        if runner.summary.interrupted {
            break;
        }
        // The quick suite may leave seeds out.
        runner.done = planned;
        runner.bar.pb_set_position(planned as u64);
    }
    Ok(runner.summary)
}

fn check_available(entry: &Entry, options: &Options) -> Result<()> {
    let d = &entry.definition;
    let unavailable = |reason: String| Error::Unavailable {
        slug: d.slug.to_string(),
        reason,
    };
    if options.suite == Suite::Full {
        let Some(folder) = d.full else {
            return Err(unavailable(
                "has no paper-size form; its suites are quick and standard".into(),
            ));
        };
        if options.data == DataSource::Embedded {
            return Err(unavailable(format!(
                "needs --data DIR with {folder} for the full suite"
            )));
        }
        if options.device.is_cpu() {
            return Err(unavailable(
                "needs a GPU (--device cuda) for the full suite".into(),
            ));
        }
    }
    Ok(())
}

impl<'a> Runner<'a> {
    fn scenario(&mut self, entry: &'a Entry, seeds: &[u64]) -> Result<()> {
        tracing::debug!(scenario = entry.definition.slug, "begins");
        let mut spent = 0.0;
        for (index, seed) in seeds.iter().enumerate() {
            if self.options.suite == Suite::Quick && index > 0 {
                // Stored durations count as well, so that a resumed run decides the same way.
                let next = spent / index as f64;
                if spent + next > self.options.quick_seconds {
                    tracing::info!(
                        scenario = entry.definition.slug,
                        seeds = index,
                        seconds = spent.round(),
                        "no time for another seed"
                    );
                    break;
                }
            }
            spent += self.seed(entry, *seed)?;
            if self.summary.interrupted {
                break;
            }
        }
        Ok(())
    }

    /// Runs all arms on one seed and gives the seconds that its trials took, stored ones included.
    fn seed(&mut self, entry: &'a Entry, seed: u64) -> Result<f64> {
        let mut spent = 0.0;
        let (mut alone, mut together) = (Vec::new(), Vec::new());
        for arm in &entry.definition.arms {
            for setting in &arm.settings {
                let key = self.key(entry, arm, setting, seed);
                let stored = if self.options.fresh {
                    None
                } else {
                    self.store.find(&key)?
                };
                if let Some(trial) = stored {
                    spent += trial.seconds;
                    self.summary.reused += 1;
                    self.advance();
                } else if arm.timed || self.options.jobs < 2 {
                    alone.push(Job { arm, setting, key });
                } else {
                    together.push(Job { arm, setting, key });
                }
            }
        }
        spent += self.batch(entry, &together, self.options.jobs)?;
        spent += self.batch(entry, &alone, 1)?;
        Ok(spent)
    }

    fn key(&self, entry: &Entry, arm: &Arm, setting: &Setting, seed: u64) -> TrialKey {
        TrialKey {
            scenario: entry.definition.slug.to_string(),
            definition: entry.definition.hash(),
            arm: arm.name.to_string(),
            setting: setting.name.clone(),
            seed,
            suite: self.options.suite.name().to_string(),
            device: tensor_core::device::name(&self.options.device),
            data: self.options.data.name_for(&entry.definition),
            version: crate::VERSION.to_string(),
        }
    }

    /// Runs jobs on `workers` threads; this thread alone writes to the store.
    fn batch(&mut self, entry: &'a Entry, jobs: &[Job<'a>], workers: usize) -> Result<f64> {
        let (options, cancelled) = (self.options, self.cancelled);
        let next = AtomicUsize::new(0);
        let stop = AtomicBool::new(false);
        let (sender, receiver) = mpsc::channel();
        let parent = self.bar.clone();
        std::thread::scope(|scope| {
            for _ in 0..workers.min(jobs.len()) {
                let (sender, next, stop, parent) = (sender.clone(), &next, &stop, parent.clone());
                scope.spawn(move || {
                    let _guard = parent.enter();
                    loop {
                        let index = next.fetch_add(1, Ordering::Relaxed);
                        let halted =
                            stop.load(Ordering::Relaxed) || cancelled.load(Ordering::Relaxed);
                        if index >= jobs.len() || halted {
                            break;
                        }
                        let started = Instant::now();
                        let outcome = trial(entry, &jobs[index], options, cancelled);
                        // The receiver outlives the scope unless storing failed; then nobody waits.
                        if sender
                            .send((index, outcome, started.elapsed().as_secs_f64()))
                            .is_err()
                        {
                            break;
                        }
                    }
                });
            }
            drop(sender);
            let mut spent = 0.0;
            for (index, outcome, seconds) in receiver {
                spent += seconds;
                let stored = self.finish(&jobs[index], outcome, seconds);
                if stored.is_err() {
                    stop.store(true, Ordering::Relaxed);
                    stored?;
                }
            }
            self.summary.interrupted |= cancelled.load(Ordering::Relaxed);
            Ok(spent)
        })
    }

    fn finish(&mut self, job: &Job, outcome: Result<TrialOutcome>, seconds: f64) -> Result<()> {
        let (error, outcome) = match outcome {
            Ok(outcome) => (None, outcome),
            Err(Error::Cancelled) => {
                self.summary.interrupted = true;
                return Ok(());
            }
            Err(error) => (Some(error.to_string()), TrialOutcome::default()),
        };
        let key = &job.key;
        let run = match self.run {
            Some(run) => run,
            None => {
                let facts = crate::machine::facts(&key.device);
                *self
                    .run
                    .insert(self.store.begin_run(self.options.suite.name(), &facts)?)
            }
        };
        self.store.insert(&StoredTrial {
            run,
            key: key.clone(),
            error: error.clone(),
            outcome,
            seconds,
            finished: now(),
        })?;
        self.advance();
        match error {
            None => {
                self.summary.ran += 1;
                tracing::info!(
                    target: TRIAL,
                    scenario = key.scenario,
                    arm = key.arm,
                    setting = key.setting,
                    seed = key.seed,
                    seconds = (seconds * 100.0).round() / 100.0,
                    "stored"
                );
            }
            Some(message) => {
                tracing::error!(
                    scenario = key.scenario,
                    arm = key.arm,
                    setting = key.setting,
                    seed = key.seed,
                    "trial failed: {message}"
                );
                self.summary.failed.push((key.clone(), message));
            }
        }
        Ok(())
    }

    fn advance(&mut self) {
        self.done += 1;
        self.bar.pb_set_position(self.done as u64);
    }
}

/// Runs one trial; a panic in it is an error of it.
fn trial(
    entry: &Entry,
    job: &Job,
    options: &Options,
    cancelled: &AtomicBool,
) -> Result<TrialOutcome> {
    let span = tracing::info_span!(target: PROGRESS, "trial");
    let key = &job.key;
    span.pb_set_message(&format!(
        "{} {} {} seed {}",
        key.scenario, key.arm, key.setting, key.seed
    ));
    let _guard = span.enter();
    let progress = |done: usize, total: usize| {
        let span = Span::current();
        span.pb_set_length(total as u64);
        span.pb_set_position(done as u64);
    };
    let context = TrialContext::new(
        entry.definition.slug,
        key.seed,
        options.suite,
        options.device.clone(),
        options.data.directory_for(&entry.definition),
        &progress,
        cancelled,
    );
    let work = || entry.scenario.run(job.arm, job.setting, &context);
    // A trial owns all it touches; what a panic leaves half done is dropped with it.
    catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|panic| Err(Error::Trial(format!("panicked: {}", words(&*panic)))))
}

fn words(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(ToString::to_string);
    text.or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "with a value that is not text".into())
}

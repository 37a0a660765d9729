//! Program search on the digits: evolution, random search and tuning at equal trainings, and the
//! funnel's larger tasks.

mod characters;
mod perceptron;

use crate::scenario::{Curve, Picture, PictureFormat, Suite, TrialContext, TrialOutcome};
use crate::scenarios::training::digits;
use crate::{Error, Result};
use candle_core::DType;
use characters::Characters;
use optim::discovery::{
    AbortRule, CompiledProgram, ConstantTuning, Evolution, Fitness, Funnel, FunnelStage,
    Individual, Program, Progress, ProxyTask, RandomSearch, SearchOptions, SearchReport, Signature,
};
use perceptron::{Part, Perceptron};
use std::sync::{Mutex, PoisonError};

/// Programs that each search trains.
fn trainings(suite: Suite) -> usize {
    match suite {
        Suite::Quick | Suite::Standard => 400,
        Suite::Full => 10_000,
    }
}

/// Programs that go from the search into the funnel, and draws of the tuned baseline there.
const CANDIDATES: usize = 20;
/// Programs that the funnel's first stage keeps.
const KEPT: usize = 5;
const WARMUP: usize = 10;

/// Warm-up and cosine to 0, in [0, 1].
fn schedule(step: usize, steps: usize) -> f64 {
    if step < WARMUP {
        return (step + 1) as f64 / WARMUP as f64;
    }
    let t = (step - WARMUP) as f64 / (steps - WARMUP) as f64;
    0.5 * (1.0 + (std::f64::consts::PI * t).cos())
}

/// A task that remembers every program it has seen, for the funnel: the last population of a search in
/// which the oldest die need not hold the best.
struct Remembering<'a> {
    task: &'a dyn ProxyTask,
    seen: Mutex<Vec<Individual>>,
}

impl ProxyTask for Remembering<'_> {
    fn fitness(
        &self,
        program: &CompiledProgram,
        seed: u64,
        abort: &AbortRule,
    ) -> optim::Result<Fitness> {
        let fitness = self.task.fitness(program, seed, abort)?;
        let individual = Individual {
            program: program.program().clone(),
            fitness: fitness.value,
        };
        // A push leaves nothing half-done.
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.push(individual);
        Ok(fitness)
    }

    fn abort(&self) -> AbortRule {
        self.task.abort()
    }
}

fn part(data: &datasets::Classification) -> Result<Part> {
    let x = data.inputs.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
    let y = data.label_vec()?.iter().map(|y| *y as usize).collect();
    Ok(Part { x, y })
}

/// Which search.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Which {
    Evolution,
    Random,
    Tuning,
}

/// The data of one trial: for training, for fitness, for later.
fn data(trial: &TrialContext) -> Result<[Part; 3]> {
    let parts = digits(trial, &[1000, 400, 397])?;
    match &parts[..] {
        [train, valid, test] => Ok([part(train)?, part(valid)?, part(test)?]),
        _ => Err(Error::Trial("the digits could not be split".into())),
    }
}

pub(super) fn search(trial: &TrialContext, which: Which) -> Result<TrialOutcome> {
    let [train, valid, test] = data(trial)?;
    let small = Perceptron {
        train: &train,
        valid: &valid,
        widths: vec![64, 16, 10],
        steps: 100,
        repeats: 1,
        stream: trial.stream("small task"),
    };
    let large = Perceptron {
        train: &train,
        valid: &test,
        widths: vec![64, 64, 64, 10],
        steps: 500,
        repeats: 3,
        stream: trial.stream("large task"),
    };
    let remembering = Remembering {
        task: &small,
        seen: Mutex::new(Vec::new()),
    };
    // One repeat: it is asked after every improvement.
    let watch = Perceptron {
        repeats: 1,
        ..large.clone()
    };
    let meta = (which == Which::Evolution).then_some(&watch as &dyn ProxyTask);
    let report = searched(trial, &remembering, which, meta)?;
    let mut seen = remembering
        .seen
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner);
    // Equal ones in an order that does not depend on threads.
    seen.sort_by(|a, b| {
        let texts = || a.program.to_string().cmp(&b.program.to_string());
        a.fitness.total_cmp(&b.fitness).then_with(texts)
    });
    seen.truncate(CANDIDATES);
    let mut outcome = TrialOutcome::default()
        .metric("fitness", report.best_fitness)
        .metric("warm_fitness", report.history[0].best)
        .metric(
            "skipped",
            report.duplicates as f64 / report.generated.max(1) as f64,
        )
        .curve(curve(&report));
    if which == Which::Evolution {
        let (ratio, winner) = funnel(trial, &seen, large)?;
        outcome = outcome
            .metric("funnel_ratio", ratio)
            .curve(watched(&report))
            .picture(program_text("the funnel's winner".into(), &winner));
    }
    let caption = format!("the best program, fitness {:.4}", report.best_fitness);
    Ok(outcome.picture(program_text(caption, &report.best)))
}

fn program_text(caption: String, program: &Program) -> Picture {
    Picture {
        caption,
        format: PictureFormat::Text,
        bytes: program.to_string().into_bytes(),
    }
}

/// The search itself; Ctrl-C ends it after a batch.
fn searched(
    trial: &TrialContext,
    task: &dyn ProxyTask,
    which: Which,
    meta: Option<&dyn ProxyTask>,
) -> Result<SearchReport> {
    let budget = trainings(trial.suite);
    let warm = Program::adamw()?;
    let stream = trial.stream("search");
    let progress = |p: &Progress| trial.step(p.evaluated.min(p.budget), p.budget).is_ok();
    let options = SearchOptions {
        progress: Some(Box::new(progress)),
        meta,
        ..SearchOptions::default()
    };
    let report = match which {
        Which::Evolution => Evolution {
            budget,
            ..Evolution::default()
        }
        .run_with(task, &warm, &stream, options)?,
        Which::Random => RandomSearch {
            budget,
            ..RandomSearch::default()
        }
        .run_with(task, &warm, &stream, options)?,
        Which::Tuning => ConstantTuning {
            budget,
            ..ConstantTuning::default()
        }
        .run_with(task, &warm, &stream, options)?,
    };
    if !report.finished && report.evaluated < budget {
        trial.step(report.evaluated, budget)?;
    }
    Ok(report)
}

/// The best fitness, at fifty places.
fn curve(report: &SearchReport) -> Curve {
    let mut curve = Curve::new("best fitness", "trainings").log_y();
    let mut points = report.history.iter().peekable();
    let mut best = f64::INFINITY;
    for evaluated in (1..=report.evaluated).step_by((report.evaluated / 50).max(1)) {
        while let Some(point) = points.next_if(|p| p.evaluated <= evaluated) {
            best = point.best;
        }
        curve.push(evaluated as f64, best);
    }
    curve
}

/// The best program's fitness on the larger task, whenever there was a better one.
fn watched(report: &SearchReport) -> Curve {
    let mut curve = Curve::new("the best program on the larger task", "trainings").log_y();
    for point in &report.history {
        if let Some(meta) = point.meta.filter(|m| m.is_finite()) {
            curve.push(point.evaluated as f64, meta);
        }
    }
    curve
}

/// The winner on the last task, relative to tuned AdamW there.
fn funnel(
    trial: &TrialContext,
    best: &[Individual],
    large: Perceptron<'_>,
) -> Result<(f64, Program)> {
    let mut stages = vec![stage(trial, Box::new(large), KEPT)?];
    if trial.suite == Suite::Full {
        let (t2, t3) = ((64, 2, 4), (256, 6, 4));
        let text = Characters::new(t2, 1000, trial.stream("text"))?;
        stages.push(stage(trial, Box::new(text), 2)?);
        let text = Characters::new(t3, 5000, trial.stream("text"))?;
        stages.push(stage(trial, Box::new(text), 1)?);
    }
    let baseline = stages.last().and_then(|s| s.baseline).unwrap_or(f64::NAN);
    let programs: Vec<Program> = best.iter().map(|i| i.program.clone()).collect();
    let selected = Funnel { stages }.select(&programs, &Signature::optimizer())?;
    let winner = selected.into_iter().next();
    match winner.and_then(|w| Some((*w.fitness.last()?, w.program))) {
        Some((fitness, program)) => Ok((fitness / baseline, program)),
        None => Err(Error::Trial("the funnel is empty".into())),
    }
}

/// A stage that keeps so many of those that beat tuned AdamW.
fn stage<'a>(
    trial: &TrialContext,
    task: Box<dyn ProxyTask + 'a>,
    keep: usize,
) -> Result<FunnelStage<'a>> {
    let mut tuning = trial.stream("tuned baseline");
    let (_, baseline) = Funnel::tuned_adamw(&*task, CANDIDATES, 0, &mut tuning)?;
    Ok(FunnelStage {
        task,
        keep,
        baseline: Some(baseline),
        seed: 0,
    })
}

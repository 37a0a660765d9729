//! Program search on the digits: evolution, random search and tuning at equal trainings, and the
//! funnel's next task.

use crate::scenario::{Curve, Picture, PictureFormat, TrialContext, TrialOutcome};
use crate::scenarios::training::digits;
use crate::{Error, Result};
use candle_core::DType;
use optim::discovery::{
    AbortRule, CompiledProgram, ConstantTuning, Evolution, Fitness, Funnel, FunnelStage,
    Individual, Program, Progress, ProxyTask, RandomSearch, SearchOptions, SearchReport, Signature,
};
use tensor_core::random::RandomStream;

/// Programs that each search trains.
pub(super) const TRAININGS: usize = 400;
/// Programs that go from the search into the funnel, and draws of the tuned baseline there.
const CANDIDATES: usize = 20;

/// Examples in single precision, row by row.
struct Part {
    x: Vec<f32>,
    y: Vec<usize>,
}

impl Part {
    fn len(&self) -> usize {
        self.y.len()
    }
}

/// A perceptron on the digits, trained by a program: warm-up and cosine, batches of 64; the fitness
/// is the mean validation loss. Forward and backward pass are written out, because a search trains
/// thousands of them.
struct Perceptron<'a> {
    train: &'a Part,
    valid: &'a Part,
    widths: Vec<usize>,
    steps: usize,
    stream: RandomStream,
}

const BATCH: usize = 64;
const WARMUP: usize = 10;

impl Perceptron<'_> {
    /// Sizes of all tensors: a weight `[in, out]` and a bias for each layer.
    fn sizes(&self) -> Vec<usize> {
        let pairs = self.widths.windows(2);
        pairs.flat_map(|w| [w[0] * w[1], w[1]]).collect()
    }

    fn start(&self, stream: &mut RandomStream) -> Vec<f32> {
        let mut w = Vec::new();
        for pair in self.widths.windows(2) {
            // He's initial weights.
            let std = (2.0 / pair[0] as f64).sqrt();
            w.extend((0..pair[0] * pair[1]).map(|_| (std * stream.next_normal()) as f32));
            w.extend(std::iter::repeat_n(0.0, pair[1]));
        }
        w
    }

    /// Outputs of all layers for rows of inputs; the last are logits.
    fn forward(&self, w: &[f32], x: &[f32]) -> Vec<Vec<f32>> {
        let rows = x.len() / self.widths[0];
        let mut outputs: Vec<Vec<f32>> = Vec::new();
        let mut from = 0;
        for (l, pair) in self.widths.windows(2).enumerate() {
            let (n, m) = (pair[0], pair[1]);
            let (weight, bias) = (&w[from..from + n * m], &w[from + n * m..from + n * m + m]);
            from += n * m + m;
            let input: &[f32] = if l == 0 { x } else { &outputs[l - 1] };
            let mut out = vec![0.0; rows * m];
            for (out, input) in out.chunks_exact_mut(m).zip(input.chunks_exact(n)) {
                out.copy_from_slice(bias);
                for (a, row) in input.iter().zip(weight.chunks_exact(m)) {
                    if *a != 0.0 {
                        out.iter_mut().zip(row).for_each(|(o, w)| *o += a * w);
                    }
                }
                if l + 2 < self.widths.len() {
                    out.iter_mut().for_each(|o| *o = o.max(0.0));
                }
            }
            outputs.push(out);
        }
        outputs
    }

    /// Turns logits into `softmax - one hot`, over the number of rows, and gives the mean loss.
    fn loss(&self, logits: &mut [f32], y: &[usize]) -> f64 {
        let classes = self.widths[self.widths.len() - 1];
        let (mut total, rows) = (0.0, y.len() as f32);
        for (row, y) in logits.chunks_exact_mut(classes).zip(y) {
            let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let own = row[*y] - top;
            row.iter_mut().for_each(|z| *z = (*z - top).exp());
            let sum: f32 = row.iter().sum();
            total += f64::from(sum.ln() - own);
            row.iter_mut().for_each(|z| *z /= sum * rows);
            row[*y] -= 1.0 / rows;
        }
        total / f64::from(rows)
    }

    /// The gradient of the mean loss into `g`; gives the loss.
    fn gradient(&self, w: &[f32], x: &[f32], y: &[usize], g: &mut [f32]) -> f64 {
        let mut outputs = self.forward(w, x);
        let layers = self.widths.len() - 1;
        let loss = self.loss(&mut outputs[layers - 1], y);
        g.fill(0.0);
        let mut to = w.len();
        for l in (0..layers).rev() {
            let (n, m) = (self.widths[l], self.widths[l + 1]);
            let from = to - n * m - m;
            let (before, after) = outputs.split_at_mut(l);
            let delta = &after[0];
            let input: &[f32] = if l == 0 { x } else { &before[l - 1] };
            let (weight_grad, bias_grad) = g[from..to].split_at_mut(n * m);
            for (d, input) in delta.chunks_exact(m).zip(input.chunks_exact(n)) {
                bias_grad.iter_mut().zip(d).for_each(|(b, d)| *b += d);
                for (a, row) in input.iter().zip(weight_grad.chunks_exact_mut(m)) {
                    if *a != 0.0 {
                        row.iter_mut().zip(d).for_each(|(r, d)| *r += a * d);
                    }
                }
            }
            if l > 0 {
                let weight = &w[from..from + n * m];
                let below = &mut before[l - 1];
                for (d, h) in delta.chunks_exact(m).zip(below.chunks_exact_mut(n)) {
                    for (h, row) in h.iter_mut().zip(weight.chunks_exact(m)) {
                        // Where ReLU was open.
                        *h = if *h > 0.0 {
                            row.iter().zip(d).map(|(w, d)| w * d).sum()
                        } else {
                            0.0
                        };
                    }
                }
            }
            to = from;
        }
        loss
    }

    fn schedule(&self, step: usize) -> f64 {
        if step < WARMUP {
            return (step + 1) as f64 / WARMUP as f64;
        }
        let t = (step - WARMUP) as f64 / (self.steps - WARMUP) as f64;
        0.5 * (1.0 + (std::f64::consts::PI * t).cos())
    }
}

impl ProxyTask for Perceptron<'_> {
    fn fitness(
        &self,
        program: &CompiledProgram,
        seed: u64,
        abort: &AbortRule,
    ) -> optim::Result<Fitness> {
        let stream = self.stream.split_index("task", seed);
        let mut w = self.start(&mut stream.split("weights"));
        let mut order = stream.split("order");
        let mut run = program.run::<f32>(&self.sizes());
        let (mut g, d) = (vec![0.0; w.len()], self.widths[0]);
        let (mut x, mut y) = (vec![0.0; BATCH * d], vec![0; BATCH]);
        for step in 0..self.steps {
            for k in 0..BATCH {
                let i = order.below(self.train.len())?;
                x[k * d..(k + 1) * d].copy_from_slice(&self.train.x[i * d..(i + 1) * d]);
                y[k] = self.train.y[i];
            }
            let loss = self.gradient(&w, &x, &y, &mut g);
            if abort.stops(step + 1, loss, &w) {
                return Ok(Fitness::aborted(step + 1));
            }
            run.update(&mut w, &g, self.schedule(step))?;
        }
        let mut outputs = self.forward(&w, &self.valid.x);
        let last = outputs.len() - 1;
        Ok(Fitness::of(self.loss(&mut outputs[last], &self.valid.y)))
    }

    fn abort(&self) -> AbortRule {
        AbortRule::for_classes(10)
    }

    fn cost(&self) -> f64 {
        (self.sizes().iter().sum::<usize>() * self.steps) as f64
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
        stream: trial.stream("small task"),
    };
    let large = Perceptron {
        train: &train,
        valid: &test,
        widths: vec![64, 64, 64, 10],
        steps: 500,
        stream: trial.stream("large task"),
    };
    let report = searched(trial, &small, which)?;
    let mut outcome = TrialOutcome::default()
        .metric("fitness", report.best_fitness)
        .metric("warm_fitness", report.history[0].best)
        .metric(
            "skipped",
            report.duplicates as f64 / report.generated.max(1) as f64,
        )
        .curve(curve(&report));
    if which == Which::Evolution {
        let (ratio, winner) = funnel(trial, &report, &large)?;
        outcome = outcome.metric("funnel_ratio", ratio).picture(Picture {
            caption: "the funnel's winner".into(),
            format: PictureFormat::Text,
            bytes: winner.to_string().into_bytes(),
        });
    }
    Ok(outcome.picture(Picture {
        caption: format!("the best program, fitness {:.4}", report.best_fitness),
        format: PictureFormat::Text,
        bytes: report.best.to_string().into_bytes(),
    }))
}

/// The search itself; Ctrl-C ends it after a batch.
fn searched(trial: &TrialContext, task: &dyn ProxyTask, which: Which) -> Result<SearchReport> {
    let warm = Program::adamw()?;
    let stream = trial.stream("search");
    let progress = |p: &Progress| trial.step(p.evaluated.min(p.budget), p.budget).is_ok();
    let options = SearchOptions {
        progress: Some(Box::new(progress)),
        ..SearchOptions::default()
    };
    let report = match which {
        Which::Evolution => {
            let search = Evolution {
                budget: TRAININGS,
                ..Evolution::default()
            };
            search.run_with(task, &warm, &stream, options)?
        }
        Which::Random => {
            let search = RandomSearch {
                budget: TRAININGS,
                ..RandomSearch::default()
            };
            search.run_with(task, &warm, &stream, options)?
        }
        Which::Tuning => {
            let search = ConstantTuning {
                budget: TRAININGS,
                ..ConstantTuning::default()
            };
            search.run_with(task, &warm, &stream, options)?
        }
    };
    if !report.finished && report.evaluated < TRAININGS {
        trial.step(report.evaluated, TRAININGS)?;
    }
    Ok(report)
}

/// The best fitness at every eighth training.
fn curve(report: &SearchReport) -> Curve {
    let mut curve = Curve::new("best fitness", "trainings").log_y();
    let mut points = report.history.iter().peekable();
    let mut best = f64::INFINITY;
    for evaluated in (1..=TRAININGS).step_by(8) {
        while let Some(point) = points.next_if(|p| p.evaluated <= evaluated) {
            best = point.best;
        }
        curve.push(evaluated as f64, best);
    }
    curve
}

/// The winner on the larger task, relative to tuned AdamW there.
fn funnel(
    trial: &TrialContext,
    report: &SearchReport,
    large: &Perceptron<'_>,
) -> Result<(f64, Program)> {
    let mut tuning = trial.stream("tuned baseline");
    let (_, baseline) = Funnel::tuned_adamw(large, CANDIDATES, 0, &mut tuning)?;
    let mut programs = vec![report.best.clone()];
    let mut others: Vec<&Individual> = report.population.iter().collect();
    others.sort_by(|a, b| a.fitness.total_cmp(&b.fitness));
    programs.extend(
        others
            .iter()
            .take(CANDIDATES - 1)
            .map(|i| i.program.clone()),
    );
    let task = Perceptron {
        train: large.train,
        valid: large.valid,
        widths: large.widths.clone(),
        steps: large.steps,
        stream: large.stream.clone(),
    };
    let stages = vec![FunnelStage {
        task: Box::new(task),
        keep: 1,
        baseline: Some(baseline),
        seed: 0,
    }];
    let selected = Funnel { stages }.select(&programs, &Signature::optimizer())?;
    match selected.into_iter().next() {
        Some(winner) => Ok((winner.fitness[0] / baseline, winner.program)),
        None => Err(Error::Trial("the funnel is empty".into())),
    }
}

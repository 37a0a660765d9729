//! Samplers of first and second order around an exact denoiser, at the same number of evaluations.

use super::clouds::ring;
use crate::scenario::{
    metric, Arm, Better, Claim, Curve, Data, Definition, Metric, Paper, Role, Scenario, Setting,
    TrialContext, TrialOutcome,
};
use crate::scenarios::generation::{digits, image_grid};
use crate::statistics::quantile;
use crate::{Error, Result};
use candle_core::{DType, Tensor};
use flows::schedule::VpSde;
use flows::stepper::Heun;
use flows::{
    AnalyticMixture, Condition, Ddim, DpmSolverPP2M, DpmSolverPP2S, Grid, Sampler, Stepper,
};

/// Digits that the denoiser knows, and the width of its kernel.
const KNOWN: usize = 400;
const BANDWIDTH: f64 = 0.2;
const SAMPLES: usize = 100;
/// Steps of what counts as the solution.
const FINE: usize = 1000;
/// Evaluations with their metrics.
const EVALUATIONS: [(usize, &str); 3] = [(10, "error10"), (20, "error20"), (40, "error40")];
/// Steps over which the order is fitted, and those of the solution there.
const ORDER_STEPS: [usize; 4] = [20, 40, 80, 160];
const ORDER_FINE: usize = 5120;
/// Variance of the twelve Gaussians there.
const RING_VARIANCE: f64 = 0.01;

pub(in crate::scenarios) struct Samplers;

impl Scenario for Samplers {
    fn definition(&self) -> Definition {
        let number = |name, label, better| Metric {
            name,
            label,
            better,
        };
        let nearer = |id, words, name, factor| {
            let bound = metric("ddim", name) * factor;
            Claim::every_seed(id, words, metric("2m", name).at_most(bound))
        };
        let second =
            |id, words, arm| Claim::every_seed(id, words, metric(arm, "order").at_least(1.8));
        Definition {
            slug: "guidance-core",
            title: "Samplers (DDIM, Heun, DPM-Solver++)",
            paper: Paper {
                title: "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models",
                venue: "2022",
                arxiv: "2211.01095",
            },
            krate: "flows",
            module: "stepper",
            tags: &["diffusion", "speed"],
            version: 1,
            summary: "The exact denoiser of 400 handwritten digits (bandwidth 0.2), variance-preserving schedule from t = 1 to \
                      0.005, 100 samples without guidance. Errors are median distances to where 1000 steps of DPM-Solver++ (2M) \
                      end, at the same number of evaluations: solvers with two of them a step make half the steps. Levels lie \
                      evenly in ln(alpha / sigma), or in time. The order is the slope of the logarithmic error over 20 to 160 \
                      steps, against 5120 of them, on a ring of twelve Gaussians down to t = 0.05.",
            notes: "The grid matters as much as the order: on even times 2M has 0.96 of DDIM's error at 10 evaluations.",
            data: Data { embedded: "digits", real: None },
            arms: vec![
                Arm::new("ddim", "DDIM", Role::Baseline),
                Arm::new("heun", "Heun", Role::Variant),
                Arm::new("2s", "DPM-Solver++ (2S)", Role::Method),
                Arm::new("2m", "DPM-Solver++ (2M)", Role::Method),
            ],
            metrics: vec![
                number("error10", "error, 10 evaluations", Better::Lower),
                number("error20", "error, 20 evaluations", Better::Lower),
                number("error40", "error, 40 evaluations", Better::Lower),
                number("even10", "error, 10 evaluations on even times", Better::Lower),
                number("order", "order", Better::Higher),
            ],
            claims: vec![
                nearer("ten", "with 10 evaluations 2M has at most 0.4 of DDIM's error", "error10", 0.4),
                nearer("twenty", "with 20 at most 0.2", "error20", 0.2),
                nearer("forty", "with 40 at most 0.12", "error40", 0.12),
                second("heun", "Heun is of second order (1.8)", "heun"),
                second("2s", "2S likewise", "2s"),
                second("2m", "2M likewise", "2m"),
            ],
            full: None,
        }
    }

    fn run(&self, arm: &Arm, _: &Setting, trial: &TrialContext) -> Result<TrialOutcome> {
        let data = digits(trial)?.inputs.narrow(0, 0, KNOWN)?;
        let setup = Setup {
            trial,
            noise: normal(trial, data.dims()[1])?,
            model: AnalyticMixture::kernel_density(&data, BANDWIDTH)?,
        };
        let even = |steps| Grid::uniform_time_between(&VpSde::default(), 1.0, 0.005, steps);
        let in_lambda = |steps| Grid::uniform_lambda_between(&VpSde::default(), 1.0, 0.005, steps);
        let solution = setup.sample("2m", in_lambda(FINE)?)?;
        let per_step = if matches!(arm.name, "2s" | "heun") {
            2
        } else {
            1
        };
        let mut curve = Curve::new("error", "evaluations").log_x().log_y();
        let mut on_times = Curve::new("error on even times", "evaluations")
            .log_x()
            .log_y();
        let mut outcome = TrialOutcome::default();
        for (i, (evaluations, name)) in EVALUATIONS.into_iter().enumerate() {
            trial.step(i, EVALUATIONS.len() + 1)?;
            let steps = evaluations / per_step;
            let x = setup.sample(arm.name, in_lambda(steps)?)?;
            let error = median_distance(&x, &solution)?;
            let other = median_distance(&setup.sample(arm.name, even(steps)?)?, &solution)?;
            curve.push(evaluations as f64, error);
            on_times.push(evaluations as f64, other);
            outcome = outcome.metric(name, error);
            if i == 0 {
                let caption = format!("{evaluations} evaluations");
                let some = x.narrow(0, 0, 40)?;
                outcome = outcome
                    .metric("even10", other)
                    .picture(image_grid(&caption, &some, 10)?);
            }
        }
        trial.step(EVALUATIONS.len(), EVALUATIONS.len() + 1)?;
        let outcome = outcome.metric("order", order(arm.name, trial)?);
        Ok(outcome.curve(curve).curve(on_times))
    }
}

fn normal(trial: &TrialContext, width: usize) -> Result<Tensor> {
    let mut stream = trial.stream("noise");
    Ok(stream.normal(0.0, 1.0, (SAMPLES, width), DType::F64, &trial.device)?)
}

/// A model and where samples of it begin.
struct Setup<'t> {
    trial: &'t TrialContext<'t>,
    noise: Tensor,
    model: AnalyticMixture,
}

impl Setup<'_> {
    fn sample(&self, solver: &str, grid: Grid) -> Result<Tensor> {
        let stepper: Box<dyn Stepper> = match solver {
            "ddim" => Box::new(Ddim::default()),
            "heun" => Box::new(Heun),
            "2s" => Box::new(DpmSolverPP2S::new(VpSde::default())),
            "2m" => Box::new(DpmSolverPP2M::default()),
            other => return Err(Error::Trial(format!("no solver for arm `{other}`"))),
        };
        let mut sampler = Sampler::new(&self.model, grid).stepper(stepper);
        let rng = self.trial.stream("steps");
        Ok(sampler.sample(&self.noise, &Condition::Null, None, &rng)?.x)
    }
}

fn median_distance(x: &Tensor, y: &Tensor) -> Result<f64> {
    let distances = (x - y)?.sqr()?.sum(1)?.sqrt()?.to_vec1::<f64>()?;
    Ok(quantile(&distances, 0.5))
}

/// The slope of `-ln error` by `ln steps`, by least squares.
fn order(solver: &str, trial: &TrialContext) -> Result<f64> {
    let setup = Setup {
        trial,
        noise: normal(trial, 2)?,
        model: ring(RING_VARIANCE, &trial.device)?,
    };
    let grid = |steps| Grid::uniform_lambda_between(&VpSde::default(), 1.0, 0.05, steps);
    let solution = setup.sample(solver, grid(ORDER_FINE)?)?;
    let (mut x, mut y) = (Vec::new(), Vec::new());
    for steps in ORDER_STEPS {
        let found = setup.sample(solver, grid(steps)?)?;
        x.push((steps as f64).ln());
        y.push(-median_distance(&found, &solution)?.ln());
    }
    let mean = |v: &[f64]| v.iter().sum::<f64>() / v.len() as f64;
    let (mx, my) = (mean(&x), mean(&y));
    let pairs = || x.iter().map(|x| x - mx).zip(y.iter().map(|y| y - my));
    let (xy, xx): (f64, f64) = (
        pairs().map(|(a, b)| a * b).sum(),
        pairs().map(|(a, _)| a * a).sum(),
    );
    Ok(xy / xx)
}

//! Adaptive guidance against fewer steps at the same number of evaluations.

use super::clouds::ring;
use crate::scenario::{
    metric, Arm, Better, Claim, Curve, Data, Definition, Metric, Paper, Role, Scenario, Setting,
    TrialContext, TrialOutcome,
};
use crate::scenarios::generation::{all_classes, digits, exact_digits};
use crate::statistics::quantile;
use crate::{Error, Result};
use candle_core::{DType, Tensor};
use flows::schedule::VpSde;
use flows::{AnalyticMixture, Condition, Grid, Guidance, RandomStream, Sampler};
use guidance::adaptive::policy::{Policy, PolicySearch};
use guidance::adaptive::{LinCoef, StepKind};
use guidance::{AdaptiveGuidance, Cfg, LinearAg, LinearAgFitter, Space};

const SAMPLES: usize = 200;
const STEPS: usize = 20;
const COMPONENTS: usize = 600;
const BANDWIDTH: f64 = 0.2;
/// Steps of the pattern of [`StepKind::alternating`] that are not conditional.
const PATTERN: usize = 14;
const TRAJECTORIES: usize = 150;
/// Scales with the ending of their metrics.
const SCALES: [(f64, &str); 2] = [(4.0, "4"), (7.5, "7.5")];

/// Of the search: scale, steps, samples of the comparison, random policies.
const RING_SCALE: f64 = 4.0;
const RING_STEPS: usize = 10;
const RING_SAMPLES: usize = 500;
const PLACEMENTS: usize = 30;

pub(in crate::scenarios) struct AdaptiveGuidanceScenario;

impl Scenario for AdaptiveGuidanceScenario {
    fn definition(&self) -> Definition {
        let number = |name, label, better| Metric {
            name,
            label,
            better,
        };
        let below = |id, words, arm, own, factor, other, of| {
            Claim::every_seed(
                id,
                words,
                metric(arm, own).at_most(metric(other, of) * factor),
            )
        };
        Definition {
            slug: "adaptive-guidance",
            title: "Adaptive guidance",
            paper: Paper {
                title: "Adaptive Guidance: Training-free Acceleration of Conditional Diffusion Models",
                venue: "AAAI 2025",
                arxiv: "2312.12487",
            },
            krate: "guidance",
            module: "adaptive",
            tags: &["guidance", "speed"],
            version: 1,
            summary: "The exact conditional denoiser of 600 handwritten digits (bandwidth 0.2), variance-preserving \
                      schedule, DDIM, 200 samples at the scales 4 and 7.5. What is compared is the median distance of \
                      a sample to the one that full guidance with 20 steps (40 evaluations) makes of the same noise, \
                      relative to its norm. Fewer steps with full guidance are the baseline. The search is made on \
                      a ring of twelve Gaussians in the plane with 10 steps.",
            notes: "Adaptive guidance compares clean samples (threshold 0.999). On noise predictions with the paper's \
                    0.991 guidance ends after its first step here. Holding the last difference is a rule that others \
                    use; it runs on the same pattern of steps as the fitted combinations.",
            data: Data { embedded: "digits", real: None },
            arms: vec![
                Arm::new("cfg", "full guidance, fewer steps", Role::Baseline),
                Arm::new("hold", "last difference held", Role::Baseline),
                Arm::new("ag", "adaptive guidance", Role::Method),
                Arm::new("linear", "fitted combinations", Role::Method),
                Arm::new("ag-noise", "adaptive guidance on noise predictions", Role::Variant),
                Arm::new("policy", "searched policy", Role::Variant),
            ],
            metrics: vec![
                number("error4", "distance to full guidance, scale 4", Better::Lower),
                number("error7.5", "distance to full guidance, scale 7.5", Better::Lower),
                number("nfe4", "evaluations per sample, scale 4", Better::Lower),
                number("nfe7.5", "evaluations per sample, scale 7.5", Better::Lower),
                number("fewer4", "distance with 14 steps, scale 4", Better::Neither),
                number("fewer7.5", "distance with 14 steps, scale 7.5", Better::Neither),
                number("policy_error", "squared distance of the searched policy", Better::Lower),
                number("random_error", "squared distance of the best random policy", Better::Neither),
                number("policy_nfe", "evaluations per sample of the searched policy", Better::Lower),
            ],
            claims: vec![
                below(
                    "early-4",
                    "at scale 4 adaptive guidance is four times nearer than 16 guided steps",
                    "ag", "error4", 0.25, "cfg", "error4",
                ),
                below(
                    "early-7.5",
                    "the same at scale 7.5",
                    "ag", "error7.5", 0.25, "cfg", "error7.5",
                ),
                Claim::every_seed(
                    "calls",
                    "with at most 34 evaluations at scale 4",
                    metric("ag", "nfe4").at_most(34.0),
                ),
                below(
                    "linear-4",
                    "with 27 evaluations fitted combinations are ten times nearer than 14 guided steps (28)",
                    "linear", "error4", 0.1, "cfg", "fewer4",
                ),
                below(
                    "linear-7.5",
                    "the same at scale 7.5",
                    "linear", "error7.5", 0.1, "cfg", "fewer7.5",
                ),
                below(
                    "hold-4",
                    "and nearer than held differences by more than a third",
                    "linear", "error4", 0.6, "hold", "error4",
                ),
                below(
                    "hold-7.5",
                    "the same at scale 7.5",
                    "linear", "error7.5", 0.6, "hold", "error7.5",
                ),
                Claim::every_seed(
                    "policy",
                    "the searched policy beats the best of 30 random placements of its guided steps",
                    metric("policy", "policy_error").below(metric("policy", "random_error")),
                ),
            ],
            full: None,
        }
    }

    fn run(&self, arm: &Arm, _: &Setting, trial: &TrialContext) -> Result<TrialOutcome> {
        match arm.name {
            "policy" => search(trial),
            name => compare(name, trial),
        }
    }
}

/// The digits' model with noise, classes and the run that is to be matched.
struct Setup<'t> {
    trial: &'t TrialContext<'t>,
    model: AnalyticMixture,
    noise: Tensor,
    wanted: Condition,
    null: Condition,
}

impl Setup<'_> {
    fn grid(steps: usize) -> Result<Grid> {
        Ok(Grid::uniform_time(&VpSde::default(), steps)?)
    }

    fn sampler(&self, steps: usize) -> Result<Sampler<'_>> {
        Ok(Sampler::new(&self.model, Self::grid(steps)?).null(self.null.clone()))
    }

    /// Samples, and evaluations per sample.
    fn sample(&self, rule: impl Guidance, steps: usize) -> Result<(Tensor, f64)> {
        let mut sampler = self.sampler(steps)?.guidance(rule);
        let rng = self.trial.stream("steps");
        let out = sampler.sample(&self.noise, &self.wanted, None, &rng)?;
        Ok((out.x, out.nfe.per_sample(SAMPLES)))
    }

    /// The median relative distance to the samples of full guidance.
    fn error(&self, x: &Tensor, w: f64) -> Result<f64> {
        let (full, _) = self.sample(Cfg::new(w), STEPS)?;
        let norms = |x: &Tensor| -> Result<Vec<f64>> {
            Ok(x.to_dtype(DType::F64)?.sqr()?.sum(1)?.sqrt()?.to_vec1()?)
        };
        let (distance, size) = (norms(&(x - &full)?)?, norms(&full)?);
        let ratios: Vec<f64> = distance.iter().zip(&size).map(|(d, s)| d / s).collect();
        Ok(quantile(&ratios, 0.5))
    }
}

fn compare(arm: &str, trial: &TrialContext) -> Result<TrialOutcome> {
    let data = digits(trial)?;
    let d = data.inputs.dims()[1];
    let setup = Setup {
        trial,
        model: exact_digits(&data, COMPONENTS, BANDWIDTH)?,
        noise: trial
            .stream("noise")
            .normal(0.0, 1.0, (SAMPLES, d), DType::F64, &trial.device)?,
        wanted: all_classes(SAMPLES, data.classes, &trial.device)?,
        null: Condition::classes(&[data.classes as u32], &trial.device)?,
    };
    let mut outcome = TrialOutcome::default();
    for (i, (w, name)) in SCALES.into_iter().enumerate() {
        trial.step(i, SCALES.len())?;
        let mut curve =
            Curve::new(format!("distance, scale {w}"), "evaluations per sample").log_y();
        let mut points = |x: &Tensor, nfe: f64| -> Result<f64> {
            let error = setup.error(x, w)?;
            curve.push(nfe, error);
            Ok(error)
        };
        let (error, nfe) = match arm {
            "cfg" => {
                let mut errors = Vec::new();
                for steps in [10, 12, 14, 16, 18] {
                    let (x, nfe) = setup.sample(Cfg::new(w), steps)?;
                    errors.push((points(&x, nfe)?, nfe));
                }
                outcome = outcome.metric(&format!("fewer{name}"), errors[2].0);
                errors[3]
            }
            "ag" => {
                let mut chosen = (0.0, 0.0);
                for threshold in [0.9, 0.98, 0.99, 0.999, 0.9999] {
                    let rule = AdaptiveGuidance::new(w).threshold(threshold);
                    let (x, nfe) = setup.sample(rule, STEPS)?;
                    let error = points(&x, nfe)?;
                    if threshold == 0.999 {
                        chosen = (error, nfe);
                    }
                }
                chosen
            }
            "ag-noise" => {
                let rule = AdaptiveGuidance::new(w).space(Space::Eps);
                let (x, nfe) = setup.sample(rule, STEPS)?;
                (points(&x, nfe)?, nfe)
            }
            "hold" => {
                let (x, nfe) = setup.sample(held(w)?, STEPS)?;
                (points(&x, nfe)?, nfe)
            }
            "linear" => {
                let (x, nfe) = setup.sample(fitted(&setup, data.classes, w)?, STEPS)?;
                (points(&x, nfe)?, nfe)
            }
            other => return Err(Error::Trial(format!("no rule for arm `{other}`"))),
        };
        outcome = outcome
            .metric(&format!("error{name}"), error)
            .metric(&format!("nfe{name}"), nfe)
            .curve(curve);
    }
    Ok(outcome)
}

/// Combined steps that hold the last difference of the two predictions.
fn held(w: f64) -> Result<LinearAg> {
    let kinds = StepKind::alternating(STEPS, PATTERN);
    let hold = |(i, kind): (usize, &StepKind)| {
        (*kind == StepKind::Linear).then(|| LinCoef {
            first: i - 1,
            // Conditional before and now, unconditional before.
            weights: vec![-1.0, 1.0, 1.0],
            intercept: None,
        })
    };
    let coef = kinds.iter().enumerate().map(hold).collect();
    Ok(LinearAg::new(
        w,
        kinds,
        coef,
        Setup::grid(STEPS)?.levels().to_vec(),
    )?)
}

fn fitted(setup: &Setup, classes: usize, w: f64) -> Result<LinearAg> {
    let trial = setup.trial;
    let shape = (TRAJECTORIES, setup.noise.dims()[1]);
    let noise = trial
        .stream("fit")
        .normal(0.0, 1.0, shape, DType::F64, &trial.device)?;
    let wanted = all_classes(TRAJECTORIES, classes, &trial.device)?;
    let fitter = LinearAgFitter::new(w, StepKind::alternating(STEPS, PATTERN));
    Ok(fitter.fit(
        setup.sampler(STEPS)?,
        &noise,
        &wanted,
        None,
        &trial.stream("steps"),
    )?)
}

fn search(trial: &TrialContext) -> Result<TrialOutcome> {
    let model = ring(0.01, &trial.device)?;
    let grid = Setup::grid(RING_STEPS)?;
    let null = Condition::classes(&[4], &trial.device)?;
    let device = trial.device.clone();
    let draw = |n: usize, rng: &mut RandomStream| {
        let noise = rng.normal(0.0, 1.0, (n, 2), DType::F64, &device)?;
        let classes: flows::Result<Vec<u32>> = (0..n).map(|_| Ok(rng.below(4)? as u32)).collect();
        Ok((noise, Condition::classes(&classes?, &device)?))
    };
    let settings = PolicySearch::new(RING_SCALE);
    let mut rng = trial.stream("search");
    trial.step(0, 2)?;
    let policy = settings.search(&model, &grid, &null, draw, &mut rng)?;
    trial.step(1, 2)?;
    let (noise, wanted) = draw(RING_SAMPLES, &mut trial.stream("noise"))?;
    let sample = |rule: Box<dyn Guidance>| -> Result<Tensor> {
        let mut sampler = Sampler::new(&model, grid.clone())
            .null(null.clone())
            .guidance(rule);
        Ok(sampler
            .sample(&noise, &wanted, None, &trial.stream("steps"))?
            .x)
    };
    let full = sample(Box::new(Cfg::new(RING_SCALE)))?;
    let error = |rule: Policy| -> Result<f64> {
        let x = sample(Box::new(rule))?;
        Ok((x - &full)?.sqr()?.sum(1)?.mean_all()?.to_scalar()?)
    };
    let guided = policy
        .choice
        .iter()
        .filter(|k| policy.options[**k].cost > 1.0)
        .count();
    let mut random = Vec::new();
    let mut order = trial.stream("placements");
    for _ in 0..PLACEMENTS {
        let places = order.permutation(RING_STEPS)?;
        // Full guidance at these steps, the conditional prediction elsewhere.
        let mut logits = vec![vec![0.0; policy.options.len()]; RING_STEPS];
        for (rank, step) in places.iter().enumerate() {
            logits[*step as usize][if rank < guided { 3 } else { 1 }] = 1.0;
        }
        random.push(error(Policy::new(logits, policy.options.clone())?)?);
    }
    let mut curve = Curve::new("scale of the searched policy", "step");
    for (i, k) in policy.choice.iter().enumerate() {
        curve.push(i as f64, policy.options[*k].scale);
    }
    let best = random.iter().copied().fold(f64::INFINITY, f64::min);
    Ok(TrialOutcome::default()
        .metric("policy_nfe", policy.nfe())
        .metric("policy_error", error(policy)?)
        .metric("random_error", best)
        .curve(curve))
}

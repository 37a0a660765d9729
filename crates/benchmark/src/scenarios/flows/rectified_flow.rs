//! Rectified flow on handwritten digits: reflow straightens paths, so that one step is enough.

use crate::scenario::{
    metric, Arm, Better, Claim, Curve, Data, Definition, Metric, Paper, Role, Scenario, Setting,
    Suite, TrialContext, TrialOutcome,
};
use crate::scenarios::generation::{
    digits, frechet, image_grid, path_picture, trained_once, Cloud,
};
use crate::Result;
use candle_core::{Tensor, Var};
use candle_nn::ModuleT;
use flows::coupling::{reflow, Coupling, Examples, Gaussian, Independent};
use flows::metrics::{straightness, transport_cost, Cost};
use flows::ode::{FixedStep, OdeSolver};
use flows::train::{Distill, FlowLoss, TrainConfig, Trainer};
use flows::{Condition, RandomStream, Velocity};
use nn::init::SeededVars;
use nn::models::{Activation, Mlp, MlpConfig};
use optim::{AdamW, AdamWConfig};

const BATCH: usize = 256;
const SOLVER_STEPS: usize = 50;
const SAMPLES: usize = 2000;
const WIDTHS: [usize; 3] = [256, 256, 256];

pub(in crate::scenarios) struct RectifiedFlow;

/// How long is trained.
struct Budget {
    flow: usize,
    distill: usize,
    pairs: usize,
}

impl Budget {
    fn of(suite: Suite) -> Self {
        match suite {
            Suite::Quick => Self {
                flow: 1000,
                distill: 500,
                pairs: 6000,
            },
            _ => Self {
                flow: 4000,
                distill: 2000,
                pairs: 20_000,
            },
        }
    }
}

impl Scenario for RectifiedFlow {
    fn definition(&self) -> Definition {
        let number = |name, label, better| Metric {
            name,
            label,
            better,
        };
        Definition {
            slug: "rectified-flow",
            title: "Rectified flow",
            paper: Paper {
                title: "Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow",
                venue: "ICLR 2023",
                arxiv: "2209.03003",
            },
            krate: "flows",
            module: "train",
            tags: &["flow", "generation"],
            version: 1,
            summary: "Handwritten digits in [-1, 1], a perceptron with three hidden layers of 256 SiLU units over \
                      the image and nine features of the time. The first flow is trained on independent pairs, the \
                      second (started from it) on 20 000 pairs of the first's 50 Euler steps; the distilled one \
                      (started from the first) on the same pairs at time 0. 4000, 4000 and 2000 steps of Adam from \
                      1e-3 to 0, batch 256. Distances are Fréchet distances of 2000 samples to all digits, on \
                      pixels. The quick suite trains a quarter as long on 6000 pairs.",
            notes: "The three flows of a seed share the first one, which is trained once per process.",
            data: Data { embedded: "digits", real: None },
            arms: vec![
                Arm::new("one", "first flow", Role::Baseline),
                Arm::new("two", "after one reflow", Role::Method),
                Arm::new("distilled", "distilled to one step", Role::Variant),
            ],
            metrics: vec![
                number("fd1", "Fréchet distance, 1 step", Better::Lower),
                number("fd50", "Fréchet distance, 50 steps", Better::Lower),
                number("straightness", "straightness S, 50 steps", Better::Lower),
                number("cost", "E|Z1 − Z0|²", Better::Lower),
                number("independent_cost", "E|X1 − X0|² of independent pairs", Better::Neither),
            ],
            claims: vec![
                Claim::every_seed(
                    "one-step",
                    "one step of the second flow is five times nearer to the data than one of the first",
                    (metric("two", "fd1") * 5.0).below(metric("one", "fd1")),
                ),
                Claim::every_seed(
                    "distilled",
                    "the distilled flow's one step is nearer still",
                    metric("distilled", "fd1").below(metric("two", "fd1")),
                ),
                Claim::every_seed(
                    "straight",
                    "the second flow's paths are eight times straighter",
                    (metric("two", "straightness") * 8.0).below(metric("one", "straightness")),
                ),
                Claim::every_seed(
                    "cost",
                    "reflow does not raise the transport cost (+ 0.5 of training error)",
                    metric("two", "cost").at_most(metric("one", "cost") + 0.5),
                ),
                Claim::every_seed(
                    "coupling",
                    "the first flow's coupling costs less than independent pairs",
                    metric("one", "cost").below(metric("one", "independent_cost")),
                ),
                Claim::every_seed(
                    "quality",
                    "with 50 steps the second flow is within 0.6 of the data",
                    metric("two", "fd50").below(0.6),
                ),
            ],
            full: None,
        }
    }

    fn run(&self, arm: &Arm, _: &Setting, trial: &TrialContext) -> Result<TrialOutcome> {
        let budget = Budget::of(trial.suite);
        let data = digits(trial)?.inputs;
        let net = first_flow(trial, &data, &budget)?;
        match arm.name {
            "one" => {}
            name => {
                let mut rng = trial.stream("pairs");
                let solver = FixedStep::euler(SOLVER_STEPS);
                let mut source = Gaussian::like(&data)?;
                let mut pairs = reflow(&net, &mut source, budget.pairs, 2000, &solver, &mut rng)?;
                let (loss, steps) = match name {
                    "two" => (FlowLoss::default(), budget.flow),
                    _ => (Distill::OneStep.loss(Default::default())?, budget.distill),
                };
                train(trial, &net, &mut pairs, &loss, steps, name)?;
            }
        }
        evaluate(trial, &net, &data)
    }
}

/// A perceptron over the image and features of the time.
pub(in crate::scenarios) struct Net {
    mlp: Mlp,
    pub(in crate::scenarios) params: Vec<(String, Var)>,
}

impl Net {
    pub(in crate::scenarios) fn new(stream: &RandomStream, data: &Tensor) -> Result<Self> {
        let d = data.dims()[1];
        let config = MlpConfig {
            widths: [&[d + 9][..], &WIDTHS, &[d]].concat(),
            activation: Activation::Silu,
            ..MlpConfig::default()
        };
        let vars = SeededVars::new(stream);
        let mlp = Mlp::new(&config, vars.builder(data.dtype(), data.device()))?;
        Ok(Self {
            mlp,
            params: vars.trainable(),
        })
    }
}

/// `[t, sin k pi t, cos k pi t]` for `k = 1..=4`, `[rows, 9]`.
fn time_features(t: &Tensor) -> candle_core::Result<Tensor> {
    let t = t.unsqueeze(1)?;
    let mut columns = vec![t.clone()];
    for k in 1..=4 {
        let angle = t.affine(f64::from(k) * std::f64::consts::PI, 0.0)?;
        columns.extend([angle.sin()?, angle.cos()?]);
    }
    Tensor::cat(&columns, 1)
}

impl Velocity for Net {
    fn velocity(&self, x: &Tensor, t: &Tensor, _: &Condition) -> flows::Result<Tensor> {
        let input = Tensor::cat(&[x, &time_features(t)?], 1)?;
        Ok(self.mlp.forward_t(&input, true)?)
    }
}

/// Trains from the network's present weights, with a learning rate that falls to 0.
pub(in crate::scenarios) fn train(
    trial: &TrialContext,
    net: &Net,
    pairs: &mut dyn Coupling,
    loss: &FlowLoss,
    steps: usize,
    name: &str,
) -> Result<()> {
    let vars = net.params.iter().map(|(_, v)| v.clone()).collect();
    let adam = AdamWConfig {
        lr: 1e-3,
        weight_decay: 0.0,
        ..AdamWConfig::default()
    };
    let config = TrainConfig {
        lr: 1e-3,
        warmup: 0,
        ema_decay: 0.0,
        grad_clip: None,
    };
    let optimizer = <AdamW as candle_nn::Optimizer>::new(vars, adam)?;
    let mut trainer = Trainer::new(net.params.clone(), optimizer, config)?;
    let mut rng = trial.stream(name);
    for step in 0..steps {
        trial.step(step, steps)?;
        trainer.set_learning_rate(1e-3 * (1.0 - step as f64 / steps as f64));
        let (x0, x1) = pairs.batch(BATCH, &mut rng)?;
        trainer.step(&loss.sample_and_loss(net, &x0, &x1, &mut rng)?)?;
    }
    Ok(())
}

/// The first flow of a seed, which all its arms start from.
fn first_flow(trial: &TrialContext, data: &Tensor, budget: &Budget) -> Result<Net> {
    let net = Net::new(&trial.stream("weights"), data)?;
    let key = ("rectified-flow", trial.seed, budget.flow);
    trained_once(key, &net.params, || {
        let mut pairs = Independent {
            source: Gaussian::like(data)?,
            target: Examples(data.clone()),
        };
        let loss = FlowLoss::default();
        train(trial, &net, &mut pairs, &loss, budget.flow, "one")
    })?;
    Ok(net)
}

fn evaluate(trial: &TrialContext, net: &Net, data: &Tensor) -> Result<TrialOutcome> {
    let mut rng = trial.stream("evaluation");
    let (d, dtype) = (data.dims()[1], data.dtype());
    let noise = rng.normal(0.0, 1.0, (SAMPLES, d), dtype, &trial.device)?;
    let reference = Cloud::new(data)?;
    let mut curve = Curve::new("Fréchet distance", "Euler steps")
        .log_x()
        .log_y();
    let mut outcome = TrialOutcome::default();
    for steps in [1, 2, 5, SOLVER_STEPS] {
        let samples = FixedStep::euler(steps).solve(net, &noise, 0.0, 1.0)?.x;
        let distance = frechet(&Cloud::new(&samples)?, &reference)?;
        curve.push(steps as f64, distance);
        outcome = match steps {
            1 => outcome.metric("fd1", distance).picture(image_grid(
                "one step",
                &samples.narrow(0, 0, 40)?,
                10,
            )?),
            SOLVER_STEPS => outcome
                .metric("fd50", distance)
                .metric("cost", transport_cost(&noise, &samples, Cost::SquaredL2)?)
                .picture(image_grid("50 steps", &samples.narrow(0, 0, 40)?, 10)?),
            _ => outcome,
        };
    }
    let some = noise.narrow(0, 0, 500)?;
    let paths = FixedStep::euler(SOLVER_STEPS)
        .recorded()
        .solve(net, &some, 0.0, 1.0)?;
    let states = paths.trajectory.unwrap_or_default();
    let few: Vec<Tensor> = states
        .iter()
        .map(|s| s.narrow(0, 0, 24))
        .collect::<candle_core::Result<_>>()?;
    let caption = "24 paths in the plane of the data's largest variance";
    let independent = transport_cost(&noise.narrow(0, 0, data.dims()[0])?, data, Cost::SquaredL2)?;
    Ok(outcome
        .metric("straightness", straightness(&states, &paths.times)?)
        .metric("independent_cost", independent)
        .curve(curve)
        .picture(path_picture(caption, &reference, &few)?))
}

//! Optimized noise of a one-step generator of digits against the best of many draws.

use super::judge::split;
use crate::scenario::{
    metric, Arm, Better, Claim, Curve, Data, Definition, Metric, Paper, Role, Scenario, Setting,
    TrialContext, TrialOutcome,
};
use crate::scenarios::generation::{digits, exact_digits, frechet, image_grid, Cloud};
use crate::{Error, Result};
use candle_core::{DType, Module, ModuleT, Tensor, Var};
use datasets::Classification;
use flows::schedule::VpSde;
use flows::{AnalyticMixture, Condition, Grid, Level, RandomStream, Sampler};
use guidance::reno::{best_of_n, FeatureCosine, LogProb, LrMode, Reno, RenoConfig, RewardLoss};
use nn::activation::Activation;
use nn::init::SeededVars;
use nn::linear::{linear, Linear};
use nn::loss::{cross_entropy, Reduction};
use nn::models::{Mlp, MlpConfig};
use optim::{AdamW, AdamWConfig};

const BANDWIDTH: f64 = 0.2;
const PAIRS: usize = 3000;
const TEACHER_STEPS: usize = 18;
const DISTILLATION: usize = 1500;
const FEATURE_STEPS: usize = 400;
const FEATURES: usize = 64;
const SAMPLES: usize = 200;
const ITERATIONS: usize = 50;
const WEIGHT: f64 = 5.0;

pub(in crate::scenarios) struct RenoScenario;

impl Scenario for RenoScenario {
    fn definition(&self) -> Definition {
        let number = |name, label, better| Metric {
            name,
            label,
            better,
        };
        let radius = 63f64.sqrt();
        let reno = |name, label, role, lr, reg, two| {
            Arm::new(name, label, role).fixed(&[("lr", lr), ("reg", reg), ("two", two)])
        };
        let sure = |name, label, role| {
            Arm::new(name, label, role).fixed(&[("lr", 1.0), ("reg", 0.01), ("draws", 50.0)])
        };
        Definition {
            slug: "reno",
            title: "Reward-based noise optimization",
            paper: Paper {
                title: "ReNO: Enhancing One-step Text-to-Image Models through Reward-based Noise Optimization",
                venue: "NeurIPS 2024",
                arxiv: "2406.04312",
            },
            krate: "guidance",
            module: "reno",
            tags: &["guidance", "generation", "reward"],
            version: 2,
            summary: "A one-step generator of handwritten digits: a perceptron (256, 256) on noise and class, trained \
                      on 3000 samples that 18 DDIM steps of the digits' exact model (bandwidth 0.2) make. The rewards \
                      are cosines between features of the sample and of a wanted digit, features being the hidden \
                      layers of two classifiers of 900 digits; the judge is the same of a third classifier of the others. \
                      The last arms have the log-probability of the first classifier for a reward. \
                      200 samples, 50 iterations, absolute learning rates. 150 draws cost as much as 50 iterations with \
                      their gradients.",
            notes: "The paper's learning rate of 5 for |z| = 128 is 0.3 here. Without the regularizer the norm of \
                    these 64 numbers grows too, but by 6 %. The same experiment in PyTorch gives 5 to 7 %, with features \
                    of ReLU, SiLU and tanh units and with twice the pairs, so it is not 10 % here: the norm grows with the way \
                    to the goal, and by 90 % there when the generator is asked for another class than the goal's. \
                    With a classifier's log-probability as the reward the noise does not drift here: the samples end at a \
                    Fréchet distance of 1.2 from the digits, where the best of 50 draws, which are the classifier's surest and \
                    not typical ones, lie at 2.0. Stopping early is nearer by 0.03 in the mean, on 4 of 5 seeds.",
            data: Data { embedded: "digits", real: None },
            arms: vec![
                Arm::new("best50", "best of 50 draws", Role::Baseline).fixed(&[("draws", 50.0)]),
                Arm::new("best150", "best of 150 draws", Role::Baseline).fixed(&[("draws", 150.0)]),
                reno("reno", "ReNO, lr 1", Role::Method, 1.0, 0.01, 1.0),
                reno("slow", "ReNO, lr 0.3", Role::Variant, 0.3, 0.01, 1.0),
                reno("free", "without regularizer, lr 1", Role::Variant, 1.0, 0.0, 1.0),
                reno("single", "one reward, lr 0.3", Role::Variant, 0.3, 0.01, 0.0),
                sure("sure-best50", "log-probability, best of 50", Role::Baseline),
                sure("sure", "log-probability, lr 1", Role::Variant),
                sure("sure-stop", "log-probability, lr 1, until the loss is below 0.01", Role::Variant),
            ],
            metrics: vec![
                number("judge", "judge, 1 - cosine", Better::Lower),
                number("initial", "judge of the first draw", Better::Neither),
                number("norm", "norm of the noise", Better::Neither),
                number("density", "log-density of the sample", Better::Higher),
                number("fd", "Fréchet distance of the samples to the digits", Better::Lower),
            ],
            claims: vec![
                Claim::every_seed(
                    "judge",
                    "a judge that was held out finds a quarter or less of the best of 150 draws' distance",
                    metric("reno", "judge").at_most(metric("best150", "judge") * 0.25),
                ),
                Claim::every_seed(
                    "radius",
                    "the noise stays within 3 % of a normal vector's norm",
                    (metric("reno", "norm") - radius).abs().at_most(0.03 * radius),
                ),
                Claim::every_seed(
                    "radius-free",
                    "without the regularizer it leaves it by more than 10 %",
                    metric("free", "norm").above(1.1 * radius),
                ),
                Claim::every_seed(
                    "rewards",
                    "two rewards are better than one in the judge's eyes",
                    metric("slow", "judge").below(metric("single", "judge")),
                ),
                Claim::every_seed(
                    "saturated",
                    "where the reward is a classifier's log-probability, which saturates, the noise drifts: the samples \
                     end farther from the digits than the best of 50 draws",
                    metric("sure", "fd").above(metric("sure-best50", "fd")),
                ),
                Claim::every_seed(
                    "early-stop",
                    "rows that stop below a loss of 0.01 end nearer to the digits",
                    metric("sure-stop", "fd").below(metric("sure", "fd")),
                ),
            ],
            full: None,
        }
    }

    fn run(&self, arm: &Arm, setting: &Setting, trial: &TrialContext) -> Result<TrialOutcome> {
        let data = digits(trial)?;
        let model = exact_digits(&data, data.len(), BANDWIDTH)?;
        let net = generator(trial, &data, &model)?;
        let (known, others) = split(&data, 900)?;
        let first = Features::train(&known, trial, "first")?;
        let second = Features::train(&known, trial, "second")?;
        let judge = Features::train(&others, trial, "judge")?;
        let goals = known.inputs.narrow(0, 0, SAMPLES)?;
        let classes = known.labels.narrow(0, 0, SAMPLES)?;
        let condition = Condition::Class(classes.clone());
        let reward = |features: &Features, name: &str| -> Result<_> {
            let target = features.of(&goals)?.detach();
            let own = features.clone();
            Ok(FeatureCosine {
                encoder: move |x: &Tensor| Ok(own.of(x)?),
                target,
                name: name.to_string(),
            })
        };
        let (one, two) = (reward(&first, "first")?, reward(&second, "second")?);
        let held_out = reward(&judge, "judge")?;
        let generate = |z: &Tensor, c: &Condition| Ok(net.generate(z, c, known.classes)?);
        let noise =
            trial
                .stream("noise")
                .normal(0.0, 1.0, goals.shape(), goals.dtype(), &trial.device)?;
        let sure = LogProb {
            classifier: |x: &Tensor| Ok(first.logits(x)?),
            labels: classes,
            name: "sure".into(),
        };
        let saturating = arm.name.starts_with("sure");
        let both: Vec<(f64, &dyn RewardLoss)> = match saturating {
            true => vec![(1.0, &sure)],
            false => vec![(WEIGHT, &one), (WEIGHT, &two)],
        };
        let mut outcome = TrialOutcome::default();
        let (z, x) = match arm.name {
            "best50" | "best150" | "sure-best50" => {
                let n = setting.get("draws")? as usize;
                let mut rng = trial.stream("draws");
                let best = best_of_n(&generate, &both, &noise, &condition, n, &mut rng)?;
                (best.z, best.sample)
            }
            _ => {
                let rewards = match saturating || setting.get("two")? > 0.0 {
                    true => both,
                    false => vec![(WEIGHT, &one as &dyn RewardLoss)],
                };
                let config = RenoConfig {
                    iters: ITERATIONS,
                    lr: setting.get("lr")?,
                    lr_mode: LrMode::Absolute,
                    reg_weight: setting.get("reg")?,
                    early_stop: (arm.name == "sure-stop").then_some(0.01),
                    ..RenoConfig::default()
                };
                let reno = Reno::new(&generate, rewards, config)?;
                let mut run = reno.start(&noise, &condition)?;
                let mut losses = Curve::new("loss of the rewards", "iteration").log_y();
                while let Some(step) = run.step()? {
                    trial.step(step.iteration, ITERATIONS)?;
                    losses.push(step.iteration as f64, mean(&step.loss));
                }
                outcome = outcome.curve(losses);
                let out = run.finish()?;
                (out.best_z, out.best_sample)
            }
        };
        let judged = |x: &Tensor| -> Result<f64> {
            let loss = held_out.loss(x, &condition)?;
            Ok(loss.mean_all()?.to_dtype(DType::F64)?.to_scalar()?)
        };
        let norms = z.sqr()?.sum(1)?.sqrt()?.mean_all()?.to_dtype(DType::F64)?;
        let clean = Level::new(1.0, 0.0, 0.0)?;
        let density = model.log_density(&x, &clean.into(), &Condition::Null)?;
        let before = generate(&noise, &condition)?;
        let rows = |x: &Tensor| x.narrow(0, 0, 10);
        let picture = Tensor::cat(&[rows(&before)?, rows(&x)?, rows(&goals)?], 0)?;
        Ok(outcome
            .metric("judge", judged(&x)?)
            .metric("initial", judged(&before)?)
            .metric("norm", norms.to_scalar()?)
            .metric("fd", frechet(&Cloud::new(&x)?, &Cloud::new(&data.inputs)?)?)
            .metric(
                "density",
                density.mean_all()?.to_dtype(DType::F64)?.to_scalar()?,
            )
            .picture(image_grid("before, after, wanted", &picture, 10)?))
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

fn adam(vars: &SeededVars, lr: f64) -> Result<AdamW> {
    let params: Vec<Var> = vars.trainable().into_iter().map(|(_, v)| v).collect();
    let config = AdamWConfig {
        lr,
        weight_decay: 0.0,
        ..AdamWConfig::default()
    };
    Ok(<AdamW as candle_nn::Optimizer>::new(params, config)?)
}

/// A perceptron from noise and class to a digit.
struct OneStep(Mlp);

impl OneStep {
    fn generate(&self, z: &Tensor, condition: &Condition, classes: usize) -> flows::Result<Tensor> {
        let Condition::Class(labels) = condition else {
            return Err(flows::Error::other("a generator of classes"));
        };
        let eye = Tensor::eye(classes, z.dtype(), z.device())?;
        let input = Tensor::cat(&[z, &eye.index_select(labels, 0)?], 1)?;
        Ok(self.0.forward_t(&input, true)?)
    }
}

/// Distills the model's sampler into one step.
fn generator(
    trial: &TrialContext,
    data: &Classification,
    model: &AnalyticMixture,
) -> Result<OneStep> {
    use candle_nn::Optimizer;
    let d = data.inputs.dims()[1];
    let (dtype, device) = (data.inputs.dtype(), &trial.device);
    let mut rng = trial.stream("pairs");
    let noise = rng.normal(0.0, 1.0, (PAIRS, d), dtype, device)?;
    let labels = (0..PAIRS).map(|_| Ok(rng.below(data.classes)? as u32));
    let condition = Condition::classes(&labels.collect::<Result<Vec<_>>>()?, device)?;
    let grid = Grid::uniform_lambda(&VpSde::default(), TEACHER_STEPS)?;
    let samples = Sampler::new(model, grid)
        .sample(&noise, &condition, None, &RandomStream::new(0))?
        .x;
    let vars = SeededVars::new(&trial.stream("generator"));
    let config = MlpConfig {
        widths: vec![d + data.classes, 256, 256, d],
        activation: Activation::Silu,
        ..MlpConfig::default()
    };
    let net = OneStep(Mlp::new(&config, vars.builder(dtype, device))?);
    let mut optimizer = adam(&vars, 2e-3)?;
    for step in 0..DISTILLATION {
        trial.step(step, DISTILLATION)?;
        optimizer.set_learning_rate(2e-3 * (1.0 - step as f64 / DISTILLATION as f64));
        let mut rows = rng.permutation(PAIRS)?;
        rows.truncate(256);
        let part = |x: &Tensor| flows::prediction::select_rows(x, &rows);
        let found = net.generate(&part(&noise)?, &condition.take_rows(&rows)?, data.classes)?;
        let loss = (found - part(&samples)?)?.sqr()?.mean_all()?;
        optimizer.backward_step(&loss)?;
    }
    Ok(net)
}

/// A classifier with one hidden layer, whose values are its features.
#[derive(Clone)]
struct Features {
    hidden: Linear,
    head: Linear,
}

impl Features {
    fn of(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        self.hidden.forward(x)
    }

    fn logits(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        self.head.forward(&self.of(x)?)
    }

    fn train(data: &Classification, trial: &TrialContext, name: &str) -> Result<Self> {
        use candle_nn::Optimizer;
        let vars = SeededVars::new(&trial.stream(name));
        let vb = vars.builder(data.inputs.dtype(), &trial.device);
        let d = data.inputs.dims()[1];
        let hidden = linear(d, FEATURES, vb.pp("hidden"))?.with_activation(Activation::Silu);
        let head = linear(FEATURES, data.classes, vb.pp("head"))?;
        let mut optimizer = adam(&vars, 3e-3)?;
        let mut rng = trial.stream(name).split("batches");
        for _ in 0..FEATURE_STEPS {
            let mut rows = rng.permutation(data.len())?;
            rows.truncate(128);
            let part = |x: &Tensor| flows::prediction::select_rows(x, &rows);
            let logits = head.forward(&hidden.forward(&part(&data.inputs)?)?)?;
            let loss = cross_entropy(&logits, &part(&data.labels)?, Reduction::Mean)?;
            optimizer.backward_step(&loss)?;
        }
        if !tensor_core::kernels::sum_squares(hidden.weight())?.is_finite() {
            return Err(Error::Trial("the features did not train".into()));
        }
        // Without the graph to their variables.
        let frozen =
            |layer: &Linear| Linear::new(layer.weight().detach(), layer.bias().map(Tensor::detach));
        Ok(Self {
            hidden: frozen(&hidden).with_activation(Activation::Silu),
            head: frozen(&head),
        })
    }
}

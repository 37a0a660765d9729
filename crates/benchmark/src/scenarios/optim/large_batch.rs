//! Large batches: what square-root scaling, ghost batches and regime adaptation win back.

use crate::scenario::{
    metric, Arm, Better, Claim, Curve, Data, Definition, Metric, Paper, Role, Scenario, Setting,
    TrialContext, TrialOutcome,
};
use crate::scenarios::training::{clip_norm, digits, Classifier};
use crate::{Error, Result};
use candle_core::{Module, ModuleT, Tensor};
use candle_nn::{Linear, Optimizer, VarBuilder};
use datasets::{BatchConfig, Batches};
use nn::init::{Fan, Gain, Initializer, SeededVars};
use nn::loss::{cross_entropy, Reduction};
use nn::norm::ghost_batch::{ghost_batch_norm, GhostBatchNorm, GhostBatchNormConfig};
use optim::large_batch::{
    log_spaced_steps, DiffusionTracker, MultiplicativeNoise, Regime, Setting as Stage,
};
use optim::schedule::Schedule;
use optim::{SgdConfig, SgdMomentum};
use std::collections::BTreeMap;

const TRAIN: usize = 500;
const SMALL: usize = 20;
const LARGE: usize = 500;
const EPOCHS: usize = 20;
/// Epochs of the small batch's regime at which the rate falls to a tenth.
const DROPS: [usize; 2] = [12, 17];

pub(in crate::scenarios) struct LargeBatch;

impl Scenario for LargeBatch {
    fn definition(&self) -> Definition {
        Definition {
            slug: "large-batch",
            title: "Large-batch training",
            paper: Paper {
                title: "Train longer, generalize better: closing the generalization gap in large batch training of neural networks",
                venue: "NeurIPS 2017",
                arxiv: "1705.08741",
            },
            krate: "optim",
            module: "large_batch",
            tags: &["large-batch", "normalization", "schedule"],
            version: 1,
            summary: "Handwritten digits, 500 for training and 1297 for testing, perceptron with three hidden layers of 64 (batch norm, \
                      ReLU, He's initial weights over the fan-out), SGD with momentum 0.9, weight decay 1e-4, norm clip 5, 20 epochs at rate 0.1, a tenth of it from 60 % \
                      and a hundredth from 85 % of the run. Small batch 20, large batch 500, then with rate times the root of 25, \
                      with ghost batches of 20, and with 25 times the epochs.",
            notes: "Ghost batches win about 0.012 here, which is more than 0.01 in the mean but not beyond doubt. With PyTorch's \
                    default initial weights they win 0.015 and the large batch loses less (0.06 against 0.09), so that scaling the \
                    rate wins less than 0.02 on a quarter of the seeds. Noise on the losses with variance 24 is an alternative to \
                    scaling the rate; both together count twice and fail, which the last arm shows on purpose.",
            data: Data { embedded: "digits", real: None },
            arms: vec![
                Arm::new("small", "batch 20", Role::Baseline),
                Arm::new("large", "batch 500", Role::Baseline),
                Arm::new("scaled", "batch 500, rate", Role::Variant),
                Arm::new("ghost", "batch 500, rate, ghost norm", Role::Method),
                Arm::new("adapted", "batch 500, rate, ghost norm, regime", Role::Method),
                Arm::new("double", "batch 500, rate and noise", Role::Diagnostic),
            ],
            metrics: vec![
                Metric { name: "accuracy", label: "test accuracy", better: Better::Higher },
                Metric { name: "updates", label: "updates", better: Better::Neither },
                Metric { name: "r2_log", label: "R² of distance ~ log t", better: Better::Neither },
                Metric { name: "r2_linear", label: "R² of distance ~ t", better: Better::Neither },
            ],
            claims: vec![
                Claim::mean(
                    "gap",
                    "the large batch loses more than 0.05",
                    (metric("small", "accuracy") - metric("large", "accuracy")).above(0.05),
                ),
                Claim::every_seed(
                    "rate",
                    "scaling the rate wins more than 0.02 on every seed",
                    metric("scaled", "accuracy").above(metric("large", "accuracy") + 0.02),
                ),
                Claim::mean(
                    "ghost",
                    "ghost batches win more than 0.01 on top",
                    metric("ghost", "accuracy").above(metric("scaled", "accuracy") + 0.01),
                ),
                Claim::every_seed(
                    "adapted",
                    "with the regime adapted it is no worse than the small batch on every seed",
                    metric("adapted", "accuracy").at_least(metric("small", "accuracy")),
                ),
                Claim::every_seed(
                    "diffusion",
                    "the distance from the start grows with log t: R² above 0.93 on every seed",
                    metric("small", "r2_log").above(0.93),
                ),
                Claim::every_seed(
                    "not-linear",
                    "and that fit is better than the linear one by more than 0.1",
                    metric("small", "r2_log").above(metric("small", "r2_linear") + 0.1),
                ),
            ],
            full: None,
        }
    }

    fn run(&self, arm: &Arm, _: &Setting, trial: &TrialContext) -> Result<TrialOutcome> {
        let plan = match arm.name {
            "small" => Plan {
                batch: SMALL,
                scale: false,
                ghost: false,
                stretch: false,
                noise: false,
            },
            "large" => Plan {
                batch: LARGE,
                scale: false,
                ghost: false,
                stretch: false,
                noise: false,
            },
            "scaled" => Plan {
                batch: LARGE,
                scale: true,
                ghost: false,
                stretch: false,
                noise: false,
            },
            "ghost" => Plan {
                batch: LARGE,
                scale: true,
                ghost: true,
                stretch: false,
                noise: false,
            },
            "adapted" => Plan {
                batch: LARGE,
                scale: true,
                ghost: true,
                stretch: true,
                noise: false,
            },
            _ => Plan {
                batch: LARGE,
                scale: true,
                ghost: false,
                stretch: false,
                noise: true,
            },
        };
        train(trial, &plan)
    }
}

/// Which of the paper's tools an arm uses.
struct Plan {
    batch: usize,
    scale: bool,
    ghost: bool,
    stretch: bool,
    noise: bool,
}

/// Linear, norm, ReLU three times, then linear.
struct Network {
    hidden: Vec<(Linear, GhostBatchNorm)>,
    head: Linear,
}

impl Network {
    fn new(
        inputs: usize,
        classes: usize,
        norm: GhostBatchNormConfig,
        vb: VarBuilder,
    ) -> Result<Self> {
        let widths = [inputs, 64, 64, 64];
        // He's normal distribution over the fan-out, as in the authors' models.
        let init = Initializer::he_normal(Gain::Relu).with_fan(Fan::Out);
        let mut hidden = Vec::new();
        for (i, w) in widths.windows(2).enumerate() {
            let vb = vb.pp(i);
            let layer = linear(w[0], w[1], init, vb.pp("linear"))?;
            hidden.push((layer, ghost_batch_norm(w[1], norm, vb.pp("norm"))?));
        }
        let head = linear(
            widths[3],
            classes,
            Initializer::torch_linear(),
            vb.pp("head"),
        )?;
        Ok(Self { hidden, head })
    }
}

fn linear(inputs: usize, outputs: usize, init: Initializer, vb: VarBuilder) -> Result<Linear> {
    let weight = init.hint(&[outputs, inputs])?;
    let bias = Initializer::torch_bias(inputs).hint(&[outputs])?;
    let weight = vb.get_with_hints((outputs, inputs), "weight", weight)?;
    Ok(Linear::new(
        weight,
        Some(vb.get_with_hints(outputs, "bias", bias)?),
    ))
}

impl ModuleT for Network {
    fn forward_t(&self, x: &Tensor, train: bool) -> candle_core::Result<Tensor> {
        let mut h = x.clone();
        for (linear, norm) in &self.hidden {
            h = norm.forward_t(&linear.forward(&h)?, train)?.relu()?;
        }
        self.head.forward(&h)
    }
}

fn network(trial: &TrialContext, ghost: bool) -> Result<Classifier<Network>> {
    let parts = digits(trial, &[TRAIN, datasets::digits::EXAMPLES - TRAIN])?;
    let [train, test] = parts.as_slice() else {
        return Err(Error::Trial("the digits could not be split".into()));
    };
    let norm = match ghost {
        true => GhostBatchNormConfig {
            ghost_size: SMALL,
            ..Default::default()
        },
        false => GhostBatchNormConfig::batch_norm(),
    };
    let vars = SeededVars::new(&trial.stream("weights"));
    let vb = vars.builder(train.inputs.dtype(), &trial.device);
    let model = Network::new(datasets::digits::PIXELS, train.classes, norm, vb)?;
    Ok(Classifier {
        model,
        params: vars.trainable(),
        train: train.clone(),
        test: test.clone(),
    })
}

/// The small batch's regime, made into the arm's.
fn regime(plan: &Plan) -> Result<Regime> {
    let rates = [(0, 0.1), (DROPS[0], 0.01), (DROPS[1], 0.001)];
    let stages: BTreeMap<usize, Stage> = rates.iter().map(|(e, lr)| (*e, Stage::lr(*lr))).collect();
    Ok(Regime::new(stages, EPOCHS)?.adapt(plan.batch, SMALL, plan.scale, plan.stretch)?)
}

fn train(trial: &TrialContext, plan: &Plan) -> Result<TrialOutcome> {
    let net = network(trial, plan.ghost)?;
    net.check_gradients()?;
    let regime = regime(plan)?;
    let per_epoch = TRAIN / plan.batch;
    let schedule = regime.schedule(per_epoch)?;
    let updates = regime.total_epochs() * per_epoch;
    let config = SgdConfig {
        lr: schedule.at(0),
        momentum: 0.9,
        weight_decay: 1e-4,
        ..Default::default()
    };
    let mut optimizer = SgdMomentum::new(net.vars(), config)?.with_transforms(clip_norm(5.0)?);
    let mut batches = Batches::new(
        TRAIN,
        BatchConfig::shuffled(plan.batch),
        &mut trial.stream("batches"),
    )?;
    let mut noise = trial.stream("noise");
    let first_drop = regime
        .milestones()
        .keys()
        .nth(1)
        .copied()
        .unwrap_or(regime.total_epochs())
        * per_epoch;
    let mut diffusion = Diffusion::new(&net, first_drop)?;
    let mut curve = Curve::new("test accuracy", "update").log_x();
    let shown = log_spaced_steps(updates, 24);
    for step in 1..=updates {
        trial.step(step, updates)?;
        let (x, y) = batches.draw(&net.train)?;
        let loss = if plan.noise {
            let losses = cross_entropy(&net.model.forward_t(&x, true)?, &y, Reduction::None)?;
            MultiplicativeNoise::matching(LARGE, SMALL)?.apply(&losses, &mut noise)?
        } else {
            net.loss(&x, &y)?
        };
        optimizer.set_learning_rate(schedule.at(step - 1));
        optimizer.backward_step(&loss)?;
        diffusion.record(step)?;
        if shown.contains(&step) {
            curve.push(step as f64, net.evaluate(&net.test)?.1);
        }
    }
    let (_, accuracy) = net.evaluate(&net.test)?;
    let outcome = TrialOutcome::default()
        .metric("accuracy", accuracy)
        .metric("updates", updates as f64)
        .curve(curve);
    diffusion.report(outcome)
}

/// Distance from the start in the phase of constant rate, from the third step on.
struct Diffusion {
    tracker: DiffusionTracker,
    steps: Vec<usize>,
}

impl Diffusion {
    fn new(net: &Classifier<Network>, phase: usize) -> Result<Self> {
        let mut steps = log_spaced_steps(phase, 40);
        steps.retain(|s| *s >= 3);
        Ok(Self {
            tracker: DiffusionTracker::from_params(net.params.clone())?,
            steps,
        })
    }

    fn record(&mut self, step: usize) -> Result<()> {
        if self.steps.contains(&step) {
            self.tracker.record(step)?;
        }
        Ok(())
    }

    fn report(&self, outcome: TrialOutcome) -> Result<TrialOutcome> {
        let mut curve = Curve::new("distance from the start", "update").log_x();
        for (step, distance) in self.tracker.steps().iter().zip(self.tracker.distances()) {
            curve.push(*step, distance);
        }
        // A handful of points fits anything.
        if self.steps.len() < 10 {
            return Ok(outcome.curve(curve));
        }
        let fit = self.tracker.fit()?;
        Ok(outcome
            .metric("r2_log", fit.r2_log)
            .metric("r2_linear", fit.r2_linear)
            .curve(curve))
    }
}

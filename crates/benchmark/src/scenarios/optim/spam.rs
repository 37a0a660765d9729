//! SPAM against Adam under gradient spikes.

use crate::scenario::{
    metric, Arm, Better, Claim, Data, Definition, Metric, Paper, Role, Scenario, Setting,
    TrialContext, TrialOutcome,
};
use crate::scenarios::training::{clip_norm, fit, images, Classifier, Fit};
use crate::Result;
use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};
use candle_nn::Optimizer;
use nn::models::{Activation, Mlp, MlpConfig};
use optim::schedule::{Cosine, Schedule, Warmup};
use optim::{AdamW, AdamWConfig, ParamGroup, SpamConfig, Stateful};
use tensor_core::random::RandomStream;

const STEPS: usize = 600;
const WARMUP: usize = 50;
const BATCH: usize = 32;
const LR: f64 = 3e-3;
/// Chance of a spike in a step.
const SPIKE_STEPS: f64 = 0.05;
/// Share of every gradient tensor's entries that a spike hits.
const SPIKE_ENTRIES: f64 = 0.3;
/// Size of a spike in standard deviations of the tensor.
const SPIKE_SIZE: f64 = 1000.0;

pub(in crate::scenarios) struct Spam;

impl Scenario for Spam {
    fn definition(&self) -> Definition {
        Definition {
            slug: "spam",
            title: "SPAM",
            paper: Paper {
                title: "SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training",
                venue: "ICLR 2025",
                arxiv: "2501.06842",
            },
            krate: "optim",
            module: "spam",
            tags: &["optimizer", "stability", "memory"],
            version: 1,
            summary: "Handwritten digits (1300 for training, 497 for testing; with real data MNIST), perceptron with two hidden \
                      layers of 64 GELU units, batch 32, 600 steps, learning rate 0.003 with 50 steps of warm-up and cosine \
                      to a tenth. At each step with chance 0.05, 30 % of the entries of every gradient get normal noise of 1000 \
                      standard deviations of their tensor. SPAM resets every 100 steps with 15 steps of warm-up, threshold 25, \
                      and clips from the tenth step after a reset.",
            notes: "Clipping by global norm 1 does as well on this toy (the arm is shown), so nothing is claimed against it. With \
                    the paper's threshold 5000 and period 500 the run is too short. Without spikes SPAM costs a little.",
            data: Data { embedded: "digits", real: Some("mnist") },
            arms: vec![
                Arm::new("adam", "Adam", Role::Baseline),
                Arm::new("spam", "SPAM", Role::Method),
                Arm::new("spam-half", "SPAM, density 0.5", Role::Variant),
                Arm::new("adam-clip", "Adam, norm clip 1", Role::Baseline),
                Arm::new("adam-calm", "Adam, no spikes", Role::Diagnostic),
                Arm::new("spam-calm", "SPAM, no spikes", Role::Diagnostic),
            ],
            metrics: vec![
                Metric { name: "loss", label: "test loss", better: Better::Lower },
                Metric { name: "accuracy", label: "test accuracy", better: Better::Higher },
                Metric { name: "clipped", label: "clipped entries", better: Better::Neither },
                Metric { name: "state_bytes", label: "bytes of state", better: Better::Neither },
            ],
            claims: vec![
                Claim::mean(
                    "loss",
                    "under spikes SPAM's loss is below 0.65 of Adam's",
                    metric("spam", "loss").below(metric("adam", "loss") * 0.65),
                ),
                Claim::every_seed(
                    "every-seed",
                    "under spikes SPAM's loss is below Adam's on every seed",
                    metric("spam", "loss").below(metric("adam", "loss")),
                ),
                Claim::mean(
                    "half",
                    "with momentum for half of the entries it is below 0.75 of Adam's",
                    metric("spam-half", "loss").below(metric("adam", "loss") * 0.75),
                ),
            ],
            full: None,
        }
    }

    fn run(&self, arm: &Arm, _: &Setting, trial: &TrialContext) -> Result<TrialOutcome> {
        let mlp = MlpConfig {
            activation: Activation::Gelu,
            ..Default::default()
        };
        let net = Classifier::mlp(trial, images(trial, 1300)?, &[64, 64], mlp)?;
        let spikes = !arm.name.ends_with("-calm");
        match arm.name {
            "adam" | "adam-calm" | "adam-clip" => {
                let mut adam = AdamW::new(net.vars(), AdamWConfig::adam(LR))?;
                if arm.name == "adam-clip" {
                    adam = adam.with_transforms(clip_norm(1.0)?);
                }
                train(trial, &net, adam, spikes, |_| 0)
            }
            _ => {
                let optimizer = spam(trial, &net, (arm.name == "spam-half").then_some(0.5))?;
                train(trial, &net, optimizer, spikes, |o| o.stats().clipped)
            }
        }
    }
}

/// SPAM with momentum for a share `density` of the matrices' entries.
fn spam(trial: &TrialContext, net: &Classifier<Mlp>, density: Option<f64>) -> Result<optim::Spam> {
    let config = SpamConfig {
        lr: LR,
        eps: 1e-8,
        delta_t: 100,
        warmup: 15,
        threshold: 25.0,
        clip_after: 10,
        ..Default::default()
    };
    let (matrices, rest): (Vec<_>, Vec<_>) =
        net.params.iter().cloned().partition(|(_, v)| v.rank() == 2);
    let groups = vec![
        ParamGroup::named(
            matrices,
            SpamConfig {
                density,
                ..config.clone()
            },
        ),
        ParamGroup::named(rest, config),
    ];
    Ok(optim::Spam::with_groups(groups, &trial.stream("masks"))?)
}

fn train<O: Stateful>(
    trial: &TrialContext,
    net: &Classifier<Mlp>,
    mut optimizer: O,
    spikes: bool,
    clipped: impl Fn(&O) -> u64,
) -> Result<TrialOutcome> {
    let schedule = Warmup::new(WARMUP, Cosine::new(LR, LR / 10.0, STEPS - WARMUP)?)?;
    let stream = trial.stream("spikes");
    let vars = net.vars();
    let mut disturb = |step: usize, grads: &mut GradStore| {
        if spikes {
            spike(&stream, step, &vars, grads)
        } else {
            Ok(())
        }
    };
    let mut total = 0;
    let how = Fit {
        steps: STEPS,
        batch: BATCH,
        lr: &|t| schedule.at(t),
        disturb: &mut disturb,
    };
    let curve = fit(trial, net, &mut optimizer, how, |o| total += clipped(o))?;
    let (loss, accuracy) = net.evaluate(&net.test)?;
    Ok(TrialOutcome::default()
        .metric("loss", loss)
        .metric("accuracy", accuracy)
        .metric("clipped", total as f64)
        .metric("state_bytes", optimizer.state_bytes() as f64)
        .curve(curve))
}

/// With a small chance adds large noise to some entries of every gradient. Where and when depends
/// on the seed and the step alone.
fn spike(stream: &RandomStream, step: usize, vars: &[Var], grads: &mut GradStore) -> Result<()> {
    let mut random = stream.split_index("step", step as u64);
    if random.next_uniform() >= SPIKE_STEPS {
        return Ok(());
    }
    for var in vars {
        let Some(grad) = grads.get(var) else { continue };
        let spread = SPIKE_SIZE * deviation(grad)?;
        let hit = random.bernoulli(SPIKE_ENTRIES, grad.shape(), DType::F32, grad.device())?;
        let noise = random.normal(0.0, 1.0, grad.shape(), DType::F32, grad.device())?;
        let spiked = (grad + ((hit * noise)? * spread)?)?;
        grads.insert(var, spiked);
    }
    Ok(())
}

/// The sample standard deviation of a tensor's entries.
fn deviation(tensor: &Tensor) -> Result<f64> {
    let values = tensor
        .flatten_all()?
        .to_dtype(DType::F64)?
        .to_vec1::<f64>()?;
    Ok(crate::statistics::deviation(&values))
}

//! Opposing signals: found in a model where they can be computed, and on the digits.

use super::pictures::contact_sheet;
use crate::scenario::{
    metric, Arm, Better, Claim, Curve, Data, Definition, Metric, Paper, Role, Scenario, Setting,
    TrialContext, TrialOutcome,
};
use crate::scenarios::training::{digits, Classifier};
use crate::{Error, Result};
use candle_core::{DType, Tensor};
use candle_nn::{ModuleT, Optimizer};
use nn::loss::{cross_entropy, Reduction};
use nn::models::MlpConfig;
use optim::diagnostics::opposing::{
    detect, loss_sharpness, EdgeOfStability, LanczosConfig, LossRecorder, OpposingConfig,
    OpposingPair, StabilityRule, TopK, ToyOpposing,
};

const STEPS: usize = 400;
/// Examples in a group.
const GROUP: usize = 20;

pub(in crate::scenarios) struct OpposingSignals;

impl Scenario for OpposingSignals {
    fn definition(&self) -> Definition {
        Definition {
            slug: "opposing-signals",
            title: "Opposing signals",
            paper: Paper {
                title: "Outliers with Opposing Signals Have an Outsized Effect on Neural Network Optimization",
                venue: "ICLR 2024",
                arxiv: "2311.04163",
            },
            krate: "optim",
            module: "diagnostics::opposing",
            tags: &["diagnostics", "stability"],
            version: 2,
            summary: "A linear model on 400 examples, 20 with a strong feature that predicts nothing and 20 with its \
                      negative, 400 steps of full-batch gradient descent at a step size beyond and below the edge of \
                      stability. 600 digits, perceptron with two hidden layers of 64 ReLU units, 400 full-batch steps \
                      at 0.3 and at 0.05. The groups are 20 examples each.",
            notes: "On the digits the groups are mostly of one class each; which classes depends on the seed. At the small \
                    step the losses change smoothly, and the correlation of two smooth series over eleven recordings \
                    is that of their trends, of either sign: the same experiment in PyTorch shows that too. By its \
                    defaults the detector reports the toy's pair at the edge alone, and none on the digits: at the \
                    large step 5 % of the examples carry less of the change than it asks for, and the small one is far \
                    from the edge.",
            data: Data { embedded: "digits", real: None },
            arms: vec![
                Arm::new("toy-stable", "toy model, stable step", Role::Baseline).fixed(&[("eta", 0.01)]),
                Arm::new("toy-edge", "toy model, at the edge", Role::Method).fixed(&[("eta", 0.06)]),
                Arm::new("digits-stable", "digits, small step", Role::Baseline).fixed(&[("lr", 0.05)]),
                Arm::new("digits-edge", "digits, large step", Role::Method).fixed(&[("lr", 0.3)]),
            ],
            metrics: vec![
                Metric { name: "corr", label: "correlation of the groups", better: Better::Lower },
                Metric { name: "share", label: "share of all change in 5 % of the examples", better: Better::Neither },
                Metric { name: "outlier_share", label: "share of all change in the true outliers", better: Better::Neither },
                Metric { name: "precision", label: "true outliers among the detected", better: Better::Higher },
                Metric { name: "sharpness_ratio", label: "final sharpness times step size / 2", better: Better::Neither },
                Metric { name: "reported", label: "pairs reported, with the sharpness known", better: Better::Neither },
                Metric { name: "rising", label: "steps of rising loss", better: Better::Neither },
            ],
            claims: vec![
                Claim::every_seed("precision", "more than 0.8 of the detected examples are outliers",
                    metric("toy-edge", "precision").above(0.8)),
                Claim::every_seed("share", "the outliers carry more than 0.8 of the change",
                    metric("toy-edge", "outlier_share").above(0.8)),
                Claim::every_seed("edge-low", "training ends with a sharpness of at least 0.85 of 2 / eta",
                    metric("toy-edge", "sharpness_ratio").at_least(0.85)),
                Claim::every_seed("edge-high", "and at most 2 / eta",
                    metric("toy-edge", "sharpness_ratio").at_most(1.0)),
                Claim::every_seed("stable", "at a stable step they carry less than 0.3",
                    metric("toy-stable", "outlier_share").below(0.3)),
                Claim::every_seed("digits-edge", "on the digits the groups are correlated below -0.7 at the large step",
                    metric("digits-edge", "corr").below(-0.7)),
                Claim::every_seed("digits-stable", "and above 0 at the small one",
                    metric("digits-stable", "corr").above(0.0)),
            ],
            full: None,
        }
    }

    fn run(&self, arm: &Arm, setting: &Setting, trial: &TrialContext) -> Result<TrialOutcome> {
        match arm.name {
            "toy-stable" | "toy-edge" => toy(trial, setting.get("eta")?),
            _ => on_digits(trial, setting.get("lr")?),
        }
    }
}

/// How often the mean loss rose.
fn rising(recorder: &LossRecorder) -> f64 {
    let mean = |t: usize| {
        let losses = recorder.losses(t).unwrap_or(&[]);
        losses.iter().map(|l| f64::from(*l)).sum::<f64>() / losses.len() as f64
    };
    (1..recorder.len())
        .filter(|t| mean(*t) > mean(t - 1))
        .count() as f64
}

/// Losses of both groups and of the others.
fn group_curves(pair: &OpposingPair, recorder: &LossRecorder) -> Result<Vec<Curve>> {
    let curves = pair.track(recorder)?;
    let draw = |name: &str, values: &[f64]| {
        let mut curve = Curve::new(name, "step").log_y();
        for (step, value) in curves.steps.iter().zip(values).step_by(2) {
            curve.push(*step as f64, *value);
        }
        curve
    };
    Ok(vec![
        draw("loss of the group that rose", &curves.up),
        draw("loss of the group that fell", &curves.down),
        draw("loss of all others", &curves.bulk),
    ])
}

fn strongest(recorder: &LossRecorder, config: &OpposingConfig) -> Result<OpposingPair> {
    let pair = OpposingPair::strongest(recorder, config)?;
    pair.ok_or_else(|| Error::Trial("no loss changes".into()))
}

fn outcome(pair: &OpposingPair, recorder: &LossRecorder) -> Result<TrialOutcome> {
    let mut outcome = TrialOutcome::default()
        .metric("corr", pair.corr)
        .metric("share", pair.share)
        .metric("rising", rising(recorder));
    for curve in group_curves(pair, recorder)? {
        outcome = outcome.curve(curve);
    }
    Ok(outcome)
}

/// Pairs that count, given the largest sharpness of the run beside the step size.
fn reported(
    recorder: &LossRecorder,
    config: &OpposingConfig,
    edge: EdgeOfStability,
) -> Result<f64> {
    let config = OpposingConfig {
        edge: Some(edge),
        ..*config
    };
    Ok(detect(recorder, &config)?.len() as f64)
}

fn toy(trial: &TrialContext, eta: f64) -> Result<TrialOutcome> {
    let toy = ToyOpposing::default();
    let data = toy.sample(400, &mut trial.stream("data"))?;
    let mut model = toy.model(&mut trial.stream("weights"))?;
    let mut recorder = LossRecorder::new(400, STEPS)?;
    let mut curve = Curve::new("sharpness", "step");
    for step in 0..STEPS {
        trial.step(step, STEPS)?;
        recorder.record(step, &data.losses(&model)?)?;
        if step % 8 == 0 {
            curve.push(step as f64, data.sharpness(&model)?.0);
        }
        model = data.descend(&model, eta)?;
    }
    let config = OpposingConfig {
        k: TopK::Count(GROUP),
        ..OpposingConfig::default()
    };
    let pair = strongest(&recorder, &config)?;
    let members = pair.up.iter().chain(&pair.down);
    let outliers = members.filter(|i| data.group[**i] != 0).count();
    let edge = EdgeOfStability::check(
        data.sharpness(&model)?.0,
        eta,
        StabilityRule::GradientDescent,
    )?;
    let total: f64 = pair.changes.iter().map(|d| d.abs()).sum();
    let changes = pair.changes.iter().zip(&data.group);
    let own: f64 = changes
        .filter(|(_, g)| **g != 0)
        .map(|(d, _)| d.abs())
        .sum();
    Ok(outcome(&pair, &recorder)?
        .metric("reported", reported(&recorder, &config, edge)?)
        .metric("outlier_share", own / total)
        .metric("precision", outliers as f64 / (2 * GROUP) as f64)
        .metric("sharpness_ratio", edge.ratio)
        .curve(curve))
}

fn on_digits(trial: &TrialContext, lr: f64) -> Result<TrialOutcome> {
    let mut parts = digits(trial, &[600, 100])?.into_iter();
    let (Some(train), Some(rest)) = (parts.next(), parts.next()) else {
        return Err(Error::Trial("the digits could not be split".into()));
    };
    let net = Classifier::mlp(trial, (train, rest), &[64, 64], MlpConfig::default())?;
    net.check_gradients()?;
    let mut sgd = candle_nn::SGD::new(net.vars(), lr)?;
    let mut recorder = LossRecorder::new(600, STEPS)?;
    let losses = || -> candle_core::Result<Tensor> {
        let logits = net.model.forward_t(&net.train.inputs, true)?;
        Ok(cross_entropy(&logits, &net.train.labels, Reduction::None)?)
    };
    let (mut curve, mut sharpest) = (Curve::new("sharpness", "step"), 0f64);
    for step in 0..STEPS {
        trial.step(step, STEPS)?;
        let own = losses()?;
        recorder.record(step, &own)?;
        if step % 100 == 50 {
            let config = LanczosConfig {
                k: 1,
                iters: 12,
                tol: 1e-2,
            };
            let mean = || losses()?.mean_all();
            let top = loss_sharpness(mean, &net.vars(), config, &mut trial.stream("lanczos"))?;
            sharpest = sharpest.max(top.values[0]);
            curve.push(step as f64, top.values[0]);
        }
        sgd.backward_step(&own.mean_all()?)?;
    }
    let config = OpposingConfig {
        k: TopK::Count(GROUP),
        window: 10,
        min_step: 20,
        ..OpposingConfig::default()
    };
    let pair = strongest(&recorder, &config)?;
    let images = |of: &[usize]| -> Result<Vec<Vec<f64>>> {
        let one = |i: &usize| Ok(net.train.inputs.get(*i)?.to_dtype(DType::F64)?.to_vec1()?);
        of.iter().map(one).collect()
    };
    let labels = net.train.label_vec()?;
    let classes = |of: &[usize]| {
        let all: Vec<String> = of.iter().map(|i| labels[*i].to_string()).collect();
        all.join(" ")
    };
    let sheet = contact_sheet(
        &format!(
            "the groups at step {}: losses that rose (above: {}) and fell (below: {})",
            pair.step,
            classes(&pair.up),
            classes(&pair.down)
        ),
        &[images(&pair.up)?, images(&pair.down)?],
    );
    let edge = EdgeOfStability::check(sharpest, lr, StabilityRule::GradientDescent)?;
    Ok(outcome(&pair, &recorder)?
        .metric("reported", reported(&recorder, &config, edge)?)
        .curve(curve)
        .picture(sheet))
}

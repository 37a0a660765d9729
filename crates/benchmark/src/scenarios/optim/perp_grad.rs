//! Orthogonal gradients and the edge of numerical stability on modular addition.

use crate::scenario::{
    constant, metric, Arm, Better, Claim, Curve, Data, Definition, Metric, Paper, Role, Scenario,
    Setting, TrialContext, TrialOutcome,
};
use crate::scenarios::training::Classifier;
use crate::{Error, Result};
use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};
use candle_nn::{ModuleT, Optimizer};
use datasets::generate::{ModularOp, ModularTable};
use datasets::Sizes;
use nn::loss::Reduction;
use nn::models::{Mlp, MlpConfig};
use nn::stablemax::{stablemax_cross_entropy, StableMaxConfig};
use optim::perp_grad::{orthogonalize, NlmMonitor, PerpGradConfig, SoftmaxCollapse};
use optim::{AdamW, AdamWConfig};
use tensor_core::kernels::{dot, sum_squares};

const MODULUS: usize = 53;
/// 40 % of all 2809 pairs.
const TRAIN: usize = 1123;
const EPOCHS: usize = 300;
/// Epochs after which collapse is measured.
const EDGE_EPOCHS: usize = 200;
/// Epochs between two points of the curves.
const EVERY: usize = 10;

pub(in crate::scenarios) struct PerpGrad;

impl Scenario for PerpGrad {
    fn definition(&self) -> Definition {
        Definition {
            slug: "perp-grad",
            title: "Orthogonal gradients",
            paper: Paper {
                title: "Grokking at the Edge of Numerical Stability",
                venue: "ICLR 2025",
                arxiv: "2501.04697",
            },
            krate: "optim",
            module: "perp_grad",
            tags: &["optimizer", "grokking", "numerics"],
            version: 1,
            summary: "Addition modulo 53, 40 % of the 2809 pairs for training, perceptron without biases with two hidden layers of \
                      200 ReLU units, full batch, AdamW with rate 0.01 and no weight decay, 300 epochs. The last arm trains 200 epochs \
                      with beta2 0.99 and epsilon 1e-25 and then looks at the softmax of the training examples in two precisions.",
            notes: "Training with StableMax alone does not generalize within 3000 epochs at this size (the paper takes 80,000), so \
                    nothing is claimed for it but a gradient where the softmax has none.",
            data: Data { embedded: "modular-addition", real: None },
            arms: vec![
                Arm::new("adamw", "AdamW", Role::Baseline),
                Arm::new("perp", "AdamW on orthogonal gradients", Role::Method),
                Arm::new("edge", "AdamW, epsilon 1e-25", Role::Diagnostic),
            ],
            metrics: vec![
                Metric { name: "accuracy", label: "test accuracy", better: Better::Higher },
                Metric { name: "train_accuracy", label: "training accuracy", better: Better::Higher },
                Metric { name: "scaling_cosine", label: "cosine of −gradient and weights, epoch 200", better: Better::Neither },
                Metric { name: "projected_cosine", label: "largest cosine after projection", better: Better::Neither },
                Metric { name: "collapsed_f16", label: "collapsed in f16", better: Better::Neither },
                Metric { name: "collapsed_f32", label: "collapsed in f32", better: Better::Neither },
                Metric { name: "collapsed_alive", label: "collapsed with a gradient", better: Better::Neither },
                Metric { name: "stablemax_dead", label: "StableMax without a gradient", better: Better::Neither },
            ],
            claims: vec![
                Claim::every_seed(
                    "generalizes",
                    "with orthogonal gradients test accuracy is above 0.9 on every seed",
                    metric("perp", "accuracy").above(0.9),
                ),
                Claim::every_seed(
                    "stuck",
                    "without them it is below 0.1 on every seed",
                    metric("adamw", "accuracy").below(0.1),
                ),
                Claim::every_seed(
                    "half",
                    "after 200 epochs more than 0.9 of the examples are collapsed in f16",
                    metric("edge", "collapsed_f16").above(0.9),
                ),
                Claim::every_seed(
                    "single",
                    "and fewer than 0.05 in f32",
                    metric("edge", "collapsed_f32").below(0.05),
                ),
                Claim::every_seed(
                    "dead",
                    "no collapsed example has a gradient in its class",
                    metric("edge", "collapsed_alive").at_most(constant(0.0)),
                ),
                Claim::every_seed(
                    "stablemax",
                    "StableMax has a gradient for every example",
                    metric("edge", "stablemax_dead").at_most(constant(0.0)),
                ),
                Claim::every_seed(
                    "scaling",
                    "after 200 epochs the gradient's cosine with scaling the weights is above 0.4",
                    metric("edge", "scaling_cosine").above(0.4),
                ),
                Claim::every_seed(
                    "projected",
                    "after projection it is below 1e-6 for every tensor in every step",
                    metric("perp", "projected_cosine").below(1e-6),
                ),
            ],
            full: None,
        }
    }

    fn run(&self, arm: &Arm, _: &Setting, trial: &TrialContext) -> Result<TrialOutcome> {
        let net = network(trial)?;
        let plain = AdamWConfig {
            lr: 0.01,
            weight_decay: 0.0,
            ..Default::default()
        };
        match arm.name {
            "adamw" => {
                let optimizer = AdamW::new(net.vars(), plain)?;
                Ok(train(trial, &net, optimizer, EPOCHS, false)?)
            }
            "perp" => {
                let config = (PerpGradConfig::default(), plain);
                let optimizer = optim::perp_grad::PerpGrad::<AdamW>::new(net.vars(), config)?;
                Ok(train(trial, &net, optimizer, EPOCHS, true)?)
            }
            _ => {
                let config = AdamWConfig {
                    beta2: 0.99,
                    eps: 1e-25,
                    ..plain
                };
                let optimizer = AdamW::new(net.vars(), config)?;
                let outcome = train(trial, &net, optimizer, EDGE_EPOCHS, false)?;
                collapse(&net, outcome)
            }
        }
    }
}

fn network(trial: &TrialContext) -> Result<Classifier<Mlp>> {
    let table = ModularTable::new(ModularOp::Add, MODULUS)?;
    let pairs = table.one_hot(DType::F32, &trial.device)?;
    let sizes = [TRAIN, pairs.len() - TRAIN];
    let parts = pairs.split(Sizes::Counts(&sizes), &mut trial.stream("split"))?;
    let [train, test] = parts.as_slice() else {
        return Err(Error::Trial("the pairs could not be split".into()));
    };
    let config = MlpConfig {
        bias: false,
        ..Default::default()
    };
    Classifier::mlp(trial, (train.clone(), test.clone()), &[200, 200], config)
}

/// Trains on the whole training set; `project` also measures what is left along the weights.
fn train<O: Optimizer>(
    trial: &TrialContext,
    net: &Classifier<Mlp>,
    mut optimizer: O,
    epochs: usize,
    project: bool,
) -> Result<TrialOutcome> {
    net.check_gradients()?;
    let mut curves = [
        Curve::new("test accuracy", "epoch"),
        Curve::new("training accuracy", "epoch"),
        Curve::new("cosine of −gradient and weights", "epoch"),
    ];
    let (mut scaling, mut left) = (None, 0.0_f64);
    for epoch in 0..epochs {
        trial.step(epoch, epochs)?;
        let grads = net.loss(&net.train.inputs, &net.train.labels)?.backward()?;
        if epoch % EVERY == 0 || epoch + 1 == EDGE_EPOCHS {
            // Once every gradient is exactly zero there is no direction left to measure.
            let cosine = NlmMonitor::measure(&net.params, &grads)?.cos_global;
            let accuracies = [net.evaluate(&net.test)?.1, net.evaluate(&net.train)?.1];
            for (curve, value) in curves
                .iter_mut()
                .zip(accuracies.into_iter().chain([cosine]))
            {
                curve.push(epoch as f64, value);
            }
            if epoch + 1 == EDGE_EPOCHS {
                scaling = Some(cosine);
            }
        }
        if project {
            left = left.max(projected_cosine(&net.params, &grads)?);
        }
        optimizer.step(&grads)?;
    }
    let mut outcome = TrialOutcome::default()
        .metric("accuracy", net.evaluate(&net.test)?.1)
        .metric("train_accuracy", net.evaluate(&net.train)?.1);
    if let Some(cosine) = scaling {
        outcome = outcome.metric("scaling_cosine", cosine);
    }
    if project {
        outcome = outcome.metric("projected_cosine", left);
    }
    Ok(curves.into_iter().fold(outcome, TrialOutcome::curve))
}

/// The largest |cosine| between a tensor and its projected gradient.
fn projected_cosine(params: &[(String, Var)], grads: &GradStore) -> Result<f64> {
    let config = PerpGradConfig::default();
    let mut largest = 0.0_f64;
    for (_, var) in params {
        let Some(grad) = grads.get(var) else { continue };
        let projected = orthogonalize(var.as_tensor(), grad, &config)?;
        let norms = (sum_squares(var.as_tensor())? * sum_squares(&projected)?).sqrt();
        if norms > 0.0 {
            largest = largest.max((dot(var.as_tensor(), &projected)? / norms).abs());
        }
    }
    Ok(largest)
}

/// What the softmax of the trained network's logits looks like in two precisions.
fn collapse(net: &Classifier<Mlp>, outcome: TrialOutcome) -> Result<TrialOutcome> {
    let logits = net.model.forward_t(&net.train.inputs, false)?.detach();
    let labels = &net.train.labels;
    let mut outcome = outcome;
    let (mut collapsed, mut alive) = (0, 0);
    for (dtype, name) in [(DType::F16, "collapsed_f16"), (DType::F32, "collapsed_f32")] {
        let flags = SoftmaxCollapse::flags(&logits, labels, dtype)?;
        let here = flags.iter().filter(|f| f.collapsed).count();
        collapsed += here;
        alive += flags
            .iter()
            .filter(|f| f.collapsed && !f.zero_correct_grad)
            .count();
        outcome = outcome.metric(name, here as f64 / flags.len() as f64);
    }
    let dead = without_gradient(&logits, labels)?;
    Ok(outcome
        .metric(
            "collapsed_alive",
            if collapsed == 0 {
                0.0
            } else {
                alive as f64 / collapsed as f64
            },
        )
        .metric("stablemax_dead", dead))
}

/// The fraction of examples for which StableMax gives a gradient of exactly zero.
fn without_gradient(logits: &Tensor, labels: &Tensor) -> Result<f64> {
    let logits = Var::from_tensor(&logits.to_dtype(DType::F64)?)?;
    let loss =
        stablemax_cross_entropy(&logits, labels, Reduction::Sum, &StableMaxConfig::default())?;
    let grads = loss.backward()?;
    let Some(grad) = grads.get(&logits) else {
        return Err(Error::Trial("StableMax gave no gradient".into()));
    };
    let sizes = grad.abs()?.max(1)?.to_vec1::<f64>()?;
    Ok(sizes.iter().filter(|s| **s == 0.0).count() as f64 / sizes.len() as f64)
}

//! Target-based surrogates against SGD at equal calls of the loss.

use crate::scenario::{
    best, metric, Arm, Better, Claim, Curve, Data, Definition, Metric, Paper, Role, Scenario,
    Setting, TrialContext, TrialOutcome,
};
use crate::scenarios::training::{digits, scalar};
use crate::Result;
use candle_core::{DType, Tensor, Var};
use candle_nn::Optimizer;
use datasets::{BatchConfig, Batches, Classification};
use nn::loss::{cross_entropy, Reduction};
use optim::sso::{ArmijoGd, ArmijoGdConfig, ArmijoTarget, AutogradLoss, Normalization, SsoConfig};
use optim::{SgdConfig, SgdMomentum};
use tensor_core::autograd::grad_check;

const CALLS: usize = 60;
const BATCH: usize = 25;

pub(in crate::scenarios) struct Sso;

impl Scenario for Sso {
    fn definition(&self) -> Definition {
        let surrogate = |name, label, role, m, step| {
            Arm::new(name, label, role).fixed(&[("inner_steps", m), ("step", step)])
        };
        Definition {
            slug: "sso",
            title: "Target-based surrogates",
            paper: Paper {
                title: "Target-based Surrogates for Stochastic Optimization",
                venue: "ICML 2023",
                arxiv: "2302.02607",
            },
            krate: "optim",
            module: "sso",
            tags: &["optimizer", "expensive-loss"],
            version: 1,
            summary: "Linear softmax classifier on all 1797 digits, from zero, cross entropy, batches of 25 drawn with replacement, \
                      60 calls of the loss; then the loss on all data. SGD with three learning rates; surrogates with 5 and 20 inner \
                      steps of gradient descent with Armijo's line search, in the authors' normalization.",
            notes: "What counts is calls of the loss: an inner step costs a forward and a backward pass of the model, so nothing is \
                    won where the loss is as cheap as here. SGD at rate 3 ends above 0.4 on 9 % of 300 draws of the \
                    batches (NumPy); where such a draw is among the seeds, rate 1 is SGD's best and the factor below one half. \
                    On the others rate 3 reaches 0.25 and the factor is about 0.65. With batches of 125 the gap shrinks \
                    (0.16 against 0.11), and on an easy problem (breast cancer, 569 x 30) there is none.",
            data: Data { embedded: "digits", real: None },
            arms: vec![
                Arm::new("sgd", "SGD", Role::Baseline).tuned("lr", &[0.3, 1.0, 3.0], "loss"),
                surrogate("sso", "surrogate, 5 inner steps", Role::Method, 5.0, 30.0),
                surrogate("sso-20", "surrogate, 20 inner steps", Role::Method, 20.0, 30.0),
                surrogate("sso-10", "surrogate, 5 inner steps, step 10", Role::Variant, 5.0, 10.0),
                surrogate("sso-search", "surrogate, 5 inner steps, searched step", Role::Variant, 5.0, 1.0),
            ],
            metrics: vec![
                Metric { name: "loss", label: "loss on all data", better: Better::Lower },
                Metric { name: "model_calls", label: "forward passes of the model", better: Better::Neither },
            ],
            claims: vec![
                Claim::mean(
                    "half",
                    "with 5 inner steps the loss is below half of the best SGD's",
                    metric("sso", "loss").below(metric("sgd", "loss") * 0.5),
                ),
                Claim::every_seed(
                    "every-seed",
                    "it is below SGD's with whatever learning rate is best on the seed",
                    metric("sso", "loss").below(best("sgd", "loss")),
                ),
                Claim::mean(
                    "more-steps",
                    "20 inner steps are no worse than 5 by more than 0.02",
                    metric("sso-20", "loss").at_most(metric("sso", "loss") + 0.02),
                ),
            ],
            full: None,
        }
    }

    fn run(&self, arm: &Arm, setting: &Setting, trial: &TrialContext) -> Result<TrialOutcome> {
        let data = &digits(trial, &[datasets::digits::EXAMPLES])?[0];
        let model = Linear::new(trial, data)?;
        let first = cross_entropy(&model.forward(&data.inputs)?, &data.labels, Reduction::Mean)?;
        grad_check(
            &[&first],
            &[
                ("weight".into(), model.weight.clone()),
                ("bias".into(), model.bias.clone()),
            ],
        )?;
        if arm.name == "sgd" {
            sgd(trial, &model, data, setting.get("lr")?)
        } else {
            let config = SsoConfig {
                step_size: setting.get("step")?,
                inner_steps: setting.get("inner_steps")? as usize,
                normalization: Normalization::Official,
                target_search: (arm.name == "sso-search").then(ArmijoTarget::default),
                ..Default::default()
            };
            surrogates(trial, &model, data, config)
        }
    }
}

/// `x W^T + b`, from zero.
struct Linear {
    weight: Var,
    bias: Var,
}

impl Linear {
    fn new(trial: &TrialContext, data: &Classification) -> Result<Self> {
        let inputs = data.inputs.dims().get(1).copied().unwrap_or(0);
        Ok(Self {
            weight: Var::zeros((data.classes, inputs), DType::F32, &trial.device)?,
            bias: Var::zeros(data.classes, DType::F32, &trial.device)?,
        })
    }

    fn vars(&self) -> Vec<Var> {
        vec![self.weight.clone(), self.bias.clone()]
    }

    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        x.matmul(&self.weight.t()?)?.broadcast_add(&self.bias)
    }
}

/// Takes `CALLS` steps on batches that the seed alone decides; `step` gives its model calls.
fn run_calls(
    trial: &TrialContext,
    model: &Linear,
    data: &Classification,
    mut step: impl FnMut(&Tensor, &Tensor) -> Result<usize>,
) -> Result<TrialOutcome> {
    let order = BatchConfig::with_replacement(BATCH);
    let mut batches = Batches::new(data.len(), order, &mut trial.stream("batches"))?;
    let mut curve = Curve::new("loss on all data", "calls of the loss").log_y();
    let (mut loss, mut passes) = (f64::INFINITY, 0);
    for call in 0..=CALLS {
        trial.step(call, CALLS)?;
        let logits = model.forward(&data.inputs)?;
        loss = scalar(&cross_entropy(&logits, &data.labels, Reduction::Mean)?)?;
        curve.push(call as f64, loss);
        if call < CALLS {
            let (x, y) = batches.draw(data)?;
            passes += step(&x, &y)?;
        }
    }
    Ok(TrialOutcome::default()
        .metric("loss", loss)
        .metric("model_calls", passes as f64)
        .curve(curve))
}

fn sgd(
    trial: &TrialContext,
    model: &Linear,
    data: &Classification,
    lr: f64,
) -> Result<TrialOutcome> {
    let config = SgdConfig {
        lr,
        momentum: 0.0,
        ..Default::default()
    };
    let mut optimizer = SgdMomentum::new(model.vars(), config)?;
    run_calls(trial, model, data, |x, y| {
        let loss = cross_entropy(&model.forward(x)?, y, Reduction::Mean)?;
        optimizer.backward_step(&loss)?;
        Ok(1)
    })
}

fn surrogates(
    trial: &TrialContext,
    model: &Linear,
    data: &Classification,
    config: SsoConfig,
) -> Result<TrialOutcome> {
    let inner = ArmijoGdConfig {
        batches_per_epoch: data.len() as f64 / BATCH as f64,
        ..Default::default()
    };
    let inner = ArmijoGd::new(model.vars(), inner)?;
    let mut sso = optim::sso::Sso::new(model.vars(), config, inner)?;
    run_calls(trial, model, data, |x, y| {
        // The authors' normalization wants the sum over the batch.
        let loss = AutogradLoss::new(|z: &Tensor| Ok(cross_entropy(z, y, Reduction::Sum)?));
        let report = sso.step(&|| model.forward(x), &loss)?;
        Ok(report.model_calls)
    })
}

//! Power normalization against layer and batch normalization where the statistics of batches
//! fluctuate.

use crate::scenario::{
    metric, Arm, Better, Claim, Curve, Data, Definition, Metric, Paper, Role, Scenario, Setting,
    TrialContext, TrialOutcome,
};
use crate::scenarios::training::scalar;
use crate::{Error, Result};
use candle_core::{DType, Tensor};
use candle_nn::Optimizer;
use datasets::generate::{ChainChoice, MarkovChains};
use nn::init::SeededVars;
use nn::loss::{cross_entropy, Reduction};
use nn::models::{TokenNorm, TransformerConfig, TransformerLm};
use nn::norm::ghost_batch::GhostBatchNormConfig;
use nn::norm::power::{PowerNorm as PowerNormLayer, PowerNormConfig};
use nn::norm::LayerNormConfig;
use optim::schedule::{InverseSqrt, Schedule};
use optim::{AdamW, AdamWConfig};
use tensor_core::autograd::grad_check;

const STEPS: usize = 600;
const WARMUP: usize = 120;
const CHAINS: usize = 8;
const TOKENS: usize = 32;
const LENGTH: usize = 25;
const BATCH: usize = 8;
const TEST_SEQUENCES: usize = 512;
/// Steps between two points of the curves.
const EVERY: usize = 25;

pub(in crate::scenarios) struct PowerNorm;

impl Scenario for PowerNorm {
    fn definition(&self) -> Definition {
        Definition {
            slug: "power-norm",
            title: "Power normalization",
            paper: Paper {
                title: "PowerNorm: Rethinking Batch Normalization in Transformers",
                venue: "ICML 2020",
                arxiv: "2003.07845",
            },
            krate: "nn",
            module: "norm::power",
            tags: &["normalization", "transformer"],
            version: 1,
            summary: "Sequences of 25 tokens out of 32 from 8 Markov chains (Dirichlet 0.15); every training batch of 8 sequences \
                      is of a single chain, so that its statistics fluctuate; testing on 512 sequences of all chains. Transformer \
                      with two post-norm blocks of width 32, 4 heads, Adam (0.9, 0.98), peak rate 0.002, 120 steps of warm-up, \
                      then inverse root, 600 steps. Power normalization with 4 groups and 120 steps of warm-up.",
            notes: "The set-up was chosen so that the statistics of a batch fluctuate. With batches that mix the chains batch \
                    normalization does not lose at this size, so nothing is claimed there.",
            data: Data { embedded: "markov-chains", real: None },
            arms: vec![
                Arm::new("layer", "layer norm", Role::Baseline),
                Arm::new("batch", "batch norm", Role::Baseline),
                Arm::new("power", "power norm", Role::Method),
            ],
            metrics: vec![
                Metric { name: "loss", label: "test cross entropy", better: Better::Lower },
                Metric { name: "fluctuation", label: "batch over running quadratic mean, deviation from 1", better: Better::Neither },
                Metric { name: "optimum", label: "entropy of the chains", better: Better::Neither },
            ],
            claims: vec![
                Claim::every_seed(
                    "batch",
                    "power norm's loss is below batch norm's − 0.03 on every seed",
                    metric("power", "loss").below(metric("batch", "loss") - 0.03),
                ),
                Claim::every_seed(
                    "layer",
                    "power norm's loss is within 0.06 of layer norm's on every seed",
                    (metric("power", "loss") - metric("layer", "loss")).abs().below(0.06),
                ),
            ],
            full: None,
        }
    }

    fn run(&self, arm: &Arm, _: &Setting, trial: &TrialContext) -> Result<TrialOutcome> {
        let norm = match arm.name {
            "layer" => TokenNorm::Layer(LayerNormConfig::default()),
            "batch" => TokenNorm::Batch(GhostBatchNormConfig::batch_norm()),
            _ => TokenNorm::Power(PowerNormConfig {
                groups: 4,
                warmup_iters: WARMUP as u64,
                ..Default::default()
            }),
        };
        train(trial, norm)
    }
}

fn train(trial: &TrialContext, norm: TokenNorm) -> Result<TrialOutcome> {
    let mut stream = trial.stream("chains");
    let chains = MarkovChains::dirichlet(CHAINS, TOKENS, 0.15, &mut stream)?;
    let test = chains.sample(
        TEST_SEQUENCES,
        LENGTH,
        ChainChoice::Mixed,
        &mut trial.stream("test"),
        &trial.device,
    )?;
    let vars = SeededVars::new(&trial.stream("weights"));
    let config = TransformerConfig {
        vocabulary: TOKENS,
        max_length: LENGTH,
        norm,
        ..Default::default()
    };
    let model = TransformerLm::new(&config, vars.builder(DType::F32, &trial.device))?;
    let params = vars.trainable();
    let adam = AdamWConfig {
        beta2: 0.98,
        ..AdamWConfig::adam(2e-3)
    };
    let mut optimizer = AdamW::new(params.iter().map(|(_, v)| v.clone()).collect(), adam)?;
    let schedule = InverseSqrt::new(2e-3, WARMUP)?;
    let mut batches = trial.stream("batches");
    let mut curve = Curve::new("test cross entropy", "step");
    let mut mechanism = Fluctuation::new(&model);
    for step in 0..STEPS {
        trial.step(step, STEPS)?;
        let batch = chains.sample(
            BATCH,
            LENGTH,
            ChainChoice::OneAtRandom,
            &mut batches,
            &trial.device,
        )?;
        let loss = next_token_loss(&model, &batch, true)?;
        if step == 0 {
            grad_check(&[&loss], &params)?;
        }
        optimizer.set_learning_rate(schedule.at(step));
        optimizer.backward_step(&loss)?;
        mechanism.record(&model, step + 1)?;
        if (step + 1) % EVERY == 0 {
            curve.push(
                (step + 1) as f64,
                scalar(&next_token_loss(&model, &test, false)?)?,
            );
        }
    }
    let outcome = TrialOutcome::default()
        .metric("loss", scalar(&next_token_loss(&model, &test, false)?)?)
        .metric("optimum", chains.best_cross_entropy(LENGTH)?)
        .curve(curve);
    Ok(mechanism.report(outcome))
}

/// Mean cross entropy of every token after the first.
fn next_token_loss(model: &TransformerLm, tokens: &Tensor, train: bool) -> Result<Tensor> {
    let logits = model.forward(&tokens.narrow(1, 0, LENGTH - 1)?.contiguous()?, train)?;
    let targets = tokens.narrow(1, 1, LENGTH - 1)?.contiguous()?;
    Ok(cross_entropy(&logits, &targets, Reduction::Mean)?)
}

/// How far the quadratic mean of a batch is from the running one that the forward pass divides by,
/// in the last power normalization of the network: the paper's picture of why it works.
struct Fluctuation {
    /// The running mean after the last step; `None` for a network without power normalization.
    running: Option<Vec<f64>>,
    curve: Curve,
    squares: Vec<f64>,
}

impl Fluctuation {
    fn new(model: &TransformerLm) -> Self {
        Self {
            running: (!model.power_norms().is_empty()).then(Vec::new),
            curve: Curve::new("batch / running quadratic mean − 1", "step"),
            squares: Vec::new(),
        }
    }

    /// After warm-up the update is `phi <- alpha phi + (1 - alpha) q`, which gives the batch's `q`.
    fn record(&mut self, model: &TransformerLm, step: usize) -> Result<()> {
        let Some(before) = &mut self.running else {
            return Ok(());
        };
        let layers = model.power_norms();
        let layer: &PowerNormLayer = layers
            .last()
            .ok_or_else(|| Error::Trial("no power norm".into()))?;
        let alpha = layer.config().alpha_fwd;
        let now = layer.statistics()?.running_phi;
        if step > WARMUP {
            let ratio = |(old, new): (&f64, &f64)| {
                ((new - alpha * old) / ((1.0 - alpha) * old) - 1.0).powi(2)
            };
            let squares: Vec<f64> = before.iter().zip(&now).map(ratio).collect();
            self.squares.push(crate::statistics::mean(&squares));
            if step.is_multiple_of(EVERY) {
                let recent = &self.squares[self.squares.len() - EVERY.min(self.squares.len())..];
                self.curve
                    .push(step as f64, crate::statistics::mean(recent).sqrt());
            }
        }
        *before = now;
        Ok(())
    }

    fn report(self, outcome: TrialOutcome) -> TrialOutcome {
        if self.squares.is_empty() {
            return outcome;
        }
        let fluctuation = crate::statistics::mean(&self.squares).sqrt();
        outcome.metric("fluctuation", fluctuation).curve(self.curve)
    }
}

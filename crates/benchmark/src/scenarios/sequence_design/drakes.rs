//! DRAKES: a reward is raised by fine-tuning, and a divergence keeps the samples natural.

use super::pictures::words;
use super::regulatory::{
    correlation, denoiser, distinct, frozen, guided, motif_logos, oracles, pretrain,
    triplet_picture, triplets, Oracle, Regulatory, LENGTH,
};
use crate::scenario::{
    metric, Arm, Better, Claim, Curve, Data, Definition, Metric, Paper, Role, Scenario, Setting,
    TrialContext, TrialOutcome,
};
use crate::Result;
use candle_core::Tensor;
use optim::{AdamW, AdamWConfig, ParamGroup};
use sequence_design::masked_diffusion::{
    DiscreteDenoiser, DrakesConfig, DrakesTrainer, MaskedDiffusion, SampleConfig,
};

const UPDATES: usize = 50;
const SAMPLES: usize = 256;
const STEPS: usize = 16;

pub(in crate::scenarios) struct Drakes;

impl Scenario for Drakes {
    fn definition(&self) -> Definition {
        Definition {
            slug: "drakes",
            title: "DRAKES",
            paper: Paper {
                title: "Fine-Tuning Discrete Diffusion Models via Reward Optimization with Applications to DNA and \
                        Protein Design",
                venue: "ICLR 2025",
                arxiv: "2410.13643",
            },
            krate: "sequence-design",
            module: "masked_diffusion",
            tags: &["sequence", "diffusion", "reward"],
            version: 4,
            summary: "Synthetic regulatory DNA: 6000 sequences of 32 letters from a Markov chain in which two motifs are \
                      planted; the activity counts motifs and punishes an excess of G and C. A convolutional denoiser is \
                      trained for 300 steps of 128, an oracle on each half of the data. 50 updates of 32 trajectories of \
                      16 steps, the last 6 relaxed, Adam 5e-4, with the exact divergence at weights 0, 0.01 and 0.03, \
                      judged on 256 samples by the other oracle. Beside it what needs no fine-tuning: the pre-trained \
                      model guided by the oracle's gradient, alone or as twisted Monte Carlo, at the best of six \
                      scales.",
            notes: "Rewards are in standard deviations of the data. Weight 0 may collapse, so that no claim says it \
                    scores higher. The networks begin with PyTorch's values, as in the experiment that the thresholds \
                    were measured in. Twisted Monte Carlo, at the scale that the steering oracle likes best, ends in \
                    a few sequences (3 of 256 are distinct on seed 0): its means are those of these few.",
            data: Data { embedded: "regulatory-dna", real: None },
            arms: vec![
                Arm::new("pre-trained", "before fine-tuning", Role::Baseline),
                Arm::new("gradient", "guidance by the gradient", Role::Baseline),
                Arm::new("twisted", "twisted Monte Carlo", Role::Baseline),
                Arm::new("alpha-0", "no divergence", Role::Baseline).fixed(&[("alpha", 0.0)]),
                Arm::new("alpha-0.01", "DRAKES, alpha = 0.01", Role::Method).fixed(&[("alpha", 0.01)]),
                Arm::new("alpha-0.03", "DRAKES, alpha = 0.03", Role::Variant).fixed(&[("alpha", 0.03)]),
            ],
            metrics: vec![
                Metric { name: "reward", label: "mean of the judging oracle", better: Better::Higher },
                Metric { name: "kl", label: "divergence along the path (nats)", better: Better::Lower },
                Metric { name: "triplets", label: "correlation of triplets with the best data", better: Better::Higher },
                Metric { name: "distinct", label: "distinct among 256 samples", better: Better::Higher },
                Metric { name: "activity", label: "mean true activity", better: Better::Higher },
                Metric { name: "scale", label: "best scale of the gradient", better: Better::Neither },
            ],
            claims: vec![
                Claim::every_seed(
                    "reward",
                    "the reward rises by at least one standard deviation",
                    metric("alpha-0.01", "reward").at_least(metric("pre-trained", "reward") + 1.0),
                ),
                Claim::every_seed(
                    "divergence",
                    "the divergence is at most 0.85 of that without a penalty",
                    metric("alpha-0.01", "kl").at_most(metric("alpha-0", "kl") * 0.85),
                ),
                Claim::every_seed(
                    "divergence-falls",
                    "and falls further with the weight",
                    metric("alpha-0.03", "kl").below(metric("alpha-0.01", "kl")),
                ),
                Claim::every_seed(
                    "natural",
                    "triplets stay nearer to those of the best data by 0.08",
                    metric("alpha-0.01", "triplets").at_least(metric("alpha-0", "triplets") + 0.08),
                ),
                Claim::every_seed(
                    "distinct",
                    "at least 250 of 256 samples are distinct",
                    metric("alpha-0.01", "distinct").at_least(250.0),
                ),
            ],
            full: None,
        }
    }

    fn trade_offs(&self) -> &'static [(&'static str, &'static str)] {
        &[("kl", "reward"), ("kl", "triplets"), ("triplets", "reward")]
    }

    fn run(&self, arm: &Arm, setting: &Setting, trial: &TrialContext) -> Result<TrialOutcome> {
        let data = Regulatory::new(&mut trial.stream("data"))?;
        let (vars, model) = denoiser(trial)?;
        pretrain(("drakes", trial), &data, &vars, &model)?;
        let frozen = frozen(&vars, trial)?;
        let [guide, judge] = oracles(("drakes", trial), &data)?;
        if matches!(arm.name, "gradient" | "twisted") {
            let size = (SAMPLES, STEPS);
            let (scale, samples) = guided((&model, &guide), arm.name == "twisted", size, trial)?;
            let before = drawn(trial, &model)?;
            let outcome = TrialOutcome::default().metric("scale", scale);
            return judged(outcome, trial, (&data, &judge), &before, &samples);
        }
        let reward = |x: &Tensor| -> sequence_design::Result<Tensor> { Ok(guide.score(x)?) };
        let config = DrakesConfig {
            steps_per_traj: STEPS,
            truncate_steps: 6,
            alpha: if arm.name == "pre-trained" {
                0.0
            } else {
                setting.get("alpha")?
            },
            batch: 32,
            accumulate: 1,
            ..DrakesConfig::default()
        };
        let group = ParamGroup::named(vars.trainable(), AdamWConfig::adam(5e-4));
        let adam = AdamW::with_groups(vec![group])?;
        let all = vars.trainable();
        let mut trainer = DrakesTrainer::new(model, frozen, all, &reward, adam, config, LENGTH)?;
        let mut rng = trial.stream("fine-tuning");
        let mut rewards = Curve::new("reward of the steering oracle", "update");
        let mut divergence = Curve::new("divergence (nats)", "update");
        let updates = if arm.name == "pre-trained" {
            0
        } else {
            UPDATES
        };
        for update in 0..updates {
            trial.step(update, updates)?;
            let report = trainer.step(&mut rng)?;
            rewards.push((update + 1) as f64, report.reward_hard);
            divergence.push((update + 1) as f64, report.kl_per_step.iter().sum());
        }
        let samples = drawn(trial, trainer.model())?;
        let before = drawn(trial, trainer.frozen())?;
        let outcome = TrialOutcome::default()
            .metric("kl", path_divergence(trial, &trainer)?)
            .curve(rewards)
            .curve(divergence);
        judged(outcome, trial, (&data, &judge), &before, &samples)
    }
}

/// Samples of a model, from the same numbers for every model of a seed.
fn drawn<D: DiscreteDenoiser>(
    trial: &TrialContext,
    model: &MaskedDiffusion<D>,
) -> Result<Vec<Vec<u32>>> {
    let config = SampleConfig {
        steps: STEPS,
        ..SampleConfig::default()
    };
    let samples = model.sample(SAMPLES, LENGTH, None, &config, &trial.stream("samples"))?;
    Ok(samples.tokens.to_vec2::<u32>()?)
}

/// Adds what is said of samples.
fn judged(
    outcome: TrialOutcome,
    trial: &TrialContext,
    (data, judge): (&Regulatory, &Oracle),
    before: &[Vec<u32>],
    samples: &[Vec<u32>],
) -> Result<TrialOutcome> {
    let best = data.best_triplets();
    let activity = samples.iter().map(|s| data.activity(s)).sum::<f64>() / SAMPLES as f64;
    Ok(outcome
        .metric("reward", judge.mean(samples, &trial.device)?)
        .metric("triplets", correlation(&triplets(samples), &best))
        .metric("distinct", distinct(samples) as f64)
        .metric("activity", activity)
        .picture(motif_logos(before, samples))
        .picture(triplet_picture(samples, &best))
        .picture(words("most frequent words of six letters", samples)))
}

/// The divergence of whole trajectories, mean over 8 batches of fresh ones.
fn path_divergence<D, F, O>(
    trial: &TrialContext,
    trainer: &DrakesTrainer<'_, D, F, O>,
) -> Result<f64>
where
    D: DiscreteDenoiser,
    F: DiscreteDenoiser,
    O: candle_nn::Optimizer,
{
    const BATCHES: usize = 8;
    let mut rng = trial.stream("divergence");
    let mut sum = 0.0;
    for _ in 0..BATCHES {
        let mut uniforms = vec![0.0; STEPS * 32 * LENGTH * 5];
        rng.fill_uniform(&mut uniforms);
        sum += trainer
            .model()
            .path_kl(trainer.frozen(), (32, LENGTH), STEPS, &uniforms)?;
    }
    Ok(sum / BATCHES as f64)
}

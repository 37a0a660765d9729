//! Experts for ranges of noise against a clean classifier and against one noise-aware guide.

use super::judge::{perceptron, split, KernelJudge};
use crate::scenario::{
    metric, Arm, Better, Claim, Curve, Data, Definition, Metric, Paper, Role, Scenario, Setting,
    TrialContext, TrialOutcome,
};
use crate::scenarios::generation::{digits, frechet, image_grid, Cloud};
use crate::{Error, Result};
use candle_core::{Module, ModuleT, Tensor, Var};
use candle_nn::{Optimizer, VarBuilder};
use datasets::Classification;
use flows::grid::Spacing;
use flows::prediction::select_rows;
use flows::schedule::{Beta, Ddpm};
use flows::{AnalyticMixture, Condition, Grid, Levels, Sampler, Schedule};
use guidance::ppap::{generate, ExpertBank, ExpertGuide, Ranges, Transfer};
use guidance::ClassifierGuidance;
use nn::lora::PeftSpec;
use nn::models::{Mlp, MlpConfig};
use optim::{AdamW, AdamWConfig};

const TRAINING: usize = 1000;
const BANDWIDTH: f64 = 0.2;
const STEPS: usize = 1000;
const SAMPLER_STEPS: usize = 25;
const WIDTHS: [usize; 4] = [64, 128, 128, 10];
const TRANSFER_SET: usize = 2000;
/// Updates in all, divided among the experts.
const UPDATES: usize = 3000;
const SAMPLES: usize = 300;
const SCALES: [f64; 3] = [1.0, 2.0, 4.0];

pub(in crate::scenarios) struct Ppap;

impl Scenario for Ppap {
    fn definition(&self) -> Definition {
        let number = |name, label, better| Metric {
            name,
            label,
            better,
        };
        let bank = |name, label, role, experts, full, updates| {
            let values = [("experts", experts), ("full", full), ("updates", updates)];
            Arm::new(name, label, role).fixed(&values)
        };
        let all = UPDATES as f64;
        Definition {
            slug: "ppap",
            title: "Practical plug-and-play guidance",
            paper: Paper {
                title: "Towards Practical Plug-and-Play Diffusion Models",
                venue: "CVPR 2023",
                arxiv: "2212.05973",
            },
            krate: "guidance",
            module: "ppap",
            tags: &["guidance", "transfer"],
            version: 3,
            summary: "An unconditional model (the exact denoiser of 1000 handwritten digits, bandwidth 0.2, 1000 steps \
                      of DDPM's linear schedule) is guided by a perceptron 64-128-128-10 that knows the same digits. \
                      Five experts (rank 8, alpha 8, biases) learn from it on 2000 samples of the model, 600 updates of \
                      AdamW each (3e-3, batch 128, tau 0.25); a single guide has all 3000. 25 DDIM steps, 300 samples, \
                      scale 4; the judge is a kernel classifier on the other digits. Distances are Fréchet distances to \
                      all digits, on pixels.",
            notes: "The guide with all weights trains every tensor of the perceptron, its last layer too; the others \
                    train adapters of the first two layers and their biases. The held-out accuracy is on the judge's digits \
                    under noise of steps drawn from five equal ranges; the last ranges carry next to no information.",
            data: Data { embedded: "digits", real: None },
            arms: vec![
                Arm::new("none", "no guidance", Role::Baseline),
                bank("naive", "clean classifier", Role::Baseline, 1.0, 0.0, 0.0),
                bank("full", "one noise-aware guide, all weights", Role::Baseline, 1.0, 1.0, all),
                bank("single", "one noise-aware guide, adapters", Role::Baseline, 1.0, 0.0, all),
                bank("ppap", "five experts", Role::Method, 5.0, 0.0, all),
            ],
            metrics: vec![
                number("accuracy", "class accuracy by the judge", Better::Higher),
                number("fd", "Fréchet distance", Better::Lower),
                number("held_out", "accuracy on noised held-out digits", Better::Higher),
                number("trainable", "trained part of the network, per expert", Better::Neither),
            ],
            claims: vec![
                Claim::every_seed(
                    "distance",
                    "samples are at half the clean classifier's distance to the data or less",
                    metric("ppap", "fd").at_most(metric("naive", "fd") * 0.5),
                ),
                Claim::every_seed(
                    "accuracy",
                    "experts hit the class more often than a single guide, by 0.02",
                    metric("ppap", "accuracy").at_least(metric("single", "accuracy") + 0.02),
                ),
                Claim::every_seed(
                    "distance-single",
                    "at no larger distance",
                    metric("ppap", "fd").at_most(metric("single", "fd")),
                ),
            ],
            full: None,
        }
    }

    fn run(&self, arm: &Arm, setting: &Setting, trial: &TrialContext) -> Result<TrialOutcome> {
        let data = digits(trial)?;
        let (known, others) = split(&data, TRAINING)?;
        let judge = KernelJudge::fit(&others)?;
        let reference = Cloud::new(&data.inputs)?;
        let model = AnalyticMixture::kernel_density(&known.inputs, BANDWIDTH)?;
        let schedule = Ddpm::new(Beta::LINEAR, STEPS)?;
        let grid = Grid::discrete(&schedule, Spacing::Trailing, SAMPLER_STEPS)?;
        let wanted: Vec<u32> = (0..SAMPLES).map(|i| (i % known.classes) as u32).collect();
        let labels = Tensor::new(wanted.clone(), &trial.device)?;
        let condition = Condition::classes(&wanted, &trial.device)?;
        let noise = trial.stream("noise").normal(
            0.0,
            1.0,
            (SAMPLES, WIDTHS[0]),
            data.inputs.dtype(),
            &trial.device,
        )?;
        let bank = match arm.name {
            "none" => None,
            _ => Some(experts(trial, setting, &known, &model, (&schedule, &grid))?),
        };
        let sample = |w: f64| -> Result<Tensor> {
            let sampler = Sampler::new(&model, grid.clone());
            let mut sampler = match &bank {
                None => sampler,
                Some(bank) => sampler.guidance(ClassifierGuidance::new(ExpertGuide::new(bank), w)),
            };
            let condition = match &bank {
                None => &Condition::Null,
                Some(_) => &condition,
            };
            Ok(sampler
                .sample(&noise, condition, None, &trial.stream("steps"))?
                .x)
        };
        let mut outcome = TrialOutcome::default();
        let mut hits = Curve::new("class accuracy", "guidance scale");
        let mut distances = Curve::new("Fréchet distance", "guidance scale");
        for w in SCALES {
            let x = sample(w)?;
            let accuracy = judge.accuracy(&x, &labels)?;
            let fd = frechet(&Cloud::new(&x)?, &reference)?;
            hits.push(w, accuracy);
            distances.push(w, fd);
            if w == 4.0 {
                outcome = outcome
                    .metric("accuracy", accuracy)
                    .metric("fd", fd)
                    .picture(image_grid(
                        "classes 0 to 9, scale 4",
                        &x.narrow(0, 0, 40)?,
                        10,
                    )?);
            }
        }
        if let Some(bank) = &bank {
            let (bins, mean) = held_out(trial, bank, &others, &schedule)?;
            outcome = outcome
                .metric("trainable", bank.trainable_fraction())
                .metric("held_out", mean)
                .curve(bins);
        }
        Ok(outcome.curve(hits).curve(distances))
    }
}

/// The guide's accuracy on digits that it does not know, at steps drawn from each of five equal ranges, and
/// the mean of these.
fn held_out(
    trial: &TrialContext,
    bank: &ExpertBank<Net>,
    others: &Classification,
    schedule: &Ddpm,
) -> Result<(Curve, f64)> {
    const BINS: usize = 5;
    let mut rng = trial.stream("held-out");
    let mut curve = Curve::new("accuracy on noised held-out digits", "range of steps");
    let labels = others.labels.to_vec1::<u32>()?;
    let mut sum = 0.0;
    for bin in 0..BINS {
        let width = STEPS / BINS;
        let t = (0..others.len()).map(|_| Ok(bin * width + rng.below(width)?));
        let t = t.collect::<Result<Vec<usize>>>()?;
        let levels = t.iter().map(|t| schedule.level(*t as f64));
        let levels = Levels::PerRow(levels.collect::<flows::Result<_>>()?);
        let (shape, dtype) = (others.inputs.shape(), others.inputs.dtype());
        let noise = rng.normal(0.0, 1.0, shape, dtype, &trial.device)?;
        let noisy = flows::level::mix(&others.inputs, &noise, &levels)?;
        let found = bank.forward(&noisy, &t)?.argmax(1)?.to_vec1::<u32>()?;
        let right = found.iter().zip(&labels).filter(|(a, b)| a == b).count();
        let accuracy = right as f64 / labels.len() as f64;
        curve.push((bin + 1) as f64, accuracy);
        sum += accuracy;
    }
    Ok((curve, sum / BINS as f64))
}

/// The perceptron behind the interface of a module.
struct Net(Mlp);

impl Module for Net {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        self.0.forward_t(x, false)
    }
}

fn build(vb: VarBuilder) -> guidance::Result<Net> {
    Ok(Net(Mlp::new(&MlpConfig::new(&WIDTHS), vb)?))
}

fn adam(vars: Vec<Var>, transfer: &Transfer) -> guidance::Result<AdamW> {
    let config = AdamWConfig {
        lr: transfer.lr,
        weight_decay: transfer.weight_decay,
        ..AdamWConfig::default()
    };
    Ok(<AdamW as Optimizer>::new(vars, config)?)
}

/// The guide of an arm, after its transfer.
fn experts(
    trial: &TrialContext,
    setting: &Setting,
    known: &Classification,
    model: &AnalyticMixture,
    (schedule, grid): (&Ddpm, &Grid),
) -> Result<ExpertBank<'static, Net>> {
    let (count, updates) = (
        setting.get("experts")? as usize,
        setting.get("updates")? as usize,
    );
    let spec = match setting.get("full")? > 0.0 {
        true => PeftSpec {
            full: true,
            exclude: Vec::new(),
            ..PeftSpec::default()
        },
        false => PeftSpec {
            rank: 8,
            alpha: 8.0,
            // The last layer, and its bias, stay.
            targets: Box::new(|name| !name.contains("layers.2")),
            exclude: vec!["2".into()],
            ..PeftSpec::default()
        },
    };
    let weights = perceptron(trial, known, &WIDTHS)?;
    let ranges = Ranges::new(count, STEPS)?;
    let mut bank = ExpertBank::new(build, weights, ranges, &spec, &mut trial.stream("adapters"))?;
    if updates == 0 {
        return Ok(bank);
    }
    let generated = generate(
        model,
        grid,
        &known.inputs,
        TRANSFER_SET,
        500,
        &trial.stream("transfer-set"),
    )?;
    let transfer = Transfer {
        iterations: updates / count,
        batch: 128,
        lr: 3e-3,
        ..Transfer::default()
    };
    let mut order = trial.stream("transfer-batches");
    let mut done = 0;
    let mut cancelled = false;
    let mut data = |rows: usize| {
        done += 1;
        cancelled |= trial.step(done, updates).is_err();
        if cancelled {
            return Err(guidance::Error::Unsupported {
                what: "a cancelled trial".into(),
                reason: "it was to stop".into(),
            });
        }
        let mut all = order.permutation(TRANSFER_SET)?;
        all.truncate(rows);
        Ok(select_rows(&generated, &all)?)
    };
    let mut rng = trial.stream("transfer");
    let outcome = transfer.run(&mut bank, schedule, &mut data, adam, &mut rng);
    match outcome {
        _ if cancelled => Err(Error::Cancelled),
        Err(error) => Err(error.into()),
        Ok(_) => Ok(bank),
    }
}

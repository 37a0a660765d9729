//! Synthetic regulatory DNA, a masked-diffusion model of it, and oracles of its activity: what the
//! scenarios of fine-tuning and of decoding share.

use super::pictures::{logos, mirrored, sites};
use crate::scenario::{Picture, TrialContext};
use crate::scenarios::generation::trained_once;
use crate::scenarios::training::scalar;
use crate::{Error, Result};
use candle_core::{DType, Device, Module, Tensor};
use candle_nn::{Conv1dConfig, Optimizer, VarBuilder};
use guidance::svdd::{sample, SmcSampler};
use nn::activation::Activation;
use nn::conv::Conv1d;
use nn::init::{Initializer, SeededVars};
use nn::linear::Linear;
use nn::norm::{layer_norm, LayerNorm, LayerNormConfig};
use optim::{AdamW, AdamWConfig, ParamGroup};
use sequence_design::masked_diffusion::{one_hot, DiscreteDenoiser, MaskedDiffusion};
use sequence_design::svdd::{GradientKernel, Twisted};
use tensor_core::autograd::grad_check;
use tensor_core::random::RandomStream;

/// Letters of a sequence.
pub const LENGTH: usize = 32;
const SEQUENCES: usize = 6000;
/// GATAAG and TGACTCA, as codes of A, C, G, T.
const MOTIFS: [&[u32]; 2] = [&[2, 0, 3, 0, 0, 2], &[3, 2, 0, 1, 3, 1, 0]];
const BACKGROUND: [[f64; 4]; 4] = [
    [0.35, 0.15, 0.20, 0.30],
    [0.30, 0.25, 0.10, 0.35],
    [0.25, 0.20, 0.25, 0.30],
    [0.20, 0.20, 0.25, 0.35],
];

/// Sequences with their activity in standard deviations.
pub struct Regulatory {
    pub sequences: Vec<Vec<u32>>,
    activity: Vec<f64>,
    mean: f64,
    std: f64,
}

/// Activity before it is standardized: how well the motifs are matched, less an excess of G and C.
fn raw_activity(sequence: &[u32]) -> f64 {
    let motif = |motif: &&[u32]| {
        let windows = sequence.windows(motif.len());
        let matched = |w: &[u32]| {
            let hits = w.iter().zip(*motif).filter(|(a, b)| a == b).count();
            (8.0 * (hits as f64 / motif.len() as f64 - 1.0)).exp()
        };
        2.0 * (1.0 + windows.map(matched).sum::<f64>().ln() / 8.0)
    };
    let gc = sequence.iter().filter(|c| **c == 1 || **c == 2).count();
    let excess = gc as f64 / sequence.len() as f64 - 0.5;
    MOTIFS.iter().map(motif).sum::<f64>() - 8.0 * excess.max(0.0)
}

fn pick(weights: &[f64; 4], u: f64) -> u32 {
    let mut sum = 0.0;
    for (k, w) in weights.iter().enumerate() {
        sum += w;
        if u < sum {
            return k as u32;
        }
    }
    3
}

impl Regulatory {
    /// A Markov background in which each motif is planted with probability 1/4, each of its letters
    /// drawn anew with probability 0.15.
    pub fn new(rng: &mut RandomStream) -> Result<Self> {
        let mut sequences = vec![];
        for _ in 0..SEQUENCES {
            let mut sequence = vec![rng.below(4)? as u32];
            while sequence.len() < LENGTH {
                let last = sequence[sequence.len() - 1] as usize;
                sequence.push(pick(&BACKGROUND[last], rng.next_uniform()));
            }
            for motif in MOTIFS {
                if rng.next_uniform() < 0.25 {
                    let at = rng.below(LENGTH - motif.len() + 1)?;
                    for (place, letter) in sequence[at..].iter_mut().zip(motif) {
                        let spoiled = rng.next_uniform() < 0.15;
                        *place = if spoiled {
                            rng.below(4)? as u32
                        } else {
                            *letter
                        };
                    }
                }
            }
            sequences.push(sequence);
        }
        let raw: Vec<f64> = sequences.iter().map(|s| raw_activity(s)).collect();
        let mean = raw.iter().sum::<f64>() / raw.len() as f64;
        let square: f64 = raw.iter().map(|r| (r - mean).powi(2)).sum();
        let std = (square / raw.len() as f64).sqrt();
        Ok(Self {
            activity: raw.iter().map(|r| (r - mean) / std).collect(),
            sequences,
            mean,
            std,
        })
    }

    /// The true activity of a sequence, in standard deviations of the data.
    pub fn activity(&self, sequence: &[u32]) -> f64 {
        (raw_activity(sequence) - self.mean) / self.std
    }

    /// Shares of the 64 triplets in the 60 most active sequences.
    pub fn best_triplets(&self) -> Vec<f64> {
        let mut order: Vec<usize> = (0..SEQUENCES).collect();
        order.sort_by(|a, b| self.activity[*b].total_cmp(&self.activity[*a]));
        let best: Vec<Vec<u32>> = order[..60]
            .iter()
            .map(|i| self.sequences[*i].clone())
            .collect();
        triplets(&best)
    }

    fn batch(&self, rows: &[usize], device: &Device) -> Result<(Tensor, Tensor)> {
        let tokens: Vec<u32> = rows
            .iter()
            .flat_map(|i| self.sequences[*i].clone())
            .collect();
        let activity: Vec<f32> = rows.iter().map(|i| self.activity[*i] as f32).collect();
        let tokens = Tensor::from_vec(tokens, (rows.len(), LENGTH), device)?;
        Ok((tokens, Tensor::from_vec(activity, rows.len(), device)?))
    }
}

/// Shares of the 64 triplets.
pub fn triplets(sequences: &[Vec<u32>]) -> Vec<f64> {
    let mut counts = vec![0.0; 64];
    let windows = sequences.iter().flat_map(|s| s.windows(3));
    windows.for_each(|w| counts[(16 * w[0] + 4 * w[1] + w[2]) as usize] += 1.0);
    let total: f64 = counts.iter().sum();
    counts.iter().map(|c| c / total).collect()
}

/// Pearson's correlation.
pub fn correlation(a: &[f64], b: &[f64]) -> f64 {
    let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
    let (ma, mb) = (mean(a), mean(b));
    let sum = |f: &dyn Fn(f64, f64) -> f64| -> f64 {
        a.iter().zip(b).map(|(x, y)| f(x - ma, y - mb)).sum()
    };
    sum(&|x, y| x * y) / (sum(&|x, _| x * x) * sum(&|_, y| y * y)).sqrt()
}

/// Distinct sequences.
pub fn distinct(sequences: &[Vec<u32>]) -> usize {
    sequences
        .iter()
        .collect::<std::collections::HashSet<_>>()
        .len()
}

/// Convolutions without a view of the noise level.
pub struct Denoiser {
    first: Conv1d,
    blocks: Vec<(LayerNorm, Conv1d)>,
    last: Linear,
}

/// A convolution that keeps the length, with PyTorch's initial values: the scale of the weights is
/// part of the experiment.
fn conv(
    (inputs, outputs): (usize, usize),
    kernel: usize,
    dilation: usize,
    vb: VarBuilder,
) -> Result<Conv1d> {
    let shape = [outputs, inputs, kernel];
    let weight = Initializer::torch_linear().hint(&shape)?;
    let bias = Initializer::torch_bias(inputs * kernel).hint(&[outputs])?;
    let config = Conv1dConfig {
        padding: dilation * (kernel / 2),
        dilation,
        ..Conv1dConfig::default()
    };
    let weight = vb.get_with_hints(&shape, "weight", weight)?;
    let bias = vb.get_with_hints(outputs, "bias", bias)?;
    Ok(Conv1d::new(weight, Some(bias), config))
}

/// A linear layer with PyTorch's initial values.
fn linear(inputs: usize, outputs: usize, vb: VarBuilder) -> Result<Linear> {
    let shape = [outputs, inputs];
    let weight = vb.get_with_hints(&shape, "weight", Initializer::torch_linear().hint(&shape)?)?;
    let bias = Initializer::torch_bias(inputs).hint(&[outputs])?;
    Ok(Linear::new(
        weight,
        Some(vb.get_with_hints(outputs, "bias", bias)?),
    ))
}

impl Denoiser {
    fn new(vb: VarBuilder) -> Result<Self> {
        const WIDTH: usize = 32;
        let relu = Activation::Relu;
        let mut blocks = vec![];
        for dilation in [1, 2] {
            let vb = vb.pp("blocks").pp(dilation);
            let norm = layer_norm(WIDTH, LayerNormConfig::default(), vb.pp("norm"))?;
            let conv = conv((WIDTH, WIDTH), 7, dilation, vb.pp("conv"))?;
            blocks.push((norm, conv.with_activation(relu)));
        }
        let first = conv((5, WIDTH), 7, 1, vb.pp("first"))?;
        Ok(Self {
            first: first.with_activation(relu),
            blocks,
            last: linear(WIDTH, 5, vb.pp("last"))?,
        })
    }
}

impl DiscreteDenoiser for Denoiser {
    fn logits(&self, x: &Tensor, _: &Tensor, _: bool) -> sequence_design::Result<Tensor> {
        let mut h = self.first.forward_rows(x)?;
        for (norm, conv) in &self.blocks {
            let change = conv.forward_rows(&norm.forward(&h)?)?;
            h = (h + change)?;
        }
        Ok(self.last.forward(&h)?)
    }
}

/// A network from sequences (or relaxations, or zero rows for masks) to a number.
pub struct Oracle {
    convs: [Conv1d; 2],
    head: Linear,
}

impl Oracle {
    /// From variables of the builder.
    pub fn new(vb: VarBuilder) -> Result<Self> {
        const WIDTH: usize = 32;
        let first = conv((4, WIDTH), 9, 1, vb.pp("conv.0"))?;
        let second = conv((WIDTH, WIDTH), 5, 1, vb.pp("conv.1"))?;
        Ok(Self {
            convs: [first, second].map(|c| c.with_activation(Activation::Gelu)),
            head: linear(2 * WIDTH, 1, vb.pp("head"))?,
        })
    }

    /// Numbers `[B]` of `x` `[B, L, 4]`.
    pub fn score(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let h = self.convs[1].forward_rows(&self.convs[0].forward_rows(x)?)?;
        let both = Tensor::cat(&[h.max(1)?, h.mean(1)?], 1)?;
        self.head.forward(&both)?.squeeze(1)
    }

    /// The mean number of sequences.
    pub fn mean(&self, sequences: &[Vec<u32>], device: &Device) -> Result<f64> {
        let tokens = Tensor::new(sequences.to_vec(), device)?;
        scalar(&self.score(&one_hot(&tokens, 4, DType::F32)?)?.mean_all()?)
    }
}

/// A denoiser with fresh variables; the same stream gives the same ones.
pub fn denoiser(trial: &TrialContext) -> Result<(SeededVars, MaskedDiffusion<Denoiser>)> {
    let vars = SeededVars::new(&trial.stream("weights"));
    let model = over(vars.builder(DType::F32, &trial.device), trial)?;
    Ok((vars, model))
}

/// The denoiser as it is now, without variables.
pub fn frozen(vars: &SeededVars, trial: &TrialContext) -> Result<MaskedDiffusion<Denoiser>> {
    over(vars.frozen(DType::F32, &trial.device)?, trial)
}

fn over(vb: VarBuilder, trial: &TrialContext) -> Result<MaskedDiffusion<Denoiser>> {
    let net = Denoiser::new(vb)?;
    Ok(MaskedDiffusion::new(net, 4, DType::F32, &trial.device)?)
}

/// Steps of 128 examples that the denoiser and each oracle are trained for.
const TRAINING: usize = 300;

/// Trains a denoiser on the data, once for all arms of a method's seed.
pub fn pretrain(
    (method, trial): (&'static str, &TrialContext),
    data: &Regulatory,
    vars: &SeededVars,
    model: &MaskedDiffusion<Denoiser>,
) -> Result<()> {
    let vars = vars.trainable();
    trained_once((method, trial.seed, 0), &vars, || {
        let config = AdamWConfig {
            lr: 1e-3,
            weight_decay: 0.0,
            ..AdamWConfig::default()
        };
        let mut adam = AdamW::with_groups(vec![ParamGroup::named(vars.clone(), config)])?;
        let mut rng = trial.stream("pre-training");
        for step in 0..TRAINING {
            trial.step(step, TRAINING)?;
            let rows = rows(&mut rng, 0, SEQUENCES)?;
            let (tokens, _) = data.batch(&rows, &trial.device)?;
            let loss = model.nll(&tokens, None, &mut rng)?.loss;
            if step == 0 {
                grad_check(&[&loss], &vars)?;
            }
            adam.backward_step(&loss)?;
        }
        Ok(())
    })
}

fn rows(rng: &mut RandomStream, from: usize, to: usize) -> Result<Vec<usize>> {
    (0..128).map(|_| Ok(from + rng.below(to - from)?)).collect()
}

/// Two oracles, each trained on a half of the data, once for all arms of a method's seed: one to steer
/// by, one to judge by.
pub fn oracles(
    (method, trial): (&'static str, &TrialContext),
    data: &Regulatory,
) -> Result<[Oracle; 2]> {
    let one = |half: usize| -> Result<Oracle> {
        let stream = trial.stream("oracles").split_index("half", half as u64);
        let vars = SeededVars::new(&stream.split("weights"));
        let oracle = Oracle::new(vars.builder(DType::F32, &trial.device))?;
        let all = vars.trainable();
        trained_once((method, trial.seed, 1 + half), &all, || {
            let group = ParamGroup::named(all.clone(), AdamWConfig::adam(2e-3));
            let mut adam = AdamW::with_groups(vec![group])?;
            let mut rng = stream.split("batches");
            for step in 0..TRAINING {
                trial.step(step, TRAINING)?;
                let first = half * SEQUENCES / 2;
                let rows = rows(&mut rng, first, first + SEQUENCES / 2)?;
                let (tokens, activity) = data.batch(&rows, &trial.device)?;
                let score = oracle.score(&one_hot(&tokens, 4, DType::F32)?)?;
                let loss = (score - activity)?.sqr()?.mean_all()?;
                if step == 0 {
                    grad_check(&[&loss], &all)?;
                }
                adam.backward_step(&loss)?;
            }
            Ok(())
        })?;
        Oracle::new(vars.frozen(DType::F32, &trial.device)?)
    };
    Ok([one(0)?, one(1)?])
}

/// Scales of the gradient that the guided baselines choose from.
const SCALES: [f64; 6] = [3.0, 10.0, 30.0, 100.0, 300.0, 1000.0];

/// Samples that the gradient of the oracle pushes, at the scale that the oracle likes best: alone, or
/// with the weights of twisted Monte Carlo at the temperature `1 / scale`, which the push then fits.
pub fn guided(
    (model, guide): (&MaskedDiffusion<Denoiser>, &Oracle),
    twisted: bool,
    (samples, steps): (usize, usize),
    trial: &TrialContext,
) -> Result<(f64, Vec<Vec<u32>>)> {
    let reward = |x: &Tensor| -> sequence_design::Result<Tensor> { Ok(guide.score(x)?) };
    let rng = trial.stream("samples");
    let mut best: Option<(f64, f64, Vec<Vec<u32>>)> = None;
    for scale in SCALES {
        let kernel = GradientKernel::new(model, &reward, scale, LENGTH, steps)?;
        let found = match twisted {
            false => sample(&kernel, samples, &rng)?,
            true => {
                let alpha = 1.0 / scale;
                let value = Twisted {
                    kernel: &kernel,
                    alpha,
                };
                let smc = SmcSampler {
                    kernel: &kernel,
                    value: &value,
                    alpha,
                    threshold: 0.5,
                };
                smc.sample(samples, &rng)?.states
            }
        };
        let found = found.sequences().to_vec();
        let mean = guide.mean(&found, &trial.device)?;
        if best.as_ref().is_none_or(|(top, _, _)| mean > *top) {
            best = Some((mean, scale, found));
        }
    }
    let (_, scale, found) = best.ok_or_else(|| Error::Trial("no scale to try".into()))?;
    Ok((scale, found))
}

/// How often each triplet of letters stands in sequences (up) and in the data's best (down).
pub fn triplet_picture(samples: &[Vec<u32>], best: &[f64]) -> Picture {
    let caption = "triplets, AAA to TTT, of samples (up) and of the best data (down)";
    mirrored(caption, &triplets(samples), best)
}

/// Both motifs, as sequences have them before and after: of each sequence the place that is most
/// like the motif.
pub fn motif_logos(before: &[Vec<u32>], after: &[Vec<u32>]) -> Picture {
    let mut rows = vec![];
    for motif in MOTIFS {
        for (when, sequences) in [("before", before), ("after", after)] {
            rows.push((when.to_string(), sites(sequences, motif)));
        }
    }
    let caption =
        "GATAAG, then TGACTCA: the place of each sample that is most like it, before and after; a \
         letter that stands alone is 2 bits high";
    logos(caption, &rows)
}

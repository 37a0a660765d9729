//! The exact law that steering aims at, where everything can be listed: a model of three tokens at
//! two positions in three steps, whose soft values are known.

use super::pictures::mirrored;
use crate::scenario::{Curve, TrialContext, TrialOutcome};
use crate::Result;
use candle_core::{DType, Device, Tensor};
use guidance::svdd::{ReverseKernel, Svdd};
use sequence_design::masked_diffusion::{DiscreteDenoiser, MaskedDiffusion};
use sequence_design::svdd::{MaskedKernel, Tokens};

const VOCAB: usize = 3;
const STEPS: usize = 3;
const SAMPLES: usize = 20_000;
/// Numbers of candidates, with the metrics that their distances have.
const CANDIDATES: [(usize, &str); 4] = [(1, "tv_1"), (4, "tv_4"), (16, "tv_16"), (64, "tv")];

/// Logits by what stands at the other position.
struct Pairs(Tensor);

impl DiscreteDenoiser for Pairs {
    fn logits(&self, x: &Tensor, _: &Tensor, _: bool) -> sequence_design::Result<Tensor> {
        let (b, _, v) = x.dims3()?;
        let other = Tensor::cat(&[&x.narrow(1, 1, 1)?, &x.narrow(1, 0, 1)?], 1)?;
        let rows = other.contiguous()?.reshape((2 * b, v))?;
        Ok(rows.matmul(&self.0)?.reshape((b, 2, v))?)
    }
}

/// A state of the two positions as one number, in base 4.
fn index(state: &[u32]) -> usize {
    (4 * state[0] + state[1]) as usize
}

fn states() -> Vec<Vec<u32>> {
    (0..16).map(|k| vec![k / 4, k % 4]).collect()
}

/// Probabilities of the next state, `[from][to]`, for each step.
fn transitions(
    model: &MaskedDiffusion<Pairs>,
    kernel: &MaskedKernel<'_, Pairs>,
) -> Result<Vec<Vec<Vec<f64>>>> {
    let mask = model.mask();
    let all = Tensor::new(states(), &Device::Cpu)?;
    let mut steps = vec![];
    for step in kernel.grid() {
        let laws = model.next_law(&all, step)?.to_vec3::<f64>()?;
        let chance = |from: &[u32], law: &[Vec<f64>], to: &[u32]| -> f64 {
            let at = |i: usize| match from[i] == mask {
                true => law[i][to[i] as usize] / law[i].iter().sum::<f64>(),
                false => f64::from(u8::from(from[i] == to[i])),
            };
            at(0) * at(1)
        };
        let rows = states().into_iter().zip(&laws);
        let row = |(from, law): (Vec<u32>, &Vec<Vec<f64>>)| {
            states().iter().map(|to| chance(&from, law, to)).collect()
        };
        steps.push(rows.map(row).collect());
    }
    Ok(steps)
}

/// Samples with the exact soft value for several numbers of candidates, against the tilted law.
pub(super) fn run(trial: &TrialContext) -> Result<TrialOutcome> {
    let mut rng = trial.stream("tilted");
    let weights = rng.normal(0.0, 1.0, (VOCAB + 1, VOCAB + 1), DType::F64, &Device::Cpu)?;
    let rewards: Vec<f64> = (0..16).map(|_| 2.0 * rng.next_uniform()).collect();
    let model = MaskedDiffusion::new(Pairs(weights), VOCAB, DType::F64, &Device::Cpu)?;
    let kernel = MaskedKernel::new(&model, 2, STEPS)?;
    let all = Tokens::new(&Tensor::new(states(), &Device::Cpu)?)?;
    let clean: Vec<usize> = kernel
        .predict_clean(&all, STEPS)?
        .sequences()
        .iter()
        .map(|s| index(s))
        .collect();
    let steps = transitions(&model, &kernel)?;

    // The value of a finished state is its reward; before that, the log of a mean of exponentials.
    let mut values = vec![clean.iter().map(|k| rewards[*k]).collect::<Vec<f64>>()];
    for step in steps.iter().rev() {
        let next = &values[values.len() - 1];
        let soft = |row: &Vec<f64>| -> f64 {
            let terms = row.iter().zip(next).map(|(p, v)| p * v.exp());
            terms.sum::<f64>().ln()
        };
        values.push(step.iter().map(soft).collect());
    }
    values.reverse();
    let mut law = vec![0.0; 16];
    law[15] = 1.0;
    for step in &steps {
        let to = |k: usize| (0..16).map(|from| law[from] * step[from][k]).sum();
        law = (0..16).map(to).collect();
    }
    let mut tilted = vec![0.0; 16];
    for (p, k) in law.iter().zip(&clean) {
        tilted[*k] += p * rewards[*k].exp();
    }
    let z: f64 = tilted.iter().sum();
    tilted.iter_mut().for_each(|p| *p /= z);

    let value = |x: &Tokens, done: usize| -> guidance::Result<Tensor> {
        let v: Vec<f64> = x
            .sequences()
            .iter()
            .map(|s| values[done][index(s)])
            .collect();
        Ok(Tensor::new(v, &Device::Cpu)?)
    };
    let mut outcome = TrialOutcome::default();
    let mut curve = Curve::new("total variation from the tilted law", "candidates")
        .log_x()
        .log_y();
    let mut found = vec![];
    for (k, (m, name)) in CANDIDATES.into_iter().enumerate() {
        trial.step(k, CANDIDATES.len())?;
        let svdd = Svdd::new(&kernel, &value).duplicates(m).alpha(1.0);
        found = frequencies(
            &svdd
                .sample(SAMPLES, &rng.split_index("m", m as u64))?
                .states,
        );
        let distance = 0.5
            * found
                .iter()
                .zip(&tilted)
                .map(|(a, b)| (a - b).abs())
                .sum::<f64>();
        curve.push(m as f64, distance);
        outcome = outcome.metric(name, distance);
    }
    let finished = |law: &[f64]| -> Vec<f64> {
        let whole = states().into_iter().filter(|s| !s.contains(&model.mask()));
        whole.map(|s| law[index(&s)]).collect()
    };
    let caption = "the nine sequences: samples of 64 candidates (up), the exact tilted law (down)";
    Ok(outcome
        .curve(curve)
        .picture(mirrored(caption, &finished(&found), &finished(&tilted))))
}

fn frequencies(samples: &Tokens) -> Vec<f64> {
    let mut counts = vec![0.0; 16];
    for s in samples.sequences() {
        counts[index(&s)] += 1.0 / SAMPLES as f64;
    }
    counts
}

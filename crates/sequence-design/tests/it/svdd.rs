use crate::support::*;
use candle_core::{DType, Device, Tensor};
use guidance::svdd::{sample, Batch, Cached, PosteriorMeanValue, ReverseKernel, SmcSampler, Svdd};
use sequence_design::masked_diffusion::{DiscreteDenoiser, MaskedDiffusion, SampleConfig, Step};
use sequence_design::svdd::{token_reward, GradientKernel, MaskedKernel, Tokens, Twisted, Weighed};
use sequence_design::{RandomStream, Result};
use std::collections::HashMap;

#[test]
fn reference() {
    let report = FILES.verify("svdd", sequence_design::verify::svdd);
    let gaussian = [
        "beta",
        "x_T",
        "z",
        "u_select_cont",
        "gm_means",
        "gm_var",
        "reward_target",
    ];
    assert_passed(&report, |n| n.starts_with("cont_") || gaussian.contains(&n));
    assert_eq!(report.comparisons.len(), 2 * 6);
}

#[test]
fn reference_with_another_prefix() {
    let report = FILES.verify_variant(
        "svdd",
        |tensors, _| {
            let tokens = tensors.iter().filter(|(n, _)| !n.starts_with("cont_"));
            *tensors = tokens.map(|(n, t)| (format!("s.{n}"), t.clone())).collect();
        },
        sequence_design::verify::svdd,
    );
    assert_passed(&report, |_| true);
    assert_eq!(report.comparisons.len(), 2 * 6);
}

/// Logits that depend on the neighbors: a table.
struct Table {
    vocab: usize,
}

impl DiscreteDenoiser for Table {
    fn logits(&self, x: &Tensor, _: &Tensor, _: bool) -> Result<Tensor> {
        let (b, l, v) = x.dims3()?;
        let left = Tensor::cat(&[&x.narrow(1, l - 1, 1)?, &x.narrow(1, 0, l - 1)?], 1)?;
        let mut weights = vec![0.0; v * v];
        for (k, w) in weights.iter_mut().enumerate() {
            *w = ((k * 7 + 3) % 11) as f64 / 4.0;
        }
        let weights = Tensor::from_vec(weights, (v, v), x.device())?.to_dtype(x.dtype())?;
        assert_eq!(v, self.vocab + 1);
        Ok(left
            .contiguous()?
            .reshape((b * l, v))?
            .matmul(&weights)?
            .reshape((b, l, v))?)
    }
}

fn model() -> MaskedDiffusion<Table> {
    MaskedDiffusion::new(Table { vocab: 3 }, 3, DType::F64, &Device::Cpu).unwrap()
}

/// One candidate is the model's own sampler, bit for bit, and fixed tokens stay.
#[test]
fn one_candidate_is_plain_sampling() {
    let model = model();
    let kernel = MaskedKernel::new(&model, 5, 8).unwrap();
    let rng = RandomStream::new(4);
    let config = SampleConfig {
        steps: 8,
        ..SampleConfig::default()
    };
    let plain = model
        .sample(6, 5, None, &config, &rng)
        .unwrap()
        .tokens
        .to_vec2::<u32>()
        .unwrap();
    assert_eq!(sample(&kernel, 6, &rng).unwrap().sequences(), plain);
    let value = |x: &Tokens, _: usize| -> guidance::Result<Tensor> {
        Ok(Tensor::zeros(x.rows()?, DType::F64, &Device::Cpu)?)
    };
    let out = Svdd::new(&kernel, &value)
        .duplicates(1)
        .sample(6, &rng)
        .unwrap();
    assert_eq!(out.states.sequences(), plain);
    let fixed = MaskedKernel::new(&model, 5, 8)
        .unwrap()
        .fixed(&[3, 1, 3, 3, 2])
        .unwrap();
    for sequence in sample(&fixed, 4, &rng).unwrap().sequences() {
        assert_eq!((sequence[1], sequence[4]), (1, 2));
        assert!(sequence.iter().all(|t| *t < 3));
    }
    assert!(MaskedKernel::new(&model, 0, 8).is_err() && MaskedKernel::new(&model, 5, 0).is_err());
    assert!(MaskedKernel::new(&model, 5, 8)
        .unwrap()
        .fixed(&[3])
        .is_err());
    assert!(MaskedKernel::new(&model, 5, 8)
        .unwrap()
        .fixed(&[4; 5])
        .is_err());
}

#[test]
fn a_black_box_steers_and_is_asked_about_each_sequence_once() {
    let model = model();
    let kernel = MaskedKernel::new(&model, 6, 8).unwrap();
    let count = |s: &Vec<u32>| s.iter().filter(|t| **t == 1).count() as f64;
    let reward = token_reward(move |all: &[Vec<u32>]| Ok(all.iter().map(count).collect()));
    let keys = |x: &Tokens| {
        guidance::svdd::token_keys(&x.tensor(&Device::Cpu).map_err(candle_core::Error::wrap)?)
    };
    let cached = Cached::new(&reward, keys);
    let value = PosteriorMeanValue::new(&kernel, &cached);
    let rng = RandomStream::new(5);
    let mean = |s: Vec<Vec<u32>>| s.iter().map(count).sum::<f64>() / s.len() as f64;
    let plain = mean(sample(&kernel, 32, &rng).unwrap().sequences());
    let out = Svdd::new(&kernel, &value)
        .duplicates(8)
        .sample(32, &rng)
        .unwrap();
    let steered = mean(out.states.sequences());
    assert!(steered > plain + 1.0, "{plain} {steered}");
    assert!(cached.misses() < out.reward_calls);
    let failing = token_reward(|_: &[Vec<u32>]| {
        Err(sequence_design::Error::State("the judge is out".into()))
    });
    let value = PosteriorMeanValue::new(&kernel, &failing);
    let error = Svdd::new(&kernel, &value)
        .duplicates(2)
        .sample(2, &rng)
        .unwrap_err();
    assert!(error.to_string().contains("the judge is out"), "{error}");
}

/// All transitions of a step with their probabilities.
fn transitions(
    model: &MaskedDiffusion<Table>,
    tokens: &[u32],
    step: &Step,
) -> Vec<(Vec<u32>, f64)> {
    let x = Tensor::from_slice(tokens, (1, tokens.len()), &Device::Cpu).unwrap();
    let law = model
        .next_law(&x, step)
        .unwrap()
        .to_vec3::<f64>()
        .unwrap()
        .remove(0);
    let mut all = vec![(vec![], 1.0)];
    for (token, weights) in tokens.iter().zip(law) {
        let total: f64 = weights.iter().sum();
        let options: Vec<(u32, f64)> = match *token == 3 {
            true => weights
                .iter()
                .enumerate()
                .map(|(k, w)| (k as u32, w / total))
                .collect(),
            false => vec![(*token, 1.0)],
        };
        all = all
            .into_iter()
            .flat_map(|(prefix, p): (Vec<u32>, f64)| {
                options
                    .iter()
                    .map(move |(k, q)| ([&prefix[..], &[*k]].concat(), p * q))
                    .collect::<Vec<_>>()
            })
            .collect();
    }
    all
}

fn clean(kernel: &MaskedKernel<Table>, s: &[u32]) -> Vec<u32> {
    let x = Tokens::new(&Tensor::from_slice(s, (1, 2), &Device::Cpu).unwrap()).unwrap();
    kernel.predict_clean(&x, 3).unwrap().sequences().remove(0)
}

/// The law of finished sequences, tilted by the exponential of a reward.
fn tilted(
    model: &MaskedDiffusion<Table>,
    kernel: &MaskedKernel<Table>,
    reward: impl Fn(&[u32]) -> f64,
) -> HashMap<Vec<u32>, f64> {
    let mut law: HashMap<Vec<u32>, f64> = HashMap::from([(vec![3, 3], 1.0)]);
    for step in kernel.grid() {
        let mut next: HashMap<Vec<u32>, f64> = HashMap::new();
        for (s, p) in &law {
            for (t, q) in transitions(model, s, step) {
                *next.entry(t).or_default() += p * q;
            }
        }
        law = next;
    }
    let mut tilted: HashMap<Vec<u32>, f64> = HashMap::new();
    for (s, p) in &law {
        let end = clean(kernel, s);
        *tilted.entry(end.clone()).or_default() += p * reward(&end).exp();
    }
    let z: f64 = tilted.values().sum();
    tilted.values_mut().for_each(|p| *p /= z);
    tilted
}

fn total_variation(samples: &[Vec<u32>], law: &HashMap<Vec<u32>, f64>) -> f64 {
    let mut counts: HashMap<&Vec<u32>, f64> = HashMap::new();
    for s in samples {
        *counts.entry(s).or_default() += 1.0 / samples.len() as f64;
    }
    let gap = |(s, p): (&Vec<u32>, &f64)| (p - counts.get(s).copied().unwrap_or(0.0)).abs();
    0.5 * law.iter().map(gap).sum::<f64>()
}

/// Guidance of scale 0 is the model's own sampler; a gradient raises the reward; and the weights of
/// twisted Monte Carlo lead to the tilted law, whatever the scale.
#[test]
fn gradients_push_and_weights_make_up_for_it() {
    let model = model();
    let weights = Tensor::new(&[[0.0, 1.2, -0.4], [0.9, 0.0, 0.3]], &Device::Cpu).unwrap();
    let reward = |x: &Tensor| -> Result<Tensor> {
        let linear = x.broadcast_mul(&weights)?.sum(2)?.sum(1)?;
        let pair = (x.narrow(1, 0, 1)? * x.narrow(1, 1, 1)?)?.sum(2)?.sum(1)?;
        Ok((linear + pair.affine(0.5, 0.0)?)?)
    };
    let on = |s: &[u32]| {
        let table = weights.to_vec2::<f64>().unwrap();
        let linear = table[0][s[0] as usize] + table[1][s[1] as usize];
        linear + if s[0] == s[1] { 0.5 } else { 0.0 }
    };
    let plain = MaskedKernel::new(&model, 2, 3).unwrap();
    let law = tilted(&model, &plain, on);
    let rng = RandomStream::new(8);
    let guided = |scale| {
        let kernel = GradientKernel::new(&model, &reward, scale, 2, 3).unwrap();
        sample(&kernel, 2000, &rng).unwrap()
    };
    let none = guided(0.0);
    assert_eq!(
        none.sequences(),
        sample(&plain, 2000, &rng).unwrap().sequences()
    );
    assert!(none.corrections().iter().all(|c| c.abs() < 1e-9));
    let mean = |all: &Weighed| all.sequences().iter().map(|s| on(s)).sum::<f64>() / 2000.0;
    let (low, high) = (mean(&none), mean(&guided(2.0)));
    assert!(high > low + 0.2, "{low} {high}");
    for scale in [0.0, 1.0] {
        let kernel = GradientKernel::new(&model, &reward, scale, 2, 3).unwrap();
        let value = Twisted {
            kernel: &kernel,
            alpha: 1.0,
        };
        let smc = SmcSampler {
            kernel: &kernel,
            value: &value,
            alpha: 1.0,
            threshold: 0.5,
        };
        let out = smc.sample(8000, &rng).unwrap();
        let distance = total_variation(out.states.sequences(), &law);
        assert!(distance < 0.03, "{scale} {distance}");
    }
    assert!(GradientKernel::new(&model, &reward, f64::NAN, 2, 3).is_err());
    assert!(GradientKernel::new(&model, &reward, 1.0, 0, 3).is_err());
    assert!(GradientKernel::new(&model, &reward, 1.0, 2, 0).is_err());
    let looked_up = |x: &Tensor| -> Result<Tensor> { Ok(x.detach().sum(2)?.sum(1)?) };
    let kernel = GradientKernel::new(&model, &looked_up, 1.0, 2, 3).unwrap();
    assert!(sample(&kernel, 1, &rng).is_err());
}

/// With the exact soft value the samples approach the tilted law as candidates are added.
#[test]
fn exact_values_give_the_tilted_law() {
    let model = model();
    let kernel = MaskedKernel::new(&model, 2, 3).unwrap();
    let reward = |s: &[u32]| f64::from(s[0] * 5 % 7 + s[1] * 3 % 4) / 4.0;
    let clean = |s: &[u32]| clean(&kernel, s);
    let states: Vec<Vec<u32>> = (0..16u32).map(|k| vec![k / 4, k % 4]).collect();
    // v_T is the reward of the filled state, and backwards the log of a mean of exponentials.
    let mut values: Vec<HashMap<Vec<u32>, f64>> = vec![HashMap::new(); 4];
    for s in &states {
        values[3].insert(s.clone(), reward(&clean(s)));
    }
    for step in (0..3).rev() {
        for s in &states {
            let next = transitions(&model, s, &kernel.grid()[step]);
            let v: f64 = next
                .iter()
                .map(|(t, p)| p * values[step + 1][t].exp())
                .sum();
            values[step].insert(s.clone(), v.ln());
        }
    }
    let tilted = tilted(&model, &kernel, reward);
    let value = |x: &Tokens, done: usize| -> guidance::Result<Tensor> {
        let v: Vec<f64> = x.sequences().iter().map(|s| values[done][s]).collect();
        Ok(Tensor::new(v, &Device::Cpu)?)
    };
    let distance = |m: usize| {
        let svdd = Svdd::new(&kernel, &value).duplicates(m).alpha(1.0);
        let out = svdd.sample(4000, &RandomStream::new(6)).unwrap();
        total_variation(&out.states.sequences(), &tilted)
    };
    let (one, four, many) = (distance(1), distance(4), distance(48));
    assert!(
        many < 0.03 && four < one && many < four,
        "{one} {four} {many}"
    );
}

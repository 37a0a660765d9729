//! Soft value-based decoding.

use crate::support::*;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{AdamW, Optimizer, ParamsAdamW};
use flows::schedule::VpSde;
use flows::{AnalyticMixture, Condition, Ddim, Grid, Noise, Sampler};
use guidance::svdd::*;
use guidance::{Error, RandomStream, Result};
use proptest::prelude::*;
use std::collections::HashMap;

const MASK: u32 = 3;
const STEPS: usize = 3;

/// Two positions of three tokens, unmasked at random in three steps by a table.
struct Masked {
    /// Weights of the tokens at a position, by the state's code and the position.
    table: Vec<f64>,
}

type Word = (u32, u32);

impl Masked {
    fn new(seed: u64) -> Self {
        let mut rng = RandomStream::new(seed);
        let table = (0..16 * 2 * 3).map(|_| 0.2 + rng.next_uniform()).collect();
        Self { table }
    }

    /// Distribution of a position's next token after `done` steps.
    fn next(&self, word: Word, position: usize, done: usize) -> Vec<(u32, f64)> {
        let now = if position == 0 { word.0 } else { word.1 };
        if now != MASK {
            return vec![(now, 1.0)];
        }
        let stay = 1.0 - 1.0 / (STEPS - done) as f64;
        let at = ((word.0 * 4 + word.1) as usize * 2 + position) * 3;
        let weights = &self.table[at..at + 3];
        let total: f64 = weights.iter().sum();
        let mut all: Vec<(u32, f64)> = (0..3)
            .map(|k| (k, (1.0 - stay) * weights[k as usize] / total))
            .collect();
        all.push((MASK, stay));
        all
    }

    /// Distribution of the whole next word.
    fn words(&self, word: Word, done: usize) -> Vec<(Word, f64)> {
        let (first, second) = (self.next(word, 0, done), self.next(word, 1, done));
        let pair = |(a, p): &(u32, f64)| {
            let p = *p;
            let a = *a;
            second
                .iter()
                .map(move |(b, q)| ((a, *b), p * q))
                .collect::<Vec<_>>()
        };
        first
            .iter()
            .flat_map(pair)
            .filter(|(_, p)| *p > 0.0)
            .collect()
    }

    /// `alpha ln E exp(r / alpha)` of every word after `done` steps.
    fn soft_values(&self, reward: &dyn Fn(Word) -> f64, alpha: f64) -> Vec<HashMap<Word, f64>> {
        let all: Vec<Word> = (0..4).flat_map(|a| (0..4).map(move |b| (a, b))).collect();
        let finished = |(a, b): &Word| *a != MASK && *b != MASK;
        let last = all
            .iter()
            .copied()
            .filter(finished)
            .map(|w| (w, reward(w)))
            .collect();
        let mut values: Vec<HashMap<Word, f64>> = vec![last];
        for done in (0..STEPS).rev() {
            let one = |w: Word| {
                let sum: f64 = self
                    .words(w, done)
                    .iter()
                    .map(|(next, p)| {
                        p * (values[0].get(next).copied().unwrap_or(-1e9) / alpha).exp()
                    })
                    .sum();
                (w, alpha * sum.ln())
            };
            let now = all.iter().map(|w| one(*w)).collect();
            values.insert(0, now);
        }
        values
    }
}

fn words(x: &Tensor) -> Vec<Word> {
    let rows = x.to_vec2::<u32>().unwrap();
    rows.into_iter().map(|r| (r[0], r[1])).collect()
}

fn tensor(values: Vec<f64>) -> Result<Tensor> {
    Ok(Tensor::new(values, &Device::Cpu)?)
}

impl ReverseKernel for Masked {
    type State = Tensor;

    fn steps(&self) -> usize {
        STEPS
    }

    fn init(&self, streams: &mut [RandomStream]) -> Result<Tensor> {
        Ok(Tensor::full(MASK, (streams.len(), 2), &Device::Cpu)?)
    }

    fn propose(
        &self,
        x: &Tensor,
        step: usize,
        m: usize,
        streams: &mut [RandomStream],
    ) -> Result<Tensor> {
        let mut next = Vec::new();
        for (word, stream) in words(x).into_iter().zip(streams) {
            for _ in 0..m {
                for position in 0..2 {
                    let mut u = stream.next_uniform();
                    let choices = self.next(word, position, step);
                    let mut token = choices[choices.len() - 1].0;
                    for (k, p) in choices {
                        if u < p {
                            token = k;
                            break;
                        }
                        u -= p;
                    }
                    next.push(token);
                }
            }
        }
        let rows = next.len() / 2;
        Ok(Tensor::from_vec(next, (rows, 2), &Device::Cpu)?)
    }

    fn predict_clean(&self, x: &Tensor, _: usize) -> Result<Tensor> {
        Ok(x.clone())
    }
}

fn tabulated(values: Vec<HashMap<Word, f64>>) -> impl Fn(&Tensor, usize) -> Result<Tensor> {
    move |x: &Tensor, done: usize| tensor(words(x).iter().map(|w| values[done][w]).collect())
}

fn reward_table(seed: u64) -> impl Fn(Word) -> f64 {
    let mut rng = RandomStream::new(seed);
    let table: Vec<f64> = (0..16).map(|_| 2.0 * rng.next_uniform()).collect();
    move |(a, b)| table[(a * 4 + b) as usize]
}

/// With the exact soft value the samples follow the tilted law, the better the more candidates.
#[test]
fn the_tilted_law_is_approached() {
    let (kernel, alpha) = (Masked::new(1), 1.0);
    let reward = reward_table(2);
    let values = kernel.soft_values(&reward, alpha);
    let plain = kernel.soft_values(&|_| 0.0, alpha);
    assert!(plain[0][&(MASK, MASK)].abs() < 1e-9);
    // The law of finished words, step by step.
    let mut law = HashMap::from([((MASK, MASK), 1.0)]);
    for done in 0..STEPS {
        let mut next = HashMap::new();
        for (w, p) in &law {
            for (v, q) in kernel.words(*w, done) {
                *next.entry(v).or_insert(0.0) += p * q;
            }
        }
        law = next;
    }
    let total: f64 = law.iter().map(|(w, p)| p * reward(*w).exp()).sum();
    let value = tabulated(values);
    let n = 20_000;
    let mut distances = Vec::new();
    for m in [1, 4, 16, 64] {
        let out = Svdd::new(&kernel, &value)
            .duplicates(m)
            .alpha(alpha)
            .sample(n, &RandomStream::new(7))
            .unwrap();
        let mut counts: HashMap<Word, f64> = HashMap::new();
        for w in words(&out.states) {
            *counts.entry(w).or_insert(0.0) += 1.0 / n as f64;
        }
        let off = |(w, p): (&Word, &f64)| {
            (p * reward(*w).exp() / total - counts.get(w).unwrap_or(&0.0)).abs()
        };
        distances.push(0.5 * law.iter().map(off).sum::<f64>());
    }
    assert!(distances[3] < 0.03, "{distances:?}");
    assert!(distances.windows(2).all(|w| w[1] < w[0]), "{distances:?}");
}

/// Gaussian data, a quadratic reward and the exact value: mean and variance in closed form.
#[test]
fn a_gaussian_is_tilted_as_the_formula_says() {
    let model = AnalyticMixture::new(
        &Tensor::new(&[[0.5f64]], &Device::Cpu).unwrap(),
        &[0.3],
        &[1.0],
    )
    .unwrap();
    let grid = Grid::uniform_lambda_between(&VpSde::default(), 1.0, 0.01, 8).unwrap();
    let kernel = GaussianKernel::ddpm(&model, grid, &[1], DType::F64);
    let (alpha, width, center) = (0.5, 0.8, 1.2);
    // Every step is x' = a x + b + s z.
    let mut steps = Vec::new();
    for step in 0..kernel.steps() {
        let at = |x: f64| {
            let x = Sample::new(Tensor::new(&[[x]], &Device::Cpu).unwrap());
            let (mean, s) = kernel.moments(&x, step).unwrap();
            (values(&mean)[0], s)
        };
        let (b, s) = at(0.0);
        steps.push((at(1.0).0 - b, b, s));
    }
    // exp(v / alpha) = exp(-(x - c)^2 / (2 k)), from the end to the start.
    let mut quadratic = vec![(center, alpha * width)];
    for (a, b, s) in steps.iter().rev() {
        let (c, k) = quadratic[0];
        quadratic.insert(0, ((c - b) / a, (k + s * s) / (a * a)));
    }
    let value = |x: &Sample, done: usize| {
        let (c, k) = quadratic[done];
        let off = x.x().affine(1.0, -c)?.sqr()?.squeeze(1)?;
        Ok(off.affine(-0.5 * alpha / k, 0.0)?)
    };
    let sigma = VpSde::default();
    let first = flows::Schedule::level(&sigma, 1.0).unwrap().sigma;
    let (mut mean, mut variance) = (0.0, first * first);
    for (a, b, s) in &steps {
        (mean, variance) = (a * mean + b, a * a * variance + s * s);
    }
    let k = alpha * width;
    let tilted = 1.0 / (1.0 / variance + 1.0 / k);
    let goal = tilted * (mean / variance + center / k);
    let n = 4000;
    let out = Svdd::new(&kernel, &value)
        .duplicates(128)
        .alpha(alpha)
        .sample(n, &RandomStream::new(5))
        .unwrap();
    let x = values(out.states.x());
    let average = x.iter().sum::<f64>() / n as f64;
    let spread = x.iter().map(|x| (x - average).powi(2)).sum::<f64>() / (n - 1) as f64;
    let error = (tilted / n as f64).sqrt();
    assert!(
        (average - goal).abs() < 3.0 * error,
        "{average} {goal} {error}"
    );
    assert!(
        (spread - tilted).abs() < 3.0 * tilted * (2.0 / n as f64).sqrt(),
        "{spread} {tilted}"
    );
    assert!((goal - mean).abs() > 10.0 * error);
}

fn ring() -> AnalyticMixture {
    mixture(DType::F64)
}

fn kernel(model: &AnalyticMixture) -> GaussianKernel<'_> {
    let grid = Grid::uniform_lambda(&VpSde::default(), 10).unwrap();
    GaussianKernel::ddpm(model, grid, &[3], DType::F64)
}

fn first_coordinate(x: &Sample) -> Result<Tensor> {
    Ok(x.x().narrow(1, 0, 1)?.squeeze(1)?)
}

#[test]
fn one_candidate_is_plain_sampling_bit_for_bit() {
    let model = ring();
    let kernel = kernel(&model);
    let value = PosteriorMeanValue::new(&kernel, &first_coordinate);
    let rng = RandomStream::new(3);
    let steered = Svdd::new(&kernel, &value)
        .duplicates(1)
        .sample(5, &rng)
        .unwrap();
    let plain = sample(&kernel, 5, &rng).unwrap();
    assert_eq!(bits(steered.states.x()), bits(plain.x()));
    assert_eq!((steered.value_calls, steered.reward_calls), (0, 0));
    // And the sampling loop's.
    let mut streams: Vec<_> = (0..5)
        .map(|i| rng.split("start").split_index("row", i))
        .collect();
    let start = kernel.init(&mut streams).unwrap();
    let grid = Grid::uniform_lambda(&VpSde::default(), 10).unwrap();
    let looped = Sampler::new(&model, grid)
        .stepper(Ddim::ancestral())
        .sample_from(start.x(), &Condition::Null, None, Noise::rows(&rng, 5))
        .unwrap();
    assert_eq!(bits(&looped.x), bits(plain.x()));
}

#[test]
fn a_sample_does_not_depend_on_its_batch() {
    let model = ring();
    let kernel = kernel(&model).max_rows(7);
    let value = PosteriorMeanValue::new(&kernel, &first_coordinate);
    let rng = RandomStream::new(4);
    for alpha in [0.0, 0.7] {
        let decoder = || {
            Svdd::new(&kernel, &value)
                .duplicates(4)
                .alpha(alpha)
                .record(true)
                .keep_candidates(true)
        };
        let whole = decoder().sample(5, &rng).unwrap();
        let parts = decoder().batch(2).sample(5, &rng).unwrap();
        assert_eq!(bits(whole.states.x()), bits(parts.states.x()));
        assert_eq!(whole.selected_index, parts.selected_index);
        assert_eq!(whole.values, parts.values);
        assert_eq!(whole.reward_calls, 5 * 4 * 10);
        assert_eq!(parts.reward_calls, whole.reward_calls);
        let (a, b) = (whole.history.unwrap(), parts.history.unwrap());
        assert_eq!(a.len(), 11);
        assert!(a.iter().zip(&b).all(|(x, y)| bits(x.x()) == bits(y.x())));
        let candidates = whole.candidates.unwrap();
        assert_eq!(candidates.len(), 10);
        assert_eq!(candidates[0].x().dims(), [20, 3]);
        let fewer = decoder().sample(2, &rng).unwrap();
        assert_eq!(
            bits(fewer.states.x()),
            bits(&whole.states.x().narrow(0, 0, 2).unwrap())
        );
    }
}

/// The prediction of a chosen candidate is not computed twice.
#[test]
fn predictions_of_chosen_candidates_are_reused() {
    let model = ring();
    let rows = std::cell::Cell::new(0);
    let counting = flows::Closure::new(flows::Prediction::X0, |x: &Tensor, l, c| {
        rows.set(rows.get() + x.dims()[0]);
        flows::Denoiser::raw(&model, x, l, c)
    });
    let grid = Grid::uniform_lambda(&VpSde::default(), 10).unwrap();
    let kernel = GaussianKernel::ddpm(&counting, grid, &[3], DType::F64);
    let value = PosteriorMeanValue::new(&kernel, &first_coordinate);
    let decoder = Svdd::new(&kernel, &value).duplicates(4);
    decoder.sample(2, &RandomStream::new(1)).unwrap();
    // The first states, then all candidates of all steps.
    assert_eq!(rows.get(), 2 + 10 * 2 * 4);
}

proptest! {
    #![proptest_config(cases(24))]

    #[test]
    fn greedy_choice_sees_only_the_order(seed in 0u64..1000) {
        let values = values(&normal(seed, &[24], DType::F64));
        let bent: Vec<f64> = values.iter().map(|v| v.exp() * 3.0 - 1.0).collect();
        let a = choose(&values, 6, 0.0, &[]).unwrap();
        prop_assert_eq!(&a, &choose(&bent, 6, 0.0, &[]).unwrap());
        for (group, index) in values.chunks(6).zip(&a.index) {
            prop_assert!(group.iter().all(|v| *v <= group[*index as usize]));
        }
        // A low temperature is the greedy choice, and shifts do not matter.
        let shifted: Vec<f64> = values.iter().map(|v| v + 1e6).collect();
        let uniforms = [0.1, 0.5, 0.7, 0.999];
        let cold = choose(&shifted, 6, 1e-8, &uniforms).unwrap();
        prop_assert_eq!(&cold.index, &a.index);
    }

    #[test]
    fn choices_follow_the_distribution_function(seed in 0u64..1000, alpha in 0.1f64..5.0, u in 0.0f64..1.0) {
        let values = values(&normal(seed, &[5], DType::F64));
        let index = choose(&values, 5, alpha, &[u]).unwrap().index[0];
        let weights: Vec<f64> = values.iter().map(|v| (v / alpha).exp()).collect();
        let total: f64 = weights.iter().sum();
        let mut sum = 0.0;
        let passed = weights.iter().filter(|w| { sum += *w / total; u > sum }).count();
        prop_assert_eq!(index as usize, passed.min(4));
    }
}

/// The higher the temperature, the more even the choice: chi-square over 5 candidates.
#[test]
fn hot_choices_are_uniform() {
    let (model, n, m) = (ring(), 4000, 5);
    let kernel = kernel(&model);
    let value = |x: &Sample, _: usize| first_coordinate(x);
    let decoder = Svdd::new(&kernel, &value)
        .duplicates(m)
        .alpha(f64::INFINITY);
    let out = decoder.sample(n, &RandomStream::new(8)).unwrap();
    for index in &out.selected_index {
        let expected = n as f64 / m as f64;
        let count = |k| index.iter().filter(|i| **i == k).count() as f64;
        let chi: f64 = (0..m as u32)
            .map(|k| (count(k) - expected).powi(2) / expected)
            .sum();
        // 99.9 % of chi-square with 4 degrees of freedom, for 10 tests.
        assert!(chi < 24.0, "{chi}");
    }
}

#[test]
fn values_that_are_no_numbers_are_passed_over() {
    let nan = f64::NAN;
    let greedy = choose(&[nan, 1.0, 3.0, nan, nan, nan], 3, 0.0, &[]).unwrap();
    assert_eq!(
        greedy,
        Choice {
            index: vec![2, 0],
            unscored: 1
        }
    );
    let drawn = choose(&[nan, 1.0, f64::NEG_INFINITY, nan], 4, 1.0, &[0.99]).unwrap();
    assert_eq!(
        drawn,
        Choice {
            index: vec![1],
            unscored: 0
        }
    );
    let endless = choose(&[1.0, f64::INFINITY], 2, 1.0, &[0.0]).unwrap();
    assert_eq!(endless.index, [1]);
    let model = ring();
    let kernel = kernel(&model);
    let never = |x: &Sample, _: usize| Ok((x.x().narrow(1, 0, 1)?.squeeze(1)? * f64::NAN)?);
    let out = Svdd::new(&kernel, &never)
        .duplicates(3)
        .sample(2, &RandomStream::new(1))
        .unwrap();
    assert_eq!(out.unscored, 2 * 10);
    assert!(values(out.states.x()).iter().all(|x| x.is_finite()));
}

#[test]
fn bad_input_is_named() {
    let model = ring();
    let kernel = kernel(&model);
    let value = PosteriorMeanValue::new(&kernel, &first_coordinate);
    let rng = RandomStream::new(0);
    let message =
        |decoder: Svdd<GaussianKernel>, n| decoder.sample(n, &rng).unwrap_err().to_string();
    let decoder = || Svdd::new(&kernel, &value);
    assert!(message(decoder(), 0).contains("n = 0"));
    assert!(message(decoder().duplicates(0), 1).contains("duplicates = 0"));
    assert!(message(decoder().every(0), 1).contains("every = 0"));
    assert!(message(decoder().alpha(-1.0), 1).contains("alpha = -1"));
    assert!(message(decoder().alpha(f64::NAN), 1).contains("alpha = NaN"));
    assert!(message(decoder().start_step(10), 1).contains("start_step = 10"));
    assert!(
        message(decoder().alpha(1.0).given_uniforms(vec![vec![0.5]; 10]), 2)
            .contains("given uniforms")
    );
    let still = GaussianKernel::ddpm(
        &model,
        Grid::uniform_lambda(&VpSde::default(), 4).unwrap(),
        &[3],
        DType::F64,
    )
    .eta(0.0);
    let value = PosteriorMeanValue::new(&still, &first_coordinate);
    assert!(matches!(
        Svdd::new(&still, &value).sample(1, &rng),
        Err(Error::Unsupported { .. })
    ));
    assert!(sample(&still, 0, &rng).is_err());
    let wide = |x: &Sample, _: usize| Ok(x.x().clone());
    let error = Svdd::new(&kernel, &wide)
        .duplicates(2)
        .sample(1, &rng)
        .unwrap_err();
    assert!(error.to_string().contains("[2, 3]"), "{error}");
    assert!(choose(&[1.0, 2.0, 3.0], 2, 0.0, &[]).is_err());
    assert!(choose(&[1.0, 2.0], 2, 1.0, &[]).is_err());
    assert!(choose(&[1.0, 2.0], 2, 1.0, &[1.0]).is_err());
}

#[test]
fn steps_are_steered_where_they_are_meant_to_be() {
    let model = ring();
    let kernel = kernel(&model);
    let value = PosteriorMeanValue::new(&kernel, &first_coordinate);
    let rng = RandomStream::new(6);
    let out = Svdd::new(&kernel, &value)
        .duplicates(3)
        .start_step(2)
        .stop_step(8)
        .every(3)
        .sample(2, &rng)
        .unwrap();
    let steered: Vec<usize> = (0..10).filter(|s| !out.values[*s].is_empty()).collect();
    assert_eq!(steered, [2, 5]);
    assert_eq!(out.value_calls, 2 * 2 * 3);
    let schedule = Svdd::new(&kernel, &value)
        .duplicates(3)
        .alpha_schedule(|step, steps| {
            assert_eq!(steps, 10);
            if step < 5 {
                1.0
            } else {
                0.0
            }
        });
    let out = schedule.sample(2, &rng).unwrap();
    for (index, values) in out.selected_index.iter().zip(&out.values).skip(5) {
        assert_eq!(*index, choose(values, 3, 0.0, &[]).unwrap().index);
    }
}

#[test]
fn rewards_are_chunked_cached_and_scaled() {
    let x = normal(3, &[11, 2], DType::F64);
    let plain = |x: &Tensor| Ok(x.sqr()?.sum(1)?);
    let want = values(&plain(&x).unwrap());
    let calls = std::sync::atomic::AtomicUsize::new(0);
    let slow = |x: &Tensor| {
        assert!(x.dims()[0] <= 3);
        calls.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        plain(x)
    };
    let chunked = Chunked {
        inner: slow,
        chunk: 3,
        parallel: 4,
    };
    assert_eq!(values(&chunked.reward(&x).unwrap()), want);
    assert_eq!(calls.load(std::sync::atomic::Ordering::Relaxed), 4);
    assert!(Chunked {
        inner: plain,
        chunk: 0,
        parallel: 1
    }
    .reward(&x)
    .is_err());
    let failing = |_: &Tensor| -> Result<Tensor> {
        Err(Error::Unsupported {
            what: "x".into(),
            reason: "y".into(),
        })
    };
    assert!(Chunked {
        inner: failing,
        chunk: 2,
        parallel: 2
    }
    .reward(&x)
    .is_err());

    let tokens = Tensor::new(&[[0u32, 1], [2, 2], [0, 1]], &Device::Cpu).unwrap();
    let count = |x: &Tensor| Ok(x.to_dtype(DType::F64)?.sum(1)?);
    let cached = Cached::new(count, token_keys);
    for _ in 0..2 {
        assert_eq!(values(&cached.reward(&tokens).unwrap()), [1.0, 4.0, 1.0]);
        assert_eq!(cached.misses(), 2);
    }

    let scaled = values(&Standardized::fit(plain, &x).unwrap().reward(&x).unwrap());
    let mean = scaled.iter().sum::<f64>() / 11.0;
    let square = scaled.iter().map(|v| v * v).sum::<f64>() / 10.0;
    assert!(mean.abs() < 1e-12 && (square - 1.0).abs() < 1e-12);
    assert!(Standardized::fit(plain, &x.narrow(0, 0, 1).unwrap()).is_err());
    let minus = |x: &Tensor| Ok(x.sqr()?.sum(1)?.neg()?);
    let sum = WeightedSum(vec![(2.0, &plain as &dyn Reward<Tensor>), (0.5, &minus)]);
    let found = values(&sum.reward(&x).unwrap());
    assert!(found
        .iter()
        .zip(&want)
        .all(|(a, b)| (a - 1.5 * b).abs() < 1e-12));
}

#[test]
fn the_baselines_do_what_they_say() {
    let kernel = Masked::new(1);
    let reward = reward_table(2);
    let judge = |x: &Tensor| tensor(words(x).into_iter().map(&reward).collect());
    let rng = RandomStream::new(9);
    let best = best_of_n(&kernel, &judge, 50, 8, &rng).unwrap();
    let plain = words(&sample(&kernel, 400, &rng).unwrap());
    for (slot, (word, r)) in words(&best.states).iter().zip(&best.rewards).enumerate() {
        let group = &plain[slot * 8..(slot + 1) * 8];
        assert!(group.contains(word) && *r == reward(*word));
        assert!(group.iter().all(|w| reward(*w) <= *r));
    }
    assert_eq!(best.reward_calls, 400);
    assert!(best_of_n(&kernel, &judge, 0, 8, &rng).is_err());
    assert!(best_of_n(&kernel, &judge, 2, 0, &rng).is_err());

    // With the exact value a large population follows the tilted law too.
    let value = tabulated(kernel.soft_values(&reward, 1.0));
    let smc = SmcSampler {
        kernel: &kernel,
        value: &value,
        alpha: 1.0,
        threshold: 1.0,
    };
    let out = smc.sample(20_000, &rng).unwrap();
    let mean = |w: Vec<Word>| w.iter().map(|w| reward(*w)).sum::<f64>() / w.len() as f64;
    let steered = Svdd::new(&kernel, &value)
        .duplicates(64)
        .alpha(1.0)
        .sample(20_000, &rng)
        .unwrap();
    let (a, b) = (mean(words(&out.states)), mean(words(&steered.states)));
    assert!((a - b).abs() < 0.03, "{a} {b}");
    assert!(a > mean(plain) + 0.1);
    assert!(out.resamplings == STEPS && out.ancestors < 20_000);
    assert!(SmcSampler { alpha: 0.0, ..smc }.sample(4, &rng).is_err());
}

/// A table of values, one per word, is what a network is in general.
struct Table(Var);

impl ValueNet<Tensor> for Table {
    fn forward(&self, x: &Tensor, time: Option<&Tensor>) -> Result<Tensor> {
        let code: Vec<u32> = words(x).iter().map(|(a, b)| a * 4 + b).collect();
        let code = match time {
            None => code,
            Some(t) => {
                let t = t.to_vec1::<f32>()?;
                let row = |(c, t): (&u32, &f32)| c + 16 * (t * STEPS as f32).round() as u32;
                code.iter().zip(&t).map(row).collect()
            }
        };
        Ok(self.0.index_select(&Tensor::new(code, &Device::Cpu)?, 0)?)
    }
}

#[test]
fn values_are_learned_from_roll_outs() {
    let kernel = Masked::new(1);
    let reward = reward_table(2);
    let judge = |x: &Tensor| tensor(words(x).into_iter().map(&reward).collect());
    // For large alpha the soft value is the expected reward.
    let exact = kernel.soft_values(&reward, 1e6);
    for target in [ValueTarget::MonteCarlo, ValueTarget::Bootstrap { inner: 4 }] {
        let table = Table(Var::zeros(16 * 4, DType::F64, &Device::Cpu).unwrap());
        let params = ParamsAdamW {
            lr: 0.05,
            weight_decay: 0.0,
            ..ParamsAdamW::default()
        };
        let mut optimizer = AdamW::new(vec![table.0.clone()], params).unwrap();
        let value = LearnedValue::new(table, STEPS).timed(true);
        let trainer = ValueTrainer {
            target,
            rollouts: 80,
            samples: 128,
            updates: 4,
            batch: 256,
        };
        let rng = RandomStream::new(3);
        let losses = trainer
            .fit(&kernel, &judge, &value, &mut optimizer, &rng)
            .unwrap();
        assert_eq!(losses.len(), 320);
        let error = |done: usize| {
            let all: Vec<u32> = [[0, 1], [1, MASK], [MASK, 2], [MASK, MASK]].concat();
            let x = Tensor::from_vec(all, (4, 2), &Device::Cpu).unwrap();
            let found = values(&value.value(&x, done).unwrap());
            let known = words(&x).into_iter().map(|w| exact[done].get(&w).copied());
            let pairs = known.zip(found).filter_map(|(k, f)| Some((k? - f).abs()));
            pairs.fold(0.0, f64::max)
        };
        assert!(
            error(1) < 0.2 && error(2) < 0.2 && error(3) < 0.1,
            "{target:?}: {} {} {}",
            error(1),
            error(2),
            error(3)
        );
        let wrong = LearnedValue { steps: 4, ..value };
        assert!(matches!(
            trainer.fit(&kernel, &judge, &wrong, &mut optimizer, &rng),
            Err(Error::Mismatch { .. })
        ));
        let nothing = ValueTrainer {
            rollouts: 0,
            ..trainer
        };
        assert!(nothing.validate().is_err());
    }
}

/// The reward's gradient through an exact denoiser moves samples up.
#[test]
fn posterior_sampling_goes_up_the_reward() {
    let reward = |x: &Tensor| Ok(x.narrow(1, 0, 1)?.squeeze(1)?);
    let mean = |w: f64| {
        let out = run(DpsGuidance::new(reward, w), 40);
        (
            values(&out.x.narrow(1, 0, 1).unwrap()).iter().sum::<f64>() / 40.0,
            out.nfe,
        )
    };
    let (plain, _) = mean(0.0);
    let (guided, nfe) = mean(2.0);
    assert!(guided > plain + 0.05, "{plain} {guided}");
    // Two evaluations more: the check of the first gradient.
    assert_eq!((nfe.main, nfe.denoiser_backward), (560, 480));
}

//! Shared by the tests.

use candle_core::{DType, Device, Tensor, Var};
use graph_learning::{Error, Graph, RandomStream};
use proptest::test_runner::{Config, RngAlgorithm, RngSeed};
use std::path::PathBuf;
use tensor_core::verify::{Reference, Report};

pub const CPU: Device = Device::Cpu;

/// Properties over this many cases, the same ones on every run.
pub fn cases(count: u32) -> Config {
    Config {
        cases: count,
        rng_algorithm: RngAlgorithm::ChaCha,
        rng_seed: RngSeed::Fixed(7),
        failure_persistence: None,
        ..Config::default()
    }
}

pub fn reference_path(slug: &str) -> PathBuf {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/reference");
    folder.join(format!("{slug}.safetensors"))
}

/// Runs an adaptor on the reference file of `slug`; everything must pass.
pub fn verify(slug: &str, adaptor: fn(&mut Reference) -> graph_learning::Result<()>) -> Report {
    let mut reference = Reference::open(reference_path(slug)).unwrap();
    adaptor(&mut reference).unwrap();
    let report = reference.finish();
    assert!(report.passed(), "{:#?}", report.failures());
    report
}

pub fn normal(seed: u64, shape: &[usize], dtype: DType) -> Tensor {
    RandomStream::new(seed)
        .normal(0.0, 1.0, shape, dtype, &CPU)
        .unwrap()
}

pub fn var(seed: u64, shape: &[usize]) -> Var {
    Var::from_tensor(&normal(seed, shape, DType::F64)).unwrap()
}

pub fn values(t: &Tensor) -> Vec<f64> {
    let t = t.to_dtype(DType::F64).unwrap();
    t.flatten_all().unwrap().to_vec1().unwrap()
}

/// Bit patterns, so that `-0.0`, `0.0` and NaNs are told apart.
pub fn bits(t: &Tensor) -> Vec<u64> {
    values(t).into_iter().map(f64::to_bits).collect()
}

/// `max |a - b| / max(1, |b|)`.
pub fn distance(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims());
    let pairs = values(a).into_iter().zip(values(b));
    pairs
        .map(|(a, b)| (a - b).abs() / b.abs().max(1.0))
        .fold(0.0, f64::max)
}

/// `sum(y * c)` with a random cotangent `c`.
pub fn against(y: &Tensor, seed: u64) -> Tensor {
    let cotangent = normal(seed, y.dims(), DType::F64);
    (y * cotangent).unwrap().sum_all().unwrap()
}

/// Compares the gradients of a scalar function with central differences, entry by entry.
pub fn check_gradients(vars: &[&Var], f: impl Fn() -> Tensor) -> f64 {
    check_gradients_at(1e-5, vars, f)
}

/// With another step: a small one where the function has kinks.
pub fn check_gradients_at(step: f64, vars: &[&Var], f: impl Fn() -> Tensor) -> f64 {
    let grads = f().backward().unwrap();
    let mut worst = 0.0_f64;
    for var in vars {
        let analytic = values(grads.get(var).expect("no gradient arrives"));
        let start = values(var);
        let at = |i: usize, step: f64| {
            let mut moved = start.clone();
            moved[i] += step;
            let moved = Tensor::from_vec(moved, var.dims(), &CPU).unwrap();
            var.set(&moved).unwrap();
            values(&f())[0]
        };
        for (i, a) in analytic.iter().enumerate() {
            let h = step * start[i].abs().max(1.0);
            // Fourth order, so that truncation stays below rounding.
            let d1 = (at(i, h) - at(i, -h)) / (2.0 * h);
            let d2 = (at(i, 2.0 * h) - at(i, -2.0 * h)) / (4.0 * h);
            let numeric = (4.0 * d1 - d2) / 3.0;
            worst = worst.max((a - numeric).abs() / numeric.abs().max(1.0));
        }
        let start = Tensor::from_vec(start, var.dims(), &CPU).unwrap();
        var.set(&start).unwrap();
    }
    worst
}

/// Runs in a pool of that many threads.
pub fn with_threads<T: Send>(threads: usize, f: impl FnOnce() -> T + Send) -> T {
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .unwrap();
    pool.install(f)
}

/// A directed graph with duplicates, self-loops and isolated nodes.
pub fn messy(seed: u64, n: usize, edges: usize) -> Graph {
    let mut rng = RandomStream::new(seed).split("messy");
    // The last node stays isolated.
    let mut end = || rng.below(n - 1).unwrap() as u32;
    let (mut src, mut dst) = (Vec::new(), Vec::new());
    for e in 0..edges {
        let (s, t) = if e % 5 == 4 {
            (src[e - 1], dst[e - 1])
        } else {
            (end(), end())
        };
        src.push(s);
        dst.push(if e % 7 == 3 { s } else { t });
    }
    Graph::from_edges(n, src, dst).unwrap()
}

/// The error's text contains each of the words.
pub fn assert_says<T: std::fmt::Debug>(result: Result<T, Error>, words: &[&str]) {
    let text = result.unwrap_err().to_string();
    for word in words {
        assert!(text.contains(word), "`{text}` lacks `{word}`");
    }
}

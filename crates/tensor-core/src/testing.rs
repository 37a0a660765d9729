//! What the tests of every crate share (feature `testing`, for dev-dependencies only): fixed
//! random tensors, bitwise and numerical comparison, finite differences, thread pools, property
//! settings, and reference files through an adaptor. It panics, as tests do.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use crate::random::RandomStream;
use crate::verify::{Array, Reference, Report};
use candle_core::{DType, Device, Tensor, Var};
use proptest::test_runner::{Config, RngSeed};
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::path::{Path, PathBuf};

/// So many property cases, the same ones in every run.
pub fn cases(cases: u32) -> Config {
    Config {
        cases,
        rng_seed: RngSeed::Fixed(20_260_101),
        failure_persistence: None,
        ..Config::default()
    }
}

/// Standard normal numbers on the CPU, the same for the same seed.
pub fn normal(seed: u64, shape: &[usize], dtype: DType) -> Tensor {
    let mut rng = RandomStream::new(seed);
    rng.normal(0.0, 1.0, shape, dtype, &Device::Cpu).unwrap()
}

/// All values, row-major.
pub fn values(tensor: &Tensor) -> Vec<f64> {
    let flat = tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap();
    flat.to_vec1().unwrap()
}

/// Bit patterns, so that `-0.0`, `0.0` and NaNs are told apart.
pub fn bits(tensor: &Tensor) -> Vec<u64> {
    values(tensor).iter().map(|x| x.to_bits()).collect()
}

/// `max |a - b|`.
pub fn max_difference(a: &Tensor, b: &Tensor) -> f64 {
    largest(a, b, |a, b| (a - b).abs())
}

/// `max |a - b| / max(1, |b|)`.
pub fn relative_distance(a: &Tensor, b: &Tensor) -> f64 {
    largest(a, b, |a, b| (a - b).abs() / b.abs().max(1.0))
}

fn largest(a: &Tensor, b: &Tensor, error: fn(f64, f64) -> f64) -> f64 {
    assert_eq!(a.dims(), b.dims());
    let pairs = values(a).into_iter().zip(values(b));
    // A NaN on either side is the largest difference of all.
    let worse = |worst: f64, e: f64| if e > worst || e.is_nan() { e } else { worst };
    pairs.map(|(a, b)| error(a, b)).fold(0.0, worse)
}

/// Asserts `|a - b| <= tol * max(1, |b|)` entry by entry.
#[track_caller]
pub fn assert_close(a: &[f64], b: &[f64], tol: f64) {
    assert_eq!(a.len(), b.len());
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        let close = (a - b).abs() <= tol * b.abs().max(1.0);
        assert!(close, "{i}: {a} for {b}");
    }
}

/// Asserts that the error's text contains each of the words.
#[track_caller]
pub fn assert_says<T: Debug, E: std::fmt::Display>(result: Result<T, E>, words: &[&str]) {
    let text = match result {
        Ok(value) => panic!("no error but {value:?}"),
        Err(error) => error.to_string(),
    };
    for word in words {
        assert!(text.contains(word), "`{text}` lacks `{word}`");
    }
}

/// Compares the gradients of a scalar function with central differences of fourth order, entry by
/// entry: the largest `|difference| / max(1, |gradient|)`.
pub fn check_gradients(vars: &[&Var], f: impl Fn() -> Tensor) -> f64 {
    check_gradients_at(1e-5, vars, f)
}

/// [`check_gradients`] with another step: a small one where the function has kinks.
pub fn check_gradients_at(step: f64, vars: &[&Var], f: impl Fn() -> Tensor) -> f64 {
    let grads = f().backward().unwrap();
    let mut worst = 0.0_f64;
    for var in vars {
        let analytic = values(grads.get(var).expect("no gradient arrives"));
        let start = values(var);
        let set = |values: &[f64]| {
            let moved = Tensor::from_slice(values, var.dims(), &Device::Cpu).unwrap();
            var.set(&moved.to_dtype(var.dtype()).unwrap()).unwrap();
        };
        for (i, a) in analytic.iter().enumerate() {
            let along = |h: f64| {
                let mut moved = start.clone();
                moved[i] += h;
                set(&moved);
                values(&f())[0]
            };
            let numeric = fourth_order(along, step * start[i].abs().max(1.0));
            worst = worst.max((a - numeric).abs() / numeric.abs().max(1.0));
        }
        set(&start);
    }
    worst
}

/// [`check_gradients`] along one random direction per variable.
pub fn check_directions(vars: &[&Var], f: impl Fn() -> Tensor) -> f64 {
    let grads = f().backward().unwrap();
    let mut worst = 0.0_f64;
    for (k, var) in vars.iter().enumerate() {
        let direction = normal(1000 + k as u64, var.dims(), DType::F64);
        let start = var.copy().unwrap();
        let analytic = (grads.get(var).expect("no gradient arrives") * &direction).unwrap();
        let analytic = values(&analytic.sum_all().unwrap())[0];
        let along = |h: f64| {
            let step = (&direction * h).unwrap();
            var.set(&(&start + step).unwrap()).unwrap();
            values(&f())[0]
        };
        let numeric = fourth_order(along, 1e-5);
        worst = worst.max((analytic - numeric).abs() / numeric.abs().max(1.0));
        var.set(&start).unwrap();
    }
    worst
}

/// The derivative at 0, of fourth order so that truncation stays below rounding.
fn fourth_order(f: impl Fn(f64) -> f64, h: f64) -> f64 {
    let d1 = (f(h) - f(-h)) / (2.0 * h);
    let d2 = (f(2.0 * h) - f(-2.0 * h)) / (4.0 * h);
    (4.0 * d1 - d2) / 3.0
}

/// Runs in a pool of that many threads.
pub fn with_threads<T: Send>(threads: usize, f: impl FnOnce() -> T + Send) -> T {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
    pool.build().unwrap().install(f)
}

/// The reference files of one crate, run through its adaptors.
#[derive(Debug, Clone, Copy)]
pub struct ReferenceFiles(
    /// The crate's folder: `env!("CARGO_MANIFEST_DIR")`.
    pub &'static str,
);

impl ReferenceFiles {
    /// Where the file of a name lies.
    pub fn path(&self, name: &str) -> PathBuf {
        let folder = Path::new(self.0).join("tests").join("reference");
        folder.join(name).with_extension("safetensors")
    }

    /// Opens a file.
    pub fn open(&self, name: &str) -> Reference {
        Reference::open(self.path(name)).unwrap()
    }

    /// Runs an adaptor and returns the finished report.
    pub fn verify<E: Debug>(
        &self,
        name: &str,
        adaptor: impl Fn(&mut Reference) -> Result<(), E>,
    ) -> Report {
        self.verify_variant(name, |_, _| (), adaptor)
    }

    /// Runs an adaptor on a changed copy of a file: tensors by name, and metadata.
    pub fn verify_variant<E: Debug>(
        &self,
        name: &str,
        change: impl FnOnce(&mut BTreeMap<String, Array>, &mut BTreeMap<String, String>),
        adaptor: impl Fn(&mut Reference) -> Result<(), E>,
    ) -> Report {
        let mut file = self.open(name).variant(change);
        adaptor(&mut file).unwrap();
        file.finish()
    }
}

/// Asserts that a report passes but for unknown tensors, all of which `belongs_elsewhere`
/// recognizes.
#[track_caller]
pub fn assert_passed(report: &Report, belongs_elsewhere: impl Fn(&str) -> bool) {
    assert!(!report.comparisons.is_empty(), "nothing was compared");
    for comparison in &report.comparisons {
        let (name, detail) = (&comparison.name, &comparison.detail);
        assert!(comparison.passed, "{name}: {detail}");
    }
    for name in &report.unknown {
        assert!(belongs_elsewhere(name), "{name} is not covered");
    }
}

//! Shared by the tests.

use candle_core::{DType, Device, Tensor};
use proptest::prelude::ProptestConfig;
use std::path::PathBuf;
use tensor_core::random::RandomStream;
use tensor_core::verify::{Reference, Report};

pub const CPU: Device = Device::Cpu;

/// The same cases on every run.
pub fn cases(cases: u32) -> ProptestConfig {
    ProptestConfig {
        cases,
        failure_persistence: None,
        rng_seed: proptest::test_runner::RngSeed::Fixed(7),
        ..ProptestConfig::default()
    }
}

pub fn reference_path(slug: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("tests/reference/{slug}.safetensors"))
}

pub fn verify(slug: &str, adaptor: fn(&mut Reference) -> convex::Result<()>) -> Report {
    let mut reference = Reference::open(reference_path(slug)).unwrap();
    adaptor(&mut reference).unwrap();
    reference.finish()
}

pub fn assert_passed(report: &Report) {
    assert!(report.passed(), "{}", report.failures().join("\n"));
}

pub fn normals(seed: u64, n: usize) -> Vec<f64> {
    let mut out = vec![0.0; n];
    RandomStream::new(seed).fill_normal(&mut out);
    out
}

pub fn uniforms(seed: u64, n: usize) -> Vec<f64> {
    let mut out = vec![0.0; n];
    RandomStream::new(seed).fill_uniform(&mut out);
    out
}

pub fn tensor(values: &[f64], shape: impl Into<candle_core::Shape>) -> Tensor {
    Tensor::from_slice(values, shape, &CPU).unwrap()
}

pub fn values(t: &Tensor) -> Vec<f64> {
    let t = t.to_dtype(DType::F64).unwrap();
    t.flatten_all().unwrap().to_vec1().unwrap()
}

#[track_caller]
pub fn assert_close(a: &[f64], b: &[f64], tol: f64) {
    assert_eq!(a.len(), b.len());
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        assert!((a - b).abs() <= tol * b.abs().max(1.0), "{i}: {a} {b}");
    }
}

/// Runs in a pool of that many threads.
pub fn with_threads<T: Send>(threads: usize, f: impl FnOnce() -> T + Send) -> T {
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .unwrap();
    pool.install(f)
}

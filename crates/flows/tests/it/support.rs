//! What the tests share.

use candle_core::{DType, Device, Tensor};
use flows::{AnalyticMixture, RandomStream};
use proptest::test_runner::{Config as ProptestConfig, RngSeed};
use std::path::PathBuf;
use tensor_core::verify::{Reference, Report};

/// So many property cases, the same ones in every run.
pub fn cases(cases: u32) -> ProptestConfig {
    ProptestConfig {
        cases,
        rng_seed: RngSeed::Fixed(20_260_101),
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

pub fn path(name: &str) -> PathBuf {
    let path: PathBuf = [env!("CARGO_MANIFEST_DIR"), "tests", "reference", name]
        .iter()
        .collect();
    path.with_extension("safetensors")
}

/// Runs an adaptor and returns the finished report.
pub fn verify(name: &str, adaptor: impl Fn(&mut Reference) -> flows::Result<()>) -> Report {
    let mut file = Reference::open(path(name)).unwrap();
    adaptor(&mut file).unwrap();
    file.finish()
}

/// A report that passes but for unknown tensors, all of which `belongs_elsewhere` recognizes.
pub fn assert_passed(report: &Report, belongs_elsewhere: impl Fn(&str) -> bool) {
    assert!(!report.comparisons.is_empty());
    for comparison in &report.comparisons {
        assert!(
            comparison.passed,
            "{}: {}",
            comparison.name, comparison.detail
        );
    }
    for name in &report.unknown {
        assert!(belongs_elsewhere(name), "{name} is not covered");
    }
}

pub fn normal(seed: u64, shape: &[usize], dtype: DType) -> Tensor {
    let mut rng = RandomStream::new(seed);
    rng.normal(0.0, 1.0, shape, dtype, &Device::Cpu).unwrap()
}

pub fn values(tensor: &Tensor) -> Vec<f64> {
    let flat = tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap();
    flat.to_vec1().unwrap()
}

pub fn bits(tensor: &Tensor) -> Vec<u64> {
    values(tensor).iter().map(|x| x.to_bits()).collect()
}

/// The largest difference of two tensors.
pub fn distance(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims());
    let pairs = values(a).into_iter().zip(values(b));
    pairs.map(|(x, y)| (x - y).abs()).fold(0.0, f64::max)
}

/// Six components in three classes in three dimensions.
pub fn mixture(dtype: DType) -> AnalyticMixture {
    let means = normal(11, &[6, 3], dtype);
    let variances = [0.05, 0.1, 0.2, 0.1, 0.05, 0.15];
    AnalyticMixture::new(&means, &variances, &[1.0, 2.0, 1.0, 1.5, 1.0, 0.5])
        .unwrap()
        .with_classes(&[0, 1, 2, 0, 1, 2])
        .unwrap()
}

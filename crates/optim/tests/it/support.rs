//! What the tests share.

use candle_core::{DType, Device, Tensor, Var};
use optim::RandomStream;
use std::path::PathBuf;
use tensor_core::verify::{Reference, Report};

pub fn reference(name: &str) -> Reference {
    let path: PathBuf = [env!("CARGO_MANIFEST_DIR"), "tests", "reference", name]
        .iter()
        .collect();
    Reference::open(path.with_extension("safetensors")).unwrap()
}

/// Runs an adaptor and returns the finished report.
pub fn verify(name: &str, adaptor: impl Fn(&mut Reference) -> optim::Result<()>) -> Report {
    let mut file = reference(name);
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

pub fn normal(rng: &mut RandomStream, shape: &[usize], dtype: DType) -> Tensor {
    rng.normal(0.0, 1.0, shape, dtype, &Device::Cpu).unwrap()
}

pub fn normal_var(rng: &mut RandomStream, shape: &[usize], dtype: DType) -> Var {
    Var::from_tensor(&normal(rng, shape, dtype)).unwrap()
}

pub fn values(tensor: &Tensor) -> Vec<f64> {
    tensor
        .to_dtype(DType::F64)
        .unwrap()
        .flatten_all()
        .unwrap()
        .to_vec1()
        .unwrap()
}

/// The bits of a tensor, so that equality is bitwise.
pub fn bits(tensor: &Tensor) -> Vec<u64> {
    values(tensor).iter().map(|x| x.to_bits()).collect()
}

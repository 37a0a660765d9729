//! What the tests share.

use candle_core::{DType, Device, Tensor};
use proptest::test_runner::{Config as ProptestConfig, RngSeed};
use sequence_design::RandomStream;
use std::collections::{BTreeMap, HashMap};
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
pub fn verify(
    name: &str,
    adaptor: impl Fn(&mut Reference) -> sequence_design::Result<()>,
) -> Report {
    let mut file = Reference::open(path(name)).unwrap();
    adaptor(&mut file).unwrap();
    file.finish()
}

/// A tensor of a reference file: dtype, shape, bytes.
pub type Raw = (safetensors::Dtype, Vec<usize>, Vec<u8>);

/// Runs an adaptor on a changed copy of a file: tensors by name, and metadata.
pub fn verify_variant(
    name: &str,
    change: impl Fn(&mut BTreeMap<String, Raw>, &mut HashMap<String, String>),
    adaptor: impl Fn(&mut Reference) -> sequence_design::Result<()>,
) -> Report {
    let bytes = std::fs::read(path(name)).unwrap();
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let mut metadata = header.metadata().clone().unwrap_or_default();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let raw = |view: safetensors::tensor::TensorView| {
        (view.dtype(), view.shape().to_vec(), view.data().to_vec())
    };
    let mut tensors = file
        .tensors()
        .into_iter()
        .map(|(n, v)| (n, raw(v)))
        .collect();
    change(&mut tensors, &mut metadata);
    let views = tensors.iter().map(|(n, (dtype, shape, data))| {
        let view = safetensors::tensor::TensorView::new(*dtype, shape.clone(), data);
        (n.clone(), view.unwrap())
    });
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("variant.safetensors");
    let bytes = safetensors::serialize(views, Some(metadata)).unwrap();
    std::fs::write(&copy, bytes).unwrap();
    let mut file = Reference::open(&copy).unwrap();
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

//! What the tests share.

use candle_core::{DType, Device, Tensor};
use flows::{AnalyticMixture, RandomStream};
use proptest::test_runner::{Config as ProptestConfig, RngSeed};
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
pub fn verify(name: &str, adaptor: impl Fn(&mut Reference) -> guidance::Result<()>) -> Report {
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
    adaptor: impl Fn(&mut Reference) -> guidance::Result<()>,
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

/// The first `keep` entries along an axis.
pub fn shorten(raw: &mut Raw, axis: usize, keep: usize) {
    let (_, shape, data) = raw;
    let item = data.len() / shape.iter().product::<usize>();
    let inner: usize = shape[axis + 1..].iter().product::<usize>() * item;
    let block = shape[axis] * inner;
    *data = data
        .chunks(block)
        .flat_map(|b| b[..keep * inner].to_vec())
        .collect();
    shape[axis] = keep;
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

/// A guided run of the mixture: 12 DDIM steps of `rows` samples of class 1.
pub fn run(rule: impl flows::Guidance, rows: usize) -> flows::Sampled {
    let mixture = mixture(DType::F64);
    let schedule = flows::schedule::VpSde::default();
    let grid = flows::Grid::uniform_lambda_between(&schedule, 1.0, 0.02, 12).unwrap();
    let class = flows::Condition::classes(&[1], &Device::Cpu).unwrap();
    let null = flows::Condition::classes(&[3], &Device::Cpu).unwrap();
    let mut sampler = flows::Sampler::new(&mixture, grid)
        .guidance(rule)
        .null(null);
    let noise = normal(17, &[rows, 3], DType::F64);
    sampler
        .sample(&noise, &class, None, &RandomStream::new(3))
        .unwrap()
}

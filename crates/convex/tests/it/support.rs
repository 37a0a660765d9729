//! Shared by the tests.

pub use tensor_core::testing::{assert_close, assert_passed, cases, values, with_threads};

use candle_core::{Device, Tensor};
use std::collections::BTreeMap;
use tensor_core::random::RandomStream;
use tensor_core::testing::ReferenceFiles;
use tensor_core::verify::{Array, Reference, Report};

/// The crate's reference files.
pub const FILES: ReferenceFiles = ReferenceFiles(env!("CARGO_MANIFEST_DIR"));

pub const CPU: Device = Device::Cpu;

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

/// The report of a file that holds everything twice, once under the prefix `other.`.
pub fn verify_twice(slug: &str, adaptor: fn(&mut Reference) -> convex::Result<()>) -> Report {
    let twice = |tensors: &mut BTreeMap<String, Array>, metadata: &mut BTreeMap<String, String>| {
        let other = |(name, value): (&String, &Array)| (format!("other.{name}"), value.clone());
        let copies: Vec<(String, Array)> = tensors.iter().map(other).collect();
        tensors.extend(copies);
        let other = |(name, value): (&String, &String)| (format!("other.{name}"), value.clone());
        let copies: Vec<(String, String)> = metadata.iter().map(other).collect();
        metadata.extend(copies);
    };
    FILES.verify_variant(slug, twice, adaptor)
}

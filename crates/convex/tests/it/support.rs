//! Shared by the tests.

pub use tensor_core::testing::{assert_close, assert_passed, cases, values, with_threads};

use candle_core::{Device, Tensor};
use tensor_core::random::RandomStream;
use tensor_core::testing::ReferenceFiles;

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

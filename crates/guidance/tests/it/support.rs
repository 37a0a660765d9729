//! What the tests share.

pub use tensor_core::testing::{
    assert_passed, bits, cases, max_difference as distance, normal, values,
};

use candle_core::{DType, Device};
use flows::{AnalyticMixture, RandomStream};
use tensor_core::testing::ReferenceFiles;

/// The crate's reference files.
pub const FILES: ReferenceFiles = ReferenceFiles(env!("CARGO_MANIFEST_DIR"));

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

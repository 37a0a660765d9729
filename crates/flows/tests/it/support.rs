//! What the tests share.

pub use tensor_core::testing::{
    assert_passed, bits, cases, max_difference as distance, normal, values,
};

use candle_core::DType;
use flows::AnalyticMixture;
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

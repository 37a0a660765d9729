//! What the tests share.

pub use tensor_core::testing::{assert_passed, bits, cases, normal, values};

use tensor_core::testing::ReferenceFiles;

/// The crate's reference files.
pub const FILES: ReferenceFiles = ReferenceFiles(env!("CARGO_MANIFEST_DIR"));

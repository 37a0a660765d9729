//! Shared by the tests.

pub use tensor_core::testing::{
    assert_passed, assert_says, bits, cases, check_gradients, check_gradients_at, normal,
    relative_distance as distance, values, with_threads,
};

use candle_core::{DType, Device, Tensor, Var};
use graph_learning::{Graph, RandomStream};
use tensor_core::testing::ReferenceFiles;
use tensor_core::verify::Report;

/// Whether a comparison of a report is within its tolerance.
pub fn passed(report: &Report, name: &str) -> bool {
    let found = report.comparisons.iter().find(|c| c.name == name);
    found
        .unwrap_or_else(|| panic!("no comparison `{name}`"))
        .passed
}

/// The crate's reference files.
pub const FILES: ReferenceFiles = ReferenceFiles(env!("CARGO_MANIFEST_DIR"));

pub const CPU: Device = Device::Cpu;

pub fn var(seed: u64, shape: &[usize]) -> Var {
    Var::from_tensor(&normal(seed, shape, DType::F64)).unwrap()
}

/// `sum(y * c)` with a random cotangent `c`.
pub fn against(y: &Tensor, seed: u64) -> Tensor {
    let cotangent = normal(seed, y.dims(), DType::F64);
    (y * cotangent).unwrap().sum_all().unwrap()
}

/// A directed graph with duplicates, self-loops and isolated nodes.
pub fn messy(seed: u64, n: usize, edges: usize) -> Graph {
    let mut rng = RandomStream::new(seed).split("messy");
    // The last node stays isolated.
    let mut end = || rng.below(n - 1).unwrap() as u32;
    let (mut src, mut dst) = (Vec::new(), Vec::new());
    for e in 0..edges {
        let (s, t) = if e % 5 == 4 {
            (src[e - 1], dst[e - 1])
        } else {
            (end(), end())
        };
        src.push(s);
        dst.push(if e % 7 == 3 { s } else { t });
    }
    Graph::from_edges(n, src, dst).unwrap()
}

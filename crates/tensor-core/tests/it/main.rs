//! One binary for all integration tests of the crate: it links once.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]
// `&[x.clone()]` reads better than `std::slice::from_ref(&x)`.
#![allow(clippy::cloned_ref_to_slice_refs)]

mod autograd;
mod checkpoint;
mod child;
mod device;
mod kernels;
mod operator;
mod params;
mod random;
mod solve;
#[cfg(feature = "testing")]
mod testing;
#[cfg(feature = "verify")]
mod verify;

/// A property test of `cases` cases, the same ones in every run.
fn few(cases: u32) -> proptest::test_runner::Config {
    proptest::test_runner::Config {
        cases,
        rng_seed: proptest::test_runner::RngSeed::Fixed(20),
        failure_persistence: None,
        ..Default::default()
    }
}

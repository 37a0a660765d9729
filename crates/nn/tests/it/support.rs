//! Shared by the tests.

pub use tensor_core::testing::{
    bits, cases, check_directions, check_gradients, normal, relative_distance as distance, values,
    with_threads,
};

use candle_core::Device;

pub const CPU: Device = Device::Cpu;

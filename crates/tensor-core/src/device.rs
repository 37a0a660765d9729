//! Devices by name.
//!
//! ```
//! use thalweg_tensor_core::device;
//! let device = device::parse("cpu")?;
//! assert!(device.is_cpu());
//! assert!(device::parse("abacus").is_err());
//! # Ok::<(), thalweg_tensor_core::Error>(())
//! ```

use crate::{Error, Result};
use candle_core::Device;

/// Parses `cpu`, `cuda`, `cuda:N`, `metal` or `metal:N` (ordinal 0 where none is given) and opens
/// the device.
///
/// # Errors
/// [`Error::UnknownDevice`] for another name, [`Error::FeatureMissing`] when this build lacks the
/// cargo feature, and candle's error when the device cannot be opened.
pub fn parse(name: &str) -> Result<Device> {
    let unknown = || Error::UnknownDevice(name.to_string());
    let (kind, ordinal) = match name.split_once(':') {
        None => (name, 0),
        Some((kind, ordinal)) => (kind, ordinal.parse::<usize>().map_err(|_| unknown())?),
    };
    match kind {
        "cpu" if !name.contains(':') => Ok(Device::Cpu),
        "cuda" => open(name, "cuda", cfg!(feature = "cuda"), || {
            Device::new_cuda(ordinal)
        }),
        "metal" => open(name, "metal", cfg!(feature = "metal"), || {
            Device::new_metal(ordinal)
        }),
        _ => Err(unknown()),
    }
}

fn open(
    name: &str,
    feature: &'static str,
    built_in: bool,
    new: impl Fn() -> candle_core::Result<Device>,
) -> Result<Device> {
    if !built_in {
        return Err(Error::FeatureMissing {
            device: name.to_string(),
            feature,
        });
    }
    Ok(new()?)
}

/// The name that [`parse`] reads back: `cpu`, `cuda:0`, `metal:0`.
pub fn name(device: &Device) -> String {
    match device.location() {
        candle_core::DeviceLocation::Cpu => "cpu".to_string(),
        candle_core::DeviceLocation::Cuda { gpu_id } => format!("cuda:{gpu_id}"),
        candle_core::DeviceLocation::Metal { gpu_id } => format!("metal:{gpu_id}"),
    }
}

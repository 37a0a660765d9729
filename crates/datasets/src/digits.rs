//! The handwritten digits that are part of this crate: real images without a download.
//!
//! Optical recognition of handwritten digits, test set, by E. Alpaydin and C. Kaynak (1998), from
//! the UCI Machine Learning Repository (<https://doi.org/10.24432/C50P49>), under the licence
//! CC BY 4.0. The same 1797 images, in the same order, as scikit-learn's `load_digits`.

use crate::{Classification, Error, Result};
use candle_core::{DType, Device, Tensor};
use flate2::read::GzDecoder;
use std::io::Read;
use std::path::Path;

/// Number of images.
pub const EXAMPLES: usize = 1797;
/// Pixels of one image, 8 x 8.
pub const PIXELS: usize = 64;
/// Largest pixel value before scaling.
pub const MAX_VALUE: u8 = 16;

static PACKED: &[u8] = include_bytes!("../assets/digits.bin.gz");

/// Pixel bytes (0 to 16) `[1797 * 64]`, then labels `[1797]`, as embedded.
///
/// # Errors
/// [`Error::BadFile`] if the embedded bytes are damaged.
pub fn raw() -> Result<(Vec<u8>, Vec<u8>)> {
    let mut bytes = Vec::with_capacity(EXAMPLES * (PIXELS + 1));
    let damaged = |reason: String| Error::bad_file(Path::new("assets/digits.bin.gz"), reason);
    GzDecoder::new(PACKED)
        .read_to_end(&mut bytes)
        .map_err(|e| damaged(e.to_string()))?;
    if bytes.len() != EXAMPLES * (PIXELS + 1) {
        return Err(damaged(format!("{} bytes", bytes.len())));
    }
    let labels = bytes.split_off(EXAMPLES * PIXELS);
    Ok((bytes, labels))
}

/// The digits: inputs `f32 [1797, 64]` in `[0, 1]` (pixel / 16), labels 0 to 9, on the CPU, in the
/// order of the file.
///
/// Writers follow each other in that order: shuffle before splitting
/// ([`split`](crate::split)). For a convolution take `digits()?.reshape(&[1, 8, 8])`.
///
/// ```
/// let digits = thalweg_datasets::digits()?;
/// assert_eq!((digits.inputs.dims(), digits.classes), (&[1797, 64][..], 10));
/// # Ok::<(), thalweg_datasets::Error>(())
/// ```
///
/// # Errors
/// [`Error::BadFile`] if the embedded bytes are damaged.
pub fn digits() -> Result<Classification> {
    let (pixels, labels) = raw()?;
    let inputs = Tensor::from_vec(pixels, (EXAMPLES, PIXELS), &Device::Cpu)?;
    let inputs = inputs
        .to_dtype(DType::F32)?
        .affine(1.0 / f64::from(MAX_VALUE), 0.0)?;
    let labels = Tensor::from_vec(labels, EXAMPLES, &Device::Cpu)?.to_dtype(DType::U32)?;
    Classification::new(inputs, labels, 10)
}

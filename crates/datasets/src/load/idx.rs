//! IDX files, plain or gzip: the format of MNIST and its relatives.
//!
//! A file is `00 00 type rank`, then `rank` big-endian 32-bit sizes, then the values, big-endian,
//! last dimension fastest.

use super::{locate, open, read_to_end_exact};
use crate::data::TrainTest;
use crate::{Classification, Error, Result};
use candle_core::{DType, Device, Tensor};
use std::io::Read;
use std::path::Path;

/// The four files of MNIST (and Fashion-MNIST, KMNIST), images before labels, training first.
pub const MNIST_FILES: [&str; 4] = [
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
];

/// The largest rank that is read; real files have 1 to 4.
const MAX_RANK: usize = 8;

/// Reads one IDX file as a tensor on the CPU: unsigned bytes as `U8`, 16-bit integers as `I16`,
/// 32-bit integers as `I32`, floats as `F32` and `F64`.
///
/// # Errors
/// [`Error::Io`], [`Error::Magic`] for another format, [`Error::Truncated`], [`Error::TooLong`],
/// [`Error::BadFile`] for signed bytes or a rank above 8.
pub fn read(path: impl AsRef<Path>) -> Result<Tensor> {
    let path = path.as_ref();
    let mut reader = open(path)?;
    let magic: [u8; 4] = header_bytes(path, &mut reader, "a magic of 4 bytes")?;
    let (dtype, rank) = element_type(path, magic)?;
    let mut shape = Vec::with_capacity(rank);
    for _ in 0..rank {
        let size: [u8; 4] = header_bytes(path, &mut reader, "a size of 4 bytes a dimension")?;
        shape.push(u32::from_be_bytes(size) as usize);
    }
    let size = shape
        .iter()
        .try_fold(dtype.size_in_bytes() as u64, |n, d| {
            n.checked_mul(*d as u64)
        })
        .ok_or_else(|| Error::bad_file(path, format!("shape {shape:?} is too large")))?;
    let mut bytes = read_to_end_exact(path, reader, size)?;
    // Big-endian on disk; candle reads the machine's order, which is little-endian here.
    if cfg!(target_endian = "little") {
        bytes
            .chunks_exact_mut(dtype.size_in_bytes())
            .for_each(<[u8]>::reverse);
    }
    if bytes.is_empty() {
        return Ok(Tensor::zeros(shape, dtype, &Device::Cpu)?);
    }
    if dtype == DType::U8 {
        return Ok(Tensor::from_vec(bytes, shape, &Device::Cpu)?);
    }
    Ok(Tensor::from_raw_buffer(
        &bytes,
        dtype,
        &shape,
        &Device::Cpu,
    )?)
}

fn header_bytes<const N: usize>(
    path: &Path,
    reader: &mut impl Read,
    expected: &str,
) -> Result<[u8; N]> {
    let mut bytes = Vec::with_capacity(N);
    let read = reader.take(N as u64).read_to_end(&mut bytes);
    let found = bytes.len() as u64;
    let truncated = Error::Truncated {
        path: path.display().to_string(),
        found,
        expected: expected.to_string(),
    };
    match read {
        Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => Err(truncated),
        Err(e) => Err(Error::io(path, e)),
        Ok(_) => <[u8; N]>::try_from(bytes).map_err(|_| truncated),
    }
}

fn element_type(path: &Path, magic: [u8; 4]) -> Result<(DType, usize)> {
    let [a, b, kind, rank] = magic;
    let dtype = match kind {
        0x08 => DType::U8,
        0x09 => return Err(Error::bad_file(path, "signed bytes are not supported")),
        0x0B => DType::I16,
        0x0C => DType::I32,
        0x0D => DType::F32,
        0x0E => DType::F64,
        _ => return Err(bad_magic(path, magic)),
    };
    if a != 0 || b != 0 || rank == 0 {
        return Err(bad_magic(path, magic));
    }
    let rank = rank as usize;
    if rank > MAX_RANK {
        let reason = format!("rank {rank}: expected at most {MAX_RANK}");
        return Err(Error::bad_file(path, reason));
    }
    Ok((dtype, rank))
}

fn bad_magic(path: &Path, magic: [u8; 4]) -> Error {
    Error::Magic {
        path: path.display().to_string(),
        found: format!("{magic:02x?}"),
        expected: "00 00, a type (08, 0b, 0c, 0d or 0e) and a rank, as IDX files do".to_string(),
    }
}

/// Images and labels as a data set: inputs `f32 [n, 1, h, w]` in `[0, 1]` (pixel / 255).
///
/// # Errors
/// Those of [`read`]; [`Error::BadFile`] unless the images are `U8 [n, h, w]` and the labels `U8
/// [n]`; [`Error::LengthMismatch`], [`Error::LabelOutOfRange`].
pub fn images(
    images: impl AsRef<Path>,
    labels: impl AsRef<Path>,
    classes: usize,
) -> Result<Classification> {
    let (images, labels) = (images.as_ref(), labels.as_ref());
    let pixels = read(images)?;
    let (&[n, h, w], DType::U8) = (pixels.dims(), pixels.dtype()) else {
        return Err(wrong_content(images, &pixels, "U8 of shape [n, h, w]"));
    };
    let answers = read(labels)?;
    if answers.rank() != 1 || answers.dtype() != DType::U8 {
        return Err(wrong_content(labels, &answers, "U8 of shape [n]"));
    }
    let inputs = pixels
        .reshape((n, 1, h, w))?
        .to_dtype(DType::F32)?
        .affine(1.0 / 255.0, 0.0)?;
    Classification::new(inputs, answers.to_dtype(DType::U32)?, classes)
}

fn wrong_content(path: &Path, tensor: &Tensor, expected: &str) -> Error {
    let (dtype, shape) = (tensor.dtype(), tensor.dims());
    let reason = format!("holds {dtype:?} of shape {shape:?}: expected {expected}");
    Error::bad_file(path, reason)
}

/// MNIST from a folder with its four files ([`MNIST_FILES`]), each plain or gzip: 60,000 training
/// and 10,000 test images, inputs `f32 [n, 1, 28, 28]` in `[0, 1]`, labels 0 to 9. Reads
/// Fashion-MNIST and KMNIST too, which use the same names and form.
///
/// # Errors
/// [`Error::MissingFiles`] that lists what is not there; those of [`images`].
pub fn mnist(dir: impl AsRef<Path>) -> Result<TrainTest> {
    let paths = locate("mnist", &[dir.as_ref().to_path_buf()], &MNIST_FILES)?;
    Ok(TrainTest {
        train: images(&paths[0], &paths[1], 10)?,
        test: images(&paths[2], &paths[3], 10)?,
    })
}

//! The binary files of CIFAR-10 and CIFAR-100.
//!
//! A file is a row of records without a header: one label byte (CIFAR-10) or two, coarse and fine
//! (CIFAR-100), then 3072 bytes of pixels: 1024 red, 1024 green, 1024 blue, each 32 rows of 32.

use super::{locate, open, read_to_end_exact};
use crate::data::TrainTest;
use crate::{Classification, Result};
use candle_core::{DType, Device, Tensor};
use std::path::{Path, PathBuf};

/// Bytes of the pixels of one record.
const PIXELS: usize = 3 * 32 * 32;

/// Which files a data set of this format has, and what a record holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CifarLayout {
    /// Name for messages.
    pub name: &'static str,
    /// The folder inside the published archive, which may lie inside the data folder.
    pub archive_folder: &'static str,
    /// Training files.
    pub train: &'static [&'static str],
    /// Records in each training file.
    pub train_records: usize,
    /// Test files.
    pub test: &'static [&'static str],
    /// Records in each test file.
    pub test_records: usize,
    /// Label bytes before the pixels.
    pub label_bytes: usize,
    /// Which of the label bytes is the class.
    pub label_index: usize,
    /// Number of classes.
    pub classes: usize,
}

/// CIFAR-10: 50,000 training and 10,000 test images in ten classes.
pub const CIFAR10: CifarLayout = CifarLayout {
    name: "cifar10",
    archive_folder: "cifar-10-batches-bin",
    train: &[
        "data_batch_1.bin",
        "data_batch_2.bin",
        "data_batch_3.bin",
        "data_batch_4.bin",
        "data_batch_5.bin",
    ],
    train_records: 10_000,
    test: &["test_batch.bin"],
    test_records: 10_000,
    label_bytes: 1,
    label_index: 0,
    classes: 10,
};

/// CIFAR-100 with its 100 fine classes: 50,000 training and 10,000 test images.
pub const CIFAR100: CifarLayout = CifarLayout {
    name: "cifar100",
    archive_folder: "cifar-100-binary",
    train: &["train.bin"],
    train_records: 50_000,
    test: &["test.bin"],
    test_records: 10_000,
    label_bytes: 2,
    label_index: 1,
    classes: 100,
};

/// CIFAR-100 with its 20 coarse classes.
pub const CIFAR100_COARSE: CifarLayout = CifarLayout {
    label_index: 0,
    classes: 20,
    ..CIFAR100
};

impl CifarLayout {
    /// Bytes of one record.
    pub fn record_bytes(&self) -> usize {
        self.label_bytes + PIXELS
    }

    /// Names of all files, training first.
    pub fn files(&self) -> Vec<&'static str> {
        self.train.iter().chain(self.test).copied().collect()
    }

    /// Reads a folder with the files (or with the archive's folder that holds them): inputs `f32
    /// [n, 3, 32, 32]` in `[0, 1]` (pixel / 255).
    ///
    /// # Errors
    /// [`MissingFiles`](crate::Error::MissingFiles) that lists what is not there;
    /// [`Truncated`](crate::Error::Truncated), [`TooLong`](crate::Error::TooLong),
    /// [`LabelOutOfRange`](crate::Error::LabelOutOfRange).
    pub fn read(&self, dir: impl AsRef<Path>) -> Result<TrainTest> {
        let dir = dir.as_ref();
        let folders = [dir.to_path_buf(), dir.join(self.archive_folder)];
        let paths = locate(self.name, &folders, &self.files())?;
        let (train, test) = paths.split_at(self.train.len());
        Ok(TrainTest {
            train: self.read_files(train, self.train_records)?,
            test: self.read_files(test, self.test_records)?,
        })
    }

    fn read_files(&self, paths: &[PathBuf], records: usize) -> Result<Classification> {
        let mut pixels = Vec::new();
        let mut labels = Vec::new();
        for path in paths {
            let size = (records * self.record_bytes()) as u64;
            let bytes = read_to_end_exact(path, open(path)?, size)?;
            for record in bytes.chunks_exact(self.record_bytes()) {
                let (label, image) = record.split_at(self.label_bytes);
                labels.push(u32::from(label[self.label_index]));
                pixels.extend_from_slice(image);
            }
        }
        let n = labels.len();
        let inputs = Tensor::from_vec(pixels, (n, 3, 32, 32), &Device::Cpu)?;
        let inputs = inputs.to_dtype(DType::F32)?.affine(1.0 / 255.0, 0.0)?;
        let labels = Tensor::from_vec(labels, n, &Device::Cpu)?;
        Classification::new(inputs, labels, self.classes)
    }
}

/// CIFAR-10 from a folder; see [`CifarLayout::read`]. Needs about 1 GB of memory.
///
/// # Errors
/// Those of [`CifarLayout::read`].
pub fn cifar10(dir: impl AsRef<Path>) -> Result<TrainTest> {
    CIFAR10.read(dir)
}

/// CIFAR-100 (fine classes) from a folder; see [`CifarLayout::read`]. Needs about 1 GB of memory.
///
/// # Errors
/// Those of [`CifarLayout::read`].
pub fn cifar100(dir: impl AsRef<Path>) -> Result<TrainTest> {
    CIFAR100.read(dir)
}

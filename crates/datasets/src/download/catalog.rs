//! The data sets that can be fetched by name.

use super::checksum::{Checksum, Hashed};
use crate::{Error, Result};

/// A data set, its files and where they come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CatalogEntry {
    /// The name to fetch it by.
    pub name: &'static str,
    /// Its folder in the layout of [`data_dir`](crate::data_dir).
    pub folder: &'static str,
    /// What it is, in a line.
    pub title: &'static str,
    /// Who made it and under which terms.
    pub terms: &'static str,
    /// What to download.
    pub files: &'static [RemoteFile],
}

/// One file of a [`CatalogEntry`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RemoteFile {
    /// The name under which it is stored.
    pub name: &'static str,
    /// Addresses, tried in this order.
    pub urls: &'static [&'static str],
    /// SHA-256, in lower-case hexadecimal digits, of what [`content`](Self::content) says.
    pub sha256: &'static str,
    /// What the file is.
    pub content: Content,
}

/// What a [`RemoteFile`] is, which decides what is checked and what happens to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// A gzip file that is kept as it is. The SHA-256 is that of the decompressed bytes, so that
    /// it holds for every mirror, however that compresses.
    Gzip {
        /// Decompressed size.
        bytes: u64,
    },
    /// An archive that is unpacked and removed. The SHA-256 is that of the archive.
    TarGz {
        /// The files to take out: path in the archive and size. They are stored without their
        /// folder.
        members: &'static [(&'static str, u64)],
    },
}

impl RemoteFile {
    /// What to compare a download with.
    pub fn checksum(&self) -> Checksum<'static> {
        Checksum {
            sha256: self.sha256,
            of: match self.content {
                Content::Gzip { bytes } => Hashed::Decompressed { bytes },
                Content::TarGz { .. } => Hashed::File,
            },
        }
    }
}

/// All data sets that can be fetched.
pub fn catalog() -> &'static [CatalogEntry] {
    &CATALOG
}

/// The data set of this name.
///
/// # Errors
/// [`Error::UnknownDataset`] that lists the names.
pub fn find(name: &str) -> Result<&'static CatalogEntry> {
    let entry = CATALOG.iter().find(|entry| entry.name == name);
    entry.ok_or_else(|| Error::UnknownDataset {
        name: name.to_string(),
        known: CATALOG.iter().map(|entry| entry.name).collect(),
    })
}

const CATALOG: [CatalogEntry; 3] = [
    CatalogEntry {
        name: "mnist",
        folder: "mnist",
        title: "70,000 handwritten digits, 28 x 28 gray",
        terms: "Y. LeCun, C. Cortes, C. J. C. Burges; CC BY-SA 3.0",
        files: &[
            RemoteFile {
                name: "train-images-idx3-ubyte.gz",
                urls: &[
                    "https://storage.googleapis.com/cvdf-datasets/mnist/train-images-idx3-ubyte.gz",
                    "https://ossci-datasets.s3.amazonaws.com/mnist/train-images-idx3-ubyte.gz",
                ],
                sha256: "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
                content: Content::Gzip { bytes: 47_040_016 },
            },
            RemoteFile {
                name: "train-labels-idx1-ubyte.gz",
                urls: &[
                    "https://storage.googleapis.com/cvdf-datasets/mnist/train-labels-idx1-ubyte.gz",
                    "https://ossci-datasets.s3.amazonaws.com/mnist/train-labels-idx1-ubyte.gz",
                ],
                sha256: "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
                content: Content::Gzip { bytes: 60_008 },
            },
            RemoteFile {
                name: "t10k-images-idx3-ubyte.gz",
                urls: &[
                    "https://storage.googleapis.com/cvdf-datasets/mnist/t10k-images-idx3-ubyte.gz",
                    "https://ossci-datasets.s3.amazonaws.com/mnist/t10k-images-idx3-ubyte.gz",
                ],
                sha256: "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
                content: Content::Gzip { bytes: 7_840_016 },
            },
            RemoteFile {
                name: "t10k-labels-idx1-ubyte.gz",
                urls: &[
                    "https://storage.googleapis.com/cvdf-datasets/mnist/t10k-labels-idx1-ubyte.gz",
                    "https://ossci-datasets.s3.amazonaws.com/mnist/t10k-labels-idx1-ubyte.gz",
                ],
                sha256: "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
                content: Content::Gzip { bytes: 10_008 },
            },
        ],
    },
    CatalogEntry {
        name: "cifar-10",
        folder: "cifar10",
        title: "60,000 photographs in 10 classes, 32 x 32 color",
        terms: "A. Krizhevsky, V. Nair, G. Hinton; see https://www.cs.toronto.edu/~kriz/cifar.html",
        files: &[RemoteFile {
            name: "cifar-10-binary.tar.gz",
            urls: &["https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"],
            sha256: "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            content: Content::TarGz {
                members: &[
                    ("cifar-10-batches-bin/data_batch_1.bin", 30_730_000),
                    ("cifar-10-batches-bin/data_batch_2.bin", 30_730_000),
                    ("cifar-10-batches-bin/data_batch_3.bin", 30_730_000),
                    ("cifar-10-batches-bin/data_batch_4.bin", 30_730_000),
                    ("cifar-10-batches-bin/data_batch_5.bin", 30_730_000),
                    ("cifar-10-batches-bin/test_batch.bin", 30_730_000),
                ],
            },
        }],
    },
    CatalogEntry {
        name: "cifar-100",
        folder: "cifar100",
        title: "60,000 photographs in 100 classes, 32 x 32 color",
        terms: "A. Krizhevsky, V. Nair, G. Hinton; see https://www.cs.toronto.edu/~kriz/cifar.html",
        files: &[RemoteFile {
            name: "cifar-100-binary.tar.gz",
            urls: &["https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz"],
            sha256: "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
            content: Content::TarGz {
                members: &[
                    ("cifar-100-binary/train.bin", 153_700_000),
                    ("cifar-100-binary/test.bin", 30_740_000),
                ],
            },
        }],
    },
];

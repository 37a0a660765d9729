//! The folder that a program's `--data DIR` names.
//!
//! | folder | files (each also with `.gz`) |
//! | --- | --- |
//! | `DIR/mnist` | `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`, `t10k-images-idx3-ubyte`, `t10k-labels-idx1-ubyte` |
//! | `DIR/fashion-mnist` | the same names |
//! | `DIR/cifar10` | `data_batch_1.bin` to `data_batch_5.bin`, `test_batch.bin`; or `cifar-10-batches-bin/` with them |
//! | `DIR/cifar100` | `train.bin`, `test.bin`; or `cifar-100-binary/` with them |
//! | `DIR/tfbind8` | `SIX6_REF_R1_8mers.txt`, and tables of other factors under the same kind of name |
//!
//! Other folders may lie beside them. The feature `download` fills all but the second.

use crate::load::cifar::{CifarLayout, CIFAR10, CIFAR100, CIFAR100_COARSE};
use crate::load::tfbind::{read_binding, BindingTable};
use crate::load::{idx, locate};
use crate::{Error, Result, TrainTest};
use std::path::{Path, PathBuf};

/// A folder with data sets in the [documented layout](self).
///
/// ```no_run
/// use thalweg_datasets::DataDir;
///
/// let data = DataDir::new("/data")?;
/// let mnist = data.mnist()?;
/// assert_eq!(mnist.train.inputs.dims(), &[60_000, 1, 28, 28]);
/// # Ok::<(), thalweg_datasets::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataDir {
    root: PathBuf,
}

/// What lies in one folder of a [`DataDir`].
enum Layout {
    Mnist(&'static str),
    Cifar(CifarLayout),
    Binding,
}

/// Folder names and what they hold.
const LAYOUTS: [(&str, Layout); 5] = [
    ("mnist", Layout::Mnist("mnist")),
    ("fashion-mnist", Layout::Mnist("fashion-mnist")),
    ("cifar10", Layout::Cifar(CIFAR10)),
    ("cifar100", Layout::Cifar(CIFAR100)),
    ("tfbind8", Layout::Binding),
];

/// The factor whose table is the task called TFBind8.
pub const TFBIND8: &str = "SIX6_REF_R1";

fn binding_file(factor: &str) -> String {
    format!("{factor}_8mers.txt")
}

impl DataDir {
    /// The folder `root`.
    ///
    /// # Errors
    /// [`Error::BadFile`] unless it is a folder.
    pub fn new(root: impl Into<PathBuf>) -> Result<Self> {
        let root = root.into();
        if !root.is_dir() {
            return Err(Error::bad_file(&root, "expected an existing folder"));
        }
        Ok(Self { root })
    }

    /// The folder itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Names of the data sets that the layout knows.
    pub fn known() -> Vec<&'static str> {
        LAYOUTS.iter().map(|(name, _)| *name).collect()
    }

    /// The folder of one data set.
    pub fn folder(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// Checks that all files of a data set are there, without reading them.
    ///
    /// # Errors
    /// [`Error::MissingFiles`] that lists them; [`Error::UnknownDataset`].
    pub fn check(&self, name: &str) -> Result<()> {
        let Some((folder, layout)) = LAYOUTS.iter().find(|(known, _)| *known == name) else {
            return Err(Error::UnknownDataset {
                name: name.to_string(),
                known: Self::known(),
            });
        };
        let dir = self.root.join(folder);
        match layout {
            Layout::Mnist(name) => locate(name, &[dir], &idx::MNIST_FILES)?,
            Layout::Cifar(cifar) => {
                let inner = dir.join(cifar.archive_folder);
                locate(cifar.name, &[dir, inner], &cifar.files())?
            }
            Layout::Binding => locate("tfbind8", &[dir], &[&binding_file(TFBIND8)])?,
        };
        Ok(())
    }

    /// MNIST; see [`idx::mnist`].
    ///
    /// # Errors
    /// Those of [`idx::mnist`].
    pub fn mnist(&self) -> Result<TrainTest> {
        idx::mnist(self.folder("mnist"))
    }

    /// Fashion-MNIST: clothes in the form of MNIST.
    ///
    /// # Errors
    /// Those of [`idx::mnist`].
    pub fn fashion_mnist(&self) -> Result<TrainTest> {
        idx::mnist(self.folder("fashion-mnist"))
    }

    /// CIFAR-10; see [`cifar10`](crate::load::cifar::cifar10).
    ///
    /// # Errors
    /// Those of [`CifarLayout::read`].
    pub fn cifar10(&self) -> Result<TrainTest> {
        CIFAR10.read(self.folder("cifar10"))
    }

    /// CIFAR-100 with 100 fine classes; see [`cifar100`](crate::load::cifar::cifar100).
    ///
    /// # Errors
    /// Those of [`CifarLayout::read`].
    pub fn cifar100(&self) -> Result<TrainTest> {
        CIFAR100.read(self.folder("cifar100"))
    }

    /// CIFAR-100 with its 20 coarse classes.
    ///
    /// # Errors
    /// Those of [`CifarLayout::read`].
    pub fn cifar100_coarse(&self) -> Result<TrainTest> {
        CIFAR100_COARSE.read(self.folder("cifar100"))
    }

    /// The 8-mer table of a transcription factor ([`TFBIND8`], say); see
    /// [`read_binding`].
    ///
    /// # Errors
    /// [`Error::MissingFiles`]; those of
    /// [`read_binding`].
    pub fn binding(&self, factor: &str) -> Result<BindingTable> {
        let folder = self.folder("tfbind8");
        let paths = locate("tfbind8", &[folder], &[&binding_file(factor)])?;
        read_binding(&paths[0])
    }
}

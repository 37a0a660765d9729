//! The raw files of Yang et al., *Revisiting Semi-Supervised Learning with Graph Embeddings*, 2016.

use super::pickle::{Array, Pickle, SparseMatrix};
use super::{lines, parse, read, read_text, NodeData};
use crate::graph::Graph;
use crate::sparse::SparseFeatures;
use crate::split::NodeSplit;
use crate::{Error, Result};
use candle_core::DType;
use std::path::{Path, PathBuf};

/// Nodes between the training and the test part that are for validation.
const VALIDATION: usize = 500;

/// Reads `ind.NAME.*` from a folder: both directions of each edge, no duplicates, no self-loops, the
/// features as they are, and the public split (training: the first labelled nodes, validation: the
/// next 500, test: `test.index`).
///
/// Test nodes that the files never describe (15 of CiteSeer) get no features and label 0; they are
/// in no part of the split.
///
/// # Errors
/// [`Error::Io`], [`Error::BadFile`] for files that are damaged or do not fit together.
pub fn planetoid(dir: impl AsRef<Path>, name: &str) -> Result<NodeData> {
    let dir = dir.as_ref();
    let path = |part: &str| dir.join(format!("ind.{name}.{part}"));
    let unpickle = |part: &str| -> Result<(PathBuf, Pickle)> {
        let path = path(part);
        let pickle = Pickle::parse(&read(&path)?).map_err(|e| Error::bad_file(&path, e))?;
        Ok((path, pickle))
    };
    let sparse = |part: &str| -> Result<SparseMatrix> {
        let (path, pickle) = unpickle(part)?;
        pickle.sparse().map_err(|e| Error::bad_file(&path, e))
    };
    let one_hot = |part: &str| -> Result<Labels> {
        let (path, pickle) = unpickle(part)?;
        Labels::new(
            &path,
            pickle.array().map_err(|e| Error::bad_file(&path, e))?,
        )
    };
    let (all, test) = (sparse("allx")?, sparse("tx")?);
    let (all_labels, test_labels) = (one_hot("ally")?, one_hot("ty")?);
    let trained = one_hot("y")?.classes.len();
    let index_path = path("test.index");
    let test_index = test_index(&index_path, test.rows)?;
    let fits = all.rows == all_labels.classes.len()
        && test.rows == test_labels.classes.len()
        && all.cols == test.cols
        && all_labels.width == test_labels.width
        && trained + VALIDATION <= all.rows;
    if !fits {
        return Err(Error::bad_file(
            &path("allx"),
            "does not fit the other files",
        ));
    }
    let first = test_index.iter().copied().min().unwrap_or(0) as usize;
    let last = test_index.iter().copied().max().unwrap_or(0) as usize;
    if first != all.rows || last - first > 2 * test.rows + 1000 {
        let reason = format!("ids from {first} to {last}: expected {} and on", all.rows);
        return Err(Error::bad_file(&index_path, reason));
    }
    let n = last + 1;
    let mut y = all_labels.classes;
    y.resize(n, 0);
    for (id, class) in test_index.iter().zip(test_labels.classes) {
        y[*id as usize] = class;
    }
    let x = features(n, &all, &test, &test_index).map_err(|e| match e {
        Error::Candle(_) => e,
        other => Error::bad_file(&path("allx"), other),
    })?;
    let (graph_path, pickle) = unpickle("graph")?;
    let adjacency = pickle
        .adjacency()
        .map_err(|e| Error::bad_file(&graph_path, e))?;
    let data = NodeData {
        graph: graph(n, &adjacency).map_err(|e| Error::bad_file(&graph_path, e))?,
        x: x.into(),
        y,
        classes: all_labels.width,
        split: Some(NodeSplit {
            train: (0..trained as u32).collect(),
            val: (trained as u32..(trained + VALIDATION) as u32).collect(),
            test: test_index,
        }),
    };
    data.validate()?;
    Ok(data)
}

/// One-hot rows as classes.
struct Labels {
    classes: Vec<u32>,
    width: usize,
}

impl Labels {
    fn new(path: &Path, array: Array) -> Result<Self> {
        let [_, width] = array.shape[..] else {
            let reason = format!("labels of shape {:?}: expected [n, classes]", array.shape);
            return Err(Error::bad_file(path, reason));
        };
        // A row of zeros is a node that was never described.
        let class = |row: &[f64]| row.iter().position(|v| *v == 1.0).unwrap_or(0) as u32;
        let classes = array.values.chunks_exact(width.max(1)).map(class).collect();
        Ok(Self { classes, width })
    }
}

fn test_index(path: &Path, rows: usize) -> Result<Vec<u32>> {
    let text = read_text(path)?;
    let index: Result<Vec<u32>> = lines(&text)
        .map(|(at, line)| parse(path, at, line, "a node"))
        .collect();
    let index = index?;
    let mut sorted = index.clone();
    sorted.sort_unstable();
    sorted.dedup();
    if index.len() != rows || sorted.len() != rows || rows == 0 {
        let reason = format!(
            "{} distinct ids: expected {rows}, one for each row of tx",
            sorted.len()
        );
        return Err(Error::bad_file(path, reason));
    }
    Ok(index)
}

fn features(
    n: usize,
    all: &SparseMatrix,
    test: &SparseMatrix,
    test_index: &[u32],
) -> Result<SparseFeatures> {
    let mut row_of = vec![None; n];
    for (k, id) in test_index.iter().enumerate() {
        row_of[*id as usize] = Some(k);
    }
    let (mut indptr, mut indices, mut values) = (vec![0u32], Vec::new(), Vec::new());
    for (v, tested) in row_of.iter().enumerate() {
        let source = match tested {
            Some(k) => Some((test, *k)),
            None if v < all.rows => Some((all, v)),
            None => None,
        };
        if let Some((matrix, r)) = source {
            let row = matrix.indptr[r] as usize..matrix.indptr[r + 1] as usize;
            let parts = (matrix.indices.get(row.clone()), matrix.values.get(row));
            let (Some(i), Some(v)) = parts else {
                return Err(Error::argument("indptr", r, "borders inside the matrix"));
            };
            indices.extend_from_slice(i);
            values.extend_from_slice(v);
        }
        indptr.push(indices.len() as u32);
    }
    SparseFeatures::from_csr(all.cols, &indptr, &indices, values, DType::F32)
}

fn graph(n: usize, adjacency: &[(u32, Vec<u32>)]) -> Result<Graph> {
    let (mut src, mut dst) = (Vec::new(), Vec::new());
    for (node, neighbors) in adjacency {
        for other in neighbors.iter().filter(|v| *v != node) {
            src.push(*node);
            dst.push(*other);
        }
    }
    Ok(Graph::from_edges(n, src, dst)?.to_undirected()?.0)
}

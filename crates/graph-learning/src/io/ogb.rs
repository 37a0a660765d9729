//! The raw layout of the Open Graph Benchmark's node data sets (Hu et al., 2020).

use super::{classes_of, lines, parse, read_text, NodeData};
use crate::graph::Graph;
use crate::split::NodeSplit;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use std::path::{Path, PathBuf};

/// Reads `raw/edge.csv`, `raw/node-feat.csv`, `raw/node-label.csv`, `raw/num-node-list.csv` and
/// `split/*/{train,valid,test}.csv` below a folder, each also with `.gz`. Edges are those of the
/// file: directed. A node whose label is `nan` gets class 0 and may be in no part of the split.
///
/// # Errors
/// [`Error::Io`], [`Error::BadFile`] for lines that are no numbers and files that do not fit
/// together.
pub fn ogb_node(dir: impl AsRef<Path>) -> Result<NodeData> {
    let dir = dir.as_ref();
    let raw = dir.join("raw");
    let nodes_path = existing(&raw, "num-node-list.csv");
    let counts: Vec<usize> = column(&nodes_path, "a number of nodes")?;
    let [n] = counts[..] else {
        let reason = format!("{} graphs: expected one", counts.len());
        return Err(Error::bad_file(&nodes_path, reason));
    };
    let edge_path = existing(&raw, "edge.csv");
    let (mut src, mut dst) = (Vec::new(), Vec::new());
    for (at, line) in lines(&read_text(&edge_path)?) {
        let cells = line.split_once(',');
        let (s, t) =
            cells.ok_or_else(|| Error::bad_file(&edge_path, format!("line {at}: `{line}`")))?;
        src.push(parse(&edge_path, at, s, "a node")?);
        dst.push(parse(&edge_path, at, t, "a node")?);
    }
    let graph = Graph::from_edges(n, src, dst).map_err(|e| Error::bad_file(&edge_path, e))?;
    let feature_path = existing(&raw, "node-feat.csv");
    let (mut values, mut rows) = (Vec::<f32>::new(), 0usize);
    for (at, line) in lines(&read_text(&feature_path)?) {
        for cell in line.split(',') {
            values.push(parse(&feature_path, at, cell, "a real number")?);
        }
        rows += 1;
    }
    if rows != n || values.len() % n.max(1) != 0 || values.iter().any(|v| !v.is_finite()) {
        let reason = format!(
            "{} numbers in {rows} lines: expected {n} finite rows",
            values.len()
        );
        return Err(Error::bad_file(&feature_path, reason));
    }
    let width = values.len() / n.max(1);
    let x = Tensor::from_vec(values, (n, width), &Device::Cpu)?.to_dtype(DType::F32)?;
    let label_path = existing(&raw, "node-label.csv");
    let labels: Vec<f64> = column(&label_path, "a label")?;
    let whole: Vec<i64> = labels.iter().map(|v| *v as i64).collect();
    let (y, classes) = classes_of(&whole);
    let data = NodeData {
        graph,
        x: x.into(),
        y,
        classes,
        split: split(dir)?,
    };
    data.validate().map_err(|e| Error::bad_file(dir, e))?;
    let split = data.split.iter();
    let mut used = split.flat_map(|s| s.train.iter().chain(&s.val).chain(&s.test));
    if let Some(v) = used.find(|v| labels[**v as usize].is_nan()) {
        let reason = format!("node {v} of the split has no label");
        return Err(Error::bad_file(&label_path, reason));
    }
    Ok(data)
}

/// The plain file or the packed one.
fn existing(folder: &Path, name: &str) -> PathBuf {
    let packed = folder.join(format!("{name}.gz"));
    if packed.is_file() {
        packed
    } else {
        folder.join(name)
    }
}

fn column<T: std::str::FromStr>(path: &Path, what: &str) -> Result<Vec<T>> {
    let text = read_text(path)?;
    lines(&text)
        .map(|(at, line)| parse(path, at, line, what))
        .collect()
}

/// The first folder below `split`, by name.
fn split(dir: &Path) -> Result<Option<NodeSplit>> {
    let Ok(entries) = std::fs::read_dir(dir.join("split")) else {
        return Ok(None);
    };
    let mut folders: Vec<PathBuf> = entries.flatten().map(|e| e.path()).collect();
    folders.retain(|p| p.is_dir());
    folders.sort();
    let Some(folder) = folders.first() else {
        return Ok(None);
    };
    let part = |name: &str| column(&existing(folder, name), "a node");
    Ok(Some(NodeSplit {
        train: part("train.csv")?,
        val: part("valid.csv")?,
        test: part("test.csv")?,
    }))
}

//! The text files of Morris et al., *TUDataset*, 2020.

use super::{classes_of, lines, parse, read_text};
use crate::graph::Graph;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use std::path::Path;

/// Many labelled graphs.
#[derive(Debug, Clone)]
pub struct TuDataset {
    /// The graphs; edges in both directions, as in the files.
    pub graphs: Vec<Graph>,
    /// The class of each graph, `0..classes` in the order of the file's labels.
    pub y: Vec<u32>,
    /// Number of classes.
    pub classes: usize,
    /// Node features of each graph in `f32`, `[n, d]`: the file's real attributes, then the one-hot
    /// node labels. A file with neither gives `[n, 0]`.
    pub x: Vec<Tensor>,
    /// How many of the first columns of `x` are real attributes. PyTorch Geometric leaves these out
    /// unless it is asked for them.
    pub num_node_attributes: usize,
    /// The class of each node where the file has node labels, graph by graph.
    pub node_labels: Option<Vec<Vec<u32>>>,
    /// The class of each edge where the file has edge labels, graph by graph.
    pub edge_labels: Option<Vec<Vec<u32>>>,
}

impl TuDataset {
    /// Number of graphs.
    pub fn len(&self) -> usize {
        self.graphs.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.graphs.is_empty()
    }
}

/// Reads `DS_A.txt`, `DS_graph_indicator.txt` and `DS_graph_labels.txt` from a folder, and
/// `DS_node_labels.txt`, `DS_edge_labels.txt` and `DS_node_attributes.txt` where they are there.
///
/// # Errors
/// [`Error::Io`], [`Error::BadFile`] for lines that are no numbers, edges between two graphs, and
/// files that do not fit together.
pub fn tu_dataset(dir: impl AsRef<Path>, name: &str) -> Result<TuDataset> {
    let dir = dir.as_ref();
    let path = |part: &str| dir.join(format!("{name}_{part}.txt"));
    let integers = |part: &str| -> Result<Vec<i64>> {
        let path = path(part);
        let text = read_text(&path)?;
        lines(&text)
            .map(|(at, line)| parse(&path, at, line, "an integer"))
            .collect()
    };
    let optional = |part: &str| match path(part).is_file() {
        true => integers(part).map(Some),
        false => Ok(None),
    };
    let (y, classes) = classes_of(&integers("graph_labels")?);
    let indicator = integers("graph_indicator")?;
    let first = first_nodes(&path("graph_indicator"), &indicator, y.len())?;
    let n = indicator.len();
    let (graphs, edge_graph) = split_edges(&path("A"), &indicator, &first)?;
    let count = |part: &str, labels: &[i64], wanted: usize| match labels.len() == wanted {
        true => Ok(()),
        false => {
            let reason = format!("{} lines: expected {wanted}", labels.len());
            Err(Error::bad_file(&path(part), reason))
        }
    };
    let node_labels = optional("node_labels")?;
    let mut parts = Vec::new();
    let attributes = path("node_attributes");
    let mut num_node_attributes = 0;
    if attributes.is_file() {
        let rows = real_rows(&attributes, n)?;
        num_node_attributes = rows.dims2()?.1;
        parts.push(rows);
    }
    let node_labels = match node_labels {
        Some(raw) => {
            count("node_labels", &raw, n)?;
            let (labels, classes) = classes_of(&raw);
            let one_hot = Tensor::eye(classes.max(1), DType::F32, &Device::Cpu)?;
            parts.push(one_hot.index_select(&Tensor::from_slice(&labels, n, &Device::Cpu)?, 0)?);
            Some(by_graph(&labels, &first))
        }
        None => None,
    };
    let edge_labels = match optional("edge_labels")? {
        Some(raw) => {
            count("edge_labels", &raw, edge_graph.len())?;
            let (labels, _) = classes_of(&raw);
            let mut split = vec![Vec::new(); y.len()];
            for (g, label) in edge_graph.iter().zip(labels) {
                split[*g].push(label);
            }
            Some(split)
        }
        None => None,
    };
    let x = match parts.is_empty() {
        true => Tensor::zeros((n, 0), DType::F32, &Device::Cpu)?,
        false => Tensor::cat(&parts, 1)?,
    };
    let rows = |w: &[usize]| Ok(x.narrow(0, w[0], w[1] - w[0])?);
    Ok(TuDataset {
        x: first.windows(2).map(rows).collect::<Result<_>>()?,
        num_node_attributes,
        graphs,
        y,
        classes,
        node_labels,
        edge_labels,
    })
}

fn by_graph(labels: &[u32], first: &[usize]) -> Vec<Vec<u32>> {
    first
        .windows(2)
        .map(|w| labels[w[0]..w[1]].to_vec())
        .collect()
}

/// Where each graph's nodes begin; graphs without nodes are possible.
fn first_nodes(path: &Path, indicator: &[i64], graphs: usize) -> Result<Vec<usize>> {
    let mut first = vec![0];
    for (node, id) in indicator.iter().enumerate() {
        if *id < first.len() as i64 || *id > graphs as i64 {
            let reason = format!(
                "line {}: graph {id}: expected {} to {graphs}",
                node + 1,
                first.len()
            );
            return Err(Error::bad_file(path, reason));
        }
        while (first.len() as i64) < *id {
            first.push(node);
        }
    }
    first.resize(graphs + 1, indicator.len());
    Ok(first)
}

type Split = (Vec<Graph>, Vec<usize>);

/// The graphs, and the graph of each line.
fn split_edges(path: &Path, indicator: &[i64], first: &[usize]) -> Result<Split> {
    let text = read_text(path)?;
    let graphs = first.len() - 1;
    let mut ends = vec![(Vec::new(), Vec::new()); graphs];
    let mut edge_graph = Vec::new();
    for (at, line) in lines(&text) {
        let bad =
            |what: &str| Error::bad_file(path, format!("line {at}: `{line}`: expected {what}"));
        let (a, b) = line.split_once(',').ok_or_else(|| bad("`row, col`"))?;
        let node = |text: &str| -> Result<usize> {
            let v: usize = parse(path, at, text, "a node")?;
            match v {
                0 => Err(bad("nodes from 1")),
                v if v > indicator.len() => Err(bad(&format!("at most {} nodes", indicator.len()))),
                v => Ok(v - 1),
            }
        };
        let (s, t) = (node(a)?, node(b)?);
        let g = indicator[s] as usize - 1;
        if indicator[t] != indicator[s] {
            return Err(bad("both ends in one graph"));
        }
        ends[g].0.push((s - first[g]) as u32);
        ends[g].1.push((t - first[g]) as u32);
        edge_graph.push(g);
    }
    let make = |(g, (src, dst)): (usize, (Vec<u32>, Vec<u32>))| {
        Graph::from_edges(first[g + 1] - first[g], src, dst)
    };
    let graphs = ends
        .into_iter()
        .enumerate()
        .map(make)
        .collect::<Result<_>>()?;
    Ok((graphs, edge_graph))
}

/// Comma-separated reals, one row per line, all of one length.
fn real_rows(path: &Path, n: usize) -> Result<Tensor> {
    let text = read_text(path)?;
    let (mut values, mut width, mut rows) = (Vec::new(), None, 0);
    for (at, line) in lines(&text) {
        let before = values.len();
        for cell in line.split(',') {
            let v: f32 = parse(path, at, cell, "a real number")?;
            if !v.is_finite() {
                let reason = format!("line {at}: `{cell}`: expected a finite number");
                return Err(Error::bad_file(path, reason));
            }
            values.push(v);
        }
        let found = values.len() - before;
        if *width.get_or_insert(found) != found {
            return Err(Error::bad_file(path, format!("line {at}: {found} numbers")));
        }
        rows += 1;
    }
    if rows != n {
        return Err(Error::bad_file(path, format!("{rows} lines: expected {n}")));
    }
    Ok(Tensor::from_vec(
        values,
        (n, width.unwrap_or(0)),
        &Device::Cpu,
    )?)
}

//! Lines of `u v` or `u v weight`.

use super::{parse, read_text};
use crate::graph::Graph;
use crate::{Error, Result};
use std::path::Path;

/// The edges of a text file.
#[derive(Debug, Clone)]
pub struct EdgeList {
    /// One directed edge a line.
    pub graph: Graph,
    /// The third column, where every line has one.
    pub weights: Option<Vec<f64>>,
}

/// Reads `u v` or `u v weight` lines, separated by blanks, tabs or commas; lines that begin with `#`
/// or `%` are comments. Nodes are numbers from 0, and there is one more than the largest, or `nodes`
/// of them where given.
///
/// # Errors
/// [`Error::Io`], [`Error::BadFile`] for other lines, weights on some lines only, weights that are not
/// finite, and nodes beyond `nodes`. Without `nodes`, one that is larger than 64 times the file's
/// bytes is an error too: it would cost memory that no file of this size justifies.
pub fn edge_list(path: impl AsRef<Path>, nodes: Option<usize>) -> Result<EdgeList> {
    let path = path.as_ref();
    let text = read_text(path)?;
    let (mut src, mut dst, mut weights) = (Vec::<u32>::new(), Vec::<u32>::new(), Vec::new());
    for (i, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with(['#', '%']) {
            continue;
        }
        let cells = line.split(|c: char| c.is_whitespace() || c == ',');
        let cells: Vec<&str> = cells.filter(|c| !c.is_empty()).collect();
        let bad = || {
            Error::bad_file(
                path,
                format!("line {}: `{line}`: expected `u v [weight]`", i + 1),
            )
        };
        let (s, t) = match cells[..] {
            [s, t] => (s, t),
            [s, t, w] => {
                let w: f64 = parse(path, i + 1, w, "a weight")?;
                weights.push(if w.is_finite() { w } else { return Err(bad()) });
                (s, t)
            }
            _ => return Err(bad()),
        };
        src.push(parse(path, i + 1, s, "a node")?);
        dst.push(parse(path, i + 1, t, "a node")?);
    }
    if !weights.is_empty() && weights.len() != src.len() {
        let reason = format!("{} of {} lines have a weight", weights.len(), src.len());
        return Err(Error::bad_file(path, reason));
    }
    let largest = src.iter().chain(&dst).max().map_or(0, |v| *v as usize + 1);
    if nodes.is_none() && largest > 64 * text.len() + 64 {
        let reason = format!("node {}: give the number of nodes", largest - 1);
        return Err(Error::bad_file(path, reason));
    }
    let graph = Graph::from_edges(nodes.unwrap_or(largest), src, dst);
    Ok(EdgeList {
        graph: graph.map_err(|e| Error::bad_file(path, e))?,
        weights: (!weights.is_empty()).then_some(weights),
    })
}

//! The JSON of NetworkX's `node_link_data`.

use super::read;
use crate::graph::Graph;
use crate::{Error, Result};
use serde_json::{Map, Value};
use std::collections::HashMap;
use std::path::Path;

/// A graph with what the file says about nodes and edges.
#[derive(Debug, Clone)]
pub struct NodeLink {
    /// The graph; an undirected file gives both directions, link by link, a self-loop once.
    pub graph: Graph,
    /// The `id` of each node.
    pub ids: Vec<Value>,
    /// The other fields of each node.
    pub nodes: Vec<Map<String, Value>>,
    /// The other fields of each directed edge.
    pub edges: Vec<Map<String, Value>>,
}

impl NodeLink {
    /// A numeric field of every edge.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] naming the first edge that lacks it.
    pub fn edge_numbers(&self, field: &'static str) -> Result<Vec<f64>> {
        let one = |(e, map): (usize, &Map<String, Value>)| {
            let number = map.get(field).and_then(Value::as_f64);
            number.ok_or_else(|| Error::argument(field, format!("none on edge {e}"), "a number"))
        };
        self.edges.iter().enumerate().map(one).collect()
    }
}

/// Reads `{"directed": .., "nodes": [{"id": ..}, ..], "links" or "edges": [{"source": ..,
/// "target": ..}, ..]}`.
///
/// # Errors
/// [`Error::Io`], [`Error::BadFile`] for other JSON, nodes that are named twice, and links to nodes
/// that are not listed.
pub fn node_link(path: impl AsRef<Path>) -> Result<NodeLink> {
    let path = path.as_ref();
    let bad = |reason: &dyn std::fmt::Display| Error::bad_file(path, reason);
    let root: Value = serde_json::from_slice(&read(path)?).map_err(|e| bad(&e))?;
    let list = |names: &[&str]| {
        let found = names
            .iter()
            .find_map(|name| root.get(name).and_then(Value::as_array));
        found.ok_or_else(|| bad(&format!("no list `{}`", names[0])))
    };
    let directed = root
        .get("directed")
        .and_then(Value::as_bool)
        .unwrap_or(false);
    let (mut ids, mut nodes, mut place) = (Vec::new(), Vec::new(), HashMap::new());
    for node in list(&["nodes"])? {
        let (id, rest) =
            field(node, "id").ok_or_else(|| bad(&format!("a node without id: {node}")))?;
        if place.insert(id.to_string(), ids.len() as u32).is_some() {
            return Err(bad(&format!("node {id} is there twice")));
        }
        ids.push(id);
        nodes.push(rest);
    }
    let (mut src, mut dst, mut edges) = (Vec::new(), Vec::new(), Vec::new());
    for link in list(&["links", "edges"])? {
        let ends = field(link, "source").and_then(|(s, rest)| {
            let (t, rest) = field(&Value::Object(rest), "target")?;
            Some((s, t, rest))
        });
        let (s, t, rest) = ends.ok_or_else(|| bad(&format!("a link without ends: {link}")))?;
        let find = |id: &Value| {
            let known = place.get(&id.to_string()).copied();
            known.ok_or_else(|| bad(&format!("a link to node {id}, which is not listed")))
        };
        let (s, t) = (find(&s)?, find(&t)?);
        src.push(s);
        dst.push(t);
        edges.push(rest.clone());
        if !directed && s != t {
            src.push(t);
            dst.push(s);
            edges.push(rest);
        }
    }
    let graph = Graph::from_edges(ids.len(), src, dst)?;
    Ok(NodeLink {
        graph,
        ids,
        nodes,
        edges,
    })
}

/// A field of an object, and the object without it.
fn field(value: &Value, name: &str) -> Option<(Value, Map<String, Value>)> {
    let mut map = value.as_object()?.clone();
    let found = map.remove(name)?;
    Some((found, map))
}

//! Training, validation and test parts of nodes, graphs and links.

use crate::graph::Graph;
use crate::sample::negative::{negative_sampling, Negatives};
use crate::{Error, RandomStream, Result};
use std::collections::BTreeSet;

/// Nodes by the part that they belong to; a node may be in none.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NodeSplit {
    /// For training.
    pub train: Vec<u32>,
    /// For choices.
    pub val: Vec<u32>,
    /// For the result.
    pub test: Vec<u32>,
}

impl NodeSplit {
    /// Checks that all are nodes and none is in two parts.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] that names the first bad node.
    pub fn validate(&self, n: usize) -> Result<()> {
        let mut seen = vec![false; n];
        for v in self.train.iter().chain(&self.val).chain(&self.test) {
            let fresh = seen
                .get_mut(*v as usize)
                .map(|s| !std::mem::replace(s, true));
            if fresh != Some(true) {
                let expected = format!("distinct nodes below {n}");
                return Err(Error::argument("split", format!("node {v}"), expected));
            }
        }
        Ok(())
    }

    /// Checks that every class has a training node.
    ///
    /// # Errors
    /// [`Error::MissingClass`], [`Error::LabelOutOfRange`].
    pub fn require_classes(&self, labels: &[u32], classes: usize) -> Result<()> {
        check_labels(labels, classes)?;
        let present: BTreeSet<u32> = self
            .train
            .iter()
            .filter_map(|v| labels.get(*v as usize).copied())
            .collect();
        match (0..classes as u32).find(|c| !present.contains(c)) {
            Some(class) => Err(Error::MissingClass {
                class: class as usize,
            }),
            None => Ok(()),
        }
    }
}

/// Labels below `classes`.
pub(crate) fn check_labels(labels: &[u32], classes: usize) -> Result<()> {
    match labels.iter().position(|y| *y as usize >= classes) {
        Some(node) => Err(Error::LabelOutOfRange {
            label: labels[node],
            node,
            classes,
        }),
        None => Ok(()),
    }
}

/// `val` and `test` random nodes; all others are for training.
///
/// # Errors
/// [`Error::InvalidArgument`] for more than `n` nodes.
pub fn random_nodes(
    n: usize,
    val: usize,
    test: usize,
    rng: &mut RandomStream,
) -> Result<NodeSplit> {
    if val.checked_add(test).is_none_or(|held| held > n) {
        let value = format!("{val} + {test}");
        return Err(Error::argument(
            "validation and test nodes",
            value,
            format!("at most {n}"),
        ));
    }
    let order = rng.permutation(n)?;
    Ok(NodeSplit {
        val: order[..val].to_vec(),
        test: order[val..val + test].to_vec(),
        train: order[val + test..].to_vec(),
    })
}

/// `per_class` random training nodes of each class, then `val` and `test` of the others: the form of
/// the public splits of citation graphs.
///
/// # Errors
/// [`Error::InvalidArgument`] where a class, or what is left, is too small;
/// [`Error::LabelOutOfRange`].
pub fn random_per_class(
    labels: &[u32],
    classes: usize,
    per_class: usize,
    (val, test): (usize, usize),
    rng: &mut RandomStream,
) -> Result<NodeSplit> {
    check_labels(labels, classes)?;
    let mut left = vec![per_class; classes];
    let (mut train, mut rest) = (Vec::new(), Vec::new());
    for v in rng.permutation(labels.len())? {
        let quota = &mut left[labels[v as usize] as usize];
        if *quota > 0 {
            *quota -= 1;
            train.push(v);
        } else {
            rest.push(v);
        }
    }
    if let Some(class) = left.iter().position(|q| *q > 0) {
        let value = format!("{per_class} of class {class}");
        return Err(Error::argument(
            "training nodes",
            value,
            format!("{} fewer", left[class]),
        ));
    }
    if val + test > rest.len() {
        let value = format!("{val} + {test}");
        let expected = format!("at most the {} nodes that are left", rest.len());
        return Err(Error::argument(
            "validation and test nodes",
            value,
            expected,
        ));
    }
    Ok(NodeSplit {
        train,
        val: rest[..val].to_vec(),
        test: rest[val..val + test].to_vec(),
    })
}

/// `folds` parts of graphs (or nodes) with about equal shares of every class.
///
/// # Errors
/// [`Error::InvalidArgument`] for fewer than 2 folds or more folds than labels.
pub fn stratified_kfold(
    labels: &[u32],
    folds: usize,
    rng: &mut RandomStream,
) -> Result<Vec<Vec<u32>>> {
    if folds < 2 || folds > labels.len() {
        return Err(Error::argument(
            "folds",
            folds,
            format!("2 to {}", labels.len()),
        ));
    }
    let mut order = rng.permutation(labels.len())?;
    // Stable: random inside a class, dealt out class after class.
    order.sort_by_key(|i| labels[*i as usize]);
    let mut parts = vec![Vec::new(); folds];
    for (at, item) in order.into_iter().enumerate() {
        parts[at % folds].push(item);
    }
    Ok(parts)
}

/// Settings of [`random_links`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LinkSplitConfig {
    /// Share of the edges for validation.
    pub val: f64,
    /// Share of the edges for testing.
    pub test: f64,
    /// Non-edges for each edge of a part.
    pub neg_ratio: f64,
    /// The graph holds each edge in both directions: pairs are split, and message graphs hold both.
    pub undirected: bool,
    /// Share of the training edges that are predicted and not used for messages; at 0 they are used
    /// for both.
    pub disjoint: f64,
}

impl Default for LinkSplitConfig {
    fn default() -> Self {
        Self {
            val: 0.1,
            test: 0.2,
            neg_ratio: 1.0,
            undirected: true,
            disjoint: 0.0,
        }
    }
}

/// One part of a link split.
#[derive(Debug, Clone)]
pub struct LinkPart {
    /// What messages may travel along when this part is predicted.
    pub message_graph: Graph,
    /// Edges to predict; `u <= v` for undirected graphs.
    pub positive: Vec<(u32, u32)>,
    /// Pairs that are no edges of the whole graph.
    pub negative: Vec<(u32, u32)>,
}

/// The parts of a link split.
#[derive(Debug, Clone)]
pub struct LinkSplit {
    /// Messages along training edges.
    pub train: LinkPart,
    /// Messages along training edges.
    pub val: LinkPart,
    /// Messages along training and validation edges.
    pub test: LinkPart,
}

/// A random split of edges, with non-edges drawn once for each part (PyTorch Geometric's
/// `RandomLinkSplit`).
///
/// # Errors
/// [`Error::InvalidArgument`] for shares outside `[0, 1]`, a graph that is not undirected where it
/// should be, or too few non-edges; [`Error::Unsupported`] for graphs between two sets of nodes.
pub fn random_links(
    graph: &Graph,
    config: LinkSplitConfig,
    rng: &mut RandomStream,
) -> Result<LinkSplit> {
    graph.require_square("a split of links")?;
    let shares = [
        config.val,
        config.test,
        config.disjoint,
        config.val + config.test,
    ];
    if let Some(bad) = shares.iter().find(|s| !(0.0..=1.0).contains(*s)) {
        return Err(Error::argument(
            "share of the links",
            bad,
            "numbers in [0, 1]",
        ));
    }
    if !(config.neg_ratio >= 0.0 && config.neg_ratio.is_finite()) {
        return Err(Error::argument(
            "neg_ratio",
            config.neg_ratio,
            "a number >= 0",
        ));
    }
    if config.undirected && !graph.is_undirected() {
        return Err(Error::argument(
            "graph",
            "directed",
            "each edge in both directions",
        ));
    }
    let mut edges: Vec<(u32, u32)> = graph.edges().collect();
    if config.undirected {
        edges.retain(|(u, v)| u <= v);
    }
    rng.shuffle(&mut edges)?;
    let share = |s: f64, n: usize| (s * n as f64).floor() as usize;
    let (val, test) = (
        share(config.val, edges.len()),
        share(config.test, edges.len()),
    );
    let train = edges.len() - val - test;
    let hidden = share(config.disjoint, train);
    let messages = |edges: &[(u32, u32)]| -> Result<Graph> {
        let back = edges.iter().filter(|(u, v)| config.undirected && u != v);
        let all = edges.iter().copied().chain(back.map(|(u, v)| (*v, *u)));
        let (src, dst) = all.unzip();
        Graph::from_edges(graph.num_nodes(), src, dst)
    };
    let mut part = |message_graph: Graph, positive: &[(u32, u32)]| -> Result<LinkPart> {
        let count = (config.neg_ratio * positive.len() as f64).round() as usize;
        let how = Negatives {
            undirected: config.undirected,
            ..Negatives::default()
        };
        Ok(LinkPart {
            message_graph,
            negative: negative_sampling(graph, count, how, rng)?,
            positive: positive.to_vec(),
        })
    };
    let (train_edges, rest) = edges.split_at(train);
    let (val_edges, test_edges) = rest.split_at(val);
    let predicted = if hidden > 0 {
        &train_edges[..hidden]
    } else {
        train_edges
    };
    Ok(LinkSplit {
        train: part(messages(&train_edges[hidden..])?, predicted)?,
        val: part(messages(train_edges)?, val_edges)?,
        test: part(messages(&edges[..train + val])?, test_edges)?,
    })
}

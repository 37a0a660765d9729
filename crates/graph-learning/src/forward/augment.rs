//! One virtual node per class, tied to the nodes of that class.

use super::config::{AppendLabel, AugDirection};
use crate::graph::Graph;
use crate::sparse::Features;
use crate::split::check_labels;
use crate::{Error, Result};
use candle_core::{DType, Tensor};

/// A graph with virtual nodes `N .. N + C - 1`, one for each class.
#[derive(Debug, Clone)]
pub struct AugmentedGraph {
    /// The given edges, then all edges to virtual nodes, then all from them.
    pub graph: Graph,
    /// Features of real and virtual nodes, with label columns where they are asked for.
    pub x: Features,
    /// 0 for a given edge, `1 + y` for one to the virtual node of class `y`, `1 + C + y` for one
    /// from it: what relational convolutions need.
    pub edge_type: Vec<u32>,
    /// Number of real nodes `N`.
    pub real: usize,
    /// Number of classes `C`.
    pub classes: usize,
    /// The real nodes that are tied to a virtual one, ascending.
    pub connected: Vec<u32>,
    /// The label block `[N + C, C]`: one-hot for connected and virtual nodes, `1 / C` elsewhere.
    pub one_hot: Tensor,
}

/// Makes [`AugmentedGraph`]s of one graph with one set of virtual features.
#[derive(Debug, Clone)]
pub struct GraphAugmenter {
    graph: Graph,
    /// `[N + C, d]`.
    stacked: Features,
    classes: usize,
    direction: AugDirection,
    append_label: AppendLabel,
    virtual_features: Tensor,
}

impl GraphAugmenter {
    /// For a graph with features `[N, d]`; the virtual nodes' features `[C, d]` are given (standard
    /// normal ones as published, drawn once and never trained).
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::DType`], [`Error::NonFinite`] for features that are not finite,
    /// [`Error::InvalidArgument`] for no class, [`Error::Unsupported`] for graphs between two sets of
    /// nodes.
    pub fn new(
        graph: &Graph,
        x: &Features,
        classes: usize,
        direction: AugDirection,
        append_label: AppendLabel,
        virtual_features: &Tensor,
    ) -> Result<Self> {
        graph.require_square("an augmented graph")?;
        let (n, d) = x.dims()?;
        if n != graph.num_nodes() {
            let expected = format!("[{}, d]", graph.num_nodes());
            return Err(Error::shape("x", &[n, d], expected));
        }
        if classes == 0 {
            return Err(Error::argument("classes", 0, "at least 1"));
        }
        if virtual_features.dims() != [classes, d] {
            let expected = format!("[{classes}, {d}]");
            return Err(Error::shape(
                "virtual features",
                virtual_features.dims(),
                expected,
            ));
        }
        if virtual_features.dtype() != x.dtype() {
            let expected = format!("{:?}, as the features", x.dtype());
            return Err(Error::dtype(
                "virtual features",
                virtual_features.dtype(),
                expected,
            ));
        }
        require_finite("features", x)?;
        Ok(Self {
            graph: graph.clone(),
            stacked: x.append_rows(virtual_features)?,
            classes,
            direction,
            append_label,
            virtual_features: virtual_features.clone(),
        })
    }

    /// The graph in which each of `nodes` is tied to the virtual node of its label. Label columns
    /// show `feature_labels` instead of `labels` where given: the published negative graphs keep the
    /// true ones.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for another number of labels, or nodes that are not distinct nodes
    /// of the graph; [`Error::LabelOutOfRange`].
    pub fn augment(
        &self,
        labels: &[u32],
        nodes: &[u32],
        feature_labels: Option<&[u32]>,
    ) -> Result<AugmentedGraph> {
        let connected = self.connected(labels, nodes)?;
        let shown = feature_labels.unwrap_or(labels);
        self.check(shown)?;
        let one_hot = self.label_block(shown, &connected)?;
        let x = match self.append_label {
            AppendLabel::None => self.stacked.clone(),
            _ => self.stacked.append_columns(&one_hot)?,
        };
        let (graph, edge_type) = self.edges(labels, &connected)?;
        Ok(AugmentedGraph {
            graph,
            x,
            edge_type,
            real: self.graph.num_nodes(),
            classes: self.classes,
            connected,
            one_hot,
        })
    }

    fn check(&self, labels: &[u32]) -> Result<()> {
        let n = self.graph.num_nodes();
        if labels.len() != n {
            let expected = format!("one for each of {n} nodes");
            return Err(Error::argument("labels", labels.len(), expected));
        }
        check_labels(labels, self.classes)
    }

    fn connected(&self, labels: &[u32], nodes: &[u32]) -> Result<Vec<u32>> {
        self.check(labels)?;
        let mut connected = nodes.to_vec();
        connected.sort_unstable();
        let twice = connected.windows(2).find(|w| w[0] == w[1]).map(|w| w[0]);
        let beyond = connected.last().filter(|v| **v as usize >= labels.len());
        match twice.or(beyond.copied()) {
            Some(bad) => {
                let expected = format!("distinct nodes below {}", labels.len());
                Err(Error::argument("labeled node", bad, expected))
            }
            None => Ok(connected),
        }
    }

    fn edges(&self, labels: &[u32], connected: &[u32]) -> Result<(Graph, Vec<u32>)> {
        let (n, c) = (self.graph.num_nodes() as u32, self.classes as u32);
        let (mut src, mut dst) = (self.graph.src().to_vec(), self.graph.dst().to_vec());
        let mut edge_type = vec![0; src.len()];
        let label = |v: u32| labels[v as usize];
        src.extend(connected);
        dst.extend(connected.iter().map(|v| n + label(*v)));
        edge_type.extend(connected.iter().map(|v| 1 + label(*v)));
        if self.direction == AugDirection::Both {
            src.extend(connected.iter().map(|v| n + label(*v)));
            dst.extend(connected);
            edge_type.extend(connected.iter().map(|v| 1 + c + label(*v)));
        }
        let nodes = self.graph.num_nodes() + self.classes;
        Ok((Graph::from_edges(nodes, src, dst)?, edge_type))
    }

    fn label_block(&self, labels: &[u32], connected: &[u32]) -> Result<Tensor> {
        let (n, c) = (self.graph.num_nodes(), self.classes);
        let mut block = vec![1.0 / c as f64; (n + c) * c];
        let mut one_hot = |row: usize, class: usize| {
            let row = &mut block[row * c..(row + 1) * c];
            row.fill(0.0);
            row[class] = 1.0;
        };
        for v in connected {
            one_hot(*v as usize, labels[*v as usize] as usize);
        }
        (0..c).for_each(|class| one_hot(n + class, class));
        let like = &self.virtual_features;
        let block = Tensor::from_vec(block, (n + c, c), &candle_core::Device::Cpu)?;
        Ok(block.to_dtype(like.dtype())?.to_device(like.device())?)
    }
}

/// [`Error::NonFinite`] for features with NaN or infinities; sparse ones were checked when made.
pub(super) fn require_finite(what: &'static str, x: &Features) -> Result<()> {
    let Features::Dense(x) = x else {
        return Ok(());
    };
    let values = x.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
    let count = values.iter().filter(|v| !v.is_finite()).count();
    match count {
        0 => Ok(()),
        _ => {
            let total = values.len();
            Err(Error::NonFinite { what, count, total })
        }
    }
}

//! What the models of node classification share.

use super::augment::{AugmentedGraph, GraphAugmenter};
use super::config::{AppendLabel, ForwardGnnConfig};
use super::layer::{adam, norm, ForwardLayer, Labeled, NORM_EPS};
use crate::io::NodeData;
use crate::sparse::Features;
use crate::split::NodeSplit;
use crate::{Error, RandomStream, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::Optimizer;
use nn::init::SeededVars;
use optim::AdamW;

/// How many numbers go in and which labels come out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NodeShape {
    /// Features of a node.
    pub features: usize,
    /// Classes.
    pub classes: usize,
}

impl NodeShape {
    /// Of some data.
    ///
    /// # Errors
    /// Those of candle, for dense features that are no matrix.
    pub fn of(data: &NodeData) -> Result<Self> {
        Ok(Self {
            features: data.x.dims()?.1,
            classes: data.classes,
        })
    }
}

/// Layers, and what they were last trained on.
#[derive(Debug)]
pub(crate) struct Stack<O> {
    pub config: ForwardGnnConfig,
    pub layers: Vec<ForwardLayer<O>>,
    pub shape: NodeShape,
    pub dtype: DType,
    pub device: Device,
}

/// The default optimizer for a configuration.
pub(crate) fn default_optimizer(
    config: &ForwardGnnConfig,
) -> impl FnMut(Vec<(String, Var)>) -> Result<AdamW> {
    let (lr, weight_decay) = (config.lr, config.weight_decay);
    move |params| adam(params, lr, weight_decay)
}

impl<O: Optimizer> Stack<O> {
    /// A layer for each of the input widths.
    pub fn new(
        config: ForwardGnnConfig,
        shape: NodeShape,
        inputs: &[usize],
        vars: &SeededVars,
        dtype: DType,
        device: &Device,
        mut make: impl FnMut(Vec<(String, Var)>) -> Result<O>,
    ) -> Result<Self> {
        config.validate()?;
        if shape.features == 0 || shape.classes < 2 {
            let value = format!("{} features, {} classes", shape.features, shape.classes);
            return Err(Error::argument("shape", value, "1 and 2 at least"));
        }
        let layer = |(index, width): (usize, &usize)| {
            ForwardLayer::new(&config, index, *width, vars, (dtype, device), &mut make)
        };
        let layers = inputs
            .iter()
            .enumerate()
            .map(layer)
            .collect::<Result<_>>()?;
        Ok(Self {
            config,
            layers,
            shape,
            dtype,
            device: device.clone(),
        })
    }

    /// The widths of a plain stack with label columns where the configuration wants them.
    pub fn widths(config: &ForwardGnnConfig, shape: NodeShape, append: AppendLabel) -> Vec<usize> {
        let first = match append {
            AppendLabel::None => shape.features,
            _ => shape.features + shape.classes,
        };
        let later = match append {
            AppendLabel::All => config.hidden + shape.classes,
            _ => config.hidden,
        };
        let width = |layer| if layer == 0 { first } else { later };
        (0..config.layers).map(width).collect()
    }

    /// Checks data against the shape and gives its split, in which every class has a training node.
    pub fn check<'a>(&self, data: &'a NodeData) -> Result<&'a NodeSplit> {
        data.validate()?;
        let shape = NodeShape::of(data)?;
        if shape != self.shape {
            let expected = format!("{:?}, as the model", self.shape);
            return Err(Error::argument("data", format!("{shape:?}"), expected));
        }
        if data.x.dtype() != self.dtype {
            let expected = format!("{:?}, as the model", self.dtype);
            return Err(Error::dtype("features", data.x.dtype(), expected));
        }
        let split = data
            .split
            .as_ref()
            .ok_or_else(|| Error::argument("data.split", "None", "a split of the nodes"))?;
        split.require_classes(&data.y, data.classes)?;
        if self.config.patience > 0 && split.val.is_empty() {
            let expected = "validation nodes, or a patience of 0";
            return Err(Error::argument("data.split.val", "empty", expected));
        }
        Ok(split)
    }

    /// What a fit begins with: the split, the graph that shows the training nodes their labels, and
    /// these nodes.
    pub fn begin<'a>(
        &self,
        data: &'a NodeData,
        rng: &RandomStream,
    ) -> Result<(&'a NodeSplit, AugmentedGraph, Labeled)> {
        let split = self.check(data)?;
        let augmenter = self.augmenter(data, rng)?;
        let graph = augmenter.augment(&data.y, &split.train, None)?;
        let labeled = self.labeled(&graph.connected, &data.y, &graph)?;
        Ok((split, graph, labeled))
    }

    /// Standard normal features of the virtual nodes, from the part `virtual nodes` of a stream.
    pub fn augmenter(&self, data: &NodeData, rng: &RandomStream) -> Result<GraphAugmenter> {
        let size = (self.shape.classes, self.shape.features);
        let mut rng = rng.split("virtual nodes");
        let drawn = rng.normal(0.0, 1.0, size, self.dtype, &self.device)?;
        GraphAugmenter::new(
            &data.graph,
            &data.x,
            data.classes,
            self.config.edge_direction,
            self.config.append_label,
            &drawn,
        )
    }

    pub fn labeled(
        &self,
        nodes: &[u32],
        labels: &[u32],
        graph: &AugmentedGraph,
    ) -> Result<Labeled> {
        let size = (graph.real, graph.classes);
        Labeled::new(nodes, labels, size, self.config.temperature, &self.device)
    }

    /// The normalized input of the layer after one with output `z`.
    pub fn after(
        &self,
        z: &Tensor,
        graph: &AugmentedGraph,
        append: AppendLabel,
    ) -> Result<Features> {
        let z = z.detach();
        Ok(Features::Dense(match append {
            AppendLabel::All => norm(&Tensor::cat(&[&z, &graph.one_hot], 1)?)?,
            _ => norm(&z)?,
        }))
    }

    /// The outputs of the first `count` layers on an augmented graph, without a graph behind them.
    pub fn outputs(
        &self,
        graph: &AugmentedGraph,
        append: AppendLabel,
        count: usize,
    ) -> Result<Vec<Tensor>> {
        let mut x = graph.x.normalize_l2(NORM_EPS)?;
        let mut outputs: Vec<Tensor> = Vec::with_capacity(count);
        for layer in &self.layers[..count] {
            if let Some(z) = outputs.last() {
                x = self.after(z, graph, append)?;
            }
            let input = layer.prepare(&graph.graph, &x, false)?;
            outputs.push(layer.output(&input)?.detach());
        }
        Ok(outputs)
    }

    /// The number of layers to use.
    pub fn up_to(&self, layer: Option<usize>) -> Result<usize> {
        let all = self.layers.len();
        match layer {
            None => Ok(all),
            Some(count) if (1..=all).contains(&count) => Ok(count),
            Some(count) => {
                let expected = format!("1 to {all} layers");
                Err(Error::argument("up_to_layer", count, expected))
            }
        }
    }
}

/// Rows of scores of some nodes.
pub(crate) fn rows(scores: &Tensor, nodes: &[u32]) -> Result<Tensor> {
    let n = scores.dims()[0];
    if let Some(bad) = nodes.iter().find(|v| **v as usize >= n) {
        return Err(Error::argument("node", bad, format!("below {n}")));
    }
    Ok(scores.index_select(&Tensor::from_slice(nodes, nodes.len(), scores.device())?, 0)?)
}

/// The share of nodes whose largest score `[N, C]` is at their label; the first of equals counts.
pub fn accuracy(scores: &Tensor, nodes: &[u32], labels: &[u32]) -> Result<f64> {
    let scores = scores.to_dtype(DType::F64)?.to_vec2::<f64>()?;
    let (n, known) = (scores.len(), labels.len());
    if let Some(bad) = nodes.iter().find(|v| **v as usize >= n.min(known)) {
        let expected = format!("below {n} scores and {known} labels");
        return Err(Error::argument("node", bad, expected));
    }
    let right = nodes.iter().filter(|v| {
        let row = scores[**v as usize].iter().enumerate();
        let best = row.fold(
            (0, f64::NEG_INFINITY),
            |b, (c, s)| {
                if *s > b.1 {
                    (c, *s)
                } else {
                    b
                }
            },
        );
        best.0 as u32 == labels[**v as usize]
    });
    Ok(right.count() as f64 / nodes.len().max(1) as f64)
}

/// [`Error::InvalidArgument`] before a fit.
pub(crate) fn fitted<T>(state: &Option<T>) -> Result<&T> {
    state
        .as_ref()
        .ok_or_else(|| Error::argument("model", "not trained", "a call of fit before"))
}

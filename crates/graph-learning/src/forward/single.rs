//! Single-forward: layers trained one after the other by their similarity to virtual nodes.

use super::augment::AugmentedGraph;
use super::config::ForwardGnnConfig;
use super::fit::{train_layer, FitReport, Observer};
use super::layer::{ForwardLayer, SingleInput, NORM_EPS};
use super::node::{accuracy, default_optimizer, fitted, rows, NodeShape, Stack};
use crate::io::NodeData;
use crate::{RandomStream, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::Optimizer;
use nn::init::SeededVars;
use optim::AdamW;

/// The single-forward classifier; see the [module](super) page.
///
/// Its variables are `layers.L.*` of the set that it is built from.
#[derive(Debug)]
pub struct SingleForward<O = AdamW> {
    stack: Stack<O>,
    trained: usize,
    graph: Option<AugmentedGraph>,
}

impl SingleForward {
    /// With Adam for each layer.
    ///
    /// # Errors
    /// Those of [`ForwardGnnConfig::validate`], and of the layers.
    pub fn new(
        config: ForwardGnnConfig,
        shape: NodeShape,
        vars: &SeededVars,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let make = default_optimizer(&config);
        Self::with_optimizer(config, shape, vars, dtype, device, make)
    }
}

impl<O: Optimizer> SingleForward<O> {
    /// With an optimizer of your own for each layer, made from the layer's variables.
    ///
    /// # Errors
    /// As [`new`](SingleForward::new).
    pub fn with_optimizer(
        config: ForwardGnnConfig,
        shape: NodeShape,
        vars: &SeededVars,
        dtype: DType,
        device: &Device,
        make: impl FnMut(Vec<(String, Var)>) -> Result<O>,
    ) -> Result<Self> {
        let widths = Stack::<O>::widths(&config, shape, config.append_label);
        Ok(Self {
            stack: Stack::new(config, shape, &widths, vars, dtype, device, make)?,
            trained: 0,
            graph: None,
        })
    }

    /// Says that the first `layers` layers have been trained before (their weights were loaded), so
    /// that [`fit`](Self::fit) goes on with the next: with the same stream and data the result has
    /// the bits of a fit without a stop.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) for more layers than there are.
    pub fn with_trained(mut self, layers: usize) -> Result<Self> {
        self.trained = match layers {
            0 => 0,
            _ => self.stack.up_to(Some(layers))?,
        };
        Ok(self)
    }

    /// How many layers have been trained.
    pub fn trained(&self) -> usize {
        self.trained
    }

    /// The layers.
    pub fn layers(&self) -> &[ForwardLayer<O>] {
        &self.stack.layers
    }

    /// Trains the layers that are not trained yet, one after the other. Virtual features come from
    /// the part `virtual nodes` of the stream, which does not move.
    ///
    /// # Errors
    /// [`Error::MissingClass`](crate::Error::MissingClass) for a class without a training node,
    /// whose virtual node would have no neighbor; data that do not fit; a loss that is not finite.
    pub fn fit(
        &mut self,
        data: &NodeData,
        rng: &RandomStream,
        observer: &mut Observer<'_>,
    ) -> Result<FitReport> {
        let stack = &mut self.stack;
        let (split, graph, labeled) = stack.begin(data, rng)?;
        let mut x = graph.x.normalize_l2(NORM_EPS)?;
        let mut ensemble: Option<Tensor> = None;
        let mut report = FitReport::default();
        for index in 0..stack.layers.len() {
            let prepared = stack.layers[index].prepare(&graph.graph, &x, stack.config.cache)?;
            let input = SingleInput {
                input: prepared,
                labeled: labeled.clone(),
            };
            let with = |layer: &ForwardLayer<O>| -> Result<(Tensor, Tensor)> {
                let z = layer.output(&input.input)?.detach();
                let own = labeled.probabilities(&z)?;
                let all = match &ensemble {
                    Some(before) => (before + own)?,
                    None => own,
                };
                Ok((z, all))
            };
            if index >= self.trained {
                let config = stack.config;
                let validate =
                    |layer: &ForwardLayer<O>| accuracy(&with(layer)?.1, &split.val, &data.y);
                let layer = &mut stack.layers[index];
                let one = train_layer(layer, index, &input, &config, observer, validate)?;
                report.per_layer.push(one);
                self.trained = index + 1;
            }
            let (z, all) = with(&stack.layers[index])?;
            ensemble = Some(all);
            x = stack.after(&z, &graph, stack.config.append_label)?;
        }
        self.graph = Some(graph);
        Ok(report)
    }

    /// Class probabilities `[nodes, C]`: the mean over layers, or over the first `up_to_layer` ones
    /// (every trained prefix is a classifier).
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) before a fit, for nodes that do not
    /// exist and another number of layers.
    pub fn predict_proba(&self, nodes: &[u32], up_to_layer: Option<usize>) -> Result<Tensor> {
        let (stack, graph) = (&self.stack, fitted(&self.graph)?);
        let count = stack.up_to(up_to_layer)?;
        let labeled = stack.labeled(&[], &[], graph)?;
        let mut sum: Option<Tensor> = None;
        for z in stack.outputs(graph, stack.config.append_label, count)? {
            let own = labeled.probabilities(&z)?;
            sum = Some(match sum {
                Some(sum) => (sum + own)?,
                None => own,
            });
        }
        // There is at least one layer.
        let sum = sum.ok_or_else(|| crate::Error::argument("layers", 0, "at least 1"))?;
        rows(&(sum / count as f64)?, nodes)
    }
}

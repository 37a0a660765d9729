//! Forward-forward: true labels should feel good and wrong ones should not.

use super::augment::{AugmentedGraph, GraphAugmenter};
use super::config::{AppendLabel, ForwardGnnConfig};
use super::fit::{train_layer, FitReport, Observer};
use super::layer::{ForwardLayer, GoodnessInput, NORM_EPS};
use super::node::{accuracy, default_optimizer, fitted, rows, NodeShape, Stack};
use crate::graph::Graph;
use crate::io::NodeData;
use crate::sparse::Features;
use crate::{RandomStream, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::Optimizer;
use nn::goodness::goodness;
use nn::init::SeededVars;
use optim::AdamW;

/// How a label is shown to the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LabelCarrier {
    /// By edges to virtual nodes (FF-VN). Positive and negative graphs share their features.
    VirtualNodes,
    /// By columns appended to the features of the first layer (FF-LA). Positive and negative
    /// features go through the layers apart from each other.
    Columns,
}

/// The forward-forward classifier; see the [module](super) page. It answers with one forward pass
/// for each class.
#[derive(Debug)]
pub struct ForwardForward<O = AdamW> {
    stack: Stack<O>,
    carrier: LabelCarrier,
    trained: usize,
    task: Option<Task>,
}

/// What predictions need of the training data.
#[derive(Debug)]
struct Task {
    shower: Shower,
    labels: Vec<u32>,
    train: Vec<u32>,
}

/// Graphs and features that show some nodes some labels.
#[derive(Debug)]
enum Shower {
    Virtual(GraphAugmenter),
    Columns {
        graph: Graph,
        x: Features,
        classes: usize,
    },
}

/// What a network is given.
struct Shown {
    graph: Graph,
    x: Features,
    real: usize,
    augmented: Option<AugmentedGraph>,
}

impl Shower {
    /// With the label `shown` of each of `nodes`; columns of a virtual-node model keep
    /// `feature_labels`.
    fn show(&self, shown: &[u32], nodes: &[u32], feature_labels: &[u32]) -> Result<Shown> {
        match self {
            Self::Virtual(augmenter) => {
                let graph = augmenter.augment(shown, nodes, Some(feature_labels))?;
                Ok(Shown {
                    x: graph.x.normalize_l2(NORM_EPS)?,
                    graph: graph.graph.clone(),
                    real: graph.real,
                    augmented: Some(graph),
                })
            }
            Self::Columns { graph, x, classes } => {
                let n = graph.num_nodes();
                let mut block = vec![1.0 / *classes as f64; n * classes];
                for v in nodes {
                    let row = &mut block[*v as usize * classes..][..*classes];
                    row.fill(0.0);
                    row[shown[*v as usize] as usize] = 1.0;
                }
                let device = match x {
                    Features::Dense(x) => x.device().clone(),
                    Features::Sparse(_) => Device::Cpu,
                };
                let block = Tensor::from_vec(block, (n, *classes), &Device::Cpu)?;
                let block = block.to_dtype(x.dtype())?.to_device(&device)?;
                Ok(Shown {
                    x: x.append_columns(&block)?.normalize_l2(NORM_EPS)?,
                    graph: graph.clone(),
                    real: n,
                    augmented: None,
                })
            }
        }
    }
}

impl ForwardForward {
    /// With Adam for each layer.
    ///
    /// # Errors
    /// Those of [`ForwardGnnConfig::validate`], and of the layers.
    pub fn new(
        carrier: LabelCarrier,
        config: ForwardGnnConfig,
        shape: NodeShape,
        vars: &SeededVars,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let make = default_optimizer(&config);
        Self::with_optimizer(carrier, config, shape, vars, dtype, device, make)
    }
}

impl<O: Optimizer> ForwardForward<O> {
    /// With an optimizer of your own for each layer, made from the layer's variables.
    ///
    /// # Errors
    /// As [`new`](ForwardForward::new).
    pub fn with_optimizer(
        carrier: LabelCarrier,
        config: ForwardGnnConfig,
        shape: NodeShape,
        vars: &SeededVars,
        dtype: DType,
        device: &Device,
        make: impl FnMut(Vec<(String, Var)>) -> Result<O>,
    ) -> Result<Self> {
        let append = match carrier {
            LabelCarrier::VirtualNodes => config.append_label,
            LabelCarrier::Columns => AppendLabel::Input,
        };
        let widths = Stack::<O>::widths(&config, shape, append);
        Ok(Self {
            stack: Stack::new(config, shape, &widths, vars, dtype, device, make)?,
            carrier,
            trained: 0,
            task: None,
        })
    }

    /// As [`SingleForward::with_trained`](super::SingleForward::with_trained).
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

    /// As if it had been trained on this.
    #[cfg(feature = "verify")]
    pub(crate) fn knowing(
        self,
        augmenter: GraphAugmenter,
        labels: Vec<u32>,
        train: Vec<u32>,
    ) -> Self {
        let shower = Shower::Virtual(augmenter);
        Self {
            task: Some(Task {
                shower,
                labels,
                train,
            }),
            ..self
        }
    }

    /// How many layers have been trained.
    pub fn trained(&self) -> usize {
        self.trained
    }

    /// The layers.
    pub fn layers(&self) -> &[ForwardLayer<O>] {
        &self.stack.layers
    }

    /// Trains the layers that are not trained yet. Virtual features and wrong labels come from the
    /// parts `virtual nodes` and `negatives` of the stream, which does not move; wrong labels are
    /// drawn once and kept for all layers.
    ///
    /// # Errors
    /// As [`SingleForward::fit`](super::SingleForward::fit).
    pub fn fit(
        &mut self,
        data: &NodeData,
        rng: &RandomStream,
        observer: &mut Observer<'_>,
    ) -> Result<FitReport> {
        let split = self.stack.check(data)?;
        let shower = match self.carrier {
            LabelCarrier::VirtualNodes => Shower::Virtual(self.stack.augmenter(data, rng)?),
            LabelCarrier::Columns => {
                super::augment::require_finite("features", &data.x)?;
                Shower::Columns {
                    graph: data.graph.clone(),
                    x: data.x.clone(),
                    classes: data.classes,
                }
            }
        };
        let task = Task {
            shower,
            labels: data.y.clone(),
            train: split.train.clone(),
        };
        let wrong = wrong_labels(
            &data.y,
            data.classes,
            self.stack.config.num_negatives,
            &mut rng.split("negatives"),
        )?;
        let show = |labels: &[u32]| task.shower.show(labels, &task.train, &data.y);
        let mut positive = show(&data.y)?;
        let mut negatives: Vec<Shown> = wrong.iter().map(|w| show(w)).collect::<Result<_>>()?;
        let nodes = Tensor::from_slice(&split.train, split.train.len(), &self.stack.device)?;
        let mut report = FitReport::default();
        for index in 0..self.stack.layers.len() {
            let (layer, cache) = (&self.stack.layers[index], self.stack.config.cache);
            let prepare = |shown: &Shown| layer.prepare(&shown.graph, &shown.x, cache);
            let input = GoodnessInput {
                positive: prepare(&positive)?,
                negatives: negatives.iter().map(prepare).collect::<Result<_>>()?,
                nodes: nodes.clone(),
                theta: self.stack.config.theta,
            };
            if index >= self.trained {
                let one = self.train(index, &input, &task, &split.val, observer)?;
                report.per_layer.push(one);
                self.trained = index + 1;
            }
            let layer = &self.stack.layers[index];
            let z = layer.output(&input.positive)?;
            positive.x = self.next(&z, &positive)?;
            for (shown, prepared) in negatives.iter_mut().zip(&input.negatives) {
                shown.x = match self.carrier {
                    LabelCarrier::VirtualNodes => positive.x.clone(),
                    LabelCarrier::Columns => self.next(&layer.output(prepared)?, shown)?,
                };
            }
        }
        self.task = Some(task);
        Ok(report)
    }

    fn next(&self, z: &Tensor, shown: &Shown) -> Result<Features> {
        match &shown.augmented {
            Some(graph) => self.stack.after(z, graph, self.stack.config.append_label),
            None => Ok(Features::Dense(super::layer::norm(&z.detach())?)),
        }
    }

    fn train(
        &mut self,
        index: usize,
        input: &GoodnessInput,
        task: &Task,
        val: &[u32],
        observer: &mut Observer<'_>,
    ) -> Result<super::LayerReport> {
        let config = self.stack.config;
        // The layers below do not change: what each class's graph gives the layer is computed once.
        let inputs = match config.patience {
            0 => Vec::new(),
            _ => self.evaluated(task, val, &[], index)?,
        };
        let validate = |layer: &ForwardLayer<O>| -> Result<f64> {
            let mut columns = Vec::with_capacity(inputs.len());
            for (shown, before) in &inputs {
                let prepared = layer.prepare(&shown.graph, &shown.x, false)?;
                let own = contribution(&layer.output(&prepared)?, shown.real, config.theta)?;
                columns.push(match before {
                    Some(before) => (before + own)?,
                    None => own,
                });
            }
            accuracy(&Tensor::stack(&columns, 1)?, val, &task.labels)
        };
        let layer = &mut self.stack.layers[index];
        train_layer(layer, index, input, &config, observer, validate)
    }

    /// For each class: what `layers` layers make of the graph that shows `nodes` that class and the
    /// training nodes and `known` ones their own, and the goodness so far.
    fn evaluated(
        &self,
        task: &Task,
        nodes: &[u32],
        known: &[u32],
        layers: usize,
    ) -> Result<Vec<(Shown, Option<Tensor>)>> {
        let mut shown_nodes = task.train.clone();
        shown_nodes.extend(known.iter().chain(nodes));
        shown_nodes.sort_unstable();
        shown_nodes.dedup();
        let own = {
            let mut own = vec![false; task.labels.len()];
            task.train
                .iter()
                .chain(known)
                .for_each(|v| own[*v as usize] = true);
            own
        };
        let one = |class: u32| -> Result<(Shown, Option<Tensor>)> {
            let mut labels = task.labels.clone();
            for v in nodes.iter().filter(|v| !own[**v as usize]) {
                labels[*v as usize] = class;
            }
            let mut shown = task.shower.show(&labels, &shown_nodes, &labels)?;
            let mut sum: Option<Tensor> = None;
            for layer in &self.stack.layers[..layers] {
                let prepared = layer.prepare(&shown.graph, &shown.x, false)?;
                let z = layer.output(&prepared)?.detach();
                let own = contribution(&z, shown.real, self.stack.config.theta)?;
                sum = Some(match sum {
                    Some(sum) => (sum + own)?,
                    None => own,
                });
                shown.x = self.next(&z, &shown)?;
            }
            Ok((shown, sum))
        };
        (0..self.stack.shape.classes as u32).map(one).collect()
    }

    /// The accumulated goodness `[nodes, C]` of each class: `mean_j z_ij^2 - theta`, summed over the
    /// layers (or the first `up_to_layer`). Training nodes show their labels, and so do the nodes
    /// `known` (the published tests show those of validation nodes).
    ///
    /// # Errors
    /// As [`SingleForward::predict_proba`](super::SingleForward::predict_proba).
    pub fn goodness(
        &self,
        nodes: &[u32],
        known: &[u32],
        up_to_layer: Option<usize>,
    ) -> Result<Tensor> {
        let task = fitted(&self.task)?;
        let count = self.stack.up_to(up_to_layer)?;
        let n = task.labels.len();
        if let Some(bad) = nodes.iter().chain(known).find(|v| **v as usize >= n) {
            let expected = format!("below {n}");
            return Err(crate::Error::argument("node", bad, expected));
        }
        let columns = self.evaluated(task, nodes, known, count)?;
        let columns: Vec<Tensor> = columns.into_iter().filter_map(|(_, sum)| sum).collect();
        rows(&Tensor::stack(&columns, 1)?, nodes)
    }
}

/// `mean_j z_ij^2 - theta` of the real nodes `[N]`. The loss takes the sum, predictions the mean.
fn contribution(z: &Tensor, real: usize, theta: f64) -> Result<Tensor> {
    let z = z.detach().narrow(0, 0, real)?;
    let width = z.dims()[1].max(1) as f64;
    Ok(goodness(&z)?.affine(1.0 / width, -theta)?)
}

/// `min(k, C - 1)` wrong labelings: of each node a random order of its wrong classes, the k-th
/// labeling has the k-th.
fn wrong_labels(
    labels: &[u32],
    classes: usize,
    count: usize,
    rng: &mut RandomStream,
) -> Result<Vec<Vec<u32>>> {
    let count = count.min(classes - 1);
    let mut wrong = vec![Vec::with_capacity(labels.len()); count];
    for label in labels {
        let mut others: Vec<u32> = (0..classes as u32).filter(|c| c != label).collect();
        rng.shuffle(&mut others)?;
        for (list, class) in wrong.iter_mut().zip(others) {
            list.push(class);
        }
    }
    Ok(wrong)
}

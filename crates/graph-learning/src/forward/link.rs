//! Link prediction, a layer at a time.

use super::config::{AppendLabel, ForwardGnnConfig};
use super::fit::{train_layer, FitReport, Observer};
use super::layer::{norm, ForwardLayer, LinkInput, LinkLoss, NORM_EPS};
use super::node::default_optimizer;
use super::top_down::{time_steps, widths, States};
use crate::graph::Graph;
use crate::metrics::roc_auc;
use crate::sparse::Features;
use crate::split::{LinkPart, LinkSplit};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::ops::sigmoid;
use candle_nn::Optimizer;
use nn::init::SeededVars;
use optim::local::{LocalLayer, LocalStep};
use optim::AdamW;

/// Node features and a split of links; edges of validation and test carry no messages in training.
#[derive(Debug, Clone, Copy)]
pub struct LinkTask<'a> {
    /// Features `[n, d]`.
    pub x: &'a Features,
    /// The parts.
    pub split: &'a LinkSplit,
}

/// Layers for links.
#[derive(Debug)]
struct Links<O> {
    config: ForwardGnnConfig,
    loss: LinkLoss,
    layers: Vec<ForwardLayer<O>>,
    features: usize,
    dtype: DType,
    device: Device,
}

impl<O: Optimizer> Links<O> {
    fn new(
        loss: LinkLoss,
        config: ForwardGnnConfig,
        features: usize,
        inputs: &[usize],
        vars: &SeededVars,
        (dtype, device): (DType, &Device),
        mut make: impl FnMut(Vec<(String, Var)>) -> Result<O>,
    ) -> Result<Self> {
        config.validate()?;
        if features == 0 {
            return Err(Error::argument("features", 0, "at least 1"));
        }
        if config.append_label != AppendLabel::None {
            return Err(Error::unsupported("append_label", "in link prediction"));
        }
        let layer = |(index, width): (usize, &usize)| {
            ForwardLayer::new(&config, index, *width, vars, (dtype, device), &mut make)
        };
        Ok(Self {
            config,
            loss,
            layers: inputs
                .iter()
                .enumerate()
                .map(layer)
                .collect::<Result<_>>()?,
            features,
            dtype,
            device: device.clone(),
        })
    }

    fn check(&self, graph: &Graph, x: &Features) -> Result<()> {
        graph.require_square("link prediction")?;
        let expected = [graph.num_nodes(), self.features];
        let (n, d) = x.dims()?;
        if [n, d] != expected {
            return Err(Error::shape("x", &[n, d], format!("{expected:?}")));
        }
        if x.dtype() != self.dtype {
            let expected = format!("{:?}, as the model", self.dtype);
            return Err(Error::dtype("features", x.dtype(), expected));
        }
        super::augment::require_finite("features", x)
    }

    fn ends(&self, graph: &Graph, pairs: &[(u32, u32)]) -> Result<[Tensor; 2]> {
        let n = graph.num_nodes();
        let beyond = |(u, v): &&(u32, u32)| (*u).max(*v) as usize >= n;
        if let Some((u, v)) = pairs.iter().find(beyond) {
            let expected = format!("two nodes below {n}");
            return Err(Error::argument("pair", format!("{u}, {v}"), expected));
        }
        let end = |pick: fn(&(u32, u32)) -> u32| -> Result<Tensor> {
            let ids: Vec<u32> = pairs.iter().map(pick).collect();
            Ok(Tensor::from_vec(ids, pairs.len(), &self.device)?)
        };
        Ok([end(|p| p.0)?, end(|p| p.1)?])
    }

    /// All pairs of a part, edges first, and which are edges.
    fn part(&self, part: &LinkPart) -> Result<([Tensor; 2], Vec<bool>)> {
        if part.positive.is_empty() || part.negative.is_empty() {
            let value = format!(
                "{} edges, {} non-edges",
                part.positive.len(),
                part.negative.len()
            );
            return Err(Error::argument("links", value, "at least one of each"));
        }
        let pairs: Vec<(u32, u32)> = part
            .positive
            .iter()
            .chain(&part.negative)
            .copied()
            .collect();
        let known = (0..pairs.len()).map(|i| i < part.positive.len()).collect();
        Ok((self.ends(&part.message_graph, &pairs)?, known))
    }

    fn targets(&self, known: &[bool]) -> Result<Tensor> {
        let targets: Vec<f64> = known.iter().map(|k| f64::from(u8::from(*k))).collect();
        let targets = Tensor::from_vec(targets, known.len(), &Device::Cpu)?;
        Ok(targets.to_dtype(self.dtype)?.to_device(&self.device)?)
    }

    fn probabilities(&self, z: &Tensor, [u, v]: &[Tensor; 2]) -> Result<Tensor> {
        Ok(sigmoid(&self.loss.logits(&z.detach(), u, v)?)?)
    }
}

fn auc(scores: &Tensor, known: &[bool]) -> Result<f64> {
    roc_auc(&scores.to_dtype(DType::F64)?.to_vec1::<f64>()?, known)
}

/// Layers trained one after the other to tell edges from other pairs. The score of a pair is the
/// mean over layers of `sigmoid(logit)`.
#[derive(Debug)]
pub struct LinkForward<O = AdamW> {
    links: Links<O>,
}

impl LinkForward {
    /// With Adam for each layer, for nodes with that many features.
    ///
    /// # Errors
    /// Those of [`ForwardGnnConfig::validate`], and of the layers;
    /// [`Error::Unsupported`] for label columns.
    pub fn new(
        loss: LinkLoss,
        config: ForwardGnnConfig,
        features: usize,
        vars: &SeededVars,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let make = default_optimizer(&config);
        Self::with_optimizer(loss, config, features, vars, dtype, device, make)
    }
}

impl<O: Optimizer> LinkForward<O> {
    /// With an optimizer of your own for each layer, made from the layer's variables.
    ///
    /// # Errors
    /// As [`new`](LinkForward::new).
    pub fn with_optimizer(
        loss: LinkLoss,
        config: ForwardGnnConfig,
        features: usize,
        vars: &SeededVars,
        dtype: DType,
        device: &Device,
        make: impl FnMut(Vec<(String, Var)>) -> Result<O>,
    ) -> Result<Self> {
        let width = |layer| if layer == 0 { features } else { config.hidden };
        let inputs: Vec<usize> = (0..config.layers).map(width).collect();
        let links = Links::new(loss, config, features, &inputs, vars, (dtype, device), make)?;
        Ok(Self { links })
    }

    /// The layers.
    pub fn layers(&self) -> &[ForwardLayer<O>] {
        &self.links.layers
    }

    /// Trains all layers; the area under the ROC curve on the validation part keeps the best weights.
    ///
    /// # Errors
    /// Data that do not fit, a part without edges or non-edges, a loss that is not finite.
    pub fn fit(&mut self, task: &LinkTask<'_>, observer: &mut Observer<'_>) -> Result<FitReport> {
        let links = &mut self.links;
        let graph = &task.split.train.message_graph;
        links.check(graph, task.x)?;
        let (ends, known) = links.part(&task.split.train)?;
        let (val_ends, val_known) = links.part(&task.split.val)?;
        let targets = links.targets(&known)?;
        let mut x = task.x.normalize_l2(NORM_EPS)?;
        let mut before: Option<Tensor> = None;
        let mut report = FitReport::default();
        for index in 0..links.layers.len() {
            let input = LinkInput {
                input: links.layers[index].prepare(graph, &x, links.config.cache)?,
                ends: ends.clone(),
                targets: targets.clone(),
                loss: links.loss,
            };
            let (config, loss) = (links.config, links.loss);
            let with = |layer: &ForwardLayer<O>| -> Result<(Tensor, Tensor)> {
                let z = layer.output(&input.input)?.detach();
                let own = sigmoid(&loss.logits(&z, &val_ends[0], &val_ends[1])?)?;
                let all = match &before {
                    Some(sum) => (sum + own)?,
                    None => own,
                };
                Ok((z, all))
            };
            let validate = |layer: &ForwardLayer<O>| auc(&with(layer)?.1, &val_known);
            let layer = &mut links.layers[index];
            let one = train_layer(layer, index, &input, &config, observer, validate)?;
            report.per_layer.push(one);
            let (z, all) = with(&links.layers[index])?;
            before = Some(all);
            x = Features::Dense(norm(&z)?);
        }
        Ok(report)
    }

    /// The probability `[pairs]` of an edge between the nodes of each pair, with messages along
    /// `graph`.
    ///
    /// # Errors
    /// Features that do not fit, pairs of nodes that do not exist.
    pub fn score(&self, graph: &Graph, x: &Features, pairs: &[(u32, u32)]) -> Result<Tensor> {
        let links = &self.links;
        links.check(graph, x)?;
        let ends = links.ends(graph, pairs)?;
        let mut x = x.normalize_l2(NORM_EPS)?;
        let mut sum = Tensor::zeros(pairs.len(), links.dtype, &links.device)?;
        for layer in &links.layers {
            let z = layer.output(&layer.prepare(graph, &x, false)?)?;
            sum = (sum + links.probabilities(&z, &ends)?)?;
            x = Features::Dense(norm(&z.detach())?);
        }
        Ok((sum / links.layers.len() as f64)?)
    }
}

/// Link prediction whose layers also hear the state above them. All layers are trained together;
/// the published runs take no weight decay here.
#[derive(Debug)]
pub struct LinkTopDown<O = AdamW> {
    links: Links<O>,
    alternating: bool,
}

impl LinkTopDown {
    /// With Adam for each layer, for nodes with that many features.
    ///
    /// # Errors
    /// As [`LinkForward::new`].
    pub fn new(
        loss: LinkLoss,
        alternating: bool,
        config: ForwardGnnConfig,
        features: usize,
        vars: &SeededVars,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let inputs = widths(&config, features, 0);
        let make = default_optimizer(&config);
        let links = Links::new(loss, config, features, &inputs, vars, (dtype, device), make)?;
        Ok(Self { links, alternating })
    }
}

impl<O: Optimizer> LinkTopDown<O> {
    /// The layers.
    pub fn layers(&self) -> &[ForwardLayer<O>] {
        &self.links.layers
    }

    /// Trains all layers for a number of time steps. A fit that was stopped starts anew.
    ///
    /// # Errors
    /// As [`LinkForward::fit`].
    pub fn fit(&mut self, task: &LinkTask<'_>, observer: &mut Observer<'_>) -> Result<FitReport> {
        let graph = &task.split.train.message_graph;
        self.links.check(graph, task.x)?;
        let (ends, known) = self.links.part(&task.split.train)?;
        let (val_ends, val_known) = self.links.part(&task.split.val)?;
        let targets = self.links.targets(&known)?;
        let blank = self.states(graph, task.x)?;
        let Self { links, .. } = self;
        let (config, loss) = (links.config, links.loss);
        let mut states = blank.clone();
        states.settle(&links.layers, graph, 0, |_, _| Ok(()))?;
        let validate = |layers: &[ForwardLayer<O>]| {
            let scores = mean_probabilities(layers, &config, loss, &blank, graph, &val_ends)?;
            auc(&scores, &val_known)
        };
        let step = |layers: &mut [ForwardLayer<O>]| {
            let mut steps: Vec<LocalStep> = Vec::new();
            states.update(|layer, x| {
                let input = LinkInput {
                    input: layers[layer].prepare(graph, x, false)?,
                    ends: ends.clone(),
                    targets: targets.clone(),
                    loss,
                };
                let step = layers[layer].step(&input)?;
                let output = step.output.clone();
                steps.push(step);
                Ok(output)
            })?;
            Ok(steps)
        };
        time_steps(&mut links.layers, &config, observer, step, validate)
    }

    fn states(&self, graph: &Graph, x: &Features) -> Result<States> {
        let links = &self.links;
        let size = (graph.num_nodes(), links.config.hidden);
        let zero = Tensor::zeros(size, links.dtype, &links.device)?;
        let bottom = x.normalize_l2(NORM_EPS)?;
        Ok(States {
            alternating: self.alternating,
            ..States::new(bottom, None, zero, links.config.layers)
        })
    }

    /// The probability `[pairs]` of an edge between the nodes of each pair: the mean over layers and
    /// late updates.
    ///
    /// # Errors
    /// As [`LinkForward::score`].
    pub fn score(&self, graph: &Graph, x: &Features, pairs: &[(u32, u32)]) -> Result<Tensor> {
        let links = &self.links;
        links.check(graph, x)?;
        let ends = links.ends(graph, pairs)?;
        let states = self.states(graph, x)?;
        mean_probabilities(
            &links.layers,
            &links.config,
            links.loss,
            &states,
            graph,
            &ends,
        )
    }
}

fn mean_probabilities<O: Optimizer>(
    layers: &[ForwardLayer<O>],
    config: &ForwardGnnConfig,
    loss: LinkLoss,
    states: &States,
    graph: &Graph,
    [u, v]: &[Tensor; 2],
) -> Result<Tensor> {
    let mut scores = Vec::new();
    let steps = config.inference_steps;
    states
        .clone()
        .settle(layers, graph, steps, |step, states| {
            if step >= config.read_out_from {
                for z in states {
                    scores.push(sigmoid(&loss.logits(z, u, v)?)?);
                }
            }
            Ok(())
        })?;
    Ok(Tensor::stack(&scores, 0)?.mean(0)?)
}

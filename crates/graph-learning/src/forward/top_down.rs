//! Single-forward with signals from above: to a layer's input, or to its loss.

use super::augment::AugmentedGraph;
use super::config::{AppendLabel, ForwardGnnConfig};
use super::fit::{require_finite_loss, tell, Best, FitReport, LayerReport, Observer, Progress};
use super::layer::{norm, ForwardLayer, Labeled, SingleInput, TopLossInput, NORM_EPS};
use super::node::{accuracy, default_optimizer, fitted, rows, NodeShape, Stack};
use crate::graph::Graph;
use crate::io::NodeData;
use crate::sparse::Features;
use crate::{Error, RandomStream, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::Optimizer;
use nn::init::SeededVars;
use optim::local::{LocalLayer, LocalStep};
use optim::AdamW;
use std::time::Instant;
use tensor_core::params::Snapshot;

/// The states between layers that hear the one below and the one above.
#[derive(Debug, Clone)]
pub(crate) struct States {
    /// The normalized features.
    pub bottom: Features,
    /// One for each layer.
    pub layers: Vec<Tensor>,
    /// What the top layer hears from above.
    pub top: Option<Tensor>,
    pub alternating: bool,
}

impl States {
    /// Zeros for every layer.
    pub fn new(bottom: Features, top: Option<Tensor>, zero: Tensor, count: usize) -> Self {
        Self {
            bottom,
            layers: vec![zero; count],
            top,
            alternating: false,
        }
    }

    /// `[norm(state below) | norm(state above)]`.
    fn input(&self, layer: usize) -> Result<Features> {
        let below = match layer {
            0 => self.bottom.clone(),
            _ => Features::Dense(norm(&self.layers[layer - 1])?),
        };
        match self.layers.get(layer + 1).or(self.top.as_ref()) {
            Some(above) => below.append_columns(&norm(above)?),
            None => Ok(below),
        }
    }

    /// From the bottom to the top with zeros in place of the state above.
    pub fn bottom_up(
        &mut self,
        mut run: impl FnMut(usize, &Features) -> Result<Tensor>,
    ) -> Result<()> {
        let top = self.top.take();
        self.top = top.as_ref().map(Tensor::zeros_like).transpose()?;
        let zero = self.layers.iter().map(Tensor::zeros_like);
        self.layers = zero.collect::<candle_core::Result<_>>()?;
        for layer in 0..self.layers.len() {
            self.layers[layer] = run(layer, &self.input(layer)?)?;
        }
        self.top = top;
        Ok(())
    }

    /// One update of every layer: all from the old states, or layers 0, 2, .. first and then the
    /// others from what these became.
    pub fn update(
        &mut self,
        mut run: impl FnMut(usize, &Features) -> Result<Tensor>,
    ) -> Result<()> {
        let count = self.layers.len();
        let phases = match self.alternating {
            true => vec![
                (0..count).step_by(2).collect::<Vec<_>>(),
                (1..count).step_by(2).collect(),
            ],
            false => vec![(0..count).collect()],
        };
        for phase in phases {
            let mut fresh = Vec::with_capacity(phase.len());
            for layer in &phase {
                fresh.push(run(*layer, &self.input(*layer)?)?);
            }
            for (layer, state) in phase.into_iter().zip(fresh) {
                self.layers[layer] = state;
            }
        }
        Ok(())
    }

    /// The states after a pass upwards and each of `steps` updates without learning, counted from 0.
    pub fn settle<O: Optimizer>(
        &mut self,
        layers: &[ForwardLayer<O>],
        graph: &Graph,
        steps: usize,
        mut read: impl FnMut(usize, &[Tensor]) -> Result<()>,
    ) -> Result<()> {
        let run = |layer: usize, x: &Features| -> Result<Tensor> {
            let input = layers[layer].prepare(graph, x, false)?;
            Ok(layers[layer].output(&input)?.detach())
        };
        self.bottom_up(run)?;
        for step in 0..steps {
            self.update(run)?;
            read(step, &self.layers)?;
        }
        Ok(())
    }
}

/// Runs time steps with looks at validation data and the best weights of all layers.
pub(crate) fn time_steps<O: Optimizer>(
    layers: &mut [ForwardLayer<O>],
    config: &ForwardGnnConfig,
    observer: &mut Observer<'_>,
    mut step: impl FnMut(&mut [ForwardLayer<O>]) -> Result<Vec<LocalStep>>,
    validate: impl Fn(&[ForwardLayer<O>]) -> Result<f64>,
) -> Result<FitReport> {
    let start = Instant::now();
    let mut best = Best::new(config);
    let (mut epochs, mut peak_bytes) = (0, 0);
    for epoch in 0..config.epochs {
        let steps = step(layers)?;
        for one in &steps {
            require_finite_loss(one.loss)?;
            peak_bytes = peak_bytes.max(one.held_bytes);
        }
        epochs = epoch + 1;
        let loss = steps.iter().map(|s| s.loss).sum::<f64>() / steps.len().max(1) as f64;
        let (mut validation, mut done) = (None, false);
        if best.looks(epoch) {
            let score = validate(layers)?;
            validation = Some(score);
            done = best.take(score, || {
                layers
                    .iter()
                    .map(ForwardLayer::snapshot)
                    .collect::<Result<Vec<Snapshot>>>()
            })?;
        }
        let layer = 0;
        tell(
            observer,
            Progress {
                layer,
                epoch,
                loss,
                validation,
            },
        )?;
        if done {
            break;
        }
    }
    let best_validation = best.score();
    best.restore(&layers.iter().collect::<Vec<_>>())?;
    let report = LayerReport {
        epochs,
        best_validation,
        seconds: start.elapsed().as_secs_f64(),
        peak_bytes,
    };
    Ok(FitReport {
        per_layer: vec![report],
    })
}

/// Single-forward whose layers also hear the state above them (T2I); the top layer hears the labels.
/// All layers are trained together, one local step each in a time step. See the
/// [module](super) page.
#[derive(Debug)]
pub struct TopDownToInput<O = AdamW> {
    stack: Stack<O>,
    alternating: bool,
    graph: Option<AugmentedGraph>,
}

impl TopDownToInput {
    /// With Adam for each layer. `alternating` updates layers 0, 2, .. before the others.
    ///
    /// # Errors
    /// Those of [`ForwardGnnConfig::validate`], and of the layers.
    pub fn new(
        alternating: bool,
        config: ForwardGnnConfig,
        shape: NodeShape,
        vars: &SeededVars,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let make = default_optimizer(&config);
        Self::with_optimizer(alternating, config, shape, vars, dtype, device, make)
    }
}

/// Input widths of layers that hear both neighbors; `top` is the width above the last.
pub(crate) fn widths(config: &ForwardGnnConfig, bottom: usize, top: usize) -> Vec<usize> {
    let mut sizes = vec![bottom];
    sizes.extend(std::iter::repeat_n(config.hidden, config.layers));
    sizes.push(top);
    sizes.windows(3).map(|w| w[0] + w[2]).collect()
}

impl<O: Optimizer> TopDownToInput<O> {
    /// With an optimizer of your own for each layer, made from the layer's variables.
    ///
    /// # Errors
    /// As [`new`](TopDownToInput::new).
    pub fn with_optimizer(
        alternating: bool,
        config: ForwardGnnConfig,
        shape: NodeShape,
        vars: &SeededVars,
        dtype: DType,
        device: &Device,
        make: impl FnMut(Vec<(String, Var)>) -> Result<O>,
    ) -> Result<Self> {
        require_no_labels_above(&config)?;
        let bottom = match config.append_label {
            AppendLabel::None => shape.features,
            _ => shape.features + shape.classes,
        };
        let widths = widths(&config, bottom, shape.classes);
        Ok(Self {
            stack: Stack::new(config, shape, &widths, vars, dtype, device, make)?,
            alternating,
            graph: None,
        })
    }

    /// The layers.
    pub fn layers(&self) -> &[ForwardLayer<O>] {
        &self.stack.layers
    }

    /// Trains all layers for a number of time steps. A fit that was stopped starts anew.
    ///
    /// # Errors
    /// As [`SingleForward::fit`](super::SingleForward::fit).
    pub fn fit(
        &mut self,
        data: &NodeData,
        rng: &RandomStream,
        observer: &mut Observer<'_>,
    ) -> Result<FitReport> {
        let stack = &mut self.stack;
        let (split, graph, labeled) = stack.begin(data, rng)?;
        let mut states = states(stack, &graph, self.alternating)?;
        let config = stack.config;
        states.settle(&stack.layers, &graph.graph, 0, |_, _| Ok(()))?;
        let validate = |layers: &[ForwardLayer<O>]| {
            let scores = settled(
                layers,
                &config,
                &states_of(&graph, self.alternating, &config)?,
                &graph,
                &labeled,
            )?;
            accuracy(&scores, &split.val, &data.y)
        };
        let step = |layers: &mut [ForwardLayer<O>]| {
            input_step(layers, &mut states, &graph.graph, &labeled)
        };
        let report = time_steps(&mut stack.layers, &config, observer, step, validate)?;
        self.graph = Some(graph);
        Ok(report)
    }

    /// Class probabilities `[nodes, C]`: the mean over all layers and the updates from
    /// [`read_out_from`](ForwardGnnConfig::read_out_from) on.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] before a fit and for nodes that do not exist.
    pub fn predict_proba(&self, nodes: &[u32]) -> Result<Tensor> {
        let (stack, graph) = (&self.stack, fitted(&self.graph)?);
        let labeled = stack.labeled(&[], &[], graph)?;
        let states = states(stack, graph, self.alternating)?;
        rows(
            &settled(&stack.layers, &stack.config, &states, graph, &labeled)?,
            nodes,
        )
    }
}

fn require_no_labels_above(config: &ForwardGnnConfig) -> Result<()> {
    match config.append_label {
        AppendLabel::All => Err(Error::unsupported(
            "AppendLabel::All",
            "by top-down models, whose upper layers have two neighbors; use Input",
        )),
        _ => Ok(()),
    }
}

fn states<O: Optimizer>(
    stack: &Stack<O>,
    graph: &AugmentedGraph,
    alternating: bool,
) -> Result<States> {
    states_of(graph, alternating, &stack.config)
}

fn states_of(
    graph: &AugmentedGraph,
    alternating: bool,
    config: &ForwardGnnConfig,
) -> Result<States> {
    let size = (graph.real + graph.classes, config.hidden);
    let zero = Tensor::zeros(size, graph.one_hot.dtype(), graph.one_hot.device())?;
    let bottom = graph.x.normalize_l2(NORM_EPS)?;
    let top = Some(graph.one_hot.clone());
    Ok(States {
        alternating,
        ..States::new(bottom, top, zero, config.layers)
    })
}

/// One time step of learning: the state of a layer becomes its output before its own step.
pub(crate) fn input_step<O: Optimizer>(
    layers: &mut [ForwardLayer<O>],
    states: &mut States,
    graph: &Graph,
    labeled: &Labeled,
) -> Result<Vec<LocalStep>> {
    let mut steps: Vec<Option<LocalStep>> = vec![None; layers.len()];
    states.update(|layer, x| {
        let input = SingleInput {
            input: layers[layer].prepare(graph, x, false)?,
            labeled: labeled.clone(),
        };
        let step = layers[layer].step(&input)?;
        let output = step.output.clone();
        steps[layer] = Some(step);
        Ok(output)
    })?;
    Ok(steps.into_iter().flatten().collect())
}

/// The mean of class probabilities over layers and late updates.
fn settled<O: Optimizer>(
    layers: &[ForwardLayer<O>],
    config: &ForwardGnnConfig,
    states: &States,
    graph: &AugmentedGraph,
    labeled: &Labeled,
) -> Result<Tensor> {
    let mut sum = graph.one_hot.narrow(0, 0, graph.real)?.zeros_like()?;
    let mut count = 0;
    let steps = config.inference_steps;
    states
        .clone()
        .settle(layers, &graph.graph, steps, |step, states| {
            if step >= config.read_out_from {
                for z in states {
                    sum = (&sum + labeled.probabilities(z)?)?;
                    count += 1;
                }
            }
            Ok(())
        })?;
    Ok((sum / f64::from(count.max(1)))?)
}

/// Single-forward whose loss is taken of the mean of a layer's output and the states above (T2L).
/// All layers are trained together and their states are replaced at the end of a time step, so that
/// they could run side by side.
#[derive(Debug)]
pub struct TopDownToLoss<O = AdamW> {
    stack: Stack<O>,
    consistent: bool,
    graph: Option<AugmentedGraph>,
}

impl TopDownToLoss {
    /// With Adam for each layer. `consistent` normalizes what a layer hears in the pass upwards too;
    /// without it, that pass takes raw features and outputs as the published code does, unlike its
    /// training.
    ///
    /// # Errors
    /// Those of [`ForwardGnnConfig::validate`], and of the layers.
    pub fn new(
        consistent: bool,
        config: ForwardGnnConfig,
        shape: NodeShape,
        vars: &SeededVars,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let make = default_optimizer(&config);
        Self::with_optimizer(consistent, config, shape, vars, dtype, device, make)
    }
}

impl<O: Optimizer> TopDownToLoss<O> {
    /// With an optimizer of your own for each layer, made from the layer's variables.
    ///
    /// # Errors
    /// As [`new`](TopDownToLoss::new).
    pub fn with_optimizer(
        consistent: bool,
        config: ForwardGnnConfig,
        shape: NodeShape,
        vars: &SeededVars,
        dtype: DType,
        device: &Device,
        make: impl FnMut(Vec<(String, Var)>) -> Result<O>,
    ) -> Result<Self> {
        require_no_labels_above(&config)?;
        let widths = Stack::<O>::widths(&config, shape, config.append_label);
        Ok(Self {
            stack: Stack::new(config, shape, &widths, vars, dtype, device, make)?,
            consistent,
            graph: None,
        })
    }

    /// The layers.
    pub fn layers(&self) -> &[ForwardLayer<O>] {
        &self.stack.layers
    }

    /// Trains all layers for a number of time steps. A fit that was stopped starts anew.
    ///
    /// # Errors
    /// As [`SingleForward::fit`](super::SingleForward::fit).
    pub fn fit(
        &mut self,
        data: &NodeData,
        rng: &RandomStream,
        observer: &mut Observer<'_>,
    ) -> Result<FitReport> {
        let stack = &mut self.stack;
        let (split, graph, labeled) = stack.begin(data, rng)?;
        let config = stack.config;
        let bottom = graph.x.normalize_l2(NORM_EPS)?;
        let consistent = self.consistent;
        let mut states = upward(&stack.layers, &graph, consistent)?;
        let validate = |layers: &[ForwardLayer<O>]| {
            let scores = mean_scores(layers, &graph, &labeled, consistent)?;
            accuracy(&scores, &split.val, &data.y)
        };
        let step = |layers: &mut [ForwardLayer<O>]| {
            loss_step(
                layers,
                &bottom,
                &mut states,
                &graph.graph,
                &labeled,
                config.grad_clip,
            )
        };
        let report = time_steps(&mut stack.layers, &config, observer, step, validate)?;
        self.graph = Some(graph);
        Ok(report)
    }

    /// Class probabilities `[nodes, C]`: the mean over layers.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] before a fit and for nodes that do not exist.
    pub fn predict_proba(&self, nodes: &[u32]) -> Result<Tensor> {
        let (stack, graph) = (&self.stack, fitted(&self.graph)?);
        let labeled = stack.labeled(&[], &[], graph)?;
        rows(
            &mean_scores(&stack.layers, graph, &labeled, self.consistent)?,
            nodes,
        )
    }
}

/// The normalized output of each layer in a pass upwards.
pub(crate) fn upward<O: Optimizer>(
    layers: &[ForwardLayer<O>],
    graph: &AugmentedGraph,
    consistent: bool,
) -> Result<Vec<Tensor>> {
    let mut x = match consistent {
        true => graph.x.normalize_l2(NORM_EPS)?,
        false => graph.x.clone(),
    };
    let mut states = Vec::with_capacity(layers.len());
    for layer in layers {
        let z = layer
            .output(&layer.prepare(&graph.graph, &x, false)?)?
            .detach();
        let state = norm(&z)?;
        x = Features::Dense(if consistent { state.clone() } else { z });
        states.push(state);
    }
    Ok(states)
}

/// The states above layer `j`, whose own is `states[j]`.
fn above(states: &[Tensor], layer: usize) -> Vec<Tensor> {
    states.iter().skip(layer + 1).cloned().collect()
}

/// One time step of learning; all states are replaced at its end.
pub(crate) fn loss_step<O: Optimizer>(
    layers: &mut [ForwardLayer<O>],
    bottom: &Features,
    states: &mut Vec<Tensor>,
    graph: &Graph,
    labeled: &Labeled,
    clip: f64,
) -> Result<Vec<LocalStep>> {
    let (mut fresh, mut steps) = (Vec::new(), Vec::new());
    for (index, layer) in layers.iter_mut().enumerate() {
        let input = loss_input(layer, index, bottom, states, graph, labeled, clip)?;
        let step = layer.step(&input)?;
        fresh.push(norm(&step.output)?);
        steps.push(step);
    }
    *states = fresh;
    Ok(steps)
}

/// What layer `index` hears, and what its loss does.
pub(crate) fn loss_input<O: Optimizer>(
    layer: &ForwardLayer<O>,
    index: usize,
    bottom: &Features,
    states: &[Tensor],
    graph: &Graph,
    labeled: &Labeled,
    clip: f64,
) -> Result<TopLossInput> {
    let x = match index {
        0 => bottom.clone(),
        _ => Features::Dense(states[index - 1].clone()),
    };
    Ok(TopLossInput {
        input: layer.prepare(graph, &x, false)?,
        labeled: labeled.clone(),
        above: above(states, index),
        clip,
    })
}

fn mean_scores<O: Optimizer>(
    layers: &[ForwardLayer<O>],
    graph: &AugmentedGraph,
    labeled: &Labeled,
    consistent: bool,
) -> Result<Tensor> {
    let states = upward(layers, graph, consistent)?;
    let bottom = graph.x.normalize_l2(NORM_EPS)?;
    let mut sum = graph.one_hot.narrow(0, 0, graph.real)?.zeros_like()?;
    for (index, layer) in layers.iter().enumerate() {
        let input = loss_input(layer, index, &bottom, &states, &graph.graph, labeled, 1.0)?;
        let output = layer.output(&input.input)?.detach();
        let mean = TopLossInput::representation(&output, &input.above)?;
        sum = (sum + labeled.probabilities(&mean)?)?;
    }
    Ok((sum / layers.len() as f64)?)
}

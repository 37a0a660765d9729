//! Augmentation, local losses, gradients and steps, top-down states and link logits.

use super::{compare_gradients, edge_list, indices, tensor, var};
use crate::forward::layer::{norm, GoodnessInput, Labeled, LinkInput, SingleInput, NORM_EPS};
use crate::forward::node::Stack;
use crate::forward::top_down::{input_step, loss_input, loss_step, upward, States};
use crate::forward::{
    adam, AppendLabel, AugDirection, AugmentedGraph, ConvKind, ForwardForward, ForwardGnnConfig,
    ForwardLayer, GraphAugmenter, LabelCarrier, LinkLoss, NodeShape,
};
use crate::graph::Graph;
use crate::sparse::Features;
use crate::{RandomStream, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::VarMap;
use nn::goodness::goodness;
use nn::init::SeededVars;
use optim::local::LocalLayer;
use optim::AdamW;
use std::sync::PoisonError;
use tensor_core::verify::{Reference, Tolerance};

const TOLERANCE: Tolerance = Tolerance::Mixed(1e-9);

/// What all checks share.
struct Setup {
    graph: Graph,
    x: Features,
    y: Vec<u32>,
    train: Vec<u32>,
    drawn: Tensor,
    config: ForwardGnnConfig,
    attention: ConvKind,
}

/// Checks every tensor of the file.
///
/// # Errors
/// An error when the file lacks an input; a difference is a failed comparison instead.
pub fn forward_gnn(reference: &mut Reference) -> Result<()> {
    let setup = Setup::read(reference)?;
    augmentation(reference, &setup)?;
    let single = reference.cases("_out");
    for case in single.iter().filter(|c| c.starts_with("sf_")) {
        single_forward(reference, &setup, case)?;
    }
    forward_forward(reference, &setup)?;
    inference(reference, &setup)?;
    to_loss(reference, &setup)?;
    to_input(reference, &setup)?;
    links(reference, &setup)
}

/// Variables by name, and the names of the same tensors in the file.
type Named = Vec<(String, String, Var)>;

impl Setup {
    fn read(reference: &mut Reference) -> Result<Self> {
        let x = tensor(reference, "x")?;
        let graph = edge_list(reference, "edge_index", x.dims()[0])?;
        let mask = reference.input("train_mask")?.values;
        let train = (0..mask.len()).filter(|v| mask[*v] != 0.0);
        let config = ForwardGnnConfig {
            lr: reference.number("lr")?,
            weight_decay: reference.number("weight_decay")?,
            temperature: reference.number("temperature")?,
            theta: reference.number("theta")?,
            grad_clip: reference.number("grad_max_norm")?,
            patience: 0,
            ..ForwardGnnConfig::default()
        };
        Ok(Self {
            graph,
            x: x.into(),
            y: indices(reference, "y")?,
            train: train.map(|v| v as u32).collect(),
            drawn: tensor(reference, "virtual_feats")?,
            config,
            attention: ConvKind::Gat {
                heads: reference.number("gat_heads")?,
                negative_slope: reference.number("gat_negative_slope")?,
            },
        })
    }

    fn classes(&self) -> usize {
        self.drawn.dims()[0]
    }

    fn shape(&self) -> Result<NodeShape> {
        Ok(NodeShape {
            features: self.x.dims()?.1,
            classes: self.classes(),
        })
    }

    fn augmenter(&self, append: AppendLabel) -> Result<GraphAugmenter> {
        let direction = AugDirection::Both;
        let (graph, x, c) = (&self.graph, &self.x, self.classes());
        GraphAugmenter::new(graph, x, c, direction, append, &self.drawn)
    }

    fn augmented(&self, labels: &[u32]) -> Result<AugmentedGraph> {
        self.augmenter(AppendLabel::None)?
            .augment(labels, &self.train, None)
    }

    fn labeled(&self, graph: &AugmentedGraph) -> Result<Labeled> {
        let size = (graph.real, graph.classes);
        let t = self.config.temperature;
        Labeled::new(&graph.connected, &self.y, size, t, &Device::Cpu)
    }

    /// Layers of this kind over variables that exist already.
    fn stack(&self, conv: ConvKind, named: &Named) -> Result<Stack<AdamW>> {
        let (vars, config, widths) = given(conv, self.config, named)?;
        let make = |params| adam(params, self.config.lr, self.config.weight_decay);
        Stack::new(
            config,
            self.shape()?,
            &widths,
            &vars,
            DType::F64,
            &Device::Cpu,
            make,
        )
    }
}

/// The set of variables, the configuration of their widths, and the input width of each layer.
fn given(
    conv: ConvKind,
    config: ForwardGnnConfig,
    named: &Named,
) -> Result<(SeededVars, ForwardGnnConfig, Vec<usize>)> {
    let map = VarMap::new();
    let (mut widths, mut hidden) = (Vec::new(), 0);
    for (name, _, var) in named {
        if let [outputs, inputs] = *var.dims() {
            if !name.ends_with("lin_r.weight") {
                widths.push(inputs);
                hidden = outputs;
            }
        }
        let mut data = map.data().lock().unwrap_or_else(PoisonError::into_inner);
        data.insert(name.clone(), var.clone());
    }
    let config = ForwardGnnConfig {
        conv,
        hidden,
        layers: widths.len(),
        ..config
    };
    let vars = SeededVars::new(&RandomStream::new(0)).with_varmap(map);
    Ok((vars, config, widths))
}

/// The graph convolutions `PREFIX_W0, PREFIX_b0, ..` of the file.
fn gcn_layers(reference: &mut Reference, prefix: &str) -> Result<Named> {
    let mut named = Named::new();
    for layer in 0.. {
        let weight = format!("{prefix}_W{layer}");
        if !reference.has(&weight) {
            break;
        }
        let bias = format!("{prefix}_b{layer}");
        for (name, key) in [("lin.weight", weight), ("bias", bias)] {
            let var = var(reference, &key)?;
            named.push((format!("layers.{layer}.{name}"), key, var));
        }
    }
    Ok(named)
}

fn augmentation(reference: &mut Reference, setup: &Setup) -> Result<()> {
    let augmenter = setup.augmenter(AppendLabel::Input)?;
    let graph = augmenter.augment(&setup.y, &setup.train, None)?;
    let exact = Tolerance::Mismatches(0);
    let ends = graph.graph.edge_index(&Device::Cpu)?;
    reference.compare_tensor("aug_edge_index", &ends, exact)?;
    let types: Vec<f64> = graph.edge_type.iter().map(|t| f64::from(*t)).collect();
    reference.compare("aug_edge_type", &types, exact)?;
    let x = graph.x.to_dense(&Device::Cpu)?;
    Ok(reference.compare_tensor("aug_x_label_input", &x, TOLERANCE)?)
}

fn single_forward(reference: &mut Reference, setup: &Setup, case: &str) -> Result<()> {
    let (kind, names): (_, &[&str]) = match case.trim_start_matches("sf_") {
        "gcn" => (ConvKind::Gcn, &["lin.weight", "bias"]),
        "sage" => (
            ConvKind::Sage,
            &["lin_l.weight", "lin_l.bias", "lin_r.weight"],
        ),
        "gat" => (
            setup.attention,
            &["lin.weight", "att_src", "att_dst", "bias"],
        ),
        other => {
            return Err(reference
                .bad(format!("unknown convolution `{other}`"))
                .into())
        }
    };
    let mut named = Named::new();
    for name in names {
        let key = name.replace('.', "_");
        let var = var(reference, &format!("{case}_{key}"))?;
        named.push((format!("layers.0.{name}"), key, var));
    }
    let mut stack = setup.stack(kind, &named)?;
    let graph = setup.augmented(&setup.y)?;
    let x = graph.x.normalize_l2(NORM_EPS)?;
    let layer = &mut stack.layers[0];
    let input = SingleInput {
        input: layer.prepare(&graph.graph, &x, true)?,
        labeled: setup.labeled(&graph)?,
    };
    let output = layer.forward(&input)?;
    let loss = layer.local_loss(&input, &output)?;
    let key = |part: &str, name: &str| format!("{case}_{part}_{name}");
    let grads: Vec<(String, &Var)> = named.iter().map(|(_, k, v)| (key("grad", k), v)).collect();
    compare_gradients(reference, &loss, &grads, TOLERANCE)?;
    let step = layer.step(&input)?;
    reference.compare_tensor(&format!("{case}_out"), &step.output, TOLERANCE)?;
    reference.compare(&format!("{case}_loss"), &[step.loss], TOLERANCE)?;
    for (_, name, var) in &named {
        reference.compare_tensor(&key("after", name), var, TOLERANCE)?;
    }
    Ok(())
}

/// The layer of `ff_W`, `ff_b`.
fn goodness_layer(reference: &mut Reference) -> Result<Named> {
    let (weight, bias) = (var(reference, "ff_W")?, var(reference, "ff_b")?);
    Ok(vec![
        ("layers.0.lin.weight".into(), "ff_W".into(), weight),
        ("layers.0.bias".into(), "ff_b".into(), bias),
    ])
}

fn forward_forward(reference: &mut Reference, setup: &Setup) -> Result<()> {
    let named = goodness_layer(reference)?;
    let stack = setup.stack(ConvKind::Gcn, &named)?;
    let layer = &stack.layers[0];
    let wrong = indices(reference, "ff_neg_y")?;
    let prepare = |labels: &[u32]| {
        let graph = setup.augmented(labels)?;
        layer.prepare(&graph.graph, &graph.x.normalize_l2(NORM_EPS)?, true)
    };
    let nodes = Tensor::from_slice(&setup.train, setup.train.len(), &Device::Cpu)?;
    let input = GoodnessInput {
        positive: prepare(&setup.y)?,
        negatives: vec![prepare(&wrong)?],
        nodes: nodes.clone(),
        theta: setup.config.theta,
    };
    let output = layer.forward(&input)?;
    let loss = layer.local_loss(&input, &output)?;
    reference.compare_tensor("ff_loss", &loss, TOLERANCE)?;
    let negative = layer.output(&input.negatives[0])?;
    let mut means = Vec::new();
    for z in [&output, &negative] {
        let logits = (goodness(&z.index_select(&nodes, 0)?)? - input.theta)?;
        means.push(logits.mean_all()?.to_scalar::<f64>()?);
    }
    reference.compare("ff_logit_means", &means, TOLERANCE)?;
    let grads = [
        ("ff_grad_W".to_string(), &named[0].2),
        ("ff_grad_b".to_string(), &named[1].2),
    ];
    compare_gradients(reference, &loss, &grads, TOLERANCE)
}

fn inference(reference: &mut Reference, setup: &Setup) -> Result<()> {
    let named = gcn_layers(reference, "ffe")?;
    let (vars, config, _) = given(ConvKind::Gcn, setup.config, &named)?;
    let model = ForwardForward::new(
        LabelCarrier::VirtualNodes,
        config,
        setup.shape()?,
        &vars,
        DType::F64,
        &Device::Cpu,
    )?;
    let augmenter = setup.augmenter(AppendLabel::None)?;
    let model = model.knowing(augmenter, setup.y.clone(), setup.train.clone());
    let n = setup.y.len() as u32;
    let others: Vec<u32> = (0..n).filter(|v| !setup.train.contains(v)).collect();
    let scores = model.goodness(&others, &[], None)?;
    Ok(reference.compare_tensor("ffe_goodness", &scores, TOLERANCE)?)
}

fn to_loss(reference: &mut Reference, setup: &Setup) -> Result<()> {
    let named = gcn_layers(reference, "t2l")?;
    let mut stack = setup.stack(ConvKind::Gcn, &named)?;
    let graph = setup.augmented(&setup.y)?;
    let labeled = setup.labeled(&graph)?;
    let bottom = graph.x.normalize_l2(NORM_EPS)?;
    let dense = bottom.to_dense(&Device::Cpu)?;
    reference.compare_tensor("t2l_state0", &dense, TOLERANCE)?;
    // The file's states are those of the published code.
    let mut states = upward(&stack.layers, &graph, false)?;
    let clip = setup.config.grad_clip;
    for (index, layer) in stack.layers.iter().enumerate() {
        reference.compare_tensor(
            &format!("t2l_state{}", index + 1),
            &states[index],
            TOLERANCE,
        )?;
        let input = loss_input(layer, index, &bottom, &states, &graph.graph, &labeled, clip)?;
        let mut grads = layer
            .local_loss(&input, &layer.forward(&input)?)?
            .backward()?;
        layer.adjust(&input, &mut grads)?;
        let weight = &named[2 * index].2;
        let zeros = weight.zeros_like()?;
        let grad = grads.get(weight).unwrap_or(&zeros);
        reference.compare_tensor(&format!("t2l_clipped_grad_W{index}"), grad, TOLERANCE)?;
    }
    let layers = &mut stack.layers;
    let steps = loss_step(layers, &bottom, &mut states, &graph.graph, &labeled, clip)?;
    compare_steps(reference, "t2l", &steps, &states)
}

fn compare_steps(
    reference: &mut Reference,
    prefix: &str,
    steps: &[optim::local::LocalStep],
    states: &[Tensor],
) -> Result<()> {
    let losses: Vec<f64> = steps.iter().map(|s| s.loss).collect();
    reference.compare(&format!("{prefix}_losses"), &losses, TOLERANCE)?;
    for (index, state) in states.iter().enumerate() {
        let name = format!("{prefix}_new_state{}", index + 1);
        reference.compare_tensor(&name, state, TOLERANCE)?;
    }
    Ok(())
}

fn to_input(reference: &mut Reference, setup: &Setup) -> Result<()> {
    let named = gcn_layers(reference, "t2i")?;
    let mut stack = setup.stack(ConvKind::Gcn, &named)?;
    let graph = setup.augmented(&setup.y)?;
    let labels = tensor(reference, "t2i_label_state")?;
    let zero = Tensor::zeros(
        (labels.dims()[0], stack.config.hidden),
        DType::F64,
        &Device::Cpu,
    )?;
    let bottom = graph.x.normalize_l2(NORM_EPS)?;
    let mut states = States {
        alternating: true,
        ..States::new(bottom, Some(labels), zero, stack.layers.len())
    };
    states.settle(&stack.layers, &graph.graph, 0, |_, _| Ok(()))?;
    for (index, state) in states.layers.iter().enumerate() {
        let name = format!("t2i_state{}", index + 1);
        reference.compare_tensor(&name, state, TOLERANCE)?;
    }
    let labeled = setup.labeled(&graph)?;
    let steps = input_step(&mut stack.layers, &mut states, &graph.graph, &labeled)?;
    compare_steps(reference, "t2i", &steps, &states.layers)
}

fn links(reference: &mut Reference, setup: &Setup) -> Result<()> {
    let named = goodness_layer(reference)?;
    let stack = setup.stack(ConvKind::Gcn, &named)?;
    let layer: &ForwardLayer = &stack.layers[0];
    let ends = indices(reference, "lp_edge_label_index")?;
    let (u, v) = ends.split_at(ends.len() / 2);
    let end = |ids: &[u32]| Tensor::from_slice(ids, ids.len(), &Device::Cpu);
    let x = norm(&setup.x.to_dense(&Device::Cpu)?)?;
    let input = LinkInput {
        input: layer.prepare(&setup.graph, &Features::Dense(x), true)?,
        ends: [end(u)?, end(v)?],
        targets: tensor(reference, "lp_edge_label")?,
        loss: LinkLoss::CrossEntropy,
    };
    let output = layer.forward(&input)?;
    let logits = input.loss.logits(&output, &input.ends[0], &input.ends[1])?;
    reference.compare_tensor("lp_logits", &logits, TOLERANCE)?;
    let loss = layer.local_loss(&input, &output)?;
    reference.compare_tensor("lp_loss", &loss, TOLERANCE)?;
    let grads = [("lp_grad_W".to_string(), &named[0].2)];
    compare_gradients(reference, &loss, &grads, TOLERANCE)
}

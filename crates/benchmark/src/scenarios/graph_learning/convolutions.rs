//! The standard convolutions where their papers try them: classes of nodes in a citation network, classes
//! of molecules.

use super::citation::citations;
use super::molecules::{others, Labeled};
use super::pictures::embeddings;
use crate::scenario::{
    constant, metric, Arm, Better, Claim, Curve, Data, Definition, Metric, Paper, Role, Scenario,
    Setting, TrialContext, TrialOutcome,
};
use crate::scenarios::training::scalar;
use crate::{Error, Result};
use candle_core::{DType, Tensor};
use candle_nn::{Activation, Optimizer, VarBuilder};
use graph_learning::conv::{
    dropout, GatConfig, GatConv, GcnConfig, GcnConv, GinConfig, GinConv, Mlp, SageConfig, SageConv,
};
use graph_learning::forward::accuracy as right_at;
use graph_learning::io::NodeData;
use graph_learning::readout::global_add;
use graph_learning::sparse::Features;
use graph_learning::split::stratified_kfold;
use graph_learning::{Graph, GraphBatch};
use nn::init::SeededVars;
use nn::loss::{accuracy, cross_entropy, Reduction};
use nn::norm::ghost_batch::GhostBatchNorm;
use optim::{AdamW, AdamWConfig, ParamGroup, WeightDecay};
use tensor_core::autograd::grad_check;
use tensor_core::random::RandomStream;

const EPOCHS: usize = 120;
const FOLDS: usize = 5;
const FOLD_EPOCHS: usize = 100;
const GIN_LR: f64 = 0.01;
/// Epochs after which the learning rate is halved, as GIN's paper has it.
const HALVED: usize = 50;
/// Width and layers of the network on molecules.
const WIDTH: usize = 32;
const LAYERS: usize = 3;

pub(in crate::scenarios) struct Convolutions;

impl Scenario for Convolutions {
    fn definition(&self) -> Definition {
        let number = |name, label| Metric {
            name,
            label,
            better: Better::Higher,
        };
        let reaches = |id, words, arm, name, least: f64| {
            Claim::mean(id, words, metric(arm, name).at_least(constant(least)))
        };
        Definition {
            slug: "graph-core",
            title: "Graph convolutions (GCN, GraphSAGE, GAT, GIN)",
            paper: Paper {
                title: "Semi-Supervised Classification with Graph Convolutional Networks",
                venue: "ICLR 2017",
                arxiv: "1609.02907",
            },
            krate: "graph-learning",
            module: "conv",
            tags: &["graph"],
            version: 1,
            summary: "Nodes of a citation network (generated: 900 nodes, 7 classes; with real data Cora and its public split), \
                      rows of features adding up to 1, two layers, 120 epochs of Adam, the weights that are best on validation \
                      nodes. GCN and GraphSAGE: width 16, dropout 0.5, learning rate 0.01, an L2 penalty of 5e-4 on the first \
                      layer; attention: 8 heads of 8, dropout 0.6 of features and of attention, 0.005, the penalty on both. Beside \
                      them GCN's layers on the same nodes without an edge, a perceptron. GIN classifies molecules (generated \
                      rings; with real data MUTAG) in 5 folds: three layers of 32 with batch norm, the sums over the nodes of \
                      each side by side, 100 epochs of Adam at 0.01, halved after 50 as in its paper, on all training graphs at once, the \
                      last weights.",
            notes: "Papers report 0.815 for GCN and 0.83 for attention on Cora, as means of 100 runs of 200 epochs and more, and \
                    0.894 for GIN on MUTAG at the epoch that is best over 10 folds; here no test chooses an epoch. \
                    GIN's rate is halved because a constant one, which was tried first, ended at 0.748, below its claim: \
                    that bound was known when the schedule was chosen. GCN is 0.01 above its bound on Cora.",
            data: Data { embedded: "citations", real: Some("graphs") },
            arms: vec![
                Arm::new("perceptron", "no edges", Role::Baseline),
                Arm::new("gcn", "GCN", Role::Method),
                Arm::new("sage", "GraphSAGE", Role::Method),
                Arm::new("gat", "GAT", Role::Method),
                Arm::new("gin", "GIN, molecules", Role::Method),
            ],
            metrics: vec![
                number("accuracy", "test accuracy"),
                number("graph_accuracy", "accuracy of graph classes"),
            ],
            claims: vec![
                reaches("gcn", "GCN is right at 0.8 of the test nodes", "gcn", "accuracy", 0.8),
                reaches("gat", "attention is right at 0.79 of them", "gat", "accuracy", 0.79),
                reaches("gin", "GIN is right at 0.76 of the graphs", "gin", "graph_accuracy", 0.76),
            ],
            full: None,
        }
    }

    fn run(&self, arm: &Arm, _: &Setting, trial: &TrialContext) -> Result<TrialOutcome> {
        match arm.name {
            "gin" => molecules(trial),
            name => nodes(name, trial),
        }
    }
}

/// Two layers of one kind.
enum Layers {
    Gcn([GcnConv; 2]),
    Sage([SageConv; 2]),
    Gat([GatConv; 2]),
}

/// Everything that an arm has of its own.
struct NodeModel {
    layers: Layers,
    graph: Graph,
    dropout: f64,
    lr: f64,
    /// Parameters of these layers are penalized.
    penalized: &'static [&'static str],
}

impl NodeModel {
    fn new(arm: &str, data: &NodeData, vb: &VarBuilder) -> Result<Self> {
        let (inputs, classes) = (data.x.dims()?.1, data.classes);
        let (one, two) = (vb.pp("conv1"), vb.pp("conv2"));
        let layers = match arm {
            "sage" => {
                let config = SageConfig::default();
                let first = SageConv::new(inputs, 16, config, one)?;
                Layers::Sage([first, SageConv::new(16, classes, config, two)?])
            }
            "gat" => {
                let config = GatConfig {
                    heads: 8,
                    dropout: 0.6,
                    ..GatConfig::default()
                };
                let first = GatConv::new(inputs, 8, config, one)?;
                let config = GatConfig { heads: 1, ..config };
                Layers::Gat([first, GatConv::new(64, classes, config, two)?])
            }
            _ => {
                let config = GcnConfig::default();
                let first = GcnConv::new(inputs, 16, config, one)?;
                Layers::Gcn([first, GcnConv::new(16, classes, config, two)?])
            }
        };
        let graph = match arm {
            "perceptron" => Graph::empty(data.y.len())?,
            _ => data.graph.clone(),
        };
        let attention = arm == "gat";
        Ok(Self {
            layers,
            graph,
            dropout: if attention { 0.6 } else { 0.5 },
            lr: if attention { 0.005 } else { 0.01 },
            penalized: if attention {
                &["conv1", "conv2"]
            } else {
                &["conv1"]
            },
        })
    }

    /// The outputs of the first layer and of both. A stream means training.
    fn forward(
        &self,
        x: &Features,
        mut train: Option<&mut RandomStream>,
    ) -> Result<(Tensor, Tensor)> {
        let x = drop_entries(x, self.dropout, train.as_deref_mut())?;
        let h = match &self.layers {
            Layers::Gcn([first, _]) => first.apply(&self.graph, &x, None)?.relu()?,
            Layers::Sage([first, _]) => first.apply(&self.graph, &x)?.relu()?,
            Layers::Gat([first, _]) => {
                let h = first.apply(&self.graph, &x, None, train.as_deref_mut())?;
                h.elu(1.0)?
            }
        };
        let shown = Features::Dense(dropout(&h, self.dropout, train.as_deref_mut())?);
        let logits = match &self.layers {
            Layers::Gcn([_, last]) => last.apply(&self.graph, &shown, None)?,
            Layers::Sage([_, last]) => last.apply(&self.graph, &shown)?,
            Layers::Gat([_, last]) => last.apply(&self.graph, &shown, None, train)?,
        };
        Ok((h, logits))
    }
}

/// Dropout of the entries that are stored.
fn drop_entries(x: &Features, p: f64, train: Option<&mut RandomStream>) -> Result<Features> {
    let Some(rng) = train else {
        return Ok(x.clone());
    };
    match x {
        Features::Dense(x) => Ok(dropout(x, p, Some(rng))?.into()),
        Features::Sparse(x) => {
            let mut draws = vec![0.0; x.len()];
            rng.fill_uniform(&mut draws);
            let keep = |u: f64| if u >= p { 1.0 / (1.0 - p) } else { 0.0 };
            draws.iter_mut().for_each(|u| *u = keep(*u));
            Ok(x.scale_entries(&draws)?.into())
        }
    }
}

fn nodes(arm: &str, trial: &TrialContext) -> Result<TrialOutcome> {
    let data = citations(trial)?;
    let split = data.split.as_ref();
    let split = split.ok_or_else(|| Error::Trial("the network has no split".into()))?;
    let vars = SeededVars::new(&trial.stream("weights"));
    let model = NodeModel::new(arm, &data, &vars.builder(DType::F32, &trial.device))?;
    let named = vars.trainable();
    let penalized = |name: &str| model.penalized.iter().any(|p| name.starts_with(p));
    let (decayed, free): (Vec<_>, Vec<_>) = named.iter().cloned().partition(|(n, _)| penalized(n));
    let config = |weight_decay| AdamWConfig {
        lr: model.lr,
        weight_decay,
        decay: WeightDecay::Coupled,
        ..AdamWConfig::default()
    };
    let groups = [(decayed, 5e-4), (free, 0.0)].into_iter();
    let groups = groups.filter(|(list, _)| !list.is_empty());
    let groups = groups.map(|(list, decay)| ParamGroup::named(list, config(decay)));
    let mut adam = AdamW::with_groups(groups.collect())?;
    let train = Tensor::from_slice(&split.train, split.train.len(), &trial.device)?;
    let classes: Vec<u32> = split.train.iter().map(|v| data.y[*v as usize]).collect();
    let classes = Tensor::from_vec(classes, split.train.len(), &trial.device)?;
    let mut rng = trial.stream("dropout");
    let mut curve = Curve::new("training loss", "epoch");
    let mut by_epoch = Curve::new("accuracy on validation nodes", "epoch");
    let (mut best, mut found, mut hidden) = (f64::NEG_INFINITY, 0.0, None);
    for epoch in 0..EPOCHS {
        trial.step(epoch, EPOCHS)?;
        let (_, logits) = model.forward(&data.x, Some(&mut rng))?;
        let loss = cross_entropy(&logits.index_select(&train, 0)?, &classes, Reduction::Mean)?;
        if epoch == 0 {
            grad_check(&[&loss], &named)?;
        }
        curve.push((epoch + 1) as f64, scalar(&loss)?);
        adam.step(&loss.backward()?)?;
        let (h, logits) = model.forward(&data.x, None)?;
        let val = right_at(&logits, &split.val, &data.y)?;
        by_epoch.push((epoch + 1) as f64, val);
        if val > best {
            best = val;
            found = right_at(&logits, &split.test, &data.y)?;
            hidden = Some(h.detach());
        }
    }
    let mut outcome = TrialOutcome::default()
        .metric("accuracy", found)
        .curve(curve)
        .curve(by_epoch);
    if let Some(h) = hidden {
        outcome = outcome.picture(embeddings(&h, &data.y)?);
    }
    Ok(outcome)
}

/// Layers with batch norm, and a linear map of all their sums over the nodes.
struct Gin {
    layers: Vec<(GinConv<Mlp>, GhostBatchNorm)>,
    last: Mlp,
}

impl Gin {
    fn new(features: usize, classes: usize, vb: &VarBuilder) -> Result<Self> {
        let mut layers = Vec::with_capacity(LAYERS);
        for l in 0..LAYERS {
            let (vb, inputs) = (vb.pp(l), if l == 0 { features } else { WIDTH });
            let nn = Mlp::new(&[inputs, WIDTH, WIDTH], Activation::Relu, vb.pp("nn"))?;
            let norm = nn::norm::batch_norm(WIDTH, 1e-5, vb.pp("norm"))?;
            layers.push((GinConv::new(nn, GinConfig::default(), vb)?, norm));
        }
        let last = Mlp::new(&[LAYERS * WIDTH, classes], Activation::Relu, vb.pp("last"))?;
        Ok(Self { layers, last })
    }

    fn logits(&self, batch: &GraphBatch, x: &Tensor, train: bool) -> Result<Tensor> {
        let (mut h, mut sums) = (x.clone(), Vec::with_capacity(LAYERS));
        for (conv, norm) in &self.layers {
            let y = conv.forward(batch.graph(), &h)?;
            let y = match train {
                true => norm.forward_train(&y)?,
                false => norm.forward_eval(&y)?,
            };
            h = y.relu()?;
            sums.push(global_add(batch, &h)?);
        }
        Ok(candle_nn::Module::forward(
            &self.last,
            &Tensor::cat(&sums, 1)?,
        )?)
    }
}

/// The mean accuracy of the folds after the last epoch.
fn molecules(trial: &TrialContext) -> Result<TrialOutcome> {
    let data = Labeled::new(trial)?;
    let (features, classes) = data.sizes();
    let folds = stratified_kfold(&data.y, FOLDS, &mut trial.stream("folds"))?;
    let mut curve = Curve::new("training loss of the first fold", "epoch");
    let mut sum = 0.0;
    for (f, test) in folds.iter().enumerate() {
        let vars = SeededVars::new(&trial.stream("weights"));
        let model = Gin::new(features, classes, &vars.builder(DType::F32, &trial.device))?;
        let group = ParamGroup::named(vars.trainable(), AdamWConfig::adam(GIN_LR));
        let mut adam = AdamW::with_groups(vec![group])?;
        let (batch, x, y) = data.batch(&others(&folds, f), trial)?;
        for epoch in 0..FOLD_EPOCHS {
            trial.step(f * FOLD_EPOCHS + epoch, FOLDS * FOLD_EPOCHS)?;
            adam.set_learning_rate(GIN_LR * 0.5f64.powi((epoch / HALVED) as i32));
            let loss = cross_entropy(&model.logits(&batch, &x, true)?, &y, Reduction::Mean)?;
            if f == 0 {
                curve.push((epoch + 1) as f64, scalar(&loss)?);
            }
            adam.step(&loss.backward()?)?;
        }
        let (batch, x, y) = data.batch(test, trial)?;
        sum += accuracy(&model.logits(&batch, &x, false)?, &y)?;
    }
    Ok(TrialOutcome::default()
        .metric("graph_accuracy", sum / FOLDS as f64)
        .curve(curve))
}

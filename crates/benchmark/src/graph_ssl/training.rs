//! Training in full or in parts, with stop rules, and what a step costs.

use super::tasks::{dot_auc, embedding_for_probe, kmeans_labels, probe};
use crate::scenarios::training::scalar;
use crate::{Error, Result};
use candle_nn::Optimizer;
use graph_learning::io::NodeData;
use graph_learning::metrics::normalized_mutual_information;
use graph_learning::sample::{partition, ClusterSampler, NeighborSampler};
use graph_learning::sparse::Features;
use graph_learning::split::LinkSplit;
use graph_learning::ssl::{GraphView, SslMethod};
use graph_learning::Graph;
use optim::local::held_bytes;
use optim::transform::clip_grad_norm;
use optim::{AdamW, AdamWConfig, ParamGroup, WeightDecay};
use serde::Serialize;
use std::time::Instant;
use tensor_core::params::{Params, Snapshot};
use tensor_core::random::RandomStream;

/// What a step sees of the graph.
#[derive(Debug, Clone, PartialEq)]
pub enum Regime {
    /// All of it.
    FullBatch,
    /// Sampled neighborhoods of all nodes in turn.
    NodeSampling {
        /// Neighbors at each step outwards.
        fanouts: Vec<usize>,
        /// Seeds of a step.
        batch: usize,
    },
    /// Unions of parts of a partition (label propagation, not METIS), which is capped at 32 nodes a
    /// part.
    SubgraphSampling {
        /// Parts.
        parts: usize,
        /// About as many nodes a step.
        batch: usize,
    },
}

impl Regime {
    /// How many nodes are embedded at a time after training in this regime; all for `None`.
    pub fn embedded(&self) -> Option<usize> {
        match self {
            Self::FullBatch => None,
            Self::NodeSampling { batch, .. } | Self::SubgraphSampling { batch, .. } => Some(*batch),
        }
    }

    /// Its name in tables.
    pub fn name(&self) -> String {
        match self {
            Self::FullBatch => "full".into(),
            Self::NodeSampling { batch, .. } => format!("nodes, {batch}"),
            Self::SubgraphSampling { batch, .. } => format!("subgraphs, {batch}"),
        }
    }
}

/// Which weights are kept.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum StopRule {
    /// The last ones.
    FixedEpochs,
    /// Those whose probe is best on the validation nodes.
    BestNodeClassification {
        /// Epochs between two looks.
        every: usize,
    },
    /// Those whose dot products are best on the validation links.
    BestLinkAuc {
        /// Epochs between two looks.
        every: usize,
    },
    /// Those whose clusters share most with the labels of the validation nodes.
    BestClustering {
        /// Epochs between two looks.
        every: usize,
    },
    /// The first whose loss was not beaten for a while.
    LossPlateau {
        /// Epochs without a smaller loss.
        patience: usize,
    },
}

impl StopRule {
    /// Its name in tables.
    pub fn name(self) -> String {
        match self {
            Self::FixedEpochs => "fixed".into(),
            Self::BestNodeClassification { .. } => "node classification".into(),
            Self::BestLinkAuc { .. } => "links".into(),
            Self::BestClustering { .. } => "clusters".into(),
            Self::LossPlateau { .. } => "loss".into(),
        }
    }
}

/// Settings of a training.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainConfig {
    /// Passes over the nodes; steps in the full regime.
    pub epochs: usize,
    /// Learning rate of Adam.
    pub lr: f64,
    /// L2 penalty in the gradient.
    pub weight_decay: f64,
    /// What a step sees.
    pub regime: Regime,
    /// Which weights are kept.
    pub stop: StopRule,
}

impl TrainConfig {
    /// The settings of a method: learning rates of the papers' order for some dozens of epochs.
    pub fn of(method: &str) -> Self {
        Self {
            epochs: 60,
            lr: match method {
                "bgrl" => 2e-3,
                "grace" | "gca" => 5e-3,
                "s2gae" | "ecl" => 5e-3,
                _ => 1e-3,
            },
            weight_decay: 0.0,
            regime: Regime::FullBatch,
            stop: StopRule::FixedEpochs,
        }
    }
}

/// What training cost.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Efficiency {
    /// Trained numbers with the optimizer's two moments.
    pub model_bytes: usize,
    /// Features and edges.
    pub data_bytes: usize,
    /// The most intermediate results that a step held for its backward pass.
    pub activation_bytes: usize,
    /// Seconds of all steps.
    pub seconds: f64,
    /// Edges of the views of all steps, per second.
    pub edges_per_second: f64,
}

impl Efficiency {
    /// Model, data and activations together.
    pub fn peak_bytes(&self) -> usize {
        self.model_bytes + self.data_bytes + self.activation_bytes
    }
}

/// What became of a training.
#[derive(Debug, Clone, Default)]
pub struct Trained {
    /// The mean loss of each epoch.
    pub losses: Vec<f64>,
    /// What it cost.
    pub efficiency: Efficiency,
}

/// Trains a method; `progress` is told the epoch and its loss.
///
/// # Errors
/// [`Error::Diverged`] for a loss that is not finite, and those of the method and of `progress`.
pub fn train(
    method: &mut dyn SslMethod,
    data: &NodeData,
    links: &LinkSplit,
    config: &TrainConfig,
    rng: &mut RandomStream,
    progress: &mut dyn FnMut(usize, f64) -> Result<()>,
) -> Result<Trained> {
    let named = method.params().to_vec();
    if named.is_empty() {
        return Ok(Trained::default());
    }
    let adam = AdamWConfig {
        lr: config.lr,
        weight_decay: config.weight_decay,
        decay: WeightDecay::Coupled,
        ..AdamWConfig::default()
    };
    let mut adam = AdamW::with_groups(vec![ParamGroup::named(named.clone(), adam)])?;
    let params = Params::new(named)?;
    let mut batches = Batches::new(&data.graph, &config.regime, rng)?;
    let mut keeper = Keeper::new(config);
    let mut trained = Trained {
        efficiency: Efficiency {
            model_bytes: 12 * params.numel(),
            data_bytes: data_bytes(data)?,
            ..Efficiency::default()
        },
        losses: Vec::new(),
    };
    let (mut step, mut edges) = (0, 0.0);
    for epoch in 0..config.epochs {
        let start = Instant::now();
        let (mut sum, mut count) = (0.0, 0.0);
        for batch in batches.epoch(data, rng)? {
            let view = batch.view(data);
            let loss = method.loss(&view, rng)?;
            let value = scalar(&loss)?;
            if !value.is_finite() {
                return Err(Error::Diverged { epoch, loss: value });
            }
            let held = held_bytes(&loss);
            let peak = &mut trained.efficiency.activation_bytes;
            *peak = (*peak).max(held);
            let mut grads = loss.backward()?;
            for prefix in method.clip_groups() {
                let own = params
                    .named()
                    .iter()
                    .filter(|(name, _)| name.starts_with(prefix));
                clip_grad_norm(&mut grads, &own.cloned().collect::<Vec<_>>(), 1.0)?;
            }
            adam.step(&grads)?;
            method.after_step(step)?;
            step += 1;
            sum += value;
            count += 1.0;
            edges += view.graph.num_edges() as f64;
        }
        trained.efficiency.seconds += start.elapsed().as_secs_f64();
        let loss = sum / f64::max(count, 1.0);
        trained.losses.push(loss);
        progress(epoch, loss)?;
        if keeper.look(epoch, loss, &*method, &params, (data, links), rng)? {
            break;
        }
    }
    keeper.restore(&params)?;
    trained.efficiency.edges_per_second = edges / trained.efficiency.seconds.max(1e-9);
    Ok(trained)
}

/// Bytes of features (`f32`, sparse ones with their column) and of the edge list.
fn data_bytes(data: &NodeData) -> Result<usize> {
    let features = match &data.x {
        Features::Sparse(x) => 8 * x.len(),
        Features::Dense(x) => x.elem_count() * x.dtype().size_in_bytes(),
    };
    Ok(features + 8 * data.graph.num_edges())
}

/// What the steps of an epoch see.
enum Batches {
    Full,
    Nodes {
        sampler: Box<NeighborSampler>,
        batch: usize,
    },
    Clusters(ClusterSampler),
}

/// All of the data, or a part.
enum Batch {
    Whole,
    Part(Graph, Features),
}

impl Batch {
    fn view<'a>(&'a self, data: &'a NodeData) -> GraphView<'a> {
        match self {
            Self::Whole => GraphView {
                graph: &data.graph,
                x: &data.x,
            },
            Self::Part(graph, x) => GraphView { graph, x },
        }
    }
}

impl Batches {
    fn new(graph: &Graph, regime: &Regime, rng: &mut RandomStream) -> Result<Self> {
        Ok(match regime {
            Regime::FullBatch => Self::Full,
            Regime::NodeSampling { fanouts, batch } => {
                let fanouts: Vec<Option<usize>> = fanouts.iter().copied().map(Some).collect();
                Self::Nodes {
                    sampler: Box::new(NeighborSampler::new(graph, &fanouts)?),
                    batch: (*batch).max(1),
                }
            }
            Regime::SubgraphSampling { parts, batch } => {
                let n = graph.num_nodes();
                let parts = (*parts).min(n / 32).max(1);
                let per_batch = (batch / (n / parts).max(1)).max(1);
                Self::Clusters(ClusterSampler::new(
                    partition(graph, parts, rng)?,
                    per_batch,
                )?)
            }
        })
    }

    fn epoch(&mut self, data: &NodeData, rng: &mut RandomStream) -> Result<Vec<Batch>> {
        match self {
            Self::Full => Ok(vec![Batch::Whole]),
            Self::Nodes { sampler, batch } => {
                let order = rng.permutation(data.graph.num_nodes())?;
                let mut parts = Vec::new();
                for seeds in order.chunks(*batch) {
                    let drawn = sampler.sample(seeds, rng)?;
                    let nodes = drawn.n_id.len();
                    // The outermost block holds the edges into every node but the last ring.
                    let Some(block) = drawn.blocks.first() else {
                        continue;
                    };
                    let (src, dst) = (block.graph.src(), block.graph.dst());
                    let graph = Graph::from_edges(nodes, src.to_vec(), dst.to_vec())?;
                    parts.push(Batch::Part(graph, data.x.select_rows(&drawn.n_id)?));
                }
                Ok(parts)
            }
            Self::Clusters(sampler) => {
                let unions = sampler.epoch(rng)?.into_iter();
                let part = |nodes: Vec<u32>| -> Result<Batch> {
                    let (graph, _) = data.graph.induced_subgraph(&nodes)?;
                    Ok(Batch::Part(graph, data.x.select_rows(&nodes)?))
                };
                unions.map(part).collect()
            }
        }
    }
}

/// Looks at a score now and then and keeps the best weights.
struct Keeper {
    rule: StopRule,
    /// Nodes that are embedded at a time.
    batch: Option<usize>,
    best: Option<(f64, Snapshot)>,
    since: usize,
}

impl Keeper {
    fn new(config: &TrainConfig) -> Self {
        Self {
            rule: config.stop,
            batch: config.regime.embedded(),
            best: None,
            since: 0,
        }
    }

    /// `true` when training is over.
    fn look(
        &mut self,
        epoch: usize,
        loss: f64,
        method: &dyn SslMethod,
        params: &Params,
        (data, links): (&NodeData, &LinkSplit),
        rng: &RandomStream,
    ) -> Result<bool> {
        let due = |every: usize| (epoch + 1).is_multiple_of(every.max(1));
        // A look draws from a part of the stream, so that it changes no later step.
        let rng = &mut rng.split("look");
        let embed = || method.embed(&data.graph, &data.x, self.batch);
        let score = match self.rule {
            StopRule::FixedEpochs => return Ok(false),
            StopRule::BestNodeClassification { every } if due(every) => {
                probe(&embedding_for_probe(&embed()?)?, data, 0.0, rng)?.val_accuracy
            }
            StopRule::BestLinkAuc { every } if due(every) => dot_auc(&embed()?, &links.val)?,
            StopRule::BestClustering { every } if due(every) => {
                let found = kmeans_labels(&embed()?, data.classes, rng)?;
                let split = data.split.as_ref();
                let split = split.ok_or_else(|| Error::Trial("the data has no split".into()))?;
                let at = |list: &[u32]| -> Vec<u32> {
                    split.val.iter().map(|v| list[*v as usize]).collect()
                };
                normalized_mutual_information(&at(&data.y), &at(&found))?
            }
            StopRule::LossPlateau { .. } => -loss,
            _ => return Ok(false),
        };
        if self.best.as_ref().is_none_or(|(best, _)| score > *best) {
            self.best = Some((score, params.snapshot()?));
            self.since = 0;
        } else {
            self.since += 1;
        }
        match self.rule {
            StopRule::LossPlateau { patience } => Ok(self.since >= patience),
            _ => Ok(false),
        }
    }

    fn restore(self, params: &Params) -> Result<()> {
        match self.best {
            Some((_, weights)) => Ok(params.restore(&weights)?),
            None => Ok(()),
        }
    }
}

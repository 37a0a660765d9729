//! Two-layer networks on random graphs: what `perf`, `peers` and the table of sizes train.

use super::Call;
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_nn::{Optimizer, VarBuilder};
use graph_learning::conv::{GatConfig, GatConv, GcnConfig, GcnConv, SageConfig, SageConv};
use graph_learning::generate::uniform_edges;
use graph_learning::sample::NeighborSampler;
use graph_learning::Graph;
use nn::init::SeededVars;
use nn::loss::{cross_entropy, Reduction};
use optim::{AdamW, AdamWConfig, ParamGroup};
use tensor_core::random::RandomStream;

/// A graph and a network on it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Size {
    /// Nodes.
    pub nodes: usize,
    /// Directed edges, at random.
    pub edges: usize,
    /// Features of a node.
    pub inputs: usize,
    /// Width between the layers.
    pub hidden: usize,
    /// Classes.
    pub classes: usize,
}

/// The convolution of both layers.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Kind {
    /// Graph convolution.
    Gcn,
    /// GraphSAGE, means.
    Sage,
    /// Attention, 8 heads and then one.
    Gat,
}

enum Layers {
    Gcn([GcnConv; 2]),
    Sage([SageConv; 2]),
    Gat([GatConv; 2]),
}

impl Layers {
    fn new(kind: Kind, size: Size, vb: VarBuilder) -> Result<Self> {
        let (first, last) = (vb.pp(0), vb.pp(1));
        let (inputs, hidden, classes) = (size.inputs, size.hidden, size.classes);
        Ok(match kind {
            Kind::Gcn => {
                let config = GcnConfig::default();
                Self::Gcn([
                    GcnConv::new(inputs, hidden, config, first)?,
                    GcnConv::new(hidden, classes, config, last)?,
                ])
            }
            Kind::Sage => {
                let config = SageConfig::default();
                Self::Sage([
                    SageConv::new(inputs, hidden, config, first)?,
                    SageConv::new(hidden, classes, config, last)?,
                ])
            }
            Kind::Gat => {
                let config = GatConfig {
                    heads: 8,
                    ..GatConfig::default()
                };
                let one = GatConfig::default();
                Self::Gat([
                    GatConv::new(inputs, hidden / 8, config, first)?,
                    GatConv::new(hidden, classes, one, last)?,
                ])
            }
        })
    }

    /// The graph of each layer may be a block of a sampled neighborhood.
    fn logits(&self, [one, two]: [&Graph; 2], x: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Self::Gcn([a, b]) => b.forward(two, &a.forward(one, x)?.relu()?)?,
            Self::Sage([a, b]) => b.forward(two, &a.forward(one, x)?.relu()?)?,
            Self::Gat([a, b]) => b.forward(two, &a.forward(one, x)?.relu()?)?,
        })
    }
}

/// A graph with labeled nodes, a network and its optimizer.
struct Task {
    graph: Graph,
    x: Tensor,
    y: Tensor,
    layers: Layers,
    adam: AdamW,
    stream: RandomStream,
}

impl Task {
    fn new(size: Size, kind: Kind) -> Result<Self> {
        let mut stream = RandomStream::new(0).split("graph networks");
        let graph = uniform_edges(size.nodes, size.edges, &mut stream)?;
        let device = &Device::Cpu;
        let x = stream.normal(0.0, 1.0, (size.nodes, size.inputs), DType::F32, device)?;
        let y: Vec<u32> = (0..size.nodes).map(|v| (v % size.classes) as u32).collect();
        let vars = SeededVars::new(&stream);
        let layers = Layers::new(kind, size, vars.builder(DType::F32, device))?;
        let config = AdamWConfig {
            weight_decay: 5e-4,
            ..AdamWConfig::adam(0.01)
        };
        Ok(Self {
            y: Tensor::from_vec(y, size.nodes, device)?,
            adam: AdamW::with_groups(vec![ParamGroup::named(vars.trainable(), config)])?,
            graph,
            x,
            layers,
            stream,
        })
    }

    fn step(&mut self, graphs: [&Graph; 2], x: &Tensor, y: &Tensor) -> Result<()> {
        let loss = cross_entropy(&self.layers.logits(graphs, x)?, y, Reduction::Mean)?;
        self.adam.step(&loss.backward()?)?;
        Ok(())
    }
}

/// An epoch on the whole graph: forward, backward and a step of Adam.
pub(crate) fn training_epoch(size: Size, kind: Kind) -> Result<Call<'static>> {
    let mut task = Task::new(size, kind)?;
    let (graph, x, y) = (task.graph.clone(), task.x.clone(), task.y.clone());
    Ok(Box::new(move || task.step([&graph, &graph], &x, &y)))
}

/// A step of GraphSAGE on the next `seeds` nodes, with as many neighbors as `fanouts` says.
pub(crate) fn sampled_step(size: Size, seeds: usize, fanouts: [usize; 2]) -> Result<Call<'static>> {
    let mut task = Task::new(size, Kind::Sage)?;
    let mut sampler = NeighborSampler::new(&task.graph, &fanouts.map(Some))?;
    let order = task.stream.permutation(size.nodes)?;
    let mut at = 0;
    Ok(Box::new(move || {
        let end = (at + seeds).min(order.len());
        let batch = sampler.sample(&order[at..end], &mut task.stream)?;
        at = if end == order.len() { 0 } else { end };
        let x = task.x.index_select(&batch.node_ids(&Device::Cpu)?, 0)?;
        let known = Tensor::from_slice(&batch.n_id[..batch.seeds], batch.seeds, &Device::Cpu)?;
        let y = task.y.index_select(&known, 0)?;
        let [one, two] = &*batch.blocks else {
            anyhow::bail!("{} blocks for two layers", batch.blocks.len());
        };
        task.step([&one.graph, &two.graph], &x, &y)
    }))
}

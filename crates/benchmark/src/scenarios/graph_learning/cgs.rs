//! Convergent graph solvers against message passing of fixed depth: potentials of networks larger
//! than those of training.

use super::molecules::{others, Labeled};
use crate::scenario::{
    metric, Arm, Better, Claim, Curve, Data, Definition, Metric, Paper, Role, Scenario, Setting,
    TrialContext, TrialOutcome,
};
use crate::scenarios::training::scalar;
use crate::Result;
use candle_core::{DType, Tensor};
use candle_nn::{Optimizer, VarBuilder};
use graph_learning::cgs::{
    conductance_network, CgsConfig, ConductanceNetwork, EncoderConfig, GraphCgs, Solver, StopRule,
};
use graph_learning::sparse::Reduce;
use graph_learning::split::stratified_kfold;
use graph_learning::{Graph, GraphBatch};
use nn::init::SeededVars;
use nn::loss::{accuracy, cross_entropy, Reduction};
use optim::{AdamW, AdamWConfig, ParamGroup};
use tensor_core::autograd::grad_check;
use tensor_core::random::RandomStream;

const LR: f64 = 2e-3;
const UPDATES: usize = 300;
/// Updates after which the training networks are replaced.
const RENEWED: usize = 30;
const GRAPHS: usize = 16;
const TEST_GRAPHS: usize = 8;
/// Sizes of the test networks; the first is a training size.
const SIZES: [usize; 3] = [50, 200, 800];
const ERRORS: [&str; 3] = ["mse_50", "mse_200", "mse_800"];

pub(in crate::scenarios) struct Cgs;

impl Scenario for Cgs {
    fn definition(&self) -> Definition {
        let arm = |name, label, role, layers: f64, gamma: f64| {
            Arm::new(name, label, role).fixed(&[("layers", layers), ("gamma", gamma)])
        };
        let error = |name, label| Metric {
            name,
            label,
            better: Better::Lower,
        };
        Definition {
            slug: "cgs",
            title: "Convergent graph solvers",
            paper: Paper {
                title: "Convergent Graph Solvers",
                venue: "ICLR 2022",
                arxiv: "2106.01680",
            },
            krate: "graph-learning",
            module: "cgs",
            tags: &["graph", "implicit"],
            version: 5,
            summary: "Electric potentials between two plates: points in the unit square joined by Delaunay's edges with \
                      random conductances. 300 updates on batches of 16 networks of 30 to 59 nodes, new ones every 30 \
                      updates; tested on 8 networks of each of 50, 200 and 800 nodes. One message-passing layer, three \
                      of them (with seven times the parameters), and one layer with 16 fixed points on top, gamma 0.5 \
                      and 0.9. Adam at 0.002 for all of them. The arm of classes predicts one \
                      label for a graph from the sum of its fixed points, in 5 folds: rings whose nitrogens carry oxygens \
                      against rings on which both hang apart, as many of each; or with real data the molecules of MUTAG, and in 20 epochs instead of 60 the proteins of PROTEINS.",
            notes: "The errors at 800 nodes show how far each model reaches: no arm was trained on networks of more \
                    than 59 nodes. Classes of graphs must differ in labels of nodes: without any, the encoder's softmax over \
                    in-edges and weights divided by degrees give each node of every graph the same state.",
            data: Data { embedded: "conductance", real: Some("graphs") },
            arms: vec![
                arm("one-layer", "one layer", Role::Baseline, 1.0, 0.0),
                arm("three-layers", "three layers", Role::Baseline, 3.0, 0.0),
                arm("cgs-near", "fixed point, gamma 0.5", Role::Method, 1.0, 0.5),
                arm("cgs-far", "fixed point, gamma 0.9", Role::Method, 1.0, 0.9),
                arm("classes", "classes of graphs, gamma 0.5", Role::Variant, 1.0, 0.5),
            ],
            metrics: vec![
                error("mse_50", "squared error, 50 nodes"),
                error("mse_200", "squared error, 200 nodes"),
                error("mse_800", "squared error, 800 nodes"),
                Metric { name: "class_accuracy", label: "accuracy of graph classes", better: Better::Higher },
                Metric { name: "proteins_accuracy", label: "accuracy of graph classes, PROTEINS", better: Better::Higher },
                Metric { name: "parameters", label: "trained numbers", better: Better::Neither },
                Metric { name: "iterations", label: "iterations at 800 nodes", better: Better::Neither },
            ],
            claims: vec![
                Claim::mean(
                    "depth",
                    "at 50 nodes, gamma 0.5 has at most 0.6 of the error of the same layer without a fixed point",
                    metric("cgs-near", "mse_50").at_most(metric("one-layer", "mse_50") * 0.6),
                ),
                Claim::mean(
                    "classes",
                    "classes of graphs are predicted with an accuracy of 0.8 at least",
                    metric("classes", "class_accuracy").at_least(0.8),
                ),
                Claim::mean(
                    "size",
                    "at 200 nodes, gamma 0.9 has at most 0.6 of the error of three layers",
                    metric("cgs-far", "mse_200").at_most(metric("three-layers", "mse_200") * 0.6),
                ),
            ],
            full: None,
        }
    }

    fn run(&self, arm: &Arm, setting: &Setting, trial: &TrialContext) -> Result<TrialOutcome> {
        if arm.name == "classes" {
            return classes(trial);
        }
        let gamma = setting.get("gamma")?;
        let model = Model {
            layers: setting.get("layers")? as usize,
            gamma: (gamma > 0.0).then_some(gamma),
            vars: SeededVars::new(&trial.stream("weights")),
        };
        let curve = model.train(trial)?;
        model.test(trial, curve)
    }
}

/// Networks side by side.
struct Networks {
    batch: GraphBatch,
    x: Tensor,
    u: Tensor,
    y: Tensor,
}

impl Networks {
    fn draw(trial: &TrialContext, sizes: &[usize], rng: &mut RandomStream) -> Result<Self> {
        let drawn = sizes.iter().map(|n| Ok(conductance_network(*n, rng)?));
        let networks: Vec<ConductanceNetwork> = drawn.collect::<Result<_>>()?;
        let graphs: Vec<Graph> = networks.iter().map(|n| n.graph.clone()).collect();
        let (mut xs, mut us, mut ys) = (Vec::new(), Vec::new(), Vec::new());
        for network in &networks {
            let (x, u) = network.features(DType::F32, &trial.device)?;
            xs.push(x);
            us.push(u);
            ys.push(network.target(DType::F32, &trial.device)?);
        }
        Ok(Self {
            batch: Graph::batch(&graphs)?,
            x: Tensor::cat(&xs, 0)?,
            u: Tensor::cat(&us, 0)?,
            y: Tensor::cat(&ys, 0)?,
        })
    }
}

struct Model {
    layers: usize,
    /// `None` for message passing alone.
    gamma: Option<f64>,
    vars: SeededVars,
}

impl Model {
    /// The model over the one set of variables, whatever solver it is given.
    fn build(
        &self,
        trial: &TrialContext,
        max_iter: Option<usize>,
    ) -> Result<graph_learning::cgs::Cgs> {
        let vb: VarBuilder = self.vars.builder(DType::F32, &trial.device);
        let encoder = EncoderConfig {
            hidden_layers: self.layers - 1,
            node_hidden: 32,
            edge_hidden: 32,
            mlp: vec![64],
            ..EncoderConfig::default()
        };
        let solver = Solver::Iterate {
            tol: 1e-6,
            max_iter,
            stop: StopRule::MaxNorm,
        };
        let config = CgsConfig {
            gamma: self.gamma.unwrap_or(0.5),
            solver,
            ..CgsConfig::default()
        };
        Ok(graph_learning::cgs::Cgs::new(
            2,
            1,
            1,
            config,
            encoder,
            &[64, 32],
            vb,
        )?)
    }

    fn loss(&self, model: &graph_learning::cgs::Cgs, data: &Networks) -> Result<(Tensor, usize)> {
        let (out, iterations) = match self.gamma {
            Some(_) => {
                let (out, report) = model.forward(&data.batch, &data.x, &data.u, None)?;
                (out, report.iterations)
            }
            None => (
                model.without_fixed_point(&data.batch, &data.x, &data.u, None)?,
                0,
            ),
        };
        Ok(((out - &data.y)?.sqr()?.mean_all()?, iterations))
    }

    fn train(&self, trial: &TrialContext) -> Result<Curve> {
        let model = self.build(trial, None)?;
        let config = AdamWConfig {
            lr: LR,
            weight_decay: 0.0,
            ..Default::default()
        };
        let params = self.vars.trainable();
        let mut adam = AdamW::with_groups(vec![ParamGroup::named(params.clone(), config)])?;
        let mut graphs = trial.stream("training networks");
        let mut curve = Curve::new("training loss", "update").log_y();
        let mut data = None;
        let mut sum = 0.0;
        for update in 0..UPDATES {
            trial.step(update, UPDATES)?;
            if update % RENEWED == 0 {
                let mut sizes = Vec::with_capacity(GRAPHS);
                for _ in 0..GRAPHS {
                    sizes.push(30 + graphs.below(30)?);
                }
                data = Some(Networks::draw(trial, &sizes, &mut graphs)?);
            }
            let Some(data) = &data else { continue };
            let (loss, _) = self.loss(&model, data)?;
            if update == 0 {
                self.check(&loss, &params)?;
            }
            sum += scalar(&loss)?;
            adam.step(&loss.backward()?)?;
            if (update + 1) % 5 == 0 {
                curve.push((update + 1) as f64, sum / 5.0);
                sum = 0.0;
            }
        }
        Ok(curve)
    }

    /// Without a fixed point nothing depends on the logits of the last layer.
    fn check(&self, loss: &Tensor, params: &[(String, candle_core::Var)]) -> Result<()> {
        let last = format!("encoder.layers.{}.edge.2", self.layers - 1);
        let used = |(name, _): &&(String, candle_core::Var)| {
            self.gamma.is_some() || !name.starts_with(&last)
        };
        let used: Vec<_> = params.iter().filter(used).cloned().collect();
        Ok(grad_check(&[loss], &used)?)
    }

    fn test(&self, trial: &TrialContext, curve: Curve) -> Result<TrialOutcome> {
        let model = self.build(trial, None)?;
        let mut by_size = Curve::new("test error by size", "nodes").log_x().log_y();
        let mut outcome = TrialOutcome::default().curve(curve);
        let mut rng = trial.stream("test networks");
        let (mut slowest, mut largest) = (0, None);
        for (size, name) in SIZES.into_iter().zip(ERRORS) {
            let data = Networks::draw(trial, &[size; TEST_GRAPHS], &mut rng)?;
            let (loss, iterations) = self.loss(&model, &data)?;
            let error = scalar(&loss)?;
            by_size.push(size as f64, error);
            outcome = outcome.metric(name, error);
            slowest = iterations;
            largest = Some(data);
        }
        if let (Some(_), Some(data)) = (self.gamma, &largest) {
            outcome = outcome.curve(self.residuals(trial, data)?);
        }
        let numbers = self
            .vars
            .trainable()
            .iter()
            .map(|(_, v)| v.elem_count())
            .sum::<usize>();
        Ok(outcome
            .curve(by_size)
            .metric("parameters", numbers as f64)
            .metric("iterations", slowest as f64))
    }

    /// The residual after a number of iterations, at the largest size.
    fn residuals(&self, trial: &TrialContext, data: &Networks) -> Result<Curve> {
        let mut curve = Curve::new("residual of the fixed point", "iterations").log_y();
        for k in [1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128] {
            let model = self.build(trial, Some(k))?;
            let (_, report) = model.states(&data.batch, &data.x, &data.u, None)?;
            if report.iterations == k {
                curve.push(k as f64, report.residual);
            }
        }
        Ok(curve)
    }
}

const FOLDS: usize = 5;
const FOLD_EPOCHS: usize = 60;
/// On PROTEINS, with six times the graphs, of twice the size.
const PROTEINS_EPOCHS: usize = 20;
const FOLD_BATCH: usize = 64;
fn classes(trial: &TrialContext) -> Result<TrialOutcome> {
    let (accuracy, curve) = class_accuracy(trial, &Labeled::new(trial)?, FOLD_EPOCHS)?;
    let outcome = TrialOutcome::default()
        .metric("class_accuracy", accuracy)
        .curve(curve);
    let Some(folder) = &trial.data else {
        return Ok(outcome);
    };
    let proteins = Labeled::read(folder, "PROTEINS")?;
    let (accuracy, _) = class_accuracy(trial, &proteins, PROTEINS_EPOCHS)?;
    Ok(outcome.metric("proteins_accuracy", accuracy))
}

/// The mean accuracy of the folds after the last epoch, so that no epoch is chosen, and the loss of the
/// first fold.
fn class_accuracy(trial: &TrialContext, data: &Labeled, epochs: usize) -> Result<(f64, Curve)> {
    let folds = stratified_kfold(&data.y, FOLDS, &mut trial.stream("folds"))?;
    let (features, count) = data.sizes();
    let (mut sum, mut curve) = (0.0, Curve::new("training loss of the first fold", "epoch"));
    for (f, test) in folds.iter().enumerate() {
        let train = others(&folds, f);
        let vars = SeededVars::new(&trial.stream("weights"));
        let vb = vars.builder(DType::F32, &trial.device);
        let encoder = EncoderConfig {
            hidden_layers: 1,
            node_hidden: 32,
            edge_hidden: 32,
            mlp: vec![64],
            ..EncoderConfig::default()
        };
        let cgs = graph_learning::cgs::Cgs::new(
            features,
            1,
            count,
            CgsConfig::default(),
            encoder,
            &[64, 32],
            vb,
        )?;
        let model = GraphCgs::new(cgs, Reduce::Sum);
        let config = AdamWConfig::adam(LR);
        let mut adam = AdamW::with_groups(vec![ParamGroup::named(vars.trainable(), config)])?;
        let mut order = trial.stream("batches");
        for epoch in 0..epochs {
            trial.step(f * epochs + epoch, FOLDS * epochs)?;
            let mut shuffled = train.clone();
            order.shuffle(&mut shuffled)?;
            let (mut total, mut steps) = (0.0, 0.0);
            for ids in shuffled.chunks(FOLD_BATCH) {
                let (logits, y) = predicted(&model, data, ids, trial)?;
                let loss = cross_entropy(&logits, &y, Reduction::Mean)?;
                total += scalar(&loss)?;
                steps += 1.0;
                adam.step(&loss.backward()?)?;
            }
            if f == 0 {
                curve.push((epoch + 1) as f64, total / steps);
            }
        }
        let (logits, y) = predicted(&model, data, test, trial)?;
        sum += accuracy(&logits, &y)?;
    }
    Ok((sum / FOLDS as f64, curve))
}

/// The logits and classes of some graphs, whose edges have nothing to say.
fn predicted(
    model: &GraphCgs,
    data: &Labeled,
    ids: &[u32],
    trial: &TrialContext,
) -> Result<(Tensor, Tensor)> {
    let (batch, x, y) = data.batch(ids, trial)?;
    let u = Tensor::zeros((batch.graph().num_edges(), 1), DType::F32, &trial.device)?;
    let (logits, _) = model.forward(&batch, &x, &u, None)?;
    Ok((logits, y))
}

//! GradSign against the gradient norm and the number of parameters: ranks of untrained cells.

use crate::scenario::{
    metric, Arm, Better, Claim, Curve, Data, Definition, Metric, Paper, Picture, PictureFormat,
    Role, Scenario, Setting, TrialContext, TrialOutcome,
};
use crate::scenarios::training::{digits, scalar};
use crate::{Error, Result};
use candle_core::{Module, Tensor, Var};
use candle_nn::{Conv2dConfig, Optimizer};
use nn::init::{Initializer, SeededVars};
use nn::loss::{accuracy, cross_entropy, Reduction};
use optim::diagnostics::gradsign::{
    gradsign, kendall_tau_b, spearman, Candidate, GradSignConfig, ProxyScore, SignConv2d,
    SignLinear, SignTape,
};
use optim::{AdamW, AdamWConfig};
use tensor_core::random::RandomStream;

const NETWORKS: usize = 30;
const CHANNELS: usize = 8;
const STEPS: usize = 120;
const BATCH: usize = 64;

pub(in crate::scenarios) struct GradSign;

impl Scenario for GradSign {
    fn definition(&self) -> Definition {
        Definition {
            slug: "gradsign",
            title: "GradSign",
            paper: Paper {
                title: "GradSign: Model Performance Inference with Theoretical Insights",
                venue: "ICLR 2022",
                arxiv: "2110.08616",
            },
            krate: "optim",
            module: "diagnostics::gradsign",
            tags: &["architecture search", "diagnostics"],
            version: 1,
            summary: "30 random cells (4 nodes, 6 edges, each one of none, skip, 1x1 and 3x3 convolution after ReLU, \
                      3x3 average) between a stem of 8 channels and a linear layer, on the standardized digits. The \
                      truth is the accuracy on 797 digits after 120 steps of Adam on 1000; the scores see 64 \
                      untrained examples.",
            notes: "The number of parameters is a strong baseline and is reported beside the score; no dominance over \
                    it is claimed.",
            data: Data { embedded: "digits", real: None },
            arms: vec![Arm::new("cells", "30 random cells", Role::Method)],
            metrics: vec![
                Metric { name: "gradsign", label: "Spearman, GradSign", better: Better::Higher },
                Metric { name: "grad_norm", label: "Spearman, gradient norm", better: Better::Higher },
                Metric { name: "parameters", label: "Spearman, number of parameters", better: Better::Higher },
                Metric { name: "synflow", label: "Spearman, SynFlow", better: Better::Higher },
                Metric { name: "agreement", label: "Spearman, agreement without size", better: Better::Neither },
                Metric { name: "kendall", label: "Kendall tau-b, GradSign", better: Better::Higher },
                Metric { name: "regret", label: "best accuracy minus that of the top cell", better: Better::Lower },
            ],
            claims: vec![
                Claim::every_seed("norm", "GradSign ranks better than the gradient norm",
                    metric("cells", "gradsign").above(metric("cells", "grad_norm"))),
                Claim::mean("rank", "its rank correlation with the trained accuracy is above 0.5",
                    metric("cells", "gradsign").above(0.5)),
            ],
            full: None,
        }
    }

    fn run(&self, _: &Arm, _: &Setting, trial: &TrialContext) -> Result<TrialOutcome> {
        let mut parts = digits(trial, &[1000, 797])?.into_iter();
        let (Some(train), Some(test)) = (parts.next(), parts.next()) else {
            return Err(Error::Trial("the digits could not be split".into()));
        };
        let data = Images::new(&train, &test)?;
        let mut cells = trial.stream("cells");
        let mut rows = Rows::default();
        for i in 0..NETWORKS {
            trial.step(i, NETWORKS)?;
            let edges = draw_edges(&mut cells)?;
            let stream = trial.stream("weights").split_index("cell", i as u64);
            let cell = Cell::new(&edges, &stream, trial)?;
            rows.score(cell, &data, trial)?;
        }
        rows.outcome()
    }
}

/// Standardized images `[N, 1, 8, 8]`.
struct Images {
    train: (Tensor, Tensor),
    test: (Tensor, Tensor),
}

impl Images {
    fn new(train: &datasets::Classification, test: &datasets::Classification) -> Result<Self> {
        let mean = scalar(&train.inputs.mean_all()?)?;
        let variance = scalar(&(&train.inputs - mean)?.sqr()?.mean_all()?)?;
        let shape = |data: &datasets::Classification| -> Result<(Tensor, Tensor)> {
            let x = ((&data.inputs - mean)? / variance.sqrt())?;
            Ok((x.reshape(((), 1, 8, 8))?, data.labels.clone()))
        };
        Ok(Self {
            train: shape(train)?,
            test: shape(test)?,
        })
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Edge {
    None,
    Skip,
    Conv1,
    Conv3,
    Average,
}

/// Six edges between four nodes.
fn draw_edges(stream: &mut RandomStream) -> Result<Vec<Edge>> {
    const KINDS: [Edge; 5] = [
        Edge::None,
        Edge::Skip,
        Edge::Conv1,
        Edge::Conv3,
        Edge::Average,
    ];
    loop {
        let mut edges = Vec::with_capacity(6);
        for _ in 0..6 {
            edges.push(KINDS[stream.below(KINDS.len())?]);
        }
        // Edges 3, 4 and 5 end in the last node: some path must reach it.
        let reaches = |to: usize| match to {
            1 => edges[0] != Edge::None,
            _ => edges[1] != Edge::None || (edges[0] != Edge::None && edges[2] != Edge::None),
        };
        let through =
            (edges[4] != Edge::None && reaches(1)) || (edges[5] != Edge::None && reaches(2));
        if edges[3] != Edge::None || through {
            return Ok(edges);
        }
    }
}

/// The ends of the edges.
const ENDS: [(usize, usize); 6] = [(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)];

struct Cell {
    tape: SignTape,
    stem: SignConv2d,
    edges: Vec<(Edge, Option<SignConv2d>)>,
    head: SignLinear,
    params: Vec<(String, Var)>,
}

impl Cell {
    fn new(edges: &[Edge], stream: &RandomStream, trial: &TrialContext) -> Result<Self> {
        let vars = SeededVars::new(stream);
        let vb = vars.builder(candle_core::DType::F32, &trial.device);
        let tape = SignTape::new();
        let make = |name: &str, shape: &[usize]| -> Result<Var> {
            let hint = Initializer::torch_linear().hint(shape)?;
            vb.get_with_hints(shape, name, hint)?;
            let made = vars.trainable().into_iter().find(|(n, _)| n == name);
            let missing = || Error::Trial(format!("no variable `{name}`"));
            Ok(made.ok_or_else(missing)?.1)
        };
        let conv = |name: &str, inputs: usize, k: usize| -> Result<SignConv2d> {
            let weight = make(name, &[CHANNELS, inputs, k, k])?;
            let config = Conv2dConfig {
                padding: k / 2,
                ..Conv2dConfig::default()
            };
            Ok(tape.conv2d(&weight, None, config)?)
        };
        let stem = conv("stem", 1, 3)?;
        let mut made = Vec::with_capacity(edges.len());
        for (i, edge) in edges.iter().enumerate() {
            let layer = match edge {
                Edge::Conv1 => Some(conv(&format!("edge{i}"), CHANNELS, 1)?),
                Edge::Conv3 => Some(conv(&format!("edge{i}"), CHANNELS, 3)?),
                _ => None,
            };
            made.push((*edge, layer));
        }
        let head = tape.linear(&make("head", &[10, CHANNELS])?, None)?;
        Ok(Self {
            tape,
            stem,
            edges: made,
            head,
            params: vars.trainable(),
        })
    }

    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let mut nodes = [Some(self.stem.forward(x)?), None, None, None];
        for ((edge, layer), (from, to)) in self.edges.iter().zip(ENDS) {
            let Some(input) = &nodes[from] else {
                continue;
            };
            let value = match (edge, layer) {
                (Edge::None, _) => continue,
                (Edge::Skip, _) => input.clone(),
                (Edge::Average, _) => average(input)?,
                (_, Some(layer)) => layer.forward(&input.relu()?)?,
                (_, None) => candle_core::bail!("an edge without its layer"),
            };
            nodes[to] = Some(match &nodes[to] {
                Some(sum) => (sum + value)?,
                None => value,
            });
        }
        match &nodes[3] {
            Some(last) => self.head.forward(&last.relu()?.mean((2, 3))?),
            None => candle_core::bail!("nothing reaches the last node"),
        }
    }

    /// Test accuracy after training.
    fn train(&self, data: &Images, stream: &RandomStream) -> Result<f64> {
        let vars = self.params.iter().map(|(_, v)| v.clone()).collect();
        let config = AdamWConfig {
            lr: 5e-3,
            weight_decay: 0.0,
            ..AdamWConfig::default()
        };
        let mut adam = AdamW::new(vars, config)?;
        let order = datasets::BatchConfig::shuffled(BATCH);
        let n = data.train.0.dim(0)?;
        let mut batches = datasets::Batches::new(n, order, &mut stream.split("batches"))?;
        let mut taken = 0;
        while taken < STEPS {
            let Some(index) = batches.next_indices()? else {
                continue;
            };
            let index = Tensor::new(index, data.train.0.device())?;
            let (x, y) = (
                data.train.0.index_select(&index, 0)?,
                data.train.1.index_select(&index, 0)?,
            );
            adam.backward_step(&cross_entropy(&self.forward(&x)?, &y, Reduction::Mean)?)?;
            taken += 1;
        }
        Ok(accuracy(&self.forward(&data.test.0)?, &data.test.1)?)
    }
}

/// Average over 3x3 neighbors, zeros outside: sums of shifted images, which have a gradient.
fn average(x: &Tensor) -> candle_core::Result<Tensor> {
    let along = |x: &Tensor, dim: usize| {
        let n = x.dim(dim)?;
        let padded = x.pad_with_zeros(dim, 1, 1)?;
        (padded.narrow(dim, 0, n)? + padded.narrow(dim, 1, n)?)? + padded.narrow(dim, 2, n)?
    };
    along(&along(x, 2)?, 3)? / 9.0
}

/// Scores of all networks.
#[derive(Default)]
struct Rows {
    truth: Vec<f64>,
    gradsign: Vec<f64>,
    agreement: Vec<f64>,
    grad_norm: Vec<f64>,
    synflow: Vec<f64>,
    parameters: Vec<f64>,
    multiplications: Vec<u64>,
}

fn mean_loss(out: &Tensor, y: &Tensor) -> candle_core::Result<Tensor> {
    Ok(cross_entropy(out, y, Reduction::Mean)?)
}

impl Rows {
    fn score(&mut self, cell: Cell, data: &Images, trial: &TrialContext) -> Result<()> {
        let (x, y) = (
            data.train.0.narrow(0, 0, 64)?,
            data.train.1.narrow(0, 0, 64)?,
        );
        let config = GradSignConfig {
            tape: Some(cell.tape.clone()),
            ..GradSignConfig::default()
        };
        let report = gradsign(
            |x: &Tensor| cell.forward(x),
            &cell.params,
            &x,
            &y,
            mean_loss,
            &config,
        )?;
        self.gradsign.push(report.score);
        self.agreement.push(report.agreement);
        self.multiplications
            .push(report.multiplications.unwrap_or(0));
        let candidate = Candidate {
            params: cell.params.clone(),
            forward: Box::new(|x: &Tensor| cell.forward(x)),
            tape: None,
        };
        let of = |score: ProxyScore| score.of(&candidate, &x, &y, &mean_loss);
        self.grad_norm.push(of(ProxyScore::GradNorm)?);
        self.synflow.push(of(ProxyScore::SynFlow)?);
        self.parameters.push(of(ProxyScore::Parameters)?);
        self.truth
            .push(cell.train(data, &trial.stream("training"))?);
        Ok(())
    }

    fn outcome(&self) -> Result<TrialOutcome> {
        let rho = |scores: &[f64]| Ok::<_, Error>(spearman(scores, &self.truth)?);
        let top = |values: &[f64]| {
            let order = values.iter().enumerate();
            order
                .max_by(|a, b| a.1.total_cmp(b.1))
                .map_or(0, |(i, _)| i)
        };
        let best = self.truth[top(&self.truth)];
        let mut order: Vec<usize> = (0..self.truth.len()).collect();
        order.sort_by(|a, b| self.gradsign[*a].total_cmp(&self.gradsign[*b]));
        let mut curve = Curve::new("trained accuracy", "rank by GradSign");
        for (rank, i) in order.iter().enumerate() {
            curve.push((rank + 1) as f64, self.truth[*i]);
        }
        Ok(TrialOutcome::default()
            .metric("gradsign", rho(&self.gradsign)?)
            .metric("grad_norm", rho(&self.grad_norm)?)
            .metric("parameters", rho(&self.parameters)?)
            .metric("synflow", rho(&self.synflow)?)
            .metric("agreement", rho(&self.agreement)?)
            .metric("kendall", kendall_tau_b(&self.gradsign, &self.truth)?)
            .metric("regret", best - self.truth[top(&self.gradsign)])
            .curve(curve)
            .picture(self.table(&order)))
    }

    fn table(&self, order: &[usize]) -> Picture {
        let mut text = String::from("score  accuracy  parameters  multiplications\n");
        for i in order.iter().rev() {
            text.push_str(&format!(
                "{:5.0}  {:8.3}  {:10.0}  {:15}\n",
                self.gradsign[*i], self.truth[*i], self.parameters[*i], self.multiplications[*i]
            ));
        }
        Picture {
            caption: "cells by their GradSign score".into(),
            format: PictureFormat::Text,
            bytes: text.into_bytes(),
        }
    }
}

//! Node compactness as a second term of GRACE: as accurate, and more compact, nodes.

use super::citation::on_citations;
use super::pictures::embeddings;
use crate::scenario::{
    metric, Arm, Better, Claim, Curve, Data, Definition, Metric, Paper, Role, Scenario, Setting,
    TrialContext, TrialOutcome,
};
use crate::scenarios::training::scalar;
use crate::{Error, Result};
use candle_core::DType;
use candle_nn::Optimizer;
use graph_learning::contrastive::pot::{
    combined, node_compactness, AdjacencyBounds, Budget, CompactnessReport, Intervals, Pot,
    PotConfig, PotInputs, PotScore,
};
use graph_learning::contrastive::{
    drop_edges, linear_probe, ContrastiveObjective, EncoderActivation, GcnEncoder, Grace,
    GraceConfig, ProbeConfig,
};
use graph_learning::io::NodeData;
use nn::init::SeededVars;
use optim::{AdamW, AdamWConfig, ParamGroup, WeightDecay};
use tensor_core::autograd::grad_check;

const EPOCHS: usize = 120;
const HIDDEN: usize = 32;
const TAU: f64 = 0.5;
/// Rates at which the edges of the two views are dropped.
const DROP: [f64; 2] = [0.4, 0.3];
const ANCHORS: usize = 512;
const KAPPA: f64 = 0.4;
const LR: f64 = 5e-3;
/// Weight decays of the probe, chosen by validation accuracy.
const PROBE_DECAYS: [f64; 3] = [0.0, 1e-3, 1e-2];

pub(in crate::scenarios) struct PotScenario;

impl Scenario for PotScenario {
    fn definition(&self) -> Definition {
        let number = |name, label, better| Metric {
            name,
            label,
            better,
        };
        Definition {
            slug: "pot",
            title: "Provable training (POT)",
            paper: Paper {
                title: "Provable Training for Graph Contrastive Learning",
                venue: "NeurIPS 2023",
                arxiv: "2309.13944",
            },
            krate: "graph-learning",
            module: "contrastive::pot",
            tags: &["graph", "contrastive", "audit"],
            version: 2,
            summary: "A citation network (generated: 900 nodes, 7 classes; with real data Cora, and CiteSeer beside it, with their public splits), two \
                      graph convolutions to 64 and 32 features, 120 epochs of GRACE with Adam at 0.005, views by dropping \
                      40 and 30 percent of the edges, 512 anchors a step against all nodes, temperature 0.5. With the \
                      term: weight 0.4 on the compactness of all nodes. Frozen embeddings, normalized, are judged by \
                      logistic regression; compactness by a certified bound on a view at the first rate.",
            notes: "The published score is a regularizer and no bound; the metric `certified` is one. Training on the \
                    certified score itself is the variant. On Cora the mean gain over five seeds is 0.012; one seed \
                    loses 0.018, and with it the interval begins 0.003 below the bound of the claim.",
            data: Data { embedded: "citations", real: Some("graphs") },
            arms: vec![
                Arm::new("grace", "GRACE", Role::Baseline),
                Arm::new("pot", "GRACE + compactness", Role::Method),
                Arm::new("certified", "GRACE + certified score", Role::Variant),
            ],
            metrics: vec![
                number("accuracy", "test accuracy", Better::Higher),
                number("f1_macro", "test macro F1", Better::Higher),
                number("actual", "mean compactness", Better::Higher),
                number("certified", "mean certified compactness", Better::Higher),
                number("positive", "share of nodes certified above 0", Better::Higher),
                number("accuracy_citeseer", "test accuracy, CiteSeer", Better::Higher),
                number("actual_citeseer", "mean compactness, CiteSeer", Better::Higher),
                number("certified_citeseer", "mean certified compactness, CiteSeer", Better::Higher),
            ],
            claims: vec![
                Claim::mean(
                    "accuracy",
                    "with the term, accuracy is at least GRACE's − 0.005",
                    metric("pot", "accuracy").at_least(metric("grace", "accuracy") - 0.005),
                ),
                Claim::every_seed(
                    "compactness",
                    "the mean compactness grows by a half at least",
                    metric("pot", "actual").at_least(metric("grace", "actual") * 1.5),
                ),
                Claim::every_seed(
                    "certified",
                    "the mean certified compactness grows by a fifth at least",
                    metric("pot", "certified").at_least(metric("grace", "certified") * 1.2),
                ),
                Claim::mean(
                    "accuracy-citeseer",
                    "with the term, accuracy on CiteSeer is at least GRACE's − 0.005",
                    metric("pot", "accuracy_citeseer")
                        .at_least(metric("grace", "accuracy_citeseer") - 0.005),
                )
                .where_reported(),
                Claim::every_seed(
                    "compactness-citeseer",
                    "the mean compactness grows by a half at least on CiteSeer",
                    metric("pot", "actual_citeseer")
                        .at_least(metric("grace", "actual_citeseer") * 1.5),
                )
                .where_reported(),
                Claim::every_seed(
                    "certified-citeseer",
                    "the mean certified compactness grows by a fifth at least on CiteSeer",
                    metric("pot", "certified_citeseer")
                        .at_least(metric("grace", "certified_citeseer") * 1.2),
                )
                .where_reported(),
            ],
            full: None,
        }
    }

    fn run(&self, arm: &Arm, _: &Setting, trial: &TrialContext) -> Result<TrialOutcome> {
        let (score, intervals) = match arm.name {
            "certified" => (PotScore::Certified, Intervals::Sound),
            _ => (PotScore::Published, Intervals::Published),
        };
        let config = PotConfig {
            kappa: KAPPA,
            score,
            intervals,
            ..PotConfig::default()
        };
        let term = match arm.name {
            "grace" => None,
            _ => Some(Pot::new(config)?),
        };
        let also = [
            ("accuracy", "accuracy_citeseer"),
            ("actual", "actual_citeseer"),
            ("certified", "certified_citeseer"),
        ];
        on_citations(trial, &also, |data| trained(trial, &data, term.as_ref()))
    }
}

fn trained(trial: &TrialContext, data: &NodeData, term: Option<&Pot>) -> Result<TrialOutcome> {
    let vars = SeededVars::new(&trial.stream("weights"));
    let vb = vars.builder(DType::F32, &trial.device);
    let (_, features) = data.x.dims()?;
    let relu = EncoderActivation::Relu;
    let encoder = GcnEncoder::new(features, HIDDEN, relu, vb.pp("encoder"))?;
    let grace = GraceConfig {
        tau: TAU,
        batch: None,
        anchors: Some(ANCHORS),
    };
    let grace = Grace::new(HIDDEN, HIDDEN, grace, vb.pp("grace"))?;
    let curve = train(trial, data, &vars, &encoder, &grace, term)?;
    judge(trial, data, &encoder, curve)
}

fn train(
    trial: &TrialContext,
    data: &NodeData,
    vars: &SeededVars,
    encoder: &GcnEncoder,
    grace: &Grace,
    term: Option<&Pot>,
) -> Result<Curve> {
    let config = AdamWConfig {
        lr: LR,
        weight_decay: 1e-5,
        decay: WeightDecay::Coupled,
        ..Default::default()
    };
    let params = vars.trainable();
    let mut adam = AdamW::with_groups(vec![ParamGroup::named(params.clone(), config)])?;
    let bounds = [
        AdjacencyBounds::from_graph(&data.graph, Budget::Rate(DROP[0]))?,
        AdjacencyBounds::from_graph(&data.graph, Budget::Rate(DROP[1]))?,
    ];
    let (mut views, mut draws) = (trial.stream("views"), trial.stream("anchors"));
    let mut curve = Curve::new("contrastive loss", "epoch");
    for epoch in 0..EPOCHS {
        trial.step(epoch, EPOCHS)?;
        let (one, _) = drop_edges(&data.graph, DROP[0], false, &mut views)?;
        let (two, _) = drop_edges(&data.graph, DROP[1], false, &mut views)?;
        let z1 = encoder.forward(&one, &data.x)?;
        let z2 = encoder.forward(&two, &data.x)?;
        let nce = grace.loss(&z1, &z2, &mut draws)?;
        curve.push((epoch + 1) as f64, scalar(&nce)?);
        let loss = match term {
            None => nce,
            Some(pot) => {
                let score = |view, other, bounds| {
                    let (x, graph) = (&data.x, &data.graph);
                    pot.loss(
                        encoder,
                        &PotInputs {
                            x,
                            graph,
                            view,
                            other,
                            bounds,
                            nodes: None,
                        },
                    )
                };
                let (first, second) =
                    (score(&one, &z2, &bounds[0])?, score(&two, &z1, &bounds[1])?);
                combined(&nce, &first, &second, pot.config().kappa)?
            }
        };
        if epoch == 0 {
            grad_check(&[&loss], &params)?;
        }
        adam.step(&loss.backward()?)?;
    }
    Ok(curve)
}

/// Accuracy of a probe on the whole graph, and compactness on a view of undirected drops.
fn judge(
    trial: &TrialContext,
    data: &NodeData,
    encoder: &GcnEncoder,
    curve: Curve,
) -> Result<TrialOutcome> {
    let z = encoder.forward(&data.graph, &data.x)?.detach();
    let norms = (z.sqr()?.sum_keepdim(1)?.sqrt()? + 1e-12)?;
    let unit = z.broadcast_div(&norms)?;
    let split = data
        .split
        .as_ref()
        .ok_or_else(|| Error::Trial("the network has no split".into()))?;
    let mut best: Option<graph_learning::contrastive::ProbeReport> = None;
    for wd in PROBE_DECAYS {
        let config = ProbeConfig {
            epochs: 1000,
            lr: 0.05,
            wd,
            val_every: 20,
        };
        let rng = &mut trial.stream("probe");
        let probe = linear_probe(&unit, &data.y, data.classes, split, config, rng)?;
        if best
            .as_ref()
            .is_none_or(|b| probe.val_accuracy > b.val_accuracy)
        {
            best = Some(probe);
        }
    }
    let best = best.ok_or_else(|| Error::Trial("no probe was trained".into()))?;
    let report = compactness(trial, data, encoder)?;
    let mean = |v: &[f64]| v.iter().sum::<f64>() / v.len().max(1) as f64;
    Ok(TrialOutcome::default()
        .metric("accuracy", best.test_accuracy)
        .metric("f1_macro", best.test_f1_macro)
        .metric("actual", mean(&report.actual))
        .metric("certified", mean(&report.lower))
        .metric("positive", report.fraction_positive)
        .curve(curve)
        .curve(by_degree(&report))
        .curve(distribution(&report))
        .picture(embeddings(&z, &data.y)?))
}

fn compactness(
    trial: &TrialContext,
    data: &NodeData,
    encoder: &GcnEncoder,
) -> Result<CompactnessReport> {
    let mut views = trial.stream("audited views");
    let (view, _) = drop_edges(&data.graph, DROP[0], true, &mut views)?;
    let (two, _) = drop_edges(&data.graph, DROP[1], true, &mut views)?;
    let other = encoder.forward(&two, &data.x)?.detach();
    let bounds = AdjacencyBounds::from_graph(&data.graph, Budget::Rate(DROP[0]))?;
    let inputs = PotInputs {
        x: &data.x,
        graph: &data.graph,
        view: &view,
        other: &other,
        bounds: &bounds,
        nodes: None,
    };
    Ok(node_compactness(encoder, &inputs)?)
}

/// Mean bound of nodes of degree 0, 1, 2, 3, 4, 5-8, 9-16, ...
fn by_degree(report: &CompactnessReport) -> Curve {
    let mut curve = Curve::new("certified compactness by degree", "degree + 1").log_x();
    let mut bins: Vec<(f64, f64, f64)> = Vec::new();
    for (degree, count, mean) in &report.by_degree {
        let degree = f64::from(*degree);
        let bin = if degree <= 4.0 {
            degree
        } else {
            degree.log2().ceil().exp2()
        };
        match bins.last_mut() {
            Some((at, n, sum)) if *at == bin => {
                *n += *count as f64;
                *sum += mean * *count as f64;
            }
            _ => bins.push((bin, *count as f64, mean * *count as f64)),
        }
    }
    bins.iter()
        .for_each(|(at, n, sum)| curve.push(at + 1.0, sum / n));
    curve
}

/// The bound below which a share of the nodes lies.
fn distribution(report: &CompactnessReport) -> Curve {
    let mut curve = Curve::new("certified compactness of nodes", "share of the nodes");
    for k in 0..=20 {
        let share = f64::from(k) / 20.0;
        curve.push(share, crate::statistics::quantile(&report.lower, share));
    }
    curve
}

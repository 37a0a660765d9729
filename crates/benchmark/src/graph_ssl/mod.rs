//! The protocol by which self-supervised methods on graphs are compared: regimes of training, stop
//! rules, tasks on frozen embeddings, and what a step costs.
//!
//! Two leaks of the published protocol are closed. Links are predicted strictly: their encoder never
//! sees an edge of validation or test (the other way is offered beside it). Settings and checkpoints are
//! chosen on validation data alone.

mod build;
mod search;
mod tasks;
mod tpe;
mod training;

pub use build::{build, Settings, METHODS};
pub use search::{search, space, Parameter, Sampler, Tuning};
pub use tasks::{
    cluster, embedding_for_probe, link_prediction, node_classification, LinkProbe, LinkScores,
};
pub use tpe::{Dimension, Tpe};
pub use training::{train, Efficiency, Regime, StopRule, TrainConfig, Trained};

use crate::report::Board;
use crate::{Error, Result};
use candle_core::{DType, Device};
use graph_learning::io::NodeData;
use graph_learning::split::{random_links, LinkSplit, LinkSplitConfig};
use nn::init::SeededVars;
use serde::Serialize;
use tensor_core::random::RandomStream;

/// One cell of the comparison.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// The method.
    pub method: String,
    /// The data.
    pub data: String,
    /// The regime of training.
    pub regime: String,
    /// The stop rule.
    pub stop: String,
    /// The seed.
    pub seed: u64,
    /// Test accuracy of a linear probe.
    pub accuracy: f64,
    /// Area under the ROC curve on test links, the encoder trained without them.
    pub auc: f64,
    /// Average precision on test links, likewise.
    pub average_precision: f64,
    /// The area of an encoder that was trained on all edges, test ones included.
    pub auc_leaky: f64,
    /// Normalized mutual information of k-means and labels.
    pub nmi: f64,
    /// Adjusted Rand index of k-means and labels.
    pub ari: f64,
    /// What training cost.
    pub efficiency: Efficiency,
}

/// What is compared.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Methods by name.
    pub methods: Vec<String>,
    /// Regimes.
    pub regimes: Vec<Regime>,
    /// Stop rules.
    pub stops: Vec<StopRule>,
    /// Seeds.
    pub seeds: Vec<u64>,
    /// Width of all encoders.
    pub width: usize,
    /// Steps of training.
    pub epochs: usize,
    /// Trials of a search for each method, data set and regime; 0 for the given settings.
    pub trials: usize,
    /// How the search chooses.
    pub sampler: Sampler,
}

/// The split of links with 5 percent for validation and 10 for testing.
///
/// # Errors
/// Those of the split.
pub fn link_split(data: &NodeData, rng: &mut RandomStream) -> Result<LinkSplit> {
    let config = LinkSplitConfig {
        val: 0.05,
        test: 0.1,
        ..LinkSplitConfig::default()
    };
    Ok(random_links(&data.graph, config, rng)?)
}

/// Runs one cell.
///
/// # Errors
/// Those of training and of the tasks.
pub fn run_cell(
    name: &str,
    method: &str,
    data: &NodeData,
    choice: &Tuning,
    seed: u64,
) -> Result<Row> {
    let Tuning { settings, config } = choice;
    let root = RandomStream::new(seed).split("graphfm");
    let links = link_split(data, &mut root.split("links"))?;
    let inputs = data.x.dims()?.1;
    let place = (DType::F32, &Device::Cpu);
    let fit = |graph: &NodeData, purpose: &str| -> Result<_> {
        let vars = SeededVars::new(&root.split("weights").split(method));
        let mut built = build(method, inputs, settings, config.epochs, &vars, place)?;
        let rng = &mut root.split(purpose);
        let trained = train(&mut *built, graph, &links, config, rng, &mut |_, _| Ok(()))?;
        Ok((built, trained))
    };
    let (built, trained) = fit(data, "training")?;
    let z = built.embed(&data.graph, &data.x, config.regime.embedded())?;
    let accuracy = node_classification(&z, data, &mut root.split("probe"))?.test_accuracy;
    let (nmi, ari) = cluster(&z, data, &mut root.split("clusters"))?;
    let probe = LinkProbe {
        embedded: config.regime.embedded(),
        ..LinkProbe::default()
    };
    let leaky = link_prediction(&*built, data, &links, &probe, &mut root.split("link probe"))?;
    let seen = NodeData {
        graph: links.train.message_graph.clone(),
        ..data.clone()
    };
    let (strict, _) = fit(&seen, "training")?;
    let strict = link_prediction(
        &*strict,
        &seen,
        &links,
        &probe,
        &mut root.split("link probe"),
    )?;
    Ok(Row {
        method: method.to_string(),
        data: name.to_string(),
        regime: config.regime.name(),
        stop: config.stop.name(),
        seed,
        accuracy,
        auc: strict.auc,
        average_precision: strict.average_precision,
        auc_leaky: leaky.auc,
        nmi,
        ari,
        efficiency: trained.efficiency,
    })
}

/// Runs all cells on one data set; `done` is told each row.
///
/// # Errors
/// Those of the cells, and of `done`.
pub fn run(
    name: &str,
    data: &NodeData,
    plan: &Plan,
    done: &mut dyn FnMut(&Row) -> Result<()>,
) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for method in &plan.methods {
        if !METHODS.contains(&method.as_str()) {
            return Err(Error::Unknown {
                kind: "method",
                name: method.clone(),
                known: METHODS.iter().map(ToString::to_string).collect(),
            });
        }
        for regime in &plan.regimes {
            let mut choice = Tuning {
                settings: Settings::new(plan.width),
                config: TrainConfig {
                    epochs: plan.epochs,
                    regime: regime.clone(),
                    ..TrainConfig::of(method)
                },
            };
            if plan.trials > 0 {
                let rng = &mut RandomStream::new(0).split("search");
                let how = (plan.sampler, plan.trials);
                let accuracy;
                (choice, accuracy) = search(method, data, &choice, how, rng)?;
                tracing::info!(method, ?choice, accuracy, "chosen on validation nodes");
            }
            for stop in &plan.stops {
                for seed in &plan.seeds {
                    choice.config.stop = *stop;
                    let row = run_cell(name, method, data, &choice, *seed)?;
                    done(&row)?;
                    rows.push(row);
                }
            }
        }
    }
    Ok(rows)
}

/// Data, regime, stop rule and method.
type Cell = (String, String, String, String);

/// Mean and standard deviation of each cell over its seeds, methods by accuracy.
pub fn leaderboard(rows: &[Row]) -> Board {
    let key = |r: &Row| {
        (
            r.data.clone(),
            r.regime.clone(),
            r.stop.clone(),
            r.method.clone(),
        )
    };
    let mut cells: Vec<(Cell, Vec<&Row>)> = Vec::new();
    for row in rows {
        match cells.iter_mut().find(|(k, _)| *k == key(row)) {
            Some((_, list)) => list.push(row),
            None => cells.push((key(row), vec![row])),
        }
    }
    let mean = |list: &[&Row], of: &dyn Fn(&Row) -> f64| {
        let values: Vec<f64> = list.iter().map(|r| of(r)).collect();
        let m = values.iter().sum::<f64>() / values.len() as f64;
        let squares = values.iter().map(|v| (v - m) * (v - m)).sum::<f64>();
        (m, (squares / values.len() as f64).sqrt())
    };
    cells.sort_by(|a, b| {
        let place = |c: &(Cell, Vec<&Row>)| mean(&c.1, &|r| r.accuracy).0;
        let ((d1, r1, s1, _), (d2, r2, s2, _)) = (&a.0, &b.0);
        (d1, r1, s1)
            .cmp(&(d2, r2, s2))
            .then(place(b).total_cmp(&place(a)))
    });
    let columns = [
        "data",
        "regime",
        "stop",
        "method",
        "accuracy",
        "AUC",
        "AP",
        "AUC, leaky",
        "NMI",
        "ARI",
        "s",
        "edges/s",
        "MB",
    ];
    let line = |((data, regime, stop, method), list): &(Cell, Vec<&Row>)| {
        let both = |of: &dyn Fn(&Row) -> f64| {
            let (m, s) = mean(list, of);
            format!("{m:.3} ± {s:.3}")
        };
        vec![
            data.clone(),
            regime.clone(),
            stop.clone(),
            method.clone(),
            both(&|r| r.accuracy),
            both(&|r| r.auc),
            both(&|r| r.average_precision),
            both(&|r| r.auc_leaky),
            both(&|r| r.nmi),
            both(&|r| r.ari),
            format!("{:.1}", mean(list, &|r| r.efficiency.seconds).0),
            format!("{:.0}", mean(list, &|r| r.efficiency.edges_per_second).0),
            format!(
                "{:.1}",
                mean(list, &|r| r.efficiency.peak_bytes() as f64).0 / 1e6
            ),
        ]
    };
    Board {
        title: "Self-supervised methods on graphs".into(),
        caption: "Means and standard deviations over seeds, methods by accuracy. AUC and AP are of links that \
                  the encoder never saw; the leaky AUC is of an encoder that did. Seconds, edges per second and \
                  megabytes are those of training."
            .into(),
        columns: columns.map(String::from).to_vec(),
        rows: cells.iter().map(line).collect(),
    }
}

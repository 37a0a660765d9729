//! `graphfm`: the whole comparison of self-supervised methods on graphs.

use crate::graph_ssl::{leaderboard, run, Plan, Regime, Row, Sampler, StopRule, METHODS};
use anyhow::{bail, Result};
use clap::Args;
use graph_learning::generate::{citation_network, CitationConfig};
use graph_learning::io::{npz, planetoid, NodeData};
use graph_learning::sparse::Features;
use graph_learning::split::{random_nodes, random_per_class};
use std::io::Write;
use std::path::PathBuf;
use tensor_core::random::RandomStream;

/// Arguments of `graphfm`.
#[derive(Debug, Args)]
pub struct GraphFmArgs {
    /// Methods, separated by commas; all of them without it.
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    pub methods: Vec<String>,
    /// Data sets, separated by commas: `generated`, a Planetoid set in the folder of `--data`, or a
    /// path to an NPZ file.
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "NAMES",
        default_value = "generated"
    )]
    pub sets: Vec<String>,
    /// The folder with `graphs/NAME`.
    #[arg(long, value_name = "DIR", default_value = "data")]
    pub data: PathBuf,
    /// What a step sees: full, nodes, subgraphs.
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "NAMES",
        default_value = "full"
    )]
    pub regimes: Vec<String>,
    /// Which weights are kept: fixed, nodes, links, clusters, loss.
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "NAMES",
        default_value = "fixed"
    )]
    pub stops: Vec<String>,
    /// Number of seeds.
    #[arg(long, default_value = "2", value_parser = clap::value_parser!(u16).range(1..))]
    pub seeds: u16,
    /// Width of the encoders.
    #[arg(long, default_value = "128", value_parser = clap::value_parser!(u16).range(1..))]
    pub width: u16,
    /// Epochs of training.
    #[arg(long, default_value = "60", value_parser = clap::value_parser!(u32).range(1..))]
    pub epochs: u32,
    /// Epochs between two looks of a stop rule.
    #[arg(long, default_value = "20", value_parser = clap::value_parser!(u32).range(1..))]
    pub every: u32,
    /// Seeds of a step that samples.
    #[arg(long, default_value = "512", value_parser = clap::value_parser!(u32).range(1..))]
    pub batch: u32,
    /// Settings tried for each method on validation data; 0 for the given ones.
    #[arg(long, default_value = "0")]
    pub trials: usize,
    /// How the settings that are tried are chosen.
    #[arg(long, value_enum, default_value_t)]
    pub sampler: Sampler,
    /// Folder of the report, whose next making shows the leaderboard.
    #[arg(long, value_name = "DIR", default_value = "target/thalweg/report")]
    pub report: PathBuf,
    /// Also write all rows to this JSON file.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// Runs the comparison and prints the leaderboard.
pub fn graphfm(args: &GraphFmArgs, out: &mut dyn Write) -> Result<()> {
    let plan = plan(args)?;
    let mut rows: Vec<Row> = Vec::new();
    for name in &args.sets {
        let data = data(args, name)?;
        let mut done = |row: &Row| {
            let (accuracy, auc) = (row.accuracy, row.auc);
            tracing::info!(
                method = row.method,
                regime = row.regime,
                accuracy,
                auc,
                "done"
            );
            Ok(())
        };
        rows.extend(run(name, &data, &plan, &mut done)?);
    }
    let board = leaderboard(&rows);
    writeln!(out, "{}", board.text())?;
    let left = board.leave(&args.report, "graphfm")?;
    writeln!(out, "For the next report: {}", left.display())?;
    if let Some(path) = &args.json {
        super::write_json(path, &rows)?;
    }
    Ok(())
}

fn plan(args: &GraphFmArgs) -> Result<Plan> {
    let (batch, every) = (args.batch as usize, args.every as usize);
    let regime = |name: &String| {
        Ok(match name.as_str() {
            "full" => Regime::FullBatch,
            "nodes" => Regime::NodeSampling {
                fanouts: vec![15, 10, 5],
                batch,
            },
            "subgraphs" => Regime::SubgraphSampling { parts: 1500, batch },
            other => bail!("no regime `{other}`; known: full, nodes, subgraphs"),
        })
    };
    let stop = |name: &String| {
        Ok(match name.as_str() {
            "fixed" => StopRule::FixedEpochs,
            "nodes" => StopRule::BestNodeClassification { every },
            "links" => StopRule::BestLinkAuc { every },
            "clusters" => StopRule::BestClustering { every },
            "loss" => StopRule::LossPlateau { patience: every },
            other => bail!("no stop rule `{other}`; known: fixed, nodes, links, clusters, loss"),
        })
    };
    let methods = match args.methods.is_empty() {
        true => METHODS.iter().map(ToString::to_string).collect(),
        false => args.methods.clone(),
    };
    Ok(Plan {
        methods,
        regimes: args.regimes.iter().map(regime).collect::<Result<_>>()?,
        stops: args.stops.iter().map(stop).collect::<Result<_>>()?,
        seeds: (0..u64::from(args.seeds)).collect(),
        width: usize::from(args.width),
        epochs: args.epochs as usize,
        trials: args.trials,
        sampler: args.sampler,
    })
}

/// A data set with row-normalized features and a split: its own, or a random one of 20, 20 and 60
/// percent where it has none.
fn data(args: &GraphFmArgs, name: &str) -> Result<NodeData> {
    let rng = &mut RandomStream::new(0).split("data");
    let mut data = if name == "generated" {
        let mut data = citation_network(CitationConfig::default(), rng)?;
        let split = random_per_class(&data.y, data.classes, 20, (200, 400), rng)?;
        data.split = Some(split);
        data
    } else if name.ends_with(".npz") {
        npz(name)?
    } else {
        planetoid(args.data.join("graphs").join(name), name)?
    };
    if !data.graph.is_undirected() {
        (data.graph, _) = data.graph.to_undirected()?;
    }
    if data.split.is_none() {
        let n = data.y.len();
        data.split = Some(random_nodes(n, n / 5, n - 2 * (n / 5), rng)?);
    }
    if let Features::Sparse(x) = &data.x {
        data.x = x.normalize_rows(false)?.into();
    }
    Ok(data)
}

//! What can be written on the command line.

use super::measure::{PeersArgs, PerfArgs};
use crate::registry::Filter;
use crate::scenario::Suite;
use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;

/// Puts published methods against their baselines and reports what holds.
#[derive(Debug, Parser)]
#[command(name = "thalweg-bench", version)]
pub struct Cli {
    /// Log as one JSON object a line instead of progress bars.
    #[arg(long, global = true)]
    pub json_log: bool,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run what is missing, store each trial, print the verdicts and write the report.
    Run(RunArgs),
    /// Write the report from stored trials.
    Report(ReportArgs),
    /// Compare two databases, or two runs or versions of one.
    Compare(CompareArgs),
    /// Run the implementations on files of reference numbers and compare.
    Verify(VerifyArgs),
    /// List the scenarios.
    List,
    /// Write the table of methods from the registry and the published results.
    Methods(MethodsArgs),
    /// Write stored results as JSON, CSV or TensorBoard event files.
    Export(ExportArgs),
    /// List the data sets that can be fetched, or fetch one.
    Data(DataArgs),
    /// Measure our kernels against the machine's own ceilings.
    Perf(PerfArgs),
    /// Measure the same operations in other packages and in ours, in turn.
    Peers(PeersArgs),
    /// Compare self-supervised methods on graphs: methods, regimes, stop rules, three tasks.
    #[cfg(feature = "graph-learning")]
    Graphfm(super::graphfm::GraphFmArgs),
    /// Measure time and memory of training against the number of edges.
    #[cfg(feature = "graph-learning")]
    GraphScale(super::graph_scale::GraphScaleArgs),
}

/// Where results are.
#[derive(Debug, Args)]
pub struct Place {
    /// The results database.
    #[arg(
        long,
        value_name = "FILE",
        default_value = "target/thalweg/results.sqlite"
    )]
    pub db: PathBuf,
}

/// Which scenarios are meant.
#[derive(Debug, Args)]
pub struct Which {
    /// Scenarios by slug, separated by commas.
    #[arg(long, value_delimiter = ',', value_name = "SLUGS")]
    pub only: Vec<String>,
    /// Scenarios of these crates.
    #[arg(long = "crate", value_delimiter = ',', value_name = "CRATES")]
    pub krate: Vec<String>,
    /// Scenarios with one of these tags.
    #[arg(long, value_delimiter = ',', value_name = "TAGS")]
    pub tag: Vec<String>,
}

impl Which {
    /// As the registry wants it.
    pub fn filter(&self) -> Filter {
        Filter {
            only: self.only.clone(),
            krate: self.krate.clone(),
            tag: self.tag.clone(),
        }
    }
}

/// Arguments of `run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// How much to run.
    #[arg(long, value_enum, default_value = "quick")]
    pub suite: Suite,
    /// Which scenarios.
    #[command(flatten)]
    pub which: Which,
    /// Read real data from this folder where a scenario can; the rest uses embedded data.
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Where tensors live: cpu, cuda, cuda:N, metal.
    #[arg(long, default_value = "cpu")]
    pub device: String,
    /// Another number of seeds than the suite's.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub seeds: Option<u16>,
    /// Run again what is stored already.
    #[arg(long)]
    pub fresh: bool,
    /// Trials at a time; timings always run alone.
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u16).range(1..))]
    pub jobs: u16,
    /// Exit with status 3 when a claim fails.
    #[arg(long)]
    pub strict: bool,
    /// The results database.
    #[command(flatten)]
    pub place: Place,
    /// Folder of the report.
    #[arg(long, value_name = "DIR", default_value = "target/thalweg/report")]
    pub out: PathBuf,
}

/// Arguments of `report`.
#[derive(Debug, Args)]
pub struct ReportArgs {
    /// The suite to show; without it the largest that has a complete seed.
    #[arg(long, value_enum)]
    pub suite: Option<Suite>,
    /// The results database.
    #[command(flatten)]
    pub place: Place,
    /// Folder of the report.
    #[arg(long, value_name = "DIR", default_value = "target/thalweg/report")]
    pub out: PathBuf,
    /// Also write results.json, methods.md and the pictures of chapters into the documentation.
    #[arg(long)]
    pub publish: bool,
    /// Folder of the documentation.
    #[arg(long, value_name = "DIR", default_value = "docs")]
    pub docs: PathBuf,
}

/// Arguments of `compare`.
#[derive(Debug, Args)]
pub struct CompareArgs {
    /// A database file, `run:N` or `version:X`.
    pub a: String,
    /// What it is compared with.
    pub b: String,
    /// The database that `run:N` and `version:X` refer to.
    #[command(flatten)]
    pub place: Place,
    /// Show rows without a difference too.
    #[arg(long)]
    pub all: bool,
}

/// Arguments of `verify`.
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// Folder of SLUG.safetensors files.
    #[arg(long, value_name = "DIR")]
    pub reference: PathBuf,
    /// Only these methods, separated by commas.
    #[arg(long, value_delimiter = ',', value_name = "SLUGS")]
    pub only: Vec<String>,
}

/// Arguments of `methods`.
#[derive(Debug, Args)]
pub struct MethodsArgs {
    /// Folder of the documentation, with results.json.
    #[arg(long, value_name = "DIR", default_value = "docs")]
    pub docs: PathBuf,
    /// Write nothing; fail when the table is not up to date.
    #[arg(long)]
    pub check: bool,
}

/// Arguments of `export`.
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("form").required(true).multiple(true))]
pub struct ExportArgs {
    /// Results with verdicts, as JSON.
    #[arg(long, value_name = "FILE", group = "form")]
    pub json: Option<PathBuf>,
    /// One row for each trial and metric, as CSV.
    #[arg(long, value_name = "FILE", group = "form")]
    pub csv: Option<PathBuf>,
    /// Curves and metrics as TensorBoard event files, one folder a trial.
    #[arg(long, value_name = "DIR", group = "form")]
    pub tensorboard: Option<PathBuf>,
    /// The suite; without it the largest that has a complete seed (JSON) or all (the others).
    #[arg(long, value_enum)]
    pub suite: Option<Suite>,
    /// The results database.
    #[command(flatten)]
    pub place: Place,
}

/// Arguments of `data`.
#[derive(Debug, Args)]
pub struct DataArgs {
    /// The folder of data sets, as `run --data` wants it.
    #[arg(long, value_name = "DIR", default_value = "data", global = true)]
    pub data: PathBuf,
    /// What to do; without it, list.
    #[command(subcommand)]
    pub action: Option<DataAction>,
}

/// What to do with data sets.
#[derive(Debug, Subcommand)]
pub enum DataAction {
    /// List them, with those that are there.
    List,
    /// Download one into its folder and check it; an interrupted download goes on.
    Fetch {
        /// Its name.
        name: String,
    },
}

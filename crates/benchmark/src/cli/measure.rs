//! `perf` and `peers`.

use crate::peers::Row;
use crate::perf::Plan;
use crate::{peers, perf};
use anyhow::{Context, Result};
use clap::Args;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Arguments of `perf`.
#[derive(Debug, Args)]
pub struct PerfArgs {
    /// Measured rounds; the median counts.
    #[arg(long, default_value = "15", value_parser = clap::value_parser!(u16).range(1..))]
    pub rounds: u16,
    /// Only the kernels of these crates, separated by commas.
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    pub only: Vec<String>,
    /// Parameters of the optimizer steps, in all tensors together.
    #[arg(long, default_value = "25000000", value_parser = clap::value_parser!(u32).range(1000..))]
    pub parameters: u32,
    /// One JSON object a line instead of a table.
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `peers`.
#[derive(Debug, Args)]
pub struct PeersArgs {
    /// A Python interpreter with the peers' packages; without one, only Rust peers are measured.
    #[arg(long, value_name = "FILE")]
    pub python: Option<PathBuf>,
    /// Only these crates or methods, separated by commas.
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    pub only: Vec<String>,
    /// Measured rounds; the median counts.
    #[arg(long, default_value = "15", value_parser = clap::value_parser!(u16).range(1..))]
    pub rounds: u16,
    /// Also write the rows to this JSON file, replacing those of the same comparison.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Measure nothing but the peak bytes of one step of this network, in this process.
    #[arg(long, value_name = "NAME", hide = true)]
    pub memory_of: Option<String>,
    /// Train networks for another process of this program.
    #[arg(long, hide = true)]
    pub serve: bool,
}

/// Kernels against the machine's ceilings.
pub fn perf(args: &PerfArgs, out: &mut dyn Write) -> Result<()> {
    let plan = Plan {
        only: &args.only,
        rounds: args.rounds.into(),
        parameters: args.parameters as usize,
        json: args.json,
    };
    perf::run(&plan, out)
}

/// Ours against other packages.
pub fn peers(args: &PeersArgs, out: &mut dyn Write) -> Result<()> {
    if args.serve {
        return peers::serve(std::io::stdin().lock(), out);
    }
    if let Some(slug) = &args.memory_of {
        writeln!(out, "{}", peers::memory(slug)?)?;
        return Ok(());
    }
    let rows = peers::run(args.python.as_deref(), &args.only, args.rounds.into(), out)?;
    match &args.json {
        Some(path) => merge(path, rows),
        None => Ok(()),
    }
}

fn merge(path: &Path, rows: Vec<Row>) -> Result<()> {
    let mut all: Vec<Row> = match std::fs::read_to_string(path) {
        Ok(text) => serde_json::from_str(&text)
            .with_context(|| format!("`{}` does not hold rows of peers", path.display()))?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => vec![],
        Err(error) => {
            return Err(error).with_context(|| format!("cannot read `{}`", path.display()))
        }
    };
    let key = |row: &Row| {
        (
            row.slug.clone(),
            row.operation.clone(),
            row.ours.clone(),
            row.peer.clone(),
            row.threads,
        )
    };
    all.retain(|old| rows.iter().all(|new| key(new) != key(old)));
    all.extend(rows);
    all.sort_by_key(key);
    super::write_json(path, &all)
}

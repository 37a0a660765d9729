//! `graph-scale`: time and memory of training against the size of a graph.

use crate::graph_scale::{measure, run, table, Row};
use anyhow::{bail, ensure, Result};
use clap::Args;
use std::io::Write;
use std::path::PathBuf;

/// Arguments of `graph-scale`.
#[derive(Debug, Args)]
pub struct GraphScaleArgs {
    /// Numbers of edges, separated by commas.
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "NUMBERS",
        default_value = "10000,100000,1000000,10000000"
    )]
    pub edges: Vec<usize>,
    /// What a step sees: full, sampled.
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "NAMES",
        default_value = "full,sampled"
    )]
    pub regimes: Vec<String>,
    /// Also write the rows to this JSON file.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Measure the one size in this process and print its row.
    #[arg(long, hide = true)]
    pub one: bool,
}

/// Measures each size in a process of its own and prints a table.
pub fn graph_scale(args: &GraphScaleArgs, out: &mut dyn Write) -> Result<()> {
    let mut sizes = Vec::new();
    for regime in &args.regimes {
        let sampled = match regime.as_str() {
            "full" => false,
            "sampled" => true,
            other => bail!("no regime `{other}`; known: full, sampled"),
        };
        sizes.extend(args.edges.iter().map(|edges| (*edges, sampled)));
    }
    if args.one {
        let [(edges, sampled)] = sizes[..] else {
            bail!("{} sizes: one is measured at a time", sizes.len());
        };
        ensure!(edges > 0, "a graph without edges");
        writeln!(out, "{}", serde_json::to_string(&measure(edges, sampled)?)?)?;
        return Ok(());
    }
    let rows = run(&sizes, &mut |row: &Row| {
        let (edges, sampled, ms, mb) = (row.edges, row.sampled, row.milliseconds, row.megabytes);
        tracing::info!(edges, sampled, ms, mb, "measured");
        Ok(())
    })?;
    write!(out, "{}", table(&rows))?;
    if let Some(path) = &args.json {
        super::write_json(path, &rows)?;
    }
    Ok(())
}

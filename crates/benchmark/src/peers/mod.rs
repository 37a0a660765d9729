//! The same operation in the package that a user would otherwise pick and in ours, in turn.

#[cfg(feature = "convex")]
mod convex;
#[cfg(feature = "flows")]
mod flows;
#[cfg(feature = "graph-learning")]
mod graph_learning;
#[cfg(feature = "guidance")]
mod guidance;
mod networks;
mod nn;
mod optim;
#[cfg(feature = "sequence-design")]
mod sequence_design;
mod worker;

pub use networks::{memory, serve};
pub use worker::Worker;

use crate::perf::{median, seconds, with_threads};
use anyhow::{bail, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::io::Write;
use std::path::Path;
use std::time::Duration;

/// One measured pair.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// The method.
    pub slug: String,
    /// What was done.
    pub operation: String,
    /// Ours.
    pub ours: String,
    /// The package it is compared with.
    pub peer: String,
    /// Threads on both sides.
    pub threads: usize,
    /// Median milliseconds of ours.
    pub our_milliseconds: f64,
    /// Median milliseconds of the peer.
    pub peer_milliseconds: f64,
    /// Peer's time over ours, the median over rounds: above 1, ours is faster.
    pub ratio: f64,
    /// Peak megabytes of ours and of the peer, each in a process of its own, where measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<[f64; 2]>,
}

type Call<'a> = Box<dyn FnMut() -> Result<()> + Send + 'a>;

/// Who is compared with.
enum Peer<'a> {
    /// An operation of the Python worker, with its arguments.
    Python(&'static str, Value),
    /// Another Rust crate.
    Rust(&'static str, Call<'a>),
}

impl Peer<'_> {
    fn name(&self) -> &'static str {
        match self {
            Self::Python(name, _) | Self::Rust(name, _) => name,
        }
    }
}

/// One comparison.
struct Case<'a> {
    slug: &'static str,
    operation: String,
    ours: &'static str,
    call: Call<'a>,
    peer: Peer<'a>,
}

/// Measures the comparisons of the groups or methods in `only` (all when empty) and prints a
/// table.
///
/// # Errors
/// An unknown name in `only`, and those of the operations.
pub fn run(
    python: Option<&Path>,
    only: &[String],
    rounds: usize,
    out: &mut dyn Write,
) -> Result<Vec<Row>> {
    let threads = std::thread::available_parallelism()?.get();
    let mut session = Session {
        python,
        worker: python.map(Worker::start).transpose()?,
        only,
        known: vec![],
        rounds,
        threads,
        rows: vec![],
    };
    optim::cases(&mut session)?;
    nn::cases(&mut session)?;
    #[cfg(feature = "graph-learning")]
    graph_learning::cases(&mut session)?;
    networks::cases(&mut session)?;
    #[cfg(feature = "flows")]
    flows::cases(&mut session)?;
    #[cfg(feature = "guidance")]
    guidance::cases(&mut session)?;
    #[cfg(feature = "convex")]
    convex::cases(&mut session)?;
    #[cfg(feature = "sequence-design")]
    sequence_design::cases(&mut session)?;
    if let Some(unknown) = only.iter().find(|name| !session.known.contains(name)) {
        bail!(
            "no comparison of `{unknown}`; known: {}",
            session.known.join(", ")
        );
    }
    print(&session.rows, rounds, out)?;
    Ok(session.rows)
}

/// What the groups of comparisons share.
struct Session<'a> {
    python: Option<&'a Path>,
    worker: Option<Worker>,
    only: &'a [String],
    known: Vec<String>,
    rounds: usize,
    threads: usize,
    rows: Vec<Row>,
}

impl Session<'_> {
    /// Whether a comparison of this group and method is wanted.
    fn wants(&mut self, group: &str, slug: &str) -> bool {
        for name in [group, slug] {
            if !self.known.iter().any(|known| known == name) {
                self.known.push(name.to_string());
            }
        }
        self.only.is_empty() || self.only.iter().any(|name| name == group || name == slug)
    }

    /// Runs both sides in turn, on the same number of threads.
    fn measure(&mut self, case: Case<'_>) -> Result<()> {
        let Case {
            slug,
            operation,
            ours,
            mut call,
            mut peer,
        } = case;
        let name = peer.name();
        if let Peer::Python(name, spec) = &peer {
            let Some(worker) = &mut self.worker else {
                tracing::warn!(peer = name, "left out: no Python interpreter was given");
                return Ok(());
            };
            worker.set(name, self.threads, spec.clone())?;
        }
        tracing::info!(slug, operation, ours, peer = name, "measuring");
        let (mut mine, mut theirs, mut ratios) = (vec![], vec![], vec![]);
        // The first round warms both up.
        for round in 0..=self.rounds {
            let a = with_threads(self.threads, || seconds(&mut call))??;
            let b = match &mut peer {
                Peer::Rust(_, call) => with_threads(self.threads, || seconds(call))??,
                Peer::Python(..) => match &mut self.worker {
                    Some(worker) => worker.run()?,
                    None => bail!("no Python interpreter was given"),
                },
            };
            // The peer's threads spin for a while after their work.
            std::thread::sleep(Duration::from_millis(20));
            if round > 0 {
                mine.push(a);
                theirs.push(b);
                ratios.push(b / a);
            }
        }
        if let (Peer::Python(..), Some(worker)) = (&peer, &mut self.worker) {
            worker.end()?;
        }
        self.rows.push(Row {
            slug: slug.to_string(),
            operation,
            ours: ours.to_string(),
            peer: name.to_string(),
            threads: self.threads,
            our_milliseconds: 1e3 * median(mine),
            peer_milliseconds: 1e3 * median(theirs),
            ratio: median(ratios),
            memory: None,
        });
        Ok(())
    }
}

fn print(rows: &[Row], rounds: usize, out: &mut dyn Write) -> Result<()> {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::UTF8_HORIZONTAL_ONLY);

    table.set_header([
        "method",
        "operation",
        "threads",
        "ours",
        "ms",
        "peer",
        "ms",
        "times faster",
        "MB",
    ]);
    for row in rows {
        table.add_row([
            row.slug.clone(),
            row.operation.clone(),
            row.threads.to_string(),
            row.ours.clone(),
            format!("{:.2}", row.our_milliseconds),
            row.peer.clone(),
            format!("{:.2}", row.peer_milliseconds),
            format!("{:.2}", row.ratio),
            row.memory
                .map_or(String::new(), |[a, b]| format!("{a:.0} : {b:.0}")),
        ]);
    }
    writeln!(
        out,
        "medians of {rounds} rounds in turn, the same threads on both sides"
    )?;
    writeln!(out, "{table}")?;
    Ok(())
}

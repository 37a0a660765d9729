//! Our kernels against the machine's own ceilings, measured in the same run.
//!
//! One file a crate: it hands each kernel to the session with the bytes it must move or
//! the operations it must do, and the session runs it in turn with the ceiling.

mod ceiling;
#[cfg(feature = "convex")]
mod convex;
#[cfg(feature = "graph-learning")]
mod graph_learning;
#[cfg(feature = "graph-learning")]
pub(crate) mod graph_networks;
#[cfg(feature = "guidance")]
mod guidance;
mod nn;
mod optim;
#[cfg(feature = "sequence-design")]
mod sequence_design;
mod timing;

pub use ceiling::Ceiling;
pub use optim::{gpt2_shapes, Workload};
pub use timing::{median, seconds, with_threads};

use anyhow::{bail, Result};
use ceiling::Ceilings;
use serde::Serialize;
use std::io::Write;

/// What is measured.
#[derive(Debug, Clone)]
pub struct Plan<'a> {
    /// Only these crates; all when empty.
    pub only: &'a [String],
    /// Measured rounds; the median counts.
    pub rounds: usize,
    /// Parameters of the optimizer steps.
    pub parameters: usize,
    /// One JSON object a line instead of a table.
    pub json: bool,
}

/// One kernel's cost with a number of threads.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// The crate that the kernel belongs to.
    pub group: String,
    /// What ran.
    pub kernel: String,
    /// Threads that it ran on.
    pub threads: usize,
    /// What it is measured against.
    pub ceiling: Ceiling,
    /// Bytes (read and written ones counted alike) or floating-point operations of one call for
    /// each element.
    pub per_element: f64,
    /// Median time of a call, in milliseconds.
    pub milliseconds: f64,
    /// Billions of bytes or operations per second.
    pub rate: f64,
    /// The ceiling's rate, measured around this kernel.
    pub ceiling_rate: f64,
    /// `rate / ceiling_rate`, the median over rounds in which both ran in turn.
    pub fraction: f64,
}

/// A call that is timed.
pub(crate) type Call<'a> = Box<dyn FnMut() -> Result<()> + Send + 'a>;

/// A kernel, and the work that any implementation of it must do.
pub(crate) struct Kernel<'a> {
    /// What runs.
    pub name: String,
    /// What limits it.
    pub ceiling: Ceiling,
    /// Bytes or floating-point operations per element, by the ceiling.
    pub per_element: f64,
    /// Elements of one call.
    pub elements: usize,
    /// One call.
    pub call: Call<'a>,
}

/// What the crates' files share: the threads, the ceilings and the rows so far.
pub(crate) struct Session<'a> {
    plan: &'a Plan<'a>,
    threads: usize,
    ceilings: Ceilings,
    groups: Vec<&'static str>,
    rows: Vec<Row>,
}

impl Session<'_> {
    /// Whether the kernels of this crate are wanted.
    pub fn wants(&mut self, group: &'static str) -> bool {
        self.groups.push(group);
        self.plan.only.is_empty() || self.plan.only.iter().any(|name| name == group)
    }

    /// Parameters of the optimizer steps.
    pub fn parameters(&self) -> usize {
        self.plan.parameters
    }

    /// Times the kernel in turn with its ceiling, so that a change of the machine's speed meets
    /// both.
    pub fn measure(&mut self, group: &'static str, mut kernel: Kernel<'_>) -> Result<()> {
        let work = kernel.per_element * kernel.elements as f64;
        let (mut times, mut rates, mut fractions) = (vec![], vec![], vec![]);
        // The first round warms both up.
        for round in 0..=self.plan.rounds {
            let rate = self.ceilings.rate(kernel.ceiling)?;
            let time = seconds(&mut kernel.call)?;
            if round > 0 {
                times.push(time);
                rates.push(rate);
                fractions.push(work / time / rate);
            }
        }
        let time = median(times);
        self.rows.push(Row {
            group: group.to_string(),
            kernel: kernel.name,
            threads: self.threads,
            ceiling: kernel.ceiling,
            per_element: kernel.per_element,
            milliseconds: 1e3 * time,
            rate: work / time / 1e9,
            ceiling_rate: median(rates) / 1e9,
            fraction: median(fractions),
        });
        Ok(())
    }
}

/// Measures with one and with all threads, and prints a table or JSON.
///
/// # Errors
/// An unknown crate in the plan, those of the kernels, and of writing.
pub fn run(plan: &Plan<'_>, out: &mut dyn Write) -> Result<()> {
    let all = std::thread::available_parallelism()?.get();
    let mut counts = vec![1];
    if all > 1 {
        counts.push(all);
    }
    let mut rows = vec![];
    for threads in counts {
        rows.extend(with_threads(threads, || measure(plan, threads))??);
    }
    if plan.json {
        for row in &rows {
            writeln!(out, "{}", serde_json::to_string(row)?)?;
        }
        return Ok(());
    }
    print(&rows, plan, out)
}

fn measure(plan: &Plan<'_>, threads: usize) -> Result<Vec<Row>> {
    let mut session = Session {
        plan,
        threads,
        ceilings: Ceilings::default(),
        groups: vec![],
        rows: vec![],
    };
    optim::kernels(&mut session)?;
    nn::kernels(&mut session)?;
    #[cfg(feature = "convex")]
    convex::kernels(&mut session)?;
    #[cfg(feature = "graph-learning")]
    graph_learning::kernels(&mut session)?;
    #[cfg(feature = "sequence-design")]
    sequence_design::kernels(&mut session)?;
    #[cfg(feature = "guidance")]
    guidance::kernels(&mut session)?;
    let known = |name: &&String| !session.groups.iter().any(|group| group == name);
    if let Some(unknown) = plan.only.iter().find(known) {
        bail!(
            "no kernels of `{unknown}`; known: {}",
            session.groups.join(", ")
        );
    }
    Ok(session.rows)
}

fn print(rows: &[Row], plan: &Plan<'_>, out: &mut dyn Write) -> Result<()> {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::UTF8_HORIZONTAL_ONLY);

    table.set_header([
        "crate",
        "kernel",
        "threads",
        "per element",
        "ms",
        "rate",
        "ceiling",
        "fraction",
    ]);
    for row in rows {
        table.add_row([
            row.group.clone(),
            row.kernel.clone(),
            row.threads.to_string(),
            format!("{:.1} {}", row.per_element, row.ceiling.unit()),
            format!("{:.2}", row.milliseconds),
            format!("{:.1} G{}/s", row.rate, row.ceiling.unit()),
            format!("{} {:.1}", row.ceiling.name(), row.ceiling_rate),
            format!("{:.2}", row.fraction),
        ]);
    }
    writeln!(
        out,
        "medians of {} rounds in turn; optimizer steps over {} f32 parameters in {} tensors",
        plan.rounds,
        plan.parameters,
        optim::mixed_shapes(plan.parameters).len()
    )?;
    writeln!(out, "{table}")?;
    Ok(())
}

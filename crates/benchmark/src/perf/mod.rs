//! Our kernels against the machine's own ceilings, measured in the same run.

mod steps;
mod timing;

pub use steps::{gpt2_shapes, mixed_shapes, Workload};
pub use timing::{median, seconds, with_threads};

use anyhow::Result;
use serde::Serialize;
use std::io::Write;

/// One kernel's cost with a number of threads.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// What ran.
    pub kernel: String,
    /// Threads that it ran on.
    pub threads: usize,
    /// Bytes that the step must move per parameter, read and written bytes counted alike.
    pub bytes_per_parameter: f64,
    /// Median time of a step, in milliseconds.
    pub milliseconds: f64,
    /// Bytes per second over all parameters, in GB/s.
    pub bandwidth: f64,
    /// Copy bandwidth measured around this kernel, in GB/s.
    pub copy_bandwidth: f64,
    /// `bandwidth / copy_bandwidth`, the median over rounds in which both ran in turn.
    pub fraction: f64,
}

/// Measures everything and prints a table, or one JSON object a line.
///
/// # Errors
/// Those of the kernels, and of writing.
pub fn run(rounds: usize, parameters: usize, json: bool, out: &mut dyn Write) -> Result<()> {
    let all = std::thread::available_parallelism()?.get();
    let mut counts = vec![1];
    if all > 1 {
        counts.push(all);
    }
    let mut rows = vec![];
    for threads in counts {
        rows.extend(with_threads(threads, || {
            steps::measure(threads, parameters, rounds)
        })??);
    }
    if json {
        for row in &rows {
            writeln!(out, "{}", serde_json::to_string(row)?)?;
        }
        return Ok(());
    }
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::UTF8_HORIZONTAL_ONLY);

    table.set_header([
        "step",
        "threads",
        "B/parameter",
        "ms",
        "GB/s",
        "copy GB/s",
        "fraction of copy",
    ]);
    for row in &rows {
        table.add_row([
            row.kernel.clone(),
            row.threads.to_string(),
            format!("{:.1}", row.bytes_per_parameter),
            format!("{:.2}", row.milliseconds),
            format!("{:.1}", row.bandwidth),
            format!("{:.1}", row.copy_bandwidth),
            format!("{:.2}", row.fraction),
        ]);
    }
    writeln!(
        out,
        "{parameters} f32 parameters in {} tensors, median of {rounds} rounds",
        mixed_shapes(parameters).len()
    )?;
    writeln!(out, "{table}")?;
    Ok(())
}

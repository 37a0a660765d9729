//! Stored results in other programs' formats.

pub mod chapters;
pub mod tensorboard;

use crate::report::replace;
use crate::store::StoredTrial;
use crate::summary::ScenarioResult;
use crate::{Error, Result};
use std::path::Path;

/// Writes results with verdicts as JSON.
///
/// # Errors
/// [`Error::Io`].
pub fn json(results: &[ScenarioResult], path: &Path) -> Result<()> {
    let mut text = serde_json::to_string_pretty(results).map_err(|e| bad(path, &e))?;
    text.push('\n');
    replace(path, text.as_bytes())
}

/// The columns of [`csv`].
pub const COLUMNS: &str =
    "scenario,suite,data,device,version,arm,setting,seed,metric,value,seconds,error";

/// Writes one row for each trial and metric (one row without a metric for a failed trial), as
/// RFC 4180 text.
///
/// # Errors
/// [`Error::Io`].
pub fn csv(trials: &[StoredTrial], path: &Path) -> Result<()> {
    let mut text = format!("{COLUMNS}\r\n");
    for t in trials {
        let k = &t.key;
        let mut row = |metric: &str, value: String| {
            let seed = k.seed.to_string();
            let seconds = t.seconds.to_string();
            let error = t.error.as_deref().unwrap_or_default();
            let cells = [
                &*k.scenario,
                &k.suite,
                &k.data,
                &k.device,
                &k.version,
                &k.arm,
                &k.setting,
                &seed,
                metric,
                &value,
                &seconds,
                error,
            ];
            text.push_str(&cells.map(quoted).join(","));
            text.push_str("\r\n");
        };
        if t.outcome.metrics.is_empty() {
            row("", String::new());
        }
        for (name, value) in &t.outcome.metrics {
            row(name, value.to_string());
        }
    }
    replace(path, text.as_bytes())
}

fn quoted(cell: &str) -> String {
    if cell.contains(['"', ',', '\n', '\r']) {
        format!("\"{}\"", cell.replace('"', "\"\""))
    } else {
        cell.to_string()
    }
}

/// Writes the curves and metrics of every successful trial as event files, in
/// `folder/SCENARIO/SUITE/ARM/SETTING/seed-N`.
///
/// # Errors
/// [`Error::Io`].
pub fn tensorboard(trials: &[StoredTrial], folder: &Path) -> Result<()> {
    for t in trials.iter().filter(|t| t.error.is_none()) {
        let k = &t.key;
        let name = |part: &str| -> String {
            let clean = |c: char| {
                if c.is_alphanumeric() || "=.-_".contains(c) {
                    c
                } else {
                    '_'
                }
            };
            part.chars().map(clean).collect()
        };
        let place = [&k.scenario, &k.suite, &k.arm, &k.setting]
            .map(|p| name(p))
            .join("/");
        let path = folder
            .join(place)
            .join(format!("seed-{}", k.seed))
            .join(format!("events.out.tfevents.{}.thalweg", t.finished));
        replace(&path, &tensorboard::event_file(t))?;
    }
    Ok(())
}

fn bad(path: &Path, error: &serde_json::Error) -> Error {
    Error::BadFile {
        path: path.display().to_string(),
        reason: error.to_string(),
    }
}

//! Log lines and progress bars on standard error.

use crate::runner::{PROGRESS, TRIAL};
use anyhow::{Context, Result};
use indicatif::ProgressStyle;
use std::io::{self, IsTerminal};
use tracing::level_filters::LevelFilter;
use tracing_indicatif::IndicatifLayer;
use tracing_subscriber::filter::{filter_fn, EnvFilter};
use tracing_subscriber::prelude::*;

/// Bars on a terminal; plain lines when standard error is none; JSON lines when asked.
/// `RUST_LOG` chooses other lines.
///
/// # Errors
/// A malformed bar template or `RUST_LOG`.
pub(super) fn start(json: bool) -> Result<()> {
    let bars = !json && io::stderr().is_terminal();
    // Bars already show each trial; plain lines are the only sign of life without them.
    let default = if bars {
        format!("warn,thalweg_benchmark=info,{TRIAL}=off")
    } else {
        "warn,thalweg_benchmark=info,thalweg=info".into()
    };
    let filter = EnvFilter::builder()
        .with_default_directive(LevelFilter::WARN.into())
        .parse(std::env::var("RUST_LOG").unwrap_or(default))
        .context("RUST_LOG")?;
    let started = if json {
        let lines = tracing_subscriber::fmt::layer()
            .json()
            .with_writer(io::stderr);
        tracing_subscriber::registry()
            .with(lines.with_filter(filter))
            .try_init()
    } else if bars {
        let style = ProgressStyle::with_template(
            "{span_child_prefix}{bar:24} {pos}/{len} {msg} {elapsed}{eta:>8}",
        )?;
        let bars = IndicatifLayer::new().with_progress_style(style);
        let writer = bars.get_stderr_writer();
        let lines = tracing_subscriber::fmt::layer()
            .compact()
            .without_time()
            .with_target(false);
        let lines = lines.with_writer(writer).with_filter(filter);
        let bars = bars.with_filter(filter_fn(|meta| {
            meta.is_span() && meta.target() == PROGRESS
        }));
        tracing_subscriber::registry()
            .with(lines)
            .with(bars)
            .try_init()
    } else {
        let lines = tracing_subscriber::fmt::layer()
            .compact()
            .without_time()
            .with_target(false);
        let lines = lines
            .with_ansi(false)
            .with_writer(io::stderr)
            .with_filter(filter);
        tracing_subscriber::registry().with(lines).try_init()
    };
    started.context("logging")
}

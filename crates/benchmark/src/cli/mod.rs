//! The command line of `thalweg-bench`.

mod args;
mod commands;
mod data;
#[cfg(feature = "graph-learning")]
mod graph_scale;
#[cfg(feature = "graph-learning")]
mod graphfm;
mod logging;
mod measure;

use crate::registry::Registry;
use crate::Error;
use anyhow::{Context, Result};
use args::{Cli, Command};
use clap::Parser;
use serde::Serialize;
use std::ffi::OsString;
use std::io::{self, Write};
use std::path::Path;

/// Everything ran (and with `--strict`: no claim failed).
pub const SUCCESS: u8 = 0;
/// Something could not be done, or a trial failed to run.
pub const FAILURE: u8 = 1;
/// `--strict` and a claim failed.
pub const CLAIM_FAILED: u8 = 3;
/// The user interrupted the run.
pub const INTERRUPTED: u8 = 130;

/// Parses `args`, does what they say and gives the exit status; a wrong argument ends the process
/// with status 2.
///
/// The registry is made by the caller, so that other scenarios can be run by the same program.
pub fn run(
    registry: impl FnOnce() -> crate::Result<Registry>,
    args: impl IntoIterator<Item = OsString>,
) -> u8 {
    let cli = Cli::parse_from(args);
    let mut out = io::stdout().lock();
    let code = registry()
        .map_err(Into::into)
        .and_then(|r| dispatch(&cli, &r, &mut out));
    match code {
        Ok(code) => code,
        Err(error) if closed_pipe(&error) => SUCCESS,
        Err(error) => {
            // Nothing is left to tell anybody when standard error is closed as well.
            let _ = writeln!(io::stderr(), "error: {error:#}");
            FAILURE
        }
    }
}

/// Writes a value as JSON to a file.
fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value)? + "\n";
    std::fs::write(path, text).with_context(|| format!("cannot write `{}`", path.display()))
}

fn dispatch(cli: &Cli, registry: &Registry, out: &mut dyn Write) -> Result<u8> {
    logging::start(cli.json_log)?;
    match &cli.command {
        Command::Run(args) => commands::run(registry, args, out),
        Command::Report(args) => commands::report(registry, args, out),
        Command::Compare(args) => commands::compare(args, out),
        Command::Verify(args) => commands::verify(args, out),
        Command::List => commands::list(registry, out),
        Command::Methods(args) => commands::methods(registry, args, out),
        Command::Data(args) => data::data(args, out),
        Command::Export(args) => commands::export(registry, args, out),
        Command::Perf(args) => measure::perf(args, out).map(|()| SUCCESS),
        Command::Peers(args) => measure::peers(args, out).map(|()| SUCCESS),
        #[cfg(feature = "graph-learning")]
        Command::GraphScale(args) => graph_scale::graph_scale(args, out).map(|()| SUCCESS),
        #[cfg(feature = "graph-learning")]
        Command::Graphfm(args) => graphfm::graphfm(args, out).map(|()| SUCCESS),
    }
}

/// `thalweg-bench list | head` is no failure.
fn closed_pipe(error: &anyhow::Error) -> bool {
    let broken = |e: &io::Error| e.kind() == io::ErrorKind::BrokenPipe;
    error.downcast_ref::<io::Error>().is_some_and(broken)
        || matches!(error.downcast_ref(), Some(Error::Io { source, .. }) if broken(source))
}

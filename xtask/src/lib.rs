//! The development commands behind `cargo xtask`: they start cargo, Python's `venv` and the
//! `thalweg-bench` binary, and hold the checks of the workspace itself (who may import whom,
//! links in the documentation, which feature sets compile). No method lives here.
//!
//! | module | what it gives |
//! | --- | --- |
//! | [`command`] | run a program, print what runs, keep its exit status |
//! | [`workspace`] | the workspace as `cargo metadata` sees it |
//! | [`binary`] | hand a command over to `thalweg-bench` |
//! | [`suite`] | `test` and `lint` |
//! | [`features`], [`cuda`] | type-check every feature set, the devices' when asked |
//! | [`venv`] | Python environments from pinned requirements |
//! | [`links`] | relative links and anchors of the Markdown files |
//! | [`floors`] | the table of who may import whom |

// A command-line tool talks to its user on the terminal.
#![allow(clippy::print_stdout, clippy::print_stderr)]

pub mod binary;
#[cfg(doctest)]
mod book;
pub mod command;
pub mod cuda;
pub mod features;
pub mod floors;
pub mod links;
pub mod suite;
pub mod venv;
pub mod workspace;

use std::ffi::OsString;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};

use crate::workspace::Workspace;

/// Development commands of the thalweg workspace.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version)]
pub struct Cli {
    /// How the `thalweg-bench` binary is built.
    #[command(flatten)]
    pub build: binary::Build,
    /// What to do.
    #[command(subcommand)]
    pub task: Task,
}

/// Arguments that belong to `thalweg-bench`; `--help` shows that program's own help.
#[derive(Args, Clone, Debug, Default)]
#[command(disable_help_flag = true)]
pub struct Passed {
    /// Arguments of `thalweg-bench` (`--help` lists them).
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub args: Vec<OsString>,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Task {
    /// Run scenarios, store their trials, print the verdicts and write the report.
    Bench(Passed),
    /// Write the report again from the stored trials.
    Report(Passed),
    /// Compare two stored runs.
    Compare(Passed),
    /// List the scenarios.
    List(Passed),
    /// Write stored results as JSON, CSV or TensorBoard event files.
    Export(Passed),
    /// Write the table of methods in the documentation, or check that it is up to date.
    Methods(Passed),
    /// Check our implementations against files of reference numbers.
    Verify(Passed),
    /// List the data sets, or fetch one.
    Data(Passed),
    /// Measure our kernels against this machine's own ceilings.
    Perf(Passed),
    /// Time ours beside the packages that users would otherwise pick (makes a Python environment).
    Peers(Passed),
    /// Run every test of the workspace, doctests included.
    Test(suite::Selection),
    /// Formatting, clippy, rustdoc and documentation links, all without a warning.
    Lint,
    /// Type-check every feature set that can be checked on this machine.
    Features(features::Options),
}

/// Runs one command and gives back the exit status of what it started.
///
/// # Errors
/// A program that cannot be started, a workspace that cannot be read, or a failed check that is
/// not a program's own exit status.
pub fn run(cli: &Cli) -> Result<ExitCode> {
    let workspace = Workspace::read()?;
    let build = &cli.build;
    match &cli.task {
        Task::Bench(passed) => binary::hand_over(build, "run", &passed.args),
        Task::Report(passed) => binary::hand_over(build, "report", &passed.args),
        Task::Compare(passed) => binary::hand_over(build, "compare", &passed.args),
        Task::List(passed) => binary::hand_over(build, "list", &passed.args),
        Task::Export(passed) => binary::hand_over(build, "export", &passed.args),
        Task::Methods(passed) => binary::hand_over(build, "methods", &passed.args),
        Task::Verify(passed) => binary::hand_over(build, "verify", &passed.args),
        Task::Data(passed) => binary::hand_over(build, "data", &passed.args),
        Task::Perf(passed) => binary::hand_over(build, "perf", &passed.args),
        Task::Peers(passed) => binary::peers(&workspace, build, &passed.args),
        Task::Test(selection) => suite::test(&workspace, selection),
        Task::Lint => suite::lint(&workspace),
        Task::Features(options) => features::check_all(&workspace, options),
    }
}

//! `cargo xtask`: the one entry point for whoever works on thalweg.

use std::process::ExitCode;

use clap::Parser;

fn main() -> anyhow::Result<ExitCode> {
    xtask::run(&xtask::Cli::parse())
}

//! Handing a command over to the `thalweg-bench` binary.

use std::ffi::{OsStr, OsString};
use std::process::{Command, ExitCode};

use anyhow::Result;
use clap::Args;

use crate::command::{cargo, replace};
use crate::venv;
use crate::workspace::Workspace;

/// How the binary is built; these stand before the command's name.
#[derive(Args, Clone, Debug, Default)]
pub struct Build {
    /// Features of the benchmark crate, such as `cuda` (comma-separated).
    #[arg(long, value_delimiter = ',', value_name = "FEATURES")]
    pub features: Vec<String>,
    /// Leave out the method crates that `--features` does not name.
    #[arg(long)]
    pub no_default_features: bool,
}

/// The cargo command that builds and runs `thalweg-bench VERB ARGS`.
pub fn bench_command(build: &Build, verb: &str, args: &[OsString]) -> Command {
    let mut command = cargo();
    command.args([
        "run",
        "--package",
        "thalweg-benchmark",
        "--bin",
        "thalweg-bench",
    ]);
    if build.no_default_features {
        command.arg("--no-default-features");
    }
    if !build.features.is_empty() {
        command.arg("--features").arg(build.features.join(","));
    }
    command.arg("--").arg(verb).args(args);
    command
}

/// Becomes `thalweg-bench VERB ARGS`.
///
/// # Errors
/// Cargo cannot be started.
pub fn hand_over(build: &Build, verb: &str, args: &[OsString]) -> Result<ExitCode> {
    replace(bench_command(build, verb, args))
}

/// Becomes `thalweg-bench peers --python INTERPRETER ARGS`, after making the Python environment;
/// an interpreter that the caller names is taken as it is.
///
/// # Errors
/// The environment cannot be made, or cargo cannot be started.
pub fn peers(workspace: &Workspace, build: &Build, args: &[OsString]) -> Result<ExitCode> {
    let mut all = args.to_vec();
    if needs_interpreter(args) {
        let requirements = workspace.root.join("xtask/peers/requirements.txt");
        let python = venv::ensure(&workspace.scratch().join("venv"), &requirements)?;
        all.insert(0, OsString::from("--python"));
        all.insert(1, python.into_os_string());
    }
    hand_over(build, "peers", &all)
}

/// False where the arguments name an interpreter or only ask for help.
fn needs_interpreter(args: &[OsString]) -> bool {
    let answers = |arg: &OsString| {
        let arg: &OsStr = arg;
        ["-h", "--help", "--python"]
            .iter()
            .any(|known| arg == *known)
            || arg.to_string_lossy().starts_with("--python=")
    };
    !args.iter().any(answers)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::line;
    use crate::{Cli, Task};
    use clap::Parser;

    fn parse(words: &[&str]) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(std::iter::once("xtask").chain(words.iter().copied()))
    }

    #[test]
    fn arguments_reach_the_binary_untouched() {
        let cli = parse(&["bench", "--suite", "standard", "--help", "-x", "lion"]).unwrap();
        let Task::Bench(passed) = &cli.task else {
            panic!("{cli:?}")
        };
        let line = line(&bench_command(&cli.build, "run", &passed.args));
        assert!(
            line.ends_with("run --package thalweg-benchmark --bin thalweg-bench -- run --suite standard --help -x lion"),
            "{line}"
        );
    }

    #[test]
    fn build_options_stand_before_the_command() {
        let cli = parse(&["--no-default-features", "--features", "optim,cuda", "perf"]).unwrap();
        let line = line(&bench_command(&cli.build, "perf", &[]));
        assert!(
            line.contains("--no-default-features --features optim,cuda -- perf"),
            "{line}"
        );
    }

    #[test]
    fn unknown_commands_and_arguments_are_refused() {
        for words in [
            &["nonsense"][..],
            &["--nonsense", "bench"],
            &["lint", "--x"],
            &["test", "--x"],
            &[],
        ] {
            assert!(parse(words).is_err(), "{words:?} was accepted");
        }
    }

    #[test]
    fn the_command_line_is_well_formed() {
        <Cli as clap::CommandFactory>::command().debug_assert();
    }

    #[test]
    fn only_a_run_of_the_peers_needs_the_environment() {
        let of = |words: &[&str]| {
            needs_interpreter(&words.iter().map(OsString::from).collect::<Vec<_>>())
        };
        assert!(of(&[]) && of(&["--only", "optim"]));
        assert!(!of(&["--help"]) && !of(&["--python", "python3"]) && !of(&["--python=python3"]));
    }
}

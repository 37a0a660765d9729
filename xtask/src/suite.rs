//! `test` and `lint`: the checks that every change must pass, the ones that CI runs.

use std::process::{Command, ExitCode};

use anyhow::{bail, Result};
use clap::Args;

use crate::command::{cargo, run_all};
use crate::links;
use crate::workspace::{Package, Workspace};

/// What is tested.
#[derive(Args, Clone, Debug, Default)]
pub struct Selection {
    /// Only this package, with or without `thalweg-` (may come again).
    #[arg(short, long, value_name = "NAME")]
    pub package: Vec<String>,
    /// Arguments of the test programs, after `--`.
    #[arg(last = true)]
    pub args: Vec<String>,
}

/// Features that are tested wherever they exist: those that only tests and the benchmark use, and the
/// adaptors for other libraries.
const OF_TESTS: [&str; 4] = ["models", "testing", "transformers", "verify"];

/// What the packages' tests need, as `package/feature`: what a target requires, and the features
/// that exist for tests.
fn tested_features<'a>(packages: impl IntoIterator<Item = &'a Package>) -> String {
    let mut all = Vec::new();
    for package in packages {
        let tested = |name: &&String| {
            OF_TESTS.contains(&name.as_str()) || package.required_features.contains(*name)
        };
        all.extend(
            package
                .features
                .keys()
                .filter(tested)
                .map(|name| format!("{}/{name}", package.name)),
        );
    }
    all.join(",")
}

/// The whole workspace with the features of its tests.
fn everything(workspace: &Workspace, verb: &str) -> Command {
    let mut command = cargo();
    command
        .current_dir(&workspace.root)
        .args([verb, "--workspace"]);
    let features = tested_features(&workspace.packages);
    if !features.is_empty() {
        command.arg("--features").arg(features);
    }
    command
}

fn test_command(workspace: &Workspace, selection: &Selection) -> Result<Command> {
    let mut command = if selection.package.is_empty() {
        everything(workspace, "test")
    } else {
        let chosen = selection
            .package
            .iter()
            .map(|name| workspace.member(name))
            .collect::<Result<Vec<_>>>()?;
        let mut command = cargo();
        command.current_dir(&workspace.root).arg("test");
        command.args(
            chosen
                .iter()
                .flat_map(|package| ["--package", &package.name]),
        );
        let features = tested_features(chosen);
        if !features.is_empty() {
            command.arg("--features").arg(features);
        }
        command
    };
    if !selection.args.is_empty() {
        command.arg("--").args(&selection.args);
    }
    Ok(command)
}

/// Runs the unit tests, the integration tests and the doctests.
///
/// # Errors
/// An unknown package, or cargo cannot be started.
pub fn test(workspace: &Workspace, selection: &Selection) -> Result<ExitCode> {
    run_all([test_command(workspace, selection)?])
}

fn lint_commands(workspace: &Workspace) -> [Command; 3] {
    let mut format = cargo();
    format
        .current_dir(&workspace.root)
        .args(["fmt", "--all", "--check"]);
    let mut clippy = everything(workspace, "clippy");
    clippy.args(["--all-targets", "--", "-D", "warnings"]);
    let mut doc = everything(workspace, "doc");
    doc.arg("--no-deps").env("RUSTDOCFLAGS", "-D warnings");
    [format, clippy, doc]
}

/// Formatting, clippy, rustdoc and the links of the documentation.
///
/// # Errors
/// A broken link, a page that the book does not list, or cargo cannot be started.
pub fn lint(workspace: &Workspace) -> Result<ExitCode> {
    let broken = links::broken(&workspace.root)?;
    if !broken.is_empty() {
        bail!(
            "broken links in the documentation:\n  {}",
            broken.join("\n  ")
        );
    }
    eprintln!("documentation links: sound");
    run_all(lint_commands(workspace))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::line;
    use std::collections::{BTreeMap, BTreeSet};
    use std::path::PathBuf;

    fn workspace() -> Workspace {
        let package = |name: &str, features: &[&str], required: &[&str]| Package {
            name: name.to_owned(),
            publish: true,
            features: features
                .iter()
                .map(|name| ((*name).to_owned(), Vec::new()))
                .collect::<BTreeMap<_, _>>(),
            required_features: required
                .iter()
                .map(|name| (*name).to_owned())
                .collect::<BTreeSet<_>>(),
            ..Package::default()
        };
        Workspace {
            root: PathBuf::from("/w"),
            target: PathBuf::from("/w/target"),
            packages: vec![
                package("thalweg-a", &["cuda", "default", "verify"], &[]),
                package("thalweg-b", &["cuda", "extra"], &["extra"]),
            ],
        }
    }

    #[test]
    fn the_whole_workspace_is_tested_with_the_features_of_its_tests() {
        let command = test_command(&workspace(), &Selection::default()).unwrap();
        assert!(
            line(&command)
                .ends_with("test --workspace --features thalweg-a/verify,thalweg-b/extra"),
            "{}",
            line(&command)
        );
    }

    #[test]
    fn one_package_is_tested_with_its_own_features_only() {
        let selection = Selection {
            package: vec!["b".to_owned()],
            args: vec!["it::".to_owned()],
        };
        let command = test_command(&workspace(), &selection).unwrap();
        assert!(
            line(&command).ends_with("test --package thalweg-b --features thalweg-b/extra -- it::"),
            "{}",
            line(&command)
        );
        let unknown = Selection {
            package: vec!["zzz".to_owned()],
            args: Vec::new(),
        };
        assert!(test_command(&workspace(), &unknown).is_err());
    }

    #[test]
    fn lint_denies_every_warning() {
        let [format, clippy, doc] = lint_commands(&workspace());
        assert!(line(&format).ends_with("fmt --all --check"));
        assert!(line(&clippy).ends_with("--all-targets -- -D warnings"));
        assert!(
            line(&doc).starts_with("RUSTDOCFLAGS='-D warnings' ")
                && line(&doc).ends_with("--no-deps")
        );
    }
}

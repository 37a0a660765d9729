//! Type-checks every set of features that can be checked on this machine.

use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{bail, Context, Result};
use clap::Args;

use crate::command::{cargo, run_all};
use crate::cuda;
use crate::workspace::{Package, Workspace};

/// Features that need more than a Rust toolchain.
const DEVICES: [&str; 5] = ["cuda", "cudnn", "metal", "mpi", "nccl"];

/// The system whose standard library a Metal check needs.
const APPLE: &str = "aarch64-apple-darwin";

/// Which device features are checked beside the plain ones.
#[derive(Args, Clone, Debug, Default)]
pub struct Options {
    /// Instead, check the features `cuda` and `cudnn` and compile every CUDA kernel to PTX; fetches
    /// nvcc as Python wheels where there is none. No GPU is needed.
    #[arg(long)]
    pub cuda: bool,
    /// Instead, check the `metal` feature; off macOS that needs `rustup target add aarch64-apple-darwin`.
    #[arg(long)]
    pub metal: bool,
}

/// Checks the devices that were asked for, or else the plain feature sets.
///
/// # Errors
/// What a device check needs cannot be had, or cargo cannot be started.
pub fn check_all(workspace: &Workspace, options: &Options) -> Result<ExitCode> {
    if !options.cuda && !options.metal {
        let code = run_all(
            plain(workspace)
                .into_iter()
                .map(|words| check(workspace, &words)),
        )?;
        eprintln!("skipped: cuda, cudnn (need nvcc; `--cuda` finds or fetches it)");
        eprintln!("skipped: metal (needs Apple's standard library; `--metal` checks it)");
        return Ok(code);
    }
    if options.cuda {
        let code = cuda::check(workspace)?;
        if code != ExitCode::SUCCESS {
            return Ok(code);
        }
    }
    if options.metal {
        return run_all([metal(workspace)?]);
    }
    Ok(ExitCode::SUCCESS)
}

/// `cargo check` with these arguments.
fn check(workspace: &Workspace, words: &[String]) -> Command {
    let mut command = cargo();
    command
        .current_dir(&workspace.root)
        .arg("check")
        .args(words);
    command
}

/// Every plain set, as arguments of `cargo check`: the workspace with and without its defaults,
/// then each crate alone with nothing, with its defaults, and with each feature of its own.
fn plain(workspace: &Workspace) -> Vec<Vec<String>> {
    let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
    let mut sets = vec![
        words("--workspace"),
        words("--workspace --no-default-features"),
    ];
    for package in workspace.libraries() {
        let name = &package.name;
        sets.push(words(&format!("--package {name} --no-default-features")));
        if package
            .features
            .get("default")
            .is_some_and(|on| !on.is_empty())
        {
            sets.push(words(&format!("--package {name}")));
        }
        let own = package
            .features
            .keys()
            .filter(|feature| *feature != "default");
        let own = own.filter(|feature| !DEVICES.contains(&feature.as_str()));
        sets.extend(own.map(|feature| {
            words(&format!(
                "--package {name} --no-default-features --features {feature}"
            ))
        }));
    }
    sets
}

/// The published packages that have this feature, as arguments that select and enable it.
pub fn with_feature<'a>(
    packages: impl IntoIterator<Item = &'a Package>,
    feature: &str,
) -> Vec<String> {
    let having: Vec<_> = packages
        .into_iter()
        .filter(|package| package.features.contains_key(feature))
        .collect();
    let mut words: Vec<_> = having
        .iter()
        .flat_map(|package| ["--package".to_owned(), package.name.clone()])
        .collect();
    words.push("--features".to_owned());
    words.push(
        having
            .iter()
            .map(|package| format!("{}/{feature}", package.name))
            .collect::<Vec<_>>()
            .join(","),
    );
    words
}

/// The check of the libraries' `metal` feature.
fn metal(workspace: &Workspace) -> Result<Command> {
    if cfg!(target_os = "macos") {
        return Ok(check(
            workspace,
            &with_feature(workspace.libraries(), "metal"),
        ));
    }
    let output = Command::new("rustc")
        .args(["--print", "target-libdir", "--target", APPLE])
        .output();
    let folder = output.context("cannot start `rustc`")?.stdout;
    if !PathBuf::from(String::from_utf8_lossy(&folder).trim()).exists() {
        bail!("the metal check needs Apple's standard library: rustup target add {APPLE}");
    }
    // The binary's C code (SQLite, the allocator) would need Apple's compiler as well.
    let libraries = workspace
        .libraries()
        .filter(|package| package.short_name() != "benchmark");
    let mut words = with_feature(libraries, "metal");
    words.extend(["--target".to_owned(), APPLE.to_owned()]);
    Ok(check(workspace, &words))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn package(name: &str, features: &[(&str, &[&str])]) -> Package {
        let strings = |list: &[&str]| list.iter().map(|one| (*one).to_owned()).collect();
        Package {
            name: name.to_owned(),
            publish: true,
            features: features
                .iter()
                .map(|(name, on)| ((*name).to_owned(), strings(on)))
                .collect::<BTreeMap<_, _>>(),
            ..Package::default()
        }
    }

    fn workspace() -> Workspace {
        Workspace {
            root: PathBuf::from("/w"),
            target: PathBuf::from("/w/target"),
            packages: vec![
                package(
                    "thalweg-a",
                    &[("cuda", &[]), ("default", &["x"]), ("x", &[])],
                ),
                package("thalweg-b", &[("default", &[]), ("metal", &[])]),
            ],
        }
    }

    #[test]
    fn every_plain_set_is_checked_and_no_device() {
        let sets: Vec<_> = plain(&workspace())
            .iter()
            .map(|words| words.join(" "))
            .collect();
        assert_eq!(
            sets,
            [
                "--workspace",
                "--workspace --no-default-features",
                "--package thalweg-a --no-default-features",
                "--package thalweg-a",
                "--package thalweg-a --no-default-features --features x",
                "--package thalweg-b --no-default-features",
            ]
        );
    }

    #[test]
    fn a_device_is_checked_where_a_package_has_it() {
        let words = with_feature(workspace().libraries(), "cuda").join(" ");
        assert_eq!(words, "--package thalweg-a --features thalweg-a/cuda");
    }
}

//! Python environments made on demand from a file of pinned requirements.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{bail, Context, Result};

use crate::command::run;

/// Left in an environment once everything is installed: the requirements it was made from.
const STAMP: &str = "thalweg-requirements.txt";

/// The interpreter of the environment in `folder`, which holds exactly `requirements`: made when
/// it is missing, made anew when the file's text has changed, left alone otherwise.
///
/// The base interpreter is `$PYTHON`, or `python3`.
///
/// # Errors
/// The file cannot be read, Python is missing, or pip fails.
pub fn ensure(folder: &Path, requirements: &Path) -> Result<PathBuf> {
    let wanted = std::fs::read_to_string(requirements)
        .with_context(|| format!("cannot read the requirements `{}`", requirements.display()))?;
    let python = interpreter(folder);
    if is_current(folder, &wanted) {
        return Ok(python);
    }
    let base = std::env::var_os("PYTHON").unwrap_or_else(|| OsString::from("python3"));
    let mut make = Command::new(&base);
    make.args(["-m", "venv", "--clear"]).arg(folder);
    succeed(&mut make)
        .context("a Python 3 with its `venv` module is needed (set PYTHON to choose one)")?;
    let mut install = Command::new(&python);
    install.args([
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "--no-input",
        "--requirement",
    ]);
    succeed(install.arg(requirements)).context("pip could not install the pinned requirements")?;
    // Written last, so that an installation that was cut short is made again.
    let stamp = folder.join(STAMP);
    std::fs::write(&stamp, wanted)
        .with_context(|| format!("cannot write `{}`", stamp.display()))?;
    Ok(python)
}

fn succeed(command: &mut Command) -> Result<()> {
    let status = run(command)?;
    if !status.success() {
        bail!("`{}` ended with {status}", crate::command::line(command));
    }
    Ok(())
}

fn interpreter(folder: &Path) -> PathBuf {
    if cfg!(windows) {
        folder.join("Scripts").join("python.exe")
    } else {
        folder.join("bin").join("python")
    }
}

fn is_current(folder: &Path, wanted: &str) -> bool {
    let stamp = std::fs::read_to_string(folder.join(STAMP));
    interpreter(folder).exists() && stamp.is_ok_and(|made_from| made_from == wanted)
}

/// The environment's folder of installed packages.
///
/// # Errors
/// The interpreter cannot be started or does not say.
pub fn packages(python: &Path) -> Result<PathBuf> {
    let output = Command::new(python)
        .args([
            "-c",
            "import sysconfig; print(sysconfig.get_path('purelib'))",
        ])
        .output()
        .with_context(|| format!("cannot start `{}`", python.display()))?;
    let folder = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    if !output.status.success() || folder.is_empty() {
        bail!("`{}` does not say where its packages are", python.display());
    }
    Ok(PathBuf::from(folder))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(folder: &Path, from: &str) {
        let python = interpreter(folder);
        std::fs::create_dir_all(python.parent().unwrap()).unwrap();
        std::fs::write(python, "").unwrap();
        std::fs::write(folder.join(STAMP), from).unwrap();
    }

    #[test]
    fn an_environment_is_current_only_for_the_text_it_was_made_from() {
        let folder = tempfile::tempdir().unwrap();
        assert!(!is_current(folder.path(), "torch==1\n"), "an empty folder");
        made(folder.path(), "torch==1\n");
        assert!(is_current(folder.path(), "torch==1\n"));
        assert!(
            !is_current(folder.path(), "torch==2\n"),
            "changed requirements"
        );
        std::fs::remove_file(interpreter(folder.path())).unwrap();
        assert!(
            !is_current(folder.path(), "torch==1\n"),
            "a lost interpreter"
        );
    }

    #[test]
    fn a_current_environment_is_used_without_starting_anything() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("requirements.txt");
        std::fs::write(&file, "torch==1\n").unwrap();
        let venv = folder.path().join("venv");
        made(&venv, "torch==1\n");
        // Starting the empty file that stands for the interpreter would fail.
        assert_eq!(ensure(&venv, &file).unwrap(), interpreter(&venv));
    }

    #[test]
    fn missing_requirements_are_named() {
        let error = ensure(Path::new("nowhere"), Path::new("no-such-file.txt")).unwrap_err();
        assert!(format!("{error:#}").contains("no-such-file.txt"));
    }
}

//! The CUDA checks that need no GPU: the crates type-check with their features `cuda` and
//! `cudnn`, and every kernel text compiles to PTX.
//!
//! Candle builds its own kernels with nvcc. Where no toolkit is installed, NVIDIA's Python
//! wheels bring the compiler and its headers.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{bail, Context, Result};

use crate::command::{cargo, run_all};
use crate::features::with_feature;
use crate::venv;
use crate::workspace::Workspace;

/// The compute capability that is compiled for where the caller names none.
const CAPABILITY: &str = "90";

/// A CUDA compiler with its headers.
struct Toolkit {
    /// Set where the toolkit is not an installed one that build scripts find by themselves.
    root: Option<PathBuf>,
    capability: OsString,
}

impl Toolkit {
    /// The installed toolkit, or else the one from wheels in the workspace's build folder.
    fn find_or_fetch(workspace: &Workspace) -> Result<Self> {
        let capability = std::env::var_os("CUDA_COMPUTE_CAP").unwrap_or_else(|| CAPABILITY.into());
        if Command::new("nvcc")
            .arg("--version")
            .output()
            .is_ok_and(|output| output.status.success())
        {
            return Ok(Self {
                root: None,
                capability,
            });
        }
        if !cfg!(all(target_os = "linux", target_arch = "x86_64")) {
            bail!("there is no `nvcc` here, and its wheels are pinned for Linux on x86-64 only");
        }
        let requirements = workspace.root.join("xtask/cuda/requirements.txt");
        let python = venv::ensure(&workspace.scratch().join("cuda-venv"), &requirements)
            .context("there is no `nvcc` here, and its wheels could not be installed")?;
        let root = venv::packages(&python)?.join("nvidia/cu13");
        let nvcc = root.join("bin/nvcc");
        if !nvcc.exists() {
            bail!("the wheels brought no compiler at `{}`", nvcc.display());
        }
        Ok(Self {
            root: Some(root),
            capability,
        })
    }

    /// Tells the command's build scripts where the toolkit is.
    fn describe_to(&self, command: &mut Command) -> Result<()> {
        command.env("CUDA_COMPUTE_CAP", &self.capability);
        let Some(root) = &self.root else {
            return Ok(());
        };
        for name in [
            "CUDA_HOME",
            "CUDA_PATH",
            "CUDA_ROOT",
            "CUDA_TOOLKIT_ROOT_DIR",
        ] {
            command.env(name, root);
        }
        let old = std::env::var_os("PATH").unwrap_or_default();
        let path = std::iter::once(root.join("bin")).chain(std::env::split_paths(&old));
        command.env(
            "PATH",
            std::env::join_paths(path).context("PATH cannot take the toolkit's folder")?,
        );
        Ok(())
    }

    /// The command that compiles a kernel text to PTX beside it.
    fn compile(&self, text: &Path) -> Command {
        let nvcc = self
            .root
            .as_ref()
            .map_or("nvcc".into(), |root| root.join("bin/nvcc"));
        let mut command = Command::new(nvcc);
        // A text defines conversions that some of its dtypes do not need; nvcc would warn.
        let architecture = format!("-arch=sm_{}", self.capability.to_string_lossy());
        command
            .args(["-ptx", "-w", &architecture, "-o"])
            .arg(text.with_extension("ptx"))
            .arg(text);
        command
    }
}

/// Names the folder to which the kernel checks of the crates also write each kernel's CUDA text.
const TEXTS: &str = "THALWEG_KERNEL_TEXTS";

/// How the tests that check a kernel's text are called.
const TESTS: &str = "the_device_text";

/// Type-checks the crates with `cuda` and with `cudnn`, then compiles every kernel text to PTX.
///
/// # Errors
/// No toolkit can be had, no kernel text is written, or a program cannot be started.
pub fn check(workspace: &Workspace) -> Result<ExitCode> {
    let toolkit = Toolkit::find_or_fetch(workspace)?;
    let mut programs = Vec::new();
    // candle finds cuDNN when a program starts, so that checking needs none.
    for feature in ["cuda", "cudnn"] {
        let mut types = cargo();
        types.current_dir(&workspace.root).arg("check");
        types.args(with_feature(workspace.libraries(), feature));
        toolkit.describe_to(&mut types)?;
        programs.push(types);
    }

    let folder = workspace.scratch().join("cuda-kernels");
    empty(&folder)?;
    let mut write = cargo();
    write
        .current_dir(&workspace.root)
        .arg("test")
        .env(TEXTS, &folder);
    let with_kernels = workspace
        .libraries()
        .filter(|package| package.features.contains_key("cuda"));
    write
        .args(with_feature(with_kernels, "verify"))
        .args(["--lib", "--tests", "--quiet", "--", TESTS]);
    programs.push(write);
    let code = run_all(programs)?;
    if code != ExitCode::SUCCESS {
        return Ok(code);
    }
    let texts = kernel_texts(&folder)?;
    if texts.is_empty() {
        bail!("no kernel text was written to `{}`", folder.display());
    }
    let code = run_all(texts.iter().map(|text| toolkit.compile(text)))?;
    if code == ExitCode::SUCCESS {
        eprintln!("{} kernel texts compile to PTX", texts.len());
    }
    Ok(code)
}

/// The folder, made anew.
fn empty(folder: &Path) -> Result<()> {
    let cannot = || format!("cannot make the folder `{}`", folder.display());
    if folder.exists() {
        std::fs::remove_dir_all(folder).with_context(cannot)?;
    }
    std::fs::create_dir_all(folder).with_context(cannot)
}

/// The CUDA texts in the folder, by name.
fn kernel_texts(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut texts = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|ending| ending == "cu") {
            texts.push(path);
        }
    }
    texts.sort();
    Ok(texts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::line;

    #[test]
    fn a_toolkit_from_wheels_is_described_to_build_scripts() {
        let toolkit = Toolkit {
            root: Some(PathBuf::from("/t")),
            capability: "86".into(),
        };
        let mut command = Command::new("cargo");
        toolkit.describe_to(&mut command).unwrap();
        let line = line(&command);
        assert!(
            line.contains("CUDA_HOME=/t ") && line.contains("CUDA_COMPUTE_CAP=86 "),
            "{line}"
        );
        let path = command
            .get_envs()
            .find(|(name, _)| *name == "PATH")
            .and_then(|(_, value)| value)
            .unwrap();
        assert_eq!(
            std::env::split_paths(path).next(),
            Some(PathBuf::from("/t/bin"))
        );
    }

    #[test]
    fn a_text_compiles_for_the_named_device() {
        let toolkit = Toolkit {
            root: None,
            capability: "86".into(),
        };
        let command = toolkit.compile(Path::new("/k/lion.cu"));
        assert!(
            line(&command).ends_with("nvcc -ptx -w -arch=sm_86 -o /k/lion.ptx /k/lion.cu"),
            "{}",
            line(&command)
        );
    }

    #[test]
    fn old_texts_are_not_compiled_again() {
        let folder = tempfile::tempdir().unwrap();
        let texts = folder.path().join("texts");
        empty(&texts).unwrap();
        for name in ["b.cu", "a.cu", "a.ptx"] {
            std::fs::write(texts.join(name), "").unwrap();
        }
        assert_eq!(
            kernel_texts(&texts).unwrap(),
            [texts.join("a.cu"), texts.join("b.cu")]
        );
        empty(&texts).unwrap();
        assert!(kernel_texts(&texts).unwrap().is_empty());
    }
}

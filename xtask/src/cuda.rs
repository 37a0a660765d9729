//! The CUDA checks that need no GPU: the crates type-check with their `cuda` feature, and every
//! kernel text compiles to PTX.
//!
//! Candle builds its own kernels with nvcc. Where no toolkit is installed, NVIDIA's Python
//! wheels bring the compiler and its headers.

use std::ffi::OsString;
use std::path::PathBuf;
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
}

/// Type-checks the crates with `cuda`, then compiles every kernel text.
///
/// # Errors
/// No toolkit can be had, the kernel texts cannot be written, or cargo cannot be started.
pub fn check(workspace: &Workspace) -> Result<ExitCode> {
    let toolkit = Toolkit::find_or_fetch(workspace)?;
    let mut types = cargo();
    types.current_dir(&workspace.root).arg("check");
    types.args(with_feature(workspace.libraries(), "cuda"));
    toolkit.describe_to(&mut types)?;
    run_all([types])
}

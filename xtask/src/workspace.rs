//! The workspace as `cargo metadata` describes it: packages, features, normal dependencies.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::{bail, Context, Result};
use serde_json::Value;

use crate::command::cargo;

/// What a dependency is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Compiled for every user of the package (build scripts' dependencies count as such).
    Normal,
    /// Compiled for the package's own tests and examples only.
    Development,
}

/// One line of a package's dependency tables.
#[derive(Clone, Debug)]
pub struct Dependency {
    /// The package's name (not a rename).
    pub package: String,
    /// The name that the code and the feature table use.
    pub alias: String,
    /// What it is for.
    pub kind: Kind,
    /// Features that this line switches on.
    pub features: Vec<String>,
    /// True when the line gives the folder of a workspace member without a version, which a
    /// registry would refuse.
    pub path_only: bool,
}

/// One member of the workspace.
#[derive(Clone, Debug, Default)]
pub struct Package {
    /// Its name.
    pub name: String,
    /// Its `Cargo.toml`.
    pub manifest: PathBuf,
    /// True when it may be published.
    pub publish: bool,
    /// Its description, if any.
    pub description: Option<String>,
    /// Its licence expression, if any.
    pub license: Option<String>,
    /// Its README, relative to its folder, if any.
    pub readme: Option<String>,
    /// Its dependencies of both kinds.
    pub dependencies: Vec<Dependency>,
    /// Its features and what each switches on.
    pub features: BTreeMap<String, Vec<String>>,
    /// Features without which some of its targets (tests, examples) are not built.
    pub required_features: BTreeSet<String>,
}

/// The members, the root folder and the folder of build products.
#[derive(Clone, Debug)]
pub struct Workspace {
    /// Folder of the workspace's `Cargo.toml`.
    pub root: PathBuf,
    /// Folder of build products.
    pub target: PathBuf,
    /// The members, sorted by name.
    pub packages: Vec<Package>,
}

impl Workspace {
    /// Asks cargo for the workspace that this program was built from.
    ///
    /// # Errors
    /// Cargo cannot be started, refuses a manifest, or answers in an unknown form.
    pub fn read() -> Result<Self> {
        // Cargo says at run time where this package lies; the binary may have been built for
        // another copy of the workspace that shares the build folder.
        let package = std::env::var_os("CARGO_MANIFEST_DIR")
            .unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
        let manifest = Path::new(&package).join("../Cargo.toml");
        let output = cargo()
            .args([
                "metadata",
                "--format-version",
                "1",
                "--no-deps",
                "--manifest-path",
            ])
            .arg(&manifest)
            .output()
            .context("cannot start `cargo metadata`")?;
        if !output.status.success() {
            bail!(
                "`cargo metadata` failed: {}",
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        let answer: Value =
            serde_json::from_slice(&output.stdout).context("`cargo metadata` gave no JSON")?;
        Self::from_metadata(&answer)
    }

    /// Reads the answer of `cargo metadata --format-version 1 --no-deps`.
    ///
    /// # Errors
    /// A field that cargo always writes is missing.
    pub fn from_metadata(answer: &Value) -> Result<Self> {
        let packages = answer["packages"]
            .as_array()
            .context("`cargo metadata` lists no packages")?;
        let mut packages = packages
            .iter()
            .map(Package::from_metadata)
            .collect::<Result<Vec<_>>>()?;
        packages.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Self {
            root: PathBuf::from(text(answer, "workspace_root")?),
            target: PathBuf::from(text(answer, "target_directory")?),
            packages,
        })
    }

    /// The members that others may depend on, in order of name.
    pub fn libraries(&self) -> impl Iterator<Item = &Package> {
        self.packages.iter().filter(|package| package.publish)
    }

    /// The member of this name, with or without the prefix `thalweg-`.
    ///
    /// # Errors
    /// There is none; the message lists those that exist.
    pub fn member(&self, name: &str) -> Result<&Package> {
        let long = format!("thalweg-{name}");
        let found = self
            .packages
            .iter()
            .find(|package| package.name == name || package.name == long);
        found.with_context(|| {
            let known = self
                .packages
                .iter()
                .map(|package| package.name.as_str())
                .collect::<Vec<_>>();
            format!(
                "no package `{name}` in the workspace (there are {})",
                known.join(", ")
            )
        })
    }

    /// Folder for what our own commands leave behind.
    pub fn scratch(&self) -> PathBuf {
        self.target.join("thalweg")
    }
}

impl Package {
    /// The folder name, which is the name without the prefix.
    pub fn short_name(&self) -> &str {
        self.name.strip_prefix("thalweg-").unwrap_or(&self.name)
    }

    /// The dependencies that every user compiles.
    pub fn normal_dependencies(&self) -> impl Iterator<Item = &Dependency> {
        self.dependencies
            .iter()
            .filter(|dependency| dependency.kind == Kind::Normal)
    }

    fn from_metadata(value: &Value) -> Result<Self> {
        let name = text(value, "name")?;
        let some = |key: &str| value[key].as_str().map(str::to_owned);
        let dependencies = value["dependencies"].as_array().into_iter().flatten();
        let features = value["features"].as_object().into_iter().flatten();
        let targets = value["targets"].as_array().into_iter().flatten();
        Ok(Self {
            manifest: PathBuf::from(text(value, "manifest_path")?),
            // `publish` is null where any registry will do and a list of registries otherwise.
            publish: value["publish"]
                .as_array()
                .is_none_or(|registries| !registries.is_empty()),
            description: some("description"),
            license: some("license"),
            readme: some("readme"),
            dependencies: dependencies
                .map(Dependency::from_metadata)
                .collect::<Result<_>>()?,
            features: features
                .map(|(name, on)| (name.clone(), strings(on)))
                .collect(),
            required_features: targets
                .flat_map(|target| strings(&target["required-features"]))
                .collect(),
            name,
        })
    }
}

impl Dependency {
    fn from_metadata(value: &Value) -> Result<Self> {
        let package = text(value, "name")?;
        Ok(Self {
            alias: value["rename"].as_str().unwrap_or(&package).to_owned(),
            kind: if value["kind"].as_str() == Some("dev") {
                Kind::Development
            } else {
                Kind::Normal
            },
            features: strings(&value["features"]),
            path_only: value["path"].is_string() && value["req"].as_str() == Some("*"),
            package,
        })
    }
}

fn text(value: &Value, key: &str) -> Result<String> {
    let found = value[key]
        .as_str()
        .with_context(|| format!("`cargo metadata` gives no `{key}`"))?;
    Ok(found.to_owned())
}

fn strings(value: &Value) -> Vec<String> {
    let list = value.as_array().into_iter().flatten();
    list.filter_map(Value::as_str).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn answer() -> Value {
        json!({
            "workspace_root": "/w", "target_directory": "/w/target",
            "packages": [
                {"name": "xtask", "manifest_path": "/w/xtask/Cargo.toml", "publish": [], "targets": [],
                 "dependencies": [], "features": {}},
                {"name": "thalweg-a", "manifest_path": "/w/crates/a/Cargo.toml", "publish": null,
                 "description": "d", "license": "MIT", "readme": "README.md",
                 "features": {"default": ["x"], "x": []},
                 "targets": [{"kind": ["test"], "required-features": ["x"]}, {"kind": ["lib"]}],
                 "dependencies": [
                    {"name": "thalweg-b", "rename": "b", "kind": null, "features": ["m"], "path": "/w/crates/b", "req": "^0.1"},
                    {"name": "c", "rename": null, "kind": "dev", "features": [], "path": "/w/c", "req": "*"},
                    {"name": "d", "rename": null, "kind": "build", "features": [], "req": "^1"}]}
            ]
        })
    }

    #[test]
    fn reads_what_cargo_writes() {
        let workspace = Workspace::from_metadata(&answer()).unwrap();
        assert_eq!(
            workspace
                .libraries()
                .map(|p| p.name.as_str())
                .collect::<Vec<_>>(),
            ["thalweg-a"]
        );
        let package = workspace.member("a").unwrap();
        assert_eq!(package.short_name(), "a");
        let normal: Vec<_> = package
            .normal_dependencies()
            .map(|d| (d.alias.as_str(), d.path_only))
            .collect();
        assert_eq!(normal, [("b", false), ("d", false)]);
        assert!(package.dependencies[1].path_only);
        assert_eq!(package.required_features, BTreeSet::from(["x".to_owned()]));
    }

    #[test]
    fn an_unknown_package_is_answered_with_the_known_ones() {
        let workspace = Workspace::from_metadata(&answer()).unwrap();
        let message = workspace.member("zzz").unwrap_err().to_string();
        assert!(
            message.contains("zzz") && message.contains("thalweg-a"),
            "{message}"
        );
    }

    #[test]
    fn an_answer_without_packages_is_an_error() {
        assert!(Workspace::from_metadata(&json!({"workspace_root": "/w"})).is_err());
    }
}

//! Who may import whom, on the workspace as it is and on made-up ones that break each rule.

use std::collections::BTreeMap;
use std::path::PathBuf;

use xtask::floors::{may_import, missing_metadata, violations};
use xtask::workspace::{Dependency, Kind, Package, Workspace};

#[test]
fn the_workspace_keeps_the_floors() {
    assert_eq!(
        violations(&Workspace::read().unwrap()),
        Vec::<String>::new()
    );
}

#[test]
fn every_library_carries_its_metadata_and_the_shared_lints() {
    let workspace = Workspace::read().unwrap();
    let mut faults: Vec<_> = workspace.libraries().flat_map(missing_metadata).collect();
    for package in &workspace.packages {
        let text = std::fs::read_to_string(&package.manifest).unwrap();
        if !inherits_lints(&text) {
            faults.push(format!(
                "`{}` has no `[lints] workspace = true`",
                package.name
            ));
        }
        let readme = package
            .readme
            .as_ref()
            .map(|name| package.manifest.with_file_name(name));
        if let Some(lost) = readme.filter(|path| !path.is_file()) {
            faults.push(format!("`{}` is missing", lost.display()));
        }
    }
    assert_eq!(faults, Vec::<String>::new());
}

#[test]
fn every_folder_of_crates_holds_the_package_of_its_name() {
    let workspace = Workspace::read().unwrap();
    for package in workspace.libraries() {
        assert!(package.name.starts_with("thalweg-"), "{}", package.name);
        let folder = package.manifest.parent().unwrap();
        assert_eq!(
            folder,
            workspace.root.join("crates").join(package.short_name())
        );
    }
}

fn inherits_lints(manifest: &str) -> bool {
    let manifest: toml::Table = manifest.parse().unwrap();
    let lints = manifest
        .get("lints")
        .and_then(|lints| lints.get("workspace"));
    lints.and_then(toml::Value::as_bool) == Some(true)
}

#[test]
fn lints_are_inherited_only_by_saying_so() {
    assert!(inherits_lints("[lints]\nworkspace = true"));
    assert!(!inherits_lints("[lints]\nworkspace = false"));
    assert!(!inherits_lints("[package]\nname = \"a\""));
}

/// A member of a made-up workspace.
fn package(folder: &str, dependencies: Vec<Dependency>) -> Package {
    Package {
        name: if folder == "xtask" {
            folder.to_owned()
        } else {
            format!("thalweg-{folder}")
        },
        publish: folder != "xtask",
        dependencies,
        ..Package::default()
    }
}

fn on(folder: &str) -> Dependency {
    Dependency {
        package: format!("thalweg-{folder}"),
        alias: folder.to_owned(),
        kind: Kind::Normal,
        features: Vec::new(),
        path_only: false,
    }
}

/// The sound members that made-up ones lean on, and the made-up ones.
fn house(extra: Vec<Package>) -> Workspace {
    let mut packages = vec![
        package("tensor-core", vec![]),
        package("datasets", vec![on("tensor-core")]),
        package("nn", vec![on("tensor-core")]),
        package(
            "benchmark",
            vec![
                on("datasets"),
                Dependency {
                    features: vec!["models".into()],
                    ..on("nn")
                },
            ],
        ),
    ];
    packages.retain(|member| extra.iter().all(|other| other.name != member.name));
    packages.extend(extra);
    Workspace {
        root: PathBuf::new(),
        target: PathBuf::new(),
        packages,
    }
}

fn faults(extra: Vec<Package>) -> Vec<String> {
    violations(&house(extra))
}

#[test]
fn a_sound_house_has_no_faults() {
    let outside = Dependency {
        package: "rayon".into(),
        ..on("rayon")
    };
    let test_only = Dependency {
        kind: Kind::Development,
        ..on("datasets")
    };
    assert_eq!(
        faults(vec![package(
            "optim",
            vec![on("tensor-core"), outside, test_only]
        )]),
        Vec::<String>::new()
    );
    let upper = vec![
        package("flows", vec![on("tensor-core"), on("nn")]),
        package("guidance", vec![on("flows"), on("nn")]),
        package(
            "sequence-design",
            vec![on("guidance"), on("flows"), on("tensor-core")],
        ),
        package("xtask", vec![]),
    ];
    assert_eq!(faults(upper), Vec::<String>::new());
}

#[test]
fn each_breach_is_found() {
    let cases: Vec<(&str, Package)> = vec![
        ("upwards", package("tensor-core", vec![on("nn")])),
        ("a sibling", package("optim", vec![on("nn")])),
        ("data for users", package("optim", vec![on("datasets")])),
        ("a sibling above", package("flows", vec![on("flows")])),
        ("the benchmark", package("optim", vec![on("benchmark")])),
        (
            "a method from xtask",
            package("xtask", vec![on("tensor-core")]),
        ),
        (
            "a name that is not in the table",
            package("helpers", vec![]),
        ),
        (
            "a folder without a version",
            package(
                "optim",
                vec![Dependency {
                    path_only: true,
                    ..on("tensor-core")
                }],
            ),
        ),
        (
            "networks for users",
            package(
                "flows",
                vec![Dependency {
                    features: vec!["models".into()],
                    ..on("nn")
                }],
            ),
        ),
    ];
    for (what, member) in cases {
        assert_eq!(faults(vec![member]).len(), 1, "{what}");
    }
}

#[test]
fn reference_networks_cannot_come_in_by_a_feature() {
    for switch in ["nn/models", "nn?/models"] {
        let mut member = package("flows", vec![on("nn")]);
        member.features = BTreeMap::from([("pretty".to_owned(), vec![switch.to_owned()])]);
        assert_eq!(faults(vec![member]).len(), 1, "{switch}");
    }
    let mut nn = package("nn", vec![on("tensor-core")]);
    nn.features = BTreeMap::from([("default".to_owned(), vec!["models".to_owned()])]);
    assert_eq!(faults(vec![nn]).len(), 1);
}

#[test]
fn the_table_says_what_the_design_says() {
    assert_eq!(may_import("tensor-core"), Some(vec![]));
    assert_eq!(may_import("optim"), Some(vec!["tensor-core"]));
    assert_eq!(
        may_import("graph-learning"),
        Some(vec!["tensor-core", "nn", "optim", "convex"])
    );
    assert_eq!(
        may_import("guidance"),
        Some(vec!["tensor-core", "nn", "optim", "convex", "flows"])
    );
    assert_eq!(
        may_import("sequence-design"),
        Some(vec![
            "tensor-core",
            "nn",
            "optim",
            "convex",
            "flows",
            "guidance"
        ])
    );
    let benchmark = may_import("benchmark").unwrap();
    assert!(benchmark.contains(&"datasets") && benchmark.contains(&"sequence-design"));
    assert_eq!(benchmark.len(), 16);
    assert_eq!(may_import("xtask"), Some(vec![]));
    assert_eq!(may_import("helpers"), None);
}

#[test]
fn each_missing_field_is_named() {
    let mut member = package("optim", vec![]);
    member.license = Some("MIT".into());
    member.description = Some("  ".into());
    let faults = missing_metadata(&member);
    assert_eq!(faults.len(), 2);
    assert!(faults[0].contains("description") && faults[1].contains("readme"));
}

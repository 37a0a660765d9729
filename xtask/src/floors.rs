//! Who may import whom, and what every published crate must carry.
//!
//! The table is the one in `docs/architecture.md`; nothing may be added here without changing it
//! there. Only normal dependencies count: tests and examples may use what they like.

use crate::workspace::{Package, Workspace};

/// The floors, lowest first; the benchmark crate stands above them and imports them all.
pub const FLOORS: &[&[&str]] = &[
    &["tensor-core"],
    &["datasets", "nn", "optim", "convex"],
    &[
        "implicit",
        "local-learning",
        "boosting",
        "transfer",
        "flows",
        "graph-learning",
        "variational",
        "audit",
        "workflow",
    ],
    &["guidance"],
    &["sequence-design"],
    &[BENCHMARK],
];

const BENCHMARK: &str = "benchmark";
const XTASK: &str = "xtask";

/// The workspace members that this one may have as normal dependencies; `None` for a name that
/// is not in the table.
pub fn may_import(name: &str) -> Option<Vec<&'static str>> {
    if name == XTASK {
        return Some(Vec::new());
    }
    let floor = FLOORS.iter().position(|crates| crates.contains(&name))?;
    let below = |floors: usize| FLOORS[..floors].concat();
    let mut allowed = match name {
        BENCHMARK => below(floor),
        "guidance" => [below(2), vec!["flows"]].concat(),
        "sequence-design" => [below(2), vec!["flows", "guidance"]].concat(),
        _ => below(floor),
    };
    if name != BENCHMARK {
        // Data sets are for tests, examples and the benchmark: no user compiles them.
        allowed.retain(|other| *other != "datasets");
    }
    Some(allowed)
}

/// Every breach of the table, one sentence each; empty when all is well.
pub fn violations(workspace: &Workspace) -> Vec<String> {
    let mut found = Vec::new();
    for package in &workspace.packages {
        let name = package.short_name();
        let Some(allowed) = may_import(name) else {
            found.push(format!("`{}` is not in the table of floors", package.name));
            continue;
        };
        for dependency in package.normal_dependencies() {
            let Some(other) = workspace
                .packages
                .iter()
                .find(|member| member.name == dependency.package)
            else {
                continue;
            };
            if !allowed.contains(&other.short_name()) {
                found.push(format!("`{name}` may not import `{}`", other.short_name()));
            }
            if dependency.path_only {
                found.push(format!(
                    "`{name}` names `{}` by its folder alone, without a version",
                    other.short_name()
                ));
            }
        }
        found.extend(reference_networks(package));
    }
    found
}

/// nn's reference networks (its feature `models`) are for the benchmark alone.
fn reference_networks(package: &Package) -> Vec<String> {
    let name = package.short_name();
    let mut found = Vec::new();
    if name == "nn"
        && package
            .features
            .get("default")
            .is_some_and(|on| on.iter().any(|one| one == "models"))
    {
        found.push("`nn` switches its feature `models` on by default".to_owned());
    }
    if name == BENCHMARK {
        return found;
    }
    for dependency in package
        .normal_dependencies()
        .filter(|one| one.package == "thalweg-nn")
    {
        if dependency.features.iter().any(|one| one == "models") {
            found.push(format!(
                "`{name}` switches on `models` of `nn` for its users"
            ));
        }
        let (plain, weak) = (
            format!("{}/models", dependency.alias),
            format!("{}?/models", dependency.alias),
        );
        for (feature, on) in &package.features {
            if on.iter().any(|one| *one == plain || *one == weak) {
                found.push(format!(
                    "`{name}` switches on `models` of `nn` by its feature `{feature}`"
                ));
            }
        }
    }
    found
}

/// What a published package's manifest lacks, one sentence each.
pub fn missing_metadata(package: &Package) -> Vec<String> {
    let filled =
        |field: &Option<String>| field.as_ref().is_some_and(|text| !text.trim().is_empty());
    let fields = [
        ("description", filled(&package.description)),
        ("readme", filled(&package.readme)),
        ("license", filled(&package.license)),
    ];
    let lacking = fields.iter().filter(|(_, present)| !present);
    lacking
        .map(|(field, _)| format!("`{}` has no `{field}`", package.name))
        .collect()
}

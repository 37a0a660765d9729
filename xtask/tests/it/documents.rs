//! The documents say what the workspace is: one line for each dependency, one row and one
//! chapter for each crate. Their examples are doctests of this package.

use std::collections::BTreeSet;
use std::path::Path;

use xtask::workspace::Workspace;

fn read(path: impl AsRef<Path>) -> String {
    let path = path.as_ref();
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The part of a Markdown text under this heading, up to the next heading.
fn section<'a>(text: &'a str, heading: &str) -> &'a str {
    let (_, after) = text
        .split_once(&format!("\n{heading}\n"))
        .unwrap_or_else(|| panic!("no heading `{heading}`"));
    let end = after.find("\n#").unwrap_or(after.len());
    &after[..end]
}

/// The first words between backticks of each line that starts with `start`.
fn names<'a>(text: &'a str, start: &str) -> BTreeSet<&'a str> {
    let lines = text.lines().filter_map(|line| line.strip_prefix(start));
    lines.filter_map(|line| line.split('`').next()).collect()
}

#[test]
fn every_dependency_has_its_reason_and_every_reason_its_dependency() {
    let workspace = Workspace::read().unwrap();
    let manifest: toml::Table = read(workspace.root.join("Cargo.toml")).parse().unwrap();
    let table = manifest["workspace"]["dependencies"].as_table().unwrap();
    // Our own crates are the architecture itself.
    let outside = table
        .iter()
        .filter(|(_, entry)| entry.get("path").is_none());
    let wanted: BTreeSet<_> = outside.map(|(name, _)| name.as_str()).collect();
    let architecture = read(workspace.root.join("docs/architecture.md"));
    assert_eq!(
        names(section(&architecture, "## Dependencies"), "- `"),
        wanted
    );
}

#[test]
fn every_shared_dependency_is_used() {
    let workspace = Workspace::read().unwrap();
    let manifest: toml::Table = read(workspace.root.join("Cargo.toml")).parse().unwrap();
    let declared = manifest["workspace"]["dependencies"].as_table().unwrap();
    let used: BTreeSet<_> = workspace
        .packages
        .iter()
        .flat_map(|package| &package.dependencies)
        .collect::<Vec<_>>()
        .into_iter()
        .map(|dependency| dependency.alias.as_str())
        .collect();
    let idle: Vec<_> = declared
        .keys()
        .filter(|name| !used.contains(name.as_str()))
        .collect();
    assert!(idle.is_empty(), "no crate uses {idle:?}");
}

#[test]
fn the_readme_and_the_book_have_every_crate() {
    let workspace = Workspace::read().unwrap();
    let crates: BTreeSet<_> = workspace
        .libraries()
        .map(|package| package.name.as_str())
        .collect();
    let readme = read(workspace.root.join("README.md"));
    assert_eq!(names(section(&readme, "## Crates"), "| [`"), crates);
    for package in workspace.libraries() {
        let chapter = workspace
            .root
            .join("docs/crates")
            .join(format!("{}.md", package.short_name()));
        assert!(chapter.is_file(), "{} is missing", chapter.display());
    }
}

#[test]
fn the_oldest_toolchain_is_the_same_everywhere() {
    let root = Workspace::read().unwrap().root;
    let manifest: toml::Table = read(root.join("Cargo.toml")).parse().unwrap();
    let version = manifest["workspace"]["package"]["rust-version"]
        .as_str()
        .unwrap();
    assert!(read(root.join("README.md")).contains(&format!("({version} or newer)")));
    let toolchain = format!("rustup toolchain install {version} ");
    assert!(read(root.join(".github/workflows/ci.yml")).contains(&toolchain));
}

#[test]
fn the_test_of_every_invariant_exists() {
    let root = Workspace::read().unwrap().root;
    let architecture = read(root.join("docs/architecture.md"));
    let rows: Vec<_> = section(&architecture, "## Invariants")
        .lines()
        .filter(|line| line.ends_with("` |"))
        .collect();
    assert!(!rows.is_empty());
    for row in rows {
        let code: Vec<_> = row.split('`').skip(1).step_by(2).collect();
        let [.., file, test] = code[..] else {
            panic!("{row}")
        };
        assert!(
            read(root.join(file)).contains(&format!("fn {test}(")),
            "{file} has no test `{test}`"
        );
    }
}

#[test]
fn a_section_ends_at_the_next_heading() {
    let text = "# A\n\n## B\n- `one`: x\n- `two`: y `z`\n## C\n- `three`: x\n";
    assert_eq!(
        names(section(text, "## B"), "- `"),
        BTreeSet::from(["one", "two"])
    );
}

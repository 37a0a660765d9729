//! The published table is that of the registry and of the published results.

use crate::toy::{output, program, registry, Toy};
use std::fs;
use std::path::{Path, PathBuf};
use thalweg_benchmark::methods::{markdown, read, PeerRatio, Published, TABLE};
use thalweg_benchmark::registry::Registry;
use thalweg_benchmark::training_page;

/// The documentation; a packaged crate has none.
fn docs() -> Option<PathBuf> {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs");
    docs.join("../Cargo.toml").is_file().then_some(docs)
}

#[test]
fn the_committed_table_is_up_to_date() {
    let Some(docs) = docs() else { return };
    let (registry, published) = (Registry::builtin().unwrap(), read(&docs).unwrap());
    let table = fs::read_to_string(docs.join(TABLE)).unwrap();
    assert_eq!(
        table,
        markdown(&registry, &published),
        "`thalweg-bench methods` writes it anew"
    );
}

#[test]
fn the_page_of_training_steps_is_up_to_date() {
    let Some(docs) = docs() else { return };
    let page = fs::read_to_string(docs.join(training_page::PAGE)).unwrap();
    let rows = training_page::rows(&docs).unwrap();
    assert_eq!(
        page,
        training_page::markdown(&rows),
        "`thalweg-bench methods` writes it anew"
    );
}

#[cfg(feature = "graph-learning")]
#[test]
fn the_page_of_graph_sizes_is_up_to_date() {
    use thalweg_benchmark::graph_scale::{markdown, rows, PAGE};
    let Some(docs) = docs() else { return };
    let page = fs::read_to_string(docs.join(PAGE)).unwrap();
    assert_eq!(
        page,
        markdown(&rows(&docs).unwrap()),
        "`thalweg-bench methods` writes it anew"
    );
}

#[test]
fn every_registered_method_has_published_results_of_its_present_definition() {
    let Some(docs) = docs() else { return };
    let published = read(&docs).unwrap();
    let registry = Registry::builtin().unwrap();
    for entry in registry.entries() {
        let d = &entry.definition;
        let result = published.results.iter().find(|r| r.slug == d.slug);
        let result = result.unwrap_or_else(|| panic!("{} has no published result", d.slug));
        assert_eq!(
            result.definition,
            d.hash(),
            "{}: the published result is of another definition",
            d.slug
        );
        assert!(
            result.seeds.len() >= 5,
            "{}: verdicts need five seeds",
            d.slug
        );
        let here = d.claims.iter().filter(|c| !c.optional);
        let formulas: Vec<String> = here.map(|c| c.formula()).collect();
        let judged: Vec<String> = result.claims.iter().map(|c| c.formula.clone()).collect();
        assert_eq!(
            judged, formulas,
            "{}: the published result judges other claims",
            d.slug
        );
    }
    assert_eq!(
        published.results.len(),
        registry.entries().len(),
        "a result without scenario"
    );
}

#[cfg(feature = "guidance")]
#[test]
fn chapters_show_pictures_that_publishing_writes() {
    use thalweg_benchmark::export::chapters::{FOLDER, PICTURES};
    let Some(docs) = docs() else { return };
    let registry = Registry::builtin().unwrap();
    let chapters = fs::read_dir(docs.join("crates")).unwrap();
    let chapters: String = chapters
        .map(|f| fs::read_to_string(f.unwrap().path()).unwrap())
        .collect();
    for picture in PICTURES {
        let mut entries = registry.entries().iter().map(|e| &e.definition);
        let d = entries.find(|d| d.slug == picture.slug).unwrap();
        assert!(d.arms.iter().any(|a| a.name == picture.arm), "{picture:?}");
        assert!(docs.join(FOLDER).join(picture.file).is_file());
        let link = format!("{FOLDER}/{}", picture.file);
        assert!(chapters.contains(&link), "no chapter shows {link}");
    }
}

#[test]
fn publishing_writes_both_and_keeps_peers() {
    let folder = tempfile::tempdir().unwrap();
    let go = |args: &[&str]| output(&mut program(folder.path(), "", args));
    assert_eq!(go(&["run", "--suite", "standard"]).0, 0);
    let (code, out, err) = go(&["report", "--publish"]);
    assert!(
        code == 0 && out.contains("docs/results.json") && out.contains("docs/methods.md"),
        "{out}{err}"
    );
    assert_eq!(go(&["methods", "--check"]).0, 0);

    let docs = folder.path().join("docs");
    let peers = vec![PeerRatio {
        slug: "toy".into(),
        operation: "a step".into(),
        peer: "abacus".into(),
        threads: 2,
        ratio: 1.5,
    }];
    fs::write(
        docs.join("peers.json"),
        serde_json::to_string(&peers).unwrap(),
    )
    .unwrap();
    let (code, _, err) = go(&["methods", "--check"]);
    assert!(code == 1 && err.contains("not up to date"), "{err}");
    assert_eq!(go(&["report", "--publish"]).0, 0);
    assert_eq!(read(&docs).unwrap().peers, peers);
    let table = fs::read_to_string(docs.join(TABLE)).unwrap();
    assert!(
        table.contains("| 1.50 abacus (a step, 2 threads) |"),
        "{table}"
    );

    // What was measured on real data has a table of its own, unless the scenario has changed since.
    let mut published = read(&docs).unwrap();
    let mut measured = published.results[0].clone();
    measured.data = "observed".into();
    published.on_data.push(measured);
    let row = "| toy | observed |";
    assert!(markdown(&registry(Toy::default()), &published).contains(row));
    published.on_data[0].definition = "another".into();
    assert!(!markdown(&registry(Toy::default()), &published).contains("On real data"));
    assert!(
        table.contains("| holds (3 of 3 claims, 5 seeds, standard) |"),
        "{table}"
    );
}

#[test]
fn a_method_without_results_is_shown_as_such() {
    let table = markdown(&registry(Toy::default()), &Published::default());
    let row = table.lines().find(|l| l.starts_with("| toy |")).unwrap();
    assert_eq!(row.matches("not run").count(), 2, "{row}");
}

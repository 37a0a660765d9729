//! The report is well-formed, needs no network, and its links lead somewhere.

use crate::toy::{registry, standard, Toy};
use std::collections::BTreeSet;
use std::sync::atomic::AtomicBool;
use thalweg_benchmark::report::{boards, html, Board};
use thalweg_benchmark::runner::run;
use thalweg_benchmark::store::{Query, Store};
use thalweg_benchmark::summary::Records;

pub fn page(toy: Option<Toy>) -> String {
    let folder = tempfile::tempdir().unwrap();
    let mut store = Store::open(&folder.path().join("r.sqlite")).unwrap();
    let registry = registry(toy.unwrap_or_default());
    if toy.is_some() {
        let entries: Vec<_> = registry.entries().iter().collect();
        run(&entries, &standard(), &mut store, &AtomicBool::new(false)).unwrap();
    }
    let records = Records::load(&store, &Query::default()).unwrap();
    let board = Board {
        title: "Wide & far".into(),
        caption: "One row".into(),
        columns: vec!["name".into(), "score <1>".into()],
        rows: vec![vec!["a".into(), "0.5 ± 0.1".into()]],
    };
    board.leave(folder.path(), "wide").unwrap();
    let boards = boards(folder.path()).unwrap();
    assert_eq!(boards, [board]);
    html(&registry, &records, None, &boards).unwrap()
}

/// An element's name and attributes.
type Tag = (String, Vec<(String, String)>);

/// Elements with their attributes, after checking that start and end tags match.
fn elements(html: &str) -> Vec<(String, Vec<(String, String)>)> {
    const VOID: [&str; 5] = ["meta", "link", "br", "img", "input"];
    let (mut found, mut open): (Vec<Tag>, Vec<String>) = (Vec::new(), Vec::new());
    let mut rest = html.strip_prefix("<!DOCTYPE html>").unwrap();
    while let Some(start) = rest.find('<') {
        let text = &rest[..start];
        assert!(!text.contains('>'), "stray > in `{text}`");
        rest = &rest[start + 1..];
        if let Some(end_tag) = rest.strip_prefix('/') {
            let end = end_tag.find('>').unwrap();
            let name = open.pop().unwrap();
            assert_eq!(name, end_tag[..end].trim(), "end tags must match");
            rest = &end_tag[end + 1..];
            continue;
        }
        // A tag ends at the first > outside quotes.
        let mut quoted = false;
        let end = rest
            .find(|c| {
                quoted ^= c == '"';
                c == '>' && !quoted
            })
            .unwrap();
        let tag = &rest[..end];
        rest = &rest[end + 1..];
        let closed = tag.ends_with('/');
        let tag = tag.trim_end_matches('/').trim();
        let (name, attributes) = tag.split_once(char::is_whitespace).unwrap_or((tag, ""));
        found.push((name.to_string(), parse_attributes(attributes)));
        if ["style", "script"].contains(&name) {
            rest = &rest[rest.find(&format!("</{name}>")).unwrap()..];
        }
        if !closed && !VOID.contains(&name) {
            open.push(name.to_string());
        }
    }
    assert!(open.is_empty(), "not closed: {open:?}");
    found
}

fn parse_attributes(mut text: &str) -> Vec<(String, String)> {
    let mut out = Vec::new();
    loop {
        text = text.trim();
        if text.is_empty() {
            return out;
        }
        let end = text
            .find(|c: char| c == '=' || c.is_whitespace())
            .unwrap_or(text.len());
        let name = text[..end].to_string();
        text = &text[end..];
        let value = if let Some(quoted) = text.strip_prefix("=\"") {
            let end = quoted.find('"').unwrap();
            text = &quoted[end + 1..];
            quoted[..end].to_string()
        } else if let Some(bare) = text.strip_prefix('=') {
            let end = bare.find(char::is_whitespace).unwrap_or(bare.len());
            text = &bare[end..];
            bare[..end].to_string()
        } else {
            String::new()
        };
        out.push((name, value));
    }
}

#[test]
fn well_formed_self_contained_and_linked() {
    let html = page(Some(Toy::default()));
    let elements = elements(&html);
    let ids: Vec<&String> = elements
        .iter()
        .flat_map(|(_, a)| a)
        .filter(|(n, _)| n == "id")
        .map(|(_, v)| v)
        .collect();
    let unique: BTreeSet<&&String> = ids.iter().collect();
    assert_eq!(unique.len(), ids.len(), "ids are unique");
    let mut links = 0;
    for (element, attributes) in &elements {
        for (name, value) in attributes {
            if name == "href" && value.starts_with('#') {
                links += 1;
                assert!(
                    ids.iter().any(|id| **id == value[1..]),
                    "`{value}` leads nowhere"
                );
            }
            // The only addresses are links that a reader may follow.
            let address =
                value.contains("http://") || value.contains("https://") || value.starts_with("//");
            assert!(
                !address || (element == "a" && name == "href"),
                "{element} {name}={value}"
            );
        }
    }
    assert!(links >= 4);
    assert!(!html.contains("@import") && !html.contains("url("));
    assert_eq!(elements.iter().filter(|(n, _)| n == "script").count(), 1);
}

#[test]
fn shows_verdicts_plots_pictures_and_facts() {
    let html = page(Some(Toy {
        fails: true,
        ..Toy::default()
    }));
    for word in [
        "averaging has the lower loss",
        "average.loss &lt; 0.9 × plain.loss + 0.1 in the mean",
        "A &lt;toy&gt; &amp; nothing more",
        "undecided",
        "Tuning grids",
        "lr=0.2",
        "final loss by seed",
        "final loss against steps",
        "where it went",
        "&lt;&amp;&gt;",
        "seed 12 is unlucky",
        "rustc",
        "Line: mean over the seeds",
        "Wide &amp; far",
        "score &lt;1&gt;",
    ] {
        assert!(html.contains(word), "lacks `{word}`");
    }
    let all = elements(&html);
    assert!(all.iter().filter(|(n, _)| n == "svg").count() >= 2);
    assert!(all
        .iter()
        .filter(|(n, _)| n == "th")
        .all(|(_, a)| a.iter().any(|(n, _)| n == "scope")));
    assert!(all
        .iter()
        .filter(|(n, _)| n == "svg")
        .all(|(_, a)| a.iter().any(|(n, _)| n == "aria-label")));
    // Colors come from the style sheet alone, so that dark mode reaches the plots.
    let fixed = all
        .iter()
        .flat_map(|(_, a)| a)
        .filter(|(n, v)| (n == "fill" || n == "stroke") && v.starts_with('#'));
    assert_eq!(fixed.count(), 0);
}

#[test]
fn an_empty_database_says_what_to_do() {
    let html = page(None);
    elements(&html);
    assert!(
        html.contains("cargo xtask bench")
            && html.contains("Not run yet")
            && html.contains("Averaged iterates")
    );
}

//! Relative links and anchors of Markdown files. Addresses on the network are not looked at.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The book's folder and its table of contents.
const BOOK: &str = "docs";
const CONTENTS: &str = "docs/SUMMARY.md";

/// Every broken link below `root`, and every page of the book that its table of contents does
/// not name; one sentence each.
///
/// # Errors
/// A file or folder cannot be read.
pub fn broken(root: &Path) -> Result<Vec<String>> {
    let pages = pages(root)?;
    let mut found = Vec::new();
    for page in &pages {
        let text = read(&root.join(page))?;
        for target in targets(&text) {
            if let Some(reason) = fault(root, page, &target)? {
                found.push(format!("{}: ({target}) {reason}", page.display()));
            }
        }
    }
    found.extend(orphans(root, &pages)?);
    Ok(found)
}

/// The Markdown files that are checked, relative to `root`, sorted.
fn pages(root: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for name in ["README.md", BOOK, "crates"] {
        collect(root, Path::new(name), &mut found)?;
    }
    found.sort();
    Ok(found)
}

fn collect(root: &Path, path: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    let full = root.join(path);
    if full.is_file() {
        if path.extension().is_some_and(|ending| ending == "md") {
            found.push(path.to_path_buf());
        }
        return Ok(());
    }
    if !full.is_dir() {
        return Ok(());
    }
    let entries =
        std::fs::read_dir(&full).with_context(|| format!("cannot list `{}`", full.display()))?;
    for entry in entries {
        collect(root, &path.join(entry?.file_name()), found)?;
    }
    Ok(())
}

fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("cannot read `{}`", path.display()))
}

/// Why the link from `page` leads nowhere, or `None`.
fn fault(root: &Path, page: &Path, target: &str) -> Result<Option<String>> {
    if target.contains("://") || target.starts_with("mailto:") {
        return Ok(None);
    }
    let (path, anchor) = target
        .split_once('#')
        .map_or((target, None), |(path, anchor)| (path, Some(anchor)));
    let file = if path.is_empty() {
        root.join(page)
    } else {
        root.join(page.parent().unwrap_or(Path::new(""))).join(path)
    };
    if !file.exists() {
        return Ok(Some("leads to no file".to_owned()));
    }
    match anchor {
        Some(anchor) if file.extension().is_some_and(|ending| ending == "md") => {
            let known = anchors(&read(&file)?);
            Ok((!known.contains(anchor)).then(|| format!("names no heading of `{path}`")))
        }
        _ => Ok(None),
    }
}

/// Pages of the book that the table of contents does not lead to.
fn orphans(root: &Path, pages: &[PathBuf]) -> Result<Vec<String>> {
    let contents = Path::new(CONTENTS);
    if !root.join(contents).is_file() {
        return Ok(vec![format!("{CONTENTS} is missing")]);
    }
    let listed: BTreeSet<_> = targets(&read(&root.join(contents))?)
        .into_iter()
        .map(|link| Path::new(BOOK).join(link))
        .collect();
    let book = pages
        .iter()
        .filter(|page| page.starts_with(BOOK) && *page != contents);
    let lost = book.filter(|page| !listed.contains(*page));
    Ok(lost
        .map(|page| format!("{} is not in {CONTENTS}", page.display()))
        .collect())
}

/// The text's lines outside fenced code.
fn prose(text: &str) -> impl Iterator<Item = &str> {
    let mut fence: Option<&str> = None;
    text.lines().filter(move |line| {
        let start = line.trim_start();
        let mark = ["```", "~~~"]
            .into_iter()
            .find(|mark| start.starts_with(mark));
        match (fence, mark) {
            (None, Some(mark)) => {
                fence = Some(mark);
                false
            }
            (Some(open), Some(mark)) if open == mark => {
                fence = None;
                false
            }
            (open, _) => open.is_none(),
        }
    })
}

/// The line without what stands between backticks.
fn without_code(line: &str) -> String {
    line.split('`').step_by(2).collect::<Vec<_>>().join("` `")
}

/// The targets of the text's inline links `[..](target)` and link definitions `[..]: target`.
pub fn targets(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for line in prose(text) {
        let line = without_code(line);
        if let Some((_, target)) = line
            .strip_prefix('[')
            .and_then(|rest| rest.split_once("]: "))
        {
            found.push(target.trim().to_owned());
        }
        let mut rest = line.as_str();
        while let Some((_, after)) = rest.split_once("](") {
            let Some((inside, tail)) = after.split_once(')') else {
                break;
            };
            // A title may follow the target.
            let target = inside.split_whitespace().next().unwrap_or_default();
            found.push(target.trim_matches(['<', '>']).to_owned());
            rest = tail;
        }
    }
    found
}

/// The anchors of the text's headings, as mdBook and GitHub write them.
fn anchors(text: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let headings = prose(text).filter_map(|line| {
        let title = line.trim_start_matches('#');
        (line.starts_with('#') && title.starts_with(' ')).then(|| title.trim())
    });
    for title in headings {
        let kept = title.chars().filter_map(|letter| match letter {
            ' ' => Some('-'),
            '-' | '_' => Some(letter),
            _ if letter.is_alphanumeric() => Some(letter.to_ascii_lowercase()),
            _ => None,
        });
        let slug: String = kept.collect();
        // A heading that comes again gets a number.
        let name = std::iter::once(slug.clone())
            .chain((1..).map(|count| format!("{slug}-{count}")))
            .find(|name| !found.contains(name));
        found.extend(name);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn book(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = folder.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        folder
    }

    #[test]
    fn finds_links_and_passes_over_code() {
        let text = "[a](one.md) and ![b](two.svg \"title\") `[c](no.md)`\n```\n[d](no.md)\n```\n[e]: three.md\n[f](<four.md>)";
        assert_eq!(targets(text), ["one.md", "two.svg", "three.md", "four.md"]);
    }

    #[test]
    fn headings_become_anchors() {
        let text = "# Who may import whom\n## `cargo xtask` & more\n## Again\n## Again\n```\n# no\n```\n#no";
        let known: Vec<_> = anchors(text).into_iter().collect();
        assert_eq!(
            known,
            [
                "again",
                "again-1",
                "cargo-xtask--more",
                "who-may-import-whom"
            ]
        );
    }

    #[test]
    fn sound_books_have_nothing_to_report() {
        let folder = book(&[
            (
                "README.md",
                "[book](docs/a.md#title) [site](https://example.org)",
            ),
            ("docs/SUMMARY.md", "- [A](a.md)\n- [B](b/c.md)"),
            ("docs/a.md", "# Title\n[up](b/c.md) [here](#title)"),
            ("docs/b/c.md", "[back](../a.md)"),
        ]);
        assert_eq!(broken(folder.path()).unwrap(), Vec::<String>::new());
    }

    #[test]
    fn every_kind_of_breach_is_reported() {
        let folder = book(&[
            ("README.md", "[lost](docs/none.md)"),
            ("docs/SUMMARY.md", "- [A](a.md)"),
            ("docs/a.md", "# Title\n[wrong](#titel)"),
            ("docs/b.md", "alone"),
        ]);
        let found = broken(folder.path()).unwrap();
        assert_eq!(found.len(), 3, "{found:?}");
        assert!(
            found[0].starts_with("README.md: (docs/none.md)"),
            "{found:?}"
        );
        assert!(found[1].contains("(#titel)"), "{found:?}");
        assert!(found[2].starts_with("docs/b.md is not in"), "{found:?}");
    }
}

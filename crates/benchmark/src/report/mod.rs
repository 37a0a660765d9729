//! The report: one self-contained HTML file that needs no network.

mod board;
mod plot;
mod view;

pub use board::{boards, Board};

use crate::registry::Registry;
use crate::scenario::Suite;
use crate::summary::Records;
use crate::{Error, Result};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{context, AutoEscape, Environment};
use std::io::Write;
use std::path::{Path, PathBuf};

const TEMPLATE: &str = include_str!("page.html");
const STYLE: &str = include_str!("style.css");
const SCRIPT: &str = include_str!("script.js");

/// The report as HTML, with tables of other commands after the scenarios.
///
/// # Errors
/// [`Error::Draw`].
pub fn html(
    registry: &Registry,
    records: &Records,
    suite: Option<Suite>,
    boards: &[Board],
) -> Result<String> {
    let sheets = records.sheets(registry, suite);
    let page = view::page(registry, records, &sheets, boards)?;
    let mut environment = Environment::new();
    environment.set_auto_escape_callback(|_| AutoEscape::Html);
    let fail = |e: minijinja::Error| Error::draw("the report", format!("{e:#}"));
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build();
    environment.set_syntax(syntax.map_err(fail)?);
    environment
        .render_str(
            TEMPLATE,
            context! { page => Serde(page), style => STYLE, script => SCRIPT },
        )
        .map_err(fail)
}

/// Writes the report to `folder/index.html`, with the tables that lie in the folder, and gives that path.
///
/// # Errors
/// [`Error::Draw`], [`Error::BadFile`] for a table, or [`Error::Io`] naming the path; an older report
/// stays whole.
pub fn write(
    registry: &Registry,
    records: &Records,
    suite: Option<Suite>,
    folder: &Path,
) -> Result<PathBuf> {
    let text = html(registry, records, suite, &boards(folder)?)?;
    let path = folder.join("index.html");
    replace(&path, text.as_bytes())?;
    Ok(path)
}

/// Writes a file under another name and renames it, so that readers never see half of it.
///
/// # Errors
/// [`Error::Io`].
pub fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let folder = path
        .parent()
        .filter(|f| !f.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
    let mut file = tempfile::NamedTempFile::new_in(folder).map_err(|e| Error::io(folder, e))?;
    file.write_all(bytes).map_err(|e| Error::io(path, e))?;
    readable(file.as_file()).map_err(|e| Error::io(path, e))?;
    file.persist(path).map_err(|e| Error::io(path, e.error))?;
    Ok(())
}

/// Temporary files are private; reports are not.
#[cfg(unix)]
fn readable(file: &std::fs::File) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    file.set_permissions(std::fs::Permissions::from_mode(0o644))
}

#[cfg(not(unix))]
fn readable(_: &std::fs::File) -> std::io::Result<()> {
    Ok(())
}

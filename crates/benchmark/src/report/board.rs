//! Tables that other commands leave for the report.

use super::replace;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Where they lie, in the report's folder.
const FOLDER: &str = "tables";

/// A table that the report shows after the scenarios.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Board {
    /// Its title.
    pub title: String,
    /// What it shows.
    pub caption: String,
    /// Names of the columns.
    pub columns: Vec<String>,
    /// A cell for each column.
    pub rows: Vec<Vec<String>>,
}

impl Board {
    /// Leaves the table in a report's folder, in place of an older one of this name, and gives its path.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn leave(&self, report: &Path, name: &str) -> Result<PathBuf> {
        let path = report.join(FOLDER).join(name).with_extension("json");
        replace(
            &path,
            &serde_json::to_vec_pretty(self).map_err(|e| bad(&path, e))?,
        )?;
        Ok(path)
    }

    /// As text for a terminal.
    pub fn text(&self) -> String {
        let mut table = comfy_table::Table::new();
        table.load_style(comfy_table::presets::UTF8_HORIZONTAL_ONLY);
        table.set_header(&self.columns);
        self.rows.iter().for_each(|row| {
            table.add_row(row);
        });
        table.to_string()
    }
}

/// The tables in a report's folder, by name; none where nobody left one.
///
/// # Errors
/// [`Error::Io`] and [`Error::BadFile`], naming the file.
pub fn boards(report: &Path) -> Result<Vec<Board>> {
    let folder = report.join(FOLDER);
    let entries = match std::fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::io(&folder, e)),
    };
    let mut paths = Vec::new();
    for entry in entries {
        paths.push(entry.map_err(|e| Error::io(&folder, e))?.path());
    }
    paths.retain(|path| path.extension().is_some_and(|e| e == "json"));
    paths.sort();
    let read = |path: &PathBuf| {
        let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
        serde_json::from_str(&text).map_err(|e| bad(path, e))
    };
    paths.iter().map(read).collect()
}

fn bad(path: &Path, error: serde_json::Error) -> Error {
    Error::BadFile {
        path: path.display().to_string(),
        reason: error.to_string(),
    }
}

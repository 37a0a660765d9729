//! `data`: what can be fetched, and fetching it.

use super::args::{DataAction, DataArgs};
use super::commands::new_table;
use super::SUCCESS;
use crate::runner::PROGRESS;
use anyhow::Result;
use datasets::download::{catalog, fetch, find, CatalogEntry, Content, Progress, RemoteFile};
use datasets::DataDir;
use std::io::Write;
use std::path::Path;
use tracing_indicatif::span_ext::IndicatifSpanExt;

pub(super) fn data(args: &DataArgs, out: &mut dyn Write) -> Result<u8> {
    match &args.action {
        None | Some(DataAction::List) => list(&args.data, out)?,
        Some(DataAction::Fetch { name }) => {
            let folder = bring(name, &args.data)?;
            writeln!(out, "Ready: {}", folder.display())?;
        }
    }
    Ok(SUCCESS)
}

fn list(root: &Path, out: &mut dyn Write) -> Result<()> {
    // A folder that is not there yet holds nothing.
    let known = |folder: &str| DataDir::new(root).is_ok_and(|dir| dir.check(folder).is_ok());
    // What another crate reads (graphs) is there when all of its single files are.
    let whole = |entry: &CatalogEntry| {
        let folder = root.join(entry.folder);
        let plain = |f: &RemoteFile| f.content == Content::Plain && folder.join(f.name).is_file();
        entry.files.iter().all(plain)
    };
    let mut table = new_table(&["name", "what it is", "terms", "folder", "there"]);
    for entry in catalog() {
        let there = if known(entry.folder) || whole(entry) {
            "yes"
        } else {
            "no"
        };
        let folder = root.join(entry.folder).display().to_string();
        table.add_row([entry.name, entry.title, entry.terms, folder.as_str(), there]);
    }
    writeln!(out, "{table}")?;
    Ok(())
}

fn bring(name: &str, root: &Path) -> Result<std::path::PathBuf> {
    let entry = find(name)?;
    let span = tracing::info_span!(target: PROGRESS, "download");
    let _guard = span.enter();
    let mut tenth = 0;
    let mut report = |p: Progress<'_>| {
        span.pb_set_message(p.file);
        span.pb_set_position(p.done);
        let Some(total) = p.total.filter(|t| *t > 0) else {
            return;
        };
        span.pb_set_length(total);
        // Lines for those without bars: one each tenth of a file.
        let now = 10 * p.done / total;
        if now != tenth {
            tenth = now;
            tracing::info!(file = p.file, percent = 10 * now, "fetching");
        }
    };
    Ok(fetch(entry, root, &mut report)?)
}

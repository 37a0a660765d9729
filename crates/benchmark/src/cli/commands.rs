//! What each command does.

use super::args::{CompareArgs, ExportArgs, MethodsArgs, ReportArgs, RunArgs, VerifyArgs};
use super::{CLAIM_FAILED, FAILURE, INTERRUPTED, SUCCESS};
#[cfg(feature = "graph-learning")]
use crate::graph_scale;
use crate::registry::Registry;
use crate::runner::{self, Options, Summary};
use crate::scenario::DataSource;
use crate::store::{Query, Store};
use crate::summary::{figure, interval, Records, ScenarioResult};
use crate::training_page;
use crate::verdict::Verdict;
use crate::{compare as comparison, export as exporting, methods as table, report as page};
use crate::{verify as verification, Error};
use anyhow::{bail, Context, Result};
use comfy_table::{presets::UTF8_FULL_CONDENSED, ContentArrangement, Table};
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

pub(super) fn run(registry: &Registry, args: &RunArgs, out: &mut dyn Write) -> Result<u8> {
    let entries = registry.select(&args.which.filter())?;
    let data = match &args.data {
        Some(folder) if !folder.is_dir() => {
            bail!("--data {}: there is no such folder", folder.display())
        }
        Some(folder) => DataSource::Directory(folder.clone()),
        None => DataSource::Embedded,
    };
    let options = Options {
        suite: args.suite,
        device: tensor_core::device::parse(&args.device)?,
        data,
        seeds: args.seeds.map(usize::from),
        fresh: args.fresh,
        jobs: args.jobs.into(),
        ..Options::quick()
    };
    let mut store = Store::open(&args.place.db)?;
    // A report that cannot be written is better known before an hour of trials than after it.
    std::fs::create_dir_all(&args.out).map_err(|e| Error::io(&args.out, e))?;
    let cancelled = stop_on_interrupt()?;
    let summary = runner::run(&entries, &options, &mut store, &cancelled)?;

    let records = Records::load(&store, &Query::default())?;
    let results: Vec<ScenarioResult> = records
        .sheets(registry, Some(args.suite))
        .iter()
        .filter(|s| {
            entries
                .iter()
                .any(|e| e.definition.slug == s.definition.slug)
        })
        .map(|s| s.result())
        .filter(|r| r.device == tensor_core::device::name(&options.device))
        .collect();
    verdicts(&results, out)?;
    let path = page::write(registry, &records, None, &args.out)?;
    outcome(&summary, args, out)?;
    writeln!(out, "Report: {}", path.display())?;
    let failed_claim = results.iter().any(|r| r.verdict == Verdict::Fails);
    Ok(match () {
        () if summary.interrupted => INTERRUPTED,
        () if !summary.failed.is_empty() => FAILURE,
        () if args.strict && failed_claim => CLAIM_FAILED,
        () => SUCCESS,
    })
}

fn outcome(summary: &Summary, args: &RunArgs, out: &mut dyn Write) -> Result<()> {
    let Summary {
        ran,
        reused,
        failed,
        interrupted,
    } = summary;
    writeln!(
        out,
        "{ran} trials run, {reused} reused, {} failed.",
        failed.len()
    )?;
    for (key, message) in failed {
        writeln!(
            out,
            "  failed: {} {} {} seed {}: {message}",
            key.scenario, key.arm, key.setting, key.seed
        )?;
    }
    if *interrupted {
        writeln!(out, "Interrupted; run the same command again to go on.")?;
    }
    writeln!(out, "Results: {}", args.place.db.display())?;
    Ok(())
}

/// The first Ctrl-C asks the running trial to stop, the second ends the process.
fn stop_on_interrupt() -> Result<Arc<AtomicBool>> {
    let cancelled = Arc::new(AtomicBool::new(false));
    let flag = cancelled.clone();
    ctrlc::set_handler(move || {
        if flag.swap(true, Ordering::Relaxed) {
            std::process::exit(INTERRUPTED.into());
        }
    })
    .context("cannot listen for Ctrl-C")?;
    Ok(cancelled)
}

pub(super) fn new_table(head: &[&str]) -> Table {
    let mut table = Table::new();
    table
        .load_style(UTF8_FULL_CONDENSED)
        .set_content_arrangement(ContentArrangement::Dynamic);
    if !std::io::IsTerminal::is_terminal(&std::io::stdout()) {
        table.set_width(140);
    }
    table.set_header(head.to_vec());
    table
}

fn verdicts(results: &[ScenarioResult], out: &mut dyn Write) -> Result<()> {
    let mut table = new_table(&[
        "scenario",
        "claim",
        "left",
        "right",
        "margin [95 %]",
        "seeds",
        "verdict",
    ]);
    for result in results {
        for (i, claim) in result.claims.iter().enumerate() {
            table.add_row([
                if i == 0 {
                    result.slug.clone()
                } else {
                    String::new()
                },
                claim.words.clone(),
                figure(claim.left),
                figure(claim.right),
                interval(&claim.margin),
                format!("{}/{}", claim.satisfied, claim.seeds),
                claim.verdict.word().to_string(),
            ]);
        }
    }
    writeln!(out, "{table}")?;
    Ok(())
}

pub(super) fn report(registry: &Registry, args: &ReportArgs, out: &mut dyn Write) -> Result<u8> {
    // A report on nothing is a page that says what to do, not an error.
    let records = if args.place.db.exists() {
        Records::load(&Store::open_existing(&args.place.db)?, &Query::default())?
    } else {
        Records {
            trials: Vec::new(),
            runs: Vec::new(),
        }
    };
    let path = page::write(registry, &records, args.suite, &args.out)?;
    writeln!(out, "Report: {}", path.display())?;
    if args.publish {
        let sheets = records.sheets(registry, args.suite);
        let results: Vec<ScenarioResult> = sheets.iter().map(|s| s.result()).collect();
        let mut written = table::publish(registry, &results, &args.docs)?;
        written.extend(exporting::chapters::write(&sheets, &args.docs)?);
        for path in written {
            writeln!(out, "Written: {}", path.display())?;
        }
    }
    Ok(SUCCESS)
}

pub(super) fn compare(args: &CompareArgs, out: &mut dyn Write) -> Result<u8> {
    let side = |name: &str| comparison::side(name, &args.place.db);
    let rows = comparison::compare(&side(&args.a)?, &side(&args.b)?);
    if rows.is_empty() {
        bail!("{} and {} have no trial in common", args.a, args.b);
    }
    let mut table = new_table(&[
        "scenario",
        "arm",
        "setting",
        "metric",
        "seeds",
        "A",
        "B",
        "B - A [95 %]",
    ]);
    let mut equal = 0;
    for row in &rows {
        if row.is_equal() && !args.all {
            equal += 1;
            continue;
        }
        let mark = if row.same_definition { "" } else { " *" };
        table.add_row([
            format!("{}{mark}", row.scenario),
            row.arm.clone(),
            row.setting.clone(),
            row.metric.clone(),
            row.seeds.to_string(),
            figure(row.a),
            figure(row.b),
            interval(&row.difference),
        ]);
    }
    writeln!(out, "{table}")?;
    if equal > 0 {
        writeln!(
            out,
            "{equal} rows without a difference are not shown (--all shows them)."
        )?;
    }
    if rows.iter().any(|r| !r.same_definition) {
        writeln!(out, "* the scenario's definition differs between the two.")?;
    }
    Ok(SUCCESS)
}

pub(super) fn verify(args: &VerifyArgs, out: &mut dyn Write) -> Result<u8> {
    let checks = verification::verify(&args.reference, &args.only)?;
    let mut table = new_table(&[
        "method",
        "compared",
        "worst / tolerance",
        "inputs",
        "not covered",
        "result",
    ]);
    for check in &checks {
        let cells = match &check.result {
            verification::Outcome::NoAdaptor => [
                "–".into(),
                "–".into(),
                "–".into(),
                "whole file".into(),
                "not covered".to_string(),
            ],
            verification::Outcome::Error(_) => [
                "–".into(),
                "–".into(),
                "–".into(),
                "–".into(),
                "error".to_string(),
            ],
            verification::Outcome::Compared(report) => [
                report.comparisons.len().to_string(),
                figure(
                    report
                        .comparisons
                        .iter()
                        .map(|c| c.worst)
                        .fold(0.0, f64::max),
                ),
                report.inputs.to_string(),
                report.uncovered.len().to_string(),
                if report.passed() { "pass" } else { "FAIL" }.to_string(),
            ],
        };
        table.add_row(std::iter::once(check.slug.clone()).chain(cells));
    }
    writeln!(out, "{table}")?;
    for check in &checks {
        for line in check.lines() {
            writeln!(out, "{}: {line}", check.slug)?;
        }
    }
    let failed = checks.iter().filter(|c| c.failed()).count();
    let compared = checks.iter().filter(|c| c.covered()).count();
    writeln!(
        out,
        "{compared} of {} files compared, {failed} failed.",
        checks.len()
    )?;
    Ok(if failed == 0 && compared > 0 {
        SUCCESS
    } else {
        FAILURE
    })
}

pub(super) fn list(registry: &Registry, out: &mut dyn Write) -> Result<u8> {
    let mut table = new_table(&[
        "scenario",
        "method",
        "crate",
        "tags",
        "data",
        "trials a seed",
    ]);
    for entry in registry.entries() {
        let d = &entry.definition;
        let real = d.data.real.map_or(String::new(), |r| format!(" (or {r})"));
        table.add_row([
            d.slug.to_string(),
            d.title.to_string(),
            d.krate.to_string(),
            d.tags.join(" "),
            format!("{}{real}", d.data.embedded),
            d.trials_per_seed().to_string(),
        ]);
    }
    writeln!(out, "{table}")?;
    Ok(SUCCESS)
}

pub(super) fn methods(registry: &Registry, args: &MethodsArgs, out: &mut dyn Write) -> Result<u8> {
    let published = table::read(&args.docs)?;
    let mut pages = vec![(table::TABLE, table::markdown(registry, &published))];
    // A folder without the page gets none.
    if args.docs.join(training_page::PAGE).exists() {
        let rows = training_page::rows(&args.docs)?;
        pages.push((training_page::PAGE, training_page::markdown(&rows)));
    }
    #[cfg(feature = "graph-learning")]
    if args.docs.join(graph_scale::ROWS).exists() {
        let rows = graph_scale::rows(&args.docs)?;
        pages.push((graph_scale::PAGE, graph_scale::markdown(&rows)));
    }
    for (name, text) in pages {
        let path = args.docs.join(name);
        if args.check {
            let present = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
            if present != text {
                bail!(
                    "{}: not up to date; `thalweg-bench methods` writes it",
                    path.display()
                );
            }
            writeln!(out, "Up to date: {}", path.display())?;
        } else {
            page::replace(&path, text.as_bytes())?;
            writeln!(out, "Written: {}", path.display())?;
        }
    }
    Ok(SUCCESS)
}

pub(super) fn export(registry: &Registry, args: &ExportArgs, out: &mut dyn Write) -> Result<u8> {
    let store = Store::open_existing(&args.place.db)?;
    let suite = args.suite.map(|s| s.name().to_string());
    let records = Records::load(
        &store,
        &Query {
            suite,
            ..Query::default()
        },
    )?;
    let mut written = Vec::new();
    if let Some(path) = &args.json {
        let results: Vec<_> = records
            .sheets(registry, args.suite)
            .iter()
            .map(|s| s.result())
            .collect();
        exporting::json(&results, path)?;
        written.push(path.clone());
    }
    if let Some(path) = &args.csv {
        exporting::csv(&records.trials, path)?;
        written.push(path.clone());
    }
    if let Some(folder) = &args.tensorboard {
        exporting::tensorboard(&records.trials, folder)?;
        written.push(folder.clone());
    }
    for path in written {
        writeln!(out, "Written: {}", path.display())?;
    }
    Ok(SUCCESS)
}

//! What the template shows, as plain data.

use super::board::Board;
use super::plot::{lines, strips, trade_off, Line, Spot, Strip, SERIES};
use crate::registry::Registry;
use crate::scenario::{Better, Definition, PictureFormat, Role};
use crate::store::StoredTrial;
use crate::summary::{figure, interval, Records, Sheet};
use crate::verdict::{overall, ArmResult, ClaimResult, Verdict};
use crate::Result;
use serde::Serialize;
use std::collections::BTreeMap;

#[derive(Serialize)]
pub(super) struct Page<'a> {
    version: String,
    date: String,
    sheets: Vec<SheetView>,
    missing: Vec<Missing>,
    totals: BTreeMap<&'static str, usize>,
    trials: usize,
    facts: Vec<(String, String)>,
    boards: &'a [Board],
}

#[derive(Serialize)]
struct Missing {
    slug: &'static str,
    title: &'static str,
}

#[derive(Serialize)]
struct SheetView {
    id: String,
    slug: &'static str,
    title: &'static str,
    summary: &'static str,
    notes: &'static str,
    paper_title: &'static str,
    venue: &'static str,
    arxiv: &'static str,
    place: String,
    tags: String,
    suite: &'static str,
    data: String,
    device: String,
    seeds: String,
    seed_count: usize,
    seconds: String,
    verdict: &'static str,
    verdict_class: &'static str,
    headline: String,
    claims: Vec<ClaimView>,
    columns: Vec<String>,
    arms: Vec<ArmView>,
    grids: Vec<GridView>,
    figures: Vec<FigureView>,
    pictures: Vec<PictureView>,
    failed: Vec<String>,
    facts: Vec<(String, String)>,
    finished: String,
}

#[derive(Serialize)]
struct ClaimView {
    words: String,
    formula: String,
    left: String,
    right: String,
    margin: String,
    satisfied: String,
    verdict: &'static str,
    verdict_class: &'static str,
}

#[derive(Serialize)]
struct ArmView {
    label: &'static str,
    role: &'static str,
    color: usize,
    setting: String,
    headline: String,
    figures: Vec<String>,
}

#[derive(Serialize)]
struct GridView {
    label: &'static str,
    metric: String,
    rows: Vec<(String, String, bool)>,
}

#[derive(Serialize)]
struct FigureView {
    title: String,
    svg: String,
    caption: String,
    legend: Vec<(usize, &'static str)>,
}

#[derive(Serialize)]
struct PictureView {
    caption: String,
    data_uri: String,
    text: String,
}

pub(super) fn page<'a>(
    registry: &Registry,
    records: &Records,
    sheets: &[Sheet],
    boards: &'a [Board],
) -> Result<Page<'a>> {
    let views = sheets
        .iter()
        .map(|s| sheet(s, registry.get(s.definition.slug)?.scenario.trade_offs()))
        .collect::<Result<Vec<_>>>()?;
    let shown = |d: &Definition| sheets.iter().any(|s| s.definition.slug == d.slug);
    let missing = registry
        .entries()
        .iter()
        .map(|e| &e.definition)
        .filter(|d| !shown(d))
        .map(|d| Missing {
            slug: d.slug,
            title: d.title,
        })
        .collect();
    let mut totals = BTreeMap::new();
    for view in &views {
        *totals.entry(view.verdict_class).or_insert(0) += 1;
    }
    let last = records.runs.last();
    Ok(Page {
        version: crate::VERSION.to_string(),
        date: records
            .trials
            .iter()
            .map(|t| t.finished)
            .max()
            .map(date)
            .unwrap_or_default(),
        sheets: views,
        missing,
        totals,
        trials: records.trials.iter().filter(|t| t.error.is_none()).count(),
        facts: last
            .map(|r| r.facts.clone().into_iter().collect())
            .unwrap_or_default(),
        boards,
    })
}

/// Names of two metrics.
type Pair = (&'static str, &'static str);

fn sheet(sheet: &Sheet, pairs: &[Pair]) -> Result<SheetView> {
    let d = sheet.definition;
    let results = sheet.table.claims();
    let arms = sheet.table.arms();
    let verdict = overall(&results);
    let headline = d.metrics.first();
    let seeds: Vec<String> = sheet.table.seeds().iter().map(u64::to_string).collect();
    Ok(SheetView {
        id: anchor(&[d.slug, sheet.suite.name(), sheet.data, sheet.device]),
        slug: d.slug,
        title: d.title,
        summary: d.summary,
        notes: d.notes,
        paper_title: d.paper.title,
        venue: d.paper.venue,
        arxiv: d.paper.arxiv,
        place: format!("thalweg-{}, {}", d.krate, d.module),
        tags: d.tags.join(" "),
        suite: sheet.suite.name(),
        data: sheet.data.to_string(),
        device: sheet.device.to_string(),
        seed_count: seeds.len(),
        seeds: seeds.join(", "),
        seconds: duration(sheet.seconds),
        verdict: verdict.word(),
        verdict_class: class(verdict),
        headline: headline.map(|m| m.label.to_string()).unwrap_or_default(),
        claims: results.iter().map(claim).collect(),
        columns: columns(d, &arms),
        arms: arms
            .iter()
            .enumerate()
            .map(|(i, a)| arm(d, &arms, i, a))
            .collect(),
        grids: arms.iter().filter_map(|a| grid(sheet, a)).collect(),
        figures: figures(sheet, &arms, pairs)?,
        pictures: pictures(sheet, &arms),
        failed: sheet.failed.iter().map(|t| failure(t)).collect(),
        facts: sheet
            .run
            .map(|r| r.facts.clone().into_iter().collect())
            .unwrap_or_default(),
        finished: sheet.run.map(|r| date(r.started)).unwrap_or_default(),
    })
}

fn claim(c: &ClaimResult) -> ClaimView {
    ClaimView {
        words: c.words.clone(),
        formula: c.formula.clone(),
        left: figure(c.left),
        right: figure(c.right),
        margin: interval(&c.margin),
        satisfied: format!("{}/{}", c.satisfied, c.seeds),
        verdict: c.verdict.word(),
        verdict_class: class(c.verdict),
    }
}

/// Labels of the metrics that any arm reported.
fn columns(d: &Definition, arms: &[ArmResult]) -> Vec<String> {
    reported(d, arms)
        .map(|i| {
            let m = &d.metrics[i];
            let arrow = match m.better {
                Better::Higher => " ↑",
                Better::Lower => " ↓",
                Better::Neither => "",
            };
            format!("{}{arrow}", m.label)
        })
        .collect()
}

fn reported<'a>(d: &'a Definition, arms: &'a [ArmResult]) -> impl Iterator<Item = usize> + 'a {
    let any = |i: &usize| {
        arms.iter()
            .any(|a| a.metrics.contains_key(d.metrics[*i].name))
    };
    (0..d.metrics.len()).filter(any)
}

fn arm(d: &Definition, arms: &[ArmResult], index: usize, a: &ArmResult) -> ArmView {
    let role = match a.arm.role {
        Role::Baseline => "baseline",
        Role::Method => "method",
        Role::Variant => "variant",
        Role::Diagnostic => "diagnostic",
    };
    let show = |name: &str| a.metrics.get(name).map_or("–".into(), |(_, i)| interval(i));
    ArmView {
        label: a.arm.label,
        role,
        color: index % SERIES + 1,
        setting: a.best.map(|s| s.name.clone()).unwrap_or_default(),
        headline: d
            .metrics
            .first()
            .and_then(|m| a.metrics.get(m.name))
            .map(|(_, i)| interval(i))
            .unwrap_or_default(),
        figures: reported(d, arms).map(|i| show(d.metrics[i].name)).collect(),
    }
}

/// The tuning grid of an arm with the mean at each point.
fn grid(sheet: &Sheet, a: &ArmResult) -> Option<GridView> {
    let best = a.best.filter(|_| a.arm.settings.len() > 1)?;
    let rows = a.arm.settings.iter().map(|s| {
        let values = sheet.table.values(a.arm.name, &s.name, a.arm.select);
        (
            s.name.clone(),
            figure(crate::statistics::mean(&values)),
            s.name == best.name,
        )
    });
    let metric = sheet.definition.metric(a.arm.select);
    Some(GridView {
        label: a.arm.label,
        metric: metric.map(|m| m.label.to_string()).unwrap_or_default(),
        rows: rows.collect(),
    })
}

fn figures(sheet: &Sheet, arms: &[ArmResult], pairs: &[Pair]) -> Result<Vec<FigureView>> {
    let mut figures = Vec::new();
    for pair in pairs {
        figures.extend(trade_off_figure(sheet.definition, arms, *pair)?);
    }
    let d = sheet.definition;
    let mut values = Vec::new();
    for metric in d.metrics.iter().filter(|m| m.better != Better::Neither) {
        let rows: Vec<Strip> = arms
            .iter()
            .enumerate()
            .filter_map(|(color, a)| {
                let (values, interval) = a.metrics.get(metric.name)?;
                Some(Strip {
                    color,
                    label: a.arm.label,
                    values,
                    interval: *interval,
                })
            })
            .collect();
        let title = format!("{}: {} of every seed", d.slug, metric.label);
        if let Some(svg) = strips(&title, &rows)? {
            values.push(FigureView {
                title: format!("{} by seed", metric.label),
                svg,
                caption: "Dots: seeds. Tick and bar: mean with its 95 % interval.".into(),
                legend: Vec::new(),
            });
        }
    }
    for name in curve_names(sheet, arms) {
        figures.extend(curve_figure(sheet, arms, &name)?);
    }
    figures.extend(values);
    Ok(figures)
}

/// Two metrics against each other, of all arms that report both.
fn trade_off_figure(
    d: &Definition,
    arms: &[ArmResult],
    (across, up): Pair,
) -> Result<Option<FigureView>> {
    let (Some(across), Some(up)) = (d.metric(across), d.metric(up)) else {
        return Ok(None);
    };
    let (mut spots, mut legend) = (Vec::new(), Vec::new());
    for (color, a) in arms.iter().enumerate() {
        let pair = (a.metrics.get(across.name), a.metrics.get(up.name));
        if let (Some((_, x)), Some((_, y))) = pair {
            spots.push(Spot {
                color,
                x: *x,
                y: *y,
            });
            legend.push((color % SERIES + 1, a.arm.label));
        }
    }
    let sign = |better: Better| if better == Better::Lower { -1.0 } else { 1.0 };
    let title = format!("{} against {}", up.label, across.label);
    let sign = (sign(across.better), sign(up.better));
    let svg = trade_off(&title, across.label, &spots, sign)?;
    Ok(svg.map(|svg| FigureView {
        title,
        svg,
        caption:
            "Dots: means over the seeds, with their 95 % intervals. Line: arms that no other one \
                  beats in both."
                .into(),
        legend,
    }))
}

/// Names of all curves, in the order in which the arms report them.
fn curve_names(sheet: &Sheet, arms: &[ArmResult]) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for a in arms {
        for trial in trials(sheet, a) {
            for curve in &trial.outcome.curves {
                if !names.contains(&curve.name) {
                    names.push(curve.name.clone());
                }
            }
        }
    }
    names
}

/// The trials of an arm at its best setting.
fn trials<'a>(sheet: &'a Sheet, a: &ArmResult) -> Vec<&'a StoredTrial> {
    let Some(best) = a.best else {
        return Vec::new();
    };
    let one = |seed: &u64| sheet.table.trial(a.arm.name, &best.name, *seed);
    sheet.table.seeds().iter().filter_map(one).collect()
}

fn curve_figure(sheet: &Sheet, arms: &[ArmResult], name: &str) -> Result<Option<FigureView>> {
    let mut drawn = Vec::new();
    let mut legend = Vec::new();
    for (color, a) in arms.iter().enumerate() {
        let seeds: Vec<_> = trials(sheet, a)
            .into_iter()
            .filter_map(|t| t.outcome.curves.iter().find(|c| c.name == name))
            .collect();
        if !seeds.is_empty() {
            drawn.push(Line { color, seeds });
            legend.push((color % SERIES + 1, a.arm.label));
        }
    }
    let title = format!("{}: {name}", sheet.definition.slug);
    Ok(lines(&title, &drawn)?.map(|svg| FigureView {
        title: name.to_string(),
        svg,
        caption: match sheet.table.seeds().len() {
            1 => "One seed.".into(),
            _ => "Line: mean over the seeds. Band: lowest to highest seed.".into(),
        },
        legend,
    }))
}

/// The pictures of the first seed of every arm.
fn pictures(sheet: &Sheet, arms: &[ArmResult]) -> Vec<PictureView> {
    let mut out = Vec::new();
    for a in arms {
        let first = trials(sheet, a).into_iter().next();
        for picture in first.iter().flat_map(|t| &t.outcome.pictures) {
            let caption = format!("{}: {}", a.arm.label, picture.caption);
            let uri = |kind: &str| format!("data:image/{kind};base64,{}", base64(&picture.bytes));
            let (data_uri, text) = match picture.format {
                PictureFormat::Svg => (uri("svg+xml"), String::new()),
                PictureFormat::Png => (uri("png"), String::new()),
                PictureFormat::Text => (
                    String::new(),
                    String::from_utf8_lossy(&picture.bytes).into_owned(),
                ),
            };
            out.push(PictureView {
                caption,
                data_uri,
                text,
            });
        }
    }
    out
}

fn failure(trial: &StoredTrial) -> String {
    let k = &trial.key;
    let message = trial.error.as_deref().unwrap_or_default();
    format!("{} {} seed {}: {message}", k.arm, k.setting, k.seed)
}

fn class(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Holds => "holds",
        Verdict::Undecided => "undecided",
        Verdict::Fails => "fails",
        Verdict::NotRun => "not-run",
    }
}

/// An id made of letters, digits and hyphens.
fn anchor(parts: &[&str]) -> String {
    let clean = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
    parts.join("-").chars().map(clean).collect()
}

fn duration(seconds: f64) -> String {
    if seconds < 90.0 {
        format!("{} s", figure((seconds * 10.0).round() / 10.0))
    } else {
        format!("{:.0} min", seconds / 60.0)
    }
}

/// `2024-02-29 13:05 UTC` for seconds since 1970 (proleptic Gregorian calendar).
pub(super) fn date(seconds: u64) -> String {
    let (days, rest) = ((seconds / 86_400) as i64, seconds % 86_400);
    // Days are counted from 1 March of year 0, so that leap days end a year.
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let of_era = shifted.rem_euclid(146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02} {:02}:{:02} UTC",
        rest / 3600,
        rest / 60 % 60
    )
}

/// Standard base64 with padding.
fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let word =
            chunk.iter().fold(0u32, |w, b| w << 8 | u32::from(*b)) << (8 * (3 - chunk.len()));
        for place in 0..4 {
            if place <= chunk.len() {
                out.push(char::from(
                    LETTERS[(word >> (18 - 6 * place)) as usize & 63],
                ));
            } else {
                out.push('=');
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::{base64, date};

    #[test]
    fn dates() {
        assert_eq!(date(0), "1970-01-01 00:00 UTC");
        assert_eq!(date(951_782_400 + 3_661), "2000-02-29 01:01 UTC");
        assert_eq!(date(4_107_542_399), "2100-02-28 23:59 UTC");
    }

    #[test]
    fn base64_of_the_standard() {
        for (text, code) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64(text.as_bytes()), code);
        }
    }
}

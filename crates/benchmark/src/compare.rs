//! Two databases, runs or versions side by side.

use crate::statistics::{bootstrap, mean, Interval};
use crate::store::{Query, Store, StoredTrial};
use crate::{Error, Result};
use std::collections::BTreeMap;
use std::path::Path;

/// The trials that `name` stands for: a database file, `run:N` or `version:X` of `database`.
///
/// # Errors
/// [`Error::Unknown`] listing the runs or versions there are, or [`Error::Store`].
pub fn side(name: &str, database: &Path) -> Result<Vec<StoredTrial>> {
    let open = || Store::open_existing(database);
    if let Some(number) = name.strip_prefix("run:") {
        let store = open()?;
        let runs = store.runs()?;
        let run = runs.iter().find(|r| r.id.to_string() == number);
        let run = run.ok_or_else(|| Error::Unknown {
            kind: "run",
            name: number.to_string(),
            known: runs.iter().map(|r| r.id.to_string()).collect(),
        })?;
        store.trials(&Query {
            run: Some(run.id),
            ..Query::default()
        })
    } else if let Some(version) = name.strip_prefix("version:") {
        let store = open()?;
        let mut known: Vec<String> = store.runs()?.into_iter().map(|r| r.version).collect();
        known.sort();
        known.dedup();
        if !known.iter().any(|v| v == version) {
            return Err(Error::Unknown {
                kind: "version",
                name: version.to_string(),
                known,
            });
        }
        store.trials(&Query {
            version: Some(version.to_string()),
            ..Query::default()
        })
    } else {
        Store::open_existing(Path::new(name))?.trials(&Query::default())
    }
}

/// One metric of one arm and setting on both sides.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// The scenario.
    pub scenario: String,
    /// The arm.
    pub arm: String,
    /// The setting.
    pub setting: String,
    /// The metric, or `seconds` for the duration of the trials.
    pub metric: String,
    /// Seeds that both sides have.
    pub seeds: usize,
    /// Mean on the left.
    pub a: f64,
    /// Mean on the right.
    pub b: f64,
    /// Mean of right minus left, paired by seed.
    pub difference: Interval,
    /// Whether both sides ran the same definition.
    pub same_definition: bool,
}

impl Row {
    /// Whether every seed gave the same number on both sides.
    pub fn is_equal(&self) -> bool {
        self.difference.low == 0.0 && self.difference.high == 0.0 && self.a == self.b
    }
}

type Place<'a> = (&'a str, &'a str, &'a str, &'a str, &'a str, u64);

/// Pairs the successful trials of two sides by scenario, arm, setting, suite, data and seed.
/// Devices, versions and definitions may differ: that is what one compares.
pub fn compare(a: &[StoredTrial], b: &[StoredTrial]) -> Vec<Row> {
    let (left, right) = (places(a), places(b));
    // A side may hold several devices or versions; the last one read stands for it.
    let mut groups: BTreeMap<_, Vec<(&StoredTrial, &StoredTrial)>> = BTreeMap::new();
    for (place, x) in &left {
        if let Some(y) = right.get(place) {
            let (scenario, arm, setting, suite, data, _) = *place;
            groups
                .entry((scenario, arm, setting, suite, data))
                .or_default()
                .push((*x, *y));
        }
    }
    groups.values().flat_map(|pairs| rows(pairs)).collect()
}

fn places(trials: &[StoredTrial]) -> BTreeMap<Place<'_>, &StoredTrial> {
    let place = |t: &'_ StoredTrial| -> bool { t.error.is_none() };
    trials
        .iter()
        .filter(|t| place(t))
        .map(|t| {
            let k = &t.key;
            (
                (
                    &*k.scenario,
                    &*k.arm,
                    &*k.setting,
                    &*k.suite,
                    &*k.data,
                    k.seed,
                ),
                t,
            )
        })
        .collect()
}

fn rows(pairs: &[(&StoredTrial, &StoredTrial)]) -> Vec<Row> {
    let Some((first, _)) = pairs.first() else {
        return Vec::new();
    };
    let key = &first.key;
    let same = pairs
        .iter()
        .all(|(x, y)| x.key.definition == y.key.definition);
    let row = |metric: &str, values: Vec<(f64, f64)>| {
        let side = |f: fn(&(f64, f64)) -> f64| mean(&values.iter().map(f).collect::<Vec<_>>());
        let label = format!(
            "compare/{}/{}/{}/{metric}",
            key.scenario, key.arm, key.setting
        );
        let difference = bootstrap(values.len(), &label, |sample| {
            mean(
                &sample
                    .iter()
                    .map(|i| values[*i].1 - values[*i].0)
                    .collect::<Vec<_>>(),
            )
        });
        Row {
            scenario: key.scenario.clone(),
            arm: key.arm.clone(),
            setting: key.setting.clone(),
            metric: metric.to_string(),
            seeds: values.len(),
            a: side(|v| v.0),
            b: side(|v| v.1),
            difference,
            same_definition: same,
        }
    };
    let mut out = Vec::new();
    for metric in first.outcome.metrics.keys() {
        let value = |t: &StoredTrial| t.outcome.metrics.get(metric).copied();
        let values: Vec<(f64, f64)> = pairs
            .iter()
            .filter_map(|(x, y)| Some((value(x)?, value(y)?)))
            .collect();
        if !values.is_empty() {
            out.push(row(metric, values));
        }
    }
    out.push(row(
        "seconds",
        pairs.iter().map(|(x, y)| (x.seconds, y.seconds)).collect(),
    ));
    out
}

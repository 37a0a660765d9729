//! What a scenario declares: the paper, the arms, the claims, and how one trial is run.
//!
//! A [`Scenario`] is one file under `src/scenarios` and one line in
//! [`Registry::builtin`](crate::registry::Registry::builtin). Its [`Definition`] is plain data; the
//! runner, the store, the verdicts and the report read nothing else.

mod claim;
mod context;
mod outcome;

pub(crate) use outcome::{number, Number};

pub use claim::{best, constant, metric, setting, Claim, Expr, Judged, Relation};
pub use context::{DataSource, Suite, TrialContext};
pub use outcome::{Curve, Picture, PictureFormat, TrialOutcome};

use crate::{Error, Result};
use serde::Serialize;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};

/// One experiment: a published claim at small scale, against its baselines, over seeds.
pub trait Scenario: Send + Sync {
    /// Everything about the experiment that is data.
    fn definition(&self) -> Definition;

    /// Runs one trial: one arm with one setting on one seed.
    ///
    /// Initial weights and data order must come from streams of the context that do not depend on
    /// the arm, so that the arms of a seed are paired.
    ///
    /// # Errors
    /// Whatever stops the trial; it is recorded as failed and the run goes on. A diverged run is
    /// not an error where divergence is a possible result: it has an infinite loss.
    fn run(&self, arm: &Arm, setting: &Setting, trial: &TrialContext) -> Result<TrialOutcome>;

    /// Pairs of metrics, by name, that the report draws against each other: the first across, the
    /// second up, an arm a point, with the line of those arms that no other one beats in both.
    fn trade_offs(&self) -> &'static [(&'static str, &'static str)] {
        &[]
    }
}

/// The paper a scenario is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Paper {
    /// Its title.
    pub title: &'static str,
    /// Where and when it appeared.
    pub venue: &'static str,
    /// Its arXiv number.
    pub arxiv: &'static str,
}

/// Which way a metric is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Better {
    /// Larger is better.
    Higher,
    /// Smaller is better.
    Lower,
    /// It is a diagnostic.
    Neither,
}

/// A number that trials report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Metric {
    /// The name in [`TrialOutcome::metrics`].
    pub name: &'static str,
    /// The name in tables.
    pub label: &'static str,
    /// Which way it is better.
    pub better: Better,
}

/// What an arm is there for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// What people use today.
    Baseline,
    /// The paper's method.
    Method,
    /// A part of the method, or a variant of it.
    Variant,
    /// A measurement that compares nothing by itself (timings, collapse fractions).
    Diagnostic,
}

/// One point of an arm's tuning grid.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Setting {
    /// `lr=0.003 wd=0.1`, or `default` for the only point of an untuned arm.
    pub name: String,
    /// The values by name.
    pub values: BTreeMap<&'static str, f64>,
}

impl Setting {
    /// The setting with these values, named after them.
    pub fn new(values: &[(&'static str, f64)]) -> Self {
        let parts: Vec<String> = values.iter().map(|(k, v)| format!("{k}={v}")).collect();
        Self {
            name: if parts.is_empty() {
                "default".into()
            } else {
                parts.join(" ")
            },
            values: values.iter().copied().collect(),
        }
    }

    /// A value that the definition gave.
    ///
    /// # Errors
    /// [`Error::Trial`] when there is none of this name.
    pub fn get(&self, name: &str) -> Result<f64> {
        self.values
            .get(name)
            .copied()
            .ok_or_else(|| Error::Trial(format!("setting `{}` has no `{name}`", self.name)))
    }
}

/// One side of a comparison: a baseline, the method or a variant, with its tuning grid.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Arm {
    /// Short name, used in claims and as the key in the database.
    pub name: &'static str,
    /// Name in tables and plots.
    pub label: &'static str,
    /// What it is there for.
    pub role: Role,
    /// The tuning grid; every point runs on every seed and the best mean counts.
    pub settings: Vec<Setting>,
    /// The metric by which the best point of the grid is chosen.
    pub select: &'static str,
    /// Whether it measures time, so that it must run alone.
    pub timed: bool,
}

impl Arm {
    /// An arm with one setting.
    pub fn new(name: &'static str, label: &'static str, role: Role) -> Self {
        Self {
            name,
            label,
            role,
            settings: vec![Setting::new(&[])],
            select: "",
            timed: false,
        }
    }

    /// Tunes `parameter` over `values`, chosen by the mean of the metric `select`.
    #[must_use]
    pub fn tuned(self, parameter: &'static str, values: &[f64], select: &'static str) -> Self {
        let settings = values
            .iter()
            .map(|v| Setting::new(&[(parameter, *v)]))
            .collect();
        Self {
            settings,
            select,
            ..self
        }
    }

    /// Fixed values that the trial reads from its setting.
    #[must_use]
    pub fn fixed(self, values: &[(&'static str, f64)]) -> Self {
        Self {
            settings: vec![Setting::new(values)],
            ..self
        }
    }

    /// Marks the arm as a timing, which never runs beside another trial.
    #[must_use]
    pub fn timed(self) -> Self {
        Self {
            timed: true,
            ..self
        }
    }
}

/// Which data a scenario runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Data {
    /// The name of the embedded or generated data.
    pub embedded: &'static str,
    /// The folder below `--data DIR` that it can use instead.
    pub real: Option<&'static str>,
}

/// Everything about a scenario that is data.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Definition {
    /// The method's short name, unique in the registry.
    pub slug: &'static str,
    /// The method's name in words.
    pub title: &'static str,
    /// The paper.
    pub paper: Paper,
    /// The crate that holds the method, without the prefix.
    pub krate: &'static str,
    /// The module in it.
    pub module: &'static str,
    /// Words to filter by.
    pub tags: &'static [&'static str],
    /// Counts changes of the experiment's code: trials of another version are not reused.
    pub version: u32,
    /// What is run, in a few sentences.
    pub summary: &'static str,
    /// Where the claim does not hold, and what was seen beside it.
    pub notes: &'static str,
    /// Data it runs on.
    pub data: Data,
    /// The sides of the comparison; the first is drawn first.
    pub arms: Vec<Arm>,
    /// The numbers that trials report; the first is the headline.
    pub metrics: Vec<Metric>,
    /// The inequalities that are judged.
    pub claims: Vec<Claim>,
    /// The data folder and the device class of the paper-size experiment, if there is one.
    pub full: Option<&'static str>,
}

impl Definition {
    /// A hash of everything that decides what a trial computes; claims and words are left out, so
    /// that they can be corrected without running again.
    pub fn hash(&self) -> String {
        let mut hash = Sha256::new();
        let mut add = |text: &str| {
            hash.update((text.len() as u64).to_le_bytes());
            hash.update(text.as_bytes());
        };
        add(self.slug);
        add(&self.version.to_string());
        for arm in &self.arms {
            add(arm.name);
            for setting in &arm.settings {
                add(&setting.name);
            }
        }
        hash.finalize()
            .iter()
            .take(8)
            .map(|b| format!("{b:02x}"))
            .collect()
    }

    /// The arm of this name.
    ///
    /// # Errors
    /// [`Error::Unknown`] naming the arms there are.
    pub fn arm(&self, name: &str) -> Result<&Arm> {
        self.arms
            .iter()
            .find(|a| a.name == name)
            .ok_or_else(|| Error::Unknown {
                kind: "arm",
                name: name.to_string(),
                known: self.arms.iter().map(|a| a.name.to_string()).collect(),
            })
    }

    /// The metric of this name.
    pub fn metric(&self, name: &str) -> Option<&Metric> {
        self.metrics.iter().find(|m| m.name == name)
    }

    /// Trials of one seed.
    pub fn trials_per_seed(&self) -> usize {
        self.arms.iter().map(|a| a.settings.len()).sum()
    }

    /// Whether a metric is better when higher; diagnostics count as lower.
    pub fn higher_is_better(&self, metric: &str) -> bool {
        self.metric(metric)
            .is_some_and(|m| m.better == Better::Higher)
    }

    /// Checks that names are unique and that claims and grids refer to what exists.
    ///
    /// # Errors
    /// [`Error::BadDefinition`] naming the first contradiction.
    pub fn validate(&self) -> Result<()> {
        let bad = |reason: String| Error::BadDefinition {
            slug: self.slug.to_string(),
            reason,
        };
        let mut seen = BTreeSet::new();
        for arm in &self.arms {
            if !seen.insert(arm.name) {
                return Err(bad(format!("two arms are called `{}`", arm.name)));
            }
            let names: BTreeSet<&str> = arm.settings.iter().map(|s| s.name.as_str()).collect();
            if names.is_empty() || names.len() != arm.settings.len() {
                return Err(bad(format!("arm `{}` needs distinct settings", arm.name)));
            }
            if arm.settings.len() > 1 && self.metric(arm.select).is_none() {
                return Err(bad(format!(
                    "arm `{}` is tuned by the undeclared metric `{}`",
                    arm.name, arm.select
                )));
            }
        }
        if self.metrics.is_empty() || self.claims.is_empty() {
            return Err(bad("needs at least one metric and one claim".into()));
        }
        for claim in &self.claims {
            claim
                .check(self)
                .map_err(|reason| bad(format!("claim `{}`: {reason}", claim.id)))?;
        }
        Ok(())
    }
}

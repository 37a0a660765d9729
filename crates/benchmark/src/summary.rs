//! Stored trials grouped into sheets (one scenario, suite, device and data source), and what a
//! sheet shows as plain data.

use crate::registry::Registry;
use crate::scenario::{Definition, Paper, Role, Suite};
use crate::statistics::Interval;
use crate::store::{Query, Run, Store, StoredTrial};
use crate::verdict::{overall, ArmResult, ClaimResult, Table, Verdict};
use crate::Result;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// Everything that was read from a database.
#[derive(Debug, Clone)]
pub struct Records {
    /// The latest row of every trial of this version.
    pub trials: Vec<StoredTrial>,
    /// All runs.
    pub runs: Vec<Run>,
}

impl Records {
    /// Reads what this version stored.
    ///
    /// # Errors
    /// [`Error::Store`](crate::Error::Store).
    pub fn load(store: &Store, query: &Query) -> Result<Self> {
        let query = Query {
            version: Some(crate::VERSION.to_string()),
            ..query.clone()
        };
        Ok(Self {
            trials: store.trials(&query)?,
            runs: store.runs()?,
        })
    }

    /// One sheet for each scenario, device and data source, in registry order. Without a `suite`
    /// the largest suite that has a complete seed is taken.
    pub fn sheets<'a>(&'a self, registry: &'a Registry, suite: Option<Suite>) -> Vec<Sheet<'a>> {
        let mut sheets = Vec::new();
        for entry in registry.entries() {
            let d = &entry.definition;
            let hash = d.hash();
            let mine = |t: &&StoredTrial| t.key.scenario == d.slug && t.key.definition == hash;
            let places: BTreeSet<(&str, &str)> = self
                .trials
                .iter()
                .filter(mine)
                .map(|t| (t.key.data.as_str(), t.key.device.as_str()))
                .collect();
            for (data, device) in places {
                let suites = [Suite::Full, Suite::Standard, Suite::Quick];
                let found: Vec<Sheet> = suites
                    .into_iter()
                    .filter(|s| suite.is_none_or(|wanted| wanted == *s))
                    .filter_map(|s| self.sheet(d, s, data, device))
                    .collect();
                let complete = found.iter().position(|s| !s.table.seeds().is_empty());
                sheets.extend(found.into_iter().nth(complete.unwrap_or(0)));
            }
        }
        sheets
    }

    fn sheet<'a>(
        &'a self,
        definition: &'a Definition,
        suite: Suite,
        data: &'a str,
        device: &'a str,
    ) -> Option<Sheet<'a>> {
        let hash = definition.hash();
        let trials: Vec<&StoredTrial> = self
            .trials
            .iter()
            .filter(|t| {
                let k = &t.key;
                k.scenario == definition.slug
                    && k.definition == hash
                    && k.suite == suite.name()
                    && k.data == data
                    && k.device == device
            })
            .collect();
        let last = trials.iter().map(|t| t.run).max()?;
        Some(Sheet {
            definition,
            suite,
            data,
            device,
            table: Table::new(definition, trials.iter().copied()),
            failed: trials
                .iter()
                .copied()
                .filter(|t| t.error.is_some())
                .collect(),
            seconds: trials.iter().map(|t| t.seconds).sum(),
            run: self.runs.iter().find(|r| r.id == last),
        })
    }
}

/// One scenario on one suite, device and data source.
pub struct Sheet<'a> {
    /// The scenario.
    pub definition: &'a Definition,
    /// The suite.
    pub suite: Suite,
    /// The data.
    pub data: &'a str,
    /// The device.
    pub device: &'a str,
    /// The trials.
    pub table: Table<'a>,
    /// Trials that ended with an error.
    pub failed: Vec<&'a StoredTrial>,
    /// Seconds that all trials took.
    pub seconds: f64,
    /// The last run that added to it.
    pub run: Option<&'a Run>,
}

impl Sheet<'_> {
    /// The sheet as plain data.
    pub fn result(&self) -> ScenarioResult {
        let d = self.definition;
        let claims = self.table.claims();
        ScenarioResult {
            slug: d.slug.to_string(),
            title: d.title.to_string(),
            paper: OwnedPaper::from(d.paper),
            krate: d.krate.to_string(),
            module: d.module.to_string(),
            definition: d.hash(),
            version: crate::VERSION.to_string(),
            suite: self.suite,
            data: self.data.to_string(),
            device: self.device.to_string(),
            seeds: self.table.seeds().to_vec(),
            headline: d
                .metrics
                .first()
                .map(|m| m.name.to_string())
                .unwrap_or_default(),
            verdict: overall(&claims),
            claims,
            arms: self.table.arms().iter().map(ArmSummary::from).collect(),
            failed: self.failed.iter().filter_map(|t| t.error.clone()).collect(),
            seconds: self.seconds,
            facts: self.run.map(|r| r.facts.clone()).unwrap_or_default(),
        }
    }
}

/// A paper as read back from JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnedPaper {
    /// Its title.
    pub title: String,
    /// Where and when it appeared.
    pub venue: String,
    /// Its arXiv number.
    pub arxiv: String,
}

impl From<Paper> for OwnedPaper {
    fn from(paper: Paper) -> Self {
        Self {
            title: paper.title.to_string(),
            venue: paper.venue.to_string(),
            arxiv: paper.arxiv.to_string(),
        }
    }
}

/// One sheet as plain data: what `--json` and `docs/results.json` hold.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ScenarioResult {
    /// The scenario's slug.
    pub slug: String,
    /// The method in words.
    pub title: String,
    /// The paper.
    pub paper: OwnedPaper,
    /// The crate.
    #[serde(rename = "crate")]
    pub krate: String,
    /// The module.
    pub module: String,
    /// Hash of the scenario's definition.
    pub definition: String,
    /// The version of this crate.
    pub version: String,
    /// The suite.
    pub suite: Suite,
    /// The data.
    pub data: String,
    /// The device.
    pub device: String,
    /// The complete seeds.
    pub seeds: Vec<u64>,
    /// The metric that overviews show.
    pub headline: String,
    /// The verdict over all claims.
    pub verdict: Verdict,
    /// The claims.
    pub claims: Vec<ClaimResult>,
    /// The arms at their best settings.
    pub arms: Vec<ArmSummary>,
    /// Messages of failed trials.
    pub failed: Vec<String>,
    /// Seconds that all trials took.
    pub seconds: f64,
    /// Machine and version facts of the last run.
    pub facts: BTreeMap<String, String>,
}

/// One arm as plain data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ArmSummary {
    /// The arm.
    pub arm: String,
    /// Its name in tables.
    pub label: String,
    /// Whether it is what the paper proposes.
    pub role: String,
    /// Its best setting.
    pub setting: String,
    /// Mean and interval of every metric.
    pub metrics: BTreeMap<String, Interval>,
}

impl From<&ArmResult<'_>> for ArmSummary {
    fn from(result: &ArmResult) -> Self {
        let role = match result.arm.role {
            Role::Baseline => "baseline",
            Role::Method => "method",
            Role::Variant => "variant",
            Role::Diagnostic => "diagnostic",
        };
        Self {
            arm: result.arm.name.to_string(),
            label: result.arm.label.to_string(),
            role: role.to_string(),
            setting: result.best.map(|s| s.name.clone()).unwrap_or_default(),
            metrics: result
                .metrics
                .iter()
                .map(|(name, (_, i))| (name.clone(), *i))
                .collect(),
        }
    }
}

/// A number with four significant digits, without an exponent where it is short enough.
pub fn figure(x: f64) -> String {
    digits(x, 4)
}

/// A number with so many significant digits.
pub(crate) fn digits(x: f64, significant: usize) -> String {
    if x == 0.0 {
        return "0".to_string();
    }
    if !x.is_finite() {
        return if x.is_nan() {
            "–".into()
        } else if x > 0.0 {
            "∞".into()
        } else {
            "−∞".into()
        };
    }
    let magnitude = x.abs().log10().floor();
    let trimmed = |text: &str| text.trim_end_matches('0').trim_end_matches('.').to_string();
    let text = if (-4.0..7.0).contains(&magnitude) {
        let places = (significant as f64 - 1.0 - magnitude).max(0.0) as usize;
        let text = format!("{x:.places$}");
        if text.contains('.') {
            trimmed(&text)
        } else {
            text
        }
    } else {
        let text = format!("{x:.2e}");
        match text.split_once('e') {
            Some((mantissa, exponent)) => format!("{}e{exponent}", trimmed(mantissa)),
            None => text,
        }
    };
    text.replace('-', "−")
}

/// A mean with its interval, three significant digits each; the mean alone where they are the same.
pub fn interval(i: &Interval) -> String {
    if i.low == i.high {
        figure(i.mean)
    } else {
        format!(
            "{} [{}, {}]",
            digits(i.mean, 3),
            digits(i.low, 3),
            digits(i.high, 3)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::figure;

    #[test]
    fn figures() {
        for (x, text) in [
            (0.0, "0"),
            (0.123456, "0.1235"),
            (-12.5, "−12.5"),
            (1234567.0, "1234567"),
            (1e-6, "1e−6"),
            (0.00012344, "0.0001234"),
            (2.5e12, "2.5e12"),
            (100.0, "100"),
            (f64::NEG_INFINITY, "−∞"),
            (f64::NAN, "–"),
        ] {
            assert_eq!(figure(x), text);
        }
    }
}

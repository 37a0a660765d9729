//! Verdicts: claims judged from stored trials.

use crate::scenario::{Arm, Claim, Definition, Expr, Judged, Setting};
use crate::statistics::{bootstrap, mean, Interval};
use crate::store::StoredTrial;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// From this many seeds on a claim is judged; below it the verdict is `undecided`.
pub const SEEDS_FOR_VERDICT: usize = 5;

/// The outcome for a claim or a whole scenario.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Shown, on five seeds or more.
    Holds,
    /// Too few seeds to judge.
    Undecided,
    /// Not shown, on five seeds or more.
    Fails,
    /// No complete seed.
    NotRun,
}

impl Verdict {
    /// The word in tables.
    pub fn word(self) -> &'static str {
        match self {
            Self::Holds => "holds",
            Self::Undecided => "undecided",
            Self::Fails => "fails",
            Self::NotRun => "not run",
        }
    }
}

/// One claim with its evidence.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClaimResult {
    /// The claim's short name.
    pub id: String,
    /// The claim in words.
    pub words: String,
    /// The inequality.
    pub formula: String,
    /// The left side over all seeds.
    #[serde(with = "crate::scenario::number")]
    pub left: f64,
    /// The right side over all seeds.
    #[serde(with = "crate::scenario::number")]
    pub right: f64,
    /// By how much the inequality is satisfied, with its 95 % interval; negative = violated.
    pub margin: Interval,
    /// Seeds on which it is satisfied.
    pub satisfied: usize,
    /// Complete seeds.
    pub seeds: usize,
    /// The verdict.
    pub verdict: Verdict,
}

/// One arm at its best setting.
#[derive(Debug, Clone, PartialEq)]
pub struct ArmResult<'a> {
    /// The arm.
    pub arm: &'a Arm,
    /// The setting that is best in the mean; `None` without a complete seed.
    pub best: Option<&'a Setting>,
    /// Every metric that was reported: per-seed values (in the order of the table's seeds) and the
    /// mean with its interval.
    pub metrics: BTreeMap<String, (Vec<f64>, Interval)>,
}

/// The trials of one scenario, one suite, one device and one data source, by arm, setting and seed.
pub struct Table<'a> {
    definition: &'a Definition,
    cells: BTreeMap<(&'a str, &'a str, u64), &'a StoredTrial>,
    seeds: Vec<u64>,
}

impl<'a> Table<'a> {
    /// Sorts trials into a table. Trials of other definitions or failed ones are left out.
    pub fn new(
        definition: &'a Definition,
        trials: impl IntoIterator<Item = &'a StoredTrial>,
    ) -> Self {
        let hash = definition.hash();
        let usable = |t: &&StoredTrial| {
            t.key.scenario == definition.slug && t.key.definition == hash && t.error.is_none()
        };
        let cells: BTreeMap<_, _> = trials
            .into_iter()
            .filter(usable)
            .map(|t| ((t.key.arm.as_str(), t.key.setting.as_str(), t.key.seed), t))
            .collect();
        let all: BTreeSet<u64> = cells.keys().map(|(_, _, seed)| *seed).collect();
        let complete = |seed: &u64| {
            definition.arms.iter().all(|arm| {
                let has = |s: &Setting| cells.contains_key(&(arm.name, s.name.as_str(), *seed));
                arm.settings.iter().all(has)
            })
        };
        let seeds = all.iter().copied().filter(complete).collect();
        Self {
            definition,
            cells,
            seeds,
        }
    }

    /// The seeds for which every arm and setting has a trial.
    pub fn seeds(&self) -> &[u64] {
        &self.seeds
    }

    /// The trial of one cell.
    pub fn trial(&self, arm: &str, setting: &str, seed: u64) -> Option<&'a StoredTrial> {
        self.cells.get(&(arm, setting, seed)).copied()
    }

    /// A metric of one cell; NaN when the trial did not report it.
    fn value(&self, arm: &str, setting: &str, seed: usize, metric: &str) -> f64 {
        self.trial(arm, setting, self.seeds[seed])
            .and_then(|t| t.outcome.metrics.get(metric).copied())
            .unwrap_or(f64::NAN)
    }

    /// A metric of one arm and setting on every complete seed.
    pub fn values(&self, arm: &str, setting: &str, metric: &str) -> Vec<f64> {
        (0..self.seeds.len())
            .map(|i| self.value(arm, setting, i, metric))
            .collect()
    }

    /// The setting of `arm` with the best mean over `sample` (indices into the complete seeds).
    fn best(&self, arm: &'a Arm, sample: &[usize]) -> Option<&'a Setting> {
        let higher = self.definition.higher_is_better(arm.select);
        // The first of equals stays, and a NaN mean never wins.
        let mut best: Option<(&Setting, f64)> = None;
        for setting in &arm.settings {
            let over: Vec<f64> = sample
                .iter()
                .map(|i| self.value(arm.name, &setting.name, *i, arm.select))
                .collect();
            let score = if higher { mean(&over) } else { -mean(&over) };
            let score = if score.is_nan() {
                f64::NEG_INFINITY
            } else {
                score
            };
            if best.is_none_or(|(_, top)| score > top) {
                best = Some((setting, score));
            }
        }
        best.map(|(setting, _)| setting)
    }

    /// The value of an expression: settings chosen on `choose`, means over `sample`.
    fn evaluate(&self, expr: &Expr, choose: &[usize], sample: &[usize]) -> f64 {
        let go = |e: &Expr| self.evaluate(e, choose, sample);
        let arm = |name: &str| self.definition.arms.iter().find(|a| a.name == name);
        let over =
            |f: &dyn Fn(usize) -> f64| mean(&sample.iter().map(|i| f(*i)).collect::<Vec<_>>());
        match expr {
            Expr::Constant(x) => *x,
            Expr::Scale(factor, a) => factor * go(a),
            Expr::Sum(a, b) => go(a) + go(b),
            Expr::Difference(a, b) => go(a) - go(b),
            Expr::Abs(a) => go(a).abs(),
            Expr::Setting {
                arm: name,
                parameter,
            } => arm(name)
                .and_then(|a| self.best(a, choose))
                .and_then(|s| s.values.get(parameter).copied())
                .unwrap_or(f64::NAN),
            Expr::Metric { arm: name, metric } => {
                match arm(name).and_then(|a| self.best(a, choose)) {
                    Some(s) => over(&|i| self.value(name, &s.name, i, metric)),
                    None => f64::NAN,
                }
            }
            Expr::Best { arm: name, metric } => {
                let higher = self.definition.higher_is_better(metric);
                let settings = arm(name).map_or(&[][..], |a| &a.settings);
                over(&|i| {
                    let values = settings
                        .iter()
                        .map(|s| self.value(name, &s.name, i, metric));
                    // `max` and `min` pass over NaN: a setting that reported nothing cannot win.
                    values
                        .reduce(if higher { f64::max } else { f64::min })
                        .unwrap_or(f64::NAN)
                })
            }
        }
    }

    /// Judges one claim.
    pub fn judge(&self, claim: &Claim) -> ClaimResult {
        let n = self.seeds.len();
        let all: Vec<usize> = (0..n).collect();
        let margin = |choose: &[usize], sample: &[usize]| {
            let left = self.evaluate(&claim.left, choose, sample);
            claim
                .relation
                .margin(left, self.evaluate(&claim.right, choose, sample))
        };
        let per_seed: Vec<f64> = all.iter().map(|i| margin(&all, &[*i])).collect();
        let satisfied = per_seed
            .iter()
            .filter(|m| claim.relation.satisfied(**m))
            .count();
        let label = format!("{}/{}", self.definition.slug, claim.id);
        let interval = bootstrap(n, &label, |sample| match claim.judged {
            Judged::EverySeed => mean(&sample.iter().map(|i| per_seed[*i]).collect::<Vec<_>>()),
            // The tuning is part of the procedure, so it is repeated on every resample.
            Judged::Mean => margin(sample, sample),
        });
        let shown = match claim.judged {
            Judged::EverySeed => satisfied == n,
            Judged::Mean => claim.relation.satisfied(interval.low),
        };
        let verdict = match n {
            0 => Verdict::NotRun,
            n if n < SEEDS_FOR_VERDICT => Verdict::Undecided,
            _ if shown => Verdict::Holds,
            _ => Verdict::Fails,
        };
        ClaimResult {
            id: claim.id.to_string(),
            words: claim.words.to_string(),
            formula: claim.formula(),
            left: self.evaluate(&claim.left, &all, &all),
            right: self.evaluate(&claim.right, &all, &all),
            margin: interval,
            satisfied,
            seeds: n,
            verdict,
        }
    }

    /// Judges all claims of the scenario, without those that are about metrics which no trial reports.
    pub fn claims(&self) -> Vec<ClaimResult> {
        let claims = self.definition.claims.iter();
        let judged =
            claims.filter(|c| !c.optional || self.reports(&c.left) && self.reports(&c.right));
        judged.map(|c| self.judge(c)).collect()
    }

    /// Whether some trial reports each metric of an expression.
    fn reports(&self, expr: &Expr) -> bool {
        let mut all = true;
        expr.leaves(&mut |leaf| {
            if let Expr::Metric { arm, metric } | Expr::Best { arm, metric } = leaf {
                let reported = |((a, _, _), t): (&(&str, &str, u64), &&StoredTrial)| {
                    a == arm && t.outcome.metrics.contains_key(*metric)
                };
                all &= self.cells.iter().any(reported);
            }
        });
        all
    }

    /// All arms at their best settings.
    pub fn arms(&self) -> Vec<ArmResult<'a>> {
        let all: Vec<usize> = (0..self.seeds.len()).collect();
        self.definition
            .arms
            .iter()
            .map(|arm| self.arm(arm, &all))
            .collect()
    }

    fn arm(&self, arm: &'a Arm, all: &[usize]) -> ArmResult<'a> {
        let best = if all.is_empty() {
            None
        } else {
            self.best(arm, all)
        };
        let mut metrics = BTreeMap::new();
        if let Some(setting) = best {
            for metric in &self.definition.metrics {
                let values = self.values(arm.name, &setting.name, metric.name);
                if values.iter().all(|v| v.is_nan()) {
                    continue;
                }
                let label = format!("{}/{}/{}", self.definition.slug, arm.name, metric.name);
                let interval = bootstrap(values.len(), &label, |sample| {
                    mean(&sample.iter().map(|i| values[*i]).collect::<Vec<_>>())
                });
                metrics.insert(metric.name.to_string(), (values, interval));
            }
        }
        ArmResult { arm, best, metrics }
    }
}

/// The verdict for a scenario: all claims must hold.
pub fn overall(claims: &[ClaimResult]) -> Verdict {
    claims
        .iter()
        .map(|c| c.verdict)
        .max()
        .unwrap_or(Verdict::NotRun)
}

//! Claims: inequalities between metrics of arms, as data.

use super::Definition;
use serde::{Serialize, Serializer};
use std::fmt;
use std::ops::{Add, Mul, Sub};

/// A number made from the trials of a set of seeds.
#[derive(Debug, Clone, PartialEq)]
pub enum Expr {
    /// A fixed number.
    Constant(f64),
    /// A metric of an arm at the arm's best setting, mean over the seeds.
    Metric {
        /// The arm.
        arm: &'static str,
        /// The metric.
        metric: &'static str,
    },
    /// A metric of an arm at whatever setting is best on each seed, mean over the seeds. It grants
    /// the arm more tuning than anybody could do.
    Best {
        /// The arm.
        arm: &'static str,
        /// The metric.
        metric: &'static str,
    },
    /// The value of a tuned parameter at the arm's best setting.
    Setting {
        /// The arm.
        arm: &'static str,
        /// The parameter.
        parameter: &'static str,
    },
    /// A multiple.
    Scale(f64, Box<Expr>),
    /// A sum.
    Sum(Box<Expr>, Box<Expr>),
    /// A difference.
    Difference(Box<Expr>, Box<Expr>),
    /// An absolute value.
    Abs(Box<Expr>),
}

/// A fixed number.
pub fn constant(value: f64) -> Expr {
    Expr::Constant(value)
}

/// A metric of an arm at the arm's best setting.
pub fn metric(arm: &'static str, metric: &'static str) -> Expr {
    Expr::Metric { arm, metric }
}

/// A metric of an arm at the best setting of each seed.
pub fn best(arm: &'static str, metric: &'static str) -> Expr {
    Expr::Best { arm, metric }
}

/// The value of a tuned parameter at the arm's best setting.
pub fn setting(arm: &'static str, parameter: &'static str) -> Expr {
    Expr::Setting { arm, parameter }
}

impl Expr {
    /// The absolute value.
    #[must_use]
    pub fn abs(self) -> Self {
        Self::Abs(Box::new(self))
    }

    /// `self < right`.
    pub fn below(self, right: impl Into<Expr>) -> (Expr, Relation, Expr) {
        (self, Relation::Below, right.into())
    }

    /// `self <= right`.
    pub fn at_most(self, right: impl Into<Expr>) -> (Expr, Relation, Expr) {
        (self, Relation::AtMost, right.into())
    }

    /// `self > right`.
    pub fn above(self, right: impl Into<Expr>) -> (Expr, Relation, Expr) {
        (self, Relation::Above, right.into())
    }

    /// `self >= right`.
    pub fn at_least(self, right: impl Into<Expr>) -> (Expr, Relation, Expr) {
        (self, Relation::AtLeast, right.into())
    }

    /// Calls `visit` with every leaf.
    pub fn leaves(&self, visit: &mut dyn FnMut(&Expr)) {
        match self {
            Self::Scale(_, a) | Self::Abs(a) => a.leaves(visit),
            Self::Sum(a, b) | Self::Difference(a, b) => {
                a.leaves(visit);
                b.leaves(visit);
            }
            leaf => visit(leaf),
        }
    }
}

impl From<f64> for Expr {
    fn from(value: f64) -> Self {
        constant(value)
    }
}

impl Mul<f64> for Expr {
    type Output = Expr;
    fn mul(self, factor: f64) -> Expr {
        Expr::Scale(factor, Box::new(self))
    }
}

impl<E: Into<Expr>> Add<E> for Expr {
    type Output = Expr;
    fn add(self, other: E) -> Expr {
        Expr::Sum(Box::new(self), Box::new(other.into()))
    }
}

impl<E: Into<Expr>> Sub<E> for Expr {
    type Output = Expr;
    fn sub(self, other: E) -> Expr {
        Expr::Difference(Box::new(self), Box::new(other.into()))
    }
}

impl fmt::Display for Expr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Constant(x) => write!(f, "{x}"),
            Self::Metric { arm, metric } => write!(f, "{arm}.{metric}"),
            Self::Best { arm, metric } => write!(f, "best({arm}.{metric})"),
            Self::Setting { arm, parameter } => write!(f, "{arm}[{parameter}]"),
            Self::Scale(factor, a) => write!(f, "{factor} × {a}"),
            Self::Sum(a, b) => write!(f, "{a} + {b}"),
            Self::Difference(a, b) => write!(f, "{a} − {b}"),
            Self::Abs(a) => write!(f, "|{a}|"),
        }
    }
}

/// How the two sides compare.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Relation {
    /// `<`
    Below,
    /// `<=`
    AtMost,
    /// `>`
    Above,
    /// `>=`
    AtLeast,
}

impl Relation {
    /// By how much the inequality is satisfied; negative where it is violated.
    pub fn margin(self, left: f64, right: f64) -> f64 {
        let margin = match self {
            Self::Below | Self::AtMost => right - left,
            Self::Above | Self::AtLeast => left - right,
        };
        // Two infinite sides (both diverged) show nothing.
        if margin.is_nan() {
            f64::NEG_INFINITY
        } else {
            margin
        }
    }

    /// Whether a margin satisfies it.
    pub fn satisfied(self, margin: f64) -> bool {
        match self {
            Self::Below | Self::Above => margin > 0.0,
            Self::AtMost | Self::AtLeast => margin >= 0.0,
        }
    }

    /// The sign in formulas.
    pub fn sign(self) -> &'static str {
        match self {
            Self::Below => "<",
            Self::AtMost => "≤",
            Self::Above => ">",
            Self::AtLeast => "≥",
        }
    }
}

/// Over what the inequality must hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Judged {
    /// On every single seed.
    EverySeed,
    /// Between means over the seeds, with the whole bootstrap interval on the right side.
    Mean,
}

/// One inequality with its words.
#[derive(Debug, Clone, PartialEq)]
pub struct Claim {
    /// Short name, unique in the scenario.
    pub id: &'static str,
    /// The claim in words.
    pub words: &'static str,
    /// The left side.
    pub left: Expr,
    /// The relation.
    pub relation: Relation,
    /// The right side.
    pub right: Expr,
    /// Over what it must hold.
    pub judged: Judged,
    /// Whether it is left out where no trial reports one of its metrics.
    pub optional: bool,
}

impl Claim {
    /// A claim that must hold on every seed.
    pub fn every_seed(
        id: &'static str,
        words: &'static str,
        (left, relation, right): (Expr, Relation, Expr),
    ) -> Self {
        Self {
            id,
            words,
            left,
            relation,
            right,
            judged: Judged::EverySeed,
            optional: false,
        }
    }

    /// A claim about means over seeds.
    pub fn mean(
        id: &'static str,
        words: &'static str,
        (left, relation, right): (Expr, Relation, Expr),
    ) -> Self {
        Self {
            id,
            words,
            left,
            relation,
            right,
            judged: Judged::Mean,
            optional: false,
        }
    }

    /// Judged only where trials report its metrics: for what only real data measure.
    #[must_use]
    pub fn where_reported(self) -> Self {
        Self {
            optional: true,
            ..self
        }
    }

    /// The inequality as a formula.
    pub fn formula(&self) -> String {
        let over = match self.judged {
            Judged::EverySeed => "on every seed",
            Judged::Mean => "in the mean",
        };
        format!(
            "{} {} {} {over}",
            self.left,
            self.relation.sign(),
            self.right
        )
    }

    pub(super) fn check(&self, definition: &Definition) -> Result<(), String> {
        let mut problem = None;
        let mut look = |leaf: &Expr| {
            let found = match leaf {
                Expr::Metric { arm, metric } | Expr::Best { arm, metric } => {
                    definition.arm(arm).is_ok() && definition.metric(metric).is_some()
                }
                Expr::Setting { arm, parameter } => definition
                    .arm(arm)
                    .is_ok_and(|a| a.settings.iter().all(|s| s.values.contains_key(parameter))),
                _ => true,
            };
            if !found {
                problem = Some(format!("`{leaf}` is not declared"));
            }
        };
        self.left.leaves(&mut look);
        self.right.leaves(&mut look);
        problem.map_or(Ok(()), Err)
    }
}

/// As its words and formula: the form of exports.
impl Serialize for Claim {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use serde::ser::SerializeStruct;
        let mut out = serializer.serialize_struct("Claim", 3)?;
        out.serialize_field("id", self.id)?;
        out.serialize_field("words", self.words)?;
        out.serialize_field("formula", &self.formula())?;
        out.end()
    }
}

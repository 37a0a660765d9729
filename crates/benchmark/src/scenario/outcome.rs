//! What a trial gives back.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A line over the course of a trial.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Curve {
    /// What is drawn on the vertical axis; curves of this name from all arms share one plot.
    pub name: String,
    /// What is drawn on the horizontal axis.
    pub x_label: String,
    /// Whether the horizontal axis is logarithmic.
    #[serde(default)]
    pub log_x: bool,
    /// Whether the vertical axis is logarithmic.
    #[serde(default)]
    pub log_y: bool,
    /// Horizontal positions; the same for all seeds of an arm.
    pub x: Vec<f64>,
    /// Values; a gap where one is not finite.
    #[serde(with = "numbers")]
    pub y: Vec<f64>,
}

impl Curve {
    /// An empty curve with linear axes.
    pub fn new(name: impl Into<String>, x_label: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            x_label: x_label.into(),
            log_x: false,
            log_y: false,
            x: Vec::new(),
            y: Vec::new(),
        }
    }

    /// With a logarithmic horizontal axis.
    #[must_use]
    pub fn log_x(self) -> Self {
        Self {
            log_x: true,
            ..self
        }
    }

    /// With a logarithmic vertical axis.
    #[must_use]
    pub fn log_y(self) -> Self {
        Self {
            log_y: true,
            ..self
        }
    }

    /// Adds a point.
    pub fn push(&mut self, x: f64, y: f64) {
        self.x.push(x);
        self.y.push(y);
    }
}

/// The form of a picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PictureFormat {
    /// Scalable vector graphics.
    Svg,
    /// Portable network graphics.
    Png,
    /// Preformatted text.
    Text,
}

/// Something to look at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture {
    /// What it shows.
    pub caption: String,
    /// Its form.
    pub format: PictureFormat,
    /// The file's bytes.
    pub bytes: Vec<u8>,
}

/// What one trial measured.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct TrialOutcome {
    /// Numbers by name.
    pub metrics: BTreeMap<String, f64>,
    /// Lines over the course of the trial.
    pub curves: Vec<Curve>,
    /// Things to look at.
    pub pictures: Vec<Picture>,
}

impl TrialOutcome {
    /// With one more number.
    #[must_use]
    pub fn metric(mut self, name: &str, value: f64) -> Self {
        self.metrics.insert(name.to_string(), value);
        self
    }

    /// With one more curve.
    #[must_use]
    pub fn curve(mut self, curve: Curve) -> Self {
        self.curves.push(curve);
        self
    }

    /// With one more picture.
    #[must_use]
    pub fn picture(mut self, picture: Picture) -> Self {
        self.pictures.push(picture);
        self
    }
}

/// A number in JSON, where the ones that JSON lacks (infinities, NaN) are written as text.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum Number {
    Finite(f64),
    Other(String),
}

impl From<f64> for Number {
    fn from(x: f64) -> Self {
        if x.is_finite() {
            Self::Finite(x)
        } else {
            Self::Other(x.to_string())
        }
    }
}

impl From<Number> for f64 {
    fn from(number: Number) -> Self {
        match number {
            Number::Finite(x) => x,
            // Not a number is what anything unreadable is.
            Number::Other(text) => text.parse().unwrap_or(f64::NAN),
        }
    }
}

/// [`Number`]s for a field of type `f64`.
pub(crate) mod number {
    use super::Number;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(crate) fn serialize<S: Serializer>(value: &f64, out: S) -> Result<S::Ok, S::Error> {
        Number::from(*value).serialize(out)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
        Number::deserialize(from).map(f64::from)
    }
}

/// [`Number`]s for a field of type `Vec<f64>`.
pub(crate) mod numbers {
    use super::Number;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(crate) fn serialize<S: Serializer>(values: &[f64], out: S) -> Result<S::Ok, S::Error> {
        out.collect_seq(values.iter().map(|x| Number::from(*x)))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<f64>, D::Error> {
        let values = Vec::<Number>::deserialize(from)?;
        Ok(values.into_iter().map(f64::from).collect())
    }
}

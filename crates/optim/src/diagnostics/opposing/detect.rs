//! Finding the pairs of groups.

use super::recorder::LossRecorder;
use super::sharpness::EdgeOfStability;
use crate::error::check;
use crate::{Error, Result};
use candle_core::{Device, Tensor};

/// Size of each of the two groups.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum TopK {
    /// So many examples.
    Count(usize),
    /// This part of all examples, rounded up.
    Fraction(f64),
}

/// What is subtracted from the changes of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Center {
    /// Their median over the examples.
    #[default]
    Median,
    /// Their mean.
    Mean,
    /// Nothing: all examples then share the trend of the loss.
    None,
}

/// Which steps are looked at.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Selection {
    /// The one with the largest change.
    #[default]
    Strongest,
    /// Every one whose largest change exceeds so many robust standard deviations (1.4826 times the
    /// median absolute deviation of the step's changes), and that is the strongest within `window`
    /// on either side.
    Outlying(f64),
}

/// Settings of [`detect`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OpposingConfig {
    /// Size of the groups.
    pub k: TopK,
    /// Recordings over which the groups are correlated, before the step.
    pub window: usize,
    /// What is subtracted from the changes.
    pub center: Center,
    /// Recordings at the beginning that are left out.
    pub min_step: usize,
    /// A pair's correlation is at most `-min_abs_corr`.
    pub min_abs_corr: f64,
    /// A pair's share is at least this.
    pub min_share: f64,
    /// Steps with no change larger than this are rounding.
    pub min_change: f64,
    /// Which steps are looked at.
    pub selection: Selection,
    /// The sharpness beside what the step size tolerates, where it is known: a pair then counts only
    /// near the edge of stability or beyond it, at a ratio of `min_edge_ratio` or more.
    pub edge: Option<EdgeOfStability>,
    /// See `edge`.
    pub min_edge_ratio: f64,
}

impl Default for OpposingConfig {
    fn default() -> Self {
        Self {
            k: TopK::Count(20),
            window: 15,
            center: Center::Median,
            min_step: 5,
            min_abs_corr: 0.7,
            min_share: 0.2,
            min_change: 1e-4,
            selection: Selection::Strongest,
            edge: None,
            min_edge_ratio: 0.8,
        }
    }
}

impl OpposingConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] that names the first bad one.
    pub fn validate(&self) -> Result<()> {
        match self.k {
            TopK::Count(k) => check::at_least_one("TopK::Count", k)?,
            TopK::Fraction(f) => {
                let holds = f > 0.0 && f <= 0.5;
                check::require(holds, "TopK::Fraction", f, "a number in (0, 0.5]")?;
            }
        }
        check::at_least_one("OpposingConfig::window", self.window)?;
        let one = |field, value: f64| {
            let holds = (0.0..=1.0).contains(&value);
            check::require(holds, field, value, "a number in [0, 1]")
        };
        one("OpposingConfig::min_abs_corr", self.min_abs_corr)?;
        one("OpposingConfig::min_share", self.min_share)?;
        check::non_negative("OpposingConfig::min_change", self.min_change)?;
        check::non_negative("OpposingConfig::min_edge_ratio", self.min_edge_ratio)?;
        if let Selection::Outlying(threshold) = self.selection {
            check::positive("Selection::Outlying", threshold)?;
        }
        Ok(())
    }

    /// Whether a pair counts.
    fn accepts(&self, pair: &OpposingPair) -> bool {
        let near = |edge: &EdgeOfStability| edge.ratio >= self.min_edge_ratio;
        pair.corr <= -self.min_abs_corr
            && pair.share >= self.min_share
            && self.edge.as_ref().is_none_or(near)
    }

    fn group_size(&self, n: usize) -> Result<usize> {
        let k = match self.k {
            TopK::Count(k) => k,
            TopK::Fraction(f) => (f * n as f64).ceil() as usize,
        };
        if 2 * k > n {
            let expected = format!("at most half of the {n} examples");
            return Err(Error::argument("group size", k, expected));
        }
        Ok(k)
    }
}

/// Two groups of examples whose losses move against each other.
#[derive(Debug, Clone, PartialEq)]
pub struct OpposingPair {
    /// The step (as it was recorded) from which the change was measured.
    pub step: usize,
    /// Its place among the recordings.
    pub row: usize,
    /// The place in the valley before it, `window` recordings earlier.
    pub valley_row: usize,
    /// Examples whose losses rose most, from the largest change on.
    pub up: Vec<usize>,
    /// Examples whose losses fell most, from the largest change on.
    pub down: Vec<usize>,
    /// Correlation of the groups' mean centered changes over the window; NaN where one of them does
    /// not change.
    pub corr: f64,
    /// Part of all change in the 5 % of examples that change most.
    pub share: f64,
    /// Robust z-scores of the members' changes: of `up`, then of `down`.
    pub z_scores: Vec<f64>,
    /// The centered changes of all examples.
    pub changes: Vec<f64>,
}

/// The pairs that the configuration's thresholds let through, by step; none away from the edge of
/// stability, where [`OpposingConfig::edge`] says so.
///
/// # Errors
/// Those of [`OpposingConfig::validate`]; [`Error::TooFew`] for fewer recordings than
/// `min_step + 2`; [`Error::InvalidArgument`] when the groups would overlap.
pub fn detect(recorder: &LossRecorder, config: &OpposingConfig) -> Result<Vec<OpposingPair>> {
    let mut found = Vec::new();
    for row in steps(recorder, config)? {
        let pair = analyze(recorder, row, config)?;
        if config.accepts(&pair) {
            found.push(pair);
        }
    }
    Ok(found)
}

/// The groups at one recording: what [`detect`] finds there, without its thresholds on `corr` and
/// `share`.
///
/// # Errors
/// As [`detect`]; [`Error::InvalidArgument`] for a recording without a next one.
pub fn analyze(
    recorder: &LossRecorder,
    row: usize,
    config: &OpposingConfig,
) -> Result<OpposingPair> {
    config.validate()?;
    let k = config.group_size(recorder.examples())?;
    let changes = centered(recorder, row, config.center)?;
    let mut order: Vec<usize> = (0..changes.len()).collect();
    // Stable: ties keep the order of the examples.
    order.sort_by(|a, b| changes[*b].total_cmp(&changes[*a]));
    let up = order[..k].to_vec();
    let mut order: Vec<usize> = (0..changes.len()).collect();
    order.sort_by(|a, b| changes[*a].total_cmp(&changes[*b]));
    let down = order[..k].to_vec();

    let valley_row = row.saturating_sub(config.window);
    let (mut first, mut second) = (Vec::new(), Vec::new());
    for t in valley_row..=row {
        let changes = centered(recorder, t, config.center)?;
        let mean = |of: &[usize]| of.iter().map(|i| changes[*i]).sum::<f64>() / k as f64;
        first.push(mean(&up));
        second.push(mean(&down));
    }
    let scale = deviation(&changes);
    let z_scores = up.iter().chain(&down).map(|i| changes[*i] / scale);
    Ok(OpposingPair {
        step: recorder.step(row).unwrap_or(row),
        row,
        valley_row,
        z_scores: z_scores.collect(),
        corr: pearson(&first, &second),
        share: share(&changes),
        up,
        down,
        changes,
    })
}

/// The recordings that are looked at.
fn steps(recorder: &LossRecorder, config: &OpposingConfig) -> Result<Vec<usize>> {
    config.validate()?;
    config.group_size(recorder.examples())?;
    let needed = config.min_step + 2;
    if recorder.len() < needed {
        return Err(Error::TooFew {
            what: "opposing signals",
            of: "recordings",
            needed,
            got: recorder.len(),
        });
    }
    let last = recorder.len() - 1;
    let mut peaks = Vec::with_capacity(last - config.min_step);
    for t in config.min_step..last {
        let changes = centered(recorder, t, config.center)?;
        let peak = changes.iter().map(|d| d.abs()).fold(0.0, f64::max);
        let outlying = match config.selection {
            Selection::Strongest => true,
            Selection::Outlying(threshold) => peak > threshold * deviation(&changes),
        };
        let counts = outlying && peak >= config.min_change;
        peaks.push(if counts { peak } else { 0.0 });
    }
    let strongest = |from: usize, to: usize| {
        let of = peaks[from..to].iter().enumerate();
        // The first of equal ones.
        of.rev()
            .max_by(|a, b| a.1.total_cmp(b.1))
            .map_or(from, |(i, _)| from + i)
    };
    let chosen: Vec<usize> = match config.selection {
        Selection::Strongest => vec![strongest(0, peaks.len())],
        Selection::Outlying(_) => (0..peaks.len())
            .filter(|i| {
                let from = i.saturating_sub(config.window);
                let to = (i + config.window + 1).min(peaks.len());
                strongest(from, to) == *i
            })
            .collect(),
    };
    let loud = chosen.into_iter().filter(|i| peaks[*i] > 0.0);
    Ok(loud.map(|i| i + config.min_step).collect())
}

impl OpposingPair {
    /// The pair at the recording with the largest change, whatever its correlation; `None` where
    /// nothing changes by `min_change`.
    ///
    /// # Errors
    /// As [`detect`].
    pub fn strongest(recorder: &LossRecorder, config: &OpposingConfig) -> Result<Option<Self>> {
        let config = OpposingConfig {
            selection: Selection::Strongest,
            ..*config
        };
        let rows = steps(recorder, &config)?;
        rows.first()
            .map(|row| analyze(recorder, *row, &config))
            .transpose()
    }

    /// Mean losses of both groups and of all others over the recordings.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when a member is not among the recorder's examples.
    pub fn track(&self, recorder: &LossRecorder) -> Result<GroupCurves> {
        let n = recorder.examples();
        let mut member = vec![false; n];
        for i in self.up.iter().chain(&self.down) {
            match member.get_mut(*i) {
                Some(flag) => *flag = true,
                None => return Err(Error::argument("example", i, format!("below {n}"))),
            }
        }
        let rest: Vec<usize> = (0..n).filter(|i| !member[*i]).collect();
        let mut curves = GroupCurves::default();
        for t in 0..recorder.len() {
            let (Some(losses), Some(step)) = (recorder.losses(t), recorder.step(t)) else {
                continue;
            };
            let mean = |of: &[usize]| {
                let sum: f64 = of.iter().map(|i| f64::from(losses[*i])).sum();
                sum / of.len() as f64
            };
            curves.steps.push(step);
            curves.up.push(mean(&self.up));
            curves.down.push(mean(&self.down));
            curves.bulk.push(mean(&rest));
        }
        Ok(curves)
    }
}

/// Mean losses over the recordings.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GroupCurves {
    /// The recorded steps.
    pub steps: Vec<usize>,
    /// The group that rose.
    pub up: Vec<f64>,
    /// The group that fell.
    pub down: Vec<f64>,
    /// All other examples (NaN where there are none).
    pub bulk: Vec<f64>,
}

/// Weights of examples for an experiment without the groups.
#[derive(Debug, Clone, PartialEq)]
pub struct Weighting(pub Vec<f32>);

impl Weighting {
    /// `weight` for every member of a pair, 1 for the other examples; 0 drops the groups.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a negative or non-finite weight or a member that is not below
    /// `examples`.
    pub fn from_pairs(pairs: &[OpposingPair], examples: usize, weight: f32) -> Result<Self> {
        if !(weight.is_finite() && weight >= 0.0) {
            return Err(Error::argument("weight", weight, "a finite number >= 0"));
        }
        let mut weights = vec![1.0; examples];
        for i in pairs.iter().flat_map(|p| p.up.iter().chain(&p.down)) {
            match weights.get_mut(*i) {
                Some(slot) => *slot = weight,
                None => {
                    let expected = format!("below {examples}");
                    return Err(Error::argument("example", i, expected));
                }
            }
        }
        Ok(Self(weights))
    }

    /// The weights as a tensor `[n]`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn tensor(&self, device: &Device) -> Result<Tensor> {
        Ok(Tensor::new(self.0.as_slice(), device)?)
    }
}

fn centered(recorder: &LossRecorder, t: usize, center: Center) -> Result<Vec<f64>> {
    let mut changes = recorder.changes(t).ok_or_else(|| {
        let expected = format!("below {}", recorder.len().saturating_sub(1));
        Error::argument("recording", t, expected)
    })?;
    let middle = match center {
        Center::None => return Ok(changes),
        Center::Mean => changes.iter().sum::<f64>() / changes.len() as f64,
        Center::Median => median(&changes),
    };
    changes.iter_mut().for_each(|d| *d -= middle);
    Ok(changes)
}

/// The middle value, or the mean of the two middle ones; NaN of nothing.
pub(super) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let n = sorted.len();
    match n {
        0 => f64::NAN,
        _ if n % 2 == 1 => sorted[n / 2],
        _ => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
    }
}

/// The robust standard deviation.
fn deviation(changes: &[f64]) -> f64 {
    let middle = median(changes);
    let distances: Vec<f64> = changes.iter().map(|d| (d - middle).abs()).collect();
    1.4826 * median(&distances)
}

fn share(changes: &[f64]) -> f64 {
    let mut sizes: Vec<f64> = changes.iter().map(|d| d.abs()).collect();
    sizes.sort_by(|a, b| b.total_cmp(a));
    let top = (sizes.len() as f64 * 0.05).ceil() as usize;
    let total: f64 = sizes.iter().sum();
    if total > 0.0 {
        sizes[..top].iter().sum::<f64>() / total
    } else {
        0.0
    }
}

/// Pearson's correlation; NaN where one side does not vary.
pub(crate) fn pearson(a: &[f64], b: &[f64]) -> f64 {
    let n = a.len() as f64;
    let (mean_a, mean_b) = (a.iter().sum::<f64>() / n, b.iter().sum::<f64>() / n);
    let (mut ab, mut aa, mut bb) = (0.0, 0.0, 0.0);
    for (a, b) in a.iter().zip(b) {
        ab += (a - mean_a) * (b - mean_b);
        aa += (a - mean_a).powi(2);
        bb += (b - mean_b).powi(2);
    }
    ab / (aa * bb).sqrt()
}

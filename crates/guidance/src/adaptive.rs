//! Adaptive guidance: classifier-free guidance at a part of its evaluations.
//!
//! For anyone who pays two network calls per step for guidance: [`AdaptiveGuidance`] stops asking for
//! the unconditional prediction once it agrees with the conditional one, [`LinearAg`] replaces some of
//! its calls by a fitted combination of earlier predictions, and [`policy`] searches which steps need
//! guidance at all. *Adaptive Guidance: Training-free Acceleration of Conditional Diffusion Models*,
//! Castillo et al., AAAI 2025, arXiv 2312.12487.
//!
//! With the predictions `a`, `b` under the wanted and the null (or negative) condition, per sample:
//!
//! ```text
//! gamma_i = <a, b> / (|a| |b|)      guided while on; off for good from step i + 1, once gamma_i >= threshold
//! ```
//!
//! | symbol | field |
//! | --- | --- |
//! | `w` | [`AdaptiveGuidance::w`] |
//! | the threshold | [`AdaptiveGuidance::threshold`] |
//! | the form of `a`, `b` | [`AdaptiveGuidance::space`] |
//!
//! **The form matters.** Of noise predictions the first ones are both nearly the sample, so their cosine
//! is 0.9999 at once and guidance would end with its first step. Clean samples (the default) differ at
//! the start and agree at the end; velocities behave like them. The paper's threshold of 0.991 belongs to
//! its models: [`suggest_threshold`] finds one for yours from recorded cosines.
//!
//! ```
//! # extern crate flows as thalweg_flows;
//! use candle_core::{DType, Device, Tensor};
//! use thalweg_flows::schedule::VpSde;
//! use thalweg_flows::{AnalyticMixture, Condition, Grid, RandomStream, Sampler};
//! use thalweg_guidance::AdaptiveGuidance;
//!
//! let means = Tensor::new(&[[1.0_f64, 1.0], [-1.0, 0.5]], &Device::Cpu)?;
//! let model = AnalyticMixture::new(&means, &[0.04, 0.04], &[1.0, 1.0])?.with_classes(&[0, 1])?;
//! let grid = Grid::uniform_lambda(&VpSde::default(), 20)?;
//! let rng = RandomStream::new(1);
//! let noise = rng.split("start").normal(0.0, 1.0, (8, 2), DType::F64, &Device::Cpu)?;
//! let class = Condition::classes(&[0], &Device::Cpu)?;
//! let mut rule = AdaptiveGuidance::new(4.0).threshold(0.999);
//! let out = Sampler::new(&model, grid).guidance(&mut rule).sample(&noise, &class, None, &rng)?;
//! // Between 20 (never guided) and 40 (always) evaluations per sample.
//! assert!(out.nfe.per_sample(8) < 40.0);
//! assert_eq!(rule.trace().len(), 20);
//! # Ok::<(), thalweg_flows::Error>(())
//! ```

mod linear;
pub mod policy;

pub use linear::{FitHistory, FitMode, LinCoef, LinearAg, LinearAgFitter, StepKind};

use crate::basic::extrapolate;
use crate::error::{check, Error};
use crate::space::Space;
use crate::Result;
use candle_core::{DType, Tensor};
use flows::guidance::{CondRole, Query, RunInfo};
use flows::prediction::{replace_rows, select_rows};
use flows::{Denoised, Evaluator, Guidance, StepCx};

/// Over what the cosine runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CosineRows {
    /// Each sample decides for itself; what is off leaves the network's batch.
    #[default]
    PerSample,
    /// One cosine of the whole batch decides for all.
    WholeBatch,
}

/// What a sample does once guidance is off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum After {
    /// The conditional prediction.
    #[default]
    Conditional,
    /// The last difference of the two predictions is used on.
    HoldDelta,
    /// The differences of the last guided steps are extrapolated over the step number by a
    /// polynomial of this order (0 is [`HoldDelta`](Self::HoldDelta)).
    ExtrapolateDelta {
        /// The polynomial's order.
        order: usize,
    },
}

/// What one step saw.
#[derive(Debug, Clone, PartialEq)]
pub struct AdaptiveStep {
    /// The cosine of each sample; none of one that was off.
    pub cosine: Vec<Option<f64>>,
    /// Whether each sample was guided.
    pub active: Vec<bool>,
    /// Evaluations of this step, over all samples.
    pub nfe: usize,
}

/// Guidance that ends sample by sample; see the [module](self) page.
#[derive(Debug, Clone)]
pub struct AdaptiveGuidance {
    /// The scale.
    pub w: f64,
    /// The cosine from which on guidance ends.
    pub threshold: f64,
    /// The form of the predictions that are compared.
    pub space: Space,
    /// Who decides.
    pub rows: CosineRows,
    /// Steps that are guided whatever the cosine.
    pub min_steps: usize,
    /// What comes after.
    pub after: After,
    on: Vec<bool>,
    /// Who is guided from the next step on.
    next: Vec<bool>,
    /// The differences of guided steps, newest last, with the step each row's entry is of.
    anchors: Vec<Anchor>,
    trace: Vec<AdaptiveStep>,
}

/// The differences of a guided step.
#[derive(Debug, Clone)]
struct Anchor {
    delta: Tensor,
    steps: Vec<usize>,
}

impl AdaptiveGuidance {
    /// The paper's threshold, on clean samples.
    pub fn new(w: f64) -> Self {
        Self {
            w,
            threshold: 0.991,
            space: Space::X0,
            rows: CosineRows::PerSample,
            min_steps: 0,
            after: After::Conditional,
            on: Vec::new(),
            next: Vec::new(),
            anchors: Vec::new(),
            trace: Vec::new(),
        }
    }

    /// Another threshold; above 1 guidance never ends, at -1 and below it ends after one step.
    #[must_use]
    pub fn threshold(self, threshold: f64) -> Self {
        Self { threshold, ..self }
    }

    /// Another form of the predictions.
    #[must_use]
    pub fn space(self, space: Space) -> Self {
        Self { space, ..self }
    }

    /// Another way to decide.
    #[must_use]
    pub fn rows(self, rows: CosineRows) -> Self {
        Self { rows, ..self }
    }

    /// Steps that are guided whatever the cosine.
    #[must_use]
    pub fn min_steps(self, min_steps: usize) -> Self {
        Self { min_steps, ..self }
    }

    /// Something else once guidance is off.
    #[must_use]
    pub fn after(self, after: After) -> Self {
        Self { after, ..self }
    }

    /// What every step of the last run saw (the first evaluation of steps with several).
    pub fn trace(&self) -> &[AdaptiveStep] {
        &self.trace
    }

    fn order(&self) -> Option<usize> {
        match self.after {
            After::Conditional => None,
            After::HoldDelta => Some(0),
            After::ExtrapolateDelta { order } => Some(order),
        }
    }

    /// The cosines of the guided rows.
    fn cosines(&self, wanted: &Denoised, null: &Denoised) -> Result<Vec<f64>> {
        let (a, b) = (self.space.read(wanted)?, self.space.read(null)?);
        let rows = a.dims().first().copied().unwrap_or(0);
        if rows == 0 {
            return Ok(Vec::new());
        }
        let groups = match self.rows {
            CosineRows::PerSample => rows,
            CosineRows::WholeBatch => 1,
        };
        let flat = |x: &Tensor| x.reshape((groups, ()))?.to_dtype(DType::F64);
        let (a, b) = (flat(&a)?, flat(&b)?);
        let dot = (&a * &b)?.sum(1)?;
        let norms = (a.sqr()?.sum(1)?.sqrt()? * b.sqr()?.sum(1)?.sqrt()?)?;
        let cosine = (dot / norms.maximum(1e-12)?)?.to_vec1::<f64>()?;
        Ok(match self.rows {
            CosineRows::PerSample => cosine,
            CosineRows::WholeBatch => vec![cosine[0]; rows],
        })
    }

    /// The difference that a row would have at a step, from its last guided ones.
    fn extrapolated(&self, rows: &[u32], step: usize, order: usize) -> Result<Option<Tensor>> {
        let used = &self.anchors[self.anchors.len().saturating_sub(order + 1)..];
        let mut sum: Option<Tensor> = None;
        for (j, anchor) in used.iter().enumerate() {
            let delta = select_rows(&anchor.delta, rows)?;
            let weight = |row: &u32| {
                let at = |a: &Anchor| a.steps[*row as usize] as f64;
                let own = at(anchor);
                // Rows that were guided in fewer steps repeat their first anchor.
                let others = used
                    .iter()
                    .enumerate()
                    .filter(|(i, a)| *i != j && at(a) != own);
                let first = used.iter().position(|a| at(a) == own) == Some(j);
                let product: f64 = others
                    .map(|(_, a)| (step as f64 - at(a)) / (own - at(a)))
                    .product();
                if first {
                    product
                } else {
                    0.0
                }
            };
            let weights: Vec<f64> = rows.iter().map(weight).collect();
            let mut shape = vec![1; delta.rank()];
            shape[0] = weights.len();
            let weights = Tensor::from_vec(weights, shape, delta.device())?;
            let part = delta.broadcast_mul(&weights.to_dtype(delta.dtype())?)?;
            sum = Some(match sum {
                Some(sum) => (sum + part)?,
                None => part,
            });
        }
        Ok(sum)
    }

    /// Keeps the differences of the guided rows; others keep those they had.
    fn remember(&mut self, rows: &[u32], delta: &Tensor, like: &Tensor, step: usize) -> Result<()> {
        let Some(order) = self.order() else {
            return Ok(());
        };
        let (base, mut steps) = match self.anchors.last() {
            Some(last) => (last.delta.clone(), last.steps.clone()),
            None => (like.zeros_like()?, vec![step; like.dims()[0]]),
        };
        for row in rows {
            steps[*row as usize] = step;
        }
        let delta = replace_rows(&base, rows, delta)?.detach();
        if rows.len() == steps.len() || self.anchors.is_empty() {
            self.anchors.push(Anchor { delta, steps });
        } else {
            // Rows that are off must keep their own last anchors: shift only the guided ones.
            self.shift(rows, delta, steps)?;
        }
        let surplus = self.anchors.len().saturating_sub(order + 1);
        self.anchors.drain(..surplus);
        Ok(())
    }

    fn shift(&mut self, rows: &[u32], delta: Tensor, steps: Vec<usize>) -> Result<()> {
        for i in 0..self.anchors.len() {
            let next = match self.anchors.get(i + 1) {
                Some(next) => next.clone(),
                None => Anchor {
                    delta: delta.clone(),
                    steps: steps.clone(),
                },
            };
            let moved = select_rows(&next.delta, rows)?;
            let anchor = &mut self.anchors[i];
            anchor.delta = replace_rows(&anchor.delta, rows, &moved)?;
            for row in rows {
                anchor.steps[*row as usize] = next.steps[*row as usize];
            }
        }
        Ok(())
    }
}

impl Guidance for AdaptiveGuidance {
    fn begin(&mut self, info: &RunInfo) -> flows::Result<()> {
        check::finite("AdaptiveGuidance::w", self.w)?;
        let threshold = !self.threshold.is_nan();
        check::require(
            threshold,
            "AdaptiveGuidance::threshold",
            self.threshold,
            "a number",
        )?;
        self.on = vec![true; info.rows];
        self.next = self.on.clone();
        self.anchors.clear();
        self.trace.clear();
        Ok(())
    }

    fn guide(&mut self, cx: &StepCx, net: &mut Evaluator) -> flows::Result<Denoised> {
        if self.w == 1.0 {
            return net.conditional();
        }
        let rows: Vec<u32> = (0..self.on.len() as u32)
            .filter(|i| self.on[*i as usize])
            .collect();
        let all = rows.len() == self.on.len();
        let query = Query::main(CondRole::Negative);
        let null = match all {
            true => query,
            false => query.rows(rows.clone()),
        };
        let answers = net.ask(&[Query::main(CondRole::Positive), null])?;
        let wanted = &answers[0];
        let part = match all {
            true => wanted.clone(),
            false => wanted.select(&rows)?,
        };
        let guided = extrapolate(&answers[1].x0, &part.x0, self.w)?;
        let mut x0 = match all {
            true => guided,
            false => replace_rows(&wanted.x0, &rows, &guided)?,
        };
        let off: Vec<u32> = (0..self.on.len() as u32)
            .filter(|i| !self.on[*i as usize])
            .collect();
        if let (Some(order), false) = (self.order(), off.is_empty()) {
            if let Some(delta) = self.extrapolated(&off, cx.step, order)? {
                let plain = select_rows(&wanted.x0, &off)?;
                let moved = (plain + delta.affine(self.w - 1.0, 0.0)?)?;
                x0 = replace_rows(&x0, &off, &moved)?;
            }
        }
        // Steps with several evaluations decide on the first.
        if cx.eval_index == 0 {
            let cosines = self.cosines(&part, &answers[1])?;
            let delta = (&part.x0 - &answers[1].x0)?;
            self.remember(&rows, &delta, &wanted.x0, cx.step)?;
            let mut cosine = vec![None; self.on.len()];
            let active = self.on.clone();
            for (row, value) in rows.iter().zip(cosines) {
                if value.is_nan() {
                    return Err(Error::NonFinite {
                        rule: "adaptive guidance",
                        what: format!("the cosine of sample {row}"),
                        step: cx.step,
                    }
                    .into());
                }
                cosine[*row as usize] = Some(value);
                let ends = value >= self.threshold && cx.step + 1 >= self.min_steps;
                self.next[*row as usize] = !ends;
            }
            self.trace.push(AdaptiveStep {
                cosine,
                active,
                nfe: self.on.len() + rows.len(),
            });
        }
        Ok(wanted.with_x0(x0))
    }

    fn end_step(&mut self, _: &StepCx) -> flows::Result<()> {
        self.on.clone_from(&self.next);
        Ok(())
    }
}

/// The threshold that would have brought recorded runs nearest to `target` evaluations per sample.
/// Record with a threshold above 1, so that every step has its cosine.
///
/// # Errors
/// [`Error::InvalidArgument`] for a trace without steps or with a step that was off, or a target that
/// is not between the number of steps and twice that.
pub fn suggest_threshold(traces: &[&[AdaptiveStep]], target: f64) -> Result<f64> {
    let mut samples: Vec<Vec<f64>> = Vec::new();
    for trace in traces {
        let rows = trace.first().map_or(0, |s| s.cosine.len());
        for row in 0..rows {
            let path: Option<Vec<f64>> = trace.iter().map(|s| s.cosine[row]).collect();
            let expected = "cosines of all steps: record with a threshold above 1";
            samples.push(
                path.ok_or_else(|| Error::argument("trace", "a step that was off", expected))?,
            );
        }
    }
    let steps = samples.first().map_or(0, Vec::len);
    if steps == 0 {
        return Err(Error::argument(
            "traces",
            "no step",
            "at least one recorded run",
        ));
    }
    let n = steps as f64;
    if !(n..=2.0 * n).contains(&target) {
        return Err(Error::argument(
            "target",
            target,
            format!("in [{n}, {}]", 2.0 * n),
        ));
    }
    let cost = |threshold: f64| {
        let one = |path: &Vec<f64>| {
            let guided = path
                .iter()
                .position(|c| *c >= threshold)
                .map_or(path.len(), |i| i + 1);
            (path.len() + guided) as f64
        };
        samples.iter().map(one).sum::<f64>() / samples.len() as f64
    };
    // The cost only changes at recorded cosines, and grows with the threshold.
    let mut candidates: Vec<f64> = samples.iter().flatten().copied().collect();
    candidates.push(2.0);
    candidates.sort_by(f64::total_cmp);
    let place = candidates.partition_point(|c| cost(*c) < target);
    let near = [place.saturating_sub(1), place.min(candidates.len() - 1)].map(|i| candidates[i]);
    let [below, above] = near;
    Ok(
        match (cost(below) - target).abs() <= (cost(above) - target).abs() {
            true => below,
            false => above,
        },
    )
}

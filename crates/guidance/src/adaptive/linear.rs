//! Unconditional predictions as fitted combinations of earlier predictions.

use crate::basic::extrapolate;
use crate::error::{check, Error};
use crate::Result;
use candle_core::{DType, Device, Tensor};
use faer::linalg::solvers::Solve;
use faer::{Mat, Side};
use flows::combine::linear_combination;
use flows::guidance::{CondRole, Query, RunInfo};
use flows::{
    Condition, Denoised, Evaluator, Grid, Guidance, Level, Prediction, RandomStream, Sampler,
    StepCx,
};
use std::collections::HashMap;
use std::path::Path;
use tensor_core::checkpoint::Checkpoint;

/// What a step evaluates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StepKind {
    /// Both predictions: classifier-free guidance.
    Cfg,
    /// The conditional one; the unconditional one is combined from earlier predictions.
    Linear,
    /// The conditional one alone.
    Cond,
    /// The unconditional one alone.
    Uncond,
}

impl StepKind {
    const ALL: [(Self, &'static str); 4] = [
        (Self::Cfg, "cfg"),
        (Self::Linear, "lin"),
        (Self::Cond, "cond"),
        (Self::Uncond, "uncond"),
    ];

    /// `cfg`, `lin`, `cond` or `uncond`.
    pub fn name(self) -> &'static str {
        Self::ALL
            .iter()
            .find(|(kind, _)| *kind == self)
            .map_or("", |(_, name)| name)
    }

    /// The kind of this name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL
            .iter()
            .find(|(_, n)| *n == name)
            .map(|(kind, _)| *kind)
    }

    /// The paper's pattern: guided and combined steps in turn for the first `guided` steps, then
    /// conditional ones.
    pub fn alternating(steps: usize, guided: usize) -> Vec<Self> {
        let one = |i: usize| match i {
            _ if i >= guided => Self::Cond,
            _ if i.is_multiple_of(2) => Self::Cfg,
            _ => Self::Linear,
        };
        (0..steps).map(one).collect()
    }
}

/// The coefficients of one combined step.
#[derive(Debug, Clone, PartialEq)]
pub struct LinCoef {
    /// The first step whose predictions are used.
    pub first: usize,
    /// Of the conditional predictions of the steps `first..=i`, then of the unconditional ones of
    /// `first..i`.
    pub weights: Vec<f64>,
    /// A constant, where one was fitted.
    pub intercept: Option<f64>,
}

/// Which earlier predictions are combined.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FitHistory {
    /// Those of all steps.
    #[default]
    All,
    /// Those of this many steps, the present one included.
    Last(usize),
}

impl FitHistory {
    fn first(self, step: usize) -> usize {
        match self {
            Self::All => 0,
            Self::Last(k) => (step + 1).saturating_sub(k),
        }
    }
}

/// Guidance whose unconditional predictions are partly combined from earlier ones; made by a
/// [`LinearAgFitter`].
///
/// The coefficients belong to one model, one grid, one way to step and one scale; another grid is
/// refused.
#[derive(Debug, Clone)]
pub struct LinearAg {
    w: f64,
    kinds: Vec<StepKind>,
    coef: Vec<Option<LinCoef>>,
    levels: Vec<Level>,
    /// The stepper that the coefficients were fitted with.
    stepper: Option<String>,
    /// Noise predictions of the steps so far: conditional, unconditional.
    history: Vec<(Tensor, Tensor)>,
}

/// The sum `sum_j weight_j prediction_j (+ constant)`.
fn combined(coef: &LinCoef, features: &[&Tensor]) -> Result<Tensor> {
    let terms: Vec<_> = coef
        .weights
        .iter()
        .copied()
        .zip(features.iter().copied())
        .collect();
    let sum = linear_combination(&terms)?;
    match coef.intercept {
        Some(constant) => Ok(sum.affine(1.0, constant)?),
        None => Ok(sum),
    }
}

/// Conditional predictions of `first..=i`, then unconditional ones of `first..i`.
fn features<'t>(history: &'t [(Tensor, Tensor)], now: &'t Tensor, first: usize) -> Vec<&'t Tensor> {
    let past = &history[first.min(history.len())..];
    let wanted = past.iter().map(|(c, _)| c).chain([now]);
    wanted.chain(past.iter().map(|(_, u)| u)).collect()
}

impl LinearAg {
    /// The scale that the coefficients were fitted for.
    pub fn w(&self) -> f64 {
        self.w
    }

    /// What each step evaluates.
    pub fn kinds(&self) -> &[StepKind] {
        &self.kinds
    }

    /// The coefficients of the combined steps.
    pub fn coef(&self) -> &[Option<LinCoef>] {
        &self.coef
    }

    /// The [`name`](flows::Stepper::name) of the stepper that the coefficients were fitted with; runs with
    /// another one are refused.
    pub fn stepper(&self) -> Option<&str> {
        self.stepper.as_deref()
    }

    /// Refuses runs with another stepper than that of this [`name`](flows::Stepper::name).
    #[must_use]
    pub fn for_stepper(self, name: impl Into<String>) -> Self {
        let stepper = Some(name.into());
        Self { stepper, ..self }
    }

    /// Evaluations per sample of a whole run.
    pub fn nfe(&self) -> usize {
        let cost = |kind: &StepKind| if *kind == StepKind::Cfg { 2 } else { 1 };
        self.kinds.iter().map(cost).sum()
    }

    /// Writes coefficients, kinds, scale and grid to a safetensors file.
    ///
    /// # Errors
    /// Those of `tensor_core::checkpoint`.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let mut tensors = HashMap::new();
        let cpu = Device::Cpu;
        for (i, coef) in self.coef.iter().enumerate() {
            if let Some(coef) = coef {
                let weights = Tensor::new(coef.weights.as_slice(), &cpu)?;
                tensors.insert(format!("weights_{i}"), weights);
                let first = Tensor::new(&[coef.first as i64], &cpu)?;
                tensors.insert(format!("first_{i}"), first);
                if let Some(constant) = coef.intercept {
                    tensors.insert(format!("intercept_{i}"), Tensor::new(&[constant], &cpu)?);
                }
            }
        }
        let column = |f: fn(&Level) -> f64| {
            let values: Vec<f64> = self.levels.iter().map(f).collect();
            Tensor::new(values, &cpu)
        };
        tensors.insert("alpha".into(), column(|l| l.alpha)?);
        tensors.insert("sigma".into(), column(|l| l.sigma)?);
        tensors.insert("model_time".into(), column(|l| l.model_time)?);
        let kinds: Vec<&str> = self.kinds.iter().map(|k| k.name()).collect();
        let mut file = Checkpoint::new("linear guidance", tensors.into_iter().collect())
            .with("w", self.w)
            .with("kinds", kinds.join(","));
        if let Some(stepper) = &self.stepper {
            file = file.with("stepper", stepper);
        }
        Ok(file.save(path)?)
    }

    /// Reads what [`save`](Self::save) wrote.
    ///
    /// # Errors
    /// Those of `tensor_core::checkpoint`; [`Error::Mismatch`] for a file of something else.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let file = Checkpoint::load(path, &Device::Cpu)?;
        let bad = |reason: String| Error::Mismatch {
            what: "linear guidance",
            reason,
        };
        let numbers = |name: &str| -> Result<Option<Vec<f64>>> {
            match file.tensors.get(name) {
                Some(tensor) => Ok(Some(tensor.to_dtype(DType::F64)?.to_vec1()?)),
                None => Ok(None),
            }
        };
        let need = |name: &str| numbers(name)?.ok_or_else(|| bad(format!("no `{name}`")));
        let kinds = file
            .text("kinds")?
            .split(',')
            .map(StepKind::parse)
            .collect::<Option<Vec<_>>>();
        let kinds = kinds.ok_or_else(|| bad("unknown kinds of steps".into()))?;
        let (alpha, sigma, time) = (need("alpha")?, need("sigma")?, need("model_time")?);
        let levels = alpha.iter().zip(&sigma).zip(&time);
        let levels = levels.map(|((a, s), t)| Level::new(*a, *s, *t));
        let levels = levels.collect::<flows::Result<Vec<_>>>()?;
        let mut coef = Vec::new();
        for i in 0..kinds.len() {
            coef.push(match numbers(&format!("weights_{i}"))? {
                None => None,
                Some(weights) => Some(LinCoef {
                    first: match need(&format!("first_{i}"))?[..] {
                        [first] => first as usize,
                        _ => return Err(bad(format!("`first_{i}` is not one number"))),
                    },
                    weights,
                    intercept: numbers(&format!("intercept_{i}"))?.and_then(|c| c.first().copied()),
                }),
            });
        }
        let found = Self::new(file.number("w")?, kinds, coef, levels)?;
        Ok(Self {
            stepper: file.text("stepper").ok().map(str::to_string),
            ..found
        })
    }

    /// Coefficients of one's own, for the levels of a grid. Holding the last difference of the two
    /// predictions, say, is `1, -1` for the conditional ones of this step and the last and `1` for the
    /// last unconditional one.
    ///
    /// # Errors
    /// [`Error::Mismatch`] when there are not as many steps as levels ask for, or a combined step has
    /// no coefficients, another one has some, or their number is wrong.
    pub fn new(
        w: f64,
        kinds: Vec<StepKind>,
        coef: Vec<Option<LinCoef>>,
        levels: Vec<Level>,
    ) -> Result<Self> {
        let bad = |reason: String| Error::Mismatch {
            what: "linear guidance",
            reason,
        };
        if levels.len() != kinds.len() + 1 || coef.len() != kinds.len() {
            return Err(bad(format!(
                "{} steps, {} coefficients and {} levels",
                kinds.len(),
                coef.len(),
                levels.len()
            )));
        }
        for (i, (kind, coef)) in kinds.iter().zip(&coef).enumerate() {
            if coef.as_ref().is_some_and(|c| c.first > i) {
                return Err(bad(format!("the first step of step {i}'s coefficients")));
            }
            let wanted = coef.as_ref().map(|c| 2 * (i - c.first) + 1);
            let found = coef.as_ref().map(|c| c.weights.len());
            if coef.is_some() != (*kind == StepKind::Linear) || wanted != found {
                return Err(bad(format!("the coefficients of step {i}")));
            }
        }
        Ok(Self {
            w,
            kinds,
            coef,
            levels,
            stepper: None,
            history: Vec::new(),
        })
    }
}

/// Refuses evaluations that are not the first of the step after the last one that was seen.
fn in_order(cx: &StepCx, seen: usize) -> Result<()> {
    if cx.eval_index > 0 {
        return Err(Error::unsupported(
            "linear guidance in steps with several evaluations",
            "take a multistep solver",
        ));
    }
    if cx.step != seen {
        return Err(Error::unsupported(
            "linear guidance in a part of a run",
            "it combines the predictions of all steps: take it out of Interval and Then, and choose by StepKind",
        ));
    }
    Ok(())
}

/// Levels that are the same but for rounding.
fn same_grid(grid: &Grid, levels: &[Level]) -> bool {
    let near = |a: f64, b: f64| (a - b).abs() <= 1e-6 * b.abs().max(1e-6);
    let same = |(a, b): (&Level, &Level)| near(a.alpha, b.alpha) && near(a.sigma, b.sigma);
    grid.levels().len() == levels.len() && grid.levels().iter().zip(levels).all(same)
}

/// A clean sample from a noise prediction.
fn from_eps(eps: &Tensor, like: &Denoised) -> Result<Denoised> {
    Ok(Denoised::from_raw(
        eps,
        Prediction::Eps,
        &like.x,
        &like.levels,
    )?)
}

impl Guidance for LinearAg {
    fn begin(&mut self, info: &RunInfo) -> flows::Result<()> {
        self.history.clear();
        let reason = match &self.stepper {
            _ if !same_grid(info.grid, &self.levels) => "it was fitted on another grid".into(),
            Some(own) if own != info.stepper => {
                format!("it was fitted with {own}, this run has {}", info.stepper)
            }
            _ => return Ok(()),
        };
        Err(Error::Mismatch {
            what: "linear guidance",
            reason,
        }
        .into())
    }

    fn guide(&mut self, cx: &StepCx, net: &mut Evaluator) -> flows::Result<Denoised> {
        in_order(cx, self.history.len())?;
        let kind = self.kinds[cx.step];
        if kind == StepKind::Uncond {
            let d = net.one(Query::main(CondRole::Negative))?;
            let eps = d.eps()?;
            self.history.push((eps.clone(), eps));
            return Ok(d);
        }
        let mut queries = vec![Query::main(CondRole::Positive)];
        if kind == StepKind::Cfg {
            queries.push(Query::main(CondRole::Negative));
        }
        let answers = net.ask(&queries)?;
        let wanted = answers[0].eps()?;
        let null = match (kind, &self.coef[cx.step]) {
            (StepKind::Cfg, _) => answers[1].eps()?,
            (StepKind::Linear, Some(coef)) => {
                combined(coef, &features(&self.history, &wanted, coef.first))?
            }
            _ => wanted.clone(),
        };
        let guided = match kind {
            StepKind::Cond => answers[0].clone(),
            _ => from_eps(&extrapolate(&null, &wanted, self.w)?, &answers[0])?,
        };
        self.history.push((wanted, null));
        Ok(guided)
    }
}

/// How the coefficients are fitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FitMode {
    /// On the trajectories of the policy that is being fitted: a combined step goes on with its
    /// estimate.
    #[default]
    OnPolicy,
    /// On guided trajectories with the true predictions. Run on their own estimates these coefficients
    /// add error to error; for comparison.
    TeacherForced,
}

/// Fits a [`LinearAg`] by least squares, one problem per combined step, over all numbers of all
/// training trajectories; about 200 of them are enough.
#[derive(Debug, Clone, PartialEq)]
pub struct LinearAgFitter {
    /// The scale.
    pub w: f64,
    /// What each step evaluates.
    pub kinds: Vec<StepKind>,
    /// Regularization relative to the mean square of the features; these are nearly collinear, so
    /// it must not be 0.
    pub ridge: f64,
    /// Which predictions are combined.
    pub history: FitHistory,
    /// Whether a constant is fitted too.
    pub intercept: bool,
    /// On which trajectories.
    pub mode: FitMode,
}

/// Numbers of each prediction that a fit looks at together.
const CHUNK: usize = 1 << 16;

impl LinearAgFitter {
    /// The defaults for a pattern of steps.
    pub fn new(w: f64, kinds: Vec<StepKind>) -> Self {
        Self {
            w,
            kinds,
            ridge: 1e-10,
            history: FitHistory::All,
            intercept: false,
            mode: FitMode::OnPolicy,
        }
    }

    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`].
    pub fn validate(&self) -> Result<()> {
        check::finite("LinearAgFitter::w", self.w)?;
        check::positive("LinearAgFitter::ridge", self.ridge)?;
        let history = self.history != FitHistory::Last(0);
        check::require(
            history,
            "LinearAgFitter::history",
            self.history,
            "at least one step",
        )?;
        let start = self.kinds.first() != Some(&StepKind::Linear) && !self.kinds.is_empty();
        let expected = "at least one step, the first of them not combined";
        check::require(start, "LinearAgFitter::kinds", &self.kinds, expected)
    }

    /// Fits on trajectories from `noise` `[n, ...]`. `configure` adds the stepper (and whatever else
    /// the later runs have) to the sampler.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`]; those of the run; a singular problem.
    pub fn fit<'a>(
        &self,
        sampler: Sampler<'a>,
        noise: &Tensor,
        condition: &Condition,
        negative: Option<&Condition>,
        rng: &RandomStream,
    ) -> Result<LinearAg> {
        self.validate()?;
        let levels = sampler.grid().levels().to_vec();
        if levels.len() != self.kinds.len() + 1 {
            let expected = format!("{} steps, as many as the grid", levels.len() - 1);
            return Err(Error::argument("kinds", self.kinds.len(), expected));
        }
        let fitting = std::cell::RefCell::new(Fitting {
            fitter: self,
            stepper: String::new(),
            history: Vec::new(),
            coef: Vec::new(),
        });
        sampler
            .guidance(&mut *fitting.borrow_mut())
            .sample(noise, condition, negative, rng)?;
        let Fitting { coef, stepper, .. } = fitting.into_inner();
        Ok(LinearAg::new(self.w, self.kinds.clone(), coef, levels)?.for_stepper(stepper))
    }

    /// `(G + ridge tr(G) / m I) b = F^T y` over all numbers of the predictions.
    fn solve(&self, features: &[&Tensor], target: &Tensor) -> Result<(Vec<f64>, Option<f64>)> {
        let m = features.len() + usize::from(self.intercept);
        let (mut gram, mut moments) = (vec![vec![0.0; m]; m], vec![0.0; m]);
        let flat = |x: &Tensor| x.flatten_all();
        let features = features.iter().map(|f| flat(f));
        let features = features.collect::<candle_core::Result<Vec<_>>>()?;
        let target = flat(target)?;
        let count = target.elem_count();
        // By chunks: the features of all steps are never side by side.
        for start in (0..count).step_by(CHUNK) {
            let part = |x: &Tensor| {
                x.narrow(0, start, CHUNK.min(count - start))?
                    .to_dtype(DType::F64)
            };
            let y = part(&target)?;
            let mut rows = features
                .iter()
                .map(part)
                .collect::<candle_core::Result<Vec<_>>>()?;
            if self.intercept {
                rows.push(y.ones_like()?);
            }
            let f = Tensor::stack(&rows, 0)?;
            let products = f.matmul(&f.t()?)?.to_vec2::<f64>()?;
            let with_y = f
                .matmul(&y.unsqueeze(1)?)?
                .flatten_all()?
                .to_vec1::<f64>()?;
            for (i, (products, with_y)) in products.iter().zip(with_y).enumerate() {
                moments[i] += with_y;
                for (sum, product) in gram[i].iter_mut().zip(products) {
                    *sum += product;
                }
            }
        }
        let trace: f64 = (0..m).map(|i| gram[i][i]).sum();
        let ridge = self.ridge * trace / m as f64;
        let system = Mat::from_fn(m, m, |i, j| gram[i][j] + if i == j { ridge } else { 0.0 });
        let right = Mat::from_fn(m, 1, |i, _| moments[i]);
        let factors = system.llt(Side::Lower).map_err(|_| {
            Error::argument("ridge", self.ridge, "enough to make the problem regular")
        })?;
        let solution = factors.solve(&right);
        let mut weights: Vec<f64> = (0..m).map(|i| solution[(i, 0)]).collect();
        let intercept = if self.intercept { weights.pop() } else { None };
        Ok((weights, intercept))
    }
}

/// The rule that fits while it samples.
struct Fitting<'f> {
    fitter: &'f LinearAgFitter,
    stepper: String,
    history: Vec<(Tensor, Tensor)>,
    coef: Vec<Option<LinCoef>>,
}

impl Guidance for Fitting<'_> {
    fn begin(&mut self, info: &RunInfo) -> flows::Result<()> {
        self.stepper = info.stepper.to_string();
        self.history.clear();
        self.coef.clear();
        Ok(())
    }

    fn guide(&mut self, cx: &StepCx, net: &mut Evaluator) -> flows::Result<Denoised> {
        in_order(cx, self.history.len())?;
        let kind = self.fitter.kinds[cx.step];
        let answers = net.ask(&[
            Query::main(CondRole::Positive),
            Query::main(CondRole::Negative),
        ])?;
        let (wanted, truth) = (answers[0].eps()?, answers[1].eps()?);
        let w = self.fitter.w;
        let (mut pair, mut coef) = ((wanted.clone(), truth.clone()), None);
        match kind {
            StepKind::Cfg => {}
            StepKind::Cond => pair.1 = wanted.clone(),
            StepKind::Uncond => pair.0 = truth.clone(),
            StepKind::Linear => {
                let first = self.fitter.history.first(cx.step);
                let used = features(&self.history, &wanted, first);
                let (weights, intercept) = self.fitter.solve(&used, &truth)?;
                let fitted = LinCoef {
                    first,
                    weights,
                    intercept,
                };
                if self.fitter.mode == FitMode::OnPolicy {
                    pair.1 = combined(&fitted, &used)?;
                }
                coef = Some(fitted);
            }
        }
        self.coef.push(coef);
        let guided = match (kind, self.fitter.mode) {
            (StepKind::Cond, _) => answers[0].clone(),
            (StepKind::Uncond, _) => answers[1].clone(),
            _ => from_eps(&extrapolate(&pair.1, &pair.0, w)?, &answers[0])?,
        };
        self.history.push(pair);
        Ok(guided)
    }
}

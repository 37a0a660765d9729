//! GFCG, gradient-free classifier guidance: class-accurate samples with any classifier that can
//! only be asked.
//!
//! For anyone with a class-conditional (or prompt-conditional) model and a classifier: what
//! classifier guidance does, without a backward pass through anything, at the evaluations of
//! classifier-free guidance and one forward pass of the classifier. *Gradient-Free Classifier
//! Guidance for Diffusion Model Sampling*, arXiv 2411.15393.
//!
//! At every step, for a row with the wanted class `c` and the clean sample `D_c` under it:
//!
//! ```text
//! p = classifier(D_c)           r = argmax over k != c of p_k       omega = (w - 1) (1 - p_c)
//! D = D_c + omega (D_c - D_r)
//! ```
//!
//! so that a sample is led away from the one class that it drifts to, and only while it drifts: its
//! density is `p(x | c)^(1 + omega) / p(x | r)^omega`. Classifier-free guidance is the same with the
//! mixture of all classes for `r` and a constant `omega`.
//!
//! | symbol | here |
//! | --- | --- |
//! | `w` | [`Gfcg::scale`], 1 is no guidance |
//! | `omega` | [`ScaleRule`] |
//! | `r` | [`RefRule`] |
//! | the classifier | [`OnDenoised`], [`OnNoisy`], [`ZeroShot`], or your own [`StepClassifier`] |
//!
//! The paper's abstract fixes what the rules must do, not their formulas: `1 - p_c` and the exchange
//! of the weak model's class ([`SwapMode::WhenUnsure`]) are reconstructions that satisfy it. Both are
//! choices of an enum, so that others can be tried.
//!
//! A classifier that is too sure of itself makes `omega` vanish: raise its temperature rather than
//! `w`. At very high noise its opinion is arbitrary; an [`Interval`](crate::Interval) starts later.
//! Judge samples by another classifier than the one that guides.
//!
//! ```
//! # extern crate flows as thalweg_flows;
//! use candle_core::{DType, Device, Tensor};
//! use thalweg_flows::schedule::VpSde;
//! use thalweg_flows::{AnalyticMixture, Condition, Grid, RandomStream, Sampler};
//! use thalweg_guidance::gfcg::{Gfcg, OnDenoised};
//!
//! let means = Tensor::new(&[[1.0_f64, 0.0], [-1.0, 0.0], [0.0, 1.0]], &Device::Cpu)?;
//! let model = AnalyticMixture::new(&means, &[0.1; 3], &[1.0; 3])?.with_classes(&[0, 1, 2])?.with_leak(0.3)?;
//! // Logits of a clean sample: a network in practice.
//! let classifier = OnDenoised::new(|x: &Tensor| Ok((x.matmul(&means.t()?)? * 4.0)?));
//! let mut rule = Gfcg::new(classifier).scale(5.0).skip_below(0.1);
//!
//! let rng = RandomStream::new(1);
//! let noise = rng.split("start").normal(0.0, 1.0, (64, 2), DType::F64, &Device::Cpu)?;
//! let class = Condition::classes(&[1], &Device::Cpu)?;
//! let grid = Grid::uniform_lambda(&VpSde::default(), 20)?;
//! let out = Sampler::new(&model, grid).guidance(&mut rule).sample(&noise, &class, None, &rng)?;
//! let right = out.x.narrow(1, 0, 1)?.lt(-0.5)?.to_dtype(DType::F64)?.mean_all()?.to_scalar::<f64>()?;
//! assert!(right > 0.9);
//! // Rows whose guidance would be weaker than 0.1 cost one evaluation.
//! assert!(out.nfe.main < 2 * 64 * 20);
//! assert_eq!(rule.trace().len(), 20);
//! # Ok::<(), thalweg_flows::Error>(())
//! ```

mod classifier;

pub use classifier::{OnDenoised, OnNoisy, StepClassifier, ZeroShot};

use crate::error::{check, Error};
use crate::Result;
use candle_core::{DType, Tensor};
use flows::guidance::{CondRole, Query, Role, Rows, RunInfo};
use flows::prediction::{replace_rows, select_rows};
use flows::{Condition, Denoised, Evaluator, Guidance, Level, StepCx};

/// How strongly a row is led away from its reference class.
#[derive(Debug, Clone, Copy, Default)]
pub enum ScaleRule {
    /// `(w - 1) (1 - p_c)`.
    #[default]
    OneMinusP,
    /// `w - 1`, whatever the classifier says.
    Constant,
    /// `(w - 1) p_r / (p_c + p_r)`.
    Ratio,
    /// A function of `p_c`, `p_r` and the level.
    Custom(fn(f64, f64, &Level) -> f64),
}

/// What a row is led away from.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum RefRule {
    /// The likeliest class but the wanted one; the lowest index on ties.
    #[default]
    MostConfusing,
    /// The likeliest class; no guidance where that is the wanted one.
    Argmax,
    /// The likeliest of these, without the wanted one: a pool of negative prompts.
    Restricted(Vec<u32>),
}

/// What the weak model of autoguidance is asked.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum SwapMode {
    /// The reference class where `p_c` is below the threshold, the wanted class elsewhere, with the
    /// constant weight `w - 1`.
    WhenUnsure {
        /// The threshold; 0.5 is usual.
        p: f64,
    },
    /// Always the reference class, with the constant weight `w - 1`.
    Always,
    /// The reference class with the weight of the rule. Where the classifier is sure, nothing is left
    /// of autoguidance.
    Adaptive,
}

impl Default for SwapMode {
    fn default() -> Self {
        Self::WhenUnsure { p: 0.5 }
    }
}

/// What the rule decided at an evaluation.
#[derive(Debug, Clone, PartialEq)]
pub struct Decision {
    /// The step, from 0.
    pub step: usize,
    /// Probabilities of the wanted classes.
    pub p_wanted: Vec<f64>,
    /// The class that each row was led away from (for autoguidance: that the weak model was asked
    /// for); `None` where there is none.
    pub reference: Vec<Option<u32>>,
    /// The weights, 0 where there is no reference.
    pub weight: Vec<f64>,
}

/// The names of classes for models that are not conditioned on a class index.
#[derive(Debug, Clone)]
struct Prompts {
    wanted: Vec<u32>,
    conditions: Vec<Condition>,
}

/// Gradient-free classifier guidance; see the [module](self) page.
pub struct Gfcg<C> {
    classifier: C,
    w: f64,
    rule: ScaleRule,
    reference: RefRule,
    floor: f64,
    w_cfg: f64,
    weak: Option<SwapMode>,
    skip_below: f64,
    every: usize,
    lagged: bool,
    prompts: Option<Prompts>,
    /// What was decided at the evaluation before, skipped rows included.
    last: Option<Decision>,
    trace: Vec<Decision>,
}

impl<C: StepClassifier> Gfcg<C> {
    /// Guidance with the scale 1, which is none: set it with [`scale`](Self::scale).
    pub fn new(classifier: C) -> Self {
        Self {
            classifier,
            w: 1.0,
            rule: ScaleRule::OneMinusP,
            reference: RefRule::MostConfusing,
            floor: 0.0,
            w_cfg: 1.0,
            weak: None,
            skip_below: 1e-3,
            every: 1,
            lagged: false,
            prompts: None,
            last: None,
            trace: Vec::new(),
        }
    }

    /// The scale `w`.
    #[must_use]
    pub fn scale(self, w: f64) -> Self {
        Self { w, ..self }
    }

    /// How strongly.
    #[must_use]
    pub fn rule(self, rule: ScaleRule) -> Self {
        Self { rule, ..self }
    }

    /// Away from what.
    #[must_use]
    pub fn reference(self, reference: RefRule) -> Self {
        Self { reference, ..self }
    }

    /// The least weight of a row that has a reference; 0 by default.
    #[must_use]
    pub fn floor(self, floor: f64) -> Self {
        Self { floor, ..self }
    }

    /// Adds classifier-free guidance, `(w_cfg - 1) (D_c - D_null)`; its evaluation shares a call with
    /// the reference's.
    #[must_use]
    pub fn with_cfg(self, w_cfg: f64) -> Self {
        Self { w_cfg, ..self }
    }

    /// Leads away from the sampler's weak model, which is asked as the mode says, instead of from the
    /// main model under the reference class.
    #[must_use]
    pub fn with_weak(self, mode: SwapMode) -> Self {
        Self {
            weak: Some(mode),
            ..self
        }
    }

    /// Rows with a weight below cost no second evaluation and are not guided.
    #[must_use]
    pub fn skip_below(self, skip_below: f64) -> Self {
        Self { skip_below, ..self }
    }

    /// Classifies at every `n`-th step only, and keeps references and weights in between.
    #[must_use]
    pub fn every(self, n: usize) -> Self {
        Self { every: n, ..self }
    }

    /// Takes the reference of the evaluation before, so that both predictions come from one call.
    /// The weight is still that of now. Worth it where launches cost more than rows.
    #[must_use]
    pub fn lagged(self) -> Self {
        Self {
            lagged: true,
            ..self
        }
    }

    /// For models that are conditioned on prompts: the condition (of one row) that stands for each
    /// class of the classifier, and the wanted class of every row of the run (or one for all).
    #[must_use]
    pub fn prompts(self, wanted: &[u32], conditions: Vec<Condition>) -> Self {
        Self {
            prompts: Some(Prompts {
                wanted: wanted.to_vec(),
                conditions,
            }),
            ..self
        }
    }

    /// What was decided at every evaluation of the last run.
    pub fn trace(&self) -> &[Decision] {
        &self.trace
    }

    /// Checks every setting.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`]; [`Error::Unsupported`] for lagged references that are also kept for
    /// several steps.
    pub fn validate(&self) -> Result<()> {
        check::finite("Gfcg::scale", self.w)?;
        check::finite("Gfcg::with_cfg", self.w_cfg)?;
        let floor = self.floor.is_finite() && self.floor >= 0.0;
        check::require(floor, "Gfcg::floor", self.floor, "a finite number >= 0")?;
        let skip = self.skip_below.is_finite() && self.skip_below >= 0.0;
        let words = "a finite number >= 0";
        check::require(skip, "Gfcg::skip_below", self.skip_below, words)?;
        check::require(self.every > 0, "Gfcg::every", self.every, "at least 1")?;
        if let Some(SwapMode::WhenUnsure { p }) = self.weak {
            let holds = (0.0..=1.0).contains(&p);
            check::require(holds, "SwapMode::WhenUnsure::p", p, "a number in [0, 1]")?;
        }
        if self.lagged && self.every > 1 {
            return Err(Error::unsupported(
                "Gfcg::lagged with Gfcg::every",
                "references that are kept are known before the step anyway",
            ));
        }
        Ok(())
    }

    /// The wanted class of every row.
    fn wanted(&self, net: &Evaluator) -> Result<Vec<u32>> {
        let rows = net.rows();
        if let Some(prompts) = &self.prompts {
            return match prompts.wanted.len() {
                1 => Ok(vec![prompts.wanted[0]; rows]),
                n if n == rows => Ok(prompts.wanted.clone()),
                n => Err(Error::argument("number of wanted classes", n, rows)),
            };
        }
        match net.positive() {
            Condition::Class(classes) => Ok(classes.to_dtype(DType::U32)?.to_vec1()?),
            _ => Err(Error::unsupported(
                "guidance by classes of a model without class indices",
                "say what condition stands for each class: Gfcg::prompts",
            )),
        }
    }

    /// The condition of these classes, one row each.
    fn condition(&self, classes: &[u32], like: &Tensor) -> Result<Condition> {
        let Some(prompts) = &self.prompts else {
            return Ok(Condition::classes(classes, like.device())?);
        };
        let one = |k: &u32| {
            let found = prompts.conditions.get(*k as usize);
            let expected = format!("below {}, the number of prompts", prompts.conditions.len());
            found.ok_or_else(|| Error::argument("class", k, expected))
        };
        let parts = classes.iter().map(one).collect::<Result<Vec<_>>>()?;
        let joined = Condition::concat(&parts)?;
        joined.ok_or_else(|| Error::unsupported("prompts of different kinds", "take one kind"))
    }

    /// Probabilities, references and weights for an unguided prediction.
    fn decide(&self, cx: &StepCx, d: &Denoised, wanted: &[u32]) -> Result<Decision> {
        let probs = self.classifier.probs(d)?;
        let rows = wanted.len();
        let classes = match probs.dims() {
            [n, k] if *n == rows && *k > 0 => *k,
            other => {
                let expected = format!("[{rows}, classes]");
                return Err(Error::shape(
                    "the classifier's probabilities",
                    other,
                    expected,
                ));
            }
        };
        let probs = probs.to_dtype(DType::F64)?.to_vec2::<f64>()?;
        if probs.iter().flatten().any(|p| !p.is_finite()) {
            return Err(Error::NonFinite {
                rule: "GFCG",
                what: "a probability of the classifier".into(),
                step: cx.step,
            });
        }
        if let Some(c) = wanted.iter().find(|c| **c as usize >= classes) {
            let expected = format!("below {classes}, the classifier's number of classes");
            return Err(Error::argument("wanted class", c, expected));
        }
        if let RefRule::Restricted(pool) = &self.reference {
            if let Some(k) = pool.iter().find(|k| **k as usize >= classes) {
                let expected = format!("below {classes}, the classifier's number of classes");
                return Err(Error::argument("class of RefRule::Restricted", k, expected));
            }
        }
        let reference: Vec<Option<u32>> = probs
            .iter()
            .zip(wanted)
            .map(|(p, c)| refer(&self.reference, p, *c))
            .collect();
        let p_wanted: Vec<f64> = probs
            .iter()
            .zip(wanted)
            .map(|(p, c)| p[*c as usize])
            .collect();
        let weight: Vec<f64> = (0..rows)
            .map(|i| match reference[i] {
                Some(r) => self.weight(p_wanted[i], probs[i][r as usize], &cx.level),
                None => 0.0,
            })
            .collect();
        if let Some(row) = weight.iter().position(|w| !w.is_finite()) {
            return Err(Error::NonFinite {
                rule: "GFCG",
                what: format!("the weight of row {row}"),
                step: cx.step,
            });
        }
        Ok(Decision {
            step: cx.step,
            p_wanted,
            reference,
            weight,
        })
    }

    fn weight(&self, wanted: f64, other: f64, level: &Level) -> f64 {
        let omega = match self.rule {
            ScaleRule::OneMinusP => (self.w - 1.0) * (1.0 - wanted),
            ScaleRule::Constant => self.w - 1.0,
            ScaleRule::Ratio if other == 0.0 => 0.0,
            ScaleRule::Ratio => (self.w - 1.0) * other / (wanted + other),
            ScaleRule::Custom(f) => f(wanted, other, level),
        };
        // Not `max`, which would make a number of no number.
        if omega < self.floor {
            self.floor
        } else {
            omega
        }
    }

    /// What autoguidance makes of a decision: the class that the weak model is asked for.
    fn swapped(&self, mode: SwapMode, mut decision: Decision, wanted: &[u32]) -> Decision {
        let constant = self.w - 1.0;
        for (i, c) in wanted.iter().enumerate() {
            let unsure = match mode {
                SwapMode::WhenUnsure { p } => decision.p_wanted[i] < p,
                SwapMode::Always => true,
                SwapMode::Adaptive => continue,
            };
            if !unsure || decision.reference[i].is_none() {
                decision.reference[i] = Some(*c);
            }
            decision.weight[i] = constant;
        }
        decision
    }

    /// What the model is to be asked after a decision.
    fn question(&self, decision: &Decision, like: &Tensor) -> Result<Question> {
        let guided = |(i, r): (usize, &Option<u32>)| {
            let weight = decision.weight[i];
            let counts = weight != 0.0 && weight.abs() >= self.skip_below;
            r.filter(|_| counts).map(|class| (i as u32, class))
        };
        let pairs = decision.reference.iter().enumerate().filter_map(guided);
        let (rows, classes): (Vec<u32>, Vec<u32>) = pairs.unzip();
        let role = match self.weak {
            Some(_) => Role::Weak,
            None => Role::Main,
        };
        let query = match rows.is_empty() {
            true => None,
            false => Some(Query {
                role,
                cond: CondRole::Given(self.condition(&classes, like)?),
                rows: match rows.len() == decision.weight.len() {
                    true => Rows::All,
                    false => Rows::Subset(rows.clone()),
                },
            }),
        };
        Ok(Question {
            rows,
            classes,
            query,
        })
    }

    /// Classifies unless an earlier answer is to be kept.
    fn judge(
        &self,
        cx: &StepCx,
        d: &Denoised,
        wanted: &[u32],
        net: &mut Evaluator,
    ) -> Result<Decision> {
        let kept = self.last.as_ref();
        if let Some(kept) = kept.filter(|_| !cx.step.is_multiple_of(self.every)) {
            return Ok(Decision {
                step: cx.step,
                ..kept.clone()
            });
        }
        let decision = self.decide(cx, d, wanted)?;
        net.nfe().classifier_forward += wanted.len();
        Ok(match self.weak {
            Some(mode) => self.swapped(mode, decision, wanted),
            None => decision,
        })
    }

    fn guided(&mut self, cx: &StepCx, net: &mut Evaluator) -> Result<Denoised> {
        let wanted = self.wanted(net)?;
        let cfg = (self.w_cfg != 1.0).then(|| Query::main(CondRole::Negative));
        let ahead = match self.last.as_ref().filter(|_| self.lagged) {
            Some(before) => Some(self.question(before, net.x())?),
            None => None,
        };
        let mut queries = vec![Query::main(CondRole::Positive)];
        if let Some(question) = &ahead {
            queries.extend(question.query.iter().cloned().chain(cfg.clone()));
        }
        let answers = net.ask(&queries)?;
        let d = answers[0].clone();
        let decision = self.judge(cx, &d, &wanted, net)?;
        let (question, other) = match ahead {
            Some(question) => {
                let other = question.query.as_ref().and(answers.get(1).cloned());
                (question, other)
            }
            None => {
                let question = self.question(&decision, &d.x0)?;
                let queries = question.query.iter().cloned().chain(cfg.clone());
                let answers = net.ask(&queries.collect::<Vec<_>>())?;
                let other = question.query.as_ref().and(answers.into_iter().next());
                (question, other)
            }
        };
        let applied = question.applied(&decision);
        let mut x0 = match other {
            Some(other) => away(&d.x0, &question.rows, &applied.weight, &other.x0)?,
            None => d.x0.clone(),
        };
        if let Some(query) = cfg {
            // Answered above: asking again costs nothing.
            let null = net.one(query)?;
            x0 = (x0 + (&d.x0 - null.x0)?.affine(self.w_cfg - 1.0, 0.0)?)?;
        }
        self.trace.push(applied);
        self.last = Some(decision);
        Ok(d.with_x0(x0))
    }
}

/// The rows that are guided, away from which classes, and what is to be asked for that.
struct Question {
    rows: Vec<u32>,
    classes: Vec<u32>,
    query: Option<Query>,
}

impl Question {
    /// A decision as it was carried out: rows without an answer were not guided.
    fn applied(&self, decision: &Decision) -> Decision {
        let mut applied = Decision {
            weight: vec![0.0; decision.weight.len()],
            ..decision.clone()
        };
        for (row, class) in self.rows.iter().zip(&self.classes) {
            let i = *row as usize;
            applied.weight[i] = decision.weight[i];
            applied.reference[i] = Some(*class);
        }
        applied
    }
}

/// The reference class of a row with these probabilities.
fn refer(rule: &RefRule, p: &[f64], wanted: u32) -> Option<u32> {
    let best = |classes: &mut dyn Iterator<Item = u32>| {
        let mut found: Option<u32> = None;
        for k in classes {
            if found.is_none_or(|f| p[k as usize] > p[f as usize]) {
                found = Some(k);
            }
        }
        found
    };
    let all = 0..p.len() as u32;
    match rule {
        RefRule::MostConfusing => best(&mut all.filter(|k| *k != wanted)),
        RefRule::Argmax => best(&mut { all }).filter(|k| *k != wanted),
        RefRule::Restricted(pool) => {
            let mut pool: Vec<u32> = pool.clone();
            pool.sort_unstable();
            best(&mut pool.into_iter().filter(|k| *k != wanted))
        }
    }
}

/// `x + weight (x - other)` in these rows.
fn away(x: &Tensor, rows: &[u32], weights: &[f64], other: &Tensor) -> Result<Tensor> {
    let whole = rows.len() == weights.len();
    let part = if whole {
        x.clone()
    } else {
        select_rows(x, rows)?
    };
    let weights: Vec<f64> = rows.iter().map(|i| weights[*i as usize]).collect();
    let mut shape = vec![1; x.rank()];
    shape[0] = rows.len();
    let weights = Tensor::from_vec(weights, shape, x.device())?.to_dtype(x.dtype())?;
    let moved = (&part + (&part - other)?.broadcast_mul(&weights)?)?;
    match whole {
        true => Ok(moved),
        false => Ok(replace_rows(x, rows, &moved)?),
    }
}

impl<C: StepClassifier> Guidance for Gfcg<C> {
    fn begin(&mut self, _: &RunInfo) -> flows::Result<()> {
        self.trace.clear();
        self.last = None;
        Ok(self.validate()?)
    }

    fn guide(&mut self, cx: &StepCx, net: &mut Evaluator) -> flows::Result<Denoised> {
        let custom = matches!(self.rule, ScaleRule::Custom(_));
        let nothing = self.w == 1.0 && self.floor == 0.0 && self.w_cfg == 1.0 && !custom;
        if nothing || net.rows() == 0 {
            return net.conditional();
        }
        Ok(self.guided(cx, net)?)
    }
}

//! What to evaluate at a step and how to combine it: the interface between the sampling loop and the
//! guidance rules (which are in `thalweg-guidance`).
//!
//! A rule asks an [`Evaluator`] for predictions and returns the clean sample that the step works
//! with. Questions that are asked together share one network call where their conditions are of one
//! kind; a question that was answered before at the same sample is not asked again, so rules compose
//! without paying twice. Every row that a network sees is counted in [`Nfe`].

use crate::condition::Condition;
use crate::denoiser::Denoiser;
use crate::error::{check, Error, Result};
use crate::grid::Grid;
use crate::level::{Level, Levels};
use crate::prediction::{select_rows, Denoised, Prediction};
use crate::watch::type_name;
use candle_core::Tensor;

/// Which model is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The model that is sampled.
    Main,
    /// A worse version of it, for autoguidance.
    Weak,
    /// Any other model, by the number it was given to the sampler with.
    Named(u8),
}

/// Under which condition.
#[derive(Debug, Clone)]
pub enum CondRole {
    /// The wanted one.
    Positive,
    /// The unwanted one: the negative condition of the run, or null where there is none.
    Negative,
    /// The sampler's null condition.
    Null,
    /// This one, for the rows of the query.
    Given(Condition),
}

impl CondRole {
    fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Given(a), Self::Given(b)) => a.is_same(b),
            (a, b) => std::mem::discriminant(a) == std::mem::discriminant(b),
        }
    }
}

/// Of which rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rows {
    /// All.
    All,
    /// These, in this order; none is allowed and costs nothing.
    Subset(Vec<u32>),
}

/// One question to a model.
#[derive(Debug, Clone)]
pub struct Query {
    /// The model.
    pub role: Role,
    /// The condition.
    pub cond: CondRole,
    /// The rows.
    pub rows: Rows,
}

impl Query {
    /// All rows of the main model under a condition.
    pub fn main(cond: CondRole) -> Self {
        Self {
            role: Role::Main,
            cond,
            rows: Rows::All,
        }
    }

    /// The same question to another model.
    #[must_use]
    pub fn of(self, role: Role) -> Self {
        Self { role, ..self }
    }

    /// The same question about some rows.
    #[must_use]
    pub fn rows(self, rows: Vec<u32>) -> Self {
        Self {
            rows: Rows::Subset(rows),
            ..self
        }
    }
}

/// What a run cost, in rows (samples) that models saw.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Nfe {
    /// Rows through the main model.
    pub main: usize,
    /// Rows through the weak model.
    pub weak: usize,
    /// Rows through all other models.
    pub named: usize,
    /// Rows that were differentiated through a denoiser.
    pub denoiser_backward: usize,
    /// Rows through a classifier.
    pub classifier_forward: usize,
    /// Rows that were differentiated through a classifier.
    pub classifier_backward: usize,
    /// Rows that a reward judged.
    pub reward_calls: usize,
    /// Launches of a denoiser, one after the other.
    pub sequential_calls: usize,
}

impl Nfe {
    /// Rows through any denoiser.
    pub fn denoiser(&self) -> usize {
        self.main + self.weak + self.named
    }

    /// Denoiser evaluations of one sample in a batch of `rows`.
    pub fn per_sample(&self, rows: usize) -> f64 {
        self.denoiser() as f64 / rows as f64
    }
}

/// What a rule knows before the first step.
#[derive(Debug, Clone, Copy)]
pub struct RunInfo<'a> {
    /// The levels that will be visited.
    pub grid: &'a Grid,
    /// Samples in the batch.
    pub rows: usize,
    /// Whether the run has a negative condition.
    pub has_negative: bool,
    /// The stepper's [`name`](crate::Stepper::name); empty in a [`Guided`] model, which makes no steps.
    pub stepper: &'a str,
}

/// Where in a run a rule is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepCx {
    /// The step, from 0.
    pub step: usize,
    /// How many steps there are.
    pub steps: usize,
    /// The level of the sample that is evaluated now.
    pub level: Level,
    /// The level at which the step ends.
    pub next: Level,
    /// 0 for the first evaluation of a step, more for further ones (Heun, two-stage solvers).
    pub eval_index: usize,
}

/// A rule that makes the clean sample of a step from the predictions of models.
pub trait Guidance {
    /// Clears all state; called once before the first step.
    ///
    /// # Errors
    /// When the rule cannot guide such a run.
    fn begin(&mut self, _info: &RunInfo) -> Result<()> {
        Ok(())
    }

    /// The clean sample to go on with. It must be at the evaluator's sample and level.
    ///
    /// # Errors
    /// Those of the models and of the rule.
    fn guide(&mut self, cx: &StepCx, net: &mut Evaluator) -> Result<Denoised>;

    /// After each step.
    ///
    /// # Errors
    /// Those of the rule.
    fn end_step(&mut self, _cx: &StepCx) -> Result<()> {
        Ok(())
    }

    /// What errors call the rule: its type, without the paths of modules.
    fn name(&self) -> String {
        type_name::<Self>()
    }
}

impl<G: Guidance + ?Sized> Guidance for Box<G> {
    fn begin(&mut self, info: &RunInfo) -> Result<()> {
        (**self).begin(info)
    }

    fn guide(&mut self, cx: &StepCx, net: &mut Evaluator) -> Result<Denoised> {
        (**self).guide(cx, net)
    }

    fn end_step(&mut self, cx: &StepCx) -> Result<()> {
        (**self).end_step(cx)
    }

    fn name(&self) -> String {
        (**self).name()
    }
}

/// To keep a rule, and what it recorded, after the sampler is gone.
impl<G: Guidance + ?Sized> Guidance for &mut G {
    fn begin(&mut self, info: &RunInfo) -> Result<()> {
        (**self).begin(info)
    }

    fn guide(&mut self, cx: &StepCx, net: &mut Evaluator) -> Result<Denoised> {
        (**self).guide(cx, net)
    }

    fn end_step(&mut self, cx: &StepCx) -> Result<()> {
        (**self).end_step(cx)
    }

    fn name(&self) -> String {
        (**self).name()
    }
}

/// No guidance: the main model under the wanted condition.
#[derive(Debug, Clone, Copy, Default)]
pub struct Unguided;

impl Guidance for Unguided {
    fn guide(&mut self, _: &StepCx, net: &mut Evaluator) -> Result<Denoised> {
        net.conditional()
    }
}

/// The models of a run.
#[derive(Clone)]
pub struct Models<'a> {
    /// The model that is sampled.
    pub main: &'a dyn Denoiser,
    /// A worse version of it.
    pub weak: Option<&'a dyn Denoiser>,
    /// Others, by number.
    pub named: Vec<(u8, &'a dyn Denoiser)>,
}

impl<'a> Models<'a> {
    /// One model.
    pub fn new(main: &'a dyn Denoiser) -> Self {
        Self {
            main,
            weak: None,
            named: Vec::new(),
        }
    }

    fn get(&self, role: Role) -> Result<&'a dyn Denoiser> {
        let found = match role {
            Role::Main => Some(self.main),
            Role::Weak => self.weak,
            Role::Named(n) => self.named.iter().find(|(k, _)| *k == n).map(|(_, d)| *d),
        };
        found.ok_or_else(|| {
            Error::unsupported(
                format!("a question to the model {role:?}"),
                "the sampler was not given one",
            )
        })
    }
}

/// The conditions of a run, with as many rows as samples.
#[derive(Debug, Clone)]
pub struct Conditions {
    /// The wanted one.
    pub positive: Condition,
    /// The unwanted one.
    pub negative: Option<Condition>,
    /// None at all.
    pub null: Condition,
}

/// Answers questions about one sample at one level; see the [module](self) page.
pub struct Evaluator<'r> {
    models: &'r Models<'r>,
    conditions: &'r Conditions,
    nfe: &'r mut Nfe,
    x: &'r Tensor,
    level: Level,
    max_rows: usize,
    detach: bool,
    answered: Vec<(Role, CondRole, Denoised)>,
}

impl<'r> Evaluator<'r> {
    /// An evaluator; `max_rows` splits network calls, `detach` cuts the graph of every answer.
    pub fn new(
        models: &'r Models<'r>,
        conditions: &'r Conditions,
        nfe: &'r mut Nfe,
        x: &'r Tensor,
        level: Level,
        max_rows: Option<usize>,
        detach: bool,
    ) -> Self {
        Self {
            models,
            conditions,
            nfe,
            x,
            level,
            max_rows: max_rows.unwrap_or(usize::MAX).max(1),
            detach,
            answered: Vec::new(),
        }
    }

    /// The noisy sample, `[rows, ...]`.
    pub fn x(&self) -> &'r Tensor {
        self.x
    }

    /// Number of samples.
    pub fn rows(&self) -> usize {
        self.x.dims().first().copied().unwrap_or(0)
    }

    /// Its level.
    pub fn level(&self) -> Level {
        self.level
    }

    /// The wanted condition, for all rows.
    pub fn positive(&self) -> &'r Condition {
        &self.conditions.positive
    }

    /// The counts of the run, for rules that evaluate something else than a denoiser.
    pub fn nfe(&mut self) -> &mut Nfe {
        self.nfe
    }

    /// A model, for rules that differentiate through it; such rules count for themselves.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when the sampler was not given one.
    pub fn model(&self, role: Role) -> Result<&'r dyn Denoiser> {
        self.models.get(role)
    }

    /// The main model under the wanted condition.
    ///
    /// # Errors
    /// Those of the model.
    pub fn conditional(&mut self) -> Result<Denoised> {
        self.one(Query::main(CondRole::Positive))
    }

    /// The answer to one question.
    ///
    /// # Errors
    /// Those of the model.
    pub fn one(&mut self, query: Query) -> Result<Denoised> {
        let answer = self.ask(std::slice::from_ref(&query))?.pop();
        answer.ok_or_else(|| Error::argument("queries", 0, "an answer for each"))
    }

    /// Answers in the order of the questions, each with the rows it asked about.
    ///
    /// # Errors
    /// Those of the models; [`Error::InvalidArgument`] for rows that do not exist,
    /// [`Error::Shape`] for a given condition with another number of rows.
    pub fn ask(&mut self, queries: &[Query]) -> Result<Vec<Denoised>> {
        let mut answers: Vec<Option<Denoised>> = Vec::new();
        for query in queries {
            answers.push(self.remembered(query)?);
        }
        let mut open: Vec<usize> = (0..queries.len())
            .filter(|i| answers[*i].is_none())
            .collect();
        while let Some(&first) = open.first() {
            let role = queries[first].role;
            let (together, rest): (Vec<_>, Vec<_>) =
                open.iter().partition(|i| queries[**i].role == role);
            open = rest;
            let asked: Vec<&Query> = together.iter().map(|i| &queries[*i]).collect();
            for (i, answer) in together.iter().zip(self.call(role, &asked)?) {
                if queries[*i].rows == Rows::All {
                    let known = (role, queries[*i].cond.clone(), answer.clone());
                    self.answered.push(known);
                }
                answers[*i] = Some(answer);
            }
        }
        Ok(answers.into_iter().flatten().collect())
    }

    fn remembered(&self, query: &Query) -> Result<Option<Denoised>> {
        let same = |(role, cond, _): &&(Role, CondRole, Denoised)| {
            *role == query.role && cond.is_same(&query.cond)
        };
        let Some((_, cond, answer)) = self.answered.iter().find(same) else {
            return Ok(None);
        };
        match (&query.rows, cond) {
            (Rows::All, _) => Ok(Some(answer.clone())),
            // A given condition has the rows of its own query only.
            (Rows::Subset(_), CondRole::Given(_)) => Ok(None),
            (Rows::Subset(rows), _) => Ok(Some(answer.select(rows)?)),
        }
    }

    fn condition(&self, query: &Query) -> Result<Condition> {
        let all = match &query.cond {
            CondRole::Positive => &self.conditions.positive,
            CondRole::Null => &self.conditions.null,
            CondRole::Negative => {
                let negative = self.conditions.negative.as_ref();
                negative.unwrap_or(&self.conditions.null)
            }
            CondRole::Given(condition) => {
                let rows = match &query.rows {
                    Rows::All => self.rows(),
                    Rows::Subset(rows) => rows.len(),
                };
                return condition.for_rows(rows);
            }
        };
        match &query.rows {
            Rows::All => Ok(all.clone()),
            Rows::Subset(rows) => all.take_rows(rows),
        }
    }

    /// Questions to one model: in one call where the conditions allow it.
    fn call(&mut self, role: Role, queries: &[&Query]) -> Result<Vec<Denoised>> {
        let model = self.models.get(role)?;
        let mut inputs = Vec::new();
        for query in queries {
            let x = match &query.rows {
                Rows::All => self.x.clone(),
                Rows::Subset(rows) => select_rows(self.x, rows)?,
            };
            inputs.push((x, self.condition(query)?));
        }
        let conditions: Vec<&Condition> = inputs.iter().map(|(_, c)| c).collect();
        let joined = match inputs.len() {
            1 => None,
            _ => Condition::concat(&conditions)?,
        };
        let Some(joined) = joined else {
            return inputs
                .iter()
                .map(|(x, c)| self.launch(role, model, x, c))
                .collect();
        };
        let parts: Vec<&Tensor> = inputs.iter().map(|(x, _)| x).collect();
        let all = self.launch(role, model, &Tensor::cat(&parts, 0)?, &joined)?;
        let mut start = 0;
        let mut answers = Vec::new();
        for (x, _) in &inputs {
            let count = x.dims()[0];
            answers.push(Denoised {
                x: x.clone(),
                x0: all.x0.narrow(0, start, count)?,
                levels: all.levels.clone(),
            });
            start += count;
        }
        Ok(answers)
    }

    fn launch(
        &mut self,
        role: Role,
        model: &dyn Denoiser,
        x: &Tensor,
        condition: &Condition,
    ) -> Result<Denoised> {
        let rows = check::rows("x", x)?;
        let levels = Levels::Same(self.level);
        let count = match role {
            Role::Main => &mut self.nfe.main,
            Role::Weak => &mut self.nfe.weak,
            Role::Named(_) => &mut self.nfe.named,
        };
        *count += rows;
        let mut parts = Vec::new();
        let mut start = 0;
        while start < rows {
            let size = (rows - start).min(self.max_rows);
            let (x, c) = match size == rows {
                true => (x.clone(), condition.clone()),
                false => {
                    let range: Vec<u32> = (start as u32..(start + size) as u32).collect();
                    (x.narrow(0, start, size)?, condition.take_rows(&range)?)
                }
            };
            self.nfe.sequential_calls += 1;
            parts.push(model.denoise(&x, &levels, &c)?.x0);
            start += size;
        }
        let x0 = match parts.len() {
            0 => x.clone(),
            1 => parts.remove(0),
            _ => Tensor::cat(&parts, 0)?,
        };
        Ok(Denoised {
            x: x.clone(),
            x0: if self.detach { x0.detach() } else { x0 },
            levels,
        })
    }
}

/// A model with its guidance as one denoiser, for whatever takes a denoiser: ODE solvers, adjoints.
///
/// The graph is kept, so it can be differentiated. The rule must be stateless; `begin` is called
/// once, on construction.
pub struct Guided<'a> {
    models: Models<'a>,
    guidance: std::cell::RefCell<Box<dyn Guidance + 'a>>,
    negative: Option<Condition>,
    null: Condition,
    nfe: std::cell::Cell<Nfe>,
}

impl<'a> Guided<'a> {
    /// A guided model, with the grid that it will be used on.
    ///
    /// # Errors
    /// What the rule refuses.
    pub fn new(
        models: Models<'a>,
        mut guidance: impl Guidance + 'a,
        grid: &Grid,
        rows: usize,
    ) -> Result<Self> {
        guidance.begin(&RunInfo {
            grid,
            rows,
            has_negative: false,
            stepper: "",
        })?;
        Ok(Self {
            models,
            guidance: std::cell::RefCell::new(Box::new(guidance)),
            negative: None,
            null: Condition::Null,
            nfe: std::cell::Cell::new(Nfe::default()),
        })
    }

    /// The unwanted condition.
    #[must_use]
    pub fn negative(mut self, negative: Condition) -> Self {
        self.negative = Some(negative);
        self
    }

    /// The null condition where it is not [`Condition::Null`].
    #[must_use]
    pub fn null(mut self, null: Condition) -> Self {
        self.null = null;
        self
    }

    /// What was evaluated so far.
    pub fn nfe(&self) -> Nfe {
        self.nfe.get()
    }
}

impl Denoiser for Guided<'_> {
    fn prediction(&self) -> Prediction {
        Prediction::X0
    }

    fn raw(&self, x: &Tensor, levels: &Levels, condition: &Condition) -> Result<Tensor> {
        let Levels::Same(level) = levels else {
            return Err(Error::unsupported(
                "guidance at different levels in one batch",
                "guided models are sampled, not trained",
            ));
        };
        let rows = check::rows("x", x)?;
        let conditions = Conditions {
            positive: condition.for_rows(rows)?,
            negative: self
                .negative
                .as_ref()
                .map(|c| c.for_rows(rows))
                .transpose()?,
            null: self.null.for_rows(rows)?,
        };
        let cx = StepCx {
            step: 0,
            steps: 1,
            level: *level,
            next: *level,
            eval_index: 0,
        };
        let mut nfe = self.nfe.get();
        let mut guidance = self.guidance.try_borrow_mut().map_err(|_| {
            Error::unsupported("a guided model that asks itself", "guide another model")
        })?;
        let mut net = Evaluator::new(&self.models, &conditions, &mut nfe, x, *level, None, false);
        let d = guidance.guide(&cx, &mut net)?;
        self.nfe.set(nfe);
        Ok(d.x0)
    }
}

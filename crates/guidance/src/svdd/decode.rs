//! The decoder.

use super::{numbers, row_streams, Batch, ReverseKernel, Value};
use crate::error::{check, Error};
use crate::Result;
use tensor_core::random::RandomStream;

/// Which candidate of each sample goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// The chosen candidate of each sample, below `m`.
    pub index: Vec<u32>,
    /// Samples none of whose candidates had a value: they go on with the first one.
    pub unscored: usize,
}

/// Chooses one of `m` candidates for each sample with probability `softmax(values / alpha)`, by the
/// inverse distribution function at `uniforms` (one in `[0, 1)` per sample): the index is the number
/// of cumulated probabilities that the uniform number exceeds. At `alpha = 0` it is the first of the
/// largest, and `uniforms` is not read. NaN counts as minus infinity. `values` has the candidates of
/// a sample side by side.
///
/// # Errors
/// [`Error::InvalidArgument`] for counts that do not fit, a negative or NaN `alpha`, or a uniform
/// number out of range.
pub fn choose(values: &[f64], m: usize, alpha: f64, uniforms: &[f64]) -> Result<Choice> {
    if m == 0 || !values.len().is_multiple_of(m) {
        let expected = format!("a multiple of {m} candidates per sample, at least 1");
        return Err(Error::argument("number of values", values.len(), expected));
    }
    if alpha.is_nan() || alpha < 0.0 {
        return Err(Error::argument("alpha", alpha, "a number >= 0"));
    }
    let rows = values.len() / m;
    if alpha > 0.0 && m > 1 {
        if uniforms.len() != rows {
            let expected = format!("{rows}, one per sample");
            return Err(Error::argument("uniforms", uniforms.len(), expected));
        }
        if let Some(u) = uniforms.iter().find(|u| !(0.0..1.0).contains(*u)) {
            return Err(Error::argument("uniform number", u, "in [0, 1)"));
        }
    }
    let mut choice = Choice {
        index: Vec::with_capacity(rows),
        unscored: 0,
    };
    for (row, candidates) in values.chunks(m).enumerate() {
        let mut best = 0;
        for (j, v) in candidates.iter().enumerate() {
            if *v > candidates[best] || (candidates[best].is_nan() && !v.is_nan()) {
                best = j;
            }
        }
        let top = candidates[best];
        choice.unscored += usize::from(top.is_nan() || top == f64::NEG_INFINITY);
        let greedy = alpha == 0.0 || m == 1 || !top.is_finite();
        let index = match greedy {
            true => best,
            false => draw(candidates, top, alpha, uniforms[row]),
        };
        choice.index.push(index as u32);
    }
    Ok(choice)
}

/// A candidate by its weight `exp((v - top) / alpha)`.
fn draw(candidates: &[f64], top: f64, alpha: f64, uniform: f64) -> usize {
    let weight = |v: f64| match v.is_nan() {
        true => 0.0,
        false => ((v - top) / alpha).exp(),
    };
    let weights: Vec<f64> = candidates.iter().map(|v| weight(*v)).collect();
    let total: f64 = weights.iter().sum();
    let (mut sum, mut last) = (0.0, 0);
    for (j, w) in weights.iter().enumerate().filter(|(_, w)| **w > 0.0) {
        sum += w / total;
        last = j;
        if uniform <= sum {
            break;
        }
    }
    last
}

/// What [`Svdd::sample`] gives.
#[derive(Debug, Clone)]
pub struct SvddOutput<S> {
    /// The finished samples.
    pub states: S,
    /// The chosen candidate of each sample at each step, 0 where a step was not steered.
    pub selected_index: Vec<Vec<u32>>,
    /// The candidates' values at each step, those of a sample side by side; empty where a step was
    /// not steered.
    pub values: Vec<Vec<f64>>,
    /// Candidates that were valued.
    pub value_calls: usize,
    /// Judgements of the reward.
    pub reward_calls: usize,
    /// How often no candidate of a sample had a value, so that the first one went on.
    pub unscored: usize,
    /// The states before the first step and after each one, where they were to be recorded.
    pub history: Option<Vec<S>>,
    /// All candidates of each step, where they were to be kept.
    pub candidates: Option<Vec<S>>,
}

/// The temperature of the choice.
enum Alpha<'a> {
    Constant(f64),
    Schedule(Box<dyn Fn(usize, usize) -> f64 + 'a>),
}

/// The decoder; see the [module](super) page.
pub struct Svdd<'a, K: ReverseKernel> {
    kernel: &'a K,
    value: &'a dyn Value<K::State>,
    duplicates: usize,
    alpha: Alpha<'a>,
    start_step: usize,
    stop_step: usize,
    every: usize,
    batch: usize,
    record: bool,
    keep_candidates: bool,
    uniforms: Option<Vec<Vec<f64>>>,
}

impl<'a, K: ReverseKernel> Svdd<'a, K> {
    /// 20 candidates at every step, greedy. The paper takes 20 for images and molecules, 10 for DNA.
    pub fn new(kernel: &'a K, value: &'a dyn Value<K::State>) -> Self {
        Self {
            kernel,
            value,
            duplicates: 20,
            alpha: Alpha::Constant(0.0),
            start_step: 0,
            stop_step: usize::MAX,
            every: 1,
            batch: usize::MAX,
            record: false,
            keep_candidates: false,
            uniforms: None,
        }
    }

    /// The number of candidates `M`; 1 is plain sampling, with the same bits.
    #[must_use]
    pub fn duplicates(self, duplicates: usize) -> Self {
        Self { duplicates, ..self }
    }

    /// The temperature, in units of the value; 0 takes the best candidate.
    #[must_use]
    pub fn alpha(self, alpha: f64) -> Self {
        Self {
            alpha: Alpha::Constant(alpha),
            ..self
        }
    }

    /// A temperature per step: a function of the step (from 0) and the number of steps.
    #[must_use]
    pub fn alpha_schedule(self, schedule: impl Fn(usize, usize) -> f64 + 'a) -> Self {
        Self {
            alpha: Alpha::Schedule(Box::new(schedule)),
            ..self
        }
    }

    /// The first step that is steered.
    #[must_use]
    pub fn start_step(self, start_step: usize) -> Self {
        Self { start_step, ..self }
    }

    /// The first step that is not steered any more.
    #[must_use]
    pub fn stop_step(self, stop_step: usize) -> Self {
        Self { stop_step, ..self }
    }

    /// Steers every so many steps, from the first one on.
    #[must_use]
    pub fn every(self, every: usize) -> Self {
        Self { every, ..self }
    }

    /// How many samples are decoded together; it changes memory and speed, never the result.
    #[must_use]
    pub fn batch(self, batch: usize) -> Self {
        Self { batch, ..self }
    }

    /// Keeps the states of all steps.
    #[must_use]
    pub fn record(self, record: bool) -> Self {
        Self { record, ..self }
    }

    /// Keeps all candidates of all steps.
    #[must_use]
    pub fn keep_candidates(self, keep_candidates: bool) -> Self {
        Self {
            keep_candidates,
            ..self
        }
    }

    /// Chooses with these numbers in `[0, 1)`, a list per step and one per sample in it, instead of
    /// drawn ones: to repeat a run of another program.
    #[must_use]
    pub fn given_uniforms(self, uniforms: Vec<Vec<f64>>) -> Self {
        Self {
            uniforms: Some(uniforms),
            ..self
        }
    }

    fn steers(&self, step: usize) -> bool {
        self.duplicates > 1
            && (self.start_step..self.stop_step).contains(&step)
            && (step - self.start_step).is_multiple_of(self.every)
    }

    fn alpha_at(&self, step: usize) -> f64 {
        match &self.alpha {
            Alpha::Constant(alpha) => *alpha,
            Alpha::Schedule(schedule) => schedule(step, self.kernel.steps()),
        }
    }

    /// Checks every setting against the kernel.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`]; [`Error::Unsupported`] where no steered step is random.
    pub fn validate(&self) -> Result<()> {
        let one = "at least 1";
        check::require(
            self.duplicates > 0,
            "Svdd::duplicates",
            self.duplicates,
            one,
        )?;
        check::require(self.every > 0, "Svdd::every", self.every, one)?;
        check::require(self.batch > 0, "Svdd::batch", self.batch, one)?;
        let steps = self.kernel.steps();
        check::require(steps > 0, "ReverseKernel::steps", steps, one)?;
        if self.duplicates == 1 {
            return Ok(());
        }
        let steered: Vec<usize> = (0..steps).filter(|s| self.steers(*s)).collect();
        let some = !steered.is_empty();
        let words = "a step of the kernel that is steered";
        check::require(some, "Svdd::start_step", self.start_step, words)?;
        for step in &steered {
            let alpha = self.alpha_at(*step);
            check::require(alpha >= 0.0, "Svdd::alpha", alpha, "a number >= 0")?;
        }
        if steered.iter().any(|s| self.kernel.is_stochastic(*s)) {
            return Ok(());
        }
        Err(Error::unsupported(
            "steering a deterministic sampler",
            "all its candidates are the same; take a kernel that draws (DDIM with eta > 0)",
        ))
    }

    /// Decodes `n` samples. Sample `i` draws from streams of its own, whatever `n` and `batch` are.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for `n = 0`; as [`validate`](Self::validate); those of kernel and
    /// value.
    pub fn sample(&self, n: usize, rng: &RandomStream) -> Result<SvddOutput<K::State>> {
        if n == 0 {
            return Err(Error::argument("n", n, "at least one sample"));
        }
        self.validate()?;
        let mut parts = Vec::new();
        let mut from = 0;
        while from < n {
            let count = (n - from).min(self.batch);
            parts.push(self.decode(from, count, rng)?);
            from += count;
        }
        join(parts)
    }

    /// The samples `from .. from + count`.
    fn decode(
        &self,
        from: usize,
        count: usize,
        rng: &RandomStream,
    ) -> Result<SvddOutput<K::State>> {
        let mut starts = row_streams(&rng.split("start"), from, count);
        let mut draws = row_streams(rng, from, count);
        let mut picks = row_streams(&rng.split("select"), from, count);
        let mut x = self.kernel.init(&mut starts)?;
        let mut out = SvddOutput {
            states: x.clone(),
            selected_index: Vec::new(),
            values: Vec::new(),
            value_calls: 0,
            reward_calls: 0,
            unscored: 0,
            history: self.record.then(|| vec![x.clone()]),
            candidates: self.keep_candidates.then(Vec::new),
        };
        for step in 0..self.kernel.steps() {
            let m = if self.steers(step) {
                self.duplicates
            } else {
                1
            };
            let candidates = self.kernel.propose(&x, step, m, &mut draws)?;
            let found = candidates.rows()?;
            if found != count * m {
                let reason = format!("{count} samples, {m} candidates each");
                return Err(Error::argument(
                    "rows of ReverseKernel::propose",
                    found,
                    reason,
                ));
            }
            if let Some(kept) = &mut out.candidates {
                kept.push(candidates.clone());
            }
            x = match m {
                1 => {
                    out.selected_index.push(vec![0; count]);
                    out.values.push(Vec::new());
                    candidates
                }
                _ => self.select(&candidates, (step, from, count), &mut picks, &mut out)?,
            };
            if let Some(history) = &mut out.history {
                history.push(x.clone());
            }
        }
        out.states = self.kernel.finish(x)?;
        Ok(out)
    }

    fn select(
        &self,
        candidates: &K::State,
        (step, from, count): (usize, usize, usize),
        picks: &mut [RandomStream],
        out: &mut SvddOutput<K::State>,
    ) -> Result<K::State> {
        let (m, alpha) = (self.duplicates, self.alpha_at(step));
        let values = self.value.value(candidates, step + 1)?;
        let values = numbers(&values, count * m, "the values of the candidates")?;
        let uniforms: Vec<f64> = match &self.uniforms {
            _ if alpha == 0.0 => Vec::new(),
            None => picks.iter_mut().map(RandomStream::next_uniform).collect(),
            Some(given) => {
                let row = given.get(step).and_then(|row| row.get(from..from + count));
                let missing = || {
                    Error::argument("given uniforms", step, "a number per sample for every step")
                };
                row.ok_or_else(missing)?.to_vec()
            }
        };
        let choice = choose(&values, m, alpha, &uniforms)?;
        let rows: Vec<u32> = (0u32..)
            .zip(&choice.index)
            .map(|(row, j)| row * m as u32 + j)
            .collect();
        out.value_calls += count * m;
        out.reward_calls += self.value.reward_calls(count * m);
        out.unscored += choice.unscored;
        out.selected_index.push(choice.index);
        out.values.push(values);
        candidates.take(&rows)
    }
}

/// Batches decoded one after the other, as if at once.
fn join<S: Batch>(mut parts: Vec<SvddOutput<S>>) -> Result<SvddOutput<S>> {
    if parts.len() == 1 {
        return Ok(parts.remove(0));
    }
    let states: Vec<S> = parts.iter().map(|p| p.states.clone()).collect();
    let steps = |lists: Vec<&Option<Vec<S>>>| -> Result<Option<Vec<S>>> {
        let lists: Vec<&Vec<S>> = lists.into_iter().flatten().collect();
        let Some(first) = lists.first() else {
            return Ok(None);
        };
        let one = |i: usize| {
            let rows: Vec<S> = lists.iter().map(|list| list[i].clone()).collect();
            S::concat(&rows)
        };
        (0..first.len()).map(one).collect::<Result<_>>().map(Some)
    };
    let history = steps(parts.iter().map(|p| &p.history).collect())?;
    let candidates = steps(parts.iter().map(|p| &p.candidates).collect())?;
    let mut all = parts.remove(0);
    for part in parts {
        for (mine, more) in all.selected_index.iter_mut().zip(part.selected_index) {
            mine.extend(more);
        }
        for (mine, more) in all.values.iter_mut().zip(part.values) {
            mine.extend(more);
        }
        all.value_calls += part.value_calls;
        all.reward_calls += part.reward_calls;
        all.unscored += part.unscored;
    }
    Ok(SvddOutput {
        states: S::concat(&states)?,
        history,
        candidates,
        ..all
    })
}

/// `n` samples without steering: those of [`Svdd::sample`] with one candidate.
///
/// # Errors
/// [`Error::InvalidArgument`] for `n = 0`; those of the kernel.
pub fn sample<K: ReverseKernel>(kernel: &K, n: usize, rng: &RandomStream) -> Result<K::State> {
    if n == 0 {
        return Err(Error::argument("n", n, "at least one sample"));
    }
    let mut x = kernel.init(&mut row_streams(&rng.split("start"), 0, n))?;
    let mut draws = row_streams(rng, 0, n);
    for step in 0..kernel.steps() {
        x = kernel.propose(&x, step, 1, &mut draws)?;
    }
    kernel.finish(x)
}

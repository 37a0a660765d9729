//! The sampling loop.
//!
//! Schedule, prediction, step and guidance are independent: a [`Sampler`] takes a denoiser (which
//! knows its prediction), a [`Grid`] of levels, a [`Stepper`] and a [`Guidance`], and counts every
//! network evaluation. All rows of a batch are independent of each other, noise included.
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use thalweg_flows::schedule::VpSde;
//! use thalweg_flows::{AnalyticMixture, Condition, DpmSolverPP2M, Grid, RandomStream, Sampler};
//!
//! // In the place of a network: the exact denoiser of two Gaussians.
//! let means = Tensor::new(&[[1.0_f64, 1.0], [-1.0, 0.5]], &Device::Cpu)?;
//! let mixture = AnalyticMixture::new(&means, &[0.01, 0.01], &[1.0, 1.0])?.with_classes(&[0, 1])?;
//! let grid = Grid::uniform_lambda(&VpSde::default(), 20)?;
//! let mut sampler = Sampler::new(&mixture, grid).stepper(DpmSolverPP2M::default());
//!
//! let rng = RandomStream::new(7);
//! let noise = rng.split("start").normal(0.0, 1.0, (16, 2), DType::F64, &Device::Cpu)?;
//! let class = Condition::classes(&[1], &Device::Cpu)?;
//! let out = sampler.sample(&noise, &class, None, &rng)?;
//! assert_eq!(out.nfe.main, 16 * 20);
//! let centers = out.x.mean(0)?.to_vec1::<f64>()?;
//! assert!((centers[0] + 1.0).abs() < 0.1);
//! # Ok::<(), thalweg_flows::Error>(())
//! ```

use crate::condition::Condition;
use crate::denoiser::Denoiser;
use crate::error::{check, Result};
use crate::grid::Grid;
use crate::guidance::{Conditions, Evaluator, Guidance, Models, Nfe, RunInfo, StepCx, Unguided};
use crate::level::{Level, Levels};
use crate::noise::Noise;
use crate::prediction::{Denoised, Prediction};
use crate::stepper::{Ddim, Stepper};
use crate::watch::{type_name, FiniteCheck, Watch};
use candle_core::{DType, Tensor, D};
use tensor_core::random::RandomStream;

/// What happens to clean samples that leave the data's range, after guidance.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Clip {
    /// Nothing.
    #[default]
    None,
    /// They are cut to `[-limit, limit]`.
    Static(f64),
    /// Dynamic thresholding (Saharia et al., 2022): per row, `s` is the quantile `p` of `|x0|` (at
    /// least 1); the row is cut to `[-s, s]` and divided by `s`.
    Dynamic {
        /// The quantile; 0.995 is usual.
        p: f64,
    },
}

impl Clip {
    fn apply(&self, d: Denoised) -> Result<Denoised> {
        match *self {
            Self::None => Ok(d),
            Self::Static(limit) => {
                check::positive("Clip::Static", limit)?;
                let x0 = d.x0.clamp(-limit, limit)?;
                Ok(d.with_x0(x0))
            }
            Self::Dynamic { p } => {
                let holds = (0.0..=1.0).contains(&p);
                check::require(holds, "Clip::Dynamic", p, "a quantile in [0, 1]")?;
                let rows = check::rows("x0", &d.x0)?;
                let flat = d.x0.reshape((rows, ()))?;
                let (sorted, _) = flat.abs()?.contiguous()?.sort_last_dim(true)?;
                let last = sorted.dim(D::Minus1)?.saturating_sub(1);
                let place = p * last as f64;
                let (low, fraction) = (place.floor() as usize, place.fract());
                let high = (low + 1).min(last);
                let s = (sorted.narrow(1, low, 1)?.affine(1.0 - fraction, 0.0)?
                    + sorted.narrow(1, high, 1)?.affine(fraction, 0.0)?)?
                .maximum(1.0)?;
                let cut = flat.broadcast_minimum(&s)?.broadcast_maximum(&s.neg()?)?;
                let x0 = cut.broadcast_div(&s)?.reshape(d.x0.shape())?;
                Ok(d.with_x0(x0))
            }
        }
    }
}

/// Changes what passes through the loop: for inpainting, steering, previews.
pub trait Hook {
    /// After guidance and clipping, before the step.
    ///
    /// # Errors
    /// Whatever stops the run.
    fn after_denoise(&mut self, _cx: &StepCx, d: Denoised) -> Result<Denoised> {
        Ok(d)
    }

    /// After the step; `x` is at the level `cx.next`.
    ///
    /// # Errors
    /// Whatever stops the run.
    fn after_step(&mut self, _cx: &StepCx, x: Tensor) -> Result<Tensor> {
        Ok(x)
    }
}

/// The sampling loop; see the [module](self) page.
pub struct Sampler<'a> {
    models: Models<'a>,
    grid: Grid,
    stepper: Box<dyn Stepper + 'a>,
    guidance: Box<dyn Guidance + 'a>,
    null: Condition,
    clip: Clip,
    hooks: Vec<Box<dyn Hook + 'a>>,
    max_rows: Option<usize>,
    keep_graph: bool,
    record: bool,
    check: FiniteCheck,
    /// The types of rule and stepper, for errors.
    names: [String; 2],
}

/// What a run gives.
#[derive(Debug, Clone)]
pub struct Sampled {
    /// The samples, at the last level of the grid.
    pub x: Tensor,
    /// What the run cost.
    pub nfe: Nfe,
    /// Samples (and clean samples) of all steps, where they were to be recorded.
    pub trace: Option<Trace>,
}

/// The course of a run.
#[derive(Debug, Clone, Default)]
pub struct Trace {
    /// The samples at every level, the first one included.
    pub x: Vec<Tensor>,
    /// The clean samples of every step.
    pub x0: Vec<Tensor>,
}

/// One step of a run.
#[derive(Debug, Clone)]
pub struct StepEvent {
    /// Which step, from 0.
    pub step: usize,
    /// The sample after it.
    pub x: Tensor,
    /// Its level.
    pub level: Level,
    /// The clean sample that the step used: a preview.
    pub x0: Tensor,
}

impl<'a> Sampler<'a> {
    /// Deterministic DDIM without guidance; everything else is set by the other methods.
    pub fn new(denoiser: &'a dyn Denoiser, grid: Grid) -> Self {
        Self {
            models: Models::new(denoiser),
            grid,
            stepper: Box::new(Ddim::default()),
            guidance: Box::new(Unguided),
            null: Condition::Null,
            clip: Clip::None,
            hooks: Vec::new(),
            max_rows: None,
            keep_graph: false,
            record: false,
            check: FiniteCheck::Auto,
            names: [type_name::<Unguided>(), type_name::<Ddim>()],
        }
    }

    /// How steps are made.
    #[must_use]
    pub fn stepper<S: Stepper + 'a>(mut self, stepper: S) -> Self {
        self.names[1] = type_name::<S>();
        self.stepper = Box::new(stepper);
        self
    }

    /// How clean samples are made from predictions. Hand a `&mut` to keep what the rule records.
    #[must_use]
    pub fn guidance<G: Guidance + 'a>(mut self, guidance: G) -> Self {
        self.names[0] = guidance.name();
        self.guidance = Box::new(guidance);
        self
    }

    /// The weak model of autoguidance.
    #[must_use]
    pub fn weak(mut self, denoiser: &'a dyn Denoiser) -> Self {
        self.models.weak = Some(denoiser);
        self
    }

    /// One more model that rules may ask.
    #[must_use]
    pub fn named(mut self, number: u8, denoiser: &'a dyn Denoiser) -> Self {
        self.models.named.retain(|(n, _)| *n != number);
        self.models.named.push((number, denoiser));
        self
    }

    /// The null condition where it is not [`Condition::Null`]: an extra class index, the embedding
    /// of the empty prompt. One row serves all. Of the same kind as the wanted condition, both
    /// share one network call.
    #[must_use]
    pub fn null(self, null: Condition) -> Self {
        Self { null, ..self }
    }

    /// What happens to clean samples beyond the data's range.
    #[must_use]
    pub fn clip(self, clip: Clip) -> Self {
        Self { clip, ..self }
    }

    /// Adds a hook, after those there are.
    #[must_use]
    pub fn hook(mut self, hook: impl Hook + 'a) -> Self {
        self.hooks.push(Box::new(hook));
        self
    }

    /// Rows that one network call may have.
    #[must_use]
    pub fn max_rows(self, rows: usize) -> Self {
        Self {
            max_rows: Some(rows),
            ..self
        }
    }

    /// Keeps the graph through all steps, to differentiate the result; memory grows with steps.
    #[must_use]
    pub fn keep_graph(self, keep: bool) -> Self {
        Self {
            keep_graph: keep,
            ..self
        }
    }

    /// Records samples and clean samples of all steps.
    #[must_use]
    pub fn record(self, record: bool) -> Self {
        Self { record, ..self }
    }

    /// When samples are looked at for NaN: on a device only at the end, unless this says otherwise.
    #[must_use]
    pub fn check(self, check: FiniteCheck) -> Self {
        Self { check, ..self }
    }

    /// The levels.
    pub fn grid(&self) -> &Grid {
        &self.grid
    }

    /// Samples from standard normal noise `[rows, ...]`, which is scaled to the first level.
    /// Stochastic steps draw from `rng`, each row from a stream of its own.
    ///
    /// # Errors
    /// Those of [`start_at`](Self::start_at) and of every step.
    pub fn sample(
        &mut self,
        noise: &Tensor,
        positive: &Condition,
        negative: Option<&Condition>,
        rng: &RandomStream,
    ) -> Result<Sampled> {
        let x = self.grid.start(noise)?;
        let noise = Noise::rows(rng, check::rows("noise", &x)?);
        self.sample_from(&x, positive, negative, noise)
    }

    /// Samples from a state at the first level, with any source of noise.
    ///
    /// # Errors
    /// As [`sample`](Self::sample).
    pub fn sample_from(
        &mut self,
        x: &Tensor,
        positive: &Condition,
        negative: Option<&Condition>,
        noise: Noise,
    ) -> Result<Sampled> {
        let record = self.record;
        let mut run = self.start_at(x, positive, negative, noise)?;
        let mut trace = Trace {
            x: vec![x.clone()],
            x0: Vec::new(),
        };
        for event in run.by_ref() {
            let event = event?;
            if record {
                trace.x.push(event.x);
                trace.x0.push(event.x0);
            }
        }
        let x = match run.half {
            Some(half) => run.x.to_dtype(half)?,
            None => run.x,
        };
        Ok(Sampled {
            x,
            nfe: run.nfe,
            trace: record.then_some(trace),
        })
    }

    /// The same loop step by step: progress, previews, early stopping.
    ///
    /// # Errors
    /// As [`start_at`](Self::start_at).
    pub fn iter<'s>(
        &'s mut self,
        noise: &Tensor,
        positive: &Condition,
        negative: Option<&Condition>,
        rng: &RandomStream,
    ) -> Result<Run<'s, 'a>> {
        let x = self.grid.start(noise)?;
        let noise = Noise::rows(rng, check::rows("noise", &x)?);
        self.start_at(&x, positive, negative, noise)
    }

    /// A run from a state at the first level. From one in half precision (F16, BF16) samples and steps are in
    /// single precision, and only the models see halves.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) for a condition with another number of rows,
    /// [`Error::NonFinite`](crate::Error::NonFinite) for a bad state, and what the guidance refuses.
    pub fn start_at<'s>(
        &'s mut self,
        x: &Tensor,
        positive: &Condition,
        negative: Option<&Condition>,
        noise: Noise,
    ) -> Result<Run<'s, 'a>> {
        let rows = check::rows("x", x)?;
        let half = Some(x.dtype()).filter(|d| matches!(d, DType::F16 | DType::BF16));
        let x = &match half {
            Some(_) => x.to_dtype(DType::F32)?,
            None => x.clone(),
        };
        let mut watch = Watch::new(self.check)?;
        watch.see(x, 0, || "the first sample".into())?;
        let conditions = Conditions {
            positive: positive.for_rows(rows)?,
            negative: negative.map(|c| c.for_rows(rows)).transpose()?,
            null: self.null.for_rows(rows)?,
        };
        self.stepper.reset();
        self.guidance.begin(&RunInfo {
            grid: &self.grid,
            rows,
            has_negative: negative.is_some(),
            stepper: &self.stepper.name(),
        })?;
        Ok(Run {
            sampler: self,
            conditions,
            x: x.clone(),
            half,
            noise,
            watch,
            nfe: Nfe::default(),
            step: 0,
            failed: false,
        })
    }
}

/// A model that sees halves of samples in single precision.
struct Halved<'a> {
    model: &'a dyn Denoiser,
    half: DType,
}

impl<'a> Halved<'a> {
    /// The main model, the weak one, the others.
    fn all(models: &Models<'a>, half: DType) -> Vec<Self> {
        let named = models.named.iter().map(|(_, model)| *model);
        let all = std::iter::once(models.main).chain(models.weak).chain(named);
        all.map(|model| Self { model, half }).collect()
    }

    /// The same models from what [`all`](Self::all) made of them.
    fn models<'h>(halved: &'h [Self], of: &Models) -> Models<'h> {
        let mut rest = halved.iter().map(|h| h as &dyn Denoiser);
        let main = rest.next();
        let weak = of.weak.and_then(|_| rest.next());
        let numbers = of.named.iter().map(|(n, _)| *n);
        Models {
            main: main.unwrap_or(&halved[0]),
            weak,
            named: numbers.zip(rest).collect(),
        }
    }
}

impl Denoiser for Halved<'_> {
    fn prediction(&self) -> Prediction {
        self.model.prediction()
    }

    fn raw(&self, x: &Tensor, levels: &Levels, condition: &Condition) -> Result<Tensor> {
        let raw = self.model.raw(&x.to_dtype(self.half)?, levels, condition)?;
        Ok(raw.to_dtype(x.dtype())?)
    }
}

/// A run in progress: an iterator over its steps that stops at the first error.
pub struct Run<'s, 'a> {
    sampler: &'s mut Sampler<'a>,
    conditions: Conditions,
    x: Tensor,
    /// What the models see samples in, where that is half precision.
    half: Option<DType>,
    noise: Noise,
    watch: Watch,
    nfe: Nfe,
    step: usize,
    failed: bool,
}

impl Run<'_, '_> {
    /// The sample as it is now.
    pub fn x(&self) -> &Tensor {
        &self.x
    }

    /// What the run has cost so far.
    pub fn nfe(&self) -> &Nfe {
        &self.nfe
    }

    /// Reads what has been left to the end by [`FiniteCheck`], for a run that is not finished.
    ///
    /// # Errors
    /// [`Error::NonFinite`](crate::Error::NonFinite) naming the first step that was not.
    pub fn check_now(&mut self) -> Result<()> {
        self.watch.finish()
    }

    fn advance(&mut self) -> Result<StepEvent> {
        let sampler = &mut *self.sampler;
        let (step, steps) = (self.step, sampler.grid.steps());
        let next = sampler.grid.levels()[step + 1];
        let (nfe, conditions) = (&mut self.nfe, &self.conditions);
        let halved = self.half.map(|half| Halved::all(&sampler.models, half));
        let models = &match &halved {
            Some(halved) => Halved::models(halved, &sampler.models),
            None => sampler.models.clone(),
        };
        let guidance = &mut sampler.guidance;
        let (clip, max_rows, detach) = (sampler.clip, sampler.max_rows, !sampler.keep_graph);
        let mut cx = StepCx {
            step,
            steps,
            level: sampler.grid.levels()[step],
            next,
            eval_index: 0,
        };
        let first = cx;
        let mut eval = |x: &Tensor, level: &Level| {
            let at = StepCx {
                level: *level,
                ..cx
            };
            let mut net = Evaluator::new(models, conditions, nfe, x, *level, max_rows, detach);
            let d = clip.apply(guidance.guide(&at, &mut net)?)?;
            check::same_shape("the guided sample", &d.x0, x)?;
            cx.eval_index += 1;
            Ok(d)
        };
        let mut d = eval(&self.x, &first.level)?;
        let [rule, stepper] = &sampler.names;
        self.watch
            .see(&d.x0, step, || format!("the clean sample of {rule}"))?;
        for hook in &mut sampler.hooks {
            d = hook.after_denoise(&first, d)?;
        }
        let mut x = sampler
            .stepper
            .step(&first, &d, &mut eval, &mut self.noise)?;
        for hook in &mut sampler.hooks {
            x = hook.after_step(&first, x)?;
        }
        self.watch
            .see(&x, step, || format!("the sample after {stepper}"))?;
        sampler.guidance.end_step(&first)?;
        if step + 1 == steps {
            self.watch.finish()?;
        }
        self.x = if detach { x.detach() } else { x };
        self.step += 1;
        Ok(StepEvent {
            step,
            x: self.x.clone(),
            level: next,
            x0: d.x0,
        })
    }
}

impl Iterator for Run<'_, '_> {
    type Item = Result<StepEvent>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed || self.step >= self.sampler.grid.steps() {
            return None;
        }
        let event = self.advance();
        self.failed = event.is_err();
        Some(event)
    }
}

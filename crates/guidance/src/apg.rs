//! APG, adaptive projected guidance: classifier-free guidance without its oversaturation.
//!
//! For anyone who samples with guidance scales of 5 and more and finds colors and contrast blown up: a
//! replacement of [`Cfg`](crate::Cfg) with the same evaluations and three more parameters.
//! *Eliminating Oversaturation and Artifacts of High Guidance Scales in Diffusion Models*, Sadat,
//! Hilliges and Weber, ICLR 2025, arXiv 2410.02416, algorithm 1.
//!
//! With clean samples `D_c` (wanted) and `D_u` (null or negative), norms and products over one sample:
//!
//! ```text
//! delta  = D_c - D_u                     m <- delta + beta m        (m = 0 at the start; no 1 - beta)
//! delta' = m min(1, r / |m|)             v = D_c / |D_c|
//! par    = <delta', v> v                 orth = delta' - par
//! D      = D_c + (w - 1) (orth + eta par)
//! ```
//!
//! | symbol | field |
//! | --- | --- |
//! | `w` | [`Apg::w`], 1 is no guidance |
//! | `eta` | [`Apg::eta`]: how much of the part along `D_c` stays; it acts like a gain on `D_c` and saturates |
//! | `r` | [`Apg::norm_threshold`] |
//! | `beta` | [`Apg::momentum`], negative pushes away from earlier directions |
//!
//! `eta = 1` without threshold and momentum is classifier-free guidance. The threshold has to follow
//! the size of a sample, since `|delta|` grows with its square root: [`Apg::norm_threshold_rms`].
//!
//! It works on clean samples. On raw noise predictions (what diffusers' guider sees) the direction of
//! `D_c` is mostly noise and less of the saturation goes away; [`Space::Native`] reproduces that.
//!
//! ```
//! # extern crate flows as thalweg_flows;
//! use candle_core::{DType, Device, Tensor};
//! use thalweg_flows::schedule::VpSde;
//! use thalweg_flows::{AnalyticMixture, Condition, Grid, RandomStream, Sampler};
//! use thalweg_guidance::Apg;
//!
//! let means = Tensor::new(&[[1.0_f64, 1.0], [-1.0, 0.5]], &Device::Cpu)?;
//! let model = AnalyticMixture::new(&means, &[0.04, 0.04], &[1.0, 1.0])?.with_classes(&[0, 1])?;
//! let grid = Grid::uniform_lambda(&VpSde::default(), 20)?;
//! let rng = RandomStream::new(1);
//! let noise = rng.split("start").normal(0.0, 1.0, (8, 2), DType::F64, &Device::Cpu)?;
//! let class = Condition::classes(&[0], &Device::Cpu)?;
//! // The sampler that you have, and one line more.
//! let mut sampler = Sampler::new(&model, grid).guidance(Apg::new(10.0).norm_threshold(0.5).momentum(-0.5));
//! let out = sampler.sample(&noise, &class, None, &rng)?;
//! assert_eq!(out.nfe.main, 2 * 8 * 20);
//! # Ok::<(), thalweg_flows::Error>(())
//! ```

use crate::error::{check, Error};
use crate::space::{ReduceDims, Space};
use crate::Result;
use candle_core::{DType, Tensor};
use flows::combine::{linear_combination, row_combination};
use flows::guidance::{CondRole, Query, Role, RunInfo};
use flows::{Denoised, Evaluator, Guidance, StepCx};
use tensor_core::kernels::{moments, GradMap};

/// What guidance leads away from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Against {
    /// The negative condition of the run, or the null condition.
    #[default]
    Negative,
    /// The null condition, also where there is a negative one.
    Null,
    /// The weak model under the wanted condition: autoguidance.
    Weak,
}

impl Against {
    pub(crate) fn query(self) -> Query {
        match self {
            Self::Negative => Query::main(CondRole::Negative),
            Self::Null => Query::main(CondRole::Null),
            Self::Weak => Query::main(CondRole::Positive).of(Role::Weak),
        }
    }
}

/// From where, and how far, the update is added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Convention {
    /// `D_c + (w - 1) update`, the paper's.
    #[default]
    Paper,
    /// `D_u + w update`: diffusers' default. Unlike the paper's it is not `D_c` at `w = 1`, so diffusers
    /// switches the rule off there, and so does this.
    DiffusersNative,
    /// `D_c + w update`: diffusers' "original formulation", the paper's with `w` one lower.
    DiffusersOriginal,
}

/// Known settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Preset {
    /// `eta` 0, threshold 15, momentum -0.5: the paper's for SDXL at 1024 x 1024 (latents of
    /// 4 x 128 x 128).
    Sdxl,
}

/// Adaptive projected guidance; see the [module](self) page.
#[derive(Debug, Clone)]
pub struct Apg {
    /// The scale.
    pub w: f64,
    /// Weight of the part along the conditional prediction.
    pub eta: f64,
    /// Largest norm of the update before the scale.
    pub norm_threshold: Option<Threshold>,
    /// Weight of the earlier updates, in `(-1, 1)`.
    pub momentum: Option<f64>,
    /// The form of the prediction that is combined.
    pub space: Space,
    /// Over what norms and products run.
    pub dims: ReduceDims,
    /// How the update is added.
    pub convention: Convention,
    /// What is led away from.
    pub against: Against,
    running: Option<Tensor>,
    /// The step that moved the running sum last, and the sum before it.
    before: Option<(usize, Option<Tensor>)>,
}

/// The limit of an update's norm.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Threshold {
    /// The norm itself.
    Norm(f64),
    /// The root mean square over the reduced dimensions: independent of the sample's size.
    Rms(f64),
}

impl Apg {
    /// The projection alone: `eta` 0, no threshold, no momentum.
    pub fn new(w: f64) -> Self {
        Self {
            w,
            eta: 0.0,
            norm_threshold: None,
            momentum: None,
            space: Space::X0,
            dims: ReduceDims::AllNonBatch,
            convention: Convention::Paper,
            against: Against::Negative,
            running: None,
            before: None,
        }
    }

    /// Known settings with a scale.
    pub fn preset(preset: Preset, w: f64) -> Self {
        match preset {
            Preset::Sdxl => Self::new(w).norm_threshold(15.0).momentum(-0.5),
        }
    }

    /// Reads diffusers' `AdaptiveProjectedGuidance` from its `guider_config.json`: keys
    /// `guidance_scale`, `adaptive_projected_guidance_momentum`,
    /// `adaptive_projected_guidance_rescale`, `eta`, `use_original_formulation`, and
    /// `adaptive_projected_guidance_norm_dim` or `norm_dim` (axes from 1 up), with diffusers' defaults where
    /// one is missing. The rule works on clean samples; set `space` to what the model predicts for
    /// diffusers' own numbers.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for text that is not such a configuration; [`Error::Unsupported`] for
    /// `guidance_rescale`, `start`, `stop` and `enabled` where they are not diffusers' defaults: these are
    /// other rules here ([`Rescaled`](crate::Rescaled), [`Interval`](crate::Interval)).
    pub fn from_diffusers_config(json: &str) -> Result<Self> {
        let bad =
            |what: String| Error::argument("guider_config.json", what, "a JSON object of numbers");
        let value: serde_json::Value =
            serde_json::from_str(json).map_err(|e| bad(e.to_string()))?;
        if !value.is_object() {
            return Err(bad(value.to_string()));
        }
        let number = |key: &str, default: Option<f64>| match &value[key] {
            serde_json::Value::Null if value.get(key).is_some() => Ok(None),
            serde_json::Value::Null => Ok(default),
            other => other
                .as_f64()
                .map(Some)
                .ok_or_else(|| bad(format!("{key} = {other}"))),
        };
        let elsewhere = [
            ("guidance_rescale", 0.0, "put the rule into Rescaled"),
            ("start", 0.0, "put the rule into an Interval"),
            ("stop", 1.0, "put the rule into an Interval"),
        ];
        for (key, default, reason) in elsewhere {
            let found = number(key, Some(default))?;
            if found != Some(default) {
                return Err(Error::unsupported(
                    format!("{key} = {:?}", value[key]),
                    reason,
                ));
            }
        }
        match &value["enabled"] {
            serde_json::Value::Null | serde_json::Value::Bool(true) => {}
            other => {
                let reason = "sample without the rule";
                return Err(Error::unsupported(format!("enabled = {other}"), reason));
            }
        }
        let axis = |axis: &serde_json::Value| {
            let found = axis.as_u64().filter(|a| *a > 0);
            found.map(|a| a as usize).ok_or_else(|| {
                let reason = "axes count from 1, the first after the batch; set Apg::dims";
                Error::unsupported(format!("norm_dim = {axis}"), reason)
            })
        };
        let keys = ["adaptive_projected_guidance_norm_dim", "norm_dim"];
        let dims = match keys
            .map(|key| &value[key])
            .into_iter()
            .find(|v| !v.is_null())
        {
            None => ReduceDims::AllNonBatch,
            Some(serde_json::Value::Array(axes)) => {
                ReduceDims::Axes(axes.iter().map(axis).collect::<Result<_>>()?)
            }
            Some(one) => ReduceDims::Axes(vec![axis(one)?]),
        };
        let scale = number("guidance_scale", Some(7.5))?;
        let rescale = number("adaptive_projected_guidance_rescale", Some(15.0))?;
        let original = match &value["use_original_formulation"] {
            serde_json::Value::Null => false,
            other => other
                .as_bool()
                .ok_or_else(|| bad(format!("use_original_formulation = {other}")))?,
        };
        let apg = Self {
            eta: number("eta", Some(1.0))?.unwrap_or(1.0),
            momentum: number("adaptive_projected_guidance_momentum", None)?,
            norm_threshold: rescale.filter(|r| *r > 0.0).map(Threshold::Norm),
            dims,
            convention: match original {
                true => Convention::DiffusersOriginal,
                false => Convention::DiffusersNative,
            },
            ..Self::new(scale.unwrap_or(7.5))
        };
        apg.validate()?;
        Ok(apg)
    }

    /// Another weight of the part along the conditional prediction.
    #[must_use]
    pub fn eta(self, eta: f64) -> Self {
        Self { eta, ..self }
    }

    /// Limits the norm of the update; 0 switches the limit off.
    #[must_use]
    pub fn norm_threshold(self, r: f64) -> Self {
        Self {
            norm_threshold: Some(Threshold::Norm(r)).filter(|_| r != 0.0),
            ..self
        }
    }

    /// Limits the root mean square of the update; 0 switches the limit off. SDXL's threshold of 15
    /// is 0.0586 here.
    #[must_use]
    pub fn norm_threshold_rms(self, r: f64) -> Self {
        Self {
            norm_threshold: Some(Threshold::Rms(r)).filter(|_| r != 0.0),
            ..self
        }
    }

    /// Adds this multiple of the earlier updates.
    #[must_use]
    pub fn momentum(self, beta: f64) -> Self {
        Self {
            momentum: Some(beta),
            ..self
        }
    }

    /// Another form of the prediction.
    #[must_use]
    pub fn space(self, space: Space) -> Self {
        Self { space, ..self }
    }

    /// Other dimensions for norms and products.
    #[must_use]
    pub fn dims(self, dims: ReduceDims) -> Self {
        Self { dims, ..self }
    }

    /// Another convention, for settings from elsewhere.
    #[must_use]
    pub fn convention(self, convention: Convention) -> Self {
        Self { convention, ..self }
    }

    /// Leads away from something else.
    #[must_use]
    pub fn against(self, against: Against) -> Self {
        Self { against, ..self }
    }

    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`].
    pub fn validate(&self) -> Result<()> {
        check::finite("Apg::w", self.w)?;
        let eta = (0.0..=1.0).contains(&self.eta);
        check::require(eta, "Apg::eta", self.eta, "a number in [0, 1]")?;
        match self.norm_threshold {
            Some(Threshold::Norm(r) | Threshold::Rms(r)) => {
                check::positive("Apg::norm_threshold", r)?;
            }
            None => {}
        }
        let beta = self.momentum.is_none_or(|b| b.abs() < 1.0);
        check::require(beta, "Apg::momentum", self.momentum, "a number in (-1, 1)")
    }

    /// The running sum of updates, where there is momentum.
    pub fn running(&self) -> Option<&Tensor> {
        self.running.as_ref()
    }

    /// The combination of two predictions in the rule's form, and the running sum after it.
    ///
    /// # Errors
    /// [`Error::Shape`] when shapes differ; those of candle.
    pub fn combine(
        &self,
        wanted: &Tensor,
        unwanted: &Tensor,
        running: Option<&Tensor>,
    ) -> Result<(Tensor, Tensor)> {
        if unwanted.dims() != wanted.dims() {
            let expected = format!("{:?}", wanted.dims());
            return Err(Error::shape(
                "the unwanted prediction",
                unwanted.dims(),
                expected,
            ));
        }
        let mut terms = vec![(1.0, wanted), (-1.0, unwanted)];
        terms.extend(self.momentum.zip(running));
        let delta = linear_combination(&terms)?;
        let (base, factor) = match self.convention {
            Convention::Paper => (wanted, self.w - 1.0),
            Convention::DiffusersNative => (unwanted, self.w),
            Convention::DiffusersOriginal => (wanted, self.w),
        };
        let guided = match self.fuses(wanted, &delta) {
            true => self.fused(&delta, wanted, (base, factor))?,
            false => {
                let update = self.update(&delta, wanted)?;
                linear_combination(&[(1.0, base), (factor, &update)])?
            }
        };
        Ok((guided, delta))
    }

    /// Whether the rule is three sums per row and one more pass: whole samples on the CPU, without a graph.
    fn fuses(&self, wanted: &Tensor, delta: &Tensor) -> bool {
        let plain = |x: &Tensor| x.device().is_cpu() && !x.track_op();
        self.dims == ReduceDims::AllNonBatch
            && matches!(wanted.dtype(), DType::F32 | DType::F64)
            && plain(wanted)
            && plain(delta)
            && wanted.elem_count() > 0
    }

    /// `base + factor update(delta)`, in two passes over memory.
    fn fused(
        &self,
        delta: &Tensor,
        wanted: &Tensor,
        (base, factor): (&Tensor, f64),
    ) -> Result<Tensor> {
        let rows = wanted.dims()[0];
        let parts = (0..rows)
            .map(|i| Ok((wanted.narrow(0, i, 1)?, delta.narrow(0, i, 1)?)))
            .collect::<Result<Vec<_>>>()?;
        let pairs: Vec<_> = parts
            .iter()
            .map(|(c, d)| (Some(c), d, GradMap::default()))
            .collect();
        let limit = self.limit(wanted.elem_count() / rows);
        let (mut on_delta, mut on_wanted) = (Vec::new(), Vec::new());
        for sums in moments(&pairs)? {
            let s = limit.map_or(1.0, |limit| {
                (limit / sums.gg.sqrt().max(tiny(DType::F64))).min(1.0)
            });
            let share = match self.eta == 1.0 {
                true => 0.0,
                false => (self.eta - 1.0) * sums.pg / sums.pp.max(ZERO_SQUARE),
            };
            on_delta.push(factor * s);
            on_wanted.push(factor * s * share);
        }
        // The base is one of the two predictions.
        if base.id() == wanted.id() {
            on_wanted.iter_mut().for_each(|c| *c += 1.0);
            return Ok(row_combination(&[
                (&on_wanted, wanted),
                (&on_delta, delta),
            ])?);
        }
        let ones = vec![1.0; rows];
        Ok(row_combination(&[
            (&ones, base),
            (&on_delta, delta),
            (&on_wanted, wanted),
        ])?)
    }

    /// The largest norm of an update of so many numbers.
    fn limit(&self, count: usize) -> Option<f64> {
        self.norm_threshold.map(|threshold| match threshold {
            Threshold::Norm(r) => r,
            Threshold::Rms(r) => r * (count as f64).sqrt(),
        })
    }

    /// `s (delta + (eta - 1) (<delta, D_c> / |D_c|^2) D_c)`, `s = min(1, r / |delta|)`: all of the
    /// rule from three sums.
    fn update(&self, delta: &Tensor, wanted: &Tensor) -> Result<Tensor> {
        if delta.elem_count() == 0 {
            return Ok(delta.clone());
        }
        let mut update = delta.clone();
        if self.eta != 1.0 {
            let (inner, norm) = inner_and_square(delta, wanted, &self.dims)?;
            let share = (inner / norm)?.affine(self.eta - 1.0, 0.0)?;
            let part = wanted.broadcast_mul(&share.to_dtype(wanted.dtype())?)?;
            update = (update + part)?;
        }
        let axes = self.dims.axes(delta.rank())?;
        let Some(limit) = self.limit(axes.iter().map(|a| delta.dims()[*a]).product()) else {
            return Ok(update);
        };
        let norm = self.dims.sum(&delta.sqr()?)?.sqrt()?;
        // Where the norm is 0 the update is 0, whatever the factor.
        let s = norm
            .maximum(tiny(norm.dtype()))?
            .recip()?
            .affine(limit, 0.0)?
            .minimum(1.0)?;
        Ok(update.broadcast_mul(&s.to_dtype(update.dtype())?)?)
    }
}

/// The least square of a norm that something is projected on.
const ZERO_SQUARE: f64 = 1e-24;

/// What is smaller counts as zero where something is divided by a norm.
fn tiny(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 1e-150,
        _ => 1e-30,
    }
}

/// `<a, b>` and `|b|^2`, the latter at least [`ZERO_SQUARE`].
fn inner_and_square(a: &Tensor, b: &Tensor, dims: &ReduceDims) -> Result<(Tensor, Tensor)> {
    let square = dims.sum(&b.sqr()?)?;
    let square = square.maximum(ZERO_SQUARE)?;
    Ok((dims.sum(&(a * b)?)?, square))
}

/// The parts of `v0` along and orthogonal to `v1`, per sample (over `dims`), accumulated in double
/// precision and returned in the dtype of `v0`. Along a zero vector there is no part.
///
/// # Errors
/// [`Error::Shape`] when shapes differ; [`Error::InvalidConfig`] for axes that do not exist.
pub fn project(v0: &Tensor, v1: &Tensor, dims: &ReduceDims) -> Result<(Tensor, Tensor)> {
    if v0.dims() != v1.dims() {
        return Err(Error::shape("v0", v0.dims(), format!("{:?}", v1.dims())));
    }
    let (a, b) = (v0.to_dtype(DType::F64)?, v1.to_dtype(DType::F64)?);
    let (inner, square) = inner_and_square(&a, &b, dims)?;
    let parallel = b.broadcast_mul(&(inner / square)?)?;
    let orthogonal = (a - &parallel)?;
    Ok((
        parallel.to_dtype(v0.dtype())?,
        orthogonal.to_dtype(v0.dtype())?,
    ))
}

impl Guidance for Apg {
    fn begin(&mut self, _: &RunInfo) -> flows::Result<()> {
        (self.running, self.before) = (None, None);
        Ok(self.validate()?)
    }

    fn guide(&mut self, cx: &StepCx, net: &mut Evaluator) -> flows::Result<Denoised> {
        let plain = self.w == 1.0 && self.convention != Convention::DiffusersOriginal;
        if plain || (self.w == 0.0 && self.convention == Convention::DiffusersOriginal) {
            return net.conditional();
        }
        let answers = net.ask(&[Query::main(CondRole::Positive), self.against.query()])?;
        let (wanted, unwanted) = (self.space.read(&answers[0])?, self.space.read(&answers[1])?);
        // Steps with several evaluations move the running sum once: all of them add to the same one.
        let sum = match &self.before {
            Some((step, before)) if *step == cx.step && cx.eval_index > 0 => before.as_ref(),
            _ => self.running.as_ref(),
        };
        let (guided, delta) = self.combine(&wanted, &unwanted, sum)?;
        if self.momentum.is_some() && cx.eval_index == 0 {
            let before = self.running.replace(delta.detach());
            self.before = Some((cx.step, before));
        }
        Ok(self.space.write(&guided, &answers[0])?)
    }
}

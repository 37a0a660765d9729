//! The rules that everything else is compared with, and those that put rules together.
//!
//! `w` is the guidance scale; everywhere here `w = 1` means "conditional only". With `D_c`, `D_u`,
//! `D_weak` the clean samples under the wanted condition, under the negative (or null) one, and of a
//! weaker model:
//!
//! | rule | clean sample | evaluations per step |
//! | --- | --- | --- |
//! | [`Cfg`] | `D_u + w (D_c - D_u)` | 2 |
//! | [`Autoguidance`] | `D_weak + w (D_c - D_weak)` | 1 and 1 of the weak model |
//! | [`ClassifierGuidance`] | `eps - w sigma grad log p(y given x)` | 1 and a gradient of the classifier |
//! | [`Interval`] | the inner rule within an interval of noise or steps, `D_c` outside | 1 outside |
//! | [`Scheduled`] | `D_c + s (D - D_c)` with a scale `s` per step | those of the rule |
//! | [`Rescaled`] | the inner rule with the standard deviation of `D_c` | those of the rule |
//! | [`Sum`] | `D_c + sum_i a_i (D_i - D_c)` | the union of the rules' |
//! | [`Then`] | one rule before, another after a step | those of the rule |
//!
//! Some papers write `w' = w - 1` on `D_c - D_u` from `D_c`, which is the same.

use crate::error::{check, Error};
use crate::space::{ReduceDims, Space};
use crate::Result;
use candle_core::{Tensor, Var};
use flows::combine::linear_combination;
use flows::guidance::{CondRole, Query, Role, RunInfo};
use flows::{
    Condition, Ddim, Denoised, Evaluator, GradientCheck, Guidance, Level, StepCx, Stepper,
};

/// `from + w (to - from)`
pub(crate) fn extrapolate(from: &Tensor, to: &Tensor, w: f64) -> Result<Tensor> {
    Ok(linear_combination(&[(1.0 - w, from), (w, to)])?)
}

/// Classifier-free guidance.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cfg {
    /// The scale.
    pub w: f64,
}

impl Cfg {
    /// Guidance with a scale; 1 costs one evaluation, like no guidance.
    pub fn new(w: f64) -> Self {
        Self { w }
    }

    /// `D_u + w (D_c - D_u)` of two predictions in any form, for a loop of one's own.
    ///
    /// # Errors
    /// [`flows::Error::Shape`] when shapes differ; those of candle.
    pub fn combine(&self, wanted: &Tensor, unwanted: &Tensor) -> Result<Tensor> {
        extrapolate(unwanted, wanted, self.w)
    }
}

impl Guidance for Cfg {
    fn begin(&mut self, _: &RunInfo) -> flows::Result<()> {
        Ok(check::finite("Cfg::w", self.w)?)
    }

    fn guide(&mut self, _: &StepCx, net: &mut Evaluator) -> flows::Result<Denoised> {
        if self.w == 1.0 {
            return net.conditional();
        }
        let answers = net.ask(&[
            Query::main(CondRole::Positive),
            Query::main(CondRole::Negative),
        ])?;
        let x0 = self.combine(&answers[0].x0, &answers[1].x0)?;
        Ok(answers[0].with_x0(x0))
    }
}

/// Guidance away from a weaker version of the model (Karras et al., 2024).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Autoguidance {
    /// The scale.
    pub w: f64,
}

impl Guidance for Autoguidance {
    fn begin(&mut self, _: &RunInfo) -> flows::Result<()> {
        Ok(check::finite("Autoguidance::w", self.w)?)
    }

    fn guide(&mut self, _: &StepCx, net: &mut Evaluator) -> flows::Result<Denoised> {
        if self.w == 1.0 {
            return net.conditional();
        }
        let answers = net.ask(&[
            Query::main(CondRole::Positive),
            Query::main(CondRole::Positive).of(Role::Weak),
        ])?;
        let x0 = extrapolate(&answers[1].x0, &answers[0].x0, self.w)?;
        Ok(answers[0].with_x0(x0))
    }
}

/// A classifier (or any other judge) of noisy samples that can be differentiated.
pub trait NoisyModel {
    /// `log p(y given x)` of each row, `[rows]`, at the level of `x`.
    ///
    /// # Errors
    /// Whatever the model's own are.
    fn log_prob(&self, x: &Tensor, level: &Level, wanted: &Condition) -> flows::Result<Tensor>;
}

impl<F: Fn(&Tensor, &Level, &Condition) -> flows::Result<Tensor>> NoisyModel for F {
    fn log_prob(&self, x: &Tensor, level: &Level, wanted: &Condition) -> flows::Result<Tensor> {
        self(x, level, wanted)
    }
}

/// What the gradient `g` of a classifier is added to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ClassifierForm {
    /// The noise prediction, `eps - w sigma g`: for any stepper.
    #[default]
    Noise,
    /// The mean of the ancestral step, `mu + w s^2 g` with the step's variance `s^2`: for
    /// [`Ddim::ancestral`], whose next sample is exactly that.
    Mean,
}

/// How the gradient of a classifier is scaled before use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum GradNorm {
    /// As it is: the gradient of the sum over the rows, so that it does not depend on the batch.
    #[default]
    None,
    /// To the norm of the ancestral step's mean, row by row, `|mu| g / |g|`; with [`ClassifierForm::Mean`].
    /// The authors of PPAP guide by depth maps so, with the norms of the first sample and of the batch.
    MeanMatched,
}

/// Guidance by the gradient of a classifier of noisy samples: `eps - w sigma grad log p(y given x)`.
///
/// The classifier must be differentiable throughout: several layers of candle-nn are not and say
/// nothing. The first gradient is therefore compared with differences, at the price of two more forward
/// passes, which are counted.
pub struct ClassifierGuidance<M> {
    /// The classifier.
    pub model: M,
    /// The scale; 0 is no guidance.
    pub w: f64,
    /// The prediction that is guided: the wanted condition's, or that of the null condition.
    pub base: CondRole,
    /// What the gradient is added to.
    pub form: ClassifierForm,
    /// How the gradient is scaled.
    pub grad_norm: GradNorm,
    /// The comparison of the first gradient with differences.
    pub gradient_check: GradientCheck,
}

impl<M: NoisyModel> ClassifierGuidance<M> {
    /// Guides the model under the null condition.
    pub fn new(model: M, w: f64) -> Self {
        Self {
            model,
            w,
            base: CondRole::Null,
            form: ClassifierForm::Noise,
            grad_norm: GradNorm::None,
            gradient_check: GradientCheck::default(),
        }
    }
}

/// The gradient of `sum log p` at a sample.
pub(crate) fn log_prob_gradient(
    model: &dyn NoisyModel,
    x: &Tensor,
    level: &Level,
    wanted: &Condition,
) -> Result<Tensor> {
    let at = Var::from_tensor(x)?;
    let value = model.log_prob(at.as_tensor(), level, wanted)?;
    let rows = x.dims().first().copied().unwrap_or(0);
    if value.dims() != [rows] {
        let expected = format!("[{rows}]");
        return Err(Error::shape(
            "the classifier's log-probability",
            value.dims(),
            expected,
        ));
    }
    match value.sum_all()?.backward()?.get(&at) {
        Some(gradient) => Ok(gradient.detach()),
        None => {
            Err(
                tensor_core::Error::LostGradient(vec!["the sample, through the classifier".into()])
                    .into(),
            )
        }
    }
}

/// `w sigma^2 / alpha`: what a gradient `g` moves the clean sample by in `eps - w sigma g`.
pub(crate) fn score_factor(w: f64, level: &Level) -> Result<f64> {
    let factor = w * level.sigma.powi(2) / level.alpha;
    match factor.is_finite() {
        true => Ok(factor),
        false => Err(Error::unsupported(
            "guidance by a gradient at pure noise",
            "start at a level with signal, or put it into an Interval",
        )),
    }
}

/// Rows in the direction of `g` with the norms of `like`; a zero row stays zero.
fn with_norms_of(g: &Tensor, like: &Tensor) -> Result<Tensor> {
    let norm =
        |x: &Tensor| -> Result<Tensor> { Ok(ReduceDims::AllNonBatch.sum(&x.sqr()?)?.sqrt()?) };
    let ratio = (norm(like)? / norm(g)?.maximum(f64::from(f32::MIN_POSITIVE))?)?;
    Ok(g.broadcast_mul(&ratio)?)
}

impl<M: NoisyModel> Guidance for ClassifierGuidance<M> {
    fn begin(&mut self, info: &RunInfo) -> flows::Result<()> {
        let noise = self.form == ClassifierForm::Noise;
        if noise && self.grad_norm == GradNorm::MeanMatched {
            let reason = "the mean is that of ClassifierForm::Mean";
            return Err(Error::unsupported("GradNorm::MeanMatched", reason).into());
        }
        let ancestral = Ddim::ancestral().name();
        if !noise && info.stepper != ancestral {
            let reason = format!("its mean is that of {ancestral}, not of {}", info.stepper);
            return Err(Error::unsupported("ClassifierForm::Mean", reason).into());
        }
        Ok(check::finite("ClassifierGuidance::w", self.w)?)
    }

    fn guide(&mut self, cx: &StepCx, net: &mut Evaluator) -> flows::Result<Denoised> {
        let d = net.one(Query::main(self.base.clone()))?;
        if self.w == 0.0 || net.rows() == 0 {
            return Ok(d);
        }
        let mut g = log_prob_gradient(&self.model, net.x(), &cx.level, net.positive())?;
        let log_prob = |x: &Tensor| self.model.log_prob(x, &cx.level, net.positive());
        let checks = self
            .gradient_check
            .run("the classifier", log_prob, net.x(), &g)?;
        let rows = net.rows();
        net.nfe().classifier_forward += (1 + checks) * rows;
        net.nfe().classifier_backward += rows;
        let factor = match self.form {
            ClassifierForm::Noise => score_factor(self.w, &cx.level)?,
            ClassifierForm::Mean => {
                let [on_x, on_clean, std] = Ddim::ancestral().coefficients(&cx.level, &cx.next)?;
                if self.grad_norm == GradNorm::MeanMatched {
                    let mean = linear_combination(&[(on_x, net.x()), (on_clean, &d.x0)])?;
                    g = with_norms_of(&g, &mean)?;
                }
                // What moves the mean by w s^2 g moves the clean sample by this much.
                self.w * std * std / on_clean
            }
        };
        let x0 = linear_combination(&[(1.0, &d.x0), (factor, &g)])?;
        Ok(d.with_x0(x0))
    }
}

/// In what an [`Interval`] is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Unit {
    /// `sigma / alpha`.
    #[default]
    Rho,
    /// The part of the steps that are done, in `[0, 1)`.
    Progress,
}

/// A rule for `lo < u <= hi` only; elsewhere the wanted condition alone, at the price of one
/// evaluation.
#[derive(Debug, Clone)]
pub struct Interval<G> {
    /// The rule.
    pub inner: G,
    /// The open lower end.
    pub lo: f64,
    /// The closed upper end.
    pub hi: f64,
    /// In what they are measured.
    pub unit: Unit,
}

impl<G: Guidance> Guidance for Interval<G> {
    fn begin(&mut self, info: &RunInfo) -> flows::Result<()> {
        let holds = self.lo < self.hi;
        check::require(holds, "Interval::hi", self.hi, "more than lo")?;
        self.inner.begin(info)
    }

    fn guide(&mut self, cx: &StepCx, net: &mut Evaluator) -> flows::Result<Denoised> {
        let at = match self.unit {
            Unit::Rho => cx.level.rho(),
            Unit::Progress => cx.step as f64 / cx.steps as f64,
        };
        match self.lo < at && at <= self.hi {
            true => self.inner.guide(cx, net),
            false => net.conditional(),
        }
    }

    fn end_step(&mut self, cx: &StepCx) -> flows::Result<()> {
        self.inner.end_step(cx)
    }
}

/// A rule whose effect has a scale of its own at every step: `D_c + s (D - D_c)`.
#[derive(Debug, Clone)]
pub struct Scheduled<G, F> {
    /// The rule.
    pub inner: G,
    /// The scale at a step; 1 leaves the rule as it is, 0 switches it off.
    pub scale: F,
}

impl<G: Guidance, F: Fn(&StepCx) -> f64> Guidance for Scheduled<G, F> {
    fn begin(&mut self, info: &RunInfo) -> flows::Result<()> {
        self.inner.begin(info)
    }

    fn guide(&mut self, cx: &StepCx, net: &mut Evaluator) -> flows::Result<Denoised> {
        let scale = (self.scale)(cx);
        check::finite("Scheduled::scale", scale)?;
        if scale == 0.0 {
            return net.conditional();
        }
        let guided = self.inner.guide(cx, net)?;
        let plain = net.conditional()?;
        let x0 = extrapolate(&plain.x0, &guided.x0, scale)?;
        Ok(guided.with_x0(x0))
    }

    fn end_step(&mut self, cx: &StepCx) -> flows::Result<()> {
        self.inner.end_step(cx)
    }
}

/// `phi std(c) / std(g) g + (1 - phi) g` for a guided prediction `g` and the conditional one `c`, with the
/// standard deviations over all of a sample, `[rows, ...]`.
///
/// # Errors
/// [`Error::Shape`] when shapes differ; those of candle.
pub fn rescale(guided: &Tensor, conditional: &Tensor, phi: f64) -> Result<Tensor> {
    if guided.dims() != conditional.dims() {
        let expected = format!("{:?}", conditional.dims());
        return Err(Error::shape(
            "the guided prediction",
            guided.dims(),
            expected,
        ));
    }
    if guided.elem_count() == 0 {
        return Ok(guided.clone());
    }
    // The counts of the two standard deviations cancel.
    let spread = |x: &Tensor| -> Result<Tensor> {
        let rows = x.dims()[0];
        let flat = x.reshape((rows, ()))?;
        let centered = flat.broadcast_sub(&flat.mean_keepdim(1)?)?;
        let mut shape = vec![1; x.rank()];
        shape[0] = rows;
        Ok(centered.sqr()?.sum_keepdim(1)?.sqrt()?.reshape(shape)?)
    };
    let ratio = (spread(conditional)? / spread(guided)?.maximum(f64::from(f32::MIN_POSITIVE))?)?;
    Ok(guided.broadcast_mul(&ratio.affine(phi, 1.0 - phi)?)?)
}

/// A rule whose result is given back the standard deviation of the conditional prediction (Lin et
/// al., 2023): `phi std(D_c) / std(g) g + (1 - phi) g`, over all of a sample, in a chosen form.
#[derive(Debug, Clone)]
pub struct Rescaled<G> {
    /// The rule.
    pub inner: G,
    /// How much of the correction; 0.7 is usual.
    pub phi: f64,
    /// The form of the prediction; the paper's is the model's own, `v`.
    pub space: Space,
}

impl<G: Guidance> Guidance for Rescaled<G> {
    fn begin(&mut self, info: &RunInfo) -> flows::Result<()> {
        let holds = (0.0..=1.0).contains(&self.phi);
        check::require(holds, "Rescaled::phi", self.phi, "a number in [0, 1]")?;
        self.inner.begin(info)
    }

    fn guide(&mut self, cx: &StepCx, net: &mut Evaluator) -> flows::Result<Denoised> {
        let guided = self.inner.guide(cx, net)?;
        let plain = net.conditional()?;
        let (g, c) = (self.space.read(&guided)?, self.space.read(&plain)?);
        Ok(self.space.write(&rescale(&g, &c, self.phi)?, &guided)?)
    }

    fn end_step(&mut self, cx: &StepCx) -> flows::Result<()> {
        self.inner.end_step(cx)
    }
}

/// Several rules at once: `D_c + sum_i a_i (D_i - D_c)`. What two rules both ask is evaluated once.
pub struct Sum<'a>(pub Vec<(f64, Box<dyn Guidance + 'a>)>);

impl<'a> Sum<'a> {
    /// No rule yet.
    pub fn new() -> Self {
        Self(Vec::new())
    }

    /// One more rule with its weight.
    #[must_use]
    pub fn and(mut self, weight: f64, rule: impl Guidance + 'a) -> Self {
        self.0.push((weight, Box::new(rule)));
        self
    }
}

impl Default for Sum<'_> {
    fn default() -> Self {
        Self::new()
    }
}

impl Guidance for Sum<'_> {
    fn begin(&mut self, info: &RunInfo) -> flows::Result<()> {
        self.0.iter_mut().try_for_each(|(weight, rule)| {
            check::finite("Sum weight", *weight)?;
            rule.begin(info)
        })
    }

    fn guide(&mut self, cx: &StepCx, net: &mut Evaluator) -> flows::Result<Denoised> {
        let mut parts = Vec::new();
        for (weight, rule) in &mut self.0 {
            parts.push((*weight, rule.guide(cx, net)?));
        }
        let plain = net.conditional()?;
        let total: f64 = parts.iter().map(|(weight, _)| weight).sum();
        let others = parts.iter().map(|(weight, part)| (*weight, &part.x0));
        let terms: Vec<_> = std::iter::once((1.0 - total, &plain.x0))
            .chain(others)
            .collect();
        Ok(plain.with_x0(linear_combination(&terms)?))
    }

    fn end_step(&mut self, cx: &StepCx) -> flows::Result<()> {
        self.0
            .iter_mut()
            .try_for_each(|(_, rule)| rule.end_step(cx))
    }
}

/// One rule until `when` holds for the first time, another from then on.
#[derive(Debug, Clone)]
pub struct Then<A, B, F> {
    /// The first rule.
    pub first: A,
    /// The second rule.
    pub second: B,
    /// From when on the second rule guides.
    pub when: F,
    switched: bool,
}

impl<A: Guidance, B: Guidance, F: Fn(&StepCx) -> bool> Then<A, B, F> {
    /// `first`, and from the step where `when` holds, `second`.
    pub fn new(first: A, when: F, second: B) -> Self {
        Self {
            first,
            second,
            when,
            switched: false,
        }
    }
}

impl<A: Guidance, B: Guidance, F: Fn(&StepCx) -> bool> Guidance for Then<A, B, F> {
    fn begin(&mut self, info: &RunInfo) -> flows::Result<()> {
        self.switched = false;
        self.first.begin(info)?;
        self.second.begin(info)
    }

    fn guide(&mut self, cx: &StepCx, net: &mut Evaluator) -> flows::Result<Denoised> {
        self.switched |= (self.when)(cx);
        match self.switched {
            true => self.second.guide(cx, net),
            false => self.first.guide(cx, net),
        }
    }

    fn end_step(&mut self, cx: &StepCx) -> flows::Result<()> {
        match self.switched {
            true => self.second.end_step(cx),
            false => self.first.end_step(cx),
        }
    }
}

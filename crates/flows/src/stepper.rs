//! Steps from one level to the next.
//!
//! With `D` the clean sample at level `i`, `e = (x - alpha_i D) / sigma_i` the noise, and
//! `h = lambda_{i+1} - lambda_i > 0`:
//!
//! | stepper | order | evaluations | `x <-` |
//! | --- | --- | --- | --- |
//! | [`Ddim`] | 1 | 1 | `alpha' D + sqrt(sigma'^2 - s^2) e + s z`, `s = eta sigma' sqrt(1 - rho'^2 / rho^2)` |
//! | [`Euler`] | 1 | 1 | `y + (rho' - rho) (y - D) / rho` in `y = x / alpha`: DDIM with `eta = 0` |
//! | [`Heun`] | 2 | 2 | the same with the mean of the slopes at both ends |
//! | [`DpmSolverPP2M`] | 2 | 1 | `sigma'/sigma x - alpha' (e^-h - 1) (D + D1 / 2)`, `D1 = (D - D_prev) h / h_prev` |
//! | [`DpmSolverPP3M`] | 3 | 1 | with one more term, from two earlier `D` |
//! | [`DpmSolverPP2S`] | 2 | 2 | with `D` at the intermediate level `lambda + r1 h` |
//!
//! For variance-preserving schedules `s` is DDIM's `eta sigma'/sigma sqrt(1 - alpha^2/alpha'^2)`;
//! written with `rho` it is the ancestral noise of every schedule, so `Ddim::ancestral()` is DDPM's
//! sampler and "Euler ancestral". Where the target has no noise every rule gives `alpha' D` exactly.
//!
//! The grid matters as much as the order: the multistep solvers want `ln(alpha / sigma)` evenly
//! spaced ([`Grid::uniform_lambda`](crate::Grid::uniform_lambda)), and gain nothing over DDIM at few
//! steps on times evenly spaced.

use crate::combine::linear_combination;
use crate::error::{check, Error, Result};
use crate::guidance::StepCx;
use crate::level::{Level, Levels, MIN_ALPHA};
use crate::noise::Noise;
use crate::prediction::Denoised;
use crate::schedule::Schedule;
use crate::watch::type_name;
use candle_core::Tensor;

/// Asks for the clean sample at another sample and level.
pub type Evaluate<'a> = dyn FnMut(&Tensor, &Level) -> Result<Denoised> + 'a;

/// One step of a sampler.
pub trait Stepper {
    /// The order of its error on a fine grid.
    fn order(&self) -> usize;

    /// Forgets all history; called before the first step of a run.
    fn reset(&mut self) {}

    /// What rules that were fitted for one way to step know it by: its type and settings.
    fn name(&self) -> String {
        type_name::<Self>()
    }

    /// The sample at `cx.next`, from the clean sample `d` at `cx.level`.
    ///
    /// # Errors
    /// [`Error::Undetermined`] for a level at which the rule is not defined; those of `eval`.
    fn step(
        &mut self,
        cx: &StepCx,
        d: &Denoised,
        eval: &mut Evaluate,
        noise: &mut Noise,
    ) -> Result<Tensor>;
}

impl<S: Stepper + ?Sized> Stepper for Box<S> {
    fn order(&self) -> usize {
        (**self).order()
    }

    fn reset(&mut self) {
        (**self).reset();
    }

    fn name(&self) -> String {
        (**self).name()
    }

    fn step(
        &mut self,
        cx: &StepCx,
        d: &Denoised,
        eval: &mut Evaluate,
        noise: &mut Noise,
    ) -> Result<Tensor> {
        (**self).step(cx, d, eval, noise)
    }
}

/// `a x + b y`
fn axpby(a: f64, x: &Tensor, b: f64, y: &Tensor) -> Result<Tensor> {
    linear_combination(&[(a, x), (b, y)])
}

/// `alpha' D`, where no noise is left.
fn clean(d: &Denoised, next: &Level) -> Result<Tensor> {
    Levels::Same(*next).scale(&d.x0, |l| l.alpha)
}

/// `sigma'/sigma x - alpha' (e^-h - 1) D`: the exponential integrator of first order, which is DDIM.
fn first_order(x: &Tensor, d: &Tensor, from: &Level, to: &Level) -> Result<Tensor> {
    let [on_x, on_d] = weights(from, to);
    axpby(on_x, x, on_d, d)
}

/// The weights of `x` and `D` in [`first_order`].
fn weights(from: &Level, to: &Level) -> [f64; 2] {
    // alpha' (1 - e^-h) = alpha' - alpha sigma' / sigma, also without signal at `from`.
    let ratio = to.sigma / from.sigma;
    [ratio, to.alpha - from.alpha * ratio]
}

/// The deterministic sampler of *Denoising Diffusion Implicit Models*, and with `eta > 0` its
/// stochastic relatives.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Ddim {
    /// From 0 (deterministic) to 1 (ancestral).
    pub eta: f64,
}

impl Ddim {
    /// As much noise as the reverse of the diffusion has.
    pub fn ancestral() -> Self {
        Self { eta: 1.0 }
    }

    /// Checks the field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] unless `eta` is in `[0, 1]`.
    pub fn validate(&self) -> Result<()> {
        let holds = (0.0..=1.0).contains(&self.eta);
        check::require(holds, "Ddim::eta", self.eta, "a number in [0, 1]")
    }

    /// The mean of the next sample is `a x + b D`, its standard deviation `s`: `[a, b, s]`.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for a bad `eta`.
    pub fn coefficients(&self, from: &Level, to: &Level) -> Result<[f64; 3]> {
        self.validate()?;
        if to.sigma == 0.0 {
            return Ok([0.0, to.alpha, 0.0]);
        }
        let shrink = (to.sigma * from.alpha / (to.alpha * from.sigma)).powi(2);
        let s = self.eta * to.sigma * (1.0 - shrink).max(0.0).sqrt();
        let kept = (to.sigma.powi(2) - s.powi(2)).max(0.0).sqrt();
        let ratio = kept / from.sigma;
        Ok([ratio, to.alpha - from.alpha * ratio, s])
    }

    /// Mean and standard deviation of the next sample.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for a bad `eta`; those of candle.
    pub fn kernel(&self, d: &Denoised, from: &Level, to: &Level) -> Result<(Tensor, f64)> {
        let [on_x, on_d, s] = self.coefficients(from, to)?;
        match to.sigma == 0.0 {
            true => Ok((clean(d, to)?, s)),
            false => Ok((axpby(on_x, &d.x, on_d, &d.x0)?, s)),
        }
    }
}

impl Stepper for Ddim {
    fn order(&self) -> usize {
        1
    }

    fn name(&self) -> String {
        format!("{self:?}")
    }

    fn step(
        &mut self,
        cx: &StepCx,
        d: &Denoised,
        _: &mut Evaluate,
        noise: &mut Noise,
    ) -> Result<Tensor> {
        let (mean, s) = self.kernel(d, &cx.level, &cx.next)?;
        if s == 0.0 {
            return Ok(mean);
        }
        axpby(1.0, &mean, s, &noise.next(&d.x)?)
    }
}

/// Euler's rule in `x / alpha` over `sigma / alpha`.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Euler;

/// `y + (rho' - rho) slope`, times `alpha'`.
fn along(cx: &StepCx, x: &Tensor, slope: &Tensor, rule: &'static str) -> Result<Tensor> {
    let (from, to) = (&cx.level, &cx.next);
    if from.alpha < MIN_ALPHA {
        return Err(Error::Undetermined {
            what: rule,
            alpha: from.alpha,
            sigma: from.sigma,
            advice: "start at a finite sigma / alpha, or take Ddim or an ODE solver in t",
        });
    }
    let move_by = to.sigma - to.alpha * from.sigma / from.alpha;
    axpby(to.alpha / from.alpha, x, move_by, slope)
}

impl Stepper for Euler {
    fn order(&self) -> usize {
        1
    }

    fn step(
        &mut self,
        cx: &StepCx,
        d: &Denoised,
        _: &mut Evaluate,
        _: &mut Noise,
    ) -> Result<Tensor> {
        match cx.next.sigma == 0.0 {
            true => clean(d, &cx.next),
            false => along(cx, &d.x, &d.eps()?, "a step of Euler"),
        }
    }
}

/// Heun's rule, the second-order sampler of EDM (without its churn).
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Heun;

impl Stepper for Heun {
    fn order(&self) -> usize {
        2
    }

    fn step(
        &mut self,
        cx: &StepCx,
        d: &Denoised,
        eval: &mut Evaluate,
        _: &mut Noise,
    ) -> Result<Tensor> {
        if cx.next.sigma == 0.0 {
            return clean(d, &cx.next);
        }
        let slope = d.eps()?;
        let guess = along(cx, &d.x, &slope, "a step of Heun")?;
        let far = eval(&guess, &cx.next)?.eps()?;
        let mean = axpby(0.5, &slope, 0.5, &far)?;
        along(cx, &d.x, &mean, "a step of Heun")
    }
}

/// How the correction of second order is weighted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Correction {
    /// `(e^-h - 1) / 2`.
    #[default]
    Midpoint,
    /// `-((e^-h - 1) / h + 1)`.
    Heun,
}

/// The second-order multistep solver DPM-Solver++ (2M).
#[derive(Debug, Clone)]
pub struct DpmSolverPP2M {
    /// How the correction is weighted.
    pub variant: Correction,
    /// Grids with fewer steps than this end with a step of first order; 0 never. 15 is usual.
    pub lower_order_final_below: usize,
    previous: Option<(Tensor, Level)>,
}

impl Default for DpmSolverPP2M {
    fn default() -> Self {
        Self::new(Correction::Midpoint, 15)
    }
}

impl DpmSolverPP2M {
    /// A solver; see the fields.
    pub fn new(variant: Correction, lower_order_final_below: usize) -> Self {
        Self {
            variant,
            lower_order_final_below,
            previous: None,
        }
    }
}

/// The weight of `D1` in `x <- ... + weight alpha' D1`.
fn correction(variant: Correction, h: f64) -> f64 {
    match variant {
        Correction::Midpoint => -0.5 * (-h).exp_m1(),
        Correction::Heun => (-h).exp_m1() / h + 1.0,
    }
}

impl Stepper for DpmSolverPP2M {
    fn name(&self) -> String {
        format!("DpmSolverPP2M {:?}", self.variant)
    }

    fn order(&self) -> usize {
        2
    }

    fn reset(&mut self) {
        self.previous = None;
    }

    fn step(
        &mut self,
        cx: &StepCx,
        d: &Denoised,
        _: &mut Evaluate,
        _: &mut Noise,
    ) -> Result<Tensor> {
        let previous = self.previous.replace((d.x0.clone(), cx.level));
        if cx.next.sigma == 0.0 {
            return clean(d, &cx.next);
        }
        let last = cx.step + 1 == cx.steps && cx.steps < self.lower_order_final_below;
        let Some((before, level)) = previous.filter(|_| !last) else {
            return first_order(&d.x, &d.x0, &cx.level, &cx.next);
        };
        let h = cx.next.lambda() - cx.level.lambda();
        let h_before = cx.level.lambda() - level.lambda();
        let weight = cx.next.alpha * correction(self.variant, h) * h / h_before;
        let [on_x, on_d] = weights(&cx.level, &cx.next);
        linear_combination(&[(on_x, &d.x), (on_d + weight, &d.x0), (-weight, &before)])
    }
}

/// The third-order multistep solver DPM-Solver++ (3M): the clean sample as a quadratic in `lambda`
/// through three levels, integrated exactly.
///
/// The weight of its last term is twice that of the code in wide use, which takes the divided
/// difference for the second derivative and has order 2.
#[derive(Debug, Clone, Default)]
pub struct DpmSolverPP3M {
    /// The clean samples of the last two steps, newest first.
    history: Vec<(Tensor, Level)>,
}

impl Stepper for DpmSolverPP3M {
    fn order(&self) -> usize {
        3
    }

    fn reset(&mut self) {
        self.history.clear();
    }

    fn step(
        &mut self,
        cx: &StepCx,
        d: &Denoised,
        _: &mut Evaluate,
        _: &mut Noise,
    ) -> Result<Tensor> {
        let history = self.history.clone();
        self.history.insert(0, (d.x0.clone(), cx.level));
        self.history.truncate(2);
        if cx.next.sigma == 0.0 {
            return clean(d, &cx.next);
        }
        let x = first_order(&d.x, &d.x0, &cx.level, &cx.next)?;
        let h = cx.next.lambda() - cx.level.lambda();
        let Some((d1, l1)) = history.first() else {
            return Ok(x);
        };
        let r0 = (cx.level.lambda() - l1.lambda()) / h;
        let slope0 = (&d.x0 - d1)?.affine(1.0 / r0, 0.0)?;
        let Some((d2, l2)) = history.get(1).filter(|(_, l)| l.lambda().is_finite()) else {
            let weight = cx.next.alpha * correction(Correction::Midpoint, h);
            return Ok((x + slope0.affine(weight, 0.0)?)?);
        };
        let r1 = (l1.lambda() - l2.lambda()) / h;
        let slope1 = (d1 - d2)?.affine(1.0 / r1, 0.0)?;
        let bend = (&slope0 - slope1)?;
        let first = axpby(1.0, &slope0, r0 / (r0 + r1), &bend)?;
        let shrink = (-h).exp_m1();
        // Integrals of s and s^2 under e^-(h (1 - s)) h, with their signs.
        let (w1, w2) = (shrink / h + 1.0, 2.0 * (shrink + h) / (h * h) - 1.0);
        let alpha = cx.next.alpha;
        let second = bend.affine(-alpha * w2 / (r0 + r1), 0.0)?;
        Ok((x + (first.affine(alpha * w1, 0.0)? + second)?)?)
    }
}

/// The second-order singlestep solver DPM-Solver++ (2S). It evaluates the model between the levels
/// of the grid, so it needs the schedule.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DpmSolverPP2S<S> {
    /// The schedule that the grid was made from.
    pub schedule: S,
    /// Where between the two levels the second evaluation is, in `lambda`; 0.5 is usual.
    pub r1: f64,
}

impl<S: Schedule> DpmSolverPP2S<S> {
    /// A solver with its second evaluation half way.
    pub fn new(schedule: S) -> Self {
        Self { schedule, r1: 0.5 }
    }
}

impl<S: Schedule> Stepper for DpmSolverPP2S<S> {
    fn order(&self) -> usize {
        2
    }

    fn step(
        &mut self,
        cx: &StepCx,
        d: &Denoised,
        eval: &mut Evaluate,
        _: &mut Noise,
    ) -> Result<Tensor> {
        let holds = self.r1 > 0.0 && self.r1 <= 1.0;
        check::require(holds, "DpmSolverPP2S::r1", self.r1, "a number in (0, 1]")?;
        if cx.next.sigma == 0.0 {
            return clean(d, &cx.next);
        }
        let (a, b) = (cx.level.lambda(), cx.next.lambda());
        if !a.is_finite() {
            return first_order(&d.x, &d.x0, &cx.level, &cx.next);
        }
        let middle = self.schedule.at_lambda(a + self.r1 * (b - a))?;
        let u = first_order(&d.x, &d.x0, &cx.level, &middle)?;
        let there = eval(&u, &middle)?;
        let weight = -cx.next.alpha * (a - b).exp_m1() / (2.0 * self.r1);
        let [on_x, on_d] = weights(&cx.level, &cx.next);
        linear_combination(&[(on_x, &d.x), (on_d - weight, &d.x0), (weight, &there.x0)])
    }
}

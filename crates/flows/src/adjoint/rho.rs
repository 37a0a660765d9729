//! The probability-flow equation without its linear part.

use crate::condition::Condition;
use crate::denoiser::Denoiser;
use crate::error::{Error, Result};
use crate::level::{Level, Levels};
use crate::ode::{OdeField, Times};
use crate::schedule::Schedule;
use candle_core::Tensor;

/// Which of the two dual forms is integrated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Form {
    /// `y = x / alpha` over `rho = sigma / alpha`, with slope `eps`.
    #[default]
    Noise,
    /// `y = x / sigma` over `xi = alpha / sigma`, with slope `x0`.
    Data,
}

/// At which end the scale of `y` is 1.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Anchor {
    /// At the data: `y = x / alpha` (or `x / sigma`).
    #[default]
    Data,
    /// At this start level: `y = alpha_T x / alpha` over `alpha_T sigma / alpha - sigma_T`, the
    /// coordinates of the authors' code. The solution is the same up to the scale.
    Start(Level),
}

/// The equation of a denoiser under a condition, for any solver of [`ode`](crate::ode) (the
/// adaptive [`Rk45`](crate::ode::Rk45) too).
#[derive(Clone, Copy)]
pub struct RhoOde<'a> {
    denoiser: &'a dyn Denoiser,
    schedule: &'a dyn Schedule,
    condition: &'a Condition,
    form: Form,
    anchor: Anchor,
}

impl<'a> RhoOde<'a> {
    /// The equation in the noise form.
    pub fn new(
        denoiser: &'a dyn Denoiser,
        schedule: &'a dyn Schedule,
        condition: &'a Condition,
    ) -> Self {
        Self {
            denoiser,
            schedule,
            condition,
            form: Form::Noise,
            anchor: Anchor::Data,
        }
    }

    /// Another form.
    #[must_use]
    pub fn form(self, form: Form) -> Self {
        Self { form, ..self }
    }

    /// Another scale.
    #[must_use]
    pub fn anchor(self, anchor: Anchor) -> Self {
        Self { anchor, ..self }
    }

    pub(crate) fn noise_form(&self) -> bool {
        self.form == Form::Noise
    }

    /// Scale of `y`, and what is taken off the time.
    fn anchored(&self) -> (f64, f64) {
        match (self.anchor, self.form) {
            (Anchor::Data, _) => (1.0, 0.0),
            (Anchor::Start(l), Form::Noise) => (l.alpha, l.sigma),
            (Anchor::Start(l), Form::Data) => (l.sigma, l.alpha),
        }
    }

    /// The solver's time at a level: `rho` or `xi`, anchored.
    ///
    /// # Errors
    /// [`Error::Undetermined`] where it is infinite.
    pub fn time(&self, level: &Level) -> Result<f64> {
        let (scale, offset) = self.anchored();
        let (time, advice) = match self.form {
            Form::Noise => (level.rho(), "start at a level with signal"),
            Form::Data => (1.0 / level.rho(), "end at a level with noise"),
        };
        match time.is_finite() {
            true => Ok(scale * time - offset),
            false => Err(Error::Undetermined {
                what: "the time of the reparameterised equation",
                alpha: level.alpha,
                sigma: level.sigma,
                advice,
            }),
        }
    }

    /// The level at a solver's time.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a time that is not positive or outside the schedule.
    pub fn level(&self, time: f64) -> Result<Level> {
        let (scale, offset) = self.anchored();
        let ratio = (time + offset) / scale;
        if !(ratio.is_finite() && ratio > 0.0) {
            return Err(Error::argument(
                "time",
                time,
                "one at which both signal and noise are left",
            ));
        }
        match self.form {
            Form::Noise => self.schedule.at_lambda(-ratio.ln()),
            Form::Data => self.schedule.at_lambda(ratio.ln()),
        }
    }

    /// `dx/dy` at a level.
    pub(crate) fn scale(&self, level: &Level) -> f64 {
        let (scale, _) = self.anchored();
        match self.form {
            Form::Noise => level.alpha / scale,
            Form::Data => level.sigma / scale,
        }
    }

    /// The sample at a level as the solver's state.
    ///
    /// # Errors
    /// Those of candle.
    pub fn state(&self, x: &Tensor, level: &Level) -> Result<Tensor> {
        Ok(x.affine(1.0 / self.scale(level), 0.0)?)
    }

    /// The solver's state at a level as a sample.
    ///
    /// # Errors
    /// Those of candle.
    pub fn sample(&self, y: &Tensor, level: &Level) -> Result<Tensor> {
        Ok(y.affine(self.scale(level), 0.0)?)
    }

    /// The clean sample in a state.
    pub(crate) fn clean(&self, y: &Tensor, level: &Level) -> Result<Tensor> {
        let x = self.sample(y, level)?;
        let levels = Levels::Same(*level);
        Ok(self.denoiser.denoise(&x, &levels, self.condition)?.x0)
    }
}

impl OdeField for RhoOde<'_> {
    fn eval(&self, y: &Tensor, t: &Times) -> Result<Tensor> {
        let Times::Same(t) = t else {
            return Err(Error::unsupported(
                "one time per row in the reparameterised equation",
                "take ErrorNorm::Global",
            ));
        };
        let level = self.level(*t)?;
        let x = self.sample(y, &level)?;
        let levels = Levels::Same(level);
        let d = self.denoiser.denoise(&x, &levels, self.condition)?;
        match self.form {
            Form::Noise => d.eps(),
            Form::Data => Ok(d.x0),
        }
    }
}

//! Grids: the levels that a sampler visits, noise first.

use crate::error::{check, Error, Result};
use crate::level::{mix, Level, Levels};
use crate::schedule::{Ddpm, Schedule};
use candle_core::Tensor;

/// `steps + 1` levels with strictly growing signal-to-noise ratio; only the last may be without
/// noise, only the first without signal.
#[derive(Debug, Clone, PartialEq)]
pub struct Grid(Vec<Level>);

/// Which of a discrete schedule's steps a grid takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Spacing {
    /// Multiples of `train_steps / steps`, plus an offset (1 for Stable Diffusion).
    Leading {
        /// Added to every step.
        offset: usize,
    },
    /// Evenly from the last to the first.
    Linspace,
    /// Counted down from the last; the choice for zero terminal signal-to-noise ratio.
    Trailing,
}

impl Grid {
    /// These levels.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for fewer than two levels, a bad level, or noise that does not
    /// shrink against the signal at every step.
    pub fn custom(levels: Vec<Level>) -> Result<Self> {
        if levels.len() < 2 {
            return Err(Error::argument("levels", levels.len(), "at least 2"));
        }
        levels.iter().try_for_each(Level::validate)?;
        for (i, pair) in levels.windows(2).enumerate() {
            // Cross-multiplied, so that levels without signal or without noise compare too.
            if pair[0].sigma * pair[1].alpha <= pair[1].sigma * pair[0].alpha {
                return Err(Error::argument(
                    "levels",
                    format!("sigma / alpha = {} then {}", pair[0].rho(), pair[1].rho()),
                    format!("less noise after step {i} than before it"),
                ));
            }
        }
        Ok(Self(levels))
    }

    /// Times evenly over the schedule's range.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for no step, and the schedule's.
    pub fn uniform_time(schedule: &dyn Schedule, steps: usize) -> Result<Self> {
        let (from, to) = schedule.range();
        Self::uniform_time_between(schedule, from, to, steps)
    }

    /// Times evenly from `from` to `to`.
    ///
    /// # Errors
    /// As [`uniform_time`](Self::uniform_time).
    pub fn uniform_time_between(
        schedule: &dyn Schedule,
        from: f64,
        to: f64,
        steps: usize,
    ) -> Result<Self> {
        let levels = ramp(from, to, steps)?.map(|t| schedule.level(t));
        Self::custom(levels.collect::<Result<_>>()?)
    }

    /// Square roots of times evenly between those of `from` and `to`: denser where time is small.
    ///
    /// # Errors
    /// As [`uniform_time`](Self::uniform_time); also for a negative time.
    pub fn quadratic_time_between(
        schedule: &dyn Schedule,
        from: f64,
        to: f64,
        steps: usize,
    ) -> Result<Self> {
        check::non_negative("from", from)?;
        check::non_negative("to", to)?;
        let mut levels = ramp(from.sqrt(), to.sqrt(), steps)?
            .map(|root| schedule.level((root * root).clamp(from.min(to), from.max(to))))
            .collect::<Result<Vec<_>>>()?;
        levels[0] = schedule.level(from)?;
        levels[steps] = schedule.level(to)?;
        Self::custom(levels)
    }

    /// `ln(alpha / sigma)` evenly between the levels of two times: the grid on which the solvers
    /// of higher order are at their best.
    ///
    /// # Errors
    /// As [`uniform_time`](Self::uniform_time); also where an end is without noise or signal.
    pub fn uniform_lambda_between(
        schedule: &dyn Schedule,
        from: f64,
        to: f64,
        steps: usize,
    ) -> Result<Self> {
        let (first, last) = (schedule.level(from)?, schedule.level(to)?);
        let (a, b) = (first.lambda(), last.lambda());
        if !(a.is_finite() && b.is_finite()) {
            return Err(Error::argument(
                "range of lambda",
                format!("[{a}, {b}]"),
                "finite ends: both signal and noise",
            ));
        }
        let mut levels = ramp(a, b, steps)?
            .map(|lambda| schedule.at_lambda(lambda.clamp(a.min(b), a.max(b))))
            .collect::<Result<Vec<_>>>()?;
        // The ends themselves, without the detour over the logarithm.
        levels[0] = first;
        levels[steps] = last;
        Self::custom(levels)
    }

    /// [`uniform_lambda_between`](Self::uniform_lambda_between) over the schedule's range.
    ///
    /// # Errors
    /// As there.
    pub fn uniform_lambda(schedule: &dyn Schedule, steps: usize) -> Result<Self> {
        let (from, to) = schedule.range();
        Self::uniform_lambda_between(schedule, from, to, steps)
    }

    /// The grid of Karras et al.: `rho^(1/exponent)` evenly from `rho_max` to `rho_min` in
    /// `steps` levels, then a clean one. The exponent is usually 7.
    ///
    /// # Errors
    /// As [`uniform_time`](Self::uniform_time); also unless `rho_max > rho_min > 0`.
    pub fn karras(
        schedule: &dyn Schedule,
        rho_min: f64,
        rho_max: f64,
        exponent: f64,
        steps: usize,
    ) -> Result<Self> {
        check::at_least_one("steps", steps)?;
        check::positive("rho_min", rho_min)?;
        check::positive("exponent", exponent)?;
        let holds = rho_max.is_finite() && rho_max > rho_min;
        check::require(holds, "rho_max", rho_max, "more than rho_min")?;
        let levels = karras_sigmas(rho_min, rho_max, exponent, steps)
            .map(|rho| schedule.at_lambda(-rho.ln()))
            .collect::<Result<Vec<_>>>()?;
        Self::with_clean_end(levels)
    }

    /// Steps of a discrete schedule, then a clean level.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for no step or more than the schedule has.
    pub fn discrete(schedule: &Ddpm, spacing: Spacing, steps: usize) -> Result<Self> {
        let all = schedule.train_steps();
        if steps == 0 || steps > all {
            return Err(Error::argument("steps", steps, format!("in 1..={all}")));
        }
        let last = (all - 1) as f64;
        let time = |i: usize| match spacing {
            Spacing::Leading { offset } => ((steps - 1 - i) * (all / steps) + offset) as f64,
            Spacing::Linspace if steps == 1 => last,
            Spacing::Linspace => (last * (steps - 1 - i) as f64 / (steps - 1) as f64).round(),
            Spacing::Trailing => (all as f64 * (steps - i) as f64 / steps as f64).round() - 1.0,
        };
        let levels = (0..steps).map(|i| schedule.level(time(i)));
        Self::with_clean_end(levels.collect::<Result<_>>()?)
    }

    /// These levels, then a clean one (`alpha = 1`, `sigma = 0`).
    ///
    /// # Errors
    /// As [`custom`](Self::custom).
    pub fn with_clean_end(mut levels: Vec<Level>) -> Result<Self> {
        let clean = |last: &Level| Level {
            alpha: 1.0,
            sigma: 0.0,
            model_time: last.model_time,
        };
        levels.extend(levels.last().map(clean));
        Self::custom(levels)
    }

    /// The last part of the grid, to start from a noised image instead of noise: of `n` steps,
    /// `floor(n * strength)` are kept.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] unless `strength` is in `(0, 1]` and leaves a step.
    pub fn truncate(&self, strength: f64) -> Result<Self> {
        let kept = (self.steps() as f64 * strength) as usize;
        if !(strength > 0.0 && strength <= 1.0) || kept == 0 {
            let expected = format!("in (0, 1], enough for one of {} steps", self.steps());
            return Err(Error::argument("strength", strength, expected));
        }
        Ok(Self(self.0[self.steps() - kept..].to_vec()))
    }

    /// All levels, noise first.
    pub fn levels(&self) -> &[Level] {
        &self.0
    }

    /// Number of steps: one less than levels.
    pub fn steps(&self) -> usize {
        self.0.len() - 1
    }

    /// The sampler's first state from standard normal noise, `sigma * noise`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn start(&self, noise: &Tensor) -> Result<Tensor> {
        Levels::Same(self.0[0]).scale(noise, |l| l.sigma)
    }

    /// The sampler's first state from data, `alpha * data + sigma * noise`.
    ///
    /// # Errors
    /// [`Error::Shape`] when the two differ in shape.
    pub fn start_from(&self, data: &Tensor, noise: &Tensor) -> Result<Tensor> {
        mix(data, noise, &Levels::Same(self.0[0]))
    }
}

/// `count` values of the grid of Karras et al., descending from `max` to `min`.
pub(crate) fn karras_sigmas(
    min: f64,
    max: f64,
    exponent: f64,
    count: usize,
) -> impl DoubleEndedIterator<Item = f64> {
    let (a, b) = (max.powf(1.0 / exponent), min.powf(1.0 / exponent));
    (0..count).map(move |i| match i {
        0 => max,
        _ if i + 1 == count => min,
        _ => (a + i as f64 / (count - 1) as f64 * (b - a)).powf(exponent),
    })
}

/// `steps + 1` numbers from `from` to `to`, the ends exact.
fn ramp(from: f64, to: f64, steps: usize) -> Result<impl Iterator<Item = f64>> {
    check::at_least_one("steps", steps)?;
    Ok((0..=steps).map(move |i| match i {
        _ if i == steps => to,
        _ => from + (to - from) * (i as f64 / steps as f64),
    }))
}

//! candle-transformers' schedulers as steppers.

use crate::error::{Error, Result};
use crate::grid::Grid;
use crate::guidance::StepCx;
use crate::noise::Noise;
use crate::prediction::{Denoised, Prediction};
use crate::schedule::{Ddpm, Schedule};
use crate::stepper::{Evaluate, Stepper};
use candle_core::Tensor;
use candle_transformers::models::stable_diffusion::schedulers::{Scheduler, SchedulerConfig};

/// One of candle-transformers' schedulers (UniPC, say) in the place of a stepper: guidance and counting
/// are ours, the step is its own.
///
/// Stochastic schedulers of candle-transformers draw their noise themselves, without a seed on the CPU;
/// for reproducible runs take [`Ddim`](crate::Ddim).
pub struct CandleScheduler {
    config: Box<dyn SchedulerConfig>,
    prediction: Prediction,
    steps: usize,
    running: Option<Box<dyn Scheduler>>,
}

impl CandleScheduler {
    /// A scheduler of `steps` steps, with the prediction that its configuration says.
    ///
    /// # Errors
    /// Those of candle-transformers; [`Error::Unsupported`] for a scheduler whose samples are scaled by
    /// more than the noise (`Euler ancestral`: take `Ddim::ancestral()`).
    pub fn new(
        config: Box<dyn SchedulerConfig>,
        prediction: Prediction,
        steps: usize,
    ) -> Result<Self> {
        let first = config.build(steps)?;
        let scale = first.init_noise_sigma();
        if !(0.5..=1.0 + 1e-6).contains(&scale) {
            return Err(Error::unsupported(
                format!("a scheduler whose noise has the standard deviation {scale}"),
                "only variance-preserving ones step the samples of this loop",
            ));
        }
        Ok(Self {
            config,
            prediction,
            steps,
            running: Some(first),
        })
    }

    /// The levels that the scheduler visits, by the schedule that its configuration says, then a clean
    /// one. (What the last step ends at is the scheduler's own affair.)
    ///
    /// # Errors
    /// Those of candle-transformers; [`Error::InvalidArgument`] for times beyond the schedule.
    pub fn grid(&self, schedule: &Ddpm) -> Result<Grid> {
        let scheduler = self.config.build(self.steps)?;
        let last = schedule.train_steps() - 1;
        let level = |t: &usize| schedule.level((*t).min(last) as f64);
        let levels = scheduler.timesteps().iter().map(level);
        Grid::with_clean_end(levels.collect::<Result<_>>()?)
    }
}

impl Stepper for CandleScheduler {
    fn order(&self) -> usize {
        1
    }

    fn reset(&mut self) {
        self.running = None;
    }

    fn step(
        &mut self,
        cx: &StepCx,
        d: &Denoised,
        _: &mut Evaluate,
        _: &mut Noise,
    ) -> Result<Tensor> {
        let mut scheduler = match self.running.take() {
            Some(scheduler) => scheduler,
            None => self.config.build(self.steps)?,
        };
        let found = scheduler.timesteps().get(cx.step).copied();
        let Some(timestep) = found.filter(|_| cx.steps == scheduler.timesteps().len()) else {
            let expected = format!("{}, those of the scheduler", scheduler.timesteps().len());
            return Err(Error::argument("steps of the grid", cx.steps, expected));
        };
        let raw = d.to_raw(self.prediction)?;
        let next = scheduler.step(&raw, timestep, &d.x)?;
        self.running = Some(scheduler);
        Ok(next)
    }
}

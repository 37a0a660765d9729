//! The two stages of DisBack: the path down, and back along it.

use super::{Batch, DistillStats, Path, ScoreDistill};
use crate::condition::Condition;
use crate::error::{check, Error, Result};
use candle_core::{Tensor, Var};
use candle_nn::Optimizer;
use std::collections::HashMap;
use tensor_core::random::RandomStream;

/// Stage 1: trains the fake denoiser, which starts with the teacher's weights, on samples of the frozen
/// student, and keeps its weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DegradationRecorder {
    /// Steps between two snapshots.
    pub interval: usize,
    /// Snapshots after the first one, which is the teacher.
    pub n_checkpoints: usize,
}

impl Default for DegradationRecorder {
    /// Every 100 steps as published for the large latent model, five snapshots.
    fn default() -> Self {
        Self {
            interval: 100,
            n_checkpoints: 5,
        }
    }
}

impl DegradationRecorder {
    /// Checks every field; no snapshot at all is plain score distillation.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`].
    pub fn validate(&self) -> Result<()> {
        check::at_least_one("DegradationRecorder::interval", self.interval)
    }

    /// Fake steps that the recording makes.
    pub fn steps(&self) -> usize {
        self.interval * self.n_checkpoints
    }

    /// Records the path from the fake denoiser's present weights, the teacher's, to its degraded ones,
    /// with which it goes on. `draw` gives latents and condition of a batch.
    ///
    /// # Errors
    /// As [`ScoreDistill::fake_step`], and those of `draw`; [`Error::Unsupported`] where there is a
    /// discriminator, which sees no data here.
    pub fn record<OG: Optimizer, OF: Optimizer>(
        &self,
        distill: &mut ScoreDistill<OG, OF>,
        mut draw: impl FnMut(&mut RandomStream) -> Result<(Tensor, Condition)>,
        rng: &mut RandomStream,
    ) -> Result<Path> {
        self.validate()?;
        let mut path = Path::of(distill.fake_trainer().params().named())?;
        for step in 1..=self.steps() {
            let (z, condition) = draw(rng)?;
            let batch = Batch {
                condition: &condition,
                ..Batch::new(&z)
            };
            let x = distill.samples(&batch)?;
            let draws = distill.fake_draws(&x, &batch, rng)?;
            distill.fake_step(&x, &batch, &draws)?;
            if step.is_multiple_of(self.interval) {
                path.record(distill.fake_trainer().params().named())?;
            }
        }
        Ok(path)
    }
}

/// Which snapshot is the target when.
#[derive(Debug, Clone)]
pub struct Backtracker {
    /// The recorded path in reverse: the most degraded weights first, the teacher last.
    path: Path,
    switch_every: usize,
}

impl Backtracker {
    /// Walks back a recorded path (teacher first), to the next snapshot every `switch_every` iterations.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for an interval of 0, [`Error::InvalidArgument`] for an empty path.
    pub fn new(recorded: &Path, switch_every: usize) -> Result<Self> {
        check::at_least_one("Backtracker::switch_every", switch_every)?;
        match recorded.is_empty() {
            true => Err(Error::argument("path", "empty", "at least the teacher")),
            false => Ok(Self {
                path: recorded.reversed(),
                switch_every,
            }),
        }
    }

    /// Number of targets: all snapshots but the most degraded one, which the fake denoiser starts from.
    /// A path of length one has the teacher for both.
    pub fn targets(&self) -> usize {
        (self.path.len() - 1).max(1)
    }

    /// Which of the targets is due in an iteration, counted from the most degraded one; the last, the
    /// teacher, stays.
    pub fn target_at(&self, iteration: usize) -> usize {
        (iteration / self.switch_every).min(self.targets() - 1)
    }

    /// Sets the fake denoiser's variables to the most degraded weights.
    ///
    /// # Errors
    /// As [`Path::load_into`].
    pub fn load_start(&self, vars: &[(String, Var)]) -> Result<()> {
        self.path.load_into(0, vars)
    }

    /// Sets the target's variables.
    ///
    /// # Errors
    /// As [`Path::load_into`].
    pub fn load_target(&self, target: usize, vars: &[(String, Var)]) -> Result<()> {
        let first = self.path.len() - self.targets();
        self.path.load_into(first + target, vars)
    }
}

/// Stage 2: score distillation whose target walks back along the recorded path. Student, fake denoiser
/// and both optimizers go on unchanged when the target does.
pub struct DisBack<'a, OG, OF> {
    base: ScoreDistill<'a, OG, OF>,
    tracker: Backtracker,
    target_vars: Vec<(String, Var)>,
    loaded: usize,
}

impl<'a, OG: Optimizer, OF: Optimizer> DisBack<'a, OG, OF> {
    /// Takes over the base method, sets the fake denoiser to the end of the recorded path and the target,
    /// whose variables these are, to the snapshot before. 1000 iterations between switches are
    /// published for the large latent model; 100 suffice for small networks.
    ///
    /// # Errors
    /// As [`Backtracker::new`] and [`Path::load_into`].
    pub fn new(
        mut base: ScoreDistill<'a, OG, OF>,
        recorded: Path,
        target_vars: Vec<(String, Var)>,
        switch_every: usize,
    ) -> Result<Self> {
        let tracker = Backtracker::new(&recorded, switch_every)?;
        tracker.load_start(base.fake_trainer().params().named())?;
        let loaded = tracker.target_at(base.iteration());
        tracker.load_target(loaded, &target_vars)?;
        Ok(Self {
            base,
            tracker,
            target_vars,
            loaded,
        })
    }

    /// One iteration of the base method against the target that is due.
    ///
    /// # Errors
    /// As [`ScoreDistill::step`] and [`Path::load_into`].
    pub fn step(&mut self, batch: &Batch, rng: &mut RandomStream) -> Result<DistillStats> {
        self.load_due()?;
        self.base.step(batch, rng)
    }

    /// Runs until this many iterations are made, with latents and conditions from `draw`; `watch` sees
    /// each iteration and ends the run early where it returns `false`.
    ///
    /// # Errors
    /// As [`step`](Self::step), and those of `draw` and `watch`.
    pub fn train(
        &mut self,
        iterations: usize,
        mut draw: impl FnMut(&mut RandomStream) -> Result<(Tensor, Condition)>,
        rng: &mut RandomStream,
        mut watch: impl FnMut(usize, &DistillStats) -> Result<bool>,
    ) -> Result<()> {
        while self.base.iteration() < iterations {
            let (z, condition) = draw(rng)?;
            let batch = Batch {
                condition: &condition,
                ..Batch::new(&z)
            };
            let stats = self.step(&batch, rng)?;
            if !watch(self.base.iteration() - 1, &stats)? {
                break;
            }
        }
        Ok(())
    }

    /// The target of the last iteration, counted from the most degraded one.
    pub fn target(&self) -> usize {
        self.loaded
    }

    /// The schedule of targets.
    pub fn tracker(&self) -> &Backtracker {
        &self.tracker
    }

    /// The base method: its iterations, its trainers.
    pub fn base(&mut self) -> &mut ScoreDistill<'a, OG, OF> {
        &mut self.base
    }

    /// As [`ScoreDistill::state`]; the target follows from the iteration, the path is saved by itself.
    ///
    /// # Errors
    /// Those of candle.
    pub fn state(&self) -> Result<HashMap<String, Tensor>> {
        self.base.state()
    }

    /// Goes on from what [`state`](Self::state) gave, with the same bits, once the variables and the
    /// optimizers have their values back.
    ///
    /// # Errors
    /// As [`ScoreDistill::load_state`].
    pub fn load_state(&mut self, state: &HashMap<String, Tensor>) -> Result<()> {
        self.base.load_state(state)?;
        self.load_due()
    }

    fn load_due(&mut self) -> Result<()> {
        let due = self.tracker.target_at(self.base.iteration());
        if due != self.loaded {
            tracing::debug!(
                target = due,
                iteration = self.base.iteration(),
                "next target"
            );
            self.tracker.load_target(due, &self.target_vars)?;
            self.loaded = due;
        }
        Ok(())
    }
}

//! The base method: a student and a fake denoiser in turn.

use super::matching::{
    discriminator_loss, fake_loss, generate, generator_gan_loss, matching, Matching,
};
use super::{GanConfig, OneStepGenerator, ScoreDistillConfig};
use crate::condition::Condition;
use crate::denoiser::Denoiser;
use crate::error::{check, Error, Result};
use crate::level::{mix, Level, Levels, MIN_ALPHA};
use crate::train::{TrainConfig, Trainer};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::Optimizer;
use std::collections::HashMap;
use tensor_core::random::RandomStream;

/// A network that is trained: the model, its variables, and the optimizer that has been given them
/// (AdamW with `beta = (0.9, 0.999)` and a decay of 0.01 as published).
pub struct Player<'a, M: ?Sized, O> {
    /// The model.
    pub model: &'a M,
    /// Its variables by name.
    pub vars: Vec<(String, Var)>,
    /// Over these variables.
    pub optimizer: O,
}

/// Logits `[rows, ...]` of "this is data" from noisy samples, from the features of the fake denoiser and
/// a head whose variables are among the fake player's.
pub type Discriminator<'a> = &'a dyn Fn(&Tensor, &Levels, &Condition) -> Result<Tensor>;

/// What an iteration starts from.
#[derive(Debug, Clone, Copy)]
pub struct Batch<'b> {
    /// Latents of the student, `[rows, ...]`.
    pub z: &'b Tensor,
    /// What the samples are conditioned on.
    pub condition: &'b Condition,
    /// Data and its condition, for the discriminator.
    pub real: Option<(&'b Tensor, &'b Condition)>,
}

impl<'b> Batch<'b> {
    /// Unconditional latents.
    pub fn new(z: &'b Tensor) -> Self {
        Self {
            z,
            condition: &Condition::Null,
            real: None,
        }
    }
}

/// Where samples are made noisy: an index into the levels for each row, and standard normal noise.
#[derive(Debug, Clone)]
pub struct Draw {
    /// One index per row.
    pub indices: Vec<u32>,
    /// In the shape of the samples.
    pub noise: Tensor,
}

/// The draws of a fake step.
#[derive(Debug, Clone)]
pub struct FakeDraws {
    /// Of the denoiser's loss.
    pub denoise: Draw,
    /// Of the discriminator's: for data, and for the student's samples.
    pub discriminate: Option<(Draw, Draw)>,
}

/// What a step of the student saw.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GeneratorStats {
    /// `mean |g|^2 / 2`.
    pub loss: f64,
    /// `mean softplus(-D(fake))`, where there is a discriminator.
    pub gan_loss: Option<f64>,
    /// The norm of all gradients before clipping.
    pub grad_norm: f64,
}

/// What a step of the fake denoiser saw.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FakeStats {
    /// The loss, the discriminator's part included.
    pub loss: f64,
    /// The norm of all gradients before clipping.
    pub grad_norm: f64,
}

/// What an iteration saw.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DistillStats {
    /// The student's step, in iterations that have one.
    pub generator: Option<GeneratorStats>,
    /// The fake denoiser's.
    pub fake: FakeStats,
}

/// Score distillation with a fixed target: Diff-Instruct and DMD. See the [module](super) page.
pub struct ScoreDistill<'a, OG, OF> {
    config: ScoreDistillConfig,
    levels: Vec<Level>,
    generator: &'a dyn OneStepGenerator,
    fake: &'a dyn Denoiser,
    target: &'a dyn Denoiser,
    discriminator: Option<Discriminator<'a>>,
    generator_trainer: Trainer<OG>,
    fake_trainer: Trainer<OF>,
    iteration: usize,
}

impl<'a, OG: Optimizer, OF: Optimizer> ScoreDistill<'a, OG, OF> {
    /// A run over these levels, noise growing. The fake denoiser should have the teacher's weights.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`]; [`Error::InvalidArgument`] unless there are two levels or more, all with
    /// signal and noise, with growing `sigma / alpha`; variables that share memory.
    pub fn new(
        config: ScoreDistillConfig,
        levels: Vec<Level>,
        generator: Player<'a, dyn OneStepGenerator + 'a, OG>,
        fake: Player<'a, dyn Denoiser + 'a, OF>,
        target: &'a dyn Denoiser,
    ) -> Result<Self> {
        config.validate()?;
        levels.iter().try_for_each(Level::validate)?;
        let usable = |l: &Level| l.alpha >= MIN_ALPHA && l.sigma > 0.0;
        let growing = levels.windows(2).all(|w| w[0].rho() < w[1].rho());
        if levels.len() < 2 || !growing || !levels.iter().all(usable) {
            return Err(Error::argument(
                "levels",
                format!("{} levels", levels.len()),
                "two or more with signal and noise, sigma / alpha growing",
            ));
        }
        let train = |lr: f64, ema_decay: f64| TrainConfig {
            lr,
            warmup: config.warmup,
            ema_decay,
            grad_clip: Some(config.max_grad_norm),
        };
        let slow = train(config.gen_lr, config.gen_ema);
        Ok(Self {
            generator_trainer: Trainer::new(generator.vars, generator.optimizer, slow)?,
            fake_trainer: Trainer::new(fake.vars, fake.optimizer, train(config.fake_lr, 0.0))?,
            config,
            levels,
            generator: generator.model,
            fake: fake.model,
            target,
            discriminator: None,
            iteration: 0,
        })
    }

    /// Adds the discriminator that [`ScoreDistillConfig::gan`] weighs.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] without those weights.
    pub fn discriminator(mut self, discriminator: Discriminator<'a>) -> Result<Self> {
        let holds = self.config.gan.is_some();
        check::require(holds, "ScoreDistillConfig::gan", "None", "its weights")?;
        self.discriminator = Some(discriminator);
        Ok(self)
    }

    /// Iterations so far.
    pub fn iteration(&self) -> usize {
        self.iteration
    }

    /// The levels.
    pub fn levels(&self) -> &[Level] {
        &self.levels
    }

    /// The student's training: learning rate, averaged weights.
    pub fn generator_trainer(&mut self) -> &mut Trainer<OG> {
        &mut self.generator_trainer
    }

    /// The fake denoiser's.
    pub fn fake_trainer(&mut self) -> &mut Trainer<OF> {
        &mut self.fake_trainer
    }

    /// One iteration: a step of the student where it is due, then one of the fake denoiser on the same
    /// samples with noise of its own.
    ///
    /// # Errors
    /// [`Error::NonFinite`] naming what is no number and the iteration: the network that it belongs to is
    /// not changed; [`Error::Core`] naming variables without a gradient; those of the models.
    pub fn step(&mut self, batch: &Batch, rng: &mut RandomStream) -> Result<DistillStats> {
        let x = generate(self.generator, batch.z, batch.condition)?;
        let due = self
            .iteration
            .is_multiple_of(self.config.fake_updates_per_gen);
        let generator = match due {
            true => {
                let draw = self.generator_draw(&x, rng)?;
                let gan = match self.gan()? {
                    Some((gan, _)) => Some(self.draw(&x, 0, gan.max_index, rng)?),
                    None => None,
                };
                Some(self.update_generator(&x, batch.condition, &draw, gan.as_ref())?)
            }
            false => None,
        };
        let draws = self.fake_draws(&x, batch, rng)?;
        let fake = self.fake_step(&x, batch, &draws)?;
        self.iteration += 1;
        Ok(DistillStats { generator, fake })
    }

    /// The student's samples, without a graph.
    ///
    /// # Errors
    /// Those of the student.
    pub fn samples(&self, batch: &Batch) -> Result<Tensor> {
        Ok(generate(self.generator, batch.z, batch.condition)?.detach())
    }

    /// One step of the student alone, with given noise; `gan` is the discriminator's.
    ///
    /// # Errors
    /// As [`step`](Self::step); [`Error::InvalidArgument`] without the discriminator's draw.
    pub fn gen_step(
        &mut self,
        z: &Tensor,
        condition: &Condition,
        draw: &Draw,
        gan: Option<&Draw>,
    ) -> Result<GeneratorStats> {
        let x = generate(self.generator, z, condition)?;
        self.update_generator(&x, condition, draw, gan)
    }

    /// One step of the fake denoiser alone, on given samples (detached here) with given noise. The
    /// batch's latents are not read.
    ///
    /// # Errors
    /// As [`step`](Self::step); [`Error::InvalidArgument`] where there is a discriminator and data or
    /// its draws are missing.
    pub fn fake_step(&mut self, x: &Tensor, batch: &Batch, draws: &FakeDraws) -> Result<FakeStats> {
        let x = x.detach();
        let levels = self.at(&draws.denoise)?;
        let (noise, sigma_data) = (&draws.denoise.noise, self.config.sigma_data);
        let mut loss = fake_loss(self.fake, &x, noise, &levels, sigma_data, batch.condition)?;
        if let Some((gan, logits)) = self.gan()? {
            let (real, real_condition) = batch.real.ok_or_else(|| needs("data in the batch"))?;
            let draws = draws.discriminate.as_ref();
            let (real_draw, fake_draw) = draws.ok_or_else(|| needs("draws"))?;
            let real = self.logits(logits, real, real_condition, real_draw)?;
            let fake = self.logits(logits, &x, batch.condition, fake_draw)?;
            loss = (loss + discriminator_loss(&real, &fake)?.affine(gan.disc_weight, 0.0)?)?;
        }
        let step = self.fake_trainer.step(&loss)?;
        Ok(FakeStats {
            loss: step.loss,
            grad_norm: step.grad_norm,
        })
    }

    /// A draw for the student's step: levels of the inner part of the grid.
    ///
    /// # Errors
    /// Those of candle.
    pub fn generator_draw(&self, x: &Tensor, rng: &mut RandomStream) -> Result<Draw> {
        let (low, high) = self.config.step_range(self.levels.len());
        self.draw(x, low, high, rng)
    }

    /// Draws for a fake step: levels of the whole grid.
    ///
    /// # Errors
    /// Those of candle; [`Error::InvalidArgument`] where a discriminator lacks data.
    pub fn fake_draws(
        &self,
        x: &Tensor,
        batch: &Batch,
        rng: &mut RandomStream,
    ) -> Result<FakeDraws> {
        let denoise = self.draw(x, 0, self.levels.len() - 1, rng)?;
        let discriminate = match self.gan()? {
            None => None,
            Some((gan, _)) => {
                let (real, _) = batch.real.ok_or_else(|| needs("data in the batch"))?;
                let on_data = self.draw(real, 0, gan.max_index, rng)?;
                Some((on_data, self.draw(x, 0, gan.max_index, rng)?))
            }
        };
        Ok(FakeDraws {
            denoise,
            discriminate,
        })
    }

    /// The averaged weights and step counts of both networks and the number of iterations, for a
    /// checkpoint beside the variables and the optimizers' own state.
    ///
    /// # Errors
    /// Those of candle.
    pub fn state(&self) -> Result<HashMap<String, Tensor>> {
        let mut state = HashMap::new();
        let parts = [
            ("generator", self.generator_trainer.state()?),
            ("fake", self.fake_trainer.state()?),
        ];
        for (prefix, part) in parts {
            state.extend(part.into_iter().map(|(k, v)| (format!("{prefix}.{k}"), v)));
        }
        let iteration = Tensor::new(&[self.iteration as i64], &Device::Cpu)?;
        state.insert("iteration".into(), iteration);
        Ok(state)
    }

    /// Goes on from what [`state`](Self::state) gave, with the same bits.
    ///
    /// # Errors
    /// As [`Trainer::load_state`].
    pub fn load_state(&mut self, state: &HashMap<String, Tensor>) -> Result<()> {
        let missing = || Error::argument("state", "iteration", "a tensor of this name");
        let iteration = state
            .get("iteration")
            .ok_or_else(missing)?
            .to_vec1::<i64>()?;
        let iteration = iteration.first().and_then(|n| usize::try_from(*n).ok());
        let iteration = iteration.ok_or_else(missing)?;
        let part = |prefix: &str| -> HashMap<String, Tensor> {
            let own =
                |(k, v): (&String, &Tensor)| Some((k.strip_prefix(prefix)?.into(), v.clone()));
            state.iter().filter_map(own).collect()
        };
        self.generator_trainer.load_state(&part("generator."))?;
        self.fake_trainer.load_state(&part("fake."))?;
        self.iteration = iteration;
        Ok(())
    }

    fn gan(&self) -> Result<Option<(GanConfig, Discriminator<'a>)>> {
        match (self.config.gan, self.discriminator) {
            (Some(_), None) => Err(Error::unsupported(
                "ScoreDistillConfig::gan without a discriminator",
                "give one with ScoreDistill::discriminator",
            )),
            (gan, discriminator) => Ok(gan.zip(discriminator)),
        }
    }

    fn draw(&self, x: &Tensor, low: usize, high: usize, rng: &mut RandomStream) -> Result<Draw> {
        let high = high.min(self.levels.len() - 1);
        let one = |_| Ok::<_, Error>((low + rng.below(high - low + 1)?) as u32);
        let indices = (0..check::rows("x", x)?).map(one).collect::<Result<_>>()?;
        let noise = rng.normal(0.0, 1.0, x.shape(), x.dtype(), x.device())?;
        Ok(Draw { indices, noise })
    }

    fn at(&self, draw: &Draw) -> Result<Levels> {
        let count = self.levels.len();
        let one = |i: &u32| {
            let level = self.levels.get(*i as usize).copied();
            level.ok_or_else(|| Error::argument("index of a level", i, format!("below {count}")))
        };
        let levels = draw.indices.iter().map(one).collect::<Result<_>>()?;
        Ok(Levels::PerRow(levels))
    }

    fn logits(
        &self,
        discriminator: Discriminator,
        x: &Tensor,
        condition: &Condition,
        draw: &Draw,
    ) -> Result<Tensor> {
        let levels = self.at(draw)?;
        discriminator(&mix(x, &draw.noise, &levels)?, &levels, condition)
    }

    /// The student's gradient at samples, without a step.
    ///
    /// # Errors
    /// As [`matching`].
    pub fn matching(&self, x: &Tensor, condition: &Condition, draw: &Draw) -> Result<Matching> {
        let (pair, weight) = ((self.target, self.fake), self.config.weight);
        matching(pair, x, &draw.noise, &self.at(draw)?, weight, condition)
    }

    fn update_generator(
        &mut self,
        x: &Tensor,
        condition: &Condition,
        draw: &Draw,
        gan: Option<&Draw>,
    ) -> Result<GeneratorStats> {
        let found = self.matching(x, condition, draw)?;
        let loss = found.loss()?;
        if !loss.is_finite() {
            return Err(Error::NonFinite {
                what: "the difference of fake and target denoiser".into(),
                step: self.iteration,
            });
        }
        let mut scalar = found.surrogate(x)?;
        let mut gan_loss = None;
        if let Some((weights, logits)) = self.gan()? {
            let draw = gan.ok_or_else(|| needs("a draw"))?;
            let term = generator_gan_loss(&self.logits(logits, x, condition, draw)?)?;
            gan_loss = Some(term.to_dtype(DType::F64)?.to_scalar()?);
            scalar = (scalar + term.affine(weights.gen_weight, 0.0)?)?;
        }
        let step = self.generator_trainer.step(&scalar)?;
        Ok(GeneratorStats {
            loss,
            gan_loss,
            grad_norm: step.grad_norm,
        })
    }
}

fn needs(what: &'static str) -> Error {
    Error::argument("discriminator", "no samples to judge", what)
}

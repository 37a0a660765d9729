//! Levels, weights and learning rates of score distillation.

use crate::error::{check, Result};
use crate::grid::karras_sigmas;
use crate::level::Level;
use crate::schedule::Edm;

/// The noise levels of Karras et al. in ASCENDING order: index 0 has `min`, index `n - 1` has `max`.
///
/// ```text
/// sigma_{n-1-i} = (max^(1/rho) + i / (n - 1) (min^(1/rho) - max^(1/rho)))^rho
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct KarrasSigmas {
    /// How many.
    pub n: usize,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
    /// The exponent.
    pub rho: f64,
}

impl Default for KarrasSigmas {
    fn default() -> Self {
        Self {
            n: 1000,
            min: 0.002,
            max: 80.0,
            rho: 7.0,
        }
    }
}

impl KarrasSigmas {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`](crate::Error::InvalidConfig).
    pub fn validate(&self) -> Result<()> {
        check::require(self.n >= 2, "KarrasSigmas::n", self.n, "at least 2")?;
        check::positive("KarrasSigmas::min", self.min)?;
        let holds = self.max.is_finite() && self.max > self.min;
        check::require(holds, "KarrasSigmas::max", self.max, "more than min")?;
        check::positive("KarrasSigmas::rho", self.rho)
    }

    /// The standard deviations, ascending, the ends exact.
    ///
    /// # Errors
    /// As [`validate`](Self::validate).
    pub fn sigmas(&self) -> Result<Vec<f64>> {
        self.validate()?;
        Ok(karras_sigmas(self.min, self.max, self.rho, self.n)
            .rev()
            .collect())
    }

    /// The same as levels of a variance-exploding process.
    ///
    /// # Errors
    /// As [`validate`](Self::validate).
    pub fn levels(&self) -> Result<Vec<Level>> {
        self.sigmas()?.into_iter().map(Edm::at_sigma).collect()
    }
}

/// The weight `w` of a difference of scores.
#[derive(Debug, Clone, Copy)]
pub enum WeightFn {
    /// 1
    One,
    /// `sigma^2`: with `alpha = 1` this is the difference of the clean samples.
    SigmaSquared,
    /// One's own.
    Custom(fn(&Level) -> f64),
}

impl WeightFn {
    /// The weight at a level.
    pub fn at(&self, level: &Level) -> f64 {
        match self {
            Self::One => 1.0,
            Self::SigmaSquared => level.sigma.powi(2),
            Self::Custom(weight) => weight(level),
        }
    }
}

/// How the student's gradient is scaled.
#[derive(Debug, Clone, Copy)]
pub enum GradWeight {
    /// DMD: `(D_phi - D_target) / mean|x - D_target|`, the mean over each row. Rows whose denominator
    /// is no larger than `1e-12 (1 + max|x|)` get no gradient.
    DmdL1Norm,
    /// Diff-Instruct: `w(sigma) (s_phi - s_target)`.
    DiffInstruct(WeightFn),
}

/// The optional discriminator on the fake denoiser's features.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GanConfig {
    /// Weight of `mean softplus(-D(fake))` in the student's loss.
    pub gen_weight: f64,
    /// Weight of `mean[softplus(D(fake)) + softplus(-D(real))]` in the fake denoiser's loss.
    pub disc_weight: f64,
    /// The discriminator sees samples at levels drawn evenly from `0..=max_index`.
    pub max_index: usize,
}

impl Default for GanConfig {
    fn default() -> Self {
        Self {
            gen_weight: 5e-3,
            disc_weight: 1e-2,
            max_index: 0,
        }
    }
}

/// Settings of [`ScoreDistill`](super::ScoreDistill).
#[derive(Debug, Clone, Copy)]
pub struct ScoreDistillConfig {
    /// Learning rate of the student.
    pub gen_lr: f64,
    /// Learning rate of the fake denoiser.
    pub fake_lr: f64,
    /// Iterations (one fake step each) per step of the student; 1 for EDM, 5 for large latent models.
    pub fake_updates_per_gen: usize,
    /// The student's levels begin at the index `floor(min_step_pct n)`.
    pub min_step_pct: f64,
    /// They end at the index `min(floor(max_step_pct n), n - 1)`, inclusive.
    pub max_step_pct: f64,
    /// How the student's gradient is scaled.
    pub weight: GradWeight,
    /// Largest norm of all gradients of either network.
    pub max_grad_norm: f64,
    /// Steps of linear warm-up of both learning rates.
    pub warmup: usize,
    /// Standard deviation of the data, in the weight of the fake denoiser's loss.
    pub sigma_data: f64,
    /// Decay of the student's averaged weights; 0 for none.
    pub gen_ema: f64,
    /// The discriminator, where there is one.
    pub gan: Option<GanConfig>,
}

impl Default for ScoreDistillConfig {
    /// The published learning rates of the large latent model; small networks want 1e-4 to 1e-3.
    fn default() -> Self {
        Self {
            gen_lr: 5e-7,
            fake_lr: 5e-7,
            fake_updates_per_gen: 1,
            min_step_pct: 0.02,
            max_step_pct: 0.98,
            weight: GradWeight::DmdL1Norm,
            max_grad_norm: 10.0,
            warmup: 500,
            sigma_data: 0.5,
            gen_ema: 0.0,
            gan: None,
        }
    }
}

impl ScoreDistillConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`](crate::Error::InvalidConfig).
    pub fn validate(&self) -> Result<()> {
        check::non_negative("ScoreDistillConfig::gen_lr", self.gen_lr)?;
        check::non_negative("ScoreDistillConfig::fake_lr", self.fake_lr)?;
        let updates = self.fake_updates_per_gen;
        check::at_least_one("ScoreDistillConfig::fake_updates_per_gen", updates)?;
        let (low, high) = (self.min_step_pct, self.max_step_pct);
        let holds = (0.0..1.0).contains(&low);
        check::require(holds, "ScoreDistillConfig::min_step_pct", low, "in [0, 1)")?;
        let holds = high >= low && high <= 1.0;
        let expected = "in [min_step_pct, 1]";
        check::require(holds, "ScoreDistillConfig::max_step_pct", high, expected)?;
        check::positive("ScoreDistillConfig::max_grad_norm", self.max_grad_norm)?;
        check::positive("ScoreDistillConfig::sigma_data", self.sigma_data)?;
        let holds = (0.0..1.0).contains(&self.gen_ema);
        check::require(
            holds,
            "ScoreDistillConfig::gen_ema",
            self.gen_ema,
            "in [0, 1)",
        )?;
        if let Some(gan) = &self.gan {
            check::non_negative("GanConfig::gen_weight", gan.gen_weight)?;
            check::positive("GanConfig::disc_weight", gan.disc_weight)?;
        }
        Ok(())
    }

    /// The first and the last index (both inclusive) of the student's levels among `n`.
    pub fn step_range(&self, n: usize) -> (usize, usize) {
        let at = |part: f64| ((part * n as f64).floor() as usize).min(n.saturating_sub(1));
        (at(self.min_step_pct), at(self.max_step_pct))
    }
}

//! Settings of [`Cbo`](super::Cbo).

use crate::error::check;
use crate::Result;

/// How the noise of a particle is scaled by its distance from the consensus.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Diffusion {
    /// By the Euclidean distance, in all coordinates alike: explores everywhere, and needs
    /// `2 lambda > d sigma^2` to contract.
    #[default]
    Isotropic,
    /// By the distance in each coordinate: contracts in any dimension.
    Anisotropic,
    /// No noise.
    None,
}

/// A drift down the gradient, beside the one to the consensus.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GradientDrift {
    /// Strength `gamma`.
    pub gamma: f64,
    /// Learning rate; multiplied by `gamma` and by the time step.
    pub learning_rate: f64,
    /// Half-width of the central differences where the objective gives no gradient (`2 d` more
    /// evaluations per particle and step).
    pub fd_step: f64,
}

impl Default for GradientDrift {
    fn default() -> Self {
        Self {
            gamma: 1.0,
            learning_rate: 1.0,
            fd_step: 1e-3,
        }
    }
}

/// When a particle's memory takes over its position.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Acceptance {
    /// Entirely, if the position's energy is strictly lower.
    Heaviside,
    /// By `Y <- Y + kappa dt (X - Y) (1 + tanh(beta (E(Y) - E(X)))) / 2` with this `beta`.
    Tanh(f64),
}

/// Particles that remember where they were best; the consensus is then that of the memories.
///
/// Energies of memories are cached: an objective that changes between steps needs
/// [`Cbo::forget_energies`](super::Cbo::forget_energies).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Memory {
    /// Drift `lambda_2` towards the own memory.
    pub lambda2: f64,
    /// Noise `sigma_2` scaled by the distance from the own memory.
    pub sigma2: f64,
    /// The form of that noise.
    pub diffusion2: Diffusion,
    /// Rate `kappa` of the memory; only for [`Acceptance::Tanh`].
    pub kappa: f64,
    /// When the memory moves.
    pub acceptance: Acceptance,
}

impl Default for Memory {
    fn default() -> Self {
        Self {
            lambda2: 0.4,
            sigma2: 0.0,
            diffusion2: Diffusion::Anisotropic,
            kappa: 100.0,
            acceptance: Acceptance::Heaviside,
        }
    }
}

/// Which particles move when a batch of them has found its consensus.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BatchUpdate {
    /// All.
    Full,
    /// Those of the batch.
    Partial,
}

/// A step over random batches of particles, one after the other. The particles are permuted for
/// good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Batching {
    /// Particles of a batch; the last one may be smaller.
    pub particles: usize,
    /// Which particles move.
    pub update: BatchUpdate,
}

/// Changes at the end of epoch `e = 1, 2, ...`
/// ([`Cbo::end_epoch`](super::Cbo::end_epoch)).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cooling {
    /// `sigma <- sigma log2(e + 1) / log2(e + 2)`.
    pub sigma: bool,
    /// `alpha <- alpha_factor alpha`.
    pub alpha_factor: f64,
}

impl Default for Cooling {
    fn default() -> Self {
        Self {
            sigma: true,
            alpha_factor: 2.0,
        }
    }
}

/// What happens to a coordinate that leaves the box.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BoundsRule {
    /// It is set to the nearest bound.
    Clamp,
    /// It is mirrored at the bound (and clamped where it went further than the box is wide).
    Reflect,
}

/// A box that particles stay in.
#[derive(Debug, Clone, PartialEq)]
pub struct Bounds {
    /// Lower ends: one for all coordinates, or one each.
    pub low: Vec<f64>,
    /// Upper ends: one for all coordinates, or one each.
    pub high: Vec<f64>,
    /// What happens at the ends.
    pub rule: BoundsRule,
}

/// Settings of [`Cbo`](super::Cbo).
#[derive(Debug, Clone, PartialEq)]
pub struct CboConfig {
    /// Drift `lambda` towards the consensus.
    pub lambda: f64,
    /// Noise `sigma`.
    pub sigma: f64,
    /// Inverse temperature `alpha` of the weights.
    pub alpha: f64,
    /// Time step.
    pub dt: f64,
    /// The form of the noise.
    pub diffusion: Diffusion,
    /// Bound `M` on the distance by which the noise is scaled.
    pub truncation: Option<f64>,
    /// A drift down the gradient.
    pub gradient_drift: Option<GradientDrift>,
    /// Particles with memory.
    pub memory: Option<Memory>,
    /// Steps over batches of particles; not together with `memory` or `gradient_drift`.
    pub batching: Option<Batching>,
    /// With `batching`: all particles get noise `sigma sqrt(dt) xi` when no coordinate of the
    /// consensus has moved by this much since the batch before (1e-5 is usual).
    pub stall_kick: Option<f64>,
    /// Changes at the end of an epoch.
    pub cooling: Option<Cooling>,
    /// Speed `mu` in `[0, 1)` (0.2 is usual) with which an epoch's loss of variance removes
    /// particles at its end.
    pub particle_reduction: Option<f64>,
    /// Chooses `alpha` at each step so that the effective number of particles is this fraction of
    /// all, instead of `alpha` itself.
    pub effective_fraction: Option<f64>,
    /// A box that particles stay in.
    pub bounds: Option<Bounds>,
    /// Steps of [`Cbo::run`](super::Cbo::run), at most.
    pub max_steps: usize,
    /// Evaluations of the objective, at most: `run` begins no step that would exceed it.
    pub max_evaluations: Option<u64>,
    /// `run` ends when the particles' root mean square distance from the consensus is at most
    /// this.
    pub tol: f64,
    /// `run` ends when some particle's energy is at most this.
    pub target_energy: Option<f64>,
}

impl Default for CboConfig {
    fn default() -> Self {
        Self {
            lambda: 1.0,
            sigma: 1.0,
            alpha: 100.0,
            dt: 0.01,
            diffusion: Diffusion::Isotropic,
            truncation: None,
            gradient_drift: None,
            memory: None,
            batching: None,
            stall_kick: None,
            cooling: None,
            particle_reduction: None,
            effective_fraction: None,
            bounds: None,
            max_steps: 1000,
            max_evaluations: None,
            tol: 0.0,
            target_energy: None,
        }
    }
}

impl CboConfig {
    /// Whether the mean-field limit contracts in `d` dimensions: `2 lambda > d sigma^2` with
    /// isotropic noise, `2 lambda > sigma^2` with anisotropic.
    pub fn contracts(&self, d: usize) -> bool {
        let noise = match self.diffusion {
            Diffusion::Isotropic => d as f64,
            Diffusion::Anisotropic => 1.0,
            Diffusion::None => 0.0,
        };
        2.0 * self.lambda > noise * self.sigma * self.sigma
    }

    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`](crate::Error::InvalidConfig) that names the first bad one.
    pub fn validate(&self) -> Result<()> {
        check::non_negative("CboConfig::lambda", self.lambda)?;
        check::non_negative("CboConfig::sigma", self.sigma)?;
        check::non_negative("CboConfig::alpha", self.alpha)?;
        check::positive("CboConfig::dt", self.dt)?;
        if let Some(bound) = self.truncation {
            let holds = bound >= 0.0;
            check::require(holds, "CboConfig::truncation", bound, "a number >= 0")?;
        }
        check::non_negative("CboConfig::tol", self.tol)?;
        self.validate_parts()?;
        self.validate_epochs()
    }

    fn validate_parts(&self) -> Result<()> {
        if let Some(drift) = self.gradient_drift {
            check::non_negative("GradientDrift::gamma", drift.gamma)?;
            check::non_negative("GradientDrift::learning_rate", drift.learning_rate)?;
            check::positive("GradientDrift::fd_step", drift.fd_step)?;
        }
        if let Some(memory) = self.memory {
            check::non_negative("Memory::lambda2", memory.lambda2)?;
            check::non_negative("Memory::sigma2", memory.sigma2)?;
            check::non_negative("Memory::kappa", memory.kappa)?;
            if let Acceptance::Tanh(beta) = memory.acceptance {
                check::non_negative("Acceptance::Tanh", beta)?;
            }
        }
        if let Some(batching) = self.batching {
            check::at_least_one("Batching::particles", batching.particles)?;
            let alone = self.memory.is_none() && self.gradient_drift.is_none();
            let expected = "no memory and no gradient drift beside it";
            check::require(alone, "CboConfig::batching", batching, expected)?;
        }
        if let Some(fraction) = self.effective_fraction {
            let holds = fraction > 0.0 && fraction <= 1.0;
            let field = "CboConfig::effective_fraction";
            check::require(holds, field, fraction, "a number in (0, 1]")?;
        }
        Ok(())
    }

    fn validate_epochs(&self) -> Result<()> {
        if let Some(threshold) = self.stall_kick {
            check::non_negative("CboConfig::stall_kick", threshold)?;
            let batched = self.batching.is_some();
            check::require(
                batched,
                "CboConfig::stall_kick",
                threshold,
                "batching beside it",
            )?;
        }
        if let Some(cooling) = self.cooling {
            check::positive("Cooling::alpha_factor", cooling.alpha_factor)?;
        }
        if let Some(speed) = self.particle_reduction {
            check::rate("CboConfig::particle_reduction", speed)?;
        }
        Ok(())
    }
}

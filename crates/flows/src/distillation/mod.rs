//! One-step generators from a trained diffusion model or flow, by score distillation along a
//! backtracked path of intermediate teachers.
//!
//! *Distribution Backtracking Builds A Faster Convergence Trajectory for One-step Diffusion
//! Distillation* (DisBack), Zhang et al., ICLR 2025, arXiv 2408.15991; its base is the distribution
//! matching of Diff-Instruct (arXiv 2305.18455) and DMD (arXiv 2311.18828).
//!
//! A teacher `D_theta` sees the clean sample in a noisy one, a student `G_psi` makes samples in one
//! evaluation, and an auxiliary denoiser `D_phi` (the *fake* one) follows what the student makes. One
//! iteration, with `x = G(z)`, `x_t = alpha x + sigma eps` and no gradient through either denoiser:
//!
//! ```text
//! student   g = (D_phi(x_t) - D_target(x_t)) / mean|x - D_target(x_t)|     dL/dx = g / numel(x)
//!      or   g = w(sigma) (s_phi - s_target),   s = (alpha D(x_t) - x_t) / sigma^2
//! fake      L = mean[(rho^-2 + sigma_d^-2) (D_phi(x_t) - x)^2],            rho = sigma / alpha
//! ```
//!
//! The target of plain score distillation is the teacher from the first iteration on, which is far
//! from what a fresh student makes. DisBack first records how the teacher degrades when it is trained
//! on the untrained student's samples, `theta = s'_0, s'_1, .., s'_N`
//! ([`DegradationRecorder`]), starts `phi` from `s'_N`, and then lets the target walk back along
//! `s'_{N-1}, .., s'_0 = theta` ([`DisBack`], [`Backtracker`]). With `N = 0` both are the same bit for bit.
//!
//! | symbol | here |
//! | --- | --- |
//! | `D` | any [`Denoiser`](crate::Denoiser): [`EdmPrecond`](crate::EdmPrecond) for a raw network, [`FromVelocity`](crate::FromVelocity) for a flow |
//! | `G(z)` | [`OneStepGenerator`]; [`DenoiserGenerator`] for `D(sigma_c z, sigma_c)` |
//! | levels | [`KarrasSigmas`], or any list of levels with growing noise |
//! | the weight of `g` | [`GradWeight`] |
//! | the base method | [`ScoreDistill`] |
//!
//! The teacher should be the averaged network in evaluation mode. Samples are `f32` or `f64`: a network in
//! half precision converts inside, after the preconditioning (`sigma = 80` overflows it).
//! Record few checkpoints at short intervals: a path that goes down to a collapsed `s'_N` costs the
//! first iterations of the second stage. Where a full set of weights per checkpoint is too much,
//! train adapters and hand only their variables over: a [`Path`] holds the variables it is given.
//!
//! ```
//! use candle_core::{DType, Device, Tensor, Var};
//! use candle_nn::{Optimizer, SGD};
//! use thalweg_flows::distillation::*;
//! use thalweg_flows::schedule::Edm;
//! use thalweg_flows::{Closure, Condition, Prediction, RandomStream};
//!
//! // Data N(2, 0.5^2), whose denoiser is D = (s^2 x + sigma^2 mu) / (s^2 + sigma^2); networks of yours
//! // stand here with all their variables. The fake one and the target are of one architecture.
//! let cpu = Device::Cpu;
//! let denoiser = |mu: &Var| {
//!     let mu = mu.clone();
//!     Closure::new(Prediction::X0, move |x, levels, _| {
//!         let gain = |l: &thalweg_flows::Level| 0.25 / (0.25 + l.sigma * l.sigma);
//!         let mean = mu.as_tensor().broadcast_as(x.shape())?;
//!         levels.combine(gain, x, move |l| 1.0 - gain(l), &mean)
//!     })
//! };
//! let named = |var: &Var| vec![("mu".to_string(), var.clone())];
//! let mu = [Var::new(2f64, &cpu)?, Var::new(2f64, &cpu)?];
//! let (fake, target) = (denoiser(&mu[0]), denoiser(&mu[1]));
//! let shift = Var::new(0f64, &cpu)?;
//! let student = |z: &Tensor, _: &Condition| -> thalweg_flows::Result<Tensor> {
//!     Ok(z.affine(0.5, 0.0)?.broadcast_add(shift.as_tensor())?)
//! };
//!
//! let config = ScoreDistillConfig { gen_lr: 0.05, fake_lr: 0.3, warmup: 0, ..Default::default() };
//! let levels = KarrasSigmas { min: 0.05, max: 5.0, ..Default::default() }.levels()?;
//! let sgd = |var: &Var| SGD::new(vec![var.clone()], 0.0);
//! let mut base = ScoreDistill::new(
//!     config,
//!     levels,
//!     Player { model: &student, vars: named(&shift), optimizer: sgd(&shift)? },
//!     Player { model: &fake, vars: named(&mu[0]), optimizer: sgd(&mu[0])? },
//!     &target,
//! )?;
//! let rng = RandomStream::new(1);
//! let mut latents = rng.split("latents");
//! let mut draw = || latents.normal(0.0, 1.0, (64, 1), DType::F64, &cpu);
//!
//! // Stage 1: how the teacher degrades on the untrained student. Stage 2: back along that path.
//! let recorder = DegradationRecorder { interval: 5, n_checkpoints: 3 };
//! let mut noise = rng.split("noise");
//! let path = recorder.record(&mut base, |_| Ok((draw()?, Condition::Null)), &mut noise)?;
//! let mut disback = DisBack::new(base, path, named(&mu[1]), 20)?;
//! for _ in 0..200 {
//!     let z = draw()?;
//!     disback.step(&Batch::new(&z), &mut noise)?;
//! }
//! assert!((shift.to_scalar::<f64>()? - 2.0).abs() < 0.2);
//! # Ok::<(), thalweg_flows::Error>(())
//! ```

mod config;
mod disback;
mod generator;
mod matching;
mod path;
mod score_distill;

pub use config::{GanConfig, GradWeight, KarrasSigmas, ScoreDistillConfig, WeightFn};
pub use disback::{Backtracker, DegradationRecorder, DisBack};
pub use generator::{ClassifierFree, DenoiserGenerator, OneStepGenerator};
pub use matching::{discriminator_loss, fake_loss, generator_gan_loss, matching, Matching};
pub use path::Path;
pub use score_distill::{
    Batch, Discriminator, DistillStats, Draw, FakeDraws, FakeStats, GeneratorStats, Player,
    ScoreDistill,
};

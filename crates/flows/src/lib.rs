//! Diffusion and flow models on [candle](candle_core): one sampling loop in which schedule,
//! prediction, step and guidance are independent, ODE solvers with adjoints, and rectified flow.
//!
//! | module | what it gives |
//! | --- | --- |
//! | [`schedule`], [`level`], [`grid`] | DDPM, VP, EDM and flow-matching schedules; the levels that a sampler visits |
//! | [`prediction`] | noise, clean sample, v, score, velocity, and the exact conversions |
//! | [`denoiser`] | your network behind one method; adapters for EDM's preconditioning and for flows |
//! | [`mixture`] | Gaussian mixtures, whose denoiser is a closed form |
//! | [`stepper`] | DDIM, ancestral, Euler, Heun, DPM-Solver++ (2M, 2S, 3M) |
//! | [`guidance`] | what to evaluate at a step and how to combine it; every evaluation counted |
//! | [`sampler`] | the loop |
//! | [`velocity`], [`ode`] | velocity fields, fixed-step and adaptive solvers, the stochastic sampler |
//! | [`adjoint`] | gradients of a loss on the sample through the whole sampler |
//! | [`train`], [`coupling`], [`interpolant`], [`time_sampler`] | rectified flow: loss, reflow, distillation |
//! | [`distillation`] | one-step generators by score distillation, along a backtracked path of teachers |
//! | `transformers` (feature) | candle-transformers' Stable Diffusion, SD3 and FLUX as denoisers, its schedulers as steppers |
//! | [`combine`] | sums of samples in one pass over memory |
//! | [`metrics`], [`likelihood`] | straightness, transport cost, exact log-densities |
//!
//! Time in a flow runs from 0 (noise) to 1 (data). Guidance rules are in `thalweg-guidance`.
//!
//! Nothing here is a framework: [`Denoiser`] and [`Velocity`] are one method each, closures
//! implement them, and every part works without the others.

pub mod adjoint;
pub mod combine;
pub mod condition;
pub mod coupling;
pub mod denoiser;
pub mod distillation;
mod error;
pub mod grid;
pub mod guidance;
pub mod interpolant;
pub mod level;
pub mod likelihood;
pub mod metrics;
pub mod mixture;
pub mod noise;
pub mod ode;
pub mod prediction;
pub mod sampler;
pub mod schedule;
pub mod stepper;
pub mod time_sampler;
pub mod train;
#[cfg(feature = "transformers")]
pub mod transformers;
pub mod velocity;
#[cfg(feature = "verify")]
pub mod verify;
mod watch;

pub use combine::{linear_combination, row_combination};
pub use condition::Condition;
pub use denoiser::{Closure, Denoiser, EdmPrecond, FromVelocity, GradientCheck};
pub use error::{Error, Result};
pub use grid::Grid;
pub use guidance::{Evaluator, Guidance, Guided, Nfe, StepCx};
pub use level::{Level, Levels};
pub use mixture::AnalyticMixture;
pub use noise::Noise;
pub use prediction::{Denoised, PathSpeed, Prediction};
pub use sampler::{Clip, Sampled, Sampler};
pub use schedule::Schedule;
pub use stepper::{Ddim, DpmSolverPP2M, DpmSolverPP2S, DpmSolverPP3M, Euler, Heun, Stepper};
pub use tensor_core::random::RandomStream;
pub use velocity::Velocity;
pub use watch::FiniteCheck;

/// The README's example is compiled and run with the others.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

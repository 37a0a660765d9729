//! Schedules: a time to a [`Level`].
//!
//! | schedule | time | signal and noise |
//! | --- | --- | --- |
//! | [`Ddpm`] | step index, `steps - 1` (noise) to 0 | `alpha^2 = prod (1 - beta_j)`, variance preserving |
//! | [`VpSde`] | 1 (noise) to 0 | `ln alpha = -t^2 (beta_max - beta_min) / 4 - t beta_min / 2` |
//! | [`Edm`] | `sigma` itself | `alpha = 1` |
//! | [`RectifiedFlow`] | 0 (noise) to 1 (data) | `alpha = t`, `sigma = 1 - t`, optionally shifted |
//!
//! Variance-preserving schedules keep the field's direction of time, flows the one of this
//! workspace; [`Schedule::range`] says which, and no formula elsewhere depends on it.

use crate::error::{check, Error, Result};
use crate::level::Level;

/// Levels over time.
pub trait Schedule {
    /// The level at a time.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a time outside the schedule.
    fn level(&self, t: f64) -> Result<Level>;

    /// The level at `lambda = ln(alpha / sigma)`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a value outside the schedule.
    fn at_lambda(&self, lambda: f64) -> Result<Level>;

    /// Times of the noisiest and of the cleanest level at which models are evaluated.
    fn range(&self) -> (f64, f64);
}

fn within(name: &'static str, value: f64, low: f64, high: f64) -> Result<()> {
    match (low..=high).contains(&value) {
        true => Ok(()),
        false => Err(Error::argument(name, value, format!("in [{low}, {high}]"))),
    }
}

/// `alpha` from `lambda` where `alpha^2 + sigma^2 = 1`: `ln alpha`.
fn ln_alpha_preserving(lambda: f64) -> f64 {
    // -ln(1 + e^(-2 lambda)) / 2 without overflow.
    let y = -2.0 * lambda;
    -0.5 * (y.max(0.0) + (-y.abs()).exp().ln_1p())
}

/// How the steps of [`Ddpm`] add noise.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Beta {
    /// `beta` from `start` to `end`; the paper's are 1e-4 and 0.02.
    Linear {
        /// The first `beta`.
        start: f64,
        /// The last `beta`.
        end: f64,
    },
    /// `sqrt(beta)` from `sqrt(start)` to `sqrt(end)`; Stable Diffusion's are 0.00085 and 0.012.
    ScaledLinear {
        /// The first `beta`.
        start: f64,
        /// The last `beta`.
        end: f64,
    },
    /// `beta_i = min(1 - f((i+1)/N) / f(i/N), 0.999)`, `f(t) = cos^2((t + 0.008) / 1.008 * pi / 2)`.
    SquaredCosine,
}

impl Beta {
    /// The linear schedule of *Denoising Diffusion Probabilistic Models*.
    pub const LINEAR: Self = Self::Linear {
        start: 1e-4,
        end: 0.02,
    };
    /// The schedule of Stable Diffusion.
    pub const STABLE_DIFFUSION: Self = Self::ScaledLinear {
        start: 0.00085,
        end: 0.012,
    };

    fn at(&self, i: usize, steps: usize) -> f64 {
        let ramp = |a: f64, b: f64| match steps {
            1 => a,
            n => a + (b - a) * i as f64 / (n - 1) as f64,
        };
        match *self {
            Self::Linear { start, end } => ramp(start, end),
            Self::ScaledLinear { start, end } => ramp(start.sqrt(), end.sqrt()).powi(2),
            Self::SquaredCosine => {
                let f = |t: f64| {
                    ((t + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2)
                        .cos()
                        .powi(2)
                };
                let n = steps as f64;
                (1.0 - f((i + 1) as f64 / n) / f(i as f64 / n)).min(0.999)
            }
        }
    }
}

/// The discrete schedule of DDPM; between steps `ln alpha` is interpolated.
#[derive(Debug, Clone, PartialEq)]
pub struct Ddpm {
    /// `ln alpha^2` after each step.
    ln_abar: Vec<f64>,
    betas: Vec<f64>,
}

impl Ddpm {
    /// A schedule of `train_steps` steps (1000 is usual).
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for fewer than two steps or a `beta` outside `(0, 1)`.
    pub fn new(beta: Beta, train_steps: usize) -> Result<Self> {
        check::require(
            train_steps >= 2,
            "Ddpm::train_steps",
            train_steps,
            "at least 2",
        )?;
        Self::from_betas((0..train_steps).map(|i| beta.at(i, train_steps)).collect())
    }

    /// A schedule from its own `beta`s.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn from_betas(betas: Vec<f64>) -> Result<Self> {
        check::require(betas.len() >= 2, "Ddpm::betas", betas.len(), "at least 2")?;
        let (mut sum, mut ln_abar) = (0.0, Vec::with_capacity(betas.len()));
        for beta in &betas {
            let holds = *beta > 0.0 && *beta < 1.0;
            check::require(holds, "Ddpm::beta", beta, "a number in (0, 1)")?;
            sum += (-beta).ln_1p();
            ln_abar.push(sum);
        }
        Ok(Self { ln_abar, betas })
    }

    /// How many steps there are.
    pub fn train_steps(&self) -> usize {
        self.ln_abar.len()
    }

    /// `alpha^2` after step `i`.
    pub fn alpha_bar(&self, i: usize) -> Option<f64> {
        self.ln_abar.get(i).map(|x| x.exp())
    }

    /// `beta` of step `i`.
    pub fn beta(&self, i: usize) -> Option<f64> {
        self.betas.get(i).copied()
    }

    fn at(&self, t: f64, ln_abar: f64) -> Level {
        Level {
            alpha: (0.5 * ln_abar).exp(),
            sigma: (-ln_abar.exp_m1()).sqrt(),
            model_time: t,
        }
    }
}

impl Schedule for Ddpm {
    fn level(&self, t: f64) -> Result<Level> {
        let last = self.ln_abar.len() - 1;
        within("t", t, 0.0, last as f64)?;
        let i = (t.floor() as usize).min(last - 1);
        let (a, b) = (self.ln_abar[i], self.ln_abar[i + 1]);
        Ok(self.at(t, a + (b - a) * (t - i as f64)))
    }

    fn at_lambda(&self, lambda: f64) -> Result<Level> {
        let wanted = 2.0 * ln_alpha_preserving(lambda);
        let table = &self.ln_abar;
        let last = table.len() - 1;
        // The ends of the table itself must be found, whatever the logarithm rounded away.
        let slack = 1e-9 * table[last].abs();
        within("ln alpha^2", wanted, table[last] - slack, table[0] + slack)?;
        let i = table.partition_point(|x| *x > wanted).clamp(1, last) - 1;
        let fraction = (wanted - table[i]) / (table[i + 1] - table[i]);
        let t = (i as f64 + fraction).clamp(0.0, last as f64);
        Ok(self.at(t, wanted))
    }

    fn range(&self) -> (f64, f64) {
        ((self.ln_abar.len() - 1) as f64, 0.0)
    }
}

/// The variance-preserving stochastic differential equation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct VpSde {
    /// Rate of noise at time 0.
    pub beta_min: f64,
    /// Rate of noise at time 1.
    pub beta_max: f64,
}

impl Default for VpSde {
    fn default() -> Self {
        Self {
            beta_min: 0.1,
            beta_max: 20.0,
        }
    }
}

impl VpSde {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`].
    pub fn validate(&self) -> Result<()> {
        check::positive("VpSde::beta_min", self.beta_min)?;
        let holds = self.beta_max.is_finite() && self.beta_max > self.beta_min;
        check::require(
            holds,
            "VpSde::beta_max",
            self.beta_max,
            "more than beta_min",
        )
    }

    fn at(&self, t: f64) -> Level {
        let ln_alpha = -0.25 * t * t * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min;
        Level {
            alpha: ln_alpha.exp(),
            sigma: (-(2.0 * ln_alpha).exp_m1()).sqrt(),
            model_time: t,
        }
    }
}

impl Schedule for VpSde {
    fn level(&self, t: f64) -> Result<Level> {
        self.validate()?;
        within("t", t, 0.0, 1.0)?;
        Ok(self.at(t))
    }

    fn at_lambda(&self, lambda: f64) -> Result<Level> {
        self.validate()?;
        if lambda.is_nan() {
            return Err(Error::argument("lambda", lambda, "a number"));
        }
        let difference = self.beta_max - self.beta_min;
        let q = -4.0 * difference * ln_alpha_preserving(lambda);
        let t = q / (((self.beta_min.powi(2) + q).sqrt() + self.beta_min) * difference);
        // Slightly beyond 1 by rounding is 1.
        within("the time of lambda", t, 0.0, 1.0 + 1e-9)?;
        Ok(self.at(t.min(1.0)))
    }

    fn range(&self) -> (f64, f64) {
        (1.0, 1e-3)
    }
}

/// Variance exploding: `x = data + sigma * noise`; the time is `sigma`.
///
/// Networks are told `ln(sigma) / 4`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Edm {
    /// The smallest `sigma` at which models are evaluated.
    pub sigma_min: f64,
    /// The largest.
    pub sigma_max: f64,
}

impl Default for Edm {
    fn default() -> Self {
        Self {
            sigma_min: 0.002,
            sigma_max: 80.0,
        }
    }
}

impl Edm {
    /// The level of a `sigma >= 0`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a negative or infinite one.
    pub fn at_sigma(sigma: f64) -> Result<Level> {
        within("sigma", sigma, 0.0, f64::MAX)?;
        // At sigma = 0 no network is asked; the time only has to be a number.
        Level::new(1.0, sigma, 0.25 * sigma.max(f64::MIN_POSITIVE).ln())
    }
}

impl Schedule for Edm {
    fn level(&self, t: f64) -> Result<Level> {
        check::positive("Edm::sigma_min", self.sigma_min)?;
        let holds = self.sigma_max.is_finite() && self.sigma_max > self.sigma_min;
        check::require(
            holds,
            "Edm::sigma_max",
            self.sigma_max,
            "more than sigma_min",
        )?;
        Self::at_sigma(t)
    }

    fn at_lambda(&self, lambda: f64) -> Result<Level> {
        self.level((-lambda).exp())
    }

    fn range(&self) -> (f64, f64) {
        (self.sigma_max, self.sigma_min)
    }
}

/// How a flow's levels are moved towards the noise, where large images need more steps.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Shift {
    /// Not at all.
    #[default]
    None,
    /// `s' = k s / (1 + (k - 1) s)`; Stable Diffusion 3 has `k = 3`.
    Constant(f64),
    /// `s' = e^mu / (e^mu + 1/s - 1)`; for FLUX see [`flux_mu`].
    Exponential(f64),
}

impl Shift {
    /// The shifted noise scale of `s` in `[0, 1]`.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for a factor that is not positive or a `mu` that is not finite.
    pub fn apply(&self, s: f64) -> Result<f64> {
        Ok(match *self {
            Self::None => s,
            Self::Constant(k) => {
                check::positive("Shift::Constant", k)?;
                k * s / (1.0 + (k - 1.0) * s)
            }
            Self::Exponential(mu) => {
                check::finite("Shift::Exponential", mu)?;
                // 1/0 = infinity gives 0.
                mu.exp() / (mu.exp() + (1.0 / s - 1.0))
            }
        })
    }
}

/// FLUX's `mu` for an image of so many tokens: linear from 256 tokens (0.5) to 4096 (1.15).
pub fn flux_mu(tokens: usize) -> f64 {
    0.5 + (tokens as f64 - 256.0) * (1.15 - 0.5) / (4096.0 - 256.0)
}

/// What a flow's network is told.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum FlowTime {
    /// The time from 0 (noise) to 1 (data).
    #[default]
    DataAtOne,
    /// This multiple of the noise scale `s`, from `scale` (noise) to 0 (data): 1 for FLUX, 1000 for
    /// Stable Diffusion 3.
    NoiseTimes(f64),
}

/// Straight paths from noise to data.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct RectifiedFlow {
    /// Moves levels towards the noise.
    pub shift: Shift,
    /// What the network is told.
    pub model_time: FlowTime,
}

impl RectifiedFlow {
    fn at(&self, alpha: f64, sigma: f64) -> Level {
        let model_time = match self.model_time {
            FlowTime::DataAtOne => alpha,
            FlowTime::NoiseTimes(scale) => scale * sigma,
        };
        Level {
            alpha,
            sigma,
            model_time,
        }
    }
}

impl Schedule for RectifiedFlow {
    fn level(&self, t: f64) -> Result<Level> {
        within("t", t, 0.0, 1.0)?;
        let sigma = self.shift.apply(1.0 - t)?;
        Ok(self.at(1.0 - sigma, sigma))
    }

    fn at_lambda(&self, lambda: f64) -> Result<Level> {
        if lambda.is_nan() {
            return Err(Error::argument("lambda", lambda, "a number"));
        }
        let ratio = (-lambda.abs()).exp();
        let (large, small) = (1.0 / (1.0 + ratio), ratio / (1.0 + ratio));
        Ok(match lambda > 0.0 {
            true => self.at(large, small),
            false => self.at(small, large),
        })
    }

    fn range(&self) -> (f64, f64) {
        (0.0, 1.0)
    }
}

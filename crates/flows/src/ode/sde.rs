//! The stochastic sampler of a flow: the same marginals as the ordinary equation.

use super::{check_call, Solution, Times};
use crate::combine::linear_combination;
use crate::condition::Condition;
use crate::error::{check, Result};
use crate::noise::Noise;
use crate::velocity::Velocity;
use crate::watch::{FiniteCheck, Watch};
use candle_core::Tensor;

/// One step of
///
/// ```text
/// dx = (v + sigma_t^2 s / 2) dt + sigma_t dW,   s(x, t) = (t v - x) / (c^2 (1 - t))
/// ```
///
/// for straight paths from a Gaussian of standard deviation `c`: `s` is the exact score, so the
/// marginals are those of `dx = v dt`. `v` is the velocity at `(x, t)`, `z` standard normal noise.
///
/// # Errors
/// [`crate::Error::InvalidArgument`] unless `t < 1`; those of candle.
pub fn sde_step(
    x: &Tensor,
    v: &Tensor,
    z: &Tensor,
    t: f64,
    h: f64,
    sigma: f64,
    source_std: f64,
) -> Result<Tensor> {
    check::positive("1 - t", 1.0 - t)?;
    check::positive("source_std", source_std)?;
    let half = 0.5 * sigma * sigma / (source_std * source_std * (1.0 - t));
    linear_combination(&[
        (1.0 - h * half, x),
        (h * (1.0 + half * t), v),
        (h.sqrt() * sigma, z),
    ])
}

/// The Euler-Maruyama sampler with `sigma_t = (1 - t) sigma`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EulerMaruyama {
    /// Steps of equal length from 0 to 1.
    pub steps: usize,
    /// Strength of the noise; 0 is Euler's method.
    pub sigma: f64,
    /// Standard deviation of the Gaussian source.
    pub source_std: f64,
}

impl EulerMaruyama {
    /// Samples of the target from samples `x0` of the source.
    ///
    /// # Errors
    /// [`crate::Error::InvalidConfig`], [`crate::Error::NonFinite`], and those of the field.
    pub fn sample(
        &self,
        velocity: &dyn Velocity,
        x0: &Tensor,
        condition: &Condition,
        noise: &mut Noise,
    ) -> Result<Solution> {
        check::at_least_one("EulerMaruyama::steps", self.steps)?;
        check::non_negative("EulerMaruyama::sigma", self.sigma)?;
        check::positive("EulerMaruyama::source_std", self.source_std)?;
        check_call(x0, 0.0, 1.0)?;
        let h = 1.0 / self.steps as f64;
        let mut x = x0.detach();
        let mut times = vec![0.0];
        let mut watch = Watch::new(FiniteCheck::Auto)?;
        for i in 0..self.steps {
            let t = i as f64 * h;
            let v = velocity.velocity(&x, &Times::Same(t).tensor(&x)?, condition)?;
            let (z, sigma) = (noise.next(&x)?, (1.0 - t) * self.sigma);
            x = sde_step(&x, &v, &z, t, h, sigma, self.source_std)?.detach();
            watch.see(&x, i, || "the sample of EulerMaruyama".into())?;
            times.push((i + 1) as f64 * h);
        }
        watch.finish()?;
        Ok(Solution {
            x,
            nfe: self.steps,
            times,
            trajectory: None,
            accepted: self.steps,
            rejected: 0,
        })
    }
}

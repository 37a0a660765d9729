//! Gradient descent with noise: what consensus hopping is compared with.

use super::noise::{NoiseRequest, NoiseSource, Purpose};
use super::objective::{finite_difference_gradients, rows, Objective};
use super::point::{host, tensor_on};
use crate::error::check;
use crate::{Error, Result};
use candle_core::Tensor;

/// How the noise of [`Langevin`] shrinks with the step `k = 1, 2, ...`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LangevinCooling {
    /// Not at all.
    None,
    /// As `1 / log(k + 1)`.
    #[default]
    Log,
}

/// Annealed Langevin dynamics `x <- x - lr dt grad E(x) + sigma / log(k + 1) sqrt(dt) xi`, of many
/// chains at once; gradient descent for `sigma = 0`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Langevin {
    /// Learning rate; multiplied by `dt`.
    pub lr: f64,
    /// Time step.
    pub dt: f64,
    /// Noise.
    pub sigma: f64,
    /// How the noise shrinks.
    pub cooling: LangevinCooling,
    /// Half-width of the central differences where the objective gives no gradient.
    pub fd_step: f64,
}

impl Default for Langevin {
    fn default() -> Self {
        Self {
            lr: 1.0,
            dt: 1e-3,
            sigma: 10.0,
            cooling: LangevinCooling::Log,
            fd_step: 1e-5,
        }
    }
}

impl Langevin {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] that names the first bad one.
    pub fn validate(&self) -> Result<()> {
        check::non_negative("Langevin::lr", self.lr)?;
        check::positive("Langevin::dt", self.dt)?;
        check::non_negative("Langevin::sigma", self.sigma)?;
        check::positive("Langevin::fd_step", self.fd_step)
    }

    /// `steps` steps of the chains `[N, d]`; gives where they end, `[N, d]`. `watch` sees the
    /// chains after each step.
    ///
    /// # Errors
    /// Those of [`validate`](Self::validate); [`Error::Shape`]; [`Error::NonFiniteLoss`] when a
    /// chain has left the finite numbers; those of objective and noise.
    pub fn run<S: NoiseSource>(
        &self,
        objective: &dyn Objective,
        chains: &Tensor,
        steps: usize,
        noise: &mut S,
        mut watch: impl FnMut(usize, &[f64]),
    ) -> Result<Tensor> {
        self.validate()?;
        let (n, d) = rows(chains)?;
        let (dtype, device) = (chains.dtype(), chains.device());
        let mut x = host(chains)?;
        let mut xi = vec![0.0; n * d];
        for k in 1..=steps {
            let here = tensor_on(&x, &[n, d], dtype, device)?;
            let grads = match objective.gradients(&here)? {
                Some(grads) => grads,
                None => finite_difference_gradients(objective, &here, self.fd_step)?,
            };
            let scale = match self.cooling {
                LangevinCooling::None => self.sigma,
                LangevinCooling::Log => self.sigma / ((k + 1) as f64).ln(),
            } * self.dt.sqrt();
            if scale != 0.0 {
                let request = NoiseRequest {
                    purpose: Purpose::Diffusion,
                    index: k - 1,
                    first_row: 0,
                    columns: d,
                };
                noise.normals(request, &mut xi)?;
            }
            for ((x, g), xi) in x.iter_mut().zip(host(&grads)?).zip(&xi) {
                *x += scale * xi - self.lr * self.dt * g;
            }
            if let Some(bad) = x.iter().find(|x| !x.is_finite()) {
                return Err(Error::NonFiniteLoss {
                    what: format!("a coordinate after step {k}"),
                    value: *bad,
                });
            }
            watch(k, &x);
        }
        tensor_on(&x, &[n, d], dtype, device)
    }
}

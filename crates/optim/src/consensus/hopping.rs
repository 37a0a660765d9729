//! Consensus hopping: a fresh cloud around the last consensus at every step.

use super::noise::{NoiseRequest, NoiseSource, Purpose};
use super::objective::Objective;
use super::point::{effective, host, tensor_on, weighted_mean, weights};
use crate::error::check;
use crate::{Error, Result};
use candle_core::Tensor;

/// `sigma <- factor sigma` after every so many steps.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SigmaDecay {
    /// Steps between two decays.
    pub every: usize,
    /// The factor.
    pub factor: f64,
}

impl Default for SigmaDecay {
    fn default() -> Self {
        Self {
            every: 100,
            factor: 0.98,
        }
    }
}

/// Consensus hopping `x_{k+1} = consensus of x_k + sigma xi`: with `tau = alpha sigma^2` each step
/// is about `x - tau grad E(x)`, by values of `E` alone.
///
/// With a large `alpha` at a fixed `sigma` one particle takes all the weight and the steps are no
/// gradient steps any more: [`Hopping::effective`] tells.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use thalweg_optim::consensus::ConsensusHopping;
/// use thalweg_optim::RandomStream;
///
/// let objective = |v: &Tensor| v.sqr()?.sum(1);
/// let hopping = ConsensusHopping { alpha: 20.0, sigma: 0.3, n: 200, sigma_decay: None };
/// let x0 = Tensor::new(&[3f64, -2.0], &Device::Cpu)?;
/// let found = hopping.run(&objective, &x0, 50, &mut RandomStream::new(0))?;
/// assert!(found.consensus.sqr()?.sum_all()?.to_scalar::<f64>()? < 0.01);
/// # Ok::<(), thalweg_optim::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ConsensusHopping {
    /// Inverse temperature of the weights.
    pub alpha: f64,
    /// Standard deviation of the cloud.
    pub sigma: f64,
    /// Particles of the cloud.
    pub n: usize,
    /// Lets `sigma` shrink.
    pub sigma_decay: Option<SigmaDecay>,
}

impl Default for ConsensusHopping {
    fn default() -> Self {
        Self {
            alpha: 100.0,
            sigma: 0.7,
            n: 200,
            sigma_decay: None,
        }
    }
}

/// What [`ConsensusHopping::run`] found.
#[derive(Debug, Clone)]
pub struct Hopping {
    /// The consensus of the last cloud, `[d]`.
    pub consensus: Tensor,
    /// All consensus points, `[steps + 1, d]`.
    pub trajectory: Tensor,
    /// Effective number of particles at each of them.
    pub effective: Vec<f64>,
    /// Evaluations of the objective.
    pub evaluations: u64,
}

impl ConsensusHopping {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] that names the first bad one.
    pub fn validate(&self) -> Result<()> {
        check::non_negative("ConsensusHopping::alpha", self.alpha)?;
        check::non_negative("ConsensusHopping::sigma", self.sigma)?;
        check::at_least_one("ConsensusHopping::n", self.n)?;
        if let Some(decay) = self.sigma_decay {
            check::at_least_one("SigmaDecay::every", decay.every)?;
            check::positive("SigmaDecay::factor", decay.factor)?;
        }
        Ok(())
    }

    /// `steps` hops from `x0` `[d]`, and a last cloud whose consensus is the answer.
    ///
    /// # Errors
    /// Those of [`validate`](Self::validate); [`Error::Shape`];
    /// [`Error::NonFiniteLoss`] when no energy of a cloud is finite; those of objective and noise.
    pub fn run<S: NoiseSource>(
        &self,
        objective: &dyn Objective,
        x0: &Tensor,
        steps: usize,
        noise: &mut S,
    ) -> Result<Hopping> {
        self.validate()?;
        let d = x0.elem_count();
        if x0.rank() != 1 || d == 0 {
            return Err(Error::shape("x0", x0.dims(), "[d]"));
        }
        let mut x = host(x0)?;
        let (mut trajectory, mut sizes) = (Vec::new(), Vec::new());
        let (mut cloud, mut sigma) = (vec![0.0; self.n * d], self.sigma);
        for k in 0..=steps {
            let request = NoiseRequest {
                purpose: Purpose::Cloud,
                index: k,
                first_row: 0,
                columns: d,
            };
            noise.normals(request, &mut cloud)?;
            for row in cloud.chunks_exact_mut(d) {
                row.iter_mut()
                    .zip(&x)
                    .for_each(|(v, x)| *v = x + sigma * *v);
            }
            let particles = tensor_on(&cloud, &[self.n, d], x0.dtype(), x0.device())?;
            let energies = objective.values(&particles)?;
            if energies.elem_count() != self.n {
                let expected = format!("[{}]", self.n);
                return Err(Error::shape(
                    "values of the objective",
                    energies.dims(),
                    expected,
                ));
            }
            let w = weights(&host(&energies)?, self.alpha)?;
            x = weighted_mean(&cloud, &w, d);
            sizes.push(effective(&w));
            trajectory.extend_from_slice(&x);
            if let Some(decay) = self.sigma_decay {
                if (k + 1) % decay.every == 0 {
                    sigma *= decay.factor;
                }
            }
        }
        let like = (x0.dtype(), x0.device());
        Ok(Hopping {
            consensus: tensor_on(&x, &[d], like.0, like.1)?,
            trajectory: tensor_on(&trajectory, &[steps + 1, d], like.0, like.1)?,
            effective: sizes,
            evaluations: (self.n * (steps + 1)) as u64,
        })
    }
}

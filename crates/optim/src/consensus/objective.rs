//! What is minimized: a function of all particles at once.

use crate::{Error, Result};
use candle_core::{DType, Device, Storage, Tensor, Var};
use rayon::prelude::*;
use std::fmt;

/// An objective over a batch of particles `[N, d]`. Every closure from a tensor to candle's result
/// is one (without gradients); [`PerParticle`] makes one of a function of a single particle.
pub trait Objective {
    /// Energies `[N]` of particles `[N, d]`.
    ///
    /// # Errors
    /// The implementor's.
    fn values(&self, particles: &Tensor) -> Result<Tensor>;

    /// Gradients `[N, d]`, where the objective has them.
    ///
    /// # Errors
    /// The implementor's.
    fn gradients(&self, particles: &Tensor) -> Result<Option<Tensor>> {
        let _ = particles;
        Ok(None)
    }
}

impl<F: Fn(&Tensor) -> candle_core::Result<Tensor>> Objective for F {
    fn values(&self, particles: &Tensor) -> Result<Tensor> {
        Ok(self(particles)?)
    }
}

/// An [`Objective`] whose gradients candle computes, from a closure of operations that have a
/// backward pass. The energy of a particle must not depend on the others.
pub struct Differentiable<F>(pub F);

impl<F> fmt::Debug for Differentiable<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Differentiable(..)")
    }
}

impl<F: Fn(&Tensor) -> candle_core::Result<Tensor>> Objective for Differentiable<F> {
    fn values(&self, particles: &Tensor) -> Result<Tensor> {
        Ok((self.0)(particles)?.detach())
    }

    fn gradients(&self, particles: &Tensor) -> Result<Option<Tensor>> {
        let v = Var::from_tensor(&particles.detach())?;
        let grads = (self.0)(v.as_tensor())?.sum_all()?.backward()?;
        let lost = || tensor_core::Error::LostGradient(vec!["the particles".into()]);
        let grad = grads.get(&v).ok_or_else(lost)?;
        Ok(Some(grad.detach()))
    }
}

type Value = dyn Fn(&[f64]) -> f64 + Send + Sync;
type Gradient = dyn Fn(&[f64], &mut [f64]) + Send + Sync;

/// An [`Objective`] from functions of one particle, evaluated on all cores of the host in double
/// precision.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use thalweg_optim::consensus::{Objective, PerParticle};
///
/// let square = PerParticle::new(|x| x.iter().map(|x| x * x).sum());
/// let particles = Tensor::new(&[[1f32, 2.0], [0.0, 3.0]], &Device::Cpu)?;
/// assert_eq!(square.values(&particles)?.to_vec1::<f32>()?, [5.0, 9.0]);
/// # Ok::<(), thalweg_optim::Error>(())
/// ```
pub struct PerParticle {
    value: Box<Value>,
    gradient: Option<Box<Gradient>>,
}

impl fmt::Debug for PerParticle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gradient = self.gradient.is_some();
        f.debug_struct("PerParticle")
            .field("gradient", &gradient)
            .finish_non_exhaustive()
    }
}

impl PerParticle {
    /// From the energy of a particle.
    pub fn new(value: impl Fn(&[f64]) -> f64 + Send + Sync + 'static) -> Self {
        Self {
            value: Box::new(value),
            gradient: None,
        }
    }

    /// With a gradient: a function that writes the gradient at its first argument into its second.
    #[must_use]
    pub fn with_gradient(
        mut self,
        gradient: impl Fn(&[f64], &mut [f64]) + Send + Sync + 'static,
    ) -> Self {
        self.gradient = Some(Box::new(gradient));
        self
    }
}

/// Rows that a task takes at a time: enough to be worth a task.
const ROWS: usize = 64;

impl Objective for PerParticle {
    fn values(&self, particles: &Tensor) -> Result<Tensor> {
        let (n, d) = rows(particles)?;
        let mut energies = vec![0.0; n];
        with_slice(particles, |v| {
            energies
                .par_chunks_mut(ROWS)
                .zip(v.par_chunks(ROWS * d))
                .for_each(|(out, v)| {
                    for (out, row) in out.iter_mut().zip(v.chunks(d)) {
                        *out = (self.value)(row);
                    }
                });
        })?;
        Ok(Tensor::from_vec(energies, n, &Device::Cpu)?
            .to_dtype(particles.dtype())?
            .to_device(particles.device())?)
    }

    fn gradients(&self, particles: &Tensor) -> Result<Option<Tensor>> {
        let Some(gradient) = &self.gradient else {
            return Ok(None);
        };
        let (n, d) = rows(particles)?;
        let mut grads = vec![0.0; n * d];
        with_slice(particles, |v| {
            grads
                .par_chunks_mut(ROWS * d)
                .zip(v.par_chunks(ROWS * d))
                .for_each(|(out, v)| {
                    for (out, row) in out.chunks_mut(d).zip(v.chunks(d)) {
                        gradient(row, out);
                    }
                });
        })?;
        let grads = Tensor::from_vec(grads, (n, d), &Device::Cpu)?;
        let grads = grads.to_dtype(particles.dtype())?;
        Ok(Some(grads.to_device(particles.device())?))
    }
}

/// `N` and `d` of particles.
pub(super) fn rows(particles: &Tensor) -> Result<(usize, usize)> {
    match particles.dims() {
        [n, d] if *n > 0 && *d > 0 => Ok((*n, *d)),
        other => Err(Error::shape(
            "particles",
            other,
            "[N, d] with at least one entry",
        )),
    }
}

/// The numbers of a tensor in double precision, without a copy where it holds them already.
pub(super) fn with_slice<R>(tensor: &Tensor, read: impl FnOnce(&[f64]) -> R) -> Result<R> {
    let tensor = tensor.detach().to_device(&Device::Cpu)?;
    let tensor = tensor.to_dtype(DType::F64)?.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    let whole = match &*storage {
        Storage::Cpu(cpu) => cpu.as_slice::<f64>()?,
        _ => {
            return Err(Error::argument(
                "particles",
                "on a device",
                "host memory after a copy",
            ))
        }
    };
    let start = layout.start_offset();
    Ok(read(&whole[start..start + tensor.elem_count()]))
}

/// Central differences of the values, with half-width `step`: `2 d` evaluations per particle, in
/// two batches for each coordinate. Shape `[N, d]`.
///
/// # Errors
/// [`Error::InvalidArgument`] for a step that is not positive; those of the objective.
pub fn finite_difference_gradients(
    objective: &dyn Objective,
    particles: &Tensor,
    step: f64,
) -> Result<Tensor> {
    if !(step.is_finite() && step > 0.0) {
        return Err(Error::argument("step", step, "a finite number > 0"));
    }
    let (_, d) = rows(particles)?;
    let mut columns = Vec::with_capacity(d);
    for j in 0..d {
        let mut unit = vec![0.0; d];
        unit[j] = step;
        let shift = Tensor::from_vec(unit, (1, d), &Device::Cpu)?;
        let shift = shift
            .to_dtype(particles.dtype())?
            .to_device(particles.device())?;
        let plus = objective.values(&particles.broadcast_add(&shift)?)?;
        let minus = objective.values(&particles.broadcast_sub(&shift)?)?;
        columns.push(((plus - minus)? / (2.0 * step))?);
    }
    Ok(Tensor::stack(&columns, 1)?)
}

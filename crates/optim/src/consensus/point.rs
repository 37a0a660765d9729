//! Consensus points: means weighted by `exp(-alpha E)`.

use super::objective::{rows, with_slice};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

/// Weights `exp(-alpha (E_i - min E))`; 0 for energies that are not finite.
///
/// # Errors
/// [`Error::TooFew`] for no energies, [`Error::NonFiniteLoss`] when none is finite,
/// [`Error::InvalidArgument`] unless `alpha` is finite and not negative.
pub fn weights(energies: &[f64], alpha: f64) -> Result<Vec<f64>> {
    if !(alpha.is_finite() && alpha >= 0.0) {
        return Err(Error::argument("alpha", alpha, "a finite number >= 0"));
    }
    let Some(first) = energies.first() else {
        return Err(Error::TooFew {
            what: "a consensus point",
            of: "particles",
            needed: 1,
            got: 0,
        });
    };
    let finite = energies.iter().filter(|e| e.is_finite());
    let Some(lowest) = finite.copied().reduce(f64::min) else {
        return Err(Error::NonFiniteLoss {
            what: format!("the energy of each of the {} particles", energies.len()),
            value: *first,
        });
    };
    let weight = |e: &f64| match e.is_finite() {
        true => (-alpha * (e - lowest)).exp(),
        false => 0.0,
    };
    Ok(energies.iter().map(weight).collect())
}

/// Rows whose sum one task takes; fixed, so that threads have no influence on the bits.
const BLOCK: usize = 256;

/// `sum_i w_i v_i / sum_i w_i` for rows of width `d`.
pub(super) fn weighted_mean(v: &[f64], weights: &[f64], d: usize) -> Vec<f64> {
    let block = |(v, w): (&[f64], &[f64])| {
        let mut sum = vec![0.0; d];
        for (row, w) in v.chunks_exact(d).zip(w) {
            if *w != 0.0 {
                sum.iter_mut().zip(row).for_each(|(s, x)| *s += w * x);
            }
        }
        sum
    };
    let parts: Vec<Vec<f64>> = if weights.len() <= BLOCK {
        vec![block((v, weights))]
    } else {
        v.par_chunks(BLOCK * d)
            .zip(weights.par_chunks(BLOCK))
            .map(block)
            .collect()
    };
    let total: f64 = weights.iter().sum();
    let mut mean = vec![0.0; d];
    for part in parts {
        mean.iter_mut().zip(part).for_each(|(m, p)| *m += p);
    }
    mean.iter_mut().for_each(|m| *m /= total);
    mean
}

/// Effective number `(sum w)^2 / sum w^2` of weighted particles.
pub(super) fn effective(weights: &[f64]) -> f64 {
    let (sum, squares) = weights
        .iter()
        .fold((0.0, 0.0), |(s, q), w| (s + w, q + w * w));
    sum * sum / squares
}

/// The `alpha` at which the effective number of particles is `fraction` of those with a finite
/// energy, by bisection over its logarithm; the largest tried where all energies are equal.
pub(super) fn alpha_for(energies: &[f64], fraction: f64) -> Result<f64> {
    let finite: Vec<f64> = energies.iter().copied().filter(|e| e.is_finite()).collect();
    let (low, high) = (
        finite.iter().copied().fold(f64::INFINITY, f64::min),
        finite.iter().copied().fold(f64::NEG_INFINITY, f64::max),
    );
    let spread = high - low;
    if finite.is_empty() || spread <= 0.0 {
        return Ok(1.0);
    }
    let goal = (fraction * finite.len() as f64).max(1.0);
    let (mut cold, mut hot) = (1e12 / spread, 1e-12 / spread);
    for _ in 0..100 {
        let middle = (cold * hot).sqrt();
        if effective(&weights(&finite, middle)?) < goal {
            cold = middle;
        } else {
            hot = middle;
        }
    }
    Ok(hot)
}

/// The numbers of a tensor on the host.
pub(super) fn host(tensor: &Tensor) -> Result<Vec<f64>> {
    with_slice(tensor, <[f64]>::to_vec)
}

/// A tensor in the dtype and on the device of `like`.
pub(super) fn tensor_like(values: &[f64], shape: &[usize], like: &Tensor) -> Result<Tensor> {
    tensor_on(values, shape, like.dtype(), like.device())
}

/// A tensor from numbers on the host.
pub(super) fn tensor_on(
    values: &[f64],
    shape: &[usize],
    dtype: DType,
    device: &Device,
) -> Result<Tensor> {
    let tensor = Tensor::from_slice(values, shape, &Device::Cpu)?;
    Ok(tensor.to_dtype(dtype)?.to_device(device)?)
}

fn energies_of(energies: &Tensor, n: usize) -> Result<Vec<f64>> {
    if energies.elem_count() != n {
        return Err(Error::shape("energies", energies.dims(), format!("[{n}]")));
    }
    host(energies)
}

/// The consensus point `[d]` of particles `[N, d]` with energies `[N]`.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use thalweg_optim::consensus::consensus_point;
///
/// let particles = Tensor::new(&[[0f64, 0.0], [2.0, 4.0]], &Device::Cpu)?;
/// let energies = Tensor::new(&[7f64, 7.5], &Device::Cpu)?;
/// assert_eq!(consensus_point(&particles, &energies, 0.0)?.to_vec1::<f64>()?, [1.0, 2.0]);
/// assert_eq!(consensus_point(&particles, &energies, 1e15)?.to_vec1::<f64>()?, [0.0, 0.0]);
/// # Ok::<(), thalweg_optim::Error>(())
/// ```
///
/// # Errors
/// [`Error::Shape`], and those of [`weights`].
pub fn consensus_point(particles: &Tensor, energies: &Tensor, alpha: f64) -> Result<Tensor> {
    let (n, d) = rows(particles)?;
    let w = weights(&energies_of(energies, n)?, alpha)?;
    let mean = with_slice(particles, |v| weighted_mean(v, &w, d))?;
    tensor_like(&mean, &[d], particles)
}

/// The consensus points `[M, d]` of `M` clouds `[M, N, d]` with energies `[M, N]`.
///
/// # Errors
/// As [`consensus_point`].
pub fn consensus_points(particles: &Tensor, energies: &Tensor, alpha: f64) -> Result<Tensor> {
    let (m, _, _) = particles.dims3()?;
    let one = |i: usize| consensus_point(&particles.get(i)?, &energies.get(i)?, alpha);
    let points: Result<Vec<Tensor>> = (0..m).map(one).collect();
    Ok(Tensor::stack(&points?, 0)?)
}

/// A consensus point for each particle, `[N, d]`, in which the others count by their nearness too:
/// weights `exp(-alpha E_j) exp(-|v_i - v_j|^2 / (2 width^2))`. Several minima can then be held at
/// once. Takes `N^2 d` operations.
///
/// # Errors
/// As [`consensus_point`]; [`Error::InvalidArgument`] unless the width is positive.
pub fn polarized_consensus(
    particles: &Tensor,
    energies: &Tensor,
    alpha: f64,
    width: f64,
) -> Result<Tensor> {
    if !(width.is_finite() && width > 0.0) {
        return Err(Error::argument("width", width, "a finite number > 0"));
    }
    let (n, d) = rows(particles)?;
    let energies = energies_of(energies, n)?;
    // Refuses what has no weight anywhere.
    weights(&energies, alpha)?;
    let points = with_slice(particles, |v| {
        let near = |row: &[f64]| {
            let exponents: Vec<f64> = v
                .chunks_exact(d)
                .zip(&energies)
                .map(|(other, e)| {
                    let distance: f64 = row.iter().zip(other).map(|(a, b)| (a - b).powi(2)).sum();
                    alpha * e + distance / (2.0 * width * width)
                })
                .collect();
            // The exponents take the place of energies at an inverse temperature of 1.
            Ok(weighted_mean(v, &weights(&exponents, 1.0)?, d))
        };
        v.par_chunks(d).map(near).collect::<Result<Vec<_>>>()
    })??;
    tensor_like(&points.concat(), &[n, d], particles)
}

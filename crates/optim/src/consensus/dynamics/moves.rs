//! How particles move: drift, diffusion, memories, gradients, bounds.

use super::Cbo;
use crate::consensus::config::{Acceptance, BoundsRule, Diffusion, Memory};
use crate::consensus::noise::{NoiseRequest, NoiseSource, Purpose};
use crate::consensus::objective::{finite_difference_gradients, Objective};
use crate::consensus::point::host;
use crate::{Error, Result};
use rayon::prelude::*;

impl<S: NoiseSource> Cbo<S> {
    pub(super) fn draw(
        &mut self,
        purpose: Purpose,
        first_row: usize,
        count: usize,
    ) -> Result<Vec<f64>> {
        let mut noise = std::mem::take(&mut self.buffer);
        noise.resize(count * self.d, 0.0);
        let request = NoiseRequest {
            purpose,
            index: self.moves,
            first_row,
            columns: self.d,
        };
        self.noise.normals(request, &mut noise)?;
        Ok(noise)
    }

    /// Drift to the consensus and diffusion around it, of `count` particles.
    pub(super) fn move_rows(&mut self, point: &[f64], from: usize, count: usize) -> Result<()> {
        let drift = self.config.lambda * self.config.dt;
        let kind = self.config.diffusion;
        let noisy = kind != Diffusion::None && self.sigma != 0.0;
        let noise = match noisy {
            true => self.draw(Purpose::Diffusion, from, count)?,
            false => Vec::new(),
        };
        let scale = self.sigma * self.config.dt.sqrt();
        let bound = self.config.truncation.unwrap_or(f64::INFINITY);
        let d = self.d;
        let rows = &mut self.v[from * d..(from + count) * d];
        for_rows(rows, &noise, d, |row, noise| {
            row.iter_mut()
                .zip(point)
                .for_each(|(x, c)| *x -= drift * (*x - c));
            diffuse(row, point, noise, scale, bound, kind);
        });
        self.buffer = noise;
        Ok(())
    }

    /// As [`move_rows`](Self::move_rows), with drift to and diffusion around the memories after it.
    pub(super) fn move_with_memory(&mut self, point: &[f64], memory: Memory) -> Result<()> {
        let n = self.len();
        let mut second = vec![0.0; n * self.d];
        if memory.sigma2 != 0.0 && memory.diffusion2 != Diffusion::None {
            let request = NoiseRequest {
                purpose: Purpose::MemoryDiffusion,
                index: self.moves,
                first_row: 0,
                columns: self.d,
            };
            self.noise.normals(request, &mut second)?;
        }
        let noisy = self.sigma != 0.0 && self.config.diffusion != Diffusion::None;
        let first = match noisy {
            true => self.draw(Purpose::Diffusion, 0, n)?,
            false => vec![0.0; n * self.d],
        };
        let Some(memories) = &self.memories else {
            return Ok(());
        };
        let (config, d, sigma) = (&self.config, self.d, self.sigma);
        let root = config.dt.sqrt();
        let bound = config.truncation.unwrap_or(f64::INFINITY);
        let own = memories.y.chunks_exact(d);
        let noises = first.chunks_exact(d).zip(second.chunks_exact(d));
        for ((row, y), (one, two)) in self.v.chunks_exact_mut(d).zip(own).zip(noises) {
            for (j, x) in row.iter_mut().enumerate() {
                *x -= config.lambda * config.dt * (*x - point[j]);
                *x -= memory.lambda2 * config.dt * (*x - y[j]);
            }
            diffuse(row, point, one, sigma * root, bound, config.diffusion);
            let around = memory.sigma2 * root;
            diffuse(row, y, two, around, bound, memory.diffusion2);
        }
        self.buffer = first;
        Ok(())
    }

    pub(super) fn gradient_drift(&mut self, objective: &dyn Objective) -> Result<()> {
        let Some(drift) = self.config.gradient_drift else {
            return Ok(());
        };
        let particles = self.particles()?;
        let grads = match objective.gradients(&particles)? {
            Some(grads) => grads,
            None => {
                self.evaluations += 2 * self.v.len() as u64;
                finite_difference_gradients(objective, &particles, drift.fd_step)?
            }
        };
        if grads.dims() != particles.dims() {
            let expected = format!("{:?}", particles.dims());
            return Err(Error::shape(
                "gradients of the objective",
                grads.dims(),
                expected,
            ));
        }
        let step = drift.gamma * drift.learning_rate * self.config.dt;
        for (x, g) in self.v.iter_mut().zip(host(&grads)?) {
            // A particle at a point without a gradient is moved by the others.
            if g.is_finite() {
                *x -= step * g;
            }
        }
        Ok(())
    }

    pub(super) fn keep_inside(&mut self) {
        let Some(bounds) = &self.config.bounds else {
            return;
        };
        let end = |ends: &[f64], j: usize| ends[j % ends.len()];
        for row in self.v.chunks_exact_mut(self.d) {
            for (j, x) in row.iter_mut().enumerate() {
                let (low, high) = (end(&bounds.low, j), end(&bounds.high, j));
                if bounds.rule == BoundsRule::Reflect {
                    if *x < low {
                        *x = 2.0 * low - *x;
                    } else if *x > high {
                        *x = 2.0 * high - *x;
                    }
                }
                *x = x.clamp(low, high);
            }
        }
    }

    /// Lets the memories take over positions whose energies are these.
    pub(super) fn remember(&mut self, positions: &[f64]) {
        let (Some(memory), Some(memories)) = (self.config.memory, &mut self.memories) else {
            return;
        };
        let Some(energies) = &mut memories.energies else {
            return;
        };
        let d = self.d;
        let rows = memories.y.chunks_exact_mut(d).zip(self.v.chunks_exact(d));
        let mut moved = false;
        for ((y, x), (ey, ex)) in rows.zip(energies.iter_mut().zip(positions)) {
            match memory.acceptance {
                Acceptance::Heaviside => {
                    let better = *ex < *ey || (ey.is_nan() && !ex.is_nan());
                    if better {
                        y.copy_from_slice(x);
                        *ey = *ex;
                    }
                }
                Acceptance::Tanh(beta) => {
                    let gain = *ey - *ex;
                    let share = if gain.is_nan() {
                        f64::from(u8::from(ey.is_nan() && !ex.is_nan()))
                    } else {
                        (1.0 + (beta * gain).tanh()) / 2.0
                    };
                    let rate = memory.kappa * self.config.dt * share;
                    y.iter_mut().zip(x).for_each(|(y, x)| *y += rate * (x - *y));
                    moved = true;
                }
            }
        }
        if moved {
            // They lie between points whose energies are known.
            memories.energies = None;
        }
    }
}

/// Entries that one task moves; fixed, and no influence on the numbers anyway.
const ENTRIES: usize = 16 * 1024;

/// Calls `one` with every row and its noise (empty where there is none), on all cores.
fn for_rows(v: &mut [f64], noise: &[f64], d: usize, one: impl Fn(&mut [f64], &[f64]) + Sync) {
    let width = (ENTRIES / d).max(1) * d;
    let task = |(i, rows): (usize, &mut [f64])| {
        for (j, row) in rows.chunks_exact_mut(d).enumerate() {
            let start = i * width + j * d;
            one(row, noise.get(start..start + d).unwrap_or(&[]));
        }
    };
    if v.len() <= width {
        task((0, v));
    } else {
        v.par_chunks_mut(width).enumerate().for_each(task);
    }
}

pub(super) fn distance(row: &[f64], point: &[f64]) -> f64 {
    let squares: f64 = row.iter().zip(point).map(|(x, c)| (x - c) * (x - c)).sum();
    squares.sqrt()
}

/// `row += scale D noise`, with `D` from the distance of `row` to `point`, at most `bound`.
fn diffuse(row: &mut [f64], point: &[f64], noise: &[f64], scale: f64, bound: f64, kind: Diffusion) {
    match kind {
        Diffusion::None => {}
        Diffusion::Isotropic => {
            let factor = scale * distance(row, point).min(bound);
            row.iter_mut()
                .zip(noise)
                .for_each(|(x, xi)| *x += factor * xi);
        }
        Diffusion::Anisotropic => {
            for ((x, c), xi) in row.iter_mut().zip(point).zip(noise) {
                *x += scale * (*x - c).abs().min(bound) * xi;
            }
        }
    }
}

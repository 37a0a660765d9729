//! Batches of particles, kicks, and what happens at the end of an epoch.

use super::{Cbo, Rows, StepReport};
use crate::consensus::config::BatchUpdate;
use crate::consensus::noise::{NoiseSource, Purpose};
use crate::consensus::objective::Objective;
use crate::{Error, Result};

impl<S: NoiseSource> Cbo<S> {
    pub(super) fn batched_step(&mut self, objective: &dyn Objective) -> Result<StepReport> {
        let Some(batching) = self.config.batching else {
            return Err(Error::config("CboConfig::batching", "None", "batches"));
        };
        let n = self.len();
        self.begin_epoch();
        let order = self.noise.permutation(self.steps, n)?;
        let mut permuted = Vec::with_capacity(self.v.len());
        for i in order {
            let i = i as usize;
            permuted.extend_from_slice(&self.v[i * self.d..(i + 1) * self.d]);
        }
        self.v = permuted;
        let mut report = None;
        for from in (0..n).step_by(batching.particles) {
            let count = batching.particles.min(n - from);
            let rows = Rows::Range(from, count);
            let energies = self.evaluate(objective, rows)?;
            let meeting = self.meet(rows, &energies)?;
            let spread = self.spread(&meeting.point);
            report = Some(self.report(&meeting, spread)?);
            match batching.update {
                BatchUpdate::Full => self.move_rows(&meeting.point, 0, n)?,
                BatchUpdate::Partial => self.move_rows(&meeting.point, from, count)?,
            }
            self.kick(&meeting.point)?;
            self.keep_inside();
            self.last_consensus = meeting.point;
            self.moves += 1;
        }
        self.steps += 1;
        report.ok_or_else(|| Error::argument("particles", n, "at least 1"))
    }

    /// Keeps the variance before the first step of an epoch.
    pub(super) fn begin_epoch(&mut self) {
        if self.variance.is_none() {
            self.variance = Some(variance(&self.v, self.d));
        }
    }

    /// Noise for all particles where the consensus has stalled.
    fn kick(&mut self, point: &[f64]) -> Result<()> {
        let Some(threshold) = self.config.stall_kick else {
            return Ok(());
        };
        let moved = point
            .iter()
            .zip(&self.last_consensus)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f64::max);
        if moved >= threshold {
            return Ok(());
        }
        let noise = self.draw(Purpose::Kick, 0, self.len())?;
        let scale = self.sigma * self.config.dt.sqrt();
        self.v
            .iter_mut()
            .zip(&noise)
            .for_each(|(x, xi)| *x += scale * xi);
        self.buffer = noise;
        tracing::debug!(moved, "the consensus has stalled: all particles kicked");
        Ok(())
    }

    /// Cools and removes particles, as the configuration says, at the end of a pass over the data.
    ///
    /// # Errors
    /// Those of the noise.
    pub fn end_epoch(&mut self) -> Result<()> {
        self.epochs += 1;
        if let Some(cooling) = self.config.cooling {
            let e = self.epochs as f64;
            if cooling.sigma {
                self.sigma *= (e + 1.0).log2() / (e + 2.0).log2();
            }
            self.alpha *= cooling.alpha_factor;
        }
        let before = self.variance.take();
        if let (Some(speed), Some(before)) = (self.config.particle_reduction, before) {
            self.reduce(speed, before)?;
        }
        Ok(())
    }

    /// Keeps a random part of the particles, by how much the variance has shrunk.
    fn reduce(&mut self, speed: f64, before: f64) -> Result<()> {
        let after = variance(&self.v, self.d);
        if before <= 0.0 {
            return Ok(());
        }
        let factor = (speed * after + (1.0 - speed) * before) / before;
        let factor = factor.clamp(1.0 - speed, 1.0);
        let unit = self.config.batching.map_or(1, |b| b.particles);
        let n = self.len();
        let batches = (n as f64 / unit as f64 * factor).ceil() as usize;
        let keep = (batches * unit).clamp(2, n);
        if keep < n {
            let d = self.d;
            let mut order = self.noise.permutation(self.steps, n)?;
            order.truncate(keep);
            let rows = |from: &[f64]| -> Vec<f64> {
                let row = |i: &u32| &from[*i as usize * d..(*i as usize + 1) * d];
                order.iter().flat_map(row).copied().collect()
            };
            self.v = rows(&self.v);
            if let Some(memories) = &mut self.memories {
                memories.y = rows(&memories.y);
                if let Some(energies) = &mut memories.energies {
                    *energies = order.iter().map(|i| energies[*i as usize]).collect();
                }
            }
            tracing::debug!(from = n, to = keep, "fewer particles");
        }
        Ok(())
    }
}

/// Norm of the coordinate-wise sample variance.
fn variance(v: &[f64], d: usize) -> f64 {
    let n = (v.len() / d) as f64;
    let mut total = 0.0;
    for j in 0..d {
        let column = || v.iter().skip(j).step_by(d);
        let mean = column().sum::<f64>() / n;
        let squares: f64 = column().map(|x| (x - mean).powi(2)).sum();
        total += (squares / (n - 1.0)).powi(2);
    }
    total.sqrt()
}

//! More patterns where the optimum wants them: column generation.

use super::{AdmmRelu, AdmmRun, AdmmState};
use crate::error::check;
use crate::linalg::{dot, norm};
use crate::relu::{ConvexLoss, ConvexReluModel, Patterns};
use crate::{Error, RandomStream, Result};
use candle_core::Tensor;

/// Settings of [`AdmmRelu::fit_growing`].
#[derive(Debug, Clone, PartialEq)]
pub struct GrowConfig {
    /// Most rounds of new patterns.
    pub rounds: usize,
    /// New patterns of a round, at most.
    pub per_round: usize,
    /// Random directions of a round, from each of which the search climbs.
    pub candidates: usize,
    /// Steps of a climb, at most.
    pub climb: usize,
    /// How far above `beta` a direction must be, relative to it, to be wanted.
    pub tol: f64,
}

impl Default for GrowConfig {
    fn default() -> Self {
        Self {
            rounds: 20,
            per_round: 5,
            candidates: 200,
            climb: 50,
            tol: 1e-3,
        }
    }
}

impl GrowConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] that names the first bad one.
    pub fn validate(&self) -> Result<()> {
        check::at_least("GrowConfig::rounds", self.rounds, 1)?;
        check::at_least("GrowConfig::per_round", self.per_round, 1)?;
        check::at_least("GrowConfig::candidates", self.candidates, 1)?;
        check::non_negative("GrowConfig::tol", self.tol)
    }
}

/// What [`AdmmRelu::fit_growing`] found.
#[derive(Debug, Clone)]
pub struct Grown {
    /// The model over all patterns in the end.
    pub model: ConvexReluModel,
    /// Patterns and objective of each round, the first ones included.
    pub history: Vec<(usize, f64)>,
    /// `max |nu' relu(X u)| / beta - 1` over the directions that the last search saw, at the last
    /// model: at most the tolerance where no direction is wanted any more. The search is not
    /// exhaustive.
    pub excess: f64,
}

impl AdmmRelu {
    /// Trains over the given patterns and then over more of them: a unit `u` of norm one lowers the
    /// optimum where `|nu' relu(X u)| > beta`, with `nu` the negative slope of the loss. Each round
    /// climbs on that from random directions, adds the best patterns that are new, and goes on from the
    /// last round's iterates.
    ///
    /// # Errors
    /// As [`fit`](AdmmRelu::fit), those of [`GrowConfig::validate`], and [`Error::Unsupported`] for a
    /// loss other than the squared one.
    pub fn fit_growing(
        &self,
        x: &Tensor,
        y: &Tensor,
        patterns: &Patterns,
        grow: &GrowConfig,
        stream: &mut RandomStream,
    ) -> Result<Grown> {
        grow.validate()?;
        check::positive("AdmmConfig::beta", self.config.beta)?;
        if self.config.loss != ConvexLoss::Squared {
            return Err(Error::unsupported(
                "growing patterns",
                "with a loss other than the squared one",
            ));
        }
        let mut run = self.start(x, y, patterns)?;
        let mut history = vec![];
        loop {
            run.finish()?;
            let model = run.model();
            history.push((run.patterns.len(), model.objective));
            let found = run.search(&model, grow, stream);
            let excess = found.first().map_or(0.0, |f| f.0) / self.config.beta - 1.0;
            let grown = run.patterns_with(&found, grow, self.config.beta);
            if grown.len() == run.patterns.len() || history.len() > grow.rounds {
                return Ok(Grown {
                    model,
                    history,
                    excess,
                });
            }
            let state = run.state().widened(run.patterns.len(), grown.len());
            run = self.start(x, y, &grown)?;
            run.restore(&state)?;
            run.iterations = 0;
        }
    }
}

impl AdmmRun {
    /// Values of `|nu' relu(X u)|` and unit directions, the largest first.
    fn search(
        &self,
        model: &ConvexReluModel,
        grow: &GrowConfig,
        stream: &mut RandomStream,
    ) -> Vec<(f64, Vec<f64>)> {
        let outputs = self.outputs(&model.v, &model.w);
        let nu: Vec<f64> = self
            .data
            .y
            .iter()
            .zip(outputs)
            .map(|(y, f)| y - f)
            .collect();
        let d = self.data.x.ncols();
        let mut found: Vec<(f64, Vec<f64>)> = (0..grow.candidates)
            .map(|_| {
                let mut u: Vec<f64> = (0..d).map(|_| stream.next_normal()).collect();
                unit(&mut u);
                self.climb(u, &nu, grow.climb)
            })
            .collect();
        found.sort_by(|a, b| b.0.total_cmp(&a.0));
        found
    }

    /// `nu' relu(X u)` and its slope.
    fn pull(&self, u: &[f64], nu: &[f64]) -> (f64, Vec<f64>) {
        let x = &self.data.x;
        let mut slope = vec![0.0; u.len()];
        let mut value = 0.0;
        for (k, nu) in nu.iter().enumerate() {
            let score: f64 = (0..u.len()).map(|j| x[(k, j)] * u[j]).sum();
            if score >= 0.0 {
                value += nu * score;
                (0..u.len()).for_each(|j| slope[j] += nu * x[(k, j)]);
            }
        }
        (value, slope)
    }

    /// Steps along the slope on the sphere, halved until the absolute value rises.
    fn climb(&self, mut u: Vec<f64>, nu: &[f64], steps: usize) -> (f64, Vec<f64>) {
        let (mut value, mut slope) = self.pull(&u, nu);
        let mut length = 1.0;
        for _ in 0..steps {
            let size = norm(&slope);
            if size == 0.0 || length < 1e-6 {
                break;
            }
            let sign = if value < 0.0 { -1.0 } else { 1.0 };
            let mut next: Vec<f64> = u
                .iter()
                .zip(&slope)
                .map(|(u, g)| u + sign * length * g / size)
                .collect();
            unit(&mut next);
            let (there, its) = self.pull(&next, nu);
            if there.abs() > value.abs() {
                (u, value, slope) = (next, there, its);
            } else {
                length *= 0.5;
            }
        }
        (value.abs(), u)
    }

    /// The patterns with the wanted ones of `found` that are new.
    fn patterns_with(&self, found: &[(f64, Vec<f64>)], grow: &GrowConfig, beta: f64) -> Patterns {
        let mut out = self.patterns.clone();
        let wanted = found
            .iter()
            .take_while(|(value, _)| *value > beta * (1.0 + grow.tol));
        for (_, u) in wanted {
            if out.len() == self.patterns.len() + grow.per_round {
                break;
            }
            let x = &self.data.x;
            let active = |k: usize| (0..u.len()).map(|j| x[(k, j)] * u[j]).sum::<f64>() >= 0.0;
            out.add((0..x.nrows()).map(active).collect(), u, out.len());
        }
        out
    }
}

impl AdmmState {
    /// The same with units of zero for patterns after the first `from`.
    fn widened(self, from: usize, to: usize) -> Self {
        let sides = |x: &[f64], size: usize| -> Vec<f64> {
            let mut out = vec![];
            for side in x.chunks(from * size) {
                out.extend_from_slice(side);
                out.resize(out.len() + (to - from) * size, 0.0);
            }
            out
        };
        let rows = |x: &[f64]| -> Vec<f64> {
            let mut out = vec![];
            for row in x.chunks(from) {
                out.extend_from_slice(row);
                out.resize(out.len() + to - from, 0.0);
            }
            out
        };
        let d = self.u.len() / (2 * from);
        Self {
            u: sides(&self.u, d),
            v: sides(&self.v, d),
            lambda: sides(&self.lambda, d),
            s: rows(&self.s),
            nu: rows(&self.nu),
            rho: self.rho,
            iterations: self.iterations,
        }
    }
}

fn unit(u: &mut [f64]) {
    let size = dot(u, u).sqrt();
    if size > 0.0 {
        u.iter_mut().for_each(|x| *x /= size);
    }
}

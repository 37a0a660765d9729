//! From the iterates to a model: the projection on the cones, the objective, a lower bound.

use super::{columns, gate, AdmmRun};
use crate::linalg::dot;
use crate::relu::model::{group_norms, outputs_and_slack, violation};
use crate::relu::projection::onto_cones;
use crate::relu::{ConvexLoss, ConvexReluModel};
use faer::Mat;

impl AdmmRun {
    /// The objective of `v` with gated outputs, `|u - v|`, `|G u - s|`, and the largest violation of
    /// `v`'s cones.
    pub fn progress(&self) -> [f64; 4] {
        let (v, w) = self.v.split_at(self.v.len() / 2);
        let [primal, slack, ..] = self.residuals;
        [self.objective(v, w), primal, slack, self.violated(v, w)]
    }

    fn violated(&self, v: &[f64], w: &[f64]) -> f64 {
        let all = vec![true; self.data.x.ncols()];
        let of = |units: &[f64]| violation(&self.data.x, &self.patterns, units, 0.0, &all);
        of(v).max(of(w))
    }

    /// Gated outputs for the training rows.
    pub(super) fn outputs(&self, v: &[f64], w: &[f64]) -> Vec<f64> {
        let all = vec![true; self.data.x.ncols()];
        outputs_and_slack(&self.data.x, &self.patterns, v, w, &all).0
    }

    fn objective(&self, v: &[f64], w: &[f64]) -> f64 {
        let d = self.data.x.ncols();
        self.data.loss(self.config.loss, &self.outputs(v, w), None)
            + self.config.beta * (group_norms(v, d) + group_norms(w, d))
    }

    /// The model at this point, its units projected on their cones.
    pub fn model(&self) -> ConvexReluModel {
        let mut v = self.v.clone();
        let mut w = v.split_off(v.len() / 2);
        onto_cones(&self.data.x, &self.patterns, &mut v);
        onto_cones(&self.data.x, &self.patterns, &mut w);
        let objective = self.objective(&v, &w);
        let bound = self.lower_bound(&v, &w);
        ConvexReluModel {
            patterns: self.patterns.clone(),
            gap: bound.map_or(f64::INFINITY, |b| objective - b),
            violation: self.violated(&v, &w),
            objective,
            v,
            w,
            iterations: self.iterations,
            converged: self.met(self.config.tol),
        }
    }

    /// A bound of the optimum by the dual problem, at the residual and the cones' multipliers scaled
    /// until they are feasible; for the squared loss.
    fn lower_bound(&self, v: &[f64], w: &[f64]) -> Option<f64> {
        if self.config.loss != ConvexLoss::Squared {
            return None;
        }
        let n = self.gates.n;
        let outputs = self.outputs(v, w);
        let residual: Vec<f64> = (0..n).map(|k| self.data.y[k] - outputs[k]).collect();
        let mut inner = vec![0.0; self.nu.len()];
        let pairs = inner.chunks_mut(n).zip(self.nu.chunks(n));
        for (c, (inner, nu)) in pairs.enumerate() {
            let (signs, own) = self.gates.of(c);
            for k in 0..n {
                let multiplier = (-self.config.rho * nu[k]).max(0.0);
                inner[k] = gate(signs[k], own) * residual[k] + signs[k] * multiplier;
            }
        }
        let forces: Mat<f64> = self.data.x.transpose() * columns(&inner, n);
        let largest = (0..forces.ncols())
            .map(|c| forces.col(c).norm_l2())
            .fold(0.0, f64::max);
        let (square, along) = (dot(&residual, &residual), dot(&residual, &self.data.y));
        let most = if largest > 0.0 {
            self.config.beta / largest
        } else {
            f64::INFINITY
        };
        let best = if square > 0.0 { along / square } else { 0.0 };
        let scale = best.min(most).max(0.0);
        Some(scale * along - 0.5 * scale * scale * square)
    }
}

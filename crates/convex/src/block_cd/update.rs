//! What happens to a block.

use super::tree::solve_forest;
use super::{BlockCdConfig, Penalty, SmoothObjective, Update};
use crate::linalg::{dot, largest_eigenvalue, solve_psd};
use crate::{Error, Result};
use faer::MatRef;

/// Halvings of a line search before it gives up.
const BACKTRACKS: usize = 60;

/// What updates keep between steps.
pub(super) struct Step {
    /// Estimates of the adaptive update, one a coordinate.
    pub estimates: Vec<f64>,
}

impl Step {
    pub(super) fn new(config: &BlockCdConfig, dim: usize) -> Self {
        let adaptive = config.update == Update::AdaptiveLipschitz;
        Self {
            estimates: if adaptive { vec![1.0; dim] } else { vec![] },
        }
    }

    /// Moves the block.
    pub(super) fn take(
        &mut self,
        config: &BlockCdConfig,
        objective: &mut impl SmoothObjective,
        block: &[usize],
    ) -> Result<()> {
        let grad = objective.grad_block(block);
        if grad.iter().all(|g| *g == 0.0) && config.penalty == Penalty::None {
            return Ok(());
        }
        let objective_ref: &_ = &*objective;
        let delta = match config.update {
            Update::Gradient => {
                let l = constant(objective_ref, block)?;
                grad.iter().map(|g| -g / l).collect()
            }
            Update::AdaptiveLipschitz => self.adaptive(objective_ref, block, &grad)?,
            Update::MatrixBound => {
                negated(solve_psd(objective_ref.bound_block(block).as_ref(), &grad)?)
            }
            Update::Newton { line_search } => {
                let full = negated(solve_psd(objective_ref.hess_block(block).as_ref(), &grad)?);
                if line_search {
                    backtrack(objective_ref, block, &grad, full, config.armijo)
                } else {
                    full
                }
            }
            Update::ExactTree => {
                let graph = objective_ref.graph().ok_or_else(|| {
                    Error::unsupported("message passing", "for an objective without a graph")
                })?;
                solve_forest(graph, block, &grad)?
            }
            Update::ProxGradient => {
                let l = constant(objective_ref, block)?;
                let x = objective_ref.point();
                let moved = block.iter().zip(&grad);
                moved
                    .map(|(&i, g)| config.penalty.prox(x[i] - g / l, 1.0 / l) - x[i])
                    .collect()
            }
            Update::TwoMetric => two_metric(config, objective_ref, block, &grad)?,
            Update::ProxNewton => prox_newton(config, objective_ref, block, &grad)?,
        };
        objective.update(block, &delta);
        Ok(())
    }

    /// Doubles the constant until the step decreases as much as a right one would.
    fn adaptive(
        &mut self,
        objective: &impl SmoothObjective,
        block: &[usize],
        grad: &[f64],
    ) -> Result<Vec<f64>> {
        let value = objective.value();
        let square = dot(grad, grad);
        let mut l = block.iter().fold(0.0f64, |m, &i| m.max(self.estimates[i]));
        loop {
            let delta: Vec<f64> = grad.iter().map(|g| -g / l).collect();
            let moved = objective.value_moved(block, &delta);
            // At the end of the doublings the step is zero and the condition holds by rounding.
            if moved <= value - square / (2.0 * l) || l > 1e300 {
                block.iter().for_each(|&i| self.estimates[i] = l);
                return Ok(if l > 1e300 {
                    vec![0.0; block.len()]
                } else {
                    delta
                });
            }
            l *= 2.0;
        }
    }
}

/// What two values of the objective differ by for no reason.
fn rounding(value: f64) -> f64 {
    8.0 * f64::EPSILON * value.abs().max(1.0)
}

fn negated(mut x: Vec<f64>) -> Vec<f64> {
    x.iter_mut().for_each(|x| *x = -*x);
    x
}

/// `L_b`; 1 for a block of zero columns, which does not move anyway.
fn constant(objective: &impl SmoothObjective, block: &[usize]) -> Result<f64> {
    let l = objective.block_lipschitz(block)?;
    Ok(if l > 0.0 { l } else { 1.0 })
}

/// Backtracking with quadratic and cubic interpolation (Nocedal and Wright, section 3.5), each new
/// step between a tenth and a half of the old.
fn backtrack(
    objective: &impl SmoothObjective,
    block: &[usize],
    grad: &[f64],
    full: Vec<f64>,
    armijo: f64,
) -> Vec<f64> {
    let slope = dot(grad, &full);
    let value = objective.value();
    let at = |alpha: f64| -> Vec<f64> { full.iter().map(|d| alpha * d).collect() };
    let excess = |alpha: f64, f: f64| f - value - alpha * slope;
    let (mut alpha, mut before) = (1.0, None);
    for _ in 0..BACKTRACKS {
        let delta = at(alpha);
        let f = objective.value_moved(block, &delta);
        if f <= value + armijo * alpha * slope + rounding(value) {
            return delta;
        }
        let z = excess(alpha, f);
        let next = match before {
            None => -(slope * alpha * alpha) / (2.0 * z),
            Some((old, old_z)) => cubic(slope, (old, old_z), (alpha, z)),
        };
        before = Some((alpha, z));
        let next = if next.is_finite() { next } else { 0.5 * alpha };
        alpha = next.clamp(0.1 * alpha, 0.5 * alpha);
    }
    vec![0.0; block.len()]
}

/// The minimum of the cubic through the value and slope at 0 and the excesses at two steps.
fn cubic(slope: f64, (a0, z0): (f64, f64), (a1, z1): (f64, f64)) -> f64 {
    let scale = 1.0 / (a0 * a0 * a1 * a1 * (a1 - a0));
    let a = scale * (a0 * a0 * z1 - a1 * a1 * z0);
    let b = scale * (a1 * a1 * a1 * z0 - a0 * a0 * a0 * z1);
    (-b + (b * b - 3.0 * a * slope).sqrt()) / (3.0 * a)
}

/// A coordinate this close to zero whose gradient points outside counts as being there.
const AT_ZERO: f64 = 1e-4;

fn two_metric(
    config: &BlockCdConfig,
    objective: &impl SmoothObjective,
    block: &[usize],
    grad: &[f64],
) -> Result<Vec<f64>> {
    let Penalty::NonNegative { l1 } = config.penalty else {
        // Refused when the solver was made.
        return Ok(vec![0.0; block.len()]);
    };
    let x: Vec<f64> = block.iter().map(|&i| objective.point()[i]).collect();
    let g: Vec<f64> = grad.iter().map(|g| g + l1).collect();
    let (active, working): (Vec<usize>, Vec<usize>) =
        (0..block.len()).partition(|&r| x[r] < AT_ZERO && g[r] > 0.0);
    let mut direction = vec![0.0; block.len()];
    let free: Vec<usize> = working.iter().map(|&r| block[r]).collect();
    if !free.is_empty() {
        let right: Vec<f64> = working.iter().map(|&r| g[r]).collect();
        let newton = solve_psd(objective.hess_block(&free).as_ref(), &right)?;
        working
            .iter()
            .zip(newton)
            .for_each(|(&r, d)| direction[r] = d);
    }
    let constants = objective.coord_lipschitz();
    let sum: f64 = active.iter().map(|&r| constants[block[r]]).sum();
    for &r in &active {
        direction[r] = if sum > 0.0 { g[r] / sum } else { 0.0 };
    }
    let value = objective.value() + l1 * x.iter().sum::<f64>();
    let mut alpha = 1.0;
    for _ in 0..BACKTRACKS {
        let moved: Vec<f64> = x
            .iter()
            .zip(&direction)
            .map(|(x, d)| (x - alpha * d).max(0.0))
            .collect();
        let delta: Vec<f64> = moved.iter().zip(&x).map(|(m, x)| m - x).collect();
        let f = objective.value_moved(block, &delta) + l1 * moved.iter().sum::<f64>();
        if f <= value + config.armijo * dot(&g, &delta) + rounding(value) {
            return Ok(delta);
        }
        alpha *= 0.5;
    }
    Ok(vec![0.0; block.len()])
}

/// `min_d g' d + 1/2 d' H d + sum_i g_i(x_i + d_i)` by cyclic coordinate descent to optimality, then
/// backtracking on the true objective.
fn prox_newton(
    config: &BlockCdConfig,
    objective: &impl SmoothObjective,
    block: &[usize],
    grad: &[f64],
) -> Result<Vec<f64>> {
    let x: Vec<f64> = block.iter().map(|&i| objective.point()[i]).collect();
    let hess = objective.hess_block(block);
    let d = minimize_model(hess.as_ref(), grad, &x, &config.penalty)?;
    let penalty = |t: f64| -> f64 {
        let moved: Vec<f64> = x.iter().zip(&d).map(|(x, d)| x + t * d).collect();
        config.penalty.value(&moved)
    };
    let value = objective.value();
    // What the linear part promises; negative but for rounding.
    let promise = dot(grad, &d) + penalty(1.0) - penalty(0.0);
    let start = value + penalty(0.0);
    let allowed = |alpha: f64| start + config.armijo * alpha * promise.min(0.0) + rounding(start);
    let mut alpha = 1.0;
    for _ in 0..BACKTRACKS {
        let delta: Vec<f64> = d.iter().map(|d| alpha * d).collect();
        let f = objective.value_moved(block, &delta) + penalty(alpha);
        if f <= allowed(alpha) {
            return Ok(delta);
        }
        alpha *= 0.5;
    }
    Ok(vec![0.0; block.len()])
}

fn minimize_model(
    hess: MatRef<'_, f64>,
    grad: &[f64],
    x: &[f64],
    penalty: &Penalty,
) -> Result<Vec<f64>> {
    const SWEEPS: usize = 10_000;
    let n = grad.len();
    let largest = largest_eigenvalue(hess)?;
    let ridge = 1e-10 * largest.max(f64::MIN_POSITIVE);
    let mut d = vec![0.0; n];
    let mut slope = grad.to_vec();
    for _ in 0..SWEEPS {
        let mut change = 0.0f64;
        for i in 0..n {
            let l = hess[(i, i)] + ridge;
            let new = penalty.prox(x[i] + d[i] - slope[i] / l, 1.0 / l) - x[i];
            let by = new - d[i];
            if by != 0.0 {
                d[i] = new;
                for (r, s) in slope.iter_mut().enumerate() {
                    *s += by * hess[(r, i)];
                }
                slope[i] += by * ridge;
                change = change.max(l.sqrt() * by.abs());
            }
        }
        let scale = crate::linalg::max_abs(&d) * largest.sqrt();
        if change <= 1e-13 * scale.max(f64::MIN_POSITIVE) {
            break;
        }
    }
    Ok(d)
}

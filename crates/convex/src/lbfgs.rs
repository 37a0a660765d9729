//! Limited-memory BFGS with a strong-Wolfe line search (Nocedal and Wright, *Numerical
//! Optimization*, algorithms 3.5, 3.6 and 7.5), for the smooth duals of this crate.

use crate::linalg::{axpy, dot, max_abs};
use std::collections::VecDeque;

/// When to stop.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Pairs of differences that are kept.
    pub memory: usize,
    /// Largest entry of the gradient at which it stops.
    pub tol: f64,
    /// Most iterations.
    pub max_iter: usize,
}

/// Where it stopped.
#[derive(Debug, Clone)]
pub(crate) struct Minimum {
    /// The point with the smallest value.
    pub x: Vec<f64>,
    /// Iterations done.
    pub iterations: usize,
    /// Values at the start and after each iteration.
    pub history: Vec<f64>,
}

const ARMIJO: f64 = 1e-4;
const CURVATURE: f64 = 0.9;
/// Evaluations of one line search.
const TRIALS: usize = 30;

/// Iterations in a row without a change of the value beyond rounding.
const STALLS: usize = 5;

struct Point {
    x: Vec<f64>,
    value: f64,
    gradient: Vec<f64>,
}

/// Minimises `f`, which writes the gradient into its second argument. On a kink the line search
/// stalls; the best point so far is the answer and its gradient tells.
pub(crate) fn minimize(
    start: &[f64],
    limits: Limits,
    mut f: impl FnMut(&[f64], &mut [f64]) -> f64,
) -> Minimum {
    let mut at = |x: Vec<f64>| {
        let mut gradient = vec![0.0; x.len()];
        let value = f(&x, &mut gradient);
        Point { x, value, gradient }
    };
    let mut now = at(start.to_vec());
    let mut pairs: VecDeque<(Vec<f64>, Vec<f64>, f64)> = VecDeque::new();
    let mut history = vec![now.value];
    let (mut iterations, mut stalled) = (0, 0);
    while iterations < limits.max_iter && max_abs(&now.gradient) > limits.tol {
        let mut direction = two_loops(&now.gradient, &pairs);
        let mut slope = dot(&direction, &now.gradient);
        if slope >= 0.0 {
            pairs.clear();
            direction = now.gradient.iter().map(|g| -g).collect();
            slope = -dot(&now.gradient, &now.gradient);
        }
        let first = if pairs.is_empty() {
            (1.0 / crate::linalg::norm(&now.gradient)).min(1.0)
        } else {
            1.0
        };
        let Some(next) = search(&now, &direction, slope, first, &mut at) else {
            if pairs.is_empty() {
                break;
            }
            pairs.clear();
            continue;
        };
        iterations += 1;
        let s: Vec<f64> = next.x.iter().zip(&now.x).map(|(a, b)| a - b).collect();
        let y: Vec<f64> = next
            .gradient
            .iter()
            .zip(&now.gradient)
            .map(|(a, b)| a - b)
            .collect();
        let curvature = dot(&s, &y);
        if curvature > f64::EPSILON * dot(&y, &y) {
            if pairs.len() == limits.memory {
                pairs.pop_front();
            }
            pairs.push_back((s, y, 1.0 / curvature));
        }
        let change = now.value - next.value;
        now = next;
        history.push(now.value);
        let stalls = change <= 4.0 * f64::EPSILON * now.value.abs().max(1.0);
        stalled = if stalls { stalled + 1 } else { 0 };
        if stalled == STALLS {
            break;
        }
    }
    Minimum {
        x: now.x,
        iterations,
        history,
    }
}

fn two_loops(gradient: &[f64], pairs: &VecDeque<(Vec<f64>, Vec<f64>, f64)>) -> Vec<f64> {
    let mut q: Vec<f64> = gradient.iter().map(|g| -g).collect();
    let mut alphas = Vec::with_capacity(pairs.len());
    for (s, y, rho) in pairs.iter().rev() {
        let alpha = rho * dot(s, &q);
        axpy(-alpha, y, &mut q);
        alphas.push(alpha);
    }
    if let Some((_, y, rho)) = pairs.back() {
        let scale = 1.0 / (rho * dot(y, y));
        q.iter_mut().for_each(|q| *q *= scale);
    }
    for ((s, y, rho), alpha) in pairs.iter().zip(alphas.iter().rev()) {
        let beta = rho * dot(y, &q);
        axpy(alpha - beta, s, &mut q);
    }
    q
}

/// A point along `direction` that satisfies the strong Wolfe conditions; the best one that at
/// least decreases where none was found; `None` where nothing decreases.
fn search(
    from: &Point,
    direction: &[f64],
    slope: f64,
    first: f64,
    at: &mut impl FnMut(Vec<f64>) -> Point,
) -> Option<Point> {
    let mut evaluate = |t: f64| {
        let mut x = from.x.clone();
        axpy(t, direction, &mut x);
        let point = at(x);
        let slope = dot(&point.gradient, direction);
        (point, slope)
    };
    // Where values differ by rounding only, the slopes decide (Hager and Zhang's approximate
    // condition).
    let noise = 2.0 * f64::EPSILON * from.value.abs().max(1.0);
    let armijo = |t: f64, value: f64| value <= from.value + ARMIJO * t * slope;
    // The bracket: low has the smaller value.
    let (mut low, mut low_value, mut low_slope) = (0.0, from.value, slope);
    let (mut high, mut high_value) = (f64::INFINITY, f64::INFINITY);
    let mut best: Option<Point> = None;
    let mut t = first;
    for _ in 0..TRIALS {
        let (point, point_slope) = evaluate(t);
        let value = point.value;
        let flat = value <= from.value + noise && point_slope.abs() <= -CURVATURE * slope;
        if flat {
            return Some(point);
        }
        if !value.is_finite() || !armijo(t, value) || value >= low_value {
            (high, high_value) = (t, value);
        } else {
            if point_slope * (if high.is_finite() { high - low } else { 1.0 }) >= 0.0 {
                (high, high_value) = (low, low_value);
            }
            (low, low_value, low_slope) = (t, value, point_slope);
            best = Some(point);
        }
        t = if high.is_infinite() {
            2.0 * t
        } else {
            inside(low, low_value, low_slope, high, high_value)
        };
        if high.is_finite() && (high - low).abs() <= 1e-14 * low.abs().max(1e-300) {
            break;
        }
    }
    best
}

/// The minimum of the parabola through both values and the slope at `low`, kept away from the
/// ends.
fn inside(low: f64, low_value: f64, low_slope: f64, high: f64, high_value: f64) -> f64 {
    let width = high - low;
    let bend = high_value - low_value - low_slope * width;
    let t = if bend.is_finite() && bend > 0.0 {
        -low_slope * width / (2.0 * bend)
    } else {
        0.5
    };
    low + width * t.clamp(0.1, 0.9)
}

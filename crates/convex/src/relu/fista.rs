//! Accelerated proximal gradients.

use crate::linalg::{axpy, dot, max_abs};

/// How an iteration ended.
pub(super) struct Reached {
    pub x: Vec<f64>,
    pub iterations: usize,
    /// The last proximal step, in units of the gradient.
    pub residual: f64,
}

/// Beck and Teboulle's method from zeros, restarted where the step turns against the momentum
/// (O'Donoghue and Candes). `gradient` is that of the smooth part, with Lipschitz constant `l`; `prox`
/// works in place, with the step `1 / l`.
pub(super) fn accelerate(
    dim: usize,
    l: f64,
    mut gradient: impl FnMut(&[f64]) -> Vec<f64>,
    mut prox: impl FnMut(&mut [f64]),
    max_iter: usize,
    tol: f64,
) -> Reached {
    let (mut x, mut y, mut momentum) = (vec![0.0; dim], vec![0.0; dim], 1.0f64);
    let (mut residual, mut iterations) = (f64::INFINITY, 0);
    while iterations < max_iter && residual > tol {
        iterations += 1;
        let mut next = y.clone();
        axpy(-1.0 / l, &gradient(&y), &mut next);
        prox(&mut next);
        let moved: Vec<f64> = next.iter().zip(&y).map(|(a, b)| a - b).collect();
        let along: Vec<f64> = next.iter().zip(&x).map(|(a, b)| a - b).collect();
        residual = l * max_abs(&moved);
        if dot(&moved, &along) < 0.0 {
            momentum = 1.0;
        }
        let following = 0.5 * (1.0 + (1.0 + 4.0 * momentum * momentum).sqrt());
        y.clone_from(&next);
        axpy((momentum - 1.0) / following, &along, &mut y);
        (x, momentum) = (next, following);
    }
    Reached {
        x,
        iterations,
        residual,
    }
}

//! Functions whose minimum is known, for any number of coordinates unless said otherwise.

use super::objective::PerParticle;
use std::f64::consts::{E, PI, TAU};

/// `sum x^2 + 2.5 (1 - cos 2 pi x)`: a bowl with a grid of local minima; 0 at the origin.
pub fn rastrigin() -> PerParticle {
    let value = |x: &[f64]| -> f64 {
        x.iter()
            .map(|x| x * x + 2.5 * (1.0 - (TAU * x).cos()))
            .sum()
    };
    PerParticle::new(value).with_gradient(|x, g| {
        for (g, x) in g.iter_mut().zip(x) {
            *g = 2.0 * x + 5.0 * PI * (TAU * x).sin();
        }
    })
}

/// Ackley's function with the usual constants 20, 0.2 and `2 pi`; 0 at the origin, where the
/// gradient is taken as 0.
pub fn ackley() -> PerParticle {
    let parts = |x: &[f64]| {
        let n = x.len() as f64;
        let root = (x.iter().map(|x| x * x).sum::<f64>() / n).sqrt();
        let wave = (x.iter().map(|x| (TAU * x).cos()).sum::<f64>() / n).exp();
        (20.0 * (-0.2 * root).exp(), root, wave)
    };
    let value = move |x: &[f64]| {
        let (bowl, _, wave) = parts(x);
        -bowl - wave + 20.0 + E
    };
    PerParticle::new(value).with_gradient(move |x, g| {
        let n = x.len() as f64;
        let (bowl, root, wave) = parts(x);
        for (g, x) in g.iter_mut().zip(x) {
            let slope = if root > 0.0 {
                0.2 * bowl * x / (n * root)
            } else {
                0.0
            };
            *g = slope + wave * TAU * (TAU * x).sin() / n;
        }
    })
}

/// `x^2 ((x - 4)^2 + 1)` summed over the coordinates: two valleys, the lower one at 0.
pub fn w_shaped() -> PerParticle {
    let value = |x: &[f64]| -> f64 { x.iter().map(|x| x * x * ((x - 4.0).powi(2) + 1.0)).sum() };
    PerParticle::new(value).with_gradient(|x, g| {
        for (g, x) in g.iter_mut().zip(x) {
            *g = 2.0 * x * ((x - 4.0).powi(2) + 1.0) + 2.0 * x * x * (x - 4.0);
        }
    })
}

/// A bent canyon in two coordinates with a barrier across it and, if `noisy`, deep ripples: the
/// minimum 0 lies at the origin, and gradient descent from (8, 8) ends in a ripple far from it.
/// Particles of another dimension have an energy of NaN.
pub fn grand_canyon(noisy: bool) -> PerParticle {
    let ripple = if noisy { 1.1625 } else { 0.25 };
    PerParticle::new(move |x| match x {
        [a, b] => canyon(*a, *b, ripple),
        _ => f64::NAN,
    })
}

fn canyon(a: f64, b: f64, ripple: f64) -> f64 {
    let valley = b - (2.0 / 16.0 * (a - 1.0) * (a - 4.0).powi(2) + 2.0);
    let block = -a - 1.6 * b;
    let walls = 25.0 * (1.0 - (-1.4 * valley * valley * (-0.002 * a.powi(4)).exp()).exp());
    let bowl = 0.4 * a * a + 0.2 * b * b;
    let waves = 2.0 - (0.75 * PI * a).cos() - (0.75 * PI * b).cos();
    let sign = if block > 0.0 {
        1.0
    } else if block < 0.0 {
        -1.0
    } else {
        0.0
    };
    let height = ((1.0 - (-9.0 * block * block).exp()) * sign).max(0.0);
    let barrier = 4.0 * (1.0 - 2.0 * valley.powi(4)).exp() * height;
    walls + bowl + ripple * waves + barrier
}

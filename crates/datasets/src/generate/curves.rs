//! Curves in the plane that no straight line separates: two moons and spirals.

use crate::{Classification, Error, Result};
use candle_core::{DType, Device, Tensor};
use tensor_core::random::RandomStream;

/// Two interleaved half circles with Gaussian noise, as in scikit-learn's `make_moons`: points at
/// even angles, class 0 on `(cos t, sin t)`, class 1 on `(1 - cos t, 1/2 - sin t)`, `t` from 0 to
/// pi; rows in random order. For odd `n` class 1 has the additional point.
///
/// # Errors
/// [`Error::InvalidArgument`] for `n = 0` or noise that is negative or not finite.
pub fn two_moons(
    n: usize,
    noise: f64,
    rng: &mut RandomStream,
    dtype: DType,
    device: &Device,
) -> Result<Classification> {
    let point = |class: usize, i: usize, m: usize| {
        // The first and the last point stand at the ends of the half circle.
        let t = std::f64::consts::PI * i as f64 / (m.max(2) - 1) as f64;
        match class {
            0 => [t.cos(), t.sin()],
            _ => [1.0 - t.cos(), 0.5 - t.sin()],
        }
    };
    curves(n, 2, noise, rng, dtype, device, point)
}

/// `arms` spirals around the origin with Gaussian noise: class `k` runs on
/// `t (cos a, sin a)` with `a = 2 pi (turns t + k / arms)` and `t` even in `(0, 1)`; rows in random
/// order.
///
/// # Errors
/// [`Error::InvalidArgument`] for `n = 0`, no arm, or turns or noise that are negative or not
/// finite.
pub fn spirals(
    n: usize,
    arms: usize,
    turns: f64,
    noise: f64,
    rng: &mut RandomStream,
    dtype: DType,
    device: &Device,
) -> Result<Classification> {
    if arms == 0 {
        return Err(Error::invalid("arms", 0, "at least 1"));
    }
    if !(turns.is_finite() && turns >= 0.0) {
        return Err(Error::invalid("turns", turns, "a finite number >= 0"));
    }
    let point = |class: usize, i: usize, m: usize| {
        let t = (i as f64 + 0.5) / m as f64;
        let angle = std::f64::consts::TAU * (turns * t + class as f64 / arms as f64);
        [t * angle.cos(), t * angle.sin()]
    };
    curves(n, arms, noise, rng, dtype, device, point)
}

/// Points of `classes` curves, `point(class, i, m)` being the i-th of m, with noise, shuffled.
fn curves(
    n: usize,
    classes: usize,
    noise: f64,
    rng: &mut RandomStream,
    dtype: DType,
    device: &Device,
    point: impl Fn(usize, usize, usize) -> [f64; 2],
) -> Result<Classification> {
    if n == 0 {
        return Err(Error::invalid("n", 0, "at least 1"));
    }
    if !(noise.is_finite() && noise >= 0.0) {
        return Err(Error::invalid("noise", noise, "a finite number >= 0"));
    }
    let mut rows = Vec::with_capacity(n);
    for class in 0..classes {
        let m = n * (class + 1) / classes - n * class / classes;
        rows.extend((0..m).map(|i| (point(class, i, m), class as u32)));
    }
    rng.shuffle(&mut rows)?;
    let mut inputs = vec![0.0; 2 * n];
    rng.fill_normal(&mut inputs);
    for (x, (point, _)) in inputs.chunks_mut(2).zip(&rows) {
        x[0] = point[0] + noise * x[0];
        x[1] = point[1] + noise * x[1];
    }
    let labels: Vec<u32> = rows.iter().map(|(_, class)| *class).collect();
    let inputs = Tensor::from_vec(inputs, (n, 2), device)?.to_dtype(dtype)?;
    Classification::new(inputs, Tensor::from_vec(labels, n, device)?, classes)
}

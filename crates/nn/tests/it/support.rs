//! Shared by the tests.

use candle_core::{DType, Device, Tensor, Var};
use tensor_core::random::RandomStream;

pub const CPU: Device = Device::Cpu;

pub fn normal(seed: u64, shape: &[usize], dtype: DType) -> Tensor {
    RandomStream::new(seed)
        .normal(0.0, 1.0, shape, dtype, &CPU)
        .unwrap()
}

pub fn values(t: &Tensor) -> Vec<f64> {
    let t = t.to_dtype(DType::F64).unwrap();
    t.flatten_all().unwrap().to_vec1().unwrap()
}

/// Bit patterns, so that `-0.0`, `0.0` and NaNs are told apart.
pub fn bits(t: &Tensor) -> Vec<u64> {
    values(t).into_iter().map(f64::to_bits).collect()
}

/// `max |a - b| / max(1, |b|)`.
pub fn distance(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims());
    let pairs = values(a).into_iter().zip(values(b));
    pairs
        .map(|(a, b)| (a - b).abs() / b.abs().max(1.0))
        .fold(0.0, f64::max)
}

/// Compares the gradients of a scalar function with central differences, entry by entry.
pub fn check_gradients(vars: &[&Var], f: impl Fn() -> Tensor) -> f64 {
    let grads = f().backward().unwrap();
    let mut worst = 0.0_f64;
    for var in vars {
        let analytic = values(grads.get(var).expect("no gradient arrives"));
        let start = values(var);
        let at = |i: usize, step: f64| {
            let mut moved = start.clone();
            moved[i] += step;
            var.set(&Tensor::from_vec(moved, var.dims(), &CPU).unwrap())
                .unwrap();
            values(&f())[0]
        };
        for (i, a) in analytic.iter().enumerate() {
            let h = 1e-5 * start[i].abs().max(1.0);
            // Fourth order, so that truncation stays below rounding.
            let d1 = (at(i, h) - at(i, -h)) / (2.0 * h);
            let d2 = (at(i, 2.0 * h) - at(i, -2.0 * h)) / (4.0 * h);
            let numeric = (4.0 * d1 - d2) / 3.0;
            worst = worst.max((a - numeric).abs() / numeric.abs().max(1.0));
        }
        var.set(&Tensor::from_vec(start, var.dims(), &CPU).unwrap())
            .unwrap();
    }
    worst
}

/// As [`check_gradients`], along one random direction per variable.
pub fn check_directions(vars: &[&Var], f: impl Fn() -> Tensor) -> f64 {
    let grads = f().backward().unwrap();
    let mut worst = 0.0_f64;
    for (k, var) in vars.iter().enumerate() {
        let direction = normal(1000 + k as u64, var.dims(), DType::F64);
        let start = var.copy().unwrap();
        let analytic = (grads.get(var).expect("no gradient arrives") * &direction).unwrap();
        let analytic = values(&analytic.sum_all().unwrap())[0];
        let at = |step: f64| {
            var.set(&(&start + (&direction * step).unwrap()).unwrap())
                .unwrap();
            values(&f())[0]
        };
        let h = 1e-5;
        let d1 = (at(h) - at(-h)) / (2.0 * h);
        let d2 = (at(2.0 * h) - at(-2.0 * h)) / (4.0 * h);
        let numeric = (4.0 * d1 - d2) / 3.0;
        worst = worst.max((analytic - numeric).abs() / numeric.abs().max(1.0));
        var.set(&start).unwrap();
    }
    worst
}

/// Runs in a pool of that many threads.
pub fn with_threads<T: Send>(threads: usize, f: impl FnOnce() -> T + Send) -> T {
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .unwrap();
    pool.install(f)
}

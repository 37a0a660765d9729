//! What the tests share.

pub use tensor_core::testing::{assert_close, assert_passed, bits, cases, values};

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::Optimizer;
use optim::RandomStream;
use tensor_core::testing::ReferenceFiles;

/// The crate's reference files.
pub const FILES: ReferenceFiles = ReferenceFiles(env!("CARGO_MANIFEST_DIR"));

pub fn normal(rng: &mut RandomStream, shape: &[usize], dtype: DType) -> Tensor {
    rng.normal(0.0, 1.0, shape, dtype, &Device::Cpu).unwrap()
}

pub fn normal_var(rng: &mut RandomStream, shape: &[usize], dtype: DType) -> Var {
    Var::from_tensor(&normal(rng, shape, dtype)).unwrap()
}

pub fn tensor(values: &[f64]) -> Tensor {
    Tensor::from_slice(values, values.len(), &Device::Cpu).unwrap()
}

pub fn var(values: &[f64]) -> Var {
    Var::from_tensor(&tensor(values)).unwrap()
}

/// Named variables of mixed shapes, the same for the same seed.
pub fn named_params(seed: u64, dtype: DType) -> Vec<(String, Var)> {
    let mut rng = RandomStream::new(seed);
    let shapes: [&[usize]; 4] = [&[7, 5], &[5], &[3, 2, 4], &[33]];
    let names = ["attn.w", "bias", "conv", "gain"];
    names
        .iter()
        .zip(shapes)
        .map(|(name, shape)| (name.to_string(), normal_var(&mut rng, shape, dtype)))
        .collect()
}

/// The same values in variables of their own.
pub fn copies(params: &[(String, Var)]) -> Vec<(String, Var)> {
    let copy = |(name, var): &(String, Var)| {
        let copy = Var::from_tensor(&var.as_detached_tensor().copy().unwrap()).unwrap();
        (name.clone(), copy)
    };
    params.iter().map(copy).collect()
}

/// Gradients drawn for step `t`, the same for the same seed whatever the variables are.
pub fn gradients(params: &[(String, Var)], seed: u64, t: u64) -> GradStore {
    let mut rng = RandomStream::new(seed).split_index("gradients", t);
    let mut store = GradStore::default();
    for (_, var) in params {
        let grad = normal(&mut rng, var.dims(), var.dtype());
        store.insert(var, grad);
    }
    store
}

/// Steps `from..to` on drawn gradients.
pub fn run(
    optimizer: &mut impl Optimizer,
    params: &[(String, Var)],
    seed: u64,
    steps: std::ops::Range<u64>,
) {
    for t in steps {
        optimizer.step(&gradients(params, seed, t)).unwrap();
    }
}

pub fn all_bits(params: &[(String, Var)]) -> Vec<Vec<u64>> {
    params.iter().map(|(_, var)| bits(var)).collect()
}

/// One gradient for one variable.
pub fn store(var: &Var, grad: &Tensor) -> GradStore {
    let mut store = GradStore::default();
    store.insert(var, grad.clone());
    store
}

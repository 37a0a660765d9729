mod eigen;
mod fixed_point;
mod linear;
mod refusals;

use candle_core::{DType, Device, Tensor, Var};
use proptest::prelude::*;
use thalweg_tensor_core::autograd::hvp;
use thalweg_tensor_core::random::RandomStream;
use thalweg_tensor_core::solve::{
    anderson, conjugate_gradient, lanczos, neumann, picard, power_iteration,
    preconditioned_conjugate_gradient, AndersonConfig, CgConfig, EigenPair, LanczosConfig,
    NeumannConfig, PicardConfig, PowerConfig,
};
use thalweg_tensor_core::{Error, Result};

const CPU: Device = Device::Cpu;

fn vector(values: &[f64], dtype: DType) -> Tensor {
    Tensor::new(values, &CPU).unwrap().to_dtype(dtype).unwrap()
}

fn host(tensor: &Tensor) -> Vec<f64> {
    tensor
        .to_dtype(DType::F64)
        .unwrap()
        .flatten_all()
        .unwrap()
        .to_vec1()
        .unwrap()
}

fn norm(values: &[f64]) -> f64 {
    values.iter().map(|x| x * x).sum::<f64>().sqrt()
}

fn distance(a: &Tensor, b: &Tensor) -> f64 {
    let difference: Vec<f64> = host(a).iter().zip(host(b)).map(|(a, b)| a - b).collect();
    norm(&difference)
}

fn normal(seed: u64, n: usize) -> Tensor {
    RandomStream::new(seed)
        .normal(0.0, 1.0, n, DType::F64, &CPU)
        .unwrap()
}

/// `Q diag(d) Q` with the reflection `Q = I - 2 u u^T`: a dense symmetric matrix with known
/// eigenvalues; its eigenvectors are the columns of `Q`.
struct Symmetric {
    matrix: Tensor,
    reflection: Tensor,
}

impl Symmetric {
    fn new(eigenvalues: &[f64], seed: u64, dtype: DType) -> Self {
        let n = eigenvalues.len();
        let u = normal(seed, n);
        let u = (&u / norm(&host(&u))).unwrap().reshape((n, 1)).unwrap();
        let q = (Tensor::eye(n, DType::F64, &CPU).unwrap()
            - (u.matmul(&u.t().unwrap()).unwrap() * 2.0).unwrap())
        .unwrap();
        let d = Tensor::new(eigenvalues, &CPU).unwrap();
        let matrix = q.broadcast_mul(&d).unwrap().matmul(&q).unwrap();
        Self {
            matrix: matrix.to_dtype(dtype).unwrap(),
            reflection: q.to_dtype(dtype).unwrap(),
        }
    }

    fn apply(&self, x: &Tensor) -> Result<Tensor> {
        Ok(self.matrix.matmul(&x.reshape(((), 1))?)?.flatten_all()?)
    }

    fn eigenvector(&self, i: usize) -> Tensor {
        self.reflection.get(i).unwrap()
    }
}

fn spread(n: usize, low: f64, high: f64) -> Vec<f64> {
    (0..n)
        .map(|i| low + (high - low) * i as f64 / (n.max(2) - 1) as f64)
        .collect()
}

const BOTH: [(DType, f64); 2] = [(DType::F64, 1e-10), (DType::F32, 1e-5)];

//! Classifiers of digits that guide samples, and others that judge them.

use crate::scenario::TrialContext;
use crate::{Error, Result};
use candle_core::{DType, Tensor};
use candle_nn::{ModuleT, Optimizer};
use datasets::Classification;
use faer::linalg::solvers::Solve;
use faer::{Mat, Side};
use flows::prediction::select_rows;
use nn::init::SeededVars;
use nn::loss::{cross_entropy, Reduction};
use nn::models::{Mlp, MlpConfig};
use nn::softmax::softmax;
use optim::{AdamW, AdamWConfig};
use std::collections::{BTreeMap, BTreeSet};

/// The first `count` examples, and the rest.
///
/// # Errors
/// Those of candle for fewer examples.
pub fn split(data: &Classification, count: usize) -> Result<(Classification, Classification)> {
    let part = |from: usize, count: usize| -> Result<Classification> {
        let inputs = data.inputs.narrow(0, from, count)?;
        let labels = data.labels.narrow(0, from, count)?;
        Ok(Classification::new(inputs, labels, data.classes)?)
    };
    Ok((part(0, count)?, part(count, data.len() - count)?))
}

fn one_hot(data: &Classification, dtype: DType) -> Result<Tensor> {
    let eye = Tensor::eye(data.classes, dtype, data.inputs.device())?;
    Ok(eye.index_select(&data.labels, 0)?)
}

/// Multinomial logistic regression, `|W|^2 / 2 + C sum` of cross entropies.
pub struct Logistic {
    weight: Tensor,
    bias: Tensor,
}

impl Logistic {
    /// Fits by accelerated gradient descent.
    ///
    /// # Errors
    /// Those of candle.
    pub fn fit(data: &Classification, c: f64) -> Result<Self> {
        const STEPS: usize = 500;
        let x = data.inputs.to_dtype(DType::F64)?;
        let (y, d) = (one_hot(data, DType::F64)?, x.dims()[1]);
        let squares = x.sqr()?.sum_all()?.to_scalar::<f64>()? + data.len() as f64;
        let steepest = 1.0 + 0.5 * c * squares;
        let root = steepest.sqrt();
        let momentum = (root - 1.0) / (root + 1.0);
        let mut w = Tensor::zeros((d, data.classes), DType::F64, x.device())?;
        let mut b = Tensor::zeros((1, data.classes), DType::F64, x.device())?;
        let (mut w_ahead, mut b_ahead) = (w.clone(), b.clone());
        for _ in 0..STEPS {
            let off = (softmax(&x.matmul(&w_ahead)?.broadcast_add(&b_ahead)?, 1)? - &y)?;
            let w_grad = (&w_ahead + x.t()?.matmul(&off)?.affine(c, 0.0)?)?;
            let b_grad = off.sum_keepdim(0)?.affine(c, 0.0)?;
            let next = |at: &Tensor, grad: Tensor| at - grad.affine(1.0 / steepest, 0.0)?;
            let (w_next, b_next) = (next(&w_ahead, w_grad)?, next(&b_ahead, b_grad)?);
            w_ahead = (&w_next + (&w_next - &w)?.affine(momentum, 0.0)?)?;
            b_ahead = (&b_next + (&b_next - &b)?.affine(momentum, 0.0)?)?;
            (w, b) = (w_next, b_next);
        }
        Ok(Self {
            weight: w.to_dtype(data.inputs.dtype())?,
            bias: b.to_dtype(data.inputs.dtype())?,
        })
    }

    /// Logits `[rows, classes]`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn logits(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        x.matmul(&self.weight)?.broadcast_add(&self.bias)
    }
}

/// The weights of a perceptron that was trained on clean examples: 600 steps of AdamW.
///
/// # Errors
/// Those of the network; [`Error::Cancelled`].
pub fn perceptron(
    trial: &TrialContext,
    data: &Classification,
    widths: &[usize],
) -> Result<BTreeMap<String, Tensor>> {
    const STEPS: usize = 600;
    const BATCH: usize = 128;
    let vars = SeededVars::new(&trial.stream("classifier"));
    let vb = vars.builder(data.inputs.dtype(), data.inputs.device());
    let net = Mlp::new(&MlpConfig::new(widths), vb)?;
    let config = AdamWConfig {
        lr: 1e-3,
        weight_decay: 0.05,
        ..AdamWConfig::default()
    };
    let params = vars.trainable().into_iter().map(|(_, v)| v).collect();
    let mut optimizer = <AdamW as Optimizer>::new(params, config)?;
    let mut rng = trial.stream("classifier-batches");
    for step in 0..STEPS {
        trial.step(step, STEPS)?;
        let mut rows = rng.permutation(data.len())?;
        rows.truncate(BATCH);
        let logits = net.forward_t(&select_rows(&data.inputs, &rows)?, false)?;
        let loss = cross_entropy(&logits, &select_rows(&data.labels, &rows)?, Reduction::Mean)?;
        optimizer.backward_step(&loss)?;
    }
    let weights = vars.trainable().into_iter();
    Ok(weights
        .map(|(name, var)| (name, var.as_detached_tensor()))
        .collect())
}

/// `|a_i - b_j|^2`, `[rows of a, rows of b]`.
fn squared_distances(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let (a, b) = (a.detach().to_dtype(DType::F64)?, b.to_dtype(DType::F64)?);
    let (aa, bb) = (a.sqr()?.sum_keepdim(1)?, b.sqr()?.sum_keepdim(1)?.t()?);
    let products = a.matmul(&b.t()?)?.affine(-2.0, 0.0)?;
    Ok(products.broadcast_add(&aa)?.broadcast_add(&bb)?)
}

/// A least-squares classifier with Gaussian kernels `exp(-gamma |x - y|^2)`: a judge that shares
/// nothing with the classifiers that guide.
pub struct KernelJudge {
    examples: Tensor,
    coefficients: Tensor,
    gamma: f64,
}

impl KernelJudge {
    /// Fits to examples, with a little ridge.
    ///
    /// # Errors
    /// [`Error::Trial`] when the factorization fails.
    pub fn fit(data: &Classification) -> Result<Self> {
        const GAMMA: f64 = 0.02;
        const RIDGE: f64 = 0.1;
        let n = data.len();
        let distances = squared_distances(&data.inputs, &data.inputs)?.to_vec2::<f64>()?;
        let kernel = |i: usize, j: usize| {
            let ridge = if i == j { RIDGE } else { 0.0 };
            (-GAMMA * distances[i][j]).exp() + ridge
        };
        let labels = data.labels.to_vec1::<u32>()?;
        let mut rhs = Mat::from_fn(n, data.classes, |i, k| {
            f64::from(u8::from(labels[i] as usize == k))
        });
        let failed = |e| Error::Trial(format!("the judge's kernel matrix: {e:?}"));
        let matrix = Mat::from_fn(n, n, kernel);
        let factor = matrix.llt(Side::Lower).map_err(failed)?;
        factor.solve_in_place(rhs.as_mut());
        let flat: Vec<f64> = (0..n)
            .flat_map(|i| (0..data.classes).map(move |k| (i, k)))
            .map(|(i, k)| rhs[(i, k)])
            .collect();
        let device = data.inputs.device();
        Ok(Self {
            examples: data.inputs.clone(),
            coefficients: Tensor::from_vec(flat, (n, data.classes), device)?,
            gamma: GAMMA,
        })
    }

    /// The part of samples that it takes for the wanted class.
    ///
    /// # Errors
    /// Those of candle.
    pub fn accuracy(&self, samples: &Tensor, wanted: &Tensor) -> Result<f64> {
        let kernel = squared_distances(samples, &self.examples)?
            .affine(-self.gamma, 0.0)?
            .exp()?;
        agreement(&kernel.matmul(&self.coefficients)?.argmax(1)?, wanted)
    }
}

/// The part of rows in which two lists of classes agree.
pub fn agreement(found: &Tensor, wanted: &Tensor) -> Result<f64> {
    let hits = found.eq(wanted)?.to_dtype(DType::F64)?;
    Ok(hits.mean_all()?.to_scalar()?)
}

/// The part of samples whose class by a vote of the five nearest examples is the wanted one.
///
/// # Errors
/// Those of candle.
pub fn neighbor_accuracy(
    samples: &Tensor,
    examples: &Classification,
    wanted: &Tensor,
) -> Result<f64> {
    let distances = squared_distances(samples, &examples.inputs)?.to_vec2::<f64>()?;
    let labels = examples.labels.to_vec1::<u32>()?;
    let found: Vec<u32> = distances
        .iter()
        .map(|row| {
            let mut order: Vec<usize> = (0..row.len()).collect();
            order.sort_by(|a, b| row[*a].total_cmp(&row[*b]));
            let mut votes = vec![0; examples.classes];
            for i in order.iter().take(5) {
                votes[labels[*i] as usize] += 1;
            }
            // The first of the largest.
            let most = votes.iter().max().copied().unwrap_or(0);
            votes.iter().position(|v| *v == most).unwrap_or(0) as u32
        })
        .collect();
    let found = Tensor::new(found, samples.device())?;
    agreement(&found, wanted)
}

/// How many different examples are the nearest one of a sample.
///
/// # Errors
/// Those of candle.
pub fn distinct_neighbors(samples: &Tensor, examples: &Tensor) -> Result<usize> {
    let nearest = squared_distances(samples, examples)?.argmin(1)?;
    let nearest: BTreeSet<u32> = nearest.to_vec1::<u32>()?.into_iter().collect();
    Ok(nearest.len())
}

//! SVDD, soft value-based decoding: a trained diffusion model, Gaussian or discrete, is steered
//! towards a reward that need not be differentiable, without any training of the model.
//!
//! For anyone with a generator and a black box that judges its products (a docking program, a
//! lookup, a compiled simulator): at every reverse step several candidates are drawn from the
//! model's own kernel, each is valued, and one of them goes on. *Derivative-Free Guidance in
//! Continuous and Discrete Diffusion Models with Soft Value-Based Decoding*, Li et al., 2024,
//! arXiv 2408.08252.
//!
//! The goal is `p(x0) exp(r(x0) / alpha)` up to a constant. With the soft value
//! `v_t(x) = alpha ln E[exp(r(x0) / alpha) | x_t = x]` the best reverse kernel is
//! `p(x' | x_t) exp(v_{t-1}(x') / alpha)`, which is approximated per sample, never across the batch:
//!
//! ```text
//! x'_1 .. x'_M ~ p(. | x_t)         w_m = exp(v(x'_m) / alpha)
//! zeta ~ Categorical(w / sum w)     x_{t-1} = x'_zeta          alpha = 0: the first of the largest
//! ```
//!
//! | symbol | here |
//! | --- | --- |
//! | `p(x' given x_t)` | [`ReverseKernel`]: [`GaussianKernel`], or your own |
//! | `v` | [`Value`]: [`PosteriorMeanValue`] (SVDD-PM, no training), [`LearnedValue`] (SVDD-MC and SVDD-Q, trained by [`ValueTrainer`]) |
//! | `r` | [`Reward`], larger is better: closures; [`Chunked`], [`Cached`], [`Standardized`], [`WeightedSum`] around them |
//! | `M`, `alpha` | [`Svdd::duplicates`], [`Svdd::alpha`] |
//!
//! `alpha` is in units of the reward. At 0, which the authors' code always uses, decoding is greedy
//! and may exploit the faults of a learned reward: judge the result by another one.
//!
//! [`best_of_n`], [`SmcSampler`] and [`DpsGuidance`] are what one would do without it.
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use thalweg_guidance::svdd::{PosteriorMeanValue, ReverseKernel, Svdd};
//! use thalweg_guidance::{RandomStream, Result};
//!
//! /// A random walk of integers: anything that has a state and a random step fits.
//! struct Walk;
//! impl ReverseKernel for Walk {
//!     type State = Tensor;
//!     fn steps(&self) -> usize { 8 }
//!     fn init(&self, streams: &mut [RandomStream]) -> Result<Tensor> {
//!         Ok(Tensor::zeros(streams.len(), DType::F64, &Device::Cpu)?)
//!     }
//!     fn propose(&self, x: &Tensor, _: usize, m: usize, streams: &mut [RandomStream]) -> Result<Tensor> {
//!         let mut next = vec![];
//!         for (x, stream) in x.to_vec1::<f64>()?.into_iter().zip(streams) {
//!             for _ in 0..m {
//!                 next.push(x + if stream.next_uniform() < 0.5 { 1.0 } else { -1.0 });
//!             }
//!         }
//!         Ok(Tensor::new(next, &Device::Cpu)?)
//!     }
//!     fn predict_clean(&self, x: &Tensor, _: usize) -> Result<Tensor> { Ok(x.clone()) }
//! }
//!
//! let reward = |x: &Tensor| Ok((x - 3.0)?.sqr()?.neg()?);
//! let value = PosteriorMeanValue::new(&Walk, &reward);
//! let out = Svdd::new(&Walk, &value).duplicates(10).sample(4, &RandomStream::new(1))?;
//! // It went to 3 and stayed beside it: 8 steps end at even numbers.
//! assert!(out.states.to_vec1::<f64>()?.iter().all(|x| *x == 2.0 || *x == 4.0));
//! # Ok::<(), thalweg_guidance::Error>(())
//! ```

mod baselines;
mod decode;
mod gaussian;
mod reward;
mod train;

pub use baselines::{best_of_n, BestOf, SmcOutput, SmcSampler};
pub use decode::{choose, sample, Choice, Svdd, SvddOutput};
pub use gaussian::{DpsGuidance, GaussianKernel, Sample};
pub use reward::{token_keys, Cached, Chunked, Standardized, WeightedSum};
pub use train::{LearnedValue, Rollout, ValueNet, ValueTarget, ValueTrainer};

use crate::error::Error;
use crate::Result;
use candle_core::{DType, Tensor};
use flows::prediction::select_rows;
use tensor_core::random::RandomStream;

/// States of several samples, one per row.
pub trait Batch: Clone {
    /// How many there are.
    ///
    /// # Errors
    /// [`Error::Shape`] for a tensor without dimensions.
    fn rows(&self) -> Result<usize>;

    /// These rows, in this order; a row may be taken more than once.
    ///
    /// # Errors
    /// When there is no such row.
    fn take(&self, rows: &[u32]) -> Result<Self>;

    /// Batches one after the other; at least one is given.
    ///
    /// # Errors
    /// When they do not fit together.
    fn concat(parts: &[Self]) -> Result<Self>;
}

impl Batch for Tensor {
    fn rows(&self) -> Result<usize> {
        let rows = self.dims().first().copied();
        rows.ok_or_else(|| Error::shape("a batch of states", self.dims(), "[rows, ...]"))
    }

    fn take(&self, rows: &[u32]) -> Result<Self> {
        Ok(select_rows(self, rows)?)
    }

    fn concat(parts: &[Self]) -> Result<Self> {
        match parts {
            [one] => Ok(one.clone()),
            _ => Ok(Tensor::cat(parts, 0)?),
        }
    }
}

/// The random reverse process of a trained model.
///
/// Every sample has a random stream of its own, so that a row does not depend on its batch.
pub trait ReverseKernel {
    /// What moves: tokens, latents, a struct of several tensors.
    type State: Batch;

    /// Number of steps from pure noise to a finished sample.
    fn steps(&self) -> usize;

    /// Samples of the prior, one per stream.
    ///
    /// # Errors
    /// Whatever the model's own are.
    fn init(&self, streams: &mut [RandomStream]) -> Result<Self::State>;

    /// `m` independent draws from the kernel of step `step` (from 0) for each of the states, row
    /// `i m + j` being candidate `j` of state `i`: one evaluation of the model, and for each state
    /// draws in turn from its stream.
    ///
    /// # Errors
    /// Whatever the model's own are.
    fn propose(
        &self,
        x: &Self::State,
        step: usize,
        m: usize,
        streams: &mut [RandomStream],
    ) -> Result<Self::State>;

    /// The model's idea of the finished samples in states after `done` steps.
    ///
    /// # Errors
    /// Whatever the model's own are.
    fn predict_clean(&self, x: &Self::State, done: usize) -> Result<Self::State>;

    /// The last touch after the last step: whatever noise discrete models have left.
    ///
    /// # Errors
    /// Whatever the model's own are.
    fn finish(&self, x: Self::State) -> Result<Self::State> {
        Ok(x)
    }

    /// Whether the draws of this step differ at all. Steering a deterministic sampler would do
    /// nothing, and is refused.
    fn is_stochastic(&self, _step: usize) -> bool {
        true
    }
}

/// How good states are that have noise left. Closures of state and steps done are values.
pub trait Value<S> {
    /// The values `[rows]` of states after `done` steps (1 after the first). NaN counts as
    /// "worse than everything".
    ///
    /// # Errors
    /// Whatever the model's own are.
    fn value(&self, x: &S, done: usize) -> Result<Tensor>;

    /// How many judgements of a reward it takes to value `rows` states.
    fn reward_calls(&self, _rows: usize) -> usize {
        0
    }
}

impl<S, F: Fn(&S, usize) -> Result<Tensor>> Value<S> for F {
    fn value(&self, x: &S, done: usize) -> Result<Tensor> {
        self(x, done)
    }
}

/// What finished samples are worth, larger being better. It may be slow, random, and not
/// differentiable. Closures are rewards.
pub trait Reward<S> {
    /// The rewards `[rows]`.
    ///
    /// # Errors
    /// Whatever the judge's own are.
    fn reward(&self, clean: &S) -> Result<Tensor>;
}

impl<S, F: Fn(&S) -> Result<Tensor>> Reward<S> for F {
    fn reward(&self, clean: &S) -> Result<Tensor> {
        self(clean)
    }
}

/// SVDD-PM: the reward of the model's prediction of the finished sample. Nothing is trained.
pub struct PosteriorMeanValue<'a, K: ReverseKernel> {
    kernel: &'a K,
    reward: &'a dyn Reward<K::State>,
}

impl<'a, K: ReverseKernel> PosteriorMeanValue<'a, K> {
    /// A value from the kernel's predictions and a reward.
    pub fn new(kernel: &'a K, reward: &'a dyn Reward<K::State>) -> Self {
        Self { kernel, reward }
    }
}

impl<K: ReverseKernel> Value<K::State> for PosteriorMeanValue<'_, K> {
    fn value(&self, x: &K::State, done: usize) -> Result<Tensor> {
        self.reward.reward(&self.kernel.predict_clean(x, done)?)
    }

    fn reward_calls(&self, rows: usize) -> usize {
        rows
    }
}

/// Judgements `[rows]` as numbers.
pub(crate) fn numbers(judged: &Tensor, rows: usize, what: &str) -> Result<Vec<f64>> {
    if judged.dims() != [rows] {
        return Err(Error::shape(what, judged.dims(), format!("[{rows}]")));
    }
    Ok(judged.to_dtype(DType::F64)?.to_vec1()?)
}

/// Streams of the samples `from .. from + count`; sample `i` has the same one in every batch, and
/// the one that [`flows::Noise::rows`] gives it.
fn row_streams(rng: &RandomStream, from: usize, count: usize) -> Vec<RandomStream> {
    (from..from + count)
        .map(|i| rng.split_index("row", i as u64))
        .collect()
}

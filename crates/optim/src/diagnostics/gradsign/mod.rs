//! GradSign: ranks untrained architectures by the agreement of per-example gradient signs.
//!
//! For architecture search, for choosing width, depth and operations before paying for a run, or as
//! a filter in front of an existing search: one mini-batch at initialization, no training.
//! *GradSign: Model Performance Inference with Theoretical Insights*, Zhang & Jia, ICLR 2022,
//! arXiv 2110.08616.
//!
//! With the gradient `g_i` of example `i` alone (`i = 1..n`) at the initial parameters (`m` of
//! them):
//!
//! ```text
//! s_i = sign(g_i)          sign(0) = 0
//! tau = sum_k | sum_i s_ik |
//! ```
//!
//! | symbol | here |
//! | --- | --- |
//! | `tau` | [`GradSignReport::score`]; higher is better |
//! | `n`, `m` | the examples of the batch, [`GradSignReport::params`] |
//!
//! Two examples whose nearest optima lie on the same side of the initial point along a coordinate
//! have equal signs there, and a denser set of optima bounds the loss after training.
//!
//! Scores compare architectures at the same batch, the same number of classes and the same kind of
//! initialization only. The size of a model is part of the signal ([`GradSignReport::agreement`],
//! without it, ranks almost at random), so look at the number of parameters beside the score:
//! [`ProxyScore::Parameters`] is a strong baseline. The score orders candidates; it does not predict
//! an accuracy.
//!
//! Examples must not interact: no dropout, no augmentation, no statistics over the batch. The
//! official evaluation runs batches of one in training mode, in which batch norm normalizes each
//! example by its own spatial statistics; in the factored form give the network a batch norm of
//! ghost batch size 1 for that. Use `f32` or `f64`: small gradients vanish in `f16`.
//!
//! Two ways to the same numbers ([`Method`]): one backward pass per example, for any network; or one
//! backward pass over the whole batch through layers made by a [`SignTape`], for which the gradient
//! of a linear layer factors, `sum_i sign(d_i a_i^T) = sign(D)^T sign(A)`, and that of a convolution
//! is a product per example over unfolded patches.
//!
//! ```
//! use candle_core::{Device, Module, Tensor, Var};
//! use thalweg_optim::diagnostics::gradsign::{gradsign, GradSignConfig};
//!
//! let w = Var::new(&[[0.3f32, -0.2], [0.1, 0.4]], &Device::Cpu)?;
//! let x = Tensor::new(&[[1f32, 2.0], [0.5, 1.5]], &Device::Cpu)?;
//! let y = Tensor::new(&[[1f32, 0.0], [1.0, 0.0]], &Device::Cpu)?;
//! let model = |x: &Tensor| x.matmul(&w.t()?);
//! let loss = |out: &Tensor, y: &Tensor| (out - y)?.sqr()?.mean_all();
//! let params = vec![("weight".to_string(), w.clone())];
//! let report = gradsign(model, &params, &x, &y, loss, &GradSignConfig::default())?;
//! // Both examples pull all four weights the same way.
//! assert_eq!((report.score, report.params, report.agreement), (8.0, 4, 1.0));
//! # Ok::<(), thalweg_optim::Error>(())
//! ```

mod counter;
mod host;
mod rank;
mod score;
mod tape;

pub use counter::SignCounter;
pub use rank::{
    kendall_tau_b, rank_architectures, spearman, Candidate, Factory, ProxyScore, Ranking,
};
pub use score::{
    grad_angle, grad_norm, gradsign, synflow, GradSignConfig, GradSignReport, Method, ParamSelect,
    SignReduction,
};
pub use tape::{PerExampleSigns, SignConv2d, SignLinear, SignTape};

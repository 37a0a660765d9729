//! Graph convolutions with the parameter names of PyTorch Geometric, so that its state dicts load.
//!
//! | layer | output for target `t` | source |
//! | --- | --- | --- |
//! | [`GcnConv`] | `sum_s A_ts W x_s + b`, `A` normalized with self-loops | Kipf and Welling, ICLR 2017 |
//! | [`SageConv`] | `W_l agg_s x_s + b + W_r x_t` | Hamilton et al., NeurIPS 2017 |
//! | [`GatConv`] | `sum_s alpha_ts W x_s + b`, `alpha = softmax leaky(a_src W x_s + a_dst W x_t)` | Velickovic et al., ICLR 2018 |
//! | [`Gatv2Conv`] | `sum_s alpha_ts W_l x_s + b`, `alpha = softmax a leaky(W_l x_s + W_r x_t)` | Brody et al., ICLR 2022 |
//! | [`GinConv`] | `nn((1 + eps) x_t + sum_s x_s)` | Xu et al., ICLR 2019 |
//!
//! Layers take a [`Graph`] and node features `[sources, d]` and give `[targets, ..]`. On a graph
//! between two sets of nodes (a sampled block) the targets are the first of the sources. A random
//! stream means training: dropout draws from it; without one nothing is random.
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use candle_nn::{Optimizer, VarBuilder, VarMap};
//! use thalweg_graph_learning::conv::{GcnConv, GcnConfig};
//! use thalweg_graph_learning::generate::karate_club;
//!
//! let club = karate_club()?;
//! let vars = VarMap::new();
//! let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
//! let hidden = GcnConv::new(34, 8, GcnConfig::default(), vb.pp("hidden"))?;
//! let head = GcnConv::new(8, 2, GcnConfig::default(), vb.pp("head"))?;
//! let x = Tensor::eye(34, DType::F32, &Device::Cpu)?;
//! let labels = Tensor::from_slice(club.labels(), 34, &Device::Cpu)?;
//! let mut sgd = candle_nn::SGD::new(vars.all_vars(), 0.5)?;
//! let loss = || -> Result<Tensor, Box<dyn std::error::Error>> {
//!     let h = hidden.forward(club.graph(), &x)?.relu()?;
//!     Ok(candle_nn::loss::cross_entropy(&head.forward(club.graph(), &h)?, &labels)?)
//! };
//! let first = loss()?.to_scalar::<f32>()?;
//! for _ in 0..50 {
//!     sgd.backward_step(&loss()?)?;
//! }
//! assert!(loss()?.to_scalar::<f32>()? < first);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod gat;
mod gatv2;
mod gcn;
mod gin;
mod mlp;
mod sage;

pub use gat::{GatConfig, GatConv};
pub use gatv2::{Gatv2Config, Gatv2Conv};
pub use gcn::{GcnConfig, GcnConv};
pub use gin::{GinConfig, GinConv};
pub use mlp::Mlp;
pub use sage::{SageConfig, SageConv};

use crate::graph::Graph;
use crate::{Error, RandomStream, Result};
use candle_core::Tensor;
use candle_nn::{Init, Module, VarBuilder};
use nn::activation::Activation;
use nn::linear::linear_activation;

/// A layer or network over a graph.
pub trait GraphModule {
    /// Node features `[sources, d]` to `[targets, ..]`. A stream means training: dropout draws from
    /// it.
    ///
    /// # Errors
    /// Those of the layer, for shapes and dtypes that do not fit.
    fn forward_t(
        &self,
        graph: &Graph,
        x: &Tensor,
        train: Option<&mut RandomStream>,
    ) -> Result<Tensor>;
}

/// Entries set to 0 with probability `p`, the others divided by `1 - p`; `x` itself without a
/// stream.
///
/// # Errors
/// [`Error::InvalidArgument`] unless `0 <= p < 1`.
pub fn dropout(x: &Tensor, p: f64, train: Option<&mut RandomStream>) -> Result<Tensor> {
    if !(0.0..1.0).contains(&p) {
        return Err(Error::argument("dropout", p, "a probability in [0, 1)"));
    }
    let Some(stream) = train.filter(|_| p > 0.0) else {
        return Ok(x.clone());
    };
    let keep = stream.bernoulli(1.0 - p, x.dims(), x.dtype(), x.device())?;
    Ok((x * (keep / (1.0 - p))?)?)
}

/// Rows divided by their Euclidean norm, which is taken to be at least `1e-12`. A shorter row has no
/// direction: it is a constant for the gradient, which would be `1e12` otherwise.
pub(crate) fn normalize_rows(x: &Tensor) -> Result<Tensor> {
    let last = x.rank() - 1;
    let squares = x.sqr()?.sum_keepdim(last)?;
    // The bound is inside the root, so that the gradient of a zero row is no NaN either.
    let floor = squares.ones_like()?.affine(1e-24, 0.0)?;
    let norms = squares.maximum(&floor)?.sqrt()?;
    let long = squares.detach().ge(1e-24)?;
    if long.min_all()?.to_scalar::<u8>()? == 1 {
        return Ok(x.broadcast_div(&norms)?);
    }
    let directed = long.broadcast_as(x.shape())?.where_cond(x, &x.detach())?;
    Ok(directed.broadcast_div(&norms)?)
}

/// Glorot's uniform distribution for a fan in and a fan out.
fn glorot(fan_in: usize, fan_out: usize) -> Init {
    let bound = (6.0 / (fan_in + fan_out).max(1) as f64).sqrt();
    Init::Uniform {
        lo: -bound,
        up: bound,
    }
}

/// PyTorch's default for a linear layer.
fn torch_linear(fan_in: usize) -> Init {
    let bound = 1.0 / (fan_in.max(1) as f64).sqrt();
    Init::Uniform {
        lo: -bound,
        up: bound,
    }
}

const ZEROS: Init = Init::Const(0.0);

fn weight(vb: &VarBuilder, name: &str, fan: (usize, usize), init: Init) -> Result<Tensor> {
    let (inputs, outputs) = fan;
    if inputs == 0 || outputs == 0 {
        let value = format!("{inputs} -> {outputs}");
        return Err(Error::argument("width", value, "at least 1 on both sides"));
    }
    Ok(vb.get_with_hints((outputs, inputs), name, init)?)
}

/// `x W^T + b`, with no gradient for a constant `x`: candle's own product computes one all the same,
/// which takes as long as the product itself where `x` are the features of a graph.
pub(crate) fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    linear_then(x, weight, bias, Activation::Identity)
}

/// The same followed by an activation.
fn linear_then(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    activation: Activation,
) -> Result<Tensor> {
    if x.elem_count() > 0 {
        return Ok(linear_activation(x, weight, bias, activation)?);
    }
    let y = add_bias(x.matmul(&weight.t()?)?, bias)?;
    Ok(activation.forward(&y)?)
}

/// `max(x, 0) + slope min(x, 0)`.
pub(crate) fn leaky_relu(x: &Tensor, slope: f64) -> Result<Tensor> {
    Ok(Activation::LeakyRelu(slope).forward(x)?)
}

fn add_bias(y: Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    match bias {
        Some(bias) => Ok(y.broadcast_add(bias)?),
        None => Ok(y),
    }
}

/// The rows of the targets: the first of the sources.
fn of_targets(graph: &Graph, x: &Tensor) -> Result<Tensor> {
    if x.dims().first() != Some(&graph.num_sources()) {
        let expected = format!("[{}, ..]", graph.num_sources());
        return Err(Error::shape("x", x.dims(), expected));
    }
    if graph.num_targets() > graph.num_sources() {
        return Err(Error::unsupported(
            "a graph convolution",
            "with more targets than sources: targets are the first of the sources",
        ));
    }
    Ok(x.narrow(0, 0, graph.num_targets())?)
}

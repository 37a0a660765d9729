//! Differentiable kernels over the edges of a [`Graph`].
//!
//! With `e: s -> t` over the edges into `t`:
//!
//! | function | what it computes | gradient |
//! | --- | --- | --- |
//! | [`spmm`], sum | `y_t = sum_e w_e x_s` | `dx_s = sum_e w_e dy_t`, `dw_e = <x_s, dy_t>` |
//! | [`spmm`], mean | the sum divided by the in-degree, 0 without in-edges | the same, scaled |
//! | [`spmm`], max and min | per channel, 0 without in-edges | to the first such edge in row order |
//! | [`sddmm`], dot | `s_e = <a_s, b_t>` per head | `da_s = sum_e g_e b_t`, `db_t = sum_e g_e a_s` |
//! | [`gather`] | `x_s` or `x_t` for each edge | [`edge_sum`] |
//! | [`edge_sum`] | `y_t = sum_e m_e` (or at the sources) | [`gather`] |
//! | [`segment_softmax`] | `p_e = exp(l_e - max) / (sum + 1e-16)` per target and head | `p_e (g_e - sum_f p_f g_f)` |
//!
//! All of them work on `f32` and `f64`; `f16` and `bf16` are computed in `f32` and rounded once. On
//! the CPU a target's sum is taken by one thread in the order of its row, so that the bits do not
//! depend on the number of threads, and no message tensor `[E, d]` is formed. On other devices the
//! same functions are made of candle's gather and scatter operations (maxima and the shift of the
//! softmax are found on the host); those have not been run on a device yet. Backward passes are made
//! of the same functions and can be differentiated again.

mod features;
mod kernel;
mod norm;
mod ops;

pub use features::{Features, SparseFeatures};
pub(crate) use kernel::{by_rows, real, vectorized, Scalar};
pub(crate) use norm::scale_by_degrees;
pub use norm::{gcn_norm, Norm};

use crate::graph::Graph;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use ops::{Dots, EdgeSum, Gather, Pick, SegmentSoftmax, Spread};
use std::sync::Arc;

/// A constant factor per node.
pub(crate) type Scale = Arc<Vec<f64>>;

/// How the messages of a node are made one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Reduce {
    /// Their sum.
    #[default]
    Sum,
    /// Their sum divided by their number; 0 for none.
    Mean,
    /// The largest of each channel; 0 for none.
    Max,
    /// The smallest of each channel; 0 for none.
    Min,
}

/// What [`sddmm`] makes of the two ends of an edge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EdgeOp {
    /// `<a_s, b_t>` per head.
    #[default]
    Dot,
    /// `a_s + b_t`.
    Add,
    /// `a_s * b_t`.
    Mul,
    /// `[a_s, b_t]`.
    Concat,
}

/// One end of an edge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Where it begins.
    Source,
    /// Where it ends.
    Target,
}

/// A tensor as rows, in a dtype that kernels compute in.
struct Rows {
    tensor: Tensor,
    /// Dimensions after the first.
    rest: Vec<usize>,
    dtype: DType,
}

impl Rows {
    fn new(name: &'static str, x: &Tensor, rows: usize) -> Result<Self> {
        if x.dims().first() != Some(&rows) {
            return Err(Error::shape(name, x.dims(), format!("[{rows}, ..]")));
        }
        let rest = x.dims()[1..].to_vec();
        let tensor = wide(name, x)?.reshape((rows, rest.iter().product::<usize>()))?;
        Ok(Self {
            tensor: tensor.contiguous()?,
            rest,
            dtype: x.dtype(),
        })
    }

    fn width(&self) -> usize {
        self.rest.iter().product()
    }

    /// A result of `rows` rows in the form of the argument.
    fn back(&self, y: &Tensor) -> Result<Tensor> {
        let shape: Vec<usize> = std::iter::once(y.dims()[0])
            .chain(self.rest.iter().copied())
            .collect();
        Ok(y.reshape(shape)?.to_dtype(self.dtype)?)
    }
}

/// f32 for half precision, f32 and f64 as they are.
fn wide(name: &'static str, x: &Tensor) -> Result<Tensor> {
    match x.dtype() {
        DType::F32 | DType::F64 => Ok(x.clone()),
        DType::F16 | DType::BF16 => Ok(x.to_dtype(DType::F32)?),
        other => Err(Error::dtype(name, other, "F16, BF16, F32 or F64")),
    }
}

/// Messages from sources to targets: `x` is `[sources, ..]` and the result `[targets, ..]`.
///
/// Weights are `[E]`, or `[E, H]` for an `x` of shape `[sources, H, d]` (or `[sources, H]`). The mean divides by the
/// number of edges, whatever their weights. Maximum and minimum take no weights.
///
/// # Errors
/// [`Error::Shape`], [`Error::DType`] for integers or for weights of another dtype,
/// [`Error::Unsupported`] for a weighted maximum.
pub fn spmm(graph: &Graph, weights: Option<&Tensor>, x: &Tensor, reduce: Reduce) -> Result<Tensor> {
    let rows = Rows::new("x", x, graph.num_sources())?;
    if matches!(reduce, Reduce::Max | Reduce::Min) {
        if weights.is_some() {
            return Err(Error::unsupported(
                "a maximum or minimum",
                "with edge weights",
            ));
        }
        return extreme(graph, &rows, reduce == Reduce::Max);
    }
    let scale = (reduce == Reduce::Mean).then(|| graph.inverse_in_degrees().clone());
    let Some(weights) = weights else {
        return propagate(graph, &rows, scale, None);
    };
    let (weights, heads) = edge_weights(graph, weights, x)?;
    let y = if x.device().is_cpu() {
        let spread = Spread {
            graph: graph.clone(),
            against: false,
            heads,
            rows: None,
            cols: None,
        };
        weights.apply_op2(&rows.tensor, spread)?
    } else {
        let sent = gather(graph, &rows.tensor, Side::Source)?;
        let edges = graph.num_edges();
        let sent = sent.reshape((edges, heads, rows.width() / heads))?;
        let sent = sent.broadcast_mul(&weights.reshape((edges, heads, 1))?)?;
        edge_sum(graph, &sent.reshape((edges, rows.width()))?, Side::Target)?
    };
    match scale {
        Some(scale) => rows.back(&y.broadcast_mul(&column(&scale, &y)?)?),
        None => rows.back(&y),
    }
}

/// `y = diag(rows) A diag(cols) x` with constant factors: means and normalized adjacencies without
/// a number per edge.
fn propagate(graph: &Graph, x: &Rows, rows: Option<Scale>, cols: Option<Scale>) -> Result<Tensor> {
    if x.tensor.device().is_cpu() {
        let spread = Spread {
            graph: graph.clone(),
            against: false,
            heads: 1,
            rows,
            cols,
        };
        return x.back(&x.tensor.apply_op1(spread)?);
    }
    let mut sent = x.tensor.clone();
    if let Some(cols) = cols {
        sent = sent.broadcast_mul(&column(&cols, &sent)?)?;
    }
    let sent = gather(graph, &sent, Side::Source)?;
    let mut received = edge_sum(graph, &sent, Side::Target)?;
    if let Some(rows) = rows {
        received = received.broadcast_mul(&column(&rows, &received)?)?;
    }
    x.back(&received)
}

/// The symmetric normalization `D^(-1/2) A D^(-1/2) x` of the graph as it is, by in-degrees.
pub(crate) fn symmetric(graph: &Graph, x: &Tensor) -> Result<Tensor> {
    let rows = Rows::new("x", x, graph.num_sources())?;
    let scale = graph.inverse_sqrt_in_degrees().clone();
    propagate(graph, &rows, Some(scale.clone()), Some(scale))
}

/// `[n, 1]` in the dtype and on the device of `like`.
fn column(scale: &Scale, like: &Tensor) -> Result<Tensor> {
    let column = Tensor::from_slice(scale.as_slice(), (scale.len(), 1), &Device::Cpu)?;
    Ok(column.to_dtype(like.dtype())?.to_device(like.device())?)
}

/// Weights as `[E, heads]` in the dtype of the kernel, and the number of heads.
fn edge_weights(graph: &Graph, weights: &Tensor, x: &Tensor) -> Result<(Tensor, usize)> {
    let edges = graph.num_edges();
    let fits = |heads: usize| x.dims().get(1) == Some(&heads);
    let heads = match *weights.dims() {
        [e] if e == edges => 1,
        [e, 1] if e == edges => 1,
        [e, heads] if e == edges && heads > 0 && fits(heads) => heads,
        _ => {
            let expected = format!("[{edges}] or [{edges}, H] with x of shape [n, H, ..]");
            return Err(Error::shape("edge weights", weights.dims(), expected));
        }
    };
    if weights.dtype() != x.dtype() {
        return Err(Error::dtype(
            "edge weights",
            weights.dtype(),
            format!("{:?}", x.dtype()),
        ));
    }
    let weights = wide("edge weights", weights)?.reshape((edges, heads))?;
    Ok((weights.contiguous()?, heads))
}

/// The largest or smallest message of each channel.
fn extreme(graph: &Graph, x: &Rows, largest: bool) -> Result<Tensor> {
    let (host, width) = (x.tensor.detach().to_device(&Device::Cpu)?, x.width());
    let values = host.flatten_all()?;
    let csr = graph.incoming();
    let picks = match values.dtype() {
        DType::F64 => kernel::extreme_sources(csr, &values.to_vec1::<f64>()?, width, largest),
        _ => kernel::extreme_sources(csr, &values.to_vec1::<f32>()?, width, largest),
    };
    if x.tensor.device().is_cpu() {
        let pick = Pick {
            picks: Arc::new(picks),
            rows: (graph.num_sources(), graph.num_targets()),
            put: false,
        };
        return x.back(&x.tensor.apply_op1(pick)?);
    }
    // A zero stands behind the values for rows without edges.
    let zero = Tensor::zeros(1, x.tensor.dtype(), x.tensor.device())?;
    let pool = Tensor::cat(&[&x.tensor.flatten_all()?, &zero], 0)?;
    let flat = |(i, p): (usize, &u32)| match *p {
        kernel::NOTHING => (graph.num_sources() * width) as i64,
        p => (p as usize * width + i % width) as i64,
    };
    let flat: Vec<i64> = picks.iter().enumerate().map(flat).collect();
    let flat = Tensor::from_vec(flat, picks.len(), x.tensor.device())?;
    let y = pool.index_select(&flat, 0)?;
    x.back(&y.reshape((graph.num_targets(), width))?)
}

/// The rows of one end of each edge: `[E, ..]` from `[sources, ..]` or `[targets, ..]`.
///
/// # Errors
/// [`Error::Shape`], [`Error::DType`] for integers.
pub fn gather(graph: &Graph, x: &Tensor, side: Side) -> Result<Tensor> {
    let n = match side {
        Side::Source => graph.num_sources(),
        Side::Target => graph.num_targets(),
    };
    let rows = Rows::new("x", x, n)?;
    if x.device().is_cpu() {
        let graph = graph.clone();
        return rows.back(&rows.tensor.apply_op1(Gather { graph, side })?);
    }
    let ends = graph.edge_tensors(x.device())?;
    let ends = if side == Side::Source {
        ends.src
    } else {
        ends.dst
    };
    rows.back(&rows.tensor.index_select(&ends, 0)?)
}

/// Rows of edges `[E, ..]` summed at one end: `[targets, ..]` or `[sources, ..]`, 0 where there is
/// no edge.
///
/// # Errors
/// [`Error::Shape`], [`Error::DType`] for integers.
pub fn edge_sum(graph: &Graph, messages: &Tensor, side: Side) -> Result<Tensor> {
    let rows = Rows::new("messages", messages, graph.num_edges())?;
    if messages.device().is_cpu() {
        let graph = graph.clone();
        return rows.back(&rows.tensor.apply_op1(EdgeSum { graph, side })?);
    }
    let ends = graph.edge_tensors(messages.device())?;
    let (ends, n) = match side {
        Side::Source => (ends.src, graph.num_sources()),
        Side::Target => (ends.dst, graph.num_targets()),
    };
    let zeros = Tensor::zeros((n, rows.width()), rows.tensor.dtype(), messages.device())?;
    rows.back(&zeros.index_add(&ends, &rows.tensor, 0)?)
}

/// Rows of edges `[E, ..]` reduced at their targets: `[targets, ..]`, 0 where there is no edge.
///
/// # Errors
/// [`Error::Shape`], [`Error::DType`] for integers.
pub fn edge_reduce(graph: &Graph, messages: &Tensor, reduce: Reduce) -> Result<Tensor> {
    match reduce {
        Reduce::Sum => edge_sum(graph, messages, Side::Target),
        Reduce::Mean => {
            let rows = Rows::new("messages", messages, graph.num_edges())?;
            let sum = edge_sum(graph, &rows.tensor, Side::Target)?;
            let scale = column(graph.inverse_in_degrees(), &sum)?;
            rows.back(&sum.broadcast_mul(&scale)?)
        }
        Reduce::Max | Reduce::Min => {
            let groups = Graph::segments(graph.dst().to_vec(), graph.num_targets())?;
            spmm(&groups, None, messages, reduce)
        }
    }
}

/// A number, or a row, for each edge from its two ends: `a` is `[sources, d]` or `[sources, H, d]`,
/// `b` the same over targets. The dot product gives `[E]` or `[E, H]`, sum and product `[E, ..]` of
/// the form of `a`, the concatenation `[E, .., 2 d]`.
///
/// # Errors
/// [`Error::Shape`], [`Error::DType`] for integers or different dtypes.
pub fn sddmm(graph: &Graph, a: &Tensor, b: &Tensor, op: EdgeOp) -> Result<Tensor> {
    let left = Rows::new("a", a, graph.num_sources())?;
    let right = Rows::new("b", b, graph.num_targets())?;
    if left.rest != right.rest {
        return Err(Error::shape(
            "b",
            b.dims(),
            format!("[targets, ..] like a {:?}", a.dims()),
        ));
    }
    if a.dtype() != b.dtype() {
        return Err(Error::dtype("b", b.dtype(), format!("{:?}", a.dtype())));
    }
    if op == EdgeOp::Dot {
        return dot(graph, &left, &right);
    }
    let (a, b) = (
        gather(graph, a, Side::Source)?,
        gather(graph, b, Side::Target)?,
    );
    Ok(match op {
        EdgeOp::Add => (a + b)?,
        EdgeOp::Mul => (a * b)?,
        _ => {
            let last = a.rank() - 1;
            Tensor::cat(&[a, b], last)?
        }
    })
}

fn dot(graph: &Graph, a: &Rows, b: &Rows) -> Result<Tensor> {
    let (edges, heads, per_head) = match a.rest[..] {
        [d] => (graph.num_edges(), 1, d),
        [heads, d] => (graph.num_edges(), heads, d),
        _ => {
            let expected = "[sources, d] or [sources, H, d]";
            return Err(Error::shape("a", a.tensor.dims(), expected));
        }
    };
    let dots = if a.tensor.device().is_cpu() {
        let graph = graph.clone();
        a.tensor.apply_op2(&b.tensor, Dots { graph, heads })?
    } else {
        let a = gather(graph, &a.tensor, Side::Source)?;
        let product = (a * gather(graph, &b.tensor, Side::Target)?)?;
        product.reshape((edges, heads, per_head))?.sum(2)?
    };
    let dots = if a.rest.len() == 1 {
        dots.squeeze(1)?
    } else {
        dots
    };
    Ok(dots.to_dtype(a.dtype)?)
}

/// Softmax of logits `[E]` or `[E, H]` over the edges into each target, per head. The largest logit
/// of a target is subtracted first and is a constant for the gradient.
///
/// # Errors
/// [`Error::Shape`], [`Error::DType`] for integers.
pub fn segment_softmax(graph: &Graph, logits: &Tensor) -> Result<Tensor> {
    let rows = Rows::new("logits", logits, graph.num_edges())?;
    if logits.device().is_cpu() {
        let graph = graph.clone();
        return rows.back(&rows.tensor.apply_op1(SegmentSoftmax { graph })?);
    }
    let groups = Graph::segments(graph.dst().to_vec(), graph.num_targets())?;
    let constant = Rows::new("logits", &rows.tensor.detach(), graph.num_edges())?;
    let max = gather(graph, &extreme(&groups, &constant, true)?, Side::Target)?;
    let exp = (&rows.tensor - max)?.exp()?;
    let sums = (edge_sum(graph, &exp, Side::Target)? + 1e-16)?;
    rows.back(&(exp / gather(graph, &sums, Side::Target)?)?)
}

//! Losses of self-supervised methods, as functions of embeddings.

use crate::conv::{normalize_rows, Mlp};
use crate::graph::Graph;
use crate::sparse::{edge_reduce, gather, sddmm, EdgeOp, Reduce, Side};
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use candle_nn::ops::sigmoid;
use candle_nn::Module;
use nn::activation::Activation;

fn pair(a: &Tensor, b: &Tensor) -> Result<(usize, usize)> {
    let (n, d) = a
        .dims2()
        .map_err(|_| Error::shape("embeddings", a.dims(), "[n, d]"))?;
    if a.dims() != b.dims() {
        let expected = format!("{:?}, as the first", a.dims());
        return Err(Error::shape("second embeddings", b.dims(), expected));
    }
    if n < 2 {
        return Err(Error::shape("embeddings", a.dims(), "at least 2 nodes"));
    }
    Ok((n, d))
}

/// `(z - mean) / std` of each column over the nodes, `std` with `n - 1`; a constant column is 0.
///
/// # Errors
/// [`Error::Shape`] for fewer than 2 rows.
pub fn standardize(z: &Tensor) -> Result<Tensor> {
    let (n, _) = pair(z, z)?;
    let centered = z.broadcast_sub(&z.mean_keepdim(0)?)?;
    let variance = (centered.sqr()?.sum_keepdim(0)? / (n - 1) as f64)?;
    let floor = variance.ones_like()?.affine(1e-18, 0.0)?;
    Ok(centered.broadcast_div(&variance.maximum(&floor)?.sqrt()?)?)
}

/// `bn0(a)^T bn0(b) / n`.
fn correlation(a: &Tensor, b: &Tensor, n: usize) -> Result<Tensor> {
    Ok((a.t()?.matmul(b)? / n as f64)?)
}

fn eye(like: &Tensor) -> Result<Tensor> {
    Ok(Tensor::eye(like.dims()[0], like.dtype(), like.device())?)
}

/// What the off-diagonal correlations of [`barlow_twins`] should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Redundancy {
    /// 0.
    #[default]
    Decorrelated,
    /// -1, as the published option "hsic" has it.
    Hsic,
}

/// `sum_i (1 - c_ii)^2 + (1 / d) sum_(i != j) c_ij^2` of the correlation `c` of two views
/// (Bielak et al., Graph Barlow Twins, 2022).
///
/// # Errors
/// [`Error::Shape`] unless both are `[n, d]`, `n >= 2`.
pub fn barlow_twins(a: &Tensor, b: &Tensor, redundancy: Redundancy) -> Result<Tensor> {
    let (n, d) = pair(a, b)?;
    let c = correlation(&standardize(a)?, &standardize(b)?, n)?;
    let eye = eye(&c)?;
    let diagonal = (&c * &eye)?.sum(1)?;
    let others = match redundancy {
        Redundancy::Decorrelated => c.sqr()?,
        Redundancy::Hsic => (c + 1.0)?.sqr()?,
    };
    let others = (others * (1.0 - &eye)?)?.sum_all()?;
    let diagonal = (1.0 - diagonal)?.sqr()?.sum_all()?;
    Ok((diagonal + (others / d as f64)?)?)
}

/// `-tr C12 + lambda (|I - C11|^2 + |I - C22|^2)` (Zhang et al., CCA-SSG, NeurIPS 2021). The
/// deviation has `n - 1` and the correlation `n`, as published, so that the ideal is not reached.
///
/// # Errors
/// As [`barlow_twins`].
pub fn cca(a: &Tensor, b: &Tensor, lambda: f64) -> Result<Tensor> {
    let (n, _) = pair(a, b)?;
    let (a, b) = (standardize(a)?, standardize(b)?);
    let trace = ((&a * &b)?.sum_all()? / n as f64)?;
    let eye = eye(&correlation(&a, &a, n)?)?;
    let apart =
        |z: &Tensor| -> Result<Tensor> { Ok((&eye - correlation(z, z, n)?)?.sqr()?.sum_all()?) };
    Ok((((apart(&a)? + apart(&b)?)? * lambda)? - trace)?)
}

/// The cosine of the rows of two matrices, norms taken to be at least `1e-12`: `[n]`.
fn cosine(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    Ok((normalize_rows(a)? * normalize_rows(b)?)?.sum(1)?)
}

/// The mean over rows of `(1 - cos(prediction, target))^alpha` (Hou et al., GraphMAE, KDD 2022).
///
/// # Errors
/// [`Error::Shape`] for shapes that differ or no row, [`Error::InvalidArgument`] for `alpha = 0`.
pub fn scaled_cosine_error(prediction: &Tensor, target: &Tensor, alpha: u32) -> Result<Tensor> {
    if prediction.dims() != target.dims() || prediction.rank() != 2 || prediction.dims()[0] == 0 {
        let expected = format!("{:?}, with at least one row", target.dims());
        return Err(Error::shape("prediction", prediction.dims(), expected));
    }
    if alpha == 0 {
        return Err(Error::argument("alpha", 0, "at least 1"));
    }
    let error = (1.0 - cosine(prediction, target)?)?;
    let mut power = error.clone();
    for _ in 1..alpha {
        power = (power * &error)?;
    }
    Ok(power.mean_all()?)
}

/// `2 - mean cos(q1, target2) - mean cos(q2, target1)` (Thakoor et al., BGRL, ICLR 2022); targets are
/// constants.
///
/// # Errors
/// As [`barlow_twins`].
pub fn bootstrap(q1: &Tensor, q2: &Tensor, target1: &Tensor, target2: &Tensor) -> Result<Tensor> {
    pair(q1, target2)?;
    pair(q2, target1)?;
    let first = cosine(q1, &target2.detach())?.mean_all()?;
    let second = cosine(q2, &target1.detach())?.mean_all()?;
    Ok((2.0 - (first + second)?)?)
}

/// GraphECL's loss of graph embeddings `h` and the projections `q` of graph-free ones, over the edges
/// `j -> i` of a graph that has a self-loop on each node (Xiao et al., 2024): with unit rows,
///
/// ```text
/// pos_i = mean_j z_j . q_i / T
/// neg_i = mean_j ln( sum_k e^(z_i . z_k / T) + lambda sum_k e^(z_j . q_k / T) )
/// loss  = mean_i (neg_i - pos_i)
/// ```
///
/// `others` are the nodes `k` of the sums, all of them when `None`; the sums over some are scaled up.
///
/// # Errors
/// [`Error::Shape`], and [`Error::InvalidArgument`] for an empty list of others.
pub fn efficient_contrast(
    graph: &Graph,
    h: &Tensor,
    q: &Tensor,
    temperature: f64,
    lambda: f64,
    others: Option<&Tensor>,
) -> Result<Tensor> {
    let (n, _) = pair(h, q)?;
    let (z, q) = (normalize_rows(h)?, normalize_rows(q)?);
    let (zk, qk, scale) = match others {
        None => (z.clone(), q.clone(), 1.0),
        Some(others) if others.elem_count() == 0 => {
            return Err(Error::argument("others", "none", "at least one node"));
        }
        Some(others) => (
            z.index_select(others, 0)?,
            q.index_select(others, 0)?,
            n as f64 / others.elem_count() as f64,
        ),
    };
    let sums = |k: &Tensor| -> Result<Tensor> {
        let exp = (z.matmul(&k.t()?)? / temperature)?.exp()?;
        Ok((exp.sum(1)? * scale)?)
    };
    let (own, cross) = (sums(&zk)?, sums(&qk)?);
    let positive = (sddmm(graph, &z, &q, EdgeOp::Dot)? / temperature)?;
    let negative = gather(graph, &own, Side::Target)?;
    let negative = (negative + (gather(graph, &cross, Side::Source)? * lambda)?)?.log()?;
    let per_node = edge_reduce(graph, &(negative - positive)?, Reduce::Mean)?;
    Ok(per_node.mean_all()?)
}

/// `[h_a[u] * h_b[v]]` for all pairs of layers `(a, b)`, the second index running first: `[pairs,
/// layers^2 d]` (Tan et al., S2GAE, WSDM 2023).
///
/// # Errors
/// [`Error::InvalidArgument`] for no layer; those of candle.
pub fn cross_layers(layers: &[Tensor], u: &Tensor, v: &Tensor) -> Result<Tensor> {
    if layers.is_empty() {
        return Err(Error::argument("layers", 0, "at least 1"));
    }
    let at = |ids: &Tensor| -> candle_core::Result<Vec<Tensor>> {
        layers.iter().map(|h| h.index_select(ids, 0)).collect()
    };
    let (from, to) = (at(u)?, at(v)?);
    let mut products = Vec::with_capacity(layers.len() * layers.len());
    for a in &from {
        for b in &to {
            products.push((a * b)?);
        }
    }
    Ok(Tensor::cat(&products, 1)?)
}

/// The probability `[pairs]` of an edge from cross-layer products.
///
/// # Errors
/// Those of candle.
pub fn link_probability(decoder: &Mlp, products: &Tensor) -> Result<Tensor> {
    Ok(sigmoid(&decoder.forward(products)?.squeeze(1)?)?)
}

/// Added inside the logarithms of [`link_loss`].
const TINY: f64 = 1e-15;

/// `-mean ln(p + 1e-15)` of edges plus `-mean ln(1 - p + 1e-15)` of other pairs.
///
/// # Errors
/// [`Error::InvalidArgument`] for an empty list.
pub fn link_loss(positive: &Tensor, negative: &Tensor) -> Result<Tensor> {
    for p in [positive, negative] {
        if p.elem_count() == 0 {
            return Err(Error::argument("pairs", 0, "at least one of each kind"));
        }
    }
    let edges = (positive + TINY)?.log()?.mean_all()?;
    let others = ((1.0 - negative)? + TINY)?.log()?.mean_all()?;
    Ok((edges + others)?.neg()?)
}

/// DGI's loss: the logistic loss of `h W s` for real (1) and corrupted (0) nodes, `s` the sigmoid of
/// the mean of the real ones (Velickovic et al., ICLR 2019).
///
/// # Errors
/// As [`barlow_twins`].
pub fn mutual_information(real: &Tensor, corrupted: &Tensor, weight: &Tensor) -> Result<Tensor> {
    pair(real, corrupted)?;
    let summary = sigmoid(&real.mean_keepdim(0)?)?;
    let direction = weight.matmul(&summary.t()?)?;
    let softplus = |x: &Tensor| Activation::Softplus.of(x);
    let real = softplus(&real.matmul(&direction)?.neg()?)?.mean_all()?;
    let corrupted = softplus(&corrupted.matmul(&direction)?)?.mean_all()?;
    Ok(((real + corrupted)? / 2.0)?)
}

/// BGRL's schedule: linear from 0 to `max` over `warmup` steps, then a cosine down to 0 at `total`.
pub fn warmup_cosine(step: usize, max: f64, warmup: usize, total: usize) -> f64 {
    if step < warmup {
        return max * step as f64 / warmup as f64;
    }
    let span = total.saturating_sub(warmup).max(1) as f64;
    let at = ((step - warmup) as f64 / span).min(1.0);
    max * (1.0 + (std::f64::consts::PI * at).cos()) / 2.0
}

/// Which nodes GraphMAE hides, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MaskPlan {
    /// Hidden nodes; the loss is theirs. One may be in neither list below and keep its features (both
    /// sizes are rounded down).
    pub masked: Vec<u32>,
    /// Those that show the token.
    pub token: Vec<u32>,
    /// Those that show another node's features.
    pub noise: Vec<u32>,
    /// The nodes whose features they show.
    pub sources: Vec<u32>,
}

impl MaskPlan {
    /// From a permutation of all nodes, one of the masked positions, and the sources: `floor(rate n)`
    /// nodes are masked, `m`; the first `floor((1 - replace) m)` of the second permutation get the token
    /// and the last `floor(replace m)` noise.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for rates outside `[0, 1]` or lists that are too short.
    pub fn new(
        rate: f64,
        replace: f64,
        nodes: &[u32],
        among: &[u32],
        sources: &[u32],
    ) -> Result<Self> {
        let masked = nodes[..mask_count(rate, nodes.len())?].to_vec();
        let (token, noise) = mask_parts(replace, masked.len())?;
        let at = |i: &u32| masked.get(*i as usize).copied();
        let ordered: Option<Vec<u32>> = among.iter().map(at).collect();
        let ordered = ordered.filter(|o| o.len() == masked.len() && sources.len() >= noise);
        let ordered = ordered.ok_or_else(|| {
            let value = format!("{} and {} entries", among.len(), sources.len());
            let expected = format!("a permutation of {} and {noise} sources", masked.len());
            Error::argument("mask permutations", value, expected)
        })?;
        Ok(Self {
            token: ordered[..token].to_vec(),
            noise: ordered[ordered.len() - noise..].to_vec(),
            sources: sources[..noise].to_vec(),
            masked,
        })
    }

    /// Features `[n, d]` with the token `[1, d]` and the noise in place.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for hidden nodes that `x` has not; those of candle.
    pub fn apply(&self, x: &Tensor, token: &Tensor) -> Result<Tensor> {
        let ((n, _), device) = (x.dims2()?, x.device());
        let named = self.token.iter().chain(&self.noise).chain(&self.sources);
        if let Some(bad) = named.copied().find(|v| *v as usize >= n) {
            return Err(Error::argument("hidden node", bad, format!("below {n}")));
        }
        let mut from: Vec<u32> = (0..n as u32).collect();
        for (v, s) in self.noise.iter().zip(&self.sources) {
            from[*v as usize] = *s;
        }
        let mut hidden = vec![0.0; n];
        self.token.iter().for_each(|v| hidden[*v as usize] = 1.0);
        let hidden = Tensor::from_vec(hidden, (n, 1), &Device::Cpu)?;
        let hidden = hidden.to_dtype(x.dtype())?.to_device(device)?;
        let shown = x.index_select(&Tensor::from_vec(from, n, device)?, 0)?;
        let kept = shown.broadcast_mul(&(1.0 - &hidden)?)?;
        Ok((kept + hidden.matmul(token)?)?)
    }
}

pub(super) fn mask_count(rate: f64, n: usize) -> Result<usize> {
    if !(0.0..=1.0).contains(&rate) {
        return Err(Error::argument("mask rate", rate, "a share in [0, 1]"));
    }
    Ok((rate * n as f64).floor() as usize)
}

/// How many of `m` masked nodes get the token, and how many noise.
fn mask_parts(replace: f64, m: usize) -> Result<(usize, usize)> {
    if !(0.0..=1.0).contains(&replace) {
        return Err(Error::argument(
            "replace rate",
            replace,
            "a share in [0, 1]",
        ));
    }
    let part = |share: f64| (share * m as f64).floor() as usize;
    Ok((part(1.0 - replace), part(replace)))
}

/// Rows of a matrix set to 0.
pub(super) fn clear_rows(x: &Tensor, rows: &[u32]) -> Result<Tensor> {
    let n = x.dims()[0];
    let mut keep = vec![1.0; n];
    rows.iter().for_each(|v| keep[*v as usize] = 0.0);
    let keep = Tensor::from_vec(keep, (n, 1), &Device::Cpu)?;
    Ok(x.broadcast_mul(&keep.to_dtype(x.dtype())?.to_device(x.device())?)?)
}

//! Scaled dot-product attention with a gradient, without the matrix of all scores.
//!
//! ```text
//! S = s Q K^T + M,   P = softmax(S),   O = P V
//! dV = P^T dO,   dS = P (dO V^T - rowsum(dO O)),   dQ = s dS K,   dK = s dS^T Q
//! ```
//!
//! `candle_nn::ops::sdpa` and everything built on `softmax_last_dim` return no gradient. Here, on
//! the CPU in f32 and f64, each head is computed in tiles of query rows: a tile's scores live in a
//! buffer that is used again, the forward pass keeps one number per row (`ln sum e^S`), and the
//! backward pass computes `P` again (Dao, Fu, Ermon, Rudra, Re 2022, arXiv 2205.14135, without its
//! split of the keys: memory grows as the sequence, not as its square). Heads run in parallel; the
//! bits do not depend on the number of threads.
//!
//! Elsewhere, and where gradients keep their graph, candle operations with the whole matrix,
//! differentiable any number of times.
//!
//! ```
//! use candle_core::{DType, Device, Var};
//! use thalweg_nn::attention::{multi_head_attention, AttentionConfig};
//! use thalweg_nn::RandomStream;
//! let mut stream = RandomStream::new(7);
//! let mut draw = || stream.normal(0.0, 1.0, (2, 5, 8), DType::F32, &Device::Cpu);
//! let (q, k, v) = (Var::from_tensor(&draw()?)?, draw()?, draw()?);
//! let config = AttentionConfig { causal: true, ..Default::default() };
//! let y = multi_head_attention(&q, &k, &v, 4, &config)?;
//! assert_eq!(y.dims(), &[2, 5, 8]);
//! assert!(y.sum_all()?.backward()?.get(&q).is_some());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use crate::kernel::{
    filled, has_kernel, max, product, sum2, tensor, transpose, vectorized, Computed, Matrix, Onto,
    Scalar, View,
};
use crate::linear::same_dtype;
use crate::softmax::{exponentials, softmax};
use crate::{Error, Result};
use candle_core::{DType, Device, Shape, Tensor, D};
use rayon::prelude::*;
use tensor_core::autograd::keeps_graph;

/// How queries look at keys.
#[derive(Debug, Clone, Default)]
pub struct AttentionConfig {
    /// Broadcasts to `[B, H, Tq, Tk]`: added to the scores (`-inf` forbids a key), or of dtype U8
    /// with 0 for forbidden keys. A floating-point mask may have a gradient; then the whole matrix
    /// of scores is formed.
    pub mask: Option<Tensor>,
    /// Query `i` sees keys up to `i + Tk - Tq`: the last query sees all of them. With as many keys
    /// as queries that is the usual causal mask.
    pub causal: bool,
    /// Factor of the scores; `1 / sqrt(D)` if none.
    pub scale: Option<f64>,
}

/// Query rows in a tile.
const ROWS: usize = 64;

/// Attention of `q` `[B, H, Tq, D]` to `k` `[B, H, Tk, D]` and `v` `[B, H, Tk, E]`; gives
/// `[B, H, Tq, E]`. A query that may see no key gives 0.
///
/// # Errors
/// [`Error::Shape`] and [`Error::DType`] when tensors do not fit or are empty, or a causal mask
/// has more queries than keys; [`Error::InvalidConfig`] for a scale that is not finite.
pub fn scaled_dot_product_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    config: &AttentionConfig,
) -> Result<Tensor> {
    for (name, x) in [("query", q), ("key", k), ("value", v)] {
        if x.rank() != 4 || x.elem_count() == 0 {
            return Err(Error::shape(name, x.dims(), "a non-empty [B, H, T, D]"));
        }
    }
    let [b, h, tq, d] = [0, 1, 2, 3].map(|i| q.dims()[i]);
    let (tk, e) = (k.dims()[2], v.dims()[3]);
    if k.dims() != [b, h, tk, d] {
        return Err(Error::shape(
            "key",
            k.dims(),
            format!("[{b}, {h}, Tk, {d}]"),
        ));
    }
    if v.dims() != [b, h, tk, e] {
        return Err(Error::shape(
            "value",
            v.dims(),
            format!("[{b}, {h}, {tk}, E]"),
        ));
    }
    let sizes = Sizes {
        batch: b,
        heads: h,
        queries: tq,
        keys: tk,
        width: d,
        value_width: e,
        interleaved: false,
    };
    attend([q, k, v], sizes, config)
}

/// Attention of `heads` heads that lie side by side in the last dimension: `q` `[B, Tq, H D]`, `k`
/// `[B, Tk, H D]`, `v` `[B, Tk, H E]`; gives `[B, Tq, H E]`. No tensor is transposed.
///
/// # Errors
/// As [`scaled_dot_product_attention`], and [`Error::InvalidConfig`] for heads that do not divide
/// the last dimensions.
pub fn multi_head_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: usize,
    config: &AttentionConfig,
) -> Result<Tensor> {
    for (name, x) in [("query", q), ("key", k), ("value", v)] {
        if x.rank() != 3 || x.elem_count() == 0 {
            return Err(Error::shape(name, x.dims(), "a non-empty [B, T, C]"));
        }
    }
    let (b, tq, c) = q.dims3()?;
    let (_, tk, e) = v.dims3()?;
    if heads == 0 || !c.is_multiple_of(heads) || !e.is_multiple_of(heads) {
        let expected = format!("a divisor of the widths {c} and {e}");
        return Err(Error::config("heads", heads, expected));
    }
    if k.dims() != [b, tk, c] {
        return Err(Error::shape("key", k.dims(), format!("[{b}, {tk}, {c}]")));
    }
    if v.dims() != [b, tk, e] {
        return Err(Error::shape("value", v.dims(), format!("[{b}, {tk}, H E]")));
    }
    let sizes = Sizes {
        batch: b,
        heads,
        queries: tq,
        keys: tk,
        width: c / heads,
        value_width: e / heads,
        interleaved: true,
    };
    attend([q, k, v], sizes, config)
}

#[derive(Debug, Clone, Copy)]
struct Sizes {
    batch: usize,
    heads: usize,
    queries: usize,
    keys: usize,
    width: usize,
    value_width: usize,
    /// `[B, T, H D]` instead of `[B, H, T, D]`.
    interleaved: bool,
}

impl Sizes {
    fn shape(&self, time: usize, width: usize) -> Shape {
        match self.interleaved {
            true => Shape::from((self.batch, time, self.heads * width)),
            false => Shape::from((self.batch, self.heads, time, width)),
        }
    }

    /// Offset of a head's first row, and the distance of its rows.
    fn place(&self, head: usize, time: usize, width: usize) -> (usize, usize) {
        let (b, h) = (head / self.heads, head % self.heads);
        match self.interleaved {
            true => (
                b * time * self.heads * width + h * width,
                self.heads * width,
            ),
            false => (head * time * width, width),
        }
    }

    /// How many keys the queries up to (not including) `end` may see.
    fn visible(&self, causal: bool, end: usize) -> usize {
        match causal {
            true => end + self.keys - self.queries,
            false => self.keys,
        }
    }
}

fn attend(qkv: [&Tensor; 3], sizes: Sizes, config: &AttentionConfig) -> Result<Tensor> {
    let [q, k, v] = qkv;
    let scale = config.scale.unwrap_or((sizes.width as f64).powf(-0.5));
    if !scale.is_finite() {
        return Err(Error::config(
            "AttentionConfig::scale",
            scale,
            "a finite number",
        ));
    }
    if config.causal && sizes.queries > sizes.keys {
        let expected = format!("at most {} queries, one per key", sizes.keys);
        return Err(Error::shape("query", q.dims(), expected));
    }
    same_dtype(q, [Some(k), Some(v)])?;
    let mask = config
        .mask
        .as_ref()
        .map(|mask| additive(mask, q))
        .transpose()?;
    let full = [sizes.batch, sizes.heads, sizes.queries, sizes.keys];
    let mask = match mask {
        Some(mask) => Some(mask.broadcast_as(&full).map_err(|_| {
            let given = config.mask.as_ref().map_or(&[][..], Tensor::dims);
            Error::shape("mask", given, format!("what broadcasts to {full:?}"))
        })?),
        None => None,
    };
    let tracked = mask.as_ref().is_some_and(Tensor::track_op);
    if !has_kernel(q) || tracked || keeps_graph()? {
        return composed(qkv, sizes, mask.as_ref(), config.causal, scale);
    }
    let head = Heads {
        sizes,
        mask,
        causal: config.causal,
        scale,
    };
    match q.dtype() {
        DType::F64 => fused::<f64>(qkv, head),
        _ => fused::<f32>(qkv, head),
    }
}

/// A mask that is added to scores of `q`'s dtype.
fn additive(mask: &Tensor, q: &Tensor) -> Result<Tensor> {
    if mask.dtype() == q.dtype() {
        return Ok(mask.clone());
    }
    if mask.dtype() != DType::U8 {
        let expected = format!("U8 or {:?}, as the query", q.dtype());
        return Err(Error::dtype("mask", mask.dtype(), expected));
    }
    let zeros = Tensor::zeros(mask.shape(), q.dtype(), q.device())?;
    let forbidden = Tensor::full(f32::NEG_INFINITY, mask.shape(), q.device())?;
    Ok(mask.where_cond(&zeros, &forbidden.to_dtype(q.dtype())?)?)
}

/// `-inf` where a query may not see a key.
fn causal_mask(sizes: &Sizes, dtype: DType, device: &Device) -> Result<Tensor> {
    let (n, m) = (sizes.queries, sizes.keys);
    let value = |i: usize| match i % m > i / m + m - n {
        true => f32::NEG_INFINITY,
        false => 0.0,
    };
    let mask: Vec<f32> = (0..n * m).map(value).collect();
    Ok(Tensor::from_vec(mask, (n, m), device)?.to_dtype(dtype)?)
}

fn composed(
    qkv: [&Tensor; 3],
    sizes: Sizes,
    mask: Option<&Tensor>,
    causal: bool,
    scale: f64,
) -> Result<Tensor> {
    let split = |x: &Tensor| -> Result<Tensor> {
        if !sizes.interleaved {
            return Ok(x.contiguous()?);
        }
        let time = x.dim(1)?;
        let heads = x.reshape((sizes.batch, time, sizes.heads, ()))?;
        Ok(heads.transpose(1, 2)?.contiguous()?)
    };
    let [q, k, v] = qkv;
    let (q, k, v) = (split(q)?, split(k)?, split(v)?);
    let scores = ((q * scale)?.matmul(&k.transpose(2, 3)?.contiguous()?))?;
    let scores = match mask {
        Some(mask) => (scores + mask)?,
        None => scores,
    };
    let scores = match causal {
        true => scores.broadcast_add(&causal_mask(&sizes, scores.dtype(), scores.device())?)?,
        false => scores,
    };
    // A row without a key has no softmax: its scores become 0 and its weights are wiped out.
    let best = scores.detach().max_keepdim(D::Minus1)?;
    let empty = best.eq(f64::NEG_INFINITY)?.broadcast_as(scores.shape())?;
    let zeros = scores.zeros_like()?;
    let weights = softmax(&empty.where_cond(&zeros, &scores)?, D::Minus1)?;
    let mixed = empty.where_cond(&zeros, &weights)?.matmul(&v)?;
    Ok(match sizes.interleaved {
        true => {
            let shape = sizes.shape(sizes.queries, sizes.value_width);
            mixed.transpose(1, 2)?.contiguous()?.reshape(shape)?
        }
        false => mixed,
    })
}

/// What every head does.
struct Heads {
    sizes: Sizes,
    /// `[B, H, Tq, Tk]`, with any strides.
    mask: Option<Tensor>,
    causal: bool,
    scale: f64,
}

/// A mask's memory.
struct Mask<'a, T> {
    data: &'a [T],
    stride: [usize; 4],
    start: usize,
}

/// The values of a head in one tensor: its rows, `stride` apart.
#[derive(Clone, Copy)]
struct Rows<'a, T> {
    data: &'a [T],
    stride: usize,
    width: usize,
}

impl<'a, T> Rows<'a, T> {
    fn matrix(&self, first: usize, end: usize) -> Matrix<'a, T> {
        let from = &self.data[first * self.stride..];
        Matrix::strided(from, (end - first, self.width), (self.stride, 1))
    }

    fn row(&self, i: usize) -> &'a [T] {
        &self.data[i * self.stride..][..self.width]
    }
}

/// All rows of a head as columns: made once, where each tile of queries would do it again.
struct Across<T> {
    data: Vec<T>,
    rows: usize,
    width: usize,
}

impl<T: Scalar> Across<T> {
    fn new(of: Rows<'_, T>, rows: usize) -> Self {
        let mut data = vec![T::ZERO; rows * of.width];
        transpose(&of.matrix(0, rows), &mut data, rows);
        Self {
            data,
            rows,
            width: of.width,
        }
    }

    /// The first columns.
    fn matrix(&self, columns: usize) -> Matrix<'_, T> {
        Matrix::strided(&self.data, (self.width, columns), (self.rows, 1))
    }
}

fn fused<T: Scalar>([q, k, v]: [&Tensor; 3], heads: Heads) -> Result<Tensor> {
    let (q, k, v) = (q.contiguous()?, k.contiguous()?, v.contiguous()?);
    let sizes = heads.sizes;
    let mut sums = vec![T::ZERO; sizes.batch * sizes.heads * sizes.queries];
    let shape = sizes.shape(sizes.queries, sizes.value_width);
    let y = {
        let views = [View::new(&q)?, View::new(&k)?, View::new(&v)?];
        let [q, k, v] = [
            views[0].slice::<T>()?,
            views[1].slice::<T>()?,
            views[2].slice::<T>()?,
        ];
        heads.with_mask(|mask| {
            let one = |(head, sums): (usize, &mut [T])| {
                heads.forward([q, k, v], mask.as_ref(), head, sums)
            };
            let parts = sums.par_chunks_mut(sizes.queries).enumerate();
            let parts: Vec<Vec<T>> = parts.map(one).collect();
            heads.joined(&parts, sizes.queries, sizes.value_width)
        })?
    };
    let backward = move |arguments: &[&Tensor], y: &Tensor, dy: &Tensor| {
        gradients(&heads, arguments, y, dy, &sums)
    };
    let node = Computed::new("attention", y, &shape, backward);
    Ok(q.apply_op3(&k, &v, node)?)
}

fn gradients<T: Scalar>(
    heads: &Heads,
    arguments: &[&Tensor],
    y: &Tensor,
    dy: &Tensor,
    sums: &[T],
) -> Result<Vec<Option<Tensor>>> {
    let sizes = heads.sizes;
    let views: Result<Vec<View>> = arguments
        .iter()
        .chain([&y, &dy])
        .map(|t| View::new(t))
        .collect();
    let views = views?;
    let slices: Result<Vec<&[T]>> = views.iter().map(View::slice::<T>).collect();
    let slices = slices?;
    let [q, k, v, y, dy] = slices.as_slice() else {
        return Err(Error::shape("arguments", &[slices.len()], "3"));
    };
    let parts = heads.with_mask(|mask| {
        let count = sizes.batch * sizes.heads;
        let one = |head| heads.backward([q, k, v, y, dy], mask.as_ref(), head, sums);
        (0..count)
            .into_par_iter()
            .map(one)
            .collect::<Vec<[Vec<T>; 3]>>()
    })?;
    let (mut dq, mut dk, mut dv) = (vec![], vec![], vec![]);
    for [q, k, v] in parts {
        dq.push(q);
        dk.push(k);
        dv.push(v);
    }
    let (n, m, d, e) = (sizes.queries, sizes.keys, sizes.width, sizes.value_width);
    let join = |parts: Vec<Vec<T>>, time: usize, width: usize| {
        tensor(heads.joined(&parts, time, width), &sizes.shape(time, width))
    };
    Ok(vec![
        Some(join(dq, n, d)?),
        Some(join(dk, m, d)?),
        Some(join(dv, m, e)?),
    ])
}

impl Heads {
    /// Calls `f` with the mask's memory.
    fn with_mask<T: Scalar, R>(&self, f: impl FnOnce(Option<Mask<'_, T>>) -> R) -> Result<R> {
        let Some(mask) = &self.mask else {
            return Ok(f(None));
        };
        let (storage, layout) = mask.storage_and_layout();
        let candle_core::Storage::Cpu(cpu) = &*storage else {
            return Err(Error::Unsupported {
                operation: "attention".into(),
                context: "with a mask on another device".into(),
            });
        };
        let data = T::slice(cpu)
            .ok_or_else(|| Error::dtype("mask", mask.dtype(), "the dtype of the query"))?;
        let stride = std::array::from_fn(|i| layout.stride()[i]);
        Ok(f(Some(Mask {
            data,
            stride,
            start: layout.start_offset(),
        })))
    }

    /// Heads `[time, width]` into one tensor.
    fn joined<T: Scalar>(&self, parts: &[Vec<T>], time: usize, width: usize) -> Vec<T> {
        if !self.sizes.interleaved {
            return parts.concat();
        }
        filled(parts.len() * time * width, |out| {
            let heads = self.sizes.heads;
            let images = out.par_chunks_mut(time * heads * width);
            images
                .zip(parts.par_chunks(heads))
                .for_each(|(out, parts)| {
                    for (t, line) in out.chunks_exact_mut(heads * width).enumerate() {
                        for (to, part) in line.chunks_exact_mut(width).zip(parts) {
                            to.copy_from_slice(&part[t * width..(t + 1) * width]);
                        }
                    }
                });
        })
    }

    fn rows<'a, T>(&self, data: &'a [T], head: usize, time: usize, width: usize) -> Rows<'a, T> {
        let (start, stride) = self.sizes.place(head, time, width);
        Rows {
            data: &data[start..],
            stride,
            width,
        }
    }

    /// The scores of a tile of queries, masked; `seen` keys of the first ones are computed.
    fn scores<T: Scalar>(
        &self,
        (q, k): (Rows<'_, T>, &Across<T>),
        mask: Option<&Mask<'_, T>>,
        head: usize,
        (first, end, seen): (usize, usize, usize),
        scores: &mut [T],
    ) {
        let scale = T::from_f64(self.scale);
        product(
            (&mut *scores, seen),
            q.matrix(first, end),
            k.matrix(seen),
            (Onto::Nothing, scale),
            false,
        );
        for (i, row) in scores.chunks_exact_mut(seen).take(end - first).enumerate() {
            if let Some(mask) = mask {
                let (b, h) = (head / self.sizes.heads, head % self.sizes.heads);
                let [sb, sh, sq, _] = mask.stride;
                let at = mask.start + b * sb + h * sh + (first + i) * sq;
                for (j, x) in row.iter_mut().enumerate() {
                    *x = *x + mask.data[at + j * mask.stride[3]];
                }
            }
            if self.causal {
                let limit = self.sizes.visible(true, first + i + 1);
                row[limit..].fill(T::from_f64(f64::NEG_INFINITY));
            }
        }
    }

    /// The tiles of queries: (first, end, keys that they may see).
    fn tiles(&self) -> impl Iterator<Item = (usize, usize, usize)> + '_ {
        let n = self.sizes.queries;
        (0..n).step_by(ROWS).map(move |first| {
            let end = (first + ROWS).min(n);
            (first, end, self.sizes.visible(self.causal, end))
        })
    }

    /// One head's output `[Tq, E]`, and `ln sum e^S` of its rows.
    fn forward<T: Scalar>(
        &self,
        [q, k, v]: [&[T]; 3],
        mask: Option<&Mask<'_, T>>,
        head: usize,
        sums: &mut [T],
    ) -> Vec<T> {
        let Sizes {
            queries,
            keys,
            width,
            value_width,
            ..
        } = self.sizes;
        let q = self.rows(q, head, queries, width);
        let k = self.rows(k, head, keys, width);
        let v = self.rows(v, head, keys, value_width);
        let k = Across::new(k, keys);
        let mut scores = vec![T::ZERO; ROWS.min(queries) * keys];
        filled(queries * value_width, |out| {
            for (first, end, seen) in self.tiles() {
                let scores = &mut scores[..(end - first) * seen];
                self.scores((q, &k), mask, head, (first, end, seen), scores);
                let mut totals = [T::ONE; ROWS];
                vectorized(
                    #[inline(always)]
                    || {
                        let rows = scores.chunks_exact_mut(seen).zip(&mut sums[first..end]);
                        for ((row, sum), total) in rows.zip(&mut totals) {
                            (*sum, *total) = weights(row);
                        }
                    },
                );
                let out = &mut out[first * value_width..end * value_width];
                let p = Matrix::new(&*scores, end - first, seen);
                let onto = (Onto::Nothing, T::ONE);
                product((&mut *out, value_width), p, v.matrix(0, seen), onto, false);
                for (row, total) in out.chunks_exact_mut(value_width).zip(totals) {
                    for y in row {
                        *y = *y * total;
                    }
                }
            }
        })
    }

    /// One head's gradients `[Tq, D]`, `[Tk, D]`, `[Tk, E]`.
    fn backward<T: Scalar>(
        &self,
        [q, k, v, y, dy]: [&[T]; 5],
        mask: Option<&Mask<'_, T>>,
        head: usize,
        sums: &[T],
    ) -> [Vec<T>; 3] {
        let Sizes {
            queries,
            keys,
            width,
            value_width,
            ..
        } = self.sizes;
        let q = self.rows(q, head, queries, width);
        let k = self.rows(k, head, keys, width);
        let v = self.rows(v, head, keys, value_width);
        let y = self.rows(y, head, queries, value_width);
        let dy = self.rows(dy, head, queries, value_width);
        let (k_across, v_across) = (Across::new(k, keys), Across::new(v, keys));
        let sums = &sums[head * queries..(head + 1) * queries];
        let size = ROWS.min(queries) * keys;
        let (mut p, mut dp) = (vec![T::ZERO; size], vec![T::ZERO; size]);
        let mut dq = vec![T::ZERO; queries * width];
        let (mut dk, mut dv) = (
            vec![T::ZERO; keys * width],
            vec![T::ZERO; keys * value_width],
        );
        let scale = T::from_f64(self.scale);
        for (first, end, seen) in self.tiles() {
            let n = end - first;
            let (p, dp) = (&mut p[..n * seen], &mut dp[..n * seen]);
            self.scores((q, &k_across), mask, head, (first, end, seen), p);
            let g = dy.matrix(first, end);
            let plain = (Onto::Nothing, T::ONE);
            product((&mut *dp, seen), g, v_across.matrix(seen), plain, false);
            vectorized(
                #[inline(always)]
                || {
                    let rows = p.chunks_exact_mut(seen).zip(dp.chunks_exact_mut(seen));
                    for (i, (p, dp)) in rows.enumerate() {
                        let along = sum2(dy.row(first + i), y.row(first + i), |a, b| a * b);
                        probabilities(p, sums[first + i]);
                        for (dp, p) in dp.iter_mut().zip(p) {
                            *dp = *p * (*dp - along);
                        }
                    }
                },
            );
            let p = Matrix::new(&*p, n, seen);
            let ds = Matrix::new(&*dp, n, seen);
            let (add, add_scaled) = ((Onto::Sum, T::ONE), (Onto::Sum, scale));
            product((&mut dv, value_width), p.t(), g, add, false);
            product(
                (&mut dk, width),
                ds.t(),
                q.matrix(first, end),
                add_scaled,
                false,
            );
            let out = &mut dq[first * width..end * width];
            product(
                (out, width),
                ds,
                k.matrix(0, seen),
                (Onto::Nothing, scale),
                false,
            );
        }
        [dq, dk, dv]
    }
}

/// `x <- e^(x - max x)` and gives `ln sum e^x` and the factor that makes probabilities of the new
/// values; infinity and 0 for a row without a key, so that its probabilities are 0 here and in the
/// backward pass.
#[inline(always)]
fn weights<T: Scalar>(row: &mut [T]) -> (T, T) {
    let top = max(row);
    if top == T::from_f64(f64::NEG_INFINITY) {
        row.fill(T::ZERO);
        return (T::from_f64(f64::INFINITY), T::ZERO);
    }
    let total = exponentials(row, top);
    (top + T::from_f64(total.ln()), T::from_f64(1.0 / total))
}

#[inline(always)]
fn probabilities<T: Scalar>(row: &mut [T], sum: T) {
    for x in row {
        *x = (*x - sum).exp_of_negative();
    }
}

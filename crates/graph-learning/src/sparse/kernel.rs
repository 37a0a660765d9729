//! The loops: rows summed by one thread each, in their order, so that the bits do not depend on the
//! number of threads.

use crate::graph::Csr;
use candle_core::WithDType;
use rayon::prelude::*;
use std::ops::Range;
use tensor_core::kernels::Real;

/// What kernels compute in: f32 or f64.
pub(crate) trait Scalar: Real + WithDType {
    fn exp(self) -> Self;
}

impl Scalar for f32 {
    #[inline(always)]
    fn exp(self) -> Self {
        f32::exp(self)
    }
}

impl Scalar for f64 {
    #[inline(always)]
    fn exp(self) -> Self {
        f64::exp(self)
    }
}

/// Numbers read or written below which a kernel stays on the calling thread.
const PARALLEL_FROM: usize = 1 << 15;

/// Runs `body` compiled for the widest vector unit of this processor.
#[inline(always)]
pub(crate) fn vectorized<R>(body: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(body)
}

/// The number `x` in the kernel's precision.
#[inline(always)]
pub(crate) fn real<T: Scalar>(x: f64) -> T {
    <T as Real>::from_f64(x)
}

/// Calls `write` with runs of rows of `csr` and the part of a new `[rows, width]` buffer that they
/// own, in parallel where there is enough work.
pub(crate) fn by_rows<T: Scalar>(
    csr: &Csr,
    width: usize,
    write: impl Fn(Range<usize>, &mut [T]) + Sync,
) -> Vec<T> {
    let mut out = vec![<T as Real>::ZERO; csr.rows() * width];
    if (csr.len() + csr.rows()) * width < PARALLEL_FROM {
        write(0..csr.rows(), &mut out);
        return out;
    }
    let mut rest = out.as_mut_slice();
    let mut parts = Vec::with_capacity(csr.chunks().len());
    for pair in csr.chunks().windows(2) {
        let (part, after) = rest.split_at_mut((pair[1] - pair[0]) * width);
        parts.push((pair[0]..pair[1], part));
        rest = after;
    }
    parts
        .into_par_iter()
        .for_each(|(rows, part)| write(rows, part));
    out
}

/// Calls `write` with runs of edges and their part of a new `[edges, width]` buffer; `work` is what
/// an edge costs in numbers read.
pub(crate) fn by_edges<T: Scalar>(
    edges: usize,
    width: usize,
    work: usize,
    write: impl Fn(Range<usize>, &mut [T]) + Sync,
) -> Vec<T> {
    let mut out = vec![<T as Real>::ZERO; edges * width];
    if width == 0 {
        return out;
    }
    let run = (PARALLEL_FROM / work.max(1)).clamp(64, 1 << 14);
    if edges <= run {
        write(0..edges, &mut out);
        return out;
    }
    out.par_chunks_mut(run * width)
        .enumerate()
        .for_each(|(i, part)| {
            let first = i * run;
            write(first..first + part.len() / width, part);
        });
    out
}

/// Edge weights `[E, heads]` in the order of the edge list.
#[derive(Clone, Copy)]
pub(crate) struct Weights<'a, T> {
    pub values: &'a [T],
    pub heads: usize,
}

/// Factors of one product: edge weights, or numbers per row and per column.
#[derive(Clone, Copy)]
pub(crate) struct Factors<'a, T> {
    pub weights: Option<Weights<'a, T>>,
    pub rows: Option<&'a [T]>,
    pub cols: Option<&'a [T]>,
}

/// `y_r = rows_r sum_p w_p cols_i x_i` over the positions of row `r`, where `i = from[p]`: the
/// other end (rows of nodes) or the edge itself (rows of edges). `x` is `[_, width]`.
pub(crate) fn product<T: Scalar>(
    csr: &Csr,
    from: &[u32],
    factors: Factors<'_, T>,
    x: &[T],
    width: usize,
) -> Vec<T> {
    if width == 0 {
        return Vec::new();
    }
    by_rows(csr, width, |rows, out| {
        vectorized(
            #[inline(always)]
            || {
                for (r, y) in rows.zip(out.chunks_exact_mut(width)) {
                    let row = csr.row(r);
                    match factors.weights {
                        Some(w) if w.heads > 1 && w.heads == width => {
                            channels(row.clone(), from, csr.perm(), w.values, x, y)
                        }
                        Some(w) if w.heads > 1 => {
                            let row = row.clone();
                            // Loops of a known length are vectorized.
                            match width / w.heads {
                                4 => heads(row, from, csr.perm(), w, x, y, 4),
                                8 => heads(row, from, csr.perm(), w, x, y, 8),
                                16 => heads(row, from, csr.perm(), w, x, y, 16),
                                d => heads(row, from, csr.perm(), w, x, y, d),
                            }
                        }
                        Some(w) => {
                            let coefficient = |p: usize| w.values[csr.perm()[p] as usize];
                            tiles(row.clone(), from, coefficient, x, width, 0, y);
                        }
                        None => match factors.cols {
                            Some(c) => {
                                let coefficient = |p: usize| c[from[p] as usize];
                                tiles(row.clone(), from, coefficient, x, width, 0, y);
                            }
                            None => tiles(row.clone(), from, |_| <T as Real>::ONE, x, width, 0, y),
                        },
                    }
                    if let Some(scale) = factors.rows {
                        y.iter_mut().for_each(|v| *v *= scale[r]);
                    }
                }
            },
        )
    })
}

/// One weight per channel.
#[inline(always)]
fn channels<T: Scalar>(
    row: Range<usize>,
    from: &[u32],
    perm: &[u32],
    weights: &[T],
    x: &[T],
    y: &mut [T],
) {
    let width = y.len();
    for p in row {
        let xs = &x[from[p] as usize * width..][..width];
        let ws = &weights[perm[p] as usize * width..][..width];
        for ((y, x), w) in y.iter_mut().zip(xs).zip(ws) {
            *y += *w * *x;
        }
    }
}

/// One weight for each head of `per_head` channels: a row of `x` is read once for all heads.
#[inline(always)]
fn heads<T: Scalar>(
    row: Range<usize>,
    from: &[u32],
    perm: &[u32],
    w: Weights<'_, T>,
    x: &[T],
    y: &mut [T],
    per_head: usize,
) {
    let width = y.len();
    for p in row {
        let xs = &x[from[p] as usize * width..][..width];
        let ws = &w.values[perm[p] as usize * w.heads..][..w.heads];
        let pairs = y.chunks_exact_mut(per_head).zip(xs.chunks_exact(per_head));
        for ((y, x), w) in pairs.zip(ws) {
            for (y, x) in y.iter_mut().zip(x) {
                *y += *w * *x;
            }
        }
    }
}

/// One row of the product, in tiles of columns that stay in registers.
#[inline(always)]
fn tiles<T: Scalar>(
    row: Range<usize>,
    from: &[u32],
    coefficient: impl Fn(usize) -> T,
    x: &[T],
    stride: usize,
    offset: usize,
    y: &mut [T],
) {
    let width = y.len();
    let mut at = 0;
    while at + 64 <= width {
        tile::<T, 64>(
            row.clone(),
            from,
            &coefficient,
            x,
            stride,
            offset + at,
            &mut y[at..],
        );
        at += 64;
    }
    while at + 16 <= width {
        tile::<T, 16>(
            row.clone(),
            from,
            &coefficient,
            x,
            stride,
            offset + at,
            &mut y[at..],
        );
        at += 16;
    }
    while at + 4 <= width {
        tile::<T, 4>(
            row.clone(),
            from,
            &coefficient,
            x,
            stride,
            offset + at,
            &mut y[at..],
        );
        at += 4;
    }
    while at < width {
        tile::<T, 1>(
            row.clone(),
            from,
            &coefficient,
            x,
            stride,
            offset + at,
            &mut y[at..],
        );
        at += 1;
    }
}

#[inline(always)]
fn tile<T: Scalar, const N: usize>(
    row: Range<usize>,
    from: &[u32],
    coefficient: &impl Fn(usize) -> T,
    x: &[T],
    stride: usize,
    offset: usize,
    y: &mut [T],
) {
    let mut sum = [<T as Real>::ZERO; N];
    for p in row {
        let xs = &x[from[p] as usize * stride + offset..][..N];
        let w = coefficient(p);
        for (s, x) in sum.iter_mut().zip(xs) {
            *s += w * *x;
        }
    }
    y[..N].copy_from_slice(&sum);
}

/// `s_e = sum_c a_{src[e], c} b_{dst[e], c}` for each of `heads` groups of channels: `[E, heads]`.
pub(crate) fn dots<T: Scalar>(
    src: &[u32],
    dst: &[u32],
    a: &[T],
    b: &[T],
    width: usize,
    heads: usize,
) -> Vec<T> {
    let per_head = width / heads.max(1);
    by_edges(src.len(), heads, width, |edges, out| {
        vectorized(
            #[inline(always)]
            || {
                for (e, out) in edges.zip(out.chunks_exact_mut(heads)) {
                    let a = &a[src[e] as usize * width..][..width];
                    let b = &b[dst[e] as usize * width..][..width];
                    if per_head == 1 {
                        for ((s, a), b) in out.iter_mut().zip(a).zip(b) {
                            *s = *a * *b;
                        }
                    } else {
                        let pairs = a.chunks_exact(per_head).zip(b.chunks_exact(per_head));
                        for (s, (a, b)) in out.iter_mut().zip(pairs) {
                            *s = match per_head {
                                8 => short_dot::<T, 8>(a, b),
                                4 => short_dot::<T, 4>(a, b),
                                _ => dot(a, b),
                            };
                        }
                    }
                }
            },
        )
    })
}

/// A dot product of few numbers, halves added to halves.
#[inline(always)]
fn short_dot<T: Scalar, const N: usize>(a: &[T], b: &[T]) -> T {
    let mut products = [<T as Real>::ZERO; N];
    for ((p, a), b) in products.iter_mut().zip(a).zip(b) {
        *p = *a * *b;
    }
    let mut half = N / 2;
    while half > 0 {
        for i in 0..half {
            let upper = products[i + half];
            products[i] += upper;
        }
        half /= 2;
    }
    products[0]
}

/// A dot product in 16 lanes that are added in a fixed order.
#[inline(always)]
fn dot<T: Scalar>(a: &[T], b: &[T]) -> T {
    let mut lanes = [<T as Real>::ZERO; 16];
    let (mut xs, mut ys) = (a.chunks_exact(16), b.chunks_exact(16));
    for (x, y) in (&mut xs).zip(&mut ys) {
        for ((lane, x), y) in lanes.iter_mut().zip(x).zip(y) {
            *lane += *x * *y;
        }
    }
    for ((lane, x), y) in lanes.iter_mut().zip(xs.remainder()).zip(ys.remainder()) {
        *lane += *x * *y;
    }
    lanes
        .iter()
        .fold(<T as Real>::ZERO, |sum, lane| sum + *lane)
}

/// Rows of `x` copied for each edge: `[E, width]`.
pub(crate) fn gather<T: Scalar>(ends: &[u32], x: &[T], width: usize) -> Vec<T> {
    by_edges(ends.len(), width, width, |edges, out| {
        for (e, out) in edges.zip(out.chunks_exact_mut(width)) {
            out.copy_from_slice(&x[ends[e] as usize * width..][..width]);
        }
    })
}

/// No edge: the row is empty.
pub(crate) const NOTHING: u32 = u32::MAX;

/// The source with the largest (or smallest) value for each target and channel, the first one in
/// row order among equals, `NOTHING` for an empty row. NaN wins.
pub(crate) fn extreme_sources<T: Scalar>(
    csr: &Csr,
    x: &[T],
    width: usize,
    largest: bool,
) -> Vec<u32> {
    let mut picks = vec![NOTHING; csr.rows() * width];
    let one = |(r, picks): (usize, &mut [u32])| {
        for s in csr.neighbors(r) {
            let xs = &x[*s as usize * width..][..width];
            for (c, (pick, v)) in picks.iter_mut().zip(xs).enumerate() {
                let better = *pick == NOTHING || {
                    let best = x[*pick as usize * width + c];
                    let ahead = if largest { *v > best } else { *v < best };
                    ahead || (is_nan(*v) && !is_nan(best))
                };
                if better {
                    *pick = *s;
                }
            }
        }
    };
    if csr.len() * width < PARALLEL_FROM {
        picks
            .chunks_exact_mut(width.max(1))
            .enumerate()
            .for_each(one);
    } else {
        picks
            .par_chunks_exact_mut(width.max(1))
            .enumerate()
            .with_min_len(64)
            .for_each(one);
    }
    picks
}

#[inline(always)]
#[allow(clippy::eq_op)]
fn is_nan<T: Scalar>(x: T) -> bool {
    x != x
}

/// `y_{r, c} = x_{pick, c}`, 0 where nothing is picked.
pub(crate) fn take<T: Scalar>(picks: &[u32], x: &[T], width: usize) -> Vec<T> {
    let mut out = vec![<T as Real>::ZERO; picks.len()];
    for (i, (y, pick)) in out.iter_mut().zip(picks).enumerate() {
        if *pick != NOTHING {
            *y = x[*pick as usize * width + i % width];
        }
    }
    out
}

/// The adjoint of [`take`]: `rows` rows, added up in the order of the picks.
pub(crate) fn put<T: Scalar>(picks: &[u32], y: &[T], width: usize, rows: usize) -> Vec<T> {
    let mut out = vec![<T as Real>::ZERO; rows * width];
    for (i, (y, pick)) in y.iter().zip(picks).enumerate() {
        if *pick != NOTHING {
            let x = &mut out[*pick as usize * width + i % width];
            *x += *y;
        }
    }
    out
}

/// Softmax over the edges of each row, per head: `exp(l - max) / (sum + 1e-16)`, `[E, heads]` in the
/// order of the edge list.
pub(crate) fn softmax<T: Scalar>(csr: &Csr, logits: &[T], heads: usize) -> Vec<T> {
    // In row order first, where a run of rows owns its part; then one pass to the edges' order.
    let mut sorted = vec![<T as Real>::ZERO; logits.len()];
    let run = |rows: Range<usize>, part: &mut [T]| {
        let (mut max, mut sum) = (
            vec![<T as Real>::ZERO; heads],
            vec![<T as Real>::ZERO; heads],
        );
        let mut at = 0;
        for r in rows {
            let edges = &csr.perm()[csr.row(r)];
            let out = &mut part[at..at + edges.len() * heads];
            softmax_row(edges, logits, (&mut max, &mut sum), out);
            at += edges.len() * heads;
        }
    };
    if logits.len() < PARALLEL_FROM / 8 {
        run(0..csr.rows(), &mut sorted);
    } else {
        let mut rest = sorted.as_mut_slice();
        let mut parts = Vec::new();
        for pair in csr.chunks().windows(2) {
            let edges = (csr.indptr()[pair[1]] - csr.indptr()[pair[0]]) as usize;
            let (part, after) = rest.split_at_mut(edges * heads);
            parts.push((pair[0]..pair[1], part));
            rest = after;
        }
        parts
            .into_par_iter()
            .for_each(|(rows, part)| run(rows, part));
    }
    if csr.in_order() {
        return sorted;
    }
    let mut out = vec![<T as Real>::ZERO; logits.len()];
    for (e, p) in csr.perm().iter().zip(sorted.chunks_exact(heads.max(1))) {
        out[*e as usize * heads..][..heads].copy_from_slice(p);
    }
    out
}

/// All heads of a row together, so that the logits of an edge are read once for them.
#[inline(always)]
fn softmax_row<T: Scalar>(
    edges: &[u32],
    logits: &[T],
    (max, sum): (&mut [T], &mut [T]),
    out: &mut [T],
) {
    let heads = max.len();
    let of = |e: u32| &logits[e as usize * heads..][..heads];
    let Some(first) = edges.first().filter(|_| heads > 0) else {
        return;
    };
    max.copy_from_slice(of(*first));
    for e in edges {
        for (max, l) in max.iter_mut().zip(of(*e)) {
            if *l > *max || is_nan(*l) {
                *max = *l;
            }
        }
    }
    sum.fill(<T as Real>::ZERO);
    for (e, out) in edges.iter().zip(out.chunks_exact_mut(heads)) {
        for ((p, l), (max, sum)) in out
            .iter_mut()
            .zip(of(*e))
            .zip(max.iter().zip(sum.iter_mut()))
        {
            *p = Scalar::exp(*l - *max);
            *sum += *p;
        }
    }
    let one = |s: &mut T| *s = <T as Real>::ONE / (*s + real(1e-16));
    sum.iter_mut().for_each(one);
    for out in out.chunks_exact_mut(heads) {
        for (p, scale) in out.iter_mut().zip(sum.iter()) {
            *p *= *scale;
        }
    }
}

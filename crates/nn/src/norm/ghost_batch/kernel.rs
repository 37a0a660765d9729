//! The fused passes of ghost batch normalization over `[batch, channels, spatial]` memory.
//!
//! Sums are taken per (group, channel) in an order that depends on the shape only: the bits do not
//! depend on the number of threads. They are f64 sums, variances from deviations: a mean far above
//! the deviation costs no digits. A piece that fits the cache is read from memory once.

use super::sums::{gradient_sums, moments};
use crate::activation::Activation;
use crate::kernel::{filled, vectorized, Scalar, PARALLEL_FROM};
use rayon::prelude::*;
use std::ops::Range;

/// Bytes of one piece of input, to stay in the second-level cache.
const PIECE_BYTES: usize = 1 << 18;

/// Channels and spatial positions of one example.
#[derive(Debug, Clone, Copy)]
pub(super) struct Geometry {
    pub channels: usize,
    pub spatial: usize,
}

impl Geometry {
    pub(super) fn example(self) -> usize {
        self.channels * self.spatial
    }

    /// How many channels of `rows` examples fit the cache.
    fn block(self, rows: usize, bytes: usize) -> usize {
        let wanted = (PIECE_BYTES / (rows * self.spatial * bytes).max(1)).max(1);
        match self.spatial {
            // Several cache lines of each row, where channels are neighbors in memory.
            1 => wanted.next_multiple_of(64),
            _ => wanted,
        }
    }
}

/// Some channels of one group of examples.
#[derive(Debug, Clone)]
pub(super) struct Piece {
    pub group: usize,
    pub rows: Range<usize>,
    pub channels: Range<usize>,
}

impl Piece {
    /// Numbers per channel.
    pub(super) fn count(&self, geometry: Geometry) -> f64 {
        (self.rows.len() * geometry.spatial) as f64
    }
}

/// Two numbers per channel of a piece: mean and biased variance forward; the sums of `dy` and of
/// `dy xhat` backward.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Pairs {
    pub first: Vec<f64>,
    pub second: Vec<f64>,
}

/// Per channel `(x - high) - low`, times `slope`, plus `offset`, plus (backward) `dy` times `along`.
/// The mean comes in two parts, so that nothing is lost when it is far above the deviation.
struct Coefficients<T> {
    high: Vec<T>,
    low: Vec<T>,
    slope: Vec<T>,
    offset: Vec<T>,
    along: Vec<T>,
}

impl<T: Scalar> Coefficients<T> {
    fn with_capacity(n: usize) -> Self {
        let new = || Vec::with_capacity(n);
        Self {
            high: new(),
            low: new(),
            slope: new(),
            offset: new(),
            along: new(),
        }
    }

    fn push(&mut self, mean: f64, slope: f64, offset: f64, along: f64) {
        let high = T::from_f64(mean);
        self.high.push(high);
        self.low.push(T::from_f64(mean - high.to_f64()));
        self.slope.push(T::from_f64(slope));
        self.offset.push(T::from_f64(offset));
        self.along.push(T::from_f64(along));
    }
}

/// A layer's constants and the cut of the batch.
pub(super) struct Plan<'a> {
    pub geometry: Geometry,
    pub groups: &'a [usize],
    pub weight: &'a [f64],
    pub bias: &'a [f64],
    pub eps: f64,
    pub remove_mean: bool,
    /// What follows.
    pub activation: Activation,
}

/// Gradients before the activation, from those after it.
pub(super) struct Before<'a, T> {
    activation: Activation,
    x: &'a [T],
    dy: &'a [T],
    /// Of the forward pass, for the channels of a piece.
    forward: &'a Coefficients<T>,
}

impl<'a, T: Scalar> Before<'a, T> {
    /// On a run of memory of some channels of the piece; the activation's input is computed again.
    #[inline(always)]
    pub(super) fn activation<'b>(
        &self,
        at: Range<usize>,
        channels: Range<usize>,
        buffer: &'b mut Vec<T>,
    ) -> &'b [T]
    where
        'a: 'b,
    {
        let f = self.activation;
        if f == Activation::Identity {
            return &self.dy[at];
        }
        buffer.resize(at.len(), T::ZERO);
        let first = match f.keeps_output() {
            true => f,
            false => Activation::Identity,
        };
        normalize(&self.x[at.clone()], buffer, self.forward, channels, first);
        f.gradient_in_place(buffer, &self.dy[at]);
        buffer
    }
}

impl Plan<'_> {
    fn inverse(&self, var: f64) -> f64 {
        1.0 / (var + self.eps).sqrt()
    }

    /// Of the forward pass, for the channels of a piece with these means and variances.
    fn coefficients<T: Scalar>(
        &self,
        piece: &Piece,
        mean: &[f64],
        variance: &[f64],
    ) -> Coefficients<T> {
        let mut k = Coefficients::with_capacity(mean.len());
        for (i, c) in piece.channels.clone().enumerate() {
            let slope = self.weight[c] * self.inverse(variance[i]);
            k.push(mean[i], slope, self.bias[c], 0.0);
        }
        k
    }

    /// The pieces of each group.
    fn pieces<T>(&self) -> Vec<Vec<Piece>> {
        let mut start = 0;
        let one = |(group, size): (usize, &usize)| {
            let rows = start..start + size;
            start += size;
            let block = self.geometry.block(*size, size_of::<T>());
            let all = self.geometry.channels;
            let cut = (0..all).step_by(block).map(|c| Piece {
                group,
                rows: rows.clone(),
                channels: c..all.min(c + block),
            });
            cut.collect()
        };
        self.groups.iter().enumerate().map(one).collect()
    }

    /// Normalized output, and mean and variance of each group.
    pub(super) fn forward<T: Scalar>(&self, x: &[T]) -> (Vec<T>, Vec<Pairs>) {
        let first = |piece: &Piece| {
            let m = vectorized(
                #[inline(always)]
                || moments(x, self.geometry, piece, self.remove_mean),
            );
            let k = self.coefficients(piece, &m.first, &m.second);
            (m, k)
        };
        let second = |piece: &Piece, k: &Coefficients<T>, rows: Range<usize>, y: &mut [T]| {
            vectorized(
                #[inline(always)]
                || {
                    write(self.geometry, piece, rows, y, |at, c, y| {
                        normalize(&x[at], y, k, c, self.activation);
                    });
                },
            );
        };
        self.two_passes(x.len(), first, second)
    }

    /// Gradient of the input, and of the bias and weight (first and second of the pair).
    pub(super) fn backward<T: Scalar>(
        &self,
        x: &[T],
        dy: &[T],
        moments: &[Pairs],
    ) -> (Vec<T>, Pairs) {
        let first = |piece: &Piece| {
            let m = &moments[piece.group];
            let inverse: Vec<f64> = m.second.iter().map(|v| self.inverse(*v)).collect();
            let c = piece.channels.clone();
            let forward = self.coefficients(piece, &m.first[c.clone()], &m.second[c]);
            let before = Before {
                activation: self.activation,
                x,
                dy,
                forward: &forward,
            };
            let s = vectorized(
                #[inline(always)]
                || gradient_sums(x, self.geometry, piece, (&m.first, &inverse), &before),
            );
            let n = piece.count(self.geometry);
            let mut k = Coefficients::with_capacity(s.first.len());
            for (i, c) in piece.channels.clone().enumerate() {
                // dx = a (dz - mean(dz) - xhat mean(dz xhat)), a = weight / sqrt(var + eps)
                let along = self.weight[c] * inverse[c];
                let slope = -along * inverse[c] * s.second[i] / n;
                let offset = if self.remove_mean {
                    -along * s.first[i] / n
                } else {
                    0.0
                };
                k.push(m.first[c], slope, offset, along);
            }
            (s, (forward, k))
        };
        type Both<T> = (Coefficients<T>, Coefficients<T>);
        let second = |piece: &Piece, (forward, k): &Both<T>, rows: Range<usize>, dx: &mut [T]| {
            let before = Before {
                activation: self.activation,
                x,
                dy,
                forward,
            };
            vectorized(
                #[inline(always)]
                || {
                    let mut buffer = vec![];
                    write(self.geometry, piece, rows, dx, |at, c, dx| {
                        let dz = before.activation(at.clone(), c.clone(), &mut buffer);
                        input_gradient(&x[at], dz, dx, k, c);
                    });
                },
            );
        };
        let (dx, sums) = self.two_passes(x.len(), first, second);
        let total = |of: &dyn Fn(&Pairs) -> &Vec<f64>| {
            let mut total = vec![0.0; self.geometry.channels];
            for s in &sums {
                total.iter_mut().zip(of(s)).for_each(|(t, s)| *t += s);
            }
            total
        };
        let total = Pairs {
            first: total(&|s| &s.first),
            second: total(&|s| &s.second),
        };
        (dx, total)
    }

    /// `first` on each piece, then `second` on its rows; returns what was written and the numbers
    /// of each group. With many groups a piece is finished while it is in the cache; with few, all
    /// threads share the first pass and then the second. The arithmetic is the same.
    fn two_passes<T: Scalar, K: Send + Sync>(
        &self,
        len: usize,
        first: impl Fn(&Piece) -> (Pairs, K) + Sync,
        second: impl Fn(&Piece, &K, Range<usize>, &mut [T]) + Sync,
    ) -> (Vec<T>, Vec<Pairs>) {
        let mut pairs = vec![];
        // The groups are the whole batch, and every row of them is written.
        let out = filled(len, |out| pairs = self.into(out, first, second));
        (out, pairs)
    }

    fn into<T: Scalar, K: Send + Sync>(
        &self,
        out: &mut [T],
        first: impl Fn(&Piece) -> (Pairs, K) + Sync,
        second: impl Fn(&Piece, &K, Range<usize>, &mut [T]) + Sync,
    ) -> Vec<Pairs> {
        let pieces = self.pieces::<T>();
        let parallel = out.len() >= PARALLEL_FROM;
        let chunks = self.split(out);
        let finish = |(pieces, chunk): (&Vec<Piece>, &mut [T])| {
            let one = |piece: &Piece| {
                let (pairs, k) = first(piece);
                second(piece, &k, piece.rows.clone(), &mut *chunk);
                pairs
            };
            join(pieces.iter().map(one))
        };
        if !parallel {
            pieces.iter().zip(chunks).map(finish).collect()
        } else if self.groups.len() >= 2 * rayon::current_num_threads() {
            pieces.par_iter().zip(chunks).map(finish).collect()
        } else {
            self.in_stages(&pieces, chunks, &first, &second)
        }
    }

    fn in_stages<T: Scalar, K: Send + Sync>(
        &self,
        pieces: &[Vec<Piece>],
        chunks: Vec<&mut [T]>,
        first: &(impl Fn(&Piece) -> (Pairs, K) + Sync),
        second: &(impl Fn(&Piece, &K, Range<usize>, &mut [T]) + Sync),
    ) -> Vec<Pairs> {
        let all: Vec<&Piece> = pieces.iter().flatten().collect();
        let sums: Vec<(Pairs, K)> = all.par_iter().map(|p| first(p)).collect();
        let mut done = sums.into_iter();
        let mut result = Vec::with_capacity(pieces.len());
        for (pieces, chunk) in pieces.iter().zip(chunks) {
            let (pairs, ks): (Vec<Pairs>, Vec<K>) = done.by_ref().take(pieces.len()).unzip();
            let example = self.geometry.example();
            let rows = (PARALLEL_FROM / example).max(1);
            let start = pieces.first().map_or(0, |p| p.rows.start);
            let parts = chunk.par_chunks_mut(rows * example).enumerate();
            parts.for_each(|(i, part)| {
                let begin = start + i * rows;
                let range = begin..begin + part.len() / example;
                for (piece, k) in pieces.iter().zip(&ks) {
                    second(piece, k, range.clone(), &mut *part);
                }
            });
            result.push(join(pairs.into_iter()));
        }
        result
    }

    /// The memory of each group.
    fn split<'a, T>(&self, mut out: &'a mut [T]) -> Vec<&'a mut [T]> {
        let mut chunks = Vec::with_capacity(self.groups.len());
        for size in self.groups {
            let (chunk, rest) = out.split_at_mut(size * self.geometry.example());
            chunks.push(chunk);
            out = rest;
        }
        chunks
    }
}

/// The channel blocks of a group, one after the other.
fn join(blocks: impl Iterator<Item = Pairs>) -> Pairs {
    blocks.fold(Pairs::default(), |mut all, block| {
        all.first.extend(block.first);
        all.second.extend(block.second);
        all
    })
}

/// Calls `f(range in the input, channels in the piece, output)` for every run of memory that the
/// piece has in the rows of `out`: a row of channels, or the positions of one channel.
#[inline(always)]
fn write<T>(
    geometry: Geometry,
    piece: &Piece,
    rows: Range<usize>,
    out: &mut [T],
    mut f: impl FnMut(Range<usize>, Range<usize>, &mut [T]),
) {
    let (example, spatial) = (geometry.example(), geometry.spatial);
    let (start, n) = (piece.channels.start, piece.channels.len());
    for (row, out) in rows.zip(out.chunks_exact_mut(example)) {
        if spatial == 1 {
            let at = row * example + start;
            f(at..at + n, 0..n, &mut out[start..start + n]);
            continue;
        }
        for c in 0..n {
            let local = (start + c) * spatial;
            let at = row * example + local;
            f(at..at + spatial, c..c + 1, &mut out[local..local + spatial]);
        }
    }
}

/// A run of memory that belongs to one channel has one set of coefficients.
#[inline(always)]
fn normalize<T: Scalar>(x: &[T], y: &mut [T], k: &Coefficients<T>, c: Range<usize>, f: Activation) {
    if c.len() == 1 {
        let c = c.start;
        let (high, low, slope, offset) = (k.high[c], k.low[c], k.slope[c], k.offset[c]);
        let z = x.iter().map(|x| ((*x - high) - low) * slope + offset);
        return f.each(z.zip(y));
    }
    let mean = k.high[c.clone()].iter().zip(&k.low[c.clone()]);
    let map = k.slope[c.clone()].iter().zip(&k.offset[c]);
    let z = x.iter().zip(mean.zip(map));
    let z = z.map(|(x, ((high, low), (slope, offset)))| ((*x - *high) - *low) * *slope + *offset);
    f.each(z.zip(y));
}

#[inline(always)]
fn input_gradient<T: Scalar>(
    x: &[T],
    dy: &[T],
    dx: &mut [T],
    k: &Coefficients<T>,
    c: Range<usize>,
) {
    if c.len() == 1 {
        let c = c.start;
        let (high, low, slope) = (k.high[c], k.low[c], k.slope[c]);
        let (offset, along) = (k.offset[c], k.along[c]);
        for ((x, dy), dx) in x.iter().zip(dy).zip(dx) {
            *dx = *dy * along + (((*x - high) - low) * slope + offset);
        }
        return;
    }
    let mean = k.high[c.clone()].iter().zip(&k.low[c.clone()]);
    let map = k.slope[c.clone()].iter().zip(&k.offset[c.clone()]);
    let source = x.iter().zip(dy).zip(dx);
    for ((((x, dy), dx), (high, low)), ((slope, offset), along)) in
        source.zip(mean).zip(map.zip(&k.along[c]))
    {
        *dx = *dy * *along + (((*x - *high) - *low) * *slope + *offset);
    }
}

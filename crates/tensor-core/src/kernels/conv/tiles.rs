//! The inner loops: a tile of sums stays in vector registers while the kernel's taps and the
//! channels go by.

use super::Lanes;
use pulp::{Simd, WithSimd};

/// Output channels that share a tile.
pub const PANEL: usize = 8;

/// The channels of each panel: eights, then a four, a two and a one.
pub fn panels(channels: usize) -> impl Iterator<Item = (usize, usize)> {
    let mut start = 0;
    std::iter::from_fn(move || {
        let left = channels - start;
        let size = match left {
            0 => return None,
            1 => 1,
            2..=3 => 2,
            4..=7 => 4,
            _ => PANEL,
        };
        start += size;
        Some((start - size, size))
    })
}

/// Lines of outputs of some channels: `out[o][j] = sum_k w[o][k] source[offsets[k] + j]`. To be
/// dispatched by `pulp::Arch`; panics where something lies outside its slice.
#[derive(Debug)]
pub struct Correlate<'a, T> {
    /// For each panel, for each `k`, the weights of its channels: [`pack`](super::pack).
    pub weights: &'a [T],
    /// Where the inputs of the first output lie, for each `k`.
    pub offsets: &'a [usize],
    /// What [`Source::fill`](super::Source::fill) has filled.
    pub source: &'a [T],
    /// `[channels, stride]`.
    pub out: &'a mut [T],
    /// Channels of the output.
    pub channels: usize,
    /// Outputs of a channel.
    pub line: usize,
    /// At least `line`, and a multiple of the widest vector.
    pub stride: usize,
}

impl<T: Lanes> WithSimd for Correlate<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let vectors = self.line.div_ceil(T::lanes::<S>());
        let furthest = self.offsets.iter().max().map_or(0, |o| *o);
        assert!(furthest + vectors * T::lanes::<S>() <= self.source.len());
        assert!(vectors * T::lanes::<S>() <= self.stride);
        assert!(self.channels * self.stride <= self.out.len());
        assert!(self.channels * self.offsets.len() <= self.weights.len());
        let wide = S::REGISTER_COUNT >= 32;
        for (first, size) in panels(self.channels) {
            // SAFETY: the assertions above hold every tile inside its slice.
            unsafe {
                let line = Line {
                    weights: self.weights.as_ptr().add(first * self.offsets.len()),
                    offsets: self.offsets,
                    source: self.source.as_ptr(),
                    out: self.out.as_mut_ptr().add(first * self.stride),
                    stride: self.stride,
                    vectors,
                };
                match (size, wide) {
                    (8, true) => line.run::<S, 8, 3>(simd),
                    (8, false) => line.run::<S, 8, 1>(simd),
                    (4, true) => line.run::<S, 4, 6>(simd),
                    (4, false) => line.run::<S, 4, 3>(simd),
                    (2, _) => line.run::<S, 2, 6>(simd),
                    _ => line.run::<S, 1, 8>(simd),
                }
            }
        }
    }
}

/// The line of one panel.
#[derive(Clone, Copy)]
struct Line<'a, T> {
    weights: *const T,
    offsets: &'a [usize],
    source: *const T,
    out: *mut T,
    stride: usize,
    vectors: usize,
}

impl<T: Lanes> Line<'_, T> {
    /// # Safety
    /// All offsets plus the line, and the outputs, lie inside their slices.
    #[inline(always)]
    unsafe fn run<S: Simd, const O: usize, const V: usize>(self, simd: S) {
        let mut v = 0;
        // SAFETY: `v` stays below the number of vectors.
        unsafe {
            while v + V <= self.vectors {
                self.tile::<S, O, V>(simd, v);
                v += V;
            }
            while v + 2 <= self.vectors {
                self.tile::<S, O, 2>(simd, v);
                v += 2;
            }
            if v < self.vectors {
                self.tile::<S, O, 1>(simd, v);
            }
        }
    }

    /// # Safety
    /// As [`run`](Self::run), with `first + V` at most the number of vectors.
    #[inline(always)]
    unsafe fn tile<S: Simd, const O: usize, const V: usize>(self, simd: S, first: usize) {
        let lanes = T::lanes::<S>();
        let zero = T::splat(simd, T::ZERO);
        let mut acc = [[zero; V]; O];
        // SAFETY: the caller's promise.
        unsafe {
            let source = self.source.add(first * lanes);
            let mut weights = self.weights;
            for offset in self.offsets {
                let at = source.add(*offset);
                let mut x = [zero; V];
                for (v, x) in x.iter_mut().enumerate() {
                    *x = T::load::<S>(at.add(v * lanes));
                }
                for (o, acc) in acc.iter_mut().enumerate() {
                    let w = T::splat(simd, *weights.add(o));
                    for (acc, x) in acc.iter_mut().zip(x) {
                        *acc = T::mul_add(simd, w, x, *acc);
                    }
                }
                weights = weights.add(O);
            }
            for (o, acc) in acc.into_iter().enumerate() {
                let out = self.out.add(o * self.stride + first * lanes);
                for (v, acc) in acc.into_iter().enumerate() {
                    T::store::<S>(out.add(v * lanes), acc);
                }
            }
        }
    }
}

/// Rows of the accumulated weight gradient that [`Outer`] may touch beyond `k`.
pub const PAD: usize = 12;

/// `sums[k][o] += sum over outputs (i, j) of source[offsets[k] + i pitch + j] dy[i cols + j][o]`. To be
/// dispatched by `pulp::Arch`; panics where something lies outside its slice.
#[derive(Debug)]
pub struct Outer<'a, T> {
    /// `k + PAD` of them; those after `k` are any valid offset.
    pub offsets: &'a [usize],
    /// How many of them count.
    pub k: usize,
    /// What [`Source::fill`](super::Source::fill) has filled.
    pub source: &'a [T],
    /// Distance of two rows in the source.
    pub pitch: usize,
    /// Rows and columns of outputs.
    pub grid: [usize; 2],
    /// `[rows cols, width]`.
    pub dy: &'a [T],
    /// Channels, a multiple of the widest vector.
    pub width: usize,
    /// `[k + PAD, width]`.
    pub sums: &'a mut [T],
}

impl<T: Lanes> WithSimd for Outer<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let furthest = self.offsets.iter().max().map_or(0, |o| *o);
        let line = (self.grid[0] - 1) * self.pitch + self.grid[1];
        assert!(furthest + line <= self.source.len());
        assert!(self.grid[0] * self.grid[1] * self.width <= self.dy.len());
        assert!((self.k + PAD) * self.width <= self.sums.len());
        assert!(self.k + PAD <= self.offsets.len());
        let wide = S::REGISTER_COUNT >= 32;
        let vectors = self.width / T::lanes::<S>();
        let mut v = 0;
        while v < vectors {
            let left = vectors - v;
            // SAFETY: the assertions above hold every tile inside its slice.
            let done = unsafe {
                match (left, wide) {
                    (4.., true) => self.block::<S, 6, 4>(simd, v),
                    (3, true) => self.block::<S, 8, 3>(simd, v),
                    (2.., true) => self.block::<S, 12, 2>(simd, v),
                    (2.., false) => self.block::<S, 6, 2>(simd, v),
                    _ => self.block::<S, 12, 1>(simd, v),
                }
            };
            v += done;
        }
    }
}

impl<T: Lanes> Outer<'_, T> {
    /// All `k` for `V` vectors of channels; gives `V`.
    ///
    /// # Safety
    /// The assertions of `with_simd`, and `first + V` vectors of channels.
    #[inline(always)]
    unsafe fn block<S: Simd, const K: usize, const V: usize>(
        &mut self,
        simd: S,
        first: usize,
    ) -> usize {
        let at = first * T::lanes::<S>();
        for k in (0..self.k).step_by(K) {
            // SAFETY: `k + K <= self.k + PAD`.
            unsafe { self.tile::<S, K, V>(simd, k, at) };
        }
        V
    }

    /// # Safety
    /// As [`block`](Self::block).
    #[inline(always)]
    unsafe fn tile<S: Simd, const K: usize, const V: usize>(
        &mut self,
        simd: S,
        k: usize,
        at: usize,
    ) {
        let lanes = T::lanes::<S>();
        let zero = T::splat(simd, T::ZERO);
        let mut acc = [[zero; V]; K];
        // SAFETY: the caller's promise.
        unsafe {
            let sums = self.sums.as_mut_ptr().add(k * self.width + at);
            let mut x = [self.source.as_ptr(); K];
            for (i, x) in x.iter_mut().enumerate() {
                *x = x.add(*self.offsets.get_unchecked(k + i));
            }
            let mut dy = self.dy.as_ptr().add(at);
            for row in 0..self.grid[0] {
                let start = row * self.pitch;
                for j in start..start + self.grid[1] {
                    let mut g = [zero; V];
                    for (v, g) in g.iter_mut().enumerate() {
                        *g = T::load::<S>(dy.add(v * lanes));
                    }
                    dy = dy.add(self.width);
                    for (acc, x) in acc.iter_mut().zip(x) {
                        let x = T::splat(simd, *x.add(j));
                        for (acc, g) in acc.iter_mut().zip(g) {
                            *acc = T::mul_add(simd, x, g, *acc);
                        }
                    }
                }
            }
            for (i, acc) in acc.into_iter().enumerate() {
                let out = sums.add(i * self.width);
                for (v, acc) in acc.into_iter().enumerate() {
                    let old = T::load::<S>(out.add(v * lanes));
                    let one = T::splat(simd, T::ONE);
                    T::store::<S>(out.add(v * lanes), T::mul_add(simd, one, acc, old));
                }
            }
        }
    }
}

//! Channel-last images: outputs of consecutive positions, all channels of each together.

use super::{transpose, Lanes, Map, Window, OVERHANG};
use pulp::{Simd, WithSimd};

/// Channels of the result whose weights lie together.
pub const ROW_PANEL: usize = 32;

/// Rows of outputs: `out[j][o] = sum_k w[k][o] source[offsets[k] + j step]`. To be dispatched by
/// `pulp::Arch`; panics where something lies outside its slice.
#[derive(Debug)]
pub struct CorrelateRows<'a, T> {
    /// For each panel of [`ROW_PANEL`] channels (the last may be narrower), for each `k`, the weights
    /// of its channels: [`pack_rows`].
    pub weights: &'a [T],
    /// Where the inputs of the first output lie, for each `k`.
    pub offsets: &'a [usize],
    /// Rows of inputs, with zeros where the image ends.
    pub source: &'a [T],
    /// Distance of the inputs of consecutive outputs.
    pub step: usize,
    /// `[rows, width]`.
    pub out: &'a mut [T],
    /// Outputs of a channel.
    pub rows: usize,
    /// Channels of the result, a multiple of [`OVERHANG`].
    pub width: usize,
}

impl<T: Lanes> WithSimd for CorrelateRows<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        if self.rows == 0 {
            return;
        }
        let lanes = T::lanes::<S>();
        let furthest = self.offsets.iter().max().map_or(0, |o| *o);
        assert!(furthest + (self.rows - 1) * self.step < self.source.len());
        assert!(self.width.is_multiple_of(OVERHANG) && OVERHANG.is_multiple_of(lanes));
        assert!(self.rows * self.width <= self.out.len());
        assert!(self.offsets.len() * self.width <= self.weights.len());
        let wide = S::REGISTER_COUNT >= 32;
        for first in (0..self.width).step_by(ROW_PANEL) {
            let panel = ROW_PANEL.min(self.width - first);
            for at in (0..panel).step_by(2 * lanes) {
                // SAFETY: the assertions above hold every tile inside its slice.
                unsafe {
                    let column = Column {
                        weights: self.weights.as_ptr().add(first * self.offsets.len() + at),
                        panel,
                        offsets: self.offsets,
                        source: self.source.as_ptr(),
                        step: self.step,
                        out: self.out.as_mut_ptr().add(first + at),
                        width: self.width,
                        rows: self.rows,
                    };
                    // Sums, weights and inputs of a tile together fit into the registers.
                    match (panel - at > lanes, wide) {
                        (true, true) => column.run::<S, 10, 2>(simd),
                        (true, false) => column.run::<S, 4, 2>(simd),
                        (false, true) => column.run::<S, 10, 1>(simd),
                        (false, false) => column.run::<S, 6, 1>(simd),
                    }
                }
            }
        }
    }
}

/// Some vectors of channels at all positions.
#[derive(Clone, Copy)]
struct Column<'a, T> {
    weights: *const T,
    /// Distance of the weights of consecutive `k`.
    panel: usize,
    offsets: &'a [usize],
    source: *const T,
    step: usize,
    out: *mut T,
    width: usize,
    rows: usize,
}

impl<T: Lanes> Column<'_, T> {
    /// # Safety
    /// All offsets at all positions, the weights and the outputs lie inside their slices.
    #[inline(always)]
    unsafe fn run<S: Simd, const R: usize, const V: usize>(self, simd: S) {
        let mut row = 0;
        // SAFETY: `row` stays below the number of rows.
        unsafe {
            while row + R <= self.rows {
                self.tile::<S, R, V>(simd, row);
                row += R;
            }
            while row + 4 <= self.rows {
                self.tile::<S, 4, V>(simd, row);
                row += 4;
            }
            while row < self.rows {
                self.tile::<S, 1, V>(simd, row);
                row += 1;
            }
        }
    }

    /// # Safety
    /// As [`run`](Self::run), with `first + R` at most the number of rows.
    #[inline(always)]
    unsafe fn tile<S: Simd, const R: usize, const V: usize>(self, simd: S, first: usize) {
        let lanes = T::lanes::<S>();
        let zero = T::splat(simd, T::ZERO);
        let mut acc = [[zero; V]; R];
        // SAFETY: the caller's promise.
        unsafe {
            let source = self.source.add(first * self.step);
            let mut weights = self.weights;
            for offset in self.offsets {
                let at = source.add(*offset);
                let mut w = [zero; V];
                for (v, w) in w.iter_mut().enumerate() {
                    *w = T::load::<S>(weights.add(v * lanes));
                }
                for (r, acc) in acc.iter_mut().enumerate() {
                    let x = T::splat(simd, *at.add(r * self.step));
                    for (acc, w) in acc.iter_mut().zip(w) {
                        *acc = T::mul_add(simd, x, w, *acc);
                    }
                }
                weights = weights.add(self.panel);
            }
            for (r, acc) in acc.into_iter().enumerate() {
                let out = self.out.add((first + r) * self.width);
                for (v, acc) in acc.into_iter().enumerate() {
                    T::store::<S>(out.add(v * lanes), acc);
                }
            }
        }
    }
}

/// The weights `[outputs, inputs, taps]` of the panel that begins with channel `first` of the result,
/// in the order in which [`CorrelateRows`] reads them: `k` counts the taps of each channel of the
/// source. `packed` `[k, panel]` is zero.
pub fn pack_rows<T: Copy>(
    map: Map,
    weights: &[T],
    window: &Window,
    (first, panel): (usize, usize),
    packed: &mut [T],
) {
    let taps = window.taps();
    let channels = panel.min(map.channels(window) - first);
    match map {
        Map::Forward => {
            let depth = window.inputs * taps;
            let rows = &weights[first * depth..];
            transpose(rows, (channels, depth, depth), packed, panel);
        }
        Map::Transposed => {
            let sources = weights.chunks_exact(window.inputs * taps);
            for (source, packed) in sources.zip(packed.chunks_exact_mut(taps * panel)) {
                transpose(
                    &source[first * taps..],
                    (channels, taps, taps),
                    packed,
                    panel,
                );
            }
        }
    }
}

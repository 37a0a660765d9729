//! Convolutions of one image on the CPU, without a matrix of patches: what layers and per-example
//! gradients share.
//!
//! A [`Window`] says the sizes, [`Map::plan`] how the image is laid out
//! ([`Source`]) and which outputs are computed together ([`Pass`]); [`Correlate`] makes lines of
//! outputs and [`Outer`] adds up a weight's gradient, both in register tiles. [`CorrelateRows`] is for
//! sequences whose channels come last.

mod lanes;
mod plan;
mod rows;
mod tiles;

pub use lanes::Lanes;
use plan::{forward, input_gradient};
pub use plan::{Pass, Source, OVERHANG};
pub use rows::{pack_rows, CorrelateRows, ROW_PANEL};
pub use tiles::{panels, Correlate, Outer, PAD, PANEL};

/// Sizes of a convolution of one image by one group of channels, of one or two spatial dimensions;
/// with one, the height is 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// Channels of `x`.
    pub inputs: usize,
    /// Channels of `y`.
    pub outputs: usize,
    /// Height and width of `x`.
    pub size: [usize; 2],
    /// Height and width of `y`.
    pub out: [usize; 2],
    /// Height and width of the kernel.
    pub kernel: [usize; 2],
    /// Steps between outputs.
    pub stride: [usize; 2],
    /// Zeros on each side.
    pub padding: [usize; 2],
    /// Steps between taps.
    pub dilation: [usize; 2],
}

impl Window {
    /// Places of the kernel.
    #[inline]
    pub fn taps(&self) -> usize {
        self.kernel[0] * self.kernel[1]
    }

    /// With the output's size from the others; `None` where the kernel does not fit into the padded
    /// image, or a stride, a dilation or a kernel's size is 0.
    pub fn fitted(self) -> Option<Self> {
        let out = |i: usize| {
            let reach = self.dilation[i] * self.kernel[i].checked_sub(1)? + 1;
            let room = (self.size[i] + 2 * self.padding[i]).checked_sub(reach)?;
            let positive = self.stride[i] > 0 && self.dilation[i] > 0;
            positive.then(|| room / self.stride[i] + 1)
        };
        Some(Self {
            out: [out(0)?, out(1)?],
            ..self
        })
    }
}

/// Which map a correlation of an image with weights computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Map {
    /// `y` from `x`.
    Forward,
    /// `dx` from `dy`, which is a transposed convolution.
    Transposed,
}

impl Map {
    /// Channels of the result.
    pub fn channels(self, window: &Window) -> usize {
        match self {
            Self::Forward => window.outputs,
            Self::Transposed => window.inputs,
        }
    }

    /// Height and width of the result.
    pub fn size(self, window: &Window) -> [usize; 2] {
        match self {
            Self::Forward => window.out,
            Self::Transposed => window.size,
        }
    }

    /// The layout and the passes.
    pub fn plan(self, window: &Window) -> (Source, Vec<Pass>) {
        match self {
            Self::Forward => forward(window),
            Self::Transposed => input_gradient(window),
        }
    }
}

/// The weights `[outputs, inputs, taps]` of a pass in the order in which [`Correlate`] reads them.
pub fn pack<T: Copy>(map: Map, pass: &Pass, weights: &[T], window: &Window) -> Vec<T> {
    let (results, sources) = match map {
        Map::Forward => (window.outputs, window.inputs),
        Map::Transposed => (window.inputs, window.outputs),
    };
    let taps = window.taps();
    let mut packed = Vec::with_capacity(results * sources * pass.taps.len());
    for (first, size) in panels(results) {
        for c in 0..sources {
            let (start, step) = match map {
                Map::Forward => ((first * window.inputs + c) * taps, window.inputs * taps),
                Map::Transposed => ((c * window.inputs + first) * taps, taps),
            };
            for (tap, _) in &pass.taps {
                packed.extend((0..size).map(|o| weights[start + o * step + tap]));
            }
        }
    }
    packed
}

/// `to[j][i] = from[i][j]` for rows of `from` that are `stride` apart; rows of `to` are `width` apart.
/// In tiles that stay in the first-level cache.
pub fn transpose<T: Copy>(
    from: &[T],
    (rows, cols, stride): (usize, usize, usize),
    to: &mut [T],
    width: usize,
) {
    const COLS: usize = 32;
    let stripes = to[..cols * width].chunks_mut(COLS * width);
    for (s, to) in stripes.enumerate() {
        let first = s * COLS;
        let cols = to.len() / width;
        let line = |i: usize| &from[i * stride + first..][..cols];
        let eights = rows / 8 * 8;
        for i in (0..eights).step_by(8) {
            let lines: [&[T]; 8] = std::array::from_fn(|r| line(i + r));
            for (j, to) in to.chunks_exact_mut(width).enumerate() {
                let eight: [T; 8] = std::array::from_fn(|r| lines[r][j]);
                to[i..i + 8].copy_from_slice(&eight);
            }
        }
        for i in eights..rows {
            for (to, x) in to.chunks_exact_mut(width).zip(line(i)) {
                to[i] = *x;
            }
        }
    }
}

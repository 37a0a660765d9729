//! Where the operands of a convolution lie.
//!
//! The input of a group is copied once into a padded buffer in which, for every tap of the kernel,
//! the inputs of consecutive outputs of a row are consecutive: a stride of `s` splits rows and
//! columns into `s` phases each. Rows follow each other at a fixed pitch, so that the outputs of a
//! whole image are one line of length `(rows - 1) pitch + cols`, with a few unused positions
//! between rows, and tap `t` of channel `c` reads the same line at an offset. A convolution is then
//! a matrix product whose right operand is read in place.

use super::Window;

/// Numbers that may be read past the end of a line: the widest vector.
pub const OVERHANG: usize = 16;

/// The padded copy of the images of one group.
#[derive(Debug, Clone)]
pub struct Source {
    /// Height and width of the images.
    size: [usize; 2],
    stride: [usize; 2],
    /// Empty rows and columns before the image.
    lead: [usize; 2],
    /// Residues of (row, column) by the stride that some tap reads.
    phases: Vec<[usize; 2]>,
    /// Channels of an image.
    pub channels: usize,
    /// Distance of two rows.
    pub pitch: usize,
    /// Numbers in a channel of a phase.
    pub plane: usize,
}

impl Source {
    /// Numbers in the copy of one image.
    pub fn padded_len(&self) -> usize {
        self.phases.len() * self.channels * self.plane + 2 * self.pitch + 2 * OVERHANG
    }

    /// Where the inputs of the first output lie, for each channel and each tap.
    pub fn offsets(&self, pass: &Pass) -> Vec<usize> {
        let channel = |c: usize| pass.taps.iter().map(move |(_, at)| c * self.plane + at);
        (0..self.channels).flat_map(channel).collect()
    }

    /// Copies `[channels, h, w]` into a buffer of [`padded_len`](Self::padded_len) that is zero
    /// elsewhere.
    pub fn fill<T: Copy>(&self, images: &[T], out: &mut [T]) {
        let [h, w] = self.size;
        // The first index of a residue, and where it goes.
        let first = |residue: usize, i: usize| {
            let s = self.stride[i];
            let start = (residue + s - self.lead[i] % s) % s;
            (start, (start + self.lead[i]) / s)
        };
        for (p, phase) in self.phases.iter().enumerate() {
            let (y0, row0) = first(phase[0], 0);
            let (x0, col0) = first(phase[1], 1);
            for c in 0..self.channels {
                let plane = (p * self.channels + c) * self.plane;
                for (i, y) in (y0..h).step_by(self.stride[0]).enumerate() {
                    let row = &images[(c * h + y) * w..(c * h + y + 1) * w];
                    let at = plane + (row0 + i) * self.pitch + col0;
                    if self.stride[1] == 1 {
                        out[at..at + w].copy_from_slice(row);
                        continue;
                    }
                    let columns = row.iter().skip(x0).step_by(self.stride[1]);
                    for (out, x) in out[at..].iter_mut().zip(columns) {
                        *out = *x;
                    }
                }
            }
        }
    }
}

/// Outputs that are computed together, as one line.
#[derive(Debug, Clone)]
pub struct Pass {
    /// (tap of the kernel, offset of its first input within a channel).
    pub taps: Vec<(usize, usize)>,
    /// Rows and columns of outputs.
    pub grid: [usize; 2],
    /// Row and column of the first output in the result.
    pub start: [usize; 2],
    /// Distance of outputs in the result.
    pub step: [usize; 2],
}

impl Pass {
    /// Length of the line.
    pub fn line(&self, pitch: usize) -> usize {
        (self.grid[0] - 1) * pitch + self.grid[1]
    }
}

/// Of `y` from `x`: one pass.
pub fn forward(g: &Window) -> (Source, Vec<Pass>) {
    let padded = [0, 1].map(|i| g.size[i] + 2 * g.padding[i]);
    let pitch = match g.stride[1] {
        // The padding after a row is the padding before the next one.
        1 => g.size[1] + g.padding[1],
        s => padded[1].div_ceil(s),
    };
    let plane = padded[0].div_ceil(g.stride[0]) * pitch;
    let mut phases: Vec<[usize; 2]> = vec![];
    let mut taps = vec![];
    for tap in 0..g.taps() {
        let k = [tap / g.kernel[1], tap % g.kernel[1]];
        let at = [0, 1].map(|i| k[i] * g.dilation[i]);
        let phase = [0, 1].map(|i| at[i] % g.stride[i]);
        let index = phases.iter().position(|p| *p == phase);
        let index = index.unwrap_or_else(|| {
            phases.push(phase);
            phases.len() - 1
        });
        let shift = (at[0] / g.stride[0]) * pitch + at[1] / g.stride[1];
        taps.push((tap, index * g.inputs * plane + shift));
    }
    let source = Source {
        size: g.size,
        stride: g.stride,
        lead: g.padding,
        phases,
        channels: g.inputs,
        pitch,
        plane,
    };
    let pass = Pass {
        taps,
        grid: g.out,
        start: [0, 0],
        step: [1, 1],
    };
    (source, vec![pass])
}

/// One dimension of a phase of `dx`: (first, last) index in units of the stride, counted in the
/// padded input.
fn range(g: &Window, i: usize, residue: usize) -> Option<(usize, usize)> {
    let last = (g.size[i] - 1 + g.padding[i]).checked_sub(residue)? / g.stride[i];
    let first = g.padding[i].saturating_sub(residue).div_ceil(g.stride[i]);
    (first <= last).then_some((first, last))
}

/// The kernel's positions along a dimension that meet a residue, as (position, shift).
fn meeting(g: &Window, i: usize, residue: usize) -> Vec<(usize, usize)> {
    let hits = (0..g.kernel[i]).filter_map(|k| {
        let at = (k * g.dilation[i]).checked_sub(residue)?;
        at.is_multiple_of(g.stride[i])
            .then_some((k, at / g.stride[i]))
    });
    hits.collect()
}

/// Of `dx` from `dy`: for each residue of the padded input's index `Y = r s + a`, the sum over the taps
/// with `k d = a + t s` of `w_k dy_(r - t)`.
pub fn input_gradient(g: &Window) -> (Source, Vec<Pass>) {
    // (residue, first and last index, taps) along each dimension.
    let along = [0, 1].map(|i| {
        let one = |a: usize| Some((a, range(g, i, a)?, meeting(g, i, a)));
        (0..g.stride[i]).filter_map(one).collect::<Vec<_>>()
    });
    let lead = [0, 1].map(|i| {
        let need = along[i].iter().map(|(_, (first, _), taps)| {
            let furthest = taps.iter().map(|(_, t)| *t).max().unwrap_or(0);
            furthest.saturating_sub(*first)
        });
        need.max().unwrap_or(0)
    });
    let last = [0, 1].map(|i| {
        along[i]
            .iter()
            .map(|(_, (_, last), _)| *last)
            .max()
            .unwrap_or(0)
    });
    let pitch = (lead[1] + g.out[1]).max(last[1] + 1);
    let rows = lead[0] + g.out[0].max(last[0] + 1);
    let source = Source {
        size: g.out,
        stride: [1, 1],
        lead,
        phases: vec![[0, 0]],
        channels: g.outputs,
        pitch,
        plane: rows * pitch,
    };
    let mut passes = vec![];
    for (a, (r0, r1), rows) in &along[0] {
        for (b, (q0, q1), cols) in &along[1] {
            let mut taps = vec![];
            for (ky, ty) in rows {
                for (kx, tx) in cols {
                    let offset = (r0 + lead[0] - ty) * pitch + (q0 + lead[1] - tx);
                    taps.push((ky * g.kernel[1] + kx, offset));
                }
            }
            passes.push(Pass {
                taps,
                grid: [r1 - r0 + 1, q1 - q0 + 1],
                start: [
                    r0 * g.stride[0] + a - g.padding[0],
                    q0 * g.stride[1] + b - g.padding[1],
                ],
                step: g.stride,
            });
        }
    }
    (source, passes)
}

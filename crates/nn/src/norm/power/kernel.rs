//! The fused passes of power normalization over row-major `[rows, cols]` memory.
//!
//! Rows are cut into blocks of a size that depends on the width only. Each block sums its columns
//! into a row of its own, and the rows are added in order: the same bits for any thread count.

use crate::kernel::{vectorized, Scalar, PARALLEL_FROM};
use rayon::prelude::*;

/// Accumulators of the sums along a row.
const LANES: usize = 16;

/// Group scaling's own epsilon; the published layer has this constant.
pub(super) const GROUP_EPS: f64 = 1e-5;

/// The extents of a pass.
#[derive(Debug, Clone, Copy)]
pub(super) struct Extent {
    pub rows: usize,
    pub cols: usize,
    /// None: no group scaling.
    pub groups: Option<usize>,
}

impl Extent {
    /// Column sums of one block are exact to a few roundings of f32 at this many rows.
    fn block(self) -> usize {
        (PARALLEL_FROM / self.cols.max(1)).clamp(4, 32)
    }

    fn blocks(self) -> usize {
        self.rows.div_ceil(self.block())
    }

    /// Scales `r` per row: one per group, or a single 1.
    pub fn scales(self) -> usize {
        self.groups.unwrap_or(1)
    }

    fn parallel(self) -> bool {
        self.rows * self.cols >= PARALLEL_FROM
    }
}

/// Column sums of `h^2`, over the kept rows and over all of them.
pub(super) struct Squares {
    pub kept: Vec<f64>,
    pub all: Vec<f64>,
}

/// What to write in a pass: `y = h * scale + shift` per column.
pub(super) struct Affine<'a, T> {
    pub y: &'a mut [T],
    pub scale: &'a [T],
    pub shift: &'a [T],
}

/// One pass over `x`: the scales `r` (`h = x r`), and, where wanted, the column sums of squares
/// (`keep` excludes padded rows) and the output.
pub(super) fn forward<T: Scalar>(
    x: &[T],
    extent: Extent,
    r: &mut [T],
    squares: Option<Option<&[bool]>>,
    output: Option<Affine<'_, T>>,
) -> Option<Squares> {
    let (block, cols, scales) = (extent.block(), extent.cols, extent.scales());
    let mut sums = match squares {
        Some(_) => vec![T::ZERO; 2 * extent.blocks() * cols],
        None => vec![],
    };
    let mut unused = [];
    let (y, scale, shift) = match output {
        Some(out) => (out.y, out.scale, out.shift),
        None => (&mut unused[..], &[][..], &[][..]),
    };
    let keep = squares.flatten();
    let one = |(i, (((x, r), sums), y)): Piece<'_, T>| {
        vectorized(
            #[inline(always)]
            || {
                let (kept, all) = sums.split_at_mut(sums.len() / 2);
                for (row, (x, r)) in x
                    .chunks_exact(cols)
                    .zip(r.chunks_exact_mut(scales))
                    .enumerate()
                {
                    if extent.groups.is_some() {
                        scales_of(x, r);
                    }
                    if !all.is_empty() {
                        let keep = keep.is_none_or(|keep| keep[i * block + row]);
                        add_squares(x, r, all);
                        if keep {
                            add_squares(x, r, kept);
                        }
                    }
                    if !y.is_empty() {
                        let y = &mut y[row * cols..(row + 1) * cols];
                        affine(x, r, y, scale, shift);
                    }
                }
            },
        )
    };
    // Chunks of an absent output are empty.
    let sums_chunk = if sums.is_empty() { 0 } else { 2 * cols };
    let y_chunk = if y.is_empty() { 0 } else { block * cols };
    let pieces: Vec<_> = x
        .chunks(block * cols)
        .zip(r.chunks_mut(block * scales))
        .zip(chunks_or_empty(&mut sums, sums_chunk))
        .zip(chunks_or_empty(y, y_chunk))
        .enumerate()
        .collect();
    run(extent.parallel(), pieces, one);
    squares.map(|_| {
        let total = |part: usize| sum_blocks(&sums, cols, 2, part);
        Squares {
            kept: total(0),
            all: total(1),
        }
    })
}

type Piece<'a, T> = (usize, (((&'a [T], &'a mut [T]), &'a mut [T]), &'a mut [T]));

/// Per column: `dh = a dy - b h`.
pub(super) struct InputGradient<'a, T> {
    pub a: &'a [T],
    pub b: &'a [T],
}

/// Column sums of `dy` and of `dy h`.
pub(super) struct GradientSums {
    pub dy: Vec<f64>,
    pub dy_h: Vec<f64>,
}

/// One pass over `x` and `dy`: `dx` through group scaling's exact gradient
/// `dx = r (dh - x r^2 mean(dh x))`, and the column sums for the parameters.
pub(super) fn backward<T: Scalar>(
    x: &[T],
    dy: &[T],
    r: &[T],
    dx: &mut [T],
    extent: Extent,
    gradient: &InputGradient<'_, T>,
) -> GradientSums {
    let (block, cols, scales) = (extent.block(), extent.cols, extent.scales());
    let mut sums = vec![T::ZERO; 2 * extent.blocks() * cols];
    type Piece<'a, T> = ((((&'a [T], &'a [T]), &'a [T]), &'a mut [T]), &'a mut [T]);
    let one = |((((x, dy), r), dx), sums): Piece<'_, T>| {
        vectorized(
            #[inline(always)]
            || {
                let (sum_dy, sum_dy_h) = sums.split_at_mut(cols);
                let rows = x.chunks_exact(cols).zip(dy.chunks_exact(cols));
                let scaled = r.chunks_exact(scales).zip(dx.chunks_exact_mut(cols));
                for ((x, dy), (r, dx)) in rows.zip(scaled) {
                    add_gradients(x, dy, r, sum_dy, sum_dy_h);
                    input_gradient(x, dy, r, dx, gradient);
                    if extent.groups.is_some() {
                        through_scaling(x, r, dx);
                    }
                }
            },
        )
    };
    let pieces: Vec<_> = x
        .chunks(block * cols)
        .zip(dy.chunks(block * cols))
        .zip(r.chunks(block * scales))
        .zip(dx.chunks_mut(block * cols))
        .zip(sums.chunks_mut(2 * cols))
        .collect();
    run(extent.parallel(), pieces, one);
    GradientSums {
        dy: sum_blocks(&sums, cols, 2, 0),
        dy_h: sum_blocks(&sums, cols, 2, 1),
    }
}

fn run<P: Send>(parallel: bool, pieces: Vec<P>, one: impl Fn(P) + Sync + Send) {
    if parallel {
        pieces.into_par_iter().for_each(one);
    } else {
        pieces.into_iter().for_each(one);
    }
}

/// Chunks of a slice, or endless empty ones for size 0.
fn chunks_or_empty<T>(slice: &mut [T], size: usize) -> impl Iterator<Item = &mut [T]> {
    let empties = if size == 0 { usize::MAX } else { 0 };
    let chunks = slice.chunks_mut(size.max(1));
    chunks.chain(std::iter::repeat_with(|| &mut [][..]).take(empties))
}

/// Adds the blocks' sums in order, in f64: part `part` of `parts` interleaved rows.
fn sum_blocks<T: Scalar>(sums: &[T], cols: usize, parts: usize, part: usize) -> Vec<f64> {
    let mut total = vec![0.0; cols];
    for block in sums.chunks_exact(parts * cols) {
        let row = &block[part * cols..(part + 1) * cols];
        total
            .iter_mut()
            .zip(row)
            .for_each(|(t, s)| *t += s.to_f64());
    }
    total
}

/// `r = 1 / sqrt(mean(x^2) + eps)` of each group of a row.
#[inline(always)]
fn scales_of<T: Scalar>(x: &[T], r: &mut [T]) {
    let width = x.len() / r.len();
    for (x, r) in x.chunks_exact(width).zip(r) {
        let mean = dot(x, x) / T::from_f64(width as f64);
        *r = T::ONE / (mean + T::from_f64(GROUP_EPS)).sqrt();
    }
}

#[inline(always)]
fn dot<T: Scalar>(a: &[T], b: &[T]) -> T {
    let mut lanes = [T::ZERO; LANES];
    let (a_full, b_full) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let mut rest = T::ZERO;
    for (a, b) in a_full.remainder().iter().zip(b_full.remainder()) {
        rest = rest + *a * *b;
    }
    for (a, b) in a_full.zip(b_full) {
        for l in 0..LANES {
            lanes[l] = lanes[l] + a[l] * b[l];
        }
    }
    lanes.into_iter().fold(rest, |sum, lane| sum + lane)
}

#[inline(always)]
fn add_squares<T: Scalar>(x: &[T], r: &[T], sums: &mut [T]) {
    let width = x.len() / r.len();
    for ((x, r), sums) in x
        .chunks_exact(width)
        .zip(r)
        .zip(sums.chunks_exact_mut(width))
    {
        for (x, s) in x.iter().zip(sums) {
            let h = *x * *r;
            *s = *s + h * h;
        }
    }
}

#[inline(always)]
fn affine<T: Scalar>(x: &[T], r: &[T], y: &mut [T], scale: &[T], shift: &[T]) {
    let width = x.len() / r.len();
    for (g, r) in r.iter().enumerate() {
        let range = g * width..(g + 1) * width;
        let (x, y) = (&x[range.clone()], &mut y[range.clone()]);
        let (scale, shift) = (&scale[range.clone()], &shift[range]);
        for (((x, y), a), b) in x.iter().zip(y).zip(scale).zip(shift) {
            *y = *x * *r * *a + *b;
        }
    }
}

#[inline(always)]
fn add_gradients<T: Scalar>(x: &[T], dy: &[T], r: &[T], sum_dy: &mut [T], sum_dy_h: &mut [T]) {
    let width = x.len() / r.len();
    for (g, r) in r.iter().enumerate() {
        let range = g * width..(g + 1) * width;
        let (x, dy) = (&x[range.clone()], &dy[range.clone()]);
        let (s, sh) = (&mut sum_dy[range.clone()], &mut sum_dy_h[range]);
        for (((x, dy), s), sh) in x.iter().zip(dy).zip(s).zip(sh) {
            *s = *s + *dy;
            *sh = *sh + *dy * (*x * *r);
        }
    }
}

/// Writes `dh` into `dx`.
#[inline(always)]
fn input_gradient<T: Scalar>(
    x: &[T],
    dy: &[T],
    r: &[T],
    dx: &mut [T],
    gradient: &InputGradient<'_, T>,
) {
    let width = x.len() / r.len();
    for (g, r) in r.iter().enumerate() {
        let range = g * width..(g + 1) * width;
        let (x, dy) = (&x[range.clone()], &dy[range.clone()]);
        let (a, b) = (&gradient.a[range.clone()], &gradient.b[range.clone()]);
        let dx = &mut dx[range];
        for ((((x, dy), dx), a), b) in x.iter().zip(dy).zip(dx).zip(a).zip(b) {
            *dx = *a * *dy - *b * (*x * *r);
        }
    }
}

/// Turns `dh` into `dx`.
#[inline(always)]
fn through_scaling<T: Scalar>(x: &[T], r: &[T], dx: &mut [T]) {
    let width = x.len() / r.len();
    let count = T::from_f64(width as f64);
    for ((x, r), dx) in x.chunks_exact(width).zip(r).zip(dx.chunks_exact_mut(width)) {
        let along = dot(dx, x) / count * *r * *r;
        for (x, dx) in x.iter().zip(dx) {
            *dx = *r * (*dx - *x * along);
        }
    }
}

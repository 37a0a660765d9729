//! Rows that do not fill a vector: several side by side. Sums are those of a long row, bit for bit.

use super::LANES;
use crate::kernel::Scalar;
use tensor_core::kernels::conv::transpose;

/// Rows side by side: one of the widest vectors of f32.
const ROWS: usize = 16;

/// The same place of each of the rows.
type Column<T> = [T; ROWS];

/// Room for rows that are shorter than [`LANES`], side by side.
type Block<T> = [Column<T>; LANES];

/// All rows of `x`; `f` makes them from some, side by side, in place.
#[inline(always)]
fn over_blocks<T: Scalar, const N: usize>(
    sources: [&[T]; N],
    out: &mut [T],
    width: usize,
    f: impl Fn(&mut [&mut [Column<T>]; N]),
) {
    let mut blocks: [Block<T>; N] = [[[T::ZERO; ROWS]; LANES]; N];
    for (i, out) in out.chunks_mut(ROWS * width).enumerate() {
        let at = i * ROWS * width;
        let mut columns = blocks.each_mut().map(|block| &mut block[..width]);
        for (columns, source) in columns.iter_mut().zip(sources) {
            let rows = (out.len() / width, width, width);
            transpose(&source[at..], rows, columns.as_flattened_mut(), ROWS);
        }
        f(&mut columns);
        let columns = (width, out.len() / width, ROWS);
        transpose(blocks[0].as_flattened(), columns, out, width);
    }
}

/// The sum of the numbers of each row, which are lost.
#[inline(always)]
fn fold<T: Scalar>(columns: &mut [Column<T>]) -> Column<T> {
    let mut count = columns.len();
    let mut half = LANES / 2;
    while half > 0 {
        let (low, high) = columns[..count].split_at_mut(half.min(count));
        for (low, high) in low.iter_mut().zip(high) {
            for (low, high) in low.iter_mut().zip(high) {
                *low = *low + *high;
            }
        }
        count = count.min(half);
        half /= 2;
    }
    columns[0]
}

/// Softmax of rows of `width` numbers, or its logarithm.
#[inline(always)]
pub(super) fn forward<T: Scalar, const LOG: bool>(x: &[T], y: &mut [T], width: usize) {
    over_blocks(
        [x],
        y,
        width,
        #[inline(always)]
        |[x]| {
            let mut top = x[0];
            for x in x.iter() {
                for l in 0..ROWS {
                    top[l] = T::select(x[l] > top[l], x[l], top[l]);
                }
            }
            let mut block: Block<T> = [[T::ZERO; ROWS]; LANES];
            let e = &mut block[..width];
            for (x, e) in x.iter_mut().zip(e.iter_mut()) {
                for l in 0..ROWS {
                    x[l] = x[l] - top[l];
                    e[l] = x[l].exp_of_negative();
                }
            }
            if LOG {
                let log = fold(e).map(|sum| T::from_f64(sum.to_f64().ln()));
                for x in x.iter_mut() {
                    for l in 0..ROWS {
                        x[l] = x[l] - log[l];
                    }
                }
                return;
            }
            x.copy_from_slice(e);
            let scale = fold(e).map(|sum| T::from_f64(1.0 / sum.to_f64()));
            for x in x.iter_mut() {
                for l in 0..ROWS {
                    x[l] = x[l] * scale[l];
                }
            }
        },
    );
}

/// The gradient for rows of `width` numbers.
#[inline(always)]
pub(super) fn gradient<T: Scalar, const LOG: bool>(y: &[T], dy: &[T], dx: &mut [T], width: usize) {
    over_blocks(
        [y, dy],
        dx,
        width,
        #[inline(always)]
        |[y, dy]| {
            let mut block: Block<T> = [[T::ZERO; ROWS]; LANES];
            let sums = &mut block[..width];
            for ((y, dy), sum) in y.iter().zip(dy.iter()).zip(sums.iter_mut()) {
                for l in 0..ROWS {
                    sum[l] = if LOG { dy[l] } else { y[l] * dy[l] };
                }
            }
            let total = fold(sums);
            for (y, dy) in y.iter_mut().zip(dy.iter()) {
                for l in 0..ROWS {
                    y[l] = match LOG {
                        true => dy[l] - y[l].exp_of_negative() * total[l],
                        false => y[l] * (dy[l] - total[l]),
                    };
                }
            }
        },
    );
}

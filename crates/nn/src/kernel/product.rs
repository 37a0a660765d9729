//! Matrix products over strided views: no operand is ever transposed in memory.

use super::{filled, Scalar, PARALLEL_FROM};
use rayon::prelude::*;
use tensor_core::kernels::conv;

/// A view of a matrix inside a slice.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a, T> {
    data: &'a [T],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a, T> Matrix<'a, T> {
    /// Row-major and dense.
    pub(crate) fn new(data: &'a [T], rows: usize, cols: usize) -> Self {
        Self::strided(data, (rows, cols), (cols, 1))
    }

    /// With the given strides of rows and columns.
    pub(crate) fn strided(
        data: &'a [T],
        (rows, cols): (usize, usize),
        (row_stride, col_stride): (usize, usize),
    ) -> Self {
        let last = rows.saturating_sub(1) * row_stride + cols.saturating_sub(1) * col_stride;
        assert!(rows * cols == 0 || last < data.len());
        Self {
            data,
            rows,
            cols,
            row_stride,
            col_stride,
        }
    }

    /// Whether rows lie a large power of two apart, so that packing a panel of them finds all in the
    /// same few lines of the first-level cache.
    fn collides(&self) -> bool {
        let distance = self.row_stride * size_of::<T>();
        let worth = self.rows >= 64 && self.cols >= 256;
        self.col_stride == 1 && distance.is_multiple_of(2048) && distance > 0 && worth
    }

    pub(crate) fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }
}

/// A copy whose rows are not a power of two apart.
fn spaced<T: Scalar>(m: &Matrix<'_, T>, parallel: bool) -> (Vec<T>, usize) {
    let stride = m.cols + 64 / size_of::<T>();
    let copy = filled(m.rows * stride, |out| {
        let row = |(i, out): (usize, &mut [T])| {
            let (values, rest) = out.split_at_mut(m.cols);
            values.copy_from_slice(&m.data[i * m.row_stride..][..m.cols]);
            rest.fill(T::ZERO);
        };
        match parallel {
            true => {
                let rows = out.par_chunks_mut(stride).enumerate();
                rows.with_min_len(PARALLEL_FROM / stride + 1).for_each(row);
            }
            false => out.chunks_mut(stride).enumerate().for_each(row),
        }
    });
    (copy, stride)
}

/// `to[j][i] = from[i][j]` for a row-major `from`; rows of `to` are `width` apart.
pub(crate) fn transpose<T: Scalar>(from: &Matrix<'_, T>, to: &mut [T], width: usize) {
    let shape = (from.rows, from.cols, from.row_stride);
    conv::transpose(from.data, shape, to, width);
}

/// What happens to the old content of the output.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Onto {
    /// It is replaced, and need not be initialized.
    Nothing,
    /// The product is added to it.
    Sum,
}

/// `out (+)= scale a b`, row-major with `out_stride` numbers from row to row, on the threads of
/// the pool that it is called from (`parallel`) or on the calling one. The sums over the inner
/// dimension are never split between threads: the bits do not depend on their number.
pub(crate) fn product<T: Scalar>(
    (out, out_stride): (&mut [T], usize),
    a: Matrix<'_, T>,
    b: Matrix<'_, T>,
    (onto, scale): (Onto, T),
    parallel: bool,
) {
    if onto == Onto::Nothing && scale == T::ONE && out_stride == b.cols && few_rows_of_large(&a, &b)
    {
        return few_rows(out, &a, &b.t(), parallel);
    }
    // Both factors are packed along their inner dimension.
    let (a_copy, b_copy);
    let a = match a.collides() {
        true => {
            a_copy = spaced(&a, parallel);
            Matrix::strided(&a_copy.0, (a.rows, a.cols), (a_copy.1, 1))
        }
        false => a,
    };
    let b = match b.t().collides() {
        true => {
            b_copy = spaced(&b.t(), parallel);
            Matrix::strided(&b_copy.0, (b.cols, b.rows), (b_copy.1, 1)).t()
        }
        false => b,
    };
    let (m, n, k) = (a.rows, b.cols, a.cols);
    assert!(k == b.rows && n <= out_stride.max(1));
    if m == 0 || n == 0 {
        return;
    }
    assert!((m - 1) * out_stride + n <= out.len());
    let parallelism = match parallel && rayon::current_num_threads() > 1 {
        true => gemm::Parallelism::Rayon(0),
        false => gemm::Parallelism::None,
    };
    // SAFETY: the views lie inside their slices and the output inside its own (asserted above and
    // in `Matrix::strided`); a mutable slice overlaps no other.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            out_stride as isize,
            onto == Onto::Sum,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            T::ONE,
            scale,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// Whether a general product would spend much of its time on packing `b`: its columns are dense and
/// larger than the second-level cache, and `a` has few rows.
fn few_rows_of_large<T>(a: &Matrix<'_, T>, b: &Matrix<'_, T>) -> bool {
    let dense = a.col_stride == 1 && b.row_stride == 1 && b.col_stride >= b.rows;
    dense && (16..=160).contains(&a.rows) && b.cols >= 64 && b.rows * b.cols >= 1 << 19
}

/// Rows of the weight in a piece of work.
const GROUP: usize = 64;
/// Rows of the output that are transposed together.
const BLOCK: usize = 16;

/// `out = a w^T` for few rows of `a`: they lie side by side in the vector registers, and the weight goes
/// by once.
fn few_rows<T: Scalar>(out: &mut [T], a: &Matrix<'_, T>, w: &Matrix<'_, T>, parallel: bool) {
    let (m, n, k) = (a.rows, w.rows, a.cols);
    let width = m.next_multiple_of(64 / size_of::<T>());
    let mut columns = vec![T::ZERO; k * width];
    transpose(a, &mut columns, width);
    let offsets: Vec<usize> = (0..k).map(|i| i * width).collect();
    let group = |(g, sums): (usize, &mut [T])| {
        let channels = sums.len() / width;
        let rows = &w.data[g * GROUP * w.row_stride..];
        pulp::Arch::new().dispatch(conv::Correlate {
            weights: &in_panels(rows, (channels, k, w.row_stride)),
            offsets: &offsets,
            source: &columns,
            out: sums,
            channels,
            line: m,
            stride: width,
        });
    };
    let sums = filled(n * width, |sums| match parallel {
        true => sums
            .par_chunks_mut(GROUP * width)
            .enumerate()
            .for_each(group),
        false => sums.chunks_mut(GROUP * width).enumerate().for_each(group),
    });
    let block = |(b, out): (usize, &mut [T])| {
        let shape = (n, out.len() / n, width);
        conv::transpose(&sums[b * BLOCK..], shape, out, n);
    };
    let out = &mut out[..m * n];
    match parallel {
        true => out.par_chunks_mut(BLOCK * n).enumerate().for_each(block),
        false => out.chunks_mut(BLOCK * n).enumerate().for_each(block),
    }
}

/// Rows `[rows, k]`, `stride` apart, in the order in which [`conv::Correlate`] reads them.
fn in_panels<T: Scalar>(data: &[T], (rows, k, stride): (usize, usize, usize)) -> Vec<T> {
    filled(rows * k, |packed| {
        for (first, size) in conv::panels(rows) {
            let panel = &mut packed[first * k..][..size * k];
            conv::transpose(&data[first * stride..], (size, k, stride), panel, size);
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both ways to multiply, by the number of rows, against sums that are written out.
    fn check<T: Scalar>(tolerance: f64) {
        let (n, k) = (1027, 515);
        let number = |i: usize| T::from_f64(((i * 7919) % 2003) as f64 / 1001.0 - 1.0);
        let w: Vec<T> = (0..n * k).map(number).collect();
        let w = Matrix::new(&w, n, k);
        for m in [15, 16, 21, 97, 160, 161] {
            let a: Vec<T> = (5..5 + m * k).map(number).collect();
            let a = Matrix::new(&a, m, k);
            assert_eq!(few_rows_of_large(&a, &w.t()), (16..=160).contains(&m));
            let multiply = |parallel| {
                filled(m * n, |out| {
                    product((out, n), a, w.t(), (Onto::Nothing, T::ONE), parallel);
                })
            };
            let out = multiply(true);
            for i in [0, m / 2, m - 1] {
                for j in [0, 63, 64, 500, 1020, 1024, 1026] {
                    let at = |l: usize| a.data[i * k + l].to_f64() * w.data[j * k + l].to_f64();
                    let expected: f64 = (0..k).map(at).sum();
                    assert!((out[i * n + j].to_f64() - expected).abs() < tolerance);
                }
            }
            let bits = |v: Vec<T>| {
                v.into_iter()
                    .map(|x| x.to_f64().to_bits())
                    .collect::<Vec<_>>()
            };
            assert_eq!(bits(out), bits(multiply(false)));
        }
    }

    #[test]
    fn few_rows_of_a_large_weight_are_multiplied_like_many() {
        check::<f32>(1e-3);
        check::<f64>(1e-10);
    }
}

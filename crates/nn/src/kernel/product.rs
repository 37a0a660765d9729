//! Matrix products over strided views: no operand is ever transposed in memory.

use super::Scalar;

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

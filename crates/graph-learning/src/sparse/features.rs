//! Node features that are mostly zero.

use super::{spmm, Reduce};
use crate::conv::linear;
use crate::graph::Graph;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};

/// A constant sparse matrix `[rows, cols]` that dense matrices are multiplied by.
///
/// Bag-of-words features of a citation graph hold one entry in a hundred; a first layer that
/// multiplies them by its weights does a hundredth of the work, forward and backward.
#[derive(Debug, Clone)]
pub struct SparseFeatures {
    /// Entries as edges from columns to rows.
    entries: Graph,
    values: Vec<f64>,
    dtype: DType,
    tensor: Tensor,
}

impl SparseFeatures {
    /// The matrix with `values[indptr[r]..indptr[r + 1]]` at the columns `indices[..]` of row `r`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for borders that decrease or lists of different lengths,
    /// [`Error::EdgeOutOfRange`] for a column beyond `cols`, [`Error::NonFinite`].
    pub fn from_csr(
        cols: usize,
        indptr: &[u32],
        indices: &[u32],
        values: Vec<f64>,
        dtype: DType,
    ) -> Result<Self> {
        let ends = (indptr.first(), indptr.last());
        let whole = ends == (Some(&0), Some(&(indices.len() as u32)));
        if !whole || indptr.windows(2).any(|w| w[0] > w[1]) {
            let expected = format!("borders from 0 to {} that do not decrease", indices.len());
            return Err(Error::argument("indptr", format!("{ends:?}"), expected));
        }
        if values.len() != indices.len() {
            return Err(Error::argument("values", values.len(), indices.len()));
        }
        let count = values.iter().filter(|v| !v.is_finite()).count();
        if count > 0 {
            let (what, total) = ("features", values.len());
            return Err(Error::NonFinite { what, count, total });
        }
        let row_of =
            |(r, w): (usize, &[u32])| std::iter::repeat_n(r as u32, (w[1] - w[0]) as usize);
        let rows = indptr.windows(2).enumerate().flat_map(row_of).collect();
        let entries = Graph::bipartite(cols, indptr.len() - 1, indices.to_vec(), rows)?;
        let tensor = weights(&values, dtype)?;
        Ok(Self {
            entries,
            values,
            dtype,
            tensor,
        })
    }

    /// The entries of a dense matrix that are not zero.
    ///
    /// # Errors
    /// [`Error::Shape`] unless it is a matrix, [`Error::NonFinite`].
    pub fn from_dense(x: &Tensor) -> Result<Self> {
        let (_, cols) = x.dims2()?;
        let (mut indptr, mut indices, mut values) = (vec![0u32], Vec::new(), Vec::new());
        for row in x.to_dtype(DType::F64)?.to_vec2::<f64>()? {
            for (c, v) in row.into_iter().enumerate().filter(|(_, v)| *v != 0.0) {
                indices.push(c as u32);
                values.push(v);
            }
            indptr.push(indices.len() as u32);
        }
        Self::from_csr(cols, &indptr, &indices, values, x.dtype())
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.entries.num_targets()
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.entries.num_sources()
    }

    /// Number of stored entries.
    pub fn len(&self) -> usize {
        self.values.len()
    }

    /// Whether nothing is stored.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// The dtype that products have.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The product with a matrix `[cols, k]` of the same dtype: `[rows, k]`, differentiable in it.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::DType`].
    pub fn matmul(&self, weight: &Tensor) -> Result<Tensor> {
        let values = self.tensor.to_device(weight.device())?;
        spmm(&self.entries, Some(&values), weight, Reduce::Sum)
    }

    /// The same matrix in another dtype.
    ///
    /// # Errors
    /// [`Error::DType`] for integers.
    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        Ok(Self {
            dtype,
            tensor: weights(&self.values, dtype)?,
            ..self.clone()
        })
    }

    /// Rows divided by `max(sum of the row, 1)` where `at_least_one`, else by their sum (empty rows
    /// stay empty).
    ///
    /// # Errors
    /// Those of [`from_csr`](Self::from_csr).
    pub fn normalize_rows(&self, at_least_one: bool) -> Result<Self> {
        let csr = self.entries.incoming();
        let mut values = self.values.clone();
        for r in 0..csr.rows() {
            let edges = &csr.perm()[csr.row(r)];
            let sum: f64 = edges.iter().map(|e| self.values[*e as usize]).sum();
            let sum = if at_least_one { sum.max(1.0) } else { sum };
            if sum != 0.0 {
                edges.iter().for_each(|e| values[*e as usize] /= sum);
            }
        }
        Ok(Self {
            tensor: weights(&values, self.dtype)?,
            values,
            ..self.clone()
        })
    }

    /// Rows divided by their Euclidean norm plus `eps`; empty rows stay empty.
    ///
    /// # Errors
    /// Those of candle.
    pub fn normalize_l2(&self, eps: f64) -> Result<Self> {
        let mut squares = vec![0.0; self.rows()];
        for (v, row) in self.values.iter().zip(self.entries.dst()) {
            squares[*row as usize] += v * v;
        }
        let divided = |(v, row): (&f64, &u32)| v / (squares[*row as usize].sqrt() + eps);
        let rows = self.entries.dst();
        let values: Vec<f64> = self.values.iter().zip(rows).map(divided).collect();
        Ok(Self {
            tensor: weights(&values, self.dtype)?,
            values,
            ..self.clone()
        })
    }

    /// With the columns of a constant matrix `[rows, k]` behind its own.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::NonFinite`].
    pub fn append_columns(&self, columns: &Tensor) -> Result<Self> {
        let right = Self::from_dense(columns)?;
        if right.rows() != self.rows() {
            let expected = format!("[{}, k]", self.rows());
            return Err(Error::shape("columns", columns.dims(), expected));
        }
        let (rows, cols) = (self.rows(), self.cols() + right.cols());
        self.join(&right, (rows, cols), (0, self.cols() as u32))
    }

    /// With the rows of a constant matrix `[k, cols]` below its own.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::NonFinite`].
    pub fn append_rows(&self, rows: &Tensor) -> Result<Self> {
        let below = Self::from_dense(rows)?;
        if below.cols() != self.cols() {
            let expected = format!("[k, {}]", self.cols());
            return Err(Error::shape("rows", rows.dims(), expected));
        }
        let (count, cols) = (self.rows() + below.rows(), self.cols());
        self.join(&below, (count, cols), (self.rows() as u32, 0))
    }

    /// The entries of both in a matrix of this size, the other's moved down and right.
    fn join(&self, other: &Self, size: (usize, usize), by: (u32, u32)) -> Result<Self> {
        let moved = |list: &[u32], by: u32| list.iter().map(|i| i + by).collect::<Vec<_>>();
        let (mut columns, mut rows) = (self.entries.src().to_vec(), self.entries.dst().to_vec());
        columns.extend(moved(other.entries.src(), by.1));
        rows.extend(moved(other.entries.dst(), by.0));
        let mut values = self.values.clone();
        values.extend(&other.values);
        Ok(Self {
            entries: Graph::bipartite(size.1, size.0, columns, rows)?,
            tensor: weights(&values, self.dtype)?,
            values,
            dtype: self.dtype,
        })
    }

    /// Stored entries multiplied by one factor each, in the order in which they were given: dropout of
    /// sparse features draws its mask for these.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] unless there is one factor per entry.
    pub fn scale_entries(&self, factors: &[f64]) -> Result<Self> {
        if factors.len() != self.len() {
            return Err(Error::argument("factors", factors.len(), self.len()));
        }
        let values: Vec<f64> = self
            .values
            .iter()
            .zip(factors)
            .map(|(v, f)| v * f)
            .collect();
        Ok(Self {
            tensor: weights(&values, self.dtype)?,
            values,
            ..self.clone()
        })
    }

    /// Columns multiplied by one factor each.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] unless there is one factor per column.
    pub fn scale_columns(&self, factors: &[f64]) -> Result<Self> {
        if factors.len() != self.cols() {
            return Err(Error::argument("factors", factors.len(), self.cols()));
        }
        let scaled = |(v, c): (&f64, &u32)| v * factors[*c as usize];
        let values: Vec<f64> = self
            .values
            .iter()
            .zip(self.entries.src())
            .map(scaled)
            .collect();
        Ok(Self {
            tensor: weights(&values, self.dtype)?,
            values,
            ..self.clone()
        })
    }

    /// `|x|^T c` for one number per row.
    pub(crate) fn column_sums(&self, c: &[f64]) -> Vec<f64> {
        let mut sums = vec![0.0; self.cols()];
        for (v, (column, row)) in self.values.iter().zip(self.entries.edges()) {
            sums[column as usize] += v.abs() * c[row as usize];
        }
        sums
    }

    /// Some rows, in this order; a row may be named often.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a row that does not exist; [`Error::TooLarge`].
    pub fn select_rows(&self, rows: &[u32]) -> Result<Self> {
        if let Some(bad) = rows.iter().find(|r| **r as usize >= self.rows()) {
            return Err(Error::argument(
                "row",
                bad,
                format!("below {}", self.rows()),
            ));
        }
        let csr = self.entries.incoming();
        let (mut indptr, mut indices, mut values) = (vec![0u32], Vec::new(), Vec::new());
        for r in rows {
            for p in csr.row(*r as usize) {
                indices.push(csr.indices()[p]);
                values.push(self.values[csr.perm()[p] as usize]);
            }
            indptr.push(indices.len() as u32);
        }
        Self::from_csr(self.cols(), &indptr, &indices, values, self.dtype)
    }

    /// The matrix with all its zeros.
    ///
    /// # Errors
    /// Those of candle.
    pub fn to_dense(&self, device: &Device) -> Result<Tensor> {
        let dense = self.entries.to_dense(Some(&self.values))?;
        Ok(dense.to_dtype(self.dtype)?.to_device(device)?)
    }
}

fn weights(values: &[f64], dtype: DType) -> Result<Tensor> {
    if !dtype.is_float() {
        return Err(Error::dtype("features", dtype, "a floating-point dtype"));
    }
    Ok(Tensor::from_slice(values, values.len(), &Device::Cpu)?.to_dtype(dtype)?)
}

/// Features of nodes, dense or sparse.
#[derive(Debug, Clone)]
pub enum Features {
    /// A tensor `[n, d]`.
    Dense(Tensor),
    /// A constant sparse matrix.
    Sparse(SparseFeatures),
}

impl Features {
    /// Number of nodes and of features.
    ///
    /// # Errors
    /// [`Error::Candle`] for a dense tensor that is no matrix.
    pub fn dims(&self) -> Result<(usize, usize)> {
        match self {
            Self::Dense(x) => Ok(x.dims2()?),
            Self::Sparse(x) => Ok((x.rows(), x.cols())),
        }
    }

    /// `x W^T` for a weight `[out, in]`.
    ///
    /// # Errors
    /// Those of candle, for shapes that do not fit.
    pub fn linear(&self, weight: &Tensor) -> Result<Tensor> {
        match self {
            Self::Dense(x) => linear(x, weight, None),
            Self::Sparse(x) => x.matmul(&weight.t()?.contiguous()?),
        }
    }

    /// Rows divided by their Euclidean norm plus `eps`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn normalize_l2(&self, eps: f64) -> Result<Self> {
        Ok(match self {
            Self::Dense(x) => {
                let norms = (x.sqr()?.sum_keepdim(1)?.sqrt()? + eps)?;
                Self::Dense(x.broadcast_div(&norms)?)
            }
            Self::Sparse(x) => Self::Sparse(x.normalize_l2(eps)?),
        })
    }

    /// With the columns of a matrix `[n, k]` behind its own; sparse features take them as constants.
    ///
    /// # Errors
    /// Those of candle, for shapes that do not fit.
    pub fn append_columns(&self, columns: &Tensor) -> Result<Self> {
        Ok(match self {
            Self::Dense(x) => Self::Dense(Tensor::cat(&[x, columns], 1)?),
            Self::Sparse(x) => Self::Sparse(x.append_columns(columns)?),
        })
    }

    /// With the rows of a matrix `[k, d]` below its own; sparse features take them as constants.
    ///
    /// # Errors
    /// Those of candle, for shapes that do not fit.
    pub fn append_rows(&self, rows: &Tensor) -> Result<Self> {
        Ok(match self {
            Self::Dense(x) => Self::Dense(Tensor::cat(&[x, rows], 0)?),
            Self::Sparse(x) => Self::Sparse(x.append_rows(rows)?),
        })
    }

    /// Some rows, in this order; a row may be named often.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] or [`Error::Candle`] for a row that does not exist.
    pub fn select_rows(&self, rows: &[u32]) -> Result<Self> {
        Ok(match self {
            Self::Dense(x) => {
                let rows = Tensor::from_slice(rows, rows.len(), x.device())?;
                Self::Dense(x.index_select(&rows, 0)?)
            }
            Self::Sparse(x) => Self::Sparse(x.select_rows(rows)?),
        })
    }

    /// The dtype that products have.
    pub fn dtype(&self) -> DType {
        match self {
            Self::Dense(x) => x.dtype(),
            Self::Sparse(x) => x.dtype(),
        }
    }

    /// As a dense tensor.
    ///
    /// # Errors
    /// Those of candle.
    pub fn to_dense(&self, device: &Device) -> Result<Tensor> {
        match self {
            Self::Dense(x) => Ok(x.to_device(device)?),
            Self::Sparse(x) => x.to_dense(device),
        }
    }
}

impl From<Tensor> for Features {
    fn from(x: Tensor) -> Self {
        Self::Dense(x)
    }
}

impl From<SparseFeatures> for Features {
    fn from(x: SparseFeatures) -> Self {
        Self::Sparse(x)
    }
}

//! Graphons as step functions.

use crate::generate::from_graphon;
use crate::graph::Graph;
use crate::{Error, RandomStream, Result};
use candle_core::{DType, Device, Tensor};
use faer::Mat;

/// A symmetric function of two positions in `[0, 1]` that is constant on the cells of a `k x k`
/// grid: the probability of an edge between nodes at these positions.
#[derive(Debug, Clone, PartialEq)]
pub struct StepFunction {
    values: Mat<f64>,
}

impl StepFunction {
    /// From a square matrix.
    ///
    /// # Errors
    /// [`Error::Shape`] unless it is square with at least one row, [`Error::NonFinite`].
    pub fn from_tensor(values: &Tensor) -> Result<Self> {
        let rows = values
            .to_device(&Device::Cpu)?
            .to_dtype(DType::F64)?
            .to_vec2::<f64>()?;
        let k = rows.len();
        if k == 0 || rows[0].len() != k {
            return Err(Error::shape(
                "step function",
                values.dims(),
                "[k, k], k >= 1",
            ));
        }
        Self::from_fn(k, |i, j| rows[i][j])
    }

    /// From the value of each cell.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for no cell, [`Error::NonFinite`].
    pub fn from_fn(k: usize, value: impl Fn(usize, usize) -> f64) -> Result<Self> {
        if k == 0 {
            return Err(Error::argument("cells", 0, "at least 1"));
        }
        Self::checked(Mat::from_fn(k, k, value))
    }

    pub(crate) fn checked(values: Mat<f64>) -> Result<Self> {
        let entries = values.col_iter().flat_map(|c| c.iter());
        let count = entries.filter(|v| !v.is_finite()).count();
        if count > 0 {
            let (what, total) = ("a step function", values.nrows() * values.ncols());
            return Err(Error::NonFinite { what, count, total });
        }
        Ok(Self { values })
    }

    /// Number of cells on a side.
    pub fn cells(&self) -> usize {
        self.values.nrows()
    }

    /// The value of cell `(i, j)`, `None` outside.
    pub fn get(&self, i: usize, j: usize) -> Option<f64> {
        let k = self.cells();
        (i < k && j < k).then(|| self.values[(i, j)])
    }

    /// The values, row-major.
    pub fn to_vec(&self) -> Vec<f64> {
        let k = self.cells();
        (0..k * k).map(|p| self.values[(p / k, p % k)]).collect()
    }

    /// The values as `[k, k]`, `f64` on the CPU.
    ///
    /// # Errors
    /// Those of candle.
    pub fn to_tensor(&self) -> Result<Tensor> {
        let k = self.cells();
        Ok(Tensor::from_vec(self.to_vec(), (k, k), &Device::Cpu)?)
    }

    pub(crate) fn matrix(&self) -> &Mat<f64> {
        &self.values
    }

    /// With other cells, by bilinear interpolation between the cells' centers: the new center `j` lies
    /// at `(j + 1/2) k / r - 1/2` of the old ones, and what lies outside takes the border's value. There
    /// is no antialiasing.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for no cell.
    pub fn resize(&self, r: usize) -> Result<Self> {
        if r == 0 {
            return Err(Error::argument("cells", 0, "at least 1"));
        }
        let k = self.cells();
        if r == k {
            return Ok(self.clone());
        }
        let place = |j: usize| {
            let x = ((j as f64 + 0.5) * k as f64 / r as f64 - 0.5).clamp(0.0, (k - 1) as f64);
            let low = (x.floor() as usize).min(k - 1);
            (low, (low + 1).min(k - 1), x - low as f64)
        };
        let at: Vec<(usize, usize, f64)> = (0..r).map(place).collect();
        let v = &self.values;
        let values = Mat::from_fn(r, r, |i, j| {
            let ((i0, i1, s), (j0, j1, t)) = (at[i], at[j]);
            let upper = v[(i0, j0)] * (1.0 - t) + v[(i0, j1)] * t;
            let lower = v[(i1, j0)] * (1.0 - t) + v[(i1, j1)] * t;
            upper * (1.0 - s) + lower * s
        });
        Ok(Self { values })
    }

    /// The mean of all cells: the expected density of its graphs.
    pub fn density(&self) -> f64 {
        let k = self.cells() as f64;
        self.values.col_iter().flat_map(|c| c.iter()).sum::<f64>() / (k * k)
    }

    /// The root of the mean squared difference of two step functions, over the finer grid.
    ///
    /// # Errors
    /// Those of [`resize`](Self::resize).
    pub fn distance(&self, other: &StepFunction) -> Result<f64> {
        let k = self.cells().max(other.cells());
        let (a, b) = (self.resize(k)?, other.resize(k)?);
        let squares = (a.values - b.values).norm_l2();
        Ok(squares / k as f64)
    }

    /// A graph for each size: uniform positions, and each pair connected with the probability of its
    /// cell.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for cells outside `[0, 1]`.
    pub fn sample_graphs(&self, sizes: &[usize], rng: &mut RandomStream) -> Result<Vec<Graph>> {
        let k = self.cells();
        let cell = |u: f64| ((u * k as f64) as usize).min(k - 1);
        let value = |u, v| self.values[(cell(u), cell(v))];
        let one = |n: &usize| Ok(from_graphon(*n, value, rng)?.0);
        sizes.iter().map(one).collect()
    }

    /// `sum_(i < j) a_ij ln W_ij + (1 - a_ij) ln (1 - W_ij)` of a graph whose nodes, by descending
    /// degree, lie at `(i + 1/2) / n`; probabilities are kept `1e-6` away from 0 and 1.
    ///
    /// # Errors
    /// Those of [`Aligned::new`](super::Aligned::new).
    pub fn log_likelihood(&self, graph: &Graph) -> Result<f64> {
        let aligned = super::Aligned::new(graph)?;
        let n = aligned.nodes();
        let resized = self.resize(n)?;
        let mut sum = 0.0;
        for j in 0..n {
            for i in 0..j {
                let p = resized.values[(i, j)].clamp(1e-6, 1.0 - 1e-6);
                let present = aligned.adjacency()[(i, j)] != 0.0;
                sum += if present { p.ln() } else { (1.0 - p).ln() };
            }
        }
        Ok(sum)
    }
}

/// One of the 13 graphons that estimators are tried on (Xu et al., AAAI 2021, table 1), on a grid of
/// `r` cells by their centers: 0 `uv`, 1 `exp(-u^0.7 - v^0.7)`, 2 `(u^2 + v^2 + sqrt u + sqrt v) / 4`,
/// 3 `(u + v) / 2`, 4 `1 / (1 + exp(-2 (u^2 + v^2)))`, 5 `1 / (1 + exp(-max^2 - min^4))`,
/// 6 `exp(-max^0.75)`, 7 `exp(-(min + sqrt u + sqrt v) / 2)`, 8 `ln(1 + max)`, 9 `|u - v|`,
/// 10 `1 - |u - v|`, 11 two blocks inside (0.8), 12 two blocks across (0.8).
///
/// # Errors
/// [`Error::InvalidArgument`] for another kind or no cell.
pub fn synthesize_graphon(kind: usize, r: usize) -> Result<StepFunction> {
    let f: fn(f64, f64) -> f64 = match kind {
        0 => |u, v| u * v,
        1 => |u, v| (-(u.powf(0.7) + v.powf(0.7))).exp(),
        2 => |u, v| 0.25 * (u * u + v * v + u.sqrt() + v.sqrt()),
        3 => |u, v| 0.5 * (u + v),
        4 => |u, v| 1.0 / (1.0 + (-2.0 * (u * u + v * v)).exp()),
        5 => |u, v| 1.0 / (1.0 + (-u.max(v).powi(2) - u.min(v).powi(4)).exp()),
        6 => |u, v| (-u.max(v).powf(0.75)).exp(),
        7 => |u, v| (-0.5 * (u.min(v) + u.sqrt() + v.sqrt())).exp(),
        8 => |u, v| (1.0 + u.max(v)).ln(),
        9 => |u, v| (u - v).abs(),
        10 => |u, v| 1.0 - (u - v).abs(),
        11 => |u, v| if (u < 0.5) == (v < 0.5) { 0.8 } else { 0.0 },
        12 => |u, v| if (u < 0.5) == (v < 0.5) { 0.0 } else { 0.8 },
        other => return Err(Error::argument("kind", other, "0 to 12")),
    };
    let at = |i: usize| (i as f64 + 0.5) / r as f64;
    StepFunction::from_fn(r, |i, j| f(at(i), at(j)))
}

//! Sparse plans.

use super::exact::network_simplex;
use super::projection::Entry;
use super::OtProblem;
use crate::error::check;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};

/// A transport plan, stored by columns.
#[derive(Debug, Clone, PartialEq)]
pub struct SparsePlan {
    rows: usize,
    starts: Vec<usize>,
    entries: Vec<Entry>,
}

impl SparsePlan {
    /// A plan of `rows` rows from its columns; entries of zero are left out.
    pub(super) fn from_columns<C: AsRef<[Entry]>>(
        rows: usize,
        columns: impl Iterator<Item = C> + Clone,
    ) -> Self {
        let most = columns.clone().map(|column| column.as_ref().len()).sum();
        let mut plan = Self {
            rows,
            starts: vec![0],
            entries: Vec::with_capacity(most),
        };
        for column in columns {
            let from = plan.entries.len();
            let some = column.as_ref().iter().filter(|(_, t)| *t != 0.0);
            plan.entries.extend(some);
            plan.entries[from..].sort_unstable_by_key(|(i, _)| *i);
            plan.starts.push(plan.entries.len());
        }
        plan
    }

    /// Rows and columns.
    pub fn shape(&self) -> (usize, usize) {
        (self.rows, self.starts.len() - 1)
    }

    /// Number of non-zeros.
    pub fn nnz(&self) -> usize {
        self.entries.len()
    }

    /// Row index and mass of each non-zero of column `j`, by ascending row.
    pub fn column(&self, j: usize) -> &[(u32, f64)] {
        &self.entries[self.starts[j]..self.starts[j + 1]]
    }

    /// Non-zeros of each column.
    pub fn nnz_per_column(&self) -> Vec<usize> {
        self.starts.windows(2).map(|w| w[1] - w[0]).collect()
    }

    /// Sums of the rows.
    pub fn row_sums(&self) -> Vec<f64> {
        let mut sums = vec![0.0; self.rows];
        for &(i, t) in &self.entries {
            sums[i as usize] += t;
        }
        sums
    }

    /// Sums of the columns.
    pub fn column_sums(&self) -> Vec<f64> {
        let columns = self.starts.len() - 1;
        let sum = |j| self.column(j).iter().map(|(_, t)| t).sum();
        (0..columns).map(sum).collect()
    }

    /// `<T, C>`.
    ///
    /// # Errors
    /// [`Error::Shape`] for a problem of another size.
    pub fn cost(&self, problem: &OtProblem) -> Result<f64> {
        self.fits(problem)?;
        Ok(self.cost_of(problem))
    }

    pub(super) fn cost_of(&self, problem: &OtProblem) -> f64 {
        (0..problem.b().len())
            .map(|j| {
                let cost = problem.column(j);
                let term = |(i, t): &(u32, f64)| t * cost[*i as usize];
                self.column(j).iter().map(term).sum::<f64>()
            })
            .sum()
    }

    /// `|T 1 - a|_1 + |T' 1 - b|_1`.
    ///
    /// # Errors
    /// [`Error::Shape`] for a problem of another size.
    pub fn marginal_error(&self, problem: &OtProblem) -> Result<f64> {
        self.fits(problem)?;
        let gap = |sums: &[f64], wanted: &[f64]| -> f64 {
            sums.iter().zip(wanted).map(|(s, w)| (s - w).abs()).sum()
        };
        Ok(gap(&self.row_sums(), problem.a()) + gap(&self.column_sums(), problem.b()))
    }

    /// Row-major values, zeros included.
    pub fn to_dense(&self) -> Vec<f64> {
        let columns = self.starts.len() - 1;
        let mut out = vec![0.0; self.rows * columns];
        for j in 0..columns {
            for &(i, t) in self.column(j) {
                out[i as usize * columns + j] = t;
            }
        }
        out
    }

    /// The plan as a tensor `[m, n]`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn to_tensor(&self, dtype: DType, device: &Device) -> Result<Tensor> {
        let dense = Tensor::from_vec(self.to_dense(), self.shape(), &Device::Cpu)?;
        Ok(dense.to_dtype(dtype)?.to_device(device)?)
    }

    fn fits(&self, problem: &OtProblem) -> Result<()> {
        let (m, n) = self.shape();
        check::length("the plan's rows", m, problem.a().len())?;
        check::length("the plan's columns", n, problem.b().len())
    }
}

/// The cheapest plan with the right marginals on the support of `plan`: what makes a plan feasible
/// that misses its marginals at ties of the `k` largest entries.
///
/// # Errors
/// [`Error::Infeasible`] where the support carries no such plan.
pub fn restrict_to_support(problem: &OtProblem, plan: &SparsePlan) -> Result<SparsePlan> {
    plan.fits(problem)?;
    let (m, n) = plan.shape();
    let mut cost = vec![f64::INFINITY; m * n];
    for j in 0..n {
        for &(i, _) in plan.column(j) {
            cost[i as usize * n + j] = problem.column(j)[i as usize];
        }
    }
    let restricted =
        OtProblem::from_slices(problem.a(), problem.b(), &cost).map_err(|e| match e {
            Error::Infeasible { certificate, .. } => Error::Infeasible {
                problem: "transport on the support of a plan",
                certificate,
                multipliers: vec![],
            },
            other => other,
        })?;
    Ok(network_simplex(&restricted)?.plan)
}

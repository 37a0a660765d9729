//! The auction algorithm for assignments (Bertsekas), with scaled increments: columns bid for rows.

use super::exact::Exact;
use super::plan::SparsePlan;
use super::OtProblem;
use crate::{Error, Result};

/// The last increment, relative to the largest cost.
const FINEST: f64 = 1e-13;
/// By what the increment is divided from one round to the next.
const FINER: f64 = 5.0;
const NOBODY: u32 = u32::MAX;

/// An assignment within `FINEST` times the largest cost of the optimum, for as many rows as columns of
/// equal weights.
pub(super) fn auction(problem: &OtProblem) -> Result<Exact> {
    let (weight, scale) = equal_weights(problem)?;
    let n = problem.a().len();
    let mut market = Market {
        problem,
        prices: vec![0.0; n],
        owner: vec![NOBODY; n],
        bids: 0,
    };
    let mut increment = scale / 2.0;
    // A round of its own where all costs are zero.
    market.round(increment.max(f64::MIN_POSITIVE))?;
    while increment > FINEST * scale {
        increment = (increment / FINER).max(FINEST * scale);
        market.round(increment)?;
    }
    let beta: Vec<f64> = (0..n).map(|j| -market.best(j).1).collect();
    let alpha: Vec<f64> = market.prices.iter().map(|p| -p).collect();
    let mut columns = vec![vec![]; n];
    for (i, &j) in market.owner.iter().enumerate() {
        columns[j as usize].push((i as u32, weight));
    }
    let sum: f64 = alpha.iter().chain(&beta).sum();
    Ok(Exact {
        plan: SparsePlan::from_columns(n, columns.into_iter()),
        value: weight * sum,
        alpha,
        beta,
        pivots: market.bids,
    })
}

/// The weight of all rows and columns, and the largest absolute cost.
fn equal_weights(problem: &OtProblem) -> Result<(f64, f64)> {
    let (a, b) = (problem.a(), problem.b());
    let weight = a[0];
    let same = |w: &f64| (w - weight).abs() <= 1e-12 * weight;
    if a.len() != b.len() || !a.iter().all(same) || !b.iter().all(same) {
        return Err(Error::unsupported(
            "the auction",
            "with unequal weights or sides: take the network simplex",
        ));
    }
    if let Some(p) = problem.cost.iter().position(|c| !c.is_finite()) {
        let pair = (p % a.len(), p / a.len());
        return Err(Error::unsupported(
            "the auction",
            format!("with a forbidden pair such as {pair:?}: take the network simplex"),
        ));
    }
    let scale = problem.cost.iter().fold(0.0f64, |s, c| s.max(c.abs()));
    Ok((weight, scale))
}

struct Market<'a> {
    problem: &'a OtProblem,
    /// Of the rows.
    prices: Vec<f64>,
    /// The column that has each row.
    owner: Vec<u32>,
    bids: usize,
}

impl Market<'_> {
    /// The cheapest row of column `j` at the prices, what it is worth, and the second best worth.
    fn best(&self, j: usize) -> (usize, f64, f64) {
        let (mut row, mut first, mut second) = (0, f64::NEG_INFINITY, f64::NEG_INFINITY);
        for (i, (c, p)) in self.problem.column(j).iter().zip(&self.prices).enumerate() {
            let worth = -c - p;
            if worth > second {
                if worth > first {
                    (row, second, first) = (i, first, worth);
                } else {
                    second = worth;
                }
            }
        }
        (row, first, second)
    }

    /// All columns without a row bid, until each has one; prices stay from the last round.
    fn round(&mut self, increment: f64) -> Result<()> {
        let n = self.owner.len();
        self.owner.fill(NOBODY);
        let mut without: Vec<u32> = (0..n as u32).rev().collect();
        let most = self.bids + 1000 * n * n + 1_000_000;
        while let Some(j) = without.pop() {
            let (row, first, second) = self.best(j as usize);
            // A single row has no second.
            let lead = if n > 1 { first - second } else { 0.0 };
            self.prices[row] += lead + increment;
            if self.owner[row] != NOBODY {
                without.push(self.owner[row]);
            }
            self.owner[row] = j;
            self.bids += 1;
            if self.bids > most {
                return Err(Error::NotConverged {
                    solver: "the auction",
                    iterations: self.bids,
                    residual: increment,
                    tolerance: increment,
                });
            }
        }
        Ok(())
    }
}

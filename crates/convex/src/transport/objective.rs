//! The dual and the semi-dual with their gradients: one pass over the columns of the cost.

use super::exponential::of_differences;
use super::plan::SparsePlan;
use super::projection::{candidates, keep_largest, threshold, Entry, Peaks};
use super::{OtProblem, OtReg};
use crate::error::check;
use crate::linalg::axpy;
use crate::Result;
use rayon::prelude::*;
use std::ops::Range;

/// The semi-dual at a point.
#[derive(Debug, Clone)]
pub struct SemiDualValue {
    /// `S(alpha)`.
    pub value: f64,
    /// `a - T 1`.
    pub grad: Vec<f64>,
    /// The derivative by `b`: the other potential that belongs to `alpha`.
    pub beta: Vec<f64>,
    /// The maximizing plan; its columns sum to `b`.
    pub plan: SparsePlan,
}

/// The dual at a point.
#[derive(Debug, Clone)]
pub struct DualValue {
    /// `D(alpha, beta)`.
    pub value: f64,
    /// `a - T 1`.
    pub grad_alpha: Vec<f64>,
    /// `b - T' 1`.
    pub grad_beta: Vec<f64>,
    /// The maximizing plan.
    pub plan: SparsePlan,
}

/// `S(alpha)`, its gradient and its plan; a subgradient where the maximizer is not unique.
///
/// # Errors
/// Those of [`OtReg::validate`]; [`Error::Shape`](crate::Error::Shape) and
/// [`Error::NonFinite`](crate::Error::NonFinite) for `alpha`.
pub fn semi_dual(problem: &OtProblem, reg: &OtReg, alpha: &[f64]) -> Result<SemiDualValue> {
    reg.validate()?;
    check::length("alpha", alpha.len(), problem.a().len())?;
    check::finite("alpha", alpha)?;
    let mut pass = Pass::new(problem, *reg);
    pass.semi_dual(problem, alpha, true);
    Ok(SemiDualValue {
        value: pass.value,
        grad: pass.grad_alpha.clone(),
        beta: pass.column_values(),
        plan: pass.plan(problem),
    })
}

/// `D(alpha, beta)`, its gradients and its plan.
///
/// # Errors
/// As [`semi_dual`], and [`Error::Unsupported`](crate::Error::Unsupported) for [`OtReg::None`], whose
/// dual is a linear program.
pub fn dual(problem: &OtProblem, reg: &OtReg, alpha: &[f64], beta: &[f64]) -> Result<DualValue> {
    reg.validate()?;
    has_dual(reg)?;
    check::length("alpha", alpha.len(), problem.a().len())?;
    check::length("beta", beta.len(), problem.b().len())?;
    check::finite("alpha", alpha)?;
    check::finite("beta", beta)?;
    let mut pass = Pass::new(problem, *reg);
    pass.dual(problem, alpha, beta, true);
    Ok(DualValue {
        value: pass.value,
        grad_alpha: pass.grad_alpha.clone(),
        grad_beta: pass.column_values(),
        plan: pass.plan(problem),
    })
}

pub(super) fn has_dual(reg: &OtReg) -> Result<()> {
    if *reg == OtReg::None {
        return Err(crate::Error::unsupported(
            "the smooth dual",
            "without a regularizer: use the semi-dual or the network simplex",
        ));
    }
    Ok(())
}

/// Columns are cut into at most this many pieces, whatever the number of threads: sums are then made
/// in the same order.
const PIECES: usize = 16;

/// A run of columns with its buffers.
#[derive(Debug, Default)]
struct Piece {
    columns: Range<usize>,
    grad: Vec<f64>,
    column: Column,
    /// The plan's columns, one after the other, as far as asked for.
    plan: Vec<Entry>,
    starts: Vec<usize>,
    /// Of each column: the potential (semi-dual) or the gradient (dual).
    column_values: Vec<f64>,
    value: f64,
}

/// One column of the plan: the entries, or all of `x` where it is dense.
#[derive(Debug, Default)]
struct Column {
    x: Vec<f64>,
    entries: Vec<Entry>,
    dense: bool,
    peaks: Peaks,
}

/// Buffers for evaluating one problem many times.
pub(super) struct Pass {
    reg: OtReg,
    pieces: Vec<Piece>,
    /// The value of the last evaluation.
    pub value: f64,
    /// The gradient by `alpha` of the last evaluation.
    pub grad_alpha: Vec<f64>,
}

impl Pass {
    pub(super) fn new(problem: &OtProblem, reg: OtReg) -> Self {
        let (m, n) = (problem.a().len(), problem.b().len());
        let width = n.div_ceil(PIECES);
        let piece = |first: usize| Piece {
            columns: first..(first + width).min(n),
            grad: vec![0.0; m],
            column: Column {
                x: vec![0.0; m],
                ..Column::default()
            },
            column_values: vec![0.0; width.min(n - first)],
            ..Piece::default()
        };
        Self {
            reg,
            pieces: (0..n).step_by(width).map(piece).collect(),
            value: 0.0,
            grad_alpha: vec![0.0; m],
        }
    }

    /// The potential of each column after [`semi_dual`](Self::semi_dual), its gradient after
    /// [`dual`](Self::dual).
    pub(super) fn column_values(&self) -> Vec<f64> {
        let values = |p: &Piece| p.column_values.clone();
        self.pieces.iter().flat_map(values).collect()
    }

    /// The plan of the last evaluation that kept it.
    pub(super) fn plan(&self, problem: &OtProblem) -> SparsePlan {
        let columns = self.pieces.iter().flat_map(|piece| {
            let ends = piece.starts.windows(2);
            ends.map(|w| &piece.plan[w[0]..w[1]])
        });
        SparsePlan::from_columns(problem.a().len(), columns)
    }

    /// Evaluates `S`. Rows with `alpha = -inf` take no part; columns without mass neither.
    pub(super) fn semi_dual(&mut self, problem: &OtProblem, alpha: &[f64], keep: bool) {
        let reg = self.reg;
        self.run(problem, alpha, keep, |column, j| {
            let (b, cost) = (problem.b()[j], problem.column(j));
            let max = column.peaks.scan(alpha, cost);
            if b == 0.0 {
                column.clear();
                return (0.0, -max);
            }
            let (value, beta) = column.semi_dual(&reg, alpha, cost, max, b);
            (-b * value, beta)
        });
    }

    /// Evaluates `D`, likewise.
    pub(super) fn dual(&mut self, problem: &OtProblem, alpha: &[f64], beta: &[f64], keep: bool) {
        let reg = self.reg;
        self.run(problem, alpha, keep, |column, j| {
            let b = problem.b()[j];
            if b == 0.0 {
                column.clear();
                return (0.0, 0.0);
            }
            let (conjugate, mass) = column.dual(&reg, alpha, problem.column(j), beta[j]);
            (beta[j] * b - conjugate, b - mass)
        });
    }

    /// Runs `one` over all columns and gathers what it leaves: the column's share of the value and
    /// the column's own number.
    fn run(
        &mut self,
        problem: &OtProblem,
        alpha: &[f64],
        keep: bool,
        one: impl Fn(&mut Column, usize) -> (f64, f64) + Sync,
    ) {
        let work = |piece: &mut Piece| {
            piece.value = 0.0;
            piece.grad.fill(0.0);
            piece.plan.clear();
            piece.starts.clear();
            piece.starts.push(0);
            for (place, j) in piece.columns.clone().enumerate() {
                let (value, own) = one(&mut piece.column, j);
                piece.value += value;
                piece.column_values[place] = own;
                piece.column.subtract_from(&mut piece.grad);
                if keep {
                    piece.column.append_to(&mut piece.plan);
                    piece.starts.push(piece.plan.len());
                }
            }
        };
        // A small problem is done before another thread wakes up.
        if problem.cost.len() < 1 << 13 {
            self.pieces.iter_mut().for_each(work);
        } else {
            self.pieces.par_iter_mut().for_each(work);
        }
        let a = problem.a();
        self.grad_alpha.copy_from_slice(a);
        let with_mass = alpha.iter().zip(a).filter(|(_, a)| **a > 0.0);
        self.value = with_mass.map(|(x, a)| x * a).sum();
        for piece in &self.pieces {
            self.value += piece.value;
            axpy(1.0, &piece.grad, &mut self.grad_alpha);
        }
    }
}

impl Column {
    fn clear(&mut self) {
        self.dense = false;
        self.entries.clear();
    }

    fn subtract_from(&self, grad: &mut [f64]) {
        if self.dense {
            for (g, t) in grad.iter_mut().zip(&self.x) {
                *g -= t;
            }
        } else {
            for &(i, t) in &self.entries {
                grad[i as usize] -= t;
            }
        }
    }

    fn append_to(&self, plan: &mut Vec<Entry>) {
        if self.dense {
            plan.extend(self.x.iter().enumerate().map(|(i, t)| (i as u32, *t)));
        } else {
            plan.extend_from_slice(&self.entries);
        }
    }

    /// From `x = alpha - c`, scanned, whose largest entry is `max`, to the column `b y`; gives
    /// `max_y (<x, y> - Omega(b y) / b)` and the derivative of the semi-dual by `b`.
    fn semi_dual(
        &mut self,
        reg: &OtReg,
        alpha: &[f64],
        cost: &[f64],
        max: f64,
        b: f64,
    ) -> (f64, f64) {
        self.clear();
        match *reg {
            OtReg::None => {
                self.entries.push((first_of(alpha, cost, max), b));
                (max, -max)
            }
            OtReg::Entropic { gamma } => {
                self.dense = true;
                let sum = of_differences(alpha, cost, (max, 1.0 / gamma), &mut self.x);
                self.x.iter_mut().for_each(|x| *x *= b / sum);
                let soft = max + gamma * sum.ln();
                let own = gamma * b.ln();
                (soft - own, own + gamma - soft)
            }
            OtReg::Quadratic { gamma } => self.project(usize::MAX, (alpha, cost), max, (gamma, b)),
            OtReg::KSparse { gamma, k } => self.project(k, (alpha, cost), max, (gamma, b)),
        }
    }

    fn project(
        &mut self,
        k: usize,
        (alpha, cost): (&[f64], &[f64]),
        max: f64,
        (gamma, b): (f64, f64),
    ) -> (f64, f64) {
        let size = gamma * b;
        let floor = self.peaks.floor(k, size);
        self.peaks.above(alpha, cost, floor, &mut self.entries);
        if self.entries.is_empty() {
            // The floor is rounded to `max`: all of the mass goes to the largest.
            self.entries.push((first_of(alpha, cost, max), max));
        }
        keep_largest(&mut self.entries, k);
        // Distances from the largest keep their digits however large the potentials are.
        self.entries.iter_mut().for_each(|(_, x)| *x -= max);
        let threshold = threshold(&mut self.entries, size);
        let (mut linear, mut square) = (0.0, 0.0);
        for (_, x) in &mut self.entries {
            let y = (*x - threshold).max(0.0) / size;
            linear += *x * y;
            square += y * y;
            *x = b * y;
        }
        (max + linear - 0.5 * size * square, -(max + threshold))
    }

    /// From `x = alpha - c` to the column `t`; gives `max_t (<x + beta, t> - Omega(t))` and `sum t`.
    fn dual(&mut self, reg: &OtReg, alpha: &[f64], cost: &[f64], beta: f64) -> (f64, f64) {
        self.clear();
        let (gamma, k) = match *reg {
            // Refused before any pass.
            OtReg::None => return (f64::NAN, f64::NAN),
            OtReg::Entropic { gamma } => {
                self.dense = true;
                let shift = (gamma - beta, 1.0 / gamma);
                let sum = of_differences(alpha, cost, shift, &mut self.x);
                return (gamma * sum, sum);
            }
            OtReg::Quadratic { gamma } => (gamma, usize::MAX),
            OtReg::KSparse { gamma, k } => (gamma, k),
        };
        candidates(alpha, cost, -beta, &mut self.entries);
        keep_largest(&mut self.entries, k);
        let (mut square, mut sum) = (0.0, 0.0);
        for (_, x) in &mut self.entries {
            let value = *x + beta;
            square += value * value;
            *x = value / gamma;
            sum += *x;
        }
        (0.5 * square / gamma, sum)
    }
}

/// The first row where `alpha - c` is `max`.
fn first_of(alpha: &[f64], cost: &[f64], max: f64) -> u32 {
    let mut pairs = alpha.iter().zip(cost);
    pairs.position(|(a, c)| a - c == max).unwrap_or(0) as u32
}

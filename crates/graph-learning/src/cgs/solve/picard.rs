//! Iteration from zero until the change is small.

use super::system::{Change, System};
use super::SolveReport;
use crate::cgs::StopRule;
use crate::sparse::{by_rows, vectorized, Scalar};
use std::ops::Range;
use std::sync::{Mutex, PoisonError};
use tensor_core::kernels::Real;

/// The rule of one iteration.
#[derive(Clone, Copy)]
pub(super) struct Limits {
    pub tol: f64,
    pub max_iter: Option<usize>,
    pub stop: StopRule,
}

/// Iterates the rows of one graph from zero; serial, for graphs of a batch that run side by side.
pub(super) fn iterate_graph<T: Scalar>(
    system: &System<T>,
    rows: Range<usize>,
    post: &(impl Fn(usize, T) -> T + Sync),
    limits: Limits,
) -> (Vec<T>, SolveReport) {
    let step = |h: &[T], next: &mut [T]| -> Change {
        vectorized(
            #[inline(always)]
            || system.apply(rows.clone(), h, rows.start, post, next),
        )
    };
    picard(system, rows.clone(), limits, step)
}

/// Iterates all rows as one graph, in parallel.
pub(super) fn iterate_whole<T: Scalar>(
    system: &System<T>,
    post: &(impl Fn(usize, T) -> T + Sync),
    limits: Limits,
) -> (Vec<T>, SolveReport) {
    let changes = Mutex::new(Vec::new());
    let step = |h: &[T], next: &mut [T]| -> Change {
        let new = by_rows::<T>(system.csr, system.heads, |rows, out| {
            let start = rows.start;
            let change = vectorized(
                #[inline(always)]
                || system.apply(rows, h, 0, post, out),
            );
            changes
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push((start, change));
        });
        next.copy_from_slice(&new);
        // In the order of the rows, so that the sum does not depend on the threads.
        let mut changes = changes.lock().unwrap_or_else(PoisonError::into_inner);
        changes.sort_by_key(|(start, _)| *start);
        let mut total = system.no_change();
        changes.drain(..).for_each(|(_, change)| total.add(&change));
        total
    };
    picard(system, 0..system.csr.rows(), limits, step)
}

fn picard<T: Scalar>(
    system: &System<T>,
    rows: Range<usize>,
    limits: Limits,
    mut step: impl FnMut(&[T], &mut [T]) -> Change,
) -> (Vec<T>, SolveReport) {
    let m = system.heads;
    let mut h = vec![<T as Real>::ZERO; rows.len() * m];
    let mut next = h.clone();
    let scale = system.scale(&rows);
    let mut max_iter = limits.max_iter;
    let mut report = SolveReport {
        iterations: 0,
        residual: 0.0,
        converged: true,
    };
    if rows.is_empty() {
        return (h, report);
    }
    loop {
        let change = step(&h, &mut next);
        std::mem::swap(&mut h, &mut next);
        let size = change.in_norm(system.contracts);
        report.residual = change.largest;
        let goal = match limits.stop {
            StopRule::MaxNorm => limits.tol * scale,
            StopRule::FrobeniusAbs => limits.tol / system.frobenius_by_norm(rows.len()),
        };
        report.converged = match limits.stop {
            StopRule::MaxNorm => size <= goal,
            StopRule::FrobeniusAbs => change.squares.sqrt() < limits.tol,
        };
        let cap = *max_iter.get_or_insert_with(|| bound(system.gamma, goal, size));
        // What was computed last is the extra application.
        if report.converged || report.iterations >= cap || !size.is_finite() {
            return (h, report);
        }
        report.iterations += 1;
    }
}

/// The iterations that a contraction by `gamma` needs at most from its first step to a `goal`, both in
/// the norm in which it contracts.
fn bound(gamma: f64, goal: f64, first: f64) -> usize {
    if !(first.is_finite() && first > goal) {
        return 1;
    }
    // The change after k steps is at most gamma^k times the first one; rounding gets a few more.
    ((goal / first).ln() / gamma.ln()).ceil() as usize + 2
}

//! The fixed point and its implicit gradient, on compressed rows.

use super::bicgstab::bicgstab;
use super::{Contraction, Orientation, Solver, StopRule};
use crate::graph::{Csr, Graph};
use crate::sparse::{by_rows, real, sddmm, vectorized, EdgeOp, Scalar};
use crate::{Error, Result};
use candle_core::{bail, CpuStorage, CustomOp2, DType, Layout, Shape, Tensor};
use faer::linalg::solvers::Solve;
use rayon::prelude::*;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};
use tensor_core::kernels::Real;

/// What a solver found, over all graphs and heads of a batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SolveReport {
    /// Iterations of the slowest graph (and head); 0 for a direct solution.
    pub iterations: usize,
    /// `max |f(H) - H|` over all nodes and heads when the solver stopped (relative to the right-hand
    /// side for [`Solver::BiCgStab`]).
    pub residual: f64,
    /// Whether every graph met its tolerance.
    pub converged: bool,
}

/// How a fixed point is solved and differentiated.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FixedPoint {
    /// The contraction.
    pub gamma: f64,
    /// The function `phi`.
    pub activation: Contraction,
    /// Where an edge stands in the matrix.
    pub orientation: Orientation,
    /// How the fixed point is found.
    pub solver: Solver,
    /// How the implicit gradient is found.
    pub backward: Solver,
}

/// The fixed point `H = phi(gamma A H + B)` of each head: weights `[E, m]` on the edges and biases
/// `[n, m]` give `H` `[n, m]`, differentiable in both (once: the implicit gradient is a constant for a
/// second derivative).
///
/// `ptr` are the borders of the graphs of a batch ([`GraphBatch::ptr`](crate::GraphBatch::ptr)), which
/// are solved one by one; the whole graph is one without it. The rows' sums of `|A|` must be at most
/// 1, as [`contracting_edge_weights`](super::contracting_edge_weights) makes them; otherwise the
/// iteration may not converge, and the report says so. An implicit gradient that does not converge is
/// a `tracing` warning.
///
/// # Errors
/// [`Error::Shape`], [`Error::DType`] unless both are `f32` or both `f64`, [`Error::NonFinite`] for
/// weights or biases that are not finite, [`Error::InvalidConfig`] for bad settings,
/// [`Error::Unsupported`] off the CPU, for graphs between two sets of nodes, and for a linear solver
/// with an activation.
pub fn fixed_point(
    graph: &Graph,
    ptr: Option<&[u32]>,
    weights: &Tensor,
    bias: &Tensor,
    how: FixedPoint,
) -> Result<(Tensor, SolveReport)> {
    check(graph, ptr, weights, bias, how)?;
    let (weights, bias) = (weights.contiguous()?, bias.contiguous()?);
    let ptr: Vec<usize> = match ptr {
        Some(ptr) => ptr.iter().map(|p| *p as usize).collect(),
        None => vec![0, graph.num_nodes()],
    };
    let node = |value, report| {
        let op = Implicit {
            graph: graph.clone(),
            ptr: ptr.clone(),
            how,
            value: Mutex::new(Some(value)),
        };
        Ok((weights.apply_op2(&bias, op)?, report))
    };
    match bias.dtype() {
        DType::F32 => {
            let (h, report) = forward::<f32>(graph, &ptr, &weights, &bias, how)?;
            node((CpuStorage::F32(h), bias.shape().clone()), report)
        }
        _ => {
            let (h, report) = forward::<f64>(graph, &ptr, &weights, &bias, how)?;
            node((CpuStorage::F64(h), bias.shape().clone()), report)
        }
    }
}

fn check(
    graph: &Graph,
    ptr: Option<&[u32]>,
    weights: &Tensor,
    bias: &Tensor,
    how: FixedPoint,
) -> Result<()> {
    graph.require_square("a fixed point")?;
    if !(how.gamma > 0.0 && how.gamma < 1.0) {
        return Err(Error::config(
            "FixedPoint::gamma",
            how.gamma,
            "a number in (0, 1)",
        ));
    }
    how.activation.validate()?;
    how.solver.validate()?;
    how.backward.validate()?;
    if how.activation != Contraction::Identity && !matches!(how.solver, Solver::Iterate { .. }) {
        return Err(Error::unsupported(
            "a linear solver",
            format!("with {:?}", how.activation),
        ));
    }
    let n = graph.num_nodes();
    let heads = match *bias.dims() {
        [rows, heads] if rows == n && heads > 0 => heads,
        _ => return Err(Error::shape("bias", bias.dims(), format!("[{n}, heads]"))),
    };
    if weights.dims() != [graph.num_edges(), heads] {
        let expected = format!("[{}, {heads}]", graph.num_edges());
        return Err(Error::shape("edge weights", weights.dims(), expected));
    }
    if weights.dtype() != bias.dtype() || !matches!(bias.dtype(), DType::F32 | DType::F64) {
        let expected = format!("{:?}, of f32 and f64", bias.dtype());
        return Err(Error::dtype("edge weights", weights.dtype(), expected));
    }
    if !(bias.device().is_cpu() && weights.device().is_cpu()) {
        return Err(Error::unsupported("a fixed point", "outside the CPU"));
    }
    if let Some(ptr) = ptr {
        let whole = ptr.first() == Some(&0) && ptr.last() == Some(&(n as u32));
        if !whole || ptr.windows(2).any(|w| w[0] > w[1]) {
            let expected = format!("borders from 0 to {n} that do not decrease");
            return Err(Error::argument("ptr", format!("{ptr:?}"), expected));
        }
    }
    Ok(())
}

/// The norm in which a system contracts by `gamma`.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Contracts {
    /// `max |h|`: rows of `A` add up to at most 1. Changes are measured against the largest bias, but not
    /// against less than 1.
    InMaximum,
    /// `sum |h|` over the nodes of a head, the largest of the heads: columns of the transpose add up to
    /// at most 1, its rows to as much as a node has neighbors. Changes are measured against the biases
    /// alone: a loss that is a mean has gradients far below 1, and they need their digits too.
    InSums,
}

/// How far one application of the map went.
struct Change {
    /// Of a single number.
    largest: f64,
    squares: f64,
    /// Of all numbers of each head; empty for a system that contracts in the maximum.
    sums: Vec<f64>,
}

impl Change {
    fn add(&mut self, other: &Self) {
        self.largest = larger(self.largest, other.largest);
        self.squares += other.squares;
        let pairs = self.sums.iter_mut().zip(&other.sums);
        pairs.for_each(|(sum, other)| *sum += other);
    }

    fn in_norm(&self, contracts: Contracts) -> f64 {
        match contracts {
            Contracts::InMaximum => self.largest,
            Contracts::InSums => self.sums.iter().copied().fold(0.0, larger),
        }
    }
}

/// The rows and columns of one solve: `A` or its transpose, with its weights in row order.
struct System<'a, T> {
    csr: &'a Csr,
    /// `gamma w`, `[E, m]`, in the order of the rows.
    weights: Vec<T>,
    /// Biases, `[n, m]`.
    bias: &'a [T],
    heads: usize,
    gamma: f64,
    contracts: Contracts,
}

impl<'a, T: Scalar> System<'a, T> {
    fn new(csr: &'a Csr, weights: &[T], bias: &'a [T], heads: usize, gamma: f64) -> Self {
        let factor: T = real(gamma);
        let mut ordered = Vec::with_capacity(weights.len());
        for e in csr.perm() {
            let row = &weights[*e as usize * heads..][..heads];
            ordered.extend(row.iter().map(|w| factor * *w));
        }
        Self {
            csr,
            weights: ordered,
            bias,
            heads,
            gamma,
            contracts: Contracts::InMaximum,
        }
    }

    fn no_change(&self) -> Change {
        let heads = match self.contracts {
            Contracts::InMaximum => 0,
            Contracts::InSums => self.heads,
        };
        Change {
            largest: 0.0,
            squares: 0.0,
            sums: vec![0.0; heads],
        }
    }

    /// How many times the norm in which the system contracts the Frobenius norm can be.
    fn frobenius_by_norm(&self, rows: usize) -> f64 {
        match self.contracts {
            Contracts::InMaximum => ((rows * self.heads) as f64).sqrt(),
            Contracts::InSums => (self.heads as f64).sqrt(),
        }
    }

    /// What changes of the rows are measured against.
    fn scale(&self, rows: &Range<usize>) -> f64 {
        let bias = &self.bias[rows.start * self.heads..rows.end * self.heads];
        match self.contracts {
            Contracts::InMaximum => {
                let sizes = bias.iter().map(|b| Real::to_f64(Real::abs(*b)));
                sizes.fold(1.0, f64::max)
            }
            Contracts::InSums => {
                let mut sums = vec![0.0; self.heads];
                for row in bias.chunks_exact(self.heads) {
                    let pairs = sums.iter_mut().zip(row);
                    pairs.for_each(|(s, b)| *s += Real::to_f64(Real::abs(*b)));
                }
                sums.into_iter().fold(0.0, f64::max)
            }
        }
    }

    /// [`row`](Self::row) for some rows, whose new values are `out`.
    #[inline(always)]
    fn apply(
        &self,
        rows: Range<usize>,
        h: &[T],
        first: usize,
        post: &impl Fn(usize, T) -> T,
        out: &mut [T],
    ) -> Change {
        let mut change = self.no_change();
        let mut largest = <T as Real>::ZERO;
        for (r, out) in rows.zip(out.chunks_exact_mut(self.heads)) {
            let (l, squares) = self.row(r, h, first, post, out);
            largest = larger(largest, l);
            change.squares += squares;
            let old = &h[(r - first) * self.heads..][..self.heads];
            for ((sum, new), old) in change.sums.iter_mut().zip(out.iter()).zip(old) {
                *sum += Real::to_f64(Real::abs(*new - *old));
            }
        }
        change.largest = Real::to_f64(largest);
        change
    }

    /// `post(gamma A h + b)` for one row: the new row in `out`, and `max |new - old|` and the sum of
    /// squares of the differences.
    #[inline(always)]
    fn row(
        &self,
        r: usize,
        h: &[T],
        first: usize,
        post: &impl Fn(usize, T) -> T,
        out: &mut [T],
    ) -> (T, f64) {
        let m = self.heads;
        out.copy_from_slice(&self.bias[r * m..(r + 1) * m]);
        for p in self.csr.row(r) {
            let col = self.csr.indices()[p] as usize - first;
            let xs = &h[col * m..][..m];
            let ws = &self.weights[p * m..][..m];
            for ((y, x), w) in out.iter_mut().zip(xs).zip(ws) {
                *y += *w * *x;
            }
        }
        let old = &h[(r - first) * m..][..m];
        let (mut largest, mut squares) = (<T as Real>::ZERO, 0.0);
        for (k, (y, old)) in out.iter_mut().zip(old).enumerate() {
            *y = post(r * m + k, *y);
            let change = Real::abs(*y - *old);
            largest = larger(largest, change);
            squares += Real::to_f64(change) * Real::to_f64(change);
        }
        (largest, squares)
    }
}

/// The larger of two changes; NaN, which must not pass for no change, is larger than everything.
#[inline(always)]
fn larger<T: PartialOrd + Copy>(a: T, b: T) -> T {
    // Only NaN cannot be compared with itself.
    if b > a || b.partial_cmp(&b).is_none() {
        b
    } else {
        a
    }
}

/// The rule of one iteration.
#[derive(Clone, Copy)]
struct Limits {
    tol: f64,
    max_iter: Option<usize>,
    stop: StopRule,
}

/// Iterates the rows of one graph from zero; serial, for graphs of a batch that run side by side.
fn iterate_graph<T: Scalar>(
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
fn iterate_whole<T: Scalar>(
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

fn merge(parts: impl Iterator<Item = SolveReport>) -> SolveReport {
    let none = SolveReport {
        iterations: 0,
        residual: 0.0,
        converged: true,
    };
    parts.fold(none, |a, b| SolveReport {
        iterations: a.iterations.max(b.iterations),
        residual: if b.residual.is_nan() {
            b.residual
        } else {
            a.residual.max(b.residual)
        },
        converged: a.converged && b.converged,
    })
}

/// Solves `h = post(gamma A h + b)` for all graphs. `slopes` are those of `post` where it is a
/// multiplication, for the linear solvers.
fn solve<T: Scalar>(
    system: &System<T>,
    ptr: &[usize],
    solver: Solver,
    slopes: Option<&[T]>,
    post: &(impl Fn(usize, T) -> T + Sync),
) -> Result<(Vec<T>, SolveReport)> {
    let graphs: Vec<Range<usize>> = ptr.windows(2).map(|w| w[0]..w[1]).collect();
    let join = |parts: Vec<(Vec<T>, SolveReport)>| {
        let report = merge(parts.iter().map(|p| p.1));
        (parts.into_iter().flat_map(|p| p.0).collect(), report)
    };
    match solver {
        Solver::Iterate {
            tol,
            max_iter,
            stop,
        } => {
            let limits = Limits {
                tol,
                max_iter,
                stop,
            };
            if graphs.len() == 1 || stop == StopRule::FrobeniusAbs {
                return Ok(iterate_whole(system, post, limits));
            }
            let one = |rows: &Range<usize>| iterate_graph(system, rows.clone(), post, limits);
            Ok(join(graphs.par_iter().map(one).collect()))
        }
        Solver::Direct => {
            let one = |rows: &Range<usize>| direct(system, rows.clone(), slopes);
            Ok(join(graphs.par_iter().map(one).collect()))
        }
        Solver::BiCgStab { tol, max_iter } => {
            let one = |rows: &Range<usize>| krylov(system, rows.clone(), slopes, tol, max_iter);
            Ok(join(graphs.par_iter().map(one).collect()))
        }
    }
}

/// `slope (gamma A h + b)` of one head and graph as `M h = slope b` with `M = I - slope gamma A`.
fn slope<T: Scalar>(slopes: Option<&[T]>, at: usize) -> f64 {
    slopes.map_or(1.0, |s| Real::to_f64(s[at]))
}

fn direct<T: Scalar>(
    system: &System<T>,
    rows: Range<usize>,
    slopes: Option<&[T]>,
) -> (Vec<T>, SolveReport) {
    let (m, n, first) = (system.heads, rows.len(), rows.start);
    let mut h = vec![<T as Real>::ZERO; n * m];
    let mut residual = 0.0f64;
    for k in 0..m {
        let mut matrix = faer::Mat::<f64>::identity(n, n);
        let mut right = faer::Mat::<f64>::zeros(n, 1);
        for r in rows.clone() {
            let d = slope(slopes, r * m + k);
            right[(r - first, 0)] = d * Real::to_f64(system.bias[r * m + k]);
            for p in system.csr.row(r) {
                let c = system.csr.indices()[p] as usize - first;
                matrix[(r - first, c)] -= d * Real::to_f64(system.weights[p * m + k]);
            }
        }
        let x = matrix.partial_piv_lu().solve(&right);
        let error = &matrix * &x - &right;
        for i in 0..n {
            residual = residual.max(error[(i, 0)].abs());
            h[i * m + k] = real(x[(i, 0)]);
        }
    }
    let report = SolveReport {
        iterations: 0,
        residual,
        converged: residual.is_finite(),
    };
    (h, report)
}

fn krylov<T: Scalar>(
    system: &System<T>,
    rows: Range<usize>,
    slopes: Option<&[T]>,
    tol: f64,
    max_iter: usize,
) -> (Vec<T>, SolveReport) {
    let (m, first) = (system.heads, rows.start);
    let mut h = vec![<T as Real>::ZERO; rows.len() * m];
    let mut reports = Vec::with_capacity(m);
    for k in 0..m {
        let apply = |x: &[f64]| -> Vec<f64> {
            let one = |r: usize| {
                let weight = |p: usize| Real::to_f64(system.weights[p * m + k]);
                let col = |p: usize| system.csr.indices()[p] as usize - first;
                let sum: f64 = system.csr.row(r).map(|p| weight(p) * x[col(p)]).sum();
                x[r - first] - slope(slopes, r * m + k) * sum
            };
            rows.clone().map(one).collect()
        };
        let right = |r: usize| slope(slopes, r * m + k) * Real::to_f64(system.bias[r * m + k]);
        let right: Vec<f64> = rows.clone().map(right).collect();
        let (x, report) = bicgstab(apply, &right, tol, max_iter);
        x.iter()
            .enumerate()
            .for_each(|(i, x)| h[i * m + k] = real(*x));
        reports.push(report);
    }
    (h, merge(reports.into_iter()))
}

impl Contraction {
    #[inline(always)]
    fn apply<T: Scalar>(self, x: T) -> T {
        let zero = <T as Real>::ZERO;
        match self {
            Self::Identity => x,
            Self::Tanh => real(Real::to_f64(x).tanh()),
            Self::Relu => {
                if x > zero {
                    x
                } else {
                    zero * x
                }
            }
            Self::LeakyRelu(slope) => {
                if x > zero {
                    x
                } else {
                    real::<T>(slope) * x
                }
            }
            Self::Sigmoid => real(1.0 / (1.0 + (-Real::to_f64(x)).exp())),
        }
    }

    /// The slope, from the value of the function.
    fn slope_at<T: Scalar>(self, y: T) -> T {
        let (zero, one) = (<T as Real>::ZERO, <T as Real>::ONE);
        match self {
            Self::Identity => one,
            Self::Tanh => one - y * y,
            Self::Relu => {
                if y > zero {
                    one
                } else {
                    zero
                }
            }
            Self::LeakyRelu(slope) => {
                if y > zero {
                    one
                } else {
                    real(slope)
                }
            }
            Self::Sigmoid => y * (one - y),
        }
    }
}

fn rows_of(graph: &Graph, orientation: Orientation) -> (&Csr, &Csr) {
    match orientation {
        Orientation::RowIsSource => (graph.outgoing(), graph.incoming()),
        Orientation::RowIsTarget => (graph.incoming(), graph.outgoing()),
    }
}

fn host<T: Scalar>(tensor: &Tensor) -> candle_core::Result<Vec<T>> {
    tensor.flatten_all()?.to_vec1::<T>()
}

fn forward<T: Scalar>(
    graph: &Graph,
    ptr: &[usize],
    weights: &Tensor,
    bias: &Tensor,
    how: FixedPoint,
) -> Result<(Vec<T>, SolveReport)> {
    let (w, b) = (host::<T>(weights)?, host::<T>(bias)?);
    for (what, values) in [("edge weights", &w), ("bias", &b)] {
        let count = values.iter().filter(|v| !Real::is_finite(**v)).count();
        if count > 0 {
            let total = values.len();
            return Err(Error::NonFinite { what, count, total });
        }
    }
    let (rows, _) = rows_of(graph, how.orientation);
    let system = System::new(rows, &w, &b, bias.dims()[1], how.gamma);
    let phi = how.activation;
    solve(&system, ptr, how.solver, None, &move |_, z| phi.apply(z))
}

/// A node whose value is known, with the implicit gradient.
struct Implicit {
    graph: Graph,
    ptr: Vec<usize>,
    how: FixedPoint,
    value: Mutex<Option<(CpuStorage, Shape)>>,
}

impl Implicit {
    /// `D y` with `y = gamma A^T (D y) + g`.
    fn adjoint<T: Scalar>(&self, w: &Tensor, h: &Tensor, grad: &Tensor) -> Result<Vec<T>> {
        let (w, h, g) = (host::<T>(w)?, host::<T>(h)?, host::<T>(grad)?);
        let (_, transposed) = rows_of(&self.graph, self.how.orientation);
        let slopes: Vec<T> = h.iter().map(|y| self.how.activation.slope_at(*y)).collect();
        let mut system = System::new(transposed, &w, &g, grad.dims()[1], self.how.gamma);
        system.contracts = Contracts::InSums;
        let post = |at: usize, z: T| slopes[at] * z;
        let (u, report) = solve(&system, &self.ptr, self.how.backward, Some(&slopes), &post)?;
        if !report.converged {
            let SolveReport {
                iterations,
                residual,
                ..
            } = report;
            tracing::warn!(
                iterations,
                residual,
                "the implicit gradient has not converged"
            );
        }
        Ok(u)
    }
}

impl CustomOp2 for Implicit {
    fn name(&self) -> &'static str {
        "fixed point"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let mut value = self.value.lock().unwrap_or_else(PoisonError::into_inner);
        match value.take() {
            Some(value) => Ok(value),
            None => bail!("a fixed point is evaluated once"),
        }
    }

    fn bwd(
        &self,
        w: &Tensor,
        bias: &Tensor,
        h: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let (grad, fixed) = (grad.contiguous()?, h.detach());
        let u = match bias.dtype() {
            DType::F32 => Tensor::from_vec(
                self.adjoint::<f32>(w, &fixed, &grad)?,
                bias.dims(),
                bias.device(),
            )?,
            _ => Tensor::from_vec(
                self.adjoint::<f64>(w, &fixed, &grad)?,
                bias.dims(),
                bias.device(),
            )?,
        };
        if !w.track_op() {
            return Ok((None, Some(u)));
        }
        let (n, m) = u.dims2()?;
        let split = |x: &Tensor| x.reshape((n, m, 1));
        let (of_rows, of_cols) = (split(&u)?, split(&fixed)?);
        let (a, b) = match self.how.orientation {
            Orientation::RowIsSource => (&of_rows, &of_cols),
            Orientation::RowIsTarget => (&of_cols, &of_rows),
        };
        let of_w = (sddmm(&self.graph, a, b, EdgeOp::Dot)? * self.how.gamma)?;
        Ok((Some(of_w), Some(u)))
    }
}

//! The fixed point and its implicit gradient, on compressed rows.

mod bicgstab;
mod implicit;
mod linear;
mod picard;
mod system;

use super::{Contraction, Orientation, Solver, StopRule};
use crate::graph::{Csr, Graph};
use crate::sparse::Scalar;
use crate::{Error, Result};
use candle_core::{CpuStorage, DType, Tensor};
use implicit::Implicit;
use linear::{direct, krylov};
use picard::{iterate_graph, iterate_whole, Limits};
use rayon::prelude::*;
use std::ops::Range;
use std::sync::Mutex;
use system::System;
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

//! Products along edges, and fixed points on graphs.

use super::{Case, Peer, Session};
use anyhow::Result;
use candle_core::{DType, Device, Var};
use graph_learning::cgs::{fixed_point, Contraction, FixedPoint, Orientation, Solver, StopRule};
use graph_learning::generate::uniform_edges;
use graph_learning::sparse::{spmm, Reduce};
use serde_json::json;
use tensor_core::random::RandomStream;

const GROUP: &str = "graph-learning";

pub(super) fn cases(session: &mut Session<'_>) -> Result<()> {
    for (nodes, edges, width) in [(2708, 13_264, 128), (50_000, 500_000, 64)] {
        for peer in ["torch.sparse CSR", "gather and index_add"] {
            if session.wants(GROUP, "graph-core") {
                product(session, (nodes, edges, width), peer)?;
            }
        }
    }
    if session.wants(GROUP, "cgs") {
        solve(session)?;
    }
    Ok(())
}

/// `y = A x` with constant weights, and `x`'s gradient of `sum(y)`.
fn product(
    session: &mut Session<'_>,
    (nodes, edges, width): (usize, usize, usize),
    peer: &'static str,
) -> Result<()> {
    let mut stream = RandomStream::new(0).split("peers");
    let graph = uniform_edges(nodes, edges, &mut stream)?;
    let device = &Device::Cpu;
    let x = Var::from_tensor(&stream.normal(0.0, 1.0, (nodes, width), DType::F32, device)?)?;
    let weights = stream.uniform(0.0, 1.0, edges, DType::F32, device)?;
    session.measure(Case {
        slug: "graph-core",
        operation: format!("product and gradient, {nodes} nodes, {edges} edges, {width} features"),
        ours: "spmm",
        call: Box::new(move || {
            let y = spmm(&graph, Some(&weights), &x, Reduce::Sum)?;
            y.sum_all()?.backward()?;
            Ok(())
        }),
        peer: Peer::Python(
            peer,
            json!({ "nodes": nodes, "edges": edges, "width": width }),
        ),
    })
}

/// 20 iterations each way of 16 linear maps, over dense matrices as published and over edges.
fn solve(session: &mut Session<'_>) -> Result<()> {
    let (nodes, edges, heads, iterations) = (720, 4200, 16, 20);
    let mut stream = RandomStream::new(0).split("peers");
    let graph = uniform_edges(nodes, edges, &mut stream)?;
    let device = &Device::Cpu;
    let bias = Var::from_tensor(&stream.normal(0.0, 1.0, (nodes, heads), DType::F32, device)?)?;
    let weights = stream.uniform(0.0, 0.1, (edges, heads), DType::F32, device)?;
    let weights = Var::from_tensor(&weights)?;
    let solver = Solver::Iterate {
        // Never met: both sides make all iterations.
        tol: 1e-30,
        max_iter: Some(iterations),
        stop: StopRule::MaxNorm,
    };
    let how = FixedPoint {
        gamma: 0.9,
        activation: Contraction::Identity,
        orientation: Orientation::RowIsSource,
        solver,
        backward: solver,
    };
    let spec = json!({ "nodes": nodes, "edges": edges, "heads": heads, "iterations": iterations });
    session.measure(Case {
        slug: "cgs",
        operation: format!(
            "{iterations} iterations and gradient, {nodes} nodes, {edges} edges, {heads} heads"
        ),
        ours: "fixed_point",
        call: Box::new(move || {
            let (h, _) = fixed_point(&graph, None, &weights, &bias, how)?;
            h.sum_all()?.backward()?;
            Ok(())
        }),
        peer: Peer::Python("torch.bmm loop", spec),
    })
}

//! Products along edges, epochs of networks, sampling, and fixed points on graphs.

use super::{Case, Peer, Session};
use crate::perf::graph_networks::{training_epoch, Kind, Size};
use anyhow::Result;
use candle_core::{DType, Device, Tensor, Var};
use convex::transport::{gromov_wasserstein, GroundLoss, GwConfig, GwProblem};
use graph_learning::cgs::{fixed_point, Contraction, FixedPoint, Orientation, Solver, StopRule};
use graph_learning::generate::{erdos_renyi, uniform_edges};
use graph_learning::sample::NeighborSampler;
use graph_learning::sparse::{spmm, Reduce};
use serde_json::json;
use tensor_core::random::RandomStream;

const GROUP: &str = "graph-learning";

pub(super) fn cases(session: &mut Session<'_>) -> Result<()> {
    if session.wants(GROUP, "graph-core") {
        for size in [(2708, 13_264, 128), (50_000, 500_000, 64)] {
            for peer in ["torch.sparse CSR", "gather and index_add"] {
                for gradient in [false, true] {
                    product(session, size, gradient, peer)?;
                }
            }
        }
        for size in [CORA, MILLION] {
            for kind in [Kind::Gcn, Kind::Sage, Kind::Gat] {
                epoch(session, size, kind)?;
            }
        }
        sampling(session)?;
    }
    if session.wants(GROUP, "cgs") {
        for peer in ["torch.bmm loop", "torch.sparse loop"] {
            solve(session, peer)?;
        }
    }
    if session.wants(GROUP, "w2pgnn") {
        for nodes in [50, 200] {
            gromov(session, nodes)?;
        }
    }
    Ok(())
}

/// Cora's proportions, with dense features.
const CORA: Size = Size {
    nodes: 2708,
    edges: 10_556,
    inputs: 1433,
    hidden: 64,
    classes: 7,
};

const MILLION: Size = Size {
    nodes: 100_000,
    edges: 1_000_000,
    inputs: 64,
    hidden: 64,
    classes: 16,
};

/// One epoch on the whole graph: forward, backward and a step of Adam.
fn epoch(session: &mut Session<'_>, size: Size, kind: Kind) -> Result<()> {
    let (ours, peer) = match kind {
        Kind::Gcn => ("GcnConv", "PyTorch Geometric GCN"),
        Kind::Sage => ("SageConv", "PyTorch Geometric SAGE"),
        Kind::Gat => ("GatConv", "PyTorch Geometric GAT"),
    };
    let (nodes, edges) = (size.nodes, size.edges);
    session.measure(Case {
        slug: "graph-core",
        operation: format!("training epoch, two layers, {nodes} nodes, {edges} edges"),
        ours,
        call: training_epoch(size, kind)?,
        peer: Peer::Python(
            peer,
            json!({ "nodes": nodes, "edges": edges, "inputs": size.inputs, "hidden": size.hidden, "classes": size.classes }),
        ),
    })
}

/// A batch of 1024 seeds with 15, 10 and 5 neighbors.
fn sampling(session: &mut Session<'_>) -> Result<()> {
    let (nodes, edges, seeds, fanouts) = (100_000, 1_000_000, 1024, [15, 10, 5]);
    let mut stream = RandomStream::new(0).split("peers");
    let graph = uniform_edges(nodes, edges, &mut stream)?;
    let mut sampler = NeighborSampler::new(&graph, &fanouts.map(Some))?;
    session.measure(Case {
        slug: "graph-core",
        operation: format!("sampling {seeds} seeds with 15, 10, 5 neighbors, {edges} edges"),
        ours: "NeighborSampler",
        call: Box::new(move || {
            let mut order = stream.permutation(nodes)?;
            order.truncate(seeds);
            std::hint::black_box(sampler.sample(&order, &mut stream)?.n_id.len());
            Ok(())
        }),
        peer: Peer::Python(
            "NumPy neighbor sampling",
            json!({ "nodes": nodes, "edges": edges, "seeds": seeds, "fanouts": fanouts }),
        ),
    })
}

/// `y = A x` with constant weights, and where wanted `x`'s gradient of `sum(y)`.
fn product(
    session: &mut Session<'_>,
    (nodes, edges, width): (usize, usize, usize),
    gradient: bool,
    peer: &'static str,
) -> Result<()> {
    let mut stream = RandomStream::new(0).split("peers");
    let graph = uniform_edges(nodes, edges, &mut stream)?;
    let device = &Device::Cpu;
    let x = stream.normal(0.0, 1.0, (nodes, width), DType::F32, device)?;
    let x = match gradient {
        true => Var::from_tensor(&x)?.into_inner(),
        false => x,
    };
    let what = if gradient {
        "product and gradient"
    } else {
        "product"
    };
    let weights = stream.uniform(0.0, 1.0, edges, DType::F32, device)?;
    session.measure(Case {
        slug: "graph-core",
        operation: format!("{what}, {nodes} nodes, {edges} edges, {width} features"),
        ours: "spmm",
        call: Box::new(move || {
            let y = spmm(&graph, Some(&weights), &x, Reduce::Sum)?;
            if gradient {
                y.sum_all()?.backward()?;
            }
            Ok(())
        }),
        peer: Peer::Python(
            peer,
            json!({ "nodes": nodes, "edges": edges, "width": width, "gradient": gradient }),
        ),
    })
}

/// 20 iterations each way of 16 linear maps: beside dense matrices, as published, and beside one sparse
/// matrix of all heads.
fn solve(session: &mut Session<'_>, peer: &'static str) -> Result<()> {
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
        peer: Peer::Python(peer, spec),
    })
}

/// The distance of two random graphs of the given size, by conditional gradients from the product plan.
fn gromov(session: &mut Session<'_>, nodes: usize) -> Result<()> {
    let mut stream = RandomStream::new(0).split("peers");
    let mut dense = |n: usize, p: f64| -> Result<(Tensor, Vec<f64>)> {
        let matrix = erdos_renyi(n, p, &mut stream)?.to_dense(None)?;
        let values = matrix.flatten_all()?.to_vec1()?;
        Ok((matrix, values))
    };
    let ((a, a_values), (b, b_values)) = (dense(nodes, 0.3)?, dense(nodes, 0.5)?);
    let problem = GwProblem::uniform(&a, &b, GroundLoss::Square)?;
    session.measure(Case {
        slug: "w2pgnn",
        operation: format!("Gromov-Wasserstein distance of graphs of {nodes} nodes"),
        ours: "gromov_wasserstein",
        call: Box::new(move || {
            let found = gromov_wasserstein(&problem, &GwConfig::default(), None)?;
            std::hint::black_box(found.value);
            Ok(())
        }),
        peer: Peer::Python(
            "POT gromov_wasserstein2",
            json!({ "nodes": nodes, "a": a_values, "b": b_values }),
        ),
    })
}

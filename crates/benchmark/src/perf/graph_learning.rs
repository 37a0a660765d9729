//! Products along edges, alone and inside an epoch, from ten thousand edges to ten million: they read a
//! row for each edge, which is what limits them.

use super::graph_networks::{training_epoch, Kind, Size};
use super::{Ceiling, Kernel, Session};
use anyhow::Result;
use candle_core::{DType, Device, Var};
use graph_learning::generate::uniform_edges;
use graph_learning::sparse::{spmm, Reduce};
use tensor_core::random::RandomStream;

const GROUP: &str = "graph-learning";

pub(super) fn kernels(session: &mut Session<'_>) -> Result<()> {
    if !session.wants(GROUP) {
        return Ok(());
    }
    for backward in [false, true] {
        product(session, backward)?;
    }
    for edges in [10_000, 100_000, 1_000_000, 10_000_000] {
        epoch(session, edges)?;
    }
    Ok(())
}

/// `y = A x` with a weight per edge, and with its backward pass: for each edge a row, its weight and
/// its index are read.
fn product(session: &mut Session<'_>, backward: bool) -> Result<()> {
    let (nodes, edges, width) = (50_000, 500_000, 64);
    let mut stream = RandomStream::new(0).split("perf");
    let graph = uniform_edges(nodes, edges, &mut stream)?;
    let device = &Device::Cpu;
    let x = Var::from_tensor(&stream.normal(0.0, 1.0, (nodes, width), DType::F32, device)?)?;
    let weights = stream.uniform(0.0, 1.0, edges, DType::F32, device)?;
    let passes = if backward { 2.0 } else { 1.0 };
    let per_edge = 4.0 * width as f64 + 8.0;
    let per_node = 4.0 * width as f64;
    let bytes = passes * (edges as f64 * per_edge + nodes as f64 * per_node);
    let kernel = Kernel {
        name: match backward {
            false => "product along 500k edges, 64 wide".to_string(),
            true => "the same with its gradient".to_string(),
        },
        ceiling: Ceiling::Copy,
        per_element: bytes / edges as f64,
        elements: edges,
        call: Box::new(move || {
            let y = spmm(&graph, Some(&weights), &x, Reduce::Sum)?;
            if backward {
                y.sum_all()?.backward()?;
            }
            Ok(())
        }),
    };
    session.measure(GROUP, kernel)
}

/// An epoch of a two-layer GCN (32 in, 32 hidden, 8 classes) on ten edges a node: each layer sends a
/// row of the narrower side along each edge, forth and back.
fn epoch(session: &mut Session<'_>, edges: usize) -> Result<()> {
    let size = Size {
        nodes: edges / 10,
        edges,
        inputs: 32,
        hidden: 32,
        classes: 8,
    };
    let floats = (size.inputs + 2 * size.classes) as f64;
    let kernel = Kernel {
        name: format!("GCN epoch, {edges} edges"),
        ceiling: Ceiling::Copy,
        per_element: 4.0 * floats,
        elements: edges,
        call: training_epoch(size, Kind::Gcn)?,
    };
    session.measure(GROUP, kernel)
}

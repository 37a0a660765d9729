use crate::support::*;
use candle_core::{DType, Tensor};
use graph_learning::conv::{GcnConfig, GcnConv};
use graph_learning::generate::uniform_edges;
use graph_learning::RandomStream;
use nn::init::SeededVars;
use nn::loss::{cross_entropy, Reduction};
use optim::local::held_bytes;

/// Bytes that a full-batch step of a two-layer GCN holds for its backward pass, ten edges a node.
fn held(edges: usize) -> usize {
    let (nodes, rng) = (edges / 10, &mut RandomStream::new(1));
    let graph = uniform_edges(nodes, edges, rng).unwrap();
    let x = rng.normal(0.0, 1.0, (nodes, 16), DType::F32, &CPU).unwrap();
    let labels: Vec<u32> = (0..nodes).map(|v| (v % 4) as u32).collect();
    let labels = Tensor::from_vec(labels, nodes, &CPU).unwrap();
    let vb = SeededVars::new(rng).builder(DType::F32, &CPU);
    let first = GcnConv::new(16, 16, GcnConfig::default(), vb.pp(0)).unwrap();
    let last = GcnConv::new(16, 4, GcnConfig::default(), vb.pp(1)).unwrap();
    let h = first.forward(&graph, &x).unwrap().relu().unwrap();
    let logits = last.forward(&graph, &h).unwrap();
    let loss = cross_entropy(&logits, &labels, Reduction::Mean).unwrap();
    loss.backward().unwrap();
    held_bytes(&loss)
}

/// Linear in the graph, and no message tensor: a million edges with 16 channels would be 64 MB of
/// messages for each layer.
#[test]
fn memory_grows_with_the_graph_and_not_with_messages() {
    let (small, large) = (held(10_000), held(1_000_000));
    assert!(large <= 101 * small, "{small} {large}");
    assert!(large < 64_000_000, "{large}");
}

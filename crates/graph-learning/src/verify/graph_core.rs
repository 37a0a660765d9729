//! The graph, the kernels, the layers and the readout.

use super::{compare_gradients, edge_list, indices, tensor, var, Weights};
use crate::conv::{
    GatConfig, GatConv, Gatv2Config, Gatv2Conv, GcnConfig, GcnConv, GinConfig, GinConv, Mlp,
    SageConfig, SageConv,
};
use crate::graph::{Csr, Direction, Graph};
use crate::sparse::{gcn_norm, sddmm, segment_softmax, spmm, EdgeOp, Norm, Reduce};
use crate::Result;
use candle_core::{Device, Tensor, Var};
use candle_nn::Activation;
use tensor_core::verify::{Reference, Tolerance};

const TOLERANCE: Tolerance = Tolerance::Mixed(1e-10);

/// Names of parameters that a layer may have.
const PARAMETERS: [&str; 16] = [
    "lin.weight",
    "bias",
    "lin_l.weight",
    "lin_l.bias",
    "lin_r.weight",
    "lin_r.bias",
    "att",
    "att_src",
    "att_dst",
    "eps",
    "nn.0.weight",
    "nn.0.bias",
    "nn.2.weight",
    "nn.2.bias",
    "nn.4.weight",
    "nn.4.bias",
];

/// Checks rows, kernels with gradients, normalized weights, every layer that the file has an output
/// of, the readout and the neighborhoods.
///
/// # Errors
/// An error when the file lacks an input; a difference is a failed comparison instead.
pub fn graph_core(reference: &mut Reference) -> Result<()> {
    let n = reference.expected("x")?.shape[0];
    let graph = edge_list(reference, "edge_index", n)?;
    rows(reference, &graph)?;
    kernels(reference, &graph)?;
    normalized(reference, &graph)?;
    for layer in reference.cases("_out") {
        run_layer(reference, &graph, &layer)?;
    }
    let ids = indices(reference, "graph_id")?;
    let groups = reference.expected("readout_sum")?.shape[0];
    let members = Graph::segments(ids, groups)?;
    let x = tensor(reference, "x")?;
    let sums = spmm(&members, None, &x, Reduce::Sum)?;
    reference.compare_tensor("readout_sum", &sums, TOLERANCE)?;
    neighborhoods(reference, &graph)
}

fn numbers(list: &[u32]) -> Vec<f64> {
    list.iter().map(|v| f64::from(*v)).collect()
}

fn rows(reference: &mut Reference, graph: &Graph) -> Result<()> {
    let exact = Tolerance::Mismatches(0);
    let csr: &Csr = graph.incoming();
    reference.compare("csr_by_target_indptr", &numbers(csr.indptr()), exact)?;
    reference.compare("csr_by_target_src", &numbers(csr.indices()), exact)?;
    reference.compare("csr_by_target_perm", &numbers(csr.perm()), exact)?;
    Ok(())
}

fn against(y: &Tensor, cotangent: &Tensor) -> Result<Tensor> {
    Ok((y * cotangent)?.sum_all()?)
}

fn kernels(reference: &mut Reference, graph: &Graph) -> Result<()> {
    let (x, w) = (var(reference, "x")?, var(reference, "edge_weight")?);
    let cot = tensor(reference, "cot")?;
    let y = spmm(graph, Some(&w), &x, Reduce::Sum)?;
    reference.compare_tensor("spmm", &y, TOLERANCE)?;
    let grads = [("spmm_grad_x".to_string(), &x), ("spmm_grad_w".into(), &w)];
    compare_gradients(reference, &against(&y, &cot)?, &grads, TOLERANCE)?;
    for (name, reduce) in [("agg_mean", Reduce::Mean), ("agg_max", Reduce::Max)] {
        let y = spmm(graph, None, &x, reduce)?;
        reference.compare_tensor(name, &y, TOLERANCE)?;
        let grads = [(format!("{name}_grad_x"), &x)];
        compare_gradients(reference, &against(&y, &cot)?, &grads, TOLERANCE)?;
    }
    let (a, b) = (var(reference, "sddmm_a")?, var(reference, "sddmm_b")?);
    let s = sddmm(graph, &a, &b, EdgeOp::Dot)?;
    reference.compare_tensor("sddmm", &s, TOLERANCE)?;
    let cot = tensor(reference, "sddmm_cot")?;
    let grads = [
        ("sddmm_grad_a".to_string(), &a),
        ("sddmm_grad_b".into(), &b),
    ];
    compare_gradients(reference, &against(&s, &cot)?, &grads, TOLERANCE)?;
    let logits = var(reference, "seg_logits")?;
    let p = segment_softmax(graph, &logits)?;
    reference.compare_tensor("seg_softmax", &p, TOLERANCE)?;
    let cot = tensor(reference, "seg_cot")?;
    let grads = [("seg_grad".to_string(), &logits)];
    compare_gradients(reference, &against(&p, &cot)?, &grads, TOLERANCE)
}

/// Normalized weights with and without edge weights. Degrees and self-loops are compared with the
/// edges in the file's order.
fn normalized(reference: &mut Reference, graph: &Graph) -> Result<()> {
    let weights = tensor(reference, "edge_weight")?;
    let ones = weights.ones_like()?;
    let exact = Tolerance::Mismatches(0);
    for (suffix, weights) in [("", &weights), ("_unw", &ones)] {
        let (looped, normal) = gcn_norm(graph, Some(weights), Norm::Sym, false)?;
        let edges = looped.edge_index(&Device::Cpu)?;
        reference.compare_tensor(&format!("gcn_edge_index{suffix}"), &edges, exact)?;
        reference.compare_tensor(&format!("gcn_weight{suffix}"), &normal, TOLERANCE)?;
    }
    Ok(())
}

/// One layer, known by the beginning of its name: output and all gradients.
fn run_layer(reference: &mut Reference, graph: &Graph, layer: &str) -> Result<()> {
    let weights = Weights::read(reference, layer, &PARAMETERS)?;
    let x = var(reference, "x")?;
    let y = output(reference, graph, layer, &weights, &x)?;
    reference.compare_tensor(&format!("{layer}_out"), &y, TOLERANCE)?;
    let cot = tensor(reference, &format!("{layer}_cot"))?;
    let mut grads = vec![(format!("{layer}_grad_x"), &x)];
    for (name, var) in &weights.0 {
        grads.push((format!("{layer}_grad_{}", name.replace('.', "_")), var));
    }
    compare_gradients(reference, &against(&y, &cot)?, &grads, TOLERANCE)
}

fn output(
    reference: &mut Reference,
    graph: &Graph,
    layer: &str,
    weights: &Weights,
    x: &Var,
) -> Result<Tensor> {
    let vb = weights.builder();
    let inputs = x.dims()[1];
    let width = reference.expected(&format!("{layer}_out"))?.shape[1];
    let slope = |r: &Reference| r.number("negative_slope");
    // [1, heads, out] of an attention vector.
    let heads = |name: &str| {
        let shape = weights.0.get(name).map(|v| v.dims().to_vec());
        shape.filter(|s| s.len() == 3).unwrap_or_default()
    };
    if layer.starts_with("gatv2") {
        let [_, heads, out] = heads("att")[..] else {
            return Err(reference.bad(format!("`{layer}_att` is missing")).into());
        };
        let gat = GatConfig {
            heads,
            concat: heads * out == width,
            negative_slope: slope(reference)?,
            ..GatConfig::default()
        };
        let share_weights = !weights.0.contains_key("lin_r.weight");
        let config = Gatv2Config { gat, share_weights };
        return Gatv2Conv::new(inputs, out, config, vb)?.forward(graph, x);
    }
    if layer.starts_with("gat") {
        let [_, heads, out] = heads("att_src")[..] else {
            return Err(reference
                .bad(format!("`{layer}_att_src` is missing"))
                .into());
        };
        let config = GatConfig {
            heads,
            // With one head both are the same.
            concat: !(layer.contains("avg") || heads * out != width),
            negative_slope: slope(reference)?,
            ..GatConfig::default()
        };
        return GatConv::new(inputs, out, config, vb)?.forward(graph, x);
    }
    if layer.starts_with("sage") {
        let config = SageConfig {
            normalize: layer.contains("norm"),
            ..SageConfig::default()
        };
        return SageConv::new(inputs, width, config, vb)?.forward(graph, x);
    }
    if layer.starts_with("gin") {
        let linear = |i: usize| weights.0.get(&format!("nn.{}.weight", 2 * i));
        let mut widths = vec![inputs];
        widths.extend((0..).map_while(linear).map(|w| w.dims()[0]));
        let nn = Mlp::new(&widths, Activation::Relu, vb.pp("nn"))?;
        let train_eps = weights.0.contains_key("eps");
        let config = GinConfig {
            eps: 0.0,
            train_eps,
        };
        return GinConv::new(nn, config, vb)?.forward(graph, x);
    }
    if layer.starts_with("gcn") {
        let weighted = layer.contains('w');
        let layer = GcnConv::new(inputs, width, GcnConfig::default(), vb)?;
        let w = tensor(reference, "edge_weight")?;
        let x = x.as_tensor().clone().into();
        return layer.apply(graph, &x, weighted.then_some(&w));
    }
    Err(reference.bad(format!("`{layer}` is no known layer")).into())
}

/// `khopK_of_A_B`: the nodes within `K` steps against the edges from `A` and `B`.
fn neighborhoods(reference: &mut Reference, graph: &Graph) -> Result<()> {
    for name in reference.names() {
        let Some(rest) = name.strip_prefix("khop") else {
            continue;
        };
        let parsed = rest.split_once("_of_").and_then(|(k, seeds)| {
            let seeds: Option<Vec<u32>> = seeds.split('_').map(|s| s.parse().ok()).collect();
            Some((k.parse::<usize>().ok()?, seeds?))
        });
        let Some((k, seeds)) = parsed else {
            return Err(reference
                .bad(format!("`{name}` is not khopK_of_A_B"))
                .into());
        };
        let found = graph.k_hop(&seeds, k, Direction::Incoming)?;
        reference.compare(&name, &numbers(&found.nodes), Tolerance::Mismatches(0))?;
    }
    Ok(())
}

//! Contracting weights, fixed points with their implicit gradients, the encoder and value iteration.

use super::{compare_gradients, indices, tensor, Weights};
use crate::cgs::{
    contracting_edge_weights, fixed_point, policy, value_iteration, Contraction, EncoderLayer,
    FixedPoint, Normalizer, Orientation, Solver, StopRule,
};
use crate::conv::Mlp;
use crate::sparse::Reduce;
use crate::{Graph, Result};
use candle_core::Var;
use candle_nn::Activation;
use tensor_core::verify::{Reference, Tolerance};

const TOLERANCE: Tolerance = Tolerance::Mixed(1e-10);

/// Checks whatever the file holds: weights of both normalizers, a fixed point for each `P_H`, the
/// encoder layer and value iteration.
///
/// # Errors
/// An error when the file lacks an input; a difference is a failed comparison instead.
pub fn cgs(reference: &mut Reference) -> Result<()> {
    let n = reference.expected("b")?.shape[0];
    let (src, dst) = (indices(reference, "src")?, indices(reference, "dst")?);
    let graph = Graph::from_edges(n, src, dst)?;
    let logits = tensor(reference, "A_logit")?;
    for (name, normalizer) in [
        ("A_degree", Normalizer::DegreeClip),
        ("A_attention", Normalizer::Attention),
    ] {
        let orientation = Orientation::RowIsSource;
        let weights = contracting_edge_weights(&graph, &logits, normalizer, orientation)?;
        reference.compare_tensor(name, &weights, TOLERANCE)?;
    }
    for case in reference.cases("_H") {
        solve(reference, &graph, &case)?;
    }
    if reference.has("mp_nf") {
        encoder(reference, &graph)?;
    }
    if reference.has("gvi_reward") {
        value(reference)?;
    }
    Ok(())
}

/// The activation of a case: linear for `lin`, the file's otherwise.
fn activation(reference: &Reference, case: &str) -> Result<Contraction> {
    let name = if case.starts_with("lin") {
        "Identity"
    } else {
        reference.text("activation")?
    };
    Ok(match name {
        "Identity" => Contraction::Identity,
        "Tanh" => Contraction::Tanh,
        "ReLU" => Contraction::Relu,
        "Sigmoid" => Contraction::Sigmoid,
        "LeakyReLU" => Contraction::LeakyRelu(reference.number("leaky_slope")?),
        other => {
            return Err(reference
                .bad(format!("activation `{other}` is unknown"))
                .into())
        }
    })
}

fn solve(reference: &mut Reference, graph: &Graph, case: &str) -> Result<()> {
    let orientation = Orientation::RowIsSource;
    let logits = tensor(reference, "A_logit")?;
    let weights = contracting_edge_weights(graph, &logits, Normalizer::DegreeClip, orientation)?;
    let weights = Var::from_tensor(&weights)?;
    let bias = Var::from_tensor(&tensor(reference, "b")?)?;
    let exact = Solver::Iterate {
        tol: 1e-14,
        max_iter: Some(100_000),
        stop: StopRule::MaxNorm,
    };
    let how = FixedPoint {
        gamma: reference.number("gamma")?,
        activation: activation(reference, case)?,
        orientation,
        solver: exact,
        backward: exact,
    };
    let (h, _) = fixed_point(graph, None, &weights, &bias, how)?;
    // The file has heads first.
    let h = h.t()?;
    reference.compare_tensor(&format!("{case}_H"), &h, TOLERANCE)?;
    let loss = (h * tensor(reference, "cot")?)?.sum_all()?;
    let grads = [
        (format!("{case}_grad_A"), &weights),
        (format!("{case}_grad_b"), &bias),
    ];
    compare_gradients(reference, &loss, &grads, TOLERANCE)?;
    let count = format!("{case}_iters_tol1e6");
    if reference.has(&count) {
        let solver = Solver::Iterate {
            tol: 1e-6,
            max_iter: Some(100_000),
            stop: StopRule::FrobeniusAbs,
        };
        let how = FixedPoint { solver, ..how };
        let (_, report) = fixed_point(graph, None, &weights, &bias, how)?;
        let exact = Tolerance::Mismatches(0);
        reference.compare(&count, &[report.iterations as f64], exact)?;
    }
    Ok(())
}

/// The perceptron `mp_NAME_{W,b}I` with the file's leaky ReLU after every layer.
fn perceptron(reference: &mut Reference, name: &str) -> Result<Mlp> {
    let slope = reference.number("leaky_slope")?;
    let mut weights = Weights::default();
    let mut widths = Vec::new();
    while reference.has(&format!("mp_{name}_W{}", widths.len().saturating_sub(1))) {
        let i = widths.len().saturating_sub(1);
        let w = super::var(reference, &format!("mp_{name}_W{i}"))?;
        let b = super::var(reference, &format!("mp_{name}_b{i}"))?;
        if i == 0 {
            widths.push(w.dims()[1]);
        }
        widths.push(w.dims()[0]);
        weights.0.insert(format!("{}.weight", 2 * i), w);
        weights.0.insert(format!("{}.bias", 2 * i), b);
    }
    let act = Activation::LeakyRelu(slope);
    Ok(Mlp::new(&widths, act, weights.builder())?.with_last(act))
}

fn encoder(reference: &mut Reference, graph: &Graph) -> Result<()> {
    let (x, u) = (tensor(reference, "mp_nf")?, tensor(reference, "mp_ef")?);
    let [edge, attn, node] = [
        perceptron(reference, "edge")?,
        perceptron(reference, "attn")?,
        perceptron(reference, "node")?,
    ];
    let layer =
        |aggregation| EncoderLayer::new(edge.clone(), attn.clone(), node.clone(), aggregation, 0.0);
    let sum = layer(Reduce::Sum);
    reference.compare_tensor("mp_attn", &sum.attention(graph, &x, &u)?, TOLERANCE)?;
    let (nodes, edges) = sum.forward(graph, &x, &u, None)?;
    reference.compare_tensor("mp_edge_out", &edges, TOLERANCE)?;
    reference.compare_tensor("mp_node_out_sum", &nodes, TOLERANCE)?;
    for (name, reduce) in [("mean", Reduce::Mean), ("max", Reduce::Max)] {
        let name = format!("mp_node_out_{name}");
        if reference.has(&name) {
            let (nodes, _) = layer(reduce).forward(graph, &x, &u, None)?;
            reference.compare_tensor(&name, &nodes, TOLERANCE)?;
        }
    }
    Ok(())
}

fn value(reference: &mut Reference) -> Result<()> {
    let n = reference.expected("gvi_value")?.shape[0];
    let (src, dst) = (
        indices(reference, "gvi_src")?,
        indices(reference, "gvi_dst")?,
    );
    let graph = Graph::from_edges(n, src, dst)?;
    let reward = reference.input("gvi_reward")?.values;
    let discount = reference.number("gvi_discount")?;
    let value = value_iteration(&graph, &reward, discount, 0.0, 100_000)?;
    reference.compare("gvi_value", &value, TOLERANCE)?;
    let policy = policy(&graph, &reward, &value, discount)?;
    let policy: Vec<f64> = policy.into_iter().map(f64::from).collect();
    reference.compare("gvi_policy", &policy, Tolerance::Mismatches(0))?;
    Ok(())
}

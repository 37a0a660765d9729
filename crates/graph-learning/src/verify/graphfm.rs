//! Losses and gradients of self-supervised methods, schedules, masks, link scores, metrics.

use super::{compare_gradients, edge_list, indices, tensor, var, Weights};
use crate::contrastive::{drop_rates, edge_weights, feature_weights, Centrality};
use crate::conv::Mlp;
use crate::metrics::{
    adjusted_rand_index, average_precision, normalized_mutual_information, roc_auc,
};
use crate::ssl::losses::{
    barlow_twins, bootstrap, cca, cross_layers, efficient_contrast, link_loss, link_probability,
    scaled_cosine_error, warmup_cosine, MaskPlan, Redundancy,
};
use crate::Result;
use candle_core::{Device, Tensor, Var};
use candle_nn::Activation;
use tensor_core::verify::{Reference, Tolerance};

const TOLERANCE: Tolerance = Tolerance::Mixed(1e-9);
/// GCA's weights were computed in f32 by the published code.
const SINGLE: Tolerance = Tolerance::Mixed(1e-5);

/// Checks every tensor of the file.
///
/// # Errors
/// An error when the file lacks an input; a difference is a failed comparison instead.
pub fn graphfm(reference: &mut Reference) -> Result<()> {
    let (za, zb) = (var(reference, "za")?, var(reference, "zb")?);
    losses(reference, &za, &zb)?;
    schedules(reference)?;
    links(reference, &za, &zb)?;
    views(reference)?;
    metrics(reference)?;
    mask(reference)
}

fn losses(reference: &mut Reference, za: &Var, zb: &Var) -> Result<()> {
    let check = |reference: &mut Reference, name: &str, loss: Tensor| -> Result<()> {
        reference.compare_tensor(name, &loss, TOLERANCE)?;
        let grads = [
            (format!("{name}_grad_za"), za),
            (format!("{name}_grad_zb"), zb),
        ];
        compare_gradients(reference, &loss, &grads, TOLERANCE)
    };
    let plain = barlow_twins(za, zb, Redundancy::Decorrelated)?;
    check(reference, "gbt_loss", plain)?;
    check(
        reference,
        "hsic_loss",
        barlow_twins(za, zb, Redundancy::Hsic)?,
    )?;
    let lambda = reference.number("cca_lambda")?;
    check(reference, "cca_loss", cca(za, zb, lambda)?)?;
    for name in reference.names() {
        let alpha = name
            .strip_prefix("sce_loss_alpha")
            .and_then(|a| a.parse().ok());
        if let Some(alpha) = alpha {
            check(reference, &name, scaled_cosine_error(za, zb, alpha)?)?;
        }
    }
    let (t1, t2) = (
        tensor(reference, "bgrl_target1")?,
        tensor(reference, "bgrl_target2")?,
    );
    check(reference, "bgrl_loss", bootstrap(za, zb, &t1, &t2)?)?;
    let graph = edge_list(reference, "edge_index", za.dims()[0])?;
    let (t, lam) = (reference.number("temp")?, reference.number("ecl_lam")?);
    let loss = efficient_contrast(graph.with_loops()?, za, zb, t, lam, None)?;
    check(reference, "ecl_loss", loss)
}

fn schedules(reference: &mut Reference) -> Result<()> {
    let steps = indices(reference, "sched_steps")?;
    let (warmup, total) = (
        reference.number("sched_warmup")?,
        reference.number("sched_total")?,
    );
    let max = reference.number("sched_max")?;
    let lr: Vec<f64> = steps
        .iter()
        .map(|s| warmup_cosine(*s as usize, max, warmup, total))
        .collect();
    reference.compare("sched_lr", &lr, TOLERANCE)?;
    let momentum: Vec<f64> = steps
        .iter()
        .map(|s| 1.0 - warmup_cosine(*s as usize, max, 0, total))
        .collect();
    Ok(reference.compare("sched_momentum", &momentum, TOLERANCE)?)
}

fn links(reference: &mut Reference, za: &Var, zb: &Var) -> Result<()> {
    let ends = indices(reference, "s2_edges")?;
    let (u, v) = ends.split_at(ends.len() / 2);
    let end = |ids: &[u32]| Tensor::from_slice(ids, ids.len(), &Device::Cpu);
    let layers = [za.as_tensor().clone(), zb.as_tensor().clone()];
    let products = cross_layers(&layers, &end(u)?, &end(v)?)?;
    reference.compare_tensor("s2_cross", &products, TOLERANCE)?;
    let (mut weights, mut widths) = (Weights::default(), Vec::new());
    for layer in 0.. {
        if !reference.has(&format!("s2_W{layer}")) {
            break;
        }
        let w = var(reference, &format!("s2_W{layer}"))?;
        let b = var(reference, &format!("s2_b{layer}"))?;
        if widths.is_empty() {
            widths.push(w.dims()[1]);
        }
        widths.push(w.dims()[0]);
        weights.0.insert(format!("{}.weight", 2 * layer), w);
        weights.0.insert(format!("{}.bias", 2 * layer), b);
    }
    let decoder = Mlp::new(&widths, Activation::Relu, weights.builder())?;
    let p = link_probability(&decoder, &products)?;
    reference.compare_tensor("s2_prob", &p, TOLERANCE)?;
    let half = p.elem_count() / 2;
    let loss = link_loss(&p.narrow(0, 0, half)?, &p.narrow(0, half, half)?)?;
    Ok(reference.compare_tensor("s2_loss", &loss, TOLERANCE)?)
}

fn views(reference: &mut Reference) -> Result<()> {
    let x = tensor(reference, "gca_x")?;
    let graph = edge_list(reference, "edge_index", x.dims()[0])?;
    let weights = edge_weights(&graph, Centrality::Degree)?;
    reference.compare("gca_edge_weight", &weights, SINGLE)?;
    let (p, most) = (
        reference.number("gca_p")?,
        reference.number("gca_threshold")?,
    );
    let rates = drop_rates(&weights, p, most)?;
    reference.compare("gca_edge_drop_prob", &rates, SINGLE)?;
    let walk = Centrality::PageRank { steps: 10 }.of(&graph)?;
    reference.compare("gca_pagerank", &walk, SINGLE)?;
    let features = feature_weights(&graph, &x.into(), Centrality::Degree)?;
    Ok(reference.compare("gca_feature_weight", &features, SINGLE)?)
}

fn metrics(reference: &mut Reference) -> Result<()> {
    let scores = reference.input("m_scores")?.values;
    let labels = reference.input("m_labels")?.values;
    let labels: Vec<bool> = labels.into_iter().map(|l| l != 0.0).collect();
    reference.compare("m_auc", &[roc_auc(&scores, &labels)?], TOLERANCE)?;
    let precision = average_precision(&scores, &labels)?;
    reference.compare("m_ap", &[precision], TOLERANCE)?;
    let (a, b) = (
        indices(reference, "m_clust_a")?,
        indices(reference, "m_clust_b")?,
    );
    let shared = normalized_mutual_information(&a, &b)?;
    reference.compare("m_nmi", &[shared], TOLERANCE)?;
    Ok(reference.compare("m_ari", &[adjusted_rand_index(&a, &b)?], TOLERANCE)?)
}

fn mask(reference: &mut Reference) -> Result<()> {
    let (x, token) = (
        tensor(reference, "mask_x")?,
        tensor(reference, "mask_token")?,
    );
    let (rate, replace) = (
        reference.number("mask_rate")?,
        reference.number("replace_rate")?,
    );
    let nodes = indices(reference, "mask_perm")?;
    let among = indices(reference, "mask_perm2")?;
    let sources = indices(reference, "mask_choice")?;
    let plan = MaskPlan::new(rate, replace, &nodes, &among, &sources)?;
    Ok(reference.compare_tensor("mask_out", &plan.apply(&x, &token)?, TOLERANCE)?)
}

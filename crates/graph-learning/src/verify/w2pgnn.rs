//! Alignment, estimators, barycenters, proximal and Gromov-Wasserstein transport, resizing.

use super::{indices, tensor};
use crate::feasibility::entropic;
use crate::graph::Graph;
use crate::graphon::{
    block_means, estimate_aligned, histogram, labels_of, mean, sba_blocks, sizes,
    target_distribution, to_tensor, Aligned, BarycenterConfig, GraphonEstimator, StepFunction,
};
use crate::topology::Topology;
use crate::Result;
use candle_core::{Device, Tensor};
use convex::transport::{
    entropic_gromov_wasserstein, gromov_wasserstein, proximal_transport, GroundLoss, GwConfig,
    GwProblem, ProximalConfig,
};
use tensor_core::verify::{Reference, Tolerance};

/// What was computed in f32 by the published code.
const SINGLE: Tolerance = Tolerance::Mixed(1e-5);
const TRANSPORT: Tolerance = Tolerance::Mixed(1e-8);
const VALUE: Tolerance = Tolerance::Mixed(1e-6);

/// Checks every tensor of the file.
///
/// # Errors
/// An error when the file lacks an input; a difference is a failed comparison instead.
pub fn w2pgnn(reference: &mut Reference) -> Result<()> {
    let (graphs, topology) = read_graphs(reference)?;
    let rows = topology.len() / 8;
    let topology = Tensor::from_vec(topology, (rows, 8), &Device::Cpu)?;
    reference.compare_tensor("topo_features", &topology, TRANSPORT)?;
    alignment(reference, &graphs)?;
    estimators(reference, &graphs)?;
    proximal(reference)?;
    for (name, loss) in [("square", GroundLoss::Square), ("kl", GroundLoss::Kl)] {
        gromov(reference, name, loss)?;
    }
    fitted(reference)?;
    resized(reference)
}

/// All `graphI` in the order `orderI`, and their topological features.
fn read_graphs(reference: &mut Reference) -> Result<(Vec<Aligned>, Vec<f64>)> {
    let (mut graphs, mut topology) = (Vec::new(), Vec::new());
    for i in 0.. {
        let name = format!("graph{i}");
        if !reference.has(&name) {
            break;
        }
        let dense = reference.input(&name)?;
        let n = dense.shape[0];
        let present = (0..n * n).filter(|p| dense.values[*p] != 0.0);
        let ends = present.map(|p| ((p % n) as u32, (p / n) as u32));
        let (src, dst) = ends.unzip();
        let graph = Graph::from_edges(n, src, dst)?;
        topology.extend(Topology::of(&graph)?.features());
        let order = indices(reference, &format!("order{i}"))?;
        graphs.push(Aligned::with_order(&graph, &order)?);
    }
    Ok((graphs, topology))
}

fn alignment(reference: &mut Reference, graphs: &[Aligned]) -> Result<()> {
    reference.compare_tensor("aligned_mean", &to_tensor(&mean(graphs))?, TRANSPORT)?;
    let (n, _, k) = sizes(graphs);
    let shares: Vec<Vec<f64>> = graphs.iter().map(|g| g.shares().to_vec()).collect();
    let mut padded = shares.clone();
    padded.iter_mut().for_each(|list| list.resize(n, 0.0));
    for (name, shares) in [("p_b_from_unpadded", shares), ("p_b_from_padded", padded)] {
        reference.compare(name, &target_distribution(&shares, k)?, TRANSPORT)?;
    }
    Ok(())
}

fn estimators(reference: &mut Reference, graphs: &[Aligned]) -> Result<()> {
    let (n, block, _) = sizes(graphs);
    let means = mean(graphs);
    reference.compare_tensor(
        "sas_hist",
        &to_tensor(&histogram(means.as_ref(), block))?,
        SINGLE,
    )?;
    // Gaps that tie were taken in the order of the published code.
    let borders: Vec<usize> = indices(reference, "lg_borders")?
        .into_iter()
        .map(|b| b as usize)
        .collect();
    let blocks = block_means(&means, &labels_of(&borders, n));
    reference.compare_tensor("step_LG", &to_tensor(&blocks)?, SINGLE)?;
    let visits = indices(reference, "sba_visit")?;
    let threshold = reference.number("sba")?;
    let found = sba_blocks(graphs, &visits, threshold)?;
    let found: Vec<f64> = found.into_iter().map(|b| b as f64).collect();
    reference.compare("sba_block", &found, Tolerance::Mismatches(0))?;
    let barycenter = |gamma: f64, alpha: f64| -> Result<GraphonEstimator> {
        Ok(GraphonEstimator::Gwb(BarycenterConfig {
            beta: reference.number("beta")?,
            inner: reference.number("inner_iters")?,
            outer: reference.number("outer_iters")?,
            gamma,
            alpha,
        }))
    };
    let (gamma, alpha) = (reference.number("gamma")?, reference.number("alpha")?);
    let weight = Some(block as f64);
    let usvt = reference.number("usvt")?;
    let list = [
        ("SAS", GraphonEstimator::Sas { tv_weight: weight }, SINGLE),
        (
            "MC",
            GraphonEstimator::MatrixCompletion { rank: None },
            SINGLE,
        ),
        ("USVT", GraphonEstimator::Usvt { threshold: usvt }, SINGLE),
        ("SBA", GraphonEstimator::Sba { threshold }, TRANSPORT),
        ("GWB", barycenter(1.0, 0.0)?, TRANSPORT),
        ("FGWB", barycenter(gamma, 0.0)?, TRANSPORT),
        ("SGWB", barycenter(1.0, alpha)?, TRANSPORT),
        ("SFGWB", barycenter(gamma, alpha)?, TRANSPORT),
    ];
    let r = reference.number("r")?;
    for (name, estimator, tolerance) in list {
        let step = estimate_aligned(graphs, &estimator, &visits)?;
        let key = format!("step_{name}");
        reference.compare_tensor(&key, &step.to_tensor()?, tolerance)?;
        let key = format!("graphon_{name}");
        if reference.has(&key) {
            let resized = step.resize(r)?.to_tensor()?;
            reference.compare_tensor(&key, &resized, SINGLE)?;
        }
    }
    Ok(())
}

fn proximal(reference: &mut Reference) -> Result<()> {
    let cost = tensor(reference, "ot_cost")?;
    let (p, q) = (tensor(reference, "ot_p1")?, tensor(reference, "ot_p2")?);
    // The file's convention, whatever its other settings are.
    let config = ProximalConfig {
        beta: 0.1,
        max_iter: 200,
        ..ProximalConfig::default()
    };
    let plan = proximal_transport(&cost, &p, &q, None, &config)?;
    Ok(reference.compare_tensor("ot_plan", &plan, TRANSPORT)?)
}

/// The objective at the product and at the file's plan, and a value of ours that is no higher.
fn gromov(reference: &mut Reference, name: &str, loss: GroundLoss) -> Result<()> {
    let prefix = format!("gw_{name}_loss");
    let (c1, c2) = (tensor(reference, "gw_C1")?, tensor(reference, "gw_C2")?);
    let problem = GwProblem::uniform(&c1, &c2, loss)?;
    let (m, n) = (problem.p().len(), problem.q().len());
    let product = Tensor::full(1.0 / (m * n) as f64, (m, n), &Device::Cpu)?;
    let at_product = problem.objective(&product)?.0;
    let tight = Tolerance::Mixed(1e-10);
    reference.compare(&format!("{prefix}_at_product"), &[at_product], tight)?;
    let plan = tensor(reference, &format!("{prefix}_plan"))?;
    let at_plan = problem.objective(&plan)?.0;
    let key = format!("{prefix}_value");
    reference.compare(&key, &[at_plan], VALUE)?;
    let found = gromov_wasserstein(&problem, &GwConfig::default(), None)?;
    let theirs = reference.expected(&key)?.values[0];
    // Lower at a plan that is one is as good.
    let valid = found.marginal_error < 1e-9 && found.value < theirs;
    let value = if valid { theirs } else { found.value };
    reference.compare(&key, &[value], VALUE)?;
    let key = format!("gw_{name}_dist");
    if reference.has(&key) {
        reference.compare(&key, &[value.max(0.0).sqrt()], VALUE)?;
    }
    Ok(())
}

fn fitted(reference: &mut Reference) -> Result<()> {
    let (c1, c2) = (tensor(reference, "gw_C1")?, tensor(reference, "gw_C2")?);
    let problem = GwProblem::uniform(&c1, &c2, GroundLoss::HalfSquare)?;
    let config = entropic(reference.number("eps")?);
    let found = entropic_gromov_wasserstein(&problem, &config, None)?;
    reference.compare_tensor("ent_plan", &found.plan, VALUE)?;
    reference.compare("ent_loss", &[found.value], VALUE)?;
    let iterations = [found.iterations as f64];
    reference.compare("ent_iters", &iterations, Tolerance::Mismatches(0))?;
    let slope = problem.gradients(&found.plan)?.c1;
    reference.compare_tensor("ent_grad_envelope", &slope, SINGLE)?;
    // At convergence both gradients agree.
    Ok(reference.compare_tensor("ent_grad_unrolled", &slope, SINGLE)?)
}

fn resized(reference: &mut Reference) -> Result<()> {
    let step = StepFunction::from_tensor(&tensor(reference, "resize_in")?)?;
    let targets = reference.names();
    let sizes = targets.iter().filter_map(|n| n.strip_prefix("resize_"));
    for size in sizes.filter_map(|s| s.parse().ok()) {
        let name = format!("resize_{size}");
        let found = step.resize(size)?.to_tensor()?;
        reference.compare_tensor(&name, &found, VALUE)?;
    }
    Ok(())
}

//! When to pre-train: how well graphs like the downstream ones can be generated from a pre-training
//! collection.
//!
//! For whoever has graphs to pre-train on and wants to know, before training anything, whether they
//! help a task, and which of several collections to take. *When to Pre-Train Graph Neural Networks?
//! From Data Generation Perspective!*, Cao et al., KDD 2023, arXiv 2303.16458.
//!
//! Each basis makes graphons `B_1 .. B_m` of the pre-training graphs, whose mixtures are what they can
//! generate; the distance is the smallest that a mixture has to the downstream graphon:
//!
//! ```text
//! W(a)     = sum_j softmax(a)_j B_j
//! a        : min GW_eps(W(a), W_down)        loss (x - y)^2 / 2, entropic, gradient by the envelope
//! distance = sqrt GW(W, W_down)              exact, by conditional gradients
//! ```
//!
//! | basis | its graphons |
//! | --- | --- |
//! | [`Basis::Integrated`] | one of all graphs |
//! | [`Basis::Domain`] | one of each collection |
//! | [`Basis::Topological`] | one of each cluster by [`Topology`] |
//!
//! The fit is not convex and can end worse than it began: the mean of the basis and each graphon alone
//! compete with it, and the best counts. The square loss ranks collections; the KL loss of the
//! published report is not symmetric and blows up at zeros. No features are used.
//!
//! ```
//! use thalweg_graph_learning::feasibility::{
//!     feasibility, AlphaFit, Basis, FeasibilityConfig, Fit, GraphCollection,
//! };
//! use thalweg_graph_learning::graphon::synthesize_graphon;
//! use thalweg_graph_learning::RandomStream;
//!
//! let rng = &mut RandomStream::new(1);
//! let mut sample = |kind| -> Result<GraphCollection, thalweg_graph_learning::Error> {
//!     let graphon = synthesize_graphon(kind, 20)?;
//!     let graphs = graphon.sample_graphs(&[40; 6], rng)?;
//!     Ok(GraphCollection::new(graphs))
//! };
//! let (a, b, alike, other) = (sample(0)?, sample(3)?, sample(0)?, sample(11)?);
//! let fit = Fit::Alpha(AlphaFit { eps: 0.01, epochs: 40, ..Default::default() });
//! let config = FeasibilityConfig { fit, bases: vec![Basis::Domain], ..Default::default() };
//! let mut distance = |down| -> Result<f64, thalweg_graph_learning::Error> {
//!     Ok(feasibility(&[a.clone(), b.clone()], down, &config, &mut RandomStream::new(2))?.distance)
//! };
//! assert!(distance(&alike)? < distance(&other)?);
//! # Ok::<(), thalweg_graph_learning::Error>(())
//! ```

use crate::graph::{Direction, Graph};
use crate::graphon::{estimate, to_tensor, BarycenterConfig, GraphonEstimator, StepFunction};
use crate::metrics::kmeans;
use crate::topology::Topology;
use crate::{Error, RandomStream, Result};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::Optimizer;
/// How two graphons' values are compared, from `thalweg-convex`.
pub use convex::transport::GroundLoss;
use convex::transport::{
    entropic_gromov_wasserstein, gromov_wasserstein, EntropicGwConfig, GwConfig, GwProblem,
};
use faer::Mat;
use optim::{AdamW, AdamWConfig, ParamGroup};

/// Graphs of one origin.
#[derive(Debug, Clone)]
pub struct GraphCollection {
    graphs: Vec<Graph>,
}

/// Which neighborhoods of a large graph become a collection.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EgoConfig {
    /// Steps around a node.
    pub hops: usize,
    /// Share of the nodes, at least one. The published runs take 0.001 for pre-training and 1 for
    /// downstream graphs.
    pub fraction: f64,
    /// Larger neighborhoods are left out.
    pub node_threshold: usize,
}

impl Default for EgoConfig {
    fn default() -> Self {
        Self {
            hops: 2,
            fraction: 1.0,
            node_threshold: 1000,
        }
    }
}

impl GraphCollection {
    /// Graphs as they are.
    pub fn new(graphs: Vec<Graph>) -> Self {
        Self { graphs }
    }

    /// The neighborhoods of random nodes of one graph.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a share outside `(0, 1]`, a graph without nodes, and where no
    /// neighborhood is small enough.
    pub fn ego_networks(graph: &Graph, config: EgoConfig, rng: &mut RandomStream) -> Result<Self> {
        if !(config.fraction > 0.0 && config.fraction <= 1.0) {
            let expected = "a share in (0, 1]";
            return Err(Error::config(
                "EgoConfig::fraction",
                config.fraction,
                expected,
            ));
        }
        let mut nodes = rng.permutation(graph.num_nodes())?;
        let count = (config.fraction * nodes.len() as f64).round() as usize;
        nodes.truncate(count.max(1));
        nodes.sort_unstable();
        let mut graphs = Vec::new();
        for v in nodes {
            let around = graph.k_hop(&[v], config.hops, Direction::Both)?;
            if around.nodes.len() <= config.node_threshold {
                graphs.push(around.graph);
            }
        }
        if graphs.is_empty() {
            let value = format!("none up to {} nodes", config.node_threshold);
            return Err(Error::argument("ego networks", value, "at least one"));
        }
        Ok(Self { graphs })
    }

    /// The graphs.
    pub fn graphs(&self) -> &[Graph] {
        &self.graphs
    }
}

/// What mixtures are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Basis {
    /// One graphon of all graphs.
    Integrated,
    /// One of each collection.
    Domain,
    /// One of each cluster of graphs with like [`Topology`].
    Topological {
        /// Number of clusters; 5 as published.
        clusters: usize,
    },
}

/// How a mixture is found by gradients.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AlphaFit {
    /// Learning rate of Adam.
    pub lr: f64,
    /// Decay of Adam's first moment.
    pub beta1: f64,
    /// Decay of Adam's second moment.
    pub beta2: f64,
    /// L2 penalty of the logits.
    pub weight_decay: f64,
    /// Most steps.
    pub epochs: usize,
    /// Weight of the entropy in the fitted distance.
    pub eps: f64,
    /// After 30 steps, losses above the best that end the fit; the count begins anew every 20 steps.
    pub patience: usize,
}

impl Default for AlphaFit {
    fn default() -> Self {
        Self {
            lr: 0.05,
            beta1: 0.9,
            beta2: 0.99,
            weight_decay: 1e-5,
            epochs: 100,
            eps: 1e-5,
            patience: 3,
        }
    }
}

/// How a mixture is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Fit {
    /// Equal weights.
    Mean,
    /// The best of: fitted weights, equal ones, each graphon alone.
    Alpha(AlphaFit),
}

/// Settings of [`feasibility`].
#[derive(Debug, Clone, PartialEq)]
pub struct FeasibilityConfig {
    /// The estimator of all graphons.
    pub estimator: GraphonEstimator,
    /// The bases that are tried; the best counts.
    pub bases: Vec<Basis>,
    /// How a mixture is chosen.
    pub fit: Fit,
    /// Cells of all graphons; the largest estimate's where none is given. The published scripts resize
    /// to 1000, which costs much and changes nothing that a step function holds.
    pub resolution: Option<usize>,
    /// The ground loss of the reported distance.
    pub loss: GroundLoss,
}

impl Default for FeasibilityConfig {
    fn default() -> Self {
        Self {
            estimator: GraphonEstimator::Gwb(BarycenterConfig::default()),
            bases: vec![
                Basis::Integrated,
                Basis::Domain,
                Basis::Topological { clusters: 5 },
            ],
            fit: Fit::Alpha(AlphaFit::default()),
            resolution: None,
            loss: GroundLoss::Square,
        }
    }
}

impl FeasibilityConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] that names the first bad one.
    pub fn validate(&self) -> Result<()> {
        self.estimator.validate()?;
        if self.bases.is_empty() {
            return Err(Error::config(
                "FeasibilityConfig::bases",
                "none",
                "at least 1",
            ));
        }
        if self.bases.contains(&Basis::Topological { clusters: 0 }) {
            return Err(Error::config(
                "Basis::Topological::clusters",
                0,
                "at least 1",
            ));
        }
        if self.resolution == Some(0) {
            let field = "FeasibilityConfig::resolution";
            return Err(Error::config(field, 0, "at least 1, or None"));
        }
        let Fit::Alpha(fit) = self.fit else {
            return Ok(());
        };
        for (field, value) in [("AlphaFit::lr", fit.lr), ("AlphaFit::eps", fit.eps)] {
            if !(value.is_finite() && value > 0.0) {
                return Err(Error::config(field, value, "a positive number"));
            }
        }
        for (field, value) in [
            ("AlphaFit::epochs", fit.epochs),
            ("AlphaFit::patience", fit.patience),
        ] {
            if value == 0 {
                return Err(Error::config(field, 0, "at least 1"));
            }
        }
        Ok(())
    }
}

/// Which mixture was the best.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// That of the fit.
    Fitted,
    /// The mean of the basis.
    Mean,
    /// One graphon.
    Single(usize),
}

/// What one basis gave.
#[derive(Debug, Clone)]
pub struct BasisReport {
    /// The basis.
    pub basis: Basis,
    /// The distance of its best mixture.
    pub distance: f64,
    /// Which mixture that is.
    pub choice: Choice,
    /// Its weights.
    pub weights: Vec<f64>,
    /// The best mixture.
    pub graphon: StepFunction,
    /// The fitted loss at each step.
    pub fit_trace: Vec<f64>,
}

/// What was found.
#[derive(Debug, Clone)]
pub struct FeasibilityReport {
    /// The smallest distance over the bases: the smaller, the better pre-training is placed.
    pub distance: f64,
    /// All bases, in the order of the configuration.
    pub per_basis: Vec<BasisReport>,
    /// The downstream graphon.
    pub downstream: StepFunction,
}

impl FeasibilityReport {
    /// Minus the distance: the larger, the more feasible.
    pub fn feasibility(&self) -> f64 {
        -self.distance
    }
}

/// How far a downstream collection is from what the pre-training collections can generate.
///
/// # Errors
/// [`Error::InvalidConfig`]; [`Error::InvalidArgument`] for no collection, collections without edges,
/// and more clusters than graphs; those of the estimators and of the transport solvers.
pub fn feasibility(
    pretrain: &[GraphCollection],
    downstream: &GraphCollection,
    config: &FeasibilityConfig,
    rng: &mut RandomStream,
) -> Result<FeasibilityReport> {
    config.validate()?;
    if pretrain.is_empty() {
        return Err(Error::argument("collections", 0, "at least 1"));
    }
    let mut bases = Vec::new();
    for basis in &config.bases {
        bases.push((*basis, graphons(pretrain, *basis, &config.estimator, rng)?));
    }
    let target = estimate(downstream.graphs(), &config.estimator, rng)?;
    compare(&bases, &target, config)
}

/// The part of [`feasibility`] after the estimates: graphons of each basis against one graphon.
///
/// # Errors
/// As [`feasibility`].
pub fn compare(
    bases: &[(Basis, Vec<StepFunction>)],
    target: &StepFunction,
    config: &FeasibilityConfig,
) -> Result<FeasibilityReport> {
    config.validate()?;
    let own = bases.iter().flat_map(|(_, list)| list);
    let largest = own.map(StepFunction::cells).max().unwrap_or(0);
    let cells = config.resolution.unwrap_or(largest.max(target.cells()));
    let downstream = target.resize(cells)?;
    let mut per_basis = Vec::new();
    for (basis, list) in bases {
        if list.is_empty() {
            return Err(Error::argument("graphons of a basis", 0, "at least 1"));
        }
        let list: Vec<StepFunction> = list
            .iter()
            .map(|g| g.resize(cells))
            .collect::<Result<_>>()?;
        per_basis.push(best_mixture(*basis, &list, &downstream, config)?);
    }
    let distances = per_basis.iter().map(|b| b.distance);
    Ok(FeasibilityReport {
        distance: distances.fold(f64::INFINITY, f64::min),
        per_basis,
        downstream,
    })
}

/// The graphons of a basis.
///
/// # Errors
/// As [`feasibility`].
pub fn graphons(
    pretrain: &[GraphCollection],
    basis: Basis,
    estimator: &GraphonEstimator,
    rng: &mut RandomStream,
) -> Result<Vec<StepFunction>> {
    let all = || pretrain.iter().flat_map(|c| c.graphs()).cloned();
    match basis {
        Basis::Integrated => Ok(vec![estimate(&all().collect::<Vec<_>>(), estimator, rng)?]),
        Basis::Domain => {
            let each = pretrain
                .iter()
                .map(|c| estimate(c.graphs(), estimator, rng));
            each.collect()
        }
        Basis::Topological { clusters } => {
            let graphs: Vec<Graph> = all().filter(|g| g.num_edges() > 0).collect();
            let mut rows = Vec::with_capacity(8 * graphs.len());
            for graph in &graphs {
                rows.extend(Topology::of(graph)?.features());
            }
            let found = kmeans(&rows, 8, clusters, 10, rng)?;
            let of = |cluster: u32| -> Vec<Graph> {
                let pairs = graphs.iter().zip(&found.labels);
                pairs
                    .filter(|(_, c)| **c == cluster)
                    .map(|(g, _)| g.clone())
                    .collect()
            };
            let parts = (0..clusters as u32).map(of).filter(|part| !part.is_empty());
            parts.map(|part| estimate(&part, estimator, rng)).collect()
        }
    }
}

fn best_mixture(
    basis: Basis,
    list: &[StepFunction],
    target: &StepFunction,
    config: &FeasibilityConfig,
) -> Result<BasisReport> {
    let equal = vec![1.0 / list.len() as f64; list.len()];
    let mut candidates = vec![(Choice::Mean, equal)];
    let mut fit_trace = Vec::new();
    if let Fit::Alpha(fit) = config.fit {
        if list.len() > 1 {
            let (weights, trace) = fit_weights(list, target, fit)?;
            candidates.push((Choice::Fitted, weights));
            fit_trace = trace;
            for j in 0..list.len() {
                let alone = (0..list.len()).map(|i| if i == j { 1.0 } else { 0.0 });
                candidates.push((Choice::Single(j), alone.collect()));
            }
        }
    }
    let mut best: Option<BasisReport> = None;
    for (choice, weights) in candidates {
        let graphon = mixture(list, &weights)?;
        let distance = graphon_distance(&graphon, target, config.loss)?;
        if best.as_ref().is_none_or(|b| distance < b.distance) {
            best = Some(BasisReport {
                basis,
                distance,
                choice,
                weights,
                graphon,
                fit_trace: fit_trace.clone(),
            });
        }
    }
    best.ok_or_else(|| Error::argument("mixtures", 0, "a distance that is a number"))
}

/// `sqrt GW` of two step functions with equal weights of all cells, by conditional gradients from the
/// product plan.
///
/// # Errors
/// Those of the solver, for negative values under [`GroundLoss::Kl`].
pub fn graphon_distance(a: &StepFunction, b: &StepFunction, loss: GroundLoss) -> Result<f64> {
    let problem = GwProblem::uniform(&a.to_tensor()?, &b.to_tensor()?, loss)?;
    let found = gromov_wasserstein(&problem, &GwConfig::default(), None)?;
    Ok(found.value.max(0.0).sqrt())
}

/// `sum_j w_j B_j`, symmetric to the last bit.
fn mixture(list: &[StepFunction], weights: &[f64]) -> Result<StepFunction> {
    let k = list.first().map_or(0, StepFunction::cells);
    let mut sum = Mat::<f64>::zeros(k, k);
    for (graphon, w) in list.iter().zip(weights) {
        sum += faer::Scale(*w) * graphon.matrix();
    }
    StepFunction::checked(Mat::from_fn(k, k, |i, j| 0.5 * (sum[(i, j)] + sum[(j, i)])))
}

/// Steps before which the fit does not stop, and after which its count begins anew.
const FIRST_LOOK: usize = 30;
const COUNT_AGAIN: usize = 20;

/// The published solver's settings at an entropy of `eps`.
pub(crate) fn entropic(eps: f64) -> EntropicGwConfig {
    EntropicGwConfig {
        epsilon: eps,
        max_iter: 100,
        tol: 1e-6,
        check_every: 10,
        sweeps: 100,
        sweep_tol: 0.1,
        warm_start: false,
    }
}

/// The weights at the smallest fitted loss, and all losses.
fn fit_weights(
    list: &[StepFunction],
    target: &StepFunction,
    fit: AlphaFit,
) -> Result<(Vec<f64>, Vec<f64>)> {
    let logits = Var::ones(list.len(), DType::F64, &Device::Cpu)?;
    let config = AdamWConfig {
        beta1: fit.beta1,
        beta2: fit.beta2,
        weight_decay: fit.weight_decay,
        ..AdamWConfig::adam(fit.lr)
    };
    let group = ParamGroup::named(vec![("logits".into(), logits.clone())], config);
    let mut adam = AdamW::with_groups(vec![group])?;
    let flat: Vec<Vec<f64>> = list.iter().map(StepFunction::to_vec).collect();
    let target = mixture(std::slice::from_ref(target), &[1.0])?.to_tensor()?;
    let (mut trace, mut worse) = (Vec::new(), 0);
    let mut best: Option<(f64, Vec<f64>)> = None;
    for epoch in 0..fit.epochs {
        let weights = softmax(&logits.to_vec1::<f64>()?);
        let mixed = to_tensor(mixture(list, &weights)?.matrix())?;
        let problem = GwProblem::uniform(&mixed, &target, GroundLoss::HalfSquare)?;
        let found = entropic_gromov_wasserstein(&problem, &entropic(fit.eps), None)?;
        trace.push(found.value);
        let exceeded = best.as_ref().is_some_and(|(b, _)| found.value > *b);
        if best.as_ref().is_none_or(|(b, _)| found.value < *b) {
            best = Some((found.value, weights.clone()));
        }
        worse = if epoch % COUNT_AGAIN == 0 { 0 } else { worse } + usize::from(exceeded);
        if epoch > FIRST_LOOK && worse >= fit.patience {
            break;
        }
        let slope = problem
            .gradients(&found.plan)?
            .c1
            .flatten_all()?
            .to_vec1::<f64>()?;
        let inner = |b: &Vec<f64>| b.iter().zip(&slope).map(|(b, g)| b * g).sum::<f64>();
        let inner: Vec<f64> = flat.iter().map(inner).collect();
        let mean: f64 = weights.iter().zip(&inner).map(|(w, g)| w * g).sum();
        let grad: Vec<f64> = weights
            .iter()
            .zip(&inner)
            .map(|(w, g)| w * (g - mean))
            .collect();
        let mut grads = GradStore::default();
        grads.insert(&logits, Tensor::from_vec(grad, list.len(), &Device::Cpu)?);
        adam.step(&grads)?;
    }
    let best = best.ok_or_else(|| Error::argument("fitted loss", "none", "a number"))?;
    Ok((best.1, trace))
}

fn softmax(logits: &[f64]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let exp: Vec<f64> = logits.iter().map(|a| (a - max).exp()).collect();
    let sum: f64 = exp.iter().sum();
    exp.into_iter().map(|e| e / sum).collect()
}

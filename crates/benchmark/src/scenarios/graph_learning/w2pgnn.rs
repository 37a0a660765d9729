//! Feasibility of pre-training: do downstream graphs rank by how well the pre-training graphs can
//! generate them?

use super::pictures::{heat_maps, HeatMap};
use crate::scenario::{
    metric, Arm, Better, Claim, Curve, Data, Definition, Metric, Paper, Role, Scenario, Setting,
    TrialContext, TrialOutcome,
};
use crate::{Error, Result};
use graph_learning::feasibility::{
    compare, graphon_distance, graphons, AlphaFit, Basis, EgoConfig, FeasibilityConfig, Fit,
    GraphCollection, GroundLoss,
};
use graph_learning::graphon::{
    estimate, synthesize_graphon, BarycenterConfig, GraphonEstimator, StepFunction,
};
use graph_learning::io::{planetoid, tu_dataset};
use graph_learning::topology::Topology;
use graph_learning::Graph;
use tensor_core::random::RandomStream;

/// The graphons of the three pre-training domains.
const DOMAINS: [usize; 3] = [0, 6, 3];
/// Graphs of each collection, with 60 to 89 nodes.
const GRAPHS: usize = 12;
/// Cells of the graphons that are sampled from.
const FINE: usize = 200;
/// Downstream collections: from a domain, between two, two blocks, nearly complete.
const DOWNSTREAM: [&str; 4] = ["same", "in", "sbm", "dense"];
/// The side of the blocks of the largest possible graph: the published weight.
const PUBLISHED_WEIGHT: f64 = 7.0;
/// Ego networks, or molecules, of each half of a domain with real data.
const HALF: usize = 24;

pub(in crate::scenarios) struct W2pGnn;

impl Scenario for W2pGnn {
    fn definition(&self) -> Definition {
        let distance = |name, label, better| Metric {
            name,
            label,
            better,
        };
        let mut claims = Vec::new();
        let mut ordered = |arm: &'static str, ids: [&'static str; 4]| {
            let at = |name: &'static str| metric(arm, name);
            let words = "the same domain is nearer than a mixture of two";
            claims.push(Claim::every_seed(ids[0], words, at("same").below(at("in"))));
            let words = "a mixture is at most half as far as two blocks";
            claims.push(Claim::every_seed(
                ids[1],
                words,
                at("in").at_most(at("sbm") * 0.5),
            ));
            let words = "a mixture is nearer than two blocks";
            claims.push(Claim::every_seed(ids[2], words, at("in").below(at("sbm"))));
            let words = "two blocks are nearer than nearly complete graphs";
            claims.push(Claim::every_seed(
                ids[3],
                words,
                at("sbm").below(at("dense")),
            ));
        };
        ordered("gwb", ["gwb-same", "gwb-half", "gwb-in", "gwb-sbm"]);
        ordered(
            "histogram",
            [
                "histogram-same",
                "histogram-half",
                "histogram-in",
                "histogram-sbm",
            ],
        );
        claims.push(Claim::every_seed(
            "published-weight",
            "with the published weight of the total variation, mixture and blocks differ by less than 0.02",
            (metric("flattened", "sbm") - metric("flattened", "in")).abs().below(0.02),
        ));
        claims.push(Claim::every_seed(
            "domains",
            "two thirds of the domains, or more, find their own other half nearest",
            metric("halves", "own_first").at_least(2.0 / 3.0),
        ));
        Definition {
            slug: "w2pgnn",
            title: "When to pre-train (W2PGNN)",
            paper: Paper {
                title: "When to Pre-Train Graph Neural Networks? From Data Generation Perspective!",
                venue: "KDD 2023",
                arxiv: "2303.16458",
            },
            krate: "graph-learning",
            module: "feasibility",
            tags: &["graph", "transfer"],
            version: 3,
            summary: "Three pre-training domains, sampled from the graphons uv, exp(-max^0.75) and (u + v)/2: 12 graphs of \
                      60 to 89 nodes each. Four downstream collections: from the first graphon (same), from the mean of the \
                      first and the third (in), from two blocks (sbm), and nearly complete graphs (dense). The distance is \
                      that of the best mixture of the domains' graphons: fitted (40 steps, entropy 0.01), equal, or one of \
                      them; 14 cells, 30 for singular values. Beside the estimators: the distance between means of seven \
                      graph statistics, standardized, to the nearest domain.",
            notes: "The arm `halves` takes half of each domain as its basis and asks which basis is nearest to each other \
                    half: the generated domains, or with real data neighborhoods in Cora and CiteSeer and the graphs of \
                    MUTAG and PROTEINS. Those two always find their own other half; Cora and CiteSeer, whose neighborhoods \
                    are alike, were taken for each other in 5 of 10 cases. The histogram's mixture is at its bound: in one seed \
                    of five it is 0.506 times as far as two blocks, and 0.22 to 0.29 times in the others. The total variation weight of \
                    the published code keeps little but the density.",
            data: Data { embedded: "graphons", real: Some("graphs") },
            arms: vec![
                Arm::new("statistics", "graph statistics", Role::Baseline),
                Arm::new("flattened", "histogram, published denoising", Role::Baseline),
                Arm::new("gwb", "barycenters", Role::Method),
                Arm::new("histogram", "histogram", Role::Variant),
                Arm::new("usvt", "singular values", Role::Variant),
                Arm::new("halves", "barycenters, own other half", Role::Variant),
            ],
            metrics: vec![
                distance("same", "distance, same domain", Better::Neither),
                distance("in", "distance, mixture of two", Better::Neither),
                distance("sbm", "distance, two blocks", Better::Neither),
                distance("dense", "distance, nearly complete", Better::Neither),
                distance("own_first", "share of domains that find their own half", Better::Higher),
            ],
            claims,
            full: None,
        }
    }

    fn run(&self, arm: &Arm, _: &Setting, trial: &TrialContext) -> Result<TrialOutcome> {
        let gwb = GraphonEstimator::Gwb(BarycenterConfig::default());
        match arm.name {
            "halves" => halves(trial, &gwb),
            "statistics" => statistics(trial),
            "histogram" => ranked(trial, &GraphonEstimator::Sas { tv_weight: None }, 14),
            "flattened" => {
                let tv_weight = Some(PUBLISHED_WEIGHT);
                ranked(trial, &GraphonEstimator::Sas { tv_weight }, 14)
            }
            "usvt" => ranked(trial, &GraphonEstimator::Usvt { threshold: 0.2 }, 30),
            _ => ranked(trial, &gwb, 14),
        }
    }
}

fn sample(graphon: &StepFunction, count: usize, rng: &mut RandomStream) -> Result<GraphCollection> {
    let mut sizes = Vec::with_capacity(count);
    for _ in 0..count {
        sizes.push(60 + rng.below(30)?);
    }
    Ok(GraphCollection::new(graphon.sample_graphs(&sizes, rng)?))
}

/// The pre-training domains and the downstream collections of a seed.
fn collections(trial: &TrialContext) -> Result<(Vec<GraphCollection>, Vec<GraphCollection>)> {
    let fine = |kind| synthesize_graphon(kind, FINE);
    let mut rng = trial.stream("pre-training graphs");
    let domains = DOMAINS.map(|kind| sample(&fine(kind)?, GRAPHS, &mut rng));
    let domains: Vec<_> = domains.into_iter().collect::<Result<_>>()?;
    let (first, third) = (fine(0)?.to_vec(), fine(3)?.to_vec());
    let cells = |f: &dyn Fn(usize) -> f64| StepFunction::from_fn(FINE, |i, j| f(i * FINE + j));
    let truths = [
        fine(0)?,
        cells(&|p| 0.5 * (first[p] + third[p]))?,
        fine(11)?,
        cells(&|p| 1.0 - 0.05 * first[p])?,
    ];
    let mut rng = trial.stream("downstream graphs");
    let downstream = truths.iter().map(|truth| sample(truth, GRAPHS, &mut rng));
    Ok((domains, downstream.collect::<Result<_>>()?))
}

fn ranked(
    trial: &TrialContext,
    estimator: &GraphonEstimator,
    cells: usize,
) -> Result<TrialOutcome> {
    let (domains, downstream) = collections(trial)?;
    let config = FeasibilityConfig {
        estimator: estimator.clone(),
        bases: vec![Basis::Domain],
        fit: Fit::Alpha(AlphaFit {
            eps: 0.01,
            epochs: 40,
            ..AlphaFit::default()
        }),
        resolution: Some(cells),
        loss: GroundLoss::Square,
    };
    let steps = downstream.len() + 1;
    trial.step(0, steps)?;
    let rng = &mut trial.stream("estimator");
    let bases = [(
        Basis::Domain,
        graphons(&domains, Basis::Domain, estimator, rng)?,
    )];
    let mut outcome = TrialOutcome::default();
    let mut maps = Vec::new();
    for (i, (name, collection)) in DOWNSTREAM.iter().zip(&downstream).enumerate() {
        trial.step(i + 1, steps)?;
        let target = estimate(collection.graphs(), estimator, rng)?;
        let report = compare(&bases, &target, &config)?;
        outcome = outcome.metric(name, report.distance);
        let best = report
            .per_basis
            .first()
            .ok_or_else(|| Error::Trial("no basis was compared".into()))?;
        if !best.fit_trace.is_empty() {
            let mut curve = Curve::new(format!("fitted loss, {name}"), "step");
            for (k, loss) in best.fit_trace.iter().enumerate() {
                curve.push((k + 1) as f64, *loss);
            }
            outcome = outcome.curve(curve);
        }
        maps.push((
            report.distance,
            *name,
            report.downstream.clone(),
            best.graphon.clone(),
        ));
    }
    maps.sort_by(|a, b| a.0.total_cmp(&b.0));
    let map = |title: String, step: &StepFunction| HeatMap {
        title: vec![title],
        cells: step.cells(),
        values: step.to_vec(),
    };
    let pair = |(place, (d, name, down, best)): (usize, &(f64, _, _, _))| {
        let title = format!("{}. {name}: {d:.3}", place + 1);
        [map(title, down), map(format!("mixture for {name}"), best)]
    };
    let maps: Vec<HeatMap> = maps.iter().enumerate().flat_map(pair).collect();
    let caption = "Downstream graphons, the most feasible first, by their distance, and the nearest mixture of the \
                   domains beside each: white is an edge probability of 0, blue of 1.";
    Ok(outcome.picture(heat_maps(caption, &maps)))
}

fn mean_features(collection: &GraphCollection) -> Result<Vec<[f64; 8]>> {
    let graphs = collection.graphs().iter().filter(|g| g.num_edges() > 0);
    graphs.map(|g| Ok(Topology::of(g)?.features())).collect()
}

/// Distances of mean graph statistics to the nearest domain, each statistic in units of its deviation
/// over all pre-training graphs.
fn statistics(trial: &TrialContext) -> Result<TrialOutcome> {
    let (domains, downstream) = collections(trial)?;
    trial.step(0, 1)?;
    let lists: Vec<Vec<[f64; 8]>> = domains.iter().map(mean_features).collect::<Result<_>>()?;
    let all: Vec<[f64; 8]> = lists.iter().flatten().copied().collect();
    let mean = |list: &[[f64; 8]], f: usize| {
        list.iter().map(|x| x[f]).sum::<f64>() / list.len().max(1) as f64
    };
    let deviation: Vec<f64> = (0..8)
        .map(|f| {
            let m = mean(&all, f);
            let squares = all.iter().map(|x| (x[f] - m) * (x[f] - m));
            (squares.sum::<f64>() / all.len() as f64).sqrt().max(1e-12)
        })
        .collect();
    let mut outcome = TrialOutcome::default();
    for (name, collection) in DOWNSTREAM.iter().zip(&downstream) {
        let own = mean_features(collection)?;
        let far = |list: &Vec<[f64; 8]>| {
            let terms = (0..8).map(|f| ((mean(&own, f) - mean(list, f)) / deviation[f]).powi(2));
            terms.sum::<f64>().sqrt()
        };
        outcome = outcome.metric(name, lists.iter().map(far).fold(f64::INFINITY, f64::min));
    }
    Ok(outcome)
}

/// Two disjoint halves of each domain.
type Halves = Vec<(&'static str, GraphCollection, GraphCollection)>;

fn domain_halves(trial: &TrialContext) -> Result<Halves> {
    let mut rng = trial.stream("halves");
    let mut halves = |name, mut graphs: Vec<Graph>| -> Result<_> {
        rng.shuffle(&mut graphs)?;
        graphs.truncate(2 * HALF);
        let second = graphs.split_off(graphs.len() / 2);
        Ok((
            name,
            GraphCollection::new(graphs),
            GraphCollection::new(second),
        ))
    };
    let Some(folder) = &trial.data else {
        let mut rng = trial.stream("pre-training graphs");
        let names = ["uv", "exp(-max^0.75)", "(u + v) / 2"];
        let each = DOMAINS.into_iter().zip(names).map(|(kind, name)| {
            let drawn = sample(&synthesize_graphon(kind, FINE)?, 2 * GRAPHS, &mut rng)?;
            halves(name, drawn.graphs().to_vec())
        });
        return each.collect();
    };
    let root = folder.join("graphs");
    let mut found = Halves::new();
    for name in ["cora", "citeseer"] {
        let data = planetoid(root.join(name), name)?;
        let config = EgoConfig {
            // The smallest and the largest neighborhoods say little, and cost most.
            node_threshold: 100,
            ..EgoConfig::default()
        };
        let rng = &mut trial.stream(name);
        let egos = GraphCollection::ego_networks(&data.graph, config, rng)?;
        let large = egos.graphs().iter().filter(|g| g.num_nodes() >= 10);
        found.push(halves(name, large.cloned().collect())?);
    }
    for (folder, name) in [("mutag", "MUTAG"), ("proteins", "PROTEINS")] {
        let mut graphs = tu_dataset(root.join(folder), name)?.graphs;
        graphs.retain(|g| (10..=100).contains(&g.num_nodes()));
        found.push(halves(folder, graphs)?);
    }
    Ok(found)
}

fn halves(trial: &TrialContext, estimator: &GraphonEstimator) -> Result<TrialOutcome> {
    let domains = domain_halves(trial)?;
    let rng = &mut trial.stream("estimator");
    let mut sides = Vec::new();
    for (i, (_, one, two)) in domains.iter().enumerate() {
        trial.step(i, domains.len() + 1)?;
        let first = estimate(one.graphs(), estimator, rng)?;
        sides.push((first, estimate(two.graphs(), estimator, rng)?));
    }
    let cells = sides.iter().map(|(a, b)| a.cells().max(b.cells())).max();
    let cells = cells.unwrap_or(1);
    let mut own_first = 0.0;
    let mut maps = Vec::new();
    for (i, (name, _, _)) in domains.iter().enumerate() {
        let target = sides[i].1.resize(cells)?;
        let mut distances = Vec::new();
        for (basis, _) in &sides {
            distances.push(graphon_distance(
                &basis.resize(cells)?,
                &target,
                GroundLoss::Square,
            )?);
        }
        let nearest = distances.iter().copied().fold(f64::INFINITY, f64::min);
        if distances[i] == nearest {
            own_first += 1.0;
        }
        let far = |((basis, _, _), d): (&(&str, _, _), &f64)| format!("to {basis}: {d:.3}");
        let shown = domains.iter().zip(&distances).map(far);
        maps.push(HeatMap {
            title: std::iter::once(format!("half of {name}"))
                .chain(shown)
                .collect(),
            cells,
            values: target.to_vec(),
        });
    }
    let caption = "The other half of each domain, with its distance from the basis of each domain: white is an \
                   edge probability of 0, blue of 1.";
    Ok(TrialOutcome::default()
        .metric("own_first", own_first / domains.len().max(1) as f64)
        .picture(heat_maps(caption, &maps)))
}

use crate::support::*;
use candle_core::{DType, Tensor};
use graph_learning::feasibility::*;
use graph_learning::generate::{erdos_renyi, grid, ring, star};
use graph_learning::graphon::*;
use graph_learning::topology::Topology;
use graph_learning::{Error, Graph, RandomStream};
use proptest::prelude::*;
use std::collections::BTreeMap;
use tensor_core::verify::Array;

#[test]
fn reference() {
    let report = FILES.verify("w2pgnn", graph_learning::verify::w2pgnn);
    assert_passed(&report, |_| false);
    assert!(report.uncovered.is_empty());
    assert_eq!(report.comparisons.len(), 33);
}

/// Nodes named the other way round, with orders that say so; one resizing more and one less; none of what
/// a file may lack.
#[test]
fn the_adaptor_reads_the_form() {
    let change = |tensors: &mut BTreeMap<String, Array>, _: &mut BTreeMap<String, String>| {
        for i in 0..3 {
            let graph = tensors.get_mut(&format!("graph{i}")).unwrap();
            graph.values.reverse();
            let last = graph.shape[0] as f64 - 1.0;
            let order = tensors.get_mut(&format!("order{i}")).unwrap();
            order.values.iter_mut().for_each(|v| *v = last - *v);
        }
        let same = tensors["resize_in"].clone();
        tensors.insert(format!("resize_{}", same.shape[0]), same);
        for gone in ["resize_3", "graphon_SAS", "graphon_USVT", "gw_kl_dist"] {
            tensors.remove(gone).unwrap();
        }
    };
    let report = FILES.verify_variant("w2pgnn", change, graph_learning::verify::w2pgnn);
    assert_passed(&report, |_| false);
    assert_eq!(report.comparisons.len(), 30);
}

/// Another number of graphs: what is made of all of them differs, what is of each graph does not.
#[test]
fn the_adaptor_counts_the_graphs() {
    let change = |tensors: &mut BTreeMap<String, Array>, _: &mut BTreeMap<String, String>| {
        tensors.remove("graph2").unwrap();
        tensors.remove("order2").unwrap();
        tensors
            .get_mut("topo_features")
            .unwrap()
            .shorten(0, 2)
            .unwrap();
    };
    let report = FILES.verify_variant("w2pgnn", change, graph_learning::verify::w2pgnn);
    let passed = |name| passed(&report, name);
    assert!(passed("topo_features") && passed("ot_plan") && !passed("step_GWB"));
    assert!(report.unknown.is_empty());
}

fn estimators() -> Vec<GraphonEstimator> {
    let barycenter = |gamma, alpha| {
        GraphonEstimator::Gwb(BarycenterConfig {
            gamma,
            alpha,
            ..BarycenterConfig::default()
        })
    };
    vec![
        GraphonEstimator::Sas { tv_weight: None },
        GraphonEstimator::Sas {
            tv_weight: Some(0.1),
        },
        GraphonEstimator::LargestGap { signed: true },
        GraphonEstimator::LargestGap { signed: false },
        GraphonEstimator::MatrixCompletion { rank: None },
        GraphonEstimator::MatrixCompletion { rank: Some(2) },
        GraphonEstimator::Usvt { threshold: 0.3 },
        GraphonEstimator::Sba { threshold: 0.1 },
        barycenter(1.0, 0.0),
        barycenter(0.5, 0.0),
        barycenter(1.0, 2e-4),
        barycenter(0.5, 2e-4),
    ]
}

proptest! {
    #![proptest_config(cases(6))]

    /// Every estimate is symmetric and a probability.
    #[test]
    fn estimates_are_graphons(seed in 0u64..1000, n in 24usize..40) {
        let rng = &mut RandomStream::new(seed);
        let truth = synthesize_graphon((seed % 13) as usize, 20).unwrap();
        let graphs = truth.sample_graphs(&[n, n - 5, n - 9, n], rng).unwrap();
        for estimator in estimators() {
            let found = estimate(&graphs, &estimator, rng).unwrap();
            for i in 0..found.cells() {
                for j in 0..found.cells() {
                    let (a, b) = (found.get(i, j).unwrap(), found.get(j, i).unwrap());
                    prop_assert!((a - b).abs() < 1e-9, "{estimator:?} {a} {b}");
                    prop_assert!((-1e-12..=1.0 + 1e-12).contains(&a), "{estimator:?} {a}");
                }
            }
        }
    }

    /// Resizing keeps constants, symmetry and the range.
    #[test]
    fn resizing_interpolates(values in prop::collection::vec(0.0f64..1.0, 9), r in 1usize..12) {
        let of = |i: usize, j: usize| values[i.max(j) * 3 + i.min(j)];
        let step = StepFunction::from_fn(3, of).unwrap();
        let resized = step.resize(r).unwrap();
        for i in 0..r {
            for j in 0..r {
                let v = resized.get(i, j).unwrap();
                prop_assert!((0.0..=1.0).contains(&v));
                prop_assert!((v - resized.get(j, i).unwrap()).abs() < 1e-12);
            }
        }
        let flat = StepFunction::from_fn(3, |_, _| 0.25).unwrap().resize(r).unwrap();
        prop_assert!(flat.to_vec().iter().all(|v| (v - 0.25).abs() < 1e-12));
    }
}

/// More nodes, smaller error: the descending estimate against the descending truth.
#[test]
fn estimates_converge() {
    // `(1 - u)(1 - v)` runs from large degrees to small ones.
    let truth = StepFunction::from_fn(40, |i, j| {
        let at = |i: usize| 1.0 - (i as f64 + 0.5) / 40.0;
        at(i) * at(j)
    })
    .unwrap();
    let error = |n: usize| -> f64 {
        let mut sum = 0.0;
        for seed in 0..3 {
            let rng = &mut RandomStream::new(seed);
            let graphs = truth.sample_graphs(&[n; 4], rng).unwrap();
            let estimator = GraphonEstimator::Sas { tv_weight: None };
            sum += estimate(&graphs, &estimator, rng)
                .unwrap()
                .distance(&truth)
                .unwrap();
        }
        sum / 3.0
    };
    let (small, large) = (error(20), error(160));
    assert!(large < 0.7 * small, "{small} {large}");
    // And graphs are likelier under what they came from.
    let rng = &mut RandomStream::new(9);
    let graphs = truth.sample_graphs(&[60; 2], rng).unwrap();
    let flat = StepFunction::from_fn(40, |_, _| truth.density()).unwrap();
    let better = truth.log_likelihood(&graphs[0]).unwrap();
    assert!(better > flat.log_likelihood(&graphs[0]).unwrap());
}

/// The published weight flattens the histogram: only its mean is left.
#[test]
fn the_published_denoising_flattens() {
    let rng = &mut RandomStream::new(2);
    let truth = synthesize_graphon(0, 20).unwrap();
    let graphs = truth.sample_graphs(&[60; 5], rng).unwrap();
    let spread = |weight| {
        let found = estimate(
            &graphs,
            &GraphonEstimator::Sas { tv_weight: weight },
            &mut RandomStream::new(0),
        )
        .unwrap();
        let values = found.to_vec();
        let max = values.iter().copied().fold(0.0, f64::max);
        max - values.iter().copied().fold(1.0, f64::min)
    };
    assert!(spread(None) > 0.7);
    assert!(spread(Some(6.0)) < 0.1 * spread(None));
}

/// A barycenter of one graph, seen often, is the graph's own blocks: block models come back.
#[test]
fn blocks_come_back() {
    let blocks = StepFunction::from_fn(2, |i, j| [[0.9, 0.1], [0.1, 0.5]][i][j]).unwrap();
    let rng = &mut RandomStream::new(4);
    let graph = blocks.sample_graphs(&[60], rng).unwrap().remove(0);
    let found = |copies: usize| {
        let graphs = vec![graph.clone(); copies];
        let config = BarycenterConfig::default();
        estimate(
            &graphs,
            &GraphonEstimator::Gwb(config),
            &mut RandomStream::new(0),
        )
        .unwrap()
    };
    let (one, three) = (found(1), found(3));
    assert!(one.distance(&three).unwrap() < 1e-9);
    let (top, bottom) = (one.get(0, 0).unwrap(), one.get(0, one.cells() - 1).unwrap());
    assert!(top > 0.6 && bottom < 0.4, "{top} {bottom}");
}

#[test]
fn distances_ignore_order() {
    let step = StepFunction::from_fn(6, |i, j| ((i * 5 + j * 5) % 7) as f64 / 7.0).unwrap();
    let order = [3, 1, 5, 0, 2, 4];
    let moved = StepFunction::from_fn(6, |i, j| step.get(order[i], order[j]).unwrap()).unwrap();
    let loss = GroundLoss::Square;
    assert!(graphon_distance(&step, &moved, loss).unwrap() < 1e-4);
    let other = synthesize_graphon(3, 6).unwrap();
    let (ab, ba) = (
        graphon_distance(&step, &other, loss).unwrap(),
        graphon_distance(&other, &step, loss).unwrap(),
    );
    assert!((ab - ba).abs() < 1e-6 && ab > 0.01, "{ab} {ba}");
}

#[test]
fn mixtures_are_found() {
    let rng = &mut RandomStream::new(5);
    let kinds = [0, 11];
    let bases: Vec<StepFunction> = kinds
        .iter()
        .map(|k| synthesize_graphon(*k, 10).unwrap())
        .collect();
    let value = |i, j| 0.3 * bases[0].get(i, j).unwrap() + 0.7 * bases[1].get(i, j).unwrap();
    let target = StepFunction::from_fn(10, value).unwrap();
    let fit = AlphaFit {
        eps: 0.01,
        epochs: 60,
        ..AlphaFit::default()
    };
    let config = FeasibilityConfig {
        fit: Fit::Alpha(fit),
        bases: vec![Basis::Domain],
        ..FeasibilityConfig::default()
    };
    let found = compare(&[(Basis::Domain, bases.clone())], &target, &config).unwrap();
    let basis = &found.per_basis[0];
    let mean = FeasibilityConfig {
        fit: Fit::Mean,
        ..config.clone()
    };
    let mean = compare(&[(Basis::Domain, bases.clone())], &target, &mean).unwrap();
    // Never worse than the mean or one graphon alone.
    assert!(found.distance <= mean.distance);
    for single in &bases {
        assert!(
            found.distance
                <= graphon_distance(single, &target, GroundLoss::Square).unwrap() + 1e-12
        );
    }
    assert!((basis.weights.iter().sum::<f64>() - 1.0).abs() < 1e-9);
    assert!(!basis.fit_trace.is_empty());
    assert_eq!(found.feasibility(), -found.distance);
    // All of it, from graphs, with each basis.
    let sample = |kind: usize, rng: &mut RandomStream| {
        let truth = synthesize_graphon(kind, 20).unwrap();
        GraphCollection::new(truth.sample_graphs(&[30; 4], rng).unwrap())
    };
    let pretrain = [sample(0, rng), sample(3, rng)];
    let all = FeasibilityConfig {
        fit: Fit::Alpha(AlphaFit { epochs: 5, ..fit }),
        bases: vec![
            Basis::Integrated,
            Basis::Domain,
            Basis::Topological { clusters: 3 },
        ],
        ..FeasibilityConfig::default()
    };
    let down = sample(0, rng);
    let run = |seed| feasibility(&pretrain, &down, &all, &mut RandomStream::new(seed)).unwrap();
    let report = run(1);
    assert_eq!(report.per_basis.len(), 3);
    let least = report
        .per_basis
        .iter()
        .map(|b| b.distance)
        .fold(f64::INFINITY, f64::min);
    assert_eq!(report.distance, least);
    assert_eq!(run(1).distance.to_bits(), report.distance.to_bits());
}

#[test]
fn ego_networks_are_neighborhoods() {
    let graph = ring(20).unwrap();
    let rng = &mut RandomStream::new(1);
    let config = EgoConfig::default();
    let all = GraphCollection::ego_networks(&graph, config, rng).unwrap();
    assert_eq!(all.graphs().len(), 20);
    assert!(all
        .graphs()
        .iter()
        .all(|g| g.num_nodes() == 5 && g.num_edges() == 8));
    let some = EgoConfig {
        fraction: 0.25,
        ..config
    };
    assert_eq!(
        GraphCollection::ego_networks(&graph, some, rng)
            .unwrap()
            .graphs()
            .len(),
        5
    );
    let small = EgoConfig {
        node_threshold: 4,
        ..config
    };
    assert_says(
        GraphCollection::ego_networks(&graph, small, rng).map(|_| ()),
        &["ego networks"],
    );
    let none = EgoConfig {
        fraction: 0.0,
        ..config
    };
    assert_says(
        GraphCollection::ego_networks(&graph, none, rng).map(|_| ()),
        &["fraction"],
    );
}

#[test]
fn shapes_have_known_numbers() {
    let t = Topology::of(&star(5).unwrap()).unwrap();
    assert_eq!(t.mean_degree, 8.0 / 5.0);
    assert_eq!(
        (t.density, t.assortativity, t.transitivity, t.clustering),
        (0.4, -1.0, 0.0, 0.0)
    );
    // The hub is at 1, each leaf at 4 / 7.
    assert!((t.closeness - (1.0 + 4.0 * 4.0 / 7.0) / 5.0).abs() < 1e-12);
    let triangle = Topology::of(&ring(3).unwrap()).unwrap();
    assert_eq!(
        (
            triangle.transitivity,
            triangle.clustering,
            triangle.assortativity
        ),
        (1.0, 1.0, 0.0)
    );
    assert_eq!(triangle.closeness, 1.0);
    let lattice = Topology::of(&grid(3, 3).unwrap()).unwrap();
    assert_eq!(lattice.transitivity, 0.0);
}

#[test]
fn bad_input_is_named() {
    let rng = &mut RandomStream::new(0);
    let plain = GraphonEstimator::Sas { tv_weight: None };
    assert_says(estimate(&[], &plain, rng), &["graphs", "at least one"]);
    assert_says(
        estimate(&[Graph::empty(5).unwrap()], &plain, rng),
        &["none with edges"],
    );
    let directed = Graph::from_edges(3, vec![0], vec![1]).unwrap();
    assert_says(estimate(&[directed], &plain, rng), &["directed"]);
    // Graphs without edges are left out, the others count.
    let dense = erdos_renyi(30, 0.5, rng).unwrap();
    let with = estimate(&[dense.clone(), Graph::empty(4).unwrap()], &plain, rng).unwrap();
    assert_eq!(
        with,
        estimate(std::slice::from_ref(&dense), &plain, rng).unwrap()
    );
    let pair = ring(2)
        .or_else(|_| Graph::from_edges(2, vec![0, 1], vec![1, 0]))
        .unwrap();
    for estimator in estimators() {
        assert_says(
            estimate(std::slice::from_ref(&pair), &estimator, rng),
            &["3 nodes"],
        );
    }
    let single = GraphonEstimator::Sba { threshold: 0.1 };
    assert_says(
        estimate(std::slice::from_ref(&dense), &single, rng),
        &["halves"],
    );
    for (bad, word) in [
        (
            GraphonEstimator::Usvt {
                threshold: f64::NAN,
            },
            "threshold",
        ),
        (
            GraphonEstimator::Sas {
                tv_weight: Some(0.0),
            },
            "tv_weight",
        ),
        (GraphonEstimator::MatrixCompletion { rank: Some(0) }, "rank"),
        (
            GraphonEstimator::Gwb(BarycenterConfig {
                beta: 0.0,
                ..Default::default()
            }),
            "beta",
        ),
        (
            GraphonEstimator::Gwb(BarycenterConfig {
                gamma: 1.5,
                ..Default::default()
            }),
            "gamma",
        ),
        (
            GraphonEstimator::Gwb(BarycenterConfig {
                outer: 0,
                ..Default::default()
            }),
            "outer",
        ),
    ] {
        assert_says(estimate(std::slice::from_ref(&dense), &bad, rng), &[word]);
    }
    let wide = Tensor::zeros((2, 3), DType::F64, &CPU).unwrap();
    assert_says(StepFunction::from_tensor(&wide), &["[k, k]"]);
    let hole = Tensor::new(&[[f64::NAN]], &CPU).unwrap();
    assert!(matches!(
        StepFunction::from_tensor(&hole),
        Err(Error::NonFinite { .. })
    ));
    let over = StepFunction::from_fn(1, |_, _| 1.5).unwrap();
    assert_says(over.sample_graphs(&[4], rng).map(|_| ()), &["graphon"]);
    assert_says(synthesize_graphon(13, 4), &["0 to 12"]);
    let down = GraphCollection::new(vec![dense]);
    let config = FeasibilityConfig::default();
    assert_says(
        feasibility(&[], &down, &config, rng).map(|_| ()),
        &["collections"],
    );
    let none = FeasibilityConfig {
        bases: vec![],
        ..config.clone()
    };
    assert_says(
        feasibility(std::slice::from_ref(&down), &down, &none, rng).map(|_| ()),
        &["bases"],
    );
    let many = FeasibilityConfig {
        bases: vec![Basis::Topological { clusters: 4 }],
        ..config
    };
    assert_says(
        feasibility(std::slice::from_ref(&down), &down, &many, rng).map(|_| ()),
        &["k = 4"],
    );
}

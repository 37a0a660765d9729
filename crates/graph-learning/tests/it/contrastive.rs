use crate::support::*;
use candle_core::{DType, Tensor, Var};
use graph_learning::contrastive::pot::*;
use graph_learning::contrastive::*;
use graph_learning::generate::{erdos_renyi, karate_club, star};
use graph_learning::sparse::{Features, SparseFeatures};
use graph_learning::split::NodeSplit;
use graph_learning::{Graph, RandomStream};
use nn::init::SeededVars;
use proptest::prelude::*;
use std::collections::BTreeMap;
use tensor_core::verify::Array;

#[test]
fn reference() {
    let report = FILES.verify("pot", graph_learning::verify::pot);
    assert_passed(&report, |_| false);
    assert!(report.uncovered.is_empty());
    assert_eq!(report.comparisons.len(), 34);
}

/// A trained slope, some of the nodes in another order, other widths and settings: numbers of an independent computation in PyTorch.
#[test]
fn another_reference() {
    let report = FILES.verify("other/pot", graph_learning::verify::pot);
    assert_passed(&report, |_| false);
    assert!(report.uncovered.is_empty());
}

/// A file of the same form with a shuffled part of the nodes, whose other numbers differ: what is over
/// all nodes still agrees, what is over the part does not.
#[test]
fn the_adaptor_reads_the_nodes() {
    let change = |tensors: &mut BTreeMap<String, Array>, _: &mut BTreeMap<String, String>| {
        let nodes = tensors.get_mut("nodes").unwrap();
        (nodes.values, nodes.shape) = (vec![5.0, 2.0, 7.0, 0.0], vec![4]);
    };
    let report = FILES.verify_variant("pot", change, graph_learning::verify::pot);
    let passed = |name| passed(&report, name);
    for name in [
        "A_upper",
        "z_view1",
        "nce_loss",
        "Wcl_full",
        "sound_p1L",
        "edgewise_score",
        "true_score",
    ] {
        assert!(passed(name), "{name}");
    }
    assert!(!passed("pot_score") && report.unknown.is_empty());
}

struct Setup {
    graph: Graph,
    x: Features,
    encoder: GcnEncoder,
    bounds: AdjacencyBounds,
}

fn setup(seed: u64, n: usize, slope: Option<f64>, rate: f64) -> Setup {
    let rng = &mut RandomStream::new(seed);
    let graph = erdos_renyi(n, 0.35, rng).unwrap();
    let vars = SeededVars::new(rng);
    let vb = vars.builder(DType::F64, &CPU);
    let activation = match slope {
        None => EncoderActivation::Relu,
        Some(a) => EncoderActivation::PRelu(Tensor::new(&[a], &CPU).unwrap()),
    };
    let encoder = GcnEncoder::new(5, 4, activation, vb.clone()).unwrap();
    // Biases start at zero: draw some.
    for (i, (name, var)) in vars.trainable().into_iter().enumerate() {
        if name.ends_with("bias") {
            var.set(&(normal(seed + i as u64, var.dims(), DType::F64) * 0.3).unwrap())
                .unwrap();
        }
    }
    Setup {
        bounds: AdjacencyBounds::from_graph(&graph, Budget::Rate(rate)).unwrap(),
        x: normal(seed + 9, &[n, 5], DType::F64).into(),
        graph,
        encoder,
    }
}

/// Drops edges in both directions while both ends have budget.
fn allowed_view(setup: &Setup, rng: &mut RandomStream) -> Graph {
    let graph = &setup.graph;
    let mut left = setup.bounds.max_delete().to_vec();
    let reverse = graph.reverse_edges().unwrap();
    let mut keep = vec![true; graph.num_edges()];
    for e in rng.permutation(graph.num_edges()).unwrap() {
        let (s, t) = (
            graph.src()[e as usize] as usize,
            graph.dst()[e as usize] as usize,
        );
        if keep[e as usize] && left[s] > 0 && left[t] > 0 && rng.next_uniform() < 0.7 {
            keep[e as usize] = false;
            keep[reverse[e as usize] as usize] = false;
            left[s] -= 1;
            left[t] -= 1;
        }
    }
    let ids: Vec<u32> = (0..keep.len())
        .filter(|e| keep[*e])
        .map(|e| e as u32)
        .collect();
    graph.select_edges(&ids).unwrap()
}

proptest! {
    #![proptest_config(cases(40))]

    /// Within the budget no view leaves the bounds, and no node is less compact than certified.
    #[test]
    fn certified_scores_are_lower_bounds(seed in 0u64..10_000, n in 4usize..12, prelu in any::<bool>(), rate in 0.1f64..0.9) {
        let setup = setup(seed, n, prelu.then_some(0.2), rate);
        let rng = &mut RandomStream::new(seed);
        let other = setup.encoder.forward(&allowed_view(&setup, rng), &setup.x).unwrap();
        for _ in 0..6 {
            let view = allowed_view(&setup, rng);
            let (looped, _) = view.add_self_loops(None, 1.0).unwrap();
            let d: Vec<f64> = looped.in_degrees().into_iter().map(f64::from).collect();
            let w: Vec<f64> = looped.edges().map(|(s, t)| 1.0 / (d[s as usize] * d[t as usize]).sqrt()).collect();
            let a = values(&looped.to_dense(Some(&w)).unwrap());
            let (upper, lower) = setup.bounds.to_dense().unwrap();
            for ((a, u), l) in a.iter().zip(values(&upper)).zip(values(&lower)) {
                prop_assert!(l <= a + 1e-12 && *a <= u + 1e-12);
            }
            let inputs = PotInputs {
                x: &setup.x,
                graph: &setup.graph,
                view: &view,
                other: &other,
                bounds: &setup.bounds,
                nodes: None,
            };
            let report = node_compactness(&setup.encoder, &inputs).unwrap();
            for (lower, actual) in report.lower.iter().zip(&report.actual) {
                prop_assert!(*lower <= actual + 1e-9, "{} {}", lower, actual);
            }
        }
    }

    /// The lines are around the activation everywhere on the interval.
    #[test]
    fn relaxations_bracket(l in -3.0f64..3.0, width in 0.0f64..4.0, a in 0.0f64..=1.0) {
        let tensor = |v: f64| Tensor::new(&[v], &CPU).unwrap();
        let u = l + width;
        let lines = Relaxation::new(&tensor(l), &tensor(u), a).unwrap();
        let (k, beta) = (values(&lines.slope)[0], values(&lines.upper)[0]);
        prop_assert!((a - 1e-12..=1.0 + 1e-12).contains(&k));
        for i in 0..=20 {
            let x = l + width * f64::from(i) / 20.0;
            let s = if x > 0.0 { x } else { a * x };
            prop_assert!(k * x <= s + 1e-12 && s <= k * (x + beta) + 1e-12);
        }
    }

    /// Gradients of both scores go through intervals, slopes and the other view.
    #[test]
    fn gradients_are_those_of_differences(seed in 0u64..300, prelu in any::<bool>()) {
        let setup = setup(seed, 6, prelu.then_some(0.2), 0.5);
        let other = var(seed + 3, &[6, 4]);
        let x = Var::from_tensor(&setup.x.to_dense(&CPU).unwrap()).unwrap();
        for (score, intervals) in [(PotScore::Published, Intervals::Published), (PotScore::Certified, Intervals::Sound)] {
            let pot = Pot::new(PotConfig { score, intervals, ..PotConfig::default() }).unwrap();
            let f = || {
                let features: Features = x.as_tensor().clone().into();
                let inputs = PotInputs {
                    x: &features,
                    graph: &setup.graph,
                    view: &setup.graph,
                    other: &other,
                    bounds: &setup.bounds,
                    nodes: None,
                };
                pot.loss(&setup.encoder, &inputs).unwrap()
            };
            prop_assert!(check_gradients_at(1e-7, &[&x, &other], f) < 1e-5);
        }
    }
}

/// With nothing to drop and no activation between signs, the bound is exact.
#[test]
fn without_a_budget_and_open_neurons_the_score_is_exact() {
    // An isolated pair of nodes: degrees 2, nothing may be dropped; slope 1 is linear.
    let graph = Graph::from_edges(4, vec![0, 1, 2, 3], vec![1, 0, 3, 2]).unwrap();
    let vars = SeededVars::new(&RandomStream::new(1));
    let slope = EncoderActivation::PRelu(Tensor::new(&[1f64], &CPU).unwrap());
    let encoder = GcnEncoder::new(3, 4, slope, vars.builder(DType::F64, &CPU)).unwrap();
    let x: Features = normal(2, &[4, 3], DType::F64).into();
    let bounds = AdjacencyBounds::from_graph(&graph, Budget::PerNode(&[0, 0, 0, 0])).unwrap();
    let other = normal(3, &[4, 4], DType::F64);
    let inputs = PotInputs {
        x: &x,
        graph: &graph,
        view: &graph,
        other: &other,
        bounds: &bounds,
        nodes: None,
    };
    let report = node_compactness(&encoder, &inputs).unwrap();
    // U is not L off the diagonal, but with a linear map the lines do not depend on intervals.
    for (lower, actual) in report.lower.iter().zip(&report.actual) {
        assert!((lower - actual).abs() < 1e-12, "{lower} {actual}");
    }
    assert_eq!(report.by_degree.len(), 1);
}

#[test]
fn bounds_keep_two_entries() {
    let star = star(6).unwrap();
    let bounds = AdjacencyBounds::from_graph(&star, Budget::Rate(1.0)).unwrap();
    assert_eq!(bounds.max_delete(), [4, 0, 0, 0, 0, 0]);
    // round(0.5 * 5) = 2: halves to even.
    let bounds = AdjacencyBounds::from_graph(&star, Budget::Rate(0.5)).unwrap();
    assert_eq!(bounds.max_delete()[0], 2);
    assert_says(
        AdjacencyBounds::from_graph(&star, Budget::Rate(1.1)),
        &["rate", "1.1"],
    );
    assert_says(
        AdjacencyBounds::from_graph(&star, Budget::PerNode(&[1])),
        &["budgets"],
    );
    assert_says(
        AdjacencyBounds::from_graph(&messy(1, 5, 9), Budget::Rate(0.5)),
        &["directed"],
    );
}

#[test]
fn views_drop_at_their_rate() {
    let rng = &mut RandomStream::new(1);
    let graph = erdos_renyi(200, 0.1, rng).unwrap();
    let (view, kept) = drop_edges(&graph, 0.3, true, rng).unwrap();
    assert!(view.is_undirected());
    let share = kept.len() as f64 / graph.num_edges() as f64;
    assert!((share - 0.7).abs() < 0.04, "{share}");
    let (view, _) = drop_edges(&graph, 0.3, false, rng).unwrap();
    assert!(!view.is_undirected());
    assert_eq!(
        drop_edges(&graph, 0.0, false, rng).unwrap().0.num_edges(),
        graph.num_edges()
    );
    assert_eq!(
        drop_edges(&graph, 1.0, false, rng).unwrap().0.num_edges(),
        0
    );
    // Peripheral edges go first.
    let weights = edge_weights(&graph, Centrality::Degree).unwrap();
    let (_, kept) = drop_edges_weighted(&graph, &weights, 0.4, 0.7, rng).unwrap();
    let mean = |ids: &mut dyn Iterator<Item = usize>| {
        let (sum, count) = ids.fold((0.0, 0.0), |(s, c), e| (s + weights[e], c + 1.0));
        sum / count
    };
    assert!(mean(&mut kept.iter().map(|e| *e as usize)) < 0.9 * mean(&mut (0..weights.len())));
    let dense: Features = Tensor::ones((4, 500), DType::F64, &CPU).unwrap().into();
    let sparse: Features =
        SparseFeatures::from_dense(&Tensor::ones((4, 500), DType::F64, &CPU).unwrap())
            .unwrap()
            .into();
    for x in [dense, sparse] {
        let x = drop_features(&x, 0.2, rng).unwrap().to_dense(&CPU).unwrap();
        let sums = values(&x.sum(0).unwrap());
        assert!(sums.iter().all(|s| *s == 0.0 || *s == 4.0));
        let share = sums.iter().sum::<f64>() / 2000.0;
        assert!((share - 0.8).abs() < 0.07, "{share}");
    }
    assert!(drop_edges(&graph, 1.2, false, rng).is_err());
    assert!(drop_edges_weighted(&graph, &weights[1..], 0.3, 0.7, rng).is_err());
}

#[test]
fn centralities_rank_the_club() {
    let club = karate_club().unwrap();
    for centrality in [
        Centrality::Degree,
        Centrality::PageRank { steps: 10 },
        Centrality::Eigenvector,
    ] {
        let c = centrality.of(club.graph()).unwrap();
        let mut order: Vec<usize> = (0..34).collect();
        order.sort_by(|a, b| c[*b].total_cmp(&c[*a]));
        assert!(
            order[..2].contains(&33) && order[..3].contains(&0),
            "{centrality:?}"
        );
    }
    // A star is bipartite: its eigenvector has 1 : 1/sqrt(n - 1).
    let c = Centrality::Eigenvector.of(&star(5).unwrap()).unwrap();
    assert!((c[0] / c[1] - 2.0).abs() < 1e-6);
    let x: Features = Tensor::eye(34, DType::F64, &CPU).unwrap().into();
    let w = feature_weights(club.graph(), &x, Centrality::Degree).unwrap();
    assert!(w[33] < w[11] && w[33] == 0.0);
}

fn grace(config: GraceConfig) -> Grace {
    let vars = SeededVars::new(&RandomStream::new(4));
    Grace::new(6, 5, config, vars.builder(DType::F64, &CPU)).unwrap()
}

#[test]
fn objectives_pull_views_together() {
    let config = GraceConfig {
        tau: 0.5,
        ..GraceConfig::default()
    };
    let mixing = ProGclConfig {
        hardness: Hardness::Mix {
            hardest: 8,
            mixed: 3,
        },
        ..ProGclConfig::default()
    };
    let objectives: Vec<(&str, Box<dyn ContrastiveObjective>)> = vec![
        ("grace", Box::new(grace(config))),
        (
            "grace in parts",
            Box::new(grace(GraceConfig {
                batch: Some(7),
                anchors: Some(20),
                ..config
            })),
        ),
        ("costa", Box::new(Costa::new(grace(config), 0.8).unwrap())),
        (
            "weighted",
            Box::new(ProGcl::new(grace(config), ProGclConfig::default()).unwrap()),
        ),
        (
            "mixed",
            Box::new(ProGcl::new(grace(config), mixing).unwrap()),
        ),
    ];
    let z1 = var(1, &[30, 6]);
    let near = (z1.as_tensor() + (normal(2, &[30, 6], DType::F64) * 0.05).unwrap()).unwrap();
    let far = normal(3, &[30, 6], DType::F64);
    for (name, objective) in &objectives {
        let run = |z2: &Tensor| objective.loss(&z1, z2, &mut RandomStream::new(5)).unwrap();
        assert!(values(&run(&near))[0] < values(&run(&far))[0], "{name}");
        assert_eq!(bits(&run(&far)), bits(&run(&far)), "{name}");
        let grads = run(&far).backward().unwrap();
        let grad = values(grads.get(&z1).unwrap());
        assert!(
            grad.iter().all(|g| g.is_finite()) && grad.iter().any(|g| *g != 0.0),
            "{name}"
        );
        assert!(objective
            .loss(
                &z1,
                &far.narrow(0, 0, 9).unwrap(),
                &mut RandomStream::new(5)
            )
            .is_err());
    }
    // Parts of the rows make the whole loss.
    let whole = objectives[0]
        .1
        .loss(&z1, &far, &mut RandomStream::new(1))
        .unwrap();
    let parts = grace(GraceConfig {
        batch: Some(7),
        ..config
    })
    .loss(&z1, &far, &mut RandomStream::new(1))
    .unwrap();
    assert!(distance(&parts, &whole) < 1e-12);
    // A zero row has no direction and no NaN.
    let zeros = Var::from_tensor(&Tensor::zeros((3, 6), DType::F64, &CPU).unwrap()).unwrap();
    let loss = objectives[0]
        .1
        .loss(&zeros, &zeros, &mut RandomStream::new(1))
        .unwrap();
    assert!(values(&loss)[0].is_finite());
    let grads = loss.backward().unwrap();
    assert!(grads
        .get(&zeros)
        .is_none_or(|g| values(g).iter().all(|g| g.is_finite())));
    // Neither has an embedding without direction a gradient through the anchors.
    let direction = anchor_direction(&zeros, None).unwrap();
    let grads = against(&direction, 1).backward().unwrap();
    assert!(grads
        .get(&zeros)
        .is_none_or(|g| values(g).iter().all(|g| *g == 0.0)));
}

#[test]
fn beta_mixtures_find_their_parts() {
    let mut rng = RandomStream::new(1);
    let mut sample = |center: f64| (center + 0.05 * rng.next_normal()).clamp(0.0, 1.0);
    let values: Vec<f64> = (0..600)
        .map(|i| sample(if i % 3 == 0 { 0.8 } else { 0.3 }))
        .collect();
    let mixture = BetaMixture::fit(&values, 20).unwrap();
    assert!(
        (mixture.mean(0) - 0.3).abs() < 0.02 && (mixture.mean(1) - 0.8).abs() < 0.02,
        "{mixture:?}"
    );
    assert!((mixture.share[0] - 2.0 / 3.0).abs() < 0.03);
    assert!(mixture.posterior_low(0.3) > 0.99 && mixture.posterior_low(0.8) < 0.01);
    assert!(BetaMixture::fit(&[0.5; 3], 5).is_err());
    assert!(BetaMixture::fit(&[0.5, 0.5, 2.0, 0.1], 5).is_err());
    // Equal values do not break it.
    let flat = BetaMixture::fit(&[0.5; 10], 5).unwrap();
    assert!(flat.posterior_low(0.5).is_finite());
}

proptest! {
    #![proptest_config(cases(64))]

    /// Whatever the values are, and however long it is fitted.
    #[test]
    fn mixtures_of_any_values_are_finite(
        values in prop::collection::vec(prop_oneof![Just(0.0), Just(1.0), 0.0..1.0f64, 0.49..0.51f64], 4..40),
        iterations in 0usize..60,
    ) {
        let mixture = BetaMixture::fit(&values, iterations).unwrap();
        for v in [0.0, 0.3, 0.5, 1.0] {
            prop_assert!((0.0..=1.0).contains(&mixture.posterior_low(v)), "{mixture:?}");
        }
    }
}

#[test]
fn probes_learn_and_choose_by_validation() {
    let n = 90;
    let labels: Vec<u32> = (0..n as u32).map(|i| i % 3).collect();
    let corners = Tensor::eye(3, DType::F64, &CPU).unwrap();
    let index = Tensor::from_slice(&labels, n, &CPU).unwrap();
    let noise = (normal(1, &[n, 3], DType::F64) * 0.1).unwrap();
    let z = (corners.index_select(&index, 0).unwrap() + noise).unwrap();
    let split = NodeSplit {
        train: (0..30).collect(),
        val: (30..60).collect(),
        test: (60..90).collect(),
    };
    let config = ProbeConfig {
        epochs: 300,
        ..ProbeConfig::default()
    };
    let run = |z: &Tensor, split: &NodeSplit| {
        linear_probe(z, &labels, 3, split, config, &mut RandomStream::new(1))
    };
    let report = run(&z, &split).unwrap();
    assert!(
        report.test_accuracy > 0.95 && report.test_f1_macro > 0.95,
        "{report:?}"
    );
    assert_says(
        run(&(&z * f64::NAN).unwrap(), &split),
        &["embeddings", "NaN"],
    );
    let empty = NodeSplit {
        train: vec![0, 1],
        ..split.clone()
    };
    assert_says(run(&z, &empty), &["class 2"]);
    let twice = NodeSplit {
        test: vec![0],
        ..split
    };
    assert_says(run(&z, &twice), &["split"]);
    // Hand-computed: class 0 has one hit of two, class 1 one hit and one error.
    let f1 = f1_macro(&[0, 1, 2], &[0, 0, 1], &[0, 1, 1], 3).unwrap();
    assert_says(
        f1_macro(&[0, 3], &[0; 4], &[0; 3], 1),
        &["node = 3", "below 3"],
    );
    assert!((f1 - 2.0 / 3.0).abs() < 1e-15);
}

#[test]
fn bad_settings_and_inputs_are_named() {
    let setup = setup(1, 6, None, 0.5);
    let z = setup.encoder.forward(&setup.graph, &setup.x).unwrap();
    let inputs = |nodes: Option<&'static [u32]>| PotInputs {
        x: &setup.x,
        graph: &setup.graph,
        view: &setup.graph,
        other: &z,
        bounds: &setup.bounds,
        nodes,
    };
    let pot = Pot::new(PotConfig::default()).unwrap();
    assert_says(
        pot.score(&setup.encoder, &inputs(Some(&[3]))),
        &["at least 2"],
    );
    assert_says(
        pot.score(&setup.encoder, &inputs(Some(&[3, 3]))),
        &["nodes"],
    );
    let short = z.narrow(0, 0, 5).unwrap();
    let wrong = PotInputs {
        other: &short,
        ..inputs(None)
    };
    assert_says(pot.score(&setup.encoder, &wrong), &["inputs", "6 nodes"]);
    let steep = EncoderActivation::PRelu(Tensor::new(&[1.5f64], &CPU).unwrap());
    let vars = SeededVars::new(&RandomStream::new(1));
    let steep = GcnEncoder::new(5, 4, steep, vars.builder(DType::F64, &CPU)).unwrap();
    assert_says(pot.score(&steep, &inputs(None)), &["slope", "1.5"]);
    assert!(Pot::new(PotConfig {
        kappa: 1.5,
        ..PotConfig::default()
    })
    .is_err());
    assert!(Pot::new(PotConfig {
        batch: Some(1),
        ..PotConfig::default()
    })
    .is_err());
    for config in [
        GraceConfig {
            tau: 0.0,
            ..GraceConfig::default()
        },
        GraceConfig {
            batch: Some(0),
            ..GraceConfig::default()
        },
        GraceConfig {
            anchors: Some(0),
            ..GraceConfig::default()
        },
    ] {
        assert!(config.validate().is_err());
    }
    assert!(Costa::new(grace(GraceConfig::default()), 0.0).is_err());
    let drawn = Pot::new(PotConfig {
        batch: Some(3),
        ..PotConfig::default()
    })
    .unwrap();
    assert_eq!(
        drawn
            .draw(10, &mut RandomStream::new(1))
            .unwrap()
            .unwrap()
            .len(),
        3
    );
    // A held anchor passes no gradient to the other view.
    let held = Pot::new(PotConfig {
        detach_anchor: true,
        ..PotConfig::default()
    })
    .unwrap();
    let other = Var::from_tensor(&z.detach()).unwrap();
    let inputs = PotInputs {
        other: &other,
        ..inputs(None)
    };
    let grads = |pot: &Pot| {
        pot.loss(&setup.encoder, &inputs)
            .unwrap()
            .backward()
            .unwrap()
    };
    assert!(grads(&held).get(&other).is_none() && grads(&pot).get(&other).is_some());
}

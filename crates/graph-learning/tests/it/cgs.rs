use crate::support::*;
use candle_core::{DType, Tensor, Var};
use candle_nn::{Activation, Optimizer};
use graph_learning::cgs::*;
use graph_learning::sparse::Reduce;
use graph_learning::{Graph, RandomStream};
use nn::init::SeededVars;
use proptest::prelude::*;

#[test]
fn reference() {
    let report = FILES.verify("cgs", graph_learning::verify::cgs);
    assert_passed(&report, |_| false);
    assert!(report.uncovered.is_empty());
    assert_eq!(report.comparisons.len(), 16);
}

/// Two nodes, one head, another activation, perceptrons of one and three layers: numbers of an independent computation in PyTorch.
#[test]
fn another_reference() {
    let report = FILES.verify("other/cgs", graph_learning::verify::cgs);
    assert_passed(&report, |_| false);
    assert!(report.uncovered.is_empty());
}

fn iterate(tol: f64) -> Solver {
    Solver::Iterate {
        tol,
        max_iter: None,
        stop: StopRule::MaxNorm,
    }
}

fn how(
    gamma: f64,
    activation: Contraction,
    orientation: Orientation,
    solver: Solver,
) -> FixedPoint {
    FixedPoint {
        gamma,
        activation,
        orientation,
        solver,
        backward: solver,
    }
}

/// Weights that contract, and biases.
fn problem(seed: u64, graph: &Graph, orientation: Orientation) -> (Var, Var) {
    let logits = normal(seed, &[graph.num_edges(), 3], DType::F64);
    let weights =
        contracting_edge_weights(graph, &logits, Normalizer::Attention, orientation).unwrap();
    (
        Var::from_tensor(&weights).unwrap(),
        var(seed + 1, &[graph.num_nodes(), 3]),
    )
}

const ORIENTATIONS: [Orientation; 2] = [Orientation::RowIsSource, Orientation::RowIsTarget];
const PHIS: [Contraction; 4] = [
    Contraction::Identity,
    Contraction::Tanh,
    Contraction::LeakyRelu(0.1),
    Contraction::Sigmoid,
];

/// Many small gradients that meet in a hub two steps later: none of them is as large as the tolerance,
/// their sum is a thousand times that.
#[test]
fn small_gradients_add_up_in_a_hub() {
    let rays = 2000u32;
    // Leaf -> middle -> hub, and a node by itself; gradients travel along the edges.
    let (hub, alone) = (2 * rays, 2 * rays + 1);
    let src: Vec<u32> = (0..2 * rays).collect();
    let dst = (0..rays).map(|i| rays + i).chain((0..rays).map(|_| hub));
    let n = 2 * rays as usize + 2;
    let graph = Graph::from_edges(n, src, dst.collect()).unwrap();
    let (small, tol) = (5e-7, 1e-6);
    let mut g = vec![0.0; n];
    g[..rays as usize].fill(small);
    g[alone as usize] = 1.0;
    let g = Tensor::from_vec(g, (n, 1), &candle_core::Device::Cpu).unwrap();
    let weights = Tensor::ones((graph.num_edges(), 1), DType::F64, g.device()).unwrap();
    let bias = Var::from_tensor(&g.zeros_like().unwrap()).unwrap();
    let gamma = 0.9;
    for ptr in [None, Some([0, alone, alone + 1])] {
        let ptr = ptr.as_ref().map(|p| p.as_slice());
        let how = how(gamma, Contraction::Identity, ORIENTATIONS[0], iterate(tol));
        let (h, _) = fixed_point(&graph, ptr, &weights, &bias, how).unwrap();
        let grads = (h * &g).unwrap().sum_all().unwrap().backward().unwrap();
        let found = values(grads.get(&bias).unwrap())[hub as usize];
        let exact = gamma * gamma * small * f64::from(rays);
        assert!((found - exact).abs() < 10.0 * tol, "{found} for {exact}");
    }
}

proptest! {
    #![proptest_config(cases(16))]

    /// Rows add up to at most 1 and two right-hand sides come closer by gamma.
    #[test]
    fn weights_contract(seed in 0u64..1000, n in 2usize..10, edges in 0usize..30) {
        let graph = messy(seed, n, edges);
        let logits = normal(seed, &[edges, 2], DType::F64);
        for orientation in ORIENTATIONS {
            for normalizer in [Normalizer::DegreeClip, Normalizer::Attention] {
                let w = contracting_edge_weights(&graph, &logits, normalizer, orientation).unwrap();
                let rows = if orientation == Orientation::RowIsSource { graph.src() } else { graph.dst() };
                let mut sums = vec![0.0; 2 * n];
                for (e, pair) in values(&w).chunks(2).enumerate() {
                    prop_assert!(pair.iter().all(|w| *w >= 0.0));
                    sums[2 * rows[e] as usize] += pair[0];
                    sums[2 * rows[e] as usize + 1] += pair[1];
                }
                prop_assert!(sums.iter().all(|s| *s <= 1.0 + 1e-12));
                let (b, c) = (normal(seed + 1, &[n, 2], DType::F64), normal(seed + 2, &[n, 2], DType::F64));
                let gamma = 0.7;
                let how = how(gamma, Contraction::Tanh, orientation, iterate(1e-13));
                let h = fixed_point(&graph, None, &w, &b, how).unwrap().0;
                let k = fixed_point(&graph, None, &w, &c, how).unwrap().0;
                let far = |a: &Tensor, b: &Tensor| {
                    values(a).iter().zip(values(b)).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
                };
                prop_assert!(far(&h, &k) <= far(&b, &c) / (1.0 - gamma) + 1e-9);
            }
        }
    }

    #[test]
    fn solvers_agree(seed in 0u64..1000, n in 2usize..10, edges in 0usize..30) {
        let graph = messy(seed, n, edges);
        for orientation in ORIENTATIONS {
            let (w, b) = problem(seed, &graph, orientation);
            let run = |solver| {
                let how = how(0.8, Contraction::Identity, orientation, solver);
                let (h, report) = fixed_point(&graph, None, &w, &b, how).unwrap();
                assert!(report.converged, "{report:?}");
                let grads = against(&h, seed).backward().unwrap();
                (h, grads.get(&w).unwrap().clone(), grads.get(&b).unwrap().clone())
            };
            let exact = run(Solver::Direct);
            for other in [run(iterate(1e-11)), run(Solver::BiCgStab { tol: 1e-12, max_iter: 200 })] {
                prop_assert!(distance(&other.0, &exact.0) < 1e-10);
                prop_assert!(distance(&other.1, &exact.1) < 1e-9);
                prop_assert!(distance(&other.2, &exact.2) < 1e-9);
            }
        }
    }

    #[test]
    fn implicit_gradients_are_those_of_differences(seed in 0u64..1000, n in 2usize..6, edges in 1usize..12) {
        let graph = messy(seed, n, edges);
        for orientation in ORIENTATIONS {
            let (w, b) = problem(seed, &graph, orientation);
            for phi in PHIS {
                let how = how(0.6, phi, orientation, iterate(1e-14));
                let f = || against(&fixed_point(&graph, None, &w, &b, how).unwrap().0, seed);
                prop_assert!(check_gradients(&[&w, &b], f) < 1e-6, "{:?}", phi);
            }
        }
    }

    /// A graph's result does not depend on its company, to the last bit.
    #[test]
    fn batches_are_graphs_one_by_one(seed in 0u64..1000, edges in 1usize..20) {
        let graphs = [messy(seed, 5, edges), Graph::empty(2).unwrap(), messy(seed + 1, 8, 2 * edges)];
        let batch = Graph::batch(&graphs).unwrap();
        let (w, b) = problem(seed, batch.graph(), Orientation::RowIsSource);
        for phi in PHIS {
            let how = how(0.9, phi, Orientation::RowIsSource, iterate(1e-6));
            let whole = fixed_point(batch.graph(), Some(batch.ptr()), &w, &b, how).unwrap().0;
            let whole = bits(&whole);
            let (mut node, mut edge) = (0, 0);
            for graph in &graphs {
                let (n, e) = (graph.num_nodes(), graph.num_edges());
                let (w, b) = (w.narrow(0, edge, e).unwrap(), b.narrow(0, node, n).unwrap());
                let alone = bits(&fixed_point(graph, None, &w, &b, how).unwrap().0);
                prop_assert_eq!(&whole[3 * node..3 * (node + n)], &alone[..]);
                (node, edge) = (node + n, edge + e);
            }
        }
    }
}

#[test]
fn one_node_and_no_edge_is_the_activation_of_the_bias() {
    let graph = Graph::empty(1).unwrap();
    let w = Tensor::zeros((0, 2), DType::F32, &CPU).unwrap();
    let b = Tensor::new(&[[0.5f32, -0.5]], &CPU).unwrap();
    for solver in [iterate(1e-6), Solver::Direct] {
        let how = how(0.9, Contraction::Identity, Orientation::RowIsSource, solver);
        let (h, report) = fixed_point(&graph, None, &w, &b, how).unwrap();
        assert_eq!(values(&h), [0.5, -0.5]);
        assert!(report.converged);
    }
}

#[test]
fn a_cap_that_is_too_low_is_reported() {
    let graph = graph_learning::generate::ring(20).unwrap();
    let (w, b) = problem(1, &graph, Orientation::RowIsSource);
    let solver = |max_iter| Solver::Iterate {
        tol: 1e-8,
        max_iter,
        stop: StopRule::MaxNorm,
    };
    let run = |s| {
        fixed_point(
            &graph,
            None,
            &w,
            &b,
            how(0.99, Contraction::Identity, Orientation::RowIsSource, s),
        )
        .unwrap()
        .1
    };
    let short = run(solver(Some(50)));
    assert!(!short.converged && short.iterations == 50 && short.residual > 1e-8);
    let long = run(solver(None));
    assert!(long.converged && long.iterations > 100, "{long:?}");
}

/// A smaller loss has a smaller gradient, with as many digits.
#[test]
fn the_size_of_the_loss_does_not_matter() {
    let graph = messy(3, 12, 40);
    let (w, b) = problem(3, &graph, Orientation::RowIsSource);
    let how = how(
        0.9,
        Contraction::Tanh,
        Orientation::RowIsSource,
        iterate(1e-6),
    );
    let grads = |power: i32| {
        let h = fixed_point(&graph, None, &w, &b, how).unwrap().0;
        let loss = (against(&h, 1) * f64::powi(2.0, power)).unwrap();
        let grads = loss.backward().unwrap();
        let back = |v: &Var| bits(&(grads.get(v).unwrap() * f64::powi(2.0, -power)).unwrap());
        (back(&w), back(&b))
    };
    assert_eq!(grads(0), grads(-30));
}

#[test]
fn clipped_logits_have_no_gradient_outside() {
    let graph = Graph::from_edges(2, vec![0, 0, 0, 0], vec![1, 1, 0, 1]).unwrap();
    let l =
        Var::from_tensor(&Tensor::new(&[[-0.1f64], [0.0], [1.0], [1.1]], &CPU).unwrap()).unwrap();
    let w = contracting_edge_weights(&graph, &l, Normalizer::DegreeClip, Orientation::RowIsSource)
        .unwrap();
    assert_eq!(values(&w), [0.0, 0.0, 0.25, 0.25]);
    let grads = w.sum_all().unwrap().backward().unwrap();
    assert_eq!(values(grads.get(&l).unwrap()), [0.0, 0.25, 0.25, 0.0]);
}

#[test]
fn threads_do_not_change_a_bit() {
    let run = || {
        let rng = &mut RandomStream::new(3);
        let graph = graph_learning::generate::uniform_edges(4000, 20_000, rng).unwrap();
        let logits = normal(1, &[20_000, 4], DType::F32);
        let w = contracting_edge_weights(
            &graph,
            &logits,
            Normalizer::DegreeClip,
            Orientation::RowIsSource,
        )
        .unwrap();
        let (w, b) = (
            Var::from_tensor(&w).unwrap(),
            Var::from_tensor(&normal(2, &[4000, 4], DType::F32)).unwrap(),
        );
        let how = how(
            0.9,
            Contraction::Tanh,
            Orientation::RowIsSource,
            iterate(1e-6),
        );
        let (h, report) = fixed_point(&graph, None, &w, &b, how).unwrap();
        let grads = h.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        (
            bits(&h),
            report.iterations,
            bits(grads.get(&w).unwrap()),
            bits(grads.get(&b).unwrap()),
        )
    };
    assert_eq!(with_threads(1, run), with_threads(3, run));
}

#[test]
fn models_train_on_nodes_and_graphs() {
    let networks: Vec<_> = (0..3)
        .map(|s| conductance_network(20, &mut RandomStream::new(s)).unwrap())
        .collect();
    let graphs: Vec<_> = networks.iter().map(|n| n.graph.clone()).collect();
    let batch = Graph::batch(&graphs).unwrap();
    let parts: Vec<_> = networks
        .iter()
        .map(|n| n.features(DType::F32, &CPU).unwrap())
        .collect();
    let x = Tensor::cat(&parts.iter().map(|p| &p.0).collect::<Vec<_>>(), 0).unwrap();
    let u = Tensor::cat(&parts.iter().map(|p| &p.1).collect::<Vec<_>>(), 0).unwrap();
    let y = networks
        .iter()
        .map(|n| n.target(DType::F32, &CPU).unwrap())
        .collect::<Vec<_>>();
    let y = Tensor::cat(&y, 0).unwrap();
    let vars = SeededVars::new(&RandomStream::new(1));
    let encoder = EncoderConfig {
        node_hidden: 8,
        edge_hidden: 8,
        mlp: vec![8],
        hidden_layers: 1,
        dropout: 0.1,
        logit_bias: Some(0.5),
        ..EncoderConfig::default()
    };
    let config = CgsConfig {
        heads: 4,
        ..CgsConfig::default()
    };
    let model = Cgs::new(
        2,
        1,
        1,
        config,
        encoder,
        &[8],
        vars.builder(DType::F32, &CPU),
    )
    .unwrap();
    let params = vars.trainable();
    let mut sgd =
        candle_nn::SGD::new(params.iter().map(|(_, v)| v.clone()).collect(), 0.05).unwrap();
    let loss = |train: Option<&mut RandomStream>| {
        let (out, report) = model.forward(&batch, &x, &u, train).unwrap();
        assert!(report.converged);
        (out - &y).unwrap().sqr().unwrap().mean_all().unwrap()
    };
    let first = values(&loss(None))[0];
    tensor_core::autograd::grad_check(&[&loss(None)], &params).unwrap();
    let rng = &mut RandomStream::new(2);
    for _ in 0..30 {
        sgd.backward_step(&loss(Some(rng))).unwrap();
    }
    assert!(values(&loss(None))[0] < first);
    assert_eq!(
        model
            .without_fixed_point(&batch, &x, &u, None)
            .unwrap()
            .dims(),
        &[60, 1]
    );
    let pooled = GraphCgs::new(model, Reduce::Mean)
        .forward(&batch, &x, &u, None)
        .unwrap()
        .0;
    assert_eq!(pooled.dims(), &[3, 1]);
}

#[test]
fn networks_obey_kirchhoff_and_values_bellman() {
    let network = conductance_network(60, &mut RandomStream::new(4)).unwrap();
    let mut lost = vec![0.0; 60];
    for ((s, t), k) in network.graph.edges().zip(&network.log_conductance) {
        lost[t as usize] +=
            k.exp() * (network.potential[s as usize] - network.potential[t as usize]);
    }
    for (lost, fixed) in lost.iter().zip(&network.fixed) {
        assert!(fixed.is_some() || lost.abs() < 1e-10);
    }
    assert!(network.potential.iter().all(|p| (0.0..=1.0).contains(p)));
    assert_eq!(network.graph.connected_components().unwrap().count, 1);
    let game = gvi_graph(30, 5, 0.9, &mut RandomStream::new(5)).unwrap();
    assert!(!game.graph.has_self_loops() && game.graph.in_degrees() == vec![5; 30]);
    let value = value_iteration(&game.graph, &game.reward, 0.9, 0.0, 10_000).unwrap();
    let best = policy(&game.graph, &game.reward, &value, 0.9).unwrap();
    for t in 0..30 {
        let e = 5 * t + best[t] as usize;
        let follows = game.reward[e] + 0.9 * value[game.graph.src()[e] as usize];
        assert!((follows - value[t]).abs() < 1e-12);
    }
}

#[test]
fn bad_settings_and_inputs_are_named() {
    type Change = fn(&mut CgsConfig);
    let changes: [(Change, &str); 6] = [
        (|c| c.heads = 0, "heads"),
        (|c| c.gamma = 1.0, "gamma"),
        (|c| c.gamma = f64::NAN, "gamma"),
        (
            |c| {
                c.solver = Solver::BiCgStab {
                    tol: 0.0,
                    max_iter: 3,
                }
            },
            "tol",
        ),
        (
            |c| c.activation = Contraction::LeakyRelu(1.5),
            "LeakyRelu(1.5)",
        ),
        (
            |c| (c.activation, c.solver) = (Contraction::Tanh, Solver::Direct),
            "solver",
        ),
    ];
    for (change, word) in changes {
        let mut config = CgsConfig::default();
        change(&mut config);
        assert_says(config.validate(), &[word]);
    }
    assert_says(Contraction::try_from(Activation::Gelu), &["Gelu", "slopes"]);
    assert_eq!(
        Contraction::try_from(Activation::Relu).unwrap(),
        Contraction::Relu
    );
    let graph = messy(1, 5, 8);
    let good = how(
        0.5,
        Contraction::Identity,
        Orientation::RowIsSource,
        Solver::default(),
    );
    let (w, b) = problem(1, &graph, Orientation::RowIsSource);
    let run = |w: &Tensor, b: &Tensor, ptr: Option<&[u32]>| fixed_point(&graph, ptr, w, b, good);
    assert_says(
        run(&w.narrow(0, 0, 7).unwrap(), &b, None),
        &["edge weights", "[8, 3]"],
    );
    assert_says(
        run(&w, &b.narrow(0, 0, 4).unwrap(), None),
        &["bias", "[5, heads]"],
    );
    assert_says(run(&w.to_dtype(DType::F32).unwrap(), &b, None), &["F32"]);
    assert_says(
        run(&(w.as_tensor() * f64::NAN).unwrap(), &b, None),
        &["edge weights", "NaN"],
    );
    assert_says(run(&w, &b, Some(&[0, 4])), &["ptr"]);
    let encoder = EncoderConfig {
        node_hidden: 0,
        ..EncoderConfig::default()
    };
    assert_says(encoder.validate(), &["node_hidden"]);
    assert!(gvi_graph(1, 2, 0.9, &mut RandomStream::new(1)).is_err());
    assert_says(value_iteration(&graph, &[0.0; 7], 0.9, 0.1, 9), &["reward"]);
    assert_says(
        value_iteration(&graph, &[0.0; 8], 1.0, 0.1, 9),
        &["discount"],
    );
}

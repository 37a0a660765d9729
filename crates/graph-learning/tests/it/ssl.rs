use crate::support::*;
use candle_core::{DType, Tensor, Var};
use candle_nn::Optimizer;
use graph_learning::contrastive::{Centrality, GraceConfig};
use graph_learning::generate::{citation_network, CitationConfig};
use graph_learning::io::NodeData;
use graph_learning::ssl::losses::*;
use graph_learning::ssl::*;
use graph_learning::{RandomStream, SeededVars};
use optim::{AdamW, AdamWConfig, ParamGroup};
use proptest::prelude::*;
use std::collections::BTreeMap;
use tensor_core::verify::Array;

#[test]
fn reference() {
    let report = FILES.verify("graphfm", graph_learning::verify::graphfm);
    assert_passed(&report, |_| false);
    assert!(report.uncovered.is_empty());
    assert_eq!(report.comparisons.len(), 35);
}

/// More features than nodes, other exponents, a decoder of three layers: numbers of an independent computation in PyTorch.
#[test]
fn another_reference() {
    let report = FILES.verify("other/graphfm", graph_learning::verify::graphfm);
    assert_passed(&report, |_| false);
    assert!(report.uncovered.is_empty());
}

/// Nodes named the other way round, fewer steps of the schedules, one exponent less.
#[test]
fn the_adaptor_reads_the_form() {
    let change = |tensors: &mut BTreeMap<String, Array>, _: &mut BTreeMap<String, String>| {
        let of_nodes = [
            "za",
            "zb",
            "bgrl_target1",
            "bgrl_target2",
            "gca_x",
            "gca_pagerank",
        ];
        tensors.retain(|name, _| !name.starts_with("sce_loss_alpha3"));
        let last = tensors["za"].shape[0] as f64 - 1.0;
        for (name, array) in tensors.iter_mut() {
            let gradient = name.ends_with("_grad_za") || name.ends_with("_grad_zb");
            if gradient || of_nodes.contains(&name.as_str()) {
                let width = array.shape[1..].iter().product();
                let rows = array.values.chunks(width).rev();
                array.values = rows.flatten().copied().collect();
            } else if ["edge_index", "s2_edges"].contains(&name.as_str()) {
                array.values.iter_mut().for_each(|v| *v = last - *v);
            } else if name.starts_with("sched_") {
                array.shorten(0, 3).unwrap();
            }
        }
    };
    let report = FILES.verify_variant("graphfm", change, graph_learning::verify::graphfm);
    assert_passed(&report, |_| false);
    assert_eq!(report.comparisons.len(), 32);
}

fn data() -> NodeData {
    let rng = &mut RandomStream::new(3);
    let config = CitationConfig {
        nodes: 140,
        words: 70,
        ..CitationConfig::default()
    };
    citation_network(config, rng).unwrap()
}

type Method = Box<dyn SslMethod>;

/// A method at a small width, with variables of its own.
fn method(name: &str) -> Method {
    method_over(name, &SeededVars::new(&RandomStream::new(1).split(name)))
}

fn method_over(name: &str, vars: &SeededVars) -> Method {
    let place = (DType::F32, &CPU);
    let gcn = EncoderConfig {
        widths: vec![16, 16],
        ..EncoderConfig::default()
    };
    let views = ViewConfig::both(0.3, 0.2);
    let cca = SiameseLoss::Cca { lambda: 1e-3 };
    let gbt = SiameseLoss::BarlowTwins(Redundancy::Decorrelated);
    let adaptive = ViewConfig {
        adaptive: Some(Centrality::Degree),
        ..views
    };
    let grace = (16, GraceConfig::default());
    let mae = |latent| GraphMaeConfig {
        encoder: EncoderConfig {
            conv: EncoderConv::Gat {
                heads: 2,
                dropout: 0.1,
            },
            ..gcn.clone()
        },
        latent,
        ..GraphMaeConfig::default()
    };
    let latent = LatentConfig {
        projector: 16,
        delayed_ema: 4,
        ..LatentConfig::default()
    };
    let bgrl = BgrlConfig {
        encoder: EncoderConfig {
            widths: vec![16],
            ..BgrlConfig::default().encoder
        },
        predictor: 16,
        total: 100,
        ..BgrlConfig::default()
    };
    let ecl = GraphEclConfig {
        encoder: gcn.clone(),
        hidden: 16,
        negatives: Some(64),
        ..GraphEclConfig::default()
    };
    let s2 = S2GaeConfig {
        encoder: gcn.clone(),
        undirected: true,
        decoder: 16,
        ..S2GaeConfig::default()
    };
    match name {
        "bgrl" => Box::new(Bgrl::new(70, bgrl, vars, place).unwrap()),
        "cca" => Box::new(Siamese::new(70, &gcn, views, cca, vars, place).unwrap()),
        "gbt" => Box::new(Siamese::new(70, &gcn, views, gbt, vars, place).unwrap()),
        "gca" => Box::new(Contrastive::new(70, &gcn, adaptive, grace, vars, place).unwrap()),
        "ecl" => Box::new(GraphEcl::new(70, ecl, vars, place).unwrap()),
        "dgi" => Box::new(Dgi::new(70, &gcn, vars, place).unwrap()),
        "mae" => Box::new(GraphMae::new(70, mae(None), vars, place).unwrap()),
        "mae2" => Box::new(GraphMae::new(70, mae(Some(latent)), vars, place).unwrap()),
        "s2gae" => Box::new(S2Gae::new(70, s2, vars, place).unwrap()),
        other => panic!("no method {other}"),
    }
}

const NAMES: [&str; 9] = [
    "bgrl", "cca", "gbt", "gca", "ecl", "dgi", "mae", "mae2", "s2gae",
];

/// Every variable gets a gradient, the loss falls, embeddings are finite, the same seed gives the same
/// bits.
#[test]
fn every_method_learns() {
    let data = data();
    for name in NAMES {
        let run = || {
            let mut method = method(name);
            let config = AdamWConfig::adam(0.005);
            let group = ParamGroup::named(method.params().to_vec(), config);
            let mut adam = AdamW::with_groups(vec![group]).unwrap();
            let rng = &mut RandomStream::new(5);
            let view = GraphView {
                graph: &data.graph,
                x: &data.x,
            };
            let mut losses = Vec::new();
            for step in 0..40 {
                let loss = method.loss(&view, rng).unwrap();
                losses.push(values(&loss)[0]);
                let grads = loss.backward().unwrap();
                if step == 1 {
                    for (var_name, var) in method.params() {
                        assert!(grads.get(var).is_some(), "{name}: {var_name}");
                    }
                }
                adam.step(&grads).unwrap();
                method.after_step(step).unwrap();
            }
            let embed = |batch| method.embed(&data.graph, &data.x, batch);
            let z = embed(None).unwrap();
            // With all neighbors, parts of the nodes are the same as all of them.
            assert!(distance(&embed(Some(33)).unwrap(), &z) < 1e-5, "{name}");
            assert_says(embed(Some(0)), &["batch"]);
            (losses, z)
        };
        let (losses, z) = run();
        let mean = |l: &[f64]| l.iter().sum::<f64>() / l.len() as f64;
        let (first, last) = (mean(&losses[..5]), mean(&losses[35..]));
        assert!(last < first, "{name}: {first} -> {last}");
        assert_eq!(z.dims()[0], 140);
        assert!(values(&z).iter().all(|v| v.is_finite()), "{name}");
        assert_eq!(bits(&z), bits(&run().1), "{name}");
    }
}

/// With all variables of the set, targets and statistics of norms among them, put back.
#[test]
fn training_goes_on_where_it_stopped() {
    let data = data();
    for name in NAMES {
        let train = |method: &mut Method, steps: std::ops::Range<usize>| {
            let vars = method.params().iter().map(|(_, var)| var.clone());
            let mut sgd = candle_nn::SGD::new(vars.collect(), 0.05).unwrap();
            let view = GraphView {
                graph: &data.graph,
                x: &data.x,
            };
            for step in steps {
                let rng = &mut RandomStream::new(6).split(format!("step {step}"));
                let loss = method.loss(&view, rng).unwrap();
                sgd.backward_step(&loss).unwrap();
                method.after_step(step).unwrap();
            }
        };
        let vars = SeededVars::new(&RandomStream::new(1));
        let mut whole = method_over(name, &vars);
        train(&mut whole, 0..3);
        let stopped: Vec<(String, Tensor)> = {
            let map = vars.varmap().data().lock().unwrap();
            map.iter()
                .map(|(name, var)| (name.clone(), var.as_tensor().copy().unwrap()))
                .collect()
        };
        train(&mut whole, 3..7);
        let vars = SeededVars::new(&RandomStream::new(2));
        let mut rest = method_over(name, &vars);
        {
            let map = vars.varmap().data().lock().unwrap();
            for (name, value) in &stopped {
                map[name].set(value).unwrap();
            }
        }
        train(&mut rest, 3..7);
        let embed = |method: &Method| method.embed(&data.graph, &data.x, None).unwrap();
        assert!(bits(&embed(&whole)) == bits(&embed(&rest)), "{name}");
    }
}

/// After k steps towards a constant the target has gone the product of what is left.
#[test]
fn the_target_follows() {
    let vars = SeededVars::new(&RandomStream::new(2));
    let config = BgrlConfig {
        encoder: EncoderConfig {
            widths: vec![4],
            batch_norm: false,
            ..EncoderConfig::default()
        },
        target_rate: 0.3,
        total: 10,
        ..BgrlConfig::default()
    };
    let mut method = Bgrl::new(5, config, &vars, (DType::F64, &CPU)).unwrap();
    let named = vars.trainable();
    let find = |name: &str| named.iter().find(|(n, _)| n == name).unwrap().1.clone();
    let (online, target) = (
        find("encoder.layers.0.lin.weight"),
        find("target.layers.0.lin.weight"),
    );
    let start = values(&target);
    assert_ne!(start, values(&online));
    let mut left = 1.0;
    for step in 0..6 {
        left *= 1.0 - method.rate(step);
        method.after_step(step).unwrap();
    }
    for ((t, s), o) in values(&target).iter().zip(&start).zip(values(&online)) {
        assert!((t - (o + left * (s - o))).abs() < 1e-12);
    }
    assert_eq!(method.rate(10), 0.0);
}

proptest! {
    #![proptest_config(cases(32))]

    #[test]
    fn standardized_columns_have_mean_0_and_deviation_1(seed in 0u64..1000, n in 2usize..30) {
        let z = standardize(&normal(seed, &[n, 3], DType::F64)).unwrap();
        for mean in values(&z.mean(0).unwrap()) {
            prop_assert!(mean.abs() < 1e-12);
        }
        for sum in values(&z.sqr().unwrap().sum(0).unwrap()) {
            prop_assert!((sum - (n - 1) as f64).abs() < 1e-9);
        }
    }

    /// Token and noise sets are disjoint, masked, and of the stated sizes.
    #[test]
    fn masks_have_their_sizes(seed in 0u64..1000, n in 4usize..40, rate in 0.2f64..0.9, replace in 0.0f64..1.0) {
        let rng = &mut RandomStream::new(seed);
        let m = (rate * n as f64).floor() as usize;
        let (nodes, among) = (rng.permutation(n).unwrap(), rng.permutation(m).unwrap());
        let sources = rng.permutation(n).unwrap();
        let plan = MaskPlan::new(rate, replace, &nodes, &among, &sources).unwrap();
        prop_assert_eq!(plan.masked.len(), m);
        prop_assert_eq!(plan.noise.len(), (replace * m as f64).floor() as usize);
        prop_assert_eq!(plan.token.len(), ((1.0 - replace) * m as f64).floor() as usize);
        let both: Vec<_> = plan.token.iter().chain(&plan.noise).collect();
        let distinct: std::collections::BTreeSet<_> = both.iter().collect();
        prop_assert_eq!(distinct.len(), both.len());
        prop_assert!(both.iter().all(|v| plan.masked.contains(v)));
        let x = normal(seed, &[n, 2], DType::F64);
        let token = normal(seed + 1, &[1, 2], DType::F64);
        let shown = plan.apply(&x, &token).unwrap().to_vec2::<f64>().unwrap();
        let (x, token) = (x.to_vec2::<f64>().unwrap(), token.to_vec2::<f64>().unwrap());
        for v in 0..n as u32 {
            let at = plan.noise.iter().position(|u| *u == v);
            let expected = match at {
                _ if plan.token.contains(&v) => &token[0],
                Some(i) => &x[plan.sources[i] as usize],
                None => &x[v as usize],
            };
            prop_assert_eq!(&shown[v as usize], expected);
        }
    }
}

/// Losses by finite differences, on a graph with everything, and a constant column.
#[test]
fn gradients_of_losses() {
    let (a, b) = (var(1, &[8, 3]), var(2, &[8, 3]));
    let graph = messy(4, 8, 20);
    let (looped, _) = graph.add_self_loops(None, 1.0).unwrap();
    let others = Tensor::new(&[1u32, 5, 6], &CPU).unwrap();
    let w = var(3, &[3, 3]);
    let losses: Vec<Box<dyn Fn() -> Tensor>> = vec![
        Box::new(|| barlow_twins(&a, &b, Redundancy::Hsic).unwrap()),
        Box::new(|| cca(&a, &b, 0.1).unwrap()),
        Box::new(|| scaled_cosine_error(&a, &b, 3).unwrap()),
        Box::new(|| efficient_contrast(&looped, &a, &b, 0.7, 0.1, Some(&others)).unwrap()),
        Box::new(|| mutual_information(&a, &b, &w).unwrap()),
    ];
    for loss in &losses {
        assert!(check_gradients(&[&a, &b], loss) < 1e-6);
    }
    let flat = Var::from_tensor(&Tensor::ones((8, 3), DType::F64, &CPU).unwrap()).unwrap();
    let grads = cca(&flat, &b, 0.1).unwrap().backward().unwrap();
    assert!(values(grads.get(&flat).unwrap())
        .iter()
        .all(|g| g.is_finite()));
    // A zero row has no direction: its error is 1.
    let zero = Tensor::zeros((1, 3), DType::F64, &CPU).unwrap();
    let one = normal(5, &[1, 3], DType::F64);
    assert_eq!(values(&scaled_cosine_error(&zero, &one, 2).unwrap()), [1.0]);
}

#[test]
fn bad_input_is_named() {
    let one = normal(1, &[1, 3], DType::F64);
    let two = normal(1, &[2, 3], DType::F64);
    assert_says(cca(&one, &one, 0.1), &["at least 2"]);
    assert_says(barlow_twins(&two, &one, Redundancy::Hsic), &["second"]);
    assert_says(scaled_cosine_error(&two, &two, 0), &["alpha"]);
    assert_says(MaskPlan::new(1.5, 0.0, &[0, 1], &[], &[]), &["mask rate"]);
    assert_says(
        MaskPlan::new(1.0, 0.5, &[0, 1], &[0], &[0]),
        &["permutation"],
    );
    let plan = MaskPlan::new(1.0, 0.0, &[0, 2], &[0, 1], &[]).unwrap();
    let token = normal(1, &[1, 3], DType::F64);
    assert_says(plan.apply(&two, &token), &["hidden node", "2"]);
    let vars = SeededVars::new(&RandomStream::new(0));
    let place = (DType::F32, &CPU);
    let bad = EncoderConfig {
        widths: vec![],
        ..EncoderConfig::default()
    };
    assert_says(Dgi::new(3, &bad, &vars, place).map(|_| ()), &["widths"]);
    let heads = EncoderConfig {
        conv: EncoderConv::Gat {
            heads: 3,
            dropout: 0.0,
        },
        ..EncoderConfig::default()
    };
    assert_says(Dgi::new(3, &heads, &vars, place).map(|_| ()), &["heads"]);
    let cca = SiameseLoss::Cca { lambda: 0.1 };
    let views = ViewConfig::both(1.0, 0.0);
    let made = Siamese::new(3, &EncoderConfig::default(), views, cca, &vars, place);
    assert_says(made.map(|_| ()), &["edges"]);
    let uneven = S2GaeConfig {
        encoder: EncoderConfig {
            widths: vec![4, 8],
            ..EncoderConfig::default()
        },
        ..S2GaeConfig::default()
    };
    assert_says(
        S2Gae::new(3, uneven, &vars, place).map(|_| ()),
        &["equal widths"],
    );
}

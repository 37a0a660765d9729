use crate::support::*;
use candle_core::{DType, Tensor};
use candle_nn::{Activation, VarBuilder};
use graph_learning::conv::*;
use graph_learning::readout::JumpingKnowledge;
use graph_learning::sparse::{gcn_norm, Features, Norm, Reduce, SparseFeatures};
use graph_learning::{Graph, RandomStream};
use nn::init::SeededVars;

fn builder(seed: u64) -> VarBuilder<'static> {
    SeededVars::new(&RandomStream::new(seed)).builder(DType::F64, &CPU)
}

type Layer = Box<dyn GraphModule>;

fn layers(inputs: usize, outputs: usize) -> Vec<(&'static str, Layer)> {
    let vb = builder(3);
    let sage = |aggregation| SageConfig {
        aggregation,
        ..SageConfig::default()
    };
    let gat = GatConfig {
        heads: 2,
        ..GatConfig::default()
    };
    let mlp = Mlp::new(&[inputs, 6, outputs], Activation::Relu, vb.pp("mlp")).unwrap();
    let project = SageConfig {
        project: true,
        normalize: true,
        ..SageConfig::default()
    };
    let v2 = Gatv2Config {
        gat,
        share_weights: true,
    };
    vec![
        (
            "gcn",
            Box::new(GcnConv::new(inputs, outputs, GcnConfig::default(), vb.pp("gcn")).unwrap()),
        ),
        (
            "sage",
            Box::new(SageConv::new(inputs, outputs, sage(Reduce::Mean), vb.pp("sage")).unwrap()),
        ),
        (
            "sage max",
            Box::new(SageConv::new(inputs, outputs, sage(Reduce::Max), vb.pp("max")).unwrap()),
        ),
        (
            "sage project",
            Box::new(SageConv::new(inputs, outputs, project, vb.pp("p")).unwrap()),
        ),
        (
            "gat",
            Box::new(GatConv::new(inputs, outputs, gat, vb.pp("gat")).unwrap()),
        ),
        (
            "gatv2",
            Box::new(Gatv2Conv::new(inputs, outputs, v2, vb.pp("v2")).unwrap()),
        ),
        (
            "gin",
            Box::new(
                GinConv::new(
                    mlp,
                    GinConfig {
                        eps: 0.3,
                        train_eps: true,
                    },
                    vb.pp("gin"),
                )
                .unwrap(),
            ),
        ),
    ]
}

/// Renaming nodes renames outputs, on a directed graph.
#[test]
fn layers_do_not_depend_on_the_numbering() {
    let n = 9;
    let graph = messy(4, n, 25);
    let order = RandomStream::new(1).permutation(n).unwrap();
    let renamed = graph.relabel(&order).unwrap();
    let mut back = vec![0u32; n];
    order
        .iter()
        .enumerate()
        .for_each(|(i, o)| back[*o as usize] = i as u32);
    let (order, back) = (
        Tensor::new(order, &CPU).unwrap(),
        Tensor::new(back, &CPU).unwrap(),
    );
    let x = normal(1, &[n, 5], DType::F64);
    let moved = x.index_select(&back, 0).unwrap();
    for (name, layer) in layers(5, 3) {
        let y = layer.forward_t(&graph, &x, None).unwrap();
        let z = layer.forward_t(&renamed, &moved, None).unwrap();
        let z = z.index_select(&order, 0).unwrap();
        assert!(distance(&z, &y) < 1e-12, "{name}");
    }
}

#[test]
fn multiplying_first_or_last_is_the_same() {
    let graph = messy(4, 9, 25);
    for (inputs, outputs) in [(5, 3), (3, 5)] {
        let x = normal(1, &[9, inputs], DType::F64).relu().unwrap();
        let sparse: Features = SparseFeatures::from_dense(&x).unwrap().into();
        let dense: Features = x.clone().into();
        let vb = builder(5).pp(inputs);
        let gcn = GcnConv::new(inputs, outputs, GcnConfig::default(), vb.pp("gcn")).unwrap();
        let (a, b) = (
            gcn.apply(&graph, &sparse, None),
            gcn.apply(&graph, &dense, None),
        );
        assert!(distance(&a.unwrap(), b.as_ref().unwrap()) < 1e-12);
        let later = gcn
            .transform(&gcn.propagate(&graph, &x, None).unwrap())
            .unwrap();
        assert!(distance(&later, &b.unwrap()) < 1e-12);
        let sage = SageConv::new(inputs, outputs, SageConfig::default(), vb.pp("sage")).unwrap();
        let (a, b) = (
            sage.apply(&graph, &sparse),
            sage.apply(&graph, &dense).unwrap(),
        );
        assert!(distance(&a.unwrap(), &b) < 1e-12);
        let later = sage
            .transform(&sage.aggregate(&graph, &x).unwrap(), &x)
            .unwrap();
        assert!(distance(&later, &b) < 1e-12);
        let gat = GatConv::new(inputs, outputs, GatConfig::default(), vb.pp("gat")).unwrap();
        let run = |x| gat.apply(&graph, x, None, None).unwrap();
        assert!(distance(&run(&sparse), &run(&dense)) < 1e-12);
    }
}

#[test]
fn normalized_weights_given_or_computed() {
    let graph = messy(4, 9, 25);
    let x = normal(1, &[9, 5], DType::F64);
    let w = normal(2, &[25], DType::F64).abs().unwrap();
    let conv = |config| GcnConv::new(5, 3, config, builder(5)).unwrap();
    let plain = conv(GcnConfig::default());
    let features: Features = x.clone().into();
    let y = plain.apply(&graph, &features, Some(&w)).unwrap();
    let raw = conv(GcnConfig {
        normalize: false,
        ..GcnConfig::default()
    });
    let (looped, normal) = gcn_norm(&graph, Some(&w), Norm::Sym, false).unwrap();
    let z = raw.apply(&looped, &features, Some(&normal)).unwrap();
    assert_eq!(bits(&y), bits(&z));
    // Kept by identity of graph and weights: other weights are normalized again.
    let kept = conv(GcnConfig {
        cached: true,
        ..GcnConfig::default()
    });
    for w in [&w, &w, &(&w * 2.0).unwrap()] {
        let y = plain.apply(&graph, &features, Some(w)).unwrap();
        assert_eq!(
            bits(&kept.apply(&graph, &features, Some(w)).unwrap()),
            bits(&y)
        );
    }
    // Without weights: ones.
    let ones = Tensor::ones(25, DType::F64, &CPU).unwrap();
    let (a, b) = (
        plain.apply(&graph, &features, None),
        plain.apply(&graph, &features, Some(&ones)),
    );
    assert!(distance(&a.unwrap(), &b.unwrap()) < 1e-12);
    let improved = conv(GcnConfig {
        improved: true,
        ..GcnConfig::default()
    });
    let (looped, normal) = gcn_norm(&graph, Some(&ones), Norm::Sym, true).unwrap();
    let z = raw.apply(&looped, &features, Some(&normal)).unwrap();
    assert_eq!(
        bits(&improved.apply(&graph, &features, None).unwrap()),
        bits(&z)
    );
    let bare = conv(GcnConfig {
        add_self_loops: false,
        ..GcnConfig::default()
    });
    let (a, b) = (
        bare.apply(&graph, &features, None),
        bare.apply(&graph, &features, Some(&ones)),
    );
    assert!(distance(&a.unwrap(), &b.unwrap()) < 1e-12);
}

#[test]
fn edge_features_take_part_in_attention() {
    let graph = messy(4, 6, 12);
    let x: Features = normal(1, &[6, 5], DType::F64).into();
    let u = var(2, &[12, 3]);
    let gat = GatConfig {
        heads: 2,
        edge_dim: Some(3),
        ..GatConfig::default()
    };
    let one = GatConv::new(5, 4, gat, builder(1)).unwrap();
    let f = || against(&one.apply(&graph, &x, Some(&u), None).unwrap(), 7);
    assert!(check_gradients(&[&u], f) < 1e-6);
    let two = Gatv2Conv::new(
        5,
        4,
        Gatv2Config {
            gat,
            share_weights: false,
        },
        builder(2),
    )
    .unwrap();
    let f = || against(&two.apply(&graph, &x, Some(&u), None).unwrap(), 7);
    assert!(check_gradients(&[&u], f) < 1e-6);
    assert_says(one.apply(&graph, &x, None, None), &["edge features"]);
    let short = u.narrow(0, 0, 11).unwrap();
    assert_says(
        one.apply(&graph, &x, Some(&short), None),
        &["edge features", "[12, edge_dim]"],
    );
}

#[test]
fn dropout_is_seeded_and_keeps_the_mean() {
    let graph = messy(4, 9, 25);
    let x = normal(1, &[9, 5], DType::F64);
    let gat = GatConfig {
        dropout: 0.5,
        ..GatConfig::default()
    };
    let gat = GatConv::new(5, 3, gat, builder(1)).unwrap();
    let run = |seed| {
        bits(
            &gat.forward_t(&graph, &x, Some(&mut RandomStream::new(seed)))
                .unwrap(),
        )
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
    assert_eq!(
        bits(&gat.forward_t(&graph, &x, None).unwrap()),
        bits(&gat.forward(&graph, &x).unwrap())
    );
    let ones = Tensor::ones((100, 100), DType::F32, &CPU).unwrap();
    let dropped = dropout(&ones, 0.3, Some(&mut RandomStream::new(3))).unwrap();
    let mean = values(&dropped.mean_all().unwrap())[0];
    assert!((mean - 1.0).abs() < 0.02, "{mean}");
    assert!(dropout(&ones, 1.0, None).is_err());
}

#[test]
fn blocks_take_the_targets_from_the_front() {
    // Targets 0 and 1 of four sources.
    let block = Graph::bipartite(4, 2, vec![2, 3, 1], vec![0, 0, 1]).unwrap();
    let x = normal(1, &[4, 5], DType::F64);
    for (name, layer) in layers(5, 3) {
        let y = layer.forward_t(&block, &x, None);
        if name == "gcn" {
            assert_says(y, &["normalized graph convolution"]);
        } else {
            assert_eq!(y.unwrap().dims()[0], 2, "{name}");
        }
    }
    let turned = Graph::bipartite(2, 4, vec![0], vec![3]).unwrap();
    let sage = SageConv::new(5, 3, SageConfig::default(), builder(1)).unwrap();
    assert!(sage
        .forward(&turned, &normal(1, &[2, 5], DType::F64))
        .is_err());
}

#[test]
fn bad_layers_are_refused() {
    assert!(GcnConv::new(0, 3, GcnConfig::default(), builder(1)).is_err());
    assert!(Mlp::new(&[3], Activation::Relu, builder(1)).is_err());
    for config in [
        GatConfig {
            heads: 0,
            ..GatConfig::default()
        },
        GatConfig {
            dropout: 1.0,
            ..GatConfig::default()
        },
        GatConfig {
            negative_slope: f64::NAN,
            ..GatConfig::default()
        },
        GatConfig {
            edge_dim: Some(0),
            ..GatConfig::default()
        },
    ] {
        assert!(GatConv::new(2, 3, config, builder(1)).is_err());
    }
    let graph = messy(1, 5, 8);
    let wrong = normal(1, &[4, 5], DType::F64);
    for (name, layer) in layers(5, 3) {
        assert!(layer.forward_t(&graph, &wrong, None).is_err(), "{name}");
    }
}

#[test]
fn jumping_knowledge_joins_layers() {
    let (a, b) = (
        normal(1, &[4, 3], DType::F64),
        normal(2, &[4, 3], DType::F64),
    );
    let joined = JumpingKnowledge::Concat
        .forward(&[a.clone(), b.clone()])
        .unwrap();
    assert_eq!(joined.dims(), &[4, 6]);
    let max = JumpingKnowledge::Max
        .forward(&[a.clone(), b.clone()])
        .unwrap();
    let expected: Vec<f64> = values(&a)
        .iter()
        .zip(values(&b))
        .map(|(a, b)| a.max(b))
        .collect();
    assert_eq!(values(&max), expected);
    assert!(JumpingKnowledge::Max.forward(&[]).is_err());
}

/// The layers' weights are positive, add up to 1 and depend on the order of the layers.
#[test]
fn lstm_jumping_knowledge_is_a_weighted_mean() {
    use graph_learning::readout::LstmJumpingKnowledge;
    let vars = SeededVars::new(&RandomStream::new(3));
    let vb = vars.builder(DType::F64, &CPU);
    let jump = LstmJumpingKnowledge::new(4, 3, vb).unwrap();
    let layers: Vec<Tensor> = (0..3).map(|i| normal(i, &[5, 4], DType::F64)).collect();
    let out = jump.forward(&layers).unwrap();
    assert_eq!(out.dims(), &[5, 4]);
    // Equal layers come back as they are, whatever the weights.
    let same = jump.forward(&[&layers[0]; 3].map(Clone::clone)).unwrap();
    assert!(distance(&same, &layers[0]) < 1e-12);
    let turned: Vec<Tensor> = layers.iter().rev().cloned().collect();
    assert!(distance(&jump.forward(&turned).unwrap(), &out) > 1e-6);
    let grads = out.sqr().unwrap().sum_all().unwrap().backward().unwrap();
    for (name, var) in vars.trainable() {
        assert!(grads.get(&var).is_some(), "{name}");
    }
    assert_eq!(vars.trainable().len(), 10);
    assert_says(jump.forward(&layers[..2]), &["layers = 2"]);
    assert_says(
        LstmJumpingKnowledge::new(1, 1, vars.builder(DType::F64, &CPU)),
        &["two numbers"],
    );
}

use crate::support::*;
use candle_core::{DType, Tensor};
use graph_learning::forward::*;
use graph_learning::generate::{citation_network, CitationConfig};
use graph_learning::io::NodeData;
use graph_learning::sparse::Features;
use graph_learning::split::{random_links, random_nodes, LinkSplitConfig};
use graph_learning::{Error, Graph, RandomStream};
use nn::init::SeededVars;
use std::ops::ControlFlow;

#[test]
fn reference() {
    let report = FILES.verify("forward-gnn", graph_learning::verify::forward_gnn);
    assert_passed(&report, |_| false);
    assert!(report.uncovered.is_empty());
    assert_eq!(report.comparisons.len(), 53);
}

/// Two classes, one head and another slope, fewer and more layers: numbers of an independent computation in PyTorch.
#[test]
fn another_reference() {
    let report = FILES.verify("other/forward-gnn", graph_learning::verify::forward_gnn);
    assert_passed(&report, |_| false);
    assert!(report.uncovered.is_empty());
}

/// Convolutions are discovered in the file.
#[test]
fn the_adaptor_finds_the_convolutions() {
    let report = FILES.verify_variant(
        "forward-gnn",
        |tensors, _| tensors.retain(|name, _| !name.starts_with("sf_gat")),
        graph_learning::verify::forward_gnn,
    );
    assert_passed(&report, |_| false);
    assert_eq!(report.comparisons.len(), 43);
}

fn data(seed: u64, dtype: DType, dense: bool) -> NodeData {
    let rng = &mut RandomStream::new(seed);
    let config = CitationConfig {
        nodes: 105,
        words: 42,
        ..CitationConfig::default()
    };
    let mut data = citation_network(config, rng).unwrap();
    data.split = Some(random_nodes(105, 20, 25, rng).unwrap());
    if let Features::Sparse(x) = &data.x {
        let x = x.to_dtype(dtype).unwrap().normalize_rows(false).unwrap();
        data.x = match dense {
            true => x.to_dense(&CPU).unwrap().into(),
            false => x.into(),
        };
    }
    data
}

fn config() -> ForwardGnnConfig {
    ForwardGnnConfig {
        hidden: 8,
        lr: 0.01,
        epochs: 12,
        ..ForwardGnnConfig::default()
    }
}

fn go(_: &Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn vars(seed: u64) -> SeededVars {
    SeededVars::new(&RandomStream::new(seed))
}

fn single(config: ForwardGnnConfig, data: &NodeData, dtype: DType) -> SingleForward {
    let shape = NodeShape::of(data).unwrap();
    SingleForward::new(config, shape, &vars(1), dtype, &CPU).unwrap()
}

fn all_nodes(data: &NodeData) -> Vec<u32> {
    (0..data.y.len() as u32).collect()
}

/// The slope of the attention is the file's.
#[test]
fn the_adaptor_reads_the_slope() {
    let report = FILES.verify_variant(
        "forward-gnn",
        |_, metadata| {
            metadata
                .insert("gat_negative_slope".into(), "0.4".into())
                .unwrap();
        },
        graph_learning::verify::forward_gnn,
    );
    for comparison in &report.comparisons {
        let attention = comparison.name.starts_with("sf_gat");
        assert!(comparison.passed || attention, "{}", comparison.name);
    }
    assert!(!passed(&report, "sf_gat_out"));
}

const GAT: ConvKind = ConvKind::Gat {
    heads: 2,
    negative_slope: 0.2,
};

/// Every convolution and label column; dense and sparse features, with and without what is computed
/// once, give the same model.
#[test]
fn cached_and_sparse_training_is_the_same() {
    for conv in [ConvKind::Gcn, ConvKind::Sage, GAT] {
        for append_label in [AppendLabel::None, AppendLabel::Input, AppendLabel::All] {
            let run = |cache: bool, dense: bool| {
                let data = data(3, DType::F64, dense);
                let config = ForwardGnnConfig {
                    conv,
                    append_label,
                    cache,
                    ..config()
                };
                let mut model = single(config, &data, DType::F64);
                let mut losses = Vec::new();
                let mut watch = |p: &Progress| {
                    losses.push(p.loss);
                    ControlFlow::Continue(())
                };
                model.fit(&data, &RandomStream::new(2), &mut watch).unwrap();
                let proba = model.predict_proba(&all_nodes(&data), None).unwrap();
                (losses, proba)
            };
            let (losses, proba) = run(true, true);
            for (cache, dense) in [(false, true), (true, false)] {
                let (other, other_proba) = run(cache, dense);
                let pairs = losses.iter().zip(&other);
                assert!(pairs.clone().all(|(a, b)| (a - b).abs() < 1e-6));
                assert!(distance(&proba, &other_proba) < 1e-6);
            }
        }
    }
}

/// Looks begin after the second epoch.
#[test]
fn the_first_epoch_is_not_looked_at() {
    let data = data(5, DType::F32, false);
    let config = ForwardGnnConfig {
        layers: 1,
        epochs: 3,
        val_every: 1,
        ..config()
    };
    let mut looks = Vec::new();
    let mut watch = |p: &Progress| {
        looks.push(p.validation.is_some());
        ControlFlow::Continue(())
    };
    let rng = RandomStream::new(1);
    single(config, &data, DType::F32)
        .fit(&data, &rng, &mut watch)
        .unwrap();
    assert_eq!(looks, [false, true, true]);
}

/// A layer's loss has gradients for its own variables alone, and every prefix answers.
#[test]
fn every_prefix_is_a_classifier() {
    let data = data(4, DType::F32, false);
    let config = ForwardGnnConfig {
        layers: 3,
        epochs: 40,
        hidden: 16,
        ..config()
    };
    let mut model = single(config, &data, DType::F32);
    let before: Vec<Vec<f64>> = model
        .layers()
        .iter()
        .map(|l| values(&l.params()[1].1))
        .collect();
    let report = model.fit(&data, &RandomStream::new(2), &mut go).unwrap();
    assert_eq!(report.per_layer.len(), 3);
    for (layer, before) in model.layers().iter().zip(before) {
        assert_ne!(values(&layer.params()[1].1), before);
    }
    let nodes = all_nodes(&data);
    let split = data.split.as_ref().unwrap();
    for layers in 1..=3 {
        let proba = model.predict_proba(&nodes, Some(layers)).unwrap();
        let sums = values(&proba.sum(1).unwrap());
        assert!(sums.iter().all(|s| (s - 1.0).abs() < 1e-5));
        let right = accuracy(&proba, &split.test, &data.y).unwrap();
        assert!(right > 0.4, "{right} with {layers} layers");
    }
    // Depth costs no memory: layers above the first have equal inputs.
    let bytes: Vec<usize> = report.per_layer.iter().map(|l| l.peak_bytes).collect();
    assert!(bytes[1] == bytes[2] && bytes[2] <= bytes[0], "{bytes:?}");
}

#[test]
fn stopping_between_layers_changes_no_bit() {
    let data = data(5, DType::F32, false);
    let rng = RandomStream::new(2);
    let mut whole = single(config(), &data, DType::F32);
    whole.fit(&data, &rng, &mut go).unwrap();
    let shared = vars(1);
    let shape = NodeShape::of(&data).unwrap();
    let build = || SingleForward::new(config(), shape, &shared, DType::F32, &CPU).unwrap();
    let mut first = build();
    let mut stop = |p: &Progress| match p.layer {
        0 => ControlFlow::Continue(()),
        _ => ControlFlow::Break(()),
    };
    let stopped = first.fit(&data, &rng, &mut stop);
    assert!(matches!(stopped, Err(Error::Stopped { .. })));
    assert_eq!(first.trained(), 1);
    // The second layer had made a step: its weights are drawn anew, the first one's stay.
    let map = shared.varmap();
    map.data()
        .lock()
        .unwrap()
        .retain(|name, _| name.starts_with("layers.0."));
    let mut second = build().with_trained(1).unwrap();
    second.fit(&data, &rng, &mut go).unwrap();
    let nodes = all_nodes(&data);
    let of = |model: &SingleForward| bits(&model.predict_proba(&nodes, None).unwrap());
    assert_eq!(of(&whole), of(&second));
}

#[test]
fn an_empty_mask_adds_isolated_nodes() {
    let data = data(6, DType::F64, true);
    let drawn = normal(1, &[7, 42], DType::F64);
    let augmenter = GraphAugmenter::new(
        &data.graph,
        &data.x,
        7,
        AugDirection::Both,
        AppendLabel::None,
        &drawn,
    )
    .unwrap();
    let graph = augmenter.augment(&data.y, &[], None).unwrap();
    assert_eq!(graph.graph.num_nodes(), 112);
    assert_eq!(graph.graph.src(), data.graph.src());
    assert_eq!(graph.graph.dst(), data.graph.dst());
    assert!(graph.edge_type.iter().all(|t| *t == 0));
    // Only to the virtual nodes: half of the new edges.
    let one_way = GraphAugmenter::new(
        &data.graph,
        &data.x,
        7,
        AugDirection::ToVirtual,
        AppendLabel::None,
        &drawn,
    )
    .unwrap();
    let graph = one_way.augment(&data.y, &[3, 1], None).unwrap();
    assert_eq!(graph.graph.num_edges(), data.graph.num_edges() + 2);
    assert_eq!(graph.connected, [1, 3]);
}

/// Renumbered nodes give renumbered answers.
#[test]
fn node_order_does_not_matter() {
    let data = data(7, DType::F64, true);
    let order = RandomStream::new(1).permutation(105).unwrap();
    let mut place = vec![0u32; 105];
    order
        .iter()
        .enumerate()
        .for_each(|(new, old)| place[*old as usize] = new as u32);
    let at = |list: &[u32]| list.iter().map(|v| place[*v as usize]).collect::<Vec<_>>();
    let index = Tensor::from_slice(&order, 105, &CPU).unwrap();
    let split = data.split.clone().unwrap();
    let moved = NodeData {
        graph: Graph::from_edges(105, at(data.graph.src()), at(data.graph.dst())).unwrap(),
        x: data
            .x
            .to_dense(&CPU)
            .unwrap()
            .index_select(&index, 0)
            .unwrap()
            .into(),
        y: order.iter().map(|old| data.y[*old as usize]).collect(),
        classes: 7,
        split: Some(graph_learning::split::NodeSplit {
            train: at(&split.train),
            val: at(&split.val),
            test: at(&split.test),
        }),
    };
    let run = |data: &NodeData| {
        let mut model = single(config(), data, DType::F64);
        model.fit(data, &RandomStream::new(2), &mut go).unwrap();
        model.predict_proba(&all_nodes(data), None).unwrap()
    };
    let expected = run(&data).index_select(&index, 0).unwrap();
    assert!(distance(&run(&moved), &expected) < 1e-7);
}

#[test]
fn goodness_learns() {
    let data = data(8, DType::F32, false);
    let shape = NodeShape::of(&data).unwrap();
    let split = data.split.clone().unwrap();
    for carrier in [LabelCarrier::VirtualNodes, LabelCarrier::Columns] {
        let config = ForwardGnnConfig {
            epochs: 40,
            hidden: 16,
            num_negatives: 3,
            ..config()
        };
        let mut model =
            ForwardForward::new(carrier, config, shape, &vars(1), DType::F32, &CPU).unwrap();
        let mut losses = vec![Vec::new(); 2];
        let mut watch = |p: &Progress| {
            losses[p.layer].push(p.loss);
            ControlFlow::Continue(())
        };
        model.fit(&data, &RandomStream::new(2), &mut watch).unwrap();
        for of_layer in &losses {
            assert!(of_layer[39] < of_layer[0], "{carrier:?} {of_layer:?}");
        }
        let scores = model.goodness(&split.test, &split.val, None).unwrap();
        assert_eq!(scores.dims(), &[25, 7]);
        let first = model.goodness(&split.test, &[], Some(1)).unwrap();
        assert_ne!(bits(&scores), bits(&first));
    }
}

#[test]
fn top_down_models_learn() {
    let data = data(9, DType::F32, false);
    let shape = NodeShape::of(&data).unwrap();
    let config = ForwardGnnConfig {
        epochs: 40,
        layers: 3,
        hidden: 16,
        val_every: 10,
        ..config()
    };
    let split = data.split.clone().unwrap();
    let nodes = all_nodes(&data);
    let rng = RandomStream::new(2);
    for switch in [false, true] {
        let mut input =
            TopDownToInput::new(switch, config, shape, &vars(1), DType::F32, &CPU).unwrap();
        input.fit(&data, &rng, &mut go).unwrap();
        let mut loss =
            TopDownToLoss::new(switch, config, shape, &vars(1), DType::F32, &CPU).unwrap();
        loss.fit(&data, &rng, &mut go).unwrap();
        for proba in [
            input.predict_proba(&nodes).unwrap(),
            loss.predict_proba(&nodes).unwrap(),
        ] {
            let right = accuracy(&proba, &split.test, &data.y).unwrap();
            // Twice what guessing gives.
            assert!(right > 2.0 / 7.0, "{right}");
        }
    }
}

#[test]
fn links_are_told_from_other_pairs() {
    let data = data(10, DType::F32, false);
    let rng = &mut RandomStream::new(1);
    let split = random_links(&data.graph, LinkSplitConfig::default(), rng).unwrap();
    let task = LinkTask {
        x: &data.x,
        split: &split,
    };
    let config = ForwardGnnConfig {
        epochs: 40,
        hidden: 16,
        val_every: 10,
        ..config()
    };
    let pairs = &split.train.positive;
    let others = &split.train.negative;
    for loss in [LinkLoss::CrossEntropy, LinkLoss::Goodness { theta: 2.0 }] {
        let mut model = LinkForward::new(loss, config, 42, &vars(1), DType::F32, &CPU).unwrap();
        model.fit(&task, &mut go).unwrap();
        let mut above =
            LinkTopDown::new(loss, true, config, 42, &vars(1), DType::F32, &CPU).unwrap();
        above.fit(&task, &mut go).unwrap();
        let graph = &split.train.message_graph;
        let mean = |scores: Tensor| values(&scores.mean(0).unwrap())[0];
        for (edges, rest) in [
            (
                model.score(graph, &data.x, pairs),
                model.score(graph, &data.x, others),
            ),
            (
                above.score(graph, &data.x, pairs),
                above.score(graph, &data.x, others),
            ),
        ] {
            assert!(mean(edges.unwrap()) > mean(rest.unwrap()), "{loss:?}");
        }
    }
}

#[test]
fn bad_input_is_named() {
    let mut data = data(11, DType::F32, false);
    let shape = NodeShape::of(&data).unwrap();
    let mut model = single(config(), &data, DType::F32);
    assert_says(model.predict_proba(&[0], None), &["not trained", "fit"]);
    let split = data.split.clone().unwrap();
    let mut lacking = split.clone();
    lacking.train.retain(|v| data.y[*v as usize] != 4);
    data.split = Some(lacking);
    let rng = RandomStream::new(0);
    let missing = model.fit(&data, &rng, &mut go);
    assert!(
        matches!(missing, Err(Error::MissingClass { class: 4 })),
        "{missing:?}"
    );
    data.split = None;
    assert_says(model.fit(&data, &rng, &mut go), &["split"]);
    data.split = Some(split);
    let mut hole = data.clone();
    let dense = data.x.to_dense(&CPU).unwrap();
    hole.x = (dense * f64::NAN).unwrap().into();
    assert_says(model.fit(&hole, &rng, &mut go), &["NaN"]);
    let wide = single(config(), &data, DType::F32).layers()[0]
        .params()
        .len();
    assert_eq!(wide, 2);
    model.fit(&data, &rng, &mut go).unwrap();
    assert_says(model.predict_proba(&[0], Some(3)), &["up_to_layer", "2"]);
    assert_says(model.predict_proba(&[105], None), &["105"]);
    for (bad, word) in [
        (
            ForwardGnnConfig {
                layers: 0,
                ..config()
            },
            "layers",
        ),
        (
            ForwardGnnConfig {
                temperature: 0.0,
                ..config()
            },
            "temperature",
        ),
        (
            ForwardGnnConfig {
                conv: ConvKind::Gat {
                    heads: 3,
                    negative_slope: 0.2,
                },
                ..config()
            },
            "divisor",
        ),
        (
            ForwardGnnConfig {
                conv: ConvKind::Gat {
                    heads: 2,
                    negative_slope: f64::NAN,
                },
                ..config()
            },
            "negative_slope",
        ),
        (
            ForwardGnnConfig {
                read_out_from: 10,
                ..config()
            },
            "read_out_from",
        ),
    ] {
        let made = SingleForward::new(bad, shape, &vars(0), DType::F32, &CPU);
        assert_says(made.map(|_| ()), &[word]);
    }
    let all = ForwardGnnConfig {
        append_label: AppendLabel::All,
        ..config()
    };
    let made = TopDownToInput::new(false, all, shape, &vars(0), DType::F32, &CPU);
    assert_says(made.map(|_| ()), &["AppendLabel::All"]);
}

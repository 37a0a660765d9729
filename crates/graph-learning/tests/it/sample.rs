use crate::support::*;
use candle_core::{DType, Tensor};
use graph_learning::conv::*;
use graph_learning::generate::*;
use graph_learning::sample::negative::{negative_sampling, Method, Negatives};
use graph_learning::sample::*;
use graph_learning::split::*;
use graph_learning::{Graph, RandomStream};
use nn::init::SeededVars;
use proptest::prelude::*;
use std::collections::BTreeSet;

proptest! {
    #![proptest_config(cases(16))]

    /// With all neighbors, the blocks compute what the whole graph computes.
    #[test]
    fn full_neighborhoods_are_exact(seed in 0u64..1000, n in 3usize..20, edges in 0usize..60) {
        let graph = messy(seed, n, edges);
        let vb = SeededVars::new(&RandomStream::new(seed)).builder(DType::F64, &CPU);
        let gat = GatConfig { heads: 2, ..GatConfig::default() };
        let layers: Vec<Vec<Box<dyn GraphModule>>> = vec![
            vec![
                Box::new(SageConv::new(4, 4, SageConfig::default(), vb.pp("a")).unwrap()),
                Box::new(SageConv::new(4, 4, SageConfig::default(), vb.pp("b")).unwrap()),
            ],
            vec![
                Box::new(GatConv::new(4, 4, gat, vb.pp("c")).unwrap()),
                Box::new(GatConv::new(8, 4, gat, vb.pp("d")).unwrap()),
            ],
        ];
        let x = normal(seed, &[n, 4], DType::F64);
        let seeds = [n as u32 - 1, 0];
        let rng = &mut RandomStream::new(seed);
        let batch = NeighborSampler::new(&graph, &[None, None]).unwrap().sample(&seeds, rng).unwrap();
        prop_assert_eq!(&batch.n_id[..2], &seeds);
        for stack in layers {
            let mut whole = x.clone();
            let mut part = x.index_select(&batch.node_ids(&CPU).unwrap(), 0).unwrap();
            for (layer, block) in stack.iter().zip(&batch.blocks) {
                whole = layer.forward_t(&graph, &whole, None).unwrap();
                part = layer.forward_t(&block.graph, &part, None).unwrap();
            }
            let wanted = whole.index_select(&Tensor::new(&seeds, &CPU).unwrap(), 0).unwrap();
            prop_assert!(distance(&part, &wanted) < 1e-12);
        }
    }

    #[test]
    fn blocks_are_parts_of_the_graph(seed in 0u64..1000, n in 3usize..20, edges in 0usize..80, k in 1usize..4) {
        let graph = messy(seed, n, edges);
        let rng = &mut RandomStream::new(seed);
        let batch = NeighborSampler::new(&graph, &[Some(k), Some(2)]).unwrap().sample(&[0, 1], rng).unwrap();
        let fanouts = [2, k];
        for (block, fanout) in batch.blocks.iter().zip(fanouts) {
            let degrees = graph.in_degrees();
            for (e, (s, t)) in block.edge_ids.iter().zip(block.graph.edges()) {
                let ends = (graph.src()[*e as usize], graph.dst()[*e as usize]);
                prop_assert_eq!(ends, (batch.n_id[s as usize], batch.n_id[t as usize]));
            }
            let distinct: BTreeSet<_> = block.edge_ids.iter().collect();
            prop_assert_eq!(distinct.len(), block.edge_ids.len());
            for (t, drawn) in block.graph.in_degrees().into_iter().enumerate() {
                let degree = degrees[batch.n_id[t] as usize];
                prop_assert_eq!(drawn, degree.min(fanout as u32));
            }
        }
        prop_assert_eq!(batch.blocks[1].graph.num_targets(), 2);
        prop_assert_eq!(batch.blocks[0].graph.num_targets(), batch.blocks[1].graph.num_sources());
    }

    #[test]
    fn partitions_cover_every_node_once(seed in 0u64..1000, n in 2usize..60, parts in 1usize..9) {
        let rng = &mut RandomStream::new(seed);
        let graph = erdos_renyi(n, 0.1, rng).unwrap();
        let count = parts.min(n);
        let parts = partition(&graph, count, rng).unwrap();
        let share = n.div_ceil(count);
        prop_assert!(parts.iter().all(|p| p.len() <= share + share / 20 + 1));
        let mut all: Vec<u32> = parts.concat();
        all.sort_unstable();
        prop_assert_eq!(all, (0..n as u32).collect::<Vec<_>>());
        let batches = ClusterSampler::new(parts, 2).unwrap().epoch(rng).unwrap();
        prop_assert_eq!(batches.concat().len(), n);
    }

    #[test]
    fn negatives_are_no_edges(seed in 0u64..1000, n in 3usize..15, edges in 0usize..30, both in any::<bool>(), dense in any::<bool>()) {
        let graph = messy(seed, n, edges);
        let method = if dense { Method::Dense } else { Method::Sparse };
        let how = Negatives { method, undirected: both };
        let pairs = negative_sampling(&graph, 2, how, &mut RandomStream::new(seed));
        let real: BTreeSet<_> = graph.edges().collect();
        if let Ok(pairs) = pairs {
            prop_assert_eq!(pairs.iter().collect::<BTreeSet<_>>().len(), 2);
            for (u, v) in pairs {
                prop_assert!(u != v && !real.contains(&(u, v)));
                prop_assert!(!both || (u < v && !real.contains(&(v, u))));
            }
        }
    }
}

#[test]
fn partitions_find_communities() {
    let rng = &mut RandomStream::new(3);
    let p = vec![vec![0.3, 0.01], vec![0.01, 0.3]];
    let (graph, blocks) = stochastic_block_model(&[50, 50], &p, rng).unwrap();
    let parts = partition(&graph, 2, rng).unwrap();
    let mut part_of = vec![0; 100];
    parts[1].iter().for_each(|v| part_of[*v as usize] = 1);
    let cut = graph
        .edges()
        .filter(|(s, t)| part_of[*s as usize] != part_of[*t as usize])
        .count();
    let planted = graph
        .edges()
        .filter(|(s, t)| blocks[*s as usize] != blocks[*t as usize])
        .count();
    assert!(cut < 3 * planted.max(20), "{cut} {planted}");
}

#[test]
fn sampled_sums_are_unbiased() {
    let graph = star(41).unwrap();
    let x = normal(1, &[41, 1], DType::F64);
    let wanted =
        values(&graph_learning::sparse::spmm(&graph, None, &x, Default::default()).unwrap())[0];
    let mut sampler = NeighborSampler::new(&graph, &[Some(8)]).unwrap();
    let rng = &mut RandomStream::new(1);
    let mut mean = 0.0;
    for _ in 0..2000 {
        let batch = sampler.sample(&[0], rng).unwrap();
        let part = x.index_select(&batch.node_ids(&CPU).unwrap(), 0).unwrap();
        let block = &batch.blocks[0];
        let w = block.weight_tensor(DType::F64, &CPU).unwrap();
        mean += values(
            &graph_learning::sparse::spmm(&block.graph, Some(&w), &part, Default::default())
                .unwrap(),
        )[0] / 2000.0;
    }
    assert!((mean - wanted).abs() < 2.0, "{mean} {wanted}");
}

#[test]
fn walks_and_subgraphs_follow_edges() {
    let rng = &mut RandomStream::new(1);
    let graph = grid(6, 6).unwrap();
    let walks = random_walk(&graph, &[0, 35], 10, rng).unwrap();
    assert_eq!(walks.len(), 22);
    let edges: BTreeSet<_> = graph.edges().collect();
    for walk in walks.chunks(11) {
        assert!(walk.windows(2).all(|w| edges.contains(&(w[0], w[1]))));
    }
    let dead_end = Graph::from_edges(2, vec![0], vec![1]).unwrap();
    assert_eq!(random_walk(&dead_end, &[0], 3, rng).unwrap(), [0, 1, 1, 1]);
    for method in [
        SaintMethod::Node { budget: 12 },
        SaintMethod::Edge { budget: 6 },
        SaintMethod::RandomWalk {
            roots: 3,
            length: 4,
        },
    ] {
        let sampler = SaintSampler::new(&graph, method, 200, rng).unwrap();
        // Loss weights are unbiased: their mean total over batches is 1.
        let mut total = 0.0;
        for _ in 0..200 {
            let batch = sampler.sample(rng).unwrap();
            assert_eq!(batch.graph.num_edges(), batch.edge_weights.len());
            assert!(batch.edge_weights.iter().all(|w| *w >= 1.0));
            total += batch.node_weights.iter().sum::<f64>() / 200.0;
        }
        assert!((total - 1.0).abs() < 0.1, "{method:?}: {total}");
    }
    assert!(SaintSampler::new(
        &Graph::empty(3).unwrap(),
        SaintMethod::Node { budget: 1 },
        1,
        rng
    )
    .is_err());
}

#[test]
fn splits_hold_out_what_they_say() {
    let rng = &mut RandomStream::new(1);
    let split = random_nodes(10, 3, 2, rng).unwrap();
    assert_eq!(
        [split.train.len(), split.val.len(), split.test.len()],
        [5, 3, 2]
    );
    split.validate(10).unwrap();
    assert!(split.validate(9).is_err());
    let labels: Vec<u32> = (0..60).map(|i| i % 3).collect();
    let split = random_per_class(&labels, 3, 4, (10, 20), rng).unwrap();
    split.require_classes(&labels, 3).unwrap();
    for c in 0..3 {
        assert_eq!(
            split
                .train
                .iter()
                .filter(|v| labels[**v as usize] == c)
                .count(),
            4
        );
    }
    let missing = NodeSplit {
        train: vec![0, 1],
        ..NodeSplit::default()
    };
    assert_says(missing.require_classes(&labels, 3), &["class 2"]);
    assert_says(missing.require_classes(&labels, 2), &["label 2", "below 2"]);
    assert!(random_per_class(&labels, 3, 21, (0, 0), rng).is_err());
    assert!(random_nodes(10, 8, 3, rng).is_err());
    let folds = stratified_kfold(&labels, 7, rng).unwrap();
    assert!(folds.iter().all(|f| (8..=9).contains(&f.len())));
    for fold in &folds {
        let ones = fold.iter().filter(|v| labels[**v as usize] == 1).count();
        assert!((2..=4).contains(&ones));
    }
    assert!(stratified_kfold(&labels, 1, rng).is_err());
}

#[test]
fn link_splits_leak_nothing() {
    let rng = &mut RandomStream::new(2);
    let graph = erdos_renyi(60, 0.1, rng).unwrap();
    for disjoint in [0.0, 0.4] {
        let config = LinkSplitConfig {
            disjoint,
            ..LinkSplitConfig::default()
        };
        let split = random_links(&graph, config, rng).unwrap();
        let pairs = graph.num_edges() / 2;
        let sizes = [&split.val, &split.test].map(|p| p.positive.len());
        assert_eq!(sizes, [pairs / 10, pairs / 5]);
        let edges = |g: &Graph| g.edges().collect::<BTreeSet<_>>();
        let all = edges(&graph);
        for part in [&split.train, &split.val, &split.test] {
            assert_eq!(part.negative.len(), part.positive.len());
            assert!(part.negative.iter().all(|p| !all.contains(p)));
            assert!(part.message_graph.is_undirected());
        }
        for part in [&split.val, &split.test] {
            let messages = edges(&part.message_graph);
            assert!(part
                .positive
                .iter()
                .all(|p| all.contains(p) && !messages.contains(p)));
        }
        let messages = edges(&split.train.message_graph);
        let used = split
            .train
            .positive
            .iter()
            .filter(|p| messages.contains(p))
            .count();
        assert_eq!(used == 0, disjoint > 0.0);
    }
    let directed = messy(1, 8, 20);
    assert_says(
        random_links(&directed, LinkSplitConfig::default(), rng),
        &["both directions"],
    );
    let bad = LinkSplitConfig {
        val: 0.9,
        test: 0.2,
        ..LinkSplitConfig::default()
    };
    assert!(random_links(&graph, bad, rng).is_err());
}

#[test]
fn bad_samples_are_refused() {
    let rng = &mut RandomStream::new(1);
    let graph = ring(5).unwrap();
    assert!(NeighborSampler::new(&graph, &[]).is_err());
    let mut sampler = NeighborSampler::new(&graph, &[Some(1)]).unwrap();
    assert_says(sampler.sample(&[1, 1], rng), &["seed", "distinct"]);
    assert_says(sampler.sample(&[9], rng), &["node", "below 5"]);
    // After an error the sampler works.
    assert_eq!(sampler.sample(&[1, 2], rng).unwrap().seeds, 2);
    assert_eq!(
        sampler
            .clone()
            .with_replacement()
            .sample(&[1], rng)
            .unwrap()
            .blocks[0]
            .edge_ids
            .len(),
        1
    );
    assert!(partition(&graph, 6, rng).is_err());
    let full = complete(5).unwrap();
    assert_says(
        negative_sampling(&full, 1, Negatives::default(), rng),
        &["at most 0"],
    );
}

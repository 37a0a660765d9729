use crate::support::*;
use candle_core::{DType, Tensor};
use graph_learning::graph::Direction;
use graph_learning::sparse::Reduce;
use graph_learning::Graph;
use proptest::prelude::*;

fn dense(graph: &Graph) -> Vec<Vec<f64>> {
    graph.to_dense(None).unwrap().to_vec2().unwrap()
}

#[test]
fn rows_are_sorted_and_the_transpose_of_the_transpose_is_the_graph() {
    let graph = messy(1, 12, 40);
    let (incoming, outgoing) = (graph.incoming(), graph.outgoing());
    for (csr, ends) in [(incoming, graph.dst()), (outgoing, graph.src())] {
        for r in 0..csr.rows() {
            assert!(csr.neighbors(r).is_sorted());
            assert!(csr.row(r).all(|p| ends[csr.perm()[p] as usize] == r as u32));
        }
    }
    let swapped = Graph::from_edges(12, graph.dst().to_vec(), graph.src().to_vec()).unwrap();
    assert_eq!(swapped.incoming(), outgoing);
    assert_eq!(swapped.outgoing(), incoming);
    assert!(!graph.is_undirected() && graph.reverse_edges().is_none());
    let sorted = graph.select_edges(incoming.perm()).unwrap();
    assert!(sorted.incoming().in_order() && !graph.incoming().in_order());
}

#[test]
fn bad_edges_are_named() {
    let make = |src: &[u32], dst: &[u32]| Graph::from_edges(3, src.to_vec(), dst.to_vec());
    assert_says(make(&[0, 7], &[1, 1]), &["edge 1", "source 7", "below 3"]);
    assert_says(make(&[0, 1], &[1, 3]), &["edge 1", "target 3"]);
    assert_says(make(&[0], &[1, 2]), &["dst", "2 targets"]);
    let index =
        |data: &[i64], shape: (usize, usize)| Tensor::from_slice(data, shape, &CPU).unwrap();
    assert_says(Graph::from_edge_index(3, &index(&[0, -1], (2, 1))), &["-1"]);
    assert_says(
        Graph::from_edge_index(3, &index(&[0, 1, 2], (3, 1))),
        &["[2, edges]"],
    );
    let float = Tensor::zeros((2, 1), DType::F32, &CPU).unwrap();
    assert_says(Graph::from_edge_index(3, &float), &["F32"]);
    assert_says(
        make(&[0], &[1]).unwrap().induced_subgraph(&[0, 0]),
        &["nodes"],
    );
    assert_says(
        make(&[0], &[1]).unwrap().relabel(&[0, 1, 1]),
        &["permutation"],
    );
    let two_sides = Graph::bipartite(3, 2, vec![2], vec![1]).unwrap();
    assert_says(two_sides.to_undirected(), &["3 sources and 2 targets"]);
}

#[test]
fn graphs_without_edges_or_nodes_work() {
    for n in [0, 1, 5] {
        let graph = Graph::empty(n).unwrap();
        assert_eq!(graph.in_degrees(), vec![0; n]);
        assert_eq!(graph.connected_components().unwrap().count, n);
        assert!(graph.is_undirected());
        assert_eq!(graph.to_undirected().unwrap().0.num_edges(), 0);
        assert_eq!(graph.add_self_loops(None, 1.0).unwrap().0.num_edges(), n);
    }
    let batch = Graph::batch(&[]).unwrap();
    assert!(batch.is_empty());
}

#[test]
fn both_directions_merge_duplicates() {
    // 0 -> 1 twice, 1 -> 0 once, a loop, and 2 -> 0.
    let graph = Graph::from_edges(3, vec![0, 0, 1, 2, 2], vec![1, 1, 0, 2, 0]).unwrap();
    let (both, map) = graph.to_undirected().unwrap();
    let edges: Vec<_> = both.edges().collect();
    assert_eq!(edges, [(1, 0), (2, 0), (0, 1), (0, 2), (2, 2)]);
    assert!(both.is_undirected());
    let reverse = both.reverse_edges().unwrap();
    for (e, r) in reverse.iter().enumerate() {
        assert_eq!(
            (both.src()[e], both.dst()[e]),
            (both.dst()[*r as usize], both.src()[*r as usize])
        );
    }
    let w = Tensor::new(&[1f64, 2.0, 3.0, 8.0, 16.0], &CPU).unwrap();
    let merged = |reduce| values(&map.merge(&w, reduce).unwrap());
    assert_eq!(merged(Reduce::Sum), [6.0, 16.0, 6.0, 16.0, 16.0]);
    assert_eq!(merged(Reduce::Mean), [2.0, 16.0, 2.0, 16.0, 8.0]);
    assert_eq!(merged(Reduce::Max), [3.0, 16.0, 3.0, 16.0, 8.0]);
    assert_eq!(merged(Reduce::Min), [1.0, 16.0, 1.0, 16.0, 8.0]);
    // An edge that is there goes before the reverse of another.
    assert_eq!(values(&map.first(&w).unwrap()), [3.0, 16.0, 1.0, 16.0, 8.0]);
    assert!(map.merge(&w.narrow(0, 0, 4).unwrap(), Reduce::Sum).is_err());
    let (single, map) = graph.coalesce().unwrap();
    assert_eq!(single.num_edges(), 4);
    let w2 = Tensor::cat(&[w.unsqueeze(1).unwrap(), w.unsqueeze(1).unwrap()], 1).unwrap();
    assert_eq!(map.merge(&w2, Reduce::Sum).unwrap().dims(), &[4, 2]);
}

#[test]
fn self_loops_are_kept_added_or_replaced() {
    let graph = Graph::from_edges(3, vec![0, 1, 1, 2], vec![1, 1, 1, 0]).unwrap();
    let w = Tensor::new(&[1f64, 5.0, 6.0, 2.0], &CPU).unwrap();
    let (looped, weights) = graph.add_remaining_self_loops(Some(&w), 9.0).unwrap();
    let edges: Vec<_> = looped.edges().collect();
    assert_eq!(edges, [(0, 1), (2, 0), (0, 0), (1, 1), (2, 2)]);
    assert_eq!(values(&weights.unwrap()), [1.0, 2.0, 9.0, 6.0, 9.0]);
    assert_eq!(graph.add_self_loops(None, 1.0).unwrap().0.num_edges(), 7);
    let (proper, ids) = graph.remove_self_loops().unwrap();
    assert_eq!(
        (ids.as_slice(), proper.has_self_loops()),
        (&[0, 3][..], false)
    );
    assert!(graph
        .add_self_loops(Some(&w.narrow(0, 0, 2).unwrap()), 1.0)
        .is_err());
}

#[test]
fn subgraphs_neighborhoods_and_components() {
    // 0 -> 1 -> 2 -> 3, and 4 alone with a loop.
    let graph = Graph::from_edges(5, vec![0, 1, 2, 4], vec![1, 2, 3, 4]).unwrap();
    let hop = |k, direction| graph.k_hop(&[2], k, direction).unwrap().nodes;
    assert_eq!(hop(0, Direction::Incoming), [2]);
    assert_eq!(hop(1, Direction::Incoming), [1, 2]);
    assert_eq!(hop(2, Direction::Incoming), [0, 1, 2]);
    assert_eq!(hop(1, Direction::Outgoing), [2, 3]);
    assert_eq!(hop(1, Direction::Both), [1, 2, 3]);
    let around = graph.k_hop(&[2], 1, Direction::Incoming).unwrap();
    assert_eq!((around.seeds, around.edge_ids), (vec![1], vec![1]));
    assert!(graph.k_hop(&[5], 1, Direction::Both).is_err());
    let parts = graph.connected_components().unwrap();
    assert_eq!((parts.count, parts.of_node), (2, vec![0, 0, 0, 0, 1]));
    let (part, ids) = graph.induced_subgraph(&[3, 2]).unwrap();
    assert_eq!(part.edges().collect::<Vec<_>>(), [(1, 0)]);
    assert_eq!(ids, [2]);
}

#[test]
fn batches_keep_graphs_without_nodes() {
    let pair = Graph::from_edges(2, vec![0], vec![1]).unwrap();
    let batch = Graph::batch(&[pair.clone(), Graph::empty(0).unwrap(), pair]).unwrap();
    assert_eq!(batch.ptr(), [0, 2, 2, 4]);
    assert_eq!(batch.graph().edges().collect::<Vec<_>>(), [(0, 1), (2, 3)]);
    assert_eq!(batch.graph_id(), [0, 0, 2, 2]);
    let x = Tensor::new(&[[1f64], [2.0], [-4.0], [-8.0]], &CPU).unwrap();
    use graph_learning::readout::*;
    assert_eq!(values(&global_add(&batch, &x).unwrap()), [3.0, 0.0, -12.0]);
    assert_eq!(values(&global_mean(&batch, &x).unwrap()), [1.5, 0.0, -6.0]);
    assert_eq!(values(&global_max(&batch, &x).unwrap()), [2.0, 0.0, -4.0]);
    let gate = Tensor::zeros(4, DType::F64, &CPU).unwrap();
    let mean = values(&global_attention(&batch, &gate, &x).unwrap());
    assert!(mean
        .iter()
        .zip([1.5, 0.0, -6.0])
        .all(|(a, b)| (a - b).abs() < 1e-12));
    let crossing = Graph::from_edges(2, vec![0], vec![1]).unwrap();
    assert!(graph_learning::GraphBatch::new(crossing, vec![0, 1], 2).is_err());
}

proptest! {
    #![proptest_config(cases(24))]

    #[test]
    fn relabeling_permutes_the_matrix(seed in 0u64..1000, n in 2usize..12, edges in 0usize..40) {
        let graph = messy(seed, n, edges);
        let order = graph_learning::RandomStream::new(seed).permutation(n).unwrap();
        let renamed = dense(&graph.relabel(&order).unwrap());
        let before = dense(&graph);
        for t in 0..n {
            for s in 0..n {
                prop_assert_eq!(renamed[order[t] as usize][order[s] as usize], before[t][s]);
            }
        }
    }

    #[test]
    fn induced_subgraphs_are_submatrices(seed in 0u64..1000, n in 2usize..12, edges in 0usize..40) {
        let graph = messy(seed, n, edges);
        let mut nodes = graph_learning::RandomStream::new(seed).permutation(n).unwrap();
        nodes.truncate(n / 2 + 1);
        let (part, ids) = graph.induced_subgraph(&nodes).unwrap();
        prop_assert_eq!(part.num_edges(), ids.len());
        let (small, large) = (dense(&part), dense(&graph));
        for (i, t) in nodes.iter().enumerate() {
            for (j, s) in nodes.iter().enumerate() {
                prop_assert_eq!(small[i][j], large[*t as usize][*s as usize]);
            }
        }
    }

    #[test]
    fn undirected_graphs_are_symmetric(seed in 0u64..1000, n in 2usize..12, edges in 0usize..40) {
        let (both, _) = messy(seed, n, edges).to_undirected().unwrap();
        prop_assert!(both.is_undirected());
        let matrix = dense(&both);
        for (t, row) in matrix.iter().enumerate() {
            for (s, entry) in row.iter().enumerate() {
                prop_assert_eq!(*entry, matrix[s][t]);
                prop_assert!(*entry <= 1.0);
            }
        }
    }
}

#[test]
fn dense_matrices_become_graphs_and_come_back() {
    for (rows, cols) in [(4, 4), (2, 3), (0, 0)] {
        let dense = normal(1, &[rows, cols], DType::F64).relu().unwrap();
        let (graph, weights) = Graph::from_dense(&dense).unwrap();
        assert_eq!((graph.num_targets(), graph.num_sources()), (rows, cols));
        assert_eq!(graph.is_square(), rows == cols);
        let back = graph.to_dense(Some(&weights)).unwrap();
        assert_eq!(values(&back), values(&dense));
    }
    assert_says(
        Graph::from_dense(&normal(1, &[4], DType::F64)),
        &["[4]", "[targets, sources]"],
    );
    let bad = Tensor::new(&[[1f32, f32::NAN], [0.0, 1.0]], &CPU).unwrap();
    assert_says(Graph::from_dense(&bad), &["adjacency", "1 of 4"]);
}

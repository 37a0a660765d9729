use crate::support::*;
use candle_core::{DType, Tensor, Var};
use graph_learning::generate::uniform_edges;
use graph_learning::sparse::*;
use graph_learning::Graph;
use graph_learning::RandomStream;
use proptest::prelude::*;

#[test]
fn reference() {
    let report = FILES.verify("graph-core", graph_learning::verify::graph_core);
    assert_passed(&report, |_| false);
    assert!(report.uncovered.is_empty());
    assert_eq!(report.comparisons.len(), 66);
}

/// More features than nodes, three edges, one head, a perceptron of three layers: numbers of an independent computation in PyTorch.
#[test]
fn another_reference() {
    let report = FILES.verify("other/graph-core", graph_learning::verify::graph_core);
    assert_passed(&report, |_| false);
    assert!(report.uncovered.is_empty());
}

fn weights(seed: u64, shape: &[usize]) -> Var {
    var(seed + 1, shape)
}

proptest! {
    #![proptest_config(cases(32))]

    #[test]
    fn products_are_dense_products(seed in 0u64..1000, n in 2usize..14, edges in 0usize..60, d in 1usize..90) {
        let graph = messy(seed, n, edges);
        let (x, w) = (normal(seed, &[n, d], DType::F64), weights(seed, &[edges]));
        let y = spmm(&graph, Some(&w), &x, Reduce::Sum).unwrap();
        let dense = graph.to_dense(Some(&values(&w))).unwrap().matmul(&x).unwrap();
        prop_assert!(distance(&y, &dense) < 1e-12);
        let mean = spmm(&graph, None, &x, Reduce::Mean).unwrap();
        let degree = Tensor::from_vec(graph.in_degrees().iter().map(|d| f64::from((*d).max(1))).collect::<Vec<_>>(), (n, 1), &CPU).unwrap();
        let dense = graph.to_dense(None).unwrap().matmul(&x).unwrap().broadcast_div(&degree).unwrap();
        prop_assert!(distance(&mean, &dense) < 1e-12);
        // Half precision is computed in f32.
        let half = spmm(&graph, None, &x.to_dtype(DType::BF16).unwrap(), Reduce::Sum).unwrap();
        prop_assert_eq!(half.dtype(), DType::BF16);
    }

    #[test]
    fn permuting_nodes_permutes_results(seed in 0u64..1000, n in 2usize..14, edges in 0usize..60) {
        let graph = messy(seed, n, edges);
        let order = RandomStream::new(seed).permutation(n).unwrap();
        let renamed = graph.relabel(&order).unwrap();
        let mut back = vec![0u32; n];
        order.iter().enumerate().for_each(|(i, o)| back[*o as usize] = i as u32);
        let order = Tensor::from_vec(order, n, &CPU).unwrap();
        let back = Tensor::from_vec(back, n, &CPU).unwrap();
        let x = normal(seed, &[n, 5], DType::F64);
        let moved = x.index_select(&back, 0).unwrap();
        for reduce in [Reduce::Sum, Reduce::Mean, Reduce::Max, Reduce::Min] {
            let y = spmm(&graph, None, &x, reduce).unwrap();
            let z = spmm(&renamed, None, &moved, reduce).unwrap();
            prop_assert!(distance(&z.index_select(&order, 0).unwrap(), &y) < 1e-13);
        }
    }

    #[test]
    fn gradients_are_those_of_central_differences(seed in 0u64..1000, n in 2usize..6, edges in 1usize..14) {
        let graph = messy(seed, n, edges);
        let (x, w) = (var(seed, &[n, 2, 3]), weights(seed, &[edges, 2]));
        let b = var(seed + 2, &[n, 2, 3]);
        let l = weights(seed + 3, &[edges, 2]);
        let check = |vars: &[&Var], f: &dyn Fn() -> Tensor| check_gradients(vars, || against(&f(), seed));
        for reduce in [Reduce::Sum, Reduce::Mean] {
            let f = || spmm(&graph, Some(&w), &x, reduce).unwrap();
            prop_assert!(check(&[&x, &w], &f) < 1e-6);
        }
        for reduce in [Reduce::Max, Reduce::Min, Reduce::Mean] {
            prop_assert!(check(&[&x], &|| spmm(&graph, None, &x, reduce).unwrap()) < 1e-6);
        }
        for op in [EdgeOp::Dot, EdgeOp::Add, EdgeOp::Mul, EdgeOp::Concat] {
            prop_assert!(check(&[&x, &b], &|| sddmm(&graph, &x, &b, op).unwrap()) < 1e-6);
        }
        prop_assert!(check(&[&l], &|| segment_softmax(&graph, &l).unwrap()) < 1e-6);
        for reduce in [Reduce::Sum, Reduce::Mean, Reduce::Max] {
            prop_assert!(check(&[&l], &|| edge_reduce(&graph, &l, reduce).unwrap()) < 1e-6);
        }
        let positive = Var::from_tensor(&(l.abs().unwrap() + 0.5).unwrap().narrow(1, 0, 1).unwrap().flatten_all().unwrap()).unwrap();
        for norm in [Norm::Sym, Norm::Row, Norm::None] {
            let f = || gcn_norm(&graph, Some(&positive), norm, true).unwrap().1;
            prop_assert!(check(&[&positive], &f) < 1e-6);
        }
    }

    #[test]
    fn softmax_sums_to_one_where_there_are_edges(seed in 0u64..1000, n in 2usize..10, edges in 0usize..40) {
        let graph = messy(seed, n, edges);
        // Far beyond the range of exp.
        let logits = (normal(seed, &[edges, 3], DType::F64) * 500.0).unwrap();
        let p = segment_softmax(&graph, &logits).unwrap();
        let sums = values(&edge_sum(&graph, &p, Side::Target).unwrap());
        for (t, d) in graph.in_degrees().into_iter().enumerate() {
            for s in &sums[3 * t..3 * t + 3] {
                prop_assert!((s - f64::from(u8::from(d > 0))).abs() < 1e-12);
            }
        }
    }

    #[test]
    fn sparse_features_are_the_dense_ones(seed in 0u64..1000, n in 1usize..8, d in 1usize..8) {
        let x = normal(seed, &[n, d], DType::F64).relu().unwrap();
        let sparse = SparseFeatures::from_dense(&x).unwrap();
        prop_assert_eq!(bits(&sparse.to_dense(&CPU).unwrap()), bits(&x));
        let w = var(seed, &[d, 4]);
        let y = sparse.matmul(&w).unwrap();
        prop_assert!(distance(&y, &x.matmul(&w).unwrap()) < 1e-12);
        prop_assert!(check_gradients(&[&w], || against(&sparse.matmul(&w).unwrap(), 3)) < 1e-6);
        let rows = sparse.normalize_rows(false).unwrap().to_dense(&CPU).unwrap().sum(1).unwrap();
        prop_assert!(values(&rows).iter().all(|s| *s == 0.0 || (s - 1.0).abs() < 1e-12));
    }
}

const SWITCH: &str = "CANDLE_GRAD_DO_NOT_DETACH";

/// candle reads the switch once per thread, so the checks run in a child of their own.
#[test]
fn second_derivatives_are_exact() {
    if std::env::var(SWITCH).is_ok() {
        return second_order();
    }
    let this = std::env::current_exe().unwrap();
    let output = std::process::Command::new(this)
        .args(["--exact", "sparse::second_derivatives_are_exact"])
        .env(SWITCH, "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}"
    );
}

fn second_order() {
    let graph = messy(3, 5, 11);
    let (x, w) = (var(1, &[5, 2, 3]), weights(1, &[11, 2]));
    let vars = [("x".to_string(), x.clone()), ("w".to_string(), w.clone())];
    let v = [
        normal(5, x.dims(), DType::F64),
        normal(6, w.dims(), DType::F64),
    ];
    let squares = |y: Tensor| y.sqr()?.sum_all();
    let functions: [&dyn Fn() -> candle_core::Result<Tensor>; 4] = [
        &|| squares(spmm(&graph, Some(&w), &x, Reduce::Mean)?),
        &|| {
            squares(spmm(
                &graph,
                Some(&segment_softmax(&graph, &w)?),
                &x,
                Reduce::Sum,
            )?)
        },
        &|| squares((sddmm(&graph, &x, &x, EdgeOp::Dot)? * w.as_tensor())?),
        &|| {
            squares(
                (edge_reduce(&graph, &w, Reduce::Sum)?
                    * spmm(&graph, None, &x, Reduce::Max)?.sum(2)?)?,
            )
        },
    ];
    for f in functions {
        let worst = tensor_core::autograd::check_second_order(f, &vars, &v, 1e-6).unwrap();
        assert!(worst.is_some(), "gradients keep no graph");
    }
}

/// Large enough for every kernel to run in parallel.
#[test]
fn threads_do_not_change_a_bit() {
    let mut rng = RandomStream::new(5);
    let graph = uniform_edges(3000, 40_000, &mut rng).unwrap();
    let run = || -> Vec<Vec<u64>> {
        let graph = Graph::from_edges(3000, graph.src().to_vec(), graph.dst().to_vec()).unwrap();
        let x = Var::from_tensor(&normal(1, &[3000, 2, 9], DType::F32)).unwrap();
        let w = Var::from_tensor(&normal(2, &[40_000, 2], DType::F32)).unwrap();
        let p = segment_softmax(&graph, &w).unwrap();
        let y = spmm(&graph, Some(&p), &x, Reduce::Sum).unwrap();
        let max = spmm(&graph, None, &x, Reduce::Max).unwrap();
        let dots = sddmm(&graph, &x, &y, EdgeOp::Dot).unwrap();
        let loss = ((y.sqr().unwrap().sum_all().unwrap() + max.sum_all().unwrap()).unwrap()
            + dots.tanh().unwrap().sum_all().unwrap())
        .unwrap();
        let grads = loss.backward().unwrap();
        let (gx, gw) = (grads.get(&x).unwrap(), grads.get(&w).unwrap());
        vec![
            bits(&p),
            bits(&y),
            bits(&max),
            bits(&dots),
            bits(gx),
            bits(gw),
        ]
    };
    assert_eq!(with_threads(1, run), with_threads(3, run));
}

#[test]
fn isolated_nodes_and_empty_graphs_give_zeros() {
    let graph = Graph::empty(3).unwrap();
    let x = Var::from_tensor(&normal(1, &[3, 4], DType::F32)).unwrap();
    for reduce in [Reduce::Sum, Reduce::Mean, Reduce::Max, Reduce::Min] {
        let y = spmm(&graph, None, &x, reduce).unwrap();
        assert_eq!(values(&y), vec![0.0; 12]);
        let grads = y.sum_all().unwrap().backward().unwrap();
        assert_eq!(values(grads.get(&x).unwrap()), vec![0.0; 12]);
    }
    let none = Tensor::zeros((0, 2), DType::F32, &CPU).unwrap();
    assert_eq!(segment_softmax(&graph, &none).unwrap().dims(), &[0, 2]);
    assert_eq!(sddmm(&graph, &x, &x, EdgeOp::Dot).unwrap().dims(), &[0]);
    let thin = Tensor::zeros((3, 0), DType::F32, &CPU).unwrap();
    let loops = graph.add_self_loops(None, 1.0).unwrap().0;
    assert_eq!(
        spmm(&loops, None, &thin, Reduce::Sum).unwrap().dims(),
        &[3, 0]
    );
    assert_eq!(
        spmm(&loops, None, &thin, Reduce::Max).unwrap().dims(),
        &[3, 0]
    );
}

#[test]
fn a_maximum_keeps_nan_and_the_first_of_equals() {
    let graph = Graph::from_edges(3, vec![2, 1, 0], vec![0, 0, 0]).unwrap();
    let x =
        Var::from_tensor(&Tensor::new(&[[1f64, 2.0], [1.0, f64::NAN], [1.0, 9.0]], &CPU).unwrap())
            .unwrap();
    let y = spmm(&graph, None, &x, Reduce::Max).unwrap();
    assert!(values(&y)[0] == 1.0 && values(&y)[1].is_nan());
    let grads = y.sum_all().unwrap().backward().unwrap();
    assert_eq!(
        values(grads.get(&x).unwrap()),
        [1.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    );
}

#[test]
fn what_does_not_fit_is_named() {
    let graph = messy(1, 6, 10);
    let x = normal(1, &[6, 2, 3], DType::F64);
    let w = |shape: &[usize]| normal(2, shape, DType::F64);
    let product = |w: &Tensor, x: &Tensor| spmm(&graph, Some(w), x, Reduce::Sum);
    assert_says(product(&w(&[9]), &x), &["edge weights", "[9]", "[10]"]);
    assert_says(product(&w(&[10, 3]), &x), &["edge weights", "[10, 3]"]);
    assert_says(product(&w(&[10]), &w(&[5, 3])), &["x", "[5, 3]"]);
    assert_says(
        product(&w(&[10]).to_dtype(DType::F32).unwrap(), &x),
        &["F32", "F64"],
    );
    assert_says(
        spmm(&graph, Some(&w(&[10])), &x, Reduce::Max),
        &["with edge weights"],
    );
    let integers = Tensor::zeros((6, 2), DType::U32, &CPU).unwrap();
    assert_says(spmm(&graph, None, &integers, Reduce::Sum), &["U32"]);
    assert_says(
        sddmm(&graph, &x, &w(&[6, 2, 4]), EdgeOp::Dot),
        &["b", "[6, 2, 4]"],
    );
    assert_says(segment_softmax(&graph, &w(&[9, 2])), &["logits"]);
    assert_says(edge_sum(&graph, &w(&[9, 2]), Side::Target), &["messages"]);
    assert_says(
        gcn_norm(&graph, Some(&w(&[3])), Norm::Sym, false),
        &["edge weights"],
    );
    let csr = |indptr: &[u32], indices: &[u32], v: Vec<f64>| {
        SparseFeatures::from_csr(2, indptr, indices, v, DType::F32)
    };
    assert_says(csr(&[0, 2, 1], &[0], vec![1.0]), &["indptr"]);
    assert_says(csr(&[0, 1], &[2], vec![1.0]), &["source 2"]);
    assert_says(csr(&[0, 1], &[1], vec![f64::NAN]), &["NaN"]);
    assert_says(csr(&[0, 1], &[1], vec![]), &["values"]);
}

#[test]
fn strided_inputs_are_read_right() {
    let graph = messy(2, 6, 15);
    let x = normal(1, &[4, 6], DType::F32).t().unwrap();
    let y = spmm(&graph, None, &x, Reduce::Sum).unwrap();
    let z = spmm(&graph, None, &x.contiguous().unwrap(), Reduce::Sum).unwrap();
    assert_eq!(bits(&y), bits(&z));
}

#[test]
fn weights_that_cancel_give_zero_and_no_nan() {
    let graph = Graph::from_edges(2, vec![0], vec![1]).unwrap();
    let w = Var::from_tensor(&Tensor::new(&[-1f64], &CPU).unwrap()).unwrap();
    let (_, normal) = gcn_norm(&graph, Some(&w), Norm::Sym, false).unwrap();
    assert!(values(&normal).iter().all(|w| w.is_finite()));
    let grads = normal.sum_all().unwrap().backward().unwrap();
    assert!(values(grads.get(&w).unwrap()).iter().all(|g| g.is_finite()));
}

/// All heads at once give what each head gives by itself, whatever its width.
#[test]
fn heads_do_not_mix() {
    let graph = messy(3, 20, 120);
    let (edges, heads) = (graph.num_edges(), 3);
    let weights = normal(1, &[edges, heads], DType::F64);
    let p = segment_softmax(&graph, &weights).unwrap();
    for d in [1, 2, 4, 5, 8, 16, 17] {
        let a = normal(2, &[20, heads, d], DType::F64);
        let b = normal(3, &[20, heads, d], DType::F64);
        let sums = spmm(&graph, Some(&weights), &a, Reduce::Sum).unwrap();
        let dots = sddmm(&graph, &a, &b, EdgeOp::Dot).unwrap();
        for h in 0..heads {
            let one = |t: &Tensor| {
                t.narrow(1, h, 1)
                    .unwrap()
                    .squeeze(1)
                    .unwrap()
                    .contiguous()
                    .unwrap()
            };
            let (w, a, b) = (one(&weights), one(&a), one(&b));
            let alone = spmm(&graph, Some(&w), &a, Reduce::Sum).unwrap();
            assert!(distance(&one(&sums), &alone) < 1e-14, "{d}");
            let gathered = gather(&graph, &a, Side::Source).unwrap();
            let product = (gathered * gather(&graph, &b, Side::Target).unwrap()).unwrap();
            assert!(
                distance(&one(&dots), &product.sum(1).unwrap()) < 1e-13,
                "{d}"
            );
            assert_eq!(
                values(&one(&p)),
                values(&segment_softmax(&graph, &w).unwrap())
            );
        }
    }
}

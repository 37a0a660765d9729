use crate::support::*;
use convex::block_cd::*;
use convex::RandomStream;
use proptest::prelude::*;

#[test]
fn reference() {
    let report = FILES.verify("bcd", convex::verify::bcd);
    assert_passed(&report, |_| false);
    assert!(report.comparisons.len() >= 120);
}

/// Cases are found by their prefix, in any number.
#[test]
fn every_case_of_a_file_is_checked() {
    let once = FILES.verify("bcd", convex::verify::bcd).comparisons;
    let report = verify_twice("bcd", convex::verify::bcd);
    assert_passed(&report, |_| false);
    assert_eq!(report.comparisons.len(), 2 * once.len());
}

fn stream() -> RandomStream {
    RandomStream::new(0)
}

fn least_squares(seed: u64, n: usize, p: usize) -> LeastSquares {
    let a = Columns::from_slice(n, p, &normals(seed, n * p)).unwrap();
    LeastSquares::new(a, &normals(seed + 1, n)).unwrap()
}

fn logistic(seed: u64, n: usize, p: usize) -> Logistic {
    let a = Columns::from_slice(n, p, &normals(seed, n * p)).unwrap();
    let labels: Vec<f64> = normals(seed + 1, n).iter().map(|x| x.signum()).collect();
    Logistic::new(a, &labels).unwrap()
}

fn softmax(seed: u64, n: usize, p: usize) -> Softmax {
    let a = Columns::from_slice(n, p, &normals(seed, n * p)).unwrap();
    let labels: Vec<usize> = uniforms(seed + 1, n)
        .iter()
        .map(|u| (u * 3.0) as usize)
        .collect();
    Softmax::new(a, &labels, 3).unwrap()
}

/// A lattice with a few labelled nodes, and the nodes of its unknowns.
fn lattice(seed: u64, rows: usize, columns: usize) -> LabelPropagation {
    let mut edges = vec![];
    let weights = uniforms(seed, 4 * rows * columns);
    for c in 0..columns {
        for r in 0..rows {
            let node = c * rows + r;
            let mut link = |other: usize, w: f64| {
                edges.push((node, other, w));
                edges.push((other, node, w));
            };
            if r + 1 < rows {
                link(node + 1, 0.1 + weights[2 * node]);
            }
            if c + 1 < columns {
                link(node + rows, 0.1 + weights[2 * node + 1]);
            }
        }
    }
    let known = |i: usize| (i % 7 == 3).then(|| if i.is_multiple_of(2) { 1.0 } else { -1.0 });
    let labels: Vec<Option<f64>> = (0..rows * columns).map(known).collect();
    LabelPropagation::new(&edges, &labels).unwrap()
}

fn run(objective: &mut impl SmoothObjective, config: BlockCdConfig) -> Report {
    let x0 = vec![0.0; objective.dim()];
    BlockCd::new(config)
        .unwrap()
        .solve(objective, &x0, &mut stream())
        .unwrap()
}

/// Gradient, Hessian and bound against differences, and the caches against a fresh start.
fn check_objective(objective: &mut impl SmoothObjective, seed: u64) {
    let p = objective.dim();
    let x = normals(seed, p);
    objective.reset(&x);
    let grad = objective.grad();
    let all: Vec<usize> = (0..p).collect();
    assert_close(&objective.grad_block(&all), &grad, 1e-10);
    let hess = objective.hess_block(&all);
    let bound = objective.bound_block(&all);
    let h = 1e-5;
    for i in 0..p {
        let slope =
            (objective.value_moved(&[i], &[h]) - objective.value_moved(&[i], &[-h])) / (2.0 * h);
        assert!((slope - grad[i]).abs() < 1e-5 * grad[i].abs().max(1.0));
        assert_close(
            &objective.bound_column(i),
            &(0..p).map(|j| bound[(i, j)]).collect::<Vec<_>>(),
            1e-12,
        );
        let mut moved = x.clone();
        moved[i] += h;
        objective.reset(&moved);
        let up = objective.grad();
        objective.reset(&x);
        for j in 0..p {
            let second = (up[j] - grad[j]) / h;
            assert!((second - hess[(i, j)]).abs() < 1e-3 * hess[(i, i)].abs().max(1.0));
        }
        assert!(hess[(i, i)] <= bound[(i, i)] + 1e-9);
    }
    // v' (H - hess) v >= 0.
    let v = normals(seed + 9, p);
    let form = |m: &faer::Mat<f64>| -> f64 {
        (0..p)
            .flat_map(|i| (0..p).map(move |j| (i, j)))
            .map(|(i, j)| v[i] * v[j] * m[(i, j)])
            .sum()
    };
    assert!(form(&hess) <= form(&bound) + 1e-8 * form(&bound).abs());
    let block = [0, p - 1];
    objective.update(&block, &[0.3, -0.7]);
    let kept = (objective.value(), objective.grad());
    let x = objective.point().to_vec();
    objective.reset(&x);
    assert!((objective.value() - kept.0).abs() < 1e-9);
    assert_close(&kept.1, &objective.grad(), 1e-9);
}

proptest! {
    #![proptest_config(cases(12))]

    #[test]
    fn objectives_know_their_derivatives(seed in 0u64..1000) {
        check_objective(&mut least_squares(seed, 7, 5), seed + 2);
        check_objective(&mut logistic(seed, 7, 5), seed + 2);
        check_objective(&mut softmax(seed, 7, 3), seed + 2);
        check_objective(&mut lattice(seed, 3, 4), seed + 2);
    }

    #[test]
    fn no_update_increases_the_objective(seed in 0u64..1000, tau in 1usize..5) {
        let updates = [
            Update::Gradient,
            Update::AdaptiveLipschitz,
            Update::MatrixBound,
            Update::Newton { line_search: true },
            Update::ProxGradient,
            Update::ProxNewton,
        ];
        let rules = [Select::Random, Select::Perm, Select::Gs, Select::Gsd(DiagBound::RowSum), Select::Gsq(GsqSolver::Iht { iters: 10 }), Select::LipschitzSampling];
        for update in updates {
            for select in &rules {
                let config = BlockCdConfig { select: select.clone(), update, block_size: tau, max_iter: 15, tol: 0.0, ..Default::default() };
                for history in [
                    run(&mut least_squares(seed, 8, 6), config.clone()).f_history,
                    run(&mut logistic(seed, 8, 6), config.clone()).f_history,
                    run(&mut softmax(seed, 8, 2), config.clone()).f_history,
                ] {
                    prop_assert!(history.windows(2).all(|w| w[1] <= w[0] + 1e-9), "{update:?} {select:?}");
                }
            }
        }
    }

    /// The rules order as the paper says.
    #[test]
    fn better_rules_promise_more(seed in 0u64..1000) {
        let mut objective = least_squares(seed, 12, 9);
        objective.reset(&normals(seed + 3, 9));
        let blocks = fixed_blocks(&objective, &FixedRule::Sort, 3).unwrap();
        let score = |select| block_scores(&objective, &blocks, &select, ScoreNorm::L2).unwrap();
        let (gsq, gsl) = (score(Select::Gsq(GsqSolver::Exact)), score(Select::Gsl));
        prop_assert!(gsq.iter().zip(&gsl).all(|(q, l)| *q >= l - 1e-9));
    }

    /// Message passing is the dense solution.
    #[test]
    fn trees_are_solved_exactly(seed in 0u64..1000, n in 1usize..12) {
        let parents = uniforms(seed, n);
        let weights = uniforms(seed + 1, n);
        let mut entries = vec![];
        for i in 0..n {
            entries.push((i, i, 3.0 + n as f64));
            // A random tree, or a forest where nothing links.
            if i > 0 && weights[i] > 0.1 {
                let parent = (parents[i] * i as f64) as usize;
                entries.extend([(i, parent, -weights[i]), (parent, i, -weights[i])]);
            }
        }
        let a = Columns::from_triplets(n, n, &entries).unwrap();
        let mut objective = LabelPropagation::quadratic(a, &normals(seed + 2, n)).unwrap();
        let all: Vec<usize> = (0..n).collect();
        let graph = objective.graph().unwrap().clone();
        let step = solve_forest(&graph, &all, &objective.grad()).unwrap();
        objective.update(&all, &step);
        prop_assert!(objective.grad().iter().all(|g| g.abs() < 1e-9));
    }

    #[test]
    fn greedy_forests_are_acyclic_and_maximal(seed in 0u64..1000) {
        let objective = lattice(seed, 5, 6);
        let graph = objective.graph().unwrap();
        let order: Vec<usize> = RandomStream::new(seed).permutation(graph.len()).unwrap().iter().map(|&i| i as usize).collect();
        let block = greedy_forest(graph, &order);
        let zeros = vec![0.0; block.len()];
        prop_assert!(solve_forest(graph, &block, &zeros).is_ok());
        for extra in (0..graph.len()).filter(|i| !block.contains(i)) {
            let mut more = block.clone();
            more.push(extra);
            prop_assert!(solve_forest(graph, &more, &vec![0.0; more.len()]).is_err());
        }
        let color = color_graph(graph, &order);
        let forest = forest_partition(graph, &order);
        for i in 0..graph.len() {
            prop_assert!(graph.neighbors(i).iter().all(|(j, _)| color[i] != color[*j]));
        }
        for f in 0..=*forest.iter().max().unwrap() {
            let block: Vec<usize> = (0..graph.len()).filter(|&i| forest[i] == f).collect();
            prop_assert!(solve_forest(graph, &block, &vec![0.0; block.len()]).is_ok());
        }
    }

    #[test]
    fn partitions_are_permutations(seed in 0u64..1000, size in 1usize..20) {
        let objective = least_squares(seed, 5, 13);
        for rule in [FixedRule::Order, FixedRule::Sort, FixedRule::Avg, FixedRule::HSort, FixedRule::HAvg] {
            let blocks = fixed_blocks(&objective, &rule, size).unwrap();
            let mut all: Vec<usize> = blocks.concat();
            all.sort_unstable();
            prop_assert_eq!(all, (0..13).collect::<Vec<_>>());
            prop_assert!(blocks.iter().all(|b| b.len() <= size));
        }
    }

    /// Every penalty's run ends at a point where no proximal step moves, inside the constraints.
    #[test]
    fn penalties_end_at_a_minimum(seed in 0u64..1000) {
        for penalty in [Penalty::L1(0.5), Penalty::NonNegative { l1: 0.3 }, Penalty::Box { lo: -0.1, hi: 0.2 }] {
            for update in [Update::ProxGradient, Update::ProxNewton] {
                let config = BlockCdConfig { penalty, update, select: Select::ProxGsq, block_size: 3, max_iter: 50_000, tol: 1e-9, ..Default::default() };
                let mut objective = least_squares(seed, 12, 8);
                let report = run(&mut objective, config.clone());
                prop_assert!(report.converged && penalty.value(&report.x).is_finite(), "{penalty:?} {update:?} {} {}", report.residual, report.blocks.len());
                if !matches!(penalty, Penalty::Box { .. }) {
                    prop_assert!(report.gap.unwrap().abs() < 1e-7);
                }
                let report = run(&mut logistic(seed, 12, 5), config);
                prop_assert!(report.converged, "{penalty:?} {update:?} {}", report.residual);
            }
        }
    }
}

#[test]
fn one_block_of_everything_is_the_exact_solution() {
    let mut objective = least_squares(3, 12, 6);
    let config = BlockCdConfig {
        block_size: 100,
        max_iter: 1,
        ..Default::default()
    };
    let report = run(&mut objective, config);
    assert!(report.converged && report.residual < 1e-10);
}

#[test]
fn sparse_and_dense_agree_bit_for_bit_in_their_choices() {
    let values: Vec<f64> = normals(1, 60)
        .iter()
        .map(|x| if *x > 0.3 { *x } else { 0.0 })
        .collect();
    let entries: Vec<(usize, usize, f64)> = (0..60)
        .map(|p| (p / 6, p % 6, values[p]))
        .filter(|e| e.2 != 0.0)
        .collect();
    let b = normals(2, 10);
    let mut dense = LeastSquares::new(Columns::from_slice(10, 6, &values).unwrap(), &b).unwrap();
    let mut sparse =
        LeastSquares::new(Columns::from_triplets(10, 6, &entries).unwrap(), &b).unwrap();
    let config = BlockCdConfig {
        block_size: 2,
        max_iter: 30,
        ..Default::default()
    };
    let (one, other) = (run(&mut dense, config.clone()), run(&mut sparse, config));
    assert_eq!(one.blocks, other.blocks);
    assert_close(&one.x, &other.x, 1e-10);
}

#[test]
fn every_graph_rule_reaches_the_minimum() {
    let (rows, columns) = (5, 6);
    let nodes = lattice(4, rows, columns).nodes().to_vec();
    let layout = Layout::Lattice {
        rows,
        columns,
        nodes,
    };
    let rules = [
        (TreeRule::GreedyGs, Update::ExactTree),
        (TreeRule::GreedyGsd, Update::ExactTree),
        (TreeRule::GreedyGsl, Update::ExactTree),
        (TreeRule::RandomTree, Update::ExactTree),
        (TreeRule::TreePartition(layout.clone()), Update::ExactTree),
        (TreeRule::TreePartition(Layout::General), Update::ExactTree),
        (TreeRule::RedBlack(layout), Update::ExactTree),
        (TreeRule::RedBlack(Layout::General), Update::ExactTree),
        (TreeRule::Dense { size: None }, Update::MatrixBound),
        (TreeRule::Dense { size: Some(9) }, Update::MatrixBound),
    ];
    for (rule, update) in rules {
        let config = BlockCdConfig {
            select: Select::Tree(rule.clone()),
            update,
            max_iter: 5000,
            tol: 1e-8,
            ..Default::default()
        };
        let report = run(&mut lattice(4, rows, columns), config);
        assert!(report.converged, "{rule:?} {}", report.residual);
    }
}

/// With blocks that hold the support, Newton-type steps end in a few steps after it is found.
#[test]
fn the_support_is_found_and_newton_is_fast_then() {
    let config = BlockCdConfig {
        penalty: Penalty::NonNegative { l1: 2.0 },
        select: Select::ProxGsq,
        update: Update::TwoMetric,
        block_size: 20,
        max_iter: 60,
        tol: 1e-9,
        ..Default::default()
    };
    let report = run(&mut least_squares(5, 30, 20), config);
    assert!(report.converged && report.active_set_iter < report.blocks.len());
    assert!(report.blocks.len() - report.active_set_iter <= 3);
}

#[test]
fn zero_columns_ties_and_odd_sizes() {
    let mut values = normals(6, 8 * 5);
    (0..8).for_each(|i| values[i * 5 + 2] = 0.0);
    let a = Columns::from_slice(8, 5, &values).unwrap();
    let mut objective = LeastSquares::new(a, &normals(7, 8)).unwrap();
    for select in [
        Select::Gs,
        Select::Gsd(DiagBound::Li),
        Select::Gsd(DiagBound::RowSum),
        Select::Perm,
        Select::LipschitzSampling,
    ] {
        let config = BlockCdConfig {
            select,
            block_size: 2,
            max_iter: 2000,
            ..Default::default()
        };
        let report = run(&mut objective, config);
        assert!(report.converged && report.x[2] == 0.0);
    }
    for fixed in [
        Select::Gsl,
        Select::Gsq(GsqSolver::Exact),
        Select::Cyclic,
        Select::Random,
        Select::LipschitzSampling,
    ] {
        let config = BlockCdConfig {
            select: fixed,
            partition: Partition::Fixed(FixedRule::Sort),
            block_size: 2,
            max_iter: 2000,
            ..Default::default()
        };
        assert!(run(&mut objective, config).converged);
    }
    // At 0 with a zero target everything ties and nothing moves.
    let a = Columns::from_slice(3, 3, &[1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]).unwrap();
    let report = run(
        &mut LeastSquares::new(a, &[0.0; 3]).unwrap(),
        BlockCdConfig::default(),
    );
    assert!(report.converged && report.blocks.is_empty());
}

#[test]
fn the_same_seed_gives_the_same_run_on_any_number_of_threads() {
    let once = |threads| {
        with_threads(threads, || {
            let config = BlockCdConfig {
                select: Select::Random,
                block_size: 3,
                max_iter: 20,
                ..Default::default()
            };
            let random = run(&mut least_squares(8, 40, 300), config.clone());
            let greedy = run(
                &mut least_squares(8, 40, 300),
                BlockCdConfig {
                    select: Select::Gs,
                    ..config
                },
            );
            let bits = |r: Report| {
                (
                    r.x.iter().map(|x| x.to_bits()).collect::<Vec<_>>(),
                    r.blocks,
                )
            };
            (bits(random), bits(greedy))
        })
    };
    assert!(once(1) == once(2));
}

#[test]
fn bad_input_is_named() {
    let named = |error: convex::Error, word: &str| {
        let text = error.to_string();
        assert!(text.contains(word), "{text}");
    };
    let a = || Columns::from_slice(2, 2, &[1.0, 0.0, 0.0, 1.0]).unwrap();
    named(Columns::from_slice(0, 2, &[]).unwrap_err(), "rows");
    named(
        Columns::from_slice(1, 2, &[1.0, f64::NAN]).unwrap_err(),
        "NaN",
    );
    named(LeastSquares::new(a(), &[1.0]).unwrap_err(), "b has shape");
    named(Logistic::new(a(), &[1.0, 0.0]).unwrap_err(), "label = 0");
    named(Softmax::new(a(), &[0, 3], 3).unwrap_err(), "label = 3");
    named(
        LabelPropagation::new(&[(0, 1, -1.0)], &[None, None]).unwrap_err(),
        "weight",
    );
    let skew = Columns::from_slice(2, 2, &[1.0, 1.0, 0.0, 1.0]).unwrap();
    named(
        LabelPropagation::quadratic(skew, &[0.0; 2]).unwrap_err(),
        "semi-definite",
    );
    let config = |change: fn(&mut BlockCdConfig)| {
        let mut config = BlockCdConfig::default();
        change(&mut config);
        BlockCd::new(config).map(|_| ()).unwrap_err()
    };
    named(config(|c| c.block_size = 0), "block_size");
    named(config(|c| c.select = Select::Gsl), "GSL");
    named(
        config(|c| c.select = Select::Gsq(GsqSolver::Exact)),
        "NP-hard",
    );
    named(config(|c| c.penalty = Penalty::L1(1.0)), "penalty");
    named(config(|c| c.penalty = Penalty::L1(-1.0)), "L1");
    named(
        config(|c| c.penalty = Penalty::Box { lo: 1.0, hi: 0.0 }),
        "lo <= hi",
    );
    named(config(|c| c.update = Update::TwoMetric), "non-negativity");
    let penalized = |select| {
        BlockCd::new(BlockCdConfig {
            penalty: Penalty::NonNegative { l1: 0.0 },
            update: Update::ProxGradient,
            select,
            ..Default::default()
        })
    };
    let by_gradient = [
        Select::Gs,
        Select::Gsd(DiagBound::Li),
        Select::Gsq(GsqSolver::Iht { iters: 5 }),
        Select::Tree(TreeRule::GreedyGsd),
        Select::Tree(TreeRule::Dense { size: None }),
    ];
    for select in by_gradient {
        named(penalized(select).unwrap_err(), "ProxGsq");
    }
    for select in [
        Select::Random,
        Select::Cyclic,
        Select::LipschitzSampling,
        Select::ProxGsq,
    ] {
        assert!(penalized(select).is_ok());
    }
    named(
        config(|c| {
            c.partition = Partition::Fixed(FixedRule::Order);
            c.select = Select::Tree(TreeRule::Dense { size: Some(2) });
        }),
        "fixed blocks",
    );
    let solve = |config: BlockCdConfig, x0: &[f64]| {
        let mut objective = LeastSquares::new(a(), &[1.0, 2.0]).unwrap();
        BlockCd::new(config)
            .unwrap()
            .solve(&mut objective, x0, &mut stream())
            .unwrap_err()
    };
    named(solve(BlockCdConfig::default(), &[0.0]), "x0");
    let tree = BlockCdConfig {
        select: Select::Tree(TreeRule::GreedyGs),
        ..Default::default()
    };
    named(solve(tree, &[0.0; 2]), "graph");
    let given = BlockCdConfig {
        partition: Partition::Fixed(FixedRule::Given(vec![vec![0, 0]])),
        ..Default::default()
    };
    named(solve(given, &[0.0; 2]), "coordinate 0 2 times");
    let bounded = BlockCdConfig {
        penalty: Penalty::NonNegative { l1: 0.0 },
        select: Select::ProxGsq,
        update: Update::ProxGradient,
        ..Default::default()
    };
    named(solve(bounded, &[-1.0, 0.0]), "feasible");
    let flat = Columns::from_slice(2, 2, &[1.0, 0.0, 0.0, 0.0]).unwrap();
    named(
        LabelPropagation::quadratic(flat.clone(), &[1.0, 2.0]).unwrap_err(),
        "coordinate 1 it is the line -2 x",
    );
    assert!(LabelPropagation::quadratic(flat, &[1.0, 0.0]).is_ok());
    // Blocks of more coordinates than there are hold all of them.
    let wide = BlockCdConfig {
        block_size: 50,
        ..Default::default()
    };
    let mut objective = LeastSquares::new(a(), &[1.0, 2.0]).unwrap();
    let report = BlockCd::new(wide)
        .unwrap()
        .solve(&mut objective, &[0.0; 2], &mut stream())
        .unwrap();
    assert_close(&report.x, &[1.0, 2.0], 1e-12);
    // A saddle is no convex problem.
    let saddle = Columns::from_slice(2, 2, &[0.0, 2.0, 2.0, 0.0]).unwrap();
    let mut objective = LabelPropagation::quadratic(saddle, &[1.0, 1.0]).unwrap();
    let error = BlockCd::new(BlockCdConfig::default()).unwrap().solve(
        &mut objective,
        &[0.0; 2],
        &mut stream(),
    );
    named(error.unwrap_err(), "semi-definite");
}

#[test]
fn a_duality_gap_ends_a_run() {
    let config = BlockCdConfig {
        penalty: Penalty::L1(0.5),
        select: Select::ProxGsq,
        update: Update::ProxNewton,
        block_size: 3,
        tol: 0.0,
        gap_tol: Some(1e-2),
        ..Default::default()
    };
    let early = run(&mut least_squares(3, 20, 12), config.clone());
    assert!(early.converged && early.gap.unwrap() <= 1e-2);
    let late = run(
        &mut least_squares(3, 20, 12),
        BlockCdConfig {
            gap_tol: Some(1e-9),
            ..config.clone()
        },
    );
    assert!(late.converged && late.blocks.len() > early.blocks.len());
    let bad = BlockCdConfig {
        gap_tol: Some(-1.0),
        ..config
    };
    assert!(BlockCd::new(bad).is_err());
}

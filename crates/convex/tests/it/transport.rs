use crate::support::*;
use candle_core::{DType, Module, Tensor, Var};
use convex::transport::*;
use convex::{Error, RandomStream};
use proptest::prelude::*;

#[test]
fn reference() {
    let report = FILES.verify("sparse-ot", convex::verify::sparse_ot);
    assert_passed(&report, |_| false);
    assert!(report.comparisons.len() >= 50);
    assert!(report.uncovered.is_empty(), "{:?}", report.uncovered);
}

/// Cases are found by their prefix, in any number.
#[test]
fn every_case_of_a_file_is_checked() {
    let once = FILES
        .verify("sparse-ot", convex::verify::sparse_ot)
        .comparisons;
    let report = verify_twice("sparse-ot", convex::verify::sparse_ot);
    assert_passed(&report, |_| false);
    assert_eq!(report.comparisons.len(), 2 * once.len());
}

/// Weights that sum to `mass` and costs in [0, 1).
fn random(seed: u64, m: usize, n: usize) -> OtProblem {
    let weights = |seed, n| {
        let mut w: Vec<f64> = uniforms(seed, n).iter().map(|u| u + 0.1).collect();
        let sum: f64 = w.iter().sum();
        w.iter_mut().for_each(|w| *w *= 2.0 / sum);
        w
    };
    let cost = uniforms(seed + 2000, m * n);
    OtProblem::from_slices(&weights(seed, m), &weights(seed + 1000, n), &cost).unwrap()
}

const REGS: [OtReg; 3] = [
    OtReg::Entropic { gamma: 0.1 },
    OtReg::Quadratic { gamma: 0.5 },
    OtReg::KSparse { gamma: 0.5, k: 3 },
];

/// The projection by trying every support.
fn brute_force(v: &[f64], k: usize, z: f64) -> Vec<f64> {
    let mut best = (f64::INFINITY, vec![]);
    for support in 1u32..1 << v.len() {
        let inside: Vec<usize> = (0..v.len()).filter(|i| support >> i & 1 == 1).collect();
        if inside.len() > k {
            continue;
        }
        let shift = (inside.iter().map(|&i| v[i]).sum::<f64>() - z) / inside.len() as f64;
        let mut y = vec![0.0; v.len()];
        inside.iter().for_each(|&i| y[i] = v[i] - shift);
        if y.iter().all(|y| *y >= 0.0) {
            let distance = v.iter().zip(&y).map(|(a, b)| (a - b).powi(2)).sum();
            if distance < best.0 {
                best = (distance, y);
            }
        }
    }
    best.1
}

proptest! {
    #![proptest_config(cases(40))]

    #[test]
    fn projections_are_the_nearest_points(seed in 0u64..5000, m in 1usize..9, k in 1usize..10, z in 0.1f64..3.0) {
        let v = normals(seed, m);
        let y = project_sparse_simplex(&v, k, z).unwrap();
        prop_assert!((y.iter().sum::<f64>() - z).abs() < 1e-12);
        assert_close(&y, &brute_force(&v, k, z), 1e-12);
        assert_close(&project_sparse_simplex(&y, k, z).unwrap(), &y, 1e-12);
        if k >= m {
            assert_close(&project_simplex(&v, z).unwrap(), &y, 0.0);
        }
    }

    /// Central differences, away from ties.
    #[test]
    fn gradients_are_derivatives(seed in 0u64..5000, which in 0usize..3) {
        let problem = random(seed, 9, 6);
        let small = |seed, n| normals(seed, n).iter().map(|x| 0.2 * x).collect::<Vec<_>>();
        let (alpha, beta) = (small(seed + 1, 9), small(seed + 2, 6));
        let reg = REGS[which];
        let h = 1e-6;
        let moved = |x: &[f64], i: usize, by: f64| {
            let mut x = x.to_vec();
            x[i] += by;
            x
        };
        let at = semi_dual(&problem, &reg, &alpha).unwrap();
        for i in 0..9 {
            let value = |by| semi_dual(&problem, &reg, &moved(&alpha, i, by)).unwrap().value;
            prop_assert!(((value(h) - value(-h)) / (2.0 * h) - at.grad[i]).abs() < 1e-6);
        }
        let at = dual(&problem, &reg, &alpha, &beta).unwrap();
        for i in 0..9 {
            let value = |by| dual(&problem, &reg, &moved(&alpha, i, by), &beta).unwrap().value;
            let scale = at.grad_alpha[i].abs().max(1.0);
            prop_assert!(((value(h) - value(-h)) / (2.0 * h) - at.grad_alpha[i]).abs() < 1e-5 * scale);
        }
        for j in 0..6 {
            let value = |by| dual(&problem, &reg, &alpha, &moved(&beta, j, by)).unwrap().value;
            let scale = at.grad_beta[j].abs().max(1.0);
            prop_assert!(((value(h) - value(-h)) / (2.0 * h) - at.grad_beta[j]).abs() < 1e-5 * scale);
        }
    }

    /// Dual <= semi-dual, the semi-dual's columns are exact and sparse, and its own potentials make
    /// the dual meet it.
    #[test]
    fn weak_duality(seed in 0u64..5000, which in 0usize..3) {
        let problem = random(seed, 8, 7);
        let (alpha, beta) = (normals(seed + 1, 8), normals(seed + 2, 7));
        let reg = REGS[which];
        let semi = semi_dual(&problem, &reg, &alpha).unwrap();
        let at = dual(&problem, &reg, &alpha, &beta).unwrap();
        prop_assert!(at.value <= semi.value + 1e-9);
        assert_close(&semi.plan.column_sums(), problem.b(), 1e-12);
        let tight = dual(&problem, &reg, &alpha, &semi.beta).unwrap();
        prop_assert!((tight.value - semi.value).abs() < 1e-9);
        if let OtReg::KSparse { k, .. } = reg {
            prop_assert!(semi.plan.nnz_per_column().iter().all(|&nnz| nnz <= k));
            prop_assert!(at.plan.nnz_per_column().iter().all(|&nnz| nnz <= k));
        }
    }

    /// The plan is feasible and its cost meets a feasible dual: that is optimality.
    #[test]
    fn the_network_simplex_is_exact(seed in 0u64..5000, m in 1usize..20, n in 1usize..20) {
        let problem = random(seed, m, n);
        let found = solve(&problem, &OtReg::None, Formulation::Dual, &OtSolver::NetworkSimplex).unwrap();
        prop_assert!(found.marginal_error < 1e-12);
        prop_assert!(found.gap.abs() < 1e-10);
        prop_assert!(found.plan.nnz() < m + n);
        for j in 0..n {
            for (i, c) in problem.column(j).iter().enumerate() {
                prop_assert!(found.alpha[i] + found.beta[j] <= c + 1e-10);
            }
        }
    }
}

/// The auction agrees with the network simplex, on costs with ties too.
#[test]
fn the_auction_assigns_as_the_network_simplex() {
    let at = |problem: &OtProblem, solver| {
        solve(problem, &OtReg::None, Formulation::Dual, &solver).unwrap()
    };
    for (seed, n) in [(1, 1), (2, 2), (3, 17), (4, 60), (5, 60)] {
        let mut cost = uniforms(seed, n * n);
        if seed == 5 {
            cost.iter_mut().for_each(|c| *c = (*c * 4.0).floor());
        }
        let problem = OtProblem::uniform(&tensor(&cost, (n, n))).unwrap();
        let (exact, found) = (
            at(&problem, OtSolver::NetworkSimplex),
            at(&problem, OtSolver::AuctionExact),
        );
        assert!((exact.value - found.primal_cost).abs() < 1e-11, "{n}");
        assert!(found.marginal_error < 1e-12 && found.gap.abs() < 1e-11);
        assert!(found.nnz_per_column.iter().all(|&nnz| nnz == 1));
    }
    let zeros = OtProblem::uniform(&tensor(&[0.0; 9], (3, 3))).unwrap();
    assert_eq!(at(&zeros, OtSolver::AuctionExact).primal_cost, 0.0);
    let refused = |problem: &OtProblem, reg: OtReg| {
        let found = solve(problem, &reg, Formulation::Dual, &OtSolver::AuctionExact);
        assert!(matches!(found, Err(Error::Unsupported { .. })));
    };
    refused(&zeros, REGS[0]);
    refused(&random(1, 4, 4), OtReg::None);
    refused(
        &OtProblem::uniform(&tensor(&[0.0; 6], (2, 3))).unwrap(),
        OtReg::None,
    );
    let inf = f64::INFINITY;
    let half = [0.5, 0.5];
    let forbidden = OtProblem::from_slices(&half, &half, &[0.0, inf, 0.0, 0.0]).unwrap();
    refused(&forbidden, OtReg::None);
}

fn optimum(problem: &OtProblem, reg: OtReg) -> OtSolution {
    solve(problem, &reg, Formulation::SemiDual, &OtSolver::lbfgs()).unwrap()
}

#[test]
fn both_formulations_and_sinkhorn_agree() {
    let problem = random(1, 12, 9);
    for gamma in [0.05, 0.5] {
        let reg = OtReg::Entropic { gamma };
        let semi = optimum(&problem, reg);
        let dual = solve(&problem, &reg, Formulation::Dual, &OtSolver::lbfgs()).unwrap();
        assert!((semi.value - dual.value).abs() < 1e-8);
        for log_domain in [true, false] {
            let solver = OtSolver::Sinkhorn {
                log_domain,
                tol: 1e-13,
                max_iter: 100_000,
            };
            let scaled = solve(&problem, &reg, Formulation::Dual, &solver).unwrap();
            assert!(scaled.converged && scaled.gap.abs() < 1e-9);
            assert_close(&scaled.plan.to_dense(), &semi.plan.to_dense(), 1e-8);
            assert_close(&scaled.alpha, &semi.alpha, 1e-6);
        }
    }
    let quadratic = OtReg::Quadratic { gamma: 0.5 };
    let semi = optimum(&problem, quadratic);
    let dual = solve(&problem, &quadratic, Formulation::Dual, &OtSolver::lbfgs()).unwrap();
    assert!(semi.converged && semi.gap.abs() < 1e-8);
    assert_close(&semi.plan.to_dense(), &dual.plan.to_dense(), 1e-7);
}

#[test]
fn k_of_all_rows_is_quadratic_and_one_is_unregularized() {
    let problem = random(2, 10, 8);
    let quadratic = optimum(&problem, OtReg::Quadratic { gamma: 0.3 });
    for k in [10, 11, usize::MAX] {
        let same = optimum(&problem, OtReg::KSparse { gamma: 0.3, k });
        assert_eq!(same.plan, quadratic.plan);
    }
    let one = semi_dual(
        &problem,
        &OtReg::KSparse { gamma: 0.3, k: 1 },
        &normals(3, 10),
    )
    .unwrap();
    let none = semi_dual(&problem, &OtReg::None, &normals(3, 10)).unwrap();
    assert_eq!(one.plan, none.plan);
    let constant: f64 = problem.b().iter().map(|b| 0.15 * b * b).sum();
    assert!((one.value - none.value - constant).abs() < 1e-12);
}

#[test]
fn shifted_costs_and_permuted_rows() {
    let (m, n) = (8, 6);
    let problem = random(4, m, n);
    let dense = |f: &dyn Fn(usize, usize) -> f64| -> Vec<f64> {
        (0..m * n).map(|p| f(p / n, p % n)).collect()
    };
    let cost = dense(&|i, j| problem.column(j)[i]);
    let shifted: Vec<f64> = cost.iter().map(|c| c + 0.7).collect();
    let shifted = OtProblem::from_slices(problem.a(), problem.b(), &shifted).unwrap();
    let order = [3, 1, 7, 0, 5, 2, 4, 6];
    let permuted = dense(&|i, j| problem.column(j)[order[i]]);
    let a: Vec<f64> = order.iter().map(|&i| problem.a()[i]).collect();
    let permuted = OtProblem::from_slices(&a, problem.b(), &permuted).unwrap();
    for reg in [
        OtReg::Entropic { gamma: 0.1 },
        OtReg::Quadratic { gamma: 0.5 },
    ] {
        let at = optimum(&problem, reg);
        let up = optimum(&shifted, reg);
        assert!((up.value - at.value - 0.7 * problem.mass()).abs() < 1e-8);
        assert_close(&up.plan.to_dense(), &at.plan.to_dense(), 1e-6);
        let other = optimum(&permuted, reg).plan.to_dense();
        let plan = at.plan.to_dense();
        let expected = dense(&|i, j| plan[order[i] * n + j]);
        assert_close(&other, &expected, 1e-6);
    }
}

#[test]
fn nothing_without_mass_and_nothing_forbidden_is_used() {
    let inf = f64::INFINITY;
    let cost = [0.1, 0.2, 0.3, inf, 0.1, 0.4, 0.0, 0.0, 0.0, 0.5, 0.1, inf];
    let problem = OtProblem::from_slices(&[0.5, 0.3, 0.0, 0.2], &[0.6, 0.0, 0.4], &cost).unwrap();
    let mut runs: Vec<OtSolution> = REGS.iter().map(|reg| optimum(&problem, *reg)).collect();
    for reg in REGS {
        runs.push(solve(&problem, &reg, Formulation::Dual, &OtSolver::lbfgs()).unwrap());
    }
    for log_domain in [true, false] {
        let solver = OtSolver::Sinkhorn {
            log_domain,
            tol: 1e-12,
            max_iter: 10_000,
        };
        runs.push(solve(&problem, &REGS[0], Formulation::Dual, &solver).unwrap());
    }
    runs.push(
        solve(
            &problem,
            &OtReg::None,
            Formulation::Dual,
            &OtSolver::NetworkSimplex,
        )
        .unwrap(),
    );
    for found in &runs {
        let plan = found.plan.to_dense();
        assert!(found.marginal_error < 1e-6, "{found:?}");
        assert!(found.value.is_finite() && found.gap.abs() < 1e-6);
        assert_eq!([plan[3], plan[11]], [0.0; 2]);
        assert!((0..3).all(|j| plan[6 + j] == 0.0) && (0..4).all(|i| plan[3 * i + 1] == 0.0));
    }
    // Row 1 reaches only column 1 and 2, row 3 only 0 and 1: the rest must fit.
    let stuck = OtProblem::from_slices(&[0.0, 0.7, 0.0, 0.3], &[0.6, 0.0, 0.4], &cost).unwrap();
    let error = solve(
        &stuck,
        &OtReg::None,
        Formulation::Dual,
        &OtSolver::NetworkSimplex,
    );
    assert!(matches!(error, Err(Error::Infeasible { .. })));
}

#[test]
fn a_warm_start_is_shorter() {
    let problem = random(5, 30, 30);
    let reg = OtReg::Quadratic { gamma: 0.2 };
    let cold = optimum(&problem, reg);
    let start = Start {
        alpha: cold.alpha.clone(),
        beta: vec![],
    };
    let solver = OtSolver::lbfgs();
    let warm = solve_from(&problem, &reg, Formulation::SemiDual, &solver, &start).unwrap();
    assert!(
        warm.iterations * 2 < cold.iterations,
        "{} {}",
        warm.iterations,
        cold.iterations
    );
}

#[test]
fn a_plan_is_made_feasible_on_its_support() {
    let problem = random(6, 7, 7);
    let plan = optimum(&problem, OtReg::Quadratic { gamma: 0.5 }).plan;
    let rounded = restrict_to_support(&problem, &plan).unwrap();
    assert!(rounded.marginal_error(&problem).unwrap() < 1e-12);
    for j in 0..7 {
        let allowed: Vec<u32> = plan.column(j).iter().map(|e| e.0).collect();
        assert!(rounded.column(j).iter().all(|e| allowed.contains(&e.0)));
    }
    let one = semi_dual(&problem, &OtReg::None, &[0.0; 7]).unwrap().plan;
    assert!(matches!(
        restrict_to_support(&problem, &one),
        Err(Error::Infeasible { .. })
    ));
}

#[test]
fn threads_do_not_change_a_bit() {
    let problem = random(7, 150, 200);
    let run = |threads| {
        with_threads(threads, || {
            let k = optimum(&problem, OtReg::KSparse { gamma: 5.0, k: 20 });
            let solver = OtSolver::sinkhorn();
            let reg = OtReg::Entropic { gamma: 0.1 };
            let s = solve(&problem, &reg, Formulation::Dual, &solver).unwrap();
            let bits = |x: &[f64]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            (bits(&k.alpha), bits(&s.alpha), k.plan, s.plan)
        })
    };
    assert!(run(1) == run(2));
}

#[test]
fn a_batch_is_its_problems() {
    let (a, b) = (
        tensor(&[0.5, 0.5, 0.2, 0.8], (2, 2)),
        tensor(&[0.3, 0.7, 0.6, 0.4], (2, 2)),
    );
    let cost = tensor(&uniforms(1, 8), (2, 2, 2));
    let reg = REGS[1];
    let all = solve_batch(
        &a,
        &b,
        &cost,
        &reg,
        Formulation::SemiDual,
        &OtSolver::lbfgs(),
    )
    .unwrap();
    for (i, found) in all.iter().enumerate() {
        let row = |t: &Tensor| t.get(i).unwrap();
        let alone = optimum(
            &OtProblem::new(&row(&a), &row(&b), &row(&cost)).unwrap(),
            reg,
        );
        assert_eq!(alone.plan, found.plan);
    }
    let wrong = cost.narrow(0, 0, 1).unwrap();
    assert!(solve_batch(&a, &b, &wrong, &reg, Formulation::Dual, &OtSolver::lbfgs()).is_err());
}

#[test]
fn bad_input_is_named() {
    let named = |result: convex::Result<OtProblem>, word: &str| {
        let error = result.unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    };
    let half = [0.5, 0.5];
    named(
        OtProblem::from_slices(&[], &half, &[]),
        "at least one weight",
    );
    named(OtProblem::from_slices(&half, &half, &[1.0; 3]), "cost");
    named(OtProblem::from_slices(&half, &[0.5, 0.6], &[1.0; 4]), "1.1");
    named(
        OtProblem::from_slices(&[-0.5, 1.5], &half, &[1.0; 4]),
        "-0.5",
    );
    named(
        OtProblem::from_slices(&[0.0, 0.0], &[0.0, 0.0], &[1.0; 4]),
        "mass",
    );
    named(
        OtProblem::from_slices(&half, &half, &[1.0, f64::NAN, 0.0, 0.0]),
        "NaN",
    );
    let inf = f64::INFINITY;
    named(
        OtProblem::from_slices(&half, &half, &[inf, inf, 0.0, 0.0]),
        "row 0",
    );
    let problem = random(1, 4, 4);
    let fails = |reg, formulation, solver, word: &str| {
        let error = solve(&problem, &reg, formulation, &solver)
            .unwrap_err()
            .to_string();
        assert!(error.contains(word), "{error}");
    };
    let (dual, semi, lbfgs) = (Formulation::Dual, Formulation::SemiDual, OtSolver::lbfgs());
    fails(OtReg::KSparse { gamma: 1.0, k: 0 }, semi, lbfgs, "k = 0");
    fails(OtReg::Entropic { gamma: 0.0 }, semi, lbfgs, "gamma");
    fails(OtReg::None, dual, lbfgs, "dual");
    fails(REGS[1], dual, OtSolver::sinkhorn(), "Sinkhorn");
    fails(REGS[1], dual, OtSolver::NetworkSimplex, "simplex");
    assert!(semi_dual(&problem, &REGS[0], &[0.0; 3]).is_err());
    assert!(semi_dual(&problem, &REGS[0], &[f64::NAN; 4]).is_err());
    assert!(project_sparse_simplex(&[1.0], 0, 1.0).is_err());
    // Ties go to the lowest index, and more than there is is all.
    assert_eq!(
        project_sparse_simplex(&[1.0; 3], 2, 1.0).unwrap(),
        [0.5, 0.5, 0.0]
    );
    let all = project_sparse_simplex(&[1.0; 3], 9, 1.0).unwrap();
    assert_close(&all, &[1.0 / 3.0; 3], 1e-15);
    assert!(project_simplex(&[], 1.0).is_err());
    assert!(project_simplex(&[1.0, 2.0], 0.0).is_err());
    // A tiny gamma underflows without logarithms, and says so.
    let solver = OtSolver::Sinkhorn {
        log_domain: false,
        tol: 1e-9,
        max_iter: 100,
    };
    fails(OtReg::Entropic { gamma: 1e-6 }, dual, solver, "logarithmic");
}

#[test]
fn tiny_gammas_reach_the_exact_plan() {
    let problem = random(8, 6, 6);
    let exact = solve(
        &problem,
        &OtReg::None,
        Formulation::Dual,
        &OtSolver::NetworkSimplex,
    )
    .unwrap();
    let at = semi_dual(&problem, &OtReg::Quadratic { gamma: 1e-300 }, &exact.alpha).unwrap();
    assert!((at.value - exact.value).abs() < 1e-9);
    assert_close(&at.plan.column_sums(), problem.b(), 1e-12);
}

#[test]
fn the_losses_gradient_is_the_derivative() {
    let (m, n) = (5, 4);
    let problem = random(9, m, n);
    let cost: Vec<f64> = (0..m * n).map(|p| problem.column(p % n)[p / n]).collect();
    let (a, b) = (tensor(problem.a(), m), tensor(problem.b(), n));
    for reg in [
        OtReg::Entropic { gamma: 0.2 },
        OtReg::Quadratic { gamma: 0.5 },
    ] {
        let loss = OtLoss::new(reg, Formulation::SemiDual, OtSolver::lbfgs()).unwrap();
        let vars = [&a, &b, &tensor(&cost, (m, n))].map(|t| Var::from_tensor(t).unwrap());
        let value = (loss.forward(&vars[0], &vars[1], &vars[2]).unwrap() * 3.0).unwrap();
        let grads = value.backward().unwrap();
        let at = |moved: &[f64; 3]| {
            let mut c = cost.clone();
            c[0] += moved[0];
            let (mut a, mut b) = (problem.a().to_vec(), problem.b().to_vec());
            // Mass moves from one entry to another.
            a[0] += moved[1];
            a[1] -= moved[1];
            b[0] += moved[2];
            b[1] -= moved[2];
            let t = loss.forward(&tensor(&a, m), &tensor(&b, n), &tensor(&c, (m, n)));
            values(&t.unwrap())[0]
        };
        let h = 1e-5;
        let slope = |i: usize| {
            let (mut up, mut down) = ([0.0; 3], [0.0; 3]);
            (up[i], down[i]) = (h, -h);
            3.0 * (at(&up) - at(&down)) / (2.0 * h)
        };
        let g = |v: &Var| values(grads.get(v).unwrap());
        let (da, db, dc) = (g(&vars[0]), g(&vars[1]), g(&vars[2]));
        assert_close(
            &[dc[0], da[0] - da[1], db[0] - db[1]],
            &[slope(0), slope(1), slope(2)],
            1e-4,
        );
    }
    // Single precision works, an unsolved problem is refused.
    let f32 = |t: &Tensor| t.to_dtype(DType::F32).unwrap();
    let loss = OtLoss::new(REGS[1], Formulation::SemiDual, OtSolver::lbfgs()).unwrap();
    let cost = tensor(&cost, (m, n));
    let value = loss.forward(&f32(&a), &f32(&b), &f32(&cost)).unwrap();
    assert_eq!(value.dtype(), DType::F32);
    let unsolved = OtLoss::new(REGS[1], Formulation::SemiDual, OtSolver::adam(1)).unwrap();
    assert!(matches!(
        unsolved.forward(&a, &b, &cost),
        Err(Error::NotConverged { .. })
    ));
    let accepted = unsolved.with_max_marginal_error(f64::INFINITY).unwrap();
    assert!(accepted.forward(&a, &b, &cost).is_ok());
}

#[test]
fn the_router_keeps_its_capacity() {
    let logits = tensor(&normals(10, 64 * 4), (64, 4));
    for (capacity, most) in [
        (Capacity::Factor(1.0), 16),
        (Capacity::Tokens(5), 5),
        (Capacity::Factor(1.25), 20),
    ] {
        for cost in [GateCost::NegGate, GateCost::NegLogGate] {
            let config = SparseOtRouterConfig {
                experts: 4,
                capacity,
                cost,
                ..Default::default()
            };
            let routing = SparseOtRouter::new(config).unwrap().route(&logits).unwrap();
            assert!(routing.load.iter().all(|&l| l <= most && l > 0));
            let weights = values(&routing.weights);
            let gates = values(&routing.gates);
            let used = weights.iter().zip(&gates).filter(|(w, g)| w == g).count();
            assert_eq!(used, routing.load.iter().sum::<usize>());
            let empty = weights
                .chunks(4)
                .filter(|row| row.iter().all(|w| *w == 0.0))
                .count();
            assert_eq!(empty, routing.dropped);
        }
    }
    let router = SparseOtRouter::new(SparseOtRouterConfig::default()).unwrap();
    assert!(router
        .route(&logits)
        .unwrap_err()
        .to_string()
        .contains("[tokens, 8]"));
    assert!(router.route(&tensor(&[], (0, 8))).is_err());
    assert!(router.route(&tensor(&[f64::NAN; 8], (1, 8))).is_err());
    assert_eq!(
        router
            .route(&tensor(&normals(1, 8), (1, 8)))
            .unwrap()
            .dropped,
        0
    );
    let bad = SparseOtRouterConfig {
        capacity: Capacity::Tokens(0),
        ..Default::default()
    };
    assert!(SparseOtRouter::new(bad).is_err());
    let same = |seed| {
        let mut stream = RandomStream::new(seed);
        let logits = tensor(&normals(1, 80), (10, 8));
        values(&router.route_noisy(&logits, &mut stream).unwrap().weights)
    };
    assert_eq!(same(1), same(1));
    assert_ne!(same(1), same(2));
}

/// With identity experts the layer multiplies each token by the sum of its gates.
#[test]
fn the_layer_weighs_its_experts() {
    struct Double;
    impl Module for Double {
        fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
            x * 2.0
        }
    }
    let gate = Var::from_tensor(&tensor(&normals(11, 4 * 3), (4, 3))).unwrap();
    let config = SparseOtRouterConfig {
        experts: 4,
        ..Default::default()
    };
    let experts = vec![Double, Double, Double, Double];
    let layer = SparseMoe::new(gate.as_tensor().clone(), experts, config.clone()).unwrap();
    let x = tensor(&normals(12, 2 * 8 * 3), (2, 8, 3));
    let (y, routing) = layer.forward_t(&x, None).unwrap();
    assert_eq!(y.dims(), &[2, 8, 3]);
    let sums = routing.weights.sum_keepdim(1).unwrap();
    let flat = x.reshape((16, 3)).unwrap();
    let expected = (flat.broadcast_mul(&sums).unwrap() * 2.0).unwrap();
    assert_close(&values(&y), &values(&expected), 1e-12);
    let grads = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
    assert!(values(grads.get(&gate).unwrap()).iter().any(|g| *g != 0.0));
    assert!(layer.forward(&tensor(&[1.0; 4], (2, 2))).is_err());
    assert!(SparseMoe::new(gate.as_tensor().clone(), vec![Double], config).is_err());
}

/// The `k` largest by sorting (ties: lowest index first), their threshold by trying every prefix.
fn by_sorting(v: &[f64], k: usize, z: f64) -> Vec<f64> {
    let mut order: Vec<usize> = (0..v.len()).collect();
    order.sort_by(|&i, &j| v[j].total_cmp(&v[i]).then(i.cmp(&j)));
    order.truncate(k);
    let (mut sum, mut threshold) = (0.0, f64::NEG_INFINITY);
    for (r, &i) in order.iter().enumerate() {
        sum += v[i];
        threshold = f64::max(threshold, (sum - z) / (r + 1) as f64);
    }
    let mut y = vec![0.0; v.len()];
    order
        .iter()
        .for_each(|&i| y[i] = (v[i] - threshold).max(0.0));
    y
}

proptest! {
    #![proptest_config(cases(64))]

    /// Columns of many runs, with ties, spread wide or narrow, far from zero or not.
    #[test]
    fn long_projections_agree_with_sorting(
        seed in 0u64..5000,
        m in 1usize..700,
        k in 1usize..80,
        z in 0.01f64..30.0,
        step in prop::sample::select(vec![0.0, 0.125, 2.0]),
        offset in prop::sample::select(vec![0.0, 4096.0]),
    ) {
        let mut v = normals(seed, m);
        for v in &mut v {
            if step > 0.0 {
                *v = (*v / step).round() * step;
            }
            *v += offset;
        }
        let y = project_sparse_simplex(&v, k, z).unwrap();
        assert_close(&y, &by_sorting(&v, k, z), 1e-10);
        assert!(y.iter().filter(|y| **y > 0.0).count() <= k);
        let problem = OtProblem::from_slices(&vec![1.0; m], &[m as f64], &vec![0.0; m]).unwrap();
        let gamma = z / m as f64;
        let column = semi_dual(&problem, &OtReg::KSparse { gamma, k }, &v).unwrap().plan;
        let wanted = by_sorting(&v, k, z).iter().map(|y| y * m as f64 / z).collect::<Vec<_>>();
        assert_close(&column.to_dense(), &wanted, 1e-8 * m as f64 / z);
    }
}

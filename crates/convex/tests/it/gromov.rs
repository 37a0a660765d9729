use crate::support::*;
use candle_core::{Tensor, Var};
use convex::transport::*;
use convex::Error;
use proptest::prelude::*;

/// A symmetric matrix of entries in (0, 1) with a diagonal of zeros.
fn structure(seed: u64, n: usize) -> Vec<f64> {
    let u = uniforms(seed, n * n);
    let entry = |i: usize, k: usize| match i == k {
        true => 0.0,
        false => 0.05 + 0.9 * u[i.min(k) * n + i.max(k)],
    };
    (0..n * n).map(|e| entry(e / n, e % n)).collect()
}

fn permuted(c: &[f64], order: &[usize]) -> Vec<f64> {
    let n = order.len();
    (0..n * n)
        .map(|e| c[order[e / n] * n + order[e % n]])
        .collect()
}

fn weights(seed: u64, n: usize) -> Vec<f64> {
    let w: Vec<f64> = uniforms(seed, n).iter().map(|u| u + 0.2).collect();
    let sum: f64 = w.iter().sum();
    w.iter().map(|w| w / sum).collect()
}

fn problem(seed: u64, m: usize, n: usize, loss: GroundLoss) -> GwProblem {
    GwProblem::new(
        &tensor(&structure(seed, m), (m, m)),
        &tensor(&structure(seed + 1, n), (n, n)),
        &tensor(&weights(seed + 2, m), m),
        &tensor(&weights(seed + 3, n), n),
        loss,
    )
    .unwrap()
}

/// `sum loss(C1_ik, C2_jl) T_ij T_kl` by its definition.
fn by_definition(c1: &[f64], c2: &[f64], plan: &[f64], loss: GroundLoss) -> f64 {
    let m = (c1.len() as f64).sqrt() as usize;
    let n = (c2.len() as f64).sqrt() as usize;
    let of = |a: f64, b: f64| match loss {
        GroundLoss::Square => (a - b).powi(2),
        GroundLoss::HalfSquare => 0.5 * (a - b).powi(2),
        GroundLoss::Kl => a * (a + 1e-15).ln() - a + b - a * (b + 1e-15).ln(),
    };
    let mut sum = 0.0;
    for i in 0..m {
        for j in 0..n {
            for k in 0..m {
                for l in 0..n {
                    sum += of(c1[i * m + k], c2[j * n + l]) * plan[i * n + j] * plan[k * n + l];
                }
            }
        }
    }
    sum
}

const LOSSES: [GroundLoss; 3] = [GroundLoss::Square, GroundLoss::HalfSquare, GroundLoss::Kl];

proptest! {
    #![proptest_config(cases(24))]

    /// The plan is feasible, its value that of the definition, it never rises, and the linear model at
    /// its end cannot fall.
    #[test]
    fn plans_are_stationary(seed in 0u64..5000, m in 1usize..9, n in 1usize..9, which in 0usize..3) {
        let loss = LOSSES[which];
        let problem = problem(seed, m, n, loss);
        let found = gromov_wasserstein(&problem, &GwConfig::default(), None).unwrap();
        prop_assert!(found.converged && found.marginal_error < 1e-12);
        let plan = values(&found.plan);
        prop_assert!(plan.iter().all(|t| *t >= 0.0));
        let (c1, c2) = (structure(seed, m), structure(seed + 1, n));
        let value = by_definition(&c1, &c2, &plan, loss);
        prop_assert!((found.value - value).abs() < 1e-10 * value.abs().max(1.0));
        prop_assert!(found.history.windows(2).all(|w| w[1] <= w[0] + 1e-12));
        prop_assert!(found.gap < 1e-3, "{}", found.gap);
        let (again, tensor) = problem.objective(&found.plan).unwrap();
        prop_assert!((again - value).abs() < 1e-10 * value.abs().max(1.0));
        let dot: f64 = values(&tensor).iter().zip(&plan).map(|(a, b)| a * b).sum();
        prop_assert!((dot - value).abs() < 1e-10 * value.abs().max(1.0));
    }

    /// From the right plan a renamed structure stays at distance zero; names do not change the value.
    #[test]
    fn names_do_not_matter(seed in 0u64..5000, n in 2usize..10) {
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by_key(|&i| (uniforms(seed + 9, n)[i] * 1e9) as u64);
        let c = structure(seed, n);
        let same = tensor(&permuted(&c, &order), (n, n));
        let problem = GwProblem::uniform(&tensor(&c, (n, n)), &same, GroundLoss::Square).unwrap();
        let mut right = vec![0.0; n * n];
        for (j, &i) in order.iter().enumerate() {
            right[i * n + j] = 1.0 / n as f64;
        }
        let start = tensor(&right, (n, n));
        let found = gromov_wasserstein(&problem, &GwConfig::default(), Some(&start)).unwrap();
        prop_assert!(found.value.abs() < 1e-12);
        let other = structure(seed + 1, 6);
        let value = |c: &Tensor| {
            let problem = GwProblem::uniform(c, &tensor(&other, (6, 6)), GroundLoss::Square).unwrap();
            gromov_wasserstein(&problem, &GwConfig::default(), None).unwrap().value
        };
        prop_assert!((value(&tensor(&c, (n, n))) - value(&same)).abs() < 1e-9);
    }
}

/// The value of the other direction; under the square loss they agree.
#[test]
fn the_square_loss_is_symmetric_in_its_sets() {
    let (c1, c2) = (
        tensor(&structure(1, 6), (6, 6)),
        tensor(&structure(2, 8), (8, 8)),
    );
    let value = |a: &Tensor, b: &Tensor| {
        let problem = GwProblem::uniform(a, b, GroundLoss::Square).unwrap();
        gromov_wasserstein(&problem, &GwConfig::default(), None)
            .unwrap()
            .value
    };
    assert!((value(&c1, &c2) - value(&c2, &c1)).abs() < 1e-8);
}

/// Directed structures: the value is the definition's and the end stationary.
#[test]
fn structures_need_not_be_symmetric() {
    let (c1, c2) = (uniforms(5, 36), uniforms(6, 25));
    for loss in LOSSES {
        let problem = GwProblem::uniform(&tensor(&c1, (6, 6)), &tensor(&c2, (5, 5)), loss).unwrap();
        let found = gromov_wasserstein(&problem, &GwConfig::default(), None).unwrap();
        let value = by_definition(&c1, &c2, &values(&found.plan), loss);
        assert!((found.value - value).abs() < 1e-10);
        assert!(found.history.windows(2).all(|w| w[1] <= w[0] + 1e-12));
        assert!(found.gap < 1e-3, "{}", found.gap);
        let error = entropic_gromov_wasserstein(&problem, &EntropicGwConfig::default(), None);
        assert!(error.unwrap_err().to_string().contains("not symmetric"));
    }
}

/// All weight on the members is exact transport; none is the structure alone.
#[test]
fn the_fused_problem_has_both_ends() {
    let (m, n) = (7, 5);
    let (cost, plain) = (uniforms(4, m * n), problem(3, m, n, GroundLoss::Square));
    let members = tensor(&cost, (m, n));
    let solve_at = |weight| {
        let fused = plain.clone().fused(&members, weight).unwrap();
        gromov_wasserstein(&fused, &GwConfig::default(), None).unwrap()
    };
    let transport = OtProblem::from_slices(plain.p(), plain.q(), &cost).unwrap();
    let exact = solve(
        &transport,
        &OtReg::None,
        Formulation::Dual,
        &OtSolver::NetworkSimplex,
    )
    .unwrap();
    assert!((solve_at(0.0).value - exact.primal_cost).abs() < 1e-10);
    let alone = gromov_wasserstein(&plain, &GwConfig::default(), None).unwrap();
    assert!((solve_at(1.0).value - alone.value).abs() < 1e-10);
    let half = solve_at(0.5);
    let structure = plain.objective(&half.plan).unwrap().0;
    let moved: f64 = values(&half.plan)
        .iter()
        .zip(&cost)
        .map(|(t, c)| t * c)
        .sum();
    assert!((half.value - 0.5 * structure - 0.5 * moved).abs() < 1e-10);
    assert!(plain.clone().fused(&members, 1.5).is_err());
    assert!(plain.fused(&members.t().unwrap(), 0.5).is_err());
}

/// Differences of the objective at a fixed plan, and of the layer's value.
#[test]
fn gradients_are_derivatives() {
    let (m, n) = (5, 4);
    for loss in LOSSES {
        let (c1, c2) = (structure(11, m), structure(12, n));
        let (p, q) = (weights(13, m), weights(14, n));
        let at = |c1: &[f64], c2: &[f64], p: &[f64]| {
            GwProblem::new(
                &tensor(c1, (m, m)),
                &tensor(c2, (n, n)),
                &tensor(p, m),
                &tensor(&q, n),
                loss,
            )
            .unwrap()
        };
        let plain = at(&c1, &c2, &p);
        let found = gromov_wasserstein(&plain, &GwConfig::default(), None).unwrap();
        let gradients = plain.gradients(&found.plan).unwrap();
        let h = 1e-5;
        let moved = |x: &[f64], e: usize, by: f64| {
            let mut x = x.to_vec();
            x[e] += by;
            x
        };
        for e in [1, 7, 14] {
            let value = |by| {
                let problem = at(&moved(&c1, e, by), &c2, &p);
                problem.objective(&found.plan).unwrap().0
            };
            let slope = (value(h) - value(-h)) / (2.0 * h);
            assert!((slope - values(&gradients.c1)[e]).abs() < 1e-6);
        }
        for e in [1, 7, 11] {
            let value = |by| {
                let problem = at(&c1, &moved(&c2, e, by), &p);
                problem.objective(&found.plan).unwrap().0
            };
            let slope = (value(h) - value(-h)) / (2.0 * h);
            assert!((slope - values(&gradients.c2)[e]).abs() < 1e-6);
        }
        let layer = GwLoss::exact(loss, GwConfig::default()).unwrap();
        let vars = [
            tensor(&c1, (m, m)),
            tensor(&c2, (n, n)),
            tensor(&p, m),
            tensor(&q, n),
        ]
        .map(|t| Var::from_tensor(&t).unwrap());
        let value = layer
            .forward(&vars[0], &vars[1], &vars[2], &vars[3])
            .unwrap();
        let grads = (value * 2.0).unwrap().backward().unwrap();
        let g = |v: &Var| values(grads.get(v).unwrap());
        let double: Vec<f64> = values(&gradients.c1).iter().map(|x| 2.0 * x).collect();
        assert_close(&g(&vars[0]), &double, 1e-12);
        // Mass moves from one row to another, and the plan follows it.
        let value = |by: f64| {
            let p = moved(&moved(&p, 0, by), 1, -by);
            let problem = at(&c1, &c2, &p);
            let found = gromov_wasserstein(&problem, &GwConfig::default(), None).unwrap();
            2.0 * found.value
        };
        let slope = (value(h) - value(-h)) / (2.0 * h);
        let dp = g(&vars[2]);
        assert!((slope - (dp[0] - dp[1])).abs() < 1e-4 * slope.abs().max(1.0));
        let entropic = GwLoss::entropic(loss, EntropicGwConfig::default()).unwrap();
        assert!(entropic
            .forward(&vars[0], &vars[1], &vars[2], &vars[3])
            .is_err());
    }
}

/// A small entropy is near the exact value, a large one at the product of the weights.
#[test]
fn entropy_spreads_the_plan() {
    let problem = problem(21, 8, 6, GroundLoss::HalfSquare);
    let at = |epsilon| {
        let config = EntropicGwConfig {
            epsilon,
            ..EntropicGwConfig::default()
        };
        entropic_gromov_wasserstein(&problem, &config, None).unwrap()
    };
    let wide = at(100.0);
    let product: Vec<f64> = (0..48)
        .map(|e| problem.p()[e / 6] * problem.q()[e % 6])
        .collect();
    assert_close(&values(&wide.plan), &product, 1e-4);
    let sharp = at(2e-3);
    assert!(sharp.marginal_error < 1e-6, "{}", sharp.marginal_error);
    assert!(sharp.value < wide.value);
    let cold = EntropicGwConfig {
        epsilon: 2e-3,
        warm_start: false,
        ..EntropicGwConfig::default()
    };
    let cold = entropic_gromov_wasserstein(&problem, &cold, None).unwrap();
    assert_close(&values(&cold.plan), &values(&sharp.plan), 1e-6);
}

/// With enough iterations it is the entropic plan; a prior that forbids a pair keeps it empty.
#[test]
fn proximal_transport_scales_its_kernel() {
    let (m, n) = (6, 5);
    let (cost, p, q) = (uniforms(31, m * n), weights(32, m), weights(33, n));
    let config = ProximalConfig {
        beta: 0.1,
        max_iter: 5000,
        tol: 0.0,
    };
    let (c, pt, qt) = (tensor(&cost, (m, n)), tensor(&p, m), tensor(&q, n));
    let plan = proximal_transport(&c, &pt, &qt, None, &config).unwrap();
    let problem = OtProblem::from_slices(&p, &q, &cost).unwrap();
    let solver = OtSolver::Sinkhorn {
        log_domain: true,
        tol: 1e-13,
        max_iter: 100_000,
    };
    let reg = OtReg::Entropic { gamma: 0.1 };
    let other = solve(&problem, &reg, Formulation::Dual, &solver).unwrap();
    assert_close(&values(&plan), &other.plan.to_dense(), 1e-9);
    let mut prior = vec![1.0; m * n];
    prior[0] = 0.0;
    let prior = tensor(&prior, (m, n));
    let kept = proximal_transport(&c, &pt, &qt, Some(&prior), &config).unwrap();
    assert_eq!(values(&kept)[0], 0.0);
    let none = (&prior * 0.0).unwrap();
    let empty = proximal_transport(&c, &pt, &qt, Some(&none), &config);
    assert!(matches!(empty, Err(Error::Numerical { .. })));
    let negative = (&prior - 0.5).unwrap();
    assert!(proximal_transport(&c, &pt, &qt, Some(&negative), &config).is_err());
    assert!(proximal_transport(&c, &qt, &pt, None, &config).is_err());
}

#[test]
fn threads_do_not_change_a_bit() {
    let problem = problem(41, 90, 140, GroundLoss::Square);
    let run = |threads| {
        with_threads(threads, || {
            let config = GwConfig {
                max_iter: 5,
                ..GwConfig::default()
            };
            let found = gromov_wasserstein(&problem, &config, None).unwrap();
            let bits = values(&found.plan)
                .iter()
                .map(|x| x.to_bits())
                .collect::<Vec<_>>();
            (bits, found.value.to_bits())
        })
    };
    assert!(run(1) == run(2));
}

#[test]
fn bad_input_is_named() {
    let c = |n: usize| tensor(&structure(1, n), (n, n));
    let named = |result: convex::Result<GwProblem>, word: &str| {
        let error = result.unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    };
    let half = tensor(&[0.5, 0.5], 2);
    let square = GroundLoss::Square;
    named(
        GwProblem::new(&c(2), &c(2), &half, &tensor(&[0.5, 0.6], 2), square),
        "1.1",
    );
    named(GwProblem::new(&c(3), &c(2), &half, &half, square), "c1");
    named(
        GwProblem::new(&c(2), &c(2), &tensor(&[1.5, -0.5], 2), &half, square),
        "-0.5",
    );
    named(
        GwProblem::uniform(&tensor(&[f64::NAN; 4], (2, 2)), &c(2), square),
        "NaN",
    );
    named(
        GwProblem::uniform(&tensor(&[-1.0; 4], (2, 2)), &c(2), GroundLoss::Kl),
        "-1",
    );
    named(
        GwProblem::uniform(&tensor(&[], (0, 0)), &c(2), square),
        "weight",
    );
    let problem = GwProblem::uniform(&c(3), &c(2), square).unwrap();
    let wrong = tensor(&[0.5, 0.0, 0.0, 0.5, 0.0, 0.0], (3, 2));
    let config = GwConfig::default();
    let error = gromov_wasserstein(&problem, &config, Some(&wrong)).unwrap_err();
    assert!(error.to_string().contains("marginal"), "{error}");
    assert!(problem.objective(&c(2)).is_err());
    let none = GwConfig {
        max_iter: 0,
        ..config
    };
    assert!(gromov_wasserstein(&problem, &none, None).is_err());
    let epsilon = EntropicGwConfig {
        epsilon: 0.0,
        ..EntropicGwConfig::default()
    };
    let error = entropic_gromov_wasserstein(&problem, &epsilon, None).unwrap_err();
    assert!(error.to_string().contains("epsilon = 0"), "{error}");
    // A set of one member, and a member without mass.
    let one = GwProblem::uniform(&tensor(&[0.0], (1, 1)), &c(3), square).unwrap();
    let found = gromov_wasserstein(&one, &GwConfig::default(), None).unwrap();
    assert!(found.converged && found.gap < 1e-12);
    let empty = tensor(&[0.0, 1.0], 2);
    let light = GwProblem::new(&c(2), &c(2), &empty, &half, square).unwrap();
    let found = gromov_wasserstein(&light, &GwConfig::default(), None).unwrap();
    assert_eq!(values(&found.plan), [0.0, 0.0, 0.5, 0.5]);
    let spread = entropic_gromov_wasserstein(&light, &EntropicGwConfig::default(), None).unwrap();
    assert_close(&values(&spread.plan), &[0.0, 0.0, 0.5, 0.5], 1e-9);
}

use crate::support::*;
use candle_core::{DType, Module, Tensor};
use convex::relu::*;
use convex::{Error, RandomStream};
use proptest::prelude::*;

#[test]
fn reference() {
    let report = FILES.verify("convex-relu", convex::verify::convex_relu);
    assert_passed(&report, |_| false);
    assert!(report.comparisons.len() >= 30);
    assert!(report.uncovered.is_empty(), "{:?}", report.uncovered);
}

/// Cases are found by their prefix, in any number.
#[test]
fn every_case_of_a_file_is_checked() {
    let once = FILES
        .verify("convex-relu", convex::verify::convex_relu)
        .comparisons;
    let report = verify_twice("convex-relu", convex::verify::convex_relu);
    assert_passed(&report, |_| false);
    assert_eq!(report.comparisons.len(), 2 * once.len());
}

/// Normal rows with a column of ones.
pub fn data(seed: u64, n: usize, d: usize) -> (Tensor, Tensor) {
    let mut x = normals(seed, n * d);
    x.chunks_mut(d).for_each(|row| row[d - 1] = 1.0);
    let y: Vec<f64> = x.chunks(d).map(|row| (3.0 * row[0]).sin()).collect();
    (tensor(&x, (n, d)), tensor(&y, n))
}

pub fn labels(y: &Tensor) -> Tensor {
    let signs: Vec<f64> = values(y).iter().map(|y| y.signum()).collect();
    tensor(&signs, y.dims())
}

pub fn config() -> AdmmConfig {
    AdmmConfig {
        beta: 0.05,
        ..Default::default()
    }
}

pub fn exact(
    x: &Tensor,
    y: &Tensor,
    patterns: &Patterns,
    loss: ConvexLoss,
    eps: f64,
) -> ConvexReluModel {
    let config = AdversarialConfig {
        eps,
        beta: 0.05,
        loss,
        ..Default::default()
    };
    AdversarialRelu::new(config)
        .unwrap()
        .fit(x, y, patterns)
        .unwrap()
}

#[test]
fn enumeration_finds_every_cell() {
    for (n, d, cells) in [
        (20, 2, 40),
        (8, 3, 2 * (1 + 7 + 21)),
        (6, 4, 2 * (1 + 5 + 10 + 10)),
        (5, 1, 2),
    ] {
        let x = tensor(&normals(n as u64, n * d), (n, d));
        let all = Patterns::enumerate(&x).unwrap();
        assert_eq!(all.len(), cells);
        // Nothing that sampling finds is missing.
        let sampled = Patterns::sample(&x, 3000, &mut RandomStream::new(1)).unwrap();
        let both = all.len() + sampled.len();
        let columns = |p: &Patterns| -> Vec<Vec<bool>> {
            let bits = p.bits();
            (0..p.len())
                .map(|i| {
                    bits.iter()
                        .skip(i)
                        .step_by(p.len())
                        .map(|b| *b > 0.5)
                        .collect()
                })
                .collect()
        };
        let known = columns(&all);
        assert!(
            columns(&sampled).iter().all(|c| known.contains(c)),
            "{both}"
        );
    }
    // Equal, opposite and zero rows, more columns than rows, three lines through a point.
    let x = tensor(&[1.0, 1.0, 2.0, 2.0, -1.0, -1.0, 0.0, 0.0], (4, 2));
    assert_eq!(Patterns::enumerate(&x).unwrap().len(), 2);
    let x = tensor(&normals(1, 2 * 5), (2, 5));
    assert_eq!(Patterns::enumerate(&x).unwrap().len(), 4);
    let x = tensor(
        &[1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0],
        (4, 3),
    );
    assert_eq!(Patterns::enumerate(&x).unwrap().len(), 12);
    assert!(Patterns::enumerate(&tensor(&normals(1, 400 * 8), (400, 8))).is_err());
}

#[test]
fn every_primal_solver_gives_the_same_steps() {
    let (x, y) = data(1, 9, 3);
    let patterns = Patterns::sample(&x, 12, &mut RandomStream::new(2)).unwrap();
    let after = |primal: Primal, steps: usize| {
        let mut run = AdmmRelu::new(AdmmConfig { primal, ..config() })
            .unwrap()
            .start(&x, &y, &patterns)
            .unwrap();
        (0..steps).for_each(|_| run.step().unwrap());
        run.state()
    };
    let one = after(Primal::Woodbury, 20);
    for primal in [
        Primal::Cholesky,
        Primal::Cg {
            tol: 1e-13,
            max_iter: 500,
        },
    ] {
        let other = after(primal, 20);
        assert_close(&other.u, &one.u, 1e-8);
        assert_close(&other.nu, &one.nu, 1e-8);
    }
    let one = after(Primal::Woodbury, 3);
    let other = after(
        Primal::Rbcd {
            seed: 1,
            steps: 200_000,
            tol: 1e-16,
        },
        3,
    );
    assert_close(&other.u, &one.u, 1e-4);
}

#[test]
fn the_network_is_the_convex_model_and_the_bound_holds() {
    for seed in 0..3 {
        let (x, y) = data(seed, 12, 2);
        let patterns = Patterns::enumerate(&x).unwrap();
        let model = AdmmRelu::new(config())
            .unwrap()
            .fit(&x, &y, &patterns)
            .unwrap();
        let best = exact(&x, &y, &patterns, ConvexLoss::Squared, 0.0);
        assert!(model.violation < 1e-9);
        assert!(
            (model.objective / best.objective - 1.0).abs() < 1e-3,
            "{} {}",
            model.objective,
            best.objective
        );
        assert!(model.gap >= -1e-9 && model.objective - model.gap <= best.objective + 1e-8);
        assert!(model.gap < 0.05 * model.objective, "{}", model.gap);
        let network = model.to_network(0.0).unwrap();
        let gated = model.predict_gated(&x).unwrap();
        assert_close(&values(&network.forward(&x).unwrap()), &gated, 1e-6);
        let objective = network
            .objective(&x, &y, ConvexLoss::Squared, 0.05)
            .unwrap();
        assert!((objective - model.objective).abs() < 1e-6);
        assert!(model.to_network(1e-4).unwrap().width() <= network.width());
        let half = x.to_dtype(DType::F32).unwrap();
        assert_eq!(model.predict(&half).unwrap().dtype(), DType::F32);
    }
}

#[test]
fn more_patterns_and_more_units_are_never_worse() {
    let (x, y) = data(4, 12, 2);
    let all = Patterns::enumerate(&x).unwrap();
    let optimum = |count| exact(&x, &y, &all.first(count), ConvexLoss::Squared, 0.0).objective;
    let values: Vec<f64> = [3, 8, all.len()].map(optimum).to_vec();
    assert!(values.windows(2).all(|w| w[1] <= w[0] + 1e-8));
    let units = sample_units(40, 2, &mut RandomStream::new(1)).unwrap();
    let solver = |solver| {
        ScpRelu::new(ScpConfig {
            beta: 0.05,
            solver,
            ..Default::default()
        })
        .unwrap()
    };
    let mut last = f64::INFINITY;
    for count in [5, 20, 40] {
        let some = units.narrow(0, 0, count).unwrap();
        let fista = solver(ScpSolver::Fista).fit_units(&x, &y, &some).unwrap();
        let blocks = solver(ScpSolver::CoordinateDescent)
            .fit_units(&x, &y, &some)
            .unwrap();
        assert!((fista.objective - blocks.objective).abs() < 1e-7);
        assert!(blocks.objective <= last + 1e-9 && blocks.objective >= values[2] - 1e-6);
        last = blocks.objective;
    }
    let signs = labels(&y);
    for solver in [ScpSolver::Fista, ScpSolver::CoordinateDescent] {
        let config = ScpConfig {
            loss: ConvexLoss::Logistic,
            beta: 0.01,
            solver,
            tol: 1e-7,
            ..Default::default()
        };
        let model = ScpRelu::new(config)
            .unwrap()
            .fit_units(&x, &signs, &units)
            .unwrap();
        assert!(model.converged, "{}", model.residual);
    }
}

#[test]
fn the_logistic_loss_by_blocks_reaches_the_interior_points_optimum() {
    let (x, y) = data(5, 8, 2);
    let y = labels(&y);
    let patterns = Patterns::enumerate(&x).unwrap();
    let best = exact(&x, &y, &patterns, ConvexLoss::Logistic, 0.0);
    let primal = Primal::Rbcd {
        seed: 0,
        steps: 400,
        tol: 1e-12,
    };
    let config = AdmmConfig {
        loss: ConvexLoss::Logistic,
        primal,
        rho: 0.05,
        gamma_a: 0.05,
        max_iter: 800,
        ..config()
    };
    let model = AdmmRelu::new(config)
        .unwrap()
        .fit(&x, &y, &patterns)
        .unwrap();
    assert!(model.objective >= best.objective - 1e-7);
    assert!(
        model.objective <= 1.02 * best.objective,
        "{} {}",
        model.objective,
        best.objective
    );
}

/// Both solvers agree, the certificate is the loss, and no attack beats it.
#[test]
fn certificates_bound_attacks() {
    let (x, y) = data(6, 10, 2);
    let y = labels(&y);
    let mask = vec![true, false];
    let (eps, patterns) = (0.05, Patterns::enumerate(&x).unwrap());
    for loss in [ConvexLoss::Hinge, ConvexLoss::Logistic, ConvexLoss::Squared] {
        let config = |solver| AdversarialConfig {
            eps,
            beta: 0.01,
            loss,
            perturb_mask: Some(mask.clone()),
            solver,
            sample_weights: None,
        };
        let fit = |solver| {
            AdversarialRelu::new(config(solver))
                .unwrap()
                .fit(&x, &y, &patterns)
                .unwrap()
        };
        let model = fit(AdversarialSolver::interior_point());
        assert!(model.gap.abs() < 1e-6 && model.violation < 1e-7);
        let split = fit(AdversarialSolver::SplitAdmm {
            rho: None,
            max_iter: 6000,
            tol: 1e-7,
        });
        assert!(
            (split.objective - model.objective).abs() < 0.02 * model.objective,
            "{loss:?} {} {}",
            split.objective,
            model.objective
        );
        let margins = certificate(&model, &x, &y, eps, &mask).unwrap();
        let network = model.to_network(0.0).unwrap();
        let mut stream = RandomStream::new(3);
        for _ in 0..50 {
            let noise = stream
                .uniform(-eps, eps, (10, 1), DType::F64, &CPU)
                .unwrap();
            let still = Tensor::zeros((10, 1), DType::F64, &CPU).unwrap();
            let moved = (&x + Tensor::cat(&[noise, still], 1).unwrap()).unwrap();
            let scores = (network.forward(&moved).unwrap() * &y).unwrap();
            let lowest = values(&scores).into_iter().zip(&margins);
            for (score, margin) in lowest {
                assert!(score >= margin - 1e-6);
            }
        }
    }
}

#[test]
fn without_perturbation_it_is_the_plain_program() {
    let (x, y) = data(7, 8, 2);
    let y = labels(&y);
    let patterns = Patterns::enumerate(&x).unwrap();
    let plain = exact(&x, &y, &patterns, ConvexLoss::Hinge, 0.0);
    let tiny = exact(&x, &y, &patterns, ConvexLoss::Hinge, 1e-9);
    assert!((plain.objective - tiny.objective).abs() < 1e-6);
}

#[test]
fn a_resumed_run_has_the_same_bits() {
    let (x, y) = data(8, 9, 3);
    let patterns = Patterns::sample(&x, 10, &mut RandomStream::new(2)).unwrap();
    let solver = AdmmRelu::new(config()).unwrap();
    let mut one = solver.start(&x, &y, &patterns).unwrap();
    (0..7).for_each(|_| one.step().unwrap());
    let mut other = solver.start(&x, &y, &patterns).unwrap();
    other.restore(&one.state()).unwrap();
    (0..9).for_each(|_| {
        one.step().unwrap();
        other.step().unwrap();
    });
    assert_eq!(one.state(), other.state());
    let mut wrong = one.state();
    wrong.u.pop();
    assert!(other.restore(&wrong).is_err());
}

proptest! {
    #![proptest_config(cases(8))]

    #[test]
    fn odd_data_works(seed in 0u64..100, n in 1usize..6, d in 1usize..3) {
        let mut x = normals(seed, n * d);
        // A zero row and a constant column.
        x[..d].fill(0.0);
        if d > 1 {
            x.chunks_mut(d).for_each(|row| row[d - 1] = 1.0);
        }
        let (x, y) = (tensor(&x, (n, d)), tensor(&normals(seed + 1, n), n));
        let patterns = Patterns::enumerate(&x).unwrap();
        let model = AdmmRelu::new(config()).unwrap().fit(&x, &y, &patterns).unwrap();
        prop_assert!(model.objective.is_finite() && model.gap >= -1e-9 && model.violation < 1e-8);
    }
}

#[test]
fn bad_input_is_named() {
    let named = |error: Error, word: &str| {
        let text = error.to_string();
        assert!(text.contains(word), "{text}");
    };
    let (x, y) = data(9, 5, 2);
    let patterns = Patterns::enumerate(&x).unwrap();
    let fit = |config: AdmmConfig, x: &Tensor, y: &Tensor| {
        AdmmRelu::new(config)
            .and_then(|s| s.fit(x, y, &patterns))
            .map(|_| ())
            .unwrap_err()
    };
    named(
        fit(
            AdmmConfig {
                rho: 0.0,
                ..config()
            },
            &x,
            &y,
        ),
        "rho",
    );
    named(
        fit(
            AdmmConfig {
                loss: ConvexLoss::Logistic,
                ..config()
            },
            &x,
            &y,
        ),
        "Rbcd",
    );
    named(
        fit(
            AdmmConfig {
                loss: ConvexLoss::Hinge,
                ..config()
            },
            &x,
            &y,
        ),
        "hinge",
    );
    named(
        fit(config(), &x, &y.narrow(0, 0, 4).unwrap()),
        "y has shape",
    );
    named(
        fit(
            config(),
            &x.narrow(0, 0, 4).unwrap(),
            &y.narrow(0, 0, 4).unwrap(),
        ),
        "patterns",
    );
    named(fit(config(), &x, &tensor(&[f64::NAN; 5], 5)), "NaN");
    for (weights, word) in [
        (vec![1.0; 4], "sample_weights has shape"),
        (vec![-1.0; 5], "-1"),
        (vec![0.0; 5], "sum of sample_weights"),
    ] {
        let config = AdmmConfig {
            sample_weights: Some(weights),
            ..config()
        };
        named(fit(config, &x, &y), word);
    }
    let hinge = AdversarialRelu::new(AdversarialConfig::default()).unwrap();
    named(
        hinge.fit(&x, &tensor(&[0.5; 5], 5), &patterns).unwrap_err(),
        "labels 1 and -1",
    );
    named(
        AdversarialRelu::new(AdversarialConfig {
            eps: -1.0,
            ..Default::default()
        })
        .unwrap_err(),
        "eps",
    );
    let mask = AdversarialConfig {
        perturb_mask: Some(vec![true]),
        ..Default::default()
    };
    named(
        AdversarialRelu::new(mask)
            .unwrap()
            .fit(&x, &labels(&y), &patterns)
            .unwrap_err(),
        "perturb_mask",
    );
    named(
        ScpRelu::new(ScpConfig {
            loss: ConvexLoss::Hinge,
            ..Default::default()
        })
        .unwrap_err(),
        "hinge",
    );
    named(
        Patterns::from_directions(&x, &tensor(&[1.0], (1, 1))).unwrap_err(),
        "directions",
    );
    named(
        Patterns::sample(&x, 0, &mut RandomStream::new(0)).unwrap_err(),
        "directions",
    );
}

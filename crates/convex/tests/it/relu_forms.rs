//! Weights of samples, paths, growing patterns, gates, several outputs.

use crate::relu::{config, data, exact, labels};
use crate::support::*;
use candle_core::{DType, Module, Tensor};
use convex::relu::*;
use convex::RandomStream;

/// Twice the weights and twice `beta` are twice the objective; a weight of zero takes a row away.
#[test]
fn weights_count_samples() {
    let (x, y) = data(10, 9, 2);
    let patterns = Patterns::enumerate(&x).unwrap();
    for loss in [ConvexLoss::Squared, ConvexLoss::Logistic, ConvexLoss::Hinge] {
        let y = match loss {
            ConvexLoss::Squared => y.clone(),
            _ => labels(&y),
        };
        let at = |beta: f64, weight: f64, eps: f64| {
            let config = AdversarialConfig {
                eps,
                beta,
                loss,
                perturb_mask: Some(vec![true, false]),
                sample_weights: Some(vec![weight; 9]),
                ..Default::default()
            };
            let solver = AdversarialRelu::new(config).unwrap();
            let model = solver.fit(&x, &y, &patterns).unwrap();
            let (again, _) = solver
                .evaluate(&x, &y, &patterns, &model.v, &model.w)
                .unwrap();
            assert_eq!(again, model.objective);
            model.objective
        };
        for eps in [0.0, 0.05] {
            let (one, two) = (at(0.02, 1.0, eps), at(0.04, 2.0, eps));
            assert!((two - 2.0 * one).abs() < 1e-6, "{loss:?} {two} {one}");
        }
    }
    let mut weights = vec![2.0; 9];
    weights[4] = 0.0;
    let keep = Tensor::new(&[0u32, 1, 2, 3, 5, 6, 7, 8], &CPU).unwrap();
    let (less_x, less_y) = (
        x.index_select(&keep, 0).unwrap(),
        y.index_select(&keep, 0).unwrap(),
    );
    let less = Patterns::enumerate(&less_x).unwrap();
    let without = exact(&less_x, &less_y, &less, ConvexLoss::Squared, 0.0).objective;
    let admm = AdmmRelu::new(AdmmConfig {
        beta: 0.1,
        sample_weights: Some(weights.clone()),
        ..config()
    })
    .unwrap()
    .fit(&x, &y, &patterns)
    .unwrap();
    assert!((admm.objective - 2.0 * without).abs() < 2e-3 * without);
    let units = sample_units(30, 2, &mut RandomStream::new(1)).unwrap();
    let sampled = |beta, sample_weights, solver, x: &Tensor, y: &Tensor| {
        let config = ScpConfig {
            beta,
            sample_weights,
            solver,
            ..Default::default()
        };
        ScpRelu::new(config)
            .unwrap()
            .fit_units(x, y, &units)
            .unwrap()
            .objective
    };
    let half = sampled(0.05, None, ScpSolver::Fista, &less_x, &less_y);
    for solver in [ScpSolver::Fista, ScpSolver::CoordinateDescent] {
        let all = sampled(0.1, Some(weights.clone()), solver, &x, &y);
        assert!((all - 2.0 * half).abs() < 1e-7);
    }
    let gated = |beta, sample_weights, x: &Tensor, y: &Tensor, patterns: &Patterns| {
        let config = GatedConfig {
            beta,
            sample_weights,
            ..Default::default()
        };
        let model = GatedRelu::new(config).unwrap().fit(x, y, patterns).unwrap();
        assert!(model.gap < 1e-6);
        model.objective
    };
    let half = gated(0.05, None, &less_x, &less_y, &less);
    let all = gated(0.1, Some(weights), &x, &y, &patterns);
    assert!((all - 2.0 * half).abs() < 1e-5);
}

#[test]
fn a_path_is_its_models() {
    let (x, y) = data(11, 12, 2);
    let patterns = Patterns::enumerate(&x).unwrap();
    let betas = [0.3, 0.1, 0.05];
    let solver = AdmmRelu::new(config()).unwrap();
    let path = solver.path(&x, &y, &patterns, &betas).unwrap();
    for (model, beta) in path.iter().zip(betas) {
        let alone = AdmmRelu::new(AdmmConfig { beta, ..config() })
            .unwrap()
            .fit(&x, &y, &patterns)
            .unwrap();
        assert!((model.objective / alone.objective - 1.0).abs() < 1e-3);
        assert!(model.gap < 0.05 * model.objective);
    }
    assert!(solver.path(&x, &y, &patterns, &[]).is_err());
    assert!(solver.path(&x, &y, &patterns, &[-1.0]).is_err());
}

/// From three patterns to the optimum over all of them.
#[test]
fn growing_finds_the_patterns_that_count() {
    for seed in 0..3 {
        let (x, y) = data(20 + seed, 14, 2);
        let all = Patterns::enumerate(&x).unwrap();
        let best = exact(&x, &y, &all, ConvexLoss::Squared, 0.0).objective;
        let grown = AdmmRelu::new(config())
            .unwrap()
            .fit_growing(
                &x,
                &y,
                &all.first(3),
                &GrowConfig::default(),
                &mut RandomStream::new(seed),
            )
            .unwrap();
        let model = &grown.model;
        assert!(model.objective <= 1.003 * best, "{grown:?} {best}");
        assert!(grown.history.windows(2).all(|w| w[1].1 <= w[0].1 * 1.001));
        assert!(grown.history[0].0 == 3 && model.patterns().len() < all.len());
        assert!(grown.history[0].1 > 1.01 * best && grown.excess < 0.02);
    }
    let (x, y) = data(1, 6, 2);
    let patterns = Patterns::enumerate(&x).unwrap();
    let none = GrowConfig {
        candidates: 0,
        ..Default::default()
    };
    let solver = AdmmRelu::new(config()).unwrap();
    let mut stream = RandomStream::new(0);
    assert!(solver
        .fit_growing(&x, &y, &patterns, &none, &mut stream)
        .is_err());
}

/// Without cones the optimum is lower; outputs by rows are problems of their own, sharing is cheaper.
#[test]
fn gated_networks_solve_their_program() {
    let (x, y) = data(12, 15, 2);
    let patterns = Patterns::enumerate(&x).unwrap();
    let fit = |y: &Tensor, norm| {
        let config = GatedConfig {
            beta: 0.05,
            norm,
            ..Default::default()
        };
        let model = GatedRelu::new(config)
            .unwrap()
            .fit(&x, y, &patterns)
            .unwrap();
        assert!(model.converged && model.gap.abs() < 1e-6, "{}", model.gap);
        model
    };
    let one = fit(&y, OutputNorm::Rows);
    assert_eq!(one.objective, fit(&y, OutputNorm::Nuclear).objective);
    let cones = exact(&x, &y, &patterns, ConvexLoss::Squared, 0.0);
    assert!(one.objective <= cones.objective + 1e-8);
    let other = (y.sqr().unwrap() - 0.3).unwrap();
    let both = Tensor::stack(&[&y, &other], 1).unwrap();
    let rows = fit(&both, OutputNorm::Rows);
    let sum = one.objective + fit(&other, OutputNorm::Rows).objective;
    assert!((rows.objective - sum).abs() < 1e-6);
    let nuclear = fit(&both, OutputNorm::Nuclear);
    assert!(nuclear.objective <= rows.objective + 1e-8);
    for (model, dims) in [(&one, &[15usize][..]), (&rows, &[15, 2])] {
        let network = model.to_network(1e-9).unwrap();
        let out = network.forward(&x).unwrap();
        assert_eq!(out.dims(), dims);
        let target = if dims.len() == 1 { &y } else { &both };
        let loss = (out - target).unwrap().sqr().unwrap().sum_all().unwrap();
        let sizes: f64 = model.weights.chunks(2).map(|w| w[0].hypot(w[1])).sum();
        let value = 0.5 * values(&loss)[0] + 0.05 * sizes;
        assert!((value - model.objective).abs() < 1e-6);
        let f32 = network.to(DType::F32, &CPU).unwrap();
        assert!(f32.forward(&x.to_dtype(DType::F32).unwrap()).is_ok());
        assert_eq!(
            model.to_network(1e9).unwrap().forward(&x).unwrap().dims(),
            dims
        );
    }
    let logistic = GatedConfig {
        loss: ConvexLoss::Logistic,
        beta: 0.01,
        ..Default::default()
    };
    let model = GatedRelu::new(logistic)
        .unwrap()
        .fit(&x, &labels(&y), &patterns)
        .unwrap();
    assert!(model.converged && model.objective < 2f64.ln());
    let hinge = GatedConfig {
        loss: ConvexLoss::Hinge,
        ..Default::default()
    };
    assert!(GatedRelu::new(hinge).is_err());
}

/// Two equal outputs are one with the norm of two.
#[test]
fn units_of_several_outputs_share_their_norm() {
    let (x, y) = data(13, 12, 2);
    let units = sample_units(25, 2, &mut RandomStream::new(2)).unwrap();
    let fit = |y: &Tensor, beta, solver| {
        let config = ScpConfig {
            beta,
            solver,
            ..Default::default()
        };
        ScpRelu::new(config).unwrap().fit_units(&x, y, &units)
    };
    let both = Tensor::stack(&[&y, &y], 1).unwrap();
    let two = fit(&both, 0.05, ScpSolver::Fista).unwrap();
    let one = fit(&y, 0.05 / 2f64.sqrt(), ScpSolver::Fista).unwrap();
    assert!((two.objective - 2.0 * one.objective).abs() < 1e-7);
    assert!(two.gap.abs() < 1e-6 && one.gap.abs() < 1e-6);
    let out = two.network.forward(&x).unwrap();
    assert_eq!(out.dims(), &[12, 2]);
    assert!(fit(&both, 0.05, ScpSolver::CoordinateDescent).is_err());
}

/// For every loss the interior point's network is the program's optimum, on its cones.
#[test]
fn the_cone_program_gives_a_network() {
    let (x, y) = data(11, 12, 3);
    let patterns = Patterns::sample(&x, 40, &mut RandomStream::new(2)).unwrap();
    for loss in [ConvexLoss::Squared, ConvexLoss::Logistic, ConvexLoss::Hinge] {
        let y = match loss {
            ConvexLoss::Squared => y.clone(),
            _ => labels(&y),
        };
        let fit = |tol| {
            let config = ConeConfig {
                beta: 0.05,
                loss,
                tol,
                ..Default::default()
            };
            ConeRelu::new(config)
                .unwrap()
                .fit(&x, &y, &patterns)
                .unwrap()
        };
        let (fine, coarse) = (fit(1e-9), fit(1e-4));
        let best = exact(&x, &y, &patterns, loss, 0.0).objective;
        assert!((fine.objective - best).abs() < 1e-7 * (1.0 + best));
        assert!((coarse.objective - best).abs() < 1e-3 * (1.0 + best));
        assert!(coarse.iterations < fine.iterations);
        for model in [fine, coarse] {
            assert!(model.violation < 1e-9, "{}", model.violation);
            let network = model.to_network(0.0).unwrap();
            let trained = network.objective(&x, &y, loss, 0.05).unwrap();
            assert!((trained - model.objective).abs() < 1e-9);
        }
    }
}

/// A sample of weight two is two samples, one of weight zero none.
#[test]
fn the_cone_program_weighs_samples() {
    let (x, y) = data(12, 8, 2);
    let patterns = Patterns::enumerate(&x).unwrap();
    let fit = |x: &Tensor, y: &Tensor, patterns: &Patterns, weights: Option<Vec<f64>>| {
        let config = ConeConfig {
            beta: 0.02,
            sample_weights: weights,
            ..Default::default()
        };
        let solver = ConeRelu::new(config).unwrap();
        solver.fit(x, y, patterns).unwrap().objective
    };
    let mut weights = vec![1.0; 8];
    weights[2] = 2.0;
    weights[5] = 0.0;
    let weighted = fit(&x, &y, &patterns, Some(weights));
    let rows: Vec<u32> = vec![0, 1, 2, 2, 3, 4, 6, 7];
    let rows = Tensor::new(rows, &CPU).unwrap();
    let (x, y) = (
        x.index_select(&rows, 0).unwrap(),
        y.index_select(&rows, 0).unwrap(),
    );
    let again = fit(&x, &y, &Patterns::enumerate(&x).unwrap(), None);
    assert!((weighted - again).abs() < 1e-6, "{weighted} {again}");
}

#[test]
fn bad_cone_settings_are_named() {
    for (config, field) in [
        (
            ConeConfig {
                beta: -1.0,
                ..Default::default()
            },
            "ConeConfig::beta",
        ),
        (
            ConeConfig {
                tol: 0.0,
                ..Default::default()
            },
            "ConeConfig::tol",
        ),
    ] {
        let error = ConeRelu::new(config).unwrap_err();
        assert!(error.to_string().contains(field), "{error}");
    }
}

/// From a penalty that is far off, balancing gets near the optimum where the fixed one does not; it
/// resumes with the same bits.
#[test]
fn a_balanced_penalty_forgives_a_bad_start() {
    let (x, y) = data(13, 30, 4);
    let patterns = Patterns::sample(&x, 40, &mut RandomStream::new(4)).unwrap();
    let best = exact(&x, &y, &patterns, ConvexLoss::Squared, 0.0).objective;
    let config = |rho, balance| AdmmConfig {
        rho,
        gamma_a: rho,
        balance,
        max_iter: 600,
        ..config()
    };
    for rho in [10.0, 1e-4] {
        let fit = |balance| {
            let solver = AdmmRelu::new(config(rho, balance)).unwrap();
            solver.fit(&x, &y, &patterns).unwrap().objective / best - 1.0
        };
        let (fixed, balanced) = (fit(false), fit(true));
        assert!(
            balanced < 0.01 && balanced < 0.2 * fixed,
            "{rho}: {balanced} {fixed}"
        );
    }
    let solver = AdmmRelu::new(config(10.0, true)).unwrap();
    let mut one = solver.start(&x, &y, &patterns).unwrap();
    (0..40).for_each(|_| one.step().unwrap());
    assert!(one.state().rho < 10.0);
    let mut other = solver.start(&x, &y, &patterns).unwrap();
    other.restore(&one.state()).unwrap();
    (0..40).for_each(|_| {
        one.step().unwrap();
        other.step().unwrap();
    });
    assert_eq!(one.state(), other.state());
}

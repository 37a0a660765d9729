use super::*;

proptest! {
    #![proptest_config(crate::few(24))]

    #[test]
    fn conjugate_gradient_solves_within_the_dimension(n in 1_usize..20, seed in 0_u64..1000, high in 1.0_f64..50.0) {
        for (dtype, tolerance) in BOTH {
            let a = Symmetric::new(&spread(n, 1.0, high), seed, dtype);
            let b = normal(seed + 1, n).to_dtype(dtype).unwrap();
            let config = CgConfig { tolerance, ..CgConfig::default() };
            let solution = conjugate_gradient(|x| a.apply(x), &b, None, &config).unwrap();
            prop_assert!(solution.converged);
            // In exact arithmetic n steps are enough.
            prop_assert!(solution.iterations <= n + n / 4 + 1, "{} of {n}", solution.iterations);
            let residual = distance(&a.apply(&solution.x).unwrap(), &b) / norm(&host(&b));
            prop_assert!(residual <= tolerance * 1.01);
            prop_assert!((solution.residuals.last().unwrap() - residual).abs() <= tolerance);
            prop_assert_eq!(solution.residuals[0], 1.0);
        }
    }
}

#[test]
fn conjugate_gradient_needs_one_step_per_distinct_eigenvalue() {
    let values: Vec<f64> = (0..30).map(|i| [1.0, 3.0, 10.0][i % 3]).collect();
    let a = Symmetric::new(&values, 1, DType::F64);
    let config = CgConfig {
        tolerance: 1e-10,
        ..CgConfig::default()
    };
    let solution = conjugate_gradient(|x| a.apply(x), &normal(2, 30), None, &config).unwrap();
    assert!(
        solution.converged && solution.iterations == 3,
        "{:?}",
        solution.residuals
    );
    assert_eq!(solution.residuals.len(), 4);
}

#[test]
fn a_good_start_and_a_good_preconditioner_save_steps() {
    let scales = vector(&[1e-3, 1.0, 50.0, 1e3, 7.0], DType::F64);
    let b = normal(3, 5);
    let apply = |x: &Tensor| Ok((x * &scales)?);
    let config = CgConfig {
        tolerance: 1e-12,
        ..CgConfig::default()
    };
    let plain = conjugate_gradient(apply, &b, None, &config).unwrap();
    let jacobi = |r: &Tensor| Ok((r / &scales)?);
    let better = preconditioned_conjugate_gradient(apply, jacobi, &b, None, &config).unwrap();
    assert!(plain.converged && plain.iterations >= 5);
    assert!(better.converged && better.iterations == 1);
    assert!(distance(&plain.x, &better.x) < 1e-8 * norm(&host(&better.x)));
    let again = conjugate_gradient(apply, &b, Some(&better.x), &config).unwrap();
    assert!(again.converged && again.iterations == 0 && again.residuals.len() == 1);
}

#[test]
fn negative_curvature_is_reported_with_its_value() {
    let a = Symmetric::new(&[1.0, 2.0, -0.25, 4.0], 5, DType::F64);
    let b = a.eigenvector(2);
    let error = conjugate_gradient(|x| a.apply(x), &b, None, &CgConfig::default()).unwrap_err();
    assert!(
        matches!(error, Error::NegativeCurvature { iteration: 0, value, .. } if (value + 0.25).abs() < 1e-12)
    );
    assert!(error.to_string().contains("curvature -2."), "{error}");
    let generic = conjugate_gradient(|x| a.apply(x), &normal(1, 4), None, &CgConfig::default());
    assert!(matches!(generic, Err(Error::NegativeCurvature { value, .. }) if value < 0.0));
    let negated = |r: &Tensor| Ok(r.neg()?);
    let good = Symmetric::new(&[1.0, 2.0, 0.25, 4.0], 5, DType::F64);
    let wrong = preconditioned_conjugate_gradient(
        |x| good.apply(x),
        negated,
        &b,
        None,
        &CgConfig::default(),
    );
    assert!(
        matches!(wrong, Err(Error::NegativeCurvature { method, value, .. })
        if method.contains("preconditioner") && (value + 1.0).abs() < 1e-12)
    );
}

#[test]
fn singular_systems_are_solved_where_they_can_be() {
    let a = Symmetric::new(&[0.0, 0.0, 1.0, 2.0, 5.0], 7, DType::F64);
    // In the range: converges.
    let b = a.apply(&normal(8, 5)).unwrap();
    let inside = conjugate_gradient(|x| a.apply(x), &b, None, &CgConfig::default()).unwrap();
    assert!(inside.converged && inside.iterations == 3);
    // Outside: ends without an error and does not claim convergence.
    let outside = conjugate_gradient(|x| a.apply(x), &normal(9, 5), None, &CgConfig::default());
    match outside {
        Ok(solution) => assert!(!solution.converged),
        Err(error) => panic!("{error}"),
    }
    let zero = conjugate_gradient(|x| Ok(x.zeros_like()?), &b, None, &CgConfig::default()).unwrap();
    assert!(!zero.converged && zero.iterations == 0 && norm(&host(&zero.x)) == 0.0);
}

#[test]
fn a_tolerance_below_rounding_ends_without_a_claim() {
    let a = Symmetric::new(&spread(40, 1e-3, 10.0), 11, DType::F32);
    let b = normal(12, 40).to_dtype(DType::F32).unwrap();
    let config = CgConfig {
        tolerance: 1e-12,
        max_iterations: 100_000,
    };
    let solution = conjugate_gradient(|x| a.apply(x), &b, None, &config).unwrap();
    assert!(
        !solution.converged && solution.iterations < 2000,
        "{}",
        solution.iterations
    );
    assert!(*solution.residuals.last().unwrap() < 1e-2);
    let capped = CgConfig {
        tolerance: 1e-6,
        max_iterations: 3,
    };
    let solution = conjugate_gradient(|x| a.apply(x), &b, None, &capped).unwrap();
    assert!(!solution.converged && solution.iterations == 3 && solution.residuals.len() == 4);
}

#[test]
fn every_shape_of_tensor_is_a_vector() {
    let b = normal(1, 12).reshape((3, 4)).unwrap();
    let solution = conjugate_gradient(|x| Ok((x * 2.0)?), &b, None, &CgConfig::default()).unwrap();
    assert_eq!(solution.x.dims(), [3, 4]);
    assert!(distance(&solution.x, &(b / 2.0).unwrap()) < 1e-14);
}

#[test]
fn the_neumann_sum_has_the_closed_form_of_a_geometric_series() {
    let d = [0.2, 1.0, 1.7];
    let apply = |x: &Tensor| Ok((x * vector(&d, x.dtype()))?);
    for (dtype, tol) in [(DType::F64, 1e-14), (DType::F32, 1e-6)] {
        for terms in [1, 2, 7] {
            let config = NeumannConfig {
                step: 0.9,
                tolerance: 0.0,
                max_terms: terms,
                ..NeumannConfig::default()
            };
            let b = vector(&[1.0, -2.0, 0.5], dtype);
            let solution = neumann(apply, &b, &config).unwrap();
            let expected: Vec<f64> = d
                .iter()
                .zip(host(&b))
                .map(|(d, b)| b * (1.0 - (1.0 - 0.9 * d).powi(terms as i32)) / d)
                .collect();
            assert!(distance(&solution.x, &vector(&expected, dtype)) < tol * norm(&expected));
            assert!(
                !solution.converged
                    && solution.iterations == terms
                    && solution.residuals.len() == terms + 1
            );
        }
        let b = vector(&[1.0, -2.0, 0.5], dtype);
        let solution = neumann(apply, &b, &NeumannConfig::default()).unwrap();
        assert!(solution.converged);
        assert!(distance(&apply(&solution.x).unwrap(), &b) < 3e-6 * norm(&host(&b)));
    }
}

#[test]
fn a_neumann_series_that_grows_is_an_error() {
    let b = normal(1, 4);
    let grows = |factor: f64| {
        let config = NeumannConfig {
            max_terms: 50,
            ..NeumannConfig::default()
        };
        neumann(move |x: &Tensor| Ok((x * factor)?), &b, &config)
    };
    // |1 - 5| = 4 per term: above the limit before the cap.
    assert!(
        matches!(grows(5.0), Err(Error::Diverged { iteration: 10, residual, .. }) if residual > 1e6)
    );
    // |1 - 2.1| = 1.1: noticed at the cap.
    assert!(matches!(
        grows(2.1),
        Err(Error::Diverged { iteration: 50, .. })
    ));
    assert!(matches!(
        grows(f64::NAN),
        Err(Error::Diverged { iteration: 1, .. })
    ));
    let stuck = grows(0.0).unwrap();
    assert!(!stuck.converged && stuck.residuals.iter().all(|r| *r == 1.0));
}

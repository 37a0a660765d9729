use super::*;

proptest! {
    #![proptest_config(crate::few(24))]

    #[test]
    fn anderson_on_a_linear_map_takes_as_many_steps_as_dimensions(n in 1_usize..8, seed in 0_u64..1000) {
        // g(x) = A x + b with eigenvalues in [-0.9, 0.9]: with full memory this is GMRES.
        let a = Symmetric::new(&spread(n, -0.9, 0.9), seed, DType::F64);
        let b = normal(seed + 1, n);
        let g = |x: &Tensor| Ok((a.apply(x)? + &b)?);
        let config = AndersonConfig { memory: n, regularization: 0.0, tolerance: 1e-8, ..AndersonConfig::default() };
        let solution = anderson(g, &Tensor::zeros(n, DType::F64, &CPU).unwrap(), &config).unwrap();
        prop_assert!(solution.converged && solution.iterations <= n + 1, "{:?}", solution.residuals);
        let image = (a.apply(&solution.x).unwrap() + &b).unwrap();
        prop_assert!(distance(&image, &solution.x) <= 1.01e-8 * norm(&host(&image)).max(norm(&host(&b))));
    }
}

#[test]
fn fixed_points_by_both_iterations() {
    for (dtype, tol) in [(DType::F64, 1e-12), (DType::F32, 1e-6)] {
        // The Dottie number.
        let start = Tensor::zeros((2, 2), dtype, &CPU).unwrap();
        let config = PicardConfig {
            tolerance: tol,
            ..PicardConfig::default()
        };
        let slow = picard(|x| Ok(x.cos()?), &start, &config).unwrap();
        let config = AndersonConfig {
            tolerance: tol,
            ..AndersonConfig::default()
        };
        let fast = anderson(|x| Ok(x.cos()?), &start, &config).unwrap();
        for solution in [&slow, &fast] {
            assert!(solution.converged);
            assert!(host(&solution.x)
                .iter()
                .all(|x| (x - 0.739_085_133_215_160_6).abs() < 2.0 * tol));
            assert_eq!(solution.residuals.len(), solution.iterations + 1);
        }
        assert!(
            3 * fast.iterations < slow.iterations,
            "{} and {}",
            fast.iterations,
            slow.iterations
        );
    }
}

#[test]
fn damping_tames_what_diverges_without() {
    let b = normal(1, 5);
    let g = |x: &Tensor| Ok(((x * -1.5)? + &b)?);
    let start = Tensor::zeros(5, DType::F64, &CPU).unwrap();
    let error = picard(g, &start, &PicardConfig::default()).unwrap_err();
    assert!(matches!(
        error,
        Error::Diverged {
            method: "Picard iteration",
            ..
        }
    ));
    let damped = picard(
        g,
        &start,
        &PicardConfig {
            mixing: 0.5,
            ..PicardConfig::default()
        },
    )
    .unwrap();
    assert!(damped.converged && distance(&damped.x, &(&b / 2.5).unwrap()) < 1e-4);
    // Anderson needs no damping here: one direction, one correction.
    let accelerated = anderson(g, &start, &AndersonConfig::default()).unwrap();
    assert!(accelerated.converged && accelerated.iterations <= 3);
    let nan = |x: &Tensor| Ok((x * f64::NAN)?);
    assert!(matches!(
        picard(nan, &b, &PicardConfig::default()),
        Err(Error::Diverged { iteration: 0, .. })
    ));
    assert!(matches!(
        anderson(nan, &b, &AndersonConfig::default()),
        Err(Error::Diverged { .. })
    ));
}

#[test]
fn anderson_without_memory_is_picard_to_the_bit() {
    let start = normal(4, 6);
    let g = |x: &Tensor| Ok((x.sin()? * 0.8)?);
    let plain = PicardConfig {
        mixing: 0.7,
        max_iterations: 30,
        tolerance: 0.0,
        ..PicardConfig::default()
    };
    let picard = picard(g, &start, &plain).unwrap();
    let none = AndersonConfig {
        memory: 0,
        mixing: 0.7,
        max_iterations: 30,
        tolerance: 0.0,
        ..AndersonConfig::default()
    };
    let anderson = anderson(g, &start, &none).unwrap();
    assert_eq!(host(&picard.x), host(&anderson.x));
    assert_eq!(picard.residuals, anderson.residuals);
    assert!(picard.iterations == 30 && !picard.converged);
}

#[test]
fn a_fixed_point_at_zero_or_at_the_start_is_reached() {
    let zero = Tensor::zeros(3, DType::F64, &CPU).unwrap();
    let halve = |x: &Tensor| Ok((x * 0.5)?);
    let at_start = picard(halve, &zero, &PicardConfig::default()).unwrap();
    assert!(at_start.converged && at_start.iterations == 0 && at_start.residuals == [0.0]);
    let from_afar = picard(halve, &normal(1, 3), &PicardConfig::default()).unwrap();
    assert!(from_afar.converged && norm(&host(&from_afar.x)) < 1e-4);
    let accelerated = anderson(halve, &normal(1, 3), &AndersonConfig::default()).unwrap();
    assert!(accelerated.converged && accelerated.iterations <= 3);
    // A constant map: the differences of f repeat and the Gram matrix is singular.
    let constant = normal(2, 3);
    let found = anderson(
        |_| Ok(constant.clone()),
        &normal(1, 3),
        &AndersonConfig::default(),
    )
    .unwrap();
    assert!(found.converged && found.iterations == 1);
}

#[test]
fn a_degenerate_history_does_no_harm() {
    // All columns parallel: rank one with memory five.
    let direction = normal(3, 8);
    let g = |x: &Tensor| {
        let along = (x * &direction)?.sum_all()?.cos()?;
        Ok(direction.broadcast_mul(&along)?)
    };
    let config = AndersonConfig {
        regularization: 0.0,
        tolerance: 1e-10,
        ..AndersonConfig::default()
    };
    let found = anderson(g, &(&direction * 0.1).unwrap(), &config).unwrap();
    assert!(found.converged, "{:?}", found.residuals);
}

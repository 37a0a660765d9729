use super::*;

/// The pair satisfies its equation, has the residual it states, and points along `expected`.
fn assert_pair(a: &Symmetric, pair: &EigenPair, expected: &Tensor, tol: f64) {
    let v = host(&pair.vector);
    assert!((norm(&v) - 1.0).abs() < 1e-6);
    let scaled = (&pair.vector * pair.value).unwrap();
    assert!(distance(&a.apply(&pair.vector).unwrap(), &scaled) <= tol * pair.value.abs());
    let along: f64 = v.iter().zip(host(expected)).map(|(a, b)| a * b).sum();
    assert!(1.0 - along.abs() < tol, "{along}");
}

proptest! {
    #![proptest_config(crate::few(24))]

    #[test]
    fn power_and_lanczos_find_a_known_spectrum(n in 2_usize..30, seed in 0_u64..1000, negative in any::<bool>()) {
        for (dtype, tolerance) in BOTH {
            let mut values = spread(n, 0.5, 2.0);
            values[n - 1] = if negative { -4.0 } else { 4.0 };
            let a = Symmetric::new(&values, seed, dtype);
            let mut stream = RandomStream::new(seed);
            let config = PowerConfig { tolerance, ..PowerConfig::default() };
            let found = power_iteration(|x| a.apply(x), &a.eigenvector(0), &config, &mut stream).unwrap();
            prop_assert!(found.converged && (found.pair.value - values[n - 1]).abs() < 50.0 * tolerance);
            assert_pair(&a, &found.pair, &a.eigenvector(n - 1), 50.0 * tolerance);
            let config = LanczosConfig { tolerance, ..LanczosConfig::default() };
            let spectrum = lanczos(|x| a.apply(x), &a.eigenvector(0), &config, &mut stream).unwrap();
            prop_assert!(spectrum.converged && spectrum.iterations <= n);
            values.sort_by(f64::total_cmp);
            prop_assert!((spectrum.smallest[0].value - values[0]).abs() < 50.0 * tolerance);
            prop_assert!((spectrum.largest[0].value - values[n - 1]).abs() < 50.0 * tolerance);
        }
    }
}

#[test]
fn several_eigenvalues_at_both_ends() {
    for (dtype, tol) in [(DType::F64, 1e-9), (DType::F32, 1e-4)] {
        let mut values = spread(60, -1.0, 1.0);
        (values[0], values[1], values[2]) = (-9.0, -7.0, -6.0);
        (values[57], values[58], values[59]) = (5.0, 6.0, 11.0);
        let a = Symmetric::new(&values, 21, dtype);
        let config = LanczosConfig {
            smallest: 3,
            largest: 3,
            tolerance: tol * 0.1,
            ..LanczosConfig::default()
        };
        let mut stream = RandomStream::new(5);
        let spectrum = lanczos(|x| a.apply(x), &a.eigenvector(0), &config, &mut stream).unwrap();
        assert!(
            spectrum.converged && spectrum.iterations < 60,
            "{}",
            spectrum.iterations
        );
        for (pairs, expected) in [
            (&spectrum.smallest, [0, 1, 2]),
            (&spectrum.largest, [59, 58, 57]),
        ] {
            for (pair, i) in pairs.iter().zip(expected) {
                assert!((pair.value - values[i]).abs() < tol);
                assert_pair(&a, pair, &a.eigenvector(i), tol);
                let scaled = (&pair.vector * pair.value).unwrap();
                let true_residual = distance(&a.apply(&pair.vector).unwrap(), &scaled);
                // Stated relative to 11, or a little more.
                assert!(
                    (pair.residual - true_residual / 11.0).abs() <= 0.01 * pair.residual.max(1e-15)
                );
            }
        }
        let along: f64 = host(&spectrum.largest[0].vector)
            .iter()
            .zip(host(&spectrum.largest[1].vector))
            .map(|(a, b)| a * b)
            .sum();
        assert!(along.abs() < tol);
    }
}

#[test]
fn repeated_eigenvalues_are_found_as_often_as_they_occur() {
    let values = [1.0, 1.0, 1.0, 2.0, 5.0, 5.0, 0.0, 0.0];
    let run = |values: &[f64], smallest, largest| {
        let a = Symmetric::new(values, 31, DType::F64);
        let config = LanczosConfig {
            smallest,
            largest,
            ..LanczosConfig::default()
        };
        let found = lanczos(
            |x| a.apply(x),
            &a.eigenvector(0),
            &config,
            &mut RandomStream::new(1),
        )
        .unwrap();
        assert!(found.converged);
        let list = |pairs: &[EigenPair]| -> Vec<f64> { pairs.iter().map(|p| p.value).collect() };
        (list(&found.smallest), list(&found.largest))
    };
    let close = |got: &[f64], expected: &[f64]| {
        assert!(
            got.len() == expected.len()
                && got.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-9),
            "{got:?}"
        );
    };
    let (smallest, largest) = run(&values, 3, 3);
    close(&smallest, &[0.0, 0.0, 1.0]);
    close(&largest, &[5.0, 5.0, 2.0]);
    // All of them, and more than there are.
    let (smallest, largest) = run(&values, 8, 20);
    close(&smallest, &[0.0, 0.0, 1.0, 1.0, 1.0, 2.0, 5.0, 5.0]);
    close(&largest, &[5.0, 5.0, 2.0, 1.0, 1.0, 1.0, 0.0, 0.0]);
    let (smallest, largest) = run(&[3.0; 6], 2, 1);
    close(&smallest, &[3.0, 3.0]);
    close(&largest, &[3.0]);
}

#[test]
fn eigenvalues_of_zero_and_of_size_one() {
    for dtype in [DType::F32, DType::F64] {
        let like = Tensor::zeros(6, dtype, &CPU).unwrap();
        let mut stream = RandomStream::new(3);
        let zero = |x: &Tensor| Ok(x.zeros_like()?);
        let power = power_iteration(zero, &like, &PowerConfig::default(), &mut stream).unwrap();
        assert!(power.converged && power.pair.value == 0.0 && power.residuals == [0.0]);
        let spectrum = lanczos(zero, &like, &LanczosConfig::default(), &mut stream).unwrap();
        assert!(
            spectrum.converged && spectrum.smallest[0].value == 0.0 && spectrum.iterations == 1
        );
        let one = Tensor::zeros(1, dtype, &CPU).unwrap();
        let triple = |x: &Tensor| Ok((x * -3.0)?);
        let power = power_iteration(triple, &one, &PowerConfig::default(), &mut stream).unwrap();
        assert!(power.converged && power.iterations == 1 && (power.pair.value + 3.0).abs() < 1e-6);
        let spectrum = lanczos(triple, &one, &LanczosConfig::default(), &mut stream).unwrap();
        assert!(spectrum.converged && (spectrum.smallest[0].value + 3.0).abs() < 1e-6);
        assert!((spectrum.largest[0].value + 3.0).abs() < 1e-6);
        let b = Tensor::ones(1, dtype, &CPU).unwrap();
        let solved =
            conjugate_gradient(|x| Ok((x * 4.0)?), &b, None, &CgConfig::default()).unwrap();
        assert!(solved.converged && solved.iterations == 1 && host(&solved.x) == [0.25]);
    }
}

#[test]
fn eigenvalues_that_are_not_found_are_not_claimed() {
    // +2 and -2: the iteration alternates between them.
    let a = Symmetric::new(&[2.0, -2.0, 0.5], 1, DType::F64);
    let config = PowerConfig {
        max_iterations: 200,
        ..PowerConfig::default()
    };
    let power = power_iteration(
        |x| a.apply(x),
        &a.eigenvector(0),
        &config,
        &mut RandomStream::new(1),
    )
    .unwrap();
    assert!(!power.converged && power.iterations == 200 && power.residuals.len() == 200);
    let wide = Symmetric::new(&spread(80, 0.0, 1.0), 2, DType::F64);
    let config = LanczosConfig {
        max_iterations: 5,
        ..LanczosConfig::default()
    };
    let few = lanczos(
        |x| wide.apply(x),
        &wide.eigenvector(0),
        &config,
        &mut RandomStream::new(1),
    )
    .unwrap();
    assert!(!few.converged && few.iterations == 5 && few.largest[0].residual > 1e-5);
    let nan = |x: &Tensor| Ok((x * f64::NAN)?);
    let error = power_iteration(
        nan,
        &a.eigenvector(0),
        &PowerConfig::default(),
        &mut RandomStream::new(1),
    );
    assert!(matches!(error, Err(Error::Diverged { .. })));
    let error = lanczos(
        nan,
        &a.eigenvector(0),
        &LanczosConfig::default(),
        &mut RandomStream::new(1),
    );
    assert!(matches!(error, Err(Error::Diverged { iteration: 1, .. })));
}

#[test]
fn the_sharpness_of_a_loss_by_hessian_products() {
    let values = [0.1, 0.4, 2.0, 3.5];
    let a = Symmetric::new(&values, 17, DType::F64);
    let x = Var::from_tensor(&normal(1, 4)).unwrap();
    let loss = || {
        let column = x.reshape((4, 1))?;
        column.t()?.matmul(&a.matrix)?.matmul(&column)?.sum_all()? * 0.5
    };
    let product = |v: &Tensor| Ok(hvp(loss, &[x.clone()], &[v.clone()])?.value.remove(0));
    let config = LanczosConfig {
        tolerance: 1e-6,
        ..LanczosConfig::default()
    };
    let spectrum = lanczos(product, &x, &config, &mut RandomStream::new(2)).unwrap();
    assert!(spectrum.converged && (spectrum.largest[0].value - 3.5).abs() < 1e-6);
}

use candle_core::{DType, Device, Tensor, Var};
use proptest::prelude::*;
use thalweg_tensor_core::autograd::hvp;
use thalweg_tensor_core::random::RandomStream;
use thalweg_tensor_core::solve::{
    anderson, conjugate_gradient, lanczos, neumann, picard, power_iteration,
    preconditioned_conjugate_gradient, AndersonConfig, CgConfig, EigenPair, LanczosConfig,
    NeumannConfig, PicardConfig, PowerConfig,
};
use thalweg_tensor_core::{Error, Result};

const CPU: Device = Device::Cpu;

fn vector(values: &[f64], dtype: DType) -> Tensor {
    Tensor::new(values, &CPU).unwrap().to_dtype(dtype).unwrap()
}

fn host(tensor: &Tensor) -> Vec<f64> {
    tensor
        .to_dtype(DType::F64)
        .unwrap()
        .flatten_all()
        .unwrap()
        .to_vec1()
        .unwrap()
}

fn norm(values: &[f64]) -> f64 {
    values.iter().map(|x| x * x).sum::<f64>().sqrt()
}

fn distance(a: &Tensor, b: &Tensor) -> f64 {
    let difference: Vec<f64> = host(a).iter().zip(host(b)).map(|(a, b)| a - b).collect();
    norm(&difference)
}

fn normal(seed: u64, n: usize) -> Tensor {
    RandomStream::new(seed)
        .normal(0.0, 1.0, n, DType::F64, &CPU)
        .unwrap()
}

/// `Q diag(d) Q` with the reflection `Q = I - 2 u u^T`: a dense symmetric matrix with known
/// eigenvalues; its eigenvectors are the columns of `Q`.
struct Symmetric {
    matrix: Tensor,
    reflection: Tensor,
}

impl Symmetric {
    fn new(eigenvalues: &[f64], seed: u64, dtype: DType) -> Self {
        let n = eigenvalues.len();
        let u = normal(seed, n);
        let u = (&u / norm(&host(&u))).unwrap().reshape((n, 1)).unwrap();
        let q = (Tensor::eye(n, DType::F64, &CPU).unwrap()
            - (u.matmul(&u.t().unwrap()).unwrap() * 2.0).unwrap())
        .unwrap();
        let d = Tensor::new(eigenvalues, &CPU).unwrap();
        let matrix = q.broadcast_mul(&d).unwrap().matmul(&q).unwrap();
        Self {
            matrix: matrix.to_dtype(dtype).unwrap(),
            reflection: q.to_dtype(dtype).unwrap(),
        }
    }

    fn apply(&self, x: &Tensor) -> Result<Tensor> {
        Ok(self.matrix.matmul(&x.reshape(((), 1))?)?.flatten_all()?)
    }

    fn eigenvector(&self, i: usize) -> Tensor {
        self.reflection.get(i).unwrap()
    }
}

fn spread(n: usize, low: f64, high: f64) -> Vec<f64> {
    (0..n)
        .map(|i| low + (high - low) * i as f64 / (n.max(2) - 1) as f64)
        .collect()
}

const BOTH: [(DType, f64); 2] = [(DType::F64, 1e-10), (DType::F32, 1e-5)];

// Conjugate gradient

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

/// The pair satisfies its equation, has the residual it states, and points along `expected`.
fn assert_pair(a: &Symmetric, pair: &EigenPair, expected: &Tensor, tol: f64) {
    let v = host(&pair.vector);
    assert!((norm(&v) - 1.0).abs() < 1e-6);
    let scaled = (&pair.vector * pair.value).unwrap();
    assert!(distance(&a.apply(&pair.vector).unwrap(), &scaled) <= tol * pair.value.abs());
    let along: f64 = v.iter().zip(host(expected)).map(|(a, b)| a * b).sum();
    assert!(1.0 - along.abs() < tol, "{along}");
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

// Neumann series

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

// Eigenvalues

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

// Fixed points

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

// Bad input, for all of them

#[test]
fn a_zero_right_hand_side_is_solved_by_zero() {
    for dtype in [DType::F32, DType::F64] {
        let b = Tensor::zeros(4, dtype, &CPU).unwrap();
        let start = Tensor::ones(4, dtype, &CPU).unwrap();
        let cg =
            conjugate_gradient(|x| Ok(x.clone()), &b, Some(&start), &CgConfig::default()).unwrap();
        let series = neumann(|x| Ok(x.clone()), &b, &NeumannConfig::default()).unwrap();
        for solution in [cg, series] {
            assert!(solution.converged && solution.iterations == 0 && solution.residuals == [0.0]);
            assert_eq!(host(&solution.x), [0.0; 4]);
        }
    }
}

/// What every solver says to a vector and an operator, as one list.
fn all_solvers(v: &Tensor, apply: &dyn Fn(&Tensor) -> Result<Tensor>) -> Vec<Error> {
    let mut stream = RandomStream::new(1);
    vec![
        conjugate_gradient(apply, v, None, &CgConfig::default()).unwrap_err(),
        neumann(apply, v, &NeumannConfig::default()).unwrap_err(),
        picard(apply, v, &PicardConfig::default()).unwrap_err(),
        anderson(apply, v, &AndersonConfig::default()).unwrap_err(),
        power_iteration(apply, v, &PowerConfig::default(), &mut stream).unwrap_err(),
        lanczos(apply, v, &LanczosConfig::default(), &mut stream).unwrap_err(),
    ]
}

#[test]
fn vectors_and_operators_that_do_not_fit_are_refused() {
    let same = |x: &Tensor| Ok(x.clone());
    let good = normal(1, 4);
    let is = |errors: Vec<Error>, what: fn(&Error) -> bool| {
        assert!(errors.iter().all(what), "{errors:?}")
    };
    let empty = Tensor::zeros(0, DType::F64, &CPU).unwrap();
    is(all_solvers(&empty, &same), |e| {
        matches!(e, Error::InvalidArgument { .. })
    });
    for dtype in [DType::BF16, DType::U32] {
        let other = good.abs().unwrap().to_dtype(dtype).unwrap();
        is(all_solvers(&other, &same), |e| {
            matches!(e, Error::DTypeMismatch { .. })
        });
    }
    let shrinks = |x: &Tensor| Ok(x.narrow(0, 0, 2)?);
    is(all_solvers(&good, &shrinks), |e| {
        matches!(e, Error::ShapeMismatch { .. })
    });
    let narrows = |x: &Tensor| Ok(x.to_dtype(DType::F32)?);
    is(all_solvers(&good, &narrows), |e| {
        matches!(e, Error::DTypeMismatch { .. })
    });
    let fails = |_: &Tensor| Err(Error::UnknownDevice("mine".into()));
    is(all_solvers(&good, &fails), |e| {
        matches!(e, Error::UnknownDevice(_))
    });
    for bad in [f64::NAN, f64::INFINITY] {
        let v = vector(&[1.0, bad], DType::F64);
        // The eigenvalue solvers do not look at the values.
        let cg = conjugate_gradient(same, &v, None, &CgConfig::default());
        assert!(matches!(cg, Err(Error::InvalidArgument { name: "b", .. })));
        let start = conjugate_gradient(
            same,
            &vector(&[1.0, 1.0], DType::F64),
            Some(&v),
            &CgConfig::default(),
        );
        assert!(matches!(
            start,
            Err(Error::InvalidArgument { name: "start", .. })
        ));
        assert!(neumann(same, &v, &NeumannConfig::default()).is_err());
        assert!(picard(same, &v, &PicardConfig::default()).is_err());
    }
    let start = conjugate_gradient(same, &good, Some(&normal(1, 5)), &CgConfig::default());
    assert!(matches!(start, Err(Error::ShapeMismatch { .. })));
    let nan = conjugate_gradient(|x| Ok((x * f64::NAN)?), &good, None, &CgConfig::default());
    assert!(matches!(nan, Err(Error::Diverged { .. })));
}

#[test]
fn configurations_that_make_no_sense_are_refused_by_name() {
    fn named(result: Result<()>, expected: &str) {
        match result {
            Err(Error::InvalidArgument { name, .. }) => assert_eq!(name, expected),
            other => panic!("{expected}: {other:?}"),
        }
    }
    let (cg, series, power) = (
        CgConfig::default(),
        NeumannConfig::default(),
        PowerConfig::default(),
    );
    let (ends, plain, fast) = (
        LanczosConfig::default(),
        PicardConfig::default(),
        AndersonConfig::default(),
    );
    for bad in [-1.0, f64::NAN, f64::INFINITY] {
        named(
            CgConfig {
                tolerance: bad,
                ..cg
            }
            .validate(),
            "tolerance",
        );
        named(
            NeumannConfig {
                tolerance: bad,
                ..series
            }
            .validate(),
            "tolerance",
        );
        named(
            NeumannConfig {
                step: bad,
                ..series
            }
            .validate(),
            "step",
        );
        named(
            PowerConfig {
                tolerance: bad,
                ..power
            }
            .validate(),
            "tolerance",
        );
        named(
            LanczosConfig {
                tolerance: bad,
                ..ends
            }
            .validate(),
            "tolerance",
        );
        named(
            PicardConfig {
                tolerance: bad,
                ..plain
            }
            .validate(),
            "tolerance",
        );
        named(
            PicardConfig {
                mixing: bad,
                ..plain
            }
            .validate(),
            "mixing",
        );
        named(
            AndersonConfig {
                regularization: bad,
                ..fast
            }
            .validate(),
            "regularization",
        );
        named(
            AndersonConfig {
                mixing: bad,
                ..fast
            }
            .validate(),
            "mixing",
        );
    }
    named(
        CgConfig {
            max_iterations: 0,
            ..cg
        }
        .validate(),
        "max_iterations",
    );
    named(
        NeumannConfig {
            max_terms: 0,
            ..series
        }
        .validate(),
        "max_terms",
    );
    named(
        NeumannConfig {
            max_growth: 1.0,
            ..series
        }
        .validate(),
        "max_growth",
    );
    named(
        PowerConfig {
            max_iterations: 0,
            ..power
        }
        .validate(),
        "max_iterations",
    );
    named(
        LanczosConfig {
            max_iterations: 1,
            smallest: 2,
            ..ends
        }
        .validate(),
        "max_iterations",
    );
    named(
        LanczosConfig {
            smallest: 0,
            largest: 0,
            ..ends
        }
        .validate(),
        "smallest and largest",
    );
    named(
        PicardConfig {
            max_growth: f64::NAN,
            ..plain
        }
        .validate(),
        "max_growth",
    );
    named(
        PicardConfig {
            mixing: 0.0,
            ..plain
        }
        .validate(),
        "mixing",
    );
    // The solvers look at their configuration.
    let b = normal(1, 3);
    assert!(conjugate_gradient(
        |x| Ok(x.clone()),
        &b,
        None,
        &CgConfig {
            max_iterations: 0,
            ..cg
        }
    )
    .is_err());
    assert!(anderson(
        |x| Ok(x.clone()),
        &b,
        &AndersonConfig {
            mixing: 2.0,
            ..fast
        }
    )
    .is_err());
}

#[test]
fn results_carry_no_graph() {
    let scale = Var::new(&[2.0_f64, 3.0], &CPU).unwrap();
    let b = Var::new(&[1.0_f64, 1.0], &CPU).unwrap();
    let apply = |x: &Tensor| Ok((x * scale.as_tensor())?);
    let cg = conjugate_gradient(apply, &b, None, &CgConfig::default()).unwrap();
    let halve = |x: &Tensor| Ok((x / scale.as_tensor())?);
    let fixed = anderson(halve, &b, &AndersonConfig::default()).unwrap();
    let pair = power_iteration(
        apply,
        &b,
        &PowerConfig::default(),
        &mut RandomStream::new(1),
    )
    .unwrap()
    .pair;
    assert!(!cg.x.track_op() && !fixed.x.track_op() && !pair.vector.track_op());
}

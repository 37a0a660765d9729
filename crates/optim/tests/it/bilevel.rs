use crate::support::*;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::Optimizer;
use optim::bilevel::*;
use optim::{Error, RandomStream};
use proptest::prelude::*;

#[test]
fn reference() {
    let report = FILES.verify("bo-rep", optim::verify::bo_rep);
    assert_passed(&report, |_| false);
    assert_eq!(report.comparisons.len(), 3 + 4 + 6 + 4 + 1);
}

/// A well-conditioned random quadratic.
fn quadratic(seed: u64, n: usize, d: usize) -> QuadraticProblem {
    let mut rng = RandomStream::new(seed);
    let root = normal(&mut rng, &[n, n], DType::F64);
    let square = root.matmul(&root.t().unwrap()).unwrap();
    let eye = Tensor::eye(n, DType::F64, &Device::Cpu).unwrap();
    let a = ((square / (4.0 * n as f64)).unwrap() + (eye * 0.5).unwrap()).unwrap();
    let b = normal(&mut rng, &[n, d], DType::F64);
    let (c, t) = (
        normal(&mut rng, &[n], DType::F64),
        normal(&mut rng, &[n], DType::F64),
    );
    QuadraticProblem::new(&a, &b, &c, &t)
        .unwrap()
        .with_direct(|x| x.powf(3.0))
}

fn start(seed: u64, n: usize, d: usize) -> (Tensor, Tensor) {
    let mut rng = RandomStream::new(seed ^ 77);
    (
        normal(&mut rng, &[d], DType::F64),
        normal(&mut rng, &[n], DType::F64),
    )
}

proptest! {
    #![proptest_config(cases(30))]

    #[test]
    fn estimators_agree(seed in 0u64..10_000, n in 1usize..7, d in 1usize..4, terms in 1usize..9) {
        let mut problem = quadratic(seed, n, d);
        let (x, y) = start(seed, n, d);
        let mut by = |solve| hypergradient(&mut problem, &x, &y, &solve, None).unwrap();
        let neumann = by(LinearSolve::Neumann { terms, lr: 0.3 });
        let fixed = by(LinearSolve::FixedPoint { iters: terms, lr: 0.3 });
        assert_close(&values(&neumann.z), &values(&fixed.z), 1e-12);
        prop_assert_eq!((neumann.hvps, fixed.hvps), (terms - 1, terms));
        let exact = by(LinearSolve::Exact);
        prop_assert!(exact.residual_norm < 1e-9);
        let cg = by(LinearSolve::ConjugateGradient { iters: n, tol: 0.0, damping: 0.0 });
        assert_close(&values(&cg.z), &values(&exact.z), 1e-9);
    }

    /// Against differences of the composed objective.
    #[test]
    fn the_hypergradient_is_a_gradient(seed in 0u64..10_000) {
        let (n, d, h) = (5, 3, 1e-5);
        let mut problem = quadratic(seed, n, d);
        let (x, _) = start(seed, n, d);
        let phi = |problem: &QuadraticProblem, x: &Tensor| {
            // The upper loss of the quadratic, from the gradient in y that it gives.
            let y = problem.minimizer(x).unwrap();
            let mut clone = quadratic(seed, n, d);
            let shift = clone.upper_grads(x, &y, &None).unwrap().y;
            let direct: f64 = values(x).iter().map(|x| x.powi(4) / 4.0).sum();
            direct + values(&shift).iter().map(|s| s * s / 2.0).sum::<f64>()
        };
        let y = problem.minimizer(&x).unwrap();
        let found = hypergradient(&mut problem, &x, &y, &LinearSolve::Exact, None).unwrap();
        let numeric: Vec<f64> = (0..d).map(|j| {
            let at = |sign: f64| {
                let mut moved = values(&x);
                moved[j] += sign * h;
                phi(&problem, &tensor(&moved))
            };
            (at(1.0) - at(-1.0)) / (2.0 * h)
        }).collect();
        assert_close(&values(&found.grad_x), &numeric, 1e-6);
        assert_close(&values(&problem.exact(&x).unwrap()), &numeric, 1e-6);
    }

    #[test]
    fn steps_have_their_length(seed in 0u64..10_000, eta in 0.001f64..2.0) {
        let mut problem = quadratic(seed, 4, 3);
        let (x, y) = start(seed, 4, 3);
        let config = BoRepConfig { eta, nu: 0.2, alpha: 0.2, ..BoRepConfig::default() };
        let mut method = BoRep::new(&x, &y, config).unwrap();
        for t in 0..6 {
            let before = method.x().clone();
            let report = method.step(&mut problem).unwrap();
            let step: f64 = values(&(method.x() - before).unwrap()).iter().map(|s| s * s).sum();
            let length = eta * report.momentum_norm / (report.momentum_norm + 1e-10);
            prop_assert!((step.sqrt() - length).abs() < 1e-7 * eta.max(1.0));
            prop_assert_eq!(report.y_updated, t > 0 && t % 2 == 0);
        }
    }
}

/// A problem that scales its upper loss.
struct Scaled(QuadraticProblem, f64);

impl BilevelProblem for Scaled {
    type Batch = Option<Tensor>;
    fn batch(&mut self, request: BatchRequest) -> optim::Result<Option<Tensor>> {
        self.0.batch(request)
    }
    fn lower_grad(&mut self, x: &Tensor, y: &Tensor, b: &Option<Tensor>) -> optim::Result<Tensor> {
        self.0.lower_grad(x, y, b)
    }
    fn upper_grads(
        &mut self,
        x: &Tensor,
        y: &Tensor,
        b: &Option<Tensor>,
    ) -> optim::Result<UpperGrads> {
        let grads = self.0.upper_grads(x, y, b)?;
        Ok(UpperGrads {
            value: None,
            x: grads.x.map(|g| g * self.1).transpose()?,
            y: (grads.y * self.1)?,
        })
    }
    /// `grad_x g = -B^T y`, so that the products are differences.
    fn lower_grad_upper(
        &mut self,
        x: &Tensor,
        y: &Tensor,
        b: &Option<Tensor>,
    ) -> optim::Result<Tensor> {
        self.0.cross_vjp(x, y, y, b)
    }
}

#[test]
fn the_scale_of_the_upper_loss_has_no_influence_on_normalized_steps() {
    let run = |scale: f64| {
        let mut problem = Scaled(quadratic(5, 4, 3), scale);
        let (x, y) = start(5, 4, 3);
        let config = BoRepConfig {
            eta: 0.05,
            nu: 0.2,
            alpha: 0.2,
            interval: 3,
            ..BoRepConfig::default()
        };
        let mut method = BoRep::new(&x, &y, config).unwrap();
        for _ in 0..20 {
            method.step(&mut problem).unwrap();
        }
        (values(method.x()), values(&(method.z() / scale).unwrap()))
    };
    let (one, ten) = (run(1.0), run(10.0));
    assert_close(&one.0, &ten.0, 1e-6);
    assert_close(&one.1, &ten.1, 1e-6);
}

#[test]
fn without_normalization_and_waiting_it_is_soba() {
    let (x, y) = start(6, 4, 3);
    let config = BoRepConfig {
        eta: 0.01,
        beta: 0.0,
        nu: 0.2,
        alpha: 0.2,
        interval: 1,
        lower_steps: 1,
        normalize: false,
        ..BoRepConfig::default()
    };
    let mut method = BoRep::new(&x, &y, config).unwrap();
    let mut problem = quadratic(6, 4, 3);
    method.step(&mut problem).unwrap();
    let (mut x, mut y, mut z) = (method.x().clone(), method.y().clone(), method.z().clone());
    let axpy = |a: &Tensor, s: f64, b: &Tensor| (a + (b * s).unwrap()).unwrap();
    for _ in 0..10 {
        method.step(&mut problem).unwrap();
        y = axpy(&y, -0.2, &problem.lower_grad(&x, &y, &None).unwrap());
        let upper = problem.upper_grads(&x, &y, &None).unwrap();
        let hz = problem.lower_hvp(&x, &y, &z, &None).unwrap();
        let cross = problem.cross_vjp(&x, &y, &z, &None).unwrap();
        x = axpy(&x, -0.01, &(upper.x.unwrap() - cross).unwrap());
        z = axpy(&z, -0.2, &(hz - upper.y).unwrap());
    }
    assert_close(&values(method.x()), &values(&x), 1e-12);
    assert_close(&values(method.y()), &values(&y), 1e-12);
}

#[test]
fn baselines_descend() {
    let gap = |x: &Tensor| {
        let exact = quadratic(7, 4, 3).exact(x).unwrap();
        values(&exact).iter().map(|g| g * g).sum::<f64>().sqrt()
    };
    let (x, y) = start(7, 4, 3);
    for beta in [0.0, 0.9] {
        let config = SobaConfig {
            eta: 0.002,
            alpha: 0.3,
            nu: 0.3,
            beta,
        };
        let mut soba = Soba::new(&x, &y, config).unwrap();
        let mut problem = quadratic(7, 4, 3);
        for _ in 0..4000 {
            soba.step(&mut problem).unwrap();
        }
        assert!(gap(soba.x()) < 0.05 * gap(&x), "{beta}: {}", gap(soba.x()));
    }
    let config = StocBioConfig {
        eta: 0.002,
        alpha: 0.3,
        ..StocBioConfig::default()
    };
    let mut method = StocBio::new(&x, &y, config).unwrap();
    let mut problem = quadratic(7, 4, 3);
    for _ in 0..2000 {
        assert!(method.step(&mut problem).unwrap().residual_norm.is_finite());
    }
    assert!(gap(method.x()) < 0.5 * gap(&x));
    assert_eq!(method.y().dims(), [4]);
    // A careful start.
    for init in [
        InitRefinement::Sgd {
            steps: 200,
            lr: 0.5,
        },
        InitRefinement::EpochSgd(EpochSgdConfig {
            lr1: 0.5,
            t1: 64,
            ..EpochSgdConfig::default()
        }),
    ] {
        let config = BoRepConfig {
            init,
            ..BoRepConfig::default()
        };
        let mut method = BoRep::new(&x, &y, config).unwrap();
        method.refine_init(&mut problem).unwrap();
        let best = problem.minimizer(&x).unwrap();
        assert_close(&values(method.y()), &values(&best), 0.05);
    }
}

/// One lower variable, one z and one momentum go through the tasks; x follows the mean momentum.
#[test]
fn tasks_share_their_momentum() {
    let (x, y) = start(5, 4, 3);
    let config = BoRepConfig {
        alpha: 0.0,
        eta: 0.3,
        ..BoRepConfig::default()
    };
    let mut tasks = [quadratic(5, 4, 3), quadratic(6, 4, 3), quadratic(7, 4, 3)];
    // The momenta that the tasks leave, from steps that do not move x.
    let still = BoRepConfig { eta: 0.0, ..config };
    let mut alone = BoRep::new(&x, &y, still).unwrap();
    let mut mean = vec![0.0; 3];
    for task in &mut tasks {
        alone.step(task).unwrap();
        let momentum = values(alone.momentum());
        mean.iter_mut()
            .zip(&momentum)
            .for_each(|(a, b)| *a += b / 3.0);
    }
    let mut together = BoRep::new(&x, &y, config).unwrap();
    let reports = together.step_tasks(&mut tasks).unwrap();
    let updated: Vec<bool> = reports.iter().map(|r| r.y_updated).collect();
    assert_eq!(updated, [true, false, true]);
    assert_eq!(bits(together.momentum()), bits(alone.momentum()));
    assert_eq!(bits(together.z()), bits(alone.z()));
    let length = mean.iter().map(|m| m * m).sum::<f64>().sqrt();
    let pairs = values(&x).into_iter().zip(&mean);
    let expected: Vec<f64> = pairs.map(|(x, m)| x - 0.3 * m / length).collect();
    assert_close(&values(together.x()), &expected, 1e-9);
    assert_eq!(together.steps(), 1);
    // The lower variable moves at the tasks that say so, and no task is an error.
    let moving = BoRepConfig {
        alpha: 0.1,
        ..config
    };
    let mut moving = BoRep::new(&x, &y, moving).unwrap();
    moving.step_tasks(&mut tasks).unwrap();
    assert_ne!(bits(moving.y()), bits(&y));
    assert!(matches!(
        moving.step_tasks(&mut tasks[..0]),
        Err(Error::TooFew { .. })
    ));
}

#[test]
fn baselines_resume() {
    let ((x, y), mut problem) = (start(9, 4, 3), quadratic(9, 4, 3));
    let mut soba = Soba::new(&x, &y, SobaConfig::default()).unwrap();
    let mut bio = StocBio::new(&x, &y, StocBioConfig::default()).unwrap();
    for _ in 0..3 {
        soba.step(&mut problem).unwrap();
        bio.step(&mut problem).unwrap();
    }
    let zero = x.zeros_like().unwrap();
    let mut soba_again = Soba::new(&zero, &y, SobaConfig::default()).unwrap();
    let mut bio_again = StocBio::new(&zero, &y, StocBioConfig::default()).unwrap();
    soba_again.load_state(&soba.state().unwrap()).unwrap();
    bio_again.load_state(&bio.state().unwrap()).unwrap();
    assert!(bio_again.load_state(&soba.state().unwrap()).is_err());
    soba.step(&mut problem).unwrap();
    bio.step(&mut problem).unwrap();
    soba_again.step(&mut problem).unwrap();
    bio_again.step(&mut problem).unwrap();
    assert_eq!(bits(soba.x()), bits(soba_again.x()));
    assert_eq!(bits(bio.x()), bits(bio_again.x()));
}

#[test]
fn resuming_gives_the_same_bits() {
    let (x, y) = start(8, 4, 3);
    let config = BoRepConfig {
        interval: 3,
        x_bounds: Some((-1.0, 1.0)),
        z_radius: Some(2.0),
        damping: 0.1,
        ..BoRepConfig::default()
    };
    let mut first = BoRep::new(&x, &y, config).unwrap();
    let mut problem = quadratic(8, 4, 3);
    for _ in 0..4 {
        first.step(&mut problem).unwrap();
    }
    let state = first.state().unwrap();
    let mut second = BoRep::new(&y.narrow(0, 0, 3).unwrap(), &y, config).unwrap();
    second.load_state(&state).unwrap();
    for _ in 0..5 {
        let a = first.step(&mut problem).unwrap();
        assert_eq!(a, second.step(&mut problem).unwrap());
    }
    assert_eq!(bits(first.x()), bits(second.x()));
    assert!(values(first.x()).iter().all(|x| x.abs() <= 1.0));
    let mut broken = state;
    broken.remove("z");
    assert!(second.load_state(&broken).is_err());
}

#[test]
fn errors_change_nothing() {
    let (x, y) = start(9, 4, 3);
    let mut method = BoRep::new(&x, &y, BoRepConfig::default()).unwrap();
    let nan = |request: BatchRequest| {
        let bad = request.oracle == Oracle::Upper;
        Ok(bad.then(|| tensor(&[f64::NAN; 4])))
    };
    let mut broken = quadratic(9, 4, 3).with_noise(nan);
    let error = method.step(&mut broken).unwrap_err();
    assert!(matches!(error, Error::NonFiniteGradient(_)), "{error}");
    assert_eq!((bits(method.x()), method.steps()), (bits(&x), 0));
    // Nothing to follow: the direction is zero, x stays and nothing becomes NaN.
    let eye = Tensor::eye(2, DType::F64, &Device::Cpu).unwrap();
    let zero = tensor(&[0.0, 0.0]);
    let mut flat = QuadraticProblem::new(&eye, &eye, &zero, &zero).unwrap();
    let mut method = BoRep::new(&zero, &zero, BoRepConfig::default()).unwrap();
    method.step(&mut flat).unwrap();
    assert_eq!(values(method.x()), [0.0, 0.0]);
    // An indefinite lower problem.
    let mut saddle = QuadraticProblem::new(&eye.neg().unwrap(), &eye, &zero, &zero).unwrap();
    let cg = LinearSolve::ConjugateGradient {
        iters: 5,
        tol: 1e-8,
        damping: 0.0,
    };
    let one = tensor(&[1.0, 1.0]);
    assert!(hypergradient(&mut saddle, &one, &one, &cg, None).is_err());
    let wrong = BoRep::new(&one, &one, BoRepConfig::default()).unwrap();
    assert!(wrong.with_start(&tensor(&[1.0]), &one).is_err());
    for bad in [
        BoRepConfig {
            interval: 0,
            ..BoRepConfig::default()
        },
        BoRepConfig {
            lower_steps: 0,
            ..BoRepConfig::default()
        },
        BoRepConfig {
            beta: 1.0,
            ..BoRepConfig::default()
        },
        BoRepConfig {
            radius: Some(0.0),
            ..BoRepConfig::default()
        },
        BoRepConfig {
            x_bounds: Some((1.0, -1.0)),
            ..BoRepConfig::default()
        },
    ] {
        assert!(matches!(
            BoRep::new(&one, &one, bad),
            Err(Error::InvalidConfig { .. })
        ));
    }
    let empty = Tensor::zeros(0, DType::F64, &Device::Cpu).unwrap();
    assert!(BoRep::new(&empty, &one, BoRepConfig::default()).is_err());
    let warm = tensor(&[1.0]);
    let fixed = LinearSolve::FixedPoint { iters: 1, lr: 0.1 };
    assert!(hypergradient(&mut flat, &one, &one, &fixed, Some(&warm)).is_err());
}

#[test]
fn the_upper_step_alone() {
    let w = var(&[3.0, 4.0]);
    let config = NormalizedMomentumSgdConfig {
        lr: 0.5,
        beta: 0.0,
        ..NormalizedMomentumSgdConfig::default()
    };
    let mut optimizer = NormalizedMomentumSgd::new(vec![w.clone()], config).unwrap();
    optimizer.step(&store(&w, &tensor(&[30.0, 40.0]))).unwrap();
    assert_close(&values(&w), &[2.7, 3.6], 1e-9);
    let error = optimizer.step(&store(&w, &tensor(&[f64::NAN, 1.0])));
    assert!(error.is_err());
    assert_close(&values(&w), &[2.7, 3.6], 1e-9);
    let state = optimizer.state().unwrap();
    let twin = Var::from_tensor(&w.as_detached_tensor().copy().unwrap()).unwrap();
    let mut second = NormalizedMomentumSgd::new(vec![twin.clone()], config).unwrap();
    second.load_state(&state).unwrap();
    optimizer.step(&store(&w, &tensor(&[1.0, -1.0]))).unwrap();
    second.step(&store(&twin, &tensor(&[1.0, -1.0]))).unwrap();
    assert_eq!(bits(&w), bits(&twin));
    assert!(second.load_state(&Default::default()).is_err());
}

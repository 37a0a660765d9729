use crate::support::*;
use candle_core::{DType, Device, Tensor, Var, D};
use candle_nn::{Optimizer, SGD};
use optim::sso::*;
use optim::{ClosureOptimizer, Error, RandomStream};
use proptest::prelude::*;

#[test]
fn reference() {
    let report = FILES.verify("sso", optim::verify::sso);
    assert_passed(&report, |_| false);
    assert_eq!(report.comparisons.len(), 4 * 5 + 3);
}

/// A linear model with squared or cross-entropy loss on random data.
struct Problem {
    x: Tensor,
    y: Tensor,
    labels: Tensor,
    w: Var,
}

impl Problem {
    fn new(seed: u64, n: usize, d: usize, c: usize) -> Self {
        let mut rng = RandomStream::new(seed);
        let labels: Vec<u32> = (0..n).map(|i| (i % c) as u32).collect();
        Self {
            x: normal(&mut rng, &[n, d], DType::F64),
            y: normal(&mut rng, &[n, c], DType::F64),
            labels: Tensor::new(labels, &Device::Cpu).unwrap(),
            w: normal_var(&mut rng, &[d, c], DType::F64),
        }
    }

    fn model(&self) -> impl Fn() -> candle_core::Result<Tensor> + '_ {
        || self.x.matmul(&self.w)
    }

    /// Mean over the batch of half the squared distance: smoothness 1 per example.
    fn squared(&self, z: &Tensor) -> candle_core::Result<Tensor> {
        (z - &self.y)?.sqr()?.sum(1)?.mean_all()? * 0.5
    }

    fn entropy(&self, z: &Tensor) -> candle_core::Result<Tensor> {
        let shifted = z.broadcast_sub(&z.detach().max_keepdim(D::Minus1)?)?;
        let sum = shifted.exp()?.sum_keepdim(D::Minus1)?;
        let log_p = shifted.broadcast_sub(&sum.log()?)?;
        log_p
            .gather(&self.labels.unsqueeze(1)?, 1)?
            .mean_all()?
            .neg()
    }

    fn sso(&self, config: SsoConfig) -> Sso<ArmijoGd> {
        let inner = ArmijoGd::new(vec![self.w.clone()], ArmijoGdConfig::default()).unwrap();
        Sso::new(vec![self.w.clone()], config, inner).unwrap()
    }
}

#[test]
fn one_plain_inner_step_is_sgd() {
    let (a, b) = (Problem::new(1, 8, 5, 3), Problem::new(1, 8, 5, 3));
    for eta in [0.01, 1.0, 50.0] {
        let config = SsoConfig {
            step_size: eta,
            inner_steps: 1,
            ..SsoConfig::default()
        };
        let inner = SGD::new(vec![a.w.clone()], 0.1).unwrap();
        let mut sso = Sso::new(vec![a.w.clone()], config, inner).unwrap();
        let mut sgd = SGD::new(vec![b.w.clone()], 0.1).unwrap();
        let oracle = AutogradLoss::new(|z: &Tensor| a.entropy(z));
        for _ in 0..5 {
            let report = sso.step(&a.model(), &oracle).unwrap();
            assert_eq!((report.model_calls, report.loss_calls), (1, 1));
            sgd.backward_step(&b.entropy(&b.model()().unwrap()).unwrap())
                .unwrap();
        }
        assert_eq!(oracle.calls(), 5);
        assert_close(&values(&a.w), &values(&b.w), 1e-12);
    }
}

#[test]
fn the_surrogate_starts_at_zero_with_the_losses_gradient() {
    let problem = Problem::new(2, 6, 4, 3);
    let z = problem.model()().unwrap();
    let oracle = AutogradLoss::new(|z: &Tensor| problem.entropy(z));
    let (_, grad) = oracle.value_and_grad(&z).unwrap();
    let rows = (grad * 6.0).unwrap();
    let (zd, direct) = (z.detach(), problem.entropy(&z).unwrap().backward().unwrap());
    for eta in [0.1, 3.0] {
        let surrogate = surrogate_squared(&z, &zd, &rows, eta).unwrap();
        assert!(values(&surrogate)[0].abs() < 1e-15);
        let found = surrogate.backward().unwrap();
        let (found, direct) = (
            found.get(&problem.w).unwrap(),
            direct.get(&problem.w).unwrap(),
        );
        assert_close(&values(found), &values(direct), 1e-12);
    }
    let official = surrogate_official(&z, &zd, &rows, 0.7).unwrap();
    let by_hand: f64 = values(&zd)
        .iter()
        .zip(values(&rows))
        .map(|(f, g)| 0.7 * f * g)
        .sum();
    assert!((values(&official)[0] - by_hand / 18.0).abs() < 1e-14);
}

/// Many inner steps on a linear model: the least-squares projection of the target step.
#[test]
fn many_inner_steps_project_the_target_step() {
    let problem = Problem::new(3, 12, 4, 2);
    let eta = 0.7;
    let z = problem.model()().unwrap().detach();
    let target = (&z - ((&z - &problem.y).unwrap() * eta).unwrap()).unwrap();
    let config = SsoConfig {
        step_size: eta,
        inner_steps: 3000,
        stop_grad_norm: 1e-12,
        ..SsoConfig::default()
    };
    let inner = SGD::new(vec![problem.w.clone()], 0.3).unwrap();
    let mut sso = Sso::new(vec![problem.w.clone()], config, inner).unwrap();
    let oracle = AutogradLoss::new(|z: &Tensor| problem.squared(z));
    sso.step(&problem.model(), &oracle).unwrap();
    // Normal equations: X^T (X w - target) = 0.
    let residual = (problem.x.matmul(&problem.w).unwrap() - target).unwrap();
    let normal = problem
        .x
        .t()
        .unwrap()
        .contiguous()
        .unwrap()
        .matmul(&residual)
        .unwrap();
    assert!(values(&normal).iter().all(|x| x.abs() < 1e-8), "{normal}");
}

proptest! {
    #![proptest_config(cases(100))]

    /// With a step size of at most 1/L the loss of the batch never rises.
    #[test]
    fn a_safe_step_never_raises_the_loss(seed in 0u64..100_000, m in 1usize..8, entropy: bool) {
        let problem = Problem::new(seed, 7, 4, 3);
        // L = 1 for half the square, 1/2 for cross entropy in logits.
        let eta = if entropy { 2.0 } else { 1.0 };
        let config = SsoConfig { step_size: eta, inner_steps: m, ..SsoConfig::default() };
        let mut sso = problem.sso(config);
        let oracle = AutogradLoss::new(|z: &Tensor| {
            if entropy { problem.entropy(z) } else { problem.squared(z) }
        });
        let mut last = f64::INFINITY;
        for _ in 0..4 {
            let report = sso.step(&problem.model(), &oracle).unwrap();
            prop_assert!(report.loss <= last + 1e-12, "{} after {}", report.loss, last);
            prop_assert!(!report.surrogate_increased);
            last = report.loss;
        }
        prop_assert_eq!(oracle.calls(), 4);
    }
}

#[test]
fn an_accepted_step_satisfies_armijo() {
    let problem = Problem::new(5, 10, 6, 3);
    let config = ArmijoGdConfig::default();
    let mut search = ArmijoGd::new(vec![problem.w.clone()], config).unwrap();
    let mut loss = || problem.entropy(&problem.model()()?);
    let mut steps = Vec::new();
    for _ in 0..30 {
        let found = search.step(&mut loss).unwrap();
        let now = values(&loss().unwrap())[0];
        assert!(found.accepted);
        assert!(now <= found.loss - config.c * found.step * found.grad_norm.powi(2) + 1e-14);
        steps.push(found.step);
    }
    assert_eq!(search.last_step(), steps.last().copied());
    // The state is one number, and continues with the same bits.
    let twin = Problem::new(5, 10, 6, 3);
    twin.w
        .set(&problem.w.as_detached_tensor().copy().unwrap())
        .unwrap();
    let mut resumed = ArmijoGd::new(vec![twin.w.clone()], config).unwrap();
    resumed.load_state(&search.state().unwrap()).unwrap();
    search.step(&mut loss).unwrap();
    resumed
        .step(&mut || twin.entropy(&twin.model()()?))
        .unwrap();
    assert_eq!(bits(&problem.w), bits(&twin.w));
    assert!(resumed.load_state(&Default::default()).is_err());
}

#[test]
fn a_line_search_at_a_minimum_or_a_cliff() {
    let w = var(&[0.0, 0.0]);
    let mut search = ArmijoGd::new(vec![w.clone()], ArmijoGdConfig::default()).unwrap();
    for _ in 0..5 {
        let found = search.step(&mut || w.sqr()?.sum_all()).unwrap();
        assert_eq!((found.step, found.backtracks), (0.0, 0));
    }
    assert_eq!(search.last_step(), None, "the step size must not grow");
    // Every trial is infinite: the search gives up where it began.
    let w = var(&[1.0]);
    let mut calls = 0;
    let mut cliff = || {
        calls += 1;
        let loss = w.sum_all()?;
        if calls == 1 {
            Ok(loss)
        } else {
            loss / 0.0
        }
    };
    let mut search = ArmijoGd::new(vec![w.clone()], ArmijoGdConfig::default()).unwrap();
    let found = search.step(&mut cliff).unwrap();
    assert!(!found.accepted && found.step == 0.0 && found.backtracks > 10);
    assert_eq!(values(&w), [1.0]);
    let mut nan = || w.sum_all()? * f64::NAN;
    assert!(matches!(
        search.step(&mut nan),
        Err(Error::NonFiniteLoss { .. })
    ));
    assert_eq!(values(&w), [1.0]);
}

#[test]
fn the_target_search_asks_for_values_only() {
    let problem = Problem::new(6, 9, 5, 3);
    let config = SsoConfig {
        step_size: 1000.0,
        inner_steps: 3,
        target_search: Some(ArmijoTarget::default()),
        ..SsoConfig::default()
    };
    let mut sso = problem.sso(config);
    let oracle = AutogradLoss::new(|z: &Tensor| problem.squared(z));
    let first = sso.step(&problem.model(), &oracle).unwrap();
    // For half the square the largest step that Armijo allows with c = 1/2 is 1.
    assert!(first.eta <= 1.0 + 1e-9 && first.eta > 0.85, "{}", first.eta);
    assert_eq!(
        (oracle.calls(), oracle.value_calls()),
        (1, first.value_calls)
    );
    assert!(first.value_calls > 1);
    let second = sso.step(&problem.model(), &oracle).unwrap();
    assert!(second.eta <= 1.0 + 1e-9 && second.value_calls < first.value_calls);
}

#[test]
fn step_sizes_follow_schedule_and_history() {
    let etas = |schedule| {
        let problem = Problem::new(7, 6, 4, 3);
        let config = SsoConfig {
            step_size: 0.8,
            inner_steps: 1,
            schedule,
            ..SsoConfig::default()
        };
        let mut sso = problem.sso(config);
        let oracle = AutogradLoss::new(|z: &Tensor| problem.squared(z));
        let mut step = || sso.step(&problem.model(), &oracle).unwrap().eta;
        [step(), step(), step(), step()]
    };
    assert_eq!(etas(StepSchedule::Constant), [0.8; 4]);
    let roots = [1.0, 2.0, 3.0, 4.0].map(|t: f64| 0.8 / t.sqrt());
    assert_close(&etas(StepSchedule::InvSqrt), &roots, 1e-15);
    let powers = [1.0, 2.0, 3.0, 4.0].map(|t: f64| 0.8 * 0.25f64.powf(t / 4.0));
    assert_close(
        &etas(StepSchedule::Exponential { total: 4 }),
        &powers,
        1e-15,
    );
}

/// All variants descend on the same problem, in both normalizations.
#[test]
fn every_variant_descends() {
    for normalization in [Normalization::Paper, Normalization::Official] {
        for (divergence, adaptive) in [
            (Divergence::Euclidean, Adaptive::None),
            (Divergence::Euclidean, Adaptive::Scalar),
            (Divergence::Euclidean, Adaptive::Diagonal),
            (Divergence::DiagonalAdaptive, Adaptive::None),
            (Divergence::Kl, Adaptive::None),
            (Divergence::Kl, Adaptive::Scalar),
        ] {
            let problem = Problem::new(8, 9, 5, 3);
            let config = SsoConfig {
                step_size: 0.5,
                inner_steps: 5,
                divergence,
                adaptive,
                normalization,
                ..SsoConfig::default()
            };
            let mut sso = problem.sso(config);
            let factor = match normalization {
                Normalization::Paper => 1.0,
                Normalization::Official => 9.0,
            };
            let oracle = AutogradLoss::new(|z: &Tensor| {
                let loss = match divergence {
                    // A function of probabilities: the squared distance to the labels.
                    Divergence::Kl => {
                        let own = z.gather(&problem.labels.unsqueeze(1)?, 1)?;
                        (own - 1.0)?.sqr()?.mean_all()?
                    }
                    _ => problem.entropy(z)?,
                };
                loss * factor
            });
            let mut losses = Vec::new();
            for _ in 0..12 {
                losses.push(sso.step(&problem.model(), &oracle).unwrap().loss);
            }
            let (first, last) = (losses[0], losses[11]);
            assert!(
                last < 0.9 * first,
                "{divergence:?} {adaptive:?} {normalization:?}: {first} to {last}"
            );
        }
    }
}

#[test]
fn diagonal_forms_have_their_closed_minimizers() {
    // A model that is the targets themselves: minimizing the surrogate gives the target step.
    let g = tensor(&[2.0, -0.5, 1.0]).reshape((3, 1)).unwrap();
    for (divergence, adaptive) in [
        (Divergence::DiagonalAdaptive, Adaptive::None),
        (Divergence::Euclidean, Adaptive::Diagonal),
    ] {
        let z = Var::zeros((3, 1), DType::F64, &Device::Cpu).unwrap();
        let config = SsoConfig {
            step_size: 0.4,
            inner_steps: 4000,
            divergence,
            adaptive,
            stop_grad_norm: 1e-11,
            ..SsoConfig::default()
        };
        let inner = SGD::new(vec![z.clone()], 0.3).unwrap();
        let mut sso = Sso::new(vec![z.clone()], config, inner).unwrap();
        let oracle = AutogradLoss::new(|z: &Tensor| (z * &g)?.mean_all());
        sso.step(&|| Ok(z.as_tensor().clone()), &oracle).unwrap();
        // AdaGrad's first step: eta sign(g), up to the small constant.
        assert_close(&values(&z), &[-0.4, 0.4, -0.4], 1e-5);
    }
}

#[test]
fn odd_shapes_are_flattened() {
    // One example with one target, and targets of rank 3.
    for shape in [vec![1, 1], vec![4], vec![2, 3, 2]] {
        let z = Var::ones(shape.as_slice(), DType::F64, &Device::Cpu).unwrap();
        let config = SsoConfig {
            step_size: 0.5,
            inner_steps: 20,
            ..SsoConfig::default()
        };
        let inner = ArmijoGd::new(vec![z.clone()], ArmijoGdConfig::default()).unwrap();
        let mut sso = Sso::new(vec![z.clone()], config, inner).unwrap();
        let n = shape[0] as f64;
        let oracle = AutogradLoss::new(|t: &Tensor| {
            assert_eq!(t.dims(), shape.as_slice());
            t.sqr()?.sum_all()? / (2.0 * n)
        });
        sso.step(&|| Ok(z.as_tensor().clone()), &oracle).unwrap();
        assert!(values(&z).iter().all(|x| (x - 0.5).abs() < 1e-3), "{z}");
    }
}

#[test]
fn errors_put_the_parameters_back() {
    let problem = Problem::new(9, 6, 4, 3);
    let before = bits(&problem.w);
    let mut sso = problem.sso(SsoConfig::default());
    let nan = AutogradLoss::new(|z: &Tensor| problem.squared(z)? * f64::NAN);
    let error = sso.step(&problem.model(), &nan).unwrap_err();
    assert!(matches!(error, Error::NonFiniteLoss { .. }));
    assert_eq!(bits(&problem.w), before);
    // The model changes its shape in the middle.
    let calls = std::cell::Cell::new(0);
    let shifting = || {
        calls.set(calls.get() + 1);
        let rows = if calls.get() > 2 { 5 } else { 6 };
        problem.x.narrow(0, 0, rows)?.matmul(&problem.w)
    };
    let oracle = AutogradLoss::new(|z: &Tensor| problem.squared(z));
    let error = sso.step(&shifting, &oracle).unwrap_err();
    assert!(matches!(error, Error::Shape { .. }), "{error}");
    assert_eq!(bits(&problem.w), before);
    // A loss that does not depend on the targets has no gradient.
    let constant = AutogradLoss::new(|z: &Tensor| z.detach().sum_all());
    assert!(sso.step(&problem.model(), &constant).is_err());
    // Adaptation per coordinate needs the same batch.
    let diagonal = SsoConfig {
        adaptive: Adaptive::Diagonal,
        ..SsoConfig::default()
    };
    let mut sso = problem.sso(diagonal);
    sso.step(&problem.model(), &oracle).unwrap();
    let fewer = || problem.x.narrow(0, 0, 5)?.matmul(&problem.w);
    let part = AutogradLoss::new(|z: &Tensor| z.sqr()?.mean_all());
    assert!(matches!(sso.step(&fewer, &part), Err(Error::Shape { .. })));
}

#[test]
fn the_decrease_ratio_and_a_resumed_run() {
    let problem = Problem::new(10, 8, 5, 3);
    let config = SsoConfig {
        step_size: 1.0,
        inner_steps: 4,
        adaptive: Adaptive::Diagonal,
        measure_decrease: true,
        ..SsoConfig::default()
    };
    let mut plain = problem.sso(SsoConfig {
        adaptive: Adaptive::None,
        ..config
    });
    let oracle = AutogradLoss::new(|z: &Tensor| problem.squared(z));
    let report = plain.step(&problem.model(), &oracle).unwrap();
    // At the step size 1/L of a quadratic the surrogate is the loss.
    assert!((report.decrease_ratio.unwrap() - 1.0).abs() < 1e-9);
    assert_eq!(report.value_calls, 1);

    let mut first = problem.sso(config);
    first.step(&problem.model(), &oracle).unwrap();
    first.step(&problem.model(), &oracle).unwrap();
    let twin = Problem::new(10, 8, 5, 3);
    twin.w
        .set(&problem.w.as_detached_tensor().copy().unwrap())
        .unwrap();
    let mut second = twin.sso(config);
    second.load_state(&first.state().unwrap()).unwrap();
    let again = AutogradLoss::new(|z: &Tensor| twin.squared(z));
    for _ in 0..3 {
        let a = first.step(&problem.model(), &oracle).unwrap();
        let b = second.step(&twin.model(), &again).unwrap();
        assert_eq!(a, b);
    }
    assert_eq!(bits(&problem.w), bits(&twin.w));
    assert!(second.load_state(&Default::default()).is_err());
}

#[test]
fn bad_configurations_are_named() {
    type Change = fn(&mut SsoConfig);
    let cases: [(Change, &str); 7] = [
        (|c| c.step_size = 0.0, "step_size"),
        (|c| c.inner_steps = 0, "inner_steps"),
        (|c| c.stop_grad_norm = f64::NAN, "stop_grad_norm"),
        (
            |c| c.schedule = StepSchedule::Exponential { total: 0 },
            "total",
        ),
        (
            |c| {
                c.target_search = Some(ArmijoTarget::default());
                c.divergence = Divergence::Kl;
            },
            "target_search",
        ),
        (
            |c| {
                c.target_search = Some(ArmijoTarget {
                    c: 1.0,
                    ..ArmijoTarget::default()
                })
            },
            "ArmijoTarget::c",
        ),
        (
            |c| {
                c.divergence = Divergence::Kl;
                c.adaptive = Adaptive::Diagonal;
            },
            "adaptive",
        ),
    ];
    for (change, field) in cases {
        let mut config = SsoConfig::default();
        change(&mut config);
        let message = config.validate().unwrap_err().to_string();
        assert!(message.contains(field), "{message}");
    }
    let bad = ArmijoGdConfig {
        shrink: 1.0,
        ..ArmijoGdConfig::default()
    };
    assert!(ArmijoGd::new(vec![], bad).is_err());
}

use crate::support::*;
use candle_core::{DType, Device, Tensor};
use optim::consensus::diagnostics::*;
use optim::consensus::test_functions::*;
use optim::consensus::*;
use optim::{Error, RandomStream};
use proptest::prelude::*;

#[test]
fn reference() {
    let report = FILES.verify("cbo", optim::verify::cbo);
    assert_passed(&report, |_| false);
    assert_eq!(report.comparisons.len(), 4 + 2 + 2 + 5 * 3 + 4 + 1 + 2);
}

fn cloud(seed: u64, n: usize, d: usize) -> Tensor {
    let mut rng = RandomStream::new(seed);
    rng.normal(1.0, 2.0, (n, d), DType::F64, &Device::Cpu)
        .unwrap()
}

/// Rastrigin's function, moved.
fn shifted(by: f64) -> PerParticle {
    let inner = |x: f64| x * x + 2.5 * (1.0 - (std::f64::consts::TAU * x).cos());
    PerParticle::new(move |x| x.iter().map(|x| inner(x - by)).sum())
}

fn run_steps(
    config: CboConfig,
    start: &Tensor,
    objective: &dyn Objective,
    steps: usize,
) -> Vec<f64> {
    let mut cbo = Cbo::new(start, config, RandomStream::new(9)).unwrap();
    for _ in 0..steps {
        cbo.step(objective).unwrap();
    }
    values(&cbo.particles().unwrap())
}

proptest! {
    #![proptest_config(cases(60))]

    #[test]
    fn the_consensus_ignores_offsets_and_order(seed in 0u64..10_000, n in 1usize..40, d in 1usize..5,
                                               alpha in 0.0f64..50.0, offset in -100.0f64..100.0) {
        let v = cloud(seed, n, d);
        let e = rastrigin().values(&v).unwrap();
        let point = values(&consensus_point(&v, &e, alpha).unwrap());
        let moved = consensus_point(&v, &(&e + offset).unwrap(), alpha).unwrap();
        assert_close(&values(&moved), &point, 1e-9);
        let order = RandomStream::new(seed).permutation(n).unwrap();
        let order = Tensor::new(order, &Device::Cpu).unwrap();
        let (v2, e2) = (v.index_select(&order, 0).unwrap(), e.index_select(&order, 0).unwrap());
        assert_close(&values(&consensus_point(&v2, &e2, alpha).unwrap()), &point, 1e-9);
        let mean = values(&v.mean(0).unwrap());
        assert_close(&values(&consensus_point(&v, &e, 0.0).unwrap()), &mean, 1e-12);
        let lowest = e.argmin(0).unwrap().to_scalar::<u32>().unwrap() as usize;
        let best = values(&v.get(lowest).unwrap());
        assert_close(&values(&consensus_point(&v, &e, 1e15).unwrap()), &best, 1e-12);
    }

    /// Without noise and with `lambda dt = 1` everybody is at the consensus after one step, and
    /// with less everybody has come nearer by the factor `1 - lambda dt`.
    #[test]
    fn the_drift_contracts(seed in 0u64..10_000, rate in 0.01f64..1.0) {
        let v = cloud(seed, 9, 3);
        let config = CboConfig { sigma: 0.0, lambda: rate / 0.01, alpha: 3.0, ..CboConfig::default() };
        let point = values(&consensus_point(&v, &rastrigin().values(&v).unwrap(), 3.0).unwrap());
        let after = run_steps(config, &v, &rastrigin(), 1);
        for (row, old) in after.chunks(3).zip(values(&v).chunks(3)) {
            for ((x, old), c) in row.iter().zip(old).zip(&point) {
                prop_assert!((x - c - (1.0 - rate) * (old - c)).abs() < 1e-9);
            }
        }
    }

    #[test]
    fn moving_everything_moves_the_result(seed in 0u64..1000, by in -5.0f64..5.0, memory: bool) {
        let v = cloud(seed, 10, 2);
        let memory = memory.then(|| Memory { sigma2: 0.2, ..Memory::default() });
        let config = CboConfig { sigma: 0.5, alpha: 5.0, memory, ..CboConfig::default() };
        let here = run_steps(config.clone(), &v, &shifted(0.0), 4);
        let there = run_steps(config, &(&v + by).unwrap(), &shifted(by), 4);
        let back: Vec<f64> = there.iter().map(|x| x - by).collect();
        assert_close(&back, &here, 1e-6);
    }

    #[test]
    fn memories_only_improve(seed in 0u64..1000) {
        let config = CboConfig { sigma: 2.0, memory: Some(Memory::default()), ..CboConfig::default() };
        let mut cbo = Cbo::new(&cloud(seed, 12, 3), config, RandomStream::new(seed)).unwrap();
        let objective = rastrigin();
        let energies = |cbo: &Cbo| values(&objective.values(&cbo.memories().unwrap().unwrap()).unwrap());
        let mut last = energies(&cbo);
        for _ in 0..10 {
            cbo.step(&objective).unwrap();
            let now = energies(&cbo);
            prop_assert!(now.iter().zip(&last).all(|(a, b)| a <= b));
            last = now;
        }
    }

    #[test]
    fn particles_stay_in_the_box(seed in 0u64..1000, reflect: bool) {
        let rule = if reflect { BoundsRule::Reflect } else { BoundsRule::Clamp };
        let bounds = Bounds { low: vec![-1.0], high: vec![0.5, 2.0, 3.0], rule };
        let config = CboConfig { sigma: 5.0, bounds: Some(bounds), ..CboConfig::default() };
        let after = run_steps(config, &cloud(seed, 10, 3), &rastrigin(), 3);
        for row in after.chunks(3) {
            prop_assert!(row.iter().zip([0.5, 2.0, 3.0]).all(|(x, high)| *x >= -1.0 && *x <= high));
        }
    }
}

#[test]
fn truncation_at_its_ends() {
    let v = cloud(3, 20, 3);
    for diffusion in [Diffusion::Isotropic, Diffusion::Anisotropic] {
        let base = CboConfig {
            diffusion,
            ..CboConfig::default()
        };
        let with = |truncation, sigma| {
            let config = CboConfig {
                truncation,
                sigma,
                ..base.clone()
            };
            run_steps(config, &v, &rastrigin(), 5)
        };
        assert_eq!(with(Some(f64::INFINITY), 1.0), with(None, 1.0));
        assert_eq!(with(Some(0.0), 1.0), with(None, 0.0));
        assert_ne!(with(Some(0.1), 1.0), with(None, 1.0));
    }
}

#[test]
fn hopping_on_a_quadratic_is_an_implicit_step() {
    let center = [1.0, -0.5];
    let bowl = PerParticle::new(move |x| {
        x.iter()
            .zip(center)
            .map(|(x, c)| (x - c) * (x - c) / 2.0)
            .sum()
    });
    let (alpha, tau) = (10.0_f64, 0.05);
    let hopping = ConsensusHopping {
        alpha,
        sigma: (tau / alpha).sqrt(),
        n: 1_000_000,
        sigma_decay: None,
    };
    let x0 = tensor(&[2.0, 3.0]);
    let found = hopping
        .run(&bowl, &x0, 0, &mut RandomStream::new(1))
        .unwrap();
    let grad = |x: &Tensor| Ok((x - tensor(&center))?);
    let implicit = implicit_step(grad, &x0, tau).unwrap();
    // In closed form: x - tau / (1 + tau) (x - c).
    let closed = [2.0 - tau / (1.0 + tau), 3.0 - tau / (1.0 + tau) * 3.5];
    assert_close(&values(&implicit), &closed, 1e-10);
    assert_close(&values(&found.consensus), &values(&implicit), 1e-3);
    let relaxation = relaxation_residual(
        &Tensor::stack(&[x0, implicit], 0).unwrap(),
        |x| Ok(x.broadcast_sub(&tensor(&center))?),
        tau,
    )
    .unwrap();
    // Explicit and implicit step differ by tau^2 of the gradient.
    assert!(relaxation.explicit[0] < 1.1 * tau * relaxation.steps[0]);
}

#[test]
fn gradients_by_hand_by_candle_and_by_differences() {
    let v = cloud(5, 6, 3);
    for function in [rastrigin(), ackley(), w_shaped()] {
        let exact = function.gradients(&v).unwrap().unwrap();
        let numeric = finite_difference_gradients(&function, &v, 1e-5).unwrap();
        assert_close(&values(&numeric), &values(&exact), 1e-6);
    }
    let differentiable = Differentiable(|v: &Tensor| v.sqr()?.sum(1));
    let grads = differentiable.gradients(&v).unwrap().unwrap();
    assert_close(&values(&grads), &values(&(v * 2.0).unwrap()), 1e-12);
    let origin = Tensor::zeros((2, 3), DType::F64, &Device::Cpu).unwrap();
    assert_eq!(
        values(&ackley().gradients(&origin).unwrap().unwrap()),
        [0.0; 6]
    );
    assert!(values(&grand_canyon(true).values(&origin).unwrap())[0].is_nan());
}

#[test]
fn resuming_gives_the_same_bits() {
    let batched = CboConfig {
        batching: Some(Batching {
            particles: 4,
            update: BatchUpdate::Full,
        }),
        stall_kick: Some(10.0),
        cooling: Some(Cooling::default()),
        particle_reduction: Some(0.2),
        ..CboConfig::default()
    };
    let smooth = Memory {
        acceptance: Acceptance::Tanh(3.0),
        ..Memory::default()
    };
    let with_memory = |memory| CboConfig {
        memory: Some(memory),
        effective_fraction: Some(0.3),
        ..CboConfig::default()
    };
    for config in [
        CboConfig::default(),
        batched,
        with_memory(Memory::default()),
        with_memory(smooth),
    ] {
        let start = cloud(7, 12, 3);
        let mut first = Cbo::new(&start, config.clone(), RandomStream::new(1)).unwrap();
        for _ in 0..3 {
            first.step(&rastrigin()).unwrap();
        }
        first.end_epoch().unwrap();
        let state = first.state().unwrap();
        let mut second = Cbo::new(&cloud(8, 12, 3), config, RandomStream::new(2)).unwrap();
        second.step(&rastrigin()).unwrap();
        second.load_state(&state).unwrap();
        for _ in 0..3 {
            first.step(&rastrigin()).unwrap();
            second.step(&rastrigin()).unwrap();
            first.end_epoch().unwrap();
            second.end_epoch().unwrap();
        }
        let (a, b) = (first.state().unwrap(), second.state().unwrap());
        assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
        for (name, tensor) in &a {
            assert_eq!(bits(tensor), bits(&b[name]), "{name}");
        }
        let mut broken = state.clone();
        broken.remove("numbers");
        broken.insert("more".into(), tensor(&[1.0]));
        let message = second.load_state(&broken).unwrap_err().to_string();
        assert!(message.contains("numbers") && message.contains("more"));
    }
}

#[test]
fn an_ensemble_is_its_runs() {
    for memory in [None, Some(Memory::default())] {
        let make = |seed: u64| {
            let config = CboConfig {
                memory,
                ..CboConfig::default()
            };
            Cbo::new(
                &cloud(seed, 5 + seed as usize, 2),
                config,
                RandomStream::new(seed),
            )
            .unwrap()
        };
        let mut ensemble = CboEnsemble::new(vec![make(1), make(2)]).unwrap();
        let (mut one, mut two) = (make(1), make(2));
        for _ in 0..4 {
            ensemble.step(&rastrigin()).unwrap();
            one.step(&rastrigin()).unwrap();
            two.step(&rastrigin()).unwrap();
        }
        for (together, alone) in ensemble.runs().iter().zip([&one, &two]) {
            let (a, b) = (together.particles().unwrap(), alone.particles().unwrap());
            assert_eq!(bits(&a), bits(&b));
        }
        let points = ensemble.consensus(&rastrigin()).unwrap();
        assert_eq!(points.dims(), [2, 2]);
    }
}

#[test]
fn a_run_ends_for_its_reason() {
    let run = |config: CboConfig| {
        let mut cbo = Cbo::new(&cloud(11, 50, 2), config, RandomStream::new(3)).unwrap();
        cbo.run(&rastrigin()).unwrap()
    };
    let base = CboConfig {
        sigma: 0.5,
        alpha: 100.0,
        ..CboConfig::default()
    };
    let report = run(CboConfig {
        max_evaluations: Some(1000),
        ..base.clone()
    });
    assert_eq!((report.stopped, report.steps), (Stop::Evaluations, 20));
    let report = run(CboConfig {
        tol: 1e-3,
        max_steps: 5000,
        ..base.clone()
    });
    assert_eq!(report.stopped, Stop::Spread);
    assert!(report.best_energy < 1e-2);
    let report = run(CboConfig {
        target_energy: Some(1e-1),
        ..base.clone()
    });
    assert_eq!(report.stopped, Stop::Energy);
    let report = run(CboConfig {
        max_steps: 7,
        ..base
    });
    assert_eq!((report.stopped, report.steps), (Stop::Steps, 7));
    assert_eq!(report.trajectory.unwrap().dims(), [7, 2]);
}

#[test]
fn epochs_cool_and_remove_particles() {
    let config = CboConfig {
        sigma: 0.1,
        lambda: 5.0,
        batching: Some(Batching {
            particles: 5,
            update: BatchUpdate::Partial,
        }),
        cooling: Some(Cooling::default()),
        particle_reduction: Some(0.5),
        ..CboConfig::default()
    };
    let mut cbo = Cbo::new(&cloud(13, 40, 3), config, RandomStream::new(4)).unwrap();
    for epoch in 1..=3u32 {
        for _ in 0..10 {
            cbo.step(&rastrigin()).unwrap();
        }
        cbo.end_epoch().unwrap();
        let (sigma, alpha) = cbo.temperature();
        assert!((sigma - 0.1 / f64::from(epoch + 2).log2()).abs() < 1e-15);
        assert_eq!(alpha, 100.0 * f64::powi(2.0, epoch as i32));
        assert!(cbo.len().is_multiple_of(5));
    }
    assert!(cbo.len() < 40, "{}", cbo.len());
}

/// Without batches too, and a memory goes where its particle goes.
#[test]
fn particles_are_removed_with_their_memories() {
    for memory in [None, Some(Memory::default())] {
        let config = CboConfig {
            sigma: 0.05,
            lambda: 5.0,
            memory,
            particle_reduction: Some(0.5),
            ..CboConfig::default()
        };
        let mut cbo = Cbo::new(&cloud(13, 40, 3), config, RandomStream::new(4)).unwrap();
        for _ in 0..19 {
            cbo.step(&rastrigin()).unwrap();
        }
        let evaluations = cbo.step(&rastrigin()).unwrap().evaluations;
        let rows = |t: &Tensor| t.to_vec2::<f64>().unwrap();
        let pairs = |cbo: &Cbo<RandomStream>| {
            let memories = cbo.memories().unwrap();
            let positions = rows(&cbo.particles().unwrap());
            let memories = memories.map_or_else(|| positions.clone(), |m| rows(&m));
            positions.into_iter().zip(memories).collect::<Vec<_>>()
        };
        let before = pairs(&cbo);
        cbo.end_epoch().unwrap();
        assert!(cbo.len() < 40, "{}", cbo.len());
        assert!(pairs(&cbo).iter().all(|pair| before.contains(pair)));
        // Remembered energies go along: only the 40 positions after the step before were evaluated.
        let fresh = if memory.is_some() {
            40
        } else {
            cbo.len() as u64
        };
        let after = cbo.step(&rastrigin()).unwrap().evaluations;
        assert_eq!(after, evaluations + fresh);
    }
}

#[test]
fn stalled_particles_are_kicked() {
    let same = Tensor::zeros((6, 2), DType::F64, &Device::Cpu).unwrap();
    let batching = Some(Batching {
        particles: 3,
        update: BatchUpdate::Full,
    });
    let with = |stall_kick| CboConfig {
        batching,
        stall_kick,
        ..CboConfig::default()
    };
    assert_eq!(run_steps(with(None), &same, &rastrigin(), 2), [0.0; 12]);
    let kicked = run_steps(with(Some(1e-5)), &same, &rastrigin(), 2);
    assert!(kicked.iter().all(|x| *x != 0.0));
}

#[test]
fn the_effective_number_is_kept() {
    let config = CboConfig {
        effective_fraction: Some(0.25),
        ..CboConfig::default()
    };
    let mut cbo = Cbo::new(&cloud(17, 200, 3), config, RandomStream::new(5)).unwrap();
    for _ in 0..5 {
        let report = cbo.step(&rastrigin()).unwrap();
        assert!(
            (report.effective - 50.0).abs() < 0.5,
            "{}",
            report.effective
        );
    }
}

#[test]
fn energies_that_are_no_numbers() {
    // Half of the space is forbidden.
    let half = PerParticle::new(|x| {
        if x[0] < 0.0 {
            f64::NAN
        } else {
            x[0] + x[1].abs()
        }
    });
    let config = CboConfig::default();
    let mut cbo = Cbo::new(&cloud(19, 30, 2), config.clone(), RandomStream::new(6)).unwrap();
    let report = cbo.step(&half).unwrap();
    assert!(values(&report.consensus).iter().all(|x| x.is_finite()));
    assert!(report.best >= 0.0);
    let nowhere = PerParticle::new(|_| f64::INFINITY);
    let before = values(&cbo.particles().unwrap());
    let error = cbo.step(&nowhere).unwrap_err();
    assert!(matches!(error, Error::NonFiniteLoss { .. }), "{error}");
    assert_eq!(values(&cbo.particles().unwrap()), before);
    let wrong = |v: &Tensor| v.sum_all()?.reshape(1);
    assert!(matches!(cbo.step(&wrong), Err(Error::Shape { .. })));
    // Equal energies everywhere: the mean.
    let flat = |v: &Tensor| v.sum(1)?.affine(0.0, 1.0);
    let point = cbo.consensus(&flat).unwrap();
    let mean = cbo.particles().unwrap().mean(0).unwrap();
    assert_close(&values(&point), &values(&mean), 1e-12);
}

#[test]
fn polarized_points_stay_near_their_particles() {
    let v = Tensor::new(&[[0f64], [0.1], [5.0], [5.1]], &Device::Cpu).unwrap();
    let e = Tensor::new(&[1f64, 0.0, 2.0, 0.5], &Device::Cpu).unwrap();
    let near = values(&polarized_consensus(&v, &e, 100.0, 0.3).unwrap());
    assert_close(&near, &[0.1, 0.1, 5.1, 5.1], 1e-3);
    let far = values(&polarized_consensus(&v, &e, 1.0, 1e6).unwrap());
    let one = values(&consensus_point(&v, &e, 1.0).unwrap())[0];
    assert_close(&far, &[one; 4], 1e-9);
    let clouds = Tensor::stack(&[&v, &v], 0).unwrap();
    let energies = Tensor::stack(&[&e, &e], 0).unwrap();
    let points = consensus_points(&clouds, &energies, 1.0).unwrap();
    assert_close(&values(&points), &[one, one], 1e-12);
}

#[test]
fn single_precision_and_langevin() {
    let start = cloud(23, 20, 2).to_dtype(DType::F32).unwrap();
    let config = CboConfig {
        sigma: 0.4,
        ..CboConfig::default()
    };
    let mut cbo = Cbo::new(&start, config, RandomStream::new(1)).unwrap();
    let report = cbo.run(&rastrigin()).unwrap();
    assert_eq!(report.consensus.dtype(), DType::F32);
    let descent = Langevin {
        sigma: 0.0,
        lr: 10.0,
        ..Langevin::default()
    };
    let bowl = |v: &Tensor| v.sqr()?.sum(1);
    let mut seen = 0;
    let end = descent
        .run(
            &bowl,
            &cloud(29, 4, 2),
            300,
            &mut RandomStream::new(2),
            |_, _| seen += 1,
        )
        .unwrap();
    assert!(seen == 300 && values(&end).iter().all(|x| x.abs() < 0.05));
    let noisy = Langevin::default();
    let steep = PerParticle::new(|x| x[0]).with_gradient(|_, g| g[0] = f64::INFINITY);
    let one = Tensor::zeros((1, 1), DType::F64, &Device::Cpu).unwrap();
    assert!(noisy
        .run(&steep, &one, 2, &mut RandomStream::new(3), |_, _| ())
        .is_err());
}

#[test]
fn diagnostics_of_clouds() {
    assert_eq!(effective_sample_size(&[1.0, 1.0, 1.0]).unwrap(), 3.0);
    assert_eq!(effective_sample_size(&[0.0, 2.0]).unwrap(), 1.0);
    assert!(effective_sample_size(&[0.0]).is_err());
    assert!(effective_sample_size(&[-1.0, 2.0]).is_err());
    let v = Tensor::new(&[[1f64, 0.0], [-1.0, 2.0]], &Device::Cpu).unwrap();
    assert_eq!(variance_functional(&v, &tensor(&[0.0, 0.0])).unwrap(), 1.5);
    assert!(variance_functional(&v, &tensor(&[0.0])).is_err());
    assert!(CboConfig {
        sigma: 0.5,
        ..CboConfig::default()
    }
    .contracts(4));
    assert!(!CboConfig::default().contracts(2));
}

#[test]
fn bad_settings_are_named() {
    type Change = fn(&mut CboConfig);
    let cases: [(Change, &str); 8] = [
        (|c| c.dt = 0.0, "dt"),
        (|c| c.alpha = f64::NAN, "alpha"),
        (|c| c.truncation = Some(-1.0), "truncation"),
        (|c| c.stall_kick = Some(1e-5), "stall_kick"),
        (|c| c.particle_reduction = Some(1.0), "particle_reduction"),
        (|c| c.effective_fraction = Some(0.0), "effective_fraction"),
        (
            |c| {
                c.memory = Some(Memory::default());
                c.batching = Some(Batching {
                    particles: 2,
                    update: BatchUpdate::Full,
                });
            },
            "batching",
        ),
        (
            |c| {
                c.bounds = Some(Bounds {
                    low: vec![0.0; 3],
                    high: vec![1.0],
                    rule: BoundsRule::Clamp,
                })
            },
            "bounds",
        ),
    ];
    for (change, field) in cases {
        let mut config = CboConfig::default();
        change(&mut config);
        let error = Cbo::new(&cloud(1, 4, 2), config, RandomStream::new(0)).unwrap_err();
        assert!(error.to_string().contains(field), "{error}");
    }
    let alone = cloud(1, 1, 2);
    let error = Cbo::new(&alone, CboConfig::default(), RandomStream::new(0)).unwrap_err();
    assert!(matches!(error, Error::TooFew { .. }));
    let hopping = ConsensusHopping {
        n: 0,
        ..ConsensusHopping::default()
    };
    assert!(hopping.validate().is_err());
}

//! Interpolants, times, losses, couplings, training.

use crate::support::*;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{AdamW, Module, Optimizer, SGD};
use flows::coupling::{
    reflow, Coupling, Examples, Gaussian, Independent, OnlinePairs, PairShards, Reassigned,
    StoredPairs,
};
use flows::interpolant::*;
use flows::metrics::{
    relative_straightness, straightness, transport_cost, transport_cost_by, Cost,
};
use flows::ode::{FixedStep, Method, OdeField, OdeSolver, Rk45, Times};
use flows::time_sampler::TimeSampler;
use flows::train::{feature_metric, Distill, FlowLoss, Metric, Reduction, TrainConfig, Trainer};
use flows::velocity::{Conditioned, FlowField};
use flows::*;
use nn::init::SeededVars;
use proptest::prelude::*;

#[test]
fn paths_join_their_ends_and_move_as_they_say() {
    let paths: [&dyn Interpolant; 4] = [&Linear, &VpOde::default(), &SubVpOde::default(), &Cosine];
    for (i, path) in paths.iter().enumerate() {
        let at = |t: f64| {
            let c = path
                .coefficients(&Tensor::new(&[t], &Device::Cpu).unwrap())
                .unwrap();
            [&c.alpha, &c.beta, &c.d_alpha, &c.d_beta].map(|x| values(x)[0])
        };
        // The variance-preserving paths only come near the source.
        assert!(
            at(0.0)[0].abs() < 0.01 && (at(0.0)[1] - 1.0).abs() < 1e-4,
            "{i}"
        );
        assert!(
            (at(1.0)[0] - 1.0).abs() < 1e-5 && at(1.0)[1].abs() < 0.02,
            "{i}"
        );
        for t in [0.1, 0.5, 0.9] {
            let (h, now) = (1e-6, at(t));
            let slope = |k: usize| (at(t + h)[k] - at(t - h)[k]) / (2.0 * h);
            assert!((slope(0) - now[2]).abs() < 1e-5, "{i} {t}");
            assert!((slope(1) - now[3]).abs() < 1e-5, "{i} {t}");
        }
    }
}

fn samplers() -> Vec<TimeSampler> {
    vec![
        TimeSampler::Uniform { eps: 0.01 },
        TimeSampler::LogitNormal {
            mean: 0.3,
            std: 1.2,
        },
        TimeSampler::Mode { scale: 1.29 },
        TimeSampler::Mode { scale: -0.7 },
        TimeSampler::CoshTails {
            a: 4.0,
            center: 0.5,
        },
        TimeSampler::CoshTails {
            a: 2.0,
            center: 0.0,
        },
    ]
}

#[test]
fn times_follow_their_density() {
    for sampler in samplers() {
        let n = 40_000;
        let t = sampler
            .sample(n, &mut RandomStream::new(1), DType::F64, &Device::Cpu)
            .unwrap();
        let t = values(&t);
        assert!(t.iter().all(|t| (0.0..=1.0).contains(t)));
        for i in 0..10 {
            let (low, high) = (i as f64 / 10.0, (i + 1) as f64 / 10.0);
            let share = t.iter().filter(|t| (low..high).contains(*t)).count() as f64 / n as f64;
            let grid = 400;
            let mass: f64 = (0..grid)
                .map(|k| low + (k as f64 + 0.5) / grid as f64 * 0.1)
                .map(|t| sampler.density(t).unwrap() * 0.1 / grid as f64)
                .sum();
            assert!(
                (share - mass).abs() < 0.01,
                "{sampler:?} {i}: {share} {mass}"
            );
        }
    }
    let discrete = TimeSampler::Discrete { k: 4, eps: 0.0 };
    let t = discrete
        .sample(50, &mut RandomStream::new(1), DType::F64, &Device::Cpu)
        .unwrap();
    assert!(values(&t)
        .iter()
        .all(|t| [0.0, 0.25, 0.5, 0.75].contains(t)));
    assert!(discrete.density(0.5).is_err());
    let bad = [
        TimeSampler::Uniform { eps: 1.0 },
        TimeSampler::Mode { scale: 3.0 },
        TimeSampler::CoshTails {
            a: 0.0,
            center: 0.5,
        },
        TimeSampler::Discrete { k: 0, eps: 0.0 },
        TimeSampler::Fixed(1.5),
        TimeSampler::LogitNormal {
            mean: 0.0,
            std: 0.0,
        },
    ];
    assert!(bad.iter().all(|s| s.validate().is_err()));
}

/// The closed-form field is where the gradient of the loss vanishes.
#[test]
fn the_exact_velocity_minimizes_the_loss() {
    let mixture = mixture(DType::F64);
    let n = 40_000;
    let mut rng = RandomStream::new(2);
    let (mut data, noise) = (Vec::new(), normal(5, &[n, 3], DType::F64));
    let means = normal(11, &[6, 3], DType::F64).to_vec2::<f64>().unwrap();
    let weights = Tensor::new(&[1.0_f64, 2.0, 1.0, 1.5, 1.0, 0.5], &Device::Cpu).unwrap();
    let variances: [f64; 6] = [0.05, 0.1, 0.2, 0.1, 0.05, 0.15];
    let table = weights.broadcast_as((n, 6)).unwrap().contiguous().unwrap();
    let which = rng.categorical(&table).unwrap().to_vec1::<u32>().unwrap();
    for m in which {
        let m = m as usize;
        data.extend(
            means[m]
                .iter()
                .map(|c| c + variances[m].sqrt() * rng.next_normal()),
        );
    }
    let data = Tensor::from_vec(data, (n, 3), &Device::Cpu).unwrap();
    let t = TimeSampler::default()
        .sample(n, &mut rng, DType::F64, &Device::Cpu)
        .unwrap();
    let (x_t, target) = interpolate(&Linear, &noise, &data, &t).unwrap();
    let v = mixture.velocity(&x_t, &t, &Condition::Null).unwrap();
    let residual = (v - target).unwrap();
    for probe in [x_t.clone(), x_t.sin().unwrap(), x_t.ones_like().unwrap()] {
        let products = values(&(&residual * probe).unwrap().sum(1).unwrap());
        let mean = products.iter().sum::<f64>() / n as f64;
        let square = products.iter().map(|p| p * p).sum::<f64>() / n as f64;
        assert!(mean.abs() < 3.0 * (square / n as f64).sqrt(), "{mean}");
    }
}

#[test]
fn a_single_target_is_reached_in_one_step() {
    let point = Tensor::new(&[[0.5_f64, -1.0, 2.0]], &Device::Cpu).unwrap();
    let field = AnalyticMixture::kernel_density(&point, 0.0).unwrap();
    let x0 = normal(1, &[5, 3], DType::F64);
    let one = FixedStep::euler(1)
        .recorded()
        .solve(&field, &x0, 0.0, 1.0)
        .unwrap();
    let wanted = point.broadcast_as((5, 3)).unwrap();
    assert!(distance(&one.x, &wanted.contiguous().unwrap()) < 1e-12);
    // Straight: many steps take the same way.
    let many = FixedStep::euler(8)
        .recorded()
        .solve(&field, &x0, 0.0, 1.0)
        .unwrap();
    let s = straightness(&many.trajectory.unwrap(), &many.times).unwrap();
    assert!(s < 1e-20, "{s}");
    // And a second round on such pairs asks for the velocity that is there already.
    let mut rng = RandomStream::new(3);
    let pairs = reflow(
        &field,
        &mut Gaussian::like(&x0).unwrap(),
        64,
        20,
        &FixedStep::euler(4),
        &mut rng,
    )
    .unwrap();
    let (x0, x1) = pairs.tensors();
    let loss = FlowLoss::with_time(TimeSampler::Uniform { eps: 0.0 });
    let loss = loss.sample_and_loss(&field, x0, x1, &mut rng).unwrap();
    assert!(values(&loss)[0] < 1e-20);
}

#[test]
fn curved_paths_are_not_straight_and_costs_are_costs() {
    let mixture = mixture(DType::F64);
    let x0 = normal(1, &[200, 3], DType::F64);
    let out = FixedStep::euler(50)
        .recorded()
        .solve(&mixture, &x0, 0.0, 1.0)
        .unwrap();
    let trajectory = out.trajectory.unwrap();
    let relative = relative_straightness(&trajectory, &out.times).unwrap();
    assert!(relative > 0.01, "{relative}");
    let moved = Tensor::new(&[[3.0_f64, 4.0]], &Device::Cpu).unwrap();
    let origin = moved.zeros_like().unwrap();
    let cost = |c| transport_cost(&origin, &moved, c).unwrap();
    assert_eq!(
        [cost(Cost::SquaredL2), cost(Cost::L2), cost(Cost::L1)],
        [25.0, 5.0, 7.0]
    );
    assert!(straightness(&trajectory[..1], &[0.0]).is_err());
    assert!(relative_straightness(&[origin.clone(), origin], &[0.0, 1.0]).is_err());
}

proptest! {
    #![proptest_config(cases(12))]

    /// Reductions and metrics against their definitions.
    #[test]
    fn losses_are_what_they_say(seed in 0u64..500, c in 0.1f64..2.0) {
        let (x0, x1) = (normal(seed, &[4, 2, 2], DType::F64), normal(seed + 1, &[4, 2, 2], DType::F64));
        let t = Tensor::new(&[0.0_f64, 0.3, 0.5, 1.0], &Device::Cpu).unwrap();
        let zero = |x: &Tensor, _: &Tensor| x.zeros_like();
        let squares = (&x1 - &x0).unwrap().sqr().unwrap().flatten_from(1).unwrap().sum(1).unwrap();
        let squares = values(&squares);
        let mean = |f: &dyn Fn(f64) -> f64| squares.iter().map(|s| f(*s)).sum::<f64>() / 4.0;
        let found = |loss: FlowLoss| {
            values(&loss.loss(&zero, &x0, &x1, &t, &Condition::Null).unwrap())[0]
        };
        let close = |a: f64, b: f64| (a - b).abs() < 1e-10 * b.abs().max(1.0);
        prop_assert!(close(found(FlowLoss::default()), mean(&|s| s / 4.0)));
        let half = FlowLoss { reduction: Reduction::HalfSum, ..FlowLoss::default() };
        prop_assert!(close(found(half), mean(&|s| s / 2.0)));
        let huber = FlowLoss { metric: Metric::PseudoHuber { c }, ..FlowLoss::default() };
        prop_assert!(close(found(huber), mean(&|s| (s + c * c).sqrt() - c)));
        // Features that are a linear map see the residual through it.
        let half_of = feature_metric(|x| Ok((x.flatten_from(1)? * 0.5)?), 1e-3);
        let features = FlowLoss { metric: half_of, ..FlowLoss::default() };
        prop_assert!((found(features) - mean(&|s| s / 4.0)).abs() < 1e-6 * mean(&|s| s).max(1.0));
        let doubled = FlowLoss { weight: Some(Box::new(|t| Ok((t.ones_like()? * 2.0)?))), ..FlowLoss::default() };
        prop_assert!(close(found(doubled), mean(&|s| s / 2.0)));
    }
}

#[test]
fn pairs_stay_together_and_survive_a_file() {
    let x0 = normal(1, &[30, 2], DType::F32);
    let mut pairs = StoredPairs::new(x0.clone(), (&x0 * 3.0).unwrap()).unwrap();
    let (a, b) = pairs.batch(100, &mut RandomStream::new(1)).unwrap();
    assert!(distance(&(a * 3.0).unwrap(), &b) < 1e-6);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("pairs.safetensors");
    pairs.save(&file).unwrap();
    let loaded = StoredPairs::load(&file, &Device::Cpu).unwrap();
    assert_eq!((bits(loaded.tensors().0), loaded.len()), (bits(&x0), 30));
    assert!(StoredPairs::new(x0.clone(), x0.narrow(0, 0, 3).unwrap()).is_err());
    let double = |x: &Tensor, _: &Tensor| x * 1.0;
    let mut online = OnlinePairs {
        teacher: &double,
        solver: &FixedStep::euler(1),
        source: Gaussian::like(&x0).unwrap(),
    };
    let (a, b) = online.batch(7, &mut RandomStream::new(1)).unwrap();
    assert!(distance(&(a * 2.0).unwrap(), &b) < 1e-6);
}

#[test]
fn distillation_trains_at_its_own_times() {
    let loss = |d: Distill| d.loss(Metric::SquaredL2).unwrap().time;
    assert_eq!(loss(Distill::OneStep), TimeSampler::Fixed(0.0));
    assert_eq!(loss(Distill::OneStepBack), TimeSampler::Fixed(1.0));
    assert_eq!(
        loss(Distill::Steps(3)),
        TimeSampler::Discrete { k: 3, eps: 0.0 }
    );
    assert_eq!(
        (Distill::OneStep.steps(), Distill::Steps(3).steps()),
        (1, 3)
    );
    assert!(Distill::Steps(0).loss(Metric::SquaredL2).is_err());
}

struct Line {
    vars: SeededVars,
    layer: candle_nn::Linear,
}

fn line() -> Line {
    let vars = SeededVars::new(&RandomStream::new(4));
    let layer = candle_nn::linear(3, 2, vars.builder(DType::F32, &Device::Cpu)).unwrap();
    Line { vars, layer }
}

impl Velocity for Line {
    fn velocity(&self, x: &Tensor, t: &Tensor, _: &Condition) -> Result<Tensor> {
        Ok(self
            .layer
            .forward(&Tensor::cat(&[x, &t.unsqueeze(1)?], 1)?)?)
    }
}

fn trainer(line: &Line, config: TrainConfig) -> Trainer<SGD> {
    let vars = line.vars.trainable();
    let sgd = SGD::new(vars.iter().map(|(_, v)| v.clone()).collect(), 0.1).unwrap();
    Trainer::new(vars, sgd, config).unwrap()
}

fn weights(line: &Line) -> Vec<u64> {
    line.vars
        .trainable()
        .iter()
        .flat_map(|(_, v)| bits(v))
        .collect()
}

fn steps(line: &Line, trainer: &mut Trainer<SGD>, range: std::ops::Range<u64>) {
    for i in range {
        let (x0, x1) = (
            normal(i, &[8, 2], DType::F32),
            normal(i + 99, &[8, 2], DType::F32),
        );
        let mut rng = RandomStream::new(i);
        let loss = FlowLoss::default()
            .sample_and_loss(line, &x0, &x1, &mut rng)
            .unwrap();
        trainer.step(&loss).unwrap();
    }
}

#[test]
fn training_that_is_stopped_goes_on_with_the_same_bits() {
    let config = TrainConfig {
        lr: 0.1,
        warmup: 6,
        ema_decay: 0.9,
        grad_clip: Some(0.5),
    };
    let whole = line();
    let mut one = trainer(&whole, config);
    steps(&whole, &mut one, 0..10);
    let parts = line();
    let mut first = trainer(&parts, config);
    steps(&parts, &mut first, 0..4);
    let state = first.state().unwrap();
    let mut second = trainer(&parts, config);
    second.load_state(&state).unwrap();
    steps(&parts, &mut second, 4..10);
    assert_eq!(weights(&whole), weights(&parts));
    let average = |l: &Line, t: &Trainer<SGD>| t.with_averaged(|| Ok(weights(l))).unwrap();
    assert_eq!(average(&whole, &one), average(&parts, &second));
    // The trained weights are back, also after an error.
    let before = weights(&whole);
    let failed: Result<()> = one.with_averaged(|| Err(Error::other("no")));
    assert!(failed.is_err() && before == weights(&whole));
    one.adopt_average().unwrap();
    assert_eq!(weights(&whole), average(&whole, &one));
    let mut bad = state.clone();
    bad.remove("steps");
    assert!(second.load_state(&bad).is_err());
}

#[test]
fn training_refuses_what_is_no_number_and_clips() {
    let line = line();
    let mut trainer = trainer(
        &line,
        TrainConfig {
            lr: 0.1,
            warmup: 0,
            grad_clip: Some(1e-3),
            ..Default::default()
        },
    );
    let before = weights(&line);
    let weight = line.vars.trainable()[0].1.clone();
    let bad = (weight.as_tensor().sum_all().unwrap() * f64::NAN).unwrap();
    assert!(trainer.step(&bad).is_err());
    assert_eq!(before, weights(&line));
    let old: Vec<f64> = line
        .vars
        .trainable()
        .iter()
        .flat_map(|(_, v)| values(v))
        .collect();
    steps(&line, &mut trainer, 0..1);
    let new: Vec<f64> = line
        .vars
        .trainable()
        .iter()
        .flat_map(|(_, v)| values(v))
        .collect();
    let moved = old
        .iter()
        .zip(&new)
        .map(|(a, b)| (a - b).powi(2))
        .sum::<f64>()
        .sqrt();
    assert!((moved - 1e-4).abs() < 1e-6, "{moved}");
    let lost = Tensor::new(1f32, &Device::Cpu).unwrap();
    let var = Var::from_tensor(&lost).unwrap();
    assert!(trainer.step(&var.sqr().unwrap()).is_err());
    let config = TrainConfig {
        ema_decay: 1.0,
        ..Default::default()
    };
    let vars = line.vars.trainable();
    let adam = AdamW::new_lr(vec![], 0.1).unwrap();
    assert!(Trainer::new(vars, adam, config).is_err());
}

/// Two Gaussians on the left to two on the right: one round of reflow straightens the paths.
#[test]
fn transfer_between_two_domains_straightens() {
    let corner = |x: f64, y: f64| Tensor::new(&[[x, y], [x, -y]], &Device::Cpu).unwrap();
    let right = AnalyticMixture::new(&corner(2.0, 1.0), &[0.05, 0.05], &[1.0, 1.0]).unwrap();
    // The exact field from standard normal noise; its pairs are the first round's.
    let mut rng = RandomStream::new(1);
    let mut source = Gaussian::like(&corner(0.0, 0.0)).unwrap();
    let first = FixedStep::euler(50);
    let pairs = reflow(&right, &mut source, 4000, 1000, &first, &mut rng).unwrap();
    let (x0, x1) = pairs.tensors();
    // Independent pairs cost more: a flow never moves farther than the pairs it came from.
    let mut independent = Independent {
        source,
        target: Examples(x1.clone()),
    };
    let (a, b) = independent.batch(4000, &mut rng).unwrap();
    let cost = |a, b| transport_cost(a, b, Cost::SquaredL2).unwrap();
    assert!(cost(x0, x1) < cost(&a, &b) - 0.3);
}

#[test]
fn shards_serve_all_their_pairs_and_keep_them_together() {
    let folder = tempfile::tempdir().unwrap();
    let mut files = Vec::new();
    for shard in 0..3 {
        let x0 = Tensor::full(f64::from(shard), (4, 2), &Device::Cpu).unwrap();
        let file = folder.path().join(format!("{shard}.safetensors"));
        let pairs = StoredPairs::new(x0.clone(), (x0 * 10.0).unwrap()).unwrap();
        pairs.save(&file).unwrap();
        files.push(file);
    }
    let mut shards = PairShards::open(files.clone(), &Device::Cpu).unwrap();
    let mut rng = RandomStream::new(3);
    let mut seen = Vec::new();
    for _ in 0..6 {
        let (x0, x1) = shards.batch(2, &mut rng).unwrap();
        assert_eq!(values(&(x0.clone() * 10.0).unwrap()), values(&x1));
        seen.push(values(&x0)[0] as usize);
    }
    assert_eq!(
        [0, 1, 2].map(|k| seen.iter().filter(|s| **s == k).count()),
        [2, 2, 2]
    );
    assert!(PairShards::open(vec![], &Device::Cpu).is_err());
    files[0] = folder.path().join("missing.safetensors");
    assert!(PairShards::open(files, &Device::Cpu).is_err());
}

#[test]
fn reassigned_pairs_cost_less_and_lose_no_target() {
    let column = |x: &[f64]| Tensor::new(x, &Device::Cpu).unwrap().unsqueeze(1).unwrap();
    let pairs = || {
        |_: usize, _: &mut RandomStream| -> Result<(Tensor, Tensor)> {
            Ok((column(&[0.0, 1.0, 2.0]), column(&[2.1, 0.1, 1.1])))
        }
    };
    let mut rng = RandomStream::new(0);
    // For points of a line the sorted order is optimal.
    let nearest = |cost: &Tensor| Ok(cost.argmin(1)?.to_vec1::<u32>()?);
    let mut assigned = Reassigned {
        inner: pairs(),
        assign: nearest,
    };
    let (x0, x1) = assigned.batch(3, &mut rng).unwrap();
    assert_eq!(values(&x1), [0.1, 1.1, 2.1]);
    assert!(transport_cost(&x0, &x1, Cost::SquaredL2).unwrap() < 0.011);
    let mut twice = Reassigned {
        inner: pairs(),
        assign: |_: &Tensor| Ok(vec![0, 0, 1]),
    };
    assert!(twice.batch(3, &mut rng).is_err());
    let mut few = Reassigned {
        inner: pairs(),
        assign: |_: &Tensor| Ok(vec![0, 1]),
    };
    assert!(few.batch(3, &mut rng).is_err());
}

#[test]
fn any_convex_cost_can_be_asked() {
    let (a, b) = (
        normal(1, &[5, 2], DType::F64),
        normal(2, &[5, 2], DType::F64),
    );
    let own = transport_cost_by(&a, &b, |moved| Ok(moved.abs()?.sum(1)?)).unwrap();
    assert_eq!(own, transport_cost(&a, &b, Cost::L1).unwrap());
    assert!(transport_cost_by(&a, &b, |moved| Ok(moved.clone())).is_err());
}

/// A denoiser as a field is the velocity of its mixture, and a guided one can teach a reflow.
#[test]
fn denoisers_are_fields_of_straight_paths() {
    let mixture = mixture(DType::F64);
    let x = normal(4, &[3, 3], DType::F64);
    let classes = Condition::classes(&[0, 1, 2], &Device::Cpu).unwrap();
    let field = FlowField {
        denoiser: &mixture,
        condition: classes.clone(),
    };
    for times in [Times::Same(0.3), Times::PerRow(vec![0.0, 0.4, 0.9])] {
        let t = times.tensor(&x).unwrap();
        let wanted = mixture.velocity(&x, &t, &classes).unwrap();
        assert!(distance(&field.eval(&x, &times).unwrap(), &wanted) < 1e-12);
    }
    // At both ends, and a rounding error beyond them; the same through a network that says velocities.
    for dtype in [DType::F64, DType::F32] {
        let near = if dtype == DType::F64 { 1e-4 } else { 1e-2 };
        let (mixture, x) = (crate::support::mixture(dtype), normal(4, &[3, 3], dtype));
        let velocity = Closure::new(
            Prediction::Velocity(PathSpeed::NoiseMinusData),
            |x: &Tensor, levels: &Levels, c: &Condition| {
                let t = Tensor::from_vec(
                    levels.values(x.dims()[0], |l| l.alpha),
                    x.dims()[0],
                    x.device(),
                )?;
                Ok(mixture.velocity(x, &t, c)?.neg()?)
            },
        );
        let denoisers: [&dyn Denoiser; 2] = [&mixture, &velocity];
        for denoiser in denoisers {
            let field = FlowField {
                denoiser,
                condition: classes.clone(),
            };
            let exact = Conditioned {
                velocity: &mixture,
                condition: classes.clone(),
            };
            let solvers: [(&dyn OdeSolver, f64, f64); 4] = [
                (&Rk45::default(), 0.0, 1.0),
                (&FixedStep::rk4(10), 0.0, 1.0),
                (&FixedStep::heun(10), 1.0, 0.0),
                (&FixedStep::new(Method::Rk38, 7), 1.0, 0.0),
            ];
            for (solver, from, to) in solvers {
                let found = solver.solve(&field, &x, from, to).unwrap().x;
                let wanted = solver.solve(&exact, &x, from, to).unwrap().x;
                let off = distance(&found, &wanted);
                assert!(off < near, "{dtype:?} {from} to {to}: {off}");
            }
            for t in [-2.8e-17, 1.0 + 1e-16] {
                assert!(field.eval(&x, &Times::Same(t)).is_ok());
            }
            assert!(field.eval(&x, &Times::Same(1.1)).is_err());
        }
    }
    let grid = Grid::uniform_time(&schedule::RectifiedFlow::default(), 4).unwrap();
    let unguided = guidance::Unguided;
    let guided = Guided::new(guidance::Models::new(&mixture), unguided, &grid, 2).unwrap();
    let one = Condition::classes(&[1], &Device::Cpu).unwrap();
    let teacher = FlowField {
        denoiser: &guided,
        condition: one,
    };
    let mut source = Gaussian::like(&x).unwrap();
    let solver = FixedStep::euler(5);
    let pairs = reflow(
        &teacher,
        &mut source,
        6,
        2,
        &solver,
        &mut RandomStream::new(1),
    )
    .unwrap();
    assert_eq!((pairs.len(), guided.nfe().main), (6, 30));
}

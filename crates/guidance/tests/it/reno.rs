//! Optimized noise.

use crate::support::*;
use candle_core::{DType, Device, Tensor, Var};
use flows::{Condition, RandomStream};
use guidance::reno::*;
use guidance::Result;
use proptest::prelude::*;

const NONE: Condition = Condition::Null;

fn same(z: &Tensor, _: &Condition) -> Result<Tensor> {
    Ok(z.clone())
}

/// `|x - goal|^2 / 2`
fn bowl(goal: f64) -> Named<impl Fn(&Tensor, &Condition) -> Result<Tensor>> {
    Named::new("bowl", move |x: &Tensor, _: &Condition| {
        Ok((x - goal)?
            .sqr()?
            .flatten_from(1)?
            .sum(1)?
            .affine(0.5, 0.0)?)
    })
}

fn absolute(lr: f64, iters: usize) -> RenoConfig {
    RenoConfig {
        lr,
        iters,
        lr_mode: LrMode::Absolute,
        ..RenoConfig::default()
    }
}

fn norms(z: &Tensor) -> Vec<f64> {
    values(
        &z.sqr()
            .unwrap()
            .flatten_from(1)
            .unwrap()
            .sum(1)
            .unwrap()
            .sqrt()
            .unwrap(),
    )
}

/// Without a reward the norm goes to the mode of a normal vector's radius.
#[test]
fn the_regularizer_holds_the_radius() {
    let nothing = Named::new("nothing", |x: &Tensor, _: &Condition| {
        Ok((x.flatten_from(1)?.sum(1)? * 1e-30)?)
    });
    let z = (normal(1, &[3, 4, 5], DType::F64) * 2.0).unwrap();
    let config = RenoConfig {
        reg_weight: 1.0,
        grad_clip: 1e6,
        ..absolute(0.05, 400)
    };
    let reno = Reno::new(&same, vec![(1.0, &nothing)], config).unwrap();
    let out = reno.optimize(&z, &NONE).unwrap();
    let last = out.norms.last().unwrap();
    assert!(
        last.iter().all(|n| (n - 19.0f64.sqrt()).abs() < 1e-6),
        "{last:?}"
    );
}

proptest! {
    #![proptest_config(cases(12))]

    /// A linear generator, a quadratic reward and plain descent: `z_k = goal + (1 - lr)^k (z - goal)`.
    #[test]
    fn plain_descent_has_a_closed_form(seed in 0u64..1000, lr in 0.05f64..0.9) {
        let z = normal(seed, &[2, 6], DType::F64);
        let reward = bowl(0.5);
        let config = RenoConfig {
            optimizer: NoiseOptimizer::Sgd { momentum: 0.0, nesterov: false },
            grad_clip: 1e9,
            reg_weight: 0.0,
            ..absolute(lr, 7)
        };
        let reno = Reno::new(&same, vec![(1.0, &reward)], config).unwrap();
        let mut run = reno.start(&z, &NONE).unwrap();
        for k in 0..7 {
            let wanted = ((&z - 0.5).unwrap() * (1.0 - lr).powi(k)).unwrap();
            prop_assert!(distance(run.z(), &(wanted + 0.5).unwrap()) < 1e-10);
            run.step().unwrap();
        }
        prop_assert!(run.step().unwrap().is_none());
    }

    /// The clip shortens and never turns; a batch is as many single runs.
    #[test]
    fn rows_are_runs_of_their_own(seed in 0u64..1000, which in 0usize..3) {
        let z = normal(seed, &[3, 5], DType::F64);
        let reward = bowl(1.0);
        let optimizer = [
            NoiseOptimizer::default(),
            NoiseOptimizer::Adam { eps: 1e-2 },
            NoiseOptimizer::Lbfgs { max_iter: 3, history: 3 },
        ][which];
        let config = RenoConfig { optimizer, ..absolute(0.5, 6) };
        let reno = Reno::new(&same, vec![(1.0, &reward)], config).unwrap();
        let all = reno.optimize(&z, &NONE).unwrap();
        for i in 0..3 {
            let one = reno.optimize(&z.narrow(0, i, 1).unwrap(), &NONE).unwrap();
            prop_assert!(distance(&one.best_z, &all.best_z.narrow(0, i, 1).unwrap()) < 1e-12);
            prop_assert_eq!(one.best_index[0], all.best_index[i]);
        }
    }
}

#[test]
fn the_clip_keeps_the_direction() {
    let z = normal(2, &[4, 7], DType::F64);
    let reward = bowl(3.0);
    let config = RenoConfig {
        optimizer: NoiseOptimizer::Sgd {
            momentum: 0.0,
            nesterov: false,
        },
        reg_weight: 0.0,
        ..absolute(1.0, 2)
    };
    let reno = Reno::new(&same, vec![(1.0, &reward)], config).unwrap();
    let mut run = reno.start(&z, &NONE).unwrap();
    run.step().unwrap();
    let step = (run.z() - &z).unwrap();
    let full = (Tensor::full(3.0, z.shape(), &Device::Cpu).unwrap() - &z).unwrap();
    let inner = values(&(&step * &full).unwrap().sum(1).unwrap());
    for ((inner, a), b) in inner.iter().zip(norms(&step)).zip(norms(&full)) {
        assert!((a - 0.1).abs() < 1e-6 && (inner / (a * b) - 1.0).abs() < 1e-9);
    }
}

#[test]
fn the_best_sample_is_the_generators() {
    // Overshoots, so that the best is not the last.
    let generator = |z: &Tensor, _: &Condition| Ok(z.tanh()?);
    let reward = Named::new("wave", |x: &Tensor, _: &Condition| {
        Ok((x * 9.0)?.sin()?.sum(1)?)
    });
    let z = normal(3, &[4, 6], DType::F32);
    let reno = Reno::new(&generator, vec![(1.0, &reward)], absolute(4.0, 20)).unwrap();
    let out = reno.optimize(&z, &NONE).unwrap();
    assert_eq!(
        bits(&out.best_sample),
        bits(&generator(&out.best_z, &NONE).unwrap())
    );
    assert_eq!(bits(&out.initial), bits(&generator(&z, &NONE).unwrap()));
    for row in 0..4 {
        let losses: Vec<f64> = out.losses.iter().map(|l| l[row]).collect();
        let best = (0..20).fold(0, |b, k| if losses[k] < losses[b] { k } else { b });
        assert_eq!(out.best_index[row], best);
        assert_eq!(out.best_loss()[row], losses[best]);
    }
    // Two evaluations more: the check of the first gradient.
    assert_eq!(out.evaluations, 4 * 22);
    // One evaluation changes nothing.
    let once = Reno::new(&generator, vec![(1.0, &reward)], absolute(4.0, 1)).unwrap();
    let out = once.optimize(&z, &NONE).unwrap();
    assert_eq!(bits(&out.best_z), bits(&z));
}

#[test]
fn the_rate_follows_the_size() {
    let config = RenoConfig::default();
    assert_eq!(config.rate(16384), 5.0);
    assert!((config.rate(64) - 5.0 / 16.0).abs() < 1e-12);
    assert_eq!(absolute(5.0, 1).rate(64), 5.0);
}

#[test]
fn lbfgs_finds_the_minimum_of_a_stretched_bowl() {
    let scales = Tensor::new(&[1.0f64, 10.0, 100.0, 3.0], &Device::Cpu).unwrap();
    let reward = Named::new("stretched", |x: &Tensor, _: &Condition| {
        Ok((x - 1.0)?.sqr()?.broadcast_mul(&scales)?.sum(1)?)
    });
    let config = RenoConfig {
        optimizer: NoiseOptimizer::Lbfgs {
            max_iter: 10,
            history: 5,
        },
        reg_weight: 0.0,
        ..absolute(1.0, 6)
    };
    let reno = Reno::new(&same, vec![(1.0, &reward)], config).unwrap();
    let out = reno
        .optimize(&normal(4, &[3, 4], DType::F64), &NONE)
        .unwrap();
    assert!(
        out.best_loss().iter().all(|l| *l < 1e-8),
        "{:?}",
        out.best_loss()
    );
    assert!(out.evaluations > 3 * 6);
}

#[test]
fn rows_end_by_themselves() {
    let z = Tensor::new(&[[0.2f64, 0.1], [5.0, 5.0], [1.0, -1.0]], &Device::Cpu).unwrap();
    let reward = bowl(0.0);
    let config = RenoConfig {
        early_stop: Some(0.5),
        reg_weight: 0.0,
        ..absolute(1.0, 4)
    };
    let reno = Reno::new(&same, vec![(1.0, &reward)], config).unwrap();
    let mut run = reno.start(&z, &NONE).unwrap();
    assert_eq!(run.step().unwrap().unwrap().active, 2);
    let first = run.z().narrow(0, 0, 1).unwrap();
    assert_eq!(bits(&first), bits(&z.narrow(0, 0, 1).unwrap()));
    let patient = RenoConfig {
        patience: Some(2),
        gradient_check: false,
        ..absolute(1.0, 50)
    };
    let up = Named::new("up", |x: &Tensor, _: &Condition| {
        // Worse with every step that follows the gradient.
        Ok((x.detach().sum(1)?.affine(-1.0, 0.0)? + (x.sum(1)? - x.detach().sum(1)?)?)?)
    });
    let reno = Reno::new(&same, vec![(1.0, &up)], patient).unwrap();
    let out = reno.optimize(&z, &NONE).unwrap();
    assert_eq!(out.losses.len(), 3);

    // No numbers: the row stays where it is, keeps its best and is given up after three.
    let broken = Named::new("broken", |x: &Tensor, _: &Condition| {
        Ok((x.sqrt()?.sum(1)? + x.sqr()?.sum(1)?)?)
    });
    let reno = Reno::new(&same, vec![(1.0, &broken)], absolute(1.0, 30)).unwrap();
    let error = reno.optimize(&z, &NONE).unwrap_err().to_string();
    assert!(error.contains("row 2"), "{error}");
    let out = reno.optimize(&z.narrow(0, 0, 2).unwrap(), &NONE).unwrap();
    assert!(values(&out.best_z).iter().all(|x| x.is_finite()));
}

/// What was stopped and saved goes on with the same bits, whatever moves the noise.
#[test]
fn a_stopped_run_goes_on() {
    let reward = bowl(1.0);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run.safetensors");
    for optimizer in [
        NoiseOptimizer::default(),
        NoiseOptimizer::Adam { eps: 1e-2 },
        NoiseOptimizer::Lbfgs {
            max_iter: 2,
            history: 3,
        },
    ] {
        let config = RenoConfig {
            optimizer,
            early_stop: Some(0.2),
            ..absolute(0.7, 9)
        };
        let reno = Reno::new(&same, vec![(1.0, &reward), (0.5, &reward)], config).unwrap();
        let z = normal(5, &[3, 4], DType::F32);
        let whole = reno.optimize(&z, &NONE).unwrap();
        for stop in [0, 1, 4] {
            let mut run = reno.start(&z, &NONE).unwrap();
            for _ in 0..stop {
                run.step().unwrap();
            }
            let state = tensor_core::checkpoint::Checkpoint::new("run", run.state().unwrap());
            state.save(&path).unwrap();
            let read = tensor_core::checkpoint::Checkpoint::load(&path, &Device::Cpu).unwrap();
            let mut run = reno.resume(&read.tensors, &NONE).unwrap();
            while run.step().unwrap().is_some() {}
            let out = run.finish().unwrap();
            assert_eq!(
                bits(&out.best_z),
                bits(&whole.best_z),
                "{optimizer:?} {stop}"
            );
            assert_eq!(bits(&out.best_sample), bits(&whole.best_sample));
            assert_eq!(bits(&out.initial), bits(&whole.initial));
            assert_eq!((&out.losses, &out.norms), (&whole.losses, &whole.norms));
            assert_eq!(out.per_reward, whole.per_reward);
            assert_eq!(out.best_index, whole.best_index);
            assert_eq!(out.evaluations, whole.evaluations);
        }
        let one = Reno::new(&same, vec![(1.0, &reward)], absolute(0.7, 9)).unwrap();
        let mut run = reno.start(&z, &NONE).unwrap();
        run.step().unwrap();
        let mut state = run.state().unwrap();
        assert!(one.resume(&state, &NONE).is_err());
        state.remove("best_z");
        assert!(reno.resume(&state, &NONE).is_err());
        state.remove("z");
        assert!(reno.resume(&state, &NONE).is_err());
    }
}

/// Random numbers inside a generator are the same at every call; the last sample can be the result.
#[test]
fn seeded_generators_are_deterministic() {
    let generator = Seeded {
        generate: |z: &Tensor, _: &Condition, rng: &mut RandomStream| {
            let noise = rng.normal(0.0, 0.1, z.shape(), z.dtype(), z.device())?;
            Ok((z + noise)?)
        },
        seed: 7,
    };
    let z = normal(1, &[2, 3], DType::F64);
    let twice = [0, 1].map(|_| bits(&generator.generate(&z, &NONE).unwrap()));
    assert_eq!(twice[0], twice[1]);
    let reward = bowl(1.0);
    let config = RenoConfig {
        select: Select::Last,
        ..absolute(8.0, 6)
    };
    let reno = Reno::new(&generator, vec![(1.0, &reward)], config).unwrap();
    let out = reno.optimize(&z, &NONE).unwrap();
    assert_eq!(out.best_index, [5, 5]);
    assert_eq!(out.best_loss(), out.losses[5]);
    let last = generator.generate(&out.best_z, &NONE).unwrap();
    assert_eq!(bits(&last), bits(&out.best_sample));
}

#[test]
fn rewards_are_what_their_formulas_say() {
    let x = normal(6, &[3, 4], DType::F64);
    let text = normal(7, &[1, 4], DType::F64);
    let features = |x: &Tensor| -> Result<Tensor> { Ok(x.clone()) };
    let cos: Vec<f64> = (0..3)
        .map(|i| {
            let row = values(&x.narrow(0, i, 1).unwrap());
            let text = values(&text);
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
            dot(&row, &text) / (dot(&row, &row) * dot(&text, &text)).sqrt()
        })
        .collect();
    let close = |reward: &dyn RewardLoss, wanted: &dyn Fn(f64) -> f64| {
        let found = values(&reward.loss(&x, &NONE).unwrap());
        for (f, c) in found.iter().zip(&cos) {
            assert!((f - wanted(*c)).abs() < 1e-9, "{}", reward.name());
        }
    };
    close(
        &FeatureCosine {
            encoder: features,
            target: text.clone(),
            name: "f".into(),
        },
        &|c| 1.0 - c,
    );
    close(&CosineScore::hps(features, &text), &|c| 1.0 - c);
    close(&CosineScore::clip(features, &text, 100.0), &|c| {
        100.0 - 100.0 * c
    });
    close(&CosineScore::pick(features, &text, 98.0), &|c| {
        30.0 - 98.0 * c
    });
    assert_eq!(CosineScore::hps(features, &text).paper_weight(), 5.0);
    let sums = |x: &Tensor| -> Result<Tensor> { Ok(x.sum(1)?) };
    let wanted: Vec<f64> = values(&sums(&x).unwrap()).iter().map(|s| 2.0 - s).collect();
    assert_eq!(
        values(&Score::image_reward(sums).loss(&x, &NONE).unwrap()),
        wanted
    );
    assert_eq!(Score::aesthetic(sums).name(), "aesthetic");
    let labels = Tensor::new(&[0u32, 3, 1], &Device::Cpu).unwrap();
    let log = LogProb {
        classifier: features,
        labels: labels.clone(),
        name: "p".into(),
    };
    let wanted = nn::loss::cross_entropy(&x, &labels, nn::loss::Reduction::None).unwrap();
    assert!(distance(&log.loss(&x, &NONE).unwrap(), &wanted) < 1e-12);
}

#[test]
fn images_are_resized_cut_and_normalized() {
    let plain = ImagePreprocess {
        size: 6,
        mean: vec![0.5, 0.25],
        std: vec![0.5, 2.0],
    };
    // A constant stays one, whatever the size.
    for (h, w) in [(6, 6), (4, 9), (17, 12)] {
        let images = Tensor::full(0.75, (2, 2, h, w), &Device::Cpu).unwrap();
        let out = plain.apply(&images).unwrap();
        assert_eq!(out.dims(), [2, 2, 6, 6]);
        let found = values(&out);
        assert!(found[..36].iter().all(|v| (v - 0.5).abs() < 1e-12));
        assert!(found[36..72].iter().all(|v| (v - 0.25).abs() < 1e-12));
    }
    // At its own size an image is itself; a ramp stays a ramp where it grows.
    let one = ImagePreprocess {
        size: 8,
        mean: vec![0.0],
        std: vec![1.0],
    };
    let x = normal(8, &[1, 1, 8, 8], DType::F64);
    assert!(distance(&one.apply(&x).unwrap(), &x) < 1e-12);
    let ramp: Vec<f64> = (0..64).map(|k| (k % 8) as f64).collect();
    let ramp = Tensor::from_vec(ramp, (1, 1, 8, 8), &Device::Cpu).unwrap();
    let two = ImagePreprocess {
        size: 16,
        ..one.clone()
    };
    let row = values(&two.apply(&ramp).unwrap())[..16].to_vec();
    for (i, v) in row.iter().enumerate().skip(4).take(8) {
        assert!((v - ((i as f64 + 0.5) / 2.0 - 0.5)).abs() < 1e-9);
    }
    // It has a gradient.
    let at = Var::from_tensor(&x).unwrap();
    let small = ImagePreprocess { size: 3, ..one };
    let grads = small
        .apply(&at)
        .unwrap()
        .sum_all()
        .unwrap()
        .backward()
        .unwrap();
    assert!(values(grads.get(&at).unwrap()).iter().any(|g| *g != 0.0));
    assert!(plain.apply(&x).is_err());
    assert!(ImagePreprocess {
        std: vec![0.5, 0.0],
        ..plain
    }
    .apply(&x)
    .is_err());
    let decoded =
        ImagePreprocess::from_decoder(&Tensor::new(&[-3.0f32, 0.0, 1.0], &Device::Cpu).unwrap());
    assert_eq!(values(&decoded.unwrap()), [0.0, 0.5, 1.0]);
}

#[test]
fn the_best_of_many_draws_is_the_best() {
    let reward = bowl(0.0);
    let like = Tensor::zeros((3, 4), DType::F64, &Device::Cpu).unwrap();
    let mut rng = RandomStream::new(1);
    let best = best_of_n(&same, &[(1.0, &reward)], &like, &NONE, 20, &mut rng).unwrap();
    let mut rng = RandomStream::new(1);
    let mut least = vec![f64::INFINITY; 3];
    for _ in 0..20 {
        let z = rng
            .normal(0.0, 1.0, (3, 4), DType::F64, &Device::Cpu)
            .unwrap();
        for (l, n) in least.iter_mut().zip(norms(&z)) {
            *l = l.min(0.5 * n * n);
        }
    }
    assert!(best
        .loss
        .iter()
        .zip(&least)
        .all(|(a, b)| (a - b).abs() < 1e-12));
    assert!(best.sample.dims() == [3, 4] && bits(&best.z) == bits(&best.sample));
    assert!(best_of_n(&same, &[(1.0, &reward)], &like, &NONE, 0, &mut rng).is_err());
    let half = like.to_dtype(DType::F16).unwrap();
    let best = best_of_n(&same, &[(1.0, &reward)], &half, &NONE, 3, &mut rng).unwrap();
    assert_eq!(best.z.dtype(), DType::F16);
}

#[test]
fn bad_input_is_named() {
    let reward = bowl(0.0);
    let make = |config: RenoConfig| match Reno::new(&same, vec![(1.0, &reward)], config) {
        Ok(_) => String::new(),
        Err(error) => error.to_string(),
    };
    let d = RenoConfig::default;
    assert!(make(RenoConfig { iters: 0, ..d() }).contains("iters"));
    assert!(make(RenoConfig { lr: -1.0, ..d() }).contains("lr"));
    assert!(make(RenoConfig {
        grad_clip: 0.0,
        ..d()
    })
    .contains("grad_clip"));
    assert!(make(RenoConfig {
        reg_weight: f64::NAN,
        ..d()
    })
    .contains("reg_weight"));
    assert!(make(RenoConfig {
        patience: Some(0),
        ..d()
    })
    .contains("patience"));
    let plain = NoiseOptimizer::Sgd {
        momentum: 0.0,
        nesterov: true,
    };
    assert!(make(RenoConfig {
        optimizer: plain,
        ..d()
    })
    .contains("nesterov"));
    assert!(make(RenoConfig {
        optimizer: NoiseOptimizer::Adam { eps: 0.0 },
        ..d()
    })
    .contains("eps"));
    let none = NoiseOptimizer::Lbfgs {
        max_iter: 0,
        history: 3,
    };
    assert!(make(RenoConfig {
        optimizer: none,
        ..d()
    })
    .contains("Lbfgs"));
    assert!(Reno::new(&same, vec![], d()).is_err());
    assert!(Reno::new(&same, vec![(f64::NAN, &reward)], d()).is_err());
    let reno = Reno::new(&same, vec![(1.0, &reward)], d()).unwrap();
    assert!(reno.optimize(&normal(1, &[4], DType::F64), &NONE).is_err());
    assert!(reno
        .start(&normal(1, &[2, 3], DType::F64), &NONE)
        .unwrap()
        .finish()
        .is_err());
    let cut = |z: &Tensor, _: &Condition| Ok(z.detach());
    let reno = Reno::new(
        &cut,
        vec![(1.0, &reward)],
        RenoConfig {
            reg_weight: 0.0,
            ..d()
        },
    )
    .unwrap();
    let error = reno
        .optimize(&normal(1, &[2, 3], DType::F64), &NONE)
        .unwrap_err();
    assert!(error.to_string().contains("the noise, through"), "{error}");
    // The regularizer brings a gradient, which is not the reward's.
    let reno = Reno::new(&cut, vec![(1.0, &reward)], d()).unwrap();
    let error = reno
        .optimize(&normal(1, &[2, 3], DType::F64), &NONE)
        .unwrap_err();
    assert!(
        error.to_string().contains("generator and rewards"),
        "{error}"
    );
    let scalar = Named::new("scalar", |x: &Tensor, _: &Condition| Ok(x.sum_all()?));
    let reno = Reno::new(&same, vec![(1.0, &scalar)], d()).unwrap();
    let error = reno
        .optimize(&normal(1, &[2, 3], DType::F64), &NONE)
        .unwrap_err();
    assert!(error.to_string().contains("`scalar`"), "{error}");
}

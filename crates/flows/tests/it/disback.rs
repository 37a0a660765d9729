//! Score distillation and the backtracked path.

use crate::support::*;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, SGD};
use flows::distillation::*;
use flows::schedule::Edm;
use flows::*;
use proptest::prelude::*;
use std::collections::BTreeMap;
use tensor_core::verify::Array;

#[test]
fn reference() {
    let report = FILES.verify("disback", verify::disback);
    assert_passed(&report, |_| false);
}

/// Losses are means: a file with its rows in another order and fewer iterations is as good.
#[test]
fn reference_in_another_order() {
    let change = |tensors: &mut BTreeMap<String, Array>, _: &mut BTreeMap<String, String>| {
        for (name, raw) in tensors.iter_mut() {
            match name.starts_with("sched_") {
                true => raw.shorten(0, 6).unwrap(),
                false if raw.shape[0] == 4 => {
                    let block = raw.values.len() / 4;
                    raw.values = raw.values.rchunks(block).flatten().copied().collect();
                }
                false => {}
            }
        }
    };
    let report = FILES.verify_variant("disback", change, verify::disback);
    assert_passed(&report, |_| false);
}

/// The exact denoiser of Gaussian data.
struct Gauss {
    mean: Var,
    std: Var,
}

impl Gauss {
    fn new(mean: f64, std: f64) -> Self {
        let var = |x: f64| Var::new(x, &Device::Cpu).unwrap();
        Self {
            mean: var(mean),
            std: var(std),
        }
    }

    fn vars(&self) -> Vec<(String, Var)> {
        vec![
            ("mean".into(), self.mean.clone()),
            ("std".into(), self.std.clone()),
        ]
    }

    fn values(&self) -> [f64; 2] {
        [&self.mean, &self.std].map(|v| v.to_scalar().unwrap())
    }
}

impl Denoiser for Gauss {
    fn prediction(&self) -> Prediction {
        Prediction::X0
    }

    fn raw(&self, x: &Tensor, levels: &Levels, _: &Condition) -> Result<Tensor> {
        let s2 = self.std.sqr()?;
        let ones = x.ones_like()?;
        let noise = levels.scale(&ones, |l| l.sigma.powi(2))?;
        let total = noise.broadcast_add(&s2)?;
        let mean = (noise.broadcast_mul(self.mean.as_tensor())? / &total)?;
        Ok(((x.broadcast_mul(&s2)? / &total)? + mean)?)
    }
}

/// `G(z) = a z + b`
impl OneStepGenerator for Gauss {
    fn generate(&self, z: &Tensor, _: &Condition) -> Result<Tensor> {
        let scaled = z.broadcast_mul(self.std.as_tensor())?;
        Ok(scaled.broadcast_add(self.mean.as_tensor())?)
    }
}

fn levels() -> Vec<Level> {
    let karras = KarrasSigmas {
        n: 100,
        min: 0.05,
        max: 5.0,
        rho: 7.0,
    };
    karras.levels().unwrap()
}

fn config() -> ScoreDistillConfig {
    ScoreDistillConfig {
        gen_lr: 0.02,
        fake_lr: 0.05,
        warmup: 0,
        ..ScoreDistillConfig::default()
    }
}

fn sgd(model: &Gauss) -> SGD {
    SGD::new(vec![model.mean.clone(), model.std.clone()], 0.0).unwrap()
}

fn base<'a>(
    config: ScoreDistillConfig,
    student: &'a Gauss,
    fake: &'a Gauss,
    target: &'a Gauss,
) -> ScoreDistill<'a, SGD, SGD> {
    let player = Player {
        model: student as &dyn OneStepGenerator,
        vars: student.vars(),
        optimizer: sgd(student),
    };
    let auxiliary = Player {
        model: fake as &dyn Denoiser,
        vars: fake.vars(),
        optimizer: sgd(fake),
    };
    ScoreDistill::new(config, levels(), player, auxiliary, target).unwrap()
}

fn latents(rows: usize) -> impl FnMut(&mut RandomStream) -> Result<(Tensor, Condition)> {
    move |rng| {
        let z = rng.normal(0.0, 1.0, (rows, 2), DType::F64, &Device::Cpu)?;
        Ok((z, Condition::Null))
    }
}

/// With a fake denoiser that follows the student exactly, the student ends at the data exactly.
#[test]
fn a_gaussian_is_distilled_under_every_weight() {
    let weights = [
        GradWeight::DmdL1Norm,
        GradWeight::DiffInstruct(WeightFn::SigmaSquared),
        GradWeight::DiffInstruct(WeightFn::One),
        GradWeight::DiffInstruct(WeightFn::Custom(|l| l.sigma)),
    ];
    for weight in weights {
        let config = ScoreDistillConfig {
            weight,
            gen_lr: 0.05,
            ..config()
        };
        let (student, fake, target) = (
            Gauss::new(-1.0, 1.5),
            Gauss::new(0.0, 1.0),
            Gauss::new(1.0, 0.5),
        );
        let adam = ParamsAdamW {
            weight_decay: 0.0,
            ..ParamsAdamW::default()
        };
        let vars = |m: &Gauss| vec![m.mean.clone(), m.std.clone()];
        let player = Player {
            model: &student as &dyn OneStepGenerator,
            vars: student.vars(),
            optimizer: AdamW::new(vars(&student), adam).unwrap(),
        };
        let auxiliary = Player {
            model: &fake as &dyn Denoiser,
            vars: fake.vars(),
            optimizer: sgd(&fake),
        };
        let mut distill = ScoreDistill::new(config, levels(), player, auxiliary, &target).unwrap();
        let mut rng = RandomStream::new(3);
        let mut draw = latents(128);
        for step in 0..600 {
            distill
                .generator_trainer()
                .set_learning_rate(0.05 * (1.0 - step as f64 / 600.0));
            fake.mean.set(&student.mean.copy().unwrap()).unwrap();
            fake.std.set(&student.std.copy().unwrap()).unwrap();
            let (z, condition) = draw(&mut rng).unwrap();
            let x = distill.samples(&Batch::new(&z)).unwrap();
            let at = distill.generator_draw(&x, &mut rng).unwrap();
            distill.gen_step(&z, &condition, &at, None).unwrap();
        }
        let [mean, std] = student.values();
        assert!(
            (mean - 1.0).abs() < 1e-2 && (std.abs() - 0.5).abs() < 1e-2,
            "{weight:?}: {mean} {std}"
        );
    }
}

/// Both networks in turn come near the data, DisBack too.
#[test]
fn student_and_fake_denoiser_reach_the_data_together() {
    for checkpoints in [0, 3] {
        let (student, fake, target) = (
            Gauss::new(-1.0, 1.2),
            Gauss::new(1.0, 0.5),
            Gauss::new(1.0, 0.5),
        );
        let mut base = base(config(), &student, &fake, &target);
        let recorder = DegradationRecorder {
            interval: 10,
            n_checkpoints: checkpoints,
        };
        let mut rng = RandomStream::new(5);
        let path = recorder.record(&mut base, latents(64), &mut rng).unwrap();
        assert_eq!(path.len(), checkpoints + 1);
        let untouched = student.values();
        assert_eq!(
            untouched,
            [-1.0, 1.2],
            "the student is frozen while the path is recorded"
        );
        let mut disback = DisBack::new(base, path, target.vars(), 50).unwrap();
        let mut seen = 0;
        disback
            .train(1500, latents(64), &mut rng, |i, stats| {
                seen += usize::from(stats.generator.is_some());
                assert!(i < 1500 && stats.fake.loss.is_finite());
                Ok(true)
            })
            .unwrap();
        assert_eq!(seen, 1500);
        assert_eq!(disback.target(), disback.tracker().targets() - 1);
        assert_eq!(
            target.values(),
            [1.0, 0.5],
            "the last target is the teacher"
        );
        let [mean, std] = student.values();
        assert!(
            (mean - 1.0).abs() < 0.15 && (std.abs() - 0.5).abs() < 0.15,
            "{mean} {std}"
        );
    }
}

#[test]
fn a_path_of_length_one_is_the_base_method_bit_for_bit() {
    let run = |backtracking: bool| {
        let (student, fake, target) = (
            Gauss::new(0.2, 1.2),
            Gauss::new(1.0, 0.5),
            Gauss::new(1.0, 0.5),
        );
        let mut base = base(config(), &student, &fake, &target);
        let (mut rng, mut draw) = (RandomStream::new(8), latents(16));
        if backtracking {
            let path = Path::of(&target.vars()).unwrap();
            let mut disback = DisBack::new(base, path, target.vars(), 7).unwrap();
            disback.train(30, draw, &mut rng, |_, _| Ok(true)).unwrap();
        } else {
            for _ in 0..30 {
                let (z, _) = draw(&mut rng).unwrap();
                base.step(&Batch::new(&z), &mut rng).unwrap();
            }
        }
        [student.values(), fake.values()].map(|v| v.map(f64::to_bits))
    };
    assert_eq!(run(true), run(false));
}

#[test]
fn stopping_and_resuming_gives_the_same_bits() {
    let models = || {
        (
            Gauss::new(0.2, 1.2),
            Gauss::new(1.0, 0.5),
            Gauss::new(1.0, 0.5),
        )
    };
    let config = ScoreDistillConfig {
        warmup: 20,
        gen_ema: 0.9,
        fake_updates_per_gen: 2,
        ..config()
    };
    let recorded = || {
        let mut path = Path::of(&Gauss::new(1.0, 0.5).vars()).unwrap();
        path.record(&Gauss::new(0.8, 0.7).vars()).unwrap();
        path.record(&Gauss::new(0.5, 0.9).vars()).unwrap();
        path
    };
    let whole = {
        let (student, fake, target) = models();
        let base = base(config, &student, &fake, &target);
        let mut disback = DisBack::new(base, recorded(), target.vars(), 6).unwrap();
        let mut rng = RandomStream::new(2);
        disback
            .train(17, latents(8), &mut rng, |_, _| Ok(true))
            .unwrap();
        let average = disback.state().unwrap()["generator.average.mean"].clone();
        (student.values(), fake.values(), values(&average))
    };
    let (state, weights, random) = {
        let (student, fake, target) = models();
        let base = base(config, &student, &fake, &target);
        let mut disback = DisBack::new(base, recorded(), target.vars(), 6).unwrap();
        let mut rng = RandomStream::new(2);
        disback
            .train(100, latents(8), &mut rng, |i, _| Ok(i < 8))
            .unwrap();
        assert_eq!(disback.base().iteration(), 9);
        let weights = (student.values(), fake.values());
        (disback.state().unwrap(), weights, rng.state())
    };
    let resumed = {
        let (student, fake, target) = models();
        let base = base(config, &student, &fake, &target);
        let mut disback = DisBack::new(base, recorded(), target.vars(), 6).unwrap();
        for (model, [mean, std]) in [(&student, weights.0), (&fake, weights.1)] {
            model
                .mean
                .set(&Tensor::new(mean, &Device::Cpu).unwrap())
                .unwrap();
            model
                .std
                .set(&Tensor::new(std, &Device::Cpu).unwrap())
                .unwrap();
        }
        disback.load_state(&state).unwrap();
        let mut rng = RandomStream::from_state(&random);
        disback
            .train(17, latents(8), &mut rng, |_, _| Ok(true))
            .unwrap();
        let average = disback.state().unwrap()["generator.average.mean"].clone();
        (student.values(), fake.values(), values(&average))
    };
    assert_eq!(whole, resumed);
    let (student, fake, target) = models();
    let mut other = base(config, &student, &fake, &target);
    let mut broken = state.clone();
    broken.remove("fake.steps");
    assert!(other.load_state(&broken).is_err());
    broken.remove("iteration");
    assert!(other
        .load_state(&broken)
        .unwrap_err()
        .to_string()
        .contains("iteration"));
}

#[test]
fn paths_are_copies_and_files_hold_the_same() {
    let model = Gauss::new(1.0, 0.5);
    let mut path = Path::of(&model.vars()).unwrap();
    model
        .mean
        .set(&Tensor::new(7.0, &Device::Cpu).unwrap())
        .unwrap();
    path.record(&model.vars()).unwrap();
    let means = |path: &Path| -> Vec<f64> {
        let one = |i| values(&path.state(i, &Device::Cpu).unwrap()["mean"])[0];
        (0..path.len()).map(one).collect()
    };
    assert_eq!(means(&path), [1.0, 7.0]);
    assert_eq!(means(&path.reversed()), [7.0, 1.0]);
    assert_eq!(means(&path.reversed().reversed()), means(&path));
    let folder = tempfile::tempdir().unwrap();
    path.save(folder.path()).unwrap();
    assert!(
        path.save(folder.path()).is_err(),
        "an older path is not overwritten"
    );
    let opened = Path::open(folder.path()).unwrap();
    assert_eq!(means(&opened), [1.0, 7.0]);
    opened.reversed().load_into(1, &model.vars()).unwrap();
    assert_eq!(model.values(), [1.0, 0.5]);
    // A path of other variables changes nothing.
    let other = vec![("mean".to_string(), model.mean.clone())];
    assert!(opened
        .load_into(0, &other)
        .unwrap_err()
        .to_string()
        .contains("std"));
    assert!(opened.load_into(2, &model.vars()).is_err());
    std::fs::remove_file(folder.path().join("checkpoint-00001.safetensors")).unwrap();
    assert!(Path::open(folder.path())
        .unwrap_err()
        .to_string()
        .contains("00001"));
}

proptest! {
    #![proptest_config(cases(40))]

    #[test]
    fn equal_denoisers_give_no_gradient(mean in -3.0..3.0f64, std in 0.1..3.0f64, seed in 0u64..99) {
        let (a, b) = (Gauss::new(mean, std), Gauss::new(mean, std));
        let x = normal(seed, &[5, 2, 3], DType::F64);
        let noise = normal(seed + 100, &[5, 2, 3], DType::F64);
        let at = Levels::PerRow(levels().into_iter().step_by(20).collect());
        for weight in [GradWeight::DmdL1Norm, GradWeight::DiffInstruct(WeightFn::One)] {
            let found = matching((&a, &b), &x, &noise, &at, weight, &Condition::Null).unwrap();
            prop_assert!(values(&found.gradient).iter().all(|g| *g == 0.0));
            prop_assert_eq!(found.loss().unwrap(), 0.0);
        }
    }

    #[test]
    fn levels_ascend_between_their_exact_ends(
        n in 2usize..200, min in 1e-3..1.0f64, span in 0.1..100.0f64, rho in 0.5..10.0f64,
    ) {
        let sigmas = KarrasSigmas { n, min, max: min + span, rho }.sigmas().unwrap();
        prop_assert_eq!(sigmas.len(), n);
        prop_assert_eq!((sigmas[0], sigmas[n - 1]), (min, min + span));
        prop_assert!(sigmas.windows(2).all(|w| w[0] < w[1]));
    }

    #[test]
    fn targets_walk_to_the_teacher_and_stay(
        length in 1usize..9, every in 1usize..50, iteration in 0usize..600,
    ) {
        let vars = Gauss::new(0.0, 1.0);
        let mut path = Path::of(&vars.vars()).unwrap();
        for i in 1..length {
            vars.mean.set(&Tensor::new(i as f64, &Device::Cpu).unwrap()).unwrap();
            path.record(&vars.vars()).unwrap();
        }
        let tracker = Backtracker::new(&path, every).unwrap();
        let due = tracker.target_at(iteration);
        prop_assert_eq!(due, (iteration / every).min((length - 1).max(1) - 1));
        tracker.load_start(&vars.vars()).unwrap();
        prop_assert_eq!(vars.values()[0], (length - 1) as f64);
        tracker.load_target(due, &vars.vars()).unwrap();
        // From the snapshot before the most degraded one down to 0, the teacher.
        let wanted = length.saturating_sub(2).saturating_sub(iteration / every);
        prop_assert_eq!(vars.values()[0], wanted as f64);
    }
}

/// A student whose samples the target does not change has a weight of 0 / 0.
#[test]
fn samples_that_the_target_leaves_alone_get_no_gradient() {
    let same = Closure::new(Prediction::X0, |x: &Tensor, _: &Levels, _: &Condition| {
        Ok(x.clone())
    });
    let other = Closure::new(Prediction::X0, |x: &Tensor, _: &Levels, _: &Condition| {
        Ok((x + 1.0)?)
    });
    let x = normal(1, &[3, 4], DType::F64);
    let none = x.zeros_like().unwrap();
    let at = Levels::Same(Edm::at_sigma(1.0).unwrap());
    let null = Condition::Null;
    let found = matching(
        (&same, &other),
        &x,
        &none,
        &at,
        GradWeight::DmdL1Norm,
        &null,
    )
    .unwrap();
    assert!(values(&found.gradient).iter().all(|g| *g == 0.0));
    // Elsewhere the mean of |g| is what the difference is relative to.
    let found = matching(
        (&other, &same),
        &x,
        &none,
        &at,
        GradWeight::DmdL1Norm,
        &null,
    )
    .unwrap();
    assert!(values(&found.gradient)
        .iter()
        .all(|g| (g + 1.0).abs() < 1e-12));
}

#[test]
fn the_discriminator_learns_and_the_student_hears_it() {
    let config = ScoreDistillConfig {
        gan: Some(GanConfig {
            gen_weight: 1.0,
            disc_weight: 1.0,
            max_index: 3,
        }),
        ..config()
    };
    // A head without weight yet: its logits are exactly 0.
    let head = Var::new(0.0f64, &Device::Cpu).unwrap();
    let judge = |x: &Tensor, _: &Levels, _: &Condition| -> Result<Tensor> {
        Ok(x.mean_keepdim(1)?.broadcast_mul(head.as_tensor())?)
    };
    let (student, fake, target) = (
        Gauss::new(-1.0, 0.5),
        Gauss::new(1.0, 0.5),
        Gauss::new(1.0, 0.5),
    );
    let mut vars = fake.vars();
    vars.push(("head".into(), head.clone()));
    let all = vars.iter().map(|(_, v)| v.clone()).collect();
    let player = Player {
        model: &student as &dyn OneStepGenerator,
        vars: student.vars(),
        optimizer: sgd(&student),
    };
    let auxiliary = Player {
        model: &fake as &dyn Denoiser,
        vars,
        optimizer: SGD::new(all, 0.0).unwrap(),
    };
    let distill = ScoreDistill::new(config, levels(), player, auxiliary, &target).unwrap();
    let mut distill = distill.discriminator(&judge).unwrap();
    let mut rng = RandomStream::new(4);
    let (z, real) = (
        normal(1, &[64, 2], DType::F64),
        (normal(2, &[64, 2], DType::F64) * 0.5).unwrap(),
    );
    let real = (real + 1.0).unwrap();
    let batch = Batch {
        real: Some((&real, &Condition::Null)),
        ..Batch::new(&z)
    };
    let lacking = distill.step(&Batch::new(&z), &mut rng);
    assert!(lacking.unwrap_err().to_string().contains("data"));
    let stats = distill.step(&batch, &mut rng).unwrap();
    // ln 2 at logits of 0.
    assert!((stats.generator.unwrap().gan_loss.unwrap() - 0.5f64.ln().abs()).abs() < 1e-12);
    for _ in 0..20 {
        distill.step(&batch, &mut rng).unwrap();
    }
    let judged: f64 = head.to_scalar().unwrap();
    assert!(judged > 0.01, "data has the larger mean: {judged}");
    let missing = distill.gen_step(&z, &Condition::Null, &draw_at(&z, 5), None);
    assert!(missing.is_err());
    let fresh = base(self::config(), &student, &fake, &target);
    assert!(fresh.discriminator(&judge).is_err(), "weights are wanted");
    // Weights without a discriminator are not ignored.
    let weighted = ScoreDistillConfig {
        gan: Some(GanConfig::default()),
        ..self::config()
    };
    let error = base(weighted, &student, &fake, &target).step(&batch, &mut rng);
    assert!(error
        .unwrap_err()
        .to_string()
        .contains("without a discriminator"));
}

fn draw_at(like: &Tensor, index: u32) -> Draw {
    Draw {
        indices: vec![index; like.dims()[0]],
        noise: like.ones_like().unwrap(),
    }
}

#[test]
fn bad_input_is_named_and_changes_nothing() {
    let (student, fake, target) = (
        Gauss::new(-1.0, 0.5),
        Gauss::new(1.0, 0.5),
        Gauss::new(1.0, 0.5),
    );
    let mut distill = base(config(), &student, &fake, &target);
    let z = normal(1, &[4, 2], DType::F64);
    let null = Condition::Null;
    // Beyond the levels; too few rows.
    assert!(distill
        .gen_step(&z, &null, &draw_at(&z, 100), None)
        .is_err());
    let few = draw_at(&z.narrow(0, 0, 2).unwrap(), 1);
    assert!(distill.gen_step(&z, &null, &few, None).is_err());
    // NaN from the target is found before the student moves.
    target
        .mean
        .set(&Tensor::new(f64::NAN, &Device::Cpu).unwrap())
        .unwrap();
    let mut rng = RandomStream::new(0);
    let error = distill
        .step(&Batch::new(&z), &mut rng)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("target") && error.contains("step 0"),
        "{error}"
    );
    assert_eq!((student.values(), fake.values()), ([-1.0, 0.5], [1.0, 0.5]));
    // NaN from the fake denoiser, in its own step.
    target
        .mean
        .set(&Tensor::new(1.0, &Device::Cpu).unwrap())
        .unwrap();
    fake.mean
        .set(&Tensor::new(f64::NAN, &Device::Cpu).unwrap())
        .unwrap();
    assert!(distill.step(&Batch::new(&z), &mut rng).is_err());
    assert_eq!((student.values(), fake.values()[1]), ([-1.0, 0.5], 0.5));
    fake.mean
        .set(&Tensor::new(1.0, &Device::Cpu).unwrap())
        .unwrap();
    // Half precision and nothing at all.
    let at = Levels::Same(Edm::at_sigma(1.0).unwrap());
    let weight = GradWeight::DmdL1Norm;
    let half = z.to_dtype(DType::F16).unwrap();
    let error = matching((&target, &fake), &half, &half, &at, weight, &null).unwrap_err();
    assert!(error.to_string().contains("F16"), "{error}");
    let empty = z.narrow(0, 0, 0).unwrap();
    assert!(matching((&target, &fake), &empty, &empty, &at, weight, &null).is_err());
    let clean = Levels::Same(Level::new(1.0, 0.0, 0.0).unwrap());
    assert!(fake_loss(&fake, &z, &z, &clean, 0.5, &null).is_err());
    // One row is enough.
    let one = z.narrow(0, 0, 1).unwrap();
    assert!(distill.step(&Batch::new(&one), &mut rng).is_ok());
}

#[test]
fn bad_settings_are_named() {
    let bad = [
        ScoreDistillConfig {
            gen_lr: -1.0,
            ..config()
        },
        ScoreDistillConfig {
            fake_lr: f64::NAN,
            ..config()
        },
        ScoreDistillConfig {
            fake_updates_per_gen: 0,
            ..config()
        },
        ScoreDistillConfig {
            min_step_pct: 1.0,
            ..config()
        },
        ScoreDistillConfig {
            max_step_pct: 0.01,
            ..config()
        },
        ScoreDistillConfig {
            max_grad_norm: 0.0,
            ..config()
        },
        ScoreDistillConfig {
            sigma_data: 0.0,
            ..config()
        },
        ScoreDistillConfig {
            gen_ema: 1.0,
            ..config()
        },
        ScoreDistillConfig {
            gan: Some(GanConfig {
                disc_weight: 0.0,
                ..GanConfig::default()
            }),
            ..config()
        },
    ];
    assert!(bad.iter().all(|c| c.validate().is_err()));
    assert!(ScoreDistillConfig::default().validate().is_ok());
    assert_eq!(ScoreDistillConfig::default().step_range(1000), (20, 980));
    let all = ScoreDistillConfig {
        min_step_pct: 0.0,
        max_step_pct: 1.0,
        ..config()
    };
    assert_eq!(all.step_range(40), (0, 39));
    assert!(KarrasSigmas {
        n: 1,
        ..KarrasSigmas::default()
    }
    .sigmas()
    .is_err());
    assert!(KarrasSigmas {
        max: 0.001,
        ..KarrasSigmas::default()
    }
    .levels()
    .is_err());
    let path = Path::of(&Gauss::new(0.0, 1.0).vars()).unwrap();
    assert!(Backtracker::new(&path, 0).is_err());
    let model = Gauss::new(0.0, 1.0);
    let descending = levels().into_iter().rev().collect();
    let player = Player {
        model: &model as &dyn OneStepGenerator,
        vars: model.vars(),
        optimizer: sgd(&model),
    };
    let other = Gauss::new(0.0, 1.0);
    let fake = Player {
        model: &other as &dyn Denoiser,
        vars: other.vars(),
        optimizer: sgd(&other),
    };
    assert!(ScoreDistill::new(config(), descending, player, fake, &other).is_err());
}

#[test]
fn generators_are_denoisers_at_one_level() {
    let model = Gauss::new(1.0, 0.5);
    let z = normal(1, &[4, 2], DType::F64);
    let student = DenoiserGenerator::edm(&model, 5.0).unwrap();
    let made = student.generate(&z, &Condition::Null).unwrap();
    let at = Levels::Same(Edm::at_sigma(5.0).unwrap());
    let wanted = model
        .denoise(&(z * 5.0).unwrap(), &at, &Condition::Null)
        .unwrap()
        .x0;
    assert!(distance(&made, &wanted) < 1e-14);
    assert!(DenoiserGenerator::edm(&model, 0.0).is_err());
    // A flow is a denoiser, and so a generator.
    let flow = FromVelocity(|x: &Tensor, _: &Tensor| x.neg());
    assert!(DenoiserGenerator::edm(flow, 80.0)
        .unwrap()
        .generate(&made, &Condition::Null)
        .is_ok());
}

#[test]
fn a_guided_teacher_works_at_a_level_per_row() {
    let mixture = mixture(DType::F64);
    let x = normal(3, &[4, 3], DType::F64);
    let classes = Condition::classes(&[0, 1, 2, 0], &Device::Cpu).unwrap();
    let at = Levels::PerRow(levels().into_iter().step_by(25).collect());
    let guided = |scale| ClassifierFree {
        denoiser: &mixture,
        scale,
        null: Condition::Null,
    };
    let run = |d: &dyn Denoiser, c: &Condition| d.denoise(&x, &at, c).unwrap().x0;
    assert!(distance(&run(&guided(1.0), &classes), &run(&mixture, &classes)) < 1e-14);
    assert!(
        distance(
            &run(&guided(0.0), &classes),
            &run(&mixture, &Condition::Null)
        ) < 1e-14
    );
}

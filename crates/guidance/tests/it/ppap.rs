//! Plug-and-play guidance.

use crate::support::*;
use candle_core::{DType, Device, Module, ModuleT, Tensor, Var};
use candle_nn::{Optimizer, VarBuilder, SGD};
use flows::schedule::{Beta, Ddpm};
use flows::{Condition, Grid, RandomStream, Sampler, Schedule};
use guidance::basic::NoisyModel;
use guidance::ppap::*;
use guidance::{ClassifierGuidance, Error, Result};
use nn::linear::{linear, Linear};
use nn::lora::PeftSpec;
use proptest::prelude::*;
use std::collections::BTreeMap;

const STEPS: usize = 50;

/// Two layers, three classes.
struct Net(Linear, Linear);

impl Module for Net {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        self.1.forward(&self.0.forward(x)?.tanh()?)
    }
}

fn build(vb: VarBuilder) -> Result<Net> {
    Ok(Net(
        linear(3, 6, vb.pp("body"))?,
        linear(6, 3, vb.pp("head"))?,
    ))
}

fn weights() -> BTreeMap<String, Tensor> {
    let tensors = [
        ("body.weight", normal(1, &[6, 3], DType::F64)),
        ("body.bias", normal(2, &[6], DType::F64)),
        ("head.weight", normal(3, &[3, 6], DType::F64)),
        ("head.bias", normal(4, &[3], DType::F64)),
    ];
    tensors
        .into_iter()
        .map(|(n, t)| (n.to_string(), t))
        .collect()
}

fn bank(experts: usize) -> ExpertBank<'static, Net> {
    let spec = PeftSpec {
        rank: 2,
        alpha: 2.0,
        ..PeftSpec::default()
    };
    let ranges = Ranges::new(experts, STEPS).unwrap();
    ExpertBank::new(build, weights(), ranges, &spec, &mut RandomStream::new(5)).unwrap()
}

fn sgd(vars: Vec<Var>, transfer: &Transfer) -> Result<SGD> {
    Ok(SGD::new(vars, transfer.lr)?)
}

fn trained(init: Init) -> (ExpertBank<'static, Net>, Vec<Vec<f64>>) {
    let mut bank = bank(3);
    let schedule = Ddpm::new(Beta::SquaredCosine, STEPS).unwrap();
    let mut data = RandomStream::new(6);
    let mut generated = |rows| Ok(data.normal(0.0, 1.0, (rows, 3), DType::F64, &Device::Cpu)?);
    let transfer = Transfer {
        iterations: 120,
        batch: 32,
        lr: 1.0,
        init,
        ..Transfer::default()
    };
    let losses = transfer.run(
        &mut bank,
        &schedule,
        &mut generated,
        sgd,
        &mut RandomStream::new(7),
    );
    (bank, losses.unwrap())
}

#[test]
fn ranges_cover_all_steps_once() {
    for (experts, steps) in [(1, 7), (5, 1000), (3, 10), (8, 8)] {
        let ranges = Ranges::new(experts, steps).unwrap();
        assert_eq!((ranges.all().len(), ranges.steps()), (experts, steps));
        for t in 0..steps {
            let owner = ranges.route(t).unwrap();
            assert_eq!(
                owner,
                ranges.all().iter().filter(|(lo, _)| *lo <= t).count() - 1
            );
        }
        assert_eq!(ranges.route(steps).unwrap(), experts - 1);
        assert!(ranges.route(steps + 1).is_err());
    }
    // At a boundary the authors' program takes the expert below.
    let ranges = Ranges::new(5, 1000).unwrap();
    assert_eq!(
        (
            ranges.route(200).unwrap(),
            ranges.route_inclusive(200).unwrap()
        ),
        (1, 0)
    );
    assert!(Ranges::new(0, 10).is_err() && Ranges::new(11, 10).is_err());
}

#[test]
fn experts_start_as_the_frozen_network() {
    let bank = bank(4);
    let x = normal(8, &[5, 3], DType::F64);
    let base = bank.base().forward(&x).unwrap();
    for t in [0, 13, 49] {
        assert_eq!(bits(&bank.forward(&x, &[t; 5]).unwrap()), bits(&base));
    }
    assert!((bank.trainable_fraction() - 24.0 / 45.0).abs() < 1e-12);
}

#[test]
fn rows_go_to_their_own_experts() {
    let (bank, _) = trained(Init::FromBase);
    let x = normal(9, &[6, 3], DType::F64);
    let t = [40, 0, 20, 49, 16, 33];
    let all = bank.forward(&x, &t).unwrap();
    for i in 0..6 {
        let one = bank
            .forward(&x.narrow(0, i, 1).unwrap(), &t[i..i + 1])
            .unwrap();
        assert!(distance(&one, &all.narrow(0, i, 1).unwrap()) < 1e-12);
    }
    assert!(bank.forward(&x, &[0; 5]).is_err());
    assert!(bank.forward(&x, &[STEPS + 1; 6]).is_err());
}

#[test]
fn transfer_lowers_the_loss_and_touches_nothing_else() {
    let (bank, losses) = trained(Init::FromBase);
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    let all = |part: std::ops::Range<usize>| {
        losses
            .iter()
            .map(|expert| mean(&expert[part.clone()]))
            .sum::<f64>()
    };
    assert!(
        all(90..120) < 0.95 * all(0..30),
        "{} {}",
        all(0..30),
        all(90..120)
    );
    let x = normal(10, &[4, 3], DType::F64);
    assert_eq!(
        bits(&bank.base().forward(&x).unwrap()),
        bits(&super::ppap::bank(1).base().forward(&x).unwrap())
    );
    for n in 0..3 {
        let merged = bank.adapters(n).unwrap().merge().unwrap();
        for (name, old) in weights() {
            let changed = distance(&merged[&name], &old) > 0.0;
            assert_eq!(changed, name.starts_with("body"), "{name}");
        }
    }
    assert!(bank.adapters(3).is_none());
    // An expert that starts from the one before begins lower than one that starts afresh.
    let (_, chained) = trained(Init::Chained);
    assert_eq!(chained[0], losses[0]);
    assert_ne!(chained[1][0], losses[1][0]);
    // The same seed gives the same bits.
    assert_eq!(trained(Init::FromBase).1, losses);
}

#[test]
fn adapters_are_saved_without_the_network() {
    let (bank, _) = trained(Init::FromBase);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("experts.safetensors");
    bank.save_adapters(&path).unwrap();
    let mut fresh = super::ppap::bank(3);
    let x = normal(11, &[3, 3], DType::F64);
    let t = [0, 20, 40];
    assert_ne!(
        bits(&fresh.forward(&x, &t).unwrap()),
        bits(&bank.forward(&x, &t).unwrap())
    );
    fresh.load_adapters(&path).unwrap();
    assert_eq!(
        bits(&fresh.forward(&x, &t).unwrap()),
        bits(&bank.forward(&x, &t).unwrap())
    );
    let error = super::ppap::bank(2).load_adapters(&path).unwrap_err();
    assert!(matches!(error, Error::Mismatch { .. }));
}

/// A network with a batch norm, which behaves otherwise in training.
struct Normed(candle_nn::BatchNorm, Linear);

impl ModuleT for Normed {
    fn forward_t(&self, x: &Tensor, train: bool) -> candle_core::Result<Tensor> {
        self.1.forward(&self.0.forward_t(x, train)?)
    }
}

fn normed() -> ExpertBank<'static, Normed> {
    let ones = Tensor::ones(3, DType::F64, &Device::Cpu).unwrap();
    let tensors = [
        ("norm.weight", ones.clone()),
        ("norm.bias", ones.zeros_like().unwrap()),
        ("norm.running_mean", ones.zeros_like().unwrap()),
        ("norm.running_var", ones),
        ("out.weight", normal(1, &[4, 3], DType::F64)),
        ("out.bias", normal(2, &[4], DType::F64)),
    ];
    let weights = tensors
        .into_iter()
        .map(|(n, t)| (n.to_string(), t))
        .collect();
    let build = |vb: VarBuilder| {
        let norm = candle_nn::batch_norm(3, 1e-5, vb.pp("norm"))?;
        Ok(Normed(norm, linear(3, 4, vb.pp("out"))?))
    };
    let spec = PeftSpec {
        rank: 2,
        ..PeftSpec::default()
    };
    let ranges = Ranges::new(2, STEPS).unwrap();
    let roles = Roles {
        teacher: Preprocess::image(&[0.4, 0.5, 0.6], &[0.2, 0.3, 0.4]),
        student: Preprocess {
            scale: 2.0,
            ..Preprocess::default()
        },
    };
    let bank = ExpertBank::new(build, weights, ranges, &spec, &mut RandomStream::new(5)).unwrap();
    bank.with_preprocess(roles).unwrap()
}

/// Experts learn the statistics of their noise, and these and what each role sees are saved with them.
#[test]
fn statistics_and_preprocessing_belong_to_the_experts() {
    let mut bank = normed();
    let schedule = Ddpm::new(Beta::SquaredCosine, STEPS).unwrap();
    let x = normal(21, &[5, 3], DType::F64);
    let taught = bank.teach(&x).unwrap();
    let column = |v: [f64; 3]| Tensor::new(&v, &Device::Cpu).unwrap();
    let seen = ((&x * 0.5).unwrap() + 0.5).unwrap();
    let seen = seen.broadcast_sub(&column([0.4, 0.5, 0.6])).unwrap();
    let seen = seen.broadcast_div(&column([0.2, 0.3, 0.4])).unwrap();
    let direct = bank.base().forward_t(&seen, false).unwrap();
    assert!(distance(&taught, &direct) < 1e-12);
    let doubled = bank.base().forward_t(&(&x * 2.0).unwrap(), false).unwrap();
    assert!(distance(&bank.forward(&x, &[0; 5]).unwrap(), &doubled) < 1e-12);

    let mut data = RandomStream::new(6);
    let mut generated = |rows| Ok(data.normal(3.0, 0.1, (rows, 3), DType::F64, &Device::Cpu)?);
    let transfer = Transfer {
        iterations: 60,
        batch: 32,
        lr: 0.01,
        ..Transfer::default()
    };
    transfer
        .run(
            &mut bank,
            &schedule,
            &mut generated,
            sgd,
            &mut RandomStream::new(7),
        )
        .unwrap();
    let mean = |n: usize| {
        let state = bank.adapters(n).unwrap().state().unwrap();
        values(&state["norm.running_mean"])[0]
    };
    // Little noise leaves the doubled mean of the data, much noise takes it away.
    assert!(mean(0) > 4.5 && mean(1) < 4.0, "{} {}", mean(0), mean(1));
    // The frozen network has its own.
    assert_eq!(bits(&bank.teach(&x).unwrap()), bits(&taught));

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("experts.safetensors");
    bank.save_adapters(&path).unwrap();
    let mut fresh = normed().with_preprocess(Roles::default()).unwrap();
    fresh.load_adapters(&path).unwrap();
    assert_eq!(fresh.preprocess(), bank.preprocess());
    let t = [0, 10, 30, 40, 49];
    assert_eq!(
        bits(&fresh.forward(&x, &t).unwrap()),
        bits(&bank.forward(&x, &t).unwrap())
    );
    assert!(bank
        .forward(&normal(1, &[2, 2], DType::F64), &[0; 2])
        .is_err());
    let flat = Roles {
        teacher: Preprocess::image(&[0.1], &[0.0]),
        ..Roles::default()
    };
    assert!(normed().with_preprocess(flat).is_err());
}

#[test]
fn a_file_that_does_not_fit_changes_nothing() {
    let (bank, _) = trained(Init::FromBase);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("experts.safetensors");
    bank.save_adapters(&path).unwrap();
    // The last expert of the file lacks a tensor.
    let mut file = tensor_core::checkpoint::Checkpoint::load(&path, &Device::Cpu).unwrap();
    file.tensors.remove("2.body.bias").unwrap();
    file.save(&path).unwrap();
    let mut fresh = super::ppap::bank(3);
    let x = normal(11, &[3, 3], DType::F64);
    let before = bits(&fresh.forward(&x, &[0, 20, 40]).unwrap());
    let error = fresh.load_adapters(&path).unwrap_err().to_string();
    assert!(error.contains("body.bias"), "{error}");
    assert_eq!(bits(&fresh.forward(&x, &[0, 20, 40]).unwrap()), before);
    for n in 0..3 {
        let state = fresh.adapters(n).unwrap().state().unwrap();
        let plain = super::ppap::bank(3).adapters(n).unwrap().state().unwrap();
        for (name, tensor) in plain {
            assert_eq!(bits(&state[&name]), bits(&tensor), "{name}");
        }
    }
}

proptest! {
    #![proptest_config(cases(16))]

    /// A divergence: not negative, and zero for equal distributions alone.
    #[test]
    fn the_loss_is_a_divergence(seed in 0u64..1000, tau in 0.2f64..2.0) {
        let (teacher, student) = (normal(seed, &[3, 5], DType::F64), normal(seed + 1, &[3, 5], DType::F64));
        let loss = |reduction| TransferLoss::KlLogits { tau, reduction };
        let mean = values(&loss(KlReduction::PaperMean).per_sample(&teacher, &student).unwrap());
        let sum = values(&loss(KlReduction::Sum).per_sample(&teacher, &student).unwrap());
        for (m, s) in mean.iter().zip(&sum) {
            prop_assert!(*m > 0.0 && (m * 5.0 - s).abs() < 1e-12);
        }
        let same = (&teacher / tau).unwrap();
        let zero = values(&loss(KlReduction::Sum).per_sample(&teacher, &same).unwrap());
        prop_assert!(zero.iter().all(|l| l.abs() < 1e-12));
    }
}

#[test]
fn maps_have_losses_too() {
    let (teacher, student) = (
        normal(1, &[2, 3, 4, 4], DType::F64),
        normal(2, &[2, 3, 4, 4], DType::F64),
    );
    let mse = values(&TransferLoss::Mse.per_sample(&teacher, &student).unwrap());
    let off = values(
        &(&teacher - &student)
            .unwrap()
            .sqr()
            .unwrap()
            .flatten_from(1)
            .unwrap()
            .mean(1)
            .unwrap(),
    );
    assert!(mse.iter().zip(&off).all(|(a, b)| (a - b).abs() < 1e-12));
    let pixels = TransferLoss::CrossEntropyPixels;
    let own = values(
        &pixels
            .per_sample(&teacher, &(&teacher * 50.0).unwrap())
            .unwrap(),
    );
    let other = values(&pixels.per_sample(&teacher, &student).unwrap());
    assert!(own.iter().zip(&other).all(|(a, b)| *a < 0.05 && b > a));
    assert!(TransferLoss::Mse
        .per_sample(&teacher, &student.narrow(0, 0, 1).unwrap())
        .is_err());
}

#[test]
fn guides_are_the_gradient_of_the_log_probability() {
    let (bank, _) = trained(Init::FromBase);
    let schedule = Ddpm::new(Beta::SquaredCosine, STEPS).unwrap();
    let model = mixture(DType::F64);
    let class = Condition::classes(&[2], &Device::Cpu).unwrap();
    let levels: Vec<_> = (0..5)
        .map(|k| schedule.level(f64::from(45 - 10 * k)).unwrap())
        .collect();
    let grid = Grid::with_clean_end(levels).unwrap();
    let sample = |w: f64, objective: Objective| {
        let guide = ExpertGuide {
            objective,
            ..ExpertGuide::new(&bank)
        };
        let rule = ClassifierGuidance::new(guide, w);
        let mut sampler = Sampler::new(&model, grid.clone()).guidance(rule);
        let out = sampler.sample(
            &normal(12, &[8, 3], DType::F64),
            &class,
            None,
            &RandomStream::new(0),
        );
        out.unwrap()
    };
    let free = sample(0.0, Objective::LogProb);
    let led = sample(3.0, Objective::LogProb);
    assert!(distance(&led.x, &free.x) > 1e-3);
    assert_eq!(led.nfe.classifier_backward, 8 * 5);
    // The same objective by hand gives the same bits.
    let own: Objective = Objective::Custom(Box::new(|out: &Tensor, c: &Condition| {
        let Condition::Class(c) = c else {
            panic!("classes")
        };
        let log_p = nn::softmax::log_softmax(out, 1)?;
        Ok(log_p.gather(&c.unsqueeze(1)?, 1)?.squeeze(1)?)
    }));
    assert_eq!(bits(&sample(3.0, own).x), bits(&led.x));
    let map = normal(13, &[1, 3], DType::F64);
    // Along a random direction, against differences, for every objective and expert.
    let x = normal(14, &[8, 3], DType::F64);
    for objective in [Objective::LogProb, Objective::Map(map)] {
        let guide = ExpertGuide {
            objective,
            ..ExpertGuide::new(&bank)
        };
        for level in grid.levels().iter().take(5) {
            let wanted = class.for_rows(8).unwrap();
            let value = |x: &Tensor| guide.log_prob(x, level, &wanted);
            let rng = &mut RandomStream::new(1);
            flows::denoiser::directional_check("the guide", value, &x, rng).unwrap();
        }
    }
}

#[test]
fn generated_samples_do_not_depend_on_being_asked_again() {
    let model = mixture(DType::F64);
    let grid = Grid::uniform_lambda(&flows::schedule::VpSde::default(), 8).unwrap();
    let like = normal(1, &[1, 3], DType::F64);
    let rng = RandomStream::new(1);
    let x = generate(&model, &grid, &like, 7, 3, &rng).unwrap();
    assert_eq!(x.dims(), [7, 3]);
    assert_eq!(
        bits(&x),
        bits(&generate(&model, &grid, &like, 7, 3, &rng).unwrap())
    );
    assert!(generate(&model, &grid, &like, 0, 3, &rng).is_err());

    // The same samples in files; what was stopped goes on.
    let folder = tempfile::tempdir().unwrap();
    let shards = || generate_shards(&model, &grid, &like, (7, 3), folder.path(), &rng).unwrap();
    assert_eq!(shards().len(), 7);
    let lost = folder.path().join("000000003.safetensors");
    std::fs::remove_file(&lost).unwrap();
    shards();
    let mut files = Shards::open(folder.path(), &Device::Cpu).unwrap();
    let mut order = RandomStream::new(3);
    let mut rows = |files: &mut Shards, n| {
        let drawn = files.draw(n, &mut order).unwrap();
        (0..n)
            .map(|i| bits(&drawn.narrow(0, i, 1).unwrap()))
            .collect::<Vec<_>>()
    };
    // A pass has every sample once, in pieces of any size.
    let mut pass = rows(&mut files, 5);
    pass.extend(rows(&mut files, 2));
    let mut all: Vec<_> = (0..7).map(|i| bits(&x.narrow(0, i, 1).unwrap())).collect();
    pass.sort();
    all.sort();
    assert_eq!(pass, all);
    assert_eq!(rows(&mut files, 20).len(), 20);
    let nothing = tempfile::tempdir().unwrap();
    assert!(Shards::open(nothing.path(), &Device::Cpu).is_err());
    assert!(Shards::open(nothing.path().join("no"), &Device::Cpu).is_err());
}

/// Experts know whole steps alone.
#[test]
fn a_time_between_steps_is_refused() {
    let bank = bank(2);
    let guide = ExpertGuide::new(&bank);
    let x = normal(1, &[2, 3], DType::F64);
    let class = Condition::classes(&[1, 2], &Device::Cpu).unwrap();
    let at = |t: f64| guide.log_prob(&x, &flows::Level::new(0.6, 0.8, t).unwrap(), &class);
    assert!(at(7.0).is_ok());
    for t in [0.35, -1.0] {
        assert!(at(t).unwrap_err().to_string().contains("whole number"));
    }
}

#[test]
fn bad_input_is_named() {
    let mut bank = bank(2);
    let schedule = Ddpm::new(Beta::SquaredCosine, STEPS).unwrap();
    let mut run = |transfer: Transfer, schedule: &Ddpm, fill: f64| {
        let mut data = |rows| Ok(Tensor::full(fill, (rows, 3), &Device::Cpu)?);
        let out = transfer.run(
            &mut bank,
            schedule,
            &mut data,
            sgd,
            &mut RandomStream::new(1),
        );
        out.unwrap_err().to_string()
    };
    let quick = || Transfer {
        iterations: 1,
        batch: 2,
        ..Transfer::default()
    };
    assert!(run(
        Transfer {
            iterations: 0,
            ..quick()
        },
        &schedule,
        0.0
    )
    .contains("iterations"));
    assert!(run(
        Transfer {
            batch: 0,
            ..quick()
        },
        &schedule,
        0.0
    )
    .contains("batch"));
    assert!(run(Transfer { lr: 0.0, ..quick() }, &schedule, 0.0).contains("lr"));
    let cold = TransferLoss::KlLogits {
        tau: 0.0,
        reduction: KlReduction::Sum,
    };
    assert!(run(
        Transfer {
            loss: cold,
            ..quick()
        },
        &schedule,
        0.0
    )
    .contains("tau"));
    let other = Ddpm::new(Beta::SquaredCosine, 20).unwrap();
    assert!(run(quick(), &other, 0.0).contains("the schedule"));
    assert!(run(quick(), &schedule, f64::NAN).contains("expert 0"));
}

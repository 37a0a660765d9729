use crate::support::*;
use candle_core::{DType, Device, Tensor, Var};
use optim::large_batch::*;
use optim::schedule::Schedule;
use optim::{Error, RandomStream};
use proptest::prelude::*;
use std::collections::BTreeMap;
use tensor_core::params::Params;

#[test]
fn reference() {
    let report = FILES.verify("large-batch", optim::verify::large_batch);
    assert_passed(&report, |name| name.starts_with("gbn"));
    assert_eq!(report.comparisons.len(), 7);
}

#[test]
fn learning_rate_scaling() {
    let scaled = |rule| scale_lr(0.1, 4096, 256, rule).unwrap();
    assert_close(
        &[
            scaled(LrScaling::Sqrt),
            scaled(LrScaling::Linear),
            scaled(LrScaling::None),
        ],
        &[0.4, 1.6, 0.1],
        1e-15,
    );
    // The exact ratio, where the stretch of epochs rounds up.
    let uneven = scale_lr(1.0, 1000, 96, LrScaling::Sqrt).unwrap();
    assert!((uneven - (1000.0f64 / 96.0).sqrt()).abs() < 1e-15);
    assert!(scale_lr(0.1, 0, 1, LrScaling::Sqrt).is_err());
    assert!(scale_lr(f64::NAN, 1, 1, LrScaling::Sqrt).is_err());
}

fn regime() -> Regime {
    let first = Setting {
        momentum: Some(0.9),
        optimizer: Some("sgd".into()),
        ..Setting::lr(0.1)
    };
    let second = Setting {
        weight_decay: Some(1e-4),
        ..Setting::default()
    };
    let milestones = BTreeMap::from([(0, first), (3, second), (7, Setting::lr(0.01))]);
    Regime::new(milestones, 10).unwrap()
}

#[test]
fn a_regime_remembers_what_was_set_before() {
    let regime = regime();
    assert_eq!(regime.at(2).weight_decay, None);
    let late = regime.at(9);
    assert_eq!(
        (late.lr, late.momentum, late.weight_decay),
        (Some(0.01), Some(0.9), Some(1e-4))
    );
    assert_eq!(late.optimizer.as_deref(), Some("sgd"));
    let schedule = regime.schedule(5).unwrap();
    assert_eq!(
        [0, 34, 35, 1000].map(|t| schedule.at(t)),
        [0.1, 0.1, 0.01, 0.01]
    );
    assert!(Regime::new(BTreeMap::from([(1, Setting::lr(0.1))]), 5).is_err());
    assert!(Regime::new(BTreeMap::from([(0, Setting::lr(-0.1))]), 5).is_err());
    assert!(Regime::new(BTreeMap::from([(0, Setting::lr(0.1))]), 0).is_err());
    let late = BTreeMap::from([(0, Setting::lr(0.1)), (5, Setting::lr(0.1))]);
    assert!(Regime::new(late, 5).is_err());
}

proptest! {
    #![proptest_config(cases(48))]

    /// The number of updates at each rate is at least the small batch's, and the same where the
    /// batches divide.
    #[test]
    fn adapting_keeps_the_updates(small in 1usize..64, factor in 1usize..16, n in 1usize..5) {
        let large = small * factor;
        let data = large * n;
        let adapted = regime().adapt(large, small, true, true).unwrap();
        prop_assert_eq!(adapted.total_epochs() * (data / large), 10 * (data / small));
        let base = regime();
        for (before, after) in base.milestones().keys().zip(adapted.milestones().keys()) {
            prop_assert_eq!(after * (data / large), before * (data / small));
        }
        let ratio = adapted.at(0).lr.unwrap() / base.at(0).lr.unwrap();
        prop_assert!((ratio * ratio - factor as f64).abs() < 1e-9);
    }
}

#[test]
fn noisy_gradients_have_the_covariance_of_the_formula() {
    let (n, m, draws) = (12, 4, 20_000);
    let mut rng = RandomStream::new(3);
    let grads = normal(&mut rng, &[n, 3], DType::F64);
    let noise = MultiplicativeNoise::matching(32, 4).unwrap();
    assert_eq!(noise.sigma2(), 7.0);
    let expected = values(&gradient_covariance(&grads, m, noise.sigma2()).unwrap());
    let rows = grads.to_vec2::<f64>().unwrap();
    let (mut mean, mut second) = ([0.0; 3], [[0.0; 3]; 3]);
    for _ in 0..draws {
        let z = noise
            .weights(m, DType::F64, &Device::Cpu, &mut rng)
            .unwrap()
            .to_vec1::<f64>()
            .unwrap();
        let mut g = [0.0; 3];
        for z in z {
            let row = &rows[rng.below(n).unwrap()];
            for (g, x) in g.iter_mut().zip(row) {
                *g += z * x / m as f64;
            }
        }
        for i in 0..3 {
            mean[i] += g[i] / draws as f64;
            for j in 0..3 {
                second[i][j] += g[i] * g[j] / draws as f64;
            }
        }
    }
    let (mut error, mut size) = (0.0, 0.0);
    for i in 0..3 {
        for j in 0..3 {
            let found = second[i][j] - mean[i] * mean[j];
            error += (found - expected[3 * i + j]).powi(2);
            size += expected[3 * i + j].powi(2);
        }
    }
    assert!((error / size).sqrt() < 0.05, "{}", (error / size).sqrt());
}

#[test]
fn noise_weights_the_losses_and_divides_by_their_number() {
    let w = var(&[1.0, -2.0, 0.5]);
    let noise = MultiplicativeNoise::new(4.0).unwrap();
    let rng = RandomStream::new(1);
    let z = noise
        .weights(3, DType::F64, &Device::Cpu, &mut rng.clone())
        .unwrap();
    let loss = noise.apply(&w, &mut rng.clone()).unwrap();
    let grads = loss.backward().unwrap();
    let expected: Vec<f64> = values(&z).iter().map(|z| z / 3.0).collect();
    assert_close(&values(grads.get(&w).unwrap()), &expected, 1e-15);
    let silent = MultiplicativeNoise::new(0.0).unwrap();
    let mean = silent.apply(&w, &mut rng.clone()).unwrap();
    assert_close(&values(&mean), &[-0.5 / 3.0], 1e-15);
    assert!(noise
        .apply(
            &Tensor::zeros((2, 2), DType::F64, &Device::Cpu).unwrap(),
            &mut rng.clone()
        )
        .is_err());
    assert!(noise
        .apply(
            &Tensor::zeros(0, DType::F64, &Device::Cpu).unwrap(),
            &mut rng.clone()
        )
        .is_err());
    assert!(MultiplicativeNoise::matching(4, 8).is_err());
    assert!(MultiplicativeNoise::new(-1.0).is_err());
}

#[test]
fn accumulated_gradient_is_the_one_pass_gradient() {
    let mut rng = RandomStream::new(5);
    let (x, y) = (
        normal(&mut rng, &[12, 4], DType::F64),
        normal(&mut rng, &[12, 1], DType::F64),
    );
    let w = normal_var(&mut rng, &[4, 1], DType::F64);
    let unused = var(&[1.0]);
    let loss = |from: usize, len: usize| {
        (x.narrow(0, from, len)?.matmul(&w)?.tanh()? - y.narrow(0, from, len)?)?
            .sqr()?
            .mean_all()
    };
    let whole = loss(0, 12).unwrap();
    let direct = values(whole.backward().unwrap().get(&w).unwrap());
    let norm = direct.iter().map(|x| x * x).sum::<f64>().sqrt();
    let config = GhostAccumulatorConfig { max_norm: None };
    let mut ghost = GhostAccumulator::new(vec![w.clone(), unused.clone()], config).unwrap();
    for _ in 0..2 {
        let step = ghost.run(3, |i| loss(4 * i, 4)).unwrap();
        assert_close(&values(step.grads.get(&w).unwrap()), &direct, 1e-10);
        assert!(step.grads.get(&unused).is_none());
        assert!((step.norm - norm).abs() < 1e-12);
        assert!((step.loss - values(&whole)[0]).abs() < 1e-12);
    }
    let config = GhostAccumulatorConfig {
        max_norm: Some(norm / 4.0),
    };
    let mut ghost = GhostAccumulator::new(vec![w.clone()], config).unwrap();
    let step = ghost.run(3, |i| loss(4 * i, 4)).unwrap();
    let quarter: Vec<f64> = direct.iter().map(|x| x / 4.0).collect();
    assert_close(&values(step.grads.get(&w).unwrap()), &quarter, 1e-12);
    assert!(ghost.run(0, |_| loss(0, 4)).is_err());
    let nan = ghost.run(1, |_| loss(0, 4)? * f64::NAN);
    assert!(matches!(nan, Err(Error::NonFiniteLoss { .. })));
    // A loss that is finite with a gradient that is not.
    let zero = var(&[0.0]);
    let mut ghost = GhostAccumulator::new(vec![zero.clone()], config).unwrap();
    let steep = ghost.run(1, |_| zero.sqrt()?.sum_all());
    assert!(matches!(steep, Err(Error::NonFiniteGradient(_))));
}

#[test]
fn diffusion_fits_what_it_is_given() {
    let t: Vec<f64> = (1..200).map(f64::from).collect();
    let logarithmic: Vec<f64> = t.iter().map(|t| 2.0 * t.ln() + 0.5).collect();
    let fit = fit_diffusion(&t, &logarithmic).unwrap();
    assert_close(
        &[fit.slope, fit.intercept, fit.r2_log],
        &[2.0, 0.5, 1.0],
        1e-12,
    );
    assert!(fit.r2_linear < 0.9);
    let linear = fit_diffusion(&t, &t).unwrap();
    assert!((linear.r2_linear - 1.0).abs() < 1e-12 && linear.r2_log < 0.9);
    let power: Vec<f64> = t.iter().map(|t| t.ln().powf(1.25)).collect();
    let fit = fit_diffusion(&t[1..], &power[1..]).unwrap();
    assert_close(&[fit.exponent, fit.alpha], &[1.25, 1.6], 1e-12);
    assert!(matches!(
        fit_diffusion(&t[..2], &t[..2]),
        Err(Error::TooFew { .. })
    ));
    assert!(matches!(
        fit_diffusion(&[1.0, 2.0, 3.0], &[1.0; 3]),
        Err(Error::TooFew { .. })
    ));
    assert!(fit_diffusion(&t, &t[1..]).is_err());
    assert!(fit_diffusion(&[0.0, 1.0, 2.0], &[1.0; 3]).is_err());
    assert!(fit_diffusion(&[1.0, 2.0, 3.0], &[1.0, f64::NAN, 1.0]).is_err());
    let steps = log_spaced_steps(1000, 20);
    assert!(steps.windows(2).all(|pair| pair[0] < pair[1]));
    assert_eq!((steps[0], *steps.last().unwrap()), (1, 1000));
}

#[test]
fn tracker_follows_every_tensor() {
    let params = named_params(1, DType::F32);
    let mut tracker = DiffusionTracker::from_params(params.clone()).unwrap();
    for t in 1..=5 {
        let ones = params[1].1.ones_like().unwrap();
        params[1]
            .1
            .set(&(params[1].1.as_tensor() + ones).unwrap())
            .unwrap();
        let distance = tracker.record(t).unwrap();
        assert!((distance - t as f64 * 5f64.sqrt()).abs() < 1e-5);
    }
    assert!(tracker.record(5).is_err());
    assert_eq!(tracker.steps(), [1.0, 2.0, 3.0, 4.0, 5.0]);
    assert_eq!(tracker.tensor_distances("conv").unwrap(), [0.0; 5]);
    assert_close(
        tracker.tensor_distances("bias").unwrap(),
        &tracker.distances(),
        1e-12,
    );
    assert!(tracker.fit_tensor("bias").unwrap().r2_linear > 0.999);
    assert!(tracker.fit_tensor("nothing").is_err());
    // A tensor that never moved has no exponent.
    assert!(tracker.fit_tensor("conv").is_err());
}

#[test]
fn landscape_of_a_plane_has_exponent_two() {
    let w = normal_var(&mut RandomStream::new(2), &[40], DType::F64);
    let slope = normal(&mut RandomStream::new(3), &[40], DType::F64);
    let params = Params::from_vars([w.clone()]).unwrap();
    let before = bits(&w);
    let probe = LandscapeProbe::default();
    let mut loss = || (w.as_tensor() * &slope)?.sum_all();
    let report = probe
        .measure(&params, &mut loss, &mut RandomStream::new(4))
        .unwrap();
    assert!((report.alpha - 2.0).abs() < 1e-9 && report.r2 > 1.0 - 1e-12);
    assert_eq!(bits(&w), before);
    let again = probe
        .measure(&params, &mut loss, &mut RandomStream::new(4))
        .unwrap();
    assert_eq!(report, again);
    // A loss that fails on the way leaves no trace either.
    let mut calls = 0;
    let mut failing = || {
        calls += 1;
        let sum = w.sum_all()?;
        if calls > 3 {
            sum * f64::NAN
        } else {
            Ok(sum)
        }
    };
    let failed = probe.measure(&params, &mut failing, &mut RandomStream::new(4));
    assert!(matches!(failed, Err(Error::NonFiniteLoss { .. })));
    assert_eq!(bits(&w), before);
    let flat = probe.measure(
        &params,
        &mut || w.zeros_like()?.sum_all(),
        &mut RandomStream::new(4),
    );
    assert!(flat.is_err());
    let bad = LandscapeProbe {
        distances: vec![0.1, 0.1],
        directions: 2,
    };
    assert!(bad.validate().is_err());
    let empty: Vec<Var> = vec![];
    assert!(Params::from_vars(empty).is_ok());
}

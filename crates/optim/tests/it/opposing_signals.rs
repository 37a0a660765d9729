use crate::support::*;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::Optimizer;
use optim::diagnostics::opposing::*;
use optim::{Error, ParamGroup, RandomStream, Stateful};
use proptest::prelude::*;

#[test]
fn reference() {
    let report = FILES.verify("opposing-signals", optim::verify::opposing_signals);
    assert_passed(&report, |_| false);
    assert_eq!(report.comparisons.len(), 4 + 11 + 4);
}

/// Losses in which examples 0..k swing against n-k..n from step 10 on.
fn swinging(n: usize, k: usize, trend: f64) -> LossRecorder {
    let mut recorder = LossRecorder::new(n, 100).unwrap();
    for t in 0..40usize {
        let swing = if t >= 10 { 0.1 * (t - 9) as f64 } else { 0.0 };
        let swing = if t % 2 == 0 { swing } else { -swing };
        let loss = |i: usize| {
            let base = 5.0 - trend * t as f64 + 0.001 * (i as f64).sin() * t as f64;
            if i < k {
                base + swing
            } else if i >= n - k {
                base - swing
            } else {
                base
            }
        };
        let row: Vec<f64> = (0..n).map(loss).collect();
        recorder.record(t, &tensor(&row)).unwrap();
    }
    recorder
}

fn config(k: usize) -> OpposingConfig {
    OpposingConfig {
        k: TopK::Count(k),
        ..OpposingConfig::default()
    }
}

#[test]
fn groups_that_swing_are_found_and_tracked() {
    let recorder = swinging(100, 3, 0.02);
    let pairs = detect(&recorder, &config(3)).unwrap();
    let [pair] = &pairs[..] else {
        panic!("{pairs:?}")
    };
    let sorted = |of: &[usize]| {
        let mut of = of.to_vec();
        of.sort_unstable();
        of
    };
    assert_eq!(pair.step, 38);
    let (low, high) = (vec![0, 1, 2], vec![97, 98, 99]);
    // From an even step to an odd one the first group falls.
    assert_eq!((sorted(&pair.down), sorted(&pair.up)), (low, high));
    assert!(pair.corr < -0.99 && pair.share > 0.8);
    assert!(pair.z_scores[..3].iter().all(|z| *z > 10.0));
    let curves = pair.track(&recorder).unwrap();
    assert_eq!(curves.steps.len(), 40);
    assert!(curves.up[39] > curves.bulk[39] && curves.down[39] < curves.bulk[39]);
    let weights = Weighting::from_pairs(&pairs, 100, 0.0).unwrap();
    assert_eq!(weights.0.iter().sum::<f32>(), 94.0);
    assert!(Weighting::from_pairs(&pairs, 10, 0.0).is_err());
    // Without the centering the trend may hide it; quiet losses give nothing.
    assert!(detect(&swinging(100, 3, 0.0), &config(3)).unwrap().len() == 1);
    let mut quiet = LossRecorder::new(10, 50).unwrap();
    for t in 0..20 {
        let row: Vec<f64> = (0..10).map(|i| 1.0 + 1e-7 * (i * t) as f64).collect();
        quiet.record(t, &tensor(&row)).unwrap();
    }
    assert!(detect(&quiet, &config(2)).unwrap().is_empty());
    let several = OpposingConfig {
        selection: Selection::Outlying(10.0),
        window: 4,
        ..config(3)
    };
    let steps: Vec<usize> = detect(&recorder, &several)
        .unwrap()
        .iter()
        .map(|p| p.step)
        .collect();
    assert_eq!(steps, [38]);
}

proptest! {
    #![proptest_config(cases(40))]

    #[test]
    fn offsets_and_order_have_no_influence(seed in 0u64..10_000, offset in -0.5f64..0.5) {
        let mut rng = RandomStream::new(seed);
        let n = 40;
        let order = rng.permutation(n).unwrap();
        let mut plain = LossRecorder::new(n, 30).unwrap();
        let (mut moved, mut permuted) = (plain.clone(), plain.clone());
        for t in 0..30 {
            let row = normal(&mut rng, &[n], DType::F64);
            plain.record(t, &row).unwrap();
            moved.record(t, &(&row + offset * t as f64).unwrap()).unwrap();
            let index = Tensor::new(order.clone(), &Device::Cpu).unwrap();
            permuted.record(t, &row.index_select(&index, 0).unwrap()).unwrap();
        }
        let find = |recorder| OpposingPair::strongest(recorder, &config(3)).unwrap().unwrap();
        let (a, b, c) = (find(&plain), find(&moved), find(&permuted));
        prop_assert_eq!((a.step, &a.up, &a.down), (b.step, &b.up, &b.down));
        prop_assert!((a.corr - b.corr).abs() < 1e-3);
        let original: Vec<usize> = c.up.iter().map(|i| order[*i] as usize).collect();
        prop_assert_eq!((a.step, &a.up), (c.step, &original));
    }

    #[test]
    fn the_toy_gradient_is_right(seed in 0u64..1000) {
        let toy = ToyOpposing { d_s: 3, d_o: 2, p: 0.5, b_std: 0.5, ..ToyOpposing::default() };
        let mut rng = RandomStream::new(seed);
        let data = toy.sample(12, &mut rng).unwrap();
        let model = toy.model(&mut rng).unwrap();
        let (in_c, in_b) = data.gradient(&model).unwrap();
        let mean = |m: &ToyModel| values(&data.losses(m).unwrap().mean_all().unwrap())[0];
        let h = 1e-6;
        let moved = |dc: f64, j: Option<usize>, db: f64| {
            let mut b = values(&model.b);
            if let Some(j) = j { b[j] += db; }
            mean(&ToyModel { c: model.c + dc, b: tensor(&b) })
        };
        prop_assert!(((moved(h, None, 0.0) - moved(-h, None, 0.0)) / (2.0 * h) - in_c).abs() < 1e-6);
        let numeric: Vec<f64> =
            (0..5).map(|j| (moved(0.0, Some(j), h) - moved(0.0, Some(j), -h)) / (2.0 * h)).collect();
        assert_close(&values(&in_b), &numeric, 1e-6);
        // The Hessian maps a direction to the change of the gradient along it.
        let v = normal(&mut rng, &[6], DType::F64);
        let hv = values(&data.hessian(&model).unwrap().matmul(&v.unsqueeze(1).unwrap()).unwrap());
        let along = |sign: f64| {
            let v = values(&v);
            let b = (&model.b + (tensor(&v[1..]) * (sign * h)).unwrap()).unwrap();
            let (c, b) = data.gradient(&ToyModel { c: model.c + sign * h * v[0], b }).unwrap();
            [vec![c], values(&b)].concat()
        };
        let numeric: Vec<f64> =
            along(1.0).iter().zip(along(-1.0)).map(|(a, b)| (a - b) / (2.0 * h)).collect();
        assert_close(&hv, &numeric, 1e-5);
    }
}

#[test]
fn the_edge_of_stability() {
    let check = |rule| EdgeOfStability::check(40.0, 0.1, rule).unwrap();
    assert_eq!(check(StabilityRule::GradientDescent).ratio, 2.0);
    assert!((check(StabilityRule::HeavyBall(0.9)).threshold - 38.0).abs() < 1e-12);
    assert!((check(StabilityRule::Adam(0.9)).threshold - 380.0).abs() < 1e-9);
    assert!(EdgeOfStability::check(1.0, 0.0, StabilityRule::GradientDescent).is_err());
    let toy = ToyOpposing::default();
    assert_eq!(
        toy.population_loss(1.0, &[1.0, 0.0], 0.5, &[1.0, 2.0]),
        4.55
    );
    assert_eq!(toy.population_curvature(0.5), 5.0);
}

#[test]
fn layers_react_to_a_direction() {
    let x = Tensor::zeros((3, 2), DType::F64, &Device::Cpu).unwrap();
    let layers = |x: &Tensor| Ok(vec![(x * 2.0)?, (x.narrow(1, 0, 1)? * 10.0)?]);
    let along = FeatureAmplification::measure(layers, &x, &tensor(&[0.0, 5.0]), 1e-3).unwrap();
    assert_close(&along.response, &[2.0, 0.0], 1e-9);
    assert!(FeatureAmplification::measure(layers, &x, &tensor(&[0.0, 0.0]), 1e-3).is_err());
    assert!(FeatureAmplification::measure(layers, &x, &tensor(&[0.0]), 1e-3).is_err());
}

#[test]
fn split_sgd_moves_the_largest_by_their_sign() {
    let w = var(&[0.0; 5]);
    let config = SplitSgdConfig {
        lr: 0.1,
        lr_sign: 0.01,
        momentum: 0.0,
        quantile: 0.5,
        ..SplitSgdConfig::default()
    };
    let mut optimizer = SplitSgd::new(vec![w.clone()], config.clone()).unwrap();
    let grad = tensor(&[5.0, -4.0, 1.0, 0.5, 0.0]);
    optimizer.step(&store(&w, &grad)).unwrap();
    // The median of the sizes is 1: two entries are larger.
    assert_close(&values(&w), &[-0.01, 0.01, -0.1, -0.05, 0.0], 1e-15);
    assert_eq!(optimizer.split_entries(), 2);
    // A sampled quantile on a large tensor.
    let large = Var::zeros(200_000, DType::F32, &Device::Cpu).unwrap();
    let mut optimizer = SplitSgd::new(vec![large.clone()], config).unwrap();
    let grad = normal(&mut RandomStream::new(1), &[200_000], DType::F32);
    optimizer.step(&store(&large, &grad)).unwrap();
    let share = optimizer.split_entries() as f64 / 200_000.0;
    assert!((share - 0.5).abs() < 0.01, "{share}");
    for bad in [
        SplitSgdConfig {
            quantile: 1.5,
            ..SplitSgdConfig::default()
        },
        SplitSgdConfig {
            lr: -1.0,
            ..SplitSgdConfig::default()
        },
    ] {
        assert!(SplitSgd::new(vec![var(&[1.0])], bad).is_err());
    }
    let (a, b) = (named_params(1, DType::F32), named_params(1, DType::F32));
    let make = |params: &[(String, Var)]| {
        let group = ParamGroup::named(params.to_vec(), SplitSgdConfig::default());
        SplitSgd::with_groups(vec![group]).unwrap()
    };
    let mut first = make(&a);
    run(&mut first, &a, 2, 0..3);
    let mut second = make(&b);
    for ((_, from), (_, to)) in a.iter().zip(&b) {
        to.set(&from.as_detached_tensor().copy().unwrap()).unwrap();
    }
    second.load_state(&first.state().unwrap()).unwrap();
    run(&mut first, &a, 2, 3..6);
    run(&mut second, &b, 2, 3..6);
    assert_eq!(all_bits(&a), all_bits(&b));
}

#[test]
fn bad_input_is_refused() {
    assert!(LossRecorder::new(0, 10).is_err());
    assert!(LossRecorder::new(3, 1).is_err());
    let mut recorder = LossRecorder::new(4, 3).unwrap();
    assert!(matches!(
        recorder.record(0, &tensor(&[1.0])),
        Err(Error::Shape { .. })
    ));
    let nan = tensor(&[1.0, f64::NAN, 1.0, 1.0]);
    assert!(matches!(
        recorder.record(0, &nan),
        Err(Error::NonFiniteLoss { .. })
    ));
    assert!(recorder.is_empty());
    // A grid of tokens, and the oldest recording falls out.
    let grid = Tensor::ones((2, 2), DType::F32, &Device::Cpu).unwrap();
    for t in 0..4 {
        recorder.record(t, &grid).unwrap();
    }
    assert_eq!((recorder.len(), recorder.step(0)), (3, Some(1)));
    assert!(recorder.record(3, &grid).is_err());
    assert!(matches!(
        detect(&recorder, &config(1)),
        Err(Error::TooFew { .. })
    ));
    let early = OpposingConfig {
        min_step: 0,
        ..config(3)
    };
    assert!(detect(&recorder, &early).is_err());
    assert!(analyze(&recorder, 2, &config(1)).is_err());
    for bad in [
        OpposingConfig {
            k: TopK::Fraction(0.0),
            ..OpposingConfig::default()
        },
        OpposingConfig {
            window: 0,
            ..OpposingConfig::default()
        },
        OpposingConfig {
            min_share: 2.0,
            ..OpposingConfig::default()
        },
        OpposingConfig {
            selection: Selection::Outlying(0.0),
            ..OpposingConfig::default()
        },
    ] {
        assert!(bad.validate().is_err());
    }
    let w = var(&[1.0]);
    let pair = OpposingPair::strongest(&swinging(10, 1, 0.0), &config(1))
        .unwrap()
        .unwrap();
    let lost = [("x".to_string(), var(&[1.0]))];
    let error = group_gradients(|_| w.sqr()?.sum_all(), &lost, &pair, &[0], None).unwrap_err();
    assert!(error.to_string().contains('x'));
    let vars = [("w".to_string(), w.clone())];
    assert!(group_gradients(|_| w.sum_all(), &vars, &pair, &[], None).is_err());
}

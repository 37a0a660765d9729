//! Adaptive projected guidance.

use crate::support::*;
use candle_core::{DType, Tensor};
use flows::{Guidance, Heun, RandomStream};
use guidance::apg::{project, Against, Apg, Convention, Preset, Threshold};
use guidance::*;
use proptest::prelude::*;

fn row_dot(a: &Tensor, b: &Tensor) -> Vec<f64> {
    values(&(a * b).unwrap().flatten_from(1).unwrap().sum(1).unwrap())
}

proptest! {
    #![proptest_config(cases(24))]

    #[test]
    fn projections_are_orthogonal_and_whole(seed in 0u64..1000, axis: bool) {
        let (a, b) = (normal(seed, &[3, 2, 4], DType::F64), normal(seed + 1, &[3, 2, 4], DType::F64));
        let dims = if axis { ReduceDims::Axes(vec![2]) } else { ReduceDims::AllNonBatch };
        let (parallel, orthogonal) = project(&a, &b, &dims).unwrap();
        prop_assert!(distance(&(&parallel + &orthogonal).unwrap(), &a) < 1e-12);
        let inner = dims.sum(&(&orthogonal * &b).unwrap()).unwrap();
        prop_assert!(values(&inner).iter().all(|x| x.abs() < 1e-10));
    }

    /// With `eta = 0` the norm grows by what is orthogonal only, and by no more than the threshold.
    #[test]
    fn the_update_is_orthogonal_and_bounded(seed in 0u64..1000, w in 1.5f64..20.0, r in 0.1f64..3.0) {
        let (c, u) = (normal(seed, &[4, 6], DType::F64), normal(seed + 1, &[4, 6], DType::F64));
        let rule = Apg::new(w).norm_threshold(r);
        let (d, _) = rule.combine(&c, &u, None).unwrap();
        let step = (&d - &c).unwrap();
        for (inner, square) in row_dot(&step, &c).iter().zip(row_dot(&step, &step)) {
            prop_assert!(inner.abs() < 1e-9 * (1.0 + square));
            prop_assert!(square.sqrt() <= (w - 1.0) * r * (1.0 + 1e-12));
        }
        // Rotating the data rotates the result.
        let turn = |x: &Tensor| {
            let parts = [x.narrow(1, 3, 3).unwrap().neg().unwrap(), x.narrow(1, 0, 3).unwrap()];
            Tensor::cat(&parts, 1).unwrap()
        };
        let (turned, _) = rule.combine(&turn(&c), &turn(&u), None).unwrap();
        prop_assert!(distance(&turned, &turn(&d)) < 1e-12);
        // By the mean square: the same threshold whatever the size.
        let rms = Apg::new(w).norm_threshold_rms(r / 6.0_f64.sqrt());
        prop_assert!(distance(&rms.combine(&c, &u, None).unwrap().0, &d) < 1e-12);
    }

    /// Passes over memory and the tensor operations that gradients need are the same rule.
    #[test]
    fn with_a_graph_it_is_the_same_rule(seed in 0u64..1000, w in 1.5f64..9.0, eta in 0.0f64..1.0, kind in 0..3) {
        let (c, u) = (normal(seed, &[3, 2, 5], DType::F64), normal(seed + 1, &[3, 2, 5], DType::F64));
        let running = normal(seed + 2, &[3, 2, 5], DType::F64);
        let convention = [Convention::Paper, Convention::DiffusersNative, Convention::DiffusersOriginal][kind as usize];
        let rule = Apg::new(w).eta(eta).norm_threshold(1.5).momentum(-0.4).convention(convention);
        let tracked = candle_core::Var::from_tensor(&c).unwrap();
        let (plain, sum) = rule.combine(&c, &u, Some(&running)).unwrap();
        let (graph, other) = rule.combine(&tracked, &u, Some(&running)).unwrap();
        prop_assert!(graph.track_op() && !plain.track_op());
        prop_assert!(distance(&plain, &graph) < 1e-12);
        prop_assert_eq!(bits(&sum), bits(&other));
    }

    #[test]
    fn the_conventions_are_each_others(seed in 0u64..1000, w in 0.5f64..9.0) {
        let (c, u) = (normal(seed, &[2, 5], DType::F64), normal(seed + 1, &[2, 5], DType::F64));
        let rule = |w| Apg::new(w).eta(0.3).norm_threshold(1.0);
        let paper = rule(w + 1.0).combine(&c, &u, None).unwrap().0;
        let original = rule(w).convention(Convention::DiffusersOriginal);
        prop_assert!(distance(&paper, &original.combine(&c, &u, None).unwrap().0) < 1e-12);
    }
}

#[test]
fn the_whole_parallel_part_is_classifier_free_guidance() {
    for w in [0.0, 1.0, 4.0, 12.0] {
        let (a, b) = (run(Apg::new(w).eta(1.0), 5), run(Cfg::new(w), 5));
        assert!(distance(&a.x, &b.x) < 1e-12);
        assert_eq!(a.nfe, b.nfe);
    }
}

#[test]
fn degenerate_predictions_give_numbers() {
    let c = normal(1, &[2, 4], DType::F64);
    let rule = Apg::new(9.0).norm_threshold(1.0).momentum(-0.5);
    let same = rule.combine(&c, &c, None).unwrap().0;
    assert_eq!(bits(&same), bits(&c));
    let zero = c.zeros_like().unwrap();
    let (d, _) = rule.combine(&zero, &c, None).unwrap();
    // Nothing is parallel to zero.
    let norm = row_dot(&d, &d)[0].sqrt();
    assert!((norm - 8.0 * row_dot(&c, &c)[0].sqrt().min(1.0)).abs() < 1e-9);
    let parallel = (&c * 0.5).unwrap();
    let (d, _) = Apg::new(9.0).combine(&c, &parallel, None).unwrap();
    assert!(distance(&d, &c) < 1e-9);
    assert!(rule.combine(&c, &c.narrow(1, 0, 2).unwrap(), None).is_err());
    let none = c.narrow(0, 0, 0).unwrap();
    assert_eq!(rule.combine(&none, &none, None).unwrap().0.dims(), [0, 4]);
    let half = c.to_dtype(DType::F16).unwrap();
    let (d, _) = rule.combine(&half, &(&half * 0.1).unwrap(), None).unwrap();
    assert!(d.dtype() == DType::F16 && values(&d).iter().all(|x| x.is_finite()));
}

#[test]
fn momentum_is_cleared_and_moves_once_a_step() {
    let mut rule = Apg::new(6.0).momentum(-0.5).norm_threshold(1.0);
    let first = run(&mut rule, 3);
    assert!(rule.running().is_some());
    let second = run(&mut rule, 3);
    assert_eq!(bits(&first.x), bits(&second.x));
    // Heun evaluates twice a step; the sum after its first step is that of its first evaluation.
    let mixture = mixture(DType::F64);
    let schedule = flows::schedule::VpSde::default();
    let grid = flows::Grid::uniform_lambda_between(&schedule, 0.9, 0.5, 1).unwrap();
    let class = flows::Condition::classes(&[1], &candle_core::Device::Cpu).unwrap();
    let noise = normal(1, &[2, 3], DType::F64);
    let sum_after = |heun: bool| {
        let mut rule = Apg::new(6.0).momentum(-0.5);
        let mut sampler = flows::Sampler::new(&mixture, grid.clone()).guidance(&mut rule);
        if heun {
            sampler = sampler.stepper(Heun);
        }
        sampler
            .sample(&noise, &class, None, &RandomStream::new(0))
            .unwrap();
        drop(sampler);
        bits(rule.running().unwrap())
    };
    assert_eq!(sum_after(true), sum_after(false));
    // No evaluation of the first step has an earlier sum to add, the second one neither.
    let heun = |rule: Apg, steps: usize| {
        let grid = flows::Grid::uniform_lambda_between(&schedule, 0.9, 0.5, steps).unwrap();
        let mut sampler = flows::Sampler::new(&mixture, grid)
            .guidance(rule)
            .stepper(Heun);
        let out = sampler.sample(&noise, &class, None, &RandomStream::new(0));
        bits(&out.unwrap().x)
    };
    let (with, without) = (Apg::new(6.0).momentum(-0.5), Apg::new(6.0));
    assert_eq!(heun(with.clone(), 1), heun(without.clone(), 1));
    assert_ne!(heun(with, 2), heun(without, 2));
}

#[test]
fn settings_of_elsewhere_are_read() {
    let json = r#"{"_class_name": "AdaptiveProjectedGuidance", "guidance_scale": 5.0, "eta": 0.2,
        "adaptive_projected_guidance_momentum": -0.5, "adaptive_projected_guidance_rescale": 10,
        "use_original_formulation": true}"#;
    let rule = Apg::from_diffusers_config(json).unwrap();
    assert_eq!((rule.w, rule.eta, rule.momentum), (5.0, 0.2, Some(-0.5)));
    assert_eq!(rule.norm_threshold, Some(Threshold::Norm(10.0)));
    assert_eq!(rule.convention, Convention::DiffusersOriginal);
    let defaults = Apg::from_diffusers_config("{}").unwrap();
    assert_eq!(
        (defaults.w, defaults.eta, defaults.momentum),
        (7.5, 1.0, None)
    );
    for (json, axes) in [("[1, 2]", vec![1, 2]), ("3", vec![3])] {
        let json = format!(r#"{{"adaptive_projected_guidance_norm_dim": {json}}}"#);
        let rule = Apg::from_diffusers_config(&json).unwrap();
        assert_eq!(rule.dims, ReduceDims::Axes(axes));
    }
    let plain = r#"{"guidance_rescale": 0.0, "start": 0.0, "stop": 1.0, "enabled": true, "norm_dim": null}"#;
    assert!(Apg::from_diffusers_config(plain).is_ok());
    // What this rule does not do is said, not ignored.
    let refused = [
        r#"{"guidance_rescale": 0.7}"#,
        r#"{"start": 0.1}"#,
        r#"{"stop": 0.8}"#,
        r#"{"enabled": false}"#,
        r#"{"norm_dim": [-1]}"#,
    ];
    for json in refused {
        let error = Apg::from_diffusers_config(json).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    }
    for bad in ["", "[1]", r#"{"eta": "a"}"#, r#"{"eta": 2}"#] {
        assert!(Apg::from_diffusers_config(bad).is_err(), "{bad}");
    }
    let sdxl = Apg::preset(Preset::Sdxl, 10.0);
    let rms = Apg::new(10.0).norm_threshold_rms(15.0 / (4.0_f64 * 128.0 * 128.0).sqrt());
    assert_eq!(
        (sdxl.norm_threshold, sdxl.momentum),
        (Some(Threshold::Norm(15.0)), Some(-0.5))
    );
    assert!(matches!(rms.norm_threshold, Some(Threshold::Rms(r)) if (r - 0.0586).abs() < 1e-4));
}

#[test]
fn bad_settings_are_named() {
    let bad: [(Apg, &str); 6] = [
        (Apg::new(f64::INFINITY), "Apg::w"),
        (Apg::new(5.0).eta(1.5), "Apg::eta"),
        (Apg::new(5.0).momentum(-1.0), "Apg::momentum"),
        (Apg::new(5.0).norm_threshold(-2.0), "Apg::norm_threshold"),
        (Apg::new(5.0).dims(ReduceDims::Axes(vec![0])), "ReduceDims"),
        (Apg::new(5.0).against(Against::Weak), "Weak"),
    ];
    for (rule, field) in bad {
        let mixture = mixture(DType::F64);
        let grid = flows::Grid::uniform_lambda(&flows::schedule::VpSde::default(), 2).unwrap();
        let noise = normal(1, &[1, 3], DType::F64);
        let error = flows::Sampler::new(&mixture, grid)
            .guidance(rule)
            .sample(&noise, &flows::Condition::Null, None, &RandomStream::new(0))
            .unwrap_err();
        assert!(error.to_string().contains(field), "{error}");
    }
}

/// Forms in which the rule is another one.
#[test]
fn the_form_matters() {
    let rule = || Apg::new(8.0).norm_threshold(0.5);
    let clean = run(rule(), 3).x;
    for space in [
        Space::Eps,
        Space::V,
        Space::Native(flows::Prediction::Score),
    ] {
        let other = run(rule().space(space), 3).x;
        assert!(distance(&clean, &other) > 1e-4);
    }
    let boxed: Box<dyn Guidance> = Box::new(rule().space(Space::Native(flows::Prediction::X0)));
    assert_eq!(bits(&run(boxed, 3).x), bits(&clean));
}

use crate::support::*;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::Optimizer;
use optim::spam::{spike_scores, DecayMode, Spam, SpamConfig, SpikeMonitor};
use optim::{ParamGroup, RandomStream, Stateful};
use proptest::prelude::*;
use tensor_core::kernels::Mask;

#[test]
fn reference() {
    let report = FILES.verify("spam", optim::verify::spam);
    assert_passed(&report, |_| false);
    assert_eq!(report.comparisons.len(), 2 * 3 + 2 + 1 + 2);
}

fn config() -> SpamConfig {
    SpamConfig {
        lr: 1e-2,
        delta_t: 7,
        warmup: 3,
        threshold: 4.0,
        clip_after: 2,
        ..SpamConfig::default()
    }
}

fn spam(params: &[(String, Var)], config: SpamConfig) -> Spam {
    let group = ParamGroup::named(params.to_vec(), config);
    Spam::with_groups(vec![group], &RandomStream::new(9)).unwrap()
}

#[test]
fn without_clipping_and_resets_it_is_adam_in_the_old_form() {
    let config = SpamConfig {
        threshold: 0.0,
        delta_t: 0,
        ..config()
    };
    let w = var(&[0.5, -1.0, 2.0]);
    let mut optimizer = spam(&[("w".into(), w.clone())], config.clone());
    let (mut expected, mut m, mut v) = (values(&w), [0.0; 3], [0.0; 3]);
    for t in 1..=10 {
        let g = values(&normal(&mut RandomStream::new(t), &[3], DType::F64));
        optimizer.step(&store(&w, &tensor(&g))).unwrap();
        let n = t as i32;
        let alpha = config.lr * (1.0 - config.beta2.powi(n)).sqrt() / (1.0 - config.beta1.powi(n));
        for i in 0..3 {
            m[i] = config.beta1 * m[i] + (1.0 - config.beta1) * g[i];
            v[i] = config.beta2 * v[i] + (1.0 - config.beta2) * g[i] * g[i];
            expected[i] -= alpha * m[i] / (f64::sqrt(v[i]) + config.eps);
        }
        assert_eq!(optimizer.stats().clipped, 0);
    }
    assert_close(&values(&w), &expected, 1e-14);
}

#[test]
fn full_density_is_dense() {
    let params = named_params(1, DType::F32);
    let twin = copies(&params);
    let mut dense = spam(&params, config());
    let mut sparse = spam(
        &twin,
        SpamConfig {
            density: Some(1.0),
            ..config()
        },
    );
    for t in 0..25 {
        dense.step(&gradients(&params, 3, t)).unwrap();
        sparse.step(&gradients(&twin, 3, t)).unwrap();
        assert_eq!(dense.stats().clipped, sparse.stats().clipped);
    }
    assert_eq!(all_bits(&params), all_bits(&twin));
}

proptest! {
    #![proptest_config(cases(10))]

    /// What the mask leaves out does not move between two changes, and what it covers does (but
    /// for steps below the last bit).
    #[test]
    fn entries_outside_the_mask_keep_their_bits(seed in 0u64..1000, density in 0.1f64..0.9) {
        let params = named_params(seed, DType::F32);
        let mut optimizer = spam(&params, SpamConfig { density: Some(density), ..config() });
        for t in 0..20 {
            let masks = optimizer.masks();
            let before = all_bits(&params);
            optimizer.step(&gradients(&params, seed, t)).unwrap();
            for ((_, mask), (old, (_, var))) in masks.iter().zip(before.iter().zip(&params)) {
                let mask = mask.as_ref().unwrap();
                let mut moved = 0;
                for (i, (old, new)) in old.iter().zip(bits(var)).enumerate() {
                    let moves = *old != new;
                    prop_assert!(mask.get(i) || !moves, "entry {} in step {}", i, t);
                    moved += usize::from(moves);
                }
                prop_assert!(moved + 2 >= mask.count(), "{} of {}", moved, mask.count());
            }
        }
    }

    /// Entries beyond the bound are clipped to it, and counted.
    #[test]
    fn clipped_entries_obey_the_bound(seed in 0u64..1000, spike in 10.0f64..1e6) {
        let w = var(&[0.0; 6]);
        let plain = SpamConfig { delta_t: 0, ..config() };
        let mut optimizer = spam(&[("w".into(), w.clone())], plain.clone());
        for t in 0..5 {
            let g = normal(&mut RandomStream::new(seed).split_index("g", t), &[6], DType::F64);
            optimizer.step(&store(&w, &g)).unwrap();
        }
        let before = optimizer.state().unwrap();
        let (m, v) = (values(&before["m.w"]), values(&before["v.w"]));
        let g = [spike, -spike, 0.0, 1e-9, spike, -1e-9];
        optimizer.step(&store(&w, &tensor(&g))).unwrap();
        let after = values(&optimizer.state().unwrap()["m.w"]);
        prop_assert_eq!(optimizer.stats().clipped, 3);
        for i in 0..6 {
            let seen = (after[i] - plain.beta1 * m[i]) / (1.0 - plain.beta1);
            prop_assert!(seen * seen <= plain.threshold * v[i] * (1.0 + 1e-12));
            prop_assert!(seen == 0.0 || seen.signum() == g[i].signum());
        }
    }
}

#[test]
fn the_warm_up_rises_from_a_hundredth_to_one() {
    let config = SpamConfig::default();
    assert!((config.warmup_factor(0) - 0.01).abs() < 1e-15);
    assert_eq!(config.warmup_factor(config.warmup), 1.0);
    for k in 0..config.warmup {
        assert!(config.warmup_factor(k) < config.warmup_factor(k + 1));
    }
    // No warm-up before the first reset; a hundredth in the reset step itself.
    let w = var(&[1.0]);
    let mut optimizer = spam(&[("w".into(), w.clone())], self::config());
    let mut scales = Vec::new();
    for _ in 0..8 {
        optimizer.step(&store(&w, &tensor(&[1.0]))).unwrap();
        scales.push(optimizer.stats().scale);
    }
    assert_eq!(scales[..6], [1.0; 6]);
    assert!((scales[6] - 0.01).abs() < 1e-15 && scales[7] > scales[6]);
    assert_eq!(optimizer.stats().last_reset, 7);
}

#[test]
fn compact_state_is_as_small_as_its_density() {
    let w = Var::zeros((512, 512), DType::F32, &Device::Cpu).unwrap();
    let adam = 8.0 * w.elem_count() as f64;
    for density in [0.1, 0.25, 0.5] {
        let sparse = SpamConfig {
            density: Some(density),
            ..config()
        };
        let mut optimizer = spam(&[("w".into(), w.clone())], sparse);
        let bound = density * adam + w.elem_count() as f64 / 8.0 + 0.02 * adam;
        // Before a change exactly the density, after one about it.
        for t in 0..9 {
            assert!((optimizer.state_bytes() as f64) < bound);
            let grad = normal(&mut RandomStream::new(t), &[512, 512], DType::F32);
            optimizer.step(&store(&w, &grad)).unwrap();
        }
        let overlap = optimizer.stats().mask_overlap.unwrap();
        assert!((overlap - density).abs() < 0.02, "{overlap}");
    }
}

#[test]
fn masks_depend_on_seed_tensor_and_period_alone() {
    let sparse = SpamConfig {
        density: Some(0.5),
        ..config()
    };
    let masks = |steps: u64| {
        let params = named_params(1, DType::F32);
        let mut optimizer = spam(&params, sparse.clone());
        // Other gradients: other updates, the same masks.
        run(&mut optimizer, &params, steps, 0..steps);
        optimizer.masks()
    };
    let (first, second) = (masks(0), masks(10));
    assert_eq!(first, masks(5));
    assert_eq!(second, masks(7));
    assert_ne!(first, second);
    // The first mask has exactly the floor of d n entries.
    for (_, mask) in &first {
        let mask = mask.as_ref().unwrap();
        assert_eq!(mask.count(), mask.len() / 2);
    }
    let blocks = SpamConfig {
        mask_block: 8,
        ..sparse
    };
    let params = named_params(1, DType::F32);
    let (_, mask) = &spam(&params, blocks).masks()[3];
    let flags = mask.as_ref().unwrap().to_bools();
    assert!(flags.chunks(8).all(|run| run.iter().all(|b| *b == run[0])));
}

#[test]
fn decay_modes_of_sparse_parameters() {
    let decayed = |mode| {
        let w = var(&[1.0; 8]);
        let sparse = SpamConfig {
            density: Some(0.5),
            weight_decay: 0.1,
            decay_mode: mode,
            ..config()
        };
        let mut optimizer = spam(&[("w".into(), w.clone())], sparse);
        let mask = Mask::from_indices(8, &[0, 2, 5]).unwrap();
        optimizer.set_masks(&[("w".into(), mask)]).unwrap();
        optimizer.step(&store(&w, &tensor(&[0.0; 8]))).unwrap();
        values(&w).iter().map(|x| *x < 1.0).collect::<Vec<bool>>()
    };
    assert_eq!(decayed(DecayMode::All), [true; 8]);
    assert_eq!(decayed(DecayMode::Nothing), [false; 8]);
    let masked = decayed(DecayMode::Masked);
    assert_eq!(
        masked,
        [true, false, true, false, false, true, false, false]
    );
}

#[test]
fn an_entry_without_history_is_frozen_unless_there_is_a_floor() {
    let moved = |min_v| {
        let w = var(&[0.0, 0.0]);
        let plain = SpamConfig {
            min_v,
            delta_t: 0,
            ..config()
        };
        let mut optimizer = spam(&[("w".into(), w.clone())], plain);
        for _ in 0..5 {
            optimizer.step(&store(&w, &tensor(&[1.0, 0.0]))).unwrap();
        }
        assert_eq!(optimizer.frozen().unwrap(), 1);
        optimizer.step(&store(&w, &tensor(&[1.0, 1.0]))).unwrap();
        values(&w)[1] != 0.0
    };
    assert!(!moved(0.0));
    assert!(moved(1e-4));
}

#[test]
fn resetting_the_bias_correction_is_an_option() {
    let last = |reset_bias_correction| {
        let w = var(&[0.0]);
        let config = SpamConfig {
            warmup: 0,
            threshold: 0.0,
            reset_bias_correction,
            ..config()
        };
        let mut optimizer = spam(&[("w".into(), w.clone())], config);
        for _ in 0..6 {
            optimizer.step(&store(&w, &tensor(&[1.0]))).unwrap();
        }
        let before = values(&w)[0];
        optimizer.step(&store(&w, &tensor(&[1.0]))).unwrap();
        (before - values(&w)[0]) / 1e-2
    };
    // A fresh Adam's first step is the learning rate. Without the option the raw first moments
    // (3.16 times the rate) meet the correction of step 7.
    let c = config();
    let uncorrected = (1.0 - c.beta1) / (1.0 - c.beta2).sqrt();
    let correction = (1.0 - c.beta2.powi(7)).sqrt() / (1.0 - c.beta1.powi(7));
    assert!((last(true) - 1.0).abs() < 1e-3, "{}", last(true));
    assert!(
        (last(false) - uncorrected * correction).abs() < 1e-3,
        "{}",
        last(false)
    );
}

#[test]
fn the_language_model_split() {
    let names = [
        "embed",
        "layer.attn.q",
        "layer.mlp.up",
        "layer.mlp.bias",
        "head",
    ];
    let shapes: [&[usize]; 5] = [&[10, 4], &[4, 4], &[4, 8], &[8], &[10, 4]];
    let params: Vec<(String, Var)> = names
        .iter()
        .zip(shapes)
        .map(|(n, s)| {
            (
                n.to_string(),
                Var::zeros(s, DType::F32, &Device::Cpu).unwrap(),
            )
        })
        .collect();
    let groups = Spam::llm_groups(params, config(), 0.25);
    let optimizer = Spam::with_groups(groups, &RandomStream::new(1)).unwrap();
    let sparse: Vec<String> = optimizer
        .masks()
        .into_iter()
        .filter_map(|(name, mask)| mask.map(|_| name))
        .collect();
    assert_eq!(sparse, ["layer.attn.q", "layer.mlp.up"]);
}

#[test]
fn bad_configurations_and_masks_are_refused() {
    type Change = fn(&mut SpamConfig);
    let cases: [(Change, &str); 5] = [
        (|c| c.lr = f64::NAN, "lr"),
        (|c| c.threshold = -1.0, "threshold"),
        (|c| c.density = Some(0.0), "density"),
        (|c| c.density = Some(1.5), "density"),
        (|c| c.mask_block = 0, "mask_block"),
    ];
    for (change, field) in cases {
        let mut config = config();
        change(&mut config);
        let error = Spam::with_groups(
            vec![ParamGroup::new(vec![var(&[1.0])], config)],
            &RandomStream::new(1),
        )
        .unwrap_err();
        assert!(error.to_string().contains(field), "{error}");
    }
    // Sparse moments need a stream for their masks.
    let sparse = SpamConfig {
        density: Some(0.5),
        ..config()
    };
    assert!(Spam::new(vec![var(&[1.0])], sparse.clone()).is_err());
    let mut optimizer = spam(&[("w".into(), var(&[1.0; 4]))], sparse);
    let short = Mask::from_indices(3, &[0]).unwrap();
    assert!(optimizer.set_masks(&[("w".into(), short.clone())]).is_err());
    assert!(optimizer.set_masks(&[("x".into(), short)]).is_err());
}

#[test]
fn scores_of_a_series() {
    let series = Tensor::new(&[[1f64, 0.0], [-1.0, 0.0], [4.0, 0.0]], &Device::Cpu).unwrap();
    let scores = values(&spike_scores(&series).unwrap());
    assert_close(&scores, &[0.5, 0.0, 0.5, 0.0, 2.0, 0.0], 1e-15);
    assert!(spike_scores(&Tensor::zeros((0, 2), DType::F64, &Device::Cpu).unwrap()).is_err());
}

#[test]
fn a_running_monitor_agrees_with_the_series_so_far() {
    let w = var(&[0.0; 3]);
    let named = vec![("w".to_string(), w.clone())];
    let all: Vec<Tensor> = (0..12)
        .map(|t| normal(&mut RandomStream::new(t), &[3], DType::F64))
        .collect();
    for window in [None, Some(4)] {
        let mut monitor = SpikeMonitor::new(named.clone(), window, 1.5).unwrap();
        for t in 0..all.len() {
            let report = monitor.observe(&store(&w, &all[t])).unwrap();
            let from = window.map_or(0, |n| (t + 1usize).saturating_sub(n));
            let series = Tensor::stack(&all[from..=t], 0).unwrap();
            let scores = values(&spike_scores(&series).unwrap().get(t - from).unwrap());
            let largest = scores.iter().copied().fold(0.0, f64::max);
            assert!((report.max_score - largest).abs() < 1e-6);
            let above = scores.iter().filter(|s| **s > 1.5).count();
            assert_eq!((report.count, report.step), (above as u64, t as u64 + 1));
        }
    }
}

#[test]
fn a_monitor_forgets_and_survives_nan() {
    let w = var(&[0.0]);
    let named = vec![("w".to_string(), w.clone())];
    let mut monitor = SpikeMonitor::new(named.clone(), Some(60), SpikeMonitor::THRESHOLD).unwrap();
    let mut observe = |g: f64| monitor.observe(&store(&w, &tensor(&[g]))).unwrap();
    for _ in 0..59 {
        assert_eq!(observe(1.0).count, 0);
    }
    assert_eq!(observe(1e9).count, 1);
    let bad = observe(f64::NAN);
    assert_eq!((bad.nonfinite, bad.count), (1, 0));
    // The spike has left the window after 60 steps: an ordinary gradient scores 1 again.
    for _ in 0..59 {
        observe(1.0);
    }
    assert!((observe(1.0).max_score - 1.0).abs() < 0.05);
    // A window that the threshold does not fit in could never report anything.
    assert!(SpikeMonitor::new(named.clone(), Some(50), 50.0).is_err());
    assert!(SpikeMonitor::new(named, None, 0.0).is_err());
}

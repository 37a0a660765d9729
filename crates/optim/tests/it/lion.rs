use crate::support::*;
use candle_core::{DType, Device, Tensor};
use candle_nn::{Optimizer, ParamsAdamW};
use optim::lion::{Lion, LionConfig};
use optim::{AdamW, AdamWConfig, DecayMask, NonFinite, ParamGroup, Stateful};
use proptest::prelude::*;
use tensor_core::params::Params;

#[test]
fn reference() {
    let report = FILES.verify("lion", optim::verify::lion);
    assert_passed(&report, |_| false);
    assert_eq!(report.comparisons.len(), 3 * 2 + 2 + 4 * 4);
    assert!(report.uncovered.is_empty());
}

#[test]
fn the_cautious_variant_moves_what_agrees() {
    for dtype in [DType::F32, DType::F64] {
        let params = named_params(1, dtype);
        let cautious = LionConfig {
            cautious: true,
            ..config()
        };
        let mut optimizer = lion(&params, cautious.clone());
        let mut momentum: Vec<Tensor> = params
            .iter()
            .map(|(_, v)| v.zeros_like().unwrap())
            .collect();
        for t in 0..5 {
            let before: Vec<Vec<f64>> = params.iter().map(|(_, v)| values(v)).collect();
            let grads = gradients(&params, 2, t);
            optimizer.step(&grads).unwrap();
            for (((_, var), m), before) in params.iter().zip(&mut momentum).zip(before) {
                let g = grads.get(var).unwrap();
                let c = ((&*m * 0.9).unwrap() + (g * (1.0 - 0.9)).unwrap()).unwrap();
                let (cs, gs) = (values(&c), values(g));
                let agrees = |i: usize| cs[i] * gs[i] > 0.0;
                let count = (0..cs.len()).filter(|i| agrees(*i)).count();
                let scale = cs.len() as f64 / count as f64;
                let expected: Vec<f64> = (0..cs.len())
                    .map(|i| {
                        let sign = if agrees(i) {
                            scale * cs[i].signum()
                        } else {
                            0.0
                        };
                        before[i] - 1e-2 * (sign + 0.1 * before[i])
                    })
                    .collect();
                assert_close(&values(var), &expected, 1e-6);
                *m = ((&*m * 0.99).unwrap() + (g * (1.0 - 0.99)).unwrap()).unwrap();
            }
        }
        // A group without it beside one with it moves as ever.
        let (a, b) = (named_params(3, dtype), named_params(3, dtype));
        let groups = vec![
            ParamGroup::named(a[..2].to_vec(), config()),
            ParamGroup::named(a[2..].to_vec(), cautious.clone()),
        ];
        run(&mut Lion::with_groups(groups).unwrap(), &a, 4, 0..3);
        run(&mut lion(&b, config()), &b, 4, 0..3);
        assert_eq!(all_bits(&a[..2]), all_bits(&b[..2]));
        assert_ne!(all_bits(&a[2..]), all_bits(&b[2..]));
    }
}

fn config() -> LionConfig {
    LionConfig {
        lr: 1e-2,
        weight_decay: 0.1,
        ..LionConfig::default()
    }
}

fn lion(params: &[(String, candle_core::Var)], config: LionConfig) -> Lion {
    Lion::with_groups(vec![ParamGroup::named(params.to_vec(), config)]).unwrap()
}

/// The step as tensor operations, in the order of the fused one.
#[test]
fn fused_step_is_the_unfused_step_bit_for_bit() {
    for dtype in [DType::F32, DType::F64] {
        let params = named_params(1, dtype);
        let mut optimizer = lion(&params, config());
        let mut plain: Vec<(Tensor, Tensor)> = params
            .iter()
            .map(|(_, v)| {
                (
                    v.as_detached_tensor().copy().unwrap(),
                    v.zeros_like().unwrap(),
                )
            })
            .collect();
        for t in 0..8 {
            let grads = gradients(&params, 2, t);
            optimizer.step(&grads).unwrap();
            for ((w, m), (_, var)) in plain.iter_mut().zip(&params) {
                let g = grads.get(var).unwrap();
                let c = ((&*m * 0.9).unwrap() + (g * (1.0 - 0.9)).unwrap()).unwrap();
                let decay = (&*w * 0.1).unwrap();
                let step = ((c.sign().unwrap() + decay).unwrap() * 1e-2).unwrap();
                *w = (&*w - step).unwrap();
                *m = ((&*m * 0.99).unwrap() + (g * (1.0 - 0.99)).unwrap()).unwrap();
                assert_eq!(bits(w), bits(var));
            }
        }
    }
}

#[test]
fn a_flat_step_is_the_same_step() {
    let params = named_params(3, DType::F32);
    let twin = copies(&params);
    let (mut one, mut other) = (lion(&params, config()), lion(&twin, config()));
    let view = Params::new(twin.clone()).unwrap();
    let mut flat = view.flatten().unwrap();
    for t in 0..5 {
        one.step(&gradients(&params, 4, t)).unwrap();
        let grads = view.flatten_gradients(&gradients(&twin, 4, t)).unwrap();
        other.step_flat(&mut flat, &grads).unwrap();
    }
    view.unflatten(&flat).unwrap();
    assert_eq!(all_bits(&params), all_bits(&twin));
    let layout = Params::new(twin[1..].to_vec()).unwrap();
    let mut short = layout.flatten().unwrap();
    let grads = short.clone();
    assert!(other.step_flat(&mut short, &grads).is_err());
}

proptest! {
    #![proptest_config(cases(12))]

    /// Gradients multiplied by a power of two leave every bit of the trajectory as it was.
    #[test]
    fn the_gradients_scale_does_not_matter(seed in 0u64..1000, power in -20i32..20) {
        let factor = f64::powi(2.0, power);
        let params = named_params(seed, DType::F32);
        let twin = copies(&params);
        let (mut one, mut other) = (lion(&params, config()), lion(&twin, config()));
        for t in 0..6 {
            one.step(&gradients(&params, seed, t)).unwrap();
            let mut scaled = gradients(&twin, seed, t);
            for (_, var) in &twin {
                let grad = scaled.get(var).unwrap().affine(factor, 0.0).unwrap();
                scaled.insert(var, grad);
            }
            other.step(&scaled).unwrap();
        }
        prop_assert_eq!(all_bits(&params), all_bits(&twin));
    }

    /// Every entry moves by the learning rate or not at all, beside the decay.
    #[test]
    fn every_update_has_the_same_size(seed in 0u64..1000) {
        let params = named_params(seed, DType::F64);
        let mut optimizer = lion(&params, config());
        for t in 0..4 {
            let before: Vec<Vec<f64>> = params.iter().map(|(_, v)| values(v)).collect();
            optimizer.step(&gradients(&params, seed, t)).unwrap();
            for ((_, var), before) in params.iter().zip(&before) {
                for (new, old) in values(var).iter().zip(before) {
                    let moved = (new - (1.0 - 1e-3) * old).abs();
                    prop_assert!(moved < 1e-15 || (moved - 1e-2).abs() < 1e-14, "{}", moved);
                }
            }
        }
    }
}

#[test]
fn zero_gradients_do_not_move_and_are_decayed() {
    let (w, frozen) = (var(&[1.0, -2.0]), var(&[3.0]));
    let group = ParamGroup::new(vec![w.clone(), frozen.clone()], config());
    let mut optimizer = Lion::with_groups(vec![group]).unwrap();
    optimizer.step(&store(&w, &tensor(&[0.0, -0.0]))).unwrap();
    assert_close(&values(&w), &[0.999, -1.998], 1e-15);
    // Without a gradient nothing happens, not even decay.
    assert_eq!(values(&frozen), [3.0]);
}

#[test]
fn the_state_is_half_of_adamws_and_a_quarter_in_bf16() {
    let params = named_params(1, DType::F32);
    let numel: usize = params.iter().map(|(_, v)| v.elem_count()).sum();
    let plain = lion(&params, config());
    let half = lion(
        &params,
        LionConfig {
            momentum_dtype: Some(DType::BF16),
            ..config()
        },
    );
    let group = ParamGroup::named(params, AdamWConfig::default());
    let adamw = AdamW::with_groups(vec![group]).unwrap();
    assert_eq!(
        [plain.state_bytes(), half.state_bytes(), adamw.state_bytes()],
        [4 * numel, 2 * numel, 8 * numel]
    );
}

#[test]
fn groups_have_their_own_rates_that_move_together() {
    let (a, b) = (var(&[0.0]), var(&[0.0]));
    let slow = LionConfig {
        lr: 1e-3,
        weight_decay: 0.0,
        ..LionConfig::default()
    };
    let fast = LionConfig {
        lr: 1e-2,
        ..slow.clone()
    };
    let groups = vec![
        ParamGroup::new(vec![a.clone()], slow),
        ParamGroup::new(vec![b.clone()], fast),
    ];
    let mut optimizer = Lion::with_groups(groups).unwrap();
    optimizer.set_learning_rate(2e-3);
    assert_eq!(optimizer.learning_rate(), 2e-3);
    let mut grads = store(&a, &tensor(&[1.0]));
    grads.insert(&b, tensor(&[-1.0]));
    optimizer.step(&grads).unwrap();
    assert_close(&values(&a), &[-2e-3], 1e-15);
    assert_close(&values(&b), &[2e-2], 1e-15);
    let ratios = optimizer.update_ratios().unwrap();
    assert!(ratios.iter().all(|(_, ratio)| (ratio - 1.0).abs() < 1e-12));
}

#[test]
fn decay_masks_choose_by_shape_and_name() {
    let params = named_params(1, DType::F64);
    let decayed = |mask: DecayMask| -> Vec<bool> {
        let params = copies(&params);
        let config = LionConfig {
            decay_mask: mask,
            ..config()
        };
        let before = all_bits(&params);
        let mut grads = gradients(&params, 1, 0);
        for (_, var) in &params {
            grads.insert(var, var.zeros_like().unwrap());
        }
        lion(&params, config).step(&grads).unwrap();
        let after = all_bits(&params);
        before.iter().zip(&after).map(|(a, b)| a != b).collect()
    };
    assert_eq!(decayed(DecayMask::All), [true; 4]);
    assert_eq!(
        decayed(DecayMask::NoOneDimensional),
        [true, false, true, false]
    );
    assert_eq!(
        decayed(DecayMask::Names(vec!["attn".into()])),
        [true, false, false, false]
    );
    let except = DecayMask::ExceptNames(vec!["bias".into(), "gain".into()]);
    assert_eq!(decayed(except), [true, false, true, false]);
    let large = DecayMask::Predicate(std::sync::Arc::new(|_, v| v.elem_count() > 30));
    assert_eq!(decayed(large), [true, false, false, true]);
}

#[test]
fn coming_from_adamw_keeps_rate_times_decay() {
    let adamw = ParamsAdamW {
        lr: 1e-3,
        weight_decay: 0.1,
        ..ParamsAdamW::default()
    };
    let config = LionConfig::from_adamw(&adamw, 5.0).unwrap();
    assert_close(&[config.lr, config.weight_decay], &[2e-4, 0.5], 1e-15);
    assert!(LionConfig::from_adamw(&adamw, 0.0).is_err());
}

#[test]
fn bad_configurations_are_named() {
    type Change = fn(&mut LionConfig);
    let cases: [(Change, &str); 6] = [
        (|c| c.lr = -1.0, "lr"),
        (|c| c.lr = f64::NAN, "lr"),
        (|c| c.beta1 = 1.0, "beta1"),
        (|c| c.beta2 = -0.1, "beta2"),
        (|c| c.weight_decay = f64::INFINITY, "weight_decay"),
        (|c| c.momentum_dtype = Some(DType::F16), "momentum_dtype"),
    ];
    for (change, field) in cases {
        let mut config = config();
        change(&mut config);
        let error = Lion::new(vec![var(&[1.0])], config).unwrap_err();
        assert!(error.to_string().contains(field), "{error}");
    }
    let w = var(&[1.0]);
    let twice = ParamGroup::new(vec![w.clone(), w.clone()], config());
    assert!(Lion::with_groups(vec![twice]).is_err());
    // What is one for all groups may not differ between them.
    let (other, types) = (
        LionConfig {
            nonfinite: NonFinite::SkipStep,
            ..config()
        },
        LionConfig {
            momentum_dtype: Some(DType::BF16),
            ..config()
        },
    );
    for (second, field) in [(other, "nonfinite"), (types, "momentum_dtype")] {
        let groups = vec![
            ParamGroup::new(vec![var(&[1.0])], config()),
            ParamGroup::named(vec![("b".to_string(), var(&[2.0]))], second),
        ];
        let error = Lion::with_groups(groups).unwrap_err();
        assert!(error.to_string().contains(field), "{error}");
    }
    let integer = candle_core::Var::zeros(3, DType::U32, &Device::Cpu).unwrap();
    let group = ParamGroup::new(vec![integer], config());
    assert!(Lion::with_groups(vec![group]).is_err());
}

#[test]
fn wrong_gradients_change_nothing() {
    let w = var(&[1.0, 2.0]);
    let mut optimizer = Lion::new(vec![w.clone()], config()).unwrap();
    let state = |o: &Lion| bits(&o.state().unwrap()["m.0"]);
    let before = state(&optimizer);
    let wrong = [
        tensor(&[1.0]),
        tensor(&[1.0, 2.0]).to_dtype(DType::F32).unwrap(),
    ];
    for grad in wrong {
        assert!(optimizer.step(&store(&w, &grad)).is_err());
        assert_eq!(values(&w), [1.0, 2.0]);
        assert_eq!(state(&optimizer), before);
    }
    // A gradient that is not contiguous is read right.
    let m = normal_var(&mut optim::RandomStream::new(1), &[2, 3], DType::F64);
    let grad = normal(&mut optim::RandomStream::new(2), &[3, 2], DType::F64);
    let twin = copies(&[("m".into(), m.clone())]);
    let strided = grad.t().unwrap();
    let mut a = Lion::new(vec![m.clone()], config()).unwrap();
    a.step(&store(&m, &strided)).unwrap();
    let mut b = Lion::new(vec![twin[0].1.clone()], config()).unwrap();
    b.step(&store(&twin[0].1, &strided.contiguous().unwrap()))
        .unwrap();
    assert_eq!(bits(&m), bits(&twin[0].1));
}

#[test]
fn half_precision_parameters_keep_single_precision_state() {
    for dtype in [DType::BF16, DType::F16] {
        let params = named_params(1, dtype);
        let mut optimizer = lion(
            &params,
            LionConfig {
                nonfinite: NonFinite::Error,
                ..config()
            },
        );
        run(&mut optimizer, &params, 1, 0..3);
        let state = optimizer.state().unwrap();
        assert_eq!(state["m.bias"].dtype(), DType::F32);
    }
}

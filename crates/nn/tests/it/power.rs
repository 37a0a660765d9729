use crate::support::{bits, check_gradients, distance, normal, values, with_threads, CPU};
use candle_core::{DType, Module, ModuleT, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use nn::init::{trainable, SeededVars};
use nn::norm::power::{
    BackwardDenominator, GroupScaling, PowerNorm, PowerNormConfig, PowerNormV, SequenceLayout,
};
use nn::{Error, RandomStream};
use proptest::prelude::*;

fn layer(channels: usize, config: PowerNormConfig, dtype: DType) -> PowerNorm {
    let vars = SeededVars::new(&RandomStream::new(8)).with_rule(|name, _, _| {
        let spread = |mean| nn::init::Initializer::Normal { mean, std: 0.3 };
        match name {
            "weight" => Some(spread(1.0)),
            "bias" => Some(spread(0.0)),
            _ => None,
        }
    });
    PowerNorm::new(channels, config, vars.builder(dtype, &CPU)).unwrap()
}

fn config() -> PowerNormConfig {
    PowerNormConfig {
        warmup_iters: 2,
        groups: 2,
        ..Default::default()
    }
}

/// One training step: output and gradients of input, weight and bias.
fn step(
    norm: &PowerNorm,
    x: &Tensor,
    dy: &Tensor,
    pad: Option<&Tensor>,
    fused: bool,
) -> Vec<Tensor> {
    let x = Var::from_tensor(x).unwrap();
    let y = match fused {
        true => norm.forward_t(&x, pad, true),
        false => norm.forward_composed(&x, pad, true),
    };
    let y = y.unwrap();
    let grads = (&y * dy).unwrap().sum_all().unwrap().backward().unwrap();
    let of = |t: &Tensor| grads.get(t).unwrap().clone();
    vec![y.detach(), of(&x), of(norm.weight()), of(norm.bias())]
}

fn variants() -> Vec<PowerNormConfig> {
    let plain = PowerNormConfig {
        group_scaling: false,
        groups: 1,
        ..config()
    };
    let running = PowerNormConfig {
        denominator: BackwardDenominator::RunningQuadraticMean,
        ..config()
    };
    let bounded = PowerNormConfig {
        max_gamma: Some(0.5),
        ..config()
    };
    vec![config(), plain, running, bounded]
}

#[test]
fn fused_and_composed_paths_agree() {
    for config in variants() {
        let (a, b) = (
            layer(6, config.clone(), DType::F64),
            layer(6, config.clone(), DType::F64),
        );
        let pad = Tensor::new(&[[0u8, 0, 1, 1], [0, 0, 0, 1]], &CPU).unwrap();
        for i in 0..5 {
            let x = (normal(i, &[4, 2, 6], DType::F64) * 3.0).unwrap();
            let dy = normal(i + 50, &[4, 2, 6], DType::F64);
            let pad = (i % 2 == 0).then_some(&pad);
            let (fused, composed) = (step(&a, &x, &dy, pad, true), step(&b, &x, &dy, pad, false));
            for (f, c) in fused.iter().zip(&composed) {
                assert!(distance(f, c) < 1e-12, "{config:?} step {i}");
            }
            assert!(distance(&a.running_phi().unwrap(), &b.running_phi().unwrap()) < 1e-13);
            assert!(distance(&a.ema_gz().unwrap(), &b.ema_gz().unwrap()) < 1e-13);
        }
        let x = normal(9, &[4, 2, 6], DType::F64);
        let (f, c) = (
            a.forward_t(&x, None, false),
            b.forward_composed(&x, None, false),
        );
        assert!(distance(&f.unwrap(), &c.unwrap()) < 1e-13);
    }
}

#[test]
fn single_precision_agrees_with_double() {
    for config in variants() {
        let (a, b) = (
            layer(48, config.clone(), DType::F32),
            layer(48, config.clone(), DType::F64),
        );
        for i in 0..5 {
            let x = normal(i, &[30, 4, 48], DType::F32);
            let dy = normal(i + 50, &[30, 4, 48], DType::F32);
            let wide = |t: &Tensor| t.to_dtype(DType::F64).unwrap();
            // The weights are the same draws, rounded.
            let (f, d) = (
                step(&a, &x, &dy, None, true),
                step(&b, &wide(&x), &wide(&dy), None, true),
            );
            for (f, d) in f.iter().zip(&d) {
                assert!(
                    distance(&wide(f), d) < 1e-5,
                    "{config:?} step {i}: {}",
                    distance(&wide(f), d)
                );
            }
        }
    }
}

#[test]
fn bits_do_not_depend_on_threads() {
    let run = |threads| {
        with_threads(threads, || {
            let norm = layer(
                96,
                PowerNormConfig {
                    groups: 4,
                    ..config()
                },
                DType::F32,
            );
            let mut all = vec![];
            for i in 0..4 {
                let x = normal(i, &[700, 96], DType::F32);
                let dy = normal(i + 50, &[700, 96], DType::F32);
                all.extend(step(&norm, &x, &dy, None, true).iter().flat_map(bits));
            }
            all.extend(bits(&norm.running_phi().unwrap()));
            all.extend(bits(&norm.ema_gz().unwrap()));
            all
        })
    };
    let one = run(1);
    assert!(one == run(2) && one == run(7));
}

/// `Lambda = weight * d_weight / M`, from which `nu'` can be followed by hand.
#[test]
fn ema_gz_follows_the_weight_gradient() {
    let norm = layer(
        5,
        PowerNormConfig {
            groups: 1,
            ..config()
        },
        DType::F64,
    );
    for i in 0..4 {
        let (x, dy) = (
            normal(i, &[7, 5], DType::F64),
            normal(i + 50, &[7, 5], DType::F64),
        );
        let before = values(&norm.ema_gz().unwrap());
        let out = step(&norm, &x, &dy, None, true);
        let (w, b) = (values(norm.weight()), values(norm.bias()));
        let (y, dw) = (values(&out[0]), values(&out[2]));
        for (c, after) in values(&norm.ema_gz().unwrap()).into_iter().enumerate() {
            let z = |row: usize| (y[row * 5 + c] - b[c]) / w[c];
            let gamma = (0..7).map(|row| z(row).powi(2)).sum::<f64>() / 7.0;
            let expected = before[c] + w[c] * dw[c] / 7.0 - 0.1 * before[c] * gamma;
            assert!((after - expected).abs() < 1e-12, "{after} for {expected}");
        }
    }
}

#[test]
fn without_backward_memory_the_gradient_is_a_scale() {
    let config = PowerNormConfig {
        alpha_bkw: 1.0,
        group_scaling: false,
        ..Default::default()
    };
    let norm = layer(3, config, DType::F64);
    for i in 0..3 {
        let (x, dy) = (
            normal(i, &[6, 3], DType::F64),
            normal(i + 50, &[6, 3], DType::F64),
        );
        let out = step(&norm, &x, &dy, None, true);
        let q = x.sqr().unwrap().mean(0).unwrap();
        let inverse = (q + 1e-5).unwrap().sqrt().unwrap().recip().unwrap();
        let scale = (norm.weight() * inverse).unwrap();
        assert!(distance(&out[1], &dy.broadcast_mul(&scale).unwrap()) < 1e-14);
    }
}

#[test]
fn without_warm_up_the_first_forward_divides_by_one() {
    let config = PowerNormConfig {
        warmup_iters: 0,
        group_scaling: false,
        ..Default::default()
    };
    let norm = PowerNorm::new(
        3,
        config,
        VarBuilder::from_varmap(&VarMap::new(), DType::F64, &CPU),
    );
    let x = normal(1, &[6, 3], DType::F64);
    let y = norm.unwrap().forward_t(&x, None, true).unwrap();
    assert!(distance(&y, &(x / 1.000_01_f64.sqrt()).unwrap()) < 1e-15);
}

#[test]
fn evaluation_is_per_token_and_moves_nothing() {
    let norm = layer(6, config(), DType::F64);
    for i in 0..4 {
        step(
            &norm,
            &normal(i, &[5, 6], DType::F64),
            &normal(i + 9, &[5, 6], DType::F64),
            None,
            true,
        );
    }
    let before = norm.statistics().unwrap();
    let x = normal(77, &[8, 6], DType::F64);
    let all = ModuleT::forward_t(&norm, &x, false).unwrap();
    for row in 0..8 {
        let alone = norm
            .forward_t(&x.narrow(0, row, 1).unwrap(), None, false)
            .unwrap();
        assert_eq!(bits(&alone), bits(&all.narrow(0, row, 1).unwrap()));
    }
    assert_eq!(norm.statistics().unwrap(), before);
    // In evaluation the gradient is the derivative.
    let x = Var::from_tensor(&x).unwrap();
    let dy = normal(78, &[8, 6], DType::F64);
    let error = check_gradients(&[&x], || {
        let y = norm.forward_t(&x, None, false).unwrap();
        (y * &dy).unwrap().sum_all().unwrap()
    });
    assert!(error < 1e-8, "{error}");
    assert_eq!(norm.statistics().unwrap(), before);
}

#[test]
fn phi_scales_with_the_square_of_the_input() {
    let config = PowerNormConfig {
        group_scaling: false,
        eps: 0.0,
        warmup_iters: 5,
        ..Default::default()
    };
    let (a, b) = (
        layer(3, config.clone(), DType::F64),
        layer(3, config, DType::F64),
    );
    for i in 0..400 {
        let x = normal(i % 3, &[9, 3], DType::F64);
        a.forward_t(&x, None, true).unwrap();
        b.forward_t(&(x * 5.0).unwrap(), None, true).unwrap();
    }
    let ratio = (b.running_phi().unwrap() / a.running_phi().unwrap()).unwrap();
    assert!(
        values(&ratio).iter().all(|r| (r - 25.0).abs() < 1e-9),
        "{ratio}"
    );
}

#[test]
fn folding_is_exact_without_group_scaling() {
    let norm = layer(
        4,
        PowerNormConfig {
            group_scaling: false,
            groups: 1,
            ..config()
        },
        DType::F64,
    );
    for i in 0..3 {
        norm.forward_t(&normal(i, &[9, 4], DType::F64), None, true)
            .unwrap();
    }
    let x = normal(5, &[7, 4], DType::F64);
    let y = norm.forward_t(&x, None, false).unwrap();
    let (scale, shift) = norm.to_affine().unwrap();
    let direct = x
        .broadcast_mul(&scale)
        .unwrap()
        .broadcast_add(&shift)
        .unwrap();
    assert!(distance(&direct, &y) < 1e-14);
    for bias in [None, Some(normal(7, &[2], DType::F64))] {
        let next = candle_nn::Linear::new(normal(6, &[2, 4], DType::F64), bias);
        let folded = norm.fold_into(&next).unwrap().forward(&x).unwrap();
        assert!(distance(&folded, &next.forward(&y).unwrap()) < 1e-13);
    }
    let narrow = candle_nn::Linear::new(normal(6, &[2, 3], DType::F64), None);
    assert!(matches!(norm.fold_into(&narrow), Err(Error::Shape { .. })));
    let scaled = layer(4, config(), DType::F64);
    assert!(matches!(scaled.to_affine(), Err(Error::Unsupported { .. })));
}

#[test]
fn layouts_agree() {
    let (a, b) = (
        layer(6, config(), DType::F64),
        layer(
            6,
            PowerNormConfig {
                layout: SequenceLayout::BatchFirst,
                ..config()
            },
            DType::F64,
        ),
    );
    let pad = Tensor::new(&[[0u8, 0, 0, 1], [0, 1, 1, 1], [0, 0, 0, 0]], &CPU).unwrap();
    for i in 0..3 {
        let x = normal(i, &[4, 3, 6], DType::F64);
        let y = a.forward_t(&x, Some(&pad), true).unwrap();
        let swapped = x.transpose(0, 1).unwrap();
        let other = b.forward_t(&swapped, Some(&pad), true).unwrap();
        assert!(distance(&other.transpose(0, 1).unwrap(), &y) < 1e-14);
        assert!(distance(&a.running_phi().unwrap(), &b.running_phi().unwrap()) < 1e-14);
    }
}

#[test]
fn padding_does_not_enter_the_statistics() {
    let (a, b) = (
        layer(6, config(), DType::F64),
        layer(6, config(), DType::F64),
    );
    let x = normal(1, &[5, 6], DType::F64);
    let junk = (normal(2, &[2, 6], DType::F64) * 1e3).unwrap();
    let padded = Tensor::cat(&[&x, &junk], 0).unwrap();
    let pad = Tensor::new(&[0u8, 0, 0, 0, 0, 1, 1], &CPU).unwrap();
    let y = a.forward_t(&padded, Some(&pad), true).unwrap();
    let expected = b.forward_t(&x, None, true).unwrap();
    assert!(distance(&y.narrow(0, 0, 5).unwrap(), &expected) < 1e-14);
    assert!(distance(&a.running_phi().unwrap(), &b.running_phi().unwrap()) < 1e-14);
}

#[test]
fn a_batch_of_padding_moves_nothing() {
    for fused in [true, false] {
        let norm = layer(6, config(), DType::F64);
        let (x, dy) = (
            normal(1, &[5, 6], DType::F64),
            normal(2, &[5, 6], DType::F64),
        );
        step(&norm, &x, &dy, None, fused);
        let before = norm.statistics().unwrap();
        let all = Tensor::ones(5, DType::U8, &CPU).unwrap();
        let out = step(&norm, &x, &dy, Some(&all), fused);
        assert_eq!(norm.statistics().unwrap(), before);
        assert!(distance(&out[0], &norm.forward_t(&x, None, false).unwrap()) < 1e-14);
    }
}

#[test]
fn resuming_gives_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("norm.safetensors");
    let data = |i| {
        (
            normal(i, &[9, 6], DType::F32),
            normal(i + 90, &[9, 6], DType::F32),
        )
    };
    let run = |norm: &PowerNorm, steps: std::ops::Range<u64>| {
        let outs = steps.map(|i| step(norm, &data(i).0, &data(i).1, None, true));
        outs.flat_map(|out| out.iter().flat_map(bits).collect::<Vec<_>>())
            .collect::<Vec<_>>()
    };
    let make = |map: &VarMap| {
        PowerNorm::new(6, config(), VarBuilder::from_varmap(map, DType::F32, &CPU)).unwrap()
    };
    let map = VarMap::new();
    let norm = make(&map);
    run(&norm, 0..4);
    map.save(&file).unwrap();
    let state = norm.state().unwrap();
    let expected = run(&norm, 4..8);
    let iters = norm.iters().unwrap();
    assert_eq!(iters, 8);

    let mut fresh = VarMap::new();
    let from_file = make(&fresh);
    fresh.load(&file).unwrap();
    assert_eq!(run(&from_file, 4..8), expected);
    assert_eq!(from_file.iters().unwrap(), iters);

    let from_state = make(&VarMap::new());
    from_state.load_state(&state).unwrap();
    assert_eq!(run(&from_state, 4..8), expected);

    let mut broken = state.clone();
    broken.remove("ema_gz");
    broken.insert("phi".into(), Tensor::ones(1, DType::F32, &CPU).unwrap());
    broken.insert("iters".into(), Tensor::ones(2, DType::F32, &CPU).unwrap());
    let before = from_state.statistics().unwrap();
    let message = from_state.load_state(&broken).unwrap_err().to_string();
    for part in [
        "`ema_gz` is missing",
        "`phi` is unknown",
        "`iters` is F32 [2]",
    ] {
        assert!(message.contains(part), "{message}");
    }
    assert_eq!(from_state.statistics().unwrap(), before);
}

#[test]
fn buffers_are_no_parameters() {
    let map = VarMap::new();
    PowerNorm::new(
        6,
        config(),
        VarBuilder::from_varmap(&map, DType::F32, &CPU).pp("n"),
    )
    .unwrap();
    let names: Vec<String> = trainable(&map).into_iter().map(|(n, _)| n).collect();
    assert_eq!(names, ["n.bias", "n.weight"]);
    assert_eq!(map.all_vars().len(), 5);
}

/// A second moment 100 times the running one makes `nu'` explode, unless `Gamma` is bounded.
#[test]
fn max_gamma_keeps_the_statistic_bounded() {
    let run = |max_gamma| {
        let config = PowerNormConfig {
            max_gamma,
            warmup_iters: 0,
            alpha_fwd: 1.0,
            group_scaling: false,
            ..Default::default()
        };
        let norm = layer(3, config, DType::F64);
        for i in 0..400 {
            let x = Var::from_tensor(&(normal(i, &[8, 3], DType::F64) * 10.0).unwrap()).unwrap();
            let y = norm.forward_t(&x, None, true).unwrap();
            let dy = (normal(i + 900, &[8, 3], DType::F64) * &y).unwrap();
            if let Err(error) = (y * dy.detach()).unwrap().sum_all().unwrap().backward() {
                return Err(error.to_string());
            }
        }
        Ok(norm.statistics().unwrap())
    };
    let statistics = run(Some(10.0)).unwrap();
    assert!(
        statistics.ema_gz.iter().all(|x| x.abs() < 1e6),
        "{statistics:?}"
    );
    let message = run(None).unwrap_err();
    assert!(
        message.contains("ema_gz") && message.contains("max_gamma"),
        "{message}"
    );
}

#[test]
fn nonfinite_batches_do_not_poison_the_state() {
    for fused in [true, false] {
        let norm = layer(2, config(), DType::F32);
        let good = normal(1, &[4, 2], DType::F32);
        step(&norm, &good, &good, None, fused);
        let before = norm.statistics().unwrap();
        for bad in [f32::NAN, f32::INFINITY] {
            let x = Tensor::new(&[[1f32, 2.0], [bad, 1.0]], &CPU).unwrap();
            let error = match fused {
                true => norm.forward_t(&x, None, true),
                false => norm.forward_composed(&x, None, true),
            };
            let error = error.unwrap_err();
            assert!(
                matches!(error, Error::NonFinite { total: 2, .. }),
                "{error}"
            );
        }
        assert_eq!(norm.statistics().unwrap(), before);
        let y = match fused {
            true => norm.forward_t(&good, None, true),
            false => norm.forward_composed(&good, None, true),
        };
        let loss = (y.unwrap() * f64::NAN).unwrap().sum_all().unwrap();
        let message = loss.backward().unwrap_err().to_string();
        assert!(message.contains("gradient holds NaN"), "{message}");
        assert_eq!(norm.statistics().unwrap().ema_gz, before.ema_gz);
    }
}

#[test]
fn half_precision_is_computed_in_single() {
    for dtype in [DType::BF16, DType::F16] {
        let norm = PowerNorm::new(
            4,
            PowerNormConfig::default(),
            VarBuilder::from_varmap(&VarMap::new(), dtype, &CPU),
        );
        let norm = norm.unwrap();
        let x = Var::from_tensor(&normal(1, &[6, 4], dtype)).unwrap();
        let y = norm.forward_t(&x, None, true).unwrap();
        assert_eq!(
            (y.dtype(), norm.running_phi().unwrap().dtype()),
            (dtype, DType::F32)
        );
        let grads = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        assert_eq!(grads.get(&x).unwrap().dtype(), dtype);
        assert_eq!(grads.get(norm.weight()).unwrap().dtype(), dtype);
    }
}

#[test]
fn bad_input_is_named() {
    let norm = layer(4, PowerNormConfig::default(), DType::F32);
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &CPU).unwrap();
    for shape in [&[4][..], &[3, 5], &[0, 4], &[2, 0, 4]] {
        let error = norm.forward_t(&zeros(shape), None, true).unwrap_err();
        assert!(
            matches!(
                error,
                Error::Shape {
                    tensor: "input",
                    ..
                }
            ),
            "{shape:?}: {error}"
        );
    }
    let pad = Tensor::zeros((3, 2), DType::U8, &CPU).unwrap();
    let error = norm
        .forward_t(&zeros(&[3, 2, 4]), Some(&pad), true)
        .unwrap_err();
    assert!(
        matches!(error, Error::Shape { tensor: "pad", .. }),
        "{error}"
    );
    let error = norm
        .forward_t(&zeros(&[2, 3, 4]), Some(&zeros(&[3, 2])), true)
        .unwrap_err();
    assert!(
        matches!(error, Error::DType { tensor: "pad", .. }),
        "{error}"
    );
    let error = norm
        .forward_t(&zeros(&[1, 2, 3, 4]), Some(&pad), true)
        .unwrap_err();
    assert!(matches!(error, Error::Shape { .. }), "{error}");
    let integers = Tensor::zeros((3, 4), DType::U32, &CPU).unwrap();
    assert!(matches!(
        norm.forward_t(&integers, None, true),
        Err(Error::DType { .. })
    ));

    let bad = [
        PowerNormConfig {
            eps: -1.0,
            ..config()
        },
        PowerNormConfig {
            alpha_fwd: 1.5,
            ..config()
        },
        PowerNormConfig {
            alpha_bkw: f64::NAN,
            ..config()
        },
        PowerNormConfig {
            groups: 0,
            ..config()
        },
        PowerNormConfig {
            groups: 3,
            ..config()
        },
        PowerNormConfig {
            max_gamma: Some(0.0),
            ..config()
        },
        PowerNormConfig {
            warmup_iters: u64::MAX,
            ..config()
        },
    ];
    for config in bad {
        let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &CPU);
        let result = PowerNorm::new(4, config.clone(), vb);
        assert!(
            matches!(result, Err(Error::InvalidConfig { .. })),
            "{config:?}"
        );
    }
}

#[test]
fn group_scaling_has_unit_second_moment_and_a_gradient() {
    let scaling = GroupScaling {
        groups: 3,
        eps: 0.0,
    };
    let x = Var::from_tensor(&normal(1, &[4, 6], DType::F64)).unwrap();
    let h = values(&scaling.forward(&x).unwrap());
    for pair in h.chunks(2) {
        assert!((pair[0].powi(2) + pair[1].powi(2) - 2.0).abs() < 1e-14);
    }
    let dy = normal(2, &[4, 6], DType::F64);
    let loss = || {
        (scaling.forward(&x).unwrap() * &dy)
            .unwrap()
            .sum_all()
            .unwrap()
    };
    assert!(check_gradients(&[&x], loss) < 1e-8);
    assert!(GroupScaling {
        groups: 4,
        eps: 0.0
    }
    .forward(&x)
    .is_err());
}

#[test]
fn variant_v_has_the_exact_gradient() {
    let pad = Tensor::new(&[0u8, 0, 1, 0, 0], &CPU).unwrap();
    for (config, pad) in [
        (config(), None),
        (config(), Some(&pad)),
        (variants()[1].clone(), None),
    ] {
        let vars = SeededVars::new(&RandomStream::new(8));
        let norm = PowerNormV::new(4, config, vars.builder(DType::F64, &CPU)).unwrap();
        let x = Var::from_tensor(&normal(1, &[5, 4], DType::F64)).unwrap();
        let dy = normal(2, &[5, 4], DType::F64);
        let loss = || {
            (norm.forward(&x, pad).unwrap() * &dy)
                .unwrap()
                .sum_all()
                .unwrap()
        };
        let trained = vars.trainable();
        assert_eq!(trained.len(), 2);
        let vars = [&x, &trained[0].1, &trained[1].1];
        assert!(check_gradients(&vars, loss) < 1e-6);
    }
}

proptest! {
    #![proptest_config(crate::support::cases(24))]

    /// Over random shapes: both paths agree, with and without warm-up, over odd widths.
    #[test]
    fn paths_agree_on_any_shape(
        rows in 1usize..40, width in 1usize..20, groups in 1usize..4,
        warmup in 0u64..3, scaling: bool, seed in 0u64..1000,
    ) {
        let config = PowerNormConfig {
            groups, warmup_iters: warmup, group_scaling: scaling, ..Default::default()
        };
        let c = width * groups;
        let (a, b) = (layer(c, config.clone(), DType::F64), layer(c, config, DType::F64));
        for i in 0..3 {
            let (x, dy) = (normal(seed + i, &[rows, c], DType::F64), normal(seed + i + 5000, &[rows, c], DType::F64));
            for (f, c) in step(&a, &x, &dy, None, true).iter().zip(step(&b, &x, &dy, None, false)) {
                prop_assert!(distance(f, &c) < 1e-10);
            }
        }
        prop_assert!(distance(&a.ema_gz().unwrap(), &b.ema_gz().unwrap()) < 1e-10);
    }
}

use crate::support::{bits, check_gradients, distance, normal, values, with_threads, CPU};
use candle_core::{DType, ModuleT, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use nn::init::SeededVars;
use nn::norm::ghost_batch::{
    ghost_batch_norm, GhostBatchNorm, GhostBatchNormConfig, GhostPlan, Remainder, RunningUpdate,
};
use nn::{Error, RandomStream};
use proptest::prelude::*;

fn layer(channels: usize, config: GhostBatchNormConfig, dtype: DType) -> GhostBatchNorm {
    let vars = SeededVars::new(&RandomStream::new(8)).with_rule(|name, _, _| {
        let spread = |mean| nn::init::Initializer::Normal { mean, std: 0.3 };
        match name {
            "weight" => Some(spread(1.0)),
            "bias" => Some(spread(0.0)),
            _ => None,
        }
    });
    ghost_batch_norm(channels, config, vars.builder(dtype, &CPU)).unwrap()
}

fn ghost(ghost_size: usize) -> GhostBatchNormConfig {
    GhostBatchNormConfig {
        ghost_size,
        ..Default::default()
    }
}

fn step(norm: &GhostBatchNorm, x: &Tensor, dy: &Tensor, fused: bool) -> Vec<Tensor> {
    let x = Var::from_tensor(x).unwrap();
    let y = match fused {
        true => norm.forward_train(&x),
        false => norm.forward_train_composed(&x),
    };
    let y = y.unwrap();
    let grads = (&y * dy).unwrap().sum_all().unwrap().backward().unwrap();
    let mut out = vec![y.detach(), grads.get(&x).unwrap().clone()];
    if let Some((w, b)) = norm.weight_and_bias() {
        out.extend([grads.get(w).unwrap().clone(), grads.get(b).unwrap().clone()]);
    }
    out.extend([
        norm.running_mean().copy().unwrap(),
        norm.running_var().copy().unwrap(),
    ]);
    out
}

#[test]
fn an_activation_is_fused_with_its_gradient() {
    for shape in [&[9, 5][..], &[6, 5, 7, 3], &[16, 24, 9, 9]] {
        let x = normal(3, shape, DType::F64);
        let dy = normal(4, shape, DType::F64);
        for activation in crate::dense::ALL {
            let norm = || layer(shape[1], ghost(4), DType::F64).with_activation(activation);
            assert_eq!(norm().activation(), activation);
            let pairs = step(&norm(), &x, &dy, true).into_iter();
            for (ours, exact) in pairs.zip(step(&norm(), &x, &dy, false)) {
                assert!(distance(&ours, &exact) < 1e-11, "{activation:?}");
            }
            let two = layer(shape[1], ghost(4), DType::F64);
            let two = activation.of(&two.forward_eval(&x).unwrap()).unwrap();
            assert!(distance(&norm().forward_eval(&x).unwrap(), &two) < 1e-14);
        }
    }
    let relu = nn::activation::Activation::Relu;
    let norm = layer(5, ghost(4), DType::F64).with_activation(relu);
    let error = norm.into_batch_norm().unwrap_err().to_string();
    assert!(error.contains("Relu"), "{error}");
}

#[test]
fn plans_cover_the_batch() {
    let plan = |b, g, r| GhostPlan::new(b, g, r).unwrap();
    assert_eq!(plan(12, 4, Remainder::Balanced), [4, 4, 4]);
    assert_eq!(plan(7, 4, Remainder::Balanced), [7]);
    assert_eq!(plan(9, 2, Remainder::Balanced), [3, 2, 2, 2]);
    // k = 4 groups of ceil(9/4) = 3 fill the batch with three.
    assert_eq!(plan(9, 2, Remainder::Official), [3, 3, 3]);
    assert_eq!(plan(13, 4, Remainder::Official), [5, 5, 3]);
    assert_eq!(plan(5, 2, Remainder::Official), [3, 2]);
    assert_eq!(plan(3, usize::MAX, Remainder::Strict), [3]);
    assert_eq!(plan(7, 4, Remainder::Strict), [7]);
    let error = GhostPlan::new(10, 4, Remainder::Strict).unwrap_err();
    assert!(
        matches!(
            error,
            Error::IndivisibleBatch {
                batch: 10,
                ghost_size: 4
            }
        ),
        "{error}"
    );
    assert!(GhostPlan::new(0, 4, Remainder::Balanced).is_err());
    assert!(GhostPlan::new(4, 0, Remainder::Balanced).is_err());
}

#[test]
fn a_large_ghost_is_batch_norm() {
    for shape in [&[9, 4][..], &[5, 4, 3], &[3, 4, 2, 5]] {
        let map = VarMap::new();
        let vb = VarBuilder::from_varmap(&map, DType::F64, &CPU);
        let theirs = candle_nn::batch_norm(4, 1e-5, vb).unwrap();
        let ours = layer(
            4,
            GhostBatchNormConfig {
                affine: false,
                ..GhostBatchNormConfig::batch_norm()
            },
            DType::F64,
        );
        for i in 0..3 {
            let x = (normal(i, shape, DType::F64) + 2.0).unwrap();
            let expected = theirs.forward_t(&x, true).unwrap();
            assert!(distance(&ours.forward_t(&x, true).unwrap(), &expected) < 1e-12);
        }
        assert!(distance(ours.running_mean(), theirs.running_mean()) < 1e-14);
        assert!(distance(ours.running_var(), theirs.running_var()) < 1e-14);
        let x = normal(7, shape, DType::F64);
        let expected = theirs.forward_t(&x, false).unwrap();
        assert!(distance(&ours.forward_t(&x, false).unwrap(), &expected) < 1e-13);
    }
}

#[test]
fn groups_are_separate_batch_norms() {
    let x = normal(1, &[10, 3, 2], DType::F64);
    let dy = normal(2, &[10, 3, 2], DType::F64);
    let all = step(&layer(3, ghost(3), DType::F64), &x, &dy, true);
    let one = layer(3, GhostBatchNormConfig::batch_norm(), DType::F64);
    let mut start = 0;
    let (mut ys, mut dxs, mut last) = (vec![], vec![], vec![]);
    for size in [4, 3, 3] {
        let part = |t: &Tensor| t.narrow(0, start, size).unwrap();
        let out = step(&one, &part(&x), &part(&dy), true);
        ys.push(out[0].clone());
        dxs.push(out[1].clone());
        last = out;
        start += size;
    }
    assert!(distance(&all[0], &Tensor::cat(&ys, 0).unwrap()) < 1e-13);
    assert!(distance(&all[1], &Tensor::cat(&dxs, 0).unwrap()) < 1e-13);
    // Fed one after the other, the running statistics are the sequential ones.
    assert!(distance(&all[4], &last[4]) < 1e-14 && distance(&all[5], &last[5]) < 1e-14);
}

#[test]
fn no_gradient_crosses_groups() {
    let x = normal(1, &[9, 3], DType::F64);
    let mut dy = vec![0.0; 27];
    dy[9..18].copy_from_slice(&values(&normal(2, &[9], DType::F64)));
    let dy = Tensor::from_vec(dy, (9, 3), &CPU).unwrap();
    let dx = values(&step(&layer(3, ghost(3), DType::F64), &x, &dy, true)[1]);
    assert!(dx[..9].iter().chain(&dx[18..]).all(|g| *g == 0.0));
    assert!(dx[9..18].iter().any(|g| g.abs() > 1e-3));
}

#[test]
fn order_within_a_group_does_not_matter() {
    let x = normal(1, &[8, 5], DType::F64);
    let order = Tensor::new(&[2u32, 0, 3, 1, 4, 7, 6, 5], &CPU).unwrap();
    let (a, b) = (
        layer(5, ghost(4), DType::F64),
        layer(5, ghost(4), DType::F64),
    );
    let y = a
        .forward_train(&x)
        .unwrap()
        .index_select(&order, 0)
        .unwrap();
    let permuted = b
        .forward_train(&x.index_select(&order, 0).unwrap())
        .unwrap();
    assert!(distance(&permuted, &y) < 1e-14);
}

#[test]
fn closed_update_is_the_sequential_one() {
    let closed = GhostBatchNormConfig {
        update: RunningUpdate::Closed,
        ..ghost(3)
    };
    let (a, b) = (layer(4, ghost(3), DType::F64), layer(4, closed, DType::F64));
    for i in 0..5 {
        let x = (normal(i, &[14, 4], DType::F64) * 2.0).unwrap();
        a.forward_train(&x).unwrap();
        b.forward_train(&x).unwrap();
    }
    assert!(distance(a.running_mean(), b.running_mean()) < 1e-13);
    assert!(distance(a.running_var(), b.running_var()) < 1e-13);
}

#[test]
fn gradients_are_derivatives() {
    for shape in [&[7, 3][..], &[4, 3, 2]] {
        for remove_mean in [true, false] {
            let config = GhostBatchNormConfig {
                remove_mean,
                ..ghost(3)
            };
            let norm = layer(3, config, DType::F64);
            let x = Var::from_tensor(&normal(1, shape, DType::F64)).unwrap();
            let dy = normal(2, shape, DType::F64);
            let (w, b) = norm.weight_and_bias().unwrap();
            let (w, b) = (Var::from_tensor(w).unwrap(), Var::from_tensor(b).unwrap());
            let loss = |y: Tensor| (y * &dy).unwrap().sum_all().unwrap();
            let train = check_gradients(&[&x, &w, &b], || loss(norm.forward_train(&x).unwrap()));
            let eval = check_gradients(&[&x, &w, &b], || loss(norm.forward_eval(&x).unwrap()));
            assert!(
                train < 1e-7 && eval < 1e-7,
                "{shape:?} {remove_mean}: {train} {eval}"
            );
        }
    }
}

#[test]
fn bits_do_not_depend_on_threads() {
    // Few groups go through the two-stage path, many through the one-pass path.
    for (shape, size) in [
        (&[600, 70][..], 600),
        (&[600, 70], 8),
        (&[60, 9, 50], 4),
        (&[30, 9, 150], 30),
    ] {
        let run = |threads| {
            with_threads(threads, || {
                let norm = layer(shape[1], ghost(size), DType::F32);
                let (x, dy) = (normal(1, shape, DType::F32), normal(2, shape, DType::F32));
                let out = step(&norm, &x, &dy, true);
                out.iter().flat_map(bits).collect::<Vec<_>>()
            })
        };
        let one = run(1);
        assert!(one == run(2) && one == run(7), "{shape:?} {size}");
    }
}

/// Deviations of 1e-2 around 1e3: an error in the mean of one f32 ulp is already 0.6 % of them.
#[test]
fn large_means_lose_no_digits() {
    for shape in [&[64, 5][..], &[16, 5, 9]] {
        let noise = normal(1, shape, DType::F32);
        let x = ((noise * 1e-2).unwrap() + 1e3).unwrap();
        let dy = normal(2, shape, DType::F32);
        let wide = |t: &Tensor| t.to_dtype(DType::F64).unwrap();
        let config = GhostBatchNormConfig {
            eps: 0.0,
            ..ghost(16)
        };
        let single = step(&layer(5, config, DType::F32), &x, &dy, true);
        let double = step(&layer(5, config, DType::F64), &wide(&x), &wide(&dy), true);
        assert!(distance(&wide(&single[0]), &double[0]) < 1e-5);
        let scale = values(&double[1])
            .iter()
            .fold(0.0, |m: f64, g| m.max(g.abs()));
        for (s, d) in values(&single[1]).iter().zip(values(&double[1])) {
            assert!((s - d).abs() < 1e-5 * scale);
        }
    }
}

#[test]
fn single_precision_agrees_with_double() {
    let (x, dy) = (
        normal(1, &[90, 33], DType::F32),
        normal(2, &[90, 33], DType::F32),
    );
    let wide = |t: &Tensor| t.to_dtype(DType::F64).unwrap();
    let single = step(&layer(33, ghost(16), DType::F32), &x, &dy, true);
    let double = step(
        &layer(33, ghost(16), DType::F64),
        &wide(&x),
        &wide(&dy),
        true,
    );
    for (s, d) in single.iter().zip(&double) {
        assert!(distance(&wide(s), d) < 1e-5);
    }
}

#[test]
fn a_group_of_one_has_factor_one() {
    let config = GhostBatchNormConfig {
        remainder: Remainder::Official,
        ..ghost(2)
    };
    for fused in [true, false] {
        let norm = layer(3, config, DType::F64);
        // Five examples in two groups of 3 and 2, seven in 3, 3 and 1.
        let out = step(
            &norm,
            &normal(1, &[7, 3], DType::F64),
            &normal(2, &[7, 3], DType::F64),
            fused,
        );
        assert!(out.iter().flat_map(values).all(f64::is_finite));
        let single = layer(3, ghost(2), DType::F64);
        let out = step(
            &single,
            &normal(1, &[1, 3], DType::F64),
            &normal(2, &[1, 3], DType::F64),
            fused,
        );
        let (_, bias) = single.weight_and_bias().unwrap();
        assert_eq!(values(&out[0]), values(bias));
        assert!(values(&out[5]).iter().all(|v| (v - 0.9).abs() < 1e-15));
    }
}

#[test]
fn batch_norm_and_back_share_their_variables() {
    let map = VarMap::new();
    let vb = VarBuilder::from_varmap(&map, DType::F64, &CPU);
    let theirs = candle_nn::batch_norm(4, 1e-3, vb.clone()).unwrap();
    let ours = GhostBatchNorm::from_batch_norm(&theirs, 2).unwrap();
    assert_eq!((ours.config().eps, ours.config().momentum), (1e-3, 0.1));
    ours.forward_train(&normal(1, &[8, 4], DType::F64)).unwrap();
    assert_eq!(bits(ours.running_var()), bits(theirs.running_var()));
    assert_ne!(values(theirs.running_var()), [1.0; 4]);
    let x = normal(2, &[5, 4], DType::F64);
    let expected = ours.forward_eval(&x).unwrap();
    let back = ours.into_batch_norm().unwrap();
    assert!(distance(&back.forward_t(&x, false).unwrap(), &expected) < 1e-13);
    // The same names in a checkpoint.
    let count = map.all_vars().len();
    ghost_batch_norm(4, ghost(2), vb).unwrap();
    assert_eq!(map.all_vars().len(), count);

    assert!(GhostBatchNorm::from_batch_norm(&theirs, 0).is_err());
    let second = GhostBatchNormConfig {
        remove_mean: false,
        ..ghost(2)
    };
    let error = layer(4, second, DType::F64).into_batch_norm().unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
}

#[test]
fn resuming_gives_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("norm.safetensors");
    let run = |norm: &GhostBatchNorm, steps: std::ops::Range<u64>| {
        let one = |i| {
            step(
                norm,
                &normal(i, &[10, 3], DType::F32),
                &normal(i + 9, &[10, 3], DType::F32),
                true,
            )
        };
        steps
            .flat_map(|i| one(i).iter().flat_map(bits).collect::<Vec<_>>())
            .collect::<Vec<_>>()
    };
    let make = |map: &VarMap| {
        ghost_batch_norm(3, ghost(4), VarBuilder::from_varmap(map, DType::F32, &CPU)).unwrap()
    };
    let map = VarMap::new();
    let norm = make(&map);
    run(&norm, 0..3);
    map.save(&file).unwrap();
    let expected = run(&norm, 3..6);
    let mut fresh = VarMap::new();
    let resumed = make(&fresh);
    fresh.load(&file).unwrap();
    assert_eq!(run(&resumed, 3..6), expected);
}

#[test]
fn nonfinite_batches_do_not_poison_the_statistics() {
    for fused in [true, false] {
        let norm = layer(2, ghost(2), DType::F32);
        let (mean, var) = (bits(norm.running_mean()), bits(norm.running_var()));
        for bad in [f32::NAN, f32::INFINITY] {
            let x = Tensor::new(&[[1f32, 2.0], [bad, 1.0], [0.0, 1.0], [1.0, 1.0]], &CPU).unwrap();
            let result = match fused {
                true => norm.forward_train(&x),
                false => norm.forward_train_composed(&x),
            };
            assert!(matches!(result, Err(Error::NonFinite { .. })));
        }
        assert_eq!(
            (bits(norm.running_mean()), bits(norm.running_var())),
            (mean, var)
        );
    }
}

#[test]
fn half_precision_is_computed_in_single() {
    let norm = ghost_batch_norm(
        4,
        ghost(4),
        VarBuilder::from_varmap(&VarMap::new(), DType::BF16, &CPU),
    );
    let norm = norm.unwrap();
    let x = Var::from_tensor(&normal(1, &[8, 4], DType::BF16)).unwrap();
    let y = norm.forward_train(&x).unwrap();
    assert_eq!(
        (y.dtype(), norm.running_var().dtype()),
        (DType::BF16, DType::F32)
    );
    let grads = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
    assert_eq!(grads.get(&x).unwrap().dtype(), DType::BF16);
    assert_eq!(norm.forward_eval(&x).unwrap().dtype(), DType::BF16);
}

#[test]
fn bad_input_is_named() {
    let norm = layer(4, ghost(2), DType::F32);
    for shape in [&[4][..], &[3, 5], &[0, 4], &[2, 4, 0]] {
        let x = Tensor::zeros(shape, DType::F32, &CPU).unwrap();
        for train in [true, false] {
            let error = norm.forward_t(&x, train).unwrap_err().to_string();
            assert!(error.contains("[B, 4, ..]"), "{shape:?}: {error}");
        }
    }
    let integers = Tensor::zeros((3, 4), DType::U32, &CPU).unwrap();
    assert!(matches!(
        norm.forward_train(&integers),
        Err(Error::DType { .. })
    ));
    let bad = [
        GhostBatchNormConfig {
            ghost_size: 0,
            ..ghost(2)
        },
        GhostBatchNormConfig {
            momentum: -0.1,
            ..ghost(2)
        },
        GhostBatchNormConfig {
            momentum: f64::NAN,
            ..ghost(2)
        },
        GhostBatchNormConfig {
            eps: f64::INFINITY,
            ..ghost(2)
        },
    ];
    for config in bad {
        let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &CPU);
        assert!(matches!(
            ghost_batch_norm(4, config, vb),
            Err(Error::InvalidConfig { .. })
        ));
    }
    let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &CPU);
    assert!(ghost_batch_norm(0, ghost(2), vb).is_err());
    let strict = GhostBatchNormConfig {
        remainder: Remainder::Strict,
        ..ghost(2)
    };
    let result = layer(4, strict, DType::F32).forward_train(&normal(1, &[5, 4], DType::F32));
    assert!(matches!(result, Err(Error::IndivisibleBatch { .. })));
}

proptest! {
    #![proptest_config(crate::support::cases(40))]

    #[test]
    fn plans_partition(batch in 1usize..500, size in 1usize..60) {
        let balanced = GhostPlan::new(batch, size, Remainder::Balanced).unwrap();
        prop_assert_eq!(balanced.iter().sum::<usize>(), batch);
        prop_assert!(balanced.iter().all(|n| *n >= size.min(batch) && *n < 2 * size.max(batch.min(size)) ));
        let (first, last) = (balanced[0], balanced[balanced.len() - 1]);
        prop_assert!(first - last <= 1 && balanced.windows(2).all(|w| w[0] >= w[1]));
        let official = GhostPlan::new(batch, size, Remainder::Official).unwrap();
        prop_assert_eq!(official.iter().sum::<usize>(), batch);
        let k = (batch / size).max(1);
        prop_assert!(official.len() <= k && official[..official.len() - 1].iter().all(|n| *n == batch.div_ceil(k)));
    }

    #[test]
    fn paths_agree_on_any_shape(
        batch in 1usize..30, channels in 1usize..40, spatial in 1usize..12,
        size in 1usize..12, remove_mean: bool, affine: bool, seed in 0u64..1000,
    ) {
        let config = GhostBatchNormConfig { remove_mean, affine, ..ghost(size) };
        let (a, b) = (layer(channels, config, DType::F64), layer(channels, config, DType::F64));
        let shape = [batch, channels, spatial];
        let (x, dy) = (normal(seed, &shape, DType::F64), normal(seed + 5000, &shape, DType::F64));
        for (f, c) in step(&a, &x, &dy, true).iter().zip(step(&b, &x, &dy, false)) {
            // Tiny groups divide by small deviations.
            let scale = values(&c).iter().fold(1.0, |m: f64, v| m.max(v.abs()));
            prop_assert!(distance(f, &c) < 1e-9 * scale);
        }
    }
}

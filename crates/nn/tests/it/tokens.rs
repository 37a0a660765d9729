//! Attention, embedding, dropout, group norm.

use crate::dense::{probe, runner, var};
use crate::support::{
    bits, check_directions, check_gradients, distance, normal, values, with_threads, CPU,
};
use candle_core::{DType, Device, Module, ModuleT, Tensor, Var, D};
use candle_nn::{VarBuilder, VarMap};
use nn::attention::{multi_head_attention, scaled_dot_product_attention, AttentionConfig};
use nn::dropout::{dropout, Dropout};
use nn::embedding::{embedding, rows_of, Embedding};
use nn::norm::{group_norm, layer_norm, rms_norm, GroupNorm, LayerNormConfig};
use nn::{Error, RandomStream};
use proptest::prelude::*;

/// The definition, with the whole matrix.
fn definition(q: &Tensor, k: &Tensor, v: &Tensor, mask: Option<&Tensor>, causal: bool) -> Tensor {
    let scale = (q.dim(3).unwrap() as f64).powf(-0.5);
    let mut scores = (q.matmul(&k.t().unwrap()).unwrap() * scale).unwrap();
    if let Some(mask) = mask {
        scores = scores.broadcast_add(mask).unwrap();
    }
    let (n, m) = (q.dim(2).unwrap(), k.dim(2).unwrap());
    if causal {
        let mask: Vec<f64> = (0..n * m)
            .map(|i| {
                if i % m > i / m + m - n {
                    f64::NEG_INFINITY
                } else {
                    0.0
                }
            })
            .collect();
        let mask = Tensor::from_vec(mask, (n, m), &CPU).unwrap();
        scores = scores.broadcast_add(&mask).unwrap();
    }
    candle_nn::ops::softmax(&scores, D::Minus1)
        .unwrap()
        .matmul(v)
        .unwrap()
}

#[test]
fn attention_over_random_shapes() {
    let sizes = (
        1usize..3,
        1usize..4,
        1usize..140,
        0usize..80,
        1usize..10,
        1usize..10,
    );
    let kind = (any::<bool>(), 0usize..4);
    runner(40)
        .run(&(sizes, kind), |((b, h, n, more, d, e), (causal, mask))| {
            let m = n + more;
            let q = var(1, &[b, h, n, d], DType::F64);
            let (k, v) = (
                var(2, &[b, h, m, d], DType::F64),
                var(3, &[b, h, m, e], DType::F64),
            );
            let mask = match mask {
                0 => None,
                1 => Some(normal(4, &[n, m], DType::F64)),
                2 => Some(normal(4, &[b, 1, 1, m], DType::F64)),
                _ => Some(normal(4, &[h, n, 1], DType::F64)),
            };
            let config = AttentionConfig {
                mask: mask.clone(),
                causal,
                scale: None,
            };
            let ours = scaled_dot_product_attention(&q, &k, &v, &config).unwrap();
            let exact = definition(&q, &k, &v, mask.as_ref(), causal);
            let error = distance(&ours, &exact);
            prop_assert!(error < 1e-12, "{error}");
            let (g, x) = (
                probe(&ours).backward().unwrap(),
                probe(&exact).backward().unwrap(),
            );
            for v in [&q, &k, &v] {
                let error = distance(g.get(v).unwrap(), x.get(v).unwrap());
                prop_assert!(error < 1e-11, "{error}");
            }
            // Heads side by side are the same function.
            let merge = |t: &Tensor| t.transpose(1, 2).unwrap().flatten_from(2).unwrap();
            let (q, k, v) = (merge(&q), merge(&k), merge(&v));
            let y = multi_head_attention(&q, &k, &v, h, &config).unwrap();
            prop_assert!(distance(&y, &merge(&ours)) < 1e-13);
            Ok(())
        })
        .unwrap();
}

#[test]
fn multi_head_attention_has_its_gradient() {
    let q = var(1, &[2, 67, 6], DType::F64);
    let (k, v) = (
        var(2, &[2, 70, 6], DType::F64),
        var(3, &[2, 70, 4], DType::F64),
    );
    let config = AttentionConfig {
        causal: true,
        ..Default::default()
    };
    let f = || probe(&multi_head_attention(&q, &k, &v, 2, &config).unwrap());
    let error = check_directions(&[&q, &k, &v], f);
    assert!(error < 1e-8, "{error}");
}

#[test]
fn forbidden_keys_and_rows_without_keys() {
    let q = var(1, &[1, 1, 3, 4], DType::F64);
    let (k, v) = (
        var(2, &[1, 1, 2, 4], DType::F64),
        var(3, &[1, 1, 2, 5], DType::F64),
    );
    let mask = Tensor::new(&[[1u8, 0], [0, 0], [1, 1]], &CPU).unwrap();
    let config = AttentionConfig {
        mask: Some(mask),
        ..Default::default()
    };
    let f = || scaled_dot_product_attention(&q, &k, &v, &config).unwrap();
    let y = f().squeeze(0).unwrap().squeeze(0).unwrap();
    let first = v.get(0).unwrap().get(0).unwrap().get(0).unwrap();
    assert!(distance(&y.get(0).unwrap(), &first) < 1e-15);
    assert!(values(&y.get(1).unwrap()).iter().all(|y| *y == 0.0));
    let error = check_gradients(&[&q, &k, &v], || probe(&f()));
    assert!(error < 1e-8, "{error}");
    // A mask that is part of a graph has a gradient.
    let mask = var(4, &[3, 2], DType::F64);
    let learned = || AttentionConfig {
        mask: Some(mask.as_tensor().clone()),
        ..Default::default()
    };
    let f = || probe(&scaled_dot_product_attention(&q, &k, &v, &learned()).unwrap());
    let error = check_gradients(&[&q, &mask], f);
    assert!(error < 1e-8, "{error}");
}

#[test]
fn attention_refuses_what_does_not_fit() {
    let t = |shape: &[usize]| normal(1, shape, DType::F32);
    let config = AttentionConfig::default();
    let (q, k) = (t(&[2, 3, 5, 4]), t(&[2, 3, 4, 4]));
    assert!(scaled_dot_product_attention(&q, &k, &t(&[2, 3, 5, 4]), &config).is_err());
    assert!(scaled_dot_product_attention(&q, &t(&[2, 3, 4, 5]), &k, &config).is_err());
    let causal = AttentionConfig {
        causal: true,
        ..Default::default()
    };
    let error = scaled_dot_product_attention(&q, &k, &k, &causal).unwrap_err();
    assert!(
        matches!(
            error,
            Error::Shape {
                tensor: "query",
                ..
            }
        ),
        "{error}"
    );
    let masked = AttentionConfig {
        mask: Some(t(&[5, 5])),
        ..Default::default()
    };
    let error = scaled_dot_product_attention(&q, &k, &k, &masked).unwrap_err();
    assert!(
        matches!(error, Error::Shape { tensor: "mask", .. }),
        "{error}"
    );
    let x = t(&[2, 5, 6]);
    assert!(multi_head_attention(&x, &x, &x, 4, &config).is_err());
    assert!(multi_head_attention(&x, &x, &x, 0, &config).is_err());
}

#[test]
fn threads_do_not_change_a_bit_of_token_layers() {
    let run = |threads| {
        with_threads(threads, || {
            let table = var(1, &[300, 96], DType::F32);
            let ids: Vec<u32> = (0..4 * 130).map(|i| (i * i) % 300).collect();
            let ids = Tensor::from_vec(ids, (4, 130), &CPU).unwrap();
            let x = rows_of(&table, &ids).unwrap();
            let vars = VarMap::new();
            let vb = VarBuilder::from_varmap(&vars, DType::F32, &CPU);
            let x = layer_norm(96, LayerNormConfig::default(), vb.pp("l"))
                .unwrap()
                .forward(&x);
            let x = rms_norm(96, 1e-6, vb.pp("r"))
                .unwrap()
                .forward(&x.unwrap())
                .unwrap();
            let config = AttentionConfig {
                causal: true,
                ..Default::default()
            };
            let y = multi_head_attention(&x, &x, &x, 3, &config).unwrap();
            let y = y.transpose(1, 2).unwrap();
            let y = group_norm(4, 96, 1e-5, vb.pp("g"))
                .unwrap()
                .forward(&y)
                .unwrap();
            let grads = probe(&y).backward().unwrap();
            (bits(&y), bits(grads.get(&table).unwrap()))
        })
    };
    let one = run(1);
    assert!(one == run(2));
    assert!(one == run(7));
}

#[test]
fn embedding_is_a_gather_with_its_gradient() {
    let table = var(1, &[7, 3], DType::F64);
    for ids in [
        Tensor::new(&[[3u32, 0, 3], [6, 3, 1]], &CPU).unwrap(),
        Tensor::new(&[[3i64, 0, 3], [6, 3, 1]], &CPU).unwrap(),
    ] {
        let y = rows_of(&table, &ids).unwrap();
        assert_eq!(y.dims(), &[2, 3, 3]);
        let flat = ids.flatten_all().unwrap().to_dtype(DType::U32).unwrap();
        let theirs = table.embedding(&flat).unwrap().reshape((2, 3, 3)).unwrap();
        assert_eq!(values(&y), values(&theirs));
        let (g, h) = (
            probe(&y).backward().unwrap(),
            probe(&theirs).backward().unwrap(),
        );
        assert!(distance(g.get(&table).unwrap(), h.get(&table).unwrap()) < 1e-15);
    }
    let outside = Tensor::new(&[7u32], &CPU).unwrap();
    assert!(matches!(
        rows_of(&table, &outside),
        Err(Error::LabelOutOfRange { label: 7, .. })
    ));
    assert!(rows_of(&table, &Tensor::new(&[-1i64], &CPU).unwrap()).is_err());
    assert!(rows_of(&table, &normal(1, &[2], DType::F32)).is_err());
    assert!(Embedding::new(normal(1, &[2], DType::F32)).is_err());
    let map = VarMap::new();
    let vb = VarBuilder::from_varmap(&map, DType::F32, &CPU);
    candle_nn::embedding(7, 3, vb.clone()).unwrap();
    embedding(7, 3, vb).unwrap();
    assert_eq!(map.all_vars().len(), 1);
}

#[test]
fn dropout_keeps_the_mean_repeats_and_resumes() {
    let x = Var::from_tensor(&Tensor::ones(20_000, DType::F32, &CPU).unwrap()).unwrap();
    let layer = Dropout::new(0.25, RandomStream::new(3)).unwrap();
    let y = layer.forward_t(&x, true).unwrap();
    let mean = values(&y).iter().sum::<f64>() / 20_000.0;
    // Four standard deviations of the mean of 20,000 draws.
    assert!(
        (mean - 1.0).abs() < 4.0 * (0.25 / 0.75 / 20_000f64).sqrt(),
        "{mean}"
    );
    let grads = y.sum_all().unwrap().backward().unwrap();
    assert_eq!(values(grads.get(&x).unwrap()), values(&y));
    let state = layer.state();
    let next = bits(&layer.forward_t(&x, true).unwrap());
    let again = Dropout::new(0.25, RandomStream::new(9)).unwrap();
    again.load_state(&state);
    assert_eq!(bits(&again.forward_t(&x, true).unwrap()), next);
    assert_eq!(values(&layer.forward_t(&x, false).unwrap()), values(&x));
    let mut stream = RandomStream::new(3);
    assert_eq!(values(&dropout(&x, 0.0, &mut stream).unwrap()), values(&x));
    for p in [1.0, -0.1, f64::NAN] {
        assert!(dropout(&x, p, &mut stream).is_err());
    }
}

#[test]
fn group_norm_equals_candle_and_has_its_gradient() {
    for (shape, groups) in [(&[3usize, 6, 4, 5][..], 2), (&[2, 6, 7], 6), (&[4, 6], 1)] {
        let x = var(1, shape, DType::F64);
        let (w, b) = (var(2, &[6], DType::F64), var(3, &[6], DType::F64));
        let (wt, bt) = (w.as_tensor().clone(), b.as_tensor().clone());
        let ours = GroupNorm::new(wt.clone(), bt.clone(), groups, 1e-5).unwrap();
        let theirs = candle_nn::GroupNorm::new(wt, bt, 6, groups, 1e-5).unwrap();
        if shape.len() > 2 {
            let error = distance(&ours.forward(&x).unwrap(), &theirs.forward(&x).unwrap());
            assert!(error < 1e-12, "{error}");
        }
        let error = check_directions(&[&x, &w, &b], || probe(&ours.forward(&x).unwrap()));
        assert!(error < 1e-7, "{error}");
    }
    let layer = group_norm(2, 6, 1e-5, VarBuilder::zeros(DType::F32, &Device::Cpu)).unwrap();
    assert!(layer.forward(&normal(1, &[2, 5, 3], DType::F32)).is_err());
    assert!(layer.forward(&normal(1, &[2, 6, 3], DType::F64)).is_err());
    assert!(group_norm(4, 6, 1e-5, VarBuilder::zeros(DType::F32, &Device::Cpu)).is_err());
}

#[test]
fn conditions_are_their_definitions_with_gradients() {
    use nn::condition::{concat_channels, shift_channels, sinusoidal};
    let (a, b) = (
        var(1, &[3, 2, 4, 5], DType::F64),
        var(2, &[3, 3, 4, 5], DType::F64),
    );
    let y = concat_channels(&a, &b).unwrap();
    assert_eq!(values(&y), values(&Tensor::cat(&[&*a, &*b], 1).unwrap()));
    let error = check_directions(&[&a, &b], || probe(&concat_channels(&a, &b).unwrap()));
    assert!(error < 1e-8, "{error}");
    assert!(concat_channels(&a, &normal(1, &[3, 3, 5, 4], DType::F64)).is_err());

    let s = var(3, &[3, 2], DType::F64);
    let y = shift_channels(&a, &s).unwrap();
    let exact = a.broadcast_add(&s.reshape((3, 2, 1, 1)).unwrap()).unwrap();
    assert_eq!(values(&y), values(&exact));
    let error = check_directions(&[&a, &s], || probe(&shift_channels(&a, &s).unwrap()));
    assert!(error < 1e-8, "{error}");
    assert!(shift_channels(&a, &normal(1, &[3, 3], DType::F64)).is_err());

    let t = Tensor::new(&[0f64, 2.5], &CPU).unwrap();
    let y = values(&sinusoidal(&t, 4, 100.0).unwrap());
    let angle = 2.5f64 * 0.1;
    let exact = [
        0.0,
        0.0,
        1.0,
        1.0,
        2.5f64.sin(),
        angle.sin(),
        2.5f64.cos(),
        angle.cos(),
    ];
    assert!(y.iter().zip(exact).all(|(a, b)| (a - b).abs() < 1e-15));
    assert!(sinusoidal(&t, 3, 100.0).is_err() && sinusoidal(&t, 4, 0.0).is_err());
}

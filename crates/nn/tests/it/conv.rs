//! Convolutions and their transposes.

use crate::dense::{probe, runner, var};
use crate::support::{bits, check_directions, distance, normal, values, with_threads, CPU};
use candle_core::{DType, Module, Tensor};
use candle_nn::{
    Conv1dConfig, Conv2dConfig, ConvTranspose1dConfig, ConvTranspose2dConfig, VarBuilder, VarMap,
};
use nn::activation::Activation;
use nn::conv::{conv1d, conv2d, conv_transpose1d, conv_transpose2d};
use nn::conv::{Conv1d, Conv2d, ConvTranspose1d, ConvTranspose2d};
use proptest::prelude::*;

fn config(padding: usize, stride: usize, dilation: usize, groups: usize) -> Conv2dConfig {
    Conv2dConfig {
        padding,
        stride,
        dilation,
        groups,
        cudnn_fwd_algo: None,
    }
}

/// The definition, one multiplication at a time.
fn definition(x: &Tensor, w: &Tensor, c: &Conv2dConfig) -> Tensor {
    let (b, _, h, wd) = x.dims4().unwrap();
    let (out, inner, kh, kw) = w.dims4().unwrap();
    let size = |n: usize, k: usize| (n + 2 * c.padding - c.dilation * (k - 1) - 1) / c.stride + 1;
    let (oh, ow) = (size(h, kh), size(wd, kw));
    let (xs, ws) = (values(x), values(w));
    let at = |b: usize, ch: usize, y: usize, x: usize| {
        let (y, x) = (
            y as isize - c.padding as isize,
            x as isize - c.padding as isize,
        );
        let inside = y >= 0 && x >= 0 && y < h as isize && x < wd as isize;
        let index = ((b * inner * c.groups + ch) * h) as isize;
        if inside {
            xs[((index + y) * wd as isize + x) as usize]
        } else {
            0.0
        }
    };
    let mut y = vec![];
    for (b, o) in (0..b).flat_map(|b| (0..out).map(move |o| (b, o))) {
        let group = o / (out / c.groups);
        for (i, j) in (0..oh).flat_map(|i| (0..ow).map(move |j| (i, j))) {
            let mut sum = 0.0;
            for (ch, ky) in (0..inner).flat_map(|ch| (0..kh).map(move |ky| (ch, ky))) {
                for kx in 0..kw {
                    let (yy, xx) = (
                        i * c.stride + ky * c.dilation,
                        j * c.stride + kx * c.dilation,
                    );
                    let x = at(b, group * inner + ch, yy, xx);
                    sum += x * ws[((o * inner + ch) * kh + ky) * kw + kx];
                }
            }
            y.push(sum);
        }
    }
    Tensor::from_vec(y, (b, out, oh, ow), &CPU).unwrap()
}

#[test]
fn convolutions_over_random_shapes() {
    let sizes = (
        1usize..4,
        1usize..4,
        1usize..6,
        1usize..19,
        1usize..20,
        1usize..20,
    );
    let kernel = (
        1usize..5,
        1usize..5,
        0usize..4,
        1usize..4,
        1usize..3,
        any::<bool>(),
    );
    runner(120)
        .run(&(sizes, kernel), |(sizes, kernel)| {
            let (batch, groups, inner, outer, h, w) = sizes;
            let (kh, kw, padding, stride, dilation, bias) = kernel;
            let config = config(padding, stride, dilation, groups);
            prop_assume!(h + 2 * padding > dilation * (kh - 1));
            prop_assume!(w + 2 * padding > dilation * (kw - 1));
            let x = var(1, &[batch, groups * inner, h, w], DType::F64);
            let weight = var(2, &[groups * outer, inner, kh, kw], DType::F64);
            let b = var(3, &[groups * outer], DType::F64);
            let layer = Conv2d::new(
                weight.as_tensor().clone(),
                bias.then(|| b.as_tensor().clone()),
                config,
            );
            let y = layer.forward(&x).unwrap();
            let mut exact = definition(&x, &weight, &config);
            if bias {
                exact = exact
                    .broadcast_add(&b.reshape((1, (), 1, 1)).unwrap())
                    .unwrap();
            }
            let error = distance(&y, &exact);
            prop_assert!(error < 1e-12, "{error}");
            let single = |t: &Tensor| t.to_dtype(DType::F32).unwrap();
            let layer32 = Conv2d::new(single(&weight), bias.then(|| single(&b)), config);
            let error = distance(&layer32.forward(&single(&x)).unwrap(), &single(&exact));
            prop_assert!(error < 2e-5, "{error}");
            // The map is bilinear: along a direction, differences are exact.
            let vars = if bias {
                vec![&x, &weight, &b]
            } else {
                vec![&x, &weight]
            };
            let error = check_directions(&vars, || probe(&layer.forward(&x).unwrap()));
            prop_assert!(error < 1e-7, "{error}");
            Ok(())
        })
        .unwrap();
}

#[test]
fn transposed_convolutions_over_random_shapes() {
    let sizes = (1usize..3, 1usize..10, 1usize..10, 1usize..8, 1usize..8);
    let kernel = (1usize..5, 0usize..3, 1usize..4, 1usize..3, 0usize..3);
    runner(80)
        .run(&(sizes, kernel), |(sizes, kernel)| {
            let (batch, inputs, outputs, h, w) = sizes;
            let (k, padding, stride, dilation, output_padding) = kernel;
            prop_assume!(output_padding < stride.max(dilation));
            let reach = dilation * (k - 1) + output_padding + 1;
            prop_assume!((h.min(w) - 1) * stride + reach > 2 * padding);
            let config = ConvTranspose2dConfig {
                padding,
                output_padding,
                stride,
                dilation,
            };
            let x = var(1, &[batch, inputs, h, w], DType::F64);
            let weight = var(2, &[inputs, outputs, k, k], DType::F64);
            let b = var(3, &[outputs], DType::F64);
            let (w, bias) = (weight.as_tensor().clone(), b.as_tensor().clone());
            let layer = ConvTranspose2d::new(w, Some(bias), config);
            let y = layer.forward(&x).unwrap();
            let theirs = x
                .conv_transpose2d(&weight, padding, output_padding, stride, dilation)
                .unwrap();
            let theirs = theirs
                .broadcast_add(&b.reshape((1, (), 1, 1)).unwrap())
                .unwrap();
            let error = distance(&y, &theirs);
            prop_assert!(error < 1e-12, "{error}");
            let layer = layer.with_activation(Activation::Tanh);
            let error = check_directions(&[&x, &weight, &b], || probe(&layer.forward(&x).unwrap()));
            prop_assert!(error < 1e-7, "{error}");
            Ok(())
        })
        .unwrap();
}

#[test]
fn one_dimension_equals_candle_and_has_its_gradient() {
    for (padding, stride, dilation, groups) in [(0, 1, 1, 1), (2, 3, 2, 2), (1, 2, 1, 4)] {
        let x = var(1, &[3, 8, 23], DType::F64);
        let (w, b) = (
            var(2, &[12, 8 / groups, 3], DType::F64),
            var(3, &[12], DType::F64),
        );
        let config = Conv1dConfig {
            padding,
            stride,
            dilation,
            groups,
            cudnn_fwd_algo: None,
        };
        let (wt, bt) = (w.as_tensor().clone(), b.as_tensor().clone());
        let ours = Conv1d::new(wt.clone(), Some(bt.clone()), config);
        let theirs = candle_nn::Conv1d::new(wt, Some(bt), config);
        let error = distance(&ours.forward(&x).unwrap(), &theirs.forward(&x).unwrap());
        assert!(error < 1e-12, "{error}");
        let error = check_directions(&[&x, &w, &b], || probe(&ours.forward(&x).unwrap()));
        assert!(error < 1e-7, "{error}");

        let w = var(2, &[8, 12 / groups, 3], DType::F64);
        let config = ConvTranspose1dConfig {
            padding,
            output_padding: 0,
            stride,
            dilation,
            groups,
        };
        let (wt, bt) = (w.as_tensor().clone(), b.as_tensor().clone());
        let ours = ConvTranspose1d::new(wt, Some(bt), config);
        // By definition the adjoint of the convolution with the same weight (candle's kernel for
        // padding 0 gives other numbers, so it is no witness).
        let y = ours.forward(&x).unwrap();
        let forward = Conv1dConfig {
            padding,
            stride,
            dilation,
            groups,
            cudnn_fwd_algo: None,
        };
        let u = normal(9, y.dims(), DType::F64);
        let back = candle_nn::Conv1d::new(w.as_tensor().clone(), None, forward);
        let inner = |a: &Tensor, b: &Tensor| values(&(a * b).unwrap().sum_all().unwrap())[0];
        let plain = y.broadcast_sub(&b.reshape((1, (), 1)).unwrap()).unwrap();
        let (left, right) = (inner(&plain, &u), inner(&x, &back.forward(&u).unwrap()));
        assert!((left - right).abs() < 1e-10 * left.abs().max(1.0));
        // There candle loses the gradient.
        let error = check_directions(&[&x, &w, &b], || probe(&ours.forward(&x).unwrap()));
        assert!(error < 1e-7, "{error}");
    }
}

#[test]
fn channels_last_equal_channels_first() {
    let sizes = (1usize..4, 1usize..40, 1usize..40, 1usize..60);
    let kernel = (1usize..6, 0usize..9, 1usize..3, 1usize..4, any::<bool>());
    runner(120)
        .run(&(sizes, kernel), |(sizes, kernel)| {
            let (batch, inputs, outputs, length) = sizes;
            let (k, padding, stride, dilation, bias) = kernel;
            prop_assume!(length + 2 * padding > dilation * (k - 1));
            let config = Conv1dConfig {
                padding,
                stride,
                dilation,
                ..Default::default()
            };
            let x = var(1, &[batch, length, inputs], DType::F64);
            let w = var(2, &[outputs, inputs, k], DType::F64);
            let b = var(3, &[outputs], DType::F64);
            let bt = bias.then(|| b.as_tensor().clone());
            let layer = Conv1d::new(w.as_tensor().clone(), bt, config);
            let layer = layer.with_activation(Activation::Tanh);
            let y = layer.forward_rows(&x).unwrap();
            let first = x.transpose(1, 2).unwrap().contiguous().unwrap();
            let other = layer.forward(&first).unwrap().transpose(1, 2).unwrap();
            prop_assert!(distance(&y, &other) < 1e-12);
            let mut vars = vec![&x, &w];
            if bias {
                vars.push(&b);
            }
            let (g, h) = (probe(&y), probe(&other.contiguous().unwrap()));
            let (g, h) = (g.backward().unwrap(), h.backward().unwrap());
            for v in vars {
                let error = distance(g.get(v).unwrap(), h.get(v).unwrap());
                prop_assert!(error < 1e-12, "{error}");
            }
            let single = |t: &Tensor| t.to_dtype(DType::F32).unwrap();
            let layer32 = Conv1d::new(single(&w), bias.then(|| single(&b)), config);
            let layer32 = layer32.with_activation(Activation::Tanh);
            let error = distance(&layer32.forward_rows(&single(&x)).unwrap(), &single(&y));
            prop_assert!(error < 2e-5, "{error}");
            Ok(())
        })
        .unwrap();
    let layer = Conv1d::new(normal(1, &[6, 4, 3], DType::F32), None, Default::default());
    for (shape, word) in [
        (vec![2, 4], "[B, L, C]"),
        (vec![2, 9, 3], "4 channels"),
        (vec![0, 9, 4], "non-empty"),
        (vec![2, 2, 4], "at least [1, 3]"),
    ] {
        let x = Tensor::zeros(shape, DType::F32, &CPU).unwrap();
        let error = layer.forward_rows(&x).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
}

#[test]
fn activations_are_fused_with_their_gradient() {
    let x = var(1, &[2, 5, 7, 6], DType::F64);
    let (w, b) = (var(2, &[9, 5, 3, 3], DType::F64), var(3, &[9], DType::F64));
    let plain = Conv2d::new(
        w.as_tensor().clone(),
        Some(b.as_tensor().clone()),
        config(1, 1, 1, 1),
    );
    for activation in crate::dense::ALL {
        let fused = plain.clone().with_activation(activation);
        let two = activation.forward(&plain.forward(&x).unwrap()).unwrap();
        assert!(distance(&fused.forward(&x).unwrap(), &two) < 1e-14);
        let (g, h) = (
            probe(&fused.forward(&x).unwrap()).backward().unwrap(),
            probe(&two).backward().unwrap(),
        );
        for v in [&x, &w, &b] {
            assert!(
                distance(g.get(v).unwrap(), h.get(v).unwrap()) < 1e-12,
                "{activation:?}"
            );
        }
    }
}

#[test]
fn shifts_and_shortcuts_are_part_of_the_convolution() {
    let x = var(1, &[3, 4, 7, 6], DType::F64);
    let w = var(2, &[6, 2, 3, 3], DType::F64);
    let b = var(3, &[6], DType::F64);
    let shift = var(4, &[3, 6], DType::F64);
    for (stride, activation) in [(1, Activation::Identity), (2, Activation::Relu)] {
        let layer = |bias: bool| {
            let bias = bias.then(|| b.as_tensor().clone());
            Conv2d::new(w.as_tensor().clone(), bias, config(1, stride, 1, 2))
        };
        let plain = layer(true).forward(&x).unwrap();
        let onto = var(5, plain.dims(), DType::F64);
        let moved = plain.broadcast_add(&shift.reshape((3, 6, 1, 1)).unwrap());
        let moved = activation.forward(&moved.unwrap()).unwrap();
        let summed = activation
            .forward(&(&plain + onto.as_tensor()).unwrap())
            .unwrap();
        let bare = layer(false).forward(&x).unwrap();
        let bare = activation
            .forward(&(&bare + onto.as_tensor()).unwrap())
            .unwrap();
        let fused = |bias: bool| layer(bias).with_activation(activation);
        let pairs = [
            (fused(true).forward_shifted(&x, &shift).unwrap(), moved),
            (fused(true).forward_onto(&x, &onto).unwrap(), summed),
            (fused(false).forward_onto(&x, &onto).unwrap(), bare),
        ];
        for (ours, exact) in pairs {
            assert!(distance(&ours, &exact) < 1e-13);
            let (g, h) = (
                probe(&ours).backward().unwrap(),
                probe(&exact).backward().unwrap(),
            );
            for v in [&x, &w, &b, &shift, &onto] {
                match (g.get(v), h.get(v)) {
                    (Some(g), Some(h)) => assert!(distance(g, h) < 1e-12),
                    (None, None) => {}
                    _ => panic!("a gradient is lost"),
                }
            }
        }
        let error = layer(true).forward_shifted(&x, &onto).unwrap_err();
        assert!(error.to_string().contains("images and channels"), "{error}");
        let error = layer(true).forward_onto(&x, &shift).unwrap_err();
        assert!(error.to_string().contains("as the result"), "{error}");
    }
}

#[test]
fn threads_do_not_change_a_bit_of_convolutions() {
    let run = |threads: usize, batch: usize, groups: usize| {
        with_threads(threads, || {
            let x = var(1, &[batch, 36, 29, 31], DType::F32);
            let w = var(2, &[72, 36 / groups, 3, 3], DType::F32);
            let b = var(3, &[72], DType::F32);
            let layer = Conv2d::new(
                w.as_tensor().clone(),
                Some(b.as_tensor().clone()),
                config(1, 2, 1, groups),
            );
            let y = layer.with_activation(Activation::Silu).forward(&x).unwrap();
            let grads = probe(&y).backward().unwrap();
            (bits(&y), [&x, &w, &b].map(|v| bits(grads.get(v).unwrap())))
        })
    };
    for (batch, groups) in [(1, 1), (19, 1), (3, 36)] {
        let one = run(1, batch, groups);
        assert!(one == run(2, batch, groups));
        assert!(one == run(7, batch, groups));
    }
}

#[test]
fn threads_do_not_change_a_bit_of_channels_last() {
    let run = |threads: usize, batch: usize| {
        with_threads(threads, || {
            let x = var(1, &[batch, 400, 36], DType::F32);
            let w = var(2, &[72, 36, 5], DType::F32);
            let layer = Conv1d::new(w.as_tensor().clone(), None, Default::default());
            let y = layer.forward_rows(&x).unwrap();
            let grads = probe(&y).backward().unwrap();
            (bits(&y), [&x, &w].map(|v| bits(grads.get(v).unwrap())))
        })
    };
    for batch in [1, 37] {
        let one = run(1, batch);
        assert!(one == run(2, batch));
        assert!(one == run(7, batch));
    }
}

#[test]
fn convolutions_share_candles_names_and_refuse_what_does_not_fit() {
    let map = VarMap::new();
    let vb = VarBuilder::from_varmap(&map, DType::F32, &CPU);
    candle_nn::conv2d(4, 6, 3, Default::default(), vb.pp("a")).unwrap();
    candle_nn::conv1d(4, 6, 3, Default::default(), vb.pp("b")).unwrap();
    candle_nn::conv_transpose2d(4, 6, 3, Default::default(), vb.pp("c")).unwrap();
    candle_nn::conv_transpose1d(4, 6, 3, Default::default(), vb.pp("d")).unwrap();
    let conv = conv2d(4, 6, 3, Default::default(), vb.pp("a")).unwrap();
    conv1d(4, 6, 3, Default::default(), vb.pp("b")).unwrap();
    conv_transpose2d(4, 6, 3, Default::default(), vb.pp("c")).unwrap();
    conv_transpose1d(4, 6, 3, Default::default(), vb.pp("d")).unwrap();
    assert_eq!(map.all_vars().len(), 8);
    let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &CPU).unwrap();
    for (x, word) in [
        (zeros(&[2, 4, 2, 9], DType::F32), "at least [3, 3]"),
        (zeros(&[2, 3, 9, 9], DType::F32), "4 channels"),
        (zeros(&[0, 4, 9, 9], DType::F32), "non-empty"),
        (zeros(&[4, 9, 9], DType::F32), "[B, C, H, W]"),
        (zeros(&[2, 4, 9, 9], DType::F64), "F32"),
    ] {
        let error = conv.forward(&x).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
    let x = normal(1, &[1, 4, 9, 9], DType::F32);
    for bad in [
        config(0, 0, 1, 1),
        config(0, 1, 0, 1),
        config(0, 1, 1, 0),
        config(0, 1, 1, 4),
    ] {
        let layer = Conv2d::new(conv.weight().clone(), None, bad);
        assert!(layer.forward(&x).is_err());
    }
    assert!(conv2d(4, 6, 3, config(0, 1, 1, 3), vb.pp("e")).is_err());
}

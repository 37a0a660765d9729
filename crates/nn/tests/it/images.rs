//! Pooling and resampling.

use crate::dense::{probe, runner, var};
use crate::support::{
    bits, check_directions, check_gradients, distance, normal, values, with_threads, CPU,
};
use candle_core::{DType, Tensor, Var};
use nn::pool::{adaptive_avg_pool2d, adaptive_max_pool2d, avg_pool2d, max_pool2d, PoolConfig};
use nn::resample::{upsample_bilinear2d, upsample_nearest2d};
use proptest::prelude::*;

/// Windows by their definition: `f` of the values inside and the size of the full window.
fn pooled(x: &Tensor, c: &PoolConfig, f: impl Fn(&[f64], usize) -> f64) -> Tensor {
    let (b, ch, h, w) = x.dims4().unwrap();
    let size = |n: usize, k: usize, s: usize, p: usize| (n + 2 * p - k) / s + 1;
    let oh = size(h, c.kernel.0, c.stride.0, c.padding.0);
    let ow = size(w, c.kernel.1, c.stride.1, c.padding.1);
    let xs = values(x);
    let mut out = vec![];
    for plane in xs.chunks(h * w) {
        for (i, j) in (0..oh).flat_map(|i| (0..ow).map(move |j| (i, j))) {
            let mut inside = vec![];
            for (ky, kx) in (0..c.kernel.0).flat_map(|y| (0..c.kernel.1).map(move |x| (y, x))) {
                let (y, x) = (i * c.stride.0 + ky, j * c.stride.1 + kx);
                let (y, x) = (y.wrapping_sub(c.padding.0), x.wrapping_sub(c.padding.1));
                if y < h && x < w {
                    inside.push(plane[y * w + x]);
                }
            }
            out.push(f(&inside, c.kernel.0 * c.kernel.1));
        }
    }
    Tensor::from_vec(out, (b, ch, oh, ow), &CPU).unwrap()
}

#[test]
fn pooling_over_random_windows() {
    let sizes = (1usize..3, 1usize..4, 1usize..12, 1usize..12);
    let window = (
        1usize..5,
        1usize..5,
        1usize..4,
        1usize..4,
        0usize..3,
        0usize..3,
        any::<bool>(),
    );
    runner(100)
        .run(&(sizes, window), |((b, c, h, w), window)| {
            let (kh, kw, sh, sw, ph, pw, count_include_pad) = window;
            prop_assume!(2 * ph <= kh && 2 * pw <= kw && h + 2 * ph >= kh && w + 2 * pw >= kw);
            let config = PoolConfig {
                kernel: (kh, kw),
                stride: (sh, sw),
                padding: (ph, pw),
                count_include_pad,
            };
            let x = var(1, &[b, c, h, w], DType::F64);
            let max = |v: &[f64], _| v.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let y = max_pool2d(&x, config).unwrap();
            prop_assert_eq!(values(&y), values(&pooled(&x, &config, max)));
            let error = check_directions(&[&x], || probe(&max_pool2d(&x, config).unwrap()));
            prop_assert!(error < 1e-8, "max: {error}");
            let mean = |v: &[f64], full: usize| {
                let n = if count_include_pad { full } else { v.len() };
                v.iter().sum::<f64>() / n as f64
            };
            let y = avg_pool2d(&x, config).unwrap();
            prop_assert!(distance(&y, &pooled(&x, &config, mean)) < 1e-14);
            let error = check_directions(&[&x], || probe(&avg_pool2d(&x, config).unwrap()));
            prop_assert!(error < 1e-8, "mean: {error}");
            Ok(())
        })
        .unwrap();
}

#[test]
fn adaptive_pooling_covers_everything() {
    let x = var(1, &[2, 3, 7, 10], DType::F64);
    let y = adaptive_avg_pool2d(&x, (1, 1)).unwrap();
    let mean = x.mean_keepdim((2, 3)).unwrap();
    assert!(distance(&y, &mean) < 1e-14);
    let y = adaptive_max_pool2d(&x, (1, 1)).unwrap();
    let max = x.flatten_from(2).unwrap().max(2).unwrap();
    assert_eq!(values(&y), values(&max));
    for size in [(3, 4), (7, 10), (9, 2)] {
        let error = check_gradients(&[&x], || probe(&adaptive_avg_pool2d(&x, size).unwrap()));
        assert!(error < 1e-8, "{error}");
        let error = check_gradients(&[&x], || probe(&adaptive_max_pool2d(&x, size).unwrap()));
        assert!(error < 1e-8, "{error}");
    }
    assert_eq!(
        values(&adaptive_avg_pool2d(&x, (7, 10)).unwrap()),
        values(&x)
    );
}

#[test]
fn upsampling_equals_candle_and_has_its_gradient() {
    let x = var(1, &[2, 3, 4, 5], DType::F64);
    for (h, w) in [(8, 10), (4, 5), (7, 9), (2, 3), (1, 1)] {
        let ours = upsample_nearest2d(&x, (h, w)).unwrap();
        let theirs = x.upsample_nearest2d(h, w).unwrap();
        assert_eq!(values(&ours), values(&theirs));
        let error = check_directions(&[&x], || probe(&upsample_nearest2d(&x, (h, w)).unwrap()));
        assert!(error < 1e-8, "{error}");
        for corners in [true, false] {
            let ours = upsample_bilinear2d(&x, (h, w), corners).unwrap();
            let single = x.to_dtype(DType::F32).unwrap();
            let theirs = single.upsample_bilinear2d(h, w, corners).unwrap();
            let error = distance(&ours, &theirs.to_dtype(DType::F64).unwrap());
            assert!(error < 1e-5, "{h} {w} {corners}: {error}");
            let f = || probe(&upsample_bilinear2d(&x, (h, w), corners).unwrap());
            let error = check_directions(&[&x], f);
            assert!(error < 1e-8, "{error}");
        }
    }
}

#[test]
fn images_that_do_not_fit_are_named() {
    let x = normal(1, &[2, 3, 4, 5], DType::F32);
    let config = PoolConfig::from(6);
    assert!(max_pool2d(&x, config)
        .unwrap_err()
        .to_string()
        .contains("at least (6, 6)"));
    assert!(max_pool2d(&x, PoolConfig::from(0)).is_err());
    let padded = PoolConfig {
        padding: (2, 0),
        ..PoolConfig::from(3)
    };
    assert!(avg_pool2d(&x, padded).is_err());
    assert!(adaptive_avg_pool2d(&x, (0, 1)).is_err());
    assert!(adaptive_max_pool2d(&x, (1, 0)).is_err());
    assert!(upsample_nearest2d(&x, (0, 1)).is_err());
    assert!(upsample_bilinear2d(&normal(1, &[3, 4, 5], DType::F32), (2, 2), true).is_err());
    let integers = Tensor::ones((1, 1, 2, 2), DType::U32, &CPU).unwrap();
    assert!(max_pool2d(&integers, 2.into()).is_err());
    let nan = Tensor::new(&[[[[1f32, f32::NAN], [0.0, 2.0]]]], &CPU).unwrap();
    assert!(values(&max_pool2d(&nan, 2.into()).unwrap())[0].is_nan());
}

#[test]
fn squares_are_the_windows_that_they_are() {
    // Ties, odd sides and NaN, beside the definition and beside the general path.
    for (h, w) in [(2, 2), (5, 7), (8, 34), (3, 2)] {
        let x = normal(5, &[3, 4, h, w], DType::F32);
        let x = Var::from_tensor(&(x * 3.0).unwrap().round().unwrap()).unwrap();
        let y = max_pool2d(&x, 2.into()).unwrap();
        let rows = values(&x);
        let mut expected = vec![];
        let mut places = vec![];
        for plane in 0..12 {
            for (i, j) in (0..h / 2).flat_map(|i| (0..w / 2).map(move |j| (i, j))) {
                let at = |k: usize| (plane * h + 2 * i + k / 2) * w + 2 * j + k % 2;
                let best = (0..4).fold(0, |b, k| if rows[at(k)] > rows[at(b)] { k } else { b });
                expected.push(rows[at(best)]);
                places.push(at(best));
            }
        }
        assert_eq!(values(&y), expected);
        let c = normal(6, y.dims(), DType::F32);
        let grads = (&y * &c).unwrap().sum_all().unwrap().backward().unwrap();
        let mut gradient = vec![0.0; rows.len()];
        for (place, c) in places.into_iter().zip(values(&c)) {
            gradient[place] = c;
        }
        assert_eq!(values(grads.get(&x).unwrap()), gradient);
    }
}

#[test]
fn threads_do_not_change_a_bit_of_image_layers() {
    let run = |threads| {
        with_threads(threads, || {
            let x = var(1, &[9, 16, 33, 31], DType::F32);
            let y = max_pool2d(&x, 2.into()).unwrap();
            let y = upsample_bilinear2d(&y, (40, 41), false).unwrap();
            let grads = probe(&y).backward().unwrap();
            (bits(&y), bits(grads.get(&x).unwrap()))
        })
    };
    let one = run(1);
    assert!(one == run(2));
    assert!(one == run(7));
}

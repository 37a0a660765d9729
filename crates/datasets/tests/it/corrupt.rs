use candle_core::{DType, Device, Tensor};
use proptest::prelude::*;
use thalweg_datasets::corrupt::{LabelNoise, LongTail, Shift, TailShape};
use thalweg_datasets::{digits, Error, RandomStream};

const CPU: &Device = &Device::Cpu;

fn image(h: usize, w: usize, pixel: impl Fn(usize, usize) -> f64) -> Tensor {
    let pixels: Vec<f64> = (0..h * w).map(|i| pixel(i / w, i % w)).collect();
    Tensor::from_vec(pixels, (1, h, w), CPU).unwrap()
}

fn apply(shift: Shift, image: &Tensor) -> Vec<Vec<f64>> {
    let shifted = shift.apply(image, &mut RandomStream::new(0)).unwrap();
    assert_eq!(shifted.dims(), image.dims());
    shifted.get(0).unwrap().to_vec2().unwrap()
}

#[test]
fn a_quarter_turn_is_exact_and_counter_clockwise() {
    let x = image(3, 3, |y, x| (3 * y + x) as f64);
    let turned = apply(Shift::Rotation { degrees: 90.0 }, &x);
    // The top row of the result is the right column of the image, read downward.
    let expected = [[2.0, 5.0, 8.0], [1.0, 4.0, 7.0], [0.0, 3.0, 6.0]];
    for (row, want) in turned.iter().flatten().zip(expected.iter().flatten()) {
        assert!((row - want).abs() < 1e-9, "{turned:?}");
    }
    let whole = apply(Shift::Rotation { degrees: 0.0 }, &x);
    assert_eq!(whole, x.get(0).unwrap().to_vec2::<f64>().unwrap());
}

#[test]
fn rotation_keeps_linear_images_and_fills_with_zero() {
    // A plane through the center is turned without interpolation error where sources are inside.
    let (h, w) = (9, 11);
    let x = image(h, w, |y, x| {
        2.0 * (x as f64 - 5.0) + (y as f64 - 4.0) + 50.0
    });
    let turned = apply(Shift::Rotation { degrees: 30.0 }, &x);
    let (sin, cos) = 30f64.to_radians().sin_cos();
    for (y, x) in [(4usize, 5usize), (3, 6), (5, 4), (2, 5), (4, 8)] {
        let (dy, dx) = (y as f64 - 4.0, x as f64 - 5.0);
        let (sx, sy) = (cos * dx - sin * dy, sin * dx + cos * dy);
        assert!((turned[y][x] - (2.0 * sx + sy + 50.0)).abs() < 1e-9);
    }
    assert_eq!(turned[0][0], 0.0);
}

#[test]
fn blur_keeps_the_sum_and_spreads_a_point() {
    let point = image(15, 13, |y, x| f64::from(u8::from((y, x) == (7, 6))));
    let blurred = apply(Shift::Blur { sigma: 0.9 }, &point);
    let total: f64 = blurred.iter().flatten().sum();
    assert!((total - 1.0).abs() < 1e-12);
    let weight = |k: f64| (-0.5 * (k / 0.9).powi(2)).exp();
    let norm: f64 = (-4..=4).map(|k| weight(f64::from(k))).sum();
    for (y, x) in [(7usize, 6usize), (6, 6), (7, 8), (5, 5)] {
        let expected = weight(y as f64 - 7.0) * weight(x as f64 - 6.0) / (norm * norm);
        assert!((blurred[y][x] - expected).abs() < 1e-12);
    }
    // Mirrored borders: a constant stays constant and a corner keeps its sum, at any width.
    for sigma in [0.3, 2.0, 30.0] {
        let corner = image(4, 5, |y, x| f64::from(u8::from(y + x == 0)));
        let total: f64 = apply(Shift::Blur { sigma }, &corner).iter().flatten().sum();
        assert!((total - 1.0).abs() < 1e-12);
        let constant = apply(Shift::Blur { sigma }, &image(4, 5, |_, _| 0.7));
        assert!(constant.iter().flatten().all(|v| (v - 0.7).abs() < 1e-12));
    }
    assert_eq!(
        apply(Shift::Blur { sigma: 0.0 }, &point),
        point.get(0).unwrap().to_vec2::<f64>().unwrap()
    );
}

#[test]
fn pointwise_shifts_do_what_they_say() {
    let x = image(50, 40, |y, x| (y * x) as f64 / 2000.0);
    let before = x.get(0).unwrap().to_vec2::<f64>().unwrap();
    let all = |shift| {
        let after = apply(shift, &x);
        let pairs = before.iter().flatten().zip(after.iter().flatten());
        pairs.map(|(a, b)| (*a, *b)).collect::<Vec<_>>()
    };
    let contrast = Shift::Contrast {
        scale: 0.35,
        offset: 0.3,
    };
    assert!(all(contrast)
        .iter()
        .all(|(a, b)| (b - (0.35 * a + 0.3)).abs() < 1e-15));
    assert!(all(Shift::Inversion { pivot: 0.35 })
        .iter()
        .all(|(a, b)| (b - (a - 0.35).abs()).abs() < 1e-15));
    let noise = all(Shift::Noise { std: 0.35 });
    let variance = noise.iter().map(|(a, b)| (a - b).powi(2)).sum::<f64>() / 2000.0;
    assert!((variance.sqrt() - 0.35).abs() < 0.02);
    let dropped = all(Shift::PixelDropout { p: 0.35 });
    assert!(dropped.iter().all(|(a, b)| b == a || *b == 0.0));
    let visible: Vec<_> = dropped.iter().filter(|(a, _)| *a > 0.0).collect();
    let share = visible.iter().filter(|(_, b)| *b == 0.0).count() as f64 / visible.len() as f64;
    assert!((share - 0.35).abs() < 0.04, "{share}");
}

#[test]
fn the_unseen_domains_work_in_f32_and_f64_and_keep_the_shape() {
    let data = digits().unwrap().select(&[0, 5, 9]).unwrap();
    for dtype in [DType::F32, DType::F64] {
        let data = data.to_dtype(dtype).unwrap();
        let mut names = Vec::new();
        for shift in Shift::UNSEEN {
            let mut rng = RandomStream::new(1);
            let shifted = shift.apply_to(&data, 8, 8, &mut rng).unwrap();
            assert_eq!(shifted.inputs.dims(), &[3, 64]);
            assert_eq!(shifted.inputs.dtype(), dtype);
            assert_eq!(shifted.label_vec().unwrap(), data.label_vec().unwrap());
            let moved = (&shifted.inputs - &data.inputs).unwrap().abs().unwrap();
            let moved = moved.mean_all().unwrap().to_dtype(DType::F64).unwrap();
            assert!(moved.to_scalar::<f64>().unwrap() > 0.01, "{}", shift.name());
            let images = data.reshape(&[1, 8, 8]).unwrap();
            let again = shift
                .apply_to(&images, 8, 8, &mut RandomStream::new(1))
                .unwrap();
            let again = again
                .inputs
                .flatten_all()
                .unwrap()
                .to_dtype(DType::F64)
                .unwrap();
            let flat = shifted
                .inputs
                .flatten_all()
                .unwrap()
                .to_dtype(DType::F64)
                .unwrap();
            assert_eq!(
                again.to_vec1::<f64>().unwrap(),
                flat.to_vec1::<f64>().unwrap()
            );
            names.push(shift.name());
        }
        names.dedup();
        assert_eq!(names.len(), 6);
    }
}

#[test]
fn shifts_check_parameters_and_images() {
    let data = digits().unwrap();
    let mut rng = RandomStream::new(0);
    for bad in [
        Shift::Noise { std: -1.0 },
        Shift::Noise { std: f64::NAN },
        Shift::Contrast {
            scale: f64::INFINITY,
            offset: 0.0,
        },
        Shift::Contrast {
            scale: 1.0,
            offset: f64::NAN,
        },
        Shift::Inversion { pivot: f64::NAN },
        Shift::Rotation {
            degrees: f64::INFINITY,
        },
        Shift::Blur { sigma: -0.1 },
        Shift::Blur { sigma: 1e9 },
        Shift::PixelDropout { p: 1.5 },
    ] {
        let refused = bad.apply_to(&data, 8, 8, &mut rng);
        assert!(matches!(refused, Err(Error::InvalidArgument { .. })));
    }
    let shift = Shift::Blur { sigma: 1.0 };
    assert!(shift.apply_to(&data, 9, 8, &mut rng).is_err());
    assert!(shift.apply_to(&data, 0, 8, &mut rng).is_err());
    for bad in [
        Tensor::zeros((2, 4, 4), DType::U8, CPU).unwrap(),
        Tensor::zeros(4, DType::F32, CPU).unwrap(),
        Tensor::zeros((2, 0, 4), DType::F32, CPU).unwrap(),
    ] {
        let refused = shift.apply(&bad, &mut rng);
        assert!(matches!(refused, Err(Error::BadTensor { .. })));
    }
    let none = Tensor::zeros((0, 4, 4), DType::F32, CPU).unwrap();
    for shift in Shift::UNSEEN {
        assert_eq!(shift.apply(&none, &mut rng).unwrap().dims(), &[0, 4, 4]);
    }
}

#[test]
fn symmetric_noise_is_uniform_over_the_wrong_classes() {
    let labels = vec![2u32; 30_000];
    let noise = LabelNoise::Symmetric { rate: 0.4 };
    let noisy = noise.apply(&labels, 4, &mut RandomStream::new(0)).unwrap();
    let mut counts = [0f64; 4];
    for (label, flipped) in noisy.labels.iter().zip(&noisy.flipped) {
        assert_eq!(*flipped, *label != 2);
        counts[*label as usize] += 1.0 / 30_000.0;
    }
    for (share, expected) in counts.iter().zip([0.4 / 3.0, 0.4 / 3.0, 0.6, 0.4 / 3.0]) {
        assert!((share - expected).abs() < 0.01, "{counts:?}");
    }
}

#[test]
fn pair_noise_goes_to_the_next_class() {
    let data = digits().unwrap();
    let noise = LabelNoise::Pair { rate: 0.4 };
    let (noisy, flipped) = noise.apply_to(&data, &mut RandomStream::new(0)).unwrap();
    let pairs = data.label_vec().unwrap().into_iter();
    for ((before, after), flipped) in pairs.zip(noisy.label_vec().unwrap()).zip(&flipped) {
        assert_eq!(after, if *flipped { (before + 1) % 10 } else { before });
    }
    let share = flipped.iter().filter(|f| **f).count() as f64 / 1797.0;
    assert!((share - 0.4).abs() < 0.04);
}

#[test]
fn label_noise_checks_its_arguments() {
    let mut rng = RandomStream::new(0);
    for rate in [-0.1, 1.1, f64::NAN] {
        let refused = LabelNoise::Pair { rate }.apply(&[0], 2, &mut rng);
        assert!(matches!(refused, Err(Error::InvalidArgument { .. })));
    }
    let noise = LabelNoise::Symmetric { rate: 1.0 };
    assert!(noise.apply(&[0], 1, &mut rng).is_err());
    assert!(noise.apply(&[3], 3, &mut rng).is_err());
    assert_eq!(noise.apply(&[0, 1], 2, &mut rng).unwrap().labels, [1, 0]);
}

#[test]
fn long_tails_have_the_published_profile() {
    // CIFAR-10-LT with ratio 100: 5000 images in class 0, 50 in class 9.
    let tail = LongTail {
        shape: TailShape::Exponential,
        ratio: 100.0,
    };
    let sizes = tail.sizes(&[5000; 10]).unwrap();
    assert_eq!(sizes, [5000, 2997, 1797, 1077, 646, 387, 232, 139, 83, 50]);
    let step = LongTail {
        shape: TailShape::Step,
        ratio: 10.0,
    };
    assert_eq!(step.sizes(&[50; 5]).unwrap(), [50, 50, 50, 5, 5]);
    assert_eq!(step.sizes(&[7]).unwrap(), [7]);
    // A small head limits the whole profile.
    assert_eq!(tail.sizes(&[200, 5000, 5000]).unwrap(), [200, 20, 2]);
    assert!(tail.sizes(&[]).is_err());
    assert!(tail.sizes(&[3, 0]).is_err());
    for ratio in [0.5, f64::NAN, f64::INFINITY] {
        assert!(LongTail { ratio, ..tail }.sizes(&[10, 10]).is_err());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..Default::default() })]

    #[test]
    fn thinned_data_has_the_promised_sizes(
        counts in prop::collection::vec(1usize..60, 1..6),
        ratio in 1.0f64..40.0,
        step: bool,
        seed in 0u64..100,
    ) {
        let shape = if step { TailShape::Step } else { TailShape::Exponential };
        let tail = LongTail { shape, ratio };
        let sizes = tail.sizes(&counts).unwrap();
        prop_assert!(sizes.iter().zip(&counts).all(|(s, n)| (1..=*n).contains(s)));
        prop_assert!(sizes.is_sorted_by(|a, b| a >= b));
        let labels: Vec<u32> = counts
            .iter()
            .enumerate()
            .flat_map(|(c, n)| std::iter::repeat_n(c as u32, *n))
            .collect();
        let mut rng = RandomStream::new(seed);
        let chosen = tail.indices(&labels, counts.len(), &mut rng).unwrap();
        prop_assert!(chosen.is_sorted_by(|a, b| a < b));
        let mut found = vec![0; counts.len()];
        chosen.iter().for_each(|i| found[labels[*i as usize] as usize] += 1);
        prop_assert_eq!(found, sizes);
    }
}

//! Linear operators.

use candle_core::{DType, Device, Tensor, Var};
use thalweg_tensor_core::operator::{AveragePool, Blur, Compose, Dense, LinearOperator, Mask};
use thalweg_tensor_core::random::RandomStream;

fn normal(seed: u64, shape: &[usize], dtype: DType) -> Tensor {
    let mut stream = RandomStream::new(seed);
    stream.normal(0.0, 1.0, shape, dtype, &Device::Cpu).unwrap()
}

fn inner(a: &Tensor, b: &Tensor) -> f64 {
    let product = (a * b).unwrap().sum_all().unwrap();
    product.to_dtype(DType::F64).unwrap().to_scalar().unwrap()
}

fn values(x: &Tensor) -> Vec<f64> {
    let flat = x.to_dtype(DType::F64).unwrap().flatten_all().unwrap();
    flat.to_vec1().unwrap()
}

fn with_each(check: impl Fn(&str, &dyn LinearOperator, &[usize])) {
    let image = [2, 3, 6, 8];
    let mask = Mask::hide_box((6, 8), 3, None, DType::F64, &Device::Cpu).unwrap();
    let soft = Mask::new(&normal(1, &[3, 6, 8], DType::F64)).unwrap();
    let pool = AveragePool { factor: 2 };
    let blur = Blur::gaussian(5, 1.3, true, DType::F64, &Device::Cpu).unwrap();
    let shifted = Blur::gaussian(5, 1.0, false, DType::F64, &Device::Cpu).unwrap();
    let dense = Dense::new(&normal(2, &[7, 144], DType::F64), &[3, 6, 8]).unwrap();
    let both = Compose(vec![&shifted, &pool]);
    let all: [(&str, &dyn LinearOperator); 7] = [
        ("mask", &mask),
        ("soft mask", &soft),
        ("pool", &pool),
        ("blur", &blur),
        ("shifted blur", &shifted),
        ("dense", &dense),
        ("both", &both),
    ];
    for (name, operator) in all {
        check(name, operator, &image);
    }
}

#[test]
fn transposes_are_exact() {
    with_each(|name, a, image| {
        for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 1e-4)] {
            let x = normal(3, image, dtype);
            let image = a.apply(&x).unwrap();
            let y = normal(4, image.dims(), dtype);
            let back = a.adjoint(&y).unwrap();
            assert_eq!(back.dims(), x.dims(), "{name}");
            let (one, two) = (inner(&image, &y), inner(&x, &back));
            assert!(
                (one - two).abs() <= tolerance * one.abs().max(1.0),
                "{name} {one} {two}"
            );
        }
    });
}

/// Images that several tasks share, against sums that are written out.
#[test]
fn large_images_are_masked_and_pooled_like_small_ones() {
    let (c, h, w) = (2, 66, 99);
    for dtype in [DType::F64, DType::F32] {
        let tolerance = if dtype == DType::F64 { 1e-12 } else { 1e-5 };
        let x = normal(20, &[5, c, h, w], dtype);
        let all = values(&x);
        let off = |a: &Tensor, expected: &dyn Fn(usize) -> f64| {
            let pairs = values(a).into_iter().enumerate();
            pairs
                .map(|(i, v)| (v - expected(i)).abs())
                .fold(0.0, f64::max)
        };
        for shape in [vec![c, h, w], vec![h, w], vec![c, 1, 1], vec![1, w]] {
            let weights = normal(21, &shape, dtype);
            let full = values(&weights.broadcast_as((c, h, w)).unwrap());
            let masked = Mask::new(&weights).unwrap().apply(&x).unwrap();
            assert!(off(&masked, &|i| all[i] * full[i % full.len()]) < tolerance);
        }
        let pooled = AveragePool { factor: 3 }.apply(&x).unwrap();
        assert_eq!(pooled.dims(), [5, c, h / 3, w / 3]);
        let mean = |i: usize| {
            let (line, j) = (i / (w / 3), i % (w / 3));
            let at = |k: usize| all[(3 * line + k / 3) * w + 3 * j + k % 3];
            (0..9).map(at).sum::<f64>() / 9.0
        };
        assert!(off(&pooled, &mean) < tolerance);
        let means = values(&pooled);
        let spread = AveragePool { factor: 3 }.adjoint(&pooled).unwrap();
        let ninth = |i: usize| means[(i / w / 3) * (w / 3) + i % w / 3] / 9.0;
        assert!(off(&spread, &ninth) < tolerance);
    }
}

/// What backpropagation makes of the operator is the transpose, too.
#[test]
fn they_can_be_differentiated() {
    with_each(|name, a, image| {
        let x = Var::from_tensor(&normal(5, image, DType::F64)).unwrap();
        let image = a.apply(&x).unwrap();
        let y = normal(6, image.dims(), DType::F64);
        let grads = (image * &y).unwrap().sum_all().unwrap().backward().unwrap();
        let pairs = values(grads.get(&x).unwrap())
            .into_iter()
            .zip(values(&a.adjoint(&y).unwrap()));
        assert!(
            pairs.into_iter().all(|(g, b)| (g - b).abs() < 1e-12),
            "{name}"
        );
    });
}

#[test]
fn norms_are_those_of_the_known_operators() {
    let mut stream = RandomStream::new(1);
    let like = normal(7, &[2, 1, 6, 8], DType::F64);
    let mask = Mask::hide_box((6, 8), 3, None, DType::F64, &Device::Cpu).unwrap();
    assert!((mask.norm_squared(&like, 100, &mut stream).unwrap() - 1.0).abs() < 1e-6);
    let pool = AveragePool { factor: 2 };
    assert!((pool.norm_squared(&like, 100, &mut stream).unwrap() - 0.25).abs() < 1e-6);
    let blur = Blur::gaussian(3, 1.0, true, DType::F64, &Device::Cpu).unwrap();
    let norm = blur.norm_squared(&like, 200, &mut stream).unwrap();
    assert!(norm > 0.6 && norm < 1.0, "{norm}");
    assert!(mask
        .norm_squared(&like.narrow(0, 0, 0).unwrap(), 9, &mut stream)
        .is_err());
}

#[test]
fn pseudo_inverses_are_right_inverses_on_the_range() {
    let x = normal(8, &[2, 1, 6, 8], DType::F64);
    let mask = Mask::hide_box((6, 8), 3, Some((0, 7)), DType::F64, &Device::Cpu).unwrap();
    let pool = AveragePool { factor: 2 };
    let both: [&dyn LinearOperator; 2] = [&mask, &pool];
    for a in both {
        let y = a.apply(&x).unwrap();
        let again = a.apply(&a.pseudo_inverse(&y).unwrap().unwrap()).unwrap();
        let pairs = values(&again).into_iter().zip(values(&y));
        assert!(pairs.into_iter().all(|(p, q)| (p - q).abs() < 1e-12));
    }
    let blur = Blur::gaussian(3, 1.0, true, DType::F64, &Device::Cpu).unwrap();
    assert!(blur.pseudo_inverse(&x).unwrap().is_none());
}

#[test]
fn boxes_are_where_they_should_be() {
    let hidden = |size, center| {
        let mask = Mask::hide_box((6, 8), size, center, DType::F64, &Device::Cpu).unwrap();
        let found = values(mask.weights());
        (0..48)
            .filter(|k| found[*k] == 0.0)
            .map(|k| (k / 8, k % 8))
            .collect::<Vec<_>>()
    };
    assert_eq!(hidden(2, None), [(2, 3), (2, 4), (3, 3), (3, 4)]);
    // Odd: one more behind the center than before it is not; the center is the middle.
    assert_eq!(hidden(1, None), [(3, 4)]);
    assert_eq!(hidden(3, Some((0, 7))).len(), 2 * 2);
    assert_eq!(hidden(0, None), []);
    assert_eq!(hidden(2, Some((40, 40))), []);
}

#[test]
fn a_blur_that_is_not_centered_shifts_half_a_pixel() {
    let mean = |centered: bool| {
        let blur = Blur::gaussian(5, 1.0, centered, DType::F64, &Device::Cpu).unwrap();
        let mut point = vec![0.0; 121];
        point[5 * 11 + 5] = 1.0;
        let x = Tensor::from_vec(point, (1, 1, 11, 11), &Device::Cpu).unwrap();
        let y = values(&blur.apply(&x).unwrap());
        assert!((y.iter().sum::<f64>() - 1.0).abs() < 1e-12);
        y.iter()
            .enumerate()
            .map(|(k, v)| v * (k / 11) as f64)
            .sum::<f64>()
    };
    assert!((mean(true) - 5.0).abs() < 1e-12);
    // A correlation moves a point against the shift of its kernel.
    assert!((mean(false) - 5.0).abs() > 0.2);
}

#[test]
fn shapes_that_do_not_fit_are_named() {
    let x = normal(9, &[2, 1, 6, 7], DType::F64);
    let device = &Device::Cpu;
    let mask = Mask::hide_box((6, 8), 3, None, DType::F64, device).unwrap();
    assert!(mask.apply(&x).is_err());
    assert!(mask.apply(mask.weights()).is_err());
    let error = AveragePool { factor: 2 }.apply(&x).unwrap_err().to_string();
    assert!(
        error.contains("[2, 1, 6, 7]") && error.contains('2'),
        "{error}"
    );
    assert!(AveragePool { factor: 0 }.apply(&x).is_err());
    assert!(AveragePool { factor: 2 }
        .apply(&x.flatten_all().unwrap())
        .is_err());
    assert!(Blur::gaussian(4, 1.0, true, DType::F64, device).is_err());
    assert!(Blur::gaussian(3, 0.0, true, DType::F64, device).is_err());
    assert!(Blur::new(&x).is_err());
    assert!(Dense::new(&x, &[4]).is_err());
    let dense = Dense::new(&normal(1, &[3, 4], DType::F64), &[2, 2]).unwrap();
    assert!(dense.apply(&normal(1, &[1, 4], DType::F64)).is_err());
    assert!(dense.adjoint(&normal(1, &[1, 4], DType::F64)).is_err());
    assert!(Mask::new(&normal(1, &[0], DType::F64)).is_err());
}

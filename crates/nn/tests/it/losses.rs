use crate::support::{check_gradients, distance, normal, values, CPU};
use candle_core::{DType, Tensor, Var, D};
use nn::loss::{accuracy, cross_entropy, Reduction};
use nn::softmax::{log_softmax, softmax};
use nn::Error;

#[test]
fn softmax_equals_candle_and_has_a_gradient() {
    let x = Var::from_tensor(&normal(3, &[2, 3, 4], DType::F64)).unwrap();
    let c = normal(4, &[2, 3, 4], DType::F64);
    for dim in 0..3 {
        let theirs = candle_nn::ops::softmax(&x, dim).unwrap();
        assert!(distance(&softmax(&x, dim).unwrap(), &theirs) < 1e-15);
        let theirs = candle_nn::ops::log_softmax(&x, dim).unwrap();
        assert!(distance(&log_softmax(&x, dim).unwrap(), &theirs) < 1e-14);
        let functions = [
            |x: &Tensor, d: usize| softmax(x, d),
            |x: &Tensor, d: usize| log_softmax(x, d),
        ];
        for f in functions {
            let loss = || (f(&x, dim).unwrap() * &c).unwrap().sum_all().unwrap();
            let error = check_gradients(&[&x], loss);
            assert!(error < 1e-8, "dim {dim}: {error}");
        }
    }
}

#[test]
fn masks_and_large_logits_are_safe() {
    let inf = f64::NEG_INFINITY;
    let x = Var::new(&[[1e4, 1e4 - 1.0, inf], [-1e4, inf, -1e4]], &CPU).unwrap();
    let p = softmax(&x, D::Minus1).unwrap();
    let expected = [
        0.731_058_578_630_004_9,
        0.268_941_421_369_995_1,
        0.0,
        0.5,
        0.0,
        0.5,
    ];
    for (p, e) in values(&p).into_iter().zip(expected) {
        assert!((p - e).abs() < 1e-14);
    }
    let c = normal(4, &[2, 3], DType::F64);
    let loss = (p * c).unwrap().sum_all().unwrap();
    let grads = loss.backward().unwrap();
    assert!(values(grads.get(&x).unwrap()).iter().all(|g| g.is_finite()));
    assert_eq!(
        softmax(&x.to_dtype(DType::BF16).unwrap(), 1)
            .unwrap()
            .dtype(),
        DType::BF16
    );
}

#[test]
fn cross_entropy_is_minus_log_probability() {
    let logits = Var::from_tensor(&normal(3, &[4, 3], DType::F64)).unwrap();
    let labels = Tensor::new(&[0u32, 2, 1, 2], &CPU).unwrap();
    let each = cross_entropy(&logits, &labels, Reduction::None).unwrap();
    let p = softmax(&logits, 1).unwrap().to_vec2::<f64>().unwrap();
    let expected: Vec<f64> = [0, 2, 1, 2]
        .iter()
        .zip(&p)
        .map(|(l, p): (&usize, _)| -p[*l].ln())
        .collect();
    for (a, b) in values(&each).iter().zip(&expected) {
        assert!((a - b).abs() < 1e-14);
    }
    let sum = values(&cross_entropy(&logits, &labels, Reduction::Sum).unwrap())[0];
    let mean = values(&cross_entropy(&logits, &labels, Reduction::Mean).unwrap())[0];
    assert!((sum - expected.iter().sum::<f64>()).abs() < 1e-14 && (mean - sum / 4.0).abs() < 1e-14);
    for reduction in [Reduction::Mean, Reduction::Sum] {
        let error = check_gradients(&[&logits], || {
            cross_entropy(&logits, &labels, reduction).unwrap()
        });
        assert!(error < 1e-8, "{error}");
    }
}

#[test]
fn sequences_of_logits_are_one_batch() {
    let logits = normal(3, &[2, 3, 5], DType::F64);
    let labels = Tensor::new(&[[0i64, 1, 2], [3, 4, 0]], &CPU).unwrap();
    let each = cross_entropy(&logits, &labels, Reduction::None).unwrap();
    assert_eq!(each.dims(), &[2, 3]);
    let flat = cross_entropy(
        &logits.reshape((6, 5)).unwrap(),
        &labels.flatten_all().unwrap(),
        Reduction::None,
    );
    assert_eq!(values(&each), values(&flat.unwrap()));
}

#[test]
fn accuracy_counts_rows() {
    let logits = Tensor::new(&[[1f32, 2.0], [3.0, 1.0], [0.0, 1.0], [0.0, 1.0]], &CPU).unwrap();
    let labels = Tensor::new(&[1u8, 0, 0, 1], &CPU).unwrap();
    assert_eq!(accuracy(&logits, &labels).unwrap(), 0.75);
}

#[test]
fn bad_input_is_named() {
    let logits = normal(3, &[2, 3], DType::F32);
    let ce = |logits: &Tensor, labels: &Tensor| cross_entropy(logits, labels, Reduction::Mean);
    let error = ce(&logits, &Tensor::new(&[0u32, 3], &CPU).unwrap()).unwrap_err();
    let named = matches!(
        error,
        Error::LabelOutOfRange {
            label: 3,
            position: 1,
            classes: 3
        }
    );
    assert!(named, "{error}");
    let error = ce(&logits, &Tensor::new(&[0i64, -1], &CPU).unwrap()).unwrap_err();
    assert!(
        matches!(error, Error::LabelOutOfRange { label: -1, .. }),
        "{error}"
    );
    let error = ce(&logits, &Tensor::new(&[0f32, 1.0], &CPU).unwrap()).unwrap_err();
    assert!(matches!(error, Error::DType { .. }), "{error}");
    let error = ce(&logits, &Tensor::new(&[0u32], &CPU).unwrap()).unwrap_err();
    assert!(
        matches!(
            error,
            Error::Shape {
                tensor: "labels",
                ..
            }
        ),
        "{error}"
    );
    let empty = Tensor::zeros((0, 3), DType::F32, &CPU).unwrap();
    let error = ce(&empty, &Tensor::zeros(0, DType::U32, &CPU).unwrap()).unwrap_err();
    assert!(
        matches!(
            error,
            Error::Shape {
                tensor: "logits",
                ..
            }
        ),
        "{error}"
    );
    let nan = Tensor::new(&[[0f32, f32::NAN], [0.0, 1.0]], &CPU).unwrap();
    let error = ce(&nan, &Tensor::new(&[0u32, 1], &CPU).unwrap()).unwrap_err();
    assert!(
        matches!(
            error,
            Error::NonFinite {
                count: 1,
                total: 2,
                ..
            }
        ),
        "{error}"
    );
}

/// The definition, row by row.
fn smoothed(logits: &[f64], label: usize, smoothing: f64) -> f64 {
    let classes = logits.len() as f64;
    let log_sum = logits.iter().map(|x| x.exp()).sum::<f64>().ln();
    let even: f64 = logits.iter().map(|x| log_sum - x).sum::<f64>() / classes;
    (1.0 - smoothing) * (log_sum - logits[label]) + smoothing * even
}

#[test]
fn smoothing_and_ignored_labels_are_their_definitions() {
    use nn::loss::{cross_entropy_with, CrossEntropyConfig};
    let x = Var::from_tensor(&normal(4, &[5, 6], DType::F64)).unwrap();
    let labels = Tensor::new(&[3i64, -100, 0, 5, -100], &CPU).unwrap();
    let rows = x.to_vec2::<f64>().unwrap();
    for smoothing in [0.0, 0.1, 1.0] {
        let config = |reduction| CrossEntropyConfig {
            reduction,
            label_smoothing: smoothing,
            ignore_index: Some(-100),
        };
        let loss = |r| cross_entropy_with(&x, &labels, &config(r)).unwrap();
        let each = values(&loss(Reduction::None));
        let exact = [(0, 3), (2, 0), (3, 5)].map(|(i, l)| smoothed(&rows[i], l, smoothing));
        assert_eq!((each[1], each[4]), (0.0, 0.0));
        for (ours, exact) in [each[0], each[2], each[3]].iter().zip(exact) {
            assert!((ours - exact).abs() < 1e-12);
        }
        let sum: f64 = exact.iter().sum();
        assert!((values(&loss(Reduction::Sum))[0] - sum).abs() < 1e-12);
        assert!((values(&loss(Reduction::Mean))[0] - sum / 3.0).abs() < 1e-12);
        for reduction in [Reduction::Mean, Reduction::Sum] {
            let error = check_gradients(&[&x], || loss(reduction));
            assert!(error < 1e-9, "{error}");
        }
        let grads = loss(Reduction::Mean).backward().unwrap();
        let dx = grads.get(&x).unwrap().to_vec2::<f64>().unwrap();
        assert!(dx[1].iter().chain(&dx[4]).all(|g| *g == 0.0));
    }
    let none = Tensor::new(&[-100i64; 5], &CPU).unwrap();
    let config = CrossEntropyConfig {
        ignore_index: Some(-100),
        ..Default::default()
    };
    assert!(cross_entropy_with(&x, &none, &config).is_err());
    let bad = CrossEntropyConfig {
        label_smoothing: 1.5,
        ..Default::default()
    };
    assert!(cross_entropy_with(&x, &none, &bad).is_err());
}

#[test]
fn soft_labels_are_their_definition() {
    use nn::loss::soft_cross_entropy;
    let x = Var::from_tensor(&normal(4, &[2, 3, 6], DType::F64)).unwrap();
    let t = normal(5, &[2, 3, 6], DType::F64).abs().unwrap();
    let exact = (log_softmax(&x.as_detached_tensor(), 2).unwrap() * &t).unwrap();
    let exact = exact.sum(2).unwrap().neg().unwrap();
    let ours = soft_cross_entropy(&x, &t, Reduction::None).unwrap();
    assert!(distance(&ours, &exact) < 1e-12);
    let error = check_gradients(&[&x], || {
        soft_cross_entropy(&x, &t, Reduction::Mean).unwrap()
    });
    assert!(error < 1e-9, "{error}");
    // Targets that are part of a graph get their gradient too.
    let t = Var::from_tensor(&t).unwrap();
    let error = check_gradients(&[&t], || {
        soft_cross_entropy(&x, &t, Reduction::Sum).unwrap()
    });
    assert!(error < 1e-9, "{error}");
    // A forbidden class of target 0 has no say.
    let x = Tensor::new(&[[0f32, f32::NEG_INFINITY]], &CPU).unwrap();
    let t = Tensor::new(&[[1f32, 0.0]], &CPU).unwrap();
    let loss = soft_cross_entropy(&x, &t, Reduction::Mean).unwrap();
    assert_eq!(loss.to_scalar::<f32>().unwrap(), 0.0);
    let flat = normal(1, &[6], DType::F64);
    assert!(soft_cross_entropy(&flat, &flat, Reduction::Mean).is_err());
}

use crate::support::{bits, check_gradients, distance, normal, values, with_threads, CPU};
use candle_core::{DType, Tensor, Var, D};
use nn::loss::Reduction;
use nn::stablemax::{
    log_stablemax, stablemax, stablemax_cross_entropy, stablemax_score, StableMaxConfig,
};
use nn::Error;
use proptest::prelude::*;

fn loss(logits: &Tensor, labels: &Tensor, reduction: Reduction) -> Tensor {
    stablemax_cross_entropy(logits, labels, reduction, &StableMaxConfig::default()).unwrap()
}

#[test]
fn it_is_softmax_of_signed_log1p() {
    let x = (normal(1, &[5, 7], DType::F64) * 4.0).unwrap();
    let h = values(&x).into_iter().map(|x| x.signum() * x.abs().ln_1p());
    let h = Tensor::from_vec(h.collect::<Vec<f64>>(), (5, 7), &CPU).unwrap();
    for dim in [0, 1] {
        let expected = nn::softmax::softmax(&h, dim).unwrap();
        assert!(distance(&stablemax(&x, dim).unwrap(), &expected) < 1e-14);
        let expected = nn::softmax::log_softmax(&h, dim).unwrap();
        assert!(distance(&log_stablemax(&x, dim).unwrap(), &expected) < 1e-14);
    }
}

#[test]
fn functions_have_gradients() {
    let x = Var::from_tensor(&(normal(1, &[3, 4], DType::F64) * 2.0).unwrap()).unwrap();
    let c = normal(2, &[3, 4], DType::F64);
    let dot = |y: Tensor| (y * &c).unwrap().sum_all().unwrap();
    assert!(check_gradients(&[&x], || dot(stablemax_score(&x).unwrap())) < 1e-8);
    assert!(check_gradients(&[&x], || dot(stablemax(&x, 1).unwrap())) < 1e-8);
    assert!(check_gradients(&[&x], || dot(log_stablemax(&x, D::Minus1).unwrap())) < 1e-8);
    let labels = Tensor::new(&[0u32, 3, 1], &CPU).unwrap();
    for reduction in [Reduction::Mean, Reduction::Sum] {
        assert!(check_gradients(&[&x], || loss(&x, &labels, reduction)) < 1e-8);
    }
}

/// The kinks and ends of the range, with the derivative of `s` at both sides of 0.
#[test]
fn gradients_are_finite_at_special_values() {
    let special = [0.0, -0.0, 1.0, -1.0, 1e30, -1e30, 1e300, -1e300];
    for (label, _) in special.iter().enumerate() {
        let x = Var::new(&[special], &CPU).unwrap();
        let labels = Tensor::new(&[label as u32], &CPU).unwrap();
        let grads = loss(&x, &labels, Reduction::Mean).backward().unwrap();
        assert!(
            values(grads.get(&x).unwrap()).iter().all(|g| g.is_finite()),
            "label {label}"
        );
        let log = log_stablemax(&x, 1).unwrap();
        assert!(values(&log).iter().all(|l| l.is_finite()));
        let grads = log.sum_all().unwrap().backward().unwrap();
        assert!(values(grads.get(&x).unwrap()).iter().all(|g| g.is_finite()));
    }
    let single = [0.0f32, -0.0, 1.0, 1e30, -1e30];
    let x = Var::new(&[single], &CPU).unwrap();
    let grads = stablemax(&x, 1)
        .unwrap()
        .sqr()
        .unwrap()
        .sum_all()
        .unwrap()
        .backward()
        .unwrap();
    assert!(values(grads.get(&x).unwrap()).iter().all(|g| g.is_finite()));
    let x = Var::new(&[0.0f64, -0.0], &CPU).unwrap();
    let grads = stablemax_score(&x)
        .unwrap()
        .sum_all()
        .unwrap()
        .backward()
        .unwrap();
    assert_eq!(values(grads.get(&x).unwrap()), [1.0, 1.0]);
}

#[test]
fn single_precision_logits_give_a_double_loss() {
    let x = (normal(1, &[40, 9], DType::F32) * 5.0).unwrap();
    let labels: Vec<u32> = (0..40).map(|i| i % 9).collect();
    let labels = Tensor::new(labels, &CPU).unwrap();
    let (a, b) = (
        Var::from_tensor(&x).unwrap(),
        Var::from_tensor(&x.to_dtype(DType::F64).unwrap()).unwrap(),
    );
    let (la, lb) = (
        loss(&a, &labels, Reduction::Mean),
        loss(&b, &labels, Reduction::Mean),
    );
    assert_eq!((la.dtype(), bits(&la)), (DType::F64, bits(&lb)));
    let (ga, gb) = (la.backward().unwrap(), lb.backward().unwrap());
    let (ga, gb) = (ga.get(&a).unwrap(), gb.get(&b).unwrap());
    assert_eq!(ga.dtype(), DType::F32);
    assert_eq!(values(ga), values(&gb.to_dtype(DType::F32).unwrap()));

    let config = StableMaxConfig {
        compute_dtype: DType::F32,
        ..Default::default()
    };
    let single = stablemax_cross_entropy(&a, &labels, Reduction::Mean, &config).unwrap();
    assert_eq!(single.dtype(), DType::F32);
    assert!(distance(&single.to_dtype(DType::F64).unwrap(), &lb) < 1e-6);
    assert!(single.backward().unwrap().get(&a).is_some());
}

#[test]
fn half_logits_take_the_composed_path() {
    let x = Var::from_tensor(&normal(1, &[4, 3], DType::BF16)).unwrap();
    let labels = Tensor::new(&[0u32, 1, 2, 0], &CPU).unwrap();
    let l = loss(&x, &labels, Reduction::Mean);
    assert_eq!(l.dtype(), DType::F64);
    let exact = loss(&x.to_dtype(DType::F64).unwrap(), &labels, Reduction::Mean);
    assert!(distance(&l, &exact) < 1e-14);
    assert_eq!(l.backward().unwrap().get(&x).unwrap().dtype(), DType::BF16);
}

/// Logits at which softmax gives the right class no gradient at all in f32.
#[test]
fn the_right_class_keeps_its_gradient_where_softmax_collapses() {
    let x = Var::new(&[[40f32, 0.0, -3.0]], &CPU).unwrap();
    let labels = Tensor::new(&[0u32], &CPU).unwrap();
    let soft = nn::loss::cross_entropy(&x, &labels, Reduction::Mean).unwrap();
    assert_eq!(values(&soft), [0.0]);
    assert_eq!(values(soft.backward().unwrap().get(&x).unwrap())[0], 0.0);
    let stable = loss(&x, &labels, Reduction::Mean);
    assert!(values(&stable)[0] > 0.0);
    assert!(values(stable.backward().unwrap().get(&x).unwrap())[0] < -1e-4);
}

#[test]
fn bits_do_not_depend_on_threads() {
    let run = |threads| {
        with_threads(threads, || {
            let x = Var::from_tensor(&normal(1, &[500, 77], DType::F32)).unwrap();
            let labels: Vec<u32> = (0..500).map(|i| i % 77).collect();
            let l = loss(&x, &Tensor::new(labels, &CPU).unwrap(), Reduction::Mean);
            let grads = l.backward().unwrap();
            (bits(&l), bits(grads.get(&x).unwrap()))
        })
    };
    let one = run(1);
    assert!(one == run(2) && one == run(7));
}

#[test]
fn reductions_and_shapes() {
    let x = normal(1, &[2, 3, 4], DType::F64);
    let labels = Tensor::new(&[[0i64, 1, 2], [3, 0, 1]], &CPU).unwrap();
    let each = loss(&x, &labels, Reduction::None);
    assert_eq!(each.dims(), &[2, 3]);
    let sum: f64 = values(&each).iter().sum();
    assert!((values(&loss(&x, &labels, Reduction::Sum))[0] - sum).abs() < 1e-14);
    assert!((values(&loss(&x, &labels, Reduction::Mean))[0] - sum / 6.0).abs() < 1e-14);
}

#[test]
fn bad_input_is_named() {
    let config = StableMaxConfig::default();
    let ce = |x: &Tensor, l: &Tensor| stablemax_cross_entropy(x, l, Reduction::Mean, &config);
    let labels = Tensor::new(&[0u32, 1], &CPU).unwrap();
    for bad in [f32::NAN, f32::INFINITY] {
        let x = Tensor::new(&[[0f32, 1.0], [bad, 1.0]], &CPU).unwrap();
        let error = ce(&x, &labels).unwrap_err();
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
    let x = normal(1, &[2, 2], DType::F32);
    let error = ce(&x, &Tensor::new(&[0u32, 2], &CPU).unwrap()).unwrap_err();
    assert!(
        matches!(error, Error::LabelOutOfRange { label: 2, .. }),
        "{error}"
    );
    assert!(matches!(
        ce(&x.narrow(0, 0, 1).unwrap(), &labels),
        Err(Error::Shape { .. })
    ));
    assert!(ce(&Tensor::zeros((2, 2), DType::U32, &CPU).unwrap(), &labels).is_err());
    for config in [
        StableMaxConfig {
            compute_dtype: DType::BF16,
            ..config
        },
        StableMaxConfig {
            eps: -1.0,
            ..config
        },
    ] {
        let result = stablemax_cross_entropy(&x, &labels, Reduction::Mean, &config);
        assert!(matches!(result, Err(Error::InvalidConfig { .. })));
    }
}

proptest! {
    #![proptest_config(crate::support::cases(48))]

    #[test]
    fn sums_to_one_and_is_monotone(x in prop::collection::vec(-1e6f64..1e6, 2..12)) {
        let n = x.len();
        let t = Tensor::from_slice(&x, n, &CPU).unwrap();
        let p = values(&stablemax(&t, 0).unwrap());
        prop_assert!((p.iter().sum::<f64>() - 1.0).abs() < 1e-13);
        for i in 0..n {
            for j in 0..n {
                prop_assert!(x[i] >= x[j] || p[i] <= p[j]);
            }
        }
    }

    /// The kernel against the composed functions, also for upstream gradients per example.
    #[test]
    fn kernel_equals_the_definition(
        x in prop::collection::vec(-50f64..50.0, 12), labels in prop::collection::vec(0u32..4, 3),
    ) {
        let x = Var::from_tensor(&Tensor::from_vec(x, (3, 4), &CPU).unwrap()).unwrap();
        let labels = Tensor::new(labels, &CPU).unwrap();
        let weights = Tensor::new(&[0.3f64, -1.0, 2.0], &CPU).unwrap();
        let fused = loss(&x, &labels, Reduction::None);
        let log = log_stablemax(&x, 1).unwrap();
        let composed = log.gather(&labels.unsqueeze(1).unwrap(), 1).unwrap().squeeze(1).unwrap().neg().unwrap();
        prop_assert!(distance(&fused, &composed) < 1e-13);
        let gradient = |l: Tensor| {
            let store = (l * &weights).unwrap().sum_all().unwrap().backward().unwrap();
            store.get(&x).unwrap().clone()
        };
        prop_assert!(distance(&gradient(fused), &gradient(composed)) < 1e-13);
    }
}

use candle_core::{DType, Device, Tensor, Var};
use thalweg_tensor_core::testing::*;

fn tensor(values: &[f64]) -> Tensor {
    Tensor::from_slice(values, values.len(), &Device::Cpu).unwrap()
}

#[test]
fn distances_do_not_pass_over_nan() {
    let (a, b) = (tensor(&[1.0, f64::NAN, 2.0]), tensor(&[1.0, 0.0, 2.5]));
    assert!(max_difference(&a, &b).is_nan() && relative_distance(&b, &a).is_nan());
    let (a, b) = (tensor(&[10.0, -1.0]), tensor(&[20.0, -1.0]));
    assert_eq!(
        (max_difference(&a, &b), relative_distance(&a, &b)),
        (10.0, 0.5)
    );
}

#[test]
fn a_wrong_gradient_is_found() {
    let x = Var::from_tensor(&normal(1, &[2, 3], DType::F64)).unwrap();
    let right = || x.sqr().unwrap().sum_all().unwrap();
    assert!(check_gradients(&[&x], right) < 1e-9 && check_directions(&[&x], right) < 1e-9);
    let wrong = || (right() + x.detach().sum_all().unwrap()).unwrap();
    assert!(check_gradients(&[&x], wrong) > 0.1 && check_directions(&[&x], wrong) > 0.1);
    assert_eq!(
        bits(&x),
        bits(&normal(1, &[2, 3], DType::F64)),
        "x is as it was"
    );
}

#[test]
#[should_panic(expected = "1: 2 for 2.5")]
fn values_apart_are_not_close() {
    assert_close(&[1.0, 2.0], &[1.0, 2.5], 0.1);
}

#[test]
#[should_panic(expected = "`no file` lacks `line`")]
fn a_missing_word_is_named() {
    assert_says(Err::<(), _>("no file"), &["file", "line"]);
}

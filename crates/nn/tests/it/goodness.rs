use candle_core::{DType, Tensor, Var};
use nn::goodness::{goodness_loss, logistic_loss};
use nn::Error;

use crate::support::{normal, CPU};

fn number(t: &Tensor) -> f64 {
    t.to_dtype(DType::F64).unwrap().to_scalar().unwrap()
}

#[test]
fn the_loss_is_its_formula() {
    let (p, n1, n2) = (
        normal(1, &[4, 3], DType::F64),
        normal(2, &[4, 3], DType::F64),
        normal(3, &[4, 3], DType::F64),
    );
    let mean = |z: &Tensor, sign: f64| {
        let rows = z.to_vec2::<f64>().unwrap();
        let one = |row: &Vec<f64>| {
            let g: f64 = row.iter().map(|v| v * v).sum();
            (1.0 + (sign * (g - 2.0)).exp()).ln()
        };
        rows.iter().map(one).sum::<f64>() / rows.len() as f64
    };
    let expected = mean(&p, -1.0) + (mean(&n1, 1.0) + mean(&n2, 1.0)) / 2.0;
    let got = number(&goodness_loss(&p, &[n1, n2], 2.0).unwrap());
    assert!((got - expected).abs() < 1e-12, "{got} {expected}");
}

/// Far from zero nothing overflows, and the gradient is a probability minus the target.
#[test]
fn large_logits_are_finite() {
    let logits = Var::from_tensor(&Tensor::new(&[900f64, -900.0], &CPU).unwrap()).unwrap();
    let targets = Tensor::new(&[0f64, 1.0], &CPU).unwrap();
    let loss = logistic_loss(&logits, &targets).unwrap();
    assert_eq!(number(&loss), 900.0);
    let grads = loss.backward().unwrap();
    assert_eq!(
        grads.get(&logits).unwrap().to_vec1::<f64>().unwrap(),
        [0.5, -0.5]
    );
}

#[test]
fn bad_shapes_are_named() {
    let z = normal(1, &[4, 3], DType::F32);
    let none = goodness_loss(&z, &[], 2.0);
    assert!(matches!(none, Err(Error::Shape { .. })), "{none:?}");
    let flat = z.flatten_all().unwrap();
    assert!(goodness_loss(&flat, std::slice::from_ref(&z), 2.0).is_err());
    assert!(logistic_loss(&flat, &z).is_err());
    let empty = Tensor::zeros(0, DType::F32, &CPU).unwrap();
    assert!(logistic_loss(&empty, &empty).is_err());
}

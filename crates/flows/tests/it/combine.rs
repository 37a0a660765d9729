//! Sums of samples in one pass.

use crate::support::*;
use candle_core::{DType, Device, Tensor, Var};
use flows::combine::{linear_combination, row_combination};
use proptest::prelude::*;
use tensor_core::testing::{assert_says, check_gradients, with_threads};

/// The same by tensor operations.
fn by_operations(terms: &[(f64, &Tensor)]) -> Tensor {
    let mut sum = terms[0].1.affine(terms[0].0, 0.0).unwrap();
    for (c, x) in &terms[1..] {
        sum = (sum + x.affine(*c, 0.0).unwrap()).unwrap();
    }
    sum
}

proptest! {
    #![proptest_config(cases(40))]

    /// The values are those of the operations that it replaces, to the last bit.
    #[test]
    fn it_rounds_as_the_operations_do(
        rows in 1..40_usize,
        width in 1..1500_usize,
        coefficients in prop::collection::vec(-3.0..3.0_f64, 1..8),
        single in any::<bool>(),
    ) {
        let dtype = if single { DType::F32 } else { DType::F64 };
        let tensors: Vec<Tensor> = (0..coefficients.len())
            .map(|i| normal(i as u64, &[rows, width], dtype))
            .collect();
        let terms: Vec<_> = coefficients.iter().copied().zip(&tensors).collect();
        let found = linear_combination(&terms).unwrap();
        prop_assert_eq!(values(&found), values(&by_operations(&terms)));
    }
}

proptest! {
    #![proptest_config(cases(20))]

    #[test]
    fn rows_have_coefficients_of_their_own(
        rows in 1..6_usize,
        width in 1..40_000_usize,
        terms in 1..5_usize,
    ) {
        let tensors: Vec<Tensor> = (0..terms)
            .map(|i| normal(i as u64, &[rows, width], DType::F32))
            .collect();
        let coefficients: Vec<Vec<f64>> = (0..terms)
            .map(|i| values(&normal(50 + i as u64, &[rows], DType::F64)))
            .collect();
        let all: Vec<_> = coefficients.iter().map(Vec::as_slice).zip(&tensors).collect();
        let found = row_combination(&all).unwrap();
        for row in 0..rows {
            let own: Vec<_> = tensors.iter().map(|t| t.narrow(0, row, 1).unwrap()).collect();
            let own: Vec<_> = coefficients.iter().map(|c| c[row]).zip(&own).collect();
            let found = found.narrow(0, row, 1).unwrap();
            prop_assert_eq!(values(&found), values(&by_operations(&own)));
        }
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    let tensors: Vec<Tensor> = (0..3)
        .map(|i| normal(i, &[7, 12_345], DType::F32))
        .collect();
    let terms = [(0.3, &tensors[0]), (-1.7, &tensors[1]), (2.5, &tensors[2])];
    let one = with_threads(1, || bits(&linear_combination(&terms).unwrap()));
    let four = with_threads(4, || bits(&linear_combination(&terms).unwrap()));
    assert_eq!(one, four);
}

#[test]
fn gradients_are_the_coefficients() {
    for count in 1..=5 {
        let vars: Vec<Var> = (0..count)
            .map(|i| Var::from_tensor(&normal(i, &[2, 3], DType::F64)).unwrap())
            .collect();
        let all: Vec<&Var> = vars.iter().collect();
        let worst = check_gradients(&all, || {
            let terms: Vec<_> = vars
                .iter()
                .enumerate()
                .map(|(i, v)| (0.5 - i as f64, v.as_tensor()))
                .collect();
            let sum = linear_combination(&terms).unwrap();
            sum.sqr().unwrap().sum_all().unwrap()
        });
        assert!(worst < 1e-7, "{count} terms: {worst}");
        let worst = check_gradients(&all, || {
            let rows: Vec<[f64; 2]> = (0..count).map(|i| [0.5 - i as f64, i as f64]).collect();
            let vars = vars.iter().map(|v| v.as_tensor());
            let terms: Vec<_> = rows.iter().map(<[f64; 2]>::as_slice).zip(vars).collect();
            let sum = row_combination(&terms).unwrap();
            sum.sqr().unwrap().sum_all().unwrap()
        });
        assert!(worst < 1e-7, "{count} terms by row: {worst}");
    }
}

/// Views, half precision, nothing at all.
#[test]
fn what_has_no_kernel_is_summed_all_the_same() {
    let x = normal(1, &[4, 6], DType::F32);
    let views = (x.t().unwrap(), x.narrow(1, 1, 4).unwrap().t().unwrap());
    let found = linear_combination(&[(2.0, &views.0.narrow(0, 1, 4).unwrap()), (-2.0, &views.1)]);
    assert!(values(&found.unwrap()).iter().all(|v| *v == 0.0));

    let half = x.to_dtype(DType::F16).unwrap();
    let found = linear_combination(&[(0.5, &half), (0.5, &half)]).unwrap();
    assert_eq!(found.dtype(), DType::F16);
    assert_eq!(values(&found), values(&half));

    let empty = Tensor::zeros((0, 3), DType::F32, &Device::Cpu).unwrap();
    let found = linear_combination(&[(1.0, &empty), (2.0, &empty), (3.0, &empty)]).unwrap();
    assert_eq!(found.dims(), [0, 3]);
}

#[test]
fn what_does_not_fit_is_an_error() {
    let x = normal(1, &[4, 6], DType::F32);
    let y = normal(1, &[4, 5], DType::F32);
    assert_says(
        linear_combination(&[]),
        &["number of terms", "at least one"],
    );
    assert_says(
        linear_combination(&[(1.0, &x), (1.0, &y)]),
        &["[4, 5]", "[4, 6]"],
    );
    assert_says(
        row_combination(&[(&[1.0], &x)]),
        &["coefficients = 1", "4, one per row"],
    );
    let wide = x.to_dtype(DType::F64).unwrap();
    assert!(linear_combination(&[(1.0, &x), (1.0, &wide)]).is_err());
}

use crate::support::*;
use candle_core::{DType, Device, Tensor, Var};
use nn::masked::{masked_log_prob, Wanted};
use nn::RandomStream;

/// A mask with at least one possible entry in each row, and a possible entry of each.
fn mask(rng: &mut RandomStream, n: usize, width: usize) -> (Vec<bool>, Vec<u32>) {
    let (mut mask, mut actions) = (vec![], vec![]);
    for _ in 0..n {
        let action = rng.below(width).unwrap();
        mask.extend((0..width).map(|j| j == action || rng.next_uniform() < 0.6));
        actions.push(action as u32);
    }
    (mask, actions)
}

/// Rows side by side, the last block not full, widths around the blocks of the sum: all against the
/// definition in f64.
#[test]
fn masked_log_probabilities_are_those_of_the_definition() {
    for (n, width, scale) in [(1, 1, 1.0), (37, 9, 30.0), (16, 600, 3.0), (3000, 7, 1.0)] {
        let mut rng = RandomStream::new(3).split_index("width", width as u64);
        let (mask, actions) = mask(&mut rng, n, width);
        let logits = rng
            .normal(0.0, scale, (n, width), DType::F64, &Device::Cpu)
            .unwrap();
        for (dtype, tolerance) in [(DType::F64, 1e-13), (DType::F32, 3e-6)] {
            let x = logits.to_dtype(dtype).unwrap();
            let rows = x.to_dtype(DType::F64).unwrap().to_vec2::<f64>().unwrap();
            for wanted in [Wanted::Action(actions.clone()), Wanted::Mean] {
                let found = masked_log_prob(&x, &mask, &wanted).unwrap();
                let found = found
                    .to_dtype(DType::F64)
                    .unwrap()
                    .to_vec1::<f64>()
                    .unwrap();
                for (i, found) in found.iter().enumerate() {
                    let possible: Vec<f64> = (0..width)
                        .filter(|j| mask[i * width + j])
                        .map(|j| rows[i][j])
                        .collect();
                    let log_sum = possible.iter().map(|x| x.exp()).sum::<f64>().ln();
                    let picked = match &wanted {
                        Wanted::Action(a) => rows[i][a[i] as usize],
                        Wanted::Mean => possible.iter().sum::<f64>() / possible.len() as f64,
                    };
                    let expected = picked - log_sum;
                    assert!(
                        (found - expected).abs() < tolerance * (1.0 + expected.abs()),
                        "{found} {expected}"
                    );
                }
            }
        }
    }
}

#[test]
fn their_gradients_are_those_of_differences_and_of_candle() {
    let mut rng = RandomStream::new(4);
    let (mask, actions) = mask(&mut rng, 20, 5);
    let logits = rng
        .normal(0.0, 2.0, (20, 5), DType::F64, &Device::Cpu)
        .unwrap();
    let weights = rng.normal(0.0, 1.0, 20, DType::F64, &Device::Cpu).unwrap();
    for wanted in [Wanted::Action(actions), Wanted::Mean] {
        let x = Var::from_tensor(&logits).unwrap();
        let loss = || {
            let log_p = masked_log_prob(&x, &mask, &wanted).unwrap();
            (log_p * &weights).unwrap().sum_all().unwrap()
        };
        assert!(check_gradients(&[&x], loss) < 1e-8);

        let y = Var::from_tensor(&logits.to_dtype(DType::F32).unwrap()).unwrap();
        let log_p = masked_log_prob(&y, &mask, &wanted).unwrap();
        let weighted = (log_p * weights.to_dtype(DType::F32).unwrap()).unwrap();
        let grads = weighted.sum_all().unwrap().backward().unwrap();
        let exact = loss().backward().unwrap();
        let (a, b) = (
            values(grads.get(&y).unwrap()),
            values(exact.get(&x).unwrap()),
        );
        assert!(a
            .iter()
            .zip(&b)
            .all(|(a, b)| (a - b).abs() < 1e-5 * (1.0 + b.abs())));
    }
}

#[test]
fn half_precision_takes_candle_operations() {
    let logits = Tensor::new(&[[1.0f32, 2.0, 3.0], [0.5, 0.0, 7.0]], &Device::Cpu).unwrap();
    let mask = [true, true, false, true, true, false];
    for wanted in [Wanted::Action(vec![0, 1]), Wanted::Mean] {
        let exact = masked_log_prob(&logits, &mask, &wanted).unwrap();
        for dtype in [DType::F16, DType::BF16] {
            let x = logits.to_dtype(dtype).unwrap();
            let found = masked_log_prob(&x, &mask, &wanted).unwrap();
            assert_eq!(found.dtype(), dtype);
            assert!(distance(&found, &exact) < 0.01);
        }
    }
}

#[test]
fn threads_do_not_change_a_bit_of_masked_rows() {
    let mut rng = RandomStream::new(5);
    let (mask, actions) = mask(&mut rng, 9000, 9);
    let logits = rng
        .normal(0.0, 2.0, (9000, 9), DType::F32, &Device::Cpu)
        .unwrap();
    let run = |threads: usize| {
        with_threads(threads, || {
            let x = Var::from_tensor(&logits).unwrap();
            let y = masked_log_prob(&x, &mask, &Wanted::Action(actions.clone())).unwrap();
            let grads = y.sum_all().unwrap().backward().unwrap();
            (values(&y), values(grads.get(&x).unwrap()))
        })
    };
    assert_eq!(run(1), run(3));
}

#[test]
fn what_is_impossible_is_named() {
    let logits = Tensor::zeros((20, 3), DType::F32, &Device::Cpu).unwrap();
    let mut mask = vec![true; 60];
    mask[17 * 3..18 * 3].fill(false);
    let error = masked_log_prob(&logits, &mask, &Wanted::Mean).unwrap_err();
    assert_eq!(error.to_string(), "row 17: no entry is possible");
    for action in [1, 3] {
        let mut actions = vec![0; 20];
        actions[17] = 1;
        actions[4] = action;
        let mut mask = mask.clone();
        mask[4 * 3 + 1] = false;
        let error = masked_log_prob(&logits, &mask, &Wanted::Action(actions)).unwrap_err();
        let expected = format!("row 4: entry {action} is wanted and impossible");
        assert_eq!(error.to_string(), expected);
    }
    assert!(masked_log_prob(&logits, &mask[1..], &Wanted::Mean).is_err());
    let none = |n| Tensor::zeros((n, 0), DType::F32, &Device::Cpu).unwrap();
    assert!(masked_log_prob(&none(2), &[], &Wanted::Mean).is_err());
    assert!(masked_log_prob(&none(2), &[], &Wanted::Action(vec![0; 2])).is_err());
    assert_eq!(
        masked_log_prob(&none(0), &[], &Wanted::Mean)
            .unwrap()
            .dims(),
        [0]
    );
    assert!(masked_log_prob(&logits, &mask, &Wanted::Action(vec![0; 19])).is_err());
}

use crate::support::*;
use candle_core::{DType, Device, Tensor};
use proptest::prelude::*;
use sequence_design::gflownet::order::{compare_pairs, pair_order_loss, set_order_loss};
use sequence_design::gflownet::pareto::pareto_mask;
use sequence_design::RandomStream;

proptest! {
    #![proptest_config(cases(64))]

    /// A monotone transform of the scores and a constant in the log reward change nothing.
    #[test]
    fn only_the_order_counts(seed in 0u64..1000, shift in -5.0..5.0f64) {
        let b = 9;
        let mut rng = RandomStream::new(seed);
        let scores: Vec<f64> = (0..b).map(|_| rng.below(5).unwrap() as f64).collect();
        let perm = rng.permutation(b).unwrap();
        let orders = compare_pairs(&scores, &perm);
        let moved: Vec<f64> = scores.iter().map(|s| (0.7 * s).exp() - 3.0).collect();
        prop_assert_eq!(&orders, &compare_pairs(&moved, &perm));
        let l = normal(seed, &[b], DType::F64);
        let loss = |l: &Tensor| values(&pair_order_loss(l, &perm, &orders, None).unwrap())[0];
        let shifted = l.affine(1.0, shift).unwrap();
        prop_assert!((loss(&l) - loss(&shifted)).abs() < 1e-12);
        let points: Vec<Vec<f64>> = scores.iter().map(|s| vec![*s]).collect();
        let mask = pareto_mask(&points);
        let set = |l: &Tensor| values(&set_order_loss(l, &mask).unwrap())[0];
        prop_assert!((set(&l) - set(&shifted)).abs() < 1e-12);
    }

    /// The loss over all pairs approaches its lower bound only along rewards that keep the order.
    #[test]
    fn the_loss_is_smallest_where_the_order_is_kept(seed in 0u64..1000) {
        let b = 6;
        let scores: Vec<f64> = RandomStream::new(seed).permutation(b).unwrap().iter().map(|x| f64::from(*x)).collect();
        let total = |l: &[f64]| {
            let l = Tensor::new(l, &Device::Cpu).unwrap();
            let mut sum = 0.0;
            for shift in 1..b as u32 {
                let perm: Vec<u32> = (0..b as u32).map(|i| (i + shift) % b as u32).collect();
                let orders = compare_pairs(&scores, &perm);
                sum += values(&pair_order_loss(&l, &perm, &orders, None).unwrap())[0];
            }
            sum
        };
        let kept: Vec<f64> = scores.iter().map(|s| 40.0 * s).collect();
        prop_assert!(total(&kept) < 1e-12);
        let mut swapped = kept.clone();
        swapped.swap(0, 1);
        prop_assert!(total(&swapped) > 1.0);
    }
}

use proptest::prelude::*;
use thalweg_benchmark::statistics::{bootstrap, deviation, mean, quantile};

#[test]
fn hand_computed() {
    assert_eq!(mean(&[1.0, 2.0, 6.0]), 3.0);
    assert_eq!(deviation(&[1.0, 3.0]), 2.0_f64.sqrt());
    assert_eq!(deviation(&[5.0]), 0.0);
    assert_eq!(quantile(&[4.0, 1.0, 3.0, 2.0], 0.5), 2.5);
    assert_eq!(quantile(&[4.0, 1.0, 3.0, 2.0], 0.0), 1.0);
    assert_eq!(quantile(&[0.0, 10.0], 0.975), 9.75);
    assert_eq!(
        quantile(&[f64::INFINITY, f64::INFINITY], 0.5),
        f64::INFINITY
    );
    assert!(quantile(&[], 0.5).is_nan() && mean(&[]).is_nan());
}

/// With two seeds a resample has mean a, (a + b) / 2 or b with chances 1/4, 1/2, 1/4, so both
/// 2.5 % quantiles are the ends.
#[test]
fn two_seeds_give_the_ends() {
    let values = [1.0, 3.0];
    let i = bootstrap(2, "two", |s| {
        mean(&s.iter().map(|i| values[*i]).collect::<Vec<_>>())
    });
    assert_eq!((i.low, i.mean, i.high), (1.0, 2.0, 3.0));
}

/// With values 0, 0, 0, 0, 5 the resampled mean is the number of draws of the last seed, binomial
/// with n = 5 and p = 1/5: P(0) = 0.328, P(<= 2) = 0.942, P(<= 3) = 0.993. The 2.5 % quantile is
/// therefore 0 and the 97.5 % quantile 3.
#[test]
fn five_seeds_against_the_binomial() {
    let values = [0.0, 0.0, 0.0, 0.0, 5.0];
    let i = bootstrap(5, "five", |s| {
        mean(&s.iter().map(|i| values[*i]).collect::<Vec<_>>())
    });
    assert_eq!((i.low, i.mean, i.high), (0.0, 1.0, 3.0));
}

#[test]
fn one_seed_has_no_spread_and_labels_fix_the_draws() {
    let i = bootstrap(1, "one", |s| 7.0 + s[0] as f64);
    assert_eq!((i.low, i.mean, i.high), (7.0, 7.0, 7.0));
    let values: Vec<f64> = (0..9).map(|i| (i as f64).sin()).collect();
    let go = |label| bootstrap(9, label, |s| s.iter().map(|i| values[*i]).sum());
    assert_eq!(go("x"), go("x"));
    assert_ne!(go("x"), go("y"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// The interval of a mean lies between the extremes, contains no more than they do, and moves
    /// with a shift of all values.
    #[test]
    fn interval_of_a_mean(values in prop::collection::vec(-100.0..100.0_f64, 2..8), shift in -5.0..5.0_f64) {
        let n = values.len();
        let go = |add: f64| bootstrap(n, "p", |s| mean(&s.iter().map(|i| values[*i] + add).collect::<Vec<_>>()));
        let (plain, moved) = (go(0.0), go(shift));
        let (low, high) = (quantile(&values, 0.0), quantile(&values, 1.0));
        prop_assert!(low - 1e-9 <= plain.low && plain.low <= plain.high && plain.high <= high + 1e-9);
        prop_assert!((moved.low - plain.low - shift).abs() < 1e-9);
        prop_assert!((moved.high - plain.high - shift).abs() < 1e-9);
    }
}

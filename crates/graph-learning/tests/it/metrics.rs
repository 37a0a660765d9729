use crate::support::*;
use graph_learning::metrics::*;
use graph_learning::RandomStream;
use proptest::prelude::*;

#[test]
fn known_values() {
    let scores = [0.9, 0.8, 0.8, 0.3];
    let positive = [true, true, false, false];
    // Pairs: 1, 1, 0.5, 1 of 4.
    assert_eq!(roc_auc(&scores, &positive).unwrap(), 3.5 / 4.0);
    // Thresholds 0.9 (1 of 1) and 0.8 (2 of 3).
    assert_eq!(
        average_precision(&scores, &positive).unwrap(),
        0.5 + 0.5 * 2.0 / 3.0
    );
    let a = [0, 0, 1, 1];
    assert_eq!(
        normalized_mutual_information(&a, &[5, 5, 2, 2]).unwrap(),
        1.0
    );
    assert_eq!(adjusted_rand_index(&a, &[5, 5, 2, 2]).unwrap(), 1.0);
    assert!(
        normalized_mutual_information(&a, &[0, 1, 0, 1])
            .unwrap()
            .abs()
            < 1e-12
    );
    assert!((adjusted_rand_index(&a, &[0, 1, 0, 1]).unwrap() + 0.5).abs() < 1e-12);
}

proptest! {
    #![proptest_config(cases(64))]

    /// Against the definition, over all pairs.
    #[test]
    fn the_area_counts_pairs(list in prop::collection::vec((0u8..5, any::<bool>()), 2..30)) {
        let scores: Vec<f64> = list.iter().map(|(s, _)| f64::from(*s)).collect();
        let positive: Vec<bool> = list.iter().map(|(_, p)| *p).collect();
        let (mut won, mut pairs) = (0.0, 0.0);
        for (a, p) in scores.iter().zip(&positive) {
            for (b, q) in scores.iter().zip(&positive) {
                if *p && !q {
                    pairs += 1.0;
                    won += if a > b { 1.0 } else if a == b { 0.5 } else { 0.0 };
                }
            }
        }
        match roc_auc(&scores, &positive) {
            Ok(area) => prop_assert!((area - won / pairs).abs() < 1e-12),
            Err(_) => prop_assert_eq!(pairs, 0.0),
        }
    }

    /// Both are symmetric, blind to names, and at most 1.
    #[test]
    fn clusterings_compare_by_their_groups(list in prop::collection::vec((0u32..4, 0u32..4), 1..30)) {
        let (a, b): (Vec<u32>, Vec<u32>) = list.into_iter().unzip();
        let renamed: Vec<u32> = a.iter().map(|x| 9 - x).collect();
        for f in [normalized_mutual_information, adjusted_rand_index] {
            let value = f(&a, &b).unwrap();
            prop_assert!(value <= 1.0 + 1e-12);
            prop_assert!((f(&b, &a).unwrap() - value).abs() < 1e-12);
            prop_assert!((f(&renamed, &b).unwrap() - value).abs() < 1e-12);
            prop_assert!((f(&a, &renamed).unwrap() - 1.0).abs() < 1e-12);
        }
    }
}

#[test]
fn separated_clouds_are_found() {
    let mut rng = RandomStream::new(3);
    let centers = [[0.0, 0.0], [8.0, 0.0], [0.0, 8.0]];
    let mut rows = Vec::new();
    for i in 0..60 {
        let c = centers[i % 3];
        rows.extend([c[0] + rng.next_normal(), c[1] + rng.next_normal()]);
    }
    let found = kmeans(&rows, 2, 3, 10, &mut rng).unwrap();
    let truth: Vec<u32> = (0..60).map(|i| i % 3).collect();
    assert_eq!(adjusted_rand_index(&found.labels, &truth).unwrap(), 1.0);
    let again = kmeans(&rows, 2, 3, 10, &mut RandomStream::new(3)).unwrap();
    let other = kmeans(&rows, 2, 3, 10, &mut RandomStream::new(3)).unwrap();
    assert_eq!(again, other);
    // More clusters than distinct rows: still every row has one, and nothing is NaN.
    let flat = kmeans(&[1.0; 8], 2, 3, 2, &mut rng).unwrap();
    assert_eq!((flat.labels.len(), flat.inertia), (4, 0.0));
}

#[test]
fn bad_input_is_named() {
    assert_says(roc_auc(&[1.0], &[true]), &["both kinds"]);
    assert_says(roc_auc(&[1.0, f64::NAN], &[true, false]), &["NaN"]);
    assert_says(average_precision(&[1.0], &[true, false]), &["labels"]);
    assert_says(normalized_mutual_information(&[], &[]), &["at least 1"]);
    let rng = &mut RandomStream::new(0);
    assert_says(kmeans(&[1.0, 2.0, 3.0], 2, 1, 1, rng), &["divisor"]);
    assert_says(kmeans(&[1.0, 2.0], 1, 3, 1, rng), &["k = 3"]);
    assert_says(kmeans(&[1.0, f64::NAN], 1, 1, 1, rng), &["NaN"]);
}

use proptest::prelude::*;
use thalweg_datasets::split::{split, split_stratified, stratified_sample};
use thalweg_datasets::{digits, Error, RandomStream, Sizes};

fn sorted(parts: &[Vec<u32>]) -> Vec<u32> {
    let mut all: Vec<u32> = parts.iter().flatten().copied().collect();
    all.sort_unstable();
    all
}

#[test]
fn parts_are_disjoint_seeded_and_of_the_right_size() {
    let sizes = Sizes::Fractions(&[0.7, 0.2, 0.1]);
    let parts = split(1797, sizes, &mut RandomStream::new(1)).unwrap();
    let lengths: Vec<usize> = parts.iter().map(Vec::len).collect();
    assert_eq!(lengths, [1258, 359, 180]);
    assert_eq!(sorted(&parts), (0..1797).collect::<Vec<u32>>());
    assert_eq!(
        parts,
        split(1797, sizes, &mut RandomStream::new(1)).unwrap()
    );
    assert_ne!(
        parts,
        split(1797, sizes, &mut RandomStream::new(2)).unwrap()
    );
    let mut rng = RandomStream::new(1);
    assert_ne!(
        split(50, sizes, &mut rng).unwrap(),
        split(50, sizes, &mut rng).unwrap()
    );
}

#[test]
fn sizes_that_make_no_sense_are_refused() {
    let mut rng = RandomStream::new(0);
    for sizes in [
        Sizes::Counts(&[]),
        Sizes::Counts(&[6, 5]),
        Sizes::Counts(&[usize::MAX, 2]),
        Sizes::Fractions(&[]),
        Sizes::Fractions(&[0.8, 0.3]),
        Sizes::Fractions(&[-0.1, 0.5]),
        Sizes::Fractions(&[f64::NAN]),
    ] {
        let refused = split(10, sizes, &mut rng);
        assert!(
            matches!(refused, Err(Error::InvalidArgument { .. })),
            "{sizes:?}"
        );
    }
    assert!(split(usize::MAX, Sizes::Counts(&[1]), &mut rng).is_err());
    assert_eq!(
        split(0, Sizes::Fractions(&[1.0]), &mut rng).unwrap(),
        [Vec::<u32>::new()]
    );
}

#[test]
fn stratified_split_of_the_digits_keeps_the_shares() {
    let data = digits().unwrap();
    let mut rng = RandomStream::new(5);
    let parts = data
        .split_stratified(Sizes::Fractions(&[0.7, 0.3]), &mut rng)
        .unwrap();
    assert_eq!((parts[0].len(), parts[1].len()), (1258, 539));
    let counts = data.class_counts().unwrap();
    for (part, share) in parts.iter().zip([0.7, 0.3]) {
        for (n, m) in counts.iter().zip(part.class_counts().unwrap()) {
            assert!((*n as f64 * share - m as f64).abs() < 1.5, "{n} {m}");
        }
    }
}

#[test]
fn stratified_sample_takes_the_same_number_of_each_class() {
    let data = digits().unwrap();
    let labels = data.label_vec().unwrap();
    let mut rng = RandomStream::new(5);
    let sample = stratified_sample(&labels, 3, &mut rng).unwrap();
    assert_eq!(
        data.select(&sample).unwrap().class_counts().unwrap(),
        [3; 10]
    );
    let refused = stratified_sample(&labels, 175, &mut rng).unwrap_err();
    let text = "per_class = 175: expected at most 174, the size of class 8";
    assert_eq!(refused.to_string(), text);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..Default::default() })]

    #[test]
    fn every_stratified_part_is_proportional(
        labels in prop::collection::vec(0u32..6, 1..200),
        first in 0.0f64..1.0,
        seed in 0u64..1000,
    ) {
        let sizes = Sizes::Fractions(&[first, 1.0 - first]);
        let counts = sizes.counts(labels.len()).unwrap();
        prop_assert_eq!(counts.iter().sum::<usize>(), labels.len());
        let mut rng = RandomStream::new(seed);
        let parts = split_stratified(&labels, sizes, &mut rng).unwrap();
        prop_assert_eq!(parts.iter().map(Vec::len).collect::<Vec<_>>(), counts.clone());
        prop_assert_eq!(sorted(&parts), (0..labels.len() as u32).collect::<Vec<_>>());
        for class in 0..6 {
            let total = labels.iter().filter(|y| **y == class).count() as f64;
            for (part, count) in parts.iter().zip(&counts) {
                let here = part.iter().filter(|i| labels[**i as usize] == class).count() as f64;
                let quota = total * *count as f64 / labels.len() as f64;
                prop_assert!((here - quota).abs() < 1.0 + 1e-9);
            }
        }
    }
}

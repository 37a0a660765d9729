use std::collections::HashMap;
use thalweg_datasets::generate::binding_table;
use thalweg_datasets::load::tfbind::LENGTH;
use thalweg_datasets::RandomStream;

fn number(sequence: &[u8; LENGTH]) -> usize {
    sequence.iter().fold(0, |k, c| 4 * k + usize::from(*c))
}

/// Scores by the number of the sequence in base 4.
fn scores(seed: u64) -> Vec<f64> {
    let table = binding_table(&mut RandomStream::new(seed)).unwrap();
    let by: HashMap<usize, f64> = table
        .sequences
        .iter()
        .map(number)
        .zip(table.scores)
        .collect();
    assert_eq!(by.len(), 1 << 16);
    (0..1 << 16).map(|k| by[&k]).collect()
}

/// Sequences with one other letter.
fn neighbors(k: usize) -> impl Iterator<Item = usize> {
    (0..LENGTH).flat_map(move |i| (1..4).map(move |d| k ^ d << (2 * i)))
}

fn correlation(a: &[f64], b: &[f64]) -> f64 {
    let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
    let (ma, mb) = (mean(a), mean(b));
    let sum = |f: &dyn Fn(f64, f64) -> f64| -> f64 {
        a.iter().zip(b).map(|(x, y)| f(x - ma, y - mb)).sum()
    };
    sum(&|x, y| x * y) / (sum(&|x, _| x * x) * sum(&|_, y| y * y)).sqrt()
}

/// What is asked of the made-up tables are the ranges that measured ones have: of nine factors
/// (Barrera et al., Science 2016; the first replicates of HOXD13, PAX4, CRX, EGR2, POU4F3, GFI1,
/// NR1H4, VSX2 and SIX6), widened by a tenth.
#[test]
fn made_up_tables_have_the_shape_of_measured_ones() {
    for seed in 0..3 {
        let s = scores(seed);
        let within = |what: &str, value: f64, low: f64, high: f64| {
            let holds = (0.9 * low..=1.1 * high).contains(&value);
            assert!(
                holds,
                "seed {seed}: {what} = {value}, measured {low} to {high}"
            );
        };
        let mut sorted = s.clone();
        sorted.sort_by(f64::total_cmp);
        let quantile = |q: f64| sorted[(q * 65_535.0) as usize];
        within("the 0.05 quantile", quantile(0.05), 0.185, 0.249);
        within("the median", quantile(0.5), 0.409, 0.467);
        within("the 0.95 quantile", quantile(0.95), 0.754, 0.807);
        within("the best of the lowest 5000", sorted[4999], 0.211, 0.271);
        let above = sorted.iter().filter(|s| **s > 0.9).count();
        within("scores above 0.9", above as f64, 781.0, 1124.0);

        let pairs: Vec<(f64, f64)> = (0..s.len())
            .flat_map(|k| neighbors(k).map(move |j| (k, j)))
            .map(|(k, j)| (s[k], s[j]))
            .collect();
        let (a, b): (Vec<f64>, Vec<f64>) = pairs.into_iter().unzip();
        within(
            "correlation of neighbors",
            correlation(&a, &b),
            0.344,
            0.635,
        );
        let shifted: Vec<f64> = (0..s.len())
            .map(|k| s[k * 4 % 65_536 + k / 16_384])
            .collect();
        within(
            "correlation with the shift by a letter",
            correlation(&s, &shifted),
            0.574,
            0.81,
        );
        let peak = |k: &usize| neighbors(*k).all(|j| s[j] <= s[*k]);
        let high = (0..s.len()).filter(|k| s[*k] > 0.7).filter(peak).count();
        within("local maxima above 0.7", high as f64, 56.0, 305.0);
    }
}

#[test]
fn strands_share_their_score_and_seeds_decide() {
    let s = scores(1);
    let other = |k: usize| (0..LENGTH).fold(0, |r, i| 4 * r + (3 - (k >> (2 * i) & 3)));
    assert!((0..s.len()).all(|k| s[k] == s[other(k)]));
    assert_eq!(s, scores(1));
    assert_ne!(s, scores(2));
}
